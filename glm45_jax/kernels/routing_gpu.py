"""The choice of experts, and rows taken by number, on Hopper in Pallas Mosaic GPU.

`top_k` reads the choices of 64 tokens into registers once and takes their maxima one after another;
`take_rows` copies rows of a matrix, several under way at a time. No sum is in either: results are
those of `lax.top_k` and of an index, bit for bit. Letters: M E A R D.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from glm45_jax.kernels import hopper
from glm45_jax.kernels.dispatch import not_hopper
from glm45_jax.kernels.hopper import HALF

THREADS = 128
MOST_EXPERTS = 256  # 64 x 256 choices and their places are 256 registers a thread: already spilled
VECTOR = 16  # bytes that a thread reads at once


@dataclasses.dataclass(frozen=True)
class Rows:
    """Sizes that do not change what `take_rows` gives. block: rows of one block; at_once: of them
    read before the first is written.
    """

    block: int = 32
    at_once: int = 4


def refuses_top_k(choice_ME: jax.Array | jax.ShapeDtypeStruct, A: int) -> str | None:
    """Why `top_k` cannot run there, or None."""
    if why := not_hopper():
        return why
    E = choice_ME.shape[1]
    if E % 8 or E > MOST_EXPERTS:
        return f"{E} experts are not a multiple of 8 up to {MOST_EXPERTS}"
    return f"top_k {A} is above {E} experts" if A > E else None


def top_k(choice_ME: jax.Array, A: int, *, interpret: bool = False) -> jax.Array:
    """The A largest of each row, largest first, of equals the first: their places, int32 [M, A].

    choice_ME: float32, E a multiple of 8. As `lax.top_k(choice_ME, A)[1]`, which is for any A and
    sorts; but zeros of both signs are equal here, and so are NaN and infinity.
    """
    M, E = choice_ME.shape
    tiles = pl.cdiv(M, HALF)
    choice_ME = choice_ME.astype(jnp.float32)
    choice_ME = jnp.where(jnp.isnan(choice_ME), jnp.inf, choice_ME)  # NaN equals nothing
    choice_ME = jnp.pad(choice_ME, ((0, tiles * HALF - M), (0, 0)))

    def kernel(choice_ref, out_ref):
        rows = pl.ds(lax.axis_index("tile") * HALF, HALF)
        value = plgpu.load(choice_ref.at[rows], layout=plgpu.Layout.WGMMA, optimized=False)
        # E - place: the largest of equals is the first, and none that was taken is above 0.
        left = (E - hopper.index((HALF, E), 1)).astype(jnp.float32)
        for a in range(A):
            equal = value == hopper.across(value.max(axis=1), E)
            found = jnp.where(equal, left, 0.0).max(axis=1)
            out_ref.at[a, rows][...] = E - found.astype(jnp.int32)
            taken = left == hopper.across(found, E)
            value, left = jnp.where(taken, -jnp.inf, value), jnp.where(taken, 0.0, left)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((A, tiles * HALF), jnp.int32),
        grid=(tiles,),
        grid_names=("tile",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(choice_ME).T[:M]


def refuses_rows(x_MD: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why `take_rows` cannot run there, or None."""
    if why := not_hopper():
        return why
    whole = THREADS * VECTOR // jnp.dtype(x_MD.dtype).itemsize
    D = x_MD.shape[1]
    return f"rows of {D} are not whole steps of {whole}" if D % whole else None


def take_rows(
    x_MD: jax.Array,
    from_R: jax.Array,
    scale_R: jax.Array | None = None,
    *,
    dtype: jnp.dtype | None = None,
    rows: Rows | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x_MD[from_R], [R, D] in `dtype` (of x); with `scale_R` each row times its number, in float32.

    from_R: int32, each below M. Bytes: R rows read and written.
    """
    D, R, sizes = x_MD.shape[1], from_R.shape[0], rows or Rows()
    dtype = jnp.dtype(dtype or x_MD.dtype)
    blocks = pl.cdiv(R, sizes.block)
    vector = VECTOR // x_MD.dtype.itemsize
    layout = plgpu.Layout.WG_STRIDED((D,), vec_size=vector)

    def kernel(x_ref, from_ref, scale_ref, out_ref):
        first = lax.axis_index("block") * sizes.block

        def some(step, carry):
            # The last block ends at R: its first rows are written twice, alike.
            at = jnp.minimum(first + step * sizes.at_once, R - sizes.at_once)
            found = []
            for i in range(sizes.at_once):
                row = plgpu.load(x_ref.at[from_ref[at + i]], layout=layout, optimized=False)
                found.append(row)
            for i, row in enumerate(found):
                if scale_ref is not None:
                    row = row.astype(jnp.float32) * scale_ref[at + i]
                out_ref.at[at + i][...] = row.astype(dtype)
            return carry

        lax.fori_loop(0, sizes.block // sizes.at_once, some, 0)

    if R < sizes.at_once:
        raise ValueError(f"{R} rows are fewer than {sizes.at_once} at once")
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((R, D), dtype),
        grid=(blocks,),
        grid_names=("block",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(x_MD, from_R.astype(jnp.int32), scale_R)
