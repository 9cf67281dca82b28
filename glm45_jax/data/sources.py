"""Where documents come from: frozen values, each with a deterministic iterator of `Doc`s.

A new source is one class here (or anywhere) with the three members of `Source`, and one line in a
`Data`; one that writes more than plain text as tokens has a fourth (`Encodes`). The sources below
need no download: they read what a Python environment already holds.
No jax: sources run in worker processes.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sysconfig
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from glm45_jax.data.reading import DroppedError, Ledger, check_text, match_files, read_utf8
from glm45_jax.tokenizer import Tokenizer

SITE_PACKAGES = ("jax", "flax", "optax", "numpy")  # what requirements.txt brings in anyway

# Tests and character tables are bulk without prose; pydoc_data is the source `PydocTopics`.
_LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__")
)


@dataclass(frozen=True)
class Doc:
    """One document.

    id: unique in its source and the same on every machine. source: the name of its source.
    meta: strings for later filters (path, repo, licence). Documents with the same meta["group"]
    share text (a file and its docstrings) and land on the same side of the train/val split.
    """

    id: str
    text: str
    source: str
    meta: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """What `prepare` asks of a source (no need to inherit)."""

    @property
    def name(self) -> str:
        """Unique among the sources of a run; names the store on disk."""
        ...

    def docs(self) -> Iterator[Doc]:
        """Every document, in an order that depends only on the fields and on `version`.

        A generator may return counts (name -> number) of what it read and left out; `prepare` puts
        them into its report.
        """
        ...

    def version(self) -> str:
        """What the text depends on besides the fields; another value means: prepare again."""
        ...


@runtime_checkable
class Encodes(Protocol):
    """A source that turns its own documents into tokens, say with special ones between the parts.

    `prepare` calls `encode` in place of the tokenizer's; all else (duplicates, split, the text the
    tokenizer is trained on) goes by `Doc.text`.
    """

    def encode(self, docs: Sequence[Doc], tokenizer: Tokenizer) -> list[list[int]]:
        """Ids of every document, without `<|endoftext|>`; no other state than the fields."""
        ...


def refuse_encoder(source: Source, wrapper: str = "the wrapper") -> None:
    """Raises ValueError for a source whose own encoding a wrapper would lose."""
    if isinstance(source, Encodes):
        raise ValueError(
            f"{type(source).__name__} encodes its documents, which a "
            f"{wrapper.removeprefix('the ')} around it would lose; put {wrapper} inside"
        )


def counted(source: Source, counts: dict[str, int]) -> Iterator[Doc]:
    """The documents of `source`; after the last one `counts` holds what the source returned."""
    docs: Any = source.docs()
    counts |= (yield from docs) or {}  # None from an iterator that is no generator


class SourceFile(NamedTuple):
    """A file of a repository. id: its path there, the same on every machine."""

    path: Path
    id: str
    repo: str
    licence: str

    def meta(self) -> dict[str, str]:
        """What a `Doc` of this file says of itself."""
        group = f"file/{self.repo}/{self.id}"
        return {"path": self.id, "repo": self.repo, "licence": self.licence, "group": group}


@dataclass(frozen=True)
class PythonSources:
    """Python files, one document each: the interpreter's standard library, installed packages.

    include: "stdlib" and/or "site" (the top-level `packages`). Tests are left out.
    """

    name: str = "python"
    include: tuple[str, ...] = ("stdlib",)
    packages: tuple[str, ...] = SITE_PACKAGES

    def __post_init__(self):
        _check_include(self.include)

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """One document a file, sorted by path; returns counts: files_in, files_read, dropped_*."""
        reader = _Reader(self.name)
        for file in _python_files(self.include, self.packages):
            text = reader.text(file.path)
            if text is not None:
                yield Doc(file.id, text, self.name, file.meta())
        return reader.report()

    def files(self) -> Iterator[SourceFile]:
        """The files, package by package (`data/repositories.py` joins them)."""
        return _python_files(self.include, self.packages)

    def version(self) -> str:
        """Versions of the interpreter and of the packages."""
        return _python_version(self.include, self.packages)


@dataclass(frozen=True)
class Docstrings:
    """English prose from code: the long docstrings of one Python file joined to one document."""

    name: str = "docstrings"
    include: tuple[str, ...] = ("stdlib",)
    packages: tuple[str, ...] = SITE_PACKAGES
    min_chars: int = 200  # shorter ones mostly repeat the signature

    def __post_init__(self):
        _check_include(self.include)

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """One document for each file that has a long docstring, sorted by path; counts files."""
        reader = _Reader(self.name)
        for file in _python_files(self.include, self.packages):
            text = reader.text(file.path)
            prose = _docstrings(text, self.min_chars) if text is not None else ""
            if prose:
                yield Doc(file.id, prose, self.name, file.meta())
        return reader.report()

    def version(self) -> str:
        """Versions of the interpreter and of the packages."""
        return _python_version(self.include, self.packages)


@dataclass(frozen=True)
class PydocTopics:
    """The Python language reference as `help()` carries it, one document a topic."""

    name: str = "topics"

    def docs(self) -> Iterator[Doc]:
        """One document a topic, sorted by its name."""
        from pydoc_data.topics import topics

        for topic in sorted(topics):
            meta = {"path": f"pydoc/{topic}", "repo": "cpython", "licence": "PSF-2.0"}
            yield Doc(f"pydoc/{topic}", topics[topic], self.name, meta)

    def version(self) -> str:
        """The version of the interpreter."""
        return f"python=={platform.python_version()}"


@dataclass(frozen=True)
class PackageDocs:
    """Descriptions and *.md / *.rst files of installed distributions (all, or those named)."""

    name: str = "packages"
    distributions: tuple[str, ...] = ()

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """A distribution's description, then its text files by path; distributions by name.

        Returns counts of the files.
        """
        reader = _Reader(self.name)
        for dist_name, dist in self._distributions():
            meta = {"repo": dist_name, "licence": licence_of(dist), "group": f"dist/{dist_name}"}
            description = (dist.metadata.get("Description") or "").strip()
            if description:
                where = f"{dist_name}/METADATA"
                yield Doc(where, description, self.name, meta | {"path": where})
            for path, where in _prose_files(dist, dist_name):
                text = reader.text(path)
                if text is not None:
                    yield Doc(where, text, self.name, meta | {"path": where})
        return reader.report()

    def version(self) -> str:
        """Names and versions of the distributions."""
        return " ".join(f"{name}=={dist.version}" for name, dist in self._distributions())

    def _distributions(self) -> list[tuple[str, importlib.metadata.Distribution]]:
        if self.distributions:
            found = [(name, _distribution(name)) for name in set(self.distributions)]
        else:
            # A folder left by a failed uninstall has no name.
            every = importlib.metadata.distributions()
            found = [(name, d) for d in every if (name := d.metadata.get("Name"))]
        by_name = {name.lower(): dist for name, dist in reversed(found)}  # first on the path wins
        return sorted(by_name.items())


@dataclass(frozen=True)
class TextFiles:
    """Your own folder (or one file): every file that matches the pattern is one document.

    Links are counted, not followed: what they name would be read twice, or lie outside the folder.
    """

    root: str
    pattern: str = "**/*.txt"
    name: str = "files"
    licence: str = ""
    max_bytes: int = 2**28  # of a file [too_large]
    max_line: int = 2**20  # characters [long_line]; tokenizers are quadratic in a word without end

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """One document a file, sorted by path; returns counts: files_in, documents, dropped_*.

        Raises: ValueError when nothing matches.
        """
        ledger = Ledger(self.name, "files_in", "documents")
        repo = Path(self.root).name
        for path, where in match_files(self.root, self.pattern):
            ledger.counts["files_in"] += 1
            try:
                text = check_text(read_utf8(path, self.max_bytes), self.max_line)
            except DroppedError as error:
                ledger.drop(error, where)
                continue
            ledger.counts["documents"] += 1
            meta = {"path": where, "repo": repo, "licence": self.licence}
            yield Doc(where, text, self.name, meta)
        return ledger.report()

    def version(self) -> str:
        """A digest of paths, sizes and times, so that an edited folder is read again."""
        return digest_files(match_files(self.root, self.pattern))


def walk_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Every file and symlink below root with its path from there; hidden folders are left out.

    Folders in the order of their names, no symlink followed.
    """
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in links)
        for name in sorted(names + links):
            yield here / name, (here / name).relative_to(root).as_posix()


def digest_files(files: Iterable[tuple[Path, str]]) -> str:
    """A digest of paths, sizes and times, so that an edited folder is read again."""
    digest = hashlib.sha256()
    for path, where in files:
        info = path.lstat()
        line = f"{where} {info.st_size} {info.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def split_at_lines(text: str, limit: int) -> list[str]:
    """Parts of at most `limit` characters that join to the text, cut at line ends if possible."""
    parts, begin = [], 0
    while len(text) - begin > limit:
        # rfind's -1 becomes 0: no line ends here, so cut inside the line.
        end = text.rfind("\n", begin, begin + limit) + 1 or begin + limit
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


class _Reader:
    """Reads UTF-8 files of installed packages, of which some tools make links; counts them."""

    def __init__(self, source: str):
        self.ledger = Ledger(source, "files_in", "files_read")

    def text(self, path: Path) -> str | None:
        self.ledger.counts["files_in"] += 1
        try:
            text = read_utf8(path.resolve(), _MAX_BYTES)
        except DroppedError as error:
            # Packages ship empty files and foreign encodings on purpose: no warning.
            self.ledger.counts[f"dropped_{error}"] += 1
            return None
        self.ledger.counts["files_read"] += 1
        return text

    def report(self) -> dict[str, int]:
        return self.ledger.report()


def _python_files(include: tuple[str, ...], packages: tuple[str, ...]) -> Iterator[SourceFile]:
    if "stdlib" in include:
        root = Path(sysconfig.get_paths()["stdlib"])
        for path, where in _sorted_python(root, root):
            yield SourceFile(path, where, "cpython", "PSF-2.0")
    if "site" in include:
        for package in packages:
            folder, licence = _package_folder(package), licence_of(_distribution(package))
            for path, where in _sorted_python(folder, folder.parent):
                yield SourceFile(path, where, package, licence)


def _sorted_python(folder: Path, root: Path) -> list[tuple[Path, str]]:
    found = []
    for path in folder.rglob("*.py"):
        is_test = path.stem.startswith("test_") or path.stem.endswith("_test")
        if not is_test and not _LEFT_OUT.intersection(path.relative_to(folder).parts):
            found.append((path, path.relative_to(root).as_posix()))
    return sorted(found, key=lambda pair: pair[1])


def _docstrings(code: str, min_chars: int) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in other people's code
        try:
            tree = ast.parse(code)
        except SyntaxError:  # templates with a .py name
            return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = [ast.get_docstring(node) or "" for node in nodes]
    return "\n\n".join(text for text in found if len(text) >= min_chars)


def _prose_files(
    dist: importlib.metadata.Distribution, dist_name: str
) -> Iterator[tuple[Path, str]]:
    legal = ("licen", "copying", "notice", "authors")
    for file in sorted(dist.files or (), key=str):
        path = Path(str(dist.locate_file(file)))
        if file.suffix not in (".md", ".rst") or path.name.lower().startswith(legal):
            continue
        if path.is_file():
            yield path, f"{dist_name}/{file.as_posix()}"


def _check_include(include: tuple[str, ...]) -> None:
    for part in include:
        if part not in ("stdlib", "site"):
            raise ValueError(f"include has {part!r}; use 'stdlib', 'site' or both")


def _python_version(include: tuple[str, ...], packages: tuple[str, ...]) -> str:
    parts = [f"python=={platform.python_version()}"]
    if "site" in include:
        parts += [f"{package}=={_distribution(package).version}" for package in packages]
    return " ".join(parts)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package!r} is not installed here; drop it from packages")
    return Path(next(iter(spec.submodule_search_locations)))


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"no installed distribution is named {name!r}; drop it") from error


def licence_of(dist: importlib.metadata.Distribution) -> str:
    """What the metadata of a distribution says; empty where it says nothing short."""
    stated = dist.metadata.get("License-Expression") or dist.metadata.get("License") or ""
    if stated and "\n" not in stated:
        return stated
    classifiers = dist.metadata.get_all("Classifier") or []
    return next((c.rsplit(" :: ", 1)[-1] for c in classifiers if c.startswith("License")), "")


_MAX_BYTES = 2**30
