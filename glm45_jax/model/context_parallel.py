"""Rows split over the devices of a mesh: each holds two chunks of every row, and its queries meet
the keys of the others. Types to know: `GatherKeys`, `RingKeys`; one is `Rules.keys`.

A row is cut into 2c chunks for c devices, and device i holds chunks i and 2c - 1 - i: a causal
query near the end of a row meets many keys, one near the beginning few, and so every device has the
same number of pairs. Only this file knows that order: `spread` brings rows into it where the model
begins and `join` back where it ends, so losses, shifts by a token and sums over documents see rows
as they are. Letters: B T N K H U; C tokens of a chunk; X = H + U, a key and its value joined.
Lower case is this device's part.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from glm45_jax import sharding
from glm45_jax.kernels import attention_tiles as tiles
from glm45_jax.kernels.attention import attention as whole_rows
from glm45_jax.kernels.dispatch import say_once

log = logging.getLogger(__name__)

GATHER_BYTES = 2**30  # of the keys and values of whole rows on a device; gradients take twice that


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The devices that share rows: `size` along `axes` of the mesh."""

    mesh: Mesh
    axes: tuple[str, ...]
    size: int


def lanes() -> Lanes | None:
    """Those of the mesh set by `sharding.use`, or None where rows are whole."""
    if (ambient := sharding.current()) is None:
        return None
    mesh, rules = ambient
    axes = sharding.names(rules.spec(("batch", "seq"))[1])
    axes = tuple(a for a in axes if mesh.shape[a] > 1)
    return Lanes(mesh, axes, sharding.ways(axes, mesh.shape)) if axes else None


def zigzag(T: int, size: int) -> np.ndarray:
    """Index in the row of each token of the order in which `size` devices hold it, int [T]."""
    chunks = np.arange(T).reshape(2 * size, -1)
    return np.stack([chunks[:size], chunks[size:][::-1]], axis=1).reshape(T)


def spread(x: Any, *, axis: int = 1) -> Any:
    """`x` of rows, in the order in which devices hold them; `x` itself where rows are whole, and
    None for None. axis: of T; that of B is the one before.

    Two permutes, each of half of what a device holds.

    Raises: ValueError where rows do not divide into chunks.
    """
    return _moved(x, axis, _spread)


def join(x: Any, *, axis: int = 1) -> Any:
    """The inverse of `spread`."""
    return _moved(x, axis, _join)


def attend() -> Callable[..., jax.Array]:
    """What `kernels.attention.attention` is for rows as `spread` leaves them."""
    return whole_rows if lanes() is None else spread_rows


def spread_rows(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKU: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    positions_BS: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Attention output q[B/batch, T/seq, N/tensor, U] of rows in the order of `spread`, exactly
    that of whole rows; by `Rules.keys`. positions: must say what the index in the row says, inside
    a segment.

    Raises: ValueError where the mask is not by index, or for a named kernel: they take whole rows.
    """
    over = lanes()
    assert over is not None
    if positions_BT is not positions_BS or (positions_BT is not None and segments_BT is None):
        raise ValueError(
            f"attention over {over.axes}: rows split over {over.size} devices are masked by index; "
            "positions without segments were given; pass segments_BT too, or use rules.seq=()"
        )
    if impl not in ("auto", "tiles"):
        raise ValueError(
            f"attention over {over.axes}: impl={impl!r} is for whole rows, a device of {over.size} "
            "holds two chunks; use 'auto' or 'tiles', or rules.seq=()"
        )
    _, rules = sharding.current()  # type: ignore[misc]
    axes = rules.spec(("batch", "seq", "kv_heads", "head_dim"))  # a group stays with its keys
    spec = sharding.fitting(axes, k_BTKH.shape, over.mesh.shape)
    heads = sharding.ways(spec[2], over.mesh.shape)
    B, T, N = q_BTNH.shape[:3]
    rows = B // sharding.ways(spec[0], over.mesh.shape)
    width = k_BTKH.shape[3] + v_BTKU.shape[3]
    gathered = rows * T * (k_BTKH.shape[2] // heads) * width * k_BTKH.dtype.itemsize
    meet = choose(rules.keys, gathered=gathered, lanes=over.size)
    tile = tiles.tile_width(rows, N // heads, T // (2 * over.size))
    return jax.shard_map(
        functools.partial(_meet, over=over, meet=meet, tile=tile),
        mesh=over.mesh,
        in_specs=(spec, spec, spec, PartitionSpec(*spec[:2])),
        out_specs=spec,
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKU, segments_BT)


@dataclasses.dataclass(frozen=True)
class GatherKeys:
    """Each device gathers the keys and values of its rows; their gradients are reduce-scattered.
    One collective a pass. tile: tokens of a tile of scores, None by size.
    """

    tile: int | None = None

    def attend(self, q: tiles.Queries, kv_btKX: jax.Array, width: int, lane: tuple):
        """Output tiles, in the dtype of q, and log-sum-exp."""
        return tiles.attend(q, _whole_keys(kv_btKX, width, lane))

    def pull(self, q: tiles.Queries, kv_btKX: jax.Array, width: int, lane: tuple, back):
        """Gradients, float32: of the queries in tiles, and of our keys and values, joined."""
        axes, size = lane
        keys = _whole_keys(kv_btKX, width, lane)
        zeros = (jnp.zeros(x.shape, jnp.float32) for x in (keys.k_BSKH, keys.v_BSKU))
        dq, *dkv = tiles.pull(q, keys, back, None, *zeros)
        dkv_bTKX = _in_lane_order(jnp.concatenate(dkv, axis=-1), size)
        return dq, lax.psum_scatter(dkv_bTKX, axes, scatter_dimension=1, tiled=True)


@dataclasses.dataclass(frozen=True)
class RingKeys:
    """Keys and values go round, one device at a time, while the queries meet those that are here.
    Holds two devices' worth of them, whatever their number. tile: tokens of a tile of scores, None
    by size.
    """

    tile: int | None = None

    def attend(self, q: tiles.Queries, kv_btKX: jax.Array, width: int, lane: tuple):
        """Output tiles, in the dtype of q, and log-sum-exp."""
        axes, size = lane

        def one(carry, step):
            sums, kv_btKX = carry
            coming = _pass_on(kv_btKX, axes, size)  # while we multiply
            return (tiles.absorb(q, _held(kv_btKX, width, lane, step), sums), coming), None

        start = tiles.nothing_yet(q, kv_btKX.shape[-1] - width), kv_btKX
        (sums, kv_btKX), _ = lax.scan(one, start, jnp.arange(size - 1, dtype=jnp.int32))
        last = _held(kv_btKX, width, lane, jnp.int32(size - 1))
        return tiles.finish(tiles.absorb(q, last, sums), q.q_ZBtKGH.dtype)

    def pull(self, q: tiles.Queries, kv_btKX: jax.Array, width: int, lane: tuple, back):
        """Gradients, float32: of the queries in tiles, and of our keys and values, joined. Those of
        keys travel with them, and are home after a whole round.
        """
        axes, size = lane

        def one(carry, step):
            dq, kv_btKX, dkv_btKX = carry
            coming = _pass_on(kv_btKX, axes, size)
            dkv = jnp.split(dkv_btKX, [width], axis=-1)
            dq, *dkv = tiles.pull(q, _held(kv_btKX, width, lane, step), back, dq, *dkv)
            return (dq, coming, _pass_on(jnp.concatenate(dkv, axis=-1), axes, size)), None

        dq, dkv = (jnp.zeros(x.shape, jnp.float32) for x in (q.q_ZBtKGH, kv_btKX))
        (dq, _, dkv), _ = lax.scan(one, (dq, kv_btKX, dkv), jnp.arange(size, dtype=jnp.int32))
        return dq, dkv


Meeting = GatherKeys | RingKeys


def choose(asked: Meeting | None, *, gathered: int, lanes: int) -> Meeting:
    """How queries meet keys: as asked for, or by size; says once which and why. gathered: bytes of
    the keys and values of a device's rows, whole.
    """
    why = "asked for"
    if asked is None:
        few = gathered <= GATHER_BYTES
        asked = GatherKeys() if few else RingKeys()
        why = (
            f"keys and values of whole rows are {gathered / 2**20:.1f} MiB a device, "
            f"{'at most' if few else 'above'} {GATHER_BYTES >> 20}"
        )
    say_once(
        log,
        logging.INFO,
        f"attention over {lanes} devices a row: {asked}, {why}; in tiles of XLA (mosaic and cudnn "
        "mask by the index in whole rows and take no offset)",
    )
    return asked


def _meet(q_btNH, k_btKH, v_btKU, segments_bt, *, over: Lanes, meet: Meeting, tile: int):
    """One device: where its tokens stand, and where their documents begin."""
    t = q_btNH.shape[1]
    at_1t = _at(lax.axis_index(over.axes), t, over.size)[None]
    begin_bt = jnp.zeros_like(at_1t)
    if segments_bt is not None:
        segments_bT = lax.all_gather(segments_bt, over.axes, axis=1, tiled=True)
        begin_bT = tiles.begins(_in_row_order(segments_bT, over.size))
        begin_bt = jnp.take(begin_bT, at_1t[0], axis=1)
    static = (meet, (over.axes, over.size), k_btKH.shape[-1], meet.tile or tile)
    kv_btKX = jnp.concatenate([k_btKH, v_btKU], axis=-1)  # one collective for both
    return _flash(q_btNH, kv_btKX, at_1t, begin_bt, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q_btNH, kv_btKX, at_1t, begin_bt, static):
    return _flash_fwd(q_btNH, kv_btKX, at_1t, begin_bt, static)[0]


def _flash_fwd(q_btNH, kv_btKX, at_1t, begin_bt, static):
    meet, lane, width, tile = static
    q = tiles.queries(q_btNH, at_1t, begin_bt, kv_btKX.shape[2], tile)
    out_ZBtKGU, lse_ZBKGt = meet.attend(q, kv_btKX, width, lane)
    kept = q_btNH, kv_btKX, at_1t, begin_bt, out_ZBtKGU, lse_ZBKGt
    return tiles.heads_merged(out_ZBtKGU, q_btNH.shape[1]), kept


def _flash_bwd(static, kept, dout_btNU):
    meet, lane, width, tile = static
    q_btNH, kv_btKX, at_1t, begin_bt, out_ZBtKGU, lse_ZBKGt = kept
    q = tiles.queries(q_btNH, at_1t, begin_bt, kv_btKX.shape[2], tile)
    dq, dkv_btKX = meet.pull(
        q, kv_btKX, width, lane, tiles.pulled(out_ZBtKGU, dout_btNU, lse_ZBKGt)
    )
    dq_btNH = tiles.heads_merged(dq, q_btNH.shape[1]).astype(q_btNH.dtype)
    return dq_btNH, dkv_btKX.astype(kv_btKX.dtype), None, None


_flash.defvjp(_flash_fwd, _flash_bwd)


def _at(device: jax.Array, t: int, size: int) -> jax.Array:
    """Index in the row of each token that a device holds, int32 [t], rising."""
    C = t // 2
    at_C = jnp.arange(C, dtype=jnp.int32)
    return jnp.concatenate([device * C + at_C, (2 * size - 1 - device) * C + at_C])


def _held(kv_btKX: jax.Array, width: int, lane: tuple, step: jax.Array) -> tiles.Keys:
    """Keys and values that are here after `step` steps of the ring."""
    axes, size = lane
    owner = (lax.axis_index(axes) - step) % size
    k_btKH, v_btKU = jnp.split(kv_btKX, [width], axis=-1)
    return tiles.Keys(k_btKH, v_btKU, _at(owner, kv_btKX.shape[1], size))


def _whole_keys(kv_btKX: jax.Array, width: int, lane: tuple) -> tiles.Keys:
    """Keys and values of all devices of a row, in its order."""
    axes, size = lane
    kv_bTKX = _in_row_order(lax.all_gather(kv_btKX, axes, axis=1, tiled=True), size)
    k_bTKH, v_bTKU = jnp.split(kv_bTKX, [width], axis=-1)
    return tiles.Keys(k_bTKH, v_bTKU, jnp.arange(kv_bTKX.shape[1], dtype=jnp.int32))


def _pass_on(x: jax.Array, axes: tuple[str, ...], size: int) -> jax.Array:
    return lax.ppermute(x, axes, [(i, (i + 1) % size) for i in range(size)])


def _in_row_order(x_bT: jax.Array, size: int) -> jax.Array:
    """Rows of which the parts of all devices lie one after another."""
    B, T = x_bT.shape[:2]
    x = x_bT.reshape(B, size, 2, T // (2 * size), *x_bT.shape[2:])
    return jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1).reshape(x_bT.shape)


def _in_lane_order(x_bT: jax.Array, size: int) -> jax.Array:
    """The inverse of `_in_row_order`."""
    B, T = x_bT.shape[:2]
    x = x_bT.reshape(B, 2 * size, T // (2 * size), *x_bT.shape[2:])
    return jnp.stack([x[:, :size], x[:, size:][:, ::-1]], axis=2).reshape(x_bT.shape)


def _moved(x: Any, axis: int, move: Callable) -> Any:
    over = lanes()
    if over is None or x is None:
        return x
    if x.shape[axis] % (2 * over.size):
        T, n = x.shape[axis], 2 * over.size
        raise ValueError(
            f"a row of {T} tokens does not divide into {n} chunks, two for each of {over.size} "
            f"devices on axes {over.axes}; use rows of {-(-T // n) * n} or another mesh"
        )
    _, rules = sharding.current()  # type: ignore[misc]
    two = sharding.fitting(
        rules.spec(("batch", "seq")), x.shape[axis - 1 : axis + 1], over.mesh.shape
    )
    spec = PartitionSpec(*(None,) * (axis - 1), *two)
    return jax.shard_map(
        functools.partial(move, axis=axis, axes=over.axes, size=over.size),
        mesh=over.mesh,
        in_specs=spec,
        out_specs=spec,
    )(x)


def _spread(x_bt: jax.Array, *, axis: int, axes: tuple[str, ...], size: int) -> jax.Array:
    """Chunks 2i and 2i + 1 of device i to those that hold them; of both that one gets, the first is
    the one of its own number, even where that is even.
    """
    even, odd = jnp.split(x_bt, 2, axis=axis)
    even, odd = (lax.ppermute(x, axes, _routes(n, size)) for n, x in enumerate((even, odd)))
    is_even = lax.axis_index(axes) % 2 == 0
    return jnp.where(
        is_even, jnp.concatenate([even, odd], axis), jnp.concatenate([odd, even], axis)
    )


def _join(x_bt: jax.Array, *, axis: int, axes: tuple[str, ...], size: int) -> jax.Array:
    first, last = jnp.split(x_bt, 2, axis=axis)
    is_even = lax.axis_index(axes) % 2 == 0
    even, odd = jnp.where(is_even, first, last), jnp.where(is_even, last, first)
    back = ([(to, at) for at, to in _routes(n, size)] for n in (0, 1))
    parts = (lax.ppermute(x, axes, routes) for x, routes in zip((even, odd), back, strict=True))
    return jnp.concatenate(list(parts), axis)


def _routes(odd: int, size: int) -> list[tuple[int, int]]:
    """From the device that has chunk 2i + odd in row order to the one that holds it."""
    chunks = [2 * i + odd for i in range(size)]
    return [(i, min(chunk, 2 * size - 1 - chunk)) for i, chunk in enumerate(chunks)]
