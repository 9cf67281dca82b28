"""What attention of rows split over 8 devices holds and moves, forward and backward:
`python -m experiments.bench.context_parallel` on any machine, `--time` on one with accelerators.

One row of GLM-4.5's attention (96/8 heads of 128, bfloat16), compiled for 8 devices: temporary
memory of one, as the compiler reports it, and bytes that come out of its collectives. Contenders:
the definition left to XLA's partitioner, keys gathered, keys in a ring (docs/adr/0015). Without an
accelerator the 8 devices are virtual CPUs, whose compiler may hold bfloat16 sums in float32. Writes
the key "context_parallel" of the device's results.
"""

import argparse
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from experiments.bench.kernels import Contender, of_jax, race
from experiments.bench.results import device_name, merge_result
from glm45_jax import sharding
from glm45_jax.kernels.attention import reference
from glm45_jax.model import context_parallel
from glm45_jax.model.context_parallel import GatherKeys, RingKeys
from glm45_jax.sharding import MeshShape, Rules

B, N, K, H = 1, 96, 8, 128
LENGTHS = (32_768, 131_072)
CONTENDERS: dict[str, GatherKeys | RingKeys | None] = {
    "partitioner": None,
    "gather": GatherKeys(),
    "ring": RingKeys(),
}
MOVES = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
BYTES = {"bf16": 2, "f32": 4, "s32": 4}


def layer(mesh: Mesh, meet: Any) -> Any:
    """Gradients of attention in q, k and v; rows lie as the model lays them."""
    rules = Rules(keys=meet)

    def run(q_BTNH, k_BTKH, v_BTKH, cotangent_BTNH):
        with sharding.use(mesh, rules):
            attend = reference if meet is None else context_parallel.attend()
            _, pull = jax.vjp(attend, q_BTNH, k_BTKH, v_BTKH)
            return pull(cotangent_BTNH)

    lies = NamedSharding(mesh, rules.spec(("batch", "seq", "kv_heads", "head_dim")))
    return jax.jit(run, out_shardings=(lies,) * 3)


def shapes(mesh: Mesh, T: int) -> list[jax.ShapeDtypeStruct]:
    """Of q, k, v and the output's gradient."""
    lies = NamedSharding(mesh, Rules().spec(("batch", "seq", "kv_heads", "head_dim")))
    make = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=lies)
    return [make((B, T, heads, H)) for heads in (N, K, K, N)]


def moved(text: str) -> dict[str, dict[str, float]]:
    """Collectives in a compiled program and MiB that come out of them, by kind; one in a loop
    counts once.
    """
    found: dict[str, dict[str, float]] = {}
    for shapes, kind in re.findall(rf"= (.+?) ({MOVES})(?:-start)?\(", text):
        sizes = [
            BYTES[dtype] * math.prod(map(int, dims.split(",")))
            for dtype, dims in re.findall(r"(bf16|f32|s32)\[([\d,]+)\]", shapes)
        ]
        row = found.setdefault(kind, {"n": 0, "mib": 0.0})
        found[kind] = {"n": row["n"] + 1, "mib": round(row["mib"] + sum(sizes) / 2**20, 2)}
    return found


def main() -> None:
    """Prints a line a contender and length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true", help="run them too, all but the partitioner")
    asked = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    devices = jax.devices()
    mesh = sharding.make_mesh(MeshShape(fsdp=1, context=len(devices)), devices)
    table = []
    for T in LENGTHS:
        times = timed(mesh, T) if asked.time else {}
        for name, meet in CONTENDERS.items():
            compiled = layer(mesh, meet).lower(*shapes(mesh, T)).compile()
            memory = compiled.memory_analysis()
            row = {
                "T": T,
                "devices": mesh.size,
                "impl": name,
                "temp_gib": round(memory.temp_size_in_bytes / 2**30, 2),
                "moved": moved(compiled.as_text()),
            }
            row |= {"ms": round(times[name]["ms"], 3)} if "ms" in times.get(name, {}) else {}
            print(row, flush=True)
            table.append(row)
    print(merge_result(device_name(), "context_parallel", {"table": table}))


def timed(mesh: Mesh, T: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of each contender that can run, taking turns."""

    def contender(meet: Any) -> Contender:
        args = [jax.device_put(jnp.ones(s.shape, s.dtype), s.sharding) for s in shapes(mesh, T)]
        return of_jax(layer(mesh, meet), *args)

    runs: dict[str, Callable[[], Contender]]
    runs = {n: functools.partial(contender, m) for n, m in CONTENDERS.items() if m is not None}
    return race(runs, samples=5)


if __name__ == "__main__":
    main()
