"""Repositories as documents: files in dependency order, a path before each, cut at file borders.

`Repositories` joins the files of installed packages or of a folder of checkouts. What a file needs
stands before it: strongly connected components (Tarjan) in depth-first order over sorted paths, so
that a dependency comes right before its first user; inside a component first the file that misses
the fewest others. `WithFim` around it cuts the last file of a document, with the others as context.
Source: spec 6.2 (D16); DeepSeek-Coder (Guo et al. 2024, 2.2) orders the same way but for the
components, without which a file may precede what it needs although no cycle forces it to.
"""

import ast
import itertools
import json
import logging
import posixpath
import re
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from glm45_jax.data.fim import INFILL_FROM
from glm45_jax.data.rules import RULES_FORMAT, CodeRules, why_drop
from glm45_jax.data.sources import (
    Doc,
    DroppedError,
    PythonSources,
    SourceFile,
    digest_files,
    read_utf8,
    split_at_lines,
    walk_files,
)

log = logging.getLogger(__name__)

REPOSITORIES_FORMAT = 1  # raise it when the same files give other documents

_COMMENTS = {
    ("# ", ""): "py pyi sh bash rb pl pm r jl toml yaml yml cmake mk ex exs nix",
    ("// ", ""): "c h cc cpp cxx hh hpp cu cuh m java js jsx mjs ts tsx go rs swift kt scala cs php"
    " proto dart zig",
    ("/* ", " */"): "css scss",
    ("-- ", ""): "sql lua hs elm",
    ("<!-- ", " -->"): "md html xml vue",
    (".. ", ""): "rst",
    ("% ", ""): "tex erl",
    ("; ", ""): "asm s lisp clj el scm",
}
COMMENT_OF = {f".{ending}": pair for pair, all_ in _COMMENTS.items() for ending in all_.split()}


class Trees(Protocol):
    """Where repositories come from: `PythonSources` (a package is one), `Checkouts`."""

    def files(self) -> Iterator[SourceFile]:
        """Every file, those of one repository together, in a fixed order."""
        ...

    def version(self) -> str:
        """As of a source."""
        ...


@dataclass(frozen=True)
class Checkouts:
    """Every folder right below `root` is a repository; hidden files in it are left out."""

    root: str
    licence: str = ""

    def files(self) -> Iterator[SourceFile]:
        """Files by repository and path; a symlink is listed, never followed.

        Raises: ValueError when there is no folder.
        """
        root = Path(self.root)
        found = sorted(p for p in root.glob("[!.]*") if p.is_dir() and not p.is_symlink())
        if not found:
            raise ValueError(f"{root} has no folder; give the folder that holds the repositories")
        for repo in found:
            for path, where in walk_files(repo):
                yield SourceFile(path, where, repo.name, self.licence)

    def version(self) -> str:
        """A digest of paths, sizes and times."""
        return digest_files((file.path, f"{file.repo}/{file.id}") for file in self.files())


@dataclass(frozen=True)
class Repositories:
    """One document a repository, or several where it is longer than `max_tokens`.

    A source does not know the tokenizer (`prepare` may train one on it), so length is counted in
    characters: max_tokens * chars_per_token of them. What still has more tokens is not lost:
    packing cuts it. A file above the limit has documents of its own, cut at line ends.
    rules: which files to leave out; None keeps all that is UTF-8 and has a known ending.
    repository_splits: a repository is in train or in val as a whole; files of one share code. False
    splits by document, for fewer repositories than a split needs.
    """

    trees: Trees = PythonSources(include=("stdlib", "site"))
    max_tokens: int = 32_768  # spec 5.1, stage 3
    chars_per_token: float = 3.0  # below what a vocabulary for code reaches (GLM's: UNVERIFIED)
    rules: CodeRules | None = CodeRules()
    repository_splits: bool = True
    name: str = "repositories"

    def __post_init__(self):
        if self.max_chars < 1:
            raise ValueError(
                f"max_tokens {self.max_tokens} * chars_per_token {self.chars_per_token} is no "
                "character; raise them"
            )

    @property
    def max_chars(self) -> int:
        """Longest document."""
        return int(self.max_tokens * self.chars_per_token)

    def version(self) -> str:
        """That of the files, and of the way they are joined."""
        rules = f" rules={RULES_FORMAT}" if self.rules else ""
        return f"{self.trees.version()} repositories={REPOSITORIES_FORMAT}{rules}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Documents by repository; returns counts.

        meta["files"] is JSON [[path, begin, end], ...] of the contents in the text (characters,
        without the path lines and the line end added to a file that has none); of a file cut in
        parts, each part in its document. Counts: repositories, files_in, files_kept, files_split,
        dropped_* by reason, unparsed (kept, but without edges), edges, cycles, edges_broken,
        edges_met (the needed file stands earlier in the same document), documents.
        """
        keys = "repositories files_in files_kept files_split unparsed edges cycles edges_broken"
        counts = Counter({key: 0 for key in (*keys.split(), "edges_met", "documents")})
        for repo, group in itertools.groupby(self.trees.files(), key=lambda file: file.repo):
            yield from self._repository(repo, list(group), counts)
        log.info("%s: %s", self.name, dict(counts))
        return dict(counts)

    def _repository(
        self, repo: str, found: Sequence[SourceFile], counts: Counter[str]
    ) -> Iterator[Doc]:
        counts["repositories"] += 1
        texts: dict[str, str] = {}
        for file in found:
            counts["files_in"] += 1
            try:
                texts[file.id] = self._text(file)
            except DroppedError as error:
                counts[f"dropped_{error}"] += 1
        graph = dependencies(texts)
        placed = order(graph.needs)
        edges = [(path, need) for path, needs in graph.needs.items() for need in needs]
        parts = join([(path, texts[path]) for path in placed.paths], self.max_chars)
        place = {file[0]: (at, file[1]) for at, part in enumerate(parts) for file in part.files}
        counts["files_kept"] += len(texts)
        counts["files_split"] += sum(
            len(text) > _room(path, self.max_chars) for path, text in texts.items()
        )
        counts["unparsed"] += graph.unparsed
        counts["edges"] += len(edges)
        counts["cycles"] += placed.cycles
        counts["edges_broken"] += placed.broken
        counts["edges_met"] += sum(
            place[path][0] == place[need][0] and place[path] > place[need] for path, need in edges
        )
        counts["documents"] += len(parts)
        for at, part in enumerate(parts):
            yield self._doc(repo, found[0].licence, at, part)

    def _text(self, file: SourceFile) -> str:
        if not file.id.isprintable():  # would not survive as a path line
            raise DroppedError("bad_name")
        if Path(file.id).suffix.lower() not in COMMENT_OF and not file.path.is_symlink():
            raise DroppedError("other_kind")
        text = read_utf8(file.path, self.rules.max_bytes if self.rules else _MAX_BYTES)
        doc = Doc(file.id, text, self.name, file.meta())
        if self.rules and (why := why_drop(doc, self.rules)):
            raise DroppedError(why)
        return text

    def _doc(self, repo: str, licence: str, at: int, part: "Joined") -> Doc:
        doc_id = f"{repo}/{at:05d}"
        meta = {
            "path": part.files[0][0],
            "repo": repo,
            "licence": licence,
            "group": f"repository/{repo if self.repository_splits else doc_id}",
            "files": json.dumps(part.files),
            INFILL_FROM: str(part.files[-1][1]),
        }
        return Doc(doc_id, part.text, self.name, meta)


class Graph(NamedTuple):
    """needs: for every path the paths it imports, sorted; unparsed: files that did not parse."""

    needs: dict[str, tuple[str, ...]]
    unparsed: int


class Order(NamedTuple):
    """Paths, dependencies first. cycles: components of several files; broken: edges against it."""

    paths: tuple[str, ...]
    cycles: int
    broken: int


class Joined(NamedTuple):
    """Text of one document, and where in it the files are: (path, begin, end)."""

    text: str
    files: tuple[tuple[str, int, int], ...]


def dependencies(texts: Mapping[str, str]) -> Graph:
    """Which files of one repository need which others of it.

    Python: imports that run on import (those inside functions mostly avoid a cycle), of the most
    specific file. C family: quoted or angled includes. JavaScript family: relative imports. Other
    languages: none. Files that do not parse keep their place by path.
    """
    known = _Known(texts)
    needs, unparsed = {}, 0
    for path in sorted(texts):
        found: set[str] = set()
        ending = path.rpartition(".")[2].lower()
        if ending == "py":
            tree = _parsed(texts[path])
            unparsed += tree is None
            found = _python_needs(path, tree, known) if tree else found
        elif ending in _C_FAMILY:
            found = {known.include(path, name) for name in _INCLUDE.findall(texts[path])} - {""}
        elif ending in _JS_FAMILY:
            found = {known.relative_js(path, name) for name in _JS_IMPORT.findall(texts[path])}
        needs[path] = tuple(sorted(found - {path, ""}))
    return Graph(needs, unparsed)


def order(needs: Mapping[str, Sequence[str]]) -> Order:
    """Every path once: a file after all it needs, but for needs inside a cycle.

    A pure function of the graph: neither the order of `needs` nor of its values matters.
    """
    paths: list[str] = []
    cycles = broken = 0
    for component in _components(needs):
        inside = _fewest_missing_first(component, needs)
        place = {path: at for at, path in enumerate(inside)}
        broken += sum(place.get(n, -1) > at for p, at in place.items() for n in needs[p])
        cycles += len(component) > 1
        paths += inside
    return Order(tuple(paths), cycles, broken)


def join(files: Sequence[tuple[str, str]], max_chars: int) -> list[Joined]:
    """Documents of at most `max_chars` characters from (path, text) in their order.

    A file goes into the open document where it fits; a longer one than a document is cut at line
    ends, and its parts stand alone. (A path line alone may pass a tiny limit.)
    """
    documents: list[list[tuple[str, str]]] = []
    room = 0
    for path, text in files:
        parts = split_at_lines(text, _room(path, max_chars))
        for part in parts:
            size = len(_header(path)) + len(part) + 1
            if size > room or len(parts) > 1:
                documents.append([])
                room = max_chars
            documents[-1].append((path, part))
            room -= size
        if len(parts) > 1:
            room = 0
    return [_joined(members) for members in documents]


def _joined(members: Sequence[tuple[str, str]]) -> Joined:
    out, files, at = [], [], 0
    for path, text in members:
        begin = at + len(_header(path))
        block = _header(path) + text + ("" if text.endswith("\n") else "\n")
        files.append((path, begin, begin + len(text)))
        out.append(block)
        at += len(block)
    return Joined("".join(out), tuple(files))


def _header(path: str) -> str:
    before, after = COMMENT_OF[Path(path).suffix.lower()]
    return f"{before}{path}{after}\n"


def _room(path: str, max_chars: int) -> int:
    return max(1, max_chars - len(_header(path)) - 1)  # the line end that may have to be added


def _components(needs: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """Strongly connected components, each after those it needs (Tarjan, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    open_: list[str] = []
    place: dict[str, int] = {}  # in open_
    for root in sorted(needs):
        work = [] if root in index else [(root, iter(sorted(needs[root])))]
        while work:
            path, rest = work[-1]
            if path not in index:
                index[path] = low[path] = len(index)
                place[path] = len(open_)
                open_.append(path)
            for need in rest:
                if need not in index:
                    work.append((need, iter(sorted(needs[need]))))
                    break
                if need in place:
                    low[path] = min(low[path], index[need])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[path])
                if low[path] == index[path]:
                    component = open_[place[path] :]
                    del open_[place[path] :]
                    for member in component:
                        del place[member]
                    yield component


def _fewest_missing_first(
    component: Sequence[str], needs: Mapping[str, Sequence[str]]
) -> list[str]:
    missing = {path: set(needs[path]) & set(component) for path in component}
    placed: list[str] = []
    while missing:
        path = min(missing, key=lambda p: (len(missing[p]), p))
        del missing[path]
        for left in missing.values():
            left.discard(path)
        placed.append(path)
    return placed


class _Known:
    """Finds the files of a repository by how code names them; '' where there is none."""

    def __init__(self, texts: Mapping[str, str]):
        self.paths = frozenset(texts)
        self.packages = {posixpath.dirname(p) for p in texts if p.endswith("__init__.py")}
        self.modules: dict[str, str] = {}
        self.by_name: dict[str, list[str]] = {}
        python = sorted(path for path in texts if path.endswith(".py"))
        for of in (self._module, lambda path: path):  # from its package up, else from the top
            for path in python:
                self.modules.setdefault(_dotted(of(path)), path)
        for path in texts:
            self.by_name.setdefault(posixpath.basename(path), []).append(path)

    def _module(self, path: str) -> str:
        top = posixpath.dirname(path)
        while top in self.packages:
            top = posixpath.dirname(top)
        return posixpath.relpath(path, top) if top else path

    def first(self, *paths: str) -> str:
        return next((path for path in paths if path in self.paths), "")

    def python(self, base: str) -> str:
        return self.first(f"{base}.py", posixpath.join(base, "__init__.py"))

    def absolute(self, path: str, module: str) -> str:
        here = posixpath.dirname(path)
        if here not in self.packages:  # a script finds its neighbours first
            beside = self.python(posixpath.join(here, module.replace(".", "/")))
            if beside:
                return beside
        return self.modules.get(module, "")

    def include(self, path: str, name: str) -> str:
        near = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        if found := self.first(near, name, f"include/{name}", f"src/{name}"):
            return found
        same = self.by_name.get(posixpath.basename(name), ())
        ends = [other for other in same if other.endswith(f"/{name}")]
        return ends[0] if len(ends) == 1 else ""

    def relative_js(self, path: str, name: str) -> str:
        base = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        endings = ("", *(f".{e}" for e in _JS_FAMILY), *(f"/index.{e}" for e in _JS_FAMILY))
        return self.first(*(base + ending for ending in endings))


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _parsed(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's code
        try:
            return ast.parse(text)
        # ValueError: NUL. The last two: nested too deep for the parser.
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _python_needs(path: str, tree: ast.Module, known: _Known) -> set[str]:
    found: set[str] = set()
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
                found.add(next(filter(None, (known.absolute(path, name) for name in names)), ""))
        elif isinstance(node, ast.ImportFrom):
            found |= _from_needs(path, node, known)
        elif isinstance(node, ast.stmt | ast.Module | ast.ExceptHandler | ast.match_case):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                nodes += ast.iter_child_nodes(node)
    return found


def _from_needs(path: str, node: ast.ImportFrom, known: _Known) -> set[str]:
    module = node.module or ""
    if node.level:
        folder = posixpath.dirname(path)
        for _ in range(node.level - 1):
            folder = posixpath.dirname(folder)
        base = posixpath.join(folder, module.replace(".", "/")) if module else folder
        whole = known.python(base)
        parts = [known.python(posixpath.join(base, alias.name)) for alias in node.names]
    else:
        whole = known.absolute(path, module)
        parts = [known.absolute(path, f"{module}.{alias.name}") for alias in node.names]
    return {part or whole for part in parts}


_MAX_BYTES = 2**30
_C_FAMILY = frozenset("c h cc cpp cxx hh hpp cu cuh m".split())
_JS_FAMILY = ("js", "jsx", "mjs", "ts", "tsx")
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*(?:include|import)[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)
_JS_IMPORT = re.compile(r"""(?:\bfrom|\bimport|\brequire\()\s*['"](\.[^'"\n]+)['"]""")
