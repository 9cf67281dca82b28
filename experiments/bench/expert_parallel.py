"""A mixture of experts over devices beside one device, and what its exchange moves a second:
`python -m experiments.bench.expert_parallel` on a host with several GPUs.

The layer is GLM-4.5-Air's (128 experts, top-8, 4096 x 1408, one shared expert), forward and
backward, the same number of tokens on each device: efficiency is the time of one device with all
experts over the time of X devices with 1/X of them each. Exchanges are also timed without experts,
beside psum, all-gather and a plain all-to-all of as many bytes. Contenders take turns. Rows: op,
shape, impl, ms, gbs (that leave a device), efficiency. Writes the key "expert_parallel" of the
device's results; `--tiny` runs on virtual CPU devices and writes nothing.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.bench.kernels import Contender, of_jax, race
from experiments.bench.results import device_name, merge_result
from glm45_jax import params as params_lib
from glm45_jax import sharding
from glm45_jax.kernels.routing import route
from glm45_jax.model import config
from glm45_jax.model.expert_parallel import (
    GatherTokens,
    GatherWeights,
    Group,
    PaddedAllToAll,
    RaggedAllToAll,
)
from glm45_jax.sharding import MeshShape, Rules

TARGET_EFFICIENCY = 0.85
TIGHT = PaddedAllToAll(1.05)  # random weights route nearly evenly
AXIS = ("expert",)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model whose layer is timed, and the rows of T tokens that each device holds."""

    model: config.ModelConfig
    rows: int
    T: int
    samples: int


CASES = {
    "air": Case(config.glm45_air(), 4, 4096, 10),
    "tiny": Case(config.tiny(), 2, 32, 2),
}


def exchanges(platform: str) -> list[Any]:
    """Those that run here; the ragged one too where it is slow: that it is, is what we show."""
    every: list[Any] = [GatherTokens(), PaddedAllToAll(), TIGHT, GatherWeights(), RaggedAllToAll()]
    return [x for x in every if x.refuses(platform) is None]


def layer(case: Case, mesh: Mesh, rules: Rules) -> Contender:
    """Forward and backward of one mixture: gradients of its weights and of its input."""
    cfg, dtype = case.model, jnp.dtype(case.model.dtype)
    specs = cfg.moe.specs(1, cfg.d_model, cfg.init_std)
    layout = sharding.shardings(specs, mesh, rules)
    rows = NamedSharding(mesh, rules.spec(("batch", "seq", None)))
    shape = (case.rows * mesh.size, case.T, cfg.d_model)

    @functools.partial(jax.jit, out_shardings=(layout, rows, rows))
    def make(key):
        weights, x, g = jax.random.split(key, 3)
        p = jax.tree.map(
            lambda w: w.astype(dtype) if w.ndim > 2 else w, params_lib.init(specs, weights)
        )
        return p, jax.random.normal(x, shape, dtype), jax.random.normal(g, shape, dtype)

    def step(p, x_BTD, g_BTD):
        def scalar(p, x_BTD):
            p = jax.tree.map(lambda w: w[0], p)
            with sharding.use(mesh, rules):
                out = cfg.moe(p, x_BTD, segments_BT=None, impl_route="auto", impl_matmul="auto")
            return (out.y_BTD.astype(jnp.float32) * g_BTD.astype(jnp.float32)).sum(), out.spilled

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(p, x_BTD)

    return of_jax(step, *make(jax.random.key(0)))


def dispatch(case: Case, mesh: Mesh, exchange: Any) -> Contender:
    """There and back with no experts between: y is the sum of a token's gates times the token."""
    cfg, M = case.model, case.rows * case.T * mesh.size
    E, group = cfg.moe.experts, Group(AXIS, AXIS, mesh.size)
    rows = NamedSharding(mesh, PartitionSpec(AXIS))

    @functools.partial(jax.jit, out_shardings=rows)
    def make(key):
        x, z = jax.random.split(key)
        dtype = jnp.dtype(cfg.dtype)
        return jax.random.normal(x, (M, cfg.d_model), dtype), jax.random.normal(z, (M, E))

    def body(x_mD, logits_mE):
        r = route(logits_mE, jnp.zeros(E), top_k=cfg.moe.top_k)
        weights = jnp.zeros((E // mesh.size, 1))
        return exchange(x_mD, r, weights, group=group, apply=lambda x_PD, w, rows_E: x_PD)[0]

    spec = PartitionSpec(AXIS)
    f = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return of_jax(f, *make(jax.random.key(0)))


def collective(mesh: Mesh, body: Callable, nbytes: int) -> Contender:
    """A collective over all devices of `nbytes` of bfloat16 on each."""
    n, D = mesh.size, 1024
    rows = nbytes // (2 * D * n) * n  # of a device
    spec = PartitionSpec(AXIS)
    make = jax.jit(
        lambda: jnp.ones((n * rows, D), jnp.bfloat16), out_shardings=NamedSharding(mesh, spec)
    )
    f = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return of_jax(f, make())


def swap(x_MD: jax.Array) -> jax.Array:
    n = jax.lax.axis_size(AXIS)
    return jax.lax.all_to_all(x_MD.reshape(n, -1, x_MD.shape[1]), AXIS, 0, 0).reshape(x_MD.shape)


def report(op: str, shape: str, found: dict[str, dict[str, Any]], more: Callable) -> list[dict]:
    """Rows of a race; `more(impl, ms)` gives the other columns."""
    table = []
    for impl, result in found.items():
        row = {"op": op, "shape": shape, "impl": impl} | result
        if "ms" in result:
            row |= {k: round(v, 3) for k, v in result.items()} | more(impl, result["ms"])
        shown = {k: v for k, v in row.items() if k not in ("op", "shape", "impl")}
        print(f"{op:10} {shape:34} {impl:28} {shown}", flush=True)
        table.append(row)
    return table


def layers(case: Case, mesh: Mesh, shape: str) -> list[dict]:
    """One device with all experts, and all devices by every exchange."""
    alone = sharding.make_mesh(MeshShape(fsdp=1), jax.devices()[:1])
    contenders: dict[str, Callable[[], Contender]]
    contenders = {"one device": functools.partial(layer, case, alone, Rules())}
    for exchange in exchanges(jax.default_backend()):
        rules = Rules(exchange=exchange)
        contenders[str(exchange)] = functools.partial(layer, case, mesh, rules)
    found = race(contenders, samples=case.samples)
    one = found["one device"]["ms"]
    return report("moe", shape, found, lambda _, ms: {"efficiency": round(one / ms, 3)})


def dispatches(case: Case, mesh: Mesh, shape: str) -> list[dict]:
    """Exchanges without experts, in GB/s of the rows that must leave a device, both ways, and the
    collectives of the machine, in GB/s that leave a device.
    """
    n, cfg = mesh.size, case.model
    M, itemsize = case.rows * case.T, jnp.dtype(cfg.dtype).itemsize
    one_way = M * cfg.moe.top_k * cfg.d_model * itemsize * (n - 1) / n
    found = race(
        {
            str(x): functools.partial(dispatch, case, mesh, x)
            for x in exchanges(jax.default_backend())
            if not x.gathers_experts
        },
        samples=case.samples,
    )
    table = report("dispatch", shape, found, lambda _, ms: {"gbs": round(2 * one_way / ms / 1e6)})
    nbytes = M * cfg.moe.top_k * cfg.d_model * itemsize
    leaves = {  # bytes a device sends, of a ring where there is one
        "psum": 2 * nbytes * (n - 1) / n,
        "all_gather": nbytes * (n - 1),
        "all_to_all": nbytes * (n - 1) / n,
    }
    bodies: dict[str, Callable] = {
        "psum": lambda x: jax.lax.psum(x, AXIS),
        "all_gather": lambda x: jax.lax.all_gather(x, AXIS, axis=0, tiled=True),
        "all_to_all": swap,
    }
    found = race(
        {name: functools.partial(collective, mesh, f, nbytes) for name, f in bodies.items()},
        samples=case.samples,
    )
    size = f"{nbytes / 2**20:.0f} MiB a device"
    return table + report(
        "collective", size, found, lambda name, ms: {"gbs": round(leaves[name] / ms / 1e6)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax.config.update("jax_num_cpu_devices", 2)
    case = CASES["tiny" if args.tiny else "air"]
    mesh = sharding.make_mesh(MeshShape(fsdp=1, expert=-1))
    if mesh.size == 1:
        raise SystemExit("one device: nothing to exchange; needs a host with several")
    shape = f"{mesh.size} x {case.rows * case.T} tokens"
    table = layers(case, mesh, shape)
    split = [r for r in table if "efficiency" in r and r["impl"] != "one device"]
    best = max(split, key=lambda r: r["efficiency"])
    print(f"best: {best['impl']}, efficiency {best['efficiency']} (target {TARGET_EFFICIENCY})")

    def save() -> None:
        if not args.tiny:
            merge_result(device_name(), "expert_parallel", {"rows": table})

    save()
    table += dispatches(case, mesh, shape)
    save()


if __name__ == "__main__":
    main()
