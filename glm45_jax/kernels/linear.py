"""Products of activations and a model's weights, arrays or FP8: `linear` is what the model calls.
Letters: M rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from glm45_jax.kernels import fp8
from glm45_jax.kernels.dispatch import Implementation, anything, not_hopper, pick
from glm45_jax.kernels.fp8_matmul import fp8_matmul, split_by_partitioner

FEW = 256  # rows up to which reading the weight is all that counts


def linear(spec: str, x: jax.Array, w: Any, *, dtype: Any = None, impl: str = "auto") -> jax.Array:
    """einsum(spec, x, w) with w in the dtype of x; of an `Fp8` weight by `fp8_matmul`.

    spec: its contracted axes are the last of x and the first of w, as those of an `Fp8` are.
    x: [.., inputs], any float. dtype: of the result, that of x if None.
    """
    return linears(x, (spec, w), dtype=dtype, impl=impl)[0]


def linears(
    x: jax.Array, *products: tuple[str, Any], dtype: Any = None, impl: str = "auto"
) -> tuple[jax.Array, ...]:
    """`linear` of each (spec, weight) with the same x. FP8 weights share one launch."""
    if not any(fp8.is_fp8(w) for _, w in products):
        return tuple(pick("linear", IMPLS, impl, s, x, w)(s, x, w, dtype) for s, w in products)
    for spec, w in products:
        _check(spec, x, w)
    inputs = products[0][1].inputs
    rows = x.shape[:-inputs]
    ys = fp8_matmul(x.reshape(math.prod(rows), -1), *(w for _, w in products), impl=impl)
    outs = (w.inner[w.inputs :] for _, w in products)
    ys = ys if dtype is None else tuple(y_MO.astype(dtype) for y_MO in ys)
    return tuple(y_MO.reshape(*rows, *out) for y_MO, out in zip(ys, outs, strict=True))


def _check(spec: str, x: jax.Array, w: Any) -> None:
    if not fp8.is_fp8(w):
        raise ValueError(f"{spec}: an array of {w.dtype} beside FP8 weights; quantise all or none")
    if x.shape[-w.inputs :] != w.inner[: w.inputs] or w.values_OI.ndim != 2:
        raise ValueError(
            f"{spec}: x ends in {x.shape[-w.inputs :]}, the weight takes {w.inner[: w.inputs]}; "
            f"stacked axes {w.shape[: -len(w.inner)]} must be gone, by a scan or an index"
        )


def reference(spec: str, x: jax.Array, w: jax.Array, dtype: Any = None) -> jax.Array:
    """The definition."""
    return jnp.einsum(spec, x, jnp.asarray(w, x.dtype), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def mosaic(spec: str, x: jax.Array, w: jax.Array, dtype: Any = None) -> jax.Array:
    """Of few rows, the Pallas kernel for Hopper (grouped_matmul_gpu.py): it reads the weight where
    it lies. XLA's products copy the slice of a stack first, and of one row and float32 results the
    whole weight in float32.
    """
    from glm45_jax.kernels import grouped_matmul_gpu  # Pallas is imported where it is used

    x_MI, w_IO = _flat(spec, x, w)
    n = _inputs(spec)
    y_MO = grouped_matmul_gpu.few_rows(x_MI, w_IO, dtype=dtype or x.dtype)
    return y_MO.reshape(*x.shape[:-n], *w.shape[n:])


def _mosaic_fwd(spec, x, w, dtype):
    return mosaic(spec, x, w, dtype), (x, w)


def _mosaic_bwd(spec, dtype, saved, g):
    return jax.vjp(functools.partial(reference, spec, dtype=dtype), *saved)[1](g)


mosaic.defvjp(_mosaic_fwd, _mosaic_bwd)


def _mosaic_supports(spec: str, x: jax.Array, w: jax.Array) -> str | None:
    if why := not_hopper():
        return why
    from glm45_jax.kernels import grouped_matmul_gpu

    x_MI, w_IO = jax.eval_shape(functools.partial(_flat, spec), x, w)
    return grouped_matmul_gpu.refuses_few(x_MI, w_IO)


def _mosaic_yields(spec: str, x: jax.Array, w: jax.Array) -> str | None:
    rows = math.prod(x.shape[: -_inputs(spec)])
    return f"more than {FEW} rows" if rows > FEW else split_by_partitioner()


def _flat(spec: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x[M, I] and w[I, O]."""
    n = _inputs(spec)
    rows, I = math.prod(x.shape[:-n]), math.prod(w.shape[:n])
    return x.reshape(rows, I), w.reshape(I, -1)


def _inputs(spec: str) -> int:
    """How many axes are contracted."""
    factors, out = spec.split("->")
    return sum(letter not in out for letter in factors.split(",")[0])


IMPLS = (
    Implementation("mosaic", mosaic, _mosaic_supports, ("gpu",), yields=_mosaic_yields),
    Implementation("einsum", reference, anything, ("cpu", "gpu", "tpu")),
)
