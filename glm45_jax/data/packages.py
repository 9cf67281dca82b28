"""Packages of Debian and PyPI as files: fetched by apt-get and pip, unpacked here, never installed.

`fetch` downloads one pinned package into a cache, `members` reads what is in it, `debian_licence`
and `wheel_licence` say under which licence it comes. No root is needed: apt gets its own lists
below the cache, with the sources (deb-src) that most machines leave out.
"""

import gzip
import hashlib
import importlib.metadata
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from glm45_jax.data.reading import DroppedError, Ledger
from glm45_jax.data.sources import licence_of


@dataclass(frozen=True)
class Docs:
    """A Debian package of documentation.

    language_after: the folder whose folders are languages. licence: of a package that has no
    copyright file of its own.
    """

    name: str
    version: str
    language_after: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Code:
    """A Debian package with the sources of a project below `root` (or in an archive there)."""

    name: str
    version: str
    root: str


@dataclass(frozen=True)
class Patches:
    """The packaging of a Debian source package: changes made to it, with their reasons."""

    name: str
    version: str


@dataclass(frozen=True)
class Wheel:
    """A package of PyPI without compiled parts: a repository of Python."""

    name: str
    version: str


@dataclass(frozen=True)
class Releases:
    """Consecutive releases of a package of PyPI whose description lists what changed in each."""

    name: str
    versions: tuple[str, ...]  # oldest first

    @property
    def version(self) -> str:
        """The last one."""
        return self.versions[-1]


Package = Docs | Code | Patches | Wheel | Releases


class MissingError(Exception):
    """A package can't be had here; the text says why. `unreachable`: nor can its neighbours."""

    def __init__(self, why: str, unreachable: bool = False):
        super().__init__(why)
        self.unreachable = unreachable


class Fetched(NamedTuple):
    """A downloaded file. origin: the command that fetches it."""

    path: Path
    version: str
    sha256: str
    origin: str


class Entry(NamedTuple):
    """A file of an archive: read() gives its `size` bytes."""

    name: str
    size: int
    read: Callable[[], bytes]


def part_name(package: Package) -> str:
    """What the package is called in caches and manifests."""
    return f"{type(package).__name__.lower()}-{package.name}"


def fetch(package: Package, cache: Path) -> list[Fetched]:
    """The files of a package (of `Releases` one a version), downloaded where the cache has none.

    A version that is not offered any more is replaced by the one that is (`Fetched.version` says
    so), but for those of `Releases`, which belong together.

    Raises: MissingError.
    """
    if isinstance(package, Releases):
        wheels = [Wheel(package.name, version) for version in package.versions]
        return [_fetch(wheel, cache, exactly=True) for wheel in wheels]
    return [_fetch(package, cache, exactly=False)]


def members(path: Path, ledger: Ledger) -> Iterator[tuple[str, bytes]]:
    """Regular files of a .deb, .whl or .tar.*, with their paths inside, in the archive's order.

    Links are left out; what is too large or would lie outside is counted. Raises DroppedError
    (damaged, bomb) where the archive ends early.
    """
    return _checked(_entries(path), path.name, ledger)


def unpack_tar(data: bytes, name: str, ledger: Ledger) -> Iterator[tuple[str, bytes]]:
    """As `members`, of a tar archive in memory, compressed or not."""
    return _checked(_tar_entries(data), name, ledger)


def _checked(files: Iterator[Entry], where: str, ledger: Ledger) -> Iterator[tuple[str, bytes]]:
    total = 0
    while True:
        try:
            entry = next(files, None)
            if entry is None:
                return
            total += entry.size
            if total > MAX_TOTAL:
                raise DroppedError("bomb")
            clean = PurePosixPath(entry.name.removeprefix("./"))
            if clean.is_absolute() or ".." in clean.parts or not entry.name.isprintable():
                ledger.drop(DroppedError("bad_path"), f"{where}: {entry.name!r}")
                continue
            if entry.size > MAX_MEMBER:
                ledger.drop(DroppedError("too_large"), f"{where}: {entry.name}")
                continue
            data = entry.read()
        except _BROKEN as error:
            raise DroppedError("damaged") from error
        yield clean.as_posix(), data


def gunzip(data: bytes, max_bytes: int) -> bytes:
    """Raises: DroppedError (damaged, too_large: unpacked)."""
    try:
        found = gzip.GzipFile(fileobj=io.BytesIO(data)).read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DroppedError("damaged") from error
    if len(found) > max_bytes:
        raise DroppedError("too_large")
    return found


def debian_licence(text: str) -> str:
    """Of a Debian copyright file: the licence of most files, as it names it; "UNKNOWN" if it can't
    be told. Where the file is free prose, every licence it points to, joined by " / ".
    """
    if text.startswith("Format:"):
        stated: dict[str, None] = {}
        for stanza in re.split(r"\n[ \t]*\n", text):
            found = re.search(r"^License:[ \t]*(\S[^\n]*)", stanza, re.MULTILINE)
            if found and re.search(r"^Files:\s*\*\s*$", stanza, re.MULTILINE):
                return found[1].strip()
            if found:
                stated[found[1].strip()] = None
        if stated:
            return " / ".join(list(stated)[:3])
    names = dict.fromkeys(re.findall(r"/usr/share/common-licenses/([\w.+-]*\w)", text))
    words = " ".join(text.lower().split())
    names |= {name: None for name, phrase in _PHRASES.items() if re.search(phrase, words)}
    return " / ".join(names) or "UNKNOWN"


def wheel_licence(path: Path) -> str:
    """Of a wheel's metadata; "UNKNOWN" if it states none."""
    return licence_of(_distribution(path)) or "UNKNOWN"


def wheel_description(path: Path) -> str:
    """The long description of a wheel."""
    return _distribution(path).metadata.get_payload() or ""  # type: ignore[attr-defined]


def _distribution(path: Path) -> importlib.metadata.Distribution:
    archive = zipfile.Path(path)
    found = [inside for inside in archive.iterdir() if inside.name.endswith(".dist-info")]
    if not found:
        raise DroppedError("no_metadata")
    return importlib.metadata.PathDistribution(found[0])


def _entries(path: Path) -> Iterator[Entry]:
    """Every regular file of an archive."""
    if path.suffix != ".whl":
        data = _data_of_deb(path) if path.suffix == ".deb" else path.read_bytes()
        yield from _tar_entries(data)
        return
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield Entry(info.filename, info.file_size, partial(archive.read, info))


def _tar_entries(data: bytes) -> Iterator[Entry]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            if file is not None:
                yield Entry(member.name, member.size, file.read)


def _data_of_deb(path: Path) -> bytes:
    """The tar archive of a Debian package: a member of an `ar` archive."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise DroppedError("damaged")
        while len(head := file.read(60)) == 60:
            name, size = head[:16].decode("latin-1").strip(" /"), int(head[48:58])
            if name.startswith("data.tar"):
                data = file.read(size)
                if not name.endswith(".zst"):
                    return data
                from fastwarc.stream_io import ZstdReader  # Ubuntu's; tarfile reads it from 3.14 on

                return ZstdReader(io.BytesIO(data)).read(MAX_TOTAL)
            file.seek(size + size % 2, os.SEEK_CUR)
    raise DroppedError("damaged")


def _fetch(package: Package, cache: Path, exactly: bool) -> Fetched:
    folder = cache / f"{part_name(package)}-{package.version.replace(':', '%3a')}"
    if not folder.exists():
        temporary = cache / f".{folder.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            _download(package, cache, temporary, exactly)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    found = [path for path in sorted(folder.iterdir()) if path.suffix in (".deb", ".whl", ".xz")]
    if len(found) != 1:
        raise MissingError(f"{folder} holds {len(found)} archives, not one; delete it")
    version, digest = _version_of(found[0]), hashlib.sha256(found[0].read_bytes()).hexdigest()
    pip = isinstance(package, Wheel)
    command = "pip download" if pip else f"apt-get {_APT[type(package)][0]}"
    return Fetched(found[0], version, digest, f"{command} {package.name}{'=' * (1 + pip)}{version}")


def _download(package: Package, cache: Path, folder: Path, exactly: bool) -> None:
    if isinstance(package, Wheel):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "15"]
        command, pinned = [*pip, *options], f"{package.name}=={package.version}"
    else:
        command = [*_apt(cache), "-q", *_APT[type(package)]]
        pinned = f"{package.name}={package.version}"
    try:
        run([*command, pinned], folder)
    except MissingError as error:
        if error.unreachable or exactly:
            raise
        run([*command, package.name], folder)


def _version_of(path: Path) -> str:
    if path.suffix == ".whl":
        return path.name.split("-")[1]
    name = path.name.removesuffix(".debian.tar.xz").removesuffix(".deb")
    return name.split("_")[1].replace("%3a", ":")


def _apt(cache: Path) -> list[str]:
    """apt-get with lists of its own, brought up to date when they are older than a day."""
    if shutil.which("apt-get") is None:
        raise MissingError("there is no apt-get on this machine", unreachable=True)
    root = (cache / "apt").resolve()
    command = [
        *("apt-get", "-o", "Dir::Etc::sourcelist=/dev/null"),
        *(
            "-o",
            f"Dir::Etc::sourceparts={root / 'sources'}",
            "-o",
            f"Dir::State::lists={root}/lists",
        ),
        *("-o", f"Dir::Cache={root / 'cache'}", "-o", "APT::Sandbox::User=root"),
        *("-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=15"),
    ]
    updated = root / "updated"
    if not updated.exists() or time.time() - updated.stat().st_mtime > _DAY:
        for name in ("sources", "lists/partial", "cache/archives/partial"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")):
            if path.is_file() and path.suffix in (".list", ".sources"):
                text = _with_sources(
                    path.read_text(encoding="utf-8", errors="replace"), path.suffix
                )
                (root / "sources" / path.name).write_text(text, encoding="utf-8")
        run([*command, "-q", "update"], root)
        if not list((root / "lists").glob("*_Packages*")):
            raise MissingError("apt-get update brought no list of packages", unreachable=True)
        updated.touch()
    return command


def _with_sources(text: str, suffix: str) -> str:
    """An apt source list with deb-src beside deb, of the distribution alone."""
    if suffix == ".sources":
        stanzas = [s for s in re.split(r"\n\s*\n", text) if _DISTRIBUTION.search(s)]
        return re.sub(r"^Types:.*$", "Types: deb deb-src", "\n\n".join(stanzas), flags=re.M) + "\n"
    lines = [x for x in text.splitlines() if x.startswith("deb ") and _DISTRIBUTION.search(x)]
    return "".join(f"{line}\ndeb-src{line[3:]}\n" for line in lines)


def run(command: list[str], folder: Path) -> None:
    """Runs a package client in `folder`.

    Raises: MissingError with the first error that it prints.
    """
    env = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        subprocess.run(
            command, cwd=folder, env=env, check=True, capture_output=True, text=True, timeout=900
        )
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"{command[0]} took over 15 minutes", unreachable=True) from error
    except subprocess.CalledProcessError as error:
        said = f"{error.stderr}{error.stdout}".strip()
        lines = [x for x in said.splitlines() if x.startswith(("E:", "ERROR", "/"))] or [said]
        raise MissingError(lines[0][:200], bool(_NO_NETWORK.search(said))) from error


_APT = {
    Docs: ("download",),
    Code: ("download",),
    Patches: ("source", "--download-only", "--diff-only"),
}
_DAY = 86_400  # seconds
_BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, OSError, EOFError),
    *(ValueError, RuntimeError),  # a size that is no number; an archive with a password
)
MAX_MEMBER = 2**25  # bytes of a file in a package
MAX_TOTAL = 2**30  # bytes that a package may unpack to
_DISTRIBUTION = re.compile(r"debian|ubuntu", re.IGNORECASE)
_NO_NETWORK = re.compile(
    r"Could not resolve|Could not connect|Temporary failure|Network is unreachable|NewConnection"
    r"|ConnectTimeout|ReadTimeout|Connection (?:failed|refused|timed out|reset)|No module named pip"
)
_PHRASES = {  # of copyright files that are prose
    "PSF-2.0": r"python software foundation license",
    "PostgreSQL": r"postgresql global development group",
    "public-domain": r"public domain",
    "Expat": r"permission is hereby granted, free of charge, to any person obtaining",
    "HPND": r"permission to use, copy, modify,? (?:and )?distribute",
    "BSD": r"redistribution and use in source and binary forms",
    "Apache-2.0": r"apache license,? v(?:ersion|\.) 2",
    "Artistic": r"artistic license",
    "Info-ZIP": r"info-zip license",
}
