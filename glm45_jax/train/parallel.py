"""The same `train_step` by `pmap` over local devices or by `jit` on a mesh. The type to know is
`Trainer`.

`make_trainer(where, ...)` takes a `Pmap` or a `MeshShape` value and hides which it was: states go
in and come out as the trainer keeps them, `save_view` / `load_view` are what a checkpoint sees, the
same for both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from glm45_jax import params as params_lib
from glm45_jax import sharding
from glm45_jax.data.types import Batch
from glm45_jax.model import transformer
from glm45_jax.model.config import ModelConfig
from glm45_jax.sharding import MeshShape, Rules
from glm45_jax.train.loss import count, cross_entropy_sum, trunk
from glm45_jax.train.state import Train, TrainState, init_state
from glm45_jax.train.step import StepOut, train_step

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
    validation.

    abstract: shapes and shardings of `save_view(state)`, for restoring. n_devices: devices that
    compute.
    """

    init: Callable[[jax.Array], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, StepOut]]
    nll: Callable[[TrainState, Batch], tuple[float, float]]
    save_view: Callable[[TrainState], TrainState]
    load_view: Callable[[TrainState], TrainState]
    check_rows: Callable[[int], None]
    abstract: TrainState
    n_devices: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What `train_step` is told, the same on any devices."""

    cfg: ModelConfig
    optim: Any
    train: Train
    packed: bool

    @functools.cached_property
    def specs(self) -> Any:
        """Plan of the weights."""
        return transformer.specs(self.cfg)

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer at a learning rate of one."""
        return self.optim.build(self.specs)

    def step(self, state: TrainState, batch: Batch, *, accum: int, axis_name: str | None = None):
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


def make_trainer(
    where: Pmap | MeshShape, recipe: Recipe, rules: Rules = Rules(), devices: Any = None
) -> Trainer:
    """The trainer of a recipe on these devices.

    Raises: ValueError where the mesh does not fit the devices.
    """
    if isinstance(where, Pmap):
        return _pmap_trainer(where, recipe, devices)
    return _mesh_trainer(where, recipe, rules, devices)


def _mesh_trainer(where: MeshShape, recipe: Recipe, rules: Rules, devices: Any) -> Trainer:
    mesh = sharding.make_mesh(where, devices)
    init = functools.partial(init_state, recipe.specs, recipe.tx)
    shapes = jax.eval_shape(init, jax.random.key(0))
    layout = state_shardings(shapes, recipe.specs, mesh, rules)

    def placed(f):
        def call(*args, **kwargs):
            with sharding.use(mesh, rules):
                return f(*args, **kwargs)

        return call

    replicated = NamedSharding(mesh, PartitionSpec())

    @functools.partial(
        jax.jit, static_argnames="accum", donate_argnums=0, out_shardings=(layout, replicated)
    )
    @placed
    def step(state, batch, accum):
        return recipe.step(state, batch, accum=accum)

    nll = jax.jit(placed(recipe.nll), out_shardings=replicated)
    put = functools.partial(sharding.put, mesh=mesh, rules=rules)
    hosts = jax.process_count()
    return Trainer(
        init=jax.jit(init, out_shardings=layout),
        step=lambda state, batch: step(
            state, put(batch), accum=recipe.train.accum(_rows(batch) * hosts)
        ),
        nll=lambda state, batch: _floats(nll(state.params, put(batch))),
        save_view=lambda state: state,
        load_view=lambda state: state,
        check_rows=functools.partial(sharding.check_batch, sizes=mesh.shape, rules=rules),
        abstract=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout
        ),
        n_devices=mesh.size,
    )


def _pmap_trainer(where: Pmap, recipe: Recipe, devices: Any) -> Trainer:
    local = list(jax.local_devices() if devices is None else devices)
    if where.devices > len(local):
        raise ValueError(
            f"pmap over {where.devices} devices, but this host has {len(local)}; use -1 for all"
        )
    used = local if where.devices == -1 else local[: where.devices]
    n, total = len(used), len(used) * jax.process_count()
    init = functools.partial(init_state, recipe.specs, recipe.tx)
    # The axis name is part of where pmap's arrays lie: with another name the second step compiles
    # again.
    copies = jax.pmap(lambda state, _: state, axis_name=PMAP_AXIS, in_axes=(None, 0), devices=used)
    step = jax.pmap(
        lambda state, batch, accum: recipe.step(state, batch, accum=accum, axis_name=PMAP_AXIS),
        axis_name=PMAP_AXIS,
        devices=used,
        donate_argnums=0,
        static_broadcasted_argnums=2,
    )
    nll = jax.pmap(
        lambda params, batch: jax.lax.psum(recipe.nll(params, batch), PMAP_AXIS),
        axis_name=PMAP_AXIS,
        devices=used,
    )

    def split(batch: Batch) -> Batch:
        return jax.tree.map(lambda x: np.asarray(x).reshape(n, -1, *x.shape[1:]), batch)

    def spread(state: TrainState) -> TrainState:
        return copies(state, np.zeros(n))

    def take_step(state: TrainState, batch: Batch):
        accum = recipe.train.accum(_rows(batch) * jax.process_count())
        state, out = step(state, split(batch), accum)
        return state, _first_copy(out)

    def check_rows(rows: int) -> None:
        sharding.check_divides(rows, total, "pmap devices", "mesh=Pmap(devices=...)")

    shapes = jax.eval_shape(init, jax.random.key(0))
    first = SingleDeviceSharding(used[0])
    return Trainer(
        init=lambda key: spread(jax.jit(init)(key)),
        step=take_step,
        nll=lambda state, batch: _floats(_first_copy(nll(state.params, split(batch)))),
        save_view=_first_copy,
        load_view=spread,
        check_rows=check_rows,
        abstract=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first), shapes
        ),
        n_devices=total,
    )


def state_shardings(shapes: TrainState, specs: Any, mesh: Any, rules: Rules) -> TrainState:
    """NamedSharding of every leaf of a state: optimizer memory lies as the weight whose path and
    shape it has.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(_: Any, owner: params_lib.ParamSpec | None) -> NamedSharding:
        return replicated if owner is None else sharding.shardings(owner, mesh, rules)

    return jax.tree.map(one, shapes, params_lib.owners(specs, shapes))


def _rows(batch: Batch) -> int:
    return batch.tokens_BT.shape[0]


def _first_copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _floats(pair: tuple[jax.Array, jax.Array]) -> tuple[float, float]:
    total, n = jax.device_get(pair)
    return float(total), float(n)
