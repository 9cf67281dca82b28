"""Rows of T tokens by number, read from a store: cut anywhere, or packed from pieces.

The type to know is `RowSource`. What is between tokens (segments, positions, masks) is computed for
all rows that are read together. Numpy only.
Letters: `T` tokens of a row, `R` rows read together, `P` pieces in them, `M` = R T places, `X`
pieces and the padding behind them, `N` pieces or documents of a store.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from glm45_jax.data.store import TokenStore

Row = dict[str, np.ndarray]  # tokens, targets, segments, positions: int32; mask: float32


class RowSource(Protocol):
    """Rows by number. `take(indices)`, where there is one, reads many rows at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Row: ...


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

    @property
    def fixed(self) -> Row:
        """What all rows share, each [T]; read-only."""
        return {} if self.document_mask else whole_row(self.seq_len)

    def take(self, indices: Sequence[int] | np.ndarray) -> Row:
        """Many rows at once, each array [R, T]; those of `fixed` are one row seen R times."""
        return self.starting_at(_checked_rows(indices, len(self)) * self.seq_len)

    def starting_at(self, start_R: np.ndarray) -> Row:
        """Rows that begin at these tokens; behind the last token the first one follows."""
        n, length = self.store.manifest.n_tokens, self.seq_len + 1
        raw_RT1 = np.empty((len(start_R), length), self.store.chunks.dtype)
        raw_M, at_R = raw_RT1.reshape(-1), np.arange(len(start_R)) * length
        if int(start_R.max()) + length <= n:
            self.store.chunks.read_into(raw_M, at_R, start_R, [length] * len(start_R))
        else:
            first_R = np.minimum(n - start_R, length)
            self.store.chunks.read_into(raw_M, at_R, start_R, first_R)
            rest_R = length - first_R
            self.store.chunks.read_into(raw_M, at_R + first_R, np.zeros_like(rest_R), rest_R)
        row = {
            "tokens": raw_RT1[:, :-1].astype(np.int32),
            "targets": raw_RT1[:, 1:].astype(np.int32),
        }
        if self.document_mask:
            return row | self._documents(start_R)
        shape = row["tokens"].shape
        return row | {name: np.broadcast_to(x, shape) for name, x in self.fixed.items()}

    def _documents(self, start_R: np.ndarray) -> Row:
        n, offsets_N1 = self.store.manifest.n_tokens, self.store.offsets_N1
        pieces, last = [], []
        for start in start_R.tolist():
            stop = start + self.seq_len
            borders = _borders(offsets_N1, start, min(stop, n))
            if stop > n:
                borders += [n + border for border in _borders(offsets_N1, 0, stop - n)]
            ends = [border for border in borders if border < stop]
            pieces.append(np.diff([start, *ends, stop]))
            last.append(bool(borders) and borders[-1] == stop)
        count_R = np.array([len(piece) for piece in pieces])
        length_P = np.concatenate(pieces)
        number_P = np.concatenate([np.arange(1, count + 1) for count in count_R])
        whole_P = np.ones(len(length_P), bool)
        whole_P[np.cumsum(count_R) - 1] = last
        shape = (len(start_R), self.seq_len)
        row = segments_of(length_P, number_P, whole_P)
        return {name: array.reshape(shape) for name, array in row.items()}


@dataclass(frozen=True)
class MovingRows:
    """The rows of `Cut(moving=True)`: in every epoch the store is a ring, cut from another token.

    Row number epoch * len + i is row i of that epoch. Every token is read once an epoch, but for
    the fewer than T behind the last row, other ones each time.
    """

    rows: CutRows
    seed: int = 0

    def __len__(self) -> int:
        return self.rows.store.manifest.n_tokens // self.rows.seq_len

    def __getitem__(self, i: int) -> Row:
        if i < 0:
            raise IndexError(f"row {i} asked, rows are numbered from 0")
        return {name: array[0] for name, array in self.take([i]).items()}

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    @property
    def fixed(self) -> Row:
        """What all rows share, each [T]; read-only."""
        return self.rows.fixed

    @property
    def recipe(self) -> list[str]:
        """That they move, for the state of a loader."""
        return ["moving"]

    def seeded(self, seed: int) -> "MovingRows":
        """The same rows, cut at other places."""
        return replace(self, seed=seed)

    def take(self, indices: Sequence[int] | np.ndarray) -> Row:
        """Many rows at once, each array [R, T]."""
        epoch_R, i_R = np.divmod(np.asarray(indices, np.int64), len(self))
        n = self.rows.store.manifest.n_tokens
        first = {e: self._first(e, n) for e in set(epoch_R.tolist())}
        first_R = np.array([first[e] for e in epoch_R.tolist()], np.int64)
        return self.rows.starting_at((first_R + i_R * self.rows.seq_len) % n)

    def _first(self, epoch: int, n: int) -> int:
        """The token where the ring is cut; 0 in the first epoch."""
        return 0 if epoch == 0 else int(np.random.default_rng([self.seed, epoch]).integers(n))


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
        first_R = self.bounds_R1[index_R]
        count_R = self.bounds_R1[index_R + 1] - first_R
        before_R = np.cumsum(count_R) - count_R  # pieces of the rows above
        member_P = np.arange(count_R.sum()) + np.repeat(first_R - before_R, count_R)
        layout = Layout.of(self.length_N[member_P], count_R, self.seq_len)
        raw_M = np.zeros(len(index_R) * self.seq_len, self.store.chunks.dtype)
        self.store.chunks.read_into(raw_M, layout.at_P, self.begin_N[member_P], layout.length_P)
        return layout.row(raw_M, self.pad_id)


class Layout(NamedTuple):
    """Where P pieces lie in R rows of T places, one piece behind another, R rows joined."""

    at_P: np.ndarray  # first place of each piece
    length_P: np.ndarray
    count_R: np.ndarray  # pieces of each row
    seq_len: int

    @classmethod
    def of(cls, length_P: np.ndarray, count_R: np.ndarray, seq_len: int) -> "Layout":
        """The layout of pieces that are given row after row."""
        before_P = np.cumsum(length_P) - length_P
        row_P = np.repeat(np.arange(len(count_R)), count_R)
        first_R = before_P[np.cumsum(count_R) - count_R]
        return cls(before_P - first_R[row_P] + row_P * seq_len, length_P, count_R, seq_len)

    def row(self, raw_M: np.ndarray, pad_id: int) -> Row:
        """Rows of the pieces' tokens, which stand in raw_M at their places, each array [R, T]."""
        n_rows = len(self.count_R)
        end_R = np.cumsum(self.count_R)
        stop_R = self.at_P[end_R - 1] + self.length_P[end_R - 1]
        padding_R = np.arange(1, n_rows + 1) * self.seq_len - stop_R
        first_R = end_R - self.count_R
        number_P = np.arange(1, len(self.length_P) + 1) - np.repeat(first_R, self.count_R)
        length_X = np.insert(self.length_P, end_R, padding_R)  # the padding is a last piece
        number_X = np.insert(number_P, end_R, 0)
        row = segments_of(length_X, number_X, np.ones(len(length_X), bool))
        tokens_M, targets_M = raw_M.astype(np.int32), np.empty(len(raw_M), np.int32)
        targets_M[:-1], targets_M[-1] = raw_M[1:], pad_id
        targets_M[self.at_P + self.length_P - 1] = pad_id
        for r in np.flatnonzero(padding_R).tolist():
            padding = slice(int(stop_R[r]), (r + 1) * self.seq_len)
            tokens_M[padding] = targets_M[padding] = pad_id
            row["positions"][padding] = row["mask"][padding] = 0
        row |= {"tokens": tokens_M, "targets": targets_M}
        return {name: array.reshape(n_rows, self.seq_len) for name, array in row.items()}


def segments_of(length_P: np.ndarray, number_P: np.ndarray, whole_P: np.ndarray) -> Row:
    """Segments, positions and mask of pieces one behind another, each [sum of lengths].

    number_P: the segments they get. whole_P: whether a piece ends where its document does, so that
    its last token has nothing to predict.
    """
    end_P = np.cumsum(length_P)
    begin_P = (end_P - length_P).astype(np.int32)
    positions_M = np.arange(end_P[-1], dtype=np.int32) - np.repeat(begin_P, length_P)
    mask_M = np.ones(end_P[-1], np.float32)
    mask_M[end_P[whole_P & (length_P > 0)] - 1] = 0
    segments_M = np.repeat(number_P.astype(np.int32), length_P)
    return {"segments": segments_M, "positions": positions_M, "mask": mask_M}


@functools.lru_cache(maxsize=8)
def whole_row(seq_len: int) -> Row:
    """Segments, positions and mask of a row that is one text, each [T]; read-only."""
    row = {
        "segments": np.ones(seq_len, np.int32),
        "positions": np.arange(seq_len, dtype=np.int32),
        "mask": np.ones(seq_len, np.float32),
    }
    for array in row.values():
        array.flags.writeable = False
    return row


def take(rows: RowSource, indices: Sequence[int] | np.ndarray) -> Row:
    """Many rows of any source, each array [R, T]; in one read where the source can."""
    many = getattr(rows, "take", None)
    if many is not None:
        return many(indices)
    found = [rows[int(i)] for i in indices]
    return {name: np.stack([row[name] for row in found]) for name in found[0]}


def _borders(offsets_N1: np.ndarray, start: int, stop: int) -> list[int]:
    """Ends of documents at tokens after start, up to stop."""
    first, last = np.searchsorted(offsets_N1, [start, stop], side="right")
    return offsets_N1[first:last].tolist()


def _checked_rows(indices: Sequence[int] | np.ndarray, n_rows: int) -> np.ndarray:
    index_R = np.asarray(indices, dtype=np.int64)
    if index_R.size and not 0 <= index_R.min() <= index_R.max() < n_rows:
        raise IndexError(f"rows {index_R.min()}..{index_R.max()} asked, there are 0..{n_rows - 1}")
    return index_R
