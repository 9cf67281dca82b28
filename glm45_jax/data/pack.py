"""Documents to rows of T tokens: cut a long row of text, or pack whole documents (best fit).

`Cut` is what pretraining does, `BestFit` what mid-training does; both turn a store into rows that
can be read in any order. Numpy only. Source: spec 5.1, 5.3.
Letters: `T` tokens of a row, `R` rows read together, `N` pieces or documents.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

import numpy as np

from glm45_jax.data.store import TokenStore

Row = dict[str, np.ndarray]  # tokens, targets, segments, positions: int32; mask: float32


class RowSource(Protocol):
    """Rows by number. `take(indices)`, where there is one, reads many rows at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Row: ...


class Pieces(NamedTuple):
    """Parts of documents: doc_N says of which, begin_N where in it, length_N how long."""

    doc_N: np.ndarray
    begin_N: np.ndarray
    length_N: np.ndarray


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths`, none over capacity: best-fit decreasing.

    Longest first (ties: lower index first), each into the fullest bin that still holds it (ties:
    the bin opened first).

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


@dataclass(frozen=True)
class Cut:
    """Documents joined and cut every T tokens, wherever that falls (pretraining, spec 5.3).

    document_mask: number the documents of a row as segments, restart positions, and drop the loss
    on targets that belong to the next document. The default treats a row as one text.
    """

    document_mask: bool = False

    def rows(self, store: TokenStore, seq_len: int, pad_id: int) -> "CutRows":
        """Row i is tokens i*T .. i*T+T, predicting one further; the last part row is dropped.

        Raises: ValueError when the store has not even one row.
        """
        del pad_id  # cut rows are full
        if store.manifest.n_tokens <= seq_len:
            raise ValueError(
                f"store {store.path} has {store.manifest.n_tokens} tokens, a row of seq_len "
                f"{seq_len} needs {seq_len + 1}; use more text or a smaller seq_len"
            )
        return CutRows(store, seq_len, self.document_mask)


@dataclass(frozen=True)
class BestFit:
    """Whole documents packed into rows; only those longer than T are cut (mid-training)."""

    def rows(self, store: TokenStore, seq_len: int, pad_id: int) -> "PackedRows":
        """Rows of pieces: one segment each, positions from 0, padding `pad_id` at the end.

        Raises: ValueError when the store is empty.
        """
        if store.manifest.n_tokens == 0:
            raise ValueError(f"store {store.path} has 0 tokens, a row needs 1; use more text")
        offsets_N1 = store.offsets_N1
        pieces = split_long(np.diff(offsets_N1), seq_len)
        bins = best_fit(pieces.length_N, seq_len)
        order_N = np.concatenate([np.array(members) for members in bins])
        return PackedRows(
            store=store,
            seq_len=seq_len,
            pad_id=pad_id,
            begin_N=(offsets_N1[pieces.doc_N] + pieces.begin_N)[order_N],
            length_N=pieces.length_N[order_N],
            bounds_R1=np.cumsum([0] + [len(members) for members in bins]),
        )


@dataclass(frozen=True)
class CutRows:
    """The rows of `Cut`."""

    store: TokenStore
    seq_len: int
    document_mask: bool

    def __len__(self) -> int:
        return (self.store.manifest.n_tokens - 1) // self.seq_len

    def __getitem__(self, i: int) -> Row:
        return {name: array[0] for name, array in self.take([i]).items()}

    def take(self, indices: Sequence[int] | np.ndarray) -> Row:
        """Many rows at once, each array [R, T]."""
        start_R = _checked_rows(indices, len(self)) * self.seq_len
        spans = self.store.read_spans(start_R.tolist(), [self.seq_len + 1] * len(start_R))
        tokens_RT1 = np.stack(spans)
        row = {"tokens": tokens_RT1[:, :-1], "targets": tokens_RT1[:, 1:]}
        if self.document_mask:
            return row | self._documents(start_R)
        shape = row["tokens"].shape
        positions_T = np.arange(self.seq_len, dtype=np.int32)
        return row | {
            "segments": np.ones(shape, np.int32),
            "positions": np.broadcast_to(positions_T, shape),
            "mask": np.ones(shape, np.float32),
        }

    def _documents(self, start_R: np.ndarray) -> Row:
        place_RT = start_R[:, None] + np.arange(self.seq_len)
        offsets_N1 = self.store.offsets_N1
        doc_RT = np.searchsorted(offsets_N1, place_RT, side="right") - 1
        first_RT = np.maximum(
            offsets_N1[doc_RT], start_R[:, None]
        )  # the part before the row is gone
        return {
            "segments": (doc_RT - doc_RT[:, :1] + 1).astype(np.int32),
            "positions": (place_RT - first_RT).astype(np.int32),
            "mask": (place_RT + 1 < offsets_N1[doc_RT + 1]).astype(np.float32),
        }


@dataclass(frozen=True)
class PackedRows:
    """The rows of `BestFit`: row r holds pieces bounds_R1[r] .. bounds_R1[r + 1]."""

    store: TokenStore
    seq_len: int
    pad_id: int
    begin_N: np.ndarray
    length_N: np.ndarray
    bounds_R1: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds_R1) - 1

    def __getitem__(self, i: int) -> Row:
        return {name: array[0] for name, array in self.take([i]).items()}

    def take(self, indices: Sequence[int] | np.ndarray) -> Row:
        """Many rows at once, each array [R, T]."""
        index_R = _checked_rows(indices, len(self))
        first_R, stop_R = self.bounds_R1[index_R], self.bounds_R1[index_R + 1]
        members = [np.arange(a, b) for a, b in zip(first_R, stop_R, strict=True)]
        member_P = np.concatenate(members)
        spans = iter(self.store.read_spans(self.begin_N[member_P], self.length_N[member_P]))
        shape = (len(index_R), self.seq_len)
        row: Row = {name: np.zeros(shape, np.int32) for name in ("segments", "positions")}
        row |= {name: np.full(shape, self.pad_id, np.int32) for name in ("tokens", "targets")}
        row["mask"] = np.zeros(shape, np.float32)
        counting_T = np.arange(self.seq_len, dtype=np.int32)
        for r, inside in enumerate(members):
            begin = 0
            for segment in range(1, len(inside) + 1):
                piece_T = next(spans)
                end = begin + len(piece_T)
                row["tokens"][r, begin:end] = piece_T
                row["targets"][r, begin : end - 1] = piece_T[1:]
                row["mask"][r, begin : end - 1] = 1
                row["segments"][r, begin:end] = segment
                row["positions"][r, begin:end] = counting_T[: len(piece_T)]
                begin = end
        return row


def take(rows: RowSource, indices: Sequence[int] | np.ndarray) -> Row:
    """Many rows of any source, each array [R, T]; in one read where the source can."""
    many = getattr(rows, "take", None)
    if many is not None:
        return many(indices)
    found = [rows[int(i)] for i in indices]
    return {name: np.stack([row[name] for row in found]) for name in found[0]}


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


def _checked_rows(indices: Sequence[int] | np.ndarray, n_rows: int) -> np.ndarray:
    index_R = np.asarray(indices, dtype=np.int64)
    if index_R.size and not 0 <= index_R.min() <= index_R.max() < n_rows:
        raise IndexError(f"rows {index_R.min()}..{index_R.max()} asked, there are 0..{n_rows - 1}")
    return index_R
