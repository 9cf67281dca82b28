"""Quality as a number of epochs: scores to buckets, buckets to levels, levels to repeats.

One line of a `Data`: `Leveled(source, Quality(scorers=(a, b)))`. Nemotron-CC's way for web pages is
`Percentiles` (each scorer's ranks in 20 buckets, the maximum over scorers, merged into 5 levels);
tiers by score, as for code and for languages, are `Thresholds`; `groups` parts the documents by
language. No text is repeated here: a document carries `meta["epochs"]`, which become copies where
stores are written (`copies_of`, `repeated`), after duplicates are dropped and the split is made. So
copies are no duplicates, lie on one side, and validation reads each document once.
Source: spec 6 D2, D3, D7, D9.
"""

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from glm45_jax.data.scorers import Judge, Scorer
from glm45_jax.data.sources import Doc, DroppedError, Source, counted, refuse_encoder

QUALITY_FORMAT = 1  # raise it when the same fields give other epochs

EPOCHS = "epochs"  # meta of a Doc: how often it is to be read, a number that need not be whole

# The level of each of 20 buckets. Nemotron-CC merges by what a model learns from each; these
# borders are UNVERIFIED.
NEMOTRON_LEVELS = (0,) * 7 + (1,) * 5 + (2,) * 6 + (3,) + (4,)

Scores = tuple[float, ...]  # of one document: one a scorer, 0 to 1


@dataclass(frozen=True)
class Percentiles:
    """Buckets of equal size on each scorer; a document has its best one. Levels merge buckets.

    levels: of every bucket, lowest bucket first, numbered from 0 without a gap.
    edges: for each scorer the scores above which the buckets from 1 on begin, as `measured` finds
    them; () measures them on the documents themselves, group by group.
    """

    levels: tuple[int, ...] = NEMOTRON_LEVELS
    edges: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        if set(self.levels) != set(range(max(self.levels, default=-1) + 1)) or not self.levels:
            raise ValueError(f"levels {self.levels} do not number 0, 1, ... without a gap")
        for row in self.edges:
            if len(row) != len(self.levels) - 1 or list(row) != sorted(row):
                raise ValueError(
                    f"{len(row)} edges for {len(self.levels)} buckets; give one fewer, rising"
                )

    def measured(self, scores: Sequence[Scores]) -> "Percentiles":
        """With the edges of these scores. They are scores themselves, so ranks alone decide: a
        rising map of a scorer changes nothing. Equal scores share their lowest bucket.

        Raises: ValueError for a scorer that cannot rank: one score for all documents.
        """
        n, buckets = len(scores), len(self.levels)
        if self.edges or not n:
            return self
        columns = [sorted(column) for column in zip(*scores, strict=True)]
        for number, column in enumerate(columns):
            if n > 1 and column[0] == column[-1]:
                raise ValueError(
                    f"scorer {number} gives each of {n} documents the score {column[0]}, so it "
                    "cannot rank them; train it on other documents, or leave it out"
                )
        below = [-(-edge * n // buckets) for edge in range(1, buckets)]  # documents under each edge
        return replace(self, edges=tuple(tuple(c[m - 1] for m in below) for c in columns))

    def bucket(self, scores: Scores) -> int:
        """The bucket of a document: the maximum over its scorers."""
        if len(self.edges) != len(scores):
            raise ValueError(
                f"{len(self.edges)} rows of edges for {len(scores)} scorers; `measured` makes one "
                "for each"
            )
        return max(map(bisect_left, self.edges, scores))


@dataclass(frozen=True)
class Thresholds:
    """Levels by score: as many as thresholds that the best of its scores reaches."""

    at: tuple[float, ...] = (0.3, 0.7)

    def __post_init__(self):
        if list(self.at) != sorted(set(self.at)):
            raise ValueError(f"thresholds {self.at} do not rise")

    @property
    def levels(self) -> tuple[int, ...]:
        """Buckets are levels."""
        return tuple(range(len(self.at) + 1))

    def measured(self, scores: Sequence[Scores]) -> "Thresholds":
        """Itself: nothing to measure."""
        del scores
        return self

    def bucket(self, scores: Scores) -> int:
        """The level of a document."""
        return bisect_right(self.at, max(scores))


class Grade(NamedTuple):
    """What the scores of a document earn it."""

    bucket: int
    level: int
    epochs: float


@dataclass(frozen=True)
class Quality:
    """What is scored, how scores become levels, and how often each level is read.

    epochs: of each level, lowest first; 0 drops it. The defaults are a CHOICE within what GLM-4.5
    states: the lowest is dropped, the highest is read more than 3.2 times.
    """

    scorers: tuple[Scorer, ...]
    cut: Percentiles | Thresholds = Percentiles()
    epochs: tuple[float, ...] = (0.0, 0.8, 1.2, 2.0, 3.3)

    def __post_init__(self):
        if not self.scorers:
            raise ValueError("scorers is empty; give at least one")
        levels = max(self.cut.levels) + 1
        if len(self.epochs) != levels:
            raise ValueError(f"{len(self.epochs)} epochs for {levels} levels; give one a level")
        if not all(0 <= epochs < math.inf for epochs in self.epochs):
            raise ValueError(f"epochs {self.epochs} are not all numbers from 0 on; 0 drops a level")

    def grade(self, scores: Scores) -> Grade:
        """Bucket, level and epochs of a document with these scores."""
        bucket = self.cut.bucket(scores)
        level = self.cut.levels[bucket]
        return Grade(bucket, level, self.epochs[level])


class Group(NamedTuple):
    """Which quality a document is held to. meta: what it then says of itself."""

    name: str
    meta: Mapping[str, str]


class Groups(Protocol):
    """How documents are parted: `Everything`, `NaturalLanguage`, `CodeLanguage`."""

    def of(self, doc: Doc) -> Group:
        """The group of a document.

        Raises: DroppedError, with the reason, where it has none.
        """
        ...

    def version(self) -> str:
        """As of a source."""
        ...


@dataclass(frozen=True)
class Everything:
    """One group, without a name."""

    def of(self, doc: Doc) -> Group:
        """That group."""
        del doc
        return Group("", {})

    def version(self) -> str:
        """Nothing that could change."""
        return ""


@dataclass(frozen=True)
class Leveled:
    """The documents of `source`, each with its level and the epochs that this earns it.

    quality: one for all groups (percentiles are still those of each group), or pairs of group and
    quality; a document of another group is dropped and counted. Percentiles without edges read the
    source twice, once to rank and once to hand on.
    Documents get meta: bucket, level, epochs (times those they had), and what the group says.
    """

    source: Source
    quality: Quality | tuple[tuple[str, Quality], ...]
    groups: Groups = Everything()

    def __post_init__(self):
        refuse_encoder(self.source, "Leveled")
        names = [] if isinstance(self.quality, Quality) else [name for name, _ in self.quality]
        if len(set(names)) != len(names):
            raise ValueError(f"groups are {names}; give each one quality")

    @property
    def name(self) -> str:
        """The name of the source inside."""
        return self.source.name

    def version(self) -> str:
        """That of the source inside, of the groups and of the scorers."""
        parts = [self.source.version(), f"quality={QUALITY_FORMAT}", self.groups.version()]
        return " ".join(filter(None, [*parts, *(s.version() for s in self._scorers())]))

    def measured(self) -> "Leveled":
        """With the edges of all percentiles, from one reading of the source: for shards of it that
        are leveled apart, or to level other documents by the same borders.
        """
        table, _ = self._measure(self._judges())
        return replace(self, quality=tuple(table.items()))

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """The documents of every level that is read at all.

        Returns counts: quality_in, quality_kept, quality_dropped_*, and for every group
        quality_[GROUP_]bucket_B_docs, _level_L_docs, _level_L_chars, _level_L_epoch_chars (the
        characters times the epochs of this wrapper).

        Raises: ValueError when a second reading of the source gives other documents.
        """
        judges = self._judges()
        table, scored = self._measure(judges) if self._unmeasured() else ({}, None)
        inner: dict[str, int] = {}
        counts = defaultdict[str, float](float, quality_in=0, quality_kept=0)
        for number, doc in enumerate(counted(self.source, inner)):
            one = self._score(doc, judges) if scored is None else _same(scored, number, doc)
            counts["quality_in"] += 1
            quality = table.get(one.group.name) or self._quality(one.group.name)
            if one.dropped or quality is None:
                counts[f"quality_dropped_{one.dropped}"] += 1
                continue
            grade = quality.grade(one.scores)
            _tally(counts, one.group.name, grade, len(doc.text))
            if grade.epochs > 0:
                yield _marked(doc, one.group, grade)
        return inner | {name: round(count) for name, count in counts.items()}

    def _quality(self, group: str) -> Quality | None:
        """The quality of a group as the field has it; None where it has none."""
        return self.quality if isinstance(self.quality, Quality) else dict(self.quality).get(group)

    def _qualities(self) -> tuple[Quality, ...]:
        if isinstance(self.quality, Quality):
            return (self.quality,)
        return tuple(quality for _, quality in self.quality)

    def _scorers(self) -> list[Scorer]:
        """Each one once."""
        return list(dict.fromkeys(s for quality in self._qualities() for s in quality.scorers))

    def _judges(self) -> dict[Scorer, Judge]:
        return {scorer: scorer.classifier() for scorer in self._scorers()}

    def _unmeasured(self) -> bool:
        cuts = [quality.cut for quality in self._qualities()]
        return any(isinstance(cut, Percentiles) and not cut.edges for cut in cuts)

    def _score(self, doc: Doc, judges: Mapping[Scorer, Judge]) -> "_Scored":
        try:
            group = self.groups.of(doc)
        except DroppedError as error:
            return _Scored(doc.id, Group("", {}), str(error))
        quality = self._quality(group.name)
        if quality is None:
            return _Scored(doc.id, group, f"group_{group.name}")
        scores = tuple(judges[scorer].score(doc.text) for scorer in quality.scorers)
        return _Scored(doc.id, group, scores=scores)

    def _measure(
        self, judges: Mapping[Scorer, Judge]
    ) -> tuple[dict[str, Quality], "list[_Scored]"]:
        """The quality of every group that occurs, with edges; what each document scored."""
        scored = [self._score(doc, judges) for doc in self.source.docs()]
        scores_of: defaultdict[str, list[Scores]] = defaultdict(list)
        for one in scored:
            if not one.dropped:
                scores_of[one.group.name].append(one.scores)
        table = {}
        for group, scores in sorted(scores_of.items()):
            quality = self._quality(group)
            assert quality is not None  # else its documents were dropped
            table[group] = replace(quality, cut=quality.cut.measured(scores))
        return table, scored


def copies_of(doc: Doc, seed: int = 0) -> int:
    """How often a document is read: the whole part of its epochs, and once more with the chance of
    the rest, decided by a hash of its source and id: the same in every run and every order.

    Raises: ValueError for epochs that are no number from 0 on.
    """
    text = doc.meta.get(EPOCHS, "1")
    try:
        epochs = float(text)
    except ValueError:
        epochs = math.nan
    if not 0 <= epochs < math.inf:
        raise ValueError(
            f"document {doc.id!r} of {doc.source!r} has epochs {text!r}; use 0 or more"
        )
    whole = math.floor(epochs)
    return whole + (_place(seed, doc) < (epochs - whole) * 2**64)


def repeated(docs: Sequence[Doc], seed: int = 0) -> list[Doc]:
    """Every document as often as `copies_of` says: a round of all, then one of those that are read
    again, and so on. No document stands twice in a round, so copies lie apart.

    The first round keeps the order of `docs`, later ones have their own; in those meta["copy"]
    counts from 1.
    """
    pairs = [(doc, copies_of(doc, seed)) for doc in docs]
    found = [doc for doc, copies in pairs if copies]
    for copy in range(1, max((copies for _, copies in pairs), default=0)):
        again = [doc for doc, copies in pairs if copies > copy]
        again.sort(key=lambda doc: _place(seed, doc, copy))
        found += [replace(doc, meta={**doc.meta, "copy": str(copy)}) for doc in again]
    return found


class _Scored(NamedTuple):
    """A document without its text. dropped: the reason, if it is."""

    id: str
    group: Group
    dropped: str = ""
    scores: Scores = ()


def _same(scored: "list[_Scored]", number: int, doc: Doc) -> _Scored:
    if number >= len(scored) or scored[number].id != doc.id:
        raise ValueError(
            f"document {number} of {doc.source!r} is {doc.id!r}, on the first reading it was not; "
            "a source must give the same documents every time"
        )
    return scored[number]


def _marked(doc: Doc, group: Group, grade: Grade) -> Doc:
    epochs = float(doc.meta.get(EPOCHS, "1")) * grade.epochs
    marks = {"bucket": str(grade.bucket), "level": str(grade.level), EPOCHS: repr(epochs)}
    return replace(doc, meta={**doc.meta, **group.meta, **marks})


def _tally(counts: defaultdict[str, float], group: str, grade: Grade, chars: int) -> None:
    label = f"quality_{group}_" if group else "quality_"
    level = f"{label}level_{grade.level}"
    counts[f"{label}bucket_{grade.bucket:02d}_docs"] += 1
    counts[f"{level}_docs"] += 1
    counts[f"{level}_chars"] += chars
    counts[f"{level}_epoch_chars"] += chars * grade.epochs
    counts["quality_kept" if grade.epochs > 0 else "quality_dropped_level"] += 1


def _place(seed: int, doc: Doc, copy: int = 0) -> int:
    """A place in 0 .. 2**64, by hash."""
    key = f"{seed}\0{doc.source}\0{doc.id}\0{copy}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(key).digest()[:8])
