"""Routing of gradients by `ParamSpec.kind`, and AdamW.

`by_kind` sends each kind of weight to its own optax transformation; `AdamW` is the value an
experiment holds. States are plain pytrees: moments have the shape of their weight, weights of other
kinds hold `optax.MaskedNode`, and kind "state" holds nothing and never moves. Updates are float32,
whatever the dtype of weights and gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from glm45_jax import params as plan
from glm45_jax.optim import rounding
from glm45_jax.optim.schedules import Cosine, Schedule, Tokens

LearningRate = float | Callable[[jax.Array], Any]
TRAINED: tuple[plan.Kind, ...] = ("matrix", "embed", "norm", "bias")


class AdamState(NamedTuple):
    """Steps taken, first and second moments (float32, shaped like the weights)."""

    step: jax.Array
    m: Any
    v: Any


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW for every trained weight: the baseline of ablations, and for short RL runs."""

    lr: float = 3e-4
    schedule: Schedule = dataclasses.field(default_factory=Cosine)
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_kinds: tuple[plan.Kind, ...] = ("matrix", "embed")
    clip_norm: float | None = 1.0
    master_dtype: rounding.MasterDtype = "float32"  # of the weights, see `rounding`

    def build(self, specs: Any) -> optax.GradientTransformation:
        """Updates for a learning rate of 1; the train step multiplies them by `lr_at`."""
        tx = adamw(
            1.0,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            specs=specs,
            decay_kinds=self.decay_kinds,
        )
        return clipped(tx, self.clip_norm, specs)

    def stored(self, specs: Any) -> Any:
        """The plan with the dtypes in which a run keeps its weights."""
        return rounding.stored(specs, self.master_dtype)

    def lr_at(self, tokens: Tokens) -> jax.Array:
        """Learning rate after this many tokens, float32."""
        return self.lr * self.schedule(tokens)


def adamw(
    lr: LearningRate,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    specs: Any,
    decay_kinds: tuple[plan.Kind, ...] = TRAINED,
) -> optax.GradientTransformation:
    """AdamW over every trained kind; weights of kind "state" get zero updates.

    lr: a number, or a function of the optax step count.
    """
    one = optax.chain(
        scale_by_adam(b1=b1, b2=b2, eps=eps),
        add_decay(weight_decay, specs, decay_kinds),
        optax.scale(-1.0),
    )
    return optax.chain(by_kind(specs, {TRAINED: one}), scale_by_lr(lr))


def by_kind(
    specs: Any, transforms: Mapping[plan.Kind | tuple[plan.Kind, ...], optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Each kind of weight through its own transformation; kind "state" gets zeros.

    transforms: keys are a kind or a tuple of kinds that share one transformation (and one step
    count).
    Raises: ValueError where a trained kind of the plan has no transformation, or has two.
    """
    group_of: dict[str, str] = {"state": "state"}
    groups: dict[str, optax.GradientTransformation] = {"state": optax.set_to_zero()}
    for key, tx in transforms.items():
        kinds = (key,) if isinstance(key, str) else key
        name = "_".join(kinds)
        if twice := [kind for kind in kinds if kind in group_of]:
            raise ValueError(
                f"kinds {twice} are in {name!r} and in another group; each kind moves by one rule"
            )
        groups[name] = tx
        group_of.update(dict.fromkeys(kinds, name))
    labels = plan.labels(specs)
    if missing := set(jax.tree.leaves(labels)) - set(group_of):
        raise ValueError(
            f"no transformation for kinds {sorted(missing)}; given are {sorted(group_of)}"
        )
    return optax.partition(groups, jax.tree.map(lambda kind: group_of[kind], labels))


def scale_by_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam directions, moments in float32.

    Not `optax.scale_by_adam`: there eps is added after the bias correction of v, here before it, so
    that early steps see a larger eps, as in the optimizer GLM's Muon comes from.
    Source: Moonlight examples/toy_train.py (its AdamW branch).
    """

    def init(weights: Any) -> AdamState:
        return AdamState(jnp.zeros((), jnp.int32), _zeros(weights), _zeros(weights))

    def update(grads: Any, state: AdamState, weights: Any = None) -> tuple[Any, AdamState]:
        del weights
        step = optax.safe_increment(state.step)
        t = step.astype(jnp.float32)
        correction = jnp.sqrt(1.0 - b2**t) / (1.0 - b1**t)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        m = jax.tree.map(lambda m, g: b1 * m + (1.0 - b1) * g, state.m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1.0 - b2) * jnp.square(g), state.v, grads)
        direction = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), m, v)
        return direction, AdamState(step, m, v)

    return optax.GradientTransformation(init, update)


def add_decay(
    weight_decay: float, specs: Any, kinds: tuple[plan.Kind, ...]
) -> optax.GradientTransformation:
    """Directions plus `weight_decay` times the weight, for these kinds.

    Not `optax.add_decayed_weights`: it adds bfloat16 weights to float32 directions, which strict
    promotion refuses.
    """

    def update(directions: Any, state: Any, weights: Any = None) -> tuple[Any, Any]:
        if weights is None:
            raise ValueError("weight decay needs the weights: call tx.update(grads, state, params)")

        def one(spec: plan.ParamSpec, direction: Any, weight: Any) -> Any:
            if spec.kind not in kinds or isinstance(direction, optax.MaskedNode):
                return direction
            return direction + weight_decay * weight.astype(jnp.float32)

        return plan.tree_map(one, specs, directions, weights), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def clipped(
    tx: optax.GradientTransformation, max_norm: float | None, specs: Any
) -> optax.GradientTransformation:
    """`tx` on gradients scaled to a global norm of at most `max_norm`; None clips nothing.

    Not `optax.clip_by_global_norm`: it would count gradients of kind "state", and sums squares in
    their own dtype.
    """
    if max_norm is None:
        return tx

    def update(grads: Any, state: Any, weights: Any = None) -> tuple[Any, Any]:
        del weights
        scale = max_norm / jnp.maximum(global_norm(grads, specs), max_norm)
        return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads), state

    return optax.chain(optax.GradientTransformation(optax.init_empty_state, update), tx)


def global_norm(grads: Any, specs: Any) -> jax.Array:
    """Euclidean norm of the gradients of all trained weights, float32 scalar."""

    def squared(spec: plan.ParamSpec, grad: jax.Array) -> jax.Array:
        if spec.kind not in TRAINED:
            return jnp.zeros((), jnp.float32)
        return jnp.sum(jnp.square(grad.astype(jnp.float32)))

    return jnp.sqrt(
        sum(jax.tree.leaves(plan.tree_map(squared, specs, grads)), jnp.zeros((), jnp.float32))
    )


def scale_by_lr(lr: LearningRate) -> optax.GradientTransformation:
    """Updates times a number, or times a function of the optax step count (0 at the first step)."""
    return optax.scale_by_schedule(lr) if callable(lr) else optax.scale(lr)


def _zeros(weights: Any) -> Any:
    return jax.tree.map(lambda w: jnp.zeros_like(w, dtype=jnp.float32), weights)
