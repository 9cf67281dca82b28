"""Documents that contain parts of evaluation sets (spec 6.4): dropped or marked, counted, shown.

One line of a `Data`: `Decontaminated(PythonSources(), (TextFiles("evals"),))`. Evaluation sets are
sources, one document an item. A training document is contaminated when it shares a run of `ngram`
words with any item, whatever the punctuation and case between; words as in shingles.py.
Letters: `N` texts, `W` words, `G` different n-grams, `I` items, `P` pairs of an n-gram and an item,
`M` matches, `S` evaluation sets.
Source: GPT-3 (Brown et al. 2020, appendix C): 13-grams, shorter items as a whole from 8 words on.
GLM-4.5 does not mention the step (UNVERIFIED).
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise
from typing import NamedTuple

import numpy as np

from glm45_jax.data.dedup import BATCH_CHARS
from glm45_jax.data.shingles import (
    SHINGLES_FORMAT,
    encoded,
    hash_ngrams,
    hash_words,
    in_batches,
    word_spans,
)
from glm45_jax.data.sources import Doc, Source, counted, refuse_encoder

log = logging.getLogger(__name__)

DECONTAMINATE_FORMAT = 1  # raise it when the same fields drop other documents
CONTAMINATED = "contaminated"  # meta of a marked Doc: "set/item: the words"

_SHOWN = 20  # n-grams named in the counts, the most frequent first


@dataclass(frozen=True)
class Overlap:
    """What counts as contamination.

    ngram: words in a row. min_ngram: an item with fewer than ngram words, but at least these, is
    looked for as a whole; shorter items are counted as too short. hits: different n-grams (of any
    items) a document must share. drop: False keeps such documents, with meta["contaminated"].
    """

    ngram: int = 13
    min_ngram: int = 8
    hits: int = 1
    drop: bool = True

    def __post_init__(self):
        if not 1 <= self.min_ngram <= self.ngram <= 1024:
            raise ValueError(
                f"min_ngram {self.min_ngram} and ngram {self.ngram} must be 1 to 1024, in this "
                "order"
            )
        if self.hits < 1:
            raise ValueError(f"hits {self.hits} is below 1, so every document would go")


class Matches(NamedTuple):
    """Places where texts share an n-gram with items, by text and place; int64 each."""

    text_M: np.ndarray
    begin_M: np.ndarray  # its first word
    words_M: np.ndarray  # their number
    gram_M: np.ndarray  # which n-gram of the index


@dataclass(frozen=True)
class Index:
    """The n-grams of evaluation items, each of the length its item asks for.

    items: their names, sorted. too_short_I: bool. n-gram g is in the items
    item_P[start_G1[g] : start_G1[g + 1]].
    """

    items: tuple[str, ...]
    too_short_I: np.ndarray
    tables: tuple["_Table", ...]
    start_G1: np.ndarray
    item_P: np.ndarray

    def search(self, texts: Sequence[str]) -> Matches:
        """Every n-gram of the texts that is in an item."""
        words = hash_words(texts)
        parts = []
        for table in self.tables:
            ngrams = hash_ngrams(words, table.ngram, whole_if_short=False)
            at_M, gram_M = table.find(ngrams.hash_W)
            text_M = np.searchsorted(ngrams.start_N1, at_M, "right") - 1
            begin_M = at_M - ngrams.start_N1[text_M]
            parts.append((text_M, begin_M, np.full(len(at_M), table.ngram), gram_M))
        found = [
            np.concatenate([np.zeros(0, np.int64), *side]) for side in zip(*parts, strict=True)
        ]
        order_M = np.lexsort((found[1], found[0]))
        return Matches(*(side[order_M] for side in found))

    def in_sets(self, set_I: np.ndarray, n_sets: int) -> np.ndarray:
        """Whether an n-gram is in an item of each set, bool [G, S]."""
        per_gram_G = np.diff(self.start_G1)
        has_GS = np.zeros((len(per_gram_G), n_sets), np.bool_)
        has_GS[np.repeat(np.arange(len(per_gram_G)), per_gram_G), set_I[self.item_P]] = True
        return has_GS


def index_of(items: Iterable[tuple[str, str]], overlap: Overlap) -> Index:
    """The index of (name, text) items; names are unique, their order does not matter.

    Raises: ValueError when no item is long enough.
    """
    items = sorted(items)
    lengths, parts = [np.zeros(0, np.int64)], defaultdict(list)
    for places, texts in in_batches(
        ((at, text) for at, (_, text) in enumerate(items)), BATCH_CHARS
    ):
        words = hash_words(texts)
        lengths.append(words.lengths())
        wanted_N = np.minimum(words.lengths(), overlap.ngram)  # a shorter item: its own length
        for n in np.unique(wanted_N[wanted_N >= overlap.min_ngram]).tolist():
            ngrams = hash_ngrams(words, n, whole_if_short=False)
            of_W = np.repeat(np.arange(len(texts)), ngrams.lengths())
            mine_W = wanted_N[of_W] == n
            parts[n].append((ngrams.hash_W[mine_W], np.asarray(places)[of_W[mine_W]]))
    if not parts:
        raise ValueError(
            f"none of {len(items)} evaluation items has {overlap.min_ngram} words; lower "
            "overlap.min_ngram, or check what the sources read"
        )
    tables: list[_Table] = []
    starts: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    n_grams, n_pairs = 0, 0
    for n in sorted(parts):
        hash_P, item_P = (np.concatenate(side) for side in zip(*parts[n], strict=True))
        order_P = np.lexsort((item_P, hash_P))
        hash_G, first_G = np.unique(hash_P[order_P], return_index=True)
        tables.append(_Table.of(n, hash_G, n_grams))
        starts.append(first_G + n_pairs)
        owners.append(item_P[order_P])
        n_grams, n_pairs = n_grams + len(hash_G), n_pairs + len(hash_P)
    item_P = np.concatenate(owners)
    too_short_I = np.concatenate(lengths) < overlap.min_ngram
    start_G1 = np.concatenate([*starts, [len(item_P)]])
    return Index(tuple(name for name, _ in items), too_short_I, tuple(tables), start_G1, item_P)


@dataclass(frozen=True)
class Decontaminated:
    """The documents of `source` without those that contain parts of the evaluation sets."""

    source: Source
    evaluations: tuple[Source, ...]
    overlap: Overlap = Overlap()

    def __post_init__(self):
        refuse_encoder(self.source)
        names = [source.name for source in self.evaluations]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"evaluation sets are {names}; give at least one, all different")

    @property
    def name(self) -> str:
        """The name of the source inside."""
        return self.source.name

    def version(self) -> str:
        """Those of the source and of the evaluation sets."""
        versions = " | ".join(source.version() for source in (self.source, *self.evaluations))
        return f"{versions} decontaminate={DECONTAMINATE_FORMAT}.{SHINGLES_FORMAT}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """The documents that stay; returns counts, which begin with decontaminate_.

        docs_in, docs_out, chars_in, chars_out, contaminated; for each evaluation set SET_docs
        (documents that contain some of it), SET_items, SET_items_too_short, SET_items_found; and
        "ngram SET/ITEM: words" for the first n-gram of each contaminated document, most frequent
        ones only.

        Raises: ValueError when the evaluation sets have nothing to look for.
        """
        index, set_I = self._index()
        names = [source.name for source in self.evaluations]
        has_set_GS = index.in_sets(set_I, len(names))
        found_G = np.zeros(len(has_set_GS), np.bool_)
        inner: dict[str, int] = {}
        counts = Counter(docs_in=0, docs_out=0, chars_in=0, chars_out=0, contaminated=0)
        shown: Counter[str] = Counter()
        for doc, gram_G, first in self._searched(index, counted(self.source, inner)):
            counts.update(docs_in=1, chars_in=len(doc.text), contaminated=bool(first))
            if first:
                found_G[gram_G] = True
                shown[first] += 1
                counts.update(f"{name}_docs" for name in compress(names, has_set_GS[gram_G].any(0)))
                doc = replace(doc, meta={**doc.meta, CONTAMINATED: first})
            if not first or not self.overlap.drop:
                counts.update(docs_out=1, chars_out=len(doc.text))
                yield doc
        found_I = np.unique(index.item_P[np.repeat(found_G, np.diff(index.start_G1))])
        for at, name in enumerate(names):
            counts[f"{name}_items"] = int((set_I == at).sum())
            counts[f"{name}_items_too_short"] = int(index.too_short_I[set_I == at].sum())
            counts[f"{name}_items_found"] = int((set_I[found_I] == at).sum())
        log.info("%s: %d of %d contaminated", self.name, counts["contaminated"], counts["docs_in"])
        most = sorted(shown.items(), key=lambda pair: (-pair[1], pair[0]))[:_SHOWN]
        counts.update({f"ngram {words}": n for words, n in most})
        return inner | {f"decontaminate_{key}": n for key, n in counts.items()}

    def _searched(self, index: Index, docs: Iterator[Doc]) -> Iterator[tuple[Doc, np.ndarray, str]]:
        """Each document with its different n-grams and the first of them, "" when they are few."""
        for batch, texts in in_batches(((doc, doc.text) for doc in docs), BATCH_CHARS):
            matches = index.search(texts)
            bounds = np.searchsorted(matches.text_M, np.arange(len(batch) + 1)).tolist()
            for doc, (low, high) in zip(batch, pairwise(bounds), strict=True):
                gram_G = np.unique(matches.gram_M[low:high])
                enough = len(gram_G) >= self.overlap.hits
                yield doc, gram_G, _shown(doc.text, index, matches, low) if enough else ""

    def _index(self) -> tuple[Index, np.ndarray]:
        """The index, and the place of the evaluation set of each item."""
        items = [
            ((f"{source.name}/{doc.id}", doc.text), at)
            for at, source in enumerate(self.evaluations)
            for doc in source.docs()
        ]
        items.sort()
        index = index_of([item for item, _ in items], self.overlap)
        return index, np.array([at for _, at in items])


@dataclass(frozen=True)
class _Table:
    """Sorted hashes of n-grams behind a table of bits, where most other hashes end."""

    ngram: int
    hash_G: np.ndarray
    seen: np.ndarray  # bool, by the low bits of a hash
    first: int  # number of the first n-gram in the index

    @classmethod
    def of(cls, ngram: int, hash_G: np.ndarray, first: int) -> "_Table":
        bits = min((16 * len(hash_G)).bit_length(), 27)
        seen = np.zeros(1 << bits, np.bool_)
        seen[hash_G & np.uint64(len(seen) - 1)] = True
        return cls(ngram, hash_G, seen, first)

    def find(self, hash_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of those hashes that are in the table, and their numbers in the index."""
        maybe = np.flatnonzero(self.seen[hash_W & np.uint64(len(self.seen) - 1)])
        at = np.minimum(np.searchsorted(self.hash_G, hash_W[maybe]), len(self.hash_G) - 1)
        true = self.hash_G[at] == hash_W[maybe]
        return maybe[true], self.first + at[true]


def _shown(text: str, index: Index, matches: Matches, at: int) -> str:
    """A match as people read it: the first item that has it, and the words as the text has them."""
    begin, item = matches.begin_M[at], index.item_P[index.start_G1[matches.gram_M[at]]]
    data = encoded(text)
    spans = word_spans(text)[begin : begin + matches.words_M[at]].tolist()
    words = b" ".join(data[a:b] for a, b in spans).decode("utf-8", "replace")
    return f"{index.items[item]}: {words}"
