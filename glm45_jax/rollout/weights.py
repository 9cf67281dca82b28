"""Weights from a trainer to a running driver: prepare -> stage -> publish, or abort and the old
version goes on. Types to know: `Push`, `Parcel`.

Nothing of this touches running rows before `publish`, which swaps a pointer between two ticks. The
first weights of a driver go the same way, without `publish`: then its first push compiles nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.model import transformer
from glm45_jax.model.block import compute_dtype
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.quantize import quantize
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.types import Policy

EXACT = ("router_DE", "bias_E")  # the model reads them as float32: they keep the trainer's dtype


@dataclasses.dataclass(frozen=True)
class Push:
    """How weights go to an engine. policy: what becomes of running rows, see `Driver.push`. fp8:
    linear weights as e4m3 with a scale for each block of 128 x 128, quantised at every push.
    """

    policy: Policy = "in_flight"
    fp8: bool = False


@dataclasses.dataclass(eq=False)
class Parcel:
    """Weights on their way, which it alone holds; `stage` and `publish` hand them on and leave it
    empty.

    names, sums: path and checksum of each leaf. staged: whether they lie where the engine is.
    """

    version: int
    tree: Any
    leaves: list[jax.Array]
    names: list[str]
    sums: list[int]
    staged: bool = False

    @property
    def params(self) -> Any:
        """The tree an engine takes. Raises: ValueError where it was handed on."""
        if len(self.leaves) != len(self.names):
            raise ValueError(f"the weights of version {self.version} were handed on or aborted")
        return jax.tree.unflatten(self.tree, self.leaves)


def prepare(params: Any, version: int, *, cfg: ModelConfig, fp8: bool = False) -> Parcel:
    """Copies of a trainer's weights as the engine of `cfg` serves them, where the trainer has them:
    in `cfg.dtype` but for the router's, linear ones quantised with `fp8`, and their checksums.

    params: `transformer.Params` in any float dtype and sharding; the trainer may change or donate
    them once this returns. Where they are not in `cfg.dtype` yet, quantising needs room for a copy
    that is.

    Raises: ValueError names the first leaf that is missing, unknown, of another shape or not
    finite; nothing has changed then.
    """
    leaves = _checked(params, version, cfg)
    dtype, names = compute_dtype(cfg), list(leaves)
    owned: list[jax.Array] = []
    for name, leaf in leaves.items():
        kept = name.split(".")[-1] in EXACT or leaf.dtype == dtype
        owned.append(leaf if kept else _cast(leaf, dtype))
    for at, finite in enumerate(_of_each(_finite, owned)):
        if not finite:
            name, was = names[at], owned[at]
            owned.clear()
            raise ValueError(
                f"{name} {list(was.shape)} of version {version} has entries that are not finite "
                f"in {was.dtype}; the old weights go on. Look at the last update of the trainer"
            )
    tree = jax.tree.unflatten(jax.tree.structure(params), owned)
    if fp8:
        tree = quantize(tree, cfg)
        names = [params_lib.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    del owned
    theirs = {id(leaf) for leaf in jax.tree.leaves(params)}
    made, structure = jax.tree.flatten(tree)
    made = [_copy(leaf) if id(leaf) in theirs else leaf for leaf in made]
    return Parcel(version, structure, made, names, _checksums(made))


def stage(
    parcel: Parcel, to: Any = None, *, put: Callable[..., jax.Array] = jax.device_put
) -> Parcel:
    """The parcel where the engine is, every leaf compared with what was sent; the given one is
    empty afterwards.

    to: a device or sharding, or a tree of them that begins like the weights (with FP8, whose leaves
    lie otherwise than the trainer's, one for all); None: where they are. put: how a leaf travels.
    Leaf by leaf, each freed at its source: beside the old weights there are at most the new ones
    and one leaf.

    Raises: RuntimeError names the first leaf that did not arrive as it was sent; nothing has
    changed then, and what arrived is freed.
    """
    params = parcel.params
    targets = [None] * len(parcel.names)
    if to is not None:
        targets = jax.tree.leaves(jax.tree.broadcast(to, params))
    del params
    left, parcel.leaves = parcel.leaves, []
    sent = [[leaf.shape, leaf.dtype, total] for leaf, total in zip(left, parcel.sums, strict=True)]
    arrived: list[jax.Array] = []
    for target in targets:
        arrived.append(put(left.pop(0), target))
    sums = _checksums(arrived)
    came = [[leaf.shape, leaf.dtype, total] for leaf, total in zip(arrived, sums, strict=True)]
    for name, one, other in zip(parcel.names, sent, came, strict=True):
        if one != other:
            arrived.clear()
            raise RuntimeError(
                f"{name} of version {parcel.version} came as {_said(other)}, it was sent as "
                f"{_said(one)}; the old weights go on. Push again"
            )
    return dataclasses.replace(parcel, leaves=arrived, staged=True)


def publish(driver: Driver, parcel: Parcel, policy: Policy = "in_flight") -> None:
    """None; the driver serves by these weights from its next step on, or as the policy has it. The
    parcel is empty: the old weights are freed with the swap.

    Raises: ValueError for a parcel that was not staged, or a version that is not newer.
    """
    if not parcel.staged:
        raise ValueError(f"weights of version {parcel.version} were not staged; call stage first")
    driver.push(parcel.params, parcel.version, policy=policy)
    parcel.leaves = []


def abort(parcel: Parcel) -> None:
    """None; the weights on their way are freed, the driver goes on as if they had never been."""
    parcel.leaves = []


def push(
    driver: Driver,
    params: Any,
    version: int,
    *,
    cfg: ModelConfig,
    to: Any = None,
    how: Push = Push(),
) -> None:
    """None; `prepare`, `stage` and `publish` of a trainer's weights.

    Raises: ValueError, RuntimeError as they do, ValueError for a version that is not newer; the old
    weights go on.
    """
    driver.check_newer(version)
    publish(driver, stage(prepare(params, version, cfg=cfg, fp8=how.fp8), to), how.policy)


async def update(
    driver: Driver,
    params: Any,
    version: int,
    *,
    cfg: ModelConfig,
    to: Any = None,
    how: Push = Push(),
) -> None:
    """`push` without holding up the loop: weights are staged in a thread beside the ticks. When it
    returns, every later token is drawn by them. A task that is cancelled before that, but for the
    swap itself, leaves the old ones.
    """
    driver.check_newer(version)
    prepared = functools.partial(prepare, params, version, cfg=cfg, fp8=how.fp8)
    parcel = await asyncio.to_thread(lambda: stage(prepared(), to))
    given, parcel.leaves = parcel.params, []
    await driver.update(given, version, policy=how.policy)


def checksum(leaf: jax.Array) -> int:
    """Of the bits and places of an array, made on its devices: the sum, modulo 2**32, of its words
    times odd numbers that hang on their index. How it is sharded does not matter.
    """
    return _checksums([leaf])[0]


def _checksums(leaves: list[jax.Array]) -> list[int]:
    """`checksum` of each."""
    return [int(total) for total in _of_each(_checksum, leaves)]


def _of_each(program: Callable[[list[jax.Array]], list[jax.Array]], leaves: list[jax.Array]) -> Any:
    """A number of every leaf, on the host; leaves on the same devices are one dispatch."""
    places: dict[Any, list[int]] = {}
    for at, leaf in enumerate(leaves):
        places.setdefault(frozenset(leaf.sharding.device_set), []).append(at)
    found: dict[int, jax.Array] = {}
    for group in places.values():
        found |= zip(group, program([leaves[at] for at in group]), strict=True)
    return jax.device_get([found[at] for at in range(len(leaves))])


@jax.jit
def _checksum(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum_of_words(leaf) for leaf in leaves]


def _sum_of_words(x: jax.Array) -> jax.Array:
    kinds = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    words = jax.lax.bitcast_convert_type(x, kinds[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index * jnp.uint32(size % 2**32) + along
    mixed = index * jnp.uint32(2_654_435_761)  # 2**32 over the golden ratio
    return jnp.sum(words * ((mixed ^ (mixed >> 15)) | 1), dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype)


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


@jax.jit
def _copy(x: jax.Array) -> jax.Array:
    return jnp.copy(x)


def _said(leaf: list[Any]) -> str:
    shape, dtype, total = leaf
    return f"{dtype}{list(shape)} with checksum {total:#010x}"


def _checked(params: Any, version: int, cfg: ModelConfig) -> dict[str, jax.Array]:
    """Weights by path, in tree order, each of the shape that `cfg` has."""
    plan = transformer.specs(cfg)
    want = dict(params_lib.leaves_with_path(plan))
    flat = jax.tree_util.tree_leaves_with_path(params)
    got = {params_lib.path_name(path): leaf for path, leaf in flat}
    for name in [*want, *got]:
        spec, shape = want.get(name), np.shape(got.get(name, ()))
        if spec is None:
            raise ValueError(
                f"{name} {list(shape)} of version {version} is no weight of the engine's model; "
                "drop it, or serve the model that the trainer has"
            )
        if name not in got:
            raise ValueError(
                f"version {version} has no {name}, {list(spec.shape)} in the engine's model; push "
                "the whole tree of the same ModelConfig"
            )
        if shape != spec.shape:
            raise ValueError(
                f"{name} of version {version} is {list(shape)}, the engine's is "
                f"{list(spec.shape)}; push weights of the same ModelConfig"
            )
    kinds: list[Any] = [jax.tree.structure(t) for t in (params, params_lib.abstract(plan))]
    if kinds[0] != kinds[1]:
        raise ValueError(f"version {version} is a {type(params).__name__}; give transformer.Params")
    arrays = {n: w if isinstance(w, jax.Array) else jnp.array(w) for n, w in got.items()}
    for name, leaf in arrays.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{name} of version {version} is {leaf.dtype}; give floats")
    return arrays
