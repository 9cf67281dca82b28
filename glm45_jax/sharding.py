"""Meshes and where arrays lie on them: logical axis names, `Rules`, constraints.

Arrays are described by logical axes ("batch", "embed", "experts"...); a `Rules` value says which
mesh axes each lies on. `use(mesh, rules)` sets both for the code traced inside; without it every
function here is the identity, so model code runs unchanged on one device.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm45_jax.params import is_spec

AXES = ("data", "fsdp", "expert", "context", "tensor")
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; at most one may be -1 (the rest of the devices)."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(n == 0 or n < -1 for n in sizes):
            raise ValueError(
                f"mesh {dict(zip(AXES, sizes, strict=True))}: sizes are >= 1, at most one is -1"
            )

    def resolve(self, n_devices: int) -> tuple[int, ...]:
        """Sizes in the order of `AXES`.

        Raises: ValueError where they do not multiply to `n_devices`.
        """
        sizes = dataclasses.astuple(self)
        known = math.prod(n for n in sizes if n > 0)
        if -1 in sizes and n_devices % known == 0:
            return tuple(n_devices // known if n == -1 else n for n in sizes)
        if known != n_devices:
            named = dict(zip(AXES, sizes, strict=True))
            raise ValueError(
                f"mesh {named} needs a multiple of {known} devices, there are {n_devices}; "
                "set one to -1"
            )
        return sizes


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes of each logical axis. Weights by fsdp and tensor; activations by batch.

    The default is fully sharded data parallelism with tensor parallel heads, mlp and vocabulary.
    exchange: how tokens meet experts on other devices, a value of `model/expert_parallel.py`; None
    picks by the size of the group and the platform (docs/adr/0011). keys: how queries meet keys on
    other devices, a value of `model/context_parallel.py`; None picks by size (docs/adr/0015).
    """

    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    seq: tuple[str, ...] = ("context",)
    embed: tuple[str, ...] = ("fsdp",)
    vocab: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert",)
    layers: tuple[str, ...] = ()
    exchange: Any = None
    keys: Any = None

    def spec(self, axes: Axes) -> PartitionSpec:
        """PartitionSpec of an array with these logical axes; a mesh axis is used once, by the first
        that asks.

        Raises: ValueError for a logical axis that has no rule.
        """
        used: set[str] = set()
        parts: list[tuple[str, ...] | None] = []
        known = {f.name for f in dataclasses.fields(self)} - {"exchange", "keys"}
        for name in axes:
            if name is not None and name not in known:
                raise ValueError(f"no rule for logical axis {name!r}; rules are {sorted(known)}")
            mesh_axes = (
                () if name is None else tuple(a for a in getattr(self, name) if a not in used)
            )
            used.update(mesh_axes)
            parts.append(mesh_axes or None)
        return PartitionSpec(*parts)


_ambient: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
    "mesh_and_rules", default=None
)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with all five axes over `devices` (default: every device of every host), axis types
    Auto. Sides of a torus are split where an axis is shorter: 8 x 8 of 4 x 4 x 4 chips. The first
    axis that is longer than 1 goes over the slices of TPU chips, and over the hosts of GPUs: the
    last axes stay where links are fast.

    Raises: ValueError where that axis does not divide over the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = shape.resolve(len(devices))
    # GPUs lie host by host already, each a slice to some.
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"})
    torus = functools.partial(mesh_utils.create_device_mesh, allow_split_physical_axes=True)
    if slices <= 1:
        grid = torus(sizes, devices)
    else:
        outer = next(i for i, n in enumerate(sizes) if n > 1)
        if sizes[outer] % slices:
            raise ValueError(
                f"mesh axis {AXES[outer]!r} of {sizes[outer]} devices does not divide over the "
                f"chips' {slices} slices; make the first axis that is longer than 1 a multiple"
            )
        inside = (*sizes[:outer], sizes[outer] // slices, *sizes[outer + 1 :])
        by_slice = sorted({d.slice_index for d in devices})
        parts = [torus(inside, [d for d in devices if d.slice_index == i]) for i in by_slice]
        grid = np.concatenate(parts, axis=outer)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh: Mesh | None, rules: Rules) -> Iterator[None]:
    """Code traced inside sees this mesh and these rules. `None` leaves one device."""
    token = _ambient.set(None if mesh is None else (mesh, rules))
    try:
        yield
    finally:
        _ambient.reset(token)


def current() -> tuple[Mesh, Rules] | None:
    """The mesh and rules set by `use`, or None."""
    return _ambient.get()


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, laid out by the rules of its logical axes; `x` itself where no mesh is set."""
    ambient = current()
    if ambient is None:
        return x
    mesh, rules = ambient
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, fitting(rules.spec(axes), x.shape, mesh.shape))
    )


def shardings(specs: Any, mesh: Mesh, rules: Rules) -> Any:
    """NamedSharding of every weight of a plan. A dimension that its mesh axes do not divide is
    replicated; experts are not.

    Raises: ValueError where experts do not divide, or the exchange cannot run on these devices.
    """
    platform = mesh.devices.flat[0].platform
    if rules.exchange is not None and (why := rules.exchange.refuses(platform)):
        raise ValueError(
            f"rules.exchange={rules.exchange}: {why}; rules.exchange=None picks for you"
        )

    def one(spec: Any) -> NamedSharding:
        for n, name in zip(spec.shape, spec.axes, strict=True):
            if name == "experts":
                check_experts(n, mesh.shape, rules)
        return NamedSharding(mesh, fitting(rules.spec(spec.axes), spec.shape, mesh.shape))

    return jax.tree.map(one, specs, is_leaf=is_spec)


def batch_axes(mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    """Mesh axes over which sequences are split, those of size 1 left out."""
    return tuple(a for a in rules.batch if mesh.shape[a] > 1)


def check_batch(rows: int, sizes: Mapping[str, int], rules: Rules) -> None:
    """Raises ValueError where `rows` sequences do not divide over the batch axes of a mesh with
    these sizes (`mesh.shape`).
    """
    n = math.prod(sizes[a] for a in rules.batch)
    check_divides(rows, n, f"devices on axes {rules.batch}", "mesh or rules.batch")


def check_experts(experts: int, sizes: Mapping[str, int], rules: Rules) -> None:
    """Raises ValueError where the experts do not divide over their axes of a mesh of this size."""
    n = ways(rules.experts, sizes)
    if experts % n:
        raise ValueError(
            f"{experts} experts do not divide over {n} devices on axes {rules.experts}; "
            f"use {math.gcd(experts, n)} devices there or change mesh or rules.experts"
        )


def check_divides(rows: int, n: int, what: str, change: str) -> None:
    """Raises ValueError where a batch of `rows` does not divide into `n`, with the way out."""
    if rows % n:
        raise ValueError(
            f"batch of {rows} rows is not a multiple of {n} {what}; "
            f"use {max(n, rows // n * n)} rows or change {change}"
        )


def flat(x_BT: jax.Array) -> jax.Array:
    """[M, ...] of [B, T, ...] so that every device keeps the tokens it has, in an order that
    `unflat` undoes; zeros fill T up to divide.

    B·T in row order would put a device's tokens apart wherever both axes are split, and XLA then
    gives each device of a row the whole of it: its product with a vocabulary is made once each.
    """
    B, T = x_BT.shape[:2]
    if (split := _split_rows(B)) is None:
        return x_BT.reshape(B * T, *x_BT.shape[2:])
    mesh, batch, seq = split
    rows, parts = ways(batch, mesh.shape), ways(seq, mesh.shape)
    x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % parts), *((0, 0),) * (x_BT.ndim - 2)))
    x = x_BT.reshape(rows, B // rows, parts, -1, *x_BT.shape[2:])
    x_M = jnp.swapaxes(x, 1, 2).reshape(-1, *x_BT.shape[2:])
    lies = NamedSharding(mesh, PartitionSpec((*batch, *seq)))
    return jax.lax.with_sharding_constraint(x_M, lies)


def unflat(x_M: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x_BT` of shape [B, T] of what `flat` made of it."""
    B, T = shape
    if (split := _split_rows(B)) is None:
        return x_M.reshape(B, T)
    mesh, batch, seq = split
    rows, parts = ways(batch, mesh.shape), ways(seq, mesh.shape)
    x = jnp.swapaxes(x_M.reshape(rows, parts, B // rows, -1), 1, 2)
    lies = NamedSharding(mesh, PartitionSpec(batch or None, seq))
    return jax.lax.with_sharding_constraint(x.reshape(B, -1), lies)[:, :T]


def _split_rows(B: int) -> tuple[Mesh, tuple[str, ...], tuple[str, ...]] | None:
    """Mesh axes over which B rows, and the tokens of each, are split; None where rows are whole."""
    if (ambient := current()) is None:
        return None
    mesh, rules = ambient
    batch, seq = (names(entry) for entry in rules.spec(("batch", "seq")))
    if ways(seq, mesh.shape) == 1:
        return None
    return mesh, batch if B % ways(batch, mesh.shape) == 0 else (), seq


def put(tree: Any, mesh: Mesh, rules: Rules, axes: Axes = ("batch", "seq")) -> Any:
    """Host-local numpy arrays as global arrays: this host's rows are its slice of the global
    batch. Where a row lies on devices of several hosts (four chips are one on a TPU), each host
    reads whole rows, of its own, and the devices exchange the parts.

    Raises: ValueError where a host would have to read a part of a row for that.
    """
    spec = rules.spec(axes)
    split = "seq" in axes and _hosts_of_a_row(mesh, rules) > 1
    rows = (*names(spec[0]), *names(rules.spec(("batch", "seq"))[1])) if split else spec[0]
    first = NamedSharding(mesh, PartitionSpec(rows))

    def one(x: np.ndarray) -> jax.Array:
        lies = first if split else NamedSharding(mesh, PartitionSpec(*spec[: x.ndim]))
        return jax.make_array_from_process_local_data(lies, x)

    if not split:
        return jax.tree.map(one, tree)
    for x in jax.tree.leaves(tree):
        of_all = x.shape[0] * jax.process_count()
        check_divides(of_all, ways(rows, mesh.shape), f"devices on axes {rows}", "mesh.context")
    ranks = tuple(x.ndim for x in jax.tree.leaves(tree))
    to = tuple(NamedSharding(mesh, PartitionSpec(*spec[:n])) for n in ranks)
    leaves, structure = jax.tree.flatten(jax.tree.map(one, tree))
    return jax.tree.unflatten(structure, _relay(to)(leaves))


@functools.cache
def _relay(to: tuple[NamedSharding, ...]) -> Any:
    """Program that lays arrays out anew."""
    return jax.jit(lambda leaves: leaves, out_shardings=list(to))


@functools.cache
def _hosts_of_a_row(mesh: Mesh, rules: Rules) -> int:
    """Most hosts among which the devices of one row are."""
    seq = names(rules.spec(("batch", "seq"))[1])
    rest = [a for a in mesh.axis_names if a not in seq]
    order = [mesh.axis_names.index(a) for a in (*rest, *seq)]
    shares = mesh.devices.transpose(order).reshape(-1, ways(seq, mesh.shape))
    return max(len({device.process_index for device in share}) for share in shares)


def placed_shapes(tree: Any, mesh: Mesh, rules: Rules, axes: Axes = ("batch", "seq")) -> Any:
    """Shapes of global arrays as `put` lays them; leaves have a shape and a dtype."""
    spec = rules.spec(axes)

    def one(x: Any) -> jax.ShapeDtypeStruct:
        lies = NamedSharding(mesh, PartitionSpec(*spec[: len(x.shape)]))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)

    return jax.tree.map(one, tree)


def fitting(spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec without the entries that do not divide their dimension. sizes: devices along each
    mesh axis.
    """
    parts = []
    for size, entry in zip(shape, spec, strict=True):
        parts.append(entry if size % ways(entry, sizes) == 0 else None)
    return PartitionSpec(*parts)


def local_size(shape: tuple[int, ...], axes: Axes, rules: Rules, sizes: Mapping[str, int]) -> int:
    """Elements of an array that one device holds."""
    spec = fitting(rules.spec(axes), shape, sizes)
    return math.prod(n // ways(entry, sizes) for n, entry in zip(shape, spec, strict=True))


def ways(entry: str | tuple[str, ...] | None, sizes: Mapping[str, int]) -> int:
    """Parts into which one entry of a PartitionSpec cuts its dimension."""
    return math.prod(sizes[axis] for axis in names(entry))


def names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else (entry or ())
