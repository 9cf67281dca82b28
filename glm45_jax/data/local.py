"""A corpus of real text from packages of pip and apt: `python -m glm45_jax.data.local --out DIR`.

Every package is one part: its documents go into ArrayRecord shards by kind (`gather.KINDS`), files
of repositories into a tree, and what came out, from where and under which licence, into a line of
`manifest.json`. A part that is done stays done, downloads are kept: a killed run goes on.
`sources(DIR)` reads the corpus. The texts are for training and tests here; mind the licences before
you pass on what you build from them.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from glm45_jax.data.files import ArrayRecords, Fields
from glm45_jax.data.gather import (
    GATHER_FORMAT,
    KINDS,
    Piece,
    debian_folders,
    installed_docs,
    installed_python,
    pieces,
    python_folders,
)
from glm45_jax.data.html import HtmlText
from glm45_jax.data.packages import (
    Code,
    Docs,
    Fetched,
    MissingError,
    Package,
    Patches,
    Releases,
    Wheel,
    fetch,
    part_name,
)
from glm45_jax.data.reading import DroppedError, Ledger
from glm45_jax.data.repositories import Repositories
from glm45_jax.data.shards import PAGES, PartWriter
from glm45_jax.data.sources import Source, SourceFile

log = logging.getLogger(__name__)

LOCAL_FORMAT = 1  # raise it when the same pieces give other shards
MAN = "4.18.1-1"
OFFICE = "4:7.4.7-1+deb12u14"

# Debian 12 and PyPI, November 2026. Where a version is not offered any more, the one that is comes.
PACKAGES: tuple[Package, ...] = (
    Docs("linux-doc-6.1", "6.1.192-2", language_after="translations"),
    Docs("debian-handbook", "11.20220922", language_after="html"),
    Docs("installation-guide-amd64", "20230508+deb12u1", language_after="installation-guide-amd64"),
    Docs("python3.11-doc", "3.11.2-6+deb12u9"),
    Docs("postgresql-doc-15", "15.20-0+deb12u1"),
    Docs("python-django-doc", "3:3.2.25-0+deb12u7"),
    Docs("sqlite3-doc", "3.40.1-2+deb12u2"),
    Docs("nodejs-doc", "18.20.4+dfsg-1~deb12u3"),
    Docs("git-doc", "1:2.39.5-0+deb12u3"),
    Docs("perl-doc", "5.36.0-7+deb12u4"),
    Docs("octave-doc", "7.3.0-2"),
    Docs("debian-policy", "4.6.2.0"),
    Docs("dict-foldoc", "20230119-1"),
    Docs("dict-jargon", "4.4.7-3.1"),
    Docs("dict-gcide", "0.48.5+nmu2"),
    Docs("manpages", "6.03-2"),
    Docs("manpages-dev", "6.03-2", licence="GPL-2+"),
    *(
        Docs(f"manpages-{code}", MAN)
        for code in "cs da de es fr it nl pt-br ro ru sv uk vi".split()
    ),
    Docs("manpages-hu", "1:4.18.1-1"),
    Docs("manpages-ja", "0.5.0.0.20221215+dfsg-1"),
    Docs("manpages-pl", "1:4.18.1-1"),
    Docs("manpages-tr", "2.0.6-2"),
    Docs("manpages-zh", "1.6.4.0-1"),
    *(
        Docs(f"libreoffice-help-{code}", OFFICE, language_after="help")
        for code in "de es fr ja pt ru zh-cn".split()
    ),
    Code("golang-1.19-src", "1.19.8-2", root="usr/share/go-1.19/src"),
    Code("rust-src", "1.63.0+dfsg1-2", root="usr/src/rustc-1.63.0/library"),
    Code("libeigen3-dev", "3.4.0-4", root="usr/include/eigen3"),
    Code("webpack", "5.75.0+dfsg+~cs17.16.14-1+deb12u1", root="usr/share/nodejs"),
    Code("newlib-source", "3.3.0-1.3+deb12u1", root="usr/src/newlib"),
    Patches("apache2", "2.4.68-1~deb12u1"),
    Patches("bash", "5.2.15-2"),
    Patches("busybox", "1.35.0-4+deb12u1"),
    Patches("cups", "2.4.2-3+deb12u9"),
    Patches("curl", "7.88.1-10+deb12u15"),
    Patches("emacs", "28.2+1-15+deb12u4"),
    Patches("exim4", "4.96-15+deb12u10"),
    Patches("ffmpeg", "5.1.9-0+deb12u1"),
    Patches("ghostscript", "10.0.0~dfsg-11+deb12u8"),
    Patches("git", "2.39.5-0+deb12u3"),
    Patches("glib2.0", "2.74.6-2+deb12u9"),
    Patches("glibc", "2.36-9+deb12u14"),
    Patches("grub2", "2.06-13+deb12u2"),
    Patches("gtk4", "4.8.3+ds-2+deb12u1"),
    Patches("krb5", "1.20.1-2+deb12u5"),
    Patches("libxml2", "2.9.14+dfsg-1.3~deb12u6"),
    Patches("linux", "6.1.176-1"),
    Patches("llvm-toolchain-14", "14.0.6-12"),
    Patches("openssh", "9.2p1-2+deb12u10"),
    Patches("perl", "5.36.0-7+deb12u3"),
    Patches("python3.11", "3.11.2-6+deb12u8"),
    Patches("qemu", "7.2+dfsg-7+deb12u18"),
    Patches("qtbase-opensource-src", "5.15.8+dfsg-11+deb12u3"),
    Patches("ruby3.1", "3.1.2-7+deb12u1"),
    Patches("samba", "4.17.12+dfsg-0+deb12u4"),
    Patches("systemd", "252.39-1~deb12u2"),
    Patches("vim", "9.0.1378-2+deb12u2"),
    Wheel("sympy", "1.14.0"),
    Wheel("networkx", "3.7"),
    Wheel("django", "6.1.3"),
    Wheel("sphinx", "9.1.1"),
    Wheel("docutils", "0.23"),
    Wheel("pygments", "2.21.0"),
    Wheel("flask", "3.1.3"),
    Wheel("rich", "15.0.0"),
    Wheel("pytest", "9.2.0"),
    Wheel("hypothesis", "6.170.17"),
    Wheel("scrapy", "2.19.0"),
    Wheel("fastapi", "0.165.0"),
    Releases("webob", ("1.8.6", "1.8.7", "1.8.8", "1.8.9", "1.8.10", "1.8.11")),
    Releases("waitress", ("2.0.0", "2.1.0", "2.1.1", "2.1.2", "3.0.0", "3.0.1", "3.0.2")),
    Releases("transaction", ("3.0.0", "3.0.1", "3.1.0", "4.0", "5.0", "5.1")),
    Releases("zope.schema", ("6.2.1", "7.0.0", "7.0.1", "7.1", "8.0", "8.1")),
    Releases("zope.component", ("5.0.0", "5.0.1", "5.1.0", "6.0", "6.1", "7.0", "7.1")),
    Releases("zope.configuration", ("4.4.1", "5.0", "5.0.1", "6.0", "7.0", "7.1")),
    Releases(
        "zope.testrunner", ("6.7", "7.0", "7.1", "7.2", "7.3", "7.4", "8.0", "8.1", "8.2", "8.3")
    ),
)


class Part(NamedTuple):
    """One line of the manifest to be. get: downloads (nothing, of what the machine holds)."""

    name: str
    pinned: str
    registry: str
    get: Callable[[], list[Fetched]]
    read: Callable[[list[Fetched], Ledger], Iterator[Piece]]


@dataclass(frozen=True)
class Gathered:
    """Repositories below a corpus as `Trees`, each under the licence of its package."""

    folder: str

    def files(self) -> Iterator[SourceFile]:
        """Files by repository and path."""
        for part in sorted(_manifest(Path(self.folder))["parts"], key=lambda part: part["name"]):
            for repo, licence in sorted(part.get("repositories", {}).items()):
                root = Path(self.folder) / "code" / repo
                for path in sorted(p for p in root.rglob("*") if p.is_file()):
                    yield SourceFile(path, path.relative_to(root).as_posix(), repo, licence)

    def version(self) -> str:
        """The digest of every repository."""
        return " ".join(
            part["kinds"]["code"]["sha256"]
            for part in _manifest(Path(self.folder))["parts"]
            if "code" in part["kinds"]
        )


def sources(folder: str | Path) -> tuple[Source, ...]:
    """What a corpus holds as sources, named by kind (`gather.KINDS`), in that order.

    Pages come as text by `HtmlText`, code by repository. Kinds that are not there are left out.

    Raises: ValueError when there is no corpus.
    """
    folder = Path(folder)
    there = {kind for part in _manifest(folder)["parts"] for kind in part["kinds"]}
    found: list[Source] = []
    for kind in (kind for kind in KINDS if kind in there):
        if kind == "code":
            found.append(Repositories(Gathered(str(folder)), name="code"))
            continue
        records = ArrayRecords(str(folder / kind), name=kind, fields=Fields(id="id"))
        found.append(HtmlText(records) if kind in PAGES else records)
    return tuple(found)


def build(
    out: Path,
    packages: tuple[Package, ...] = PACKAGES,
    *,
    cache: Path | None = None,
    offline: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Writes the parts that `out` lacks and returns the manifest, which is also in `out`.

    cache: of downloads; by default below `out`. offline: nothing is downloaded. A package that
    can't be had is in "missing" with the reason; after the first answer that a registry can't be
    reached, the rest of its packages are not tried.
    """
    out.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    away = {"PyPI": "offline was asked for", "Debian": "offline was asked for"} if offline else {}
    bar = tqdm(
        _parts(packages, (cache or out / "downloads").resolve()), unit="part", disable=not progress
    )
    for part in bar:
        bar.set_postfix_str(part.name)
        if line := _load(out, part):
            done.append(line)
        elif part.registry in away:
            missing.append({"name": part.name, "why": away[part.registry]})
        else:
            try:
                done.append(_write(out, part))
            except MissingError as error:
                missing.append({"name": part.name, "why": str(error)})
                if error.unreachable:
                    away[part.registry] = f"{part.registry} could not be reached"
            except DroppedError as error:
                missing.append({"name": part.name, "why": f"the archive is refused: {error}"})
    manifest = {
        "format": LOCAL_FORMAT,
        "kinds": KINDS,
        "totals": _totals(done),
        "parts": done,
        "missing": missing,
    }
    _remove_others(out, done)
    _write_json(out / "manifest.json", manifest)
    return manifest


def report(manifest: Mapping[str, Any]) -> str:
    """Tables of a manifest: sizes by kind, the largest licences of each, what is missing."""
    lines = [f"{'kind':18}{'documents':>12}{'MB':>9}{'MB of text':>12}  licences, MB"]
    for kind, found in manifest["totals"].items():
        top = sorted(found["licences"].items(), key=lambda pair: -pair[1])
        shown = [f"{name[:30]} {size / 1e6:.1f}" for name, size in top[:4]]
        shown += [f"{len(top) - 4} more"] if len(top) > 4 else []
        sizes = f"{found['bytes'] / 1e6:9.1f}{found['text_bytes'] / 1e6:12.1f}"
        lines.append(f"{kind:18}{found['documents']:12,}{sizes}  {', '.join(shown)}")
    lines.append(f"{'all':18}{'':21}{text_bytes(manifest) / 1e6:12.1f}")
    for part in manifest["parts"]:
        versions = [file["version"] for file in part["files"]]
        if versions and f"'{versions[-1]}'" not in part["pinned"]:
            lines.append(f"not the pinned version: {part['name']} {versions[-1]}")
    reasons: dict[str, list[str]] = {}
    for part in manifest["missing"]:
        reasons.setdefault(part["why"], []).append(part["name"])
    lines += [f"missing ({why}): {', '.join(names)}" for why, names in reasons.items()]
    return "\n".join(lines)


def text_bytes(manifest: Mapping[str, Any]) -> int:
    """UTF-8 bytes of text in a corpus; of pages, of their text."""
    return sum(found["text_bytes"] for found in manifest["totals"].values())


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code: 1 for a corpus smaller than asked."""
    parser = argparse.ArgumentParser(prog="glm45_jax.data.local", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the corpus")
    parser.add_argument("--cache", type=Path, help="of downloads; default OUT/downloads")
    parser.add_argument("--mb", type=float, default=100, help="of text that must be there")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    manifest = build(args.out, PACKAGES, cache=args.cache, offline=args.offline, progress=True)
    sys.stdout.write(report(manifest) + "\n")
    if text_bytes(manifest) < args.mb * 1e6:
        sys.stdout.write(
            f"{text_bytes(manifest) / 1e6:.1f} MB of text are fewer than --mb {args.mb:g}; what is "
            "missing is listed above: run it again when it can be had\n"
        )
        return 1
    return 0


def _parts(packages: tuple[Package, ...], cache: Path) -> list[Part]:
    """Every part; what the machine holds first."""
    pinned = frozenset(package.name for package in packages if isinstance(package, Docs | Code))
    docs, python = partial(installed_docs, pinned=pinned), installed_python
    parts = [
        Part("installed-docs", debian_folders(), "", list, lambda _, ledger: docs(ledger)),
        Part("installed-python", python_folders(), "", list, lambda _, ledger: python(ledger)),
    ]
    for package in packages:
        registry = "PyPI" if isinstance(package, Wheel | Releases) else "Debian"
        get, read = partial(fetch, package, cache), partial(pieces, package)
        parts.append(Part(part_name(package), repr(package), registry, get, read))
    return parts


def _load(out: Path, part: Part) -> dict[str, Any] | None:
    """The manifest's line of a part that is done; None where it is not, or not as asked for."""
    try:
        line = json.loads((out / "parts" / f"{part.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if line["pinned"] != part.pinned or line["format"] != [LOCAL_FORMAT, GATHER_FORMAT]:
        return None
    for kind, found in line["kinds"].items():
        path = out / kind / f"{part.name}.arrayrecord"
        if kind != "code" and (not path.is_file() or path.stat().st_size != found["file_bytes"]):
            return None
    if any(not (out / "code" / repo).is_dir() for repo in line["repositories"]):
        return None
    return line


def _write(out: Path, part: Part) -> dict[str, Any]:
    """Writes the shards of a part, then its line, which says that they are complete."""
    fetched = part.get()
    ledger = Ledger(part.name)
    writer = PartWriter(out, part.name)
    try:
        for piece in part.read(fetched, ledger):
            writer.write(piece, ledger)
        line = {
            "name": part.name,
            "pinned": part.pinned,
            "format": [LOCAL_FORMAT, GATHER_FORMAT],
            "files": [
                {"from": f.origin, "version": f.version, "sha256": f.sha256} for f in fetched
            ],
            "left_out": dict(sorted(ledger.report().items())),
            **writer.finish(),
        }
    finally:
        writer.close()
    _write_json(out / "parts" / f"{part.name}.json", line)
    return line


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{folder} has no manifest.json; python -m glm45_jax.data.local --out {folder} makes it"
        ) from error
    if found["format"] != LOCAL_FORMAT:
        raise ValueError(
            f"{folder} has format {found['format']}, not {LOCAL_FORMAT}; make it again"
        )
    return found


def _totals(parts: list[dict[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {}
    for kind in KINDS:
        there = [part["kinds"][kind] for part in parts if kind in part["kinds"]]
        licences: Counter[str] = Counter()
        for found in there:
            licences.update(found["licences"])
        if there:
            sums = {k: sum(f[k] for f in there) for k in ("documents", "bytes", "text_bytes")}
            totals[kind] = {**sums, "licences": dict(sorted(licences.items()))}
    return totals


def _remove_others(out: Path, done: list[dict[str, Any]]) -> None:
    """What other pins or a killed run left: a source would read it."""
    names = {part["name"] for part in done}
    repositories = {repo for part in done for repo in part["repositories"]}
    for path in [*out.glob("*/*.arrayrecord"), *out.glob("*/*.writing"), *out.glob("parts/*.json")]:
        if path.suffix == ".writing" or path.stem not in names:
            path.unlink()
    for path in out.glob("code/*"):
        if path.name not in repositories:
            shutil.rmtree(path)


def _write_json(path: Path, value: Any) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
