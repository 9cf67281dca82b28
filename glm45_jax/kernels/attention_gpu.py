"""Causal grouped-query attention for Hopper in Pallas Mosaic GPU: forward and backward.

A row is documents laid one after another. `Bounds` says where the document of each position begins
and ends, so the mask is by index alone and tiles of other documents are never loaded: the work of a
packed row falls with the number of its documents. Every sum has one order: bitwise repeatable.
Letters: B T N K G H; inside a kernel `_t` and `_s` are the queries and keys of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from flax import struct
from jax import lax

from glm45_jax.kernels import hopper
from glm45_jax.kernels.hopper import COLUMN, HALF, ROW, TILE
from glm45_jax.kernels.tuning import tuned

LOWEST = -1e30  # finite: a row whose first block is all masked has no NaN
LOG2_E = math.log2(math.e)


@struct.dataclass
class Bounds:
    """Document of each position: query t sees keys begin[t] <= s <= t, key s is seen by queries
    s <= t < end[s]. int32 [B, T].
    """

    begin_BT: jax.Array
    end_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result but its speed. sms: blocks of the kernels that stay.

    stages: blocks in flight of forward, dq, dk/dv. queries, keys_dq: width of a step of dk/dv, of
    dq. registers: of a thread that copies and one that computes; 128 and 256 threads share 65,536.
    """

    sms: int = 132
    stages: int = 2
    stages_dq: int = 3
    stages_dkv: int = 4
    queries: int = 64
    keys_dq: int = 64
    registers: tuple[int, int] = (24, 240)
    registers_dq: tuple[int, int] = (40, 232)
    interpret: bool = False


def bounds(segments_BT: jax.Array) -> Bounds:
    """Where the run of equal segments around each position begins and ends."""
    T = segments_BT.shape[1]
    at_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], segments_BT.shape)
    new_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    begin_BT = lax.cummax(jnp.where(new_BT, at_BT, 0), axis=1)
    next_BT = jnp.where(jnp.pad(new_BT[:, 1:], ((0, 0), (0, 1))), at_BT + 1, T)
    return Bounds(begin_BT, lax.cummin(next_BT, axis=1, reverse=True))


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    tuning: Tuning | None = None,
) -> jax.Array:
    """Attention output [B, T, N, H] in bfloat16; scores scaled by H^-0.5; softmax in float32.

    segments_BT: the document of each position; equal numbers that do not touch are two documents.
    None for one document a row. Differentiable in q, k, v. Any T: rows are padded to whole tiles.
    """
    T = q_BTNH.shape[1]
    more = -T % TILE
    if more:  # the positions added come last, so causal queries do not see them
        q_BTNH, k_BTKH, v_BTKH = (
            jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        if segments_BT is not None:
            segments_BT = jnp.pad(segments_BT, ((0, 0), (0, more)), constant_values=-1)
    within = None if segments_BT is None else bounds(segments_BT)
    N, H = q_BTNH.shape[2:]
    key = {"T": q_BTNH.shape[1], "G": N // k_BTKH.shape[2], "H": H}
    tuning = tuning or tuned("flash_attention", Tuning(), **key)
    return _flash(q_BTNH, k_BTKH, v_BTKH, within, tuning)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q_BTNH, k_BTKH, v_BTKH, within, tuning):
    return _forward(q_BTNH, k_BTKH, v_BTKH, within, tuning)[0]


def _flash_fwd(q_BTNH, k_BTKH, v_BTKH, within, tuning):
    out_BTNH, lse_BNT = _forward(q_BTNH, k_BTKH, v_BTKH, within, tuning)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, within, out_BTNH, lse_BNT)


def _flash_bwd(tuning, residuals, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, within, out_BTNH, lse_BNT = residuals
    delta_BNT = jnp.einsum(
        "btnh,btnh->bnt", out_BTNH, dout_BTNH, preferred_element_type=jnp.float32
    )
    args = (q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, within, tuning)
    dk_BTKH, dv_BTKH = _backward_keys(*args)
    return _backward_queries(*args), dk_BTKH, dv_BTKH, None


_flash.defvjp(_flash_fwd, _flash_bwd)


# Layers of one shape share what is lowered, which takes seconds a kernel.
@functools.partial(jax.jit, static_argnames="tuning")
def _forward(q_BTNH, k_BTKH, v_BTKH, within, tuning):
    """Output and base-2 log-sum-exp float32 [B, N, T]. T: whole tiles, here and below.

    One block stays on each multiprocessor and walks over query tiles, long ones first within a row.
    Warpgroup 2 copies; 0 and 1 own 64 queries each and take turns: one multiplies while the other
    takes exponentials.
    """
    B, T, N, H = q_BTNH.shape
    stages, dtype, scale = tuning.stages, q_BTNH.dtype, LOG2_E / math.sqrt(H)
    walk = _Walk(q_BTNH.shape, k_BTKH.shape[2], tuning.sms, stages, TILE)
    begin_BT = None if within is None else within.begin_BT

    def kernel(q_ref, k_ref, v_ref, begin_ref, out_ref, lse_ref, mem):
        wg = lax.axis_index("wg")

        def compute():
            q_smem, out_smem, lse_smem = (mem[x].at[wg] for x in ("q", "out", "lse"))
            pl.when(wg == 1)(lambda: plgpu.barrier_arrive(mem["turn"].at[0]))

            def one_tile(i, step):
                b, n, tile = walk.place(i)
                row0 = tile * TILE + wg * HALF
                begin_t = hopper.vector(begin_ref, b, row0, ROW)

                def soften(masked, down, step, m, total, score):
                    """Weights of a block in bfloat16, the new maximum, sum and shrinkage."""
                    plgpu.barrier_arrive(mem["k_free"].at[lax.rem(step, stages)])
                    if masked:
                        score = _mask(score, row0, (tile - down) * TILE, begin_t)
                    m_new = jnp.maximum(m, score.max(axis=1) * scale)
                    p = jnp.exp2(score * scale - hopper.across(m_new, TILE))
                    shrink = jnp.exp2(m - m_new)
                    return p.astype(dtype), m_new, total * shrink + p.sum(axis=1), shrink

                def one_block(masked, down, carry):
                    acc, p16, m, total, step = carry
                    slot, before = lax.rem(step, stages), lax.rem(step - 1, stages)
                    plgpu.barrier_wait(mem["k_full"].at[slot])
                    plgpu.barrier_wait(mem["v_full"].at[before])
                    plgpu.barrier_wait(mem["turn"].at[wg])
                    refs = (q_smem, mem["k"].at[slot], mem["v"].at[before])
                    give = functools.partial(plgpu.barrier_arrive, mem["turn"].at[1 - wg])
                    soft = functools.partial(soften, masked, down, step, m, total)
                    new = _step_queries((acc, p16, m, total), refs, give, soft, tuning.interpret)
                    acc, p16, m, total, shrink = new
                    plgpu.barrier_arrive(mem["v_free"].at[before])
                    return acc * hopper.across(shrink, H), p16, m, total, step + 1

                edge, whole = (functools.partial(one_block, masked) for masked in (True, False))
                plgpu.barrier_wait(mem["q_full"])
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(mem["k_full"].at[slot])
                score = hopper.product(q_smem, mem["k"].at[slot].transpose((1, 0)))
                m, total = hopper.filled((HALF,), LOWEST, ROW), hopper.filled((HALF,), 0.0, ROW)
                p16, m, total, _ = soften(True, 0, step, m, total, score)
                acc = hopper.filled((HALF, H), 0.0, plgpu.Layout.WGMMA)
                carry = (acc, p16, m, total, step + 1)
                if begin_ref is None:
                    carry = lax.fori_loop(1, tile + 1, whole, carry)
                else:  # at the far end, blocks where documents of these rows begin
                    start = pl.cdiv(begin_ref[b, row0 + HALF - 1], TILE)
                    inside = jnp.maximum(tile + 1 - start, 1)
                    carry = lax.fori_loop(1, inside, whole, carry)
                    first = _first_block(begin_ref, b, tile, TILE)
                    carry = lax.fori_loop(inside, tile + 1 - first, edge, carry)
                acc, p16, m, total, step = carry
                plgpu.barrier_arrive(mem["q_free"])
                slot = lax.rem(step - 1, stages)
                plgpu.barrier_wait(mem["v_full"].at[slot])
                acc = hopper.accumulate(acc, p16, mem["v"].at[slot], tuning.interpret)
                plgpu.barrier_arrive(mem["v_free"].at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[...] = (acc * hopper.across(1 / total, H)).astype(dtype)
                lse_smem[...] = m + jnp.log(total) * LOG2_E
                plgpu.commit_smem()
                rows = pl.ds(row0, HALF)
                plgpu.copy_smem_to_gmem(out_smem, out_ref.at[b, rows, n])
                plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b, n, rows])
                return step

            lax.fori_loop(0, walk.mine(), one_tile, jnp.int32(0))
            pl.when(wg == 0)(lambda: plgpu.barrier_wait(mem["turn"].at[0]))
            plgpu.wait_smem_to_gmem(0)

        queries, keys = ((q_ref, "q"),), (k_ref, v_ref)
        hopper.specialise(
            wg,
            tuning.registers,
            lambda: walk.copies(mem, queries, keys, begin_ref, down=True),
            compute,
        )

    scratch = dict(
        q=hopper.tiles(2, HALF, H, dtype),
        k=hopper.tiles(stages, TILE, H, dtype),
        v=hopper.tiles(stages, TILE, H, dtype),
        out=hopper.tiles(2, HALF, H, dtype),
        lse=plgpu.SMEM((2, HALF), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=2),
        q_free=plgpu.Barrier(num_arrivals=2),
        turn=plgpu.Barrier(num_barriers=2),
        **hopper.ring("k", stages),
        **hopper.ring("v", stages),
    )
    lse_BNT = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    run = hopper.launch(
        kernel,
        (q_BTNH, lse_BNT),
        scratch,
        interpret=tuning.interpret,
        grid=(walk.blocks,),
        names=("sm",),
    )
    return run(q_BTNH, k_BTKH, v_BTKH, begin_BT)


@functools.partial(jax.jit, static_argnames="tuning")
def _backward_queries(
    q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, within, tuning
) -> jax.Array:
    """dq: like the forward pass, query tiles that walk over their keys."""
    H = q_BTNH.shape[-1]
    stages, dtype, wide = tuning.stages_dq, q_BTNH.dtype, tuning.keys_dq
    scale = 1 / math.sqrt(H)
    walk = _Walk(q_BTNH.shape, k_BTKH.shape[2], tuning.sms, stages, wide)
    begin_BT = None if within is None else within.begin_BT

    def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, begin_ref, dq_ref, mem):
        wg = lax.axis_index("wg")

        def compute():
            q_smem, dout_smem, dq_smem = (mem[x].at[wg] for x in ("q", "dout", "dq"))

            def one_tile(i, step):
                b, n, tile = walk.place(i)
                row0 = tile * TILE + wg * HALF
                begin_t = hopper.vector(begin_ref, b, row0, ROW)
                lse_t, delta_t = (
                    hopper.vector(ref.at[b], n, row0, ROW) for ref in (lse_ref, delta_ref)
                )
                plgpu.barrier_wait(mem["q_full"])

                def one_block(masked, block, carry):
                    dq, step = carry
                    slot = lax.rem(step, stages)
                    k_smem, v_smem = mem["k"].at[slot], mem["v"].at[slot]
                    plgpu.barrier_wait(mem["k_full"].at[slot])
                    plgpu.barrier_wait(mem["v_full"].at[slot])

                    def dscores(score_ref, dp_ref):
                        plgpu.wgmma(score_ref, q_smem, k_smem.transpose((1, 0)))
                        plgpu.wgmma(dp_ref, dout_smem, v_smem.transpose((1, 0)))
                        score = plgpu.wgmma_accumulator_load(score_ref, wait_n=1)
                        if masked:
                            score = _mask(score, row0, block * wide, begin_t)
                        p = jnp.exp2(score * (scale * LOG2_E) - hopper.across(lse_t, wide))
                        return p * (dp_ref[...] - hopper.across(delta_t, wide))

                    acc = plgpu.ACC((HALF, wide), jnp.float32)
                    ds16 = pl.run_scoped(dscores, acc, acc).astype(dtype)
                    plgpu.barrier_arrive(mem["v_free"].at[slot])
                    dq = hopper.accumulate(dq, ds16, k_smem, tuning.interpret)
                    plgpu.barrier_arrive(mem["k_free"].at[slot])
                    return dq, step + 1

                def skip(_, step):  # keys after these queries, that the other warpgroup needs
                    slot = lax.rem(step, stages)
                    for name in ("k", "v"):
                        plgpu.barrier_wait(mem[f"{name}_full"].at[slot])
                        plgpu.barrier_arrive(mem[f"{name}_free"].at[slot])
                    return step + 1

                edge, whole = (functools.partial(one_block, masked) for masked in (True, False))
                carry = (hopper.filled((HALF, H), 0.0, plgpu.Layout.WGMMA), step)
                diagonal = lax.div(row0, wide)
                start = jnp.int32(0)
                if begin_ref is not None:
                    start = jnp.minimum(pl.cdiv(begin_ref[b, row0 + HALF - 1], wide), diagonal)
                    first = _first_block(begin_ref, b, tile, wide)
                    carry = lax.fori_loop(first, start, edge, carry)
                carry = lax.fori_loop(start, diagonal, whole, carry)
                dq, step = edge(diagonal, carry)
                step = lax.fori_loop(diagonal + 1, (tile + 1) * (TILE // wide), skip, step)
                plgpu.barrier_arrive(mem["q_free"])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_smem[...] = (dq * scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dq_smem, dq_ref.at[b, pl.ds(row0, HALF), n])
                return step

            lax.fori_loop(0, walk.mine(), one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        queries, keys = ((q_ref, "q"), (dout_ref, "dout")), (k_ref, v_ref)
        hopper.specialise(
            wg,
            tuning.registers_dq,
            lambda: walk.copies(mem, queries, keys, begin_ref, down=False),
            compute,
        )

    scratch = dict(
        q=hopper.tiles(2, HALF, H, dtype),
        dout=hopper.tiles(2, HALF, H, dtype),
        dq=hopper.tiles(2, HALF, H, dtype),
        k=hopper.tiles(stages, wide, H, dtype),
        v=hopper.tiles(stages, wide, H, dtype),
        q_full=plgpu.Barrier(num_arrivals=4),
        q_free=plgpu.Barrier(num_arrivals=2),
        **hopper.ring("k", stages),
        **hopper.ring("v", stages),
    )
    run = hopper.launch(
        kernel, q_BTNH, scratch, interpret=tuning.interpret, grid=(walk.blocks,), names=("sm",)
    )
    return run(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, begin_BT)


@functools.partial(jax.jit, static_argnames="tuning")
def _backward_keys(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, within, tuning):
    """dk and dv: a block owns TILE keys of a kv head and walks over the queries of all its G heads.

    From the last queries to the first: blocks of one kv head then read the same queries at the same
    time, and early keys, which have the most, come first.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    G, tiles, scale = N // K, T // TILE, 1 / math.sqrt(H)
    stages, dtype, many = tuning.stages_dkv, q_BTNH.dtype, tuning.queries
    end_BT = None if within is None else within.end_BT

    def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, end_ref, dk_ref, dv_ref, mem):
        wg, tile = lax.axis_index("wg"), lax.axis_index("tile")
        b, kv = lax.axis_index("b"), lax.axis_index("kv")
        low = tile * (TILE // many)
        high = T // many if end_ref is None else pl.cdiv(end_ref[b, tile * TILE + TILE - 1], many)

        def copies():
            hopper.copy_halves(k_ref.at[b, :, kv], mem["k"], mem["kv_full"], tile)
            hopper.copy_halves(v_ref.at[b, :, kv], mem["v"], mem["kv_full"], tile)

            def one_step(step, _):
                block, n = high - 1 - lax.div(step, G), kv * G + lax.rem(step, G)
                slot = lax.rem(step, stages)
                rows = pl.ds(block * many, many)
                for name, ref, row, row_ref in (
                    ("q", q_ref, "lse", lse_ref),
                    ("dout", dout_ref, "delta", delta_ref),
                ):
                    full, free = (mem[f"{name}_{x}"].at[slot] for x in ("full", "free"))
                    pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, free))
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, n], mem[name].at[slot], full)
                    plgpu.copy_gmem_to_smem(row_ref.at[b, n, rows], mem[row].at[slot], full)

            lax.fori_loop(0, (high - low) * G, one_step, None)
            hopper.drain(mem, ("q", "dout"), (high - low) * G, stages)

        def compute():
            key0 = tile * TILE + wg * HALF
            end_s = hopper.vector(end_ref, b, key0, ROW)
            k_smem, v_smem = mem["k"].at[wg], mem["v"].at[wg]
            plgpu.barrier_wait(mem["kv_full"])

            def one_step(masked, step, carry):
                slot = lax.rem(step, stages)
                q_smem, dout_smem = mem["q"].at[slot], mem["dout"].at[slot]
                plgpu.barrier_wait(mem["q_full"].at[slot])
                plgpu.barrier_wait(mem["dout_full"].at[slot])

                def weights(score):
                    if masked:
                        row0 = (high - 1 - lax.div(step, G)) * many
                        score = _mask_keys(score, key0, row0, end_s)
                    lse_t = plgpu.load(mem["lse"].at[slot], layout=COLUMN)
                    return jnp.exp2(score * (scale * LOG2_E) - hopper.down(lse_t, HALF))

                def dscores(p, dp):  # loaded late, to hold fewer registers
                    delta_t = plgpu.load(mem["delta"].at[slot], layout=COLUMN)
                    return (p * (dp - hopper.down(delta_t, HALF))).astype(dtype)

                refs = (q_smem, k_smem, v_smem, dout_smem)
                carry = _step_keys(carry, refs, weights, dscores, tuning.interpret)
                plgpu.barrier_arrive(mem["q_free"].at[slot])
                plgpu.barrier_arrive(mem["dout_free"].at[slot])
                return carry

            edge, whole = (functools.partial(one_step, masked) for masked in (True, False))
            after = pl.cdiv(key0 + HALF - 1, many)  # blocks from here on come after all the keys
            inside = high if end_ref is None else lax.div(end_ref[b, key0], many)
            inside = jnp.clip(inside, after, high)  # and before here, inside their documents
            carry = (hopper.filled((HALF, H), 0.0, plgpu.Layout.WGMMA),) * 2
            at_inside, at_after = (high - inside) * G, jnp.maximum(high - after, 0) * G
            if end_ref is not None:
                carry = lax.fori_loop(0, at_inside, edge, carry)
            carry = lax.fori_loop(at_inside, at_after, whole, carry)
            dk, dv = lax.fori_loop(at_after, (high - low) * G, edge, carry)
            k_smem[...] = (dk * scale).astype(dtype)
            v_smem[...] = dv.astype(dtype)
            plgpu.commit_smem()
            at = (b, pl.ds(key0, HALF), kv)
            plgpu.copy_smem_to_gmem(k_smem, dk_ref.at[at])
            plgpu.copy_smem_to_gmem(v_smem, dv_ref.at[at])
            plgpu.wait_smem_to_gmem(0)

        hopper.specialise(wg, tuning.registers, copies, compute)

    scratch = dict(
        k=hopper.tiles(2, HALF, H, dtype),
        v=hopper.tiles(2, HALF, H, dtype),
        q=hopper.tiles(stages, many, H, dtype),
        dout=hopper.tiles(stages, many, H, dtype),
        lse=plgpu.SMEM((stages, many), jnp.float32),
        delta=plgpu.SMEM((stages, many), jnp.float32),
        kv_full=plgpu.Barrier(num_arrivals=4),
        **hopper.ring("q", stages, copies=2),
        **hopper.ring("dout", stages, copies=2),
    )
    out = (k_BTKH, v_BTKH)
    grid, names = (B, K, tiles), ("b", "kv", "tile")
    run = hopper.launch(kernel, out, scratch, interpret=tuning.interpret, grid=grid, names=names)
    return run(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, lse_BNT, delta_BNT, end_BT)


def _step_queries(carry, refs, give, soften, interpret):
    """Multiplies the last block's weights with its values while this block's scores soften."""
    acc, p16, m, total = carry
    q_smem, k_smem, v_smem = refs

    def body(score_ref):
        plgpu.wgmma(score_ref, q_smem, k_smem.transpose((1, 0)))
        if interpret:
            give()
            return hopper.accumulate(acc, p16, v_smem, True), *soften(score_ref[...])

        def add(state):
            acc_ref, *results = state
            plgpu.wgmma(acc_ref, p16, v_smem)
            give()
            new = soften(plgpu.wgmma_accumulator_load(score_ref, wait_n=1))
            for ref, x in zip(results, new, strict=True):
                ref[...] = x

        return pl.run_state(add)((plgpu.ACC.init(acc), p16, m, total, m))

    return pl.run_scoped(body, plgpu.ACC((HALF, k_smem.shape[0]), jnp.float32))


def _step_keys(carry, refs, weights, dscores, interpret):
    """dk and dv after one block of queries; keys are rows, queries columns."""
    (dk, dv), (q_smem, k_smem, v_smem, dout_smem) = carry, refs
    dtype, many = k_smem.dtype, q_smem.shape[0]

    def body(score_ref, dp_ref):
        plgpu.wgmma(score_ref, k_smem, q_smem.transpose((1, 0)))
        plgpu.wgmma(dp_ref, v_smem, dout_smem.transpose((1, 0)))
        p = weights(plgpu.wgmma_accumulator_load(score_ref, wait_n=1))
        if interpret:
            ds16 = dscores(p, dp_ref[...])
            return hopper.accumulate(dk, ds16, q_smem, True), hopper.accumulate(
                dv, p.astype(dtype), dout_smem, True
            )
        p16 = p.astype(dtype)

        def add(refs):  # ds is formed while dv is multiplied
            dk_ref, dv_ref = refs
            plgpu.wgmma(dv_ref, p16, dout_smem)
            ds16 = dscores(p, plgpu.wgmma_accumulator_load(dp_ref, wait_n=1))
            plgpu.wgmma(dk_ref, ds16, q_smem)

        return pl.run_state(add)((plgpu.ACC.init(dk), plgpu.ACC.init(dv)))

    acc = plgpu.ACC((HALF, many), jnp.float32)
    return pl.run_scoped(body, acc, acc)


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Which query tiles a block takes, one after the other, and the keys that each needs.

    shape: of the queries. width: keys of a block of them, of which `stages` are in flight.
    """

    shape: tuple[int, int, int, int]
    kv_heads: int
    sms: int
    stages: int
    width: int

    @property
    def pieces(self) -> int:
        """Query tiles of all rows and heads."""
        B, T, N, _ = self.shape
        return B * N * (T // TILE)

    @property
    def blocks(self) -> int:
        """How many blocks share the pieces."""
        return min(self.sms, self.pieces)

    def mine(self) -> jax.Array:
        """Number of pieces of this block."""
        return lax.div(self.pieces - 1 - lax.axis_index("sm"), self.blocks) + 1

    def place(self, i) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Row, head and tile of the i-th of them: heads fastest, so that a group shares its keys,
        then tiles from the longest.
        """
        _, T, N, _ = self.shape
        index = lax.axis_index("sm") + i * self.blocks
        above, tiles = lax.div(index, N), T // TILE
        return lax.div(above, tiles), lax.rem(index, N), tiles - 1 - lax.rem(above, tiles)

    def copies(self, mem, queries, keys, begin_ref, *, down) -> None:
        """All a block's copies into shared memory, from the last keys down or from the first up."""
        group = self.shape[2] // self.kv_heads

        def one_tile(i, step):
            b, n, tile = self.place(i)
            pl.when(i > 0)(lambda: plgpu.barrier_wait(mem["q_free"]))
            for ref, name in queries:
                hopper.copy_halves(ref.at[b, :, n], mem[name], mem["q_full"], tile)
            first = _first_block(begin_ref, b, tile, self.width)
            last = (tile + 1) * (TILE // self.width) - 1

            def one_block(i, step):
                slot = lax.rem(step, self.stages)
                rows = pl.ds((last - i if down else first + i) * self.width, self.width)
                for name, ref in zip("kv", keys, strict=True):
                    full, free = (mem[f"{name}_{x}"].at[slot] for x in ("full", "free"))
                    pl.when(step >= self.stages)(functools.partial(plgpu.barrier_wait, free))
                    src = ref.at[b, rows, lax.div(n, group)]
                    plgpu.copy_gmem_to_smem(src, mem[name].at[slot], full)
                return step + 1

            return lax.fori_loop(0, last + 1 - first, one_block, step)

        steps = lax.fori_loop(0, self.mine(), one_tile, jnp.int32(0))
        plgpu.barrier_wait(mem["q_free"])
        hopper.drain(mem, ("k", "v"), steps, self.stages)


def _first_block(begin_ref, b, tile, width):
    return 0 if begin_ref is None else lax.div(begin_ref[b, tile * TILE], width)


def _mask(score, row0, key0, begin_t):
    """Scores of queries row0.. on keys key0..; -inf on later keys and other documents."""
    row, key = hopper.index(score.shape, 0) + row0, hopper.index(score.shape, 1) + key0
    seen = key <= row
    if begin_t is not None:
        seen &= key >= hopper.across(begin_t, score.shape[1])
    return jnp.where(seen, score, -jnp.inf)


def _mask_keys(score, key0, row0, end_s):
    """The same with keys as rows."""
    key, row = hopper.index(score.shape, 0) + key0, hopper.index(score.shape, 1) + row0
    seen = key <= row
    if end_s is not None:
        seen &= row < hopper.across(end_s, score.shape[1])
    return jnp.where(seen, score, -jnp.inf)
