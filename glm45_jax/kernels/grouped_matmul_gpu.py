"""Grouped matmul in Pallas Mosaic GPU for Hopper: forward, dlhs and drhs. Letters: R E D F; P row
tiles.

Types to know: `Tiles`, the table of row tiles that all products of one routing share, and `Plan`.
Persistent CTAs of two consumer warpgroups and one producer; a consumer stores a tile while the
tensor cores run the first steps of its next one. Numbers: docs/log.md.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 128  # of a tile: 64 a consumer
STEP = 64  # of the contracted dimension: 128 bytes, one swizzle atom
HALF = 64  # rows of a tile that one consumer owns, and columns of an output chunk
SLOTS = 2  # output chunks in flight a consumer
CTAS = 132  # streaming multiprocessors of an H100
PRODUCER = 2  # index of the warpgroup that loads; 0 and 1 multiply


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one product is cut.

    columns: of a tile. stages: steps loaded ahead. overlap: steps of the next tile that are issued
    before a tile is stored; 0 stores first.
    """

    columns: int = 256
    stages: int = 4
    overlap: int = 1


@struct.dataclass
class Tiles:
    """Which rows each row tile holds. One table serves forward, dlhs and drhs of a routing.

    rows_E: as given. end_E: row after each group. expert_P: group of a tile, E for rows past the
    last group. start_P, end_P: rows of that group. first_P, next_P: its first tile and the one
    after its last; next_P[-1] is the number of tiles.
    """

    rows_E: jax.Array
    end_E: jax.Array
    expert_P: jax.Array
    start_P: jax.Array
    end_P: jax.Array
    first_P: jax.Array
    next_P: jax.Array


def lay_tiles(rows_E: jax.Array, *, n_rows: int) -> Tiles:
    """The table, by comparing and reducing alone: two fused XLA kernels, where a cumulative sum and
    a binary search are dozens.
    """
    E = rows_E.shape[0]
    P = n_rows // ROWS + E + 1
    rows_E = rows_E.astype(jnp.int32)
    upto_EE = jnp.arange(E)[None, :] <= jnp.arange(E)[:, None]
    tiles_E = lax.div(rows_E + (ROWS - 1), ROWS)
    end_E = jnp.where(upto_EE, rows_E[None, :], 0).sum(axis=1)
    next_E = jnp.where(upto_EE, tiles_E[None, :], 0).sum(axis=1)
    total = next_E[-1] + lax.div(n_rows - end_E[-1] + (ROWS - 1), ROWS)
    done_PE = next_E[None, :] <= jnp.arange(P, dtype=jnp.int32)[:, None]
    return Tiles(
        rows_E=rows_E,
        end_E=end_E,
        expert_P=done_PE.astype(jnp.int32).sum(axis=1),
        start_P=jnp.where(done_PE, end_E[None, :], 0).max(axis=1),
        end_P=jnp.where(done_PE, n_rows, end_E[None, :]).min(axis=1),
        first_P=jnp.where(done_PE, next_E[None, :], 0).max(axis=1),
        next_P=jnp.where(done_PE, total, next_E[None, :]).min(axis=1),
    )


def refuses(x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array) -> str | None:
    """Why the kernel cannot run on these shapes and dtypes anywhere, or None."""
    if x_RD.dtype != jnp.bfloat16 or w_EDF.dtype != jnp.bfloat16:
        return f"rows are {x_RD.dtype}, matrices {w_EDF.dtype}, both must be bfloat16"
    D, F = w_EDF.shape[1:]
    # A result 64 wide came back as zeros (H100, jax 0.11.2; right in the interpreter), 128, 192 and
    # 320 are right. Both D and F are the width of a result, one forward, one backward.
    if min(D, F) < 2 * STEP or D % STEP or F % STEP:
        return f"matrices are {D} x {F}, both sides must be multiples of {STEP} from {2 * STEP} on"
    if x_RD.shape[0] % 8 or not x_RD.shape[0]:
        return f"there are {x_RD.shape[0]} rows, which must be a multiple of 8"
    return None


def grouped_matmul(
    x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array, *, interpret: Any = None
) -> jax.Array:
    """y[R, F], as `glm45_jax.kernels.grouped_matmul`; rows past sum(rows_E) give zeros and get
    zeros.

    bfloat16 in and out, float32 sums. Deterministic, backward too. A NaN in a row of the gradient
    of y reaches dw of the groups beside its own as well; past the last group it reaches none.
    """
    return _product(x_RD, w_EDF, lay_tiles(rows_E, n_rows=x_RD.shape[0]), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x_RD, w_EDF, tiles: Tiles, interpret):
    return rows_by_matrix(x_RD, w_EDF, tiles, interpret=interpret)


def _product_fwd(x_RD, w_EDF, tiles: Tiles, interpret):
    return _product(x_RD, w_EDF, tiles, interpret), (x_RD, w_EDF, tiles)


def _product_bwd(interpret, saved, g_RF):
    x_RD, w_EDF, tiles = saved
    dx_RD = rows_by_matrix(g_RF, w_EDF, tiles, transposed=True, interpret=interpret)
    return dx_RD, rows_by_rows(x_RD, g_RF, tiles, interpret=interpret), None


_product.defvjp(_product_fwd, _product_bwd)


def plan_for(columns: int) -> Plan:
    """256 columns a tile where there are more than 128: 48 KB a stage, four of them fit."""
    return Plan(256, 4) if columns > 128 else Plan(128, 6)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Stages between the producer and the consumers: step `i` of a CTA lies in slot i % stages."""

    stages: int
    full: Any
    empty: Any

    def slot(self, i):
        return lax.rem(i, jnp.int32(self.stages))

    def claim(self, i):
        """Producer: waits until both consumers have left the slot of step i."""

        @pl.when(i >= self.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[self.slot(i)])

        return self.slot(i)

    def wait(self, i):
        """Consumer: waits until step i is loaded."""
        plgpu.barrier_wait(self.full.at[self.slot(i)])
        return self.slot(i)

    def release(self, i):
        plgpu.barrier_arrive(self.empty.at[self.slot(i)])

    def drain(self, n):
        """Producer, after n steps: waits until the last of them have been read."""
        for back in range(self.stages, 0, -1):

            @pl.when(n >= back)
            def _(back=back):
                plgpu.barrier_wait(self.empty.at[self.slot(n - back)])


def _tiling(rows: int) -> dict[str, Any]:
    tile: Any = plgpu.TilingTransform  # their base class says that they are abstract
    swizzle: Any = plgpu.SwizzleTransform
    return {"transforms": (tile((rows, STEP)), swizzle(128))}


def _two_views(n: int, interpret: Any) -> Any:
    """SMEM of n blocks of 64 x 64, tiled by 8 rows for wgmma, and the same bytes row by row.

    TMA takes any row only of the second: a tiled block wants rows that are multiples of 8. The
    interpreter knows no shared bytes; it gets one view and needs no more.
    """
    blocks = plgpu.SMEM((n, HALF, STEP), jnp.bfloat16, **_tiling(8))
    if interpret:
        return blocks
    return plgpu.RefUnion(blocks, plgpu.SMEM((n * HALF, STEP), jnp.bfloat16, **_tiling(1)))


def _scratch(plan: Plan, rhs: tuple[int, int], interpret: Any) -> dict[str, Any]:
    return {
        "lhs": _two_views(2 * plan.stages, interpret),
        "rhs": plgpu.SMEM((plan.stages, *rhs), jnp.bfloat16, **_tiling(8)),
        "out": _two_views(2 * SLOTS, interpret),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=plan.stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
    }


def _views(refs: Any, interpret: Any) -> tuple[Any, Any]:
    """(blocks, function from block, first row and number of rows to the bytes TMA copies)."""
    if interpret:
        return refs, lambda block, row, n: refs.at[block, pl.ds(row, n)]
    blocks, flat = refs
    return blocks, lambda block, row, n: flat.at[pl.ds(block * HALF + row, n)]


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The persistent CTAs: CTA c has tiles c, c + ctas, ..."""

    interpret: Any

    @property
    def ctas(self) -> int:
        return 2 if self.interpret else CTAS

    def tiles(self, total):
        """Tiles of this CTA, of `total`."""
        return lax.div(total - self.tile(0) + (self.ctas - 1), jnp.int32(self.ctas))

    def tile(self, j):
        """Its j-th."""
        return lax.axis_index("cta") + j * self.ctas

    def call(self, body: Any, out: jax.ShapeDtypeStruct, scratch: dict[str, Any]) -> Any:
        """The kernel, to be called with its arrays."""
        return plgpu.kernel(
            body,
            out_type=out,
            scratch_types=scratch,
            grid=(self.ctas,),
            grid_names=("cta",),
            num_threads=3,
            thread_name="wg",
            interpret=self.interpret,
        )


@struct.dataclass
class _Place:
    """Where a tile goes: first row and column, rows that count, whether they are zeros, the matrix
    where there are several.
    """

    row: Any
    column: Any
    rows: Any
    zeros: Any
    matrix: Any


def _store(values: Any, place: _Place, blocks: Any, bytes_of: Any, target: Any) -> None:
    """Writes this consumer's 64 rows in chunks of 64 columns, by TMA; of a short group just its
    rows.
    """
    wg = lax.axis_index("wg")
    if target.ndim == 3:
        target = target.at[place.matrix]
    valid = jnp.clip(place.rows - wg * HALF, 0, HALF)
    row = place.row + wg * HALF
    for c in range(values.shape[1] // HALF):
        block = wg * SLOTS + c % SLOTS
        columns = pl.ds(pl.multiple_of(place.column + c * HALF, HALF), HALF)
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        blocks[block] = values[:, c * HALF : (c + 1) * HALF]

        # Not by a select of the sums: ptxas then takes them for read while wgmma runs (C7514) and
        # waits after every step.
        @pl.when(place.zeros)
        def _(block=block):
            blocks[block] = jnp.zeros((HALF, HALF), jnp.bfloat16)

        plgpu.commit_smem()

        @pl.when(valid == HALF)
        def _(block=block, columns=columns):
            to = target.at[pl.ds(row, HALF), columns]
            plgpu.copy_smem_to_gmem(bytes_of(block, 0, HALF), to, commit_group=False)

        @pl.when(valid < HALF)
        def _(block=block, columns=columns):
            done = jnp.int32(0)
            for n in (32, 16, 8, 4, 2, 1):
                # TMA shapes are static: the set bits of `valid`, largest first.
                @pl.when((valid & n) != 0)
                def _(n=n, done=done):
                    to = target.at[pl.ds(row + done, n), columns]
                    plgpu.copy_smem_to_gmem(bytes_of(block, done, n), to, commit_group=False)

                done = done + (valid & n)

        plgpu.commit_smem_to_gmem_group()


def _consume(plan: Plan, ring: _Ring, n_tiles: Any, locate: Any, multiply: Any, store: Any) -> None:
    """The loop of a consumer over its tiles.

    locate(j) -> (steps, place, context). multiply(acc, slot, k, context) issues the wgmma of one
    step. store(values, place) writes bfloat16 values.
    """

    def tile(j, carry):
        i, before, values = carry
        steps, place, context = locate(j)

        def accumulate(acc):
            for k in range(plan.overlap):
                multiply(acc, ring.wait(i + k), jnp.int32(k), context)
            if plan.overlap:

                @pl.when(j > 0)
                def _():
                    store(values, before)

            for k in range(plan.overlap - 1):
                if k == 0:
                    plgpu.wgmma_wait(1)
                ring.release(i + k)

            def step(k, _):
                multiply(acc, ring.wait(i + k), k, context)
                plgpu.wgmma_wait(1)
                if plan.overlap:
                    ring.release(i + k - 1)
                else:
                    pl.when(k > 0)(lambda: ring.release(i + k - 1))

            lax.fori_loop(jnp.int32(plan.overlap), steps, step, None)
            return acc[...]

        acc = pl.run_scoped(accumulate, plgpu.ACC((HALF, plan.columns)))
        ring.release(i + steps - 1)
        values = acc.astype(jnp.bfloat16)
        if not plan.overlap:
            store(values, place)
        return i + steps, place, values

    nothing = plgpu.layout_cast(jnp.zeros((HALF, plan.columns), jnp.bfloat16), plgpu.Layout.WGMMA)
    zero = jnp.int32(0)
    start = zero, _Place(zero, zero, zero, zero > 0, zero), nothing
    _, place, values = lax.fori_loop(zero, n_tiles, tile, start)
    if plan.overlap:

        @pl.when(n_tiles > 0)
        def _():
            store(values, place)

    plgpu.wait_smem_to_gmem(0)


def rows_by_matrix(
    x_RK: jax.Array,
    w_EDF: jax.Array,
    tiles: Tiles,
    *,
    transposed: bool = False,
    plan: Plan | None = None,
    interpret: Any = None,
) -> jax.Array:
    """x[R, D] · w[E, D, F] -> [R, F], or transposed x[R, F] · w[E, D, F] -> [R, D].

    The last tile of a group is shifted back to end where the group ends: rows that two tiles hold
    are written twice, with the same bits. Only a group of less than a tile is stored row by row.
    """
    R, K = x_RK.shape
    E, N = w_EDF.shape[0], w_EDF.shape[1 if transposed else 2]
    plan = plan or plan_for(N)
    k_steps, n_tiles = pl.cdiv(K, STEP), pl.cdiv(N, plan.columns)
    plan = dataclasses.replace(plan, overlap=min(plan.overlap, k_steps))
    least, grid = max(1, plan.overlap), _Grid(interpret)
    last = tiles.next_P.shape[0] - 1

    def body(x, w, expert_P, start_P, end_P, first_P, next_P, y, *, lhs, rhs, out, full, empty):
        ring = _Ring(plan.stages, full, empty)
        lhs_blocks, lhs_bytes = _views(lhs, interpret)
        out_blocks, out_bytes = _views(out, interpret)
        wg = lax.axis_index("wg")
        mine = grid.tiles(next_P[last] * n_tiles)

        def locate(j):
            t = grid.tile(j)
            p = lax.div(t, jnp.int32(n_tiles))
            expert, start, end, first = expert_P[p], start_P[p], end_P[p], first_P[p]
            count, within = next_P[p] - first, t - first * n_tiles
            row = start + lax.rem(within, count) * ROWS  # rows fastest: they share the matrix
            row = jnp.maximum(jnp.minimum(row, end - ROWS), start)
            column, past = lax.div(within, count) * plan.columns, expert == E
            place = _Place(row, column, end - row, past, jnp.minimum(expert, E - 1))
            steps = jnp.where(past, jnp.int32(least), jnp.int32(k_steps))
            return steps, place, None

        @pl.when(wg == PRODUCER)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def tile(j, i):
                steps, place, _ = locate(j)
                columns = pl.ds(pl.multiple_of(place.column, plan.columns), plan.columns)

                def load(k, i):
                    slot = ring.claim(i)
                    inner = pl.ds(pl.multiple_of(k * STEP, STEP), STEP)
                    for half in range(2):
                        plgpu.copy_gmem_to_smem(
                            x.at[pl.ds(place.row + half * HALF, HALF), inner],
                            lhs_bytes(slot * 2 + half, 0, HALF),
                            full.at[slot],
                        )
                    index = (columns, inner) if transposed else (inner, columns)
                    plgpu.copy_gmem_to_smem(w.at[place.matrix, *index], rhs.at[slot], full.at[slot])
                    return i + 1

                return lax.fori_loop(jnp.int32(0), steps, load, i)

            ring.drain(lax.fori_loop(jnp.int32(0), mine, tile, jnp.int32(0)))

        @pl.when(wg != PRODUCER)
        def _():
            plgpu.set_max_registers(232, action="increase")

            def multiply(acc, slot, k, context):
                b = rhs.at[slot]
                plgpu.wgmma(
                    acc, lhs_blocks.at[slot * 2 + wg], b.transpose((1, 0)) if transposed else b
                )

            store = functools.partial(_store, blocks=out_blocks, bytes_of=out_bytes, target=y)
            _consume(plan, ring, mine, locate, multiply, store)

    rhs = (plan.columns, STEP) if transposed else (STEP, plan.columns)
    out = jax.ShapeDtypeStruct((R, N), x_RK.dtype)
    table = tiles.expert_P, tiles.start_P, tiles.end_P, tiles.first_P, tiles.next_P
    return grid.call(body, out, _scratch(plan, rhs, interpret))(x_RK, w_EDF, *table)


@struct.dataclass
class _GroupContext:
    """Of a drhs tile: its group's rows [start, end), the row its first step begins at, all rows
    that count.
    """

    base: Any
    start: Any
    end: Any
    total: Any

    def mask(self, ref, k, *, rhs: bool):
        """Zeros the rows of step k in shared memory that are not of the group.

        Of dy (rhs) only where they may hold anything at all: past the last group, or no group.
        Both consumers then write the same bits.
        """
        low = self.base + k * STEP
        if rhs:
            ragged = (low + STEP > self.total) | (self.start == self.end)
        else:
            ragged = (low < self.start) | (low + STEP > self.end)

        @pl.when(ragged)
        def _():
            layout = plgpu.Layout.WGMMA
            row = low + plgpu.broadcasted_iota(jnp.int32, (STEP, HALF), 0, layout=layout)
            kept = (row >= self.start) & (row < self.end)
            for c in range(0, ref.shape[1], HALF):  # by 64 columns: registers are short here
                part = ref.at[:, c : c + HALF]
                part[...] = jnp.where(kept, plgpu.load(part, layout=layout), jnp.bfloat16(0))
            plgpu.commit_smem()


def rows_by_rows(
    x_RD: jax.Array,
    g_RF: jax.Array,
    tiles: Tiles,
    *,
    plan: Plan | None = None,
    interpret: Any = None,
) -> jax.Array:
    """dw[E, D, F]: for each group, its rows of x transposed times its rows of g; zeros for an empty
    one.

    Steps of 64 rows begin at a multiple of 8, so the first and the last hold rows of neighbours:
    those of x are zeroed in shared memory.
    """
    D, F, E = x_RD.shape[1], g_RF.shape[1], tiles.rows_E.shape[0]
    plan = plan or plan_for(F)
    d_tiles, f_tiles = pl.cdiv(D, ROWS), pl.cdiv(F, plan.columns)
    least, grid = max(1, plan.overlap), _Grid(interpret)

    def body(x, g, rows_E, end_E, dw, *, lhs, rhs, out, full, empty):
        ring = _Ring(plan.stages, full, empty)
        lhs_blocks = _views(lhs, interpret)[0]
        out_blocks, out_bytes = _views(out, interpret)
        wg = lax.axis_index("wg")
        mine = grid.tiles(jnp.int32(E * d_tiles * f_tiles))

        def locate(j):
            t = grid.tile(j)
            expert, within = lax.div(t, d_tiles * f_tiles), lax.rem(t, d_tiles * f_tiles)
            end = end_E[expert]
            start = end - rows_E[expert]
            base = pl.multiple_of(lax.div(start, 8) * 8, 8)
            steps = jnp.maximum(lax.div(end - base + (STEP - 1), STEP), least)
            d, f = lax.rem(within, d_tiles), lax.div(within, d_tiles)
            place = _Place(d * ROWS, f * plan.columns, D - d * ROWS, expert < 0, expert)
            return steps, place, _GroupContext(base, start, end, end_E[E - 1])

        @pl.when(wg == PRODUCER)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def tile(j, i):
                steps, place, context = locate(j)
                columns = pl.ds(pl.multiple_of(place.column, plan.columns), plan.columns)

                def load(k, i):
                    slot = ring.claim(i)
                    rows = pl.ds(pl.multiple_of(context.base + k * STEP, 8), STEP)
                    for half in range(2):
                        inner = pl.ds(pl.multiple_of(place.row + half * HALF, HALF), HALF)
                        plgpu.copy_gmem_to_smem(
                            x.at[rows, inner], lhs_blocks.at[slot * 2 + half], full.at[slot]
                        )
                    plgpu.copy_gmem_to_smem(g.at[rows, columns], rhs.at[slot], full.at[slot])
                    return i + 1

                return lax.fori_loop(jnp.int32(0), steps, load, i)

            ring.drain(lax.fori_loop(jnp.int32(0), mine, tile, jnp.int32(0)))

        @pl.when(wg != PRODUCER)
        def _():
            plgpu.set_max_registers(232, action="increase")

            def multiply(acc, slot, k, context):
                a = lhs_blocks.at[slot * 2 + wg]
                context.mask(a, k, rhs=False)
                context.mask(rhs.at[slot], k, rhs=True)
                plgpu.wgmma(acc, a.transpose((1, 0)), rhs.at[slot])

            store = functools.partial(_store, blocks=out_blocks, bytes_of=out_bytes, target=dw)
            _consume(plan, ring, mine, locate, multiply, store)

    out = jax.ShapeDtypeStruct((E, D, F), x_RD.dtype)
    scratch = _scratch(plan, (STEP, plan.columns), interpret)
    return grid.call(body, out, scratch)(x_RD, g_RF, tiles.rows_E, tiles.end_E)
