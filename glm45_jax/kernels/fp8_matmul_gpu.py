"""Products of FP8 rows and FP8 matrices with block scales in Pallas Mosaic GPU for Hopper: dense
and grouped by expert. Letters: M R rows, I inputs, O outputs, E experts; P Q blocks of outputs and
inputs; S splits of the inputs.

Persistent CTAs of two or three consumer warpgroups and one producer, as in grouped_matmul_gpu.py.
Tensor cores sum one block of 128 inputs; its sum enters the float32 total times both scales. Few
rows, as in decoding, make tiles of 64 rows whose columns the consumers share: the weights stream
past. Where they are too few columns to keep all CTAs loading, CTAs share the inputs and XLA sums
their parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm45_jax.kernels import fp8, fp8_rows_gpu
from glm45_jax.kernels.fp8 import Fp8
from glm45_jax.kernels.hopper import tiling
from glm45_jax.kernels.row_tiles_gpu import (
    CTAS,
    HALF,
    ROWS,
    Grid,
    Place,
    Ring,
    Tiles,
    lay_bands,
    lay_tiles,
    load_rows,
    store_rows,
    tile_rows,
    two_views,
    views,
    walk_tiles,
)
from glm45_jax.kernels.tuning import tuned

STEP = 128  # of the inputs: one atom of shared memory, one block of scales
COLUMNS = 128  # of a tile: one block of scales
SPARE = 32  # scales of a step beyond its rows: TMA starts at every fourth number alone (H100)
MANY = 192  # rows of a tile, at most: its columns are read from L2 a third less often
AMPLE = 4096  # rows of a dense product, from which on its tiles are of MANY (timed with 8,192)
E4M3 = jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one product is cut. rows: of a tile, 64, 128 or 192. stages: steps loaded ahead. splits:
    parts of the inputs, each of which leaves float32 sums of its own. band: rows of a dense product
    that meet all columns before the next: they stay in L2.
    """

    rows: int = HALF
    stages: int = 8
    splits: int = 1
    band: int = 2048

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply: each has 64 rows of a tile, or two share its columns."""
        return max(2, self.rows // HALF)

    @property
    def part(self) -> int:
        """Columns of a consumer."""
        return COLUMNS // 2 if self.rows == HALF else COLUMNS


def plan_for(rows: int, splits: int = 1) -> Plan:
    """24 KB a stage with 64 rows, 32 with 128, 40 with 192, and the scales; 210 KB fit beside the
    output.
    """
    stages, band = {HALF: (8, 2048), ROWS: (6, 2048), MANY: (4, 11 * MANY)}[rows]
    return Plan(rows, stages, splits, band)


def dense_plan(n_rows: int, inputs: int, columns: Sequence[int]) -> Plan:
    """Of matrices of so many columns each: as many splits as give every CTA a tile, of four steps
    at least.
    """
    rows = HALF if n_rows <= HALF else ROWS if n_rows < AMPLE else MANY
    n_tiles = pl.cdiv(n_rows, rows) * sum(pl.cdiv(c, COLUMNS) for c in columns)
    return plan_for(rows, max(1, min(CTAS // n_tiles, pl.cdiv(inputs, STEP) // 4)))


def refuses(x_RI: jax.Array, w: Fp8) -> str | None:
    """Why the kernels cannot run on these shapes and dtypes anywhere, or None."""
    if x_RI.dtype != jnp.bfloat16:
        return f"rows are {x_RI.dtype}, must be bfloat16"
    O = w.values_OI.shape[-2]
    if O % HALF or O < COLUMNS:
        return f"there are {O} outputs, which must be a multiple of {HALF} from {COLUMNS} on"
    if not x_RI.shape[0]:
        return "there are no rows"
    return None


def matmul(
    x_MI: jax.Array, *ws: Fp8, plan: Plan | None = None, interpret: Any = None
) -> tuple[jax.Array, ...]:
    """y[M, O] in bfloat16 of each weight, as `kernels.fp8_matmul.fp8_matmul`, in one launch."""
    return matmul_quantized(*quantized(x_MI, interpret), *ws, plan=plan, interpret=interpret)


def matmul_quantized(
    q_MI: jax.Array,
    scale_QM: jax.Array,
    *ws: Fp8,
    plan: Plan | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """The same of rows as `quantized` gives them."""
    M, I = q_MI.shape
    columns = [w.values_OI.shape[0] for w in ws]
    plan = plan or tuned("fp8 matmul", dense_plan(M, I, columns), M=M, I=I, O=sum(columns))
    tiles = lay_bands(M, band=plan.band, rows=plan.rows)
    stacks = [jax.tree.map(lambda a: a[None], w) for w in ws]
    ys = rows_by_fp8(q_MI, scale_QM, stacks, tiles, plan, interpret)
    return tuple(y.sum(axis=0).astype(jnp.bfloat16) if y.ndim == 3 else y for y in ys)


def grouped_matmul(
    x_RI: jax.Array,
    w: Fp8,
    rows_E: jax.Array,
    *,
    plan: Plan | None = None,
    interpret: Any = None,
) -> jax.Array:
    """y[R, O] in bfloat16, as `kernels.fp8_matmul.grouped_matmul_fp8`."""
    R, E = x_RI.shape[0], rows_E.shape[0]
    O, I = w.values_OI.shape[1:]
    plan = plan or tuned("fp8 grouped_matmul", plan_for(tile_rows(R, E)), R=R, E=E, I=I, O=O)
    tiles = lay_tiles(rows_E, n_rows=R, rows=plan.rows)
    return rows_by_fp8(*quantized(x_RI, interpret), [w], tiles, plan, interpret)[0]


def quantized(x_RI: jax.Array, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """Rows in FP8 and their scales [Q, R], so that a step's are neighbours; R is filled up to a
    multiple of four, as TMA wants rows of whole 16 bytes.
    """
    if not interpret and fp8_rows_gpu.refuses(x_RI) is None:
        return fp8_rows_gpu.quantize_rows(x_RI)
    q_RI, scale_RQ = fp8.quantize_rows(x_RI)
    return q_RI, jnp.pad(scale_RQ.T, ((0, 0), (0, -x_RI.shape[0] % 4)))


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Tiles of columns of several matrices, one after another. starts: the first tile of each and
    the number of all.
    """

    starts: tuple[int, ...]

    def local(self, tile: Any) -> Any:
        """Its number within its matrix."""
        start = jnp.int32(0)
        for s in self.starts[1:-1]:
            start = jnp.where(tile >= s, jnp.int32(s), start)
        return tile - start

    def each(self, tile: Any, do: Any) -> None:
        """do(i) for the matrix i of the tile."""
        if len(self.starts) == 2:
            do(0)
            return
        for i, (low, high) in enumerate(zip(self.starts, self.starts[1:], strict=False)):

            @pl.when((tile >= low) & (tile < high))
            def _(i=i):
                do(i)

    def scale(self, refs: Any, matrix: Any, tile: Any, k: Any) -> Any:
        """Of the tile's block of outputs and block k of inputs."""
        found = None
        for ref, low in zip(refs, self.starts, strict=False):
            block = jnp.clip(tile - low, 0, ref.shape[1] - 1)
            here = ref[matrix, block, k]
            found = here if found is None else jnp.where(tile >= low, here, found)
        return found


def rows_by_fp8(
    q_RI: jax.Array,
    scale_QR: jax.Array,
    ws: Sequence[Fp8],
    tiles: Tiles,
    plan: Plan,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """For each weight [E, O, I]: rows of each group times its matrix, or all of them times the only
    one. bfloat16 [R, O], or float32 [S, R, O] of a plan with splits.

    scale_QR: of a multiple of four columns. Tiles as in `grouped_matmul_gpu.rows_by_matrix`.
    """
    R, E, n = q_RI.shape[0], ws[0].values_OI.shape[0], len(ws)
    groups, halves = tiles.rows_E.shape[0], plan.rows // HALF
    k_steps = q_RI.shape[1] // STEP
    k_part = pl.cdiv(k_steps, plan.splits)
    splits = pl.cdiv(k_steps, k_part)
    widths = [w.values_OI.shape[1] for w in ws]
    columns = _Columns((0, *np.cumsum([pl.cdiv(O, COLUMNS) for O in widths]).tolist()))
    n_tiles = columns.starts[-1] * splits
    part, producer = plan.part, plan.consumers
    blocks = COLUMNS // part  # of columns, in a step
    grid = Grid(interpret)
    registers = (40, 232) if producer == 2 else (32, 160)  # 65,536 for all warpgroups
    dtype = jnp.bfloat16 if splits == 1 else jnp.float32

    def body(x, xs, *refs, **mem):
        w, ws = refs[:n], refs[n : 2 * n]
        table, y = refs[2 * n : -1], refs[-1]
        ring = Ring(plan.stages, mem["full"], mem["empty"])
        lhs_blocks, lhs_bytes = views(mem["lhs"], interpret)
        out_blocks, out_bytes = views(mem["out"], interpret)
        rhs, wg = mem["rhs"], lax.axis_index("wg")
        mine, find = walk_tiles(table, grid, rows=plan.rows, n_tiles=n_tiles)

        def locate(j):
            """(first step, steps, place, tile of columns, split)."""
            group, row, left, tile = find(j)
            split, tile = lax.rem(tile, jnp.int32(splits)), lax.div(tile, jnp.int32(splits))
            first_k = split * k_part
            steps = jnp.minimum(jnp.int32(k_part), k_steps - first_k)
            steps = jnp.where(group == groups, jnp.int32(0), steps)
            column = pl.multiple_of(tile * COLUMNS, COLUMNS)
            place = Place(row, column, left, None, jnp.minimum(group, E - 1))
            return first_k, steps, place, tile, split

        @pl.when(wg == producer)
        def _():
            plgpu.set_max_registers(registers[0], action="decrease")

            def tile(j, i):
                first_k, steps, place, tile, _ = locate(j)
                column = columns.local(tile) * COLUMNS

                def load(k, i):
                    slot = ring.claim(i)
                    full = mem["full"].at[slot]
                    k = first_k + k
                    inner = pl.ds(pl.multiple_of(k * STEP, STEP), STEP)
                    load_rows(x, inner, place, lhs_bytes, slot, halves, full)
                    scales = xs.at[k, pl.ds(aligned(place.row), plan.rows + SPARE)]
                    plgpu.copy_gmem_to_smem(scales, mem["scales"].at[slot], full)
                    for c in range(blocks):
                        these = pl.ds(pl.multiple_of(column + c * part, part), part)
                        block = rhs.at[slot * blocks + c]

                        def copy(m, these=these, block=block):
                            from_ = w[m].at[place.matrix, these, inner]
                            plgpu.copy_gmem_to_smem(from_, block, full)

                        columns.each(tile, copy)
                    return i + 1

                return lax.fori_loop(jnp.int32(0), steps, load, i)

            ring.drain(lax.fori_loop(jnp.int32(0), mine, tile, jnp.int32(0)))

        @pl.when(wg != producer)
        def _():
            plgpu.set_max_registers(registers[1], action="increase")

            def tile(j, i):
                first_k, steps, place, tile, split = locate(j)
                own = place.right(wg, part) if halves == 1 else place.lower(wg)

                def step(k, total):
                    # Before the wait, which hides it.
                    w_scale = columns.scale(ws, place.matrix, tile, first_k + k)
                    slot = ring.wait(i + k)
                    a = lhs_blocks.at[slot if halves == 1 else slot * halves + wg]
                    b = rhs.at[slot * 2 + wg if halves == 1 else slot]
                    first = own.row - aligned(place.row)

                    def product(acc):
                        plgpu.wgmma(acc, a, b.transpose((1, 0)))
                        scale_R = plgpu.load(
                            mem["scales"].at[slot, pl.ds(first, HALF)],
                            layout=plgpu.Layout.WGMMA.reduce(1),
                            optimized=False,
                        )
                        return acc[...], scale_R * w_scale

                    sums, scale_R = pl.run_scoped(product, plgpu.ACC((HALF, part)))
                    ring.release(i + k)
                    return total + sums * lax.broadcast_in_dim(scale_R, (HALF, part), [0])

                total = lax.fori_loop(jnp.int32(0), steps, step, _zeros(part)).astype(dtype)
                to = own.replace(matrix=split)
                store_rows((total,), to, out_blocks, out_bytes, (y,), slots=1)
                return i + steps

            lax.fori_loop(jnp.int32(0), mine, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "lhs": two_views(halves * plan.stages, E4M3, interpret),
        "rhs": plgpu.SMEM((blocks * plan.stages, part, STEP), E4M3, **tiling(8, E4M3)),
        "scales": plgpu.SMEM((plan.stages, plan.rows + SPARE), jnp.float32),
        "out": two_views(plan.consumers, dtype, interpret),
        "full": plgpu.Barrier(num_arrivals=halves + blocks + 1, num_barriers=plan.stages),
        "empty": plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=plan.stages),
    }
    # One result for all: with a store for each matrix it compiled for 80 s (jax 0.11.2).
    width = widths[0] if n == 1 else columns.starts[-1] * COLUMNS
    out = jax.ShapeDtypeStruct((R, width) if splits == 1 else (splits, R, width), dtype)
    values, scales = [w.values_OI for w in ws], [w.scales_PQ for w in ws]
    y = grid.call(body, out, scratch, producer + 1)(q_RI, scale_QR, *values, *scales, *tiles.table)
    firsts = [start * COLUMNS for start in columns.starts]
    return tuple(y[..., a : a + O] for a, O in zip(firsts, widths, strict=False))


def aligned(row: Any) -> Any:
    """The row at or before it whose scale TMA can start at; elsewhere it is an illegal
    instruction.
    """
    return pl.multiple_of(lax.div(row, jnp.int32(4)) * 4, 4)


def _zeros(columns: int) -> Any:
    return plgpu.layout_cast(jnp.zeros((HALF, columns), jnp.float32), plgpu.Layout.WGMMA)
