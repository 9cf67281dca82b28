"""Paged decode attention for TPU in Pallas: a few new tokens a row, pages in place. Compiled for
v5p and v6e, run only by the interpreter: nothing here has been timed.

A step of the grid is one block of keys of one row, copied page by page while the block before it is
multiplied, whichever row that one is of. `blocks` lists them all, so that the time is that of the
keys that are there. Keys and heads of a page are columns alike: all queries of a row multiply all
of them, and scores with another head's keys are masked. That is K times the FLOPs (M x 4 x H of a
key and head, 4 x H bytes: with 96 queries 96 FLOPs a byte, where v5p has 166 in balance and v6e
560) and spares a shuffle of every page; heads split over devices leave less of it.
Letters: B T N K G H U, L P S of the pages, M = T x N; X columns, keys x heads of a block; C halves
of the rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
from jax import lax

LANES = 128
LOWEST = -1e30  # finite: a block all of whose keys come after a query has no NaN
LOG2_E = math.log2(math.e)
# What an entry of the list says beside its row and block: first and last block of the row, whether
# some of it is masked, and whether it is a block at all.
FIRST, LAST, EDGE, LIVE = 1, 2, 4, 8
BLOCK_SHIFT, ROW_SHIFT = 4, 17
MOST_QUERIES = 512  # scores of a block are 8 MiB then
MOST_IDS = 1 << 17  # of pages in the table, int32 in SMEM, which has 1 MiB


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result (but its rounding) but its speed. UNVERIFIED on a TPU:
    chosen by counting.

    columns: keys x heads of a block. 4,096 of 128 are 1 MiB of keys and 1 MiB of values, 1.3 us of
    v6e's memory; two are held, and scores of 96 queries are 1.5 MiB. In the compiler's schedule for
    v6e an unmasked block of 96 queries has 1,675 bundles, two half as large 1,946; copying 32 pages
    of 16 takes some 540 more to issue, larger pages fewer. halves: of the rows, for the two cores
    of a v5p. vmem: of the 64 MiB that a core of v5p has (v6e: 128); the compiler needs 6 to 8 for
    96 queries, 8 to 16 for 384.
    """

    columns: int = 4096
    halves: int = 2
    vmem: int = 48 * 2**20
    interpret: bool = False


@functools.partial(jax.jit, static_argnames=("skip", "latent", "tuning"))
def paged_attention(
    q_BTNH: jax.Array,
    k_LPSKH: jax.Array,
    v_LPSKU: jax.Array,
    *,
    layer: jax.Array,
    table_BP: jax.Array,
    start_B: jax.Array,
    skip: int = 0,
    latent: bool = False,
    tuning: Tuning | None = None,
) -> jax.Array:
    """`decode_attention` on one device. Queries without a key give zeros."""
    tuning = tuning or Tuning()
    layer_1 = jnp.asarray(layer, jnp.int32).reshape(1)
    if latent:  # rotated entries are half a vector wide: XLA lays them out anew, of one layer only
        k_LPSKH = lax.dynamic_slice_in_dim(k_LPSKH, layer_1[0], 1)
    B, T, N, H = q_BTNH.shape
    pages, size, K, width = k_LPSKH.shape[1:]
    U, M = v_LPSKU.shape[-1], T * N
    per = keys_of(table_BP.shape[1], size, K, tuning) // size  # pages of a block
    keys, X = per * size, per * size * K
    scale = LOG2_E / math.sqrt(H)
    code_CP, count = blocks(start_B, T, keys, table_BP.shape[1] * size, skip, tuning.halves)
    shared = _Shared(T, size, per, pages)

    def kernel(code_ref, layer_ref, table_ref, start_ref, *refs):
        query_ref, column_ref, q_ref, k_ref, v_ref, out_ref, *mem, sems = refs
        k_mem, v_mem, top_ref, total_ref, acc_ref = mem
        half, p = pl.program_id(0), pl.program_id(1)
        code = code_ref[half, p]
        slot = lax.rem(p, 2)
        copies = functools.partial(
            shared.copies, (k_ref, v_ref), (k_mem, v_mem), sems, layer_ref, table_ref, start_ref
        )

        @pl.when(p == 0)
        def _():
            v_mem[...] = jnp.zeros_like(v_mem)  # slots of pages never copied: weight 0, not NaN
            copies(code, slot, start=True)

        @pl.when(p + 1 < pl.num_programs(1))
        def _():
            copies(code_ref[half, p + 1], 1 - slot, start=True)

        @pl.when((code & FIRST) != 0)
        def _():
            top_ref[...] = jnp.full_like(top_ref, LOWEST)
            total_ref[...] = jnp.zeros_like(total_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)

        def step(masked):
            k_XH, v_XU = (x[slot].astype(q_BTNH.dtype) for x in (k_mem, v_mem))
            if latent:
                score_MX = _dot(q_ref[0, :, :U], v_XU, 1) + _dot(q_ref[0, :, U:], k_XH, 1)
            else:
                score_MX = _dot(q_ref[0], k_XH, 1)
            seen_MX = query_ref[:, 1:2] == column_ref[1:2] if K > 1 else None
            if masked:
                key_1X = column_ref[:1] + _block(code) * keys
                inside = key_1X <= query_ref[:, :1] + start_ref[_row(code)]
                inside = inside & (key_1X >= skip) if skip else inside
                seen_MX = inside if seen_MX is None else seen_MX & inside
            if seen_MX is not None:
                score_MX = jnp.where(seen_MX, score_MX, LOWEST)
            top_Ml = jnp.maximum(top_ref[...], score_MX.max(axis=1, keepdims=True))
            p_MX = jnp.exp2((score_MX - top_Ml[:, :1]) * scale)
            if masked:
                p_MX = jnp.where(score_MX > LOWEST, p_MX, 0.0)  # a row may see nothing
            kept_Ml = jnp.exp2((top_ref[...] - top_Ml) * scale)
            total_ref[...] = total_ref[...] * kept_Ml + p_MX.sum(axis=1, keepdims=True)
            mixed_MU = _dot(p_MX.astype(q_BTNH.dtype), v_XU, 0)
            acc_ref[...] = acc_ref[...] * kept_Ml[:, :1] + mixed_MU
            top_ref[...] = top_Ml

        @pl.when((code & LIVE) != 0)
        def _():
            copies(code, slot, start=False)
            pl.when((code & EDGE) != 0)(lambda: step(True))
            pl.when((code & EDGE) == 0)(lambda: step(False))

        @pl.when((code & LAST) != 0)
        def _():
            total_M1 = total_ref[:, :1]
            whole_MU = acc_ref[...] / jnp.where(total_M1 > 0, total_M1, 1.0)
            out_ref[0] = whole_MU.astype(out_ref.dtype)

    # Of each query its token and kv head, of each column its key and kv head.
    query_M2 = np.stack([np.arange(M) // N, np.arange(M) % N // (N // K)], axis=1).astype(np.int32)
    column_2X = np.stack([np.arange(X) // K, np.arange(X) % K]).astype(np.int32)

    def row(half, p, code_ref, *_):
        return _row(code_ref[half, p]), 0, 0

    def fixed(shape):
        return pl.BlockSpec(shape, lambda half, p, *_: (0, 0))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out_BMU = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((B, M, U), q_BTNH.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(code_CP.shape[0], count),
            in_specs=[
                fixed((M, 2)),
                fixed((2, X)),
                pl.BlockSpec((1, M, H), row),
                anywhere,
                anywhere,
            ],
            out_specs=pl.BlockSpec((1, M, U), row),
            scratch_shapes=[
                pltpu.VMEM((2, X, width), k_LPSKH.dtype),
                pltpu.VMEM((2, X, U), v_LPSKU.dtype),
                pltpu.VMEM((M, LANES), jnp.float32),
                pltpu.VMEM((M, LANES), jnp.float32),
                pltpu.VMEM((M, U), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tuning.vmem,
            disable_bounds_checks=True,  # ids of pages are clipped
        ),
        interpret=pltpu.InterpretParams() if tuning.interpret else False,
        name="decode_attention",
    )(
        code_CP,
        layer_1,
        table_BP,
        start_B,
        query_M2,
        column_2X,
        q_BTNH.reshape(B, M, H),
        *(x.reshape(*x.shape[:2], size * K, x.shape[-1]) for x in (k_LPSKH, v_LPSKU)),
    )
    return out_BMU.reshape(B, T, N, U)


def refuses(
    q_BTNH: jax.Array,
    k_LPSKH: jax.Array,
    v_LPSKU: jax.Array,
    table_BP: jax.Array,
    *,
    latent: bool,
) -> str | None:
    """Why the kernel cannot take these arguments of one device, or None."""
    if q_BTNH.dtype != jnp.bfloat16:
        return f"mosaic_tpu takes queries in bfloat16, not {q_BTNH.dtype}"
    kinds = {str(x.dtype) for x in (k_LPSKH, v_LPSKU)}
    if kinds not in ({"bfloat16"}, {"float8_e4m3fn"}):
        return f"mosaic_tpu takes pages in bfloat16 or float8_e4m3fn, not {sorted(kinds)}"
    widths = (v_LPSKU.shape[-1],) if latent else (k_LPSKH.shape[-1], v_LPSKU.shape[-1])
    if any(width % LANES for width in widths):
        return (
            f"mosaic_tpu takes heads of whole vectors of {LANES} lanes, not {widths}: XLA lays "
            "narrower pages out in another order, and would copy all of them at each call"
        )
    size, K = k_LPSKH.shape[2:4]
    if (rows := size * K) % 8:
        return f"mosaic_tpu takes pages of a multiple of 8 keys x heads, not {size} x {K} = {rows}"
    if (M := q_BTNH.shape[1] * q_BTNH.shape[2]) > MOST_QUERIES:
        return f"mosaic_tpu takes up to {MOST_QUERIES} queries a row (tokens x heads), not {M}"
    if (ids := math.prod(table_BP.shape)) > MOST_IDS:
        return f"mosaic_tpu takes tables of up to {MOST_IDS} pages, not {ids}; use larger pages"
    return None


def keys_of(width: int, size: int, kv_heads: int, tuning: Tuning) -> int:
    """Keys of a block: whole pages, no more than a row of the table has. width: its pages; size:
    tokens of one.
    """
    return min(width, max(1, tuning.columns // kv_heads // size)) * size


def blocks(start_B: jax.Array, T: int, keys: int, capacity: int, skip: int, halves: int):
    """The blocks of `keys` that rows hold, int32 [C, P], and the most that a half has. Those of a
    row follow each other; a row without keys has one.

    A half with fewer ends in entries that repeat its last one, not LIVE: nothing is copied for
    them.
    """
    B = start_B.shape[0]
    halves = halves if B % halves == 0 else 1
    held_CB = jnp.clip(start_B + T, 1, capacity).reshape(halves, -1)
    blocks_CB = (held_CB + (keys - 1)) // keys
    after_CB = jnp.cumsum(blocks_CB, axis=1, dtype=jnp.int32)
    count_C1 = after_CB[:, -1:]
    at_1P = np.arange(B // halves * -(-capacity // keys), dtype=np.int32)[None]
    p_CP = jnp.minimum(at_1P, count_C1 - 1)
    row_CP = (p_CP[:, :, None] >= after_CB[:, None, :]).sum(axis=-1, dtype=jnp.int32)

    def of(x_CB):
        return jnp.take_along_axis(x_CB, row_CP, axis=1)

    block_CP = of(blocks_CB) - (of(after_CB) - p_CP)
    edge_CP = (block_CP + 1) * keys > of(start_B.reshape(halves, -1)) + 1
    edge_CP = edge_CP | (block_CP == 0) if skip else edge_CP
    last_CP = block_CP == of(blocks_CB) - 1
    whole_CP = row_CP + np.arange(0, B, B // halves, dtype=np.int32)[:, None]
    code_CP = (whole_CP << ROW_SHIFT) | (block_CP << BLOCK_SHIFT) | LIVE
    for flag, where in ((FIRST, block_CP == 0), (LAST, last_CP), (EDGE, edge_CP)):
        code_CP = code_CP | jnp.where(where, jnp.int32(flag), jnp.int32(0))
    live_CP = at_1P < count_C1
    return jnp.where(live_CP, code_CP, code_CP & ~(FIRST | LAST | LIVE)), count_C1.max()


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What a copy knows. T: new tokens; size: tokens of a page; per: pages of a block; pages: that
    there are.
    """

    T: int
    size: int
    per: int
    pages: int

    def copies(self, hbm, mem, sems, layer_ref, table_ref, start_ref, code, slot, *, start) -> None:
        """Starts the copies of a block's pages that hold keys, or waits for them."""
        b, first, rows = _row(code), _block(code) * self.per, mem[0].shape[1] // self.per
        held = pl.cdiv(jnp.maximum(start_ref[b] + self.T, 0), self.size)
        count = jnp.where((code & LIVE) != 0, jnp.clip(held - first, 0, self.per), 0)

        def of_page(i):
            page = jnp.clip(table_ref[b, first + i], 0, self.pages - 1)
            at = pl.ds(pl.multiple_of(i * rows, rows), rows)
            return [
                pltpu.make_async_copy(
                    hbm[n].at[0 if hbm[n].shape[0] == 1 else layer_ref[0], page],
                    mem[n].at[slot, at],
                    sems.at[slot, n],
                )
                for n in range(2)
            ]

        def one(i, _):
            for copy in of_page(i):
                copy.start() if start else copy.wait()

        def whole():
            if start:
                lax.fori_loop(0, self.per, one, None, unroll=math.gcd(self.per, 8))
            else:  # at once for all of its bytes
                for n in range(2):
                    all_of = mem[n].at[slot]
                    pltpu.make_async_copy(all_of, all_of, sems.at[slot, n]).wait()

        pl.when(count == self.per)(whole)
        pl.when(count != self.per)(lambda: lax.fori_loop(0, count, one, None))


def _row(code):
    return code >> ROW_SHIFT


def _block(code):
    return (code >> BLOCK_SHIFT) & ((1 << (ROW_SHIFT - BLOCK_SHIFT)) - 1)


def _dot(lhs, rhs, axis):
    """lhs @ rhs over an axis of the latter, in float32. bfloat16 products are exact in float32, so
    that JAX's default precision, which may ask for more passes, has nothing to add.
    """
    return lax.dot_general(
        lhs,
        rhs,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
