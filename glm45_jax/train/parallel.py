"""The same `train_step` by `pmap` over local devices or by `jit` on a mesh. The types to know are
`Trainer` and `Work`.

`make_trainer(where, ...)` takes a `Pmap` or a `MeshShape` value and hides which it was: states go
in and come out as the trainer keeps them, `save_view` / `load_view` are what a checkpoint sees, the
same for both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from glm45_jax import params as params_lib
from glm45_jax import sharding
from glm45_jax.data.types import Batch
from glm45_jax.model import transformer
from glm45_jax.model.config import ModelConfig
from glm45_jax.sharding import MeshShape, Rules
from glm45_jax.train.ahead import Programs
from glm45_jax.train.loss import count, cross_entropy_sum, target_nll, trunk
from glm45_jax.train.state import Train, TrainState, init_state, state_of
from glm45_jax.train.step import StepOut, row_by_row, train_step

PMAP_AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Pmap:
    """Data parallelism by `pmap` over this host's devices; -1 takes all. Weights are whole on
    each.
    """

    devices: int = -1


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Functions of one run. step donates its state. nll: (sum of -log p, count) of a batch, for
    validation. begin: step 0 with a copy of these weights, which lie anywhere. place: a copy of
    weights as a state holds them. logp: of such weights, this host's rows [B, T] of a batch.

    abstract: shapes and shardings of `save_view(state)`, for restoring. lower: the step of global
    batches of these shapes, not compiled; on a mesh, whose devices need not be here. n_devices:
    devices that compute; row_parts: those among which the rows of a batch are split.
    """

    init: Callable[[jax.Array], TrainState]
    begin: Callable[[Any, jax.Array], TrainState]
    place: Callable[[Any], Any]
    step: Callable[[TrainState, Any], tuple[TrainState, StepOut]]
    nll: Callable[[TrainState, Any], tuple[float, float]]
    logp: Callable[[Any, Any], np.ndarray]
    compile_step: Callable[[Any], float]
    compile_nll: Callable[[Any], float]
    save_view: Callable[[TrainState], TrainState]
    load_view: Callable[[TrainState], TrainState]
    check_rows: Callable[[int], None]
    abstract: TrainState
    lower: Callable[[Any], jax.stages.Lowered]
    n_devices: int
    row_parts: int


class Work(Protocol):
    """What a trainer is told: pure functions of a state and a batch (any tree of arrays whose first
    axis is rows), the same on any devices. `Recipe` is pretraining's.
    """

    @property
    def specs(self) -> Any:
        """Plan of the weights."""

    @property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer at a learning rate of one."""

    def accum(self, rows: int) -> int:
        """Micro-batches of a batch of so many rows over all devices."""

    def step(
        self, state: TrainState, batch: Any, *, accum: int, axis_name: str | None = None
    ) -> tuple[TrainState, StepOut]:
        """The state after a batch; axis_name: of a `pmap`, each device with its share of it."""

    def nll(self, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Sum of -log p over the batch's targets, and their number."""

    def logp(self, params: Any, batch: Any, *, accum: int) -> jax.Array:
        """log p of each target, float32 [B, T]."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `train_step` is told, the same on any devices."""

    cfg: ModelConfig
    optim: Any
    train: Train
    packed: bool

    @functools.cached_property
    def specs(self) -> Any:
        """Plan of the weights, in the dtypes that the optimizer keeps them in."""
        return self.optim.stored(transformer.specs(self.cfg))

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer at a learning rate of one."""
        return self.optim.build(self.specs)

    def accum(self, rows: int) -> int:
        """Micro-batches of a batch of so many rows."""
        return self.train.accum(rows)

    def step(
        self, state: TrainState, batch: Batch, *, accum: int, axis_name: str | None = None
    ) -> tuple[TrainState, StepOut]:
        """`train_step` with this recipe."""
        return train_step(
            state,
            batch,
            cfg=self.cfg,
            optim=self.optim,
            tx=self.tx,
            train=self.train,
            specs=self.specs,
            packed=self.packed,
            accum=accum,
            axis_name=axis_name,
        )

    def nll(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum of -log p over the batch's targets, and their number."""
        hidden = trunk(params, batch, cfg=self.cfg, packed=self.packed)
        total = cross_entropy_sum(
            params, hidden.hidden_BTD, batch.targets_BT, batch.mask_BT, cfg=self.cfg
        )
        return total, count(batch).tokens

    def logp(self, params: Any, batch: Batch, *, accum: int) -> jax.Array:
        """log p of each target, float32 [B, T]; of those that do not count too."""

        def one(micro: Batch) -> jax.Array:
            hidden = trunk(params, micro, cfg=self.cfg, packed=self.packed)
            return -target_nll(params, hidden.hidden_BTD, micro.targets_BT, cfg=self.cfg)

        return row_by_row(one, batch, accum)


def make_trainer(
    where: Pmap | MeshShape, recipe: Work, rules: Rules = Rules(), devices: Any = None
) -> Trainer:
    """The trainer of a recipe on these devices.

    Raises: ValueError where the mesh does not fit the devices.
    """
    if isinstance(where, Pmap):
        return _pmap_trainer(where, recipe, devices)
    return _mesh_trainer(where, recipe, rules, devices)


def _mesh_trainer(where: MeshShape, recipe: Work, rules: Rules, devices: Any) -> Trainer:
    mesh = sharding.make_mesh(where, devices)
    replicated = NamedSharding(mesh, PartitionSpec())
    init = functools.partial(init_state, recipe.specs, recipe.tx)
    shapes = jax.eval_shape(init, jax.random.key(0))
    layout = state_shardings(shapes, recipe.specs, mesh, rules)

    placed = functools.partial(_under, mesh=mesh, rules=rules)

    @functools.partial(
        jax.jit, static_argnames="accum", donate_argnums=0, out_shardings=(layout, replicated)
    )
    @placed
    def step(state, batch, accum):
        return recipe.step(state, batch, accum=accum)

    nll = jax.jit(placed(recipe.nll), out_shardings=replicated)
    logp = jax.jit(placed(recipe.logp), static_argnames="accum", out_shardings=replicated)
    begin = jax.jit(functools.partial(state_of, recipe.tx), donate_argnums=0, out_shardings=layout)
    kept = functools.partial(_kept, like=shapes.params)
    copied = jax.jit(lambda p: kept(_copied(p)), out_shardings=layout.params)

    def place(params: Any) -> Any:
        # device_put shares what already lies right (replicated leaves, on one of their devices),
        # whatever may_alias says, and a step would donate it.
        return copied(jax.device_put(params, layout.params))

    put = functools.partial(sharding.put, mesh=mesh, rules=rules)
    hosts, host = jax.process_count(), jax.process_index()

    def take_logp(params: Any, batch: Any) -> np.ndarray:
        out_BT = logp(params, put(batch), accum=recipe.accum((rows := _rows(batch)) * hosts))
        return np.asarray(out_BT)[host * rows : (host + 1) * rows]

    abstract = jax.tree.map(_placed, shapes, layout)

    laid = functools.partial(sharding.placed_shapes, mesh=mesh, rules=rules)
    steps = Programs(
        lambda state, batch: step(state, batch, accum=recipe.accum(_rows(batch))),
        lambda batch: step.lower(abstract, laid(batch), accum=recipe.accum(_rows(batch))),
    )
    nlls = Programs(nll, lambda batch: nll.lower(abstract.params, laid(batch)))

    return Trainer(
        init=jax.jit(init, out_shardings=layout),
        begin=lambda params, key: begin(place(params), key),
        place=place,
        step=lambda state, batch: steps(state, put(batch)),
        nll=lambda state, batch: _floats(nlls(state.params, put(batch))),
        logp=take_logp,
        compile_step=lambda batch: steps.compile(_of_all_hosts(batch, hosts)),
        compile_nll=lambda batch: nlls.compile(_of_all_hosts(batch, hosts)),
        save_view=lambda state: state,
        load_view=lambda state: state.replace(params=kept(state.params)),
        check_rows=functools.partial(sharding.check_batch, sizes=mesh.shape, rules=rules),
        abstract=abstract,
        lower=steps.lower,
        n_devices=mesh.size,
        row_parts=sharding.ways(rules.batch, mesh.shape),
    )


def _pmap_trainer(where: Pmap, recipe: Work, devices: Any) -> Trainer:
    used = _devices_of(where, list(jax.local_devices() if devices is None else devices))
    n, hosts = len(used), jax.process_count()
    init = functools.partial(init_state, recipe.specs, recipe.tx)
    # The axis name is part of where pmap's arrays lie: with another name the second step compiles
    # again.
    on_each = functools.partial(jax.pmap, axis_name=PMAP_AXIS, devices=used)
    spread = functools.partial(on_each(lambda _, tree: tree, in_axes=(0, None)), np.zeros(n))
    step = on_each(
        lambda state, batch, accum: recipe.step(state, batch, accum=accum, axis_name=PMAP_AXIS),
        donate_argnums=0,
        static_broadcasted_argnums=2,
    )
    nll = on_each(lambda params, batch: jax.lax.psum(recipe.nll(params, batch), PMAP_AXIS))
    logp = on_each(
        lambda params, batch, accum: recipe.logp(params, batch, accum=accum),
        static_broadcasted_argnums=2,
    )
    shapes = jax.eval_shape(init, jax.random.key(0))
    kept = functools.partial(_kept, like=shapes.params)
    begin = jax.jit(lambda params, key: state_of(recipe.tx, kept(params), key))
    first, split = SingleDeviceSharding(used[0]), functools.partial(_split, parts=n)

    def accum(parts: Any) -> int:  # of leaves [n, rows of a device, ...]
        return recipe.accum(n * hosts * jax.tree.leaves(parts)[0].shape[1])

    held = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), shapes)
    steps = Programs(
        lambda state, parts: step(state, parts, accum(parts)),
        lambda parts: step.lower(held, parts, accum(parts)),
    )
    nlls = Programs(nll, lambda parts: nll.lower(held.params, parts))

    def take_step(state: TrainState, batch: Any):
        state, out = steps(state, split(batch))
        return state, _first_copy(out)

    def take_logp(params: Any, batch: Any) -> np.ndarray:
        out_nbT = logp(params, split(batch), recipe.accum(_rows(batch) * hosts))
        return np.asarray(out_nbT).reshape(-1, *out_nbT.shape[2:])

    return Trainer(
        init=lambda key: spread(jax.jit(init)(key)),
        begin=lambda params, key: spread(begin(jax.device_put(params, first), key)),
        place=lambda params: spread(kept(jax.device_put(params, first))),
        step=take_step,
        nll=lambda state, batch: _floats(_first_copy(nlls(state.params, split(batch)))),
        logp=take_logp,
        compile_step=lambda batch: steps.compile(_split_shapes(batch, n)),
        compile_nll=lambda batch: nlls.compile(_split_shapes(batch, n)),
        save_view=_first_copy,
        load_view=lambda state: spread(state.replace(params=kept(state.params))),
        check_rows=lambda rows: sharding.check_divides(
            rows, n * hosts, "pmap devices", "mesh=Pmap(devices=...)"
        ),
        abstract=jax.tree.map(lambda x: _placed(x, first), shapes),
        lower=_refuse_pmap,
        n_devices=n * hosts,
        row_parts=n * hosts,
    )


def state_shardings(shapes: TrainState, specs: Any, mesh: Any, rules: Rules) -> TrainState:
    """NamedSharding of every leaf of a state: optimizer memory lies as the weight whose path and
    shape it has.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(_: Any, owner: params_lib.ParamSpec | None) -> NamedSharding:
        return replicated if owner is None else sharding.shardings(owner, mesh, rules)

    return jax.tree.map(one, shapes, params_lib.owners(specs, shapes))


def _under(f: Callable[..., Any], mesh: Any, rules: Rules) -> Callable[..., Any]:
    """The function, traced where code sees this mesh and these rules."""

    def call(*args, **kwargs):
        with sharding.use(mesh, rules):
            return f(*args, **kwargs)

    return call


def _devices_of(where: Pmap, local: list[Any]) -> list[Any]:
    """Those of this host that a pmap computes on."""
    if where.devices > len(local):
        raise ValueError(
            f"pmap over {where.devices} devices, but this host has {len(local)}; use -1 for all"
        )
    return local if where.devices == -1 else local[: where.devices]


def _split(batch: Any, parts: int) -> Any:
    """Leaves [parts, B / parts, ...] of leaves [B, ...]."""
    return jax.tree.map(lambda x: np.asarray(x).reshape(parts, -1, *x.shape[1:]), batch)


def _split_shapes(batch: Any, parts: int) -> Any:
    """The same of shapes."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((parts, x.shape[0] // parts, *x.shape[1:]), x.dtype), batch
    )


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _refuse_pmap(_: Any) -> Any:
    raise ValueError("a pmap step is not lowered for other devices; use mesh=MeshShape(...)")


def _rows(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _of_all_hosts(batch: Any, hosts: int) -> Any:
    """Shapes of the global batch of which each host has this part."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] * hosts, *x.shape[1:]), x.dtype), batch
    )


def _kept(params: Any, like: Any) -> Any:
    """Weights in the dtypes in which a state keeps them; where they have these, the same arrays."""
    return jax.tree.map(
        lambda x, to: x if x.dtype == to.dtype else x.astype(to.dtype), params, like
    )


def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _first_copy(tree: Any) -> Any:
    """What the first device of this host holds, copied there; x[0] would be a program of all
    devices, with a collective for each leaf, and on a busy CPU such programs wait for each other
    until XLA aborts.
    """
    return _without_first_axis(jax.tree.map(lambda x: x.addressable_data(0), tree))


@jax.jit
def _without_first_axis(tree: Any) -> Any:
    """One program for the whole tree: a slice of each leaf by itself is a dispatch each."""
    return jax.tree.map(lambda x: x[0], tree)


def _floats(pair: tuple[jax.Array, jax.Array]) -> tuple[float, float]:
    total, n = jax.device_get(pair)
    return float(total), float(n)
