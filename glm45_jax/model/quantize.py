"""A model's weights to FP8 and back: what a rollout engine serves with. Type to know:
`kernels.fp8.Fp8`, which stands in the place of an array.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from glm45_jax.kernels import fp8
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.transformer import Params, specs
from glm45_jax.params import ParamSpec, path_name

# Matrices that stay, besides embeddings: as in the converters of released files (spec 3.2).
KEPT = ("router_DE", "join_2DD", "head_DV")


def quantize(params: Params, cfg: ModelConfig) -> Params:
    """The weights with every linear matrix of attention, MLPs and experts, MTP's too, as `Fp8`;
    embedding, head, router, MTP's join, norms, biases are the arrays that were given.

    On device, one leaf after another; on GPU a leaf needs no memory beside its result. The matrices
    are quantised as they are: of float32 weights, give the bfloat16 that is served. Byte for byte
    `fp8.quantize_blocks` of each matrix [out, in]. Source: spec 3.2.
    """

    def one(path: tuple[Any, ...], spec: ParamSpec, w: jax.Array) -> Any:
        if not is_quantized(path_name(path), spec):
            return w
        return _quantize(w, lead=spec.batch_dims, inputs=_inputs(spec))

    return jax.tree_util.tree_map_with_path(
        one, specs(cfg), params, is_leaf=lambda x: isinstance(x, ParamSpec)
    )


def dequantize(params: Params, dtype: Any) -> Params:
    """The arrays that the `Fp8` weights stand for, in `dtype`; the others as they are."""

    def one(w: Any) -> jax.Array:
        return fp8.to_array(w, dtype) if fp8.is_fp8(w) else w

    return jax.tree.map(one, params, is_leaf=fp8.is_fp8)


def is_quantized(name: str, spec: ParamSpec) -> bool:
    """Whether `quantize` makes the weight of this dotted name an `Fp8`."""
    return spec.kind == "matrix" and name.split(".")[-1] not in KEPT


# Not layer by layer in a loop: XLA then turns the whole leaf in front of it, in bfloat16 (H100, jax
# 0.11.2: 3.7 GB for 2.9 GB of experts; so, 0.4 MB).
@functools.partial(jax.jit, static_argnames=("lead", "inputs"))
def _quantize(w: jax.Array, *, lead: int, inputs: int) -> fp8.Fp8:
    return fp8.to_fp8(w, inputs=inputs, outputs=w.ndim - lead - inputs)


def _inputs(spec: ParamSpec) -> int:
    """How many axes behind the stack's are inputs."""
    size, n = 1, 0
    while size < (spec.fan_in or 0):
        size *= spec.shape[spec.batch_dims + n]
        n += 1
    return n
