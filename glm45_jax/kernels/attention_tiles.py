"""Causal grouped-query attention in tiles, in plain XLA: no device ever holds the scores of a row.

Queries and keys carry their index in the row, so any part of a row can meet any other: the one way
that runs everywhere, and the part of context parallelism that multiplies. A query at index t sees
keys begin <= s <= t, where its document begins at `begin`. Tiles that nobody sees are not visited.
Letters: B T S N K G H U; Z tiles of queries, lower-case t and s those of one tile.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

LOWEST = -1e30  # finite: a row whose first tile is all masked has no NaN, and forgets that tile
NOWHERE = 2**31 - 1  # the index of keys that only fill a tile
SCORES = 2**26  # of one tile that live at once: 256 MiB in float32
WIDEST = 1024  # tokens of a tile


@struct.dataclass
class Queries:
    """Queries in tiles. at, begin: int32, index in the row of each and of the first token of its
    document; their B is 1 where all rows agree.
    """

    q_ZBtKGH: jax.Array
    at_ZBt: jax.Array
    begin_ZBt: jax.Array


@struct.dataclass
class Keys:
    """Keys and values, and the index of each in the row, int32, rising."""

    k_BSKH: jax.Array
    v_BSKU: jax.Array
    at_S: jax.Array


@struct.dataclass
class Sums:
    """A softmax under way, float32: sum of weights times values, largest score, sum of weights.
    Weights are exp(score - top). Of all tiles, a leading Z.
    """

    mixed_BKGtU: jax.Array
    top_BKGt: jax.Array
    total_BKGt: jax.Array


@struct.dataclass
class Pulled:
    """What the backward pass knows of the queries, in their tiles: gradient of the output, base-e
    log-sum-exp, and the output times its gradient, summed over U, float32.
    """

    dout_ZBtKGU: jax.Array
    lse_ZBKGt: jax.Array
    delta_ZBKGt: jax.Array


def tile_width(rows: int, heads: int, length: int) -> int:
    """Tokens of a tile: a power of two, as many as `SCORES` allows, and no more than the row."""
    fits = math.isqrt(SCORES // (rows * heads))
    fits = min(WIDEST, max(128, 1 << (max(fits, 1).bit_length() - 1)))
    return min(fits, 1 << max(length - 1, 0).bit_length())


def begins(segments_BT: jax.Array) -> jax.Array:
    """Index in the row where the run of equal segments around each token begins, int32 [B, T]."""
    at_1T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)[None]
    new_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    return lax.cummax(jnp.where(new_BT, at_1T, 0), axis=1)


def queries(
    q_BTNH: jax.Array, at_BT: jax.Array, begin_BT: jax.Array, kv_heads: int, tile: int
) -> Queries:
    """Queries of `kv_heads` groups in tiles. Those that fill the last tile stand where the last one
    stands; what comes out of them is cut off, and their gradient is 0.
    """
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, kv_heads, N // kv_heads, H)
    return Queries(split(q_BTKGH, tile), split(at_BT, tile, "edge"), split(begin_BT, tile, "edge"))


def split(x_BT: jax.Array, tile: int, fill: str = "constant") -> jax.Array:
    """[Z, B, t, ...] of [B, T, ...], filled up to whole tiles."""
    B, T = x_BT.shape[:2]
    pad = ((0, 0), (0, -T % tile), *((0, 0),) * (x_BT.ndim - 2))
    x_BT = jnp.pad(x_BT, pad, mode=fill)
    return jnp.moveaxis(x_BT.reshape(B, -1, tile, *x_BT.shape[2:]), 1, 0)


def merge(x_ZBt: jax.Array, T: int) -> jax.Array:
    """[B, T, ...] of [Z, B, t, ...]."""
    x_BZt = jnp.moveaxis(x_ZBt, 0, 1)
    return x_BZt.reshape(x_BZt.shape[0], -1, *x_BZt.shape[3:])[:, :T]


def nothing_yet(q: Queries, width: int) -> Sums:
    """Sums of queries that met no key; width: of a value."""
    Z, B, t, K, G = q.q_ZBtKGH.shape[:5]
    none = jnp.zeros((Z, B, K, G, t), jnp.float32)
    return Sums(jnp.zeros((*none.shape, width), jnp.float32), none + LOWEST, none)


def absorb(q: Queries, keys: Keys, sums: Sums) -> Sums:
    """The sums after all queries met these keys too."""
    tile = q.q_ZBtKGH.shape[2]
    keys = _fill(keys, tile)
    return lax.map(lambda one: _absorb(one[0], keys, one[1], tile), (q, sums))


def attend(q: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """Output [Z, B, t, K, G, U] in the dtype of the queries and log-sum-exp of queries that meet
    these keys and no others. Sums of one tile live at a time.
    """
    tile = q.q_ZBtKGH.shape[2]
    keys = _fill(keys, tile)
    none = nothing_yet(jax.tree.map(lambda x: x[:1], q), keys.v_BSKU.shape[-1])
    none = jax.tree.map(lambda x: x[0], none)
    return lax.map(lambda one: finish(_absorb(one, keys, none, tile), one.q_ZBtKGH.dtype), q)


def finish(sums: Sums, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Output [..., B, t, K, G, U] and log-sum-exp [..., B, K, G, t] of sums."""
    mixed_BKGtU = sums.mixed_BKGtU / sums.total_BKGt[..., None]
    out_BtKGU = jnp.moveaxis(mixed_BKGtU, -2, -4)
    return out_BtKGU.astype(dtype), sums.top_BKGt + jnp.log(sums.total_BKGt)


def pulled(out_ZBtKGU: jax.Array, dout_BTNU: jax.Array, lse_ZBKGt: jax.Array) -> Pulled:
    """What the backward pass needs of the queries."""
    K, G = out_ZBtKGU.shape[3:5]
    B, T, _, U = dout_BTNU.shape
    dout_ZBtKGU = split(dout_BTNU.reshape(B, T, K, G, U), out_ZBtKGU.shape[2])
    delta_ZBKGt = jnp.einsum(
        "zbtkgu,zbtkgu->zbkgt", out_ZBtKGU, dout_ZBtKGU, preferred_element_type=jnp.float32
    )
    return Pulled(dout_ZBtKGU, lse_ZBKGt, delta_ZBKGt)


def pull(
    q: Queries, keys: Keys, back: Pulled, dq_ZBtKGH: jax.Array | None, dk_BSKH: jax.Array, dv_BSKU
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three gradients, float32, with those of the pairs of these queries and keys added. dq:
    None where these are all keys; what comes out has the dtype of the queries then.
    """
    tile, S = q.q_ZBtKGH.shape[2], keys.at_S.shape[0]
    keys = _fill(keys, tile)
    fill = ((0, 0), (0, keys.at_S.shape[0] - S), (0, 0), (0, 0))

    def one(carry, tile_of):
        (dk_BSKH, dv_BSKU), (q, back, dq) = carry, tile_of
        start = jnp.zeros(q.q_ZBtKGH.shape, jnp.float32) if dq is None else dq
        end, dk_BSKH, dv_BSKU = _pull(q, back, start, keys, dk_BSKH, dv_BSKU, tile)
        return (dk_BSKH, dv_BSKU), end.astype(q.q_ZBtKGH.dtype) if dq is None else end

    start = jnp.pad(dk_BSKH, fill), jnp.pad(dv_BSKU, fill)
    (dk_BSKH, dv_BSKU), moved_ZBtKGH = lax.scan(one, start, (q, back, dq_ZBtKGH))
    return moved_ZBtKGH, dk_BSKH[:, :S], dv_BSKU[:, :S]


def _fill(keys: Keys, tile: int) -> Keys:
    """Keys in whole tiles; those added are seen by nobody."""
    more = -keys.at_S.shape[0] % tile
    wide = ((0, 0), (0, more), (0, 0), (0, 0))
    return Keys(
        jnp.pad(keys.k_BSKH, wide),
        jnp.pad(keys.v_BSKU, wide),
        jnp.pad(keys.at_S, (0, more), constant_values=NOWHERE),
    )


def _reach(at_Bt: jax.Array, begin_Bt: jax.Array, keys: Keys, tile: int):
    """First and last + 1 of the tiles of keys that a tile of queries can see: keys rise."""
    before = (keys.at_S < begin_Bt.min()).sum(dtype=jnp.int32)
    seen = (keys.at_S <= at_Bt.max()).sum(dtype=jnp.int32)
    return before // tile, -(-seen // tile)


def _score(q: Queries, keys: Keys, i: jax.Array, tile: int):
    """Keys and values of tile i, the scores that queries of one tile have there, and what they see:
    float32 and bool [B or 1, 1, 1, t, s].
    """
    k_BsKH, v_BsKU = (
        lax.dynamic_slice_in_dim(x, i * tile, tile, 1) for x in (keys.k_BSKH, keys.v_BSKU)
    )
    at_s = lax.dynamic_slice_in_dim(keys.at_S, i * tile, tile)[None, None, None, None]
    score_BKGts = jnp.einsum(
        "btkgh,bskh->bkgts", q.q_ZBtKGH, k_BsKH, preferred_element_type=jnp.float32
    ) * jnp.float32(1 / math.sqrt(k_BsKH.shape[-1]))
    at, begin = (x[:, None, None, :, None] for x in (q.at_ZBt, q.begin_ZBt))
    seen = (at_s <= at) & (at_s >= begin)
    return k_BsKH, v_BsKU, jnp.where(seen, score_BKGts, jnp.float32(LOWEST)), seen


def _absorb(q: Queries, keys: Keys, sums: Sums, tile: int) -> Sums:
    """Of one tile of queries: leaves without Z."""

    def one(i, sums):
        _, v_BsKU, score_BKGts, _ = _score(q, keys, i, tile)
        top_BKGt = jnp.maximum(sums.top_BKGt, score_BKGts.max(axis=-1))
        weight_BKGts = jnp.exp(score_BKGts - top_BKGt[..., None])
        kept_BKGt = jnp.exp(sums.top_BKGt - top_BKGt)
        mixed_BKGtU = jnp.einsum(
            "bkgts,bsku->bkgtu",
            weight_BKGts.astype(v_BsKU.dtype),
            v_BsKU,
            preferred_element_type=jnp.float32,
        )
        return Sums(
            sums.mixed_BKGtU * kept_BKGt[..., None] + mixed_BKGtU,
            top_BKGt,
            sums.total_BKGt * kept_BKGt + weight_BKGts.sum(axis=-1),
        )

    first, stop = _reach(q.at_ZBt, q.begin_ZBt, keys, tile)
    return lax.fori_loop(first, stop, one, sums)


def _pull(q: Queries, back: Pulled, dq_BtKGH, keys: Keys, dk_BSKH, dv_BSKU, tile: int):
    """Of one tile of queries: leaves of `q`, `back` and dq without Z."""
    dtype = q.q_ZBtKGH.dtype
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one(i, grads):
        dq_BtKGH, dk_BSKH, dv_BSKU = grads
        k_BsKH, v_BsKU, score_BKGts, seen = _score(q, keys, i, tile)
        # A query of an all masked tile has score - lse near -1e30, and exp gives 0 without `where`;
        # with it nothing that fills a tile can.
        p_BKGts = jnp.where(seen, jnp.exp(score_BKGts - back.lse_ZBKGt[..., None]), jnp.float32(0))
        dp_BKGts = dot("btkgu,bsku->bkgts", back.dout_ZBtKGU, v_BsKU)
        ds_BKGts = p_BKGts * (dp_BKGts - back.delta_ZBKGt[..., None])
        ds_BKGts = (ds_BKGts * jnp.float32(1 / math.sqrt(k_BsKH.shape[-1]))).astype(dtype)
        dv_BsKU = dot("bkgts,btkgu->bsku", p_BKGts.astype(dtype), back.dout_ZBtKGU)
        dk_BsKH = dot("bkgts,btkgh->bskh", ds_BKGts, q.q_ZBtKGH)
        dq_BtKGH = dq_BtKGH + dot("bkgts,bskh->btkgh", ds_BKGts, k_BsKH)
        return dq_BtKGH, _add_at(dk_BSKH, dk_BsKH, i * tile), _add_at(dv_BSKU, dv_BsKU, i * tile)

    first, stop = _reach(q.at_ZBt, q.begin_ZBt, keys, tile)
    return lax.fori_loop(first, stop, one, (dq_BtKGH, dk_BSKH, dv_BSKU))


def _add_at(x_BSKH: jax.Array, more_BsKH: jax.Array, at: jax.Array) -> jax.Array:
    old = lax.dynamic_slice_in_dim(x_BSKH, at, more_BsKH.shape[1], 1)
    return lax.dynamic_update_slice_in_dim(x_BSKH, old + more_BsKH, at, 1)


def tiled_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKU: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    tile: int | None = None,
) -> jax.Array:
    """Attention output [B, T, N, U] of whole rows; scores scaled by H^-0.5, softmax in float32.

    segments_BT: the document of each token; equal numbers that do not touch are two documents.
    Differentiable in q, k, v; the backward pass makes the scores again. Any T.
    """
    B, T, N = q_BTNH.shape[:3]
    at_1T = jnp.arange(T, dtype=jnp.int32)[None]
    begin_BT = jnp.zeros_like(at_1T) if segments_BT is None else begins(segments_BT)
    return _flash(q_BTNH, k_BTKH, v_BTKU, at_1T, begin_BT, tile or tile_width(B, N, T))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q_BTNH, k_BTKH, v_BTKU, at_1T, begin_BT, tile):
    return _flash_fwd(q_BTNH, k_BTKH, v_BTKU, at_1T, begin_BT, tile)[0]


def _flash_fwd(q_BTNH, k_BTKH, v_BTKU, at_1T, begin_BT, tile):
    q = queries(q_BTNH, at_1T, begin_BT, k_BTKH.shape[2], tile)
    out_ZBtKGU, lse_ZBKGt = attend(q, Keys(k_BTKH, v_BTKU, at_1T[0]))
    kept = q_BTNH, k_BTKH, v_BTKU, at_1T, begin_BT, out_ZBtKGU, lse_ZBKGt
    return heads_merged(out_ZBtKGU, q_BTNH.shape[1]), kept


def _flash_bwd(tile, kept, dout_BTNU):
    q_BTNH, k_BTKH, v_BTKU, at_1T, begin_BT, out_ZBtKGU, lse_ZBKGt = kept
    q = queries(q_BTNH, at_1T, begin_BT, k_BTKH.shape[2], tile)
    back = pulled(out_ZBtKGU, dout_BTNU, lse_ZBKGt)
    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (k_BTKH, v_BTKU))
    dq, dk, dv = pull(q, Keys(k_BTKH, v_BTKU, at_1T[0]), back, None, *zeros)
    dq_BTNH = heads_merged(dq, q_BTNH.shape[1])
    return (
        *(d.astype(x.dtype) for d, x in ((dq_BTNH, q_BTNH), (dk, k_BTKH), (dv, v_BTKU))),
        None,
        None,
    )


_flash.defvjp(_flash_fwd, _flash_bwd)


def heads_merged(x_ZBtKGU: jax.Array, T: int) -> jax.Array:
    """[B, T, N, U] of [Z, B, t, K, G, U]."""
    x_BTKGU = merge(x_ZBtKGU, T)
    B, _, K, G, U = x_BTKGU.shape
    return x_BTKGU.reshape(B, T, K * G, U)
