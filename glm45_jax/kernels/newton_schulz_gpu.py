"""Batched products of Newton-Schulz in Pallas Mosaic GPU for Hopper. Letters: B matrices, m k n.

One kernel for all of them: scale * (lhs + shift I) @ rhs + diagonal I. Of a symmetric result only
tiles from the diagonal on are computed; each is stored a second time, transposed. Persistent CTAs
of two warpgroups that multiply and one that loads, as in grouped_matmul_gpu.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm45_jax.kernels.hopper import tiling
from glm45_jax.kernels.row_tiles_gpu import (
    CTAS,
    HALF,
    PRODUCER,
    ROWS,
    Grid,
    Place,
    Ring,
    chunks,
    consume,
)
from glm45_jax.kernels.tuning import tuned

STEP = 64  # of the contracted dimension: 128 bytes, one swizzle atom
SLOTS = 2  # blocks on their way to memory, a consumer
DTYPES = (jnp.dtype("bfloat16"), jnp.dtype("float16"))
NARROW = 0.57  # time of a tile of 128 columns, of one of 256 (H100: 560 TFLOP/s against 640)


@dataclasses.dataclass(frozen=True)
class Plan:
    """columns: of a tile, 128 or 256. stages: steps loaded ahead. overlap: first steps of the next
    tile over which a tile is stored.
    """

    columns: int = 256
    stages: int = 4
    overlap: int = 1


def refuses(m: int, n: int) -> str | None:
    """Why the kernel cannot multiply matrices with these sides, or None."""
    if min(m, n) < 2 * STEP or m % STEP or n % STEP:
        return f"matrices are {m} x {n}, both sides must be multiples of {STEP} from {2 * STEP} on"
    return None


def idles(count: int, m: int, n: int) -> str | None:
    """Why most of the device would wait while so many matrices are multiplied, or None. Nobody
    shares the long sum of an inner product, as XLA's kernels do.
    """
    k = min(m, n)
    tiles = count * lay_tiles(k, k, 128, symmetric=True).shape[1]
    return f"{count} of {m} x {n} have {tiles} tiles for {CTAS} CTAs" if tiles < CTAS else None


def lay_tiles(m: int, n: int, columns: int, *, symmetric: bool) -> np.ndarray:
    """int32 [2, tiles]: first row and first column of each tile of one matrix, rows fastest.

    symmetric: tiles of a row begin at the diagonal, so that at most one in a row sticks out.
    """
    rows = np.arange(0, m, ROWS)
    if symmetric:
        pairs = [(r, c) for r in rows for c in range(r, n, columns)]
        pairs.sort(key=lambda pair: (pair[1] - pair[0], pair[0]))
    else:
        pairs = [(r, c) for c in range(0, n, columns) for r in rows]
    return np.array(pairs, np.int32).T


def plan_for(count: int, m: int, n: int, *, symmetric: bool) -> Plan:
    """256 columns a tile, or 128 where these fill the last round of the CTAs so much better."""

    def rounds(columns: int) -> int:
        return -(-count * lay_tiles(m, n, columns, symmetric=symmetric).shape[1] // CTAS)

    narrow = n <= 128 or rounds(128) * NARROW < rounds(256)
    return Plan(128, 6) if narrow else Plan(256, 4)


@functools.partial(
    jax.jit,
    static_argnames=(
        *("symmetric", "lhs_t", "rhs_t", "shifted", "diagonal", "dtype", "plan", "interpret"),
    ),
)
def product(
    lhs: jax.Array,
    rhs: jax.Array,
    scale_B: jax.Array,
    shift_B: jax.Array,
    *,
    symmetric: bool = False,
    lhs_t: bool = False,
    rhs_t: bool = False,
    shifted: bool = False,
    diagonal: float = 0.0,
    dtype: Any = jnp.bfloat16,
    plan: Plan | None = None,
    interpret: Any = None,
) -> jax.Array:
    """scale * (lhs + shift I) @ rhs + diagonal I, in `dtype`, for each matrix of a stack.

    lhs [B, m, k] or, transposed, [B, k, m]; rhs [B, k, n] or [B, n, k]; both of one dtype, float32
    sums. scale_B, shift_B: float32. The shift is rounded with the entries of lhs that it meets.
    symmetric: the product is, and m == n; only its upper half is computed. All sides as `refuses`
    wants them.
    """
    B, m, k = lhs.shape if not lhs_t else (lhs.shape[0], lhs.shape[2], lhs.shape[1])
    n = rhs.shape[1 if rhs_t else 2]
    assert lhs.dtype == rhs.dtype and lhs.dtype in DTYPES, (lhs.dtype, rhs.dtype)
    assert m == n or not (symmetric or diagonal), (m, n)
    assert not (shifted and lhs_t), "the shift meets rows of lhs as they lie"
    key = {"B": B, "m": m, "n": n, "k": k, "symmetric": int(symmetric)}
    plan = plan or tuned("product", plan_for(B, m, n, symmetric=symmetric), **key)
    table = lay_tiles(m, n, plan.columns, symmetric=symmetric)
    n_tiles, k_steps, grid = table.shape[1], k // STEP, Grid(interpret)
    columns = plan.columns

    def body(a_ref, b_ref, scale, shift, row_L, column_L, out_ref, *, a, b, out, full, empty):
        ring = Ring(plan.stages, full, empty)
        wg = lax.axis_index("wg")
        mine, steps = grid.tiles(jnp.int32(B * n_tiles)), jnp.int32(k_steps)

        def locate(j):
            t = grid.tile(j)
            matrix = lax.div(t, jnp.int32(n_tiles))
            within = t - matrix * n_tiles
            return matrix, row_L[within], column_L[within]

        @pl.when(wg == PRODUCER)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def tile(j, i):
                matrix, row, column = locate(j)
                across = pl.ds(pl.multiple_of(column, STEP), columns)

                def load(s, i):
                    slot = ring.claim(i)
                    inner = pl.ds(pl.multiple_of(s * STEP, STEP), STEP)
                    for half in range(2):
                        down = pl.ds(pl.multiple_of(row + half * HALF, HALF), HALF)
                        index = (inner, down) if lhs_t else (down, inner)
                        block = a.at[slot * 2 + half]
                        plgpu.copy_gmem_to_smem(a_ref.at[matrix, *index], block, full.at[slot])
                    index = (across, inner) if rhs_t else (inner, across)
                    plgpu.copy_gmem_to_smem(b_ref.at[matrix, *index], b.at[slot], full.at[slot])
                    return i + 1

                return lax.fori_loop(jnp.int32(0), steps, load, i)

            ring.drain(lax.fori_loop(jnp.int32(0), mine, tile, jnp.int32(0)))

        @pl.when(wg != PRODUCER)
        def _():
            plgpu.set_max_registers(232, action="increase")

            def multiply(accs, slot, s, context):
                block, (row, amount) = a.at[slot * 2 + wg], context
                if shifted:
                    pl.when(s * STEP == row)(functools.partial(_add_diagonal, block, amount))
                part = b.at[slot]
                plgpu.wgmma(
                    accs[0],
                    block.transpose((1, 0)) if lhs_t else block,
                    part.transpose((1, 0)) if rhs_t else part,
                )

            def find(j):
                matrix, row, column = locate(j)
                place = Place(row + wg * HALF, column, None, None, matrix)
                return steps, place, (place.row, shift[matrix] if shifted else None)

            def finish(sums, place, _):
                sums = sums * scale[place.matrix]
                if diagonal:
                    on = _on_diagonal(sums.shape, place.row - place.column)
                    sums = jnp.where(on, sums + diagonal, sums)
                return sums.astype(dtype)

            def store(values, place, *part_of):
                which = chunks(columns // HALF, *part_of)
                _store(values[0], place, out, out_ref, which, symmetric)

            zero = jnp.int32(0)
            consume(
                ring,
                mine,
                find,
                multiply,
                store,
                columns=columns,
                overlap=min(plan.overlap, k_steps),
                dtype=dtype,
                nowhere=Place(zero, zero, None, None, zero),
                finish=finish,
            )

    half = lhs.dtype
    scratch = {
        "a": plgpu.SMEM((2 * plan.stages, HALF, STEP), half, **tiling(8, half)),
        "b": plgpu.SMEM(
            (plan.stages, *((columns, STEP) if rhs_t else (STEP, columns))), half, **tiling(8, half)
        ),
        "out": plgpu.SMEM((2 * SLOTS, HALF, HALF), dtype, **tiling(8, dtype)),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=plan.stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
    }
    out = jax.ShapeDtypeStruct((B, m, n), dtype)
    rows, firsts = jnp.asarray(table[0]), jnp.asarray(table[1])
    return grid.call(body, out, scratch)(lhs, rhs, scale_B, shift_B, rows, firsts)


def _on_diagonal(shape: tuple[int, ...], offset: Any) -> jax.Array:
    """Where column == row + offset."""
    layout = plgpu.Layout.WGMMA
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
    return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout) == row + offset


def _add_diagonal(block: Any, amount: Any) -> None:
    """Adds a number to the diagonal of a square block of shared memory."""
    x = plgpu.load(block, layout=plgpu.Layout.WGMMA)
    more = (x.astype(jnp.float32) + amount).astype(x.dtype)
    block[...] = jnp.where(_on_diagonal(x.shape, jnp.int32(0)), more, x)
    plgpu.commit_smem()


def _store(
    values: Any, place: Place, blocks: Any, target: Any, which: range, symmetric: bool
) -> None:
    """Writes these of a consumer's blocks of 64 columns by TMA; of a symmetric result those from
    the diagonal on, and beyond it their transposes as well.
    """
    wg, row, column = lax.axis_index("wg"), place.row, place.column
    m, n = target.shape[1:]

    def put(value, slot, down, right, wanted, *, transposed):
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        block = blocks.at[wg * SLOTS + slot]

        @pl.when(wanted)
        def _():
            if transposed:
                turned = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
                block.transpose((1, 0))[...] = turned
            else:
                block[...] = value
            plgpu.commit_smem()
            rows = pl.ds(pl.multiple_of(down, HALF), HALF)
            to = target.at[place.matrix, rows, pl.ds(pl.multiple_of(right, HALF), HALF)]
            plgpu.copy_smem_to_gmem(block, to, commit_group=False)

        plgpu.commit_smem_to_gmem_group()

    for c in which:
        value, right = values[:, c * HALF : (c + 1) * HALF], column + c * HALF
        inside = (row < m) & (right < n)
        if symmetric:
            put(value, 0, row, right, inside & (right >= row), transposed=False)
            put(value, 1, right, row, inside & (right > row), transposed=True)
        else:
            put(value, c % SLOTS, row, right, inside, transposed=False)
