"""The backward pass of the attention kernels for Hopper in one kernel: dk and dv as in
`attention_backward_gpu`, and what their keys add to dq; five products where two kernels do seven.

dq is a sum over blocks, in float32 in global memory. They add to it in the order of their key
tiles: a counter for each block of queries says how many have, so the sum is bitwise repeatable. A
block waits for blocks before it in the grid only; a device starts blocks in that order, so they
run. Which queries a block takes first (`walks_up`) decides whether they are in L2. The interpreter
has neither counters nor copies that add, but runs one block after the other in that order: there a
block reads, adds and writes.

Letters: B T N K G H; U entries of a value. Inside a kernel `_t`, `_s`: queries, keys of a tile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from glm45_jax.kernels import attention_walk_gpu as walking
from glm45_jax.kernels import hopper
from glm45_jax.kernels.attention_walk_gpu import LOG2_E, Tuning
from glm45_jax.kernels.hopper import COLUMN, HALF, ROW, TILE

ASKED = 4  # turns that are waited for ahead of time


@functools.partial(jax.jit, static_argnames="tuning")
def gradients(
    q_BTNH, k_BTKH, v_BTKU, dout_BTNU, lse_BNT, delta_BNT, within, tuning
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv.

    Raises: ValueError for heads that are not 64 or 128 wide, values included.
    """
    (B, T, N, H), (K, U) = q_BTNH.shape, v_BTKU.shape[2:]
    if H != U or H not in (HALF, TILE):
        raise ValueError(f"one kernel takes heads 64 or 128 wide, not ({H}, {U}); fused=False")
    lanes = heads_at_once(B * K, T // TILE, tuning.sms)
    begin_BT, end_BT = (None, None) if within is None else (within.begin_BT, within.end_BT)
    many = HALF * TILE // H  # queries of a step: half of their dq is HALF by HALF

    def kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *rest):
        begin_ref, end_ref, dq_ref, dk_ref, dv_ref, mem = rest
        wave, tile = lax.axis_index("wave"), lax.axis_index("tile")
        b, kv = hopper.div_rem(wave * lanes + lax.axis_index("lane"), K)
        high, upward = T // many, walks_up(wave, tile, T // TILE, tuning.sms)
        if end_ref is not None:
            high, upward = pl.cdiv(end_ref[b, tile * TILE + TILE - 1], many), None
        blocks = (tile * (TILE // many), high)
        at = (b, kv, tile)
        block = _Block(tuning, mem, begin_ref, end_ref, N // K, H, many, at, blocks, upward)
        counters = plgpu.SemaphoreType.REGULAR((B, N, T // many))  # zeros at the start
        turns = None if tuning.interpret else pl.get_global(counters)
        queries = ("q", q_ref, "lse", lse_ref), ("dout", dout_ref, "delta", delta_ref)

        def apart(warp):
            pl.when(warp == 0)(lambda: block.copies(k_ref, v_ref, queries))
            pl.when(warp == 1)(lambda: block.add(dq_ref, turns))
            if turns is not None:
                pl.when(warp == 2)(lambda: block.ask(turns))

        hopper.specialise(
            lax.axis_index("wg"),
            tuning.registers,
            lambda: plgpu.warp_map(apart),
            lambda: block.compute(dk_ref, dv_ref),
        )

    run = hopper.launch(
        kernel,
        (jax.ShapeDtypeStruct(q_BTNH.shape, jnp.float32), k_BTKH, v_BTKU),
        _scratch(tuning, many, H, q_BTNH.dtype),
        interpret=tuning.interpret,
        grid=(B * K // lanes, T // TILE, lanes),
        names=("wave", "tile", "lane"),
    )
    rows_BNT = lse_BNT * (-math.sqrt(H) / LOG2_E), -delta_BNT
    dq, dk, dv = run(q_BTNH, k_BTKH, v_BTKU, dout_BTNU, *rows_BNT, begin_BT, end_BT)
    return (dq * (1 / math.sqrt(H))).astype(q_BTNH.dtype), dk, dv


def turn(begin, tile):
    """How many key tiles add to a block of queries before this one. begin: where the document of
    the block's first query does; the tile that has this key is the first that adds.
    """
    return tile - lax.div(begin, TILE)


def heads_at_once(heads, tiles, sms) -> int:
    """Of how many kv heads, each row's counted, all tiles are at work on a device of `sms`."""
    most = max(1, sms // tiles)
    return max(n for n in range(1, most + 1) if heads % n == 0)


def walks_up(wave, tile, tiles, sms):
    """Whether a block takes its first queries first, where rows are one document.

    Blocks that begin together walk down side by side from the last query, so that the queries and
    dq of a few steps are all that L2 holds. They end one after the other, the last tile first, and
    who begins in the place of one would be alone on its way down. Walking up it meets its
    predecessors where they are: all are side by side again, and end together.
    """
    rounds = max(1, round(tiles / sms))
    return lax.rem(wave * rounds + jnp.minimum(lax.div(tile, sms), rounds - 1), 2) == 1


def _scratch(tuning, many, H, dtype):
    """In KiB, heads 128 wide: 64 of keys and values, 32 a stage, 32 of ds, 32 a part of dq."""
    stages, parts = tuning.stages_fused, tuning.parts_fused
    return dict(
        k=hopper.tiles(2, HALF, H, dtype),
        v=hopper.tiles(2, HALF, H, dtype),
        q=hopper.tiles(stages, many, H, dtype),
        dout=hopper.tiles(stages, many, H, dtype),
        lse=plgpu.SMEM((stages, many), jnp.float32),
        delta=plgpu.SMEM((stages, many), jnp.float32),
        ds=hopper.tiles(4, HALF, many, dtype),  # of two steps
        dq=hopper.tiles(2 * parts, HALF, HALF, jnp.float32),
        kv_full=plgpu.Barrier(num_arrivals=4),
        ds_full=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        dq_full=plgpu.Barrier(num_arrivals=2, num_barriers=parts),
        dq_free=plgpu.Barrier(num_barriers=parts),
        turn_full=plgpu.Barrier(num_barriers=ASKED),
        turn_free=plgpu.Barrier(num_barriers=ASKED),
        **hopper.ring("q", stages, copies=2),
        **hopper.ring("dout", stages, copies=2),
    )


@dataclasses.dataclass(frozen=True)
class _Block:
    """TILE keys of a kv head, which walk over the queries of all its heads, `many` of one head a
    step. at: row, kv head, tile. blocks: the first of queries, and the one after the last. upward:
    see `walks_up`; None is never.

    Warpgroups 0 and 1 own HALF keys each and write their part of ds, keys by queries, into shared
    memory. A step later, when both surely have, each makes half of dq from all of it: half its
    columns, or of heads 64 wide half its rows.
    """

    tuning: Tuning
    mem: Any
    begin_ref: Any
    end_ref: Any
    group: int
    width: int
    many: int
    at: tuple[Any, Any, Any]
    blocks: tuple[Any, Any]
    upward: Any

    @property
    def steps(self):
        """Blocks of queries, heads counted one by one."""
        return (self.blocks[1] - self.blocks[0]) * self.group

    def place(self, step):
        """Row, block of queries and head of a step."""
        (b, kv, _), (low, high) = self.at, self.blocks
        walked, head = hopper.div_rem(step, self.group)
        block = high - 1 - walked
        if self.upward is not None:  # the tile's own queries come last either way
            first = low + TILE // self.many
            block = jnp.where(self.upward & (block >= first), first + walked, block)
        return b, block, kv * self.group + head

    def copies(self, k_ref, v_ref, queries) -> None:
        """All copies into shared memory."""
        mem, (b, kv, tile) = self.mem, self.at
        for name, ref in (("k", k_ref), ("v", v_ref)):
            hopper.copy_halves(ref.at[b, :, kv], mem[name], mem["kv_full"], tile)
        rings = tuple((*query, self.tuning.stages_fused) for query in queries)
        walking.copy_steps(mem, rings, self.place, self.steps, self.many)

    def before(self, step):
        """How many blocks of the grid add to dq of a step before this one."""
        b, block, _ = self.place(step)
        begin = jnp.int32(0) if self.begin_ref is None else self.begin_ref[b, block * self.many]
        return turn(begin, self.at[2])

    def ask(self, turns) -> None:
        """Waits for each turn, some steps ahead of who takes it: an answer takes a microsecond."""
        mem = self.mem

        def one_step(step, _):
            (b, block, n), slot = self.place(step), lax.rem(step, ASKED)
            pl.when(step >= ASKED)(lambda: plgpu.barrier_wait(mem["turn_free"].at[slot]))
            plgpu.semaphore_wait(
                turns.at[b, n, block], self.before(step), decrement=False, memory_scope="gpu"
            )
            plgpu.barrier_arrive(mem["turn_full"].at[slot])

        lax.fori_loop(0, self.steps, one_step, None)

    def add(self, dq_ref, turns) -> None:
        """Adds parts of dq to the sum, each in its turn. The next block hears of it a step later,
        when it is sure to be there: waited for at once, that would be most of a step's time.
        """
        mem, parts = self.mem, self.tuning.parts_fused

        def tell(step):
            b, block, n = self.place(step)
            plgpu.semaphore_signal(turns.at[b, n, block], memory_scope="gpu")

        def one_step(step, _):
            (b, block, n), slot = self.place(step), lax.rem(step, parts)
            asked, row0, before = lax.rem(step, ASKED), block * self.many, self.before(step)
            if turns is not None:
                plgpu.barrier_wait(mem["turn_full"].at[asked])
                plgpu.barrier_arrive(mem["turn_free"].at[asked])
            plgpu.barrier_wait(mem["dq_full"].at[slot])
            for half in range(2):
                row, column = (half * HALF, 0) if self.width == HALF else (0, half * HALF)
                to = dq_ref.at[b, pl.ds(row0 + row, HALF), n, pl.ds(column, HALF)]
                _add(mem["dq"].at[2 * slot + half], to, before, self.tuning.interpret, half == 1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(mem["dq_free"].at[slot])
            if turns is not None:
                plgpu.wait_smem_to_gmem(1)
                pl.when(step > 0)(lambda: tell(step - 1))

        lax.fori_loop(0, self.steps, one_step, None)
        if turns is not None:
            plgpu.wait_smem_to_gmem(0)
            pl.when(self.steps > 0)(lambda: tell(self.steps - 1))

    def compute(self, dk_ref, dv_ref) -> None:
        """dk and dv of half the keys, and half of dq."""
        mem, dtype, many = self.mem, dk_ref.dtype, self.many
        wg, (b, kv, tile) = lax.axis_index("wg"), self.at
        key0 = tile * TILE + wg * HALF
        end_s = hopper.vector(self.end_ref, b, key0, ROW)
        end_T = None if self.end_ref is None else self.end_ref.at[b]

        def one_step(masked, step, carry):
            def hide(score):
                _, block, _ = self.place(step)
                return walking.mask_keys(score, key0, block * many, end_s) if masked else score

            return self.step(step, hide, carry)

        plgpu.barrier_wait(mem["kv_full"])
        zero = hopper.filled((HALF, self.width), 0.0, plgpu.Layout.WGMMA)
        dk, dv = walking.by_mask(one_step, (zero, zero), key0, end_T, self.blocks, many, self.group)
        pl.when(self.steps > 0)(lambda: self.finish(self.steps - 1))
        done = mem["ds_full"].at[lax.rem(self.steps, 2)]
        plgpu.barrier_arrive(done)  # nobody reads the keys any more, say both
        plgpu.barrier_wait(done)
        for name, ref, x in (("k", dk_ref, dk * (1 / math.sqrt(self.width))), ("v", dv_ref, dv)):
            walking.store(x.astype(dtype), mem[name].at[wg], ref.at[b, :, kv], pl.ds(key0, HALF))
        hopper.drain(mem, ("dq",), self.steps, self.tuning.parts_fused)
        plgpu.wait_smem_to_gmem(0)

    def step(self, step, hide, carry):
        """dk and dv after one block of queries; keys are rows, queries columns."""
        mem, slot = self.mem, lax.rem(step, self.tuning.stages_fused)
        for name in ("q", "dout"):
            plgpu.barrier_wait(mem[f"{name}_full"].at[slot])
        q_smem, dout_smem = mem["q"].at[slot], mem["dout"].at[slot]
        dtype, accs = q_smem.dtype, (*self.offsets(slot), *carry)

        def run(refs):
            score_ref, dp_ref, dk_ref, dv_ref = refs
            self.scores(score_ref, dp_ref, q_smem, dout_smem)
            p = self.weights(hide(plgpu.wgmma_accumulator_load(score_ref, wait_n=1)))
            plgpu.wgmma(dv_ref, p.astype(dtype), dout_smem)  # meanwhile ds is formed
            ds16 = (p * plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)).astype(dtype)
            self.exchange(step, ds16, lambda: plgpu.wgmma(dk_ref, ds16, q_smem))

        if self.tuning.interpret:
            carry = self.interpreted(step, hide, accs, q_smem, dout_smem)
        else:
            carry = pl.run_state(run)(tuple(plgpu.ACC.init(x) for x in accs))[2:]
        for name in ("q", "dout"):
            plgpu.barrier_arrive(mem[f"{name}_free"].at[slot])
        return carry

    def interpreted(self, step, hide, accs, q_smem, dout_smem):
        """`run` where no product is in flight or starts from a value."""
        (lse, delta, dk, dv), dtype = accs, q_smem.dtype

        def body(score_ref, dp_ref):
            self.scores(score_ref, dp_ref, q_smem, dout_smem)
            return score_ref[...], dp_ref[...]

        acc = plgpu.ACC(lse.shape, jnp.float32)
        score, dp = pl.run_scoped(body, acc, acc)
        p = self.weights(hide(score + lse))
        ds16 = (p * (dp + delta)).astype(dtype)
        self.exchange(step, ds16)
        dk = hopper.accumulate(dk, ds16, q_smem, True)
        return dk, hopper.accumulate(dv, p.astype(dtype), dout_smem, True)

    def offsets(self, slot):
        """What scores and dp start from. Added later, ptxas has no registers for them and for the
        products, which it serialises.
        """
        for name in ("lse", "delta"):
            row_t = plgpu.load(self.mem[name].at[slot], layout=COLUMN)
            yield hopper.down(row_t, HALF)

    def scores(self, score_ref, dp_ref, q_smem, dout_smem) -> None:
        """Starts scores and dp of this warpgroup's keys."""
        k_smem, v_smem = (self.mem[name].at[lax.axis_index("wg")] for name in "kv")
        plgpu.wgmma(score_ref, k_smem, q_smem.transpose((1, 0)))
        plgpu.wgmma(dp_ref, v_smem, dout_smem.transpose((1, 0)))

    def weights(self, score):
        """Of scores from which the log-sum-exp is taken already."""
        return jnp.exp2(score * (LOG2_E / math.sqrt(self.width)))

    def ds(self, step, half):
        """Where a warpgroup's ds of a step is."""
        return self.mem["ds"].at[2 * lax.rem(step + 2, 2) + half]

    def exchange(self, step, ds16, start=None) -> None:
        """Gives this warpgroup's ds of a step, and half of dq of the step before, for which it
        takes the other's: so neither waits long for the other. start: starts one more product.
        """
        before, given = step - 1, self.mem["ds_full"].at[lax.rem(step, 2)]

        def store():
            self.ds(step, lax.axis_index("wg"))[...] = ds16
            plgpu.commit_smem()

        if start is None:
            pl.when(step > 0)(lambda: self.finish(before))
            store()
            plgpu.barrier_arrive(given)
            return

        def beside():
            start()
            store()

        pl.when(step > 0)(lambda: self.take(before))
        dq = self.product(before, beside, running=1)  # of step 0: nothing, and given to nobody
        plgpu.barrier_arrive(given)
        pl.when(step > 0)(lambda: self.hand(dq, before))

    def take(self, step) -> None:
        """Waits until both have given ds."""
        plgpu.barrier_wait(self.mem["ds_full"].at[lax.rem(step, 2)])

    def finish(self, step) -> None:
        """Half of dq of a step, by itself."""
        self.take(step)
        self.hand(self.product(step), step)

    def product(self, step, beside=lambda: None, running=0):
        """Half of dq of a step: ds of all keys, times keys. beside: starts `running` more products
        and does what else there is.
        """
        mine = pl.ds(lax.axis_index("wg") * HALF, HALF)

        def body(dq_ref):
            for half in range(2):
                ds, k = self.ds(step, half), self.mem["k"].at[half]
                ds, k = (ds.at[:, mine], k) if self.width == HALF else (ds, k.at[:, mine])
                plgpu.wgmma(dq_ref, ds.transpose((1, 0)), k)
            beside()
            if self.tuning.interpret:
                return dq_ref[...]
            return plgpu.wgmma_accumulator_load(dq_ref, wait_n=running)

        return pl.run_scoped(body, plgpu.ACC((HALF, HALF), jnp.float32))

    def hand(self, dq, step) -> None:
        """Gives the warp that adds this warpgroup's half of dq."""
        mem, parts = self.mem, self.tuning.parts_fused
        slot = lax.rem(step, parts)
        pl.when(step >= parts)(lambda: plgpu.barrier_wait(mem["dq_free"].at[slot]))
        dq_smem = mem["dq"].at[2 * slot + lax.axis_index("wg")]
        dq_smem[...] = dq
        plgpu.commit_smem()
        plgpu.barrier_arrive(mem["dq_full"].at[slot])


def _add(smem, ref, before, interpret, last) -> None:
    """Starts the addition of smem to ref, which has no value before the first. last: of a group
    that is waited for as one.
    """
    if interpret:
        ref[...] = jnp.where(before == 0, 0.0, ref[...]) + smem[...]
        return
    plgpu.copy_smem_to_gmem(smem, ref, before == 0, commit_group=False)
    plgpu.copy_smem_to_gmem(smem, ref, before > 0, reduction_op="add", commit_group=last)
