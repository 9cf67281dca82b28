"""The offline pipeline: lines of steps from sources to a corpus on disk, resumable, with manifests.

`build(Corpus(folder, (Line("web", sources, steps), ...)))` leaves FOLDER/LINE/STEP for every step:
shards, what the step learnt, and a manifest. A step that is there and whole is not made again: its
key hashes its repr (every threshold), its version and the documents it read. So a changed threshold
makes that step anew, and those behind it whose input became another. A killed run goes on at the
first shard that is missing; a damaged shard is found by its hash and made again, with a warning.
From the shell: `python -m glm45_jax.data.pipeline module:function --sources DIR --out DIR`.
"""

import fcntl
import functools
import hashlib
import json
import logging
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from glm45_jax.data.outputs import (
    MANIFEST,
    OUTPUTS_FORMAT,
    Counts,
    Manifest,
    Shard,
    Shards,
    added,
    damage,
    damaged_files,
    digest_of,
    file_facts,
    read_manifest,
    read_record,
    read_shard,
    record_name,
    summed,
    write_manifest,
    write_shard,
)
from glm45_jax.data.reading import LONE
from glm45_jax.data.sources import Doc, Source, counted
from glm45_jax.data.steps import LEARNED, Applied, Part, Step, Work
from glm45_jax.integrity import write_whole

log = logging.getLogger(__name__)

PIPELINE_FORMAT = 1  # raise it when the same lines give other documents
READ = "read"  # the first step of every line: the sources as shards
CORPUS = "corpus.json"

_STARTED = "started.json"  # in a step's folder while it is being made
_ERROR = "error_"  # begins the reason of a document on which a step raised
_NAME = re.compile(r"[\w][\w.-]*")
# What a step may raise over one document. Not OSError: a full disk is nobody's document.
_BAD = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Line:
    """Sources of one kind, and the steps all their documents go through, in order."""

    name: str
    sources: tuple[Source, ...]
    steps: tuple[Step, ...] = ()

    def __post_init__(self):
        for what, names in (
            ("source", [source.name for source in self.sources]),
            ("step", [READ, *(step.name for step in self.steps)]),
        ):
            if not names or len(set(names)) != len(names):
                raise ValueError(
                    f"line {self.name!r}: {what} names are {names}; give at least one, all "
                    "different"
                )
            for name in (self.name, *names):
                if not _NAME.fullmatch(name):
                    raise ValueError(f"{what} {name!r} names a file; use letters, digits, . _ -")
        for part in (*self.sources, *self.steps):
            if " at 0x" in repr(part):
                raise ValueError(
                    f"{part!r} is named by its address, so every run would make it anew; use "
                    "frozen dataclasses"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Of all steps, `read` first."""
        return (READ, *(step.name for step in self.steps))


@dataclass(frozen=True)
class Corpus:
    """Where it lies and what it is made of. A line may read what an earlier line wrote (`Shards`).

    shard_chars: a shard ends with the document that reaches them; work that a kill can lose.
    max_chars: of a document; longer ones are dropped as too_long. max_errors: documents of a step
    that may fail, each counted as error_NAME; more of them, or all of a shard, and the error is
    taken for the step's own. All numbers are a CHOICE.
    """

    folder: str
    lines: tuple[Line, ...]
    shard_chars: int = 8_000_000
    max_chars: int = 20_000_000
    max_errors: int = 100

    def __post_init__(self):
        names = [line.name for line in self.lines]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"line names are {names}; give at least one, all different")
        if self.shard_chars < 1 or self.max_chars < 1:
            raise ValueError(
                f"shard_chars {self.shard_chars} and max_chars {self.max_chars} must be 1 or more"
            )

    def output(self, line: str, step: str = "", of: tuple[str, ...] = ()) -> Shards:
        """What a line gives, as a source with its name: of its last step, or of `step`.

        Raises: ValueError for a line or a step that is not there.
        """
        found = {one.name: one for one in self.lines}.get(line)
        if found is None or (step and step not in found.names):
            there = [one.name for one in self.lines] if found is None else found.names
            raise ValueError(f"no {step if found else line!r} in {list(there)}")
        return Shards(str(Path(self.folder) / line / (step or found.names[-1])), line, of)


class Built(NamedTuple):
    """steps: manifests by line and step. made: those that were made now. seconds: of these.

    digest: sha256 (hex) of the documents that all lines give.
    """

    steps: dict[tuple[str, str], Manifest]
    made: tuple[tuple[str, str], ...]
    seconds: dict[tuple[str, str], float]
    digest: str


def build(corpus: Corpus) -> Built:
    """Makes what is missing; twice the same corpus gives the same bytes.

    Raises: ValueError when another process builds there, when the folder holds something else, or
    when a source gives other documents the second time.
    """
    steps: dict[tuple[str, str], Manifest] = {}
    seconds: dict[tuple[str, str], float] = {}
    with _locked(Path(corpus.folder)):
        for line in corpus.lines:
            before: Manifest | None = None
            for number, name in enumerate(line.names):
                began = time.monotonic()
                step = line.steps[number - 1] if number else None
                before, fresh = _make(corpus, line, step, before)
                steps[line.name, name] = before
                if fresh:
                    seconds[line.name, name] = round(time.monotonic() - began, 2)
                _say(before, fresh)
        last = [(line.name, steps[line.name, line.names[-1]].digest) for line in corpus.lines]
        digest = hashlib.sha256(json.dumps(last).encode()).hexdigest()
        about = {"digest": digest, "lines": {line.name: line.names for line in corpus.lines}}
        write_whole(Path(corpus.folder) / CORPUS, json.dumps(about, indent=1).encode() + b"\n")
    return Built(steps, tuple(seconds), seconds, digest)


def _make(
    corpus: Corpus, line: Line, step: Step | None, before: Manifest | None
) -> tuple[Manifest, bool]:
    """The manifest of a step (None: reading), and whether it was made now."""
    folder = Path(corpus.folder) / line.name / (step.name if step else READ)
    if step is None or before is None:
        what, version = repr(line.sources), " | ".join(s.version() for s in line.sources)
        inputs = {s.name: f"{type(s).__name__} {s.version()}" for s in line.sources}
        limits = [corpus.shard_chars, corpus.max_chars]
    else:
        what, version = repr(step), step.version()
        inputs, limits = {before.name: before.digest}, [corpus.max_errors]
    kind = type(step).__name__ if step else READ
    parts = [OUTPUTS_FORMAT, PIPELINE_FORMAT, kind, what, version, inputs, limits]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    there = _whole(folder, key)
    if there is not None:
        return there, False
    _begin(folder, key)
    if step is None or before is None:
        shards, sources = _read(corpus, line, folder)
    else:
        shards, sources = _apply(corpus, line, step, before, folder)
    learned = sorted(p for p in folder.iterdir() if p.name.startswith(LEARNED))
    manifest = Manifest(
        format=OUTPUTS_FORMAT,
        line=line.name,
        name=folder.name,
        key=key,
        digest=digest_of(shards),
        step=what,
        version=version,
        code=_code(line.sources if step is None else (step,)),
        inputs=inputs,
        sources=sources,
        shards=shards,
        files={path.name: file_facts(path) for path in learned},
    )
    write_manifest(folder, manifest)
    (folder / _STARTED).unlink()
    return manifest, True


def _read(corpus: Corpus, line: Line, folder: Path) -> tuple[tuple[Shard, ...], dict[str, Counts]]:
    """Sources as shards. A source is read from its beginning again, but written only where a
    shard is missing.
    """
    shards: list[Shard] = []
    sources = {}
    for source in line.sources:
        told: dict[str, int] = {}
        mine = []
        for at, (docs, counts) in enumerate(_cut(corpus, line, source, told)):
            file = f"{source.name}-{at:05d}.jsonl.gz"
            shard = read_record(folder, file)
            if shard is not None and shard.counts != counts:
                raise ValueError(
                    f"source {source.name!r} gave other documents before the run was killed; its "
                    "docs() must give the same ones each time, or its version() say otherwise"
                )
            mine.append(shard or write_shard(folder, file, source.name, docs, counts))
        shards += mine
        sources[source.name] = replace(summed(s.counts for s in mine), told=dict(told))
    return tuple(shards), sources


def _cut(
    corpus: Corpus, line: Line, source: Source, told: dict[str, int]
) -> Iterator[tuple[list[Doc], Counts]]:
    """Documents of a source by shards, at least one, with the counts of each."""
    docs: list[Doc] = []
    why: Counter[str] = Counter()
    seen: set[bytes] = set()
    size = size_in = 0
    with _bar(f"{line.name}: read {source.name}") as bar:
        for doc in counted(source, told):
            reason = _unreadable(doc, corpus.max_chars)
            if not reason:
                place = hashlib.blake2b(_bytes(doc.id), digest_size=16).digest()
                reason = "repeated_id" if place in seen else ""
                seen.add(place)
            chars = len(doc.text) if isinstance(doc.text, str) else 0
            bar.update(chars)
            size_in += chars
            if reason:
                why[reason] += 1
                continue
            docs.append(doc)
            size += chars
            if size >= corpus.shard_chars:
                yield docs, _counts(len(docs) + why.total(), docs, size_in, why)
                docs, why, size, size_in = [], Counter(), 0, 0
        if docs or why or not seen:
            yield docs, _counts(len(docs) + why.total(), docs, size_in, why)


def _apply(
    corpus: Corpus, line: Line, step: Step, before: Manifest, folder: Path
) -> tuple[tuple[Shard, ...], dict[str, Counts]]:
    """One shard for each of the step before. The step looks at all documents only if one is
    missing.
    """
    source_folder = folder.parent / before.name
    names = [source.name for source in line.sources]
    inputs = [Shards(str(source_folder), name, (name,)) for name in names]
    budget = _Budget(f"{line.name}/{step.name}", corpus.max_errors)
    work: Work | None = None
    first = 0
    shards: list[Shard] = []
    with _bar(f"{line.name}: {step.name}", sum(s.counts.chars_out for s in before.shards)) as bar:
        for shard in before.shards:
            made = read_record(folder, shard.file)
            if made is None:
                work = work or step.fit(inputs, folder)
                docs = list(read_shard(source_folder, shard))
                part = Part(shard.source, first, docs)
                out, counts = _applied(work, part, budget)
                made = write_shard(folder, shard.file, shard.source, out, counts)
            shards.append(made)
            first += shard.counts.docs_out
            bar.update(shard.counts.chars_out)
    by_source = {name: summed(s.counts for s in shards if s.source == name) for name in names}
    return tuple(shards), by_source


@dataclass
class _Budget:
    """How many documents of a step may still fail."""

    where: str
    left: int

    def spend(self, doc: Doc, error: Exception) -> None:
        log.warning("%s: document %r fails: %r; dropped", self.where, doc.id, error)
        self.left -= 1
        if self.left < 0:
            raise error


def _applied(work: Work, part: Part, budget: _Budget) -> tuple[list[Doc], Counts]:
    """A shard through a step, and what became of each document."""
    try:
        applied = work(part)
    except _BAD as error:
        applied = _without_bad(work, part, budget)
        failed = sum(n for reason, n in applied.why.items() if reason.startswith(_ERROR))
        if len(part.docs) == failed > 1:
            raise error  # not one document passes: it is not the documents
    came, left = {doc.id for doc in part.docs}, {doc.id for doc in applied.docs}
    why = Counter({reason: n for reason, n in applied.why.items() if n})
    unexplained = len(came - left) - why.total()
    why.update({"other": unexplained} if unexplained > 0 else {})
    chars_in = sum(len(doc.text) for doc in part.docs)
    counts = _counts(len(part.docs), applied.docs, chars_in, why)
    return applied.docs, replace(counts, told=dict(sorted(applied.told.items())))


def _without_bad(work: Work, part: Part, budget: _Budget) -> Applied:
    """Halves the shard until the documents that fail stand alone, and drops those."""
    if len(part.docs) == 1:
        try:
            return work(part)
        except _BAD as error:
            budget.spend(part.docs[0], error)
            return Applied([], {f"{_ERROR}{type(error).__name__}": 1}, {})
    half = len(part.docs) // 2
    found = Applied([], {}, {})
    for low, docs in ((0, part.docs[:half]), (half, part.docs[half:])):
        piece = Part(part.source, part.first + low, docs)
        try:
            one = work(piece)
        except _BAD:
            one = _without_bad(work, piece, budget)
        found = Applied(
            found.docs + one.docs, added(found.why, one.why), added(found.told, one.told)
        )
    return found


def _counts(docs_in: int, docs: Sequence[Doc], chars_in: int, why: Mapping[str, int]) -> Counts:
    gone = sum(why.values())
    return Counts(
        docs_in=docs_in,
        docs_out=len(docs),
        chars_in=chars_in,
        chars_out=sum(len(doc.text) for doc in docs),
        added=max(0, len(docs) + gone - docs_in),
        dropped=dict(sorted(why.items())),
    )


def _unreadable(doc: Any, max_chars: int) -> str:
    """Why a document cannot be one; empty when it can."""
    if not isinstance(doc.text, str) or not isinstance(doc.id, str):
        return "not_text"
    if any(not isinstance(part, str) for pair in doc.meta.items() for part in pair):
        return "bad_meta"
    if len(doc.text) > max_chars:
        return "too_long"
    if not doc.text or doc.text.isspace():
        return "blank"
    return "lone_surrogates" if LONE.search(doc.text) else ""


def _whole(folder: Path, key: str) -> Manifest | None:
    """The manifest of a step that is made from the same things and whole; else None.

    Damaged shards are taken away, so that only they are made again.
    """
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        log.warning("%s; it is made again", error)
        return None
    if manifest.key != key:
        return None
    bad = [(shard, why) for shard in manifest.shards if (why := damage(folder, shard))]
    bad_files = damaged_files(folder, manifest.files)
    if not bad and not bad_files:
        return manifest
    for why in (*(why for _, why in bad), *bad_files):
        log.warning("%s; the step is made again", why)
    if bad_files:  # what was learnt decides all shards
        return None
    write_whole(folder / _STARTED, json.dumps({"key": key}).encode())
    (folder / MANIFEST).unlink()
    for shard, _ in bad:
        (folder / record_name(shard.file)).unlink(missing_ok=True)
    return None


def _begin(folder: Path, key: str) -> None:
    """A folder in which this step was begun, by a killed run or now."""
    started, old = folder / _STARTED, folder.with_name(f".{folder.name}.old")
    for left in folder.glob(".*.writing"):
        left.unlink()
    known = [path for path in (started, folder / MANIFEST) if path.is_file()]
    if folder.exists() and not known and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds files that no pipeline wrote; choose another folder, or empty it"
        )
    try:
        resumes = known == [started] and json.loads(started.read_bytes())["key"] == key
    except (ValueError, KeyError):
        resumes = False
    shutil.rmtree(old, ignore_errors=True)
    if not resumes:
        if folder.exists():
            folder.rename(old)  # at once: half a folder could not be told from somebody's files
            shutil.rmtree(old)
        folder.mkdir(parents=True)
        write_whole(started, json.dumps({"key": key}).encode())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process builds in {folder}; wait for it, or choose another folder"
            ) from error
        yield


def _bar(what: str, total: int | None = None) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=" chars", unit_scale=True, disable=None)


def _say(manifest: Manifest, fresh: bool) -> None:
    counts = summed(manifest.sources.values())
    log.info(
        "%s/%s: %s of %s documents, %s",
        manifest.line,
        manifest.name,
        f"{counts.docs_out:,}",
        f"{counts.docs_in:,}",
        "made" if fresh else "there already",
    )


def _code(parts: Sequence[Any]) -> dict[str, str]:
    """Hashes of the files that define a step, by module: which code made it, to the letter."""
    modules = {"glm45_jax.data.pipeline", "glm45_jax.data.outputs"}
    left = list(parts)
    while left:
        part = left.pop()
        if isinstance(part, tuple):
            left += part
        elif is_dataclass(part):
            modules.add(type(part).__module__)
            left += [getattr(part, field.name) for field in fields(part)]
    return {name: _digest_of_module(name) for name in sorted(modules)}


@functools.cache
def _digest_of_module(name: str) -> str:
    file = getattr(sys.modules.get(name), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


if __name__ == "__main__":
    from glm45_jax.data.funnel import main

    raise SystemExit(main())
