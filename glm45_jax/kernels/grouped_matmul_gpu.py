"""Grouped matmul in Pallas Mosaic GPU for Hopper: forward, dlhs and drhs. Letters: R E D F; P row
tiles.

Types to know: `Plan`, and `Tiles`, `Turns` of row_tiles_gpu.py. Persistent CTAs of two consumer
warpgroups and one producer; a consumer stores a tile, chunk by chunk, while the tensor cores run
the first steps of its next one. Few last rows of a group are half a tile, of one consumer. Few rows
a group, as in decoding, lie in tiles of 64, whose columns the consumers share: then the matrices
stream past and nothing else counts. Numbers: docs/log.md.
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

from glm45_jax.kernels.grouped_matmul import silu_product_bwd
from glm45_jax.kernels.hopper import tiling
from glm45_jax.kernels.row_tiles_gpu import (
    CTAS,
    HALF,
    PRODUCER,
    ROWS,
    SLOTS,
    Grid,
    Place,
    Ring,
    Tiles,
    consume,
    lay_bands,
    lay_tiles,
    lay_turns,
    load_half,
    load_rows,
    store_rows,
    tile_rows,
    two_views,
    views,
    walk_tiles,
    walk_turns,
)
from glm45_jax.kernels.tuning import tuned

STEP = 64  # of the contracted dimension: 128 bytes, one swizzle atom


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one product is cut.

    columns: of a tile. stages: steps loaded ahead. overlap: first steps of the next tile over which
    the chunks of a tile are stored, some after each step is issued; 0 stores first.
    """

    columns: int = 256
    stages: int = 4
    overlap: int = 4


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


def refuses_gated(
    x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, rows_E: jax.Array
) -> str | None:
    """Why `gated_matmul` cannot run on these, or None."""
    (R, _), E = x_RD.shape, rows_E.shape[0]
    if tile_rows(R, E) == HALF:
        return f"{R} rows of {E} groups lie in tiles of {HALF}"
    return refuses(x_RD, gate_EDF, rows_E) or refuses(x_RD, up_EDF, rows_E)


def refuses_few(x_MI: jax.Array, w_IO: jax.Array) -> str | None:
    """Why `few_rows` cannot run on these, or None."""
    if x_MI.dtype != jnp.bfloat16 or w_IO.dtype != jnp.bfloat16:
        return f"rows are {x_MI.dtype}, the matrix {w_IO.dtype}, both must be bfloat16"
    I, O = w_IO.shape
    if min(I, O) < 2 * STEP or I % STEP or O % STEP:
        return f"the matrix is {I} x {O}, both must be multiples of {STEP} from {2 * STEP} on"
    return None if x_MI.shape[0] else "there are no rows"


def grouped_matmul(
    x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array, *, interpret: Any = None
) -> jax.Array:
    """y[R, F], as `glm45_jax.kernels.grouped_matmul`; rows past sum(rows_E) give zeros and get
    zeros.

    bfloat16 in and out, float32 sums. Deterministic, backward too. A NaN in a row of the gradient
    of y reaches dw of the groups beside its own as well; past the last group it reaches none.
    """
    R, E = x_RD.shape[0], w_EDF.shape[0]
    tiles = lay_tiles(rows_E, n_rows=R, rows=tile_rows(R, E))
    return _product(x_RD, w_EDF, tiles, interpret)


def few_rows(
    x_MI: jax.Array, w_IO: jax.Array, *, dtype: Any = jnp.bfloat16, interpret: Any = None
) -> jax.Array:
    """y[M, O] in `dtype` of some rows and one matrix, both bfloat16; the matrix is read once, as
    memory gives it.

    Where it has too few columns to keep all CTAs loading, they share its rows: parts of the
    contracted dimension are groups of their own, float32, and XLA sums them. No gradient.
    """
    (M, I), O = x_MI.shape, w_IO.shape[1]
    rows = HALF if M <= HALF else ROWS
    plan = plan_for(128, rows)
    n_tiles, steps = pl.cdiv(M, rows) * pl.cdiv(O, plan.columns), I // STEP
    fitting = (s for s in range(1, steps // 4 + 1) if steps % s == 0 and s * n_tiles <= CTAS)
    S = max(fitting, default=1)
    x_RI = x_MI.reshape(M, S, I // S).swapaxes(0, 1).reshape(S * M, I // S)
    y_RO = rows_by_matrix(
        x_RI,
        w_IO.reshape(S, I // S, O),
        lay_bands(S * M, band=M, rows=rows),
        dtype=dtype if S == 1 else jnp.float32,
        plan=plan,
        interpret=interpret,
    )
    return y_RO if S == 1 else y_RO.reshape(S, M, O).sum(axis=0).astype(dtype)


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


def gated_matmul(
    x_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    rows_E: jax.Array,
    *,
    interpret: Any = None,
) -> jax.Array:
    """h[R, F] = silu(x gate) * (x up), as `glm45_jax.kernels.grouped_matmul.gated_matmul`.

    Rows past sum(rows_E) give zeros and get zeros. Backward three kernels and silu's derivative.
    """
    tiles = lay_tiles(rows_E, n_rows=x_RD.shape[0], rows=ROWS)
    return _gated(x_RD, gate_EDF, up_EDF, tiles, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gated(x_RD, gate_EDF, up_EDF, tiles: Tiles, interpret):
    run = functools.partial(rows_by_gate_and_up, keep=False, interpret=interpret)
    return run(x_RD, gate_EDF, up_EDF, tiles)[0]


def _gated_fwd(x_RD, gate_EDF, up_EDF, tiles: Tiles, interpret):
    run = functools.partial(rows_by_gate_and_up, keep=True, interpret=interpret)
    h_RF, *kept = run(x_RD, gate_EDF, up_EDF, tiles)
    return h_RF, (x_RD, gate_EDF, up_EDF, tiles, *kept)


def _gated_bwd(interpret, saved, dh_RF):
    x_RD, gate_EDF, up_EDF, tiles, g_RF, u_RF = saved
    d = silu_product_bwd((g_RF, u_RF), dh_RF)
    dx_RD = rows_by_sum(d, (gate_EDF, up_EDF), tiles, interpret=interpret)
    return dx_RD, *rows_by_all(x_RD, d, tiles, plan=Plan(), interpret=interpret), None


_gated.defvjp(_gated_fwd, _gated_bwd)


def _silu_product(g: jax.Array, u: jax.Array) -> jax.Array:
    """As `grouped_matmul.silu_product`, where there is no sigmoid: -0 where exp(-g) is infinite."""
    g32 = g.astype(jnp.float32)
    return (g32 / (1 + jnp.exp(-g32)) * u.astype(jnp.float32)).astype(g.dtype)


def _gated_first(n: int, g: jax.Array, u: jax.Array) -> jax.Array:
    """Of (silu(g) * u, g, u)."""
    return (g, u)[n - 1] if n else _silu_product(g, u)


def plan_for(columns: int, rows: int = ROWS) -> Plan:
    """256 columns a tile where there are more than 128: 48 KB a stage, four of them fit. With half
    the rows 128: more tiles, which fill the last round of the CTAs, and 24 KB a stage. As many
    steps to store over as a consumer has chunks of 64 columns.
    """
    if rows == HALF:
        return Plan(128, 8, 1)
    return Plan(256, 4, 4) if columns > 128 else Plan(128, 6, 2)


def _scratch(
    plan: Plan, rhs: tuple[int, int], halves: int, blocks: int, out: Any, interpret: Any
) -> dict[str, Any]:
    """halves, blocks: of 64 rows and of matrices, in a stage."""
    half = jnp.bfloat16
    return {
        "lhs": two_views(halves * plan.stages, half, interpret),
        "rhs": plgpu.SMEM((blocks * plan.stages, *rhs), half, **tiling(8, half)),
        "out": two_views(2 * SLOTS, out, interpret),
        "full": plgpu.Barrier(num_arrivals=halves + blocks, num_barriers=plan.stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
    }


@functools.partial(jax.jit, static_argnames=("transposed", "dtype", "plan", "interpret"))
def rows_by_matrix(
    x_RK: jax.Array,
    w_EDF: jax.Array,
    tiles: Tiles,
    *,
    transposed: bool = False,
    dtype: Any = jnp.bfloat16,
    plan: Plan | None = None,
    interpret: Any = None,
) -> jax.Array:
    """x[R, D] · w[E, D, F] -> [R, F], or transposed x[R, F] · w[E, D, F] -> [R, D]; in `dtype`.

    The last tile of a group is shifted back to end where the group ends: rows that two tiles hold
    are written twice, with the same bits. Only a group of less than a tile is stored row by row. Up
    to HALF last rows of a group are half a tile, which one consumer multiplies, see `lay_turns`.
    Jitted: a program traces and lowers (0.5 s) each of its shapes once, however many layers use it.
    """
    K, N = x_RK.shape[1], w_EDF.shape[1 if transposed else 2]
    key = {"K": K, "N": N, "rows": tiles.rows, "transposed": int(transposed)}
    plan = plan or tuned("rows_by_matrix", plan_for(N, tiles.rows), **key)
    how = dict(transposed=transposed, dtype=dtype, plan=plan, interpret=interpret)
    return _rows_by_matrices((x_RK,), (w_EDF,), tiles, **how)[0]


@functools.partial(jax.jit, static_argnames=("interpret",))
def rows_by_sum(
    xs: tuple[jax.Array, ...], ws: tuple[jax.Array, ...], tiles: Tiles, *, interpret: Any = None
) -> jax.Array:
    """The sum of x[R, F] times transposed w[E, D, F] over pairs of one shape each: [R, D]. One long
    product: no part of the sum is rounded or goes through memory.
    """
    plan = plan_for(ws[0].shape[1], tiles.rows)
    return _rows_by_matrices(xs, ws, tiles, transposed=True, plan=plan, interpret=interpret)[0]


@functools.partial(jax.jit, static_argnames=("keep", "interpret"))
def rows_by_gate_and_up(
    x_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    tiles: Tiles,
    *,
    keep: bool,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """h[R, F] = silu(g) * u, of g = x gate and u = x up, rounded; with keep (h, g, u). Tiles of
    ROWS. A tile has 128 columns of each product: rows are loaded once for both.
    """
    ws = gate_EDF, up_EDF
    plan = Plan(overlap=4 if keep else 2)
    return _rows_by_matrices((x_RD,), ws, tiles, keep=keep, plan=plan, interpret=interpret)


def _rows_by_matrices(
    xs: tuple[jax.Array, ...],
    ws: tuple[jax.Array, ...],
    tiles: Tiles,
    *,
    transposed: bool = False,
    dtype: Any = jnp.bfloat16,
    keep: bool = False,
    plan: Plan,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """As many xs as ws: the sum of their products. One x and two ws: as `rows_by_gate_and_up`."""
    (R, K), results = xs[0].shape, len(ws) // len(xs)
    E, N = ws[0].shape[0], ws[0].shape[1 if transposed else 2]
    halves = tiles.rows // HALF
    assert results == 1 or halves == 2, "half tiles have one result"
    width = plan.columns // results  # of a tile, in each result
    part = width // (3 - halves)  # columns of a consumer
    blocks = results * (3 - halves)
    k_steps, n_tiles = pl.cdiv(K, STEP), pl.cdiv(N, width)
    steps_of_all = len(xs) * k_steps
    plan = dataclasses.replace(plan, overlap=min(plan.overlap, steps_of_all))
    least, grid = max(1, plan.overlap), Grid(interpret)
    # Of 128 columns half a tile takes as long as a whole one: it waits for the matrix, docs/log.md.
    halved = halves == 2 and plan.columns > 128
    outs = 3 if keep else 1
    turns = lay_turns(tiles, n_rows=R, n_tiles=n_tiles, ctas=grid.ctas) if halved else tiles

    def body(*refs, lhs, rhs, out, full, empty):
        x, w = refs[: len(xs)], refs[len(xs) : len(xs) + len(ws)]
        table, ys = refs[len(xs) + len(ws) : -outs], refs[-outs:]
        ring = Ring(plan.stages, full, empty)
        lhs_blocks, lhs_bytes = views(lhs, interpret)
        out_blocks, out_bytes = views(out, interpret)
        wg = lax.axis_index("wg")
        mine, find = (
            walk_turns(table, grid)
            if halved
            else walk_tiles(table, grid, rows=tiles.rows, n_tiles=n_tiles)
        )

        def locate(j):
            expert, row, left, tile = find(j)
            past = expert == E
            place = Place(row, tile * width, left, past, jnp.minimum(expert, E - 1))
            steps = jnp.where(past, jnp.int32(least), jnp.int32(steps_of_all))
            return steps, place, None

        @pl.when(wg == PRODUCER)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def tile(j, i):
                steps, place, _ = locate(j)

                def copy(k, slot, x, ws):
                    inner = pl.ds(pl.multiple_of(k * STEP, STEP), STEP)
                    rows = x, inner, place, lhs_bytes, slot, halves, full.at[slot]
                    if halved:
                        half = place.rows <= HALF
                        lax.cond(half, lambda: load_half(*rows), lambda: load_rows(*rows))
                    else:
                        load_rows(*rows)
                    for b in range(blocks):
                        column = place.column + b // results * part
                        columns = pl.ds(pl.multiple_of(column, part), part)
                        index = (columns, inner) if transposed else (inner, columns)
                        w, block = ws[b % results], rhs.at[slot * blocks + b]
                        plgpu.copy_gmem_to_smem(w.at[place.matrix, *index], block, full.at[slot])

                def load(k, i):
                    slot = ring.claim(i)
                    if len(xs) == 1:
                        copy(k, slot, x[0], w)
                        return i + 1
                    for n, pair in enumerate(zip(x, w, strict=True)):

                        @pl.when((k >= n * k_steps) & (k < (n + 1) * k_steps))
                        def _(n=n, pair=pair):
                            copy(k - n * k_steps, slot, pair[0], pair[1:])

                    return i + 1

                return lax.fori_loop(jnp.int32(0), steps, load, i)

            ring.drain(lax.fori_loop(jnp.int32(0), mine, tile, jnp.int32(0)))

        @pl.when(wg != PRODUCER)
        def _():
            plgpu.set_max_registers(232, action="increase")

            def multiply(accs, slot, k, context):
                a = lhs_blocks.at[slot * halves + (wg if halves == 2 else 0)]
                for n, acc in enumerate(accs):
                    b = rhs.at[slot * blocks + (n if halves == 2 else wg)]
                    plgpu.wgmma(acc, a, b.transpose((1, 0)) if transposed else b)

            def share(steps, place):
                """A tile of HALF rows is the first consumer's; the second does what it must."""
                return jnp.where((wg == 1) & (place.rows <= HALF), jnp.int32(least), steps)

            def store(values, place, *part_of):
                own = place.lower(wg) if halves == 2 else place.right(wg, part)
                rows = values, own, out_blocks, out_bytes, ys
                if results == 1:
                    store_rows(*rows, part_of=part_of)
                else:
                    store_rows(*rows, part_of=part_of, choose=_gated_first)

            consume(
                ring,
                mine,
                locate,
                multiply,
                store,
                columns=part,
                overlap=plan.overlap,
                dtype=dtype,
                results=results,
                share=share if halved else None,
            )

    rhs = (part, STEP) if transposed else (STEP, part)
    out = (jax.ShapeDtypeStruct((R, N), dtype),) * outs
    scratch = _scratch(plan, rhs, halves, blocks, dtype, interpret)
    return grid.call(body, out, scratch)(*xs, *ws, *turns.table)


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


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
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
    """
    D, F = x_RD.shape[1], g_RF.shape[1]
    plan = plan or tuned("rows_by_rows", plan_for(F), D=D, F=F)
    return rows_by_all(x_RD, (g_RF,), tiles, plan=plan, interpret=interpret)[0]


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def rows_by_all(
    x_RD: jax.Array,
    gs: tuple[jax.Array, ...],
    tiles: Tiles,
    *,
    plan: Plan,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """`rows_by_rows` of one x and each g, of one shape. The columns of a tile are shared: rows of x
    are loaded once for all.

    Steps of 64 rows begin at a multiple of 8, so the first and the last hold rows of neighbours:
    those of x are zeroed in shared memory.
    """
    D, F, E, results = x_RD.shape[1], gs[0].shape[1], tiles.rows_E.shape[0], len(gs)
    width = plan.columns // results
    # A tile takes as many steps as it is stored over, at least: those that its group does not have
    # multiply zeros.
    overlap = min(plan.overlap, max(1, x_RD.shape[0] // (E * STEP)))
    d_tiles, f_tiles = pl.cdiv(D, ROWS), pl.cdiv(F, width)
    least, grid = max(1, overlap), Grid(interpret)

    def body(x, *refs, lhs, rhs, out, full, empty):
        g, rows_E, end_E, dws = refs[:results], *refs[results : results + 2], refs[results + 2 :]
        ring = Ring(plan.stages, full, empty)
        lhs_blocks = views(lhs, interpret)[0]
        out_blocks, out_bytes = views(out, interpret)
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
            place = Place(d * ROWS, f * width, D - d * ROWS, expert < 0, expert)
            return steps, place, _GroupContext(base, start, end, end_E[E - 1])

        @pl.when(wg == PRODUCER)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def tile(j, i):
                steps, place, context = locate(j)
                columns = pl.ds(pl.multiple_of(place.column, width), width)

                def load(k, i):
                    slot = ring.claim(i)
                    rows = pl.ds(pl.multiple_of(context.base + k * STEP, 8), STEP)
                    for half in range(2):
                        inner = pl.ds(pl.multiple_of(place.row + half * HALF, HALF), HALF)
                        plgpu.copy_gmem_to_smem(
                            x.at[rows, inner], lhs_blocks.at[slot * 2 + half], full.at[slot]
                        )
                    for n in range(results):
                        block = rhs.at[slot * results + n]
                        plgpu.copy_gmem_to_smem(g[n].at[rows, columns], block, full.at[slot])
                    return i + 1

                return lax.fori_loop(jnp.int32(0), steps, load, i)

            ring.drain(lax.fori_loop(jnp.int32(0), mine, tile, jnp.int32(0)))

        @pl.when(wg != PRODUCER)
        def _():
            plgpu.set_max_registers(232, action="increase")

            def multiply(accs, slot, k, context):
                a = lhs_blocks.at[slot * 2 + wg]
                context.mask(a, k, rhs=False)
                for n, acc in enumerate(accs):
                    b = rhs.at[slot * results + n]
                    context.mask(b, k, rhs=True)
                    plgpu.wgmma(acc, a.transpose((1, 0)), b)

            def store(values, place, *part_of):
                own = place.lower(wg)
                store_rows(values, own, out_blocks, out_bytes, dws, part_of=part_of)

            consume(
                ring,
                mine,
                locate,
                multiply,
                store,
                columns=width,
                overlap=overlap,
                dtype=x_RD.dtype,
                results=results,
            )

    out = (jax.ShapeDtypeStruct((E, D, F), x_RD.dtype),) * results
    scratch = _scratch(plan, (STEP, width), 2, results, x_RD.dtype, interpret)
    return grid.call(body, out, scratch)(x_RD, *gs, tiles.rows_E, tiles.end_E)
