"""Lengths to bins: best-fit decreasing, and long documents in pieces. Numpy only.

Letters: `N` pieces or documents. Source: spec 5.3.
"""

from bisect import bisect_left, insort
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
    the bin opened first). O(n log n): the different free spaces, at most `capacity`, are a sorted
    list; bisection in C finds there what a segment tree over all spaces would find in Python.

    Raises: ValueError for an item longer than capacity (`split_long` first) or negative.
    Source: spec 5.3; Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """
    length_N = np.asarray(lengths, dtype=np.int64)
    _check_lengths(length_N, capacity)
    bins: list[list[int]] = []
    bins_with: dict[int, list[int]] = {}  # free space -> heap of the bins that have it
    spaces: list[int] = []  # the keys of bins_with, sorted
    for i in np.argsort(-length_N, kind="stable").tolist():
        length = int(length_N[i])
        at = bisect_left(spaces, length)
        if at == len(spaces):
            chosen, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[at]
            chosen = heappop(bins_with[space])
            if not bins_with[space]:
                del bins_with[space], spaces[at]
        bins[chosen].append(i)
        left = space - length
        if left not in bins_with:
            bins_with[left] = []
            insort(spaces, left)
        heappush(bins_with[left], chosen)
    return bins


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
