"""One plan of every weight: shapes, logical axes, kinds. Init, counts, labels are maps over it.

The type to know is `ParamSpec`. A model is a pytree whose leaves are `ParamSpec`s; the weights are
a pytree of the same structure. Nothing else in the library declares a weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Kind = Literal["matrix", "embed", "norm", "bias", "state"]
KINDS: tuple[Kind, ...] = ("matrix", "embed", "norm", "bias", "state")
BATCH_AXES = ("layers", "experts")  # axes that index independent weights, not a side of a matrix


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """What one weight is.

    shape: global shape. axes: one logical axis name (or None) a dimension, see `sharding.Rules`.
    kind: "matrix" goes to Muon; "embed", "norm", "bias" do not (spec 2.7); "state" moves by rule,
    never by gradient. fan_in: product of the input dimensions of a matrix, so that [L, D, N, H]
    reads as D x (N*H); None takes the last two dimensions as they are. init: standard deviation of
    a normal, or "ones" / "zeros".
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kind: Kind = "matrix"
    fan_in: int | None = None
    dtype: Any = jnp.float32
    init: float | Literal["ones", "zeros"] = 0.02

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"shape {self.shape} has {len(self.shape)} dims, axes {self.axes} {len(self.axes)}"
            )
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {KINDS}")

    @property
    def batch_dims(self) -> int:
        """Leading dimensions that count independent weights (layers, experts)."""
        n = 0
        while n < len(self.axes) and self.axes[n] in BATCH_AXES:
            n += 1
        if self.kind == "matrix" and self.fan_in is None:
            return max(n, len(self.shape) - 2)
        return n

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(count, m, n): the weight as a batch of matrices, inputs by outputs.

        Raises: ValueError where no split of the trailing dimensions has `fan_in` inputs.
        """
        b = self.batch_dims
        count, rest = math.prod(self.shape[:b]), self.shape[b:]
        fan_in = rest[0] if self.fan_in is None else self.fan_in
        n_all = math.prod(rest)
        if len(rest) < 2 or fan_in not in (math.prod(rest[:i]) for i in range(1, len(rest))):
            raise ValueError(
                f"{self} is no batch of matrices: fan_in {fan_in} splits none of {rest}"
            )
        return count, fan_in, n_all // fan_in

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def is_spec(x: Any) -> bool:
    """True for a leaf of a plan."""
    return isinstance(x, ParamSpec)


def tree_map(f: Callable[..., Any], specs: Any, *rest: Any) -> Any:
    """`jax.tree.map` that treats each `ParamSpec` as one leaf."""
    return jax.tree.map(f, specs, *rest, is_leaf=is_spec)


def leaves_with_path(specs: Any) -> list[tuple[str, ParamSpec]]:
    """(dotted path, spec) of every weight, in tree order."""
    flat = jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    return [(path_name(path), spec) for path, spec in flat]


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as dotted text: `moe.mlp.w_gate_LEDF`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def owners(specs: Any, tree: Any) -> Any:
    """For each leaf of `tree` (optimizer memory, say) the `ParamSpec` whose path ends its path and
    whose shape it has.

    None where there is none, as for a step count. `tree` may hold arrays or `ShapeDtypeStruct`s.
    """
    by_path = dict(leaves_with_path(specs))

    def one(path: tuple[Any, ...], leaf: Any) -> ParamSpec | None:
        parts = path_name(path).split(".")
        for i in range(len(parts)):
            spec = by_path.get(".".join(parts[i:]))
            if spec is not None and spec.shape == leaf.shape:
                return spec
        return None

    return jax.tree_util.tree_map_with_path(one, tree)


def init(specs: Any, key: jax.Array) -> Any:
    """Weights of the plan. Each leaf's key comes from its path, so adding a weight moves no other.

    Call under `jit` with `out_shardings` to have each device draw only its part.
    Source: normal(0, 0.02) for matrices, ones for norms, zeros for biases (spec 2.1).
    """

    def one(path: tuple[Any, ...], spec: ParamSpec) -> jax.Array:
        if spec.init == "ones":
            return jnp.ones(spec.shape, spec.dtype)
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, spec.dtype)
        leaf_key = jax.random.fold_in(key, _stable_hash(path_name(path)))
        draw = jax.random.normal(leaf_key, spec.shape, jnp.float32)
        return (draw * jnp.float32(spec.init)).astype(spec.dtype)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def abstract(specs: Any) -> Any:
    """`jax.ShapeDtypeStruct` of every weight, without sharding."""
    return tree_map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)


def count(specs: Any, kinds: tuple[Kind, ...] = ("matrix", "embed", "norm", "bias")) -> int:
    """Number of trained parameters (kind "state" is not trained, and not counted by default)."""
    return sum(s.size for s in jax.tree.leaves(specs, is_leaf=is_spec) if s.kind in kinds)


def labels(specs: Any) -> Any:
    """Tree of kinds, for optimizers that route by kind."""
    return tree_map(lambda s: s.kind, specs)


def _stable_hash(text: str) -> int:
    """FNV-1a, 31 bits: Python's own `hash` differs from run to run."""
    h = 0x811C9DC5
    for byte in text.encode():
        h = ((h ^ byte) * 0x01000193) & 0xFFFFFFFF
    return h & 0x7FFFFFFF
