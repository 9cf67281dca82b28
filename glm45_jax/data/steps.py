"""The steps of a pipeline: what stands between the sources and a corpus, as frozen values.

A step sees a shard of documents at a time and is a function of it. What it must know of all
documents first (which are duplicates, where percentiles lie, a trained classifier) is its `fit`.
`Each` makes a step of any wrapper that looks at one document after the other: `Each("rules",
Filtered(HERE, CodeRules()))`; `Dedup` takes the rules of `data/dedup.py`, `Level` the qualities of
`data/quality.py`. The thresholds are in those values, and so in the repr of the step.
Letters: `N` documents of all sources of a line, in the order they are read in.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from glm45_jax.data.dedup import (
    DEDUP_FORMAT,
    Deduplicated,
    Facts,
    FirstSource,
    Found,
    Keep,
    Read,
    Rule,
    best_of_groups,
)
from glm45_jax.data.quality import (
    EPOCHS,
    Everything,
    Groups,
    Leveled,
    Percentiles,
    Quality,
    Thresholds,
)
from glm45_jax.data.scorers import Classifier, Judge, Saved, Scorer, save
from glm45_jax.data.shingles import SHINGLES_FORMAT, encoded
from glm45_jax.data.sources import Doc, Source, counted
from glm45_jax.integrity import write_whole

LEARNED = "learned"  # files of a step that begin so are part of its manifest
_DROPPED = "_dropped_"


class Part(NamedTuple):
    """A shard. source: the name of its source; first: documents of the line before it."""

    source: str
    first: int
    docs: Sequence[Doc]


class Applied(NamedTuple):
    """What a step makes of a shard. why: reasons of those that went; told: other counts."""

    docs: list[Doc]
    why: Mapping[str, int]
    told: Mapping[str, int]


Work = Callable[[Part], Applied]


class Step(Protocol):
    """A frozen dataclass whose repr says all its output depends on but `version`."""

    @property
    def name(self) -> str:
        """Unique in its line; the name of its folder."""
        ...

    def version(self) -> str:
        """Formats, libraries and other documents that its output depends on."""
        ...

    def fit(self, inputs: Sequence[Source], folder: Path) -> Work:
        """The function of a shard, after a look at all documents if it needs one.

        inputs: one a source of the line. folder: for files named `learned*`, which a second call
        may read instead of learning again.
        """
        ...


@dataclass(frozen=True)
class Here:
    """Stands for the documents of the step before, inside a wrapper."""

    name: str = "here"

    def docs(self) -> Iterator[Doc]:
        """Nothing to read: a pipeline puts a source here."""
        raise ValueError("HERE stands for the step before; only a pipeline can read it")

    def version(self) -> str:
        """Nothing."""
        return ""


HERE = Here()


@dataclass(frozen=True)
class Each:
    """A wrapper around `HERE` that looks at one document after the other."""

    name: str
    wrapper: Source

    def __post_init__(self):
        if getattr(self.wrapper, "source", None) != HERE:
            raise ValueError(f"{self.wrapper!r} is not a wrapper around HERE")
        for kind, instead in ((Leveled, "Level"), (Deduplicated, "Dedup")):
            if isinstance(self.wrapper, kind):
                raise ValueError(f"{kind.__name__} looks at all documents; use {instead}(...)")

    def version(self) -> str:
        """That of the wrapper."""
        return self.wrapper.version()

    def fit(self, inputs: Sequence[Source], folder: Path) -> Work:
        """Trains the scorers that the wrapper holds, so that a shard does not."""
        del inputs
        trained = _trained(self.wrapper, folder)
        return lambda part: _through(trained, part)


@dataclass(frozen=True)
class Level:
    """Levels and epochs by quality (`Leveled`), borders measured over all sources of the line."""

    quality: Quality | tuple[tuple[str, Quality], ...]
    groups: Groups = Everything()
    name: str = "level"

    def version(self) -> str:
        """Of groups and scorers."""
        return Leveled(HERE, self.quality, self.groups).version()

    def fit(self, inputs: Sequence[Source], folder: Path) -> Work:
        """Trains the scorers, measures the borders of percentiles; both are kept in `folder`."""
        leveled = Leveled(_Joined(tuple(inputs)), _trained(self.quality, folder), self.groups)
        written = _learned(folder)
        if written is None:
            unmeasured = any(isinstance(c, Percentiles) and not c.edges for c in self._cuts())
            measured = leveled.measured() if unmeasured else leveled
            _learn(folder, {"edges": _edges(measured.quality) if unmeasured else None})
        else:
            measured = _with_edges(leveled, written["edges"])
        return lambda part: _through(measured, part)

    def _cuts(self) -> list[Percentiles | Thresholds]:
        if isinstance(self.quality, Quality):
            return [self.quality.cut]
        return [quality.cut for _, quality in self.quality]


@dataclass(frozen=True)
class Dedup:
    """Of documents that a rule finds equal or near one stays, over all sources of the line."""

    rule: Rule

    @property
    def name(self) -> str:
        """The label of the rule."""
        return self.rule.label

    def version(self) -> str:
        """Of the hashes."""
        return f"dedup={DEDUP_FORMAT}.{SHINGLES_FORMAT}"

    def fit(self, inputs: Sequence[Source], folder: Path) -> Work:
        """Reads everything and decides; what it found is kept as counts."""

        def read() -> Iterator[tuple[int, Doc]]:
            yield from (
                (place, doc) for place, source in enumerate(inputs) for doc in source.docs()
            )

        found = self.rule.find(read)
        _learn(folder, found.counts)
        names = [source.name for source in inputs]
        return lambda part: _without(found, names, part)


@dataclass(frozen=True)
class Exact:
    """Equal texts: a rule for `Dedup`. Takes 36 bytes a document."""

    keep: Keep = FirstSource()

    @property
    def label(self) -> str:
        """Of its counts."""
        return "exact"

    def find(self, read: Read) -> Found:
        """Groups by 128 bits of a hash of the text."""
        facts = Facts(self.keep)
        digests = b"".join(
            hashlib.blake2b(encoded(doc.text), digest_size=16).digest()
            for doc in facts.noting(read())
        )
        _, group_N = np.unique(np.frombuffer(digests, "V16"), return_inverse=True)
        return best_of_groups(facts.table(), group_N)


@dataclass(frozen=True)
class Long:
    """Long documents are read more often (spec 6 D19); epochs multiply those they had.

    min_chars: from there on a document is long. epochs_below: 0 drops the shorter ones. All
    numbers are a CHOICE.
    """

    min_chars: int = 98_304  # 32K tokens at 3 characters
    epochs: float = 2.0
    epochs_below: float = 0.0
    name: str = "long"

    def __post_init__(self):
        if self.epochs < 0 or self.epochs_below < 0:
            raise ValueError(f"epochs {self.epochs} and {self.epochs_below} must be 0 or more")

    def version(self) -> str:
        """Nothing else."""
        return "long=1"

    def fit(self, inputs: Sequence[Source], folder: Path) -> Work:
        """Nothing to learn."""
        del inputs, folder
        return self._lengthened

    def _lengthened(self, part: Part) -> Applied:
        docs, why, told = [], Counter[str](), Counter(long=0)
        for doc in part.docs:
            long = len(doc.text) >= self.min_chars
            told["long"] += long
            times = self.epochs if long else self.epochs_below
            if times > 0:
                epochs = repr(float(doc.meta.get(EPOCHS, "1")) * times)
                docs.append(replace(doc, meta={**doc.meta, EPOCHS: epochs}))
            else:
                why["long" if long else "short"] += 1
        return Applied(docs, why, told)


@dataclass(frozen=True)
class _Memory:
    """Documents that are there already."""

    kept: Sequence[Doc]
    name: str

    def docs(self) -> Iterator[Doc]:
        """As given."""
        return iter(self.kept)

    def version(self) -> str:
        """Never asked for."""
        return ""


@dataclass(frozen=True)
class _Joined:
    """Several sources, one after the other."""

    sources: tuple[Source, ...]
    name: str = "joined"

    def docs(self) -> Iterator[Doc]:
        """Of all."""
        for source in self.sources:
            yield from source.docs()

    def version(self) -> str:
        """Never asked for."""
        return ""


def _through(wrapper: Any, part: Part) -> Applied:
    """The documents of a shard through a wrapper, with the reasons it counts."""
    counts: dict[str, int] = {}
    docs = list(counted(replace(wrapper, source=_Memory(part.docs, part.source)), counts))
    why = Counter[str]()
    for name, n in counts.items():
        if _DROPPED in name:
            why[name.partition(_DROPPED)[2]] += n
    # Numbers of evaluation items are the same for each shard, so a sum would say nothing.
    told = {name: n for name, n in counts.items() if "_items" not in name and "ngram " not in name}
    if len(docs) < len(part.docs) and (found := counts.get("decontaminate_contaminated")):
        why["contaminated"] += found
    return Applied(docs, why, told)


def _without(found: Found, names: Sequence[str], part: Part) -> Applied:
    """The documents of a shard that a rule leaves, edited; reasons say what stands for one."""
    docs, why = [], Counter[str]()
    for at, doc in enumerate(part.docs, part.first):
        edited = found.edit(at, doc)
        if not found.stays_N[at]:
            why[f"like_one_of_{names[found.place_N[found.instead_N[at]]]}"] += 1
        elif doc.text and not edited.text:
            why["emptied"] += 1
        else:
            docs.append(edited)
    return Applied(docs, why, {})


def _trained[Value](value: Value, folder: Path) -> Value:
    """The value with all scorers in it trained, and saved in `folder` the first time."""
    scorers = list(dict.fromkeys(_scorers(value)))
    if not scorers:
        return value
    path = folder / f"{LEARNED}-scorers.json"
    files = json.loads(path.read_bytes()) if path.is_file() else None
    if files is None:
        paths = [folder / f"{LEARNED}-{number}.safetensors" for number in range(len(scorers))]
        kept = list(map(_kept, scorers, paths))
        files = [new and [Path(new.path).name, new.sha256] for new in kept]
        write_whole(path, json.dumps(files).encode() + b"\n")
    table = {
        scorer: scorer if file is None else Saved(str(folder / file[0]), file[1])
        for scorer, file in zip(scorers, files, strict=True)
    }
    return _swapped(value, table)


def _kept(scorer: Scorer, path: Path) -> Saved | None:
    """The scorer trained and saved; None where it is saved already or is no classifier."""
    judge = None if isinstance(scorer, Saved) else _judge(cast(Hashable, scorer), scorer.version())
    return save(judge, path) if isinstance(judge, Classifier) else None


@functools.lru_cache(maxsize=8)
def _judge(scorer: Any, version: str) -> Judge:
    """Trained; steps one after the other often ask for the same one."""
    del version  # of the documents that teach it
    return scorer.classifier()


def _scorers(value: Any) -> Iterator[Scorer]:
    """The scorers in a value, those inside of others (`OfPage`) in place of these."""
    parts = _parts(value)
    if hasattr(value, "classifier") and not any(hasattr(part, "classifier") for part in parts):
        yield value
        return
    for part in parts:
        yield from _scorers(part)


def _swapped(value: Any, table: Mapping[Scorer, Scorer]) -> Any:
    """The value with scorers replaced."""
    if hasattr(value, "classifier") and value in table:
        return table[value]
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_swapped(part, table) for part in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    old = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    new = {name: _swapped(part, table) for name, part in old.items()}
    changed = {name: part for name, part in new.items() if part is not old[name]}
    return replace(value, **changed) if any(changed[n] != old[n] for n in changed) else value


def _parts(value: Any) -> tuple[Any, ...]:
    if type(value) is tuple:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return tuple(getattr(value, f.name) for f in fields(value))
    return ()


def _edges(quality: Quality | tuple[tuple[str, Quality], ...]) -> dict[str, Any]:
    assert not isinstance(quality, Quality)  # `measured` gives one a group
    return {
        group: one.cut.edges if isinstance(one.cut, Percentiles) else None for group, one in quality
    }


def _with_edges(leveled: Leveled, edges: Mapping[str, Any] | None) -> Leveled:
    """What `measured` made, from the edges it found."""
    if edges is None:
        return leveled
    pairs = []
    for group, rows in edges.items():
        whole = leveled.quality
        one = whole if isinstance(whole, Quality) else dict(whole)[group]
        if rows is not None:
            assert isinstance(one.cut, Percentiles)
            one = replace(one, cut=replace(one.cut, edges=tuple(map(tuple, rows))))
        pairs.append((group, one))
    return replace(leveled, quality=tuple(pairs))


def _learn(folder: Path, what: Mapping[str, Any]) -> None:
    data = json.dumps(what, indent=1, sort_keys=True).encode()
    write_whole(folder / f"{LEARNED}.json", data + b"\n")


def _learned(folder: Path) -> dict[str, Any] | None:
    path = folder / f"{LEARNED}.json"
    return json.loads(path.read_bytes()) if path.is_file() else None
