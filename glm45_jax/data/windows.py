"""Best-fit packing while training: a window of documents at a time, of an endless row of them.

`WindowRows` packs `window` documents, shuffles the rows that come out, and goes on with the next
ones; a window depends on nothing but its documents' lengths, so every host finds the same rows.
What it packs are `Documents`: those of a store in a new order every epoch (`StoredDocuments`), or
ones that are made when they are asked for (`MadeDocuments`), or both by weight (`MixedDocuments`).
Letters: `N` documents, `P` pieces, `R` rows.
"""

import functools
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from glm45_jax.data.fit import best_fit, split_long
from glm45_jax.data.order import ENDLESS, Order, permuted
from glm45_jax.data.rows import Layout, Row
from glm45_jax.data.store import TokenStore

_WINDOWS_KEPT = 4


class Documents(Protocol):
    """An endless row of documents, numbered from 0; the same number is always the same one."""

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens."""
        ...

    @property
    def recipe(self) -> list[Any]:
        """What they are, JSON-able, for the state of a loader."""
        ...

    def seeded(self, seed: int) -> "Documents":
        """The documents of this seed, below 2**32."""
        ...

    def lengths(self, first: int, n: int) -> np.ndarray:
        """Tokens of documents first .. first + n, int64 [n]."""
        ...

    def read_into(
        self,
        out_M: np.ndarray,
        at_P: np.ndarray,
        number_P: np.ndarray,
        begin_P: np.ndarray,
        length_P: np.ndarray,
    ) -> None:
        """Puts tokens begin .. begin + length of documents at their places of out_M."""
        ...


@dataclass(frozen=True)
class StoredDocuments:
    """The documents of a store, each once an epoch, in another order every epoch."""

    store: TokenStore
    seed: int = 0

    @property
    def dtype(self) -> np.dtype:
        """Of the store."""
        return self.store.chunks.dtype

    @property
    def recipe(self) -> list[Any]:
        """How many there are."""
        return ["stored", self.store.manifest.n_docs, self.store.manifest.n_tokens]

    def seeded(self, seed: int) -> "StoredDocuments":
        """The same documents in other orders."""
        return replace(self, seed=seed)

    def stored(self, number_N: np.ndarray) -> np.ndarray:
        """Which document of the store stands at these numbers."""
        n = self.store.manifest.n_docs
        epoch_N, place_N = np.divmod(number_N, n)
        keys = np.uint64(self.seed << 32) + epoch_N.astype(np.uint64)
        return permuted(place_N, np.full(len(place_N), n), keys)

    def lengths(self, first: int, n: int) -> np.ndarray:
        """Tokens of documents first .. first + n, their `<|endoftext|>` included."""
        doc_N = self.stored(np.arange(first, first + n))
        return self.store.offsets_N1[doc_N + 1] - self.store.offsets_N1[doc_N]

    def read_into(
        self,
        out_M: np.ndarray,
        at_P: np.ndarray,
        number_P: np.ndarray,
        begin_P: np.ndarray,
        length_P: np.ndarray,
    ) -> None:
        """Reads the pieces from the store."""
        start_P = self.store.offsets_N1[self.stored(number_P)] + begin_P
        self.store.chunks.read_into(out_M, at_P, start_P, length_P)


class MadeDocuments:
    """Documents that a function makes: drawn, joined or cut for infilling anew in every epoch.

    make: (seed, number) -> ids, nothing else may decide them. Every host makes every document, to
    know its length, and keeps the last `keep` (at least a window) until they are read.
    """

    def __init__(
        self,
        make: Callable[[int, int], Sequence[int] | np.ndarray],
        *,
        seed: int = 0,
        keep: int = 8192,
    ):
        self._make, self._seed, self._keep = make, seed, keep
        self._tokens = functools.lru_cache(maxsize=keep)(
            lambda number: np.asarray(make(seed, number), np.uint32)
        )

    def __reduce__(self):
        return _made, (self._make, self._seed, self._keep)

    @property
    def dtype(self) -> np.dtype:
        """Wide enough for every vocabulary."""
        return np.dtype(np.uint32)

    @property
    def recipe(self) -> list[Any]:
        """No more than that they are made."""
        return ["made"]

    def seeded(self, seed: int) -> "MadeDocuments":
        """The documents of this seed."""
        return _made(self._make, seed, self._keep)

    def lengths(self, first: int, n: int) -> np.ndarray:
        """Makes the documents and counts them."""
        return np.array([len(self._tokens(i)) for i in range(first, first + n)], np.int64)

    def read_into(
        self,
        out_M: np.ndarray,
        at_P: np.ndarray,
        number_P: np.ndarray,
        begin_P: np.ndarray,
        length_P: np.ndarray,
    ) -> None:
        """Copies the pieces; makes those again that are not kept any more."""
        for at, number, begin, length in zip(
            *(x.tolist() for x in (at_P, number_P, begin_P, length_P)), strict=True
        ):
            out_M[at : at + length] = self._tokens(number)[begin : begin + length]


class MixedDocuments:
    """Documents of several kinds by weight, so that the short ones of one fill the rows of another.

    Every kind comes in its own order, exactly once before it comes again.
    """

    def __init__(self, documents: Sequence[Documents], weights: Sequence[float]):
        """weights: shares of the documents (not of the tokens).

        Raises: ValueError for kinds of different dtypes.
        """
        dtypes = sorted({str(kind.dtype) for kind in documents})
        if len(dtypes) != 1:
            raise ValueError(
                f"documents of dtypes {dtypes} cannot be in one row; prepare all with one tokenizer"
            )
        self._documents, self._weights = tuple(documents), tuple(weights)
        n = len(documents)
        self._order = Order([ENDLESS] * n, weights, seeds=[0] * n, drawn=[0] * n)

    def __reduce__(self):
        return MixedDocuments, (self._documents, self._weights)

    @property
    def dtype(self) -> np.dtype:
        """That of every kind."""
        return self._documents[0].dtype

    @property
    def recipe(self) -> list[Any]:
        """Every kind with its weight."""
        kinds = zip(self._documents, self._weights, strict=True)
        return ["mixed", *([kind.recipe, weight] for kind, weight in kinds)]

    def seeded(self, seed: int) -> "MixedDocuments":
        """The same kinds, each with a seed of its own."""
        seeds = np.random.SeedSequence(seed).generate_state(len(self._documents)).tolist()
        kinds = [kind.seeded(own) for kind, own in zip(self._documents, seeds, strict=True)]
        return MixedDocuments(kinds, self._weights)

    def lengths(self, first: int, n: int) -> np.ndarray:
        """Tokens of documents first .. first + n; those of a kind are neighbours there too."""
        drawn, length_N = self._order.of(np.arange(first, first + n)), np.zeros(n, np.int64)
        for s in np.unique(drawn.source_N):
            at = np.flatnonzero(drawn.source_N == s)
            length_N[at] = self._documents[s].lengths(int(drawn.row_N[at[0]]), len(at))
        return length_N

    def read_into(
        self,
        out_M: np.ndarray,
        at_P: np.ndarray,
        number_P: np.ndarray,
        begin_P: np.ndarray,
        length_P: np.ndarray,
    ) -> None:
        """Reads the pieces, kind by kind."""
        drawn = self._order.of(number_P)
        for s in np.unique(drawn.source_N):
            own = np.flatnonzero(drawn.source_N == s)
            self._documents[s].read_into(
                out_M, at_P[own], drawn.row_N[own], begin_P[own], length_P[own]
            )


def _made(make: Callable, seed: int, keep: int) -> MadeDocuments:
    return MadeDocuments(make, seed=seed, keep=keep)


class _Window(NamedTuple):
    """Rows of a window: row r holds pieces bounds_R1[r] .. bounds_R1[r + 1]."""

    number_P: np.ndarray
    begin_P: np.ndarray
    length_P: np.ndarray
    bounds_R1: np.ndarray


class WindowRows:
    """Endless rows of whole documents, packed a window at a time (the rows of `BestFit(window)`).

    No document of up to seq_len tokens is cut, and each is in one row. Rows come in their own order
    and are found by packing the windows before them, lengths only, once; `resume` spares that.
    """

    def __init__(
        self, documents: Documents, seq_len: int, pad_id: int, window: int, *, seed: int = 0
    ):
        """window: documents packed together; thousands leave under half a percent of padding.

        Raises: ValueError for a window without documents.
        """
        if window < 1:
            raise ValueError(f"a window of {window} documents; use at least 1, better thousands")
        self._made_of = (documents, seq_len, pad_id, window)
        self.documents, self.seq_len, self.pad_id, self.window = self._made_of
        self._seed = seed
        self._base, self._first_row = 0, [0]  # rows where windows base, base + 1, ... begin
        self._packed: dict[int, _Window] = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return _window_rows, (*self._made_of, self._seed)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: int) -> Row:
        return {name: array[0] for name, array in self.take([i]).items()}

    @property
    def recipe(self) -> list[Any]:
        """What decides the rows beside the seed, JSON-able."""
        return [self.window, self.seq_len, self.documents.recipe]

    def seeded(self, seed: int) -> "WindowRows":
        """The rows of this seed, below 2**32."""
        documents, *rest = self._made_of
        return WindowRows(documents.seeded(seed), *rest, seed=seed)

    def take(self, indices: Sequence[int] | np.ndarray) -> Row:
        """Many rows at once, each array [R, T]."""
        found = [self._row(int(i)) for i in indices]
        number_P, begin_P, length_P = (np.concatenate(x) for x in zip(*found, strict=True))
        count_R = np.array([len(number) for number, _, _ in found])
        layout = Layout.of(length_P, count_R, self.seq_len)
        raw_M = np.zeros(len(found) * self.seq_len, self.documents.dtype)
        self.documents.read_into(raw_M, layout.at_P, number_P, begin_P, length_P)
        return layout.row(raw_M, self.pad_id)

    def window_of(self, row: int) -> tuple[int, int]:
        """(window that holds the row, first row of that window)."""
        if not 0 <= row < ENDLESS:
            raise IndexError(f"row {row} asked, rows are numbered from 0")
        with self._lock:
            if row < self._first_row[0]:
                self._base, self._first_row = 0, [0]
            while row >= self._first_row[-1]:
                n_rows = len(self._pack(self._base + len(self._first_row) - 1).bounds_R1) - 1
                self._first_row.append(self._first_row[-1] + n_rows)
            at = bisect_right(self._first_row, row) - 1
            return self._base + at, self._first_row[at]

    def resume(self, window: int, first_row: int) -> None:
        """Takes it as known that the window begins at this row, as `window_of` said before."""
        with self._lock:
            self._base, self._first_row = window, [first_row]

    def _row(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        index, first = self.window_of(i)
        with self._lock:
            window = self._pack(index)
        begin, end = window.bounds_R1[i - first : i - first + 2]
        return window.number_P[begin:end], window.begin_P[begin:end], window.length_P[begin:end]

    def _pack(self, index: int) -> _Window:
        """The window, its rows in shuffled order; the lock is held."""
        if index in self._packed:
            return self._packed[index]
        first = index * self.window
        pieces = split_long(self.documents.lengths(first, self.window), self.seq_len)
        if not len(pieces.doc_N):
            raise ValueError(
                f"documents {first} to {first + self.window - 1} are all empty; a window needs text"
            )
        bins = best_fit(pieces.length_N, self.seq_len)
        keys = np.full(len(bins), (self._seed << 32) + index, np.uint64)
        order_R = permuted(np.arange(len(bins)), np.full(len(bins), len(bins)), keys)
        bins = [bins[r] for r in order_R.tolist()]
        member_P = np.concatenate([np.array(members) for members in bins])
        self._packed[index] = _Window(
            pieces.doc_N[member_P] + first,
            pieces.begin_N[member_P],
            pieces.length_N[member_P],
            np.cumsum([0] + [len(members) for members in bins]),
        )
        while len(self._packed) > _WINDOWS_KEPT:
            del self._packed[next(iter(self._packed))]
        return self._packed[index]


def _window_rows(
    documents: Documents, seq_len: int, pad_id: int, window: int, seed: int
) -> WindowRows:
    return WindowRows(documents, seq_len, pad_id, window, seed=seed)
