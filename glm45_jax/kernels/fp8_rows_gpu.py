"""Rows to FP8 by a kernel for Hopper: read once, written once. Letters: M rows, I inputs, Q blocks
of 128 inputs.

XLA reads the rows twice, for the scales and for the numbers. Here a block of 64 rows and 128 inputs
lies in registers between the two; `BLOCKS` of them are on their way at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm45_jax.kernels.fp8 import BLOCK, E4M3_MAX, ROW_FLOOR
from glm45_jax.kernels.hopper import tiling
from glm45_jax.kernels.row_tiles_gpu import HALF

SIZE = BLOCK[1]
BLOCKS = 8  # of inputs a CTA: 128 KB of rows on their way, 64 KB of results
LEAST = 1024  # rows; fewer, as in decoding, are left to XLA (timed with 8,192)
LAYOUT = plgpu.Layout.WGMMA


def refuses(x_MI: jax.Array) -> str | None:
    """Why the kernel does not run on these rows, or None."""
    M, I = x_MI.shape
    if x_MI.dtype != jnp.bfloat16:
        return f"rows are {x_MI.dtype}, must be bfloat16"
    if M < LEAST or M % HALF or I % SIZE:
        return f"{M} rows of {I} are fewer than {LEAST}, or no whole blocks of {HALF} by {SIZE}"
    return None


def quantize_rows(x_MI: jax.Array, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """As `fp8.quantize_rows`, but scales come as [Q, M].

    Raises: ValueError for rows that `refuses` names.
    """
    if interpret is None and (why := refuses(x_MI)):
        raise ValueError(why)
    return _quantize(x_MI, interpret)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(x_MI, interpret):
    (M, I), half = x_MI.shape, (HALF, SIZE)
    Q = I // SIZE
    n = max(n for n in range(1, BLOCKS + 1) if Q % n == 0)

    def kernel(x_ref, q_ref, scale_ref, x_smem, q_smem, scale_smem, full):
        rows = pl.ds(lax.axis_index("m") * HALF, HALF)
        first = lax.axis_index("q") * n

        def columns(i):
            return pl.ds((first + i) * SIZE, SIZE)

        for i in range(n):
            plgpu.copy_gmem_to_smem(x_ref.at[rows, columns(i)], x_smem.at[i], full.at[i])
        for i in range(n):
            plgpu.barrier_wait(full.at[i])
            x = plgpu.load(x_smem.at[i], layout=LAYOUT, optimized=False).astype(jnp.float32)
            most_M = jnp.max(jnp.abs(x), axis=1)
            scale_M = jnp.maximum(most_M, ROW_FLOOR) * (1 / E4M3_MAX)
            x = x / lax.broadcast_in_dim(scale_M, half, [0])
            q_smem[i] = jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
            scale_smem[i] = scale_M
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[i], q_ref.at[rows, columns(i)])
            plgpu.copy_smem_to_gmem(scale_smem.at[i], scale_ref.at[first + i, rows])
        plgpu.wait_smem_to_gmem(0)

    f8, smem = jnp.float8_e4m3fn, plgpu.SMEM
    run = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((M, I), f8), jax.ShapeDtypeStruct((Q, M), jnp.float32)),
        scratch_types=[
            smem((n, *half), jnp.bfloat16, **tiling(8, jnp.bfloat16)),
            smem((n, *half), f8, **tiling(8, f8)),
            smem((n, HALF), jnp.float32),
            plgpu.Barrier(num_barriers=n),
        ],
        grid=(M // HALF, Q // n),
        grid_names=("m", "q"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return run(x_MI)
