"""Paged cache of keys and values for decoding. Letters: L layers, P pages, S slots of a page, K H.

What a key and a value are is the mixer's affair (`kv_shapes`): heads and width H of the two may
differ, and latent attention keeps one latent for all heads.

A row's tokens lie in the pages its line of the table names, in order. Pages may be shared between
rows that only read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KVCache:
    """Keys and values of every layer.

    k_LPSKH, v_LPSKH: pages, in the activations' dtype. table_BP: pages of each row, in order.
    length_B: tokens held.
    """

    k_LPSKH: jax.Array
    v_LPSKH: jax.Array
    table_BP: jax.Array
    length_B: jax.Array

    def layers(self, start: int, stop: int) -> LayerCache:
        """The stacked pages of some layers, as `lax.scan` takes them."""
        return LayerCache(self.k_LPSKH[start:stop], self.v_LPSKH[start:stop])

    def slots(self, tokens: int, valid_BT: jax.Array | None) -> Slots:
        """Where the next `tokens` tokens of each row go; invalid ones (right padding) are not
        stored.
        """
        n_pages, size = self.k_LPSKH.shape[1:3]
        step_1T = jnp.arange(tokens, dtype=jnp.int32)[None, :]
        positions_BT = self.length_B[:, None] + step_1T
        page_BT = jnp.take_along_axis(
            self.table_BP, positions_BT // size, axis=1, mode="fill", fill_value=n_pages
        )
        slot_BT = page_BT * size + positions_BT % size
        if valid_BT is None:
            new_B = jnp.full_like(self.length_B, tokens)
        else:
            slot_BT = jnp.where(valid_BT, slot_BT, n_pages * size)
            new_B = valid_BT.sum(axis=1).astype(jnp.int32)
        reach_1S = jnp.arange(self.table_BP.shape[1] * size, dtype=jnp.int32)[None, :]
        return Slots(slot_BT, positions_BT, reach_1S, self.table_BP, new_B)


@struct.dataclass
class Slots:
    """Where one step's tokens go: flat slots (out of range = not stored), their positions, and the
    positions of all keys.
    """

    slot_BT: jax.Array
    positions_BT: jax.Array
    positions_1S: jax.Array
    table_BP: jax.Array
    new_B: jax.Array


@struct.dataclass
class LayerCache:
    """Pages of one layer (or, with a leading L, of stacked layers)."""

    k_PSKH: jax.Array
    v_PSKH: jax.Array

    def append(self, k_BTKH: jax.Array, v_BTKH: jax.Array, slots: Slots) -> LayerCache:
        """The pages with this step's keys and values stored."""

        def put(page_PSKH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            flat = page_PSKH.reshape(-1, *page_PSKH.shape[2:])
            return (
                flat.at[slots.slot_BT]
                .set(new_BTKH.astype(flat.dtype), mode="drop")
                .reshape(page_PSKH.shape)
            )

        return LayerCache(put(self.k_PSKH, k_BTKH), put(self.v_PSKH, v_BTKH))

    def read(self, slots: Slots) -> tuple[jax.Array, jax.Array]:
        """Keys and values of each row in order, [B, S, K, H]; slots not yet filled hold
        anything.
        """

        def get(page_PSKH: jax.Array) -> jax.Array:
            k_BPSKH = page_PSKH[slots.table_BP]
            return k_BPSKH.reshape(k_BPSKH.shape[0], -1, *k_BPSKH.shape[3:])

        return get(self.k_PSKH), get(self.v_PSKH)


def init_cache(
    *,
    layers: int,
    rows: int,
    max_tokens: int,
    key: tuple[int, int],
    value: tuple[int, int],
    dtype: jnp.dtype,
    page: int = 16,
) -> KVCache:
    """An empty cache in which every row owns ceil(max_tokens / page) pages of its own.

    key, value: (heads, width) of what one token stores in a layer.
    """
    per_row = -(-max_tokens // page)
    pages = (layers, rows * per_row, page)
    table_BP = jnp.arange(rows * per_row, dtype=jnp.int32).reshape(rows, per_row)
    return KVCache(
        k_LPSKH=jnp.zeros((*pages, *key), dtype),
        v_LPSKH=jnp.zeros((*pages, *value), dtype),
        table_BP=table_BP,
        length_B=jnp.zeros(rows, jnp.int32),
    )
