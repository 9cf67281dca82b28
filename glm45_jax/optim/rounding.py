"""Master weights in bfloat16, rounded at random, where memory is small: an optimizer's
`master_dtype`. The default is float32.

A step of a thousandth of a bfloat16 weight would be lost to nearest rounding every time. Rounded up
or down by chance, with the odds of its place between the two, a weight moves as much as it should
in the mean. The chance is a function of a key, the leaf's path and the place in the leaf: a run
that resumes, and one on another mesh, round as the first did, and each device rounds its own shard.
Gradients of such weights are bfloat16 too, those of a micro-batch; what they sum to is float32.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from glm45_jax import params as plan

MasterDtype = Literal["float32", "bfloat16"]
KINDS: tuple[plan.Kind, ...] = ("matrix", "embed")  # norms and biases are few and stay float32
FLOAT32 = ("router_DE",)  # the model reads it in float32: a choice of experts is no place to round
STREAM = 0x5EED  # of a state's key, what rounding is drawn from


def stored(specs: Any, dtype: MasterDtype) -> Any:
    """The plan with the dtypes in which a run keeps its weights."""
    if dtype == "float32":
        return specs

    def one(path: tuple[Any, ...], spec: plan.ParamSpec) -> plan.ParamSpec:
        name = plan.path_name(path).split(".")[-1]
        if spec.kind not in KINDS or name in FLOAT32:
            return spec
        return dataclasses.replace(spec, dtype=jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=plan.is_spec)


def check(specs: Any, dtype: MasterDtype) -> None:
    """Raises ValueError where the plan's weights are not kept as `stored` says."""
    ours, kept = (plan.leaves_with_path(tree) for tree in (specs, stored(specs, dtype)))
    for (path, spec), (_, asked) in zip(ours, kept, strict=True):
        if spec.dtype != asked.dtype:
            raise ValueError(
                f"optim.master_dtype={dtype}, but {path} is {jnp.dtype(spec.dtype).name}: the plan "
                "was made without optim.stored(specs); do that, or use master_dtype=float32"
            )


def moved(weights: Any, updates: Any, lr: jax.Array, key: jax.Array) -> Any:
    """Weights plus `lr` times their updates, each in its dtype; bfloat16 ones rounded at random.

    key: of this step; the same key gives the same bits on any mesh.
    """
    key = jax.random.fold_in(key, STREAM)

    def one(path: tuple[Any, ...], weight: jax.Array, update: jax.Array) -> jax.Array:
        step = lr * update.astype(jnp.float32)
        if weight.dtype != jnp.bfloat16:
            return weight + step.astype(weight.dtype)
        leaf = jax.random.fold_in(key, zlib.crc32(plan.path_name(path).encode()))
        return rounded(weight.astype(jnp.float32) + step, leaf)

    return jax.tree_util.tree_map_with_path(one, weights, updates)


def rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 x as bfloat16: one of its two neighbours, by chance, so that the mean is x.

    What bfloat16 holds exactly stays; what is not finite is cast. Of the 16 bits that are dropped
    the odds of the neighbour further from zero are their value over 2**16: a random number of 16
    bits is added, and its carry decides.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    chance = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = ((bits + chance) >> jnp.uint32(16)).astype(jnp.uint16)
    up_or_down = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), up_or_down, x.astype(jnp.bfloat16))
