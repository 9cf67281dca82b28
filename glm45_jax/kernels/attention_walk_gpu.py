"""What the attention kernels for Hopper share: sizes by width of a head, where documents begin and
end, which query tiles a block takes, and the mask.

Letters: B T N K G H; U entries of a value. Inside a kernel `_t` and `_s` are the queries and keys
of a tile.
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
from glm45_jax.kernels.hopper import HALF, TILE

LOG2_E = math.log2(math.e)
SHARED = 4  # blocks that should share keys
CHUNK = 64  # columns of a wide result that leave at a time


@struct.dataclass
class Bounds:
    """Document of each position: query t sees keys begin[t] <= s <= t, key s is seen by queries
    s <= t < end[s]. int32 [B, T].
    """

    begin_BT: jax.Array
    end_BT: jax.Array


def bounds(segments_BT: jax.Array) -> Bounds:
    """Where the run of equal segments around each position begins and ends."""
    T = segments_BT.shape[1]
    at_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], segments_BT.shape)
    new_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)))
    begin_BT = lax.cummax(jnp.where(new_BT, at_BT, 0), axis=1)
    next_BT = jnp.where(jnp.pad(new_BT[:, 1:], ((0, 0), (0, 1))), at_BT + 1, T)
    return Bounds(begin_BT, lax.cummin(next_BT, axis=1, reverse=True))


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that do not change the result but its speed. sms: blocks of the kernels that stay.

    stages: blocks in flight of forward, dq, dk/dv; stages_q: tiles of queries in flight of forward;
    stages_early: blocks of what dq and dk are done with first, values and the output's gradient,
    None for as many. keys, keys_dq, queries: width of a step of forward, dq, dk/dv. apart: dv and
    dk in a kernel each. registers: of a thread that copies and one that computes; 128 and 256
    threads share 65,536.

    fused: the backward pass in one kernel, for heads up to TILE wide. stages_fused, parts_fused:
    blocks in flight there, and parts of dq on their way out.
    """

    sms: int = 132
    stages: int = 2
    stages_dq: int = 3
    stages_dkv: int = 4
    stages_q: int = 2
    stages_early: int | None = None
    queries: int = 64
    keys: int = TILE
    keys_dq: int = 64
    apart: bool = False
    registers: tuple[int, int] = (24, 240)
    registers_dq: tuple[int, int] = (40, 232)
    fused: bool = False
    stages_fused: int = 2
    parts_fused: int = 2
    interpret: bool = False


# Heads up to 128 wide have one set of sizes: forward holds two tiles of queries, so that those of
# the next and its first keys are there when it begins (64 + 2(32 + 32) + 32 KiB). Wider ones meet
# both limits of a block: 227 KiB of shared memory, and 240 registers a thread that computes. In
# KiB, for 128 queries or keys a block:
#
#     H · U      forward                dq                 dk                 dv
#     192 · 128  48 + 3(24 + 16) + 16   80 + 3(24 + 16)    80 + 3(24 + 16)    48 + 3(24 + 16) + 16
#     192 · 192  48 + 3(24 + 24) + 16   96 + 2(24 + 24)    96 + 2(24 + 24)    48 + 2(24 + 24) + 16
#     192 · 256  48 + 2(24 + 32) + 16  112 + 2(24 + 32)   112 + 2(24 + 32)    48 + 2(24 + 32) + 16
#     256 · 128  64 + 2(32 + 16) + 16   96 + 2(32 + 16)    96 + 2(32 + 16)    64 + 2(32 + 16) + 16
#     256 · 256  64 + 2(32 + 32) + 16  128 + 2·32 + 1·32  128 + 2·32 + 1·32   64 + 2(32 + 32) + 16
#
# First what stays (forward q; dq q and dout; dk k and v; dv k), then stages of a step of 64 keys or
# queries, last 64 columns of the result on its way out; dq and dk leave through the memory of q and
# k. Rows of sums and what the compiler wants take 1 to 3 KiB more, so 224 is the most that fits.
# 192 · 128 with steps of 128 keys, two in flight, was as fast.
#
# Registers a thread: an accumulator of 64 rows takes half its columns, so a step of 64 has 32 of
# scores, 32 of dp and 16 of weights in bfloat16. At 256 · 256 forward holds 128 + 32 + 2·16 = 192,
# dq 128 + 32 + 32 + 16 = 208, dk as much and 16 of a row, dv 128 + 32 + 16. dk and dv in one kernel
# would hold 256 of sums alone (192 · 128: 160, for which ptxas serialises the products): each has
# its own, and scores are made once more, 5 products instead of 4. No kernel spills more than 24
# bytes, and that in forward.
_WIDE = Tuning(keys=64, stages_q=1, stages_dq=2, stages_dkv=2, apart=True)
WIDE = {
    (192, 128): dataclasses.replace(_WIDE, stages=3, stages_dq=3, stages_dkv=3),
    (192, 192): dataclasses.replace(_WIDE, stages=3),
    (192, 256): _WIDE,
    (256, 128): _WIDE,
    (256, 256): dataclasses.replace(_WIDE, stages_early=1),
}
SIZES = {
    (HALF, HALF): Tuning(),
    (TILE, TILE): Tuning(fused=True),
    **WIDE,
}
WIDTHS = tuple(SIZES)


def tuning_of(H: int, U: int) -> Tuning:
    """The kernels' own sizes for queries and keys H wide and values U wide."""
    return SIZES.get((H, U), Tuning())


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which query tiles a block takes, one after the other, and the keys that each needs.

    shape: of the queries. width: keys of a block of them; stages: blocks of keys and of values in
    flight; ahead: query tiles.
    """

    shape: tuple[int, int, int, int]
    kv_heads: int
    sms: int
    stages: tuple[int, int]
    width: int
    ahead: int = 1

    @property
    def pieces(self) -> int:
        """Query tiles of all rows and heads."""
        B, T, N, _ = self.shape
        return B * N * (T // TILE)

    @property
    def blocks(self) -> int:
        """How many blocks share the pieces."""
        return min(self.sms, self.pieces)

    @property
    def together(self) -> int:
        """Tiles of a head that are at work at once: in groups of few heads blocks would else read
        most keys from memory, not from the cache.
        """
        T, N = self.shape[1:3]
        most = max(1, SHARED * self.kv_heads // N)
        return max(n for n in range(1, most + 1) if T // TILE % n == 0)

    def mine(self) -> jax.Array:
        """Number of pieces of this block."""
        rounds, left = divmod(self.pieces, self.blocks)
        return rounds + (self.turn(jnp.int32(rounds)) < left).astype(jnp.int32)

    def turn(self, i) -> jax.Array:
        """When this block's turn is in a round: first to last, then last to first, and so on, for
        pieces become shorter.
        """
        sm = lax.axis_index("sm")
        return jnp.where(lax.rem(i, 2) == 0, sm, self.blocks - 1 - sm)

    def place(self, i) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Row, head and tile of the i-th of them: those that share keys first, `together` tiles of
        a head and heads of a group, then rows, then other tiles, from the longest.
        """
        B, T, N, _ = self.shape
        above, near = hopper.div_rem(i * self.blocks + self.turn(i), self.together)
        above, n = hopper.div_rem(above, N)
        far, b = hopper.div_rem(above, B)
        return b, n, T // TILE - 1 - (far * self.together + near)

    def copies(self, mem, queries, keys, begin_ref, *, down) -> None:
        """All a block's copies into shared memory, from the last keys down or from the first up."""
        group = self.shape[2] // self.kv_heads
        rings = tuple(zip("kv", keys, self.stages, strict=True))

        def one_tile(i, step):
            b, n, tile = self.place(i)
            at = lax.rem(i, self.ahead)
            full, free = (mem[f"q_{x}"].at[at] for x in ("full", "free"))
            pl.when(i >= self.ahead)(functools.partial(plgpu.barrier_wait, free))
            for ref, name in queries:
                hopper.copy_halves(ref.at[b, :, n], mem[name], full, tile, 2 * at)
            first = first_block(begin_ref, b, tile, self.width)
            last = (tile + 1) * (TILE // self.width) - 1

            def one_block(i, step):
                rows = pl.ds((last - i if down else first + i) * self.width, self.width)
                for name, ref, stages in rings:
                    slot = lax.rem(step, stages)
                    full, free = (mem[f"{name}_{x}"].at[slot] for x in ("full", "free"))
                    pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, free))
                    src = ref.at[b, rows, lax.div(n, group)]
                    plgpu.copy_gmem_to_smem(src, mem[name].at[slot], full)
                return step + 1

            return lax.fori_loop(0, last + 1 - first, one_block, step)

        steps = lax.fori_loop(0, self.mine(), one_tile, jnp.int32(0))
        hopper.drain(mem, ("q",), self.mine(), self.ahead)
        for name, _, stages in rings:
            hopper.drain(mem, (name,), steps, stages)


def copy_steps(mem, rings, place, steps, many) -> None:
    """All copies of the kernels that walk over queries, `many` a step. rings: name, reference, and
    the same of a number a query if it has one, and how many blocks are in flight. place: row, block
    and head of a step.
    """

    def one_step(step, _):
        b, block, n = place(step)
        rows = pl.ds(block * many, many)
        for name, ref, row, row_ref, count in rings:
            slot = lax.rem(step, count)
            full, free = (mem[f"{name}_{x}"].at[slot] for x in ("full", "free"))
            pl.when(step >= count)(functools.partial(plgpu.barrier_wait, free))
            plgpu.copy_gmem_to_smem(ref.at[b, rows, n], mem[name].at[slot], full)
            if row_ref is not None:
                plgpu.copy_gmem_to_smem(row_ref.at[b, n, rows], mem[row].at[slot], full)

    lax.fori_loop(0, steps, one_step, None)
    for name, _, _, _, count in rings:
        hopper.drain(mem, (name,), steps, count)


def by_mask(one_step, carry, key0, end_T, blocks, many, group):
    """one_step(masked, step, carry) over blocks of `many` queries, `group` heads each, from the
    last to the first of blocks = (first, last + 1). Masked, unless all their queries see the HALF
    keys from key0 on. end_T: where the document of each ends; None for one document.
    """
    low, high = blocks
    edge, whole = (functools.partial(one_step, masked) for masked in (True, False))
    after = pl.cdiv(key0 + HALF - 1, many)  # blocks from here on come after all the keys
    inside = high if end_T is None else lax.div(end_T[key0], many)
    inside = jnp.clip(inside, after, high)  # and before here, inside their documents
    at_inside, at_after = (high - inside) * group, jnp.maximum(high - after, 0) * group
    if end_T is not None:
        carry = lax.fori_loop(0, at_inside, edge, carry)
    carry = lax.fori_loop(at_inside, at_after, whole, carry)
    return lax.fori_loop(at_after, (high - low) * group, edge, carry)


def first_block(begin_ref, b, tile, width):
    """The first block of keys that a tile of queries sees."""
    return 0 if begin_ref is None else lax.div(begin_ref[b, tile * TILE], width)


def mask(score, row0, key0, begin_t):
    """Scores of queries row0.. on keys key0..; -inf on later keys and other documents."""
    row, key = hopper.index(score.shape, 0) + row0, hopper.index(score.shape, 1) + key0
    seen = key <= row
    if begin_t is not None:
        seen &= key >= hopper.across(begin_t, score.shape[1])
    return jnp.where(seen, score, -jnp.inf)


def mask_keys(score, key0, row0, end_s):
    """The same with keys as rows."""
    key, row = hopper.index(score.shape, 0) + key0, hopper.index(score.shape, 1) + row0
    seen = key <= row
    if end_s is not None:
        seen &= row < hopper.across(end_s, score.shape[1])
    return jnp.where(seen, score, -jnp.inf)


def only_if(chosen, f, x):
    """f(x) or x; chosen: while the kernel is traced, a bool, or while it runs."""
    if isinstance(chosen, bool):
        return f(x) if chosen else x
    return lax.cond(chosen, f, lambda x: x, x)


def store(x, smem, ref, rows):
    """Starts the copy of x to rows of a [T, width] reference by way of shared memory, which nobody
    reads any more, as many columns at a time as that has.
    """
    width, columns = x.shape[1], smem.shape[1]
    for at in range(0, width, columns):
        if at:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem[...] = x if columns == width else lax.slice(x, (0, at), (x.shape[0], at + columns))
        plgpu.commit_smem()
        part = ref.at[rows] if columns == width else ref.at[rows, pl.ds(at, columns)]
        plgpu.copy_smem_to_gmem(smem, part)


def slot(step, stages):
    """Where a ring has the block of a step."""
    return afresh(0, step, TILE + 1) if stages == 1 else lax.rem(step, stages)


def afresh(at, step, width):
    """`at`, 0 or 1. With heads wider than a tile the compiler does not see that it is the same in
    all steps: it would make the addresses of an operand's parts before them, 16 of 256 columns, and
    spill them (1,300 bytes a thread in dk). A square is never 5 modulo 8.
    """
    return jnp.where(lax.rem(step * step, 8) == 5, 1 - at, at) if width > TILE else at
