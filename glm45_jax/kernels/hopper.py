"""What kernels in Pallas Mosaic GPU share on Hopper: two warpgroups that compute, one that copies
tiles into rings of shared memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

TILE = 128  # rows of a tile
HALF = TILE // 2  # rows of one warpgroup's part
ROW = plgpu.Layout.WGMMA.reduce(1)  # a number a row of an accumulator
BYTES = 128  # of a row in shared memory: one swizzle atom
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # a number a column


def specialise(wg, registers, copies, compute):
    """Warpgroup 2 copies, 0 and 1 compute."""

    @pl.when(wg == 2)
    def _():
        plgpu.set_max_registers(registers[0], action="decrease")
        copies()

    @pl.when(wg < 2)
    def _():
        plgpu.set_max_registers(registers[1], action="increase")
        compute()


def launch(body, out, scratch, *, grid, names, interpret):
    """The kernel as a function: three warpgroups a block, `scratch` is its last argument."""
    out = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[scratch],
        grid=grid,
        grid_names=names,
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def tiles(count, rows, columns, dtype):
    """`count` blocks of shared memory as TMA writes and wgmma reads them."""
    return plgpu.SMEM((count, rows, columns), dtype, **tiling(8, dtype))


def tiling(rows: int, dtype: Any, atom: int = BYTES) -> dict[str, Any]:
    """Keywords of shared memory in tiles of that many rows by one swizzle atom of `atom` bytes."""
    tile: Any = plgpu.TilingTransform  # their base class says that they are abstract
    swizzle: Any = plgpu.SwizzleTransform
    return {"transforms": (tile((rows, atom // jnp.dtype(dtype).itemsize)), swizzle(atom))}


def ring(name, stages, copies=1):
    """Barriers of a ring of tiles: filled by `copies`, freed by both warpgroups."""
    return {
        f"{name}_full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        f"{name}_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }


def drain(mem, names, steps, stages):
    """Waits until the last tile in each place of the rings has been used."""

    def wait(slot):
        for name in names:
            plgpu.barrier_wait(mem[f"{name}_free"].at[slot])

    for slot in range(stages):
        pl.when(steps > slot)(functools.partial(wait, slot))


def copy_halves(ref, smem, barrier, tile, first=0):
    """Starts the copy of a tile's rows, a half for each computing warpgroup, to first and first + 1
    of smem.
    """
    for half in range(2):
        rows = pl.ds(tile * TILE + half * HALF, HALF)
        plgpu.copy_gmem_to_smem(ref.at[rows], smem.at[first + half], barrier)


def vector(ref, row, start, layout):
    """HALF numbers of a row in global memory; None of None."""
    if ref is None:
        return None
    return plgpu.load(ref.at[row, pl.ds(start, HALF)], layout=layout, optimized=False)


def filled(shape, value, layout):
    """float32, of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def across(x, columns):
    """One number a row, repeated along it."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def down(x, rows):
    """One number a column, repeated along it."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def div_rem(x, y):
    """Quotient and remainder of indices, which are not negative."""
    return lax.div(x, y), lax.rem(x, y)


def index(shape, axis):
    """Index of each entry along an axis."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def product(lhs, rhs, interpret=False):
    """lhs @ rhs in float32. The interpreter multiplies no registers."""
    if interpret:
        return jnp.dot(lhs[...], rhs[...], preferred_element_type=jnp.float32)

    def body(ref):
        plgpu.wgmma(ref, lhs, rhs)
        return ref[...]

    return pl.run_scoped(body, plgpu.ACC((lhs.shape[0], rhs.shape[1]), jnp.float32))


def accumulate(acc, lhs, rhs, interpret):
    """acc + lhs @ rhs. The interpreter multiplies no registers and starts from no value."""
    if interpret:
        return acc + jnp.dot(lhs, rhs[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, lhs, rhs))(plgpu.ACC.init(acc))
