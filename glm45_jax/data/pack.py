"""Documents to rows of T tokens: cut a long row of text, or pack whole documents (best fit).

`Cut` is what pretraining does, `BestFit` what mid-training does; both turn a store into rows that
can be read in any order. Numpy only. Source: spec 5.1, 5.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glm45_jax.data.fit import best_fit as best_fit
from glm45_jax.data.fit import split_long as split_long
from glm45_jax.data.rows import CutRows, MovingRows, PackedRows
from glm45_jax.data.rows import Row as Row
from glm45_jax.data.rows import RowSource as RowSource
from glm45_jax.data.rows import take as take
from glm45_jax.data.store import TokenStore
from glm45_jax.data.windows import MixedDocuments, StoredDocuments, WindowRows


@dataclass(frozen=True)
class Cut:
    """Documents joined and cut every T tokens, wherever that falls (pretraining, spec 5.3).

    document_mask: number the documents of a row as segments, restart positions, and drop the loss
    on targets that belong to the next document. The default treats a row as one text. moving: cut
    at other places in every epoch, so that a document that is read again is truncated at random.
    """

    document_mask: bool = False
    moving: bool = False

    def rows(self, store: TokenStore, seq_len: int, pad_id: int) -> "CutRows | MovingRows":
        """Row i is tokens i*T .. i*T+T, predicting one further; the last part row is dropped.

        Raises: ValueError when the store has not even one row.
        """
        del pad_id  # cut rows are full
        if store.manifest.n_tokens <= seq_len:
            raise ValueError(
                f"store {store.path} has {store.manifest.n_tokens} tokens, a row of seq_len "
                f"{seq_len} needs {seq_len + 1}; use more text or a smaller seq_len"
            )
        rows = CutRows(store, seq_len, self.document_mask)
        return MovingRows(rows) if self.moving else rows

    def mixture(
        self, stores: Sequence[tuple[TokenStore, float]], seq_len: int, pad_id: int
    ) -> list[tuple[RowSource, float]]:
        """Rows of every store, with its weight."""
        return [(self.rows(store, seq_len, pad_id), weight) for store, weight in stores]


@dataclass(frozen=True)
class BestFit:
    """Whole documents packed into rows; only those longer than T are cut (mid-training).

    window: pack this many documents at a time while training (data/windows.py), those of all
    sources together and in a new order every epoch; best thousands, fewer than there are. None
    packs every store by itself before the first step: the least padding where each has documents
    of all lengths.
    """

    window: int | None = None

    def rows(self, store: TokenStore, seq_len: int, pad_id: int) -> RowSource:
        """Rows of pieces: one segment each, positions from 0, padding `pad_id` at the end.

        Raises: ValueError when the store is empty.
        """
        if self.window is not None:
            return self.mixture([(store, 1.0)], seq_len, pad_id)[0][0]
        _check_text(store)
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

    def mixture(
        self, stores: Sequence[tuple[TokenStore, float]], seq_len: int, pad_id: int
    ) -> list[tuple[RowSource, float]]:
        """Rows of every store with its weight; with a window one source of rows of all of them.

        The weights are shares of the tokens either way.
        """
        if self.window is None:
            return [(self.rows(store, seq_len, pad_id), weight) for store, weight in stores]
        shares = []
        for store, weight in stores:
            _check_text(store)
            shares.append(weight * store.manifest.n_docs / store.manifest.n_tokens)
        documents = MixedDocuments([StoredDocuments(store) for store, _ in stores], shares)
        return [(WindowRows(documents, seq_len, pad_id, self.window), 1.0)]


def _check_text(store: TokenStore) -> None:
    if store.manifest.n_tokens == 0:
        raise ValueError(f"store {store.path} has 0 tokens, a row needs 1; use more text")
