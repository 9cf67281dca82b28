"""Laws of the corpus builder, on packages made here: no test but the last needs the network."""

import email
import io
import json
import tarfile
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.data import local, packages
from glm45_jax.data.changelogs import entries, release_diff, section
from glm45_jax.data.commits import parse_commit
from glm45_jax.data.gather import KINDS, Piece, pieces
from glm45_jax.data.packages import (
    Code,
    Docs,
    Fetched,
    MissingError,
    Patches,
    Releases,
    Wheel,
    debian_licence,
    members,
    part_name,
)
from glm45_jax.data.reading import DroppedError, Ledger
from glm45_jax.data.roff import man_text
from tests.data.common import run

WORDS = "This is a sentence of the documentation, long enough to be worth reading. "
COPYRIGHT = "Format: x\n\nFiles: debian/*\nLicense: GPL-2+\n\nFiles: *\nLicense: MIT\n text\n"
CHANGES = """tool (2.0-1) unstable; urgency=low

  * New upstream release.
    + With two lines.

 -- Ann Author <ann@example.org>  Mon, 06 May 2024 07:08:09 +0000

tool (1.0-1) unstable; urgency=low

  * First one.

 -- Ann Author <ann@example.org>  Sun, 05 May 2024 07:08:09 +0000
"""
MAN = ".TH TOOL 1\n.SH NAME\ntool \\- does it\n.SH OPTIONS\n.TP\n.B \\-v\n" + WORDS * 4
PATCH = """Description: Stop the leak
 It lost a page every time.
Author: Ann Author <ann@example.org>

--- a/tool.c
+++ b/tool.c
@@ -1 +1 @@
-leak();
+keep();
"""
DOCS = {
    "usr/share/doc/tool/copyright": COPYRIGHT,
    "usr/share/doc/tool/changelog.Debian": CHANGES,
    "usr/share/doc/tool/html/en/a.html": f"<h1>Tool</h1><p>{WORDS}</p>",
    "usr/share/doc/tool/html/de/a.html": f"<h1>Werkzeug</h1><p>Satz. {WORDS}</p>",
    "usr/share/doc/tool/html/de/broken.html": "",
    "usr/share/man/man1/tool.1": MAN,
    "usr/share/man/fr/man1/tool.1": MAN.replace("does it", "le fait"),
    "usr/share/man/fr/man1/other.1": ".so man1/tool.1\n",
    "usr/share/doc/tool/logo.png": "PNG",
}
CODE = {
    "usr/share/doc/code/copyright": COPYRIGHT,
    "usr/src/code/main.py": "import helper\n\nprint(helper.value)\n",
    "usr/src/code/helper.py": "value = 1\n",
    "usr/src/code/data.bin": "01",
    "usr/share/elsewhere.py": "x = 1\n",
}


def tar(files, mode="w:xz"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def deb(files):
    out = b"!<arch>\n"
    data = tar({f"./{name}": text for name, text in files.items()})
    for name, part in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"xyz"),
        ("data.tar.xz", data),
    ):
        out += f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(part):<10}`\n".encode()
        out += part + b"\n" * (len(part) % 2)
    return out


def wheel(name, version, files, description=""):
    message = email.message.EmailMessage()
    for key, value in (
        ("Name", name),
        ("Version", version),
        ("License-Expression", "BSD-3-Clause"),
    ):
        message[key] = value
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:  # ZipInfo: of 1980, not of now
        for path, text in files.items():
            archive.writestr(zipfile.ZipInfo(path), text)
        head = message.as_string().rstrip("\n")
        meta = zipfile.ZipInfo(f"{name}-{version}.dist-info/METADATA")
        archive.writestr(meta, f"{head}\n\n{description}")
    return out.getvalue()


RELEASES = Releases("rel", ("1.0", "1.1", "1.2"))
PACKAGES = (
    Docs("tool", "2.0-1", language_after="html"),
    Code("code", "1", root="usr/src/code"),
    Patches("src", "3-1"),
    Wheel("wheel", "1.0"),
    RELEASES,
)
LIST = (
    "rel\n===\n\n1.1 (2024-01-01)\n----------------\n\n- The answer is right.\n\n1.0\n---\n\n- x\n"
)


def archive_of(package):
    """The archive of one of PACKAGES, and its name."""
    if isinstance(package, Docs):
        return deb(DOCS), f"{package.name}_{package.version}_all.deb"
    if isinstance(package, Code):
        return deb(CODE), f"{package.name}_{package.version}_all.deb"
    if isinstance(package, Patches):
        files = {"debian/copyright": COPYRIGHT, "debian/patches/leak.patch": PATCH}
        files["debian/patches/silent.patch"] = PATCH[PATCH.index("---") :]
        return tar(files), f"{package.name}_{package.version}.debian.tar.xz"
    value = {"1.0": "41", "1.1": "42", "1.2": "43"}[package.version]
    files = {f"{package.name}/a.py": f"answer = {value}\n", f"{package.name}/b.txt": "text"}
    data = wheel(package.name, package.version, files, LIST)
    return data, f"{package.name}-{package.version}-py3-none-any.whl"


class Registry:
    """Stands for apt-get and pip: `run` as in `packages`; calls: what was asked for."""

    def __init__(self, without=(), away=()):
        self.calls, self.without, self.away = [], without, away

    def __call__(self, command, folder):
        name, _, version = command[-1].replace("==", "=").partition("=")
        self.calls.append(command[-1])
        if any(word in command for word in self.away):
            raise MissingError("Could not resolve the host", unreachable=True)
        if command[-1] in self.without:
            raise MissingError(f"E: {command[-1]} was not found")
        package = next(p for p in PACKAGES if p.name == name)
        kind = Wheel if isinstance(package, Releases) else type(package)
        data, file = archive_of(kind(name, version or "1.0", *([CODE] if kind is Code else [])))
        (folder / file).write_bytes(data)


@pytest.fixture
def registry(monkeypatch):
    def use(**options):
        found = Registry(**options)
        monkeypatch.setattr(packages, "run", found)
        return found

    def machine(ledger, pinned=frozenset()):
        meta = {"repo": "here", "licence": "PSF-2.0", "version": ""}
        yield Piece("prose", "a.txt", WORDS, meta)
        yield Piece("code", "here.py", "here = 1\n", meta)

    monkeypatch.setattr(packages, "_apt", lambda cache: ["apt-get"])
    monkeypatch.setattr(local, "installed_docs", lambda ledger, pinned: iter(()))
    monkeypatch.setattr(local, "installed_python", machine)
    return use


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "downloads" not in path.parts
    }


def test_a_corpus_comes_out_as_sources_by_kind_with_the_licence_of_each_package(tmp_path, registry):
    registry()
    manifest = local.build(tmp_path, PACKAGES)
    found = {source.name: run(source)[0] for source in local.sources(tmp_path)}
    assert list(found) == list(KINDS) and not manifest["missing"]
    assert [doc.id for doc in found["web"]] == ["tool/usr/share/doc/tool/html/en/a.html"]
    (german,) = found["web_multilingual"]  # the broken page is counted by `HtmlText`
    assert german.meta["language"] == "de" and german.text.startswith("Werkzeug\n")
    (french,) = found["multilingual"]
    assert french.meta["language"] == "fr" and "tool - le fait" in french.text
    assert [doc.text for doc in found["changelogs"]] == [
        "* New upstream release.\n  + With two lines.",
        "* First one.",
    ]
    assert {doc.id: doc.meta["licence"] for doc in found["commits"]} == {
        "rel/1.1.patch#0": "BSD-3-Clause",
        "src/debian/patches/leak.patch#0": "MIT",
    }
    release, leak = sorted(found["commits"], key=lambda doc: doc.id)
    assert release.text.startswith("1.1 (2024-01-01)\n\n- The answer is right.\n\n--- a/rel/a.py")
    assert "-answer = 41\n+answer = 42\n" in release.text and "Ann Author" not in leak.text
    code = {doc.meta["repo"]: doc for doc in found["code"]}
    assert code["code"].text.index("value = 1") < code["code"].text.index("import helper")
    assert {repo: doc.meta["licence"] for repo, doc in code.items()} == {
        **{"code": "MIT", "here": "PSF-2.0", "wheel": "BSD-3-Clause"}
    }
    assert all(doc.meta["licence"] and doc.meta["repo"] for docs in found.values() for doc in docs)


def test_the_manifest_adds_up_and_says_where_everything_is_from(tmp_path, registry):
    registry()
    manifest = local.build(tmp_path, PACKAGES)
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    for source in local.sources(tmp_path):
        docs, counts = run(source)
        total = manifest["totals"][source.name]
        if source.name != "code":
            assert total["documents"] == counts["records_in"]
            assert total["text_bytes"] == sum(len(doc.text.encode()) for doc in docs)
        assert sum(total["licences"].values()) == total["text_bytes"] <= total["bytes"]
    parts = {part["name"]: part for part in manifest["parts"]}
    assert [file["from"] for file in parts["docs-tool"]["files"]] == [
        "apt-get download tool=2.0-1",
    ]
    assert [file["version"] for file in parts["releases-rel"]["files"]] == ["1.0", "1.1", "1.2"]
    assert parts["docs-tool"]["left_out"] == {"dropped_short": 1}
    assert parts["code-code"]["left_out"] == {"dropped_other_kind": 1}
    assert parts["patches-src"]["left_out"]["commits_dropped_no_message"] == 1
    assert parts["releases-rel"]["left_out"]["dropped_no_section"] == 1  # of 1.2
    assert local.text_bytes(manifest) == sum(t["text_bytes"] for t in manifest["totals"].values())


def test_two_builds_are_the_same_byte_for_byte(tmp_path, registry):
    registry()
    first, second = tmp_path / "first", tmp_path / "second"
    assert local.build(first, PACKAGES) == local.build(second, PACKAGES)
    a, b = files_of(first), files_of(second)
    assert {name: data for name, (_, data) in a.items()} == {n: data for n, (_, data) in b.items()}
    versions = [[source.version() for source in local.sources(first)] for _ in range(2)]
    assert versions[0] == versions[1]


def test_what_is_done_is_not_done_again_and_a_killed_run_goes_on(tmp_path, registry, monkeypatch):
    asked = registry()
    write, written = local._write, []

    def killed(out, part):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(part.name)
        return write(out, part)

    monkeypatch.setattr(local, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        local.build(tmp_path, PACKAGES)
    assert written == ["installed-docs", "installed-python", "docs-tool"]
    (tmp_path / "web" / "half.writing").write_bytes(b"half")
    (tmp_path / "code" / "half").mkdir()
    before = files_of(tmp_path)
    monkeypatch.setattr(local, "_write", write)
    manifest = local.build(tmp_path, PACKAGES)
    after = files_of(tmp_path)
    assert all(after[name] == before[name] for name in before if "half" not in name)
    assert not [name for name in after if "half" in name]
    assert len(asked.calls) == len(set(asked.calls)) == 7  # everything downloaded once
    assert local.build(tmp_path, PACKAGES) == manifest and len(asked.calls) == 7
    again = files_of(tmp_path)
    assert {n: v for n, v in again.items() if n != "manifest.json"} == {
        n: v for n, v in after.items() if n != "manifest.json"
    }
    next((tmp_path / "web").glob("*.arrayrecord")).unlink()
    assert local.build(tmp_path, PACKAGES) == manifest  # a lost shard is written again
    assert {name: data for name, (_, data) in files_of(tmp_path).items()} == {
        name: data for name, (_, data) in after.items()
    }


def test_other_pins_take_the_place_of_old_ones(tmp_path, registry):
    registry()
    local.build(tmp_path, PACKAGES)
    manifest = local.build(tmp_path, PACKAGES[1:2])
    assert [part["name"] for part in manifest["parts"]][2:] == ["code-code"]
    assert [source.name for source in local.sources(tmp_path)] == ["prose", "code"]
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == ["code", "here"]


def test_a_registry_that_is_away_is_asked_once_and_what_is_missing_is_said(
    tmp_path, registry, monkeypatch, capsys
):
    asked = registry(away=("download",))
    monkeypatch.setattr(local, "PACKAGES", PACKAGES)
    arguments = ["--out", str(tmp_path), "--mb", "0.001"]
    assert local.main(arguments) == 1
    said = capsys.readouterr().out
    assert "missing (Debian could not be reached): code-code" in said
    assert "missing (PyPI could not be reached): releases-rel" in said
    assert "fewer than --mb 0.001" in said and "PSF-2.0" in said
    assert asked.calls == ["tool=2.0-1", "wheel==1.0"]
    assert [source.name for source in local.sources(tmp_path)] == ["prose", "code"]
    registry()
    assert local.main(arguments) == 0
    assert "missing" not in capsys.readouterr().out
    asked = registry(away=("download",))
    assert local.main([*arguments, "--offline"]) == 0 and not asked.calls


def test_a_version_that_is_gone_is_replaced_aloud_but_not_among_releases(tmp_path, registry):
    registry(without=("wheel==9.0", "rel==1.1"))
    manifest = local.build(tmp_path, (Wheel("wheel", "9.0"), RELEASES))
    assert manifest["missing"] == [{"name": "releases-rel", "why": "E: rel==1.1 was not found"}]
    assert manifest["parts"][-1]["files"][0]["version"] == "1.0"
    assert "not the pinned version: wheel-wheel 1.0" in local.report(manifest)


def test_a_folder_without_a_corpus_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"data\.local --out"):
        local.sources(tmp_path)


def test_archives_of_strangers_stay_in_their_place(tmp_path):
    hostile = {"../up.py": "x = 1", "/etc/root.py": "x = 1", "a\nb.py": "x = 1", "ok.py": "x = 1"}
    hostile["large.py"] = bytes(packages.MAX_MEMBER + 1)
    for name, data in (
        ("a_1_all.deb", deb(hostile)),
        ("a-1.whl", wheel("a", "1", hostile)),
        ("a_1.debian.tar.xz", tar(hostile)),
    ):
        path, ledger = tmp_path / name, Ledger("a")
        path.write_bytes(data)
        found = [inside for inside, _ in members(path, ledger) if "dist-info" not in inside]
        assert found[-1] == "ok.py" and not any(".." in p or p.startswith("/") for p in found)
        assert ledger.counts["dropped_too_large"] == 1 and ledger.counts["dropped_bad_path"] >= 1


def test_damaged_archives_and_bombs_are_refused_and_the_rest_is_built(
    tmp_path, registry, monkeypatch
):
    registry()
    good, name = archive_of(PACKAGES[0])
    for number, bad in enumerate(
        (
            b"",
            b"!<arch>\n",
            good[:400],
            good.replace(b"`\n", b"x\n").replace(b"4  ", b"no "),
            b"x" * 999,
        )
    ):
        path = tmp_path / f"{number}" / name
        path.parent.mkdir()
        path.write_bytes(bad)
        with pytest.raises(DroppedError):
            list(pieces(PACKAGES[0], [Fetched(path, "1", "", "")], Ledger("a")))
    monkeypatch.setattr(packages, "MAX_TOTAL", 500)
    manifest = local.build(tmp_path / "out", PACKAGES)
    assert {part["why"] for part in manifest["missing"]} == {"the archive is refused: bomb"}
    assert "docs-tool" in [part["name"] for part in manifest["missing"]]
    assert not list((tmp_path / "out").rglob("*.writing"))


def test_every_pin_is_there_once_and_can_be_told_apart():
    names = [part_name(package) for package in local.PACKAGES]
    assert len(set(names)) == len(names) > 80
    assert all(package.version for package in local.PACKAGES)


def test_debian_copyright_files_give_the_licence_of_most_files():
    assert debian_licence(COPYRIGHT) == "MIT"
    assert debian_licence("Format: x\n\nFiles: a\nLicense: A\n\nLicense: B\n text\n") == "A / B"
    assert debian_licence("See /usr/share/common-licenses/GPL-2.") == "GPL-2"
    assert debian_licence("It is in the public domain.") == "public-domain"
    assert debian_licence("All rights reserved.") == "UNKNOWN"


def test_manual_pages_keep_their_words_and_lose_their_markup():
    page = r"""'\" t
.\" a comment
.TH X 1
.SH "OPTIONS AND MORE"
First line
and \fBsecond\fR line, \(lqquoted\(rq.
.PP
.BR open (2)
is \- with \e and \[u00E4].
.TP
\fB\-v\fR
Says more.
.nf
  code  kept
.fi
.de Xx
.B lost
..
.if n \{\
.B lost too
.\}
"""
    assert man_text(page) == (
        "OPTIONS AND MORE\n\nFirst line and second line, “quoted”.\n\n"
        "open(2) is - with \\ and ä.\n\n-v\nSays more.\n      code  kept"
    )
    assert man_text(".so man1/x.1\n") == ""


@given(st.text(alphabet=".\\'\"fBRSHTPXx{}()[]*u0D8 \n\té", max_size=200))
def test_any_manual_page_gives_text_that_can_be_written(page):
    man_text(page).encode()


def test_change_logs_split_at_their_entries():
    assert [version for version, _ in entries(CHANGES)] == ["2.0-1", "1.0-1"]
    gnu = "2024-05-06  Ann  <a@b.c>\n\n\t* x.c (f): Fix.\n\n"
    gnu += "2024-05-05  Bo  <b@b.c>\n\n\t* y.c: Add.\n"
    assert [(date, entry.author, entry.message) for date, entry in entries(gnu)] == [
        ("2024-05-06", "Ann", "* x.c (f): Fix."),
        ("2024-05-05", "Bo", "* y.c: Add."),
    ]
    assert entries("Version 2 is better than version 1.\n") == []


@pytest.mark.parametrize("heading", ["1.1 (2024)\n----------", "## [1.1] - 2024", "# v1.1"])
def test_the_section_of_a_version_ends_at_the_next(heading):
    older = heading.replace("1.1", "1.0")
    text = f"Read me, 1.1 is out.\n\n{heading}\n\n- One.\n- Two.\n\n{older}\n\n- Old.\n"
    found = section(text, "1.1")
    assert found.startswith(("1.1", "[1.1]", "v1.1")) and found.endswith("\n\n- One.\n- Two.")
    assert section(text, "1.2") == ""


texts = st.text(alphabet="ab \n\r\f-+@\\", max_size=60)
trees = st.dictionaries(st.sampled_from(["a.py", "b/c.py", "d.md"]), texts)


@given(trees, trees)
def test_the_diff_of_two_releases_parses_to_the_files_that_differ(old, new):
    commit = parse_commit(f"Message\n\n{release_diff(old, new)}")
    changed = {path for path in {*old, *new} if (old.get(path) or "") != (new.get(path) or "")}
    assert commit.message == "Message" and {diff.path for diff in commit.diffs} == changed


@pytest.mark.net
def test_real_packages_come_from_the_registries(tmp_path):
    pins = {"dict-jargon", "bash", "flask"}
    manifest = local.build(tmp_path, tuple(p for p in local.PACKAGES if p.name in pins))
    assert not manifest["missing"]
    assert {"prose", "changelogs", "commits", "code"} <= manifest["totals"].keys()
