"""Muon for matrices and AdamW for the rest: GLM-4.5's optimizer, equal to Moonlight's step by step.

`Muon` is the value an experiment holds, `muon` the whole optimizer as one optax transformation.
Newton-Schulz runs on whole stacks [layers, experts, m, n] at once. On a mesh (`sharding.use`) each
device first receives whole matrices of a stack, iterates alone, and sends the result back: one
all-to-all each way instead of collectives in every iteration.
Letters: B leading dims of a stack, m and n the sides of a matrix, C matrices on one device.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from glm45_jax import params as plan
from glm45_jax import sharding
from glm45_jax.optim import mixed, rounding
from glm45_jax.optim.schedules import Cosine, Schedule, Tokens

QUINTIC = (3.4445, -4.7750, 2.0315)  # Source: spec 2.7
EPS = 1e-7


class MuonState(NamedTuple):
    """Momentum of the matrices, shaped like the weights."""

    momentum: Any


@dataclasses.dataclass(frozen=True)
class Muon:
    """GLM-4.5's optimizer. Source: spec 2.7 and 5.2."""

    lr: float = 2.5e-4
    schedule: Schedule = dataclasses.field(default_factory=Cosine)
    momentum: float = 0.95
    steps: int = 5
    rms: float = 0.2
    weight_decay: float = 0.1
    decay_kinds: tuple[plan.Kind, ...] = (
        "matrix",
        "embed",
    )  # UNVERIFIED for GLM; Moonlight decays all kinds
    adam_lr_ratio: float = 1.0  # one rate for both optimizers: UNVERIFIED
    adam_b1: float = (
        0.9  # AdamW for the other kinds, and its three numbers: UNVERIFIED, Moonlight's
    )
    adam_b2: float = 0.95
    adam_eps: float = 1e-8
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    momentum_dtype: Literal["bfloat16", "float32"] = "float32"
    clip_norm: float | None = 1.0  # UNVERIFIED for GLM
    master_dtype: rounding.MasterDtype = "float32"  # of the weights, see `rounding`

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"steps {self.steps} must be at least 1, momentum {self.momentum} in [0, 1)"
            )

    def build(self, specs: Any) -> optax.GradientTransformation:
        """Updates for a learning rate of 1; the train step multiplies them by `lr_at`."""
        numbers = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del numbers["lr"], numbers["schedule"], numbers["master_dtype"]
        return muon(1.0, specs=specs, **numbers)

    def stored(self, specs: Any) -> Any:
        """The plan with the dtypes in which a run keeps its weights."""
        return rounding.stored(specs, self.master_dtype)

    def lr_at(self, tokens: Tokens) -> jax.Array:
        """Learning rate after this many tokens, float32."""
        return self.lr * self.schedule(tokens)


def muon(
    lr: mixed.LearningRate,
    *,
    momentum: float = 0.95,
    steps: int = 5,
    rms: float = 0.2,
    weight_decay: float = 0.1,
    specs: Any,
    dtype: Any = jnp.float32,
    momentum_dtype: Any = jnp.float32,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-8,
    adam_lr_ratio: float = 1.0,
    decay_kinds: tuple[plan.Kind, ...] = mixed.TRAINED,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Muon for kind "matrix", AdamW for "embed", "norm" and "bias", nothing for "state".

    lr: a number, or a function of the optax step count. specs: the plan of the weights. Everything
    in an update, weight decay included, is linear in `lr`. Memory: one momentum for a matrix, two
    moments for the others.
    Source: spec 2.7; Moonlight examples/toy_train.py, whose trajectories it reproduces.
    """
    matrix = optax.chain(
        scale_by_muon(
            momentum=momentum,
            steps=steps,
            rms=rms,
            dtype=dtype,
            momentum_dtype=momentum_dtype,
            specs=specs,
        ),
        mixed.add_decay(weight_decay, specs, decay_kinds),
        optax.scale(-1.0),
    )
    rest = optax.chain(
        mixed.scale_by_adam(b1=adam_b1, b2=adam_b2, eps=adam_eps),
        mixed.add_decay(weight_decay, specs, decay_kinds),
        optax.scale(-adam_lr_ratio),
    )
    tx = mixed.by_kind(specs, {"matrix": matrix, ("embed", "norm", "bias"): rest})
    return optax.chain(mixed.clipped(tx, clip_norm, specs), mixed.scale_by_lr(lr))


def scale_by_muon(
    *,
    momentum: float = 0.95,
    steps: int = 5,
    rms: float = 0.2,
    dtype: Any = jnp.bfloat16,
    momentum_dtype: Any = jnp.float32,
    specs: Any,
) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum of every matrix, times rms * sqrt(larger side). float32.

    Every matrix of a stack is its own problem; `ParamSpec.matrix_shape` says how a weight reads as
    matrices. Leaves that are `optax.MaskedNode` (other kinds, see `mixed.by_kind`) pass through.
    dtype: of the Newton-Schulz products; the momentum is summed in float32 and kept in
    `momentum_dtype`.
    """

    def init(weights: Any) -> MuonState:
        return MuonState(jax.tree.map(lambda w: jnp.zeros_like(w, dtype=momentum_dtype), weights))

    def update(grads: Any, state: MuonState, weights: Any = None) -> tuple[Any, MuonState]:
        del weights
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        sums = jax.tree.map(
            lambda m, g: momentum * m.astype(jnp.float32) + g, state.momentum, grads
        )
        nesterov = jax.tree.map(lambda s, g: g + momentum * s, sums, grads)

        def direction(spec: plan.ParamSpec, x: Any) -> Any:
            if isinstance(x, optax.MaskedNode):
                return x
            _, m, n = spec.matrix_shape
            return (
                rms
                * math.sqrt(max(m, n))
                * orthogonal(x, spec, steps=steps, dtype=dtype).astype(jnp.float32)
            )

        directions = plan.tree_map(direction, specs, nesterov)
        return directions, MuonState(jax.tree.map(lambda s: s.astype(momentum_dtype), sums))

    return optax.GradientTransformation(init, update)


def newton_schulz(x_Bmn: jax.Array, *, steps: int = 5, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Nearly orthogonal factor of each matrix, in `dtype`; singular values about 0.5 to 1.5.

    x_Bmn: any leading dims, one problem each. The transpose gives the transpose, zero gives zero.
    Source: spec 2.7 (five quintic steps after division by the Frobenius norm, as Moonlight).
    """
    return _iterate(x_Bmn.astype(dtype), steps=steps)


def newton_schulz_flops(specs: Any, steps: int = 5) -> float:
    """FLOPs of the iterations for every matrix of a plan, 2 a multiply-add, no symmetry used: with
    sides m <= n a step has two products of m·m·n and one of m·m·m.
    """
    total = 0.0
    for spec in jax.tree.leaves(specs, is_leaf=plan.is_spec):
        if spec.kind == "matrix":
            stacked, *sides = spec.matrix_shape
            m, n = sorted(sides)
            total += stacked * steps * (4.0 * m * m * n + 2.0 * m**3)
    return total


def orthogonal(
    x: jax.Array, spec: plan.ParamSpec, *, steps: int = 5, dtype: Any = jnp.bfloat16
) -> jax.Array:
    """`newton_schulz` of each matrix of a weight, in its shape, spread over the ambient mesh.

    x[spec.axes by rules] -> the same layout; on the way the matrices lie whole on single devices.
    Raises: ValueError where x is not of the plan's shape.
    """
    if x.shape != spec.shape:
        raise ValueError(f"gradient of shape {x.shape} for {spec}; the specs are of another model")
    _, m, n = spec.matrix_shape
    x = x.astype(dtype)  # before anything moves between devices
    ambient = sharding.current()
    if ambient is None or ambient[0].size == 1:
        return _iterate(x.reshape(*spec.shape[: spec.batch_dims], m, n), steps=steps).reshape(
            spec.shape
        )
    mesh, rules = ambient
    layout = sharding.shardings(spec, mesh, rules).spec
    on_one = partial(
        _on_one_device, moves=_plan_moves(spec, layout, mesh), long=1 if m > n else 2, steps=steps
    )

    def local(x_local: jax.Array) -> jax.Array:
        shape = x_local.shape
        b = spec.batch_dims
        side = math.prod(shape[b : b + _split_of(spec)])
        return on_one(x_local.reshape(math.prod(shape[:b]), side, -1)).reshape(shape)

    return jax.shard_map(local, mesh=mesh, in_specs=layout, out_specs=layout, check_vma=False)(x)


def _iterate(x_Bmn: jax.Array, *, steps: int, split: tuple[str, ...] = ()) -> jax.Array:
    """Newton-Schulz in the dtype of x. `split`: mesh axes that cut the last side in `shard_map`."""
    a, b, c = QUINTIC
    exact = jax.lax.Precision.HIGHEST if x_Bmn.dtype == jnp.float32 else None  # no TF32 in float32
    dot = partial(jnp.matmul, precision=exact)

    def total(y: jax.Array) -> jax.Array:
        return jax.lax.psum(y, split) if split else y

    # A cut side looks short here; the caller has already put the longer side last.
    flip = not split and x_Bmn.shape[-2] > x_Bmn.shape[-1]
    x = x_Bmn.mT if flip else x_Bmn
    squares = total(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True))
    norm = jnp.sqrt(squares).astype(x.dtype).astype(jnp.float32)
    x = (x.astype(jnp.float32) / (norm + EPS)).astype(x.dtype)

    def step(_: Any, x: jax.Array) -> jax.Array:
        gram = total(dot(x, x.mT, preferred_element_type=jnp.float32)).astype(x.dtype)
        return _times(a, x) + dot(_times(b, gram) + dot(_times(c, gram), gram), x)

    # A loop, not unrolled: a model has dozens of shapes of matrix, and each would compile five
    # times.
    x = jax.lax.fori_loop(0, steps, step, x)
    return x.mT if flip else x


def _times(scalar: float, x: jax.Array) -> jax.Array:
    """scalar * x, the scalar in float32: 3.4445 in bfloat16 is 3.4375, another polynomial."""
    return (scalar * x.astype(jnp.float32)).astype(x.dtype)


class _Move(NamedTuple):
    """What one mesh axis does: it splits side `src` now (1, 2 or None) and shall split dim `dst`.

    Dims of a local stack [C, m, n]; dst 0 hands out whole matrices, None gathers.
    """

    axis: str
    size: int
    src: int | None
    dst: int | None


def _plan_moves(spec: plan.ParamSpec, layout: PartitionSpec, mesh: Mesh) -> tuple[_Move, ...]:
    """Moves of every mesh axis that does not already split the stack.

    An axis hands out matrices while there are enough of them, else it splits the longer side (its
    Gram matrices are then summed over it), else the shorter side is gathered and the work repeated.
    """
    where = {a: dim for dim, entry in enumerate(layout) for a in _names(entry) if mesh.shape[a] > 1}
    b, first = spec.batch_dims, spec.batch_dims + _split_of(spec)
    count, m, n = spec.matrix_shape
    long = 1 if m > n else 2
    count //= math.prod(mesh.shape[a] for a, dim in where.items() if dim < b)
    sides = {a: 1 if dim < first else 2 for a, dim in where.items() if dim >= b}
    idle = [a for a in mesh.axis_names if mesh.shape[a] > 1 and a not in where]
    long_size = (m if long == 1 else n) // math.prod(
        mesh.shape[a] for a, side in sides.items() if side == long
    )
    moves, owners = [], 1
    for axis in sorted(sides, key=lambda a: -mesh.shape[a]) + idle:
        size, src = mesh.shape[axis], sides.get(axis)
        dst: int | None = None
        if owners * size <= count:
            dst, owners = 0, owners * size
        elif src == long:
            dst = long
        elif src is not None and long_size % size == 0:
            dst, long_size = long, long_size // size
        moves.append(_Move(axis, size, src, dst))
    return tuple(moves)


def _on_one_device(
    x_Cmn: jax.Array, *, moves: tuple[_Move, ...], long: int, steps: int
) -> jax.Array:
    """`_iterate` on local stacks: moves matrices to their owners, iterates, moves them back.

    The order in which pieces are joined does not matter: the iteration commutes with permutations
    of a side, and the way back undoes the way there.
    """
    count = x_Cmn.shape[0]
    owners = math.prod(move.size for move in moves if move.dst == 0)
    x = jnp.pad(x_Cmn, ((0, -count % owners), (0, 0), (0, 0)))  # zero matrices stay zero
    for move in moves:
        x = _shift(x, move.axis, move.size, move.src, move.dst)
    split = tuple(move.axis for move in moves if move.dst == long)
    x = x.mT if long == 1 else x
    x = _iterate(x, steps=steps, split=split)
    x = x.mT if long == 1 else x
    for move in reversed(moves):
        x = _shift(x, move.axis, move.size, move.dst, move.src)
    return x[:count]


def _shift(x: jax.Array, axis: str, size: int, src: int | None, dst: int | None) -> jax.Array:
    """x with a mesh axis moved from splitting dim `src` to `dst`; None: it splits nothing."""
    if src == dst:
        return x
    if src is not None and dst is not None:
        return jax.lax.all_to_all(x, axis, split_axis=dst, concat_axis=src, tiled=True)
    if src is not None:
        return jax.lax.all_gather(x, axis, axis=src, tiled=True)
    assert dst is not None
    piece = x.shape[dst] // size
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * piece, piece, dst)


def _split_of(spec: plan.ParamSpec) -> int:
    """How many of the dims after the leading ones make the first side."""
    rest, fan_in = spec.shape[spec.batch_dims :], spec.matrix_shape[1]
    return next(i for i in range(1, len(rest)) if math.prod(rest[:i]) == fan_in)


def _names(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
