"""The choice of experts, and rows of tokens sent to their places, on Hopper in Pallas Mosaic GPU.

`top_k` reads the choices of 64 tokens into registers once and takes their maxima one after another.
`copy_rows` and `put_rows` read a token's row once and write it to all of its places: in expert
order it would be read A times, too far apart for the cache to keep it. Every row is written once:
no atomics, the same bits every time. Letters: M E A R D.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

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
MOST_BYTES = 128 * 1024  # of rows that a block of `copy_rows` holds in shared memory


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Sizes that do not change what `copy_rows` and `put_rows` give. block: tokens of one block;
    at_once: rows of a token whose outputs `put_rows` reads before it writes the first.
    """

    block: int = 4
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


def refuses_places(x_MD: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why `copy_rows` and `put_rows` cannot run there, or None."""
    if why := not_hopper():
        return why
    D = x_MD.shape[1]
    return f"rows of {D} are not a multiple of {THREADS}" if D % THREADS else None


def copy_rows(
    x_MD: jax.Array,
    place_MA: jax.Array,
    *,
    tokens: Tokens | None = None,
    interpret: bool = False,
) -> jax.Array:
    """out_RD[place_MA[m, a]] = x_MD[m], R = M * A, by copies of whole rows that pass no register.

    place_MA: int32, a permutation of 0 to R - 1. D a multiple of THREADS. Bytes: M rows read, R
    written.
    """
    (M, D), A = x_MD.shape, place_MA.shape[1]
    fit = max(1, MOST_BYTES // (D * x_MD.dtype.itemsize))
    block = min((tokens or Tokens()).block, M, fit)

    def kernel(x_ref, place_ref, out_ref, rows_ref, loaded):
        # The last block ends at M: its first tokens are written twice, alike.
        first = jnp.minimum(lax.axis_index("block") * block, M - block)
        inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # else by tiles, of at most 256 columns
        plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(first, block)], rows_ref, loaded, oob_mode=inside)
        places = [place_ref[first * A + i] for i in range(block * A)]
        plgpu.barrier_wait(loaded)
        for i, place in enumerate(places):
            row = rows_ref.at[pl.ds(i // A, 1)]
            plgpu.copy_smem_to_gmem(row, out_ref.at[pl.ds(place, 1)], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M * A, D), x_MD.dtype),
        scratch_types=[plgpu.SMEM((block, D), x_MD.dtype), plgpu.Barrier()],
        grid=(pl.cdiv(M, block),),
        grid_names=("block",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(x_MD, place_MA.astype(jnp.int32).reshape(-1))


def put_rows(
    x_MD: jax.Array,
    place_MA: jax.Array,
    scale_MA: jax.Array | None = None,
    y_RD: jax.Array | None = None,
    *,
    dtype: jnp.dtype | None = None,
    tokens: Tokens | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """(out_RD, dot_MA): out_RD[place_MA[m, a]] = scale_MA[m, a] * x_MD[m] in `dtype` (of x), and
    dot_MA[m, a] = <x_MD[m], y_RD[place_MA[m, a]]>, float32; None without `y_RD`.

    place_MA: int32, a permutation of 0 to R - 1, R = M * A. Without `scale_MA` rows are copied.
    Products and sums in float32. D a multiple of THREADS. Bytes: M rows of x read, R of out
    written, R of y read.
    """
    (M, D), A, sizes = x_MD.shape, place_MA.shape[1], tokens or Tokens()
    block, dtype = min(sizes.block, M), jnp.dtype(dtype or x_MD.dtype)
    layout = _layout(D, x_MD.dtype, dtype, x_MD.dtype if y_RD is None else y_RD.dtype)

    def load(ref, row):
        return plgpu.load(ref.at[row], layout=layout, optimized=False)

    def one(m, x_ref, place_ref, scale_ref, y_ref, out_ref, dot_ref):
        place_A = [place_ref[m * A + a] for a in range(A)]
        scale_A = [None if scale_ref is None else scale_ref[m * A + a] for a in range(A)]
        x_D = load(x_ref, m)
        wide_D = x_D if scale_ref is None and y_ref is None else x_D.astype(jnp.float32)
        for first in range(0, A, sizes.at_once):
            some = range(first, min(first + sizes.at_once, A))
            y_aD = [] if y_ref is None else [load(y_ref, place_A[a]) for a in some]
            for a in some:
                row_D = x_D if scale_A[a] is None else wide_D * scale_A[a]
                out_ref.at[place_A[a]][...] = row_D.astype(dtype)
            for a, y_D in zip(some, y_aD, strict=False):
                dot_ref[m * A + a] = (wide_D * y_D.astype(jnp.float32)).sum()

    def kernel(*refs):
        # The last block ends at M: its first tokens are written twice, alike.
        first = jnp.minimum(lax.axis_index("block") * block, M - block)
        lax.fori_loop(0, block, lambda i, _: one(first + i, *refs), None)

    out = jax.ShapeDtypeStruct((M * A, D), dtype)
    dot = None if y_RD is None else jax.ShapeDtypeStruct((M * A,), jnp.float32)
    run = plgpu.kernel(
        kernel,
        out_type=(out, dot),
        grid=(pl.cdiv(M, block),),
        grid_names=("block",),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    scale_R = None if scale_MA is None else scale_MA.astype(jnp.float32).reshape(-1)
    out_RD, dot_R = run(x_MD, place_MA.astype(jnp.int32).reshape(-1), scale_R, y_RD)
    return out_RD, None if dot_R is None else dot_R.reshape(M, A)


def _layout(D: int, *dtypes: jnp.dtype) -> Any:
    """A row over the threads of a warpgroup, in the widest pieces that a thread reads at once."""
    vector = VECTOR // max(jnp.dtype(dtype).itemsize for dtype in dtypes)
    return plgpu.Layout.WG_STRIDED((D,), vec_size=math.gcd(vector, D // THREADS))
