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

    def pages(self) -> LayerCache:
        """The pages as the layers take them, one after another."""
        return LayerCache(self.k_LPSKH, self.v_LPSKH, jnp.int32(0))

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
    """The pages of all layers, and which layer is at work.

    The scan over layers carries it: a layer writes its few slots into the one buffer and reads the
    pages of its rows, so a step costs what it touches, not the whole cache.
    """

    k_LPSKH: jax.Array
    v_LPSKH: jax.Array
    layer: jax.Array

    def append(self, k_BTKH: jax.Array, v_BTKH: jax.Array, slots: Slots) -> LayerCache:
        """The pages with this step's keys and values stored."""

        def put(page_LPSKH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            n_layers, n_pages, size = page_LPSKH.shape[:3]
            of_layer = n_pages * size
            flat = page_LPSKH.reshape(n_layers * of_layer, *page_LPSKH.shape[3:])
            # A slot out of its layer is no slot of the next one.
            stored_BT = slots.slot_BT < of_layer
            slot_BT = self.layer * of_layer + slots.slot_BT
            slot_BT = jnp.where(stored_BT, slot_BT, n_layers * of_layer)
            flat = flat.at[slot_BT].set(new_BTKH.astype(flat.dtype), mode="drop")
            return flat.reshape(page_LPSKH.shape)

        return self.replace(k_LPSKH=put(self.k_LPSKH, k_BTKH), v_LPSKH=put(self.v_LPSKH, v_BTKH))

    def read(self, slots: Slots) -> tuple[jax.Array, jax.Array]:
        """Keys and values of each row in order, [B, S, K, H]; slots not yet filled hold
        anything.
        """

        def get(page_LPSKH: jax.Array) -> jax.Array:
            k_BPSKH = page_LPSKH[self.layer, slots.table_BP]
            return k_BPSKH.reshape(k_BPSKH.shape[0], -1, *k_BPSKH.shape[3:])

        return get(self.k_LPSKH), get(self.v_LPSKH)


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
