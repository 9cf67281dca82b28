"""The text inside packages as documents, by kind, with the licence of the package.

`pieces(package, fetched, ledger)` gives what a package holds; `installed()` lists what the machine
holds already. `KINDS` says what each kind is. Pages stay HTML: making them text is a step of the
pipeline. What is left out is counted in the ledger by reason.
"""

import hashlib
import itertools
import re
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from glm45_jax.data.changelogs import entries, release_diff, section
from glm45_jax.data.commits import Commits
from glm45_jax.data.html import decode
from glm45_jax.data.packages import (
    MAX_MEMBER,
    Code,
    Docs,
    Fetched,
    Package,
    Patches,
    Releases,
    debian_licence,
    gunzip,
    members,
    unpack_tar,
    wheel_description,
    wheel_licence,
)
from glm45_jax.data.reading import DroppedError, Ledger, decoded, read_regular
from glm45_jax.data.repositories import COMMENT_OF
from glm45_jax.data.roff import man_text
from glm45_jax.data.sources import PackageDocs, PythonSources, counted, walk_files

KINDS = {
    "web": "documentation as HTML pages",
    "web_multilingual": "HTML pages of translations; meta['language'] is what the folder says",
    "prose": "texts, manual pages, dictionaries, descriptions of packages, in English",
    "multilingual": "manual pages of other languages; meta['language']",
    "changelogs": "entries of change logs",
    "commits": "changes with their reasons: patches, and releases with their list of changes",
    "code": "files of repositories, as a tree",
}
GATHER_FORMAT = 1  # raise it when the same package gives other documents


class Piece(NamedTuple):
    """A document (or, of kind code, a file) of a package. path: inside the package."""

    kind: str
    path: str
    text: str
    meta: Mapping[str, str]


def pieces(package: Package, fetched: list[Fetched], ledger: Ledger) -> Iterator[Piece]:
    """What a package holds, in the order of its archive. Every piece has its licence in meta.

    Raises: DroppedError for an archive that is damaged.
    """
    (path, version, *_), *_ = fetched
    if isinstance(package, Docs | Code):
        files = list(members(path, ledger))
        stated = next((_copyright(d) for n, d in files if n.endswith("/copyright")), "UNKNOWN")
        licence = (isinstance(package, Docs) and package.licence) or stated
        base = {"repo": package.name, "version": version, "licence": licence}
        if isinstance(package, Code):
            yield from _code(_below(files, package.root, ledger), base, ledger)
        else:
            yield from _documents(files, base, ledger, package.language_after)
    elif isinstance(package, Patches):
        yield from _patches(package.name, version, path, ledger)
    elif isinstance(package, Releases):
        yield from _releases(package.name, fetched, ledger)
    else:
        files = [(n, d) for n, d in members(path, ledger) if ".dist-info/" not in n]
        base = {"repo": package.name, "version": version, "licence": wheel_licence(path)}
        yield from _code(files, base, ledger)


def installed_docs(ledger: Ledger, pinned: frozenset[str]) -> Iterator[Piece]:
    """Documentation and manual pages of installed Debian packages, but for those in `pinned`.

    Other systems have no such folders, and give nothing.
    """
    owner = _owners()
    seen: set[bytes] = set()
    found = [
        (top, path.as_posix().removeprefix("/"))
        for top in ("usr/share/doc", "usr/share/man")
        for path, _ in walk_files(Path("/") / top)
    ]
    # By package: whether it has pages decides about its texts.
    by_package = ((n.split("/")[3] if "doc" in top else owner.get(n, ""), n) for top, n in found)
    for package, names in itertools.groupby(by_package, key=lambda pair: pair[0]):
        if not package or package in pinned:
            continue
        files = {}
        for _, name in names:
            try:
                data = read_regular(Path("/") / name, MAX_MEMBER)
            except DroppedError as error:
                ledger.drop(error, name)
                continue
            digest = hashlib.sha256(data).digest()
            if digest in seen:  # packages of one source share their change log
                ledger.drop(DroppedError("same_file"), name)
            else:
                files[name] = data
            seen.add(digest)
        if not (licence := _copyright_of(package)):  # not from Debian; no word of who may use it
            ledger.counts["dropped_no_copyright_file"] += len(files)
            continue
        base = {"repo": package, "version": "", "licence": licence}
        yield from _documents(files.items(), base, ledger)


def installed_python(ledger: Ledger) -> Iterator[Piece]:
    """Descriptions and texts of every installed distribution; the standard library's code and that
    of the packages that this one needs.
    """
    counts: dict[str, int] = {}
    for doc in counted(PackageDocs(), counts):
        yield Piece("prose", doc.meta["path"], doc.text, doc.meta)
    for file in PythonSources(include=("stdlib", "site")).files():
        try:
            data = read_regular(file.path.resolve(), MAX_MEMBER)
        except DroppedError as error:
            ledger.drop(error, file.id)
            continue
        base = {"repo": file.repo, "version": "", "licence": file.licence}
        yield from _code([(file.id, data)], base, ledger)
    ledger.counts.update({f"docs_{key}": n for key, n in counts.items()})


def debian_folders() -> str:
    """What the installed documentation depends on: names and versions of the packages."""
    try:
        status = Path("/var/lib/dpkg/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "none"
    found = re.findall(r"^Package: (.*)(?:\n.+)*?\nVersion: (.*)$", status, re.MULTILINE)
    return " ".join(f"{name}={version}" for name, version in sorted(found))


def python_folders() -> str:
    """As `debian_folders`, of the Python environment."""
    every = PythonSources(include=("stdlib", "site")).version()
    return f"{every} {PackageDocs().version()} {sysconfig.get_platform()}"


def _documents(
    files: Iterable[tuple[str, bytes]],
    base: Mapping[str, str],
    ledger: Ledger,
    language_after: str = "",
) -> Iterator[Piece]:
    """Documents by the names of files; texts only where the package has no pages made from them."""
    by_name = dict(files)
    has_pages = any(_PAGE.search(name) for name in by_name)
    for name, data in by_name.items():
        try:
            if name.endswith(".gz") and not name.endswith(".dict.dz"):
                data = gunzip(data, MAX_MEMBER)
            yield from _of_file(name, data, by_name, base, has_pages, language_after)
        except DroppedError as error:
            ledger.drop(error, f"{base['repo']}: {name}")


def _of_file(
    name: str,
    data: bytes,
    others: Mapping[str, bytes],
    base: Mapping[str, str],
    has_pages: bool,
    language_after: str,
) -> Iterator[Piece]:
    if found := _MANUAL.search(name):
        text = man_text(decoded(data))
        if len(text) < _SHORT:
            raise DroppedError("short")  # a page that only names another one
        language = (found["language"] or "en").split(".")[0]
        kind = "prose" if language.startswith("en") else "multilingual"
        yield Piece(kind, name, text, {**base, "language": language})
    elif _PAGE.search(name):
        if _NO_CONTENT.search(name):
            raise DroppedError("index_page")
        folder = rf"/{language_after}/({_LANGUAGE})/"
        after = re.search(folder, f"/{name}") if language_after else None
        language = after[1] if after else "en"
        kind = "web" if language.startswith("en") else "web_multilingual"
        yield Piece(kind, name, decode(data), {**base, "language": language})
    elif _CHANGELOG.search(name):
        found_entries = entries(decoded(data))
        if not found_entries:
            raise DroppedError("other_form_of_changelog")
        for at, (version, entry) in enumerate(found_entries):
            meta = {**base, "version": version, "group": f"changelog/{base['repo']}"}
            yield Piece("changelogs", f"{name}#{at}", entry.message, meta)
    elif name.endswith(".dict.dz"):
        index = others.get(name.removesuffix(".dict.dz") + ".index", b"")
        for at, text in enumerate(_dictionary(gunzip(data, 2**28), index)):
            yield Piece("prose", f"{name}#{at}", text, {**base, "language": "en"})
    elif _TEXT.search(name) and not has_pages:
        text = decoded(data)
        if len(text) < _SHORT:
            raise DroppedError("short")
        yield Piece("prose", name, text, {**base, "language": "en"})


def _dictionary(data: bytes, index: bytes) -> Iterator[str]:
    """Pages of about `_DICTIONARY_PAGE` bytes of whole entries, by their place in the file."""
    spans: set[tuple[int, int]] = set()
    for line in index.decode("utf-8", "replace").splitlines():
        word, *place = line.split("\t")
        if len(place) >= 2 and not word.startswith("00"):  # 00-database-...: about the dictionary
            spans.add((_base64(place[0]), _base64(place[1])))
    page, end, size = [], 0, 0
    for begin, length in sorted(spans):
        if begin < end:  # another word of the same entry
            continue
        end = begin + length
        page.append(data[begin:end].decode("utf-8", "replace").strip())
        size += length
        if size > _DICTIONARY_PAGE:
            yield "\n\n".join(page)
            page, size = [], 0
    if page:
        yield "\n\n".join(page)


def _base64(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _BASE64.index(digit)
    return value


def _code(
    files: Iterable[tuple[str, bytes]], base: Mapping[str, str], ledger: Ledger
) -> Iterator[Piece]:
    for name, data in files:
        if Path(name).suffix.lower() not in COMMENT_OF:
            ledger.counts["dropped_other_kind"] += 1
            continue
        try:
            yield Piece("code", name, decoded(data), base)
        except DroppedError as error:
            ledger.drop(error, f"{base['repo']}: {name}")


def _below(
    files: Iterable[tuple[str, bytes]], root: str, ledger: Ledger
) -> Iterator[tuple[str, bytes]]:
    """Files below `root`, with paths from there; those of archives that lie there as well."""
    for name, data in files:
        inside = name.removeprefix(f"{root}/")
        if inside == name:
            continue
        if inside.endswith((".tar.xz", ".tar.gz")):
            for path, content in unpack_tar(data, name, ledger):
                yield path.partition("/")[2] or path, content
        else:
            yield inside, data


def _patches(name: str, version: str, path: Path, ledger: Ledger) -> Iterator[Piece]:
    """Changes in debian/patches that say why; read as `data/commits.py` reads them."""
    files = dict(members(path, ledger))
    base = {"repo": name, "version": version}
    licence = _copyright(files.get("debian/copyright", b""))
    found = {n: d for n, d in files.items() if n.startswith("debian/patches/")}
    yield from _commits(found, {**base, "licence": licence}, ledger)


def _releases(name: str, fetched: list[Fetched], ledger: Ledger) -> Iterator[Piece]:
    """One change a release: the section of its list of changes, and how the files differ."""
    texts: list[dict[str, str]] = []
    for wheel in fetched:
        inside = [(n, d) for n, d in members(wheel.path, ledger) if ".dist-info/" not in n]
        texts.append({piece.path: piece.text for piece in _code(inside, {"repo": name}, ledger)})
    for at in range(1, len(fetched)):
        path, version, *_ = fetched[at]
        words = section(wheel_description(path), version)
        if not words:
            ledger.drop(DroppedError("no_section"), f"{name} {version}")
            continue
        change = f"{words}\n\n{release_diff(texts[at - 1], texts[at])}".encode()
        base = {"repo": name, "version": version, "licence": wheel_licence(path)}
        yield from _commits({f"{version}.patch": change}, base, ledger)


def _commits(
    files: Mapping[str, bytes], base: Mapping[str, str], ledger: Ledger
) -> Iterator[Piece]:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        suffixes = (".patch", ".diff")
        if not any(name.endswith(suffixes) for name in files):
            ledger.drop(DroppedError("no_patches"), base["repo"])
            return
        # A release is many commits: longer than `Commits` takes by itself.
        source = Commits(folder, suffixes=suffixes, max_chars=2**19, max_files=400)
        counts: dict[str, int] = {}
        for doc in counted(source, counts):
            meta = {**base, "changes": doc.meta["path"], "commit": doc.meta["commit"]}
            yield Piece("commits", doc.id, doc.text, meta)
        ledger.counts.update({f"commits_{key}": n for key, n in counts.items()})


def _owners() -> dict[str, str]:
    """Which installed package a manual page belongs to."""
    owner = {}
    for path in sorted(Path("/var/lib/dpkg/info").glob("*.list")):
        package = path.stem.split(":")[0]
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("/usr/share/man/"):
                owner[line[1:]] = package
    return owner


def _copyright_of(package: str) -> str:
    try:
        data = Path(f"/usr/share/doc/{package}/copyright").read_bytes()
    except OSError:
        return ""
    return _copyright(data)


def _copyright(data: bytes) -> str:
    return debian_licence(data.decode("utf-8", "replace"))


_SHORT = 200  # characters
_DICTIONARY_PAGE = 20_000  # bytes
_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"  # of dictd
_LANGUAGE = "[a-z]{2,3}(?:[-_@][A-Za-z]{2,5})?"
_MANUAL = re.compile(r"(?:^|/)share/man/(?:(?P<language>[a-z]{2,3}[\w.@-]*)/)?man\d\w*/[^/]+$")
_PAGE = re.compile(r"\.x?html?(?:\.gz)?$", re.IGNORECASE)
_NO_CONTENT = re.compile(r"(?:^|/)(?:genindex[^/]*|search|py-modindex|_sources|_static)\b")
_CHANGELOG = re.compile(r"share/doc/[^/]+/changelog(?:\.Debian)?(?:\.\w+)?(?:\.gz)?$")
_TEXT = re.compile(
    r"(?:share/doc/.*(?:\.(?:txt|text|md|rst|pod)|/(?:README|NEWS|FAQ|HACKING|TODO)[^/]*?)"
    r"|share/perl/.*\.pod)(?:\.gz)?$"
)
