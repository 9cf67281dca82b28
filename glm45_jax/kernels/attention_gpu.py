"""Causal grouped-query attention for Hopper in Pallas Mosaic GPU: the operation, its forward pass.

A row is documents laid one after another. `Bounds` says where the document of each position begins
and ends, so the mask is by index alone and tiles of other documents are never loaded: the work of a
packed row falls with the number of its documents. Every sum has one order: bitwise repeatable.
Letters: B T N K G H; U entries of a value. Inside a kernel `_t` are the queries of a tile.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from glm45_jax.kernels import attention_backward_gpu, attention_fused_gpu, hopper
from glm45_jax.kernels import attention_walk_gpu as walking
from glm45_jax.kernels.attention_walk_gpu import (
    CHUNK,
    LOG2_E,
    Tuning,
    Walk,
    bounds,
    tuning_of,
)
from glm45_jax.kernels.hopper import HALF, ROW, TILE
from glm45_jax.kernels.tuning import tuned

LOWEST = -1e30  # finite: a row whose first block is all masked has no NaN


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKU: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    tuning: Tuning | None = None,
) -> jax.Array:
    """Attention output [B, T, N, U] in bfloat16; scores scaled by H^-0.5; softmax in float32. The
    widths of keys and values: a pair of `WIDTHS`.

    segments_BT: the document of each position; equal numbers that do not touch are two documents.
    None for one document a row. Differentiable in q, k, v. Any T: rows are padded to whole tiles.
    """
    T = q_BTNH.shape[1]
    more = -T % TILE
    if more:  # the positions added come last, so causal queries do not see them
        q_BTNH, k_BTKH, v_BTKU = (
            jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKU)
        )
        if segments_BT is not None:
            segments_BT = jnp.pad(segments_BT, ((0, 0), (0, more)), constant_values=-1)
    within = None if segments_BT is None else bounds(segments_BT)
    (N, H), U = q_BTNH.shape[2:], v_BTKU.shape[-1]
    key = {"T": q_BTNH.shape[1], "G": N // k_BTKH.shape[2], "H": H} | ({} if U == H else {"U": U})
    tuning = tuning or tuned("flash_attention", tuning_of(H, U), **key)
    return _flash(q_BTNH, k_BTKH, v_BTKU, within, tuning)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q_BTNH, k_BTKH, v_BTKU, within, tuning):
    return _forward(q_BTNH, k_BTKH, v_BTKU, within, tuning)[0]


def _flash_fwd(q_BTNH, k_BTKH, v_BTKU, within, tuning):
    out_BTNU, lse_BNT = _forward(q_BTNH, k_BTKH, v_BTKU, within, tuning)
    return out_BTNU, (q_BTNH, k_BTKH, v_BTKU, within, out_BTNU, lse_BNT)


def _flash_bwd(tuning, residuals, dout_BTNU):
    q_BTNH, k_BTKH, v_BTKU, within, out_BTNU, lse_BNT = residuals
    delta_BNT = jnp.einsum(
        "btnu,btnu->bnt", out_BTNU, dout_BTNU, preferred_element_type=jnp.float32
    )
    args = (q_BTNH, k_BTKH, v_BTKU, dout_BTNU, lse_BNT, delta_BNT, within, tuning)
    if tuning.fused:
        return *attention_fused_gpu.gradients(*args), None
    dk_BTKH, dv_BTKU = attention_backward_gpu.keys(*args)
    return attention_backward_gpu.queries(*args), dk_BTKH, dv_BTKU, None


_flash.defvjp(_flash_fwd, _flash_bwd)


# Layers of one shape share what is lowered, which takes seconds a kernel.
@functools.partial(jax.jit, static_argnames="tuning")
def _forward(q_BTNH, k_BTKH, v_BTKU, within, tuning):
    """Output and base-2 log-sum-exp float32 [B, N, T]. T: whole tiles, here and below.

    One block stays on each multiprocessor and walks over query tiles, long ones first within a row.
    Warpgroup 2 copies; 0 and 1 own 64 queries each and take turns: one multiplies while the other
    takes exponentials.
    """
    (B, T, N, H), U = q_BTNH.shape, v_BTKU.shape[-1]
    stages, dtype, wide = tuning.stages, q_BTNH.dtype, tuning.keys
    scale, own = LOG2_E / math.sqrt(H), TILE // wide
    kv_heads, ahead = k_BTKH.shape[2], tuning.stages_q
    walk = Walk(q_BTNH.shape, kv_heads, tuning.sms, (stages, stages), wide, ahead)
    begin_BT = None if within is None else within.begin_BT

    def kernel(q_ref, k_ref, v_ref, begin_ref, out_ref, lse_ref, mem):
        wg = lax.axis_index("wg")

        def compute():
            out_smem = mem["out"].at[wg]
            pl.when(wg == 1)(lambda: plgpu.barrier_arrive(mem["turn"].at[0]))

            def one_tile(i, step):
                b, n, tile = walk.place(i)
                row0, blocks = tile * TILE + wg * HALF, (tile + 1) * own
                begin_t = hopper.vector(begin_ref, b, row0, ROW)
                at = lax.rem(i, ahead)
                q_smem = mem["q"].at[2 * at + wg]

                def soften(masked, down, step, m, total, score):
                    """Weights of a block in bfloat16, the new maximum, sum and shrinkage."""
                    plgpu.barrier_arrive(mem["k_free"].at[lax.rem(step, stages)])
                    key0 = (blocks - 1 - down) * wide
                    hide = functools.partial(walking.mask, row0=row0, key0=key0, begin_t=begin_t)
                    score = walking.only_if(masked, hide, score)
                    m_new = jnp.maximum(m, score.max(axis=1) * scale)
                    p = jnp.exp2(score * scale - hopper.across(m_new, wide))
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
                    return acc * hopper.across(shrink, U), p16, m, total, step + 1

                plgpu.barrier_wait(mem["q_full"].at[at])
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(mem["k_full"].at[slot])
                score = hopper.product(q_smem, mem["k"].at[slot].transpose((1, 0)))
                m, total = hopper.filled((HALF,), LOWEST, ROW), hopper.filled((HALF,), 0.0, ROW)
                p16, m, total, _ = soften(True, 0, step, m, total, score)
                acc = hopper.filled((HALF, U), 0.0, plgpu.Layout.WGMMA)
                carry = (acc, p16, m, total, step + 1)
                for down in range(1, own):  # the other blocks of these queries' own tile
                    carry = one_block(True, down, carry)
                inside = blocks  # at the far end, blocks where documents of these rows begin
                if begin_ref is not None:
                    inside -= pl.cdiv(begin_ref[b, row0 + HALF - 1], wide)

                def rest(down, carry):
                    return one_block(begin_ref is not None and down >= inside, down, carry)

                # One loop: of two in a row ptxas serialises the products.
                last = blocks - walking.first_block(begin_ref, b, tile, wide)
                acc, p16, m, total, step = lax.fori_loop(own, last, rest, carry)
                plgpu.barrier_arrive(mem["q_free"].at[at])
                slot = lax.rem(step - 1, stages)
                plgpu.barrier_wait(mem["v_full"].at[slot])
                acc = hopper.accumulate(acc, p16, mem["v"].at[slot], tuning.interpret)
                plgpu.barrier_arrive(mem["v_free"].at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out, rows = (acc * hopper.across(1 / total, U)).astype(dtype), pl.ds(row0, HALF)
                walking.store(out, out_smem, out_ref.at[b, :, n], rows)
                lse_ref.at[b, n, rows][...] = m + jnp.log(total) * LOG2_E
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
        q=hopper.tiles(2 * ahead, HALF, H, dtype),
        k=hopper.tiles(stages, wide, H, dtype),
        v=hopper.tiles(stages, wide, U, dtype),
        out=hopper.tiles(2, HALF, U if H <= TILE else CHUNK, dtype),
        turn=plgpu.Barrier(num_barriers=2),
        **hopper.ring("q", ahead, copies=2),
        **hopper.ring("k", stages),
        **hopper.ring("v", stages),
    )
    out_BTNU = jax.ShapeDtypeStruct((B, T, N, U), dtype)
    lse_BNT = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    run = hopper.launch(
        kernel,
        (out_BTNU, lse_BNT),
        scratch,
        interpret=tuning.interpret,
        grid=(walk.blocks,),
        names=("sm",),
    )
    return run(q_BTNH, k_BTKH, v_BTKU, begin_BT)


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
