"""Memory of a device by term, and the settings nearest to an experiment's that fit. All of it
estimates (`model/cost.py`); the type to know is `Setting`.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from glm45_jax import sharding
from glm45_jax.kernels import attention
from glm45_jax.model import cost
from glm45_jax.optim.muon import Muon
from glm45_jax.plan import roofline
from glm45_jax.plan.targets import Target
from glm45_jax.sharding import AXES, MeshShape

# Arrays of all scores, float32, that live at once where attention is the reference. Compiled so
# for v5p at 4,096 tokens, 96 heads and a row a device, glm45 took 12.2 GiB more than the other
# terms sum to, and one such array has 6.
SCORE_ARRAYS = 2.0
LONG = 16_384  # tokens of rows that are worth splitting
MARGIN = 0.95  # of the memory that a setting may fill by estimate
REMAT = ("none", "dots", "outputs", "full")  # what a block keeps, most first: least is made twice


@dataclasses.dataclass(frozen=True)
class Setting:
    """changes: (path, value) as `--set` takes them. bytes: of a device, by estimate."""

    changes: tuple[tuple[str, Any], ...]
    bytes: float

    def text(self) -> str:
        """To be pasted behind the command."""
        told = (f"{path}={value}" for path, value in self.changes)
        return " ".join(f'--set "{t}"' if "(" in t else f"--set {t}" for t in told)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A remat policy. bytes: of a device with it, by estimate. again_s: arithmetic of a step that
    it does twice, at the chip's full rate.
    """

    name: str
    bytes: float
    again_s: float
    fits: bool


def sizes_of(exp: Any, target: Target) -> dict[str, int]:
    """Devices along each mesh axis on the target.

    Raises: ValueError where the mesh is not of so many devices, or not a mesh.
    """
    if not isinstance(exp.mesh, MeshShape):
        raise ValueError(f"mesh {exp.mesh} is of this host; a target takes mesh=MeshShape(...)")
    try:
        return dict(zip(AXES, exp.mesh.resolve(target.devices), strict=True))
    except ValueError as error:
        raise ValueError(f"target {target} has {target.devices} devices: {error}") from error


def keeps_scores(exp: Any, platform: str) -> bool:
    """Whether attention's backward pass there has all scores of a row in memory."""
    if platform == "gpu":
        return False
    (heads, width), _ = exp.model.mixer.kv_shapes
    dtype = jnp.dtype(exp.model.dtype)
    q = jax.ShapeDtypeStruct((1, exp.data.seq_len, exp.model.mixer.heads, width), dtype)
    k = jax.ShapeDtypeStruct((1, exp.data.seq_len, heads, width), dtype)
    if platform == "tpu":  # `supports` would ask the device that is here
        from glm45_jax.kernels import attention_tpu  # Pallas is imported where it is used

        if attention_tpu.refuses(q, k, k, rows=1) is None:
            return False
    for i in attention.IMPLS:
        if platform in i.auto and not (i.supports(q, k, k) or i.yields(q, k, k)):
            return i.name == "reference"
    return True


def terms(exp: Any, rows: int, target: Target) -> dict[str, float]:
    """Bytes of one device by term in a step of `rows` rows, those that begin with "E" estimates."""
    sizes = sizes_of(exp, target)
    micro = rows // exp.train.accum(rows)
    found = cost.memory_per_device(
        exp.model,
        optim=exp.optim,
        mesh_sizes=tuple(sizes.values()),
        rules=exp.rules,
        rows=micro,
        seq_len=exp.data.seq_len,
        accumulate=micro < rows,
        platform=target.chip.platform,
    )
    del found["total"]
    if keeps_scores(exp, target.chip.platform):
        found["E scores of attention"] = SCORE_ARRAYS * _scores(exp, micro, sizes)
    return found | {"total": sum(found.values())}


def search(exp: Any, rows: int, target: Target, *, scale: float, wanted: int = 3) -> list[Setting]:
    """The settings that fit by estimate times `scale` (what the compiler said over the estimate),
    those with the fewest and smallest changes first.
    """
    room = MARGIN * target.chip.hbm_bytes
    found: list[Setting] = []
    for _, changes in _by_distance(exp, rows, target):
        try:
            changed = _changed(exp, changes)
            check(changed, rows, target)
            size = scale * terms(changed, rows, target)["total"]
        except ValueError:  # micro-batches or experts that do not come out even
            continue
        if size <= room and not any(set(s.changes) <= set(changes) for s in found):
            found.append(Setting(changes, size))
            if len(found) == wanted:
                break
    return found


def policies(exp: Any, rows: int, target: Target, *, scale: float = 1.0) -> list[Policy]:
    """Every remat policy with all else as it is, the one that repeats least first; the first that
    fits is the cheapest. scale: of the estimates, as of `search`.
    """
    chip = target.chip
    flops = cost.flops_per_token(exp.model, exp.data.seq_len)
    tokens = rows * exp.data.seq_len / target.devices
    found = []
    for name in REMAT:
        changed = _changed(exp, (("model.remat", name),))
        size = scale * terms(changed, rows, target)["total"]
        again = tokens * roofline.recomputed(changed.model, flops) / chip.flops
        found.append(Policy(name, size, again, size <= MARGIN * chip.hbm_bytes))
    return found


def _scores(exp: Any, micro: int, sizes: dict[str, int]) -> float:
    """Bytes of one array of scores on a device."""
    heads = math.ceil(exp.model.mixer.heads / sharding.ways(exp.rules.heads, sizes))
    queries = math.ceil(exp.data.seq_len / sharding.ways(exp.rules.seq, sizes))
    rows = math.ceil(micro / sharding.ways(exp.rules.batch, sizes))
    return 4.0 * rows * heads * queries * exp.data.seq_len


def _by_distance(exp: Any, rows: int, target: Target) -> Iterator[tuple[float, tuple]]:
    """(distance, changes) of every combination but none, nearest first."""
    sizes = sizes_of(exp, target)
    micro = rows // exp.train.accum(rows)
    parts = [_remat(exp), _micro_rows(micro, sizes, exp), _optimizer(exp), _meshes(exp, sizes)]
    heap: list[tuple[float, int, tuple]] = []
    for number, combined in enumerate(itertools.product(*parts)):
        distance = sum(far for far, _ in combined)
        changes = tuple(change for _, some in combined for change in some)
        if changes:
            heapq.heappush(heap, (distance, number, changes))
    while heap:
        distance, _, changes = heapq.heappop(heap)
        yield distance, changes


def _remat(exp: Any) -> list[tuple[float, tuple]]:
    less = REMAT[REMAT.index(exp.model.remat) + 1 :]
    return [(0.0, ()), *((1.0 + 0.1 * i, (("model.remat", r),)) for i, r in enumerate(less))]


def _micro_rows(micro: int, sizes: dict[str, int], exp: Any) -> list[tuple[float, tuple]]:
    """Halves, down to a row for each part of the batch in some mesh."""
    found: list[tuple[float, tuple]] = [(0.0, ())]
    halvings = 1
    while micro % 2**halvings == 0 and halvings <= 10:
        found.append((0.9 + 0.2 * halvings, (("train.micro_rows", micro // 2**halvings),)))
        halvings += 1
    return found


def _optimizer(exp: Any) -> list[tuple[float, tuple]]:
    """Momentum in bfloat16, then weights too (rounded at random): these change the run's numbers,
    the more the further.
    """
    found: list[tuple[float, tuple]] = [(0.0, ())]
    changes: tuple = ()
    if isinstance(exp.optim, Muon) and exp.optim.momentum_dtype == "float32":
        changes = (("optim.momentum_dtype", "bfloat16"),)
        found.append((1.2, changes))
    if exp.optim.master_dtype == "float32":
        found.append((2.4, (*changes, ("optim.master_dtype", "bfloat16"))))
    return found


def _meshes(exp: Any, sizes: dict[str, int]) -> list[tuple[float, tuple]]:
    """Meshes of as many devices with other expert and tensor axes, and of long rows with a context
    axis that holds the experts too; fsdp takes the rest.
    """
    n = math.prod(sizes.values())
    found: list[tuple[float, tuple]] = [(0.0, ())]
    for expert, tensor in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        rest = n // (sizes["data"] * sizes["context"] * expert * tensor)
        new = sizes | {"expert": expert, "tensor": tensor, "fsdp": rest}
        if new == sizes or rest < 1 or math.prod(new.values()) != n:
            continue
        changed = tuple((f"mesh.{a}", new[a]) for a in AXES if new[a] != sizes[a])
        steps = sum(abs(math.log2(new[a] / sizes[a])) for a in ("expert", "tensor"))
        found.append((1.4 + 0.3 * steps, changed))
    for context in (2, 4, 8, 16) if exp.data.seq_len >= LONG else ():
        new = sizes | {"expert": 1, "tensor": 1, "context": context}
        new["fsdp"] = n // (sizes["data"] * context)
        changed = tuple((f"mesh.{a}", new[a]) for a in AXES if new[a] != sizes[a])
        if math.prod(new.values()) == n and changed:
            rule = ("rules.experts", ("context",))
            found.append((1.3 + 0.3 * math.log2(context), (*changed, rule)))
    return found


def _changed(exp: Any, changes: tuple) -> Any:
    """The experiment with the changes; raises ValueError where they make no experiment."""
    for path, value in changes:
        part, field = path.split(".")
        new = dataclasses.replace(getattr(exp, part), **{field: value})
        exp = dataclasses.replace(exp, **{part: new})
    return exp


def check(exp: Any, rows: int, target: Target) -> None:
    """Raises ValueError where a micro-batch or the experts do not divide over the target's mesh."""
    sizes = sizes_of(exp, target)
    if exp.model.n_moe + exp.model.n_mtp:
        sharding.check_experts(exp.model.moe.experts, sizes, exp.rules)
    sharding.check_batch(rows // exp.train.accum(rows), sizes, exp.rules)
