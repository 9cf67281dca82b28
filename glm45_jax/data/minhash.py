"""Near-duplicates by MinHash and locality-sensitive hashing (spec 6 D5): a rule for `Deduplicated`.

A document is the set of its word n-grams. Two documents have equal minima under one random
permutation with the probability of their Jaccard similarity s, so a band of r permutations is equal
with s^r and at least one of b bands with 1 - (1 - s^r)^b. Documents with an equal band are joined,
and what they are joined to (union-find); of each group one stays. Takes 330 bytes a document, at
the peak (`python -m experiments.bench.dedup`, which measures speed and recall as well).
Letters: `N` documents, `P` permutations, `A` bands, `G` n-grams.
Source: Broder 1997; FineWeb (Penedo et al. 2024, section 3.4) for 5-grams in 14 bands of 8.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from glm45_jax.data.dedup import (
    Facts,
    Found,
    Keep,
    Longest,
    Read,
    best_of_groups,
    join_groups,
)
from glm45_jax.data.shingles import Hashes, draws, hash_ngrams, hash_words, in_batches, mix

_CHUNK = 1 << 16  # n-grams permuted at once: they stay in the second-level cache


@dataclass(frozen=True)
class MinHash:
    """Which documents count as near-duplicates, and which of them stays.

    verify: with a number, a pair with an equal band is joined only if the Jaccard similarity of its
    n-grams is at least that. It reads the sources twice and takes 8 bytes for each n-gram of the
    documents with an equal band. None joins all such pairs, as FineWeb does.
    """

    ngram: int = 5  # words
    bands: int = 14
    rows: int = 8  # permutations a band
    keep: Keep = Longest()
    verify: float | None = None
    seed: int = 0

    def __post_init__(self):
        for name, value in (("ngram", self.ngram), ("bands", self.bands), ("rows", self.rows)):
            if not 1 <= value <= 1024:
                raise ValueError(f"{name} {value} is not in 1 to 1024")
        if self.verify is not None and not 0 < self.verify <= 1:
            raise ValueError(f"verify {self.verify} is a Jaccard similarity: above 0, at most 1")

    @property
    def label(self) -> str:
        """Of its counts."""
        return "minhash"

    def find(self, read: Read) -> Found:
        """Groups of near-duplicates. Documents without words stay, and are counted."""
        facts = Facts(self.keep)
        keys, worded = [], []
        for texts in facts.batches(read()):
            ngrams = self.ngrams(texts)
            keys.append(self.band_keys(ngrams))
            worded.append(ngrams.lengths() > 0)
        table = facts.table()
        n = len(table.rank_N)
        key_NA = np.concatenate([np.zeros((0, self.bands), np.uint64), *keys])
        worded_N = np.concatenate([np.zeros(0, np.bool_), *worded])
        if self.verify is None:
            root_N = np.arange(n)
            for key_N in key_NA.T:
                root_N = join_groups(root_N, *_neighbours(key_N, worded_N))
            checked: dict[str, int] = {}
        else:
            root_N, checked = self._verified(read, key_NA, worded_N, self.verify)
        found = best_of_groups(table, root_N)
        found.counts.update(checked, without_words=int((~worded_N).sum()))
        return found

    def ngrams(self, texts: Sequence[str]) -> Hashes:
        """The n-grams of each text; all words of a shorter one are its only n-gram."""
        return hash_ngrams(hash_words(texts), self.ngram, whole_if_short=True)

    def minima(self, ngrams: Hashes) -> np.ndarray:
        """The smallest hash of each text under each permutation, uint32 [P, N].

        Equal in two texts with the probability of their Jaccard similarity. All bits are set where
        a text has no n-gram.
        """
        # Hashes are random already, so a linear map of 32 bits is permutation enough.
        value_G = (ngrams.hash_W >> np.uint64(32)).astype(np.uint32)
        n_permutations = self.bands * self.rows
        factor_P, shift_P = draws(self.seed, 2 * n_permutations).astype(np.uint32).reshape(2, -1)
        factor_P |= np.uint32(1)
        start_N1 = ngrams.start_N1
        worded = np.flatnonzero(ngrams.lengths())
        least_PN = np.full((n_permutations, len(worded)), np.uint32(2**32 - 1))
        first_N, end_N = start_N1[worded], start_N1[worded + 1]
        permuted = np.empty(_CHUNK, np.uint32)
        for low in range(0, len(value_G), _CHUNK):
            value = value_G[low : low + _CHUNK]
            # Texts that have a part in this chunk, and where it begins.
            a = int(np.searchsorted(end_N, low, "right"))
            b = int(np.searchsorted(first_N, low + len(value)))
            begin = np.maximum(first_N[a:b] - low, 0)
            out = permuted[: len(value)]
            for least_N, factor, shift in zip(least_PN[:, a:b], factor_P, shift_P, strict=True):
                np.multiply(value, factor, out=out)
                np.add(out, shift, out=out)
                np.minimum(least_N, np.minimum.reduceat(out, begin), out=least_N)
        all_PN = np.full((n_permutations, len(start_N1) - 1), np.uint32(2**32 - 1))
        all_PN[:, worded] = least_PN
        return all_PN

    def band_keys(self, ngrams: Hashes) -> np.ndarray:
        """One hash for the minima of each band, uint64 [N, A]."""
        least_PN = self.minima(ngrams).astype(np.uint64)
        least_ARN = least_PN.reshape(self.bands, self.rows, -1)
        odd_R1 = draws(0, self.rows)[:, None] | np.uint64(1)
        return mix((mix(least_ARN + odd_R1) * odd_R1).sum(1, dtype=np.uint64)).T

    def _verified(
        self, read: Read, key_NA: np.ndarray, worded_N: np.ndarray, least: float
    ) -> tuple[np.ndarray, dict[str, int]]:
        candidate_N = np.zeros(len(key_NA), np.bool_)
        for key_N in key_NA.T:
            for side in _neighbours(key_N, worded_N):
                candidate_N[side] = True
        sets = self._sets(read, candidate_N)
        up = list(range(len(key_NA)))
        seen, joined = 0, 0
        for key_N in key_NA.T:
            for bucket in _buckets(key_N, candidate_N):
                for a, b in _apart(up, bucket):
                    seen += 1
                    if jaccard(sets[a], sets[b]) >= least:
                        joined += 1
                        up[max(_root(up, a), _root(up, b))] = min(_root(up, a), _root(up, b))
        root_N = np.array([_root(up, at) for at in range(len(up))], np.int64)
        return root_N, {"pairs_compared": seen, "pairs_refused": seen - joined}

    def _sets(self, read: Read, candidate_N: np.ndarray) -> Mapping[int, np.ndarray]:
        docs = (doc for _, doc in read())
        pairs = ((at, doc.text) for at, doc in enumerate(docs) if candidate_N[at])
        sets = {}
        for places, texts in in_batches(pairs, 1 << 20):
            ngrams = self.ngrams(texts)
            for at, place in enumerate(places):
                sets[place] = np.unique(
                    ngrams.hash_W[ngrams.start_N1[at] : ngrams.start_N1[at + 1]]
                )
        return sets


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over that of the union, of two sorted arrays without repeats."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def chance_of_equal_band(similarity: float, bands: int, rows: int) -> float:
    """1 - (1 - s^rows)^bands: how likely two documents of Jaccard similarity s are found."""
    return 1 - (1 - similarity**rows) ** bands


def _root(up: list[int], at: int) -> int:
    while up[at] != at:
        up[at] = up[up[at]]
        at = up[at]
    return at


def _apart(up: list[int], bucket: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs of a bucket that are not joined when it is their turn."""
    for at, a in enumerate(bucket):
        if len({_root(up, member) for member in bucket[at:]}) == 1:
            return
        for b in bucket[at + 1 :]:
            if _root(up, a) != _root(up, b):
                yield a, b


def _neighbours(key_N: np.ndarray, worded_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of places with equal keys, enough to join all that are equal."""
    place = np.flatnonzero(worded_N)
    place = place[np.argsort(key_N[place], kind="stable")]
    equal = key_N[place[1:]] == key_N[place[:-1]]
    return place[:-1][equal], place[1:][equal]


def _buckets(key_N: np.ndarray, candidate_N: np.ndarray) -> Iterator[list[int]]:
    """Places with equal keys, where there is more than one."""
    place = np.flatnonzero(candidate_N)
    place = place[np.argsort(key_N[place], kind="stable")]
    edges = np.flatnonzero(np.diff(key_N[place])) + 1
    for bucket in np.split(place, edges):
        if len(bucket) > 1:
            yield bucket.tolist()
