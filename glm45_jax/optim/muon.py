"""Muon for matrices and AdamW for the rest: GLM-4.5's optimizer, equal to Moonlight's step by step.

`Muon` is the value an experiment holds, `muon` the whole optimizer as one optax transformation.
Newton-Schulz (kernels/newton_schulz.py) runs on whole stacks [layers, experts, m, n] at once, small
stacks of one shape joined. On a mesh (`sharding.use`) each device first receives whole matrices of
a stack, iterates alone, and sends the result back: one all-to-all each way instead of collectives
in every iteration.
Letters: B leading dims of a stack, m and n the sides of a matrix, C matrices on one device.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from glm45_jax import params as plan
from glm45_jax import sharding
from glm45_jax.kernels import newton_schulz as kernels
from glm45_jax.kernels.dispatch import say_once
from glm45_jax.optim import mixed, rounding
from glm45_jax.optim.schedules import Cosine, Schedule, Tokens

QUINTIC = kernels.QUINTIC
Impl = Literal["auto", "xla", "gram", "mosaic"]
# Stacks of one shape go into Newton-Schulz as one up to this many numbers: joining costs a copy
# and saves the fifty launches of a stack. `mini` has 31 stacks in 8 shapes; one of Air's is 7.4e8.
JOINED = 2**28

log = logging.getLogger(__name__)


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
    impl: Impl = "auto"  # of Newton-Schulz, see `scale_by_muon`
    clip_norm: float | None = 1.0  # UNVERIFIED for GLM
    master_dtype: rounding.MasterDtype = "float32"  # of the weights, see `rounding`

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"steps {self.steps} must be at least 1, momentum {self.momentum} in [0, 1)"
            )
        if self.impl not in get_args(Impl):
            raise ValueError(f"Muon has no implementation {self.impl!r}; one of {get_args(Impl)}")

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
    impl: Impl = "auto",
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
            impl=impl,
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
    impl: Impl = "auto",
    specs: Any,
) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum of every matrix, times rms * sqrt(larger side). float32.

    Every matrix of a stack is its own problem; `ParamSpec.matrix_shape` says how a weight reads as
    matrices. Leaves that are `optax.MaskedNode` (other kinds, see `mixed.by_kind`) pass through.
    dtype: of the Newton-Schulz products; the momentum is summed in float32 and kept in
    `momentum_dtype`. impl: of Newton-Schulz, by name as `kernels.newton_schulz` has them; matrices
    with sides that the kernel of "mosaic" does not take go by "xla", as do those cut over a mesh,
    and a line of the log says so.
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

        directions = _directions(nesterov, specs, rms=rms, steps=steps, dtype=dtype, impl=impl)
        return directions, MuonState(jax.tree.map(lambda s: s.astype(momentum_dtype), sums))

    return optax.GradientTransformation(init, update)


def newton_schulz(
    x_Bmn: jax.Array, *, steps: int = 5, dtype: Any = jnp.bfloat16, impl: Impl = "auto"
) -> jax.Array:
    """`kernels.newton_schulz` in `dtype`."""
    return kernels.newton_schulz(x_Bmn.astype(dtype), steps=steps, impl=impl)


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
    x: jax.Array,
    spec: plan.ParamSpec,
    *,
    steps: int = 5,
    dtype: Any = jnp.bfloat16,
    impl: Impl = "auto",
) -> jax.Array:
    """`newton_schulz` of each matrix of a weight, in its shape, spread over the ambient mesh.

    x[spec.axes by rules] -> the same layout; on the way the matrices lie whole on single devices.
    Raises: ValueError where x is not of the plan's shape.
    """
    _same_shape(x, spec)
    ambient = sharding.current()
    if ambient is None or ambient[0].size == 1:
        return _iterate(_as_stack(x, spec).astype(dtype), steps=steps, impl=impl).reshape(x.shape)
    x = x.astype(dtype)  # before anything moves between devices
    mesh, rules = ambient
    layout = sharding.shardings(spec, mesh, rules).spec
    _, m, n = spec.matrix_shape
    on_one = partial(
        _on_one_device,
        moves=_plan_moves(spec, layout, mesh),
        long=1 if m > n else 2,
        steps=steps,
        impl=impl,
    )

    def local(x_local: jax.Array) -> jax.Array:
        shape = x_local.shape
        b = spec.batch_dims
        side = math.prod(shape[b : b + _split_of(spec)])
        return on_one(x_local.reshape(math.prod(shape[:b]), side, -1)).reshape(shape)

    return jax.shard_map(local, mesh=mesh, in_specs=layout, out_specs=layout, check_vma=False)(x)


def _directions(
    nesterov: Any, specs: Any, *, rms: float, steps: int, dtype: Any, impl: Impl
) -> Any:
    """rms * sqrt(larger side) * `orthogonal` of every leaf, float32; small stacks joined where
    there is one device.
    """
    ambient = sharding.current()
    leaves = jax.tree.leaves(specs, is_leaf=plan.is_spec)
    grads, tree = jax.tree.flatten(nesterov, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    out = list(grads)
    mine = [i for i, x in enumerate(grads) if not isinstance(x, optax.MaskedNode)]
    if ambient is None or ambient[0].size == 1:
        for i in mine:
            _same_shape(grads[i], leaves[i])
        for joined in _joined([leaves[i].matrix_shape for i in mine]):
            parts = [mine[j] for j in joined]
            stacks = [_as_stack(grads[i], leaves[i]).astype(dtype) for i in parts]
            x = stacks[0] if len(parts) == 1 else jnp.concatenate(stacks)
            y = _iterate(x, steps=steps, impl=impl)
            ends = np.cumsum([len(stack) for stack in stacks])[:-1]
            for i, piece in zip(parts, jnp.split(y, ends), strict=True):
                out[i] = piece.reshape(grads[i].shape)
    else:
        # CPU devices may begin loops that do not hang on each other in different orders, and the
        # collectives in them then wait for each other: there, one leaf after the other.
        in_turn = ambient[0].devices.flat[0].platform == "cpu"
        last = None
        for i in mine:
            x = grads[i]
            if in_turn and last is not None:
                x, _ = jax.lax.optimization_barrier((x, last))
            out[i] = last = orthogonal(x, leaves[i], steps=steps, dtype=dtype, impl=impl)
    for i in mine:
        _, m, n = leaves[i].matrix_shape
        out[i] = rms * math.sqrt(max(m, n)) * out[i].astype(jnp.float32)
    return jax.tree.unflatten(tree, out)


def _joined(shapes: Sequence[tuple[int, int, int]]) -> list[list[int]]:
    """Which stacks [count, m, n] go together: of one m and n, up to JOINED numbers."""
    groups: dict[tuple[int, int], list[list[int]]] = {}
    sizes = [math.prod(shape) for shape in shapes]
    for i, (_, m, n) in enumerate(shapes):
        same = groups.setdefault((m, n), [])
        if same and sum(sizes[j] for j in same[-1]) + sizes[i] <= JOINED:
            same[-1].append(i)
        else:
            same.append([i])
    return [group for same in groups.values() for group in same]


def _as_stack(x: jax.Array, spec: plan.ParamSpec) -> jax.Array:
    """[count, m, n]."""
    return x.reshape(spec.matrix_shape)


def _same_shape(x: jax.Array, spec: plan.ParamSpec) -> None:
    """Raises: ValueError where x is not of the plan's shape."""
    if x.shape != spec.shape:
        raise ValueError(f"gradient of shape {x.shape} for {spec}; the specs are of another model")


def _iterate(x_Bmn: jax.Array, *, steps: int, impl: Impl, split: tuple[str, ...] = ()) -> jax.Array:
    """Newton-Schulz in the dtype of x. `split`: mesh axes that cut the last side in `shard_map`."""
    if split:
        if impl not in ("auto", "xla"):
            _by_xla(impl, f"matrices [{x_Bmn.shape[-2]}, {x_Bmn.shape[-1]} / {split}] are cut")
        return kernels.iterate(x_Bmn, steps=steps, split=split)
    if impl == "mosaic" and (why := kernels.unfit(x_Bmn)):
        _by_xla(impl, why)
        impl = "xla"
    return kernels.newton_schulz(x_Bmn, steps=steps, impl=impl)


def _by_xla(impl: str, why: str) -> None:
    said = f"newton_schulz: xla where {impl!r} was asked for: {why}"
    say_once(log, logging.INFO, said)


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
    x_Cmn: jax.Array, *, moves: tuple[_Move, ...], long: int, steps: int, impl: Impl
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
    turned = long == 1 and bool(split)  # a cut side comes last
    x = x.mT if turned else x
    x = _iterate(x, steps=steps, impl=impl, split=split)
    x = x.mT if turned else x
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
