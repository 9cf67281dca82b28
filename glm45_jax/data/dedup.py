"""Duplicates among the documents of several sources: one stays, the others go, all are counted.

One line of a `Data`: `sources=deduplicated(((A(), 0.8), (B(), 0.2)), MinHash(), SemDedup())` in
place of `sources=((A(), 0.8), (B(), 0.2))`. The rules work one after the other: `MinHash`,
`SemDedup` and, in this file, `Repeats` for paragraphs or lines (`prepare` drops equal documents
itself). A rule reads every source once or twice and keeps some numbers of each document, not its
text; then each source is read again as it is used. Documents in another order: the same ones stay.
Letters: `N` documents of all sources, in the order they are read in; `U` paragraphs; `E` pairs.
"""

import hashlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from glm45_jax.data.shingles import SHINGLES_FORMAT, draws, encoded, in_batches, mix
from glm45_jax.data.sources import Doc, Source, counted, refuse_encoder

log = logging.getLogger(__name__)

DEDUP_FORMAT = 1  # raise it when the same rules keep other documents
BATCH_CHARS = 1 << 20


class Keep(Protocol):
    """Which of several duplicates stays: the one with the highest score.

    Equal scores: the source named first, then a hash of id and text. So no order matters.
    """

    def score(self, doc: Doc) -> float:
        """Any finite number; looks at this document alone."""
        ...


@dataclass(frozen=True)
class Longest:
    """The one with the most characters."""

    def score(self, doc: Doc) -> float:
        """Characters."""
        return float(len(doc.text))


@dataclass(frozen=True)
class FirstSource:
    """One of the source that is named first; within a source any, but always the same one."""

    def score(self, doc: Doc) -> float:
        """No difference."""
        return 0.0


@dataclass(frozen=True)
class Best:
    """The one with the highest number in `meta[field]`, say a quality score."""

    field: str

    def score(self, doc: Doc) -> float:
        """That number.

        Raises: ValueError for a document without it.
        """
        try:
            found = float(doc.meta[self.field])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{doc.source}/{doc.id} has meta {self.field!r} = {doc.meta.get(self.field)!r}, "
                "Best needs a number there; score the source first, or keep Longest()"
            ) from error
        if not np.isfinite(found):
            raise ValueError(f"{doc.source}/{doc.id} has meta {self.field!r} = {found}, not finite")
        return found


@dataclass(frozen=True)
class AtRandom:
    """One by chance: a hash of seed, id and text."""

    seed: int = 0

    def score(self, doc: Doc) -> float:
        """A number in 0 to 1."""
        mixed = mix(draws(self.seed, 1) ^ np.uint64(_digest(doc.id, doc.text)))
        return int(mixed[0]) / 2**64


Read = Callable[[], Iterator[tuple[int, Doc]]]  # all documents, each with the place of its source


@dataclass(frozen=True)
class Found:
    """What a rule found. stays_N: bool. instead_N: for one that goes, which stands for it.

    counts: what to say of all sources together. edit: the document in place n, with less in it;
    without text it goes.
    """

    place_N: np.ndarray  # int32
    stays_N: np.ndarray
    instead_N: np.ndarray  # int64
    counts: dict[str, int]
    edit: Callable[[int, Doc], Doc] = lambda _, doc: doc


class Rule(Protocol):
    """What finds duplicates; a frozen dataclass whose repr says all it depends on."""

    @property
    def label(self) -> str:
        """What its counts begin with."""
        ...

    def find(self, read: Read) -> Found:
        """Reads once or more; the answer must not depend on the order of documents."""
        ...


def deduplicated(
    sources: Sequence[tuple[Source, float]], *rules: Rule
) -> tuple[tuple[Source, float], ...]:
    """The same sources with the same weights, without the duplicates within and between them."""
    among = tuple(source for source, _ in sources)
    return tuple((Deduplicated(source, rules, among), weight) for source, weight in sources)


@dataclass(frozen=True)
class Deduplicated:
    """Those documents of `source` that stay when the sources `among` are deduplicated together.

    rules: each looks at what the one before it left. among: `source` and others; () means `source`
    alone.
    """

    source: Source
    rules: tuple[Rule, ...]
    among: tuple[Source, ...] = ()

    def __post_init__(self):
        for source in (self.source, *self.among):
            refuse_encoder(source)
        names = [source.name for source in self.among]
        for what, found in (("source names", names), ("rules", [r.label for r in self.rules])):
            if len(set(found)) != len(found):
                raise ValueError(f"{what} are {found}; they must all be different")
        if not self.rules:
            raise ValueError("there are no rules; give one, say MinHash()")
        if self.among and self.source not in self.among:
            raise ValueError(f"source {self.source.name!r} is not among {names}; put it there")

    @property
    def name(self) -> str:
        """The name of the source inside."""
        return self.source.name

    def version(self) -> str:
        """Those of all sources, and of the rules."""
        versions = " | ".join(source.version() for source in self._sources())
        return f"{versions} dedup={DEDUP_FORMAT}.{SHINGLES_FORMAT}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """The documents that stay, in their order; returns counts that begin with a rule's label.

        docs_in, docs_out, chars_in, chars_out, emptied and dropped_for_NAME (by the source whose
        document stands for them) are of this source; other counts of all sources together.

        Raises: ValueError when a source gives other documents the second time.
        """
        sources = self._sources()
        all_found = _find(_Question(_identity(self.rules, sources), self.rules, sources))
        counts: dict[str, int] = {}
        docs = counted(self.source, counts)
        stages = [Counter(docs_in=0, docs_out=0, chars_in=0, chars_out=0) for _ in self.rules]
        for found, stage in zip(all_found, stages, strict=True):
            docs = _left(docs, found, sources, sources.index(self.source), stage)
        yield from docs
        for rule, found, stage in zip(self.rules, all_found, stages, strict=True):
            told = dict(stage) | found.counts
            counts |= {f"{rule.label}_{key}": n for key, n in told.items()}
        return counts

    def _sources(self) -> tuple[Source, ...]:
        return self.among or (self.source,)


@dataclass(frozen=True)
class Repeats:
    """Paragraphs that stand elsewhere too are cut out of all documents but one.

    unit: what parts them ("\\n" for lines). Two are equal when their words between white space are;
    shorter ones than min_chars (UNVERIFIED: GLM-4.5 states no such step) stay anywhere. Takes 16
    bytes a paragraph. Source: CCNet (Wenzek et al. 2019, section 3.1) does so line by line.
    """

    unit: str = "\n\n"
    min_chars: int = 100
    keep: Keep = FirstSource()

    def __post_init__(self):
        if not self.unit:
            raise ValueError("unit is empty; use '\\n\\n' for paragraphs, '\\n' for lines")

    @property
    def label(self) -> str:
        """Of its counts: repeated_lines, repeated_paragraphs or repeated_units."""
        kind = {"\n": "lines", "\n\n": "paragraphs"}.get(self.unit, "units")
        return f"repeated_{kind}"

    def find(self, read: Read) -> Found:
        """Nothing goes as a whole, but what is left of a document may be empty."""
        facts = Facts(self.keep)
        hashes, owners = [], []
        for at, doc in enumerate(facts.noting(read())):
            found = [h for _, h in self._long(doc.text)]
            hashes.append(np.array(found, np.uint64))
            owners.append(np.full(len(found), at, np.int64))
        table = facts.table()
        hash_U = np.concatenate([np.zeros(0, np.uint64), *hashes])
        of_U = np.concatenate([np.zeros(0, np.int64), *owners])
        # Stable: within one document the first stays.
        order_U = np.lexsort((table.rank_N[of_U], hash_U))
        again = np.zeros(len(hash_U), np.bool_)
        again[order_U[1:]] = hash_U[order_U[1:]] == hash_U[order_U[:-1]]
        starts = np.searchsorted(of_U, np.arange(len(table.rank_N) + 1))

        def edit(at: int, doc: Doc) -> Doc:
            cut = again[starts[at] : starts[at + 1]]
            return self._without(doc, cut.tolist()) if cut.any() else doc

        everyone = np.arange(len(table.rank_N))
        counts = {"units": len(hash_U), "units_cut": int(again.sum())}
        return Found(table.place_N, np.ones(len(everyone), np.bool_), everyone, counts, edit)

    def _long(self, text: str) -> Iterator[tuple[int, int]]:
        for at, part in enumerate(text.split(self.unit)):
            words = " ".join(part.split())
            if len(words) >= self.min_chars:
                yield at, _digest(words)

    def _without(self, doc: Doc, cut: Sequence[bool]) -> Doc:
        gone = {at for (at, _), goes in zip(self._long(doc.text), cut, strict=True) if goes}
        left = [part for at, part in enumerate(doc.text.split(self.unit)) if at not in gone]
        text = self.unit.join(left)
        return replace(doc, text=text if text.strip() else "")


@dataclass(frozen=True)
class Table:
    """What is known of every document. rank_N: 0 for the one that would stay before all others."""

    place_N: np.ndarray  # int32, of its source
    digest_N: np.ndarray  # uint64, of id and text
    rank_N: np.ndarray  # int64


class Facts:
    """Notes some numbers of each document that passes: 20 bytes."""

    def __init__(self, keep: Keep):
        self._keep = keep
        self._place, self._score, self._digest = array("i"), array("d"), array("Q")

    def noting(self, docs: Iterator[tuple[int, Doc]]) -> Iterator[Doc]:
        """The documents as they come."""
        for place, doc in docs:
            self._place.append(place)
            self._score.append(self._keep.score(doc))
            self._digest.append(_digest(doc.id, doc.text))
            yield doc

    def batches(self, docs: Iterator[tuple[int, Doc]]) -> Iterator[list[str]]:
        """Their texts, some at a time."""
        pairs = ((None, doc.text) for doc in self.noting(docs))
        return (texts for _, texts in in_batches(pairs, BATCH_CHARS))

    def table(self) -> Table:
        """Of all that passed."""
        place_N = np.array(self._place, np.int32)
        digest_N = np.array(self._digest, np.uint64)
        score_N = np.array(self._score, np.float64)
        return Table(place_N, digest_N, ranked(-score_N, place_N, digest_N))


def ranked(*keys_N: np.ndarray) -> np.ndarray:
    """The rank of each, int64: by the first key, ties by the next ones, then by place."""
    order_N = np.lexsort(keys_N[::-1])
    rank_N = np.empty(len(order_N), np.int64)
    rank_N[order_N] = np.arange(len(order_N))
    return rank_N


def join_groups(root_N: np.ndarray, a_E: np.ndarray, b_E: np.ndarray) -> np.ndarray:
    """Union-find for many pairs at once: the smallest member of each one's group, after the pairs.

    root_N: the same before them (np.arange(N) when every one is alone).
    """
    root_N = root_N.copy()
    while True:
        a_E, b_E = root_N[a_E], root_N[b_E]
        apart = a_E != b_E
        if not apart.any():
            return root_N
        a_E, b_E = a_E[apart], b_E[apart]
        # Larger roots hang themselves under smaller ones, so that no circle can close.
        np.minimum.at(root_N, np.maximum(a_E, b_E), np.minimum(a_E, b_E))
        while not np.array_equal(up_N := root_N[root_N], root_N):
            root_N = up_N


def best_of_groups(table: Table, root_N: np.ndarray) -> Found:
    """Of every group the document with the lowest rank stays."""
    n = len(root_N)
    best_N = np.full(n, n, np.int64)
    np.minimum.at(best_N, root_N, table.rank_N)
    by_rank_N = np.empty(n, np.int64)
    by_rank_N[table.rank_N] = np.arange(n)
    instead_N = by_rank_N[best_N[root_N]] if n else best_N
    return Found(table.place_N, instead_N == np.arange(n), instead_N, group_counts(instead_N))


def group_counts(instead_N: np.ndarray) -> dict[str, int]:
    """Groups of two documents and more, and the size of the largest group."""
    size_N = np.bincount(instead_N, minlength=1)
    return {"clusters": int((size_N > 1).sum()), "largest_cluster": int(size_N.max())}


@dataclass(frozen=True)
class _Question:
    """Equal to another with the same identity, whatever objects ask."""

    identity: str
    rules: tuple[Rule, ...] = field(compare=False)
    sources: tuple[Source, ...] = field(compare=False)


@lru_cache(maxsize=16)
def _find(question: _Question) -> tuple[Found, ...]:
    """One a rule. Remembered: sources that belong together ask one after the other."""
    sources, names = question.sources, [source.name for source in question.sources]
    all_found: list[Found] = []

    def read() -> Iterator[tuple[int, Doc]]:
        for place, source in enumerate(sources):
            docs = source.docs()
            for found in all_found:
                docs = _left(docs, found, sources, place, Counter())
            yield from ((place, doc) for doc in docs)

    for rule in question.rules:
        log.info("%s: reading %s", rule.label, ", ".join(names))
        found = rule.find(read)
        log.info("%s: of %d documents, %s", rule.label, len(found.place_N), found.counts)
        all_found.append(found)
    return tuple(all_found)


def _left(
    docs: Iterator[Doc],
    found: Found,
    sources: Sequence[Source],
    place: int,
    counts: Counter[str],
) -> Iterator[Doc]:
    """Those of one source's documents that a rule leaves; adds to counts."""
    first, stop = np.searchsorted(found.place_N, [place, place + 1]).tolist()
    n = 0
    for at, doc in enumerate(docs, first):
        n += 1
        if at >= stop:
            break
        counts["docs_in"] += 1
        counts["chars_in"] += len(doc.text)
        edited = found.edit(at, doc)
        if not found.stays_N[at]:
            counts[f"dropped_for_{sources[found.place_N[found.instead_N[at]]].name}"] += 1
        elif doc.text and not edited.text:
            counts["emptied"] += 1
        else:
            counts["docs_out"] += 1
            counts["chars_out"] += len(edited.text)
            yield edited
    if n != stop - first:
        raise ValueError(
            f"source {sources[place].name!r} gave {stop - first} documents when duplicates were "
            "looked for and another number now; its docs() must give the same ones each time"
        )


def _identity(rules: Sequence[Rule], sources: Sequence[Source]) -> str:
    parts = [[type(source).__name__, repr(source), source.version()] for source in sources]
    return json.dumps([repr(rules), parts])


def _digest(*parts: str) -> int:
    data = b"\0".join(map(encoded, parts))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
