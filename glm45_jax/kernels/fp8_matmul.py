"""Products with FP8 weights: dense and grouped by expert. Letters: M R rows, I inputs, O outputs, E
experts.

Rows are quantised as they come, 1 x 128 along the inputs; a weight has blocks of 128 x 128 (`Fp8`);
sums are float32, each 128 inputs times both scales. For inference: no gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from glm45_jax import sharding
from glm45_jax.kernels import fp8, grouped_matmul
from glm45_jax.kernels.dispatch import Implementation, anything, not_hopper, pick
from glm45_jax.kernels.fp8 import Fp8


def fp8_matmul(x_MI: jax.Array, *ws: Fp8, impl: str = "auto") -> tuple[jax.Array, ...]:
    """y[M, O] for each weight: rows times it, both in FP8 with block scales; the dtype of x.

    Raises: ValueError where a named implementation cannot run on these arguments.
    """
    return pick("fp8_matmul", IMPLS, impl, x_MI, *ws)(x_MI, *ws)


def grouped_matmul_fp8(
    x_RI: jax.Array, w: Fp8, rows_E: jax.Array, *, impl: str = "auto"
) -> jax.Array:
    """y[R, O] with row r times the matrix of its group, as `grouped_matmul`; w: [E, inputs,
    outputs] as `Fp8`. Rows past the last group give zeros.

    Raises: ValueError where a named implementation cannot run on these arguments.
    """
    run = pick("grouped_matmul_fp8", GROUPED_IMPLS, impl, x_RI, w, rows_E)
    return run(x_RI, w, rows_E)


def reference(x_MI: jax.Array, *ws: Fp8) -> tuple[jax.Array, ...]:
    """The definition: both factors as the numbers they stand for, a product in float32."""

    def one(w: Fp8) -> jax.Array:
        w_IO = fp8.to_array(w, jnp.float32).reshape(x_MI.shape[1], -1)
        y_MO = jnp.dot(as_quantized(x_MI), w_IO, precision=jax.lax.Precision.HIGHEST)
        return y_MO.astype(x_MI.dtype)

    return tuple(map(one, ws))


def as_quantized(x_MI: jax.Array) -> jax.Array:
    """Rows as a product with FP8 weights sees them, float32."""
    q_MI, scale_MQ = fp8.quantize_rows(x_MI)
    back_MI = q_MI.astype(jnp.float32) * jnp.repeat(scale_MQ, fp8.BLOCK[1], axis=1)
    return back_MI[:, : x_MI.shape[1]]


def grouped_reference(x_RI: jax.Array, w: Fp8, rows_E: jax.Array) -> jax.Array:
    """The definition, as `reference`."""
    return _grouped(grouped_matmul.reference, x_RI, w, rows_E)


def grouped_blocked(x_RI: jax.Array, w: Fp8, rows_E: jax.Array) -> jax.Array:
    """The same by the blocked form, which is the fast one on a CPU."""
    return _grouped(grouped_matmul.blocked, x_RI, w, rows_E)


def _grouped(matmul, x_RI: jax.Array, w: Fp8, rows_E: jax.Array) -> jax.Array:
    w_EIO = fp8.to_array(w, jnp.float32)
    w_EIO = w_EIO.reshape(w_EIO.shape[0], x_RI.shape[1], -1)
    return matmul(as_quantized(x_RI), w_EIO, rows_E).astype(x_RI.dtype)


def mosaic(x_MI: jax.Array, *ws: Fp8) -> tuple[jax.Array, ...]:
    """The Pallas kernel for Hopper (fp8_matmul_gpu.py), one launch for all weights."""
    from glm45_jax.kernels import fp8_matmul_gpu  # Pallas is imported where it is used

    return fp8_matmul_gpu.matmul(x_MI, *ws)


def grouped_mosaic(x_RI: jax.Array, w: Fp8, rows_E: jax.Array) -> jax.Array:
    """The same of grouped rows."""
    from glm45_jax.kernels import fp8_matmul_gpu

    return fp8_matmul_gpu.grouped_matmul(x_RI, w, rows_E)


def _mosaic_supports(x_MI: jax.Array, *ws: Fp8) -> str | None:
    if why := not_hopper():
        return why
    from glm45_jax.kernels import fp8_matmul_gpu

    return next(filter(None, (fp8_matmul_gpu.refuses(x_MI, w) for w in ws)), None)


def _grouped_mosaic_supports(x_RI: jax.Array, w: Fp8, rows_E: jax.Array) -> str | None:
    return _mosaic_supports(x_RI, w)


def split_by_partitioner(*_: Any) -> str | None:
    """Why "auto" leaves a dense product on a mesh to the partitioner."""
    ambient = sharding.current()
    if ambient is not None and ambient[0].size > 1:
        return f"the partitioner cannot split a kernel over {ambient[0].size} devices"
    return None


IMPLS = (
    Implementation("mosaic", mosaic, _mosaic_supports, ("gpu",), yields=split_by_partitioner),
    Implementation("reference", reference, anything, ("cpu", "gpu", "tpu")),
)
GROUPED_IMPLS = (
    Implementation("mosaic", grouped_mosaic, _grouped_mosaic_supports, ("gpu",)),
    Implementation("blocked", grouped_blocked, anything, ("cpu", "gpu")),
    Implementation("reference", grouped_reference, anything, ("cpu", "gpu", "tpu")),
)
