"""The backward pass of the attention kernels for Hopper: dq by query tiles that walk over keys, dk
and dv by key tiles that walk over queries, so that nothing is added atomically.

Letters: B T N K G H; U entries of a value. Inside a kernel `_t` and `_s` are the queries and keys
of a tile.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from glm45_jax.kernels import attention_walk_gpu as walking
from glm45_jax.kernels import hopper
from glm45_jax.kernels.attention_walk_gpu import CHUNK, LOG2_E, Walk
from glm45_jax.kernels.hopper import COLUMN, HALF, ROW, TILE


@functools.partial(jax.jit, static_argnames="tuning")
def queries(q_BTNH, k_BTKH, v_BTKU, dout_BTNU, lse_BNT, delta_BNT, within, tuning) -> jax.Array:
    """dq: like the forward pass, query tiles that walk over their keys."""
    H, U = q_BTNH.shape[-1], v_BTKU.shape[-1]
    stages, dtype, wide = tuning.stages_dq, q_BTNH.dtype, tuning.keys_dq
    stages_v = tuning.stages_early or stages
    scale, room = 1 / math.sqrt(H), H <= TILE  # else dq leaves through the memory of q
    walk = Walk(q_BTNH.shape, k_BTKH.shape[2], tuning.sms, (stages, stages_v), wide)
    begin_BT = None if within is None else within.begin_BT

    def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, begin_ref, dq_ref, mem):
        wg = lax.axis_index("wg")

        def compute():
            dq_smem = mem["dq" if room else "q"].at[wg]

            def one_tile(i, step):
                b, n, tile = walk.place(i)
                row0 = tile * TILE + wg * HALF
                begin_t = hopper.vector(begin_ref, b, row0, ROW)
                lse_t, delta_t = (
                    hopper.vector(ref.at[b], n, row0, ROW) for ref in (lse_ref, delta_ref)
                )
                plgpu.barrier_wait(mem["q_full"].at[0])

                def one_block(masked, block, carry):
                    dq, step = carry
                    slot, slot_v = walking.slot(step, stages), walking.slot(step, stages_v)
                    k_smem, v_smem = mem["k"].at[slot], mem["v"].at[slot_v]
                    mine = walking.afresh(wg, step, H)
                    q_smem, dout_smem = mem["q"].at[mine], mem["dout"].at[mine]
                    plgpu.barrier_wait(mem["k_full"].at[slot])
                    plgpu.barrier_wait(mem["v_full"].at[slot_v])

                    def dscores(score_ref, dp_ref):
                        plgpu.wgmma(score_ref, q_smem, k_smem.transpose((1, 0)))
                        plgpu.wgmma(dp_ref, dout_smem, v_smem.transpose((1, 0)))
                        score = plgpu.wgmma_accumulator_load(score_ref, wait_n=1)
                        if masked:
                            score = walking.mask(score, row0, block * wide, begin_t)
                        p = jnp.exp2(score * (scale * LOG2_E) - hopper.across(lse_t, wide))
                        return p * (dp_ref[...] - hopper.across(delta_t, wide))

                    acc = plgpu.ACC((HALF, wide), jnp.float32)
                    ds16 = pl.run_scoped(dscores, acc, acc).astype(dtype)
                    plgpu.barrier_arrive(mem["v_free"].at[slot_v])
                    dq = hopper.accumulate(dq, ds16, k_smem, tuning.interpret)
                    plgpu.barrier_arrive(mem["k_free"].at[slot])
                    return dq, step + 1

                def skip(_, step):  # keys after these queries, that the other warpgroup needs
                    for name, count in (("k", stages), ("v", stages_v)):
                        slot = lax.rem(step, count)
                        plgpu.barrier_wait(mem[f"{name}_full"].at[slot])
                        plgpu.barrier_arrive(mem[f"{name}_free"].at[slot])
                    return step + 1

                edge, whole = (functools.partial(one_block, masked) for masked in (True, False))
                carry = (hopper.filled((HALF, H), 0.0, plgpu.Layout.WGMMA), step)
                diagonal = lax.div(row0, wide)
                start = jnp.int32(0)
                if begin_ref is not None:
                    start = jnp.minimum(pl.cdiv(begin_ref[b, row0 + HALF - 1], wide), diagonal)
                    first = walking.first_block(begin_ref, b, tile, wide)
                    carry = lax.fori_loop(first, start, edge, carry)
                carry = lax.fori_loop(start, diagonal, whole, carry)
                dq, step = edge(diagonal, carry)
                step = lax.fori_loop(diagonal + 1, (tile + 1) * (TILE // wide), skip, step)
                if room:
                    plgpu.barrier_arrive(mem["q_free"].at[0])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq16 = (dq * scale).astype(dtype)
                walking.store(dq16, dq_smem, dq_ref.at[b, :, n], pl.ds(row0, HALF))
                if not room:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(mem["q_free"].at[0])
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
        dout=hopper.tiles(2, HALF, U, dtype),
        k=hopper.tiles(stages, wide, H, dtype),
        v=hopper.tiles(stages_v, wide, U, dtype),
        **hopper.ring("q", 1, copies=4),
        **hopper.ring("k", stages),
        **hopper.ring("v", stages_v),
    )
    if room:
        scratch["dq"] = hopper.tiles(2, HALF, H, dtype)
    run = hopper.launch(
        kernel, q_BTNH, scratch, interpret=tuning.interpret, grid=(walk.blocks,), names=("sm",)
    )
    return run(q_BTNH, k_BTKH, v_BTKU, dout_BTNU, lse_BNT, delta_BNT, begin_BT)


def keys(
    q_BTNH, k_BTKH, v_BTKU, dout_BTNU, lse_BNT, delta_BNT, within, tuning
) -> tuple[jax.Array, jax.Array]:
    """dk and dv, of one kernel or, where that has no registers for both, of two."""
    args = (q_BTNH, k_BTKH, v_BTKU, dout_BTNU, lse_BNT, delta_BNT, within, tuning)
    if not tuning.apart:
        return _keys(*args, made=("dk", "dv"))
    return *_keys(*args, made=("dk",)), *_keys(*args, made=("dv",))


@functools.partial(jax.jit, static_argnames=("tuning", "made"))
def _keys(q_BTNH, k_BTKH, v_BTKU, dout_BTNU, lse_BNT, delta_BNT, within, tuning, made):
    """What is made of dk and dv: a block owns TILE keys of a kv head and walks over the queries of
    all its G heads. dv alone needs neither values nor delta.

    From the last queries to the first: blocks of one kv head then read the same queries at the same
    time, and early keys, which have the most, come first.
    """
    (B, T, N, H), (K, U) = q_BTNH.shape, v_BTKU.shape[2:]
    G, tiles, scale = N // K, T // TILE, 1 / math.sqrt(H)
    stages, dtype, many = tuning.stages_dkv, q_BTNH.dtype, tuning.queries
    stages_dout = (made == ("dk",) and tuning.stages_early) or stages
    end_BT = None if within is None else within.end_BT
    outs, with_dk = {"dk": k_BTKH, "dv": v_BTKU}, "dk" in made
    v_name = "v" if with_dk else "dv"  # values, or only the way out of their gradient

    def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, end_ref, *rest):
        *out_refs, mem = rest
        wg, tile = lax.axis_index("wg"), lax.axis_index("tile")
        b, kv = lax.axis_index("b"), lax.axis_index("kv")
        low = tile * (TILE // many)
        high = T // many if end_ref is None else pl.cdiv(end_ref[b, tile * TILE + TILE - 1], many)

        def copies():
            hopper.copy_halves(k_ref.at[b, :, kv], mem["k"], mem["kv_full"], tile)
            if with_dk:
                hopper.copy_halves(v_ref.at[b, :, kv], mem["v"], mem["kv_full"], tile)

            rings = (
                ("q", q_ref, "lse", lse_ref, stages),
                ("dout", dout_ref, "delta", delta_ref, stages_dout),
            )

            def place(step):
                return b, high - 1 - lax.div(step, G), kv * G + lax.rem(step, G)

            walking.copy_steps(mem, rings, place, (high - low) * G, many)

        def compute():
            key0 = tile * TILE + wg * HALF
            end_s = hopper.vector(end_ref, b, key0, ROW)
            plgpu.barrier_wait(mem["kv_full"])

            def one_step(masked, step, carry):
                slot, slot_dout = walking.slot(step, stages), walking.slot(step, stages_dout)
                q_smem, dout_smem = mem["q"].at[slot], mem["dout"].at[slot_dout]
                plgpu.barrier_wait(mem["q_full"].at[slot])
                plgpu.barrier_wait(mem["dout_full"].at[slot_dout])

                def weights(score):
                    if masked:
                        row0 = (high - 1 - lax.div(step, G)) * many
                        score = walking.mask_keys(score, key0, row0, end_s)
                    lse_t = plgpu.load(mem["lse"].at[slot], layout=COLUMN)
                    return jnp.exp2(score * (scale * LOG2_E) - hopper.down(lse_t, HALF))

                def dscores(p, dp):  # loaded late, to hold fewer registers
                    delta_t = plgpu.load(mem["delta"].at[slot_dout], layout=COLUMN)
                    return (p * (dp - hopper.down(delta_t, HALF))).astype(dtype)

                mine = walking.afresh(wg, step, H)
                refs = (q_smem, mem["k"].at[mine], mem[v_name].at[mine], dout_smem)
                free = functools.partial(plgpu.barrier_arrive, mem["dout_free"].at[slot_dout])
                if made == ("dk",):
                    carry = _step_dk(carry, refs, weights, dscores, free, tuning.interpret)
                    plgpu.barrier_arrive(mem["q_free"].at[slot])
                    return carry
                if made == ("dv",):
                    carry = _step_dv(carry, refs, weights, tuning.interpret)
                else:
                    carry = _step_keys(carry, refs, weights, dscores, tuning.interpret)
                plgpu.barrier_arrive(mem["q_free"].at[slot])
                free()
                return carry

            carry = tuple(
                hopper.filled((HALF, outs[name].shape[-1]), 0.0, plgpu.Layout.WGMMA)
                for name in made
            )
            end_T = None if end_ref is None else end_ref.at[b]
            carry = walking.by_mask(one_step, carry, key0, end_T, (low, high), many, G)
            for name, ref, x in zip(made, out_refs, carry, strict=True):
                by, x = ("k", x * scale) if name == "dk" else (v_name, x)
                walking.store(x.astype(dtype), mem[by].at[wg], ref.at[b, :, kv], pl.ds(key0, HALF))
            plgpu.wait_smem_to_gmem(0)

        hopper.specialise(wg, tuning.registers, copies, compute)

    scratch = dict(
        k=hopper.tiles(2, HALF, H, dtype),
        q=hopper.tiles(stages, many, H, dtype),
        dout=hopper.tiles(stages_dout, many, U, dtype),
        lse=plgpu.SMEM((stages, many), jnp.float32),
        kv_full=plgpu.Barrier(num_arrivals=4 if with_dk else 2),
        **hopper.ring("q", stages, copies=2),
        **hopper.ring("dout", stages_dout, copies=2 if with_dk else 1),
    )
    out = tuple(outs[name] for name in made)
    if with_dk:
        scratch["v"] = hopper.tiles(2, HALF, U, dtype)
        scratch["delta"] = plgpu.SMEM((stages_dout, many), jnp.float32)
    else:
        scratch["dv"] = hopper.tiles(2, HALF, CHUNK, dtype)
        v_BTKU = delta_BNT = None
    grid, names = (B, K, tiles), ("b", "kv", "tile")
    run = hopper.launch(kernel, out, scratch, interpret=tuning.interpret, grid=grid, names=names)
    return run(q_BTNH, k_BTKH, v_BTKU, dout_BTNU, lse_BNT, delta_BNT, end_BT)


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


def _step_dk(carry, refs, weights, dscores, free, interpret):
    """dk alone; free: says that the output's gradient has been used."""
    (dk,), (q_smem, k_smem, v_smem, dout_smem) = carry, refs

    def body(score_ref, dp_ref):
        plgpu.wgmma(score_ref, k_smem, q_smem.transpose((1, 0)))
        plgpu.wgmma(dp_ref, v_smem, dout_smem.transpose((1, 0)))
        p = weights(plgpu.wgmma_accumulator_load(score_ref, wait_n=1))
        return dscores(p, dp_ref[...])

    acc = plgpu.ACC((HALF, q_smem.shape[0]), jnp.float32)
    ds16 = pl.run_scoped(body, acc, acc)
    free()
    return (hopper.accumulate(dk, ds16, q_smem, interpret),)


def _step_dv(carry, refs, weights, interpret):
    """dv alone."""
    (dv,), (q_smem, k_smem, _, dout_smem) = carry, refs
    p = weights(hopper.product(k_smem, q_smem.transpose((1, 0))))
    return (hopper.accumulate(dv, p.astype(k_smem.dtype), dout_smem, interpret),)
