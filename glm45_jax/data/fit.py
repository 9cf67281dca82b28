"""Lengths to bins: best-fit decreasing, and long documents in pieces. Numpy only.

Letters: `N` pieces or documents. Source: spec 5.3.
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np


class Pieces(NamedTuple):
    """Parts of documents: doc_N says of which, begin_N where in it, length_N how long."""

    doc_N: np.ndarray
    begin_N: np.ndarray
    length_N: np.ndarray


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, none over capacity: best-fit decreasing.

    Longest first (ties: lower index first), each into the fullest bin that still holds it (ties:
    the bin opened first). O(n log n), whatever the capacity: a segment tree over the free spaces.

    Raises: ValueError for an item longer than capacity (`split_long` first) or negative.
    Source: spec 5.3; Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """
    length_N = np.asarray(lengths, dtype=np.int64)
    _check_lengths(length_N, capacity)
    bins: list[list[int]] = []
    bins_with: dict[int, list[int]] = {}  # free space -> heap of the bins that have it
    spaces = _Spaces(capacity)  # the keys of bins_with
    for i in np.argsort(-length_N, kind="stable").tolist():
        length = int(length_N[i])
        space = spaces.at_least(length)
        if space is None:
            chosen, space = len(bins), capacity
            bins.append([])
        else:
            chosen = heappop(bins_with[space])
            if not bins_with[space]:
                del bins_with[space]
                spaces.remove(space)
        bins[chosen].append(i)
        left = space - length
        if left not in bins_with:
            bins_with[left] = []
            spaces.add(left)
        heappush(bins_with[left], chosen)
    return bins


class _Spaces:
    """A set of numbers 0 .. most that knows its smallest member from x on, in O(log most).

    A segment tree of 64 children a node: bit i of a word says whether there is a member under its
    child i; words_of[0] are the leaves. (A sorted list and bisection took 0.7 to 1.1 s where
    this takes 1.4 to 1.8, for a million documents, but inserting is linear there: docs/log.md.)
    """

    def __init__(self, most: int) -> None:
        self.words_of: list[list[int]] = []
        n = most + 1
        while n > 1 or not self.words_of:
            n = -(-n // 64)
            self.words_of.append([0] * n)

    def add(self, x: int) -> None:
        for words in self.words_of:
            x, bit = divmod(x, 64)
            known, words[x] = words[x], words[x] | 1 << bit
            if known:
                return

    def remove(self, x: int) -> None:
        for words in self.words_of:
            x, bit = divmod(x, 64)
            words[x] &= ~(1 << bit)
            if words[x]:
                return

    def at_least(self, x: int) -> int | None:
        for level, words in enumerate(self.words_of):
            word, bit = divmod(x, 64)
            if word == len(words):
                return None
            if found := words[word] >> bit:
                x += _lowest(found)
                for below in reversed(self.words_of[:level]):
                    x = x * 64 + _lowest(below[x])
                return x
            x = word + 1  # the next node a level up
        return None


def _lowest(word: int) -> int:
    return (word & -word).bit_length() - 1


def split_long(lengths: Sequence[int] | np.ndarray, capacity: int) -> Pieces:
    """Documents in pieces of at most `capacity`: full pieces and a remainder, in order.

    A document that fits is one piece; an empty one is none.
    """
    length_N = np.asarray(lengths, dtype=np.int64)
    count_N = -(-length_N // capacity)
    doc_P = np.repeat(np.arange(len(length_N)), count_N)
    first_P = np.repeat(np.cumsum(count_N) - count_N, count_N)
    begin_P = (np.arange(len(doc_P)) - first_P) * capacity
    return Pieces(doc_P, begin_P, np.minimum(length_N[doc_P] - begin_P, capacity))


def _check_lengths(length_N: np.ndarray, capacity: int) -> None:
    if not length_N.size:
        return
    longest, shortest = int(length_N.max()), int(length_N.min())
    if longest > capacity:
        raise ValueError(
            f"item {int(length_N.argmax())} has length {longest}, over capacity {capacity}; "
            "split long items first (split_long)"
        )
    if shortest < 0:
        raise ValueError(f"item {int(length_N.argmin())} has length {shortest}; lengths are >= 0")
