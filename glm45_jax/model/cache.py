"""Paged cache of keys and values for decoding. Letters: L layers, P pages, S slots of a page, K H.

What a key and a value are is the mixer's affair (`kv_shapes`): heads and width H of the two may
differ, and latent attention keeps one latent for all heads.

A row's tokens lie in the pages its line of the table names, in order. Pages may be shared between
rows that only read. In float8_e4m3fn they are stored without a scale, up to 448 either way: that
has three bits of a number's mantissa whatever its size, and keys are of order 1 to 10. The output
of attention is then some 3% off (docs/log.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from glm45_jax.kernels.attention import attention
from glm45_jax.kernels.decode_attention import NEW_TOKENS, decode_attention, gather

UNSEEN = 2**30  # a position after every query


@struct.dataclass
class KVCache:
    """Keys and values of every layer.

    k_LPSKH, v_LPSKH: pages, in the activations' dtype or float8_e4m3fn. table_BP: pages of each
    row, in order. length_B: tokens held. lead: slots at the beginning of each row that hold none;
    the token at position i lies i + lead slots on. fresh: no row holds a token yet, so that the
    next ones see each other alone and nothing is read.
    """

    k_LPSKH: jax.Array
    v_LPSKH: jax.Array
    table_BP: jax.Array
    length_B: jax.Array
    lead: int = struct.field(pytree_node=False, default=0)
    fresh: bool = struct.field(pytree_node=False, default=False)

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
        place_BT = positions_BT + self.lead
        page_BT = jnp.take_along_axis(
            self.table_BP, place_BT // size, axis=1, mode="fill", fill_value=n_pages
        )
        slot_BT = page_BT * size + place_BT % size
        if valid_BT is None:
            new_B = jnp.full_like(self.length_B, tokens)
        else:
            slot_BT = jnp.where(valid_BT, slot_BT, n_pages * size)
            new_B = valid_BT.sum(axis=1).astype(jnp.int32)
        reach_1S = jnp.arange(self.table_BP.shape[1] * size, dtype=jnp.int32)[None, :] - self.lead
        if self.lead:
            reach_1S = jnp.where(reach_1S < 0, UNSEEN, reach_1S)
        return Slots(slot_BT, positions_BT, reach_1S, self.table_BP, new_B, self.lead, self.fresh)


@struct.dataclass
class Slots:
    """Where one step's tokens go: flat slots (out of range = not stored), their positions, and the
    positions of all keys. lead, fresh: as in `KVCache`.
    """

    slot_BT: jax.Array
    positions_BT: jax.Array
    positions_1S: jax.Array
    table_BP: jax.Array
    new_B: jax.Array
    lead: int = struct.field(pytree_node=False, default=0)
    fresh: bool = struct.field(pytree_node=False, default=False)

    @property
    def start_B(self) -> jax.Array:
        """How many slots on the first new token of a row lies; a row with none has nothing to see:
        all its queries stand before slot 0.
        """
        none = -self.positions_BT.shape[1]
        return jnp.where(self.new_B > 0, self.positions_BT[:, 0] + self.lead, none)


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
            flat = flat.at[slot_BT].set(stored(new_BTKH, flat.dtype), mode="drop")
            return flat.reshape(page_LPSKH.shape)

        return self.replace(k_LPSKH=put(self.k_LPSKH, k_BTKH), v_LPSKH=put(self.v_LPSKH, v_BTKH))

    def read(self, slots: Slots) -> tuple[jax.Array, jax.Array]:
        """Keys and values of each row in order, [B, S, K, H], a copy; slots not yet filled hold
        anything.
        """
        k_BSKH, v_BSKH = (
            gather(x, self.layer, slots.table_BP) for x in (self.k_LPSKH, self.v_LPSKH)
        )
        return k_BSKH, v_BSKH

    def attend(
        self,
        q_BTNH: jax.Array,
        slots: Slots,
        *,
        impl: str,
        impl_decode: str,
        latent: bool = False,
    ) -> jax.Array:
        """Attention of new tokens, which have been appended, over all that their rows hold:
        [B, T, N, H]. latent: keys are [value; key entry], as latent attention stores them.

        A few tokens read the pages where they lie (`impl_decode`); the chunk of a prompt, a copy of
        them (`impl`), which many queries share.
        """
        if q_BTNH.shape[1] <= NEW_TOKENS:
            return decode_attention(
                q_BTNH,
                self.k_LPSKH,
                self.v_LPSKH,
                layer=self.layer,
                table_BP=slots.table_BP,
                start_B=slots.start_B,
                skip=slots.lead,
                latent=latent,
                impl=impl_decode,
            )
        k_BSKH, v_BSKH = (x.astype(q_BTNH.dtype) for x in self.read(slots))
        if latent:
            k_BSKH = jnp.concatenate([v_BSKH, k_BSKH], axis=-1)
        return attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            positions_BT=slots.positions_BT,
            positions_BS=slots.positions_1S,
            impl=impl,
        )


def stored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` as a page keeps it; what 8 bits cannot hold becomes their largest number, not NaN."""
    if dtype == jnp.float8_e4m3fn:
        most = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -most, most)
    return x.astype(dtype)


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
