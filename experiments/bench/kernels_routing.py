"""Routing and the copies around the grouped products on one GPU, a row each, in one run.

    python -m experiments.bench.kernels_routing

`route` from logits to the expert order, by each implementation; then the copies: `permute` and
`combine` forward and with their backward, whose floor is the bytes they must move at the speed of a
copy of 2 GiB. A program makes LOOPS calls, each on what the last one gave.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernels import Contender, copy_gbs, of_jax, race
from experiments.bench.results import device_name, merge_result
from glm45_jax.kernels import routing, routing_gpu

LOOPS = 20
WIDTH, TOP_K = 4096, 8
TARGET_MS = 0.05  # of routing 8,192 tokens


def looped(step: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """LOOPS times the step; what it returns enters the next."""
    return lambda x: jax.lax.fori_loop(0, LOOPS, lambda _, x: step(x), x)


def route_step(impl: str, bias_E: jax.Array, logits_ME: jax.Array) -> jax.Array:
    """Logits again, which depend on all that a routing gives."""
    r = routing.route(logits_ME, bias_E, top_k=TOP_K, impl=impl)
    seen = r.gate_MA.sum() + (r.order_R[:1] + r.rows_E[:1] + r.expert_MA[0, :1]).sum()
    return logits_ME + 1e-9 * seen


def routing_rows(tokens: int, experts: int) -> list[dict[str, Any]]:
    """Each implementation, and what of it `lax.top_k` alone takes."""
    logits = jax.random.normal(jax.random.key(0), (tokens, experts), jnp.float32)
    bias = 0.01 * jax.random.normal(jax.random.key(1), (experts,), jnp.float32)
    steps: dict[str, Callable[[jax.Array], jax.Array]] = {
        impl.name: functools.partial(route_step, impl.name, bias)
        for impl in routing.IMPLS
        if not impl.supports(logits, bias, top_k=TOP_K)
    }
    steps["top_k alone"] = lambda x: x + 1e-9 * jax.lax.top_k(x, TOP_K)[1][:1, :1]
    if "mosaic" in steps:
        steps["top_k alone, mosaic"] = lambda x: x + 1e-9 * routing_gpu.top_k(x, TOP_K)[:1, :1]
    contenders: dict[str, Callable[[], Contender]] = {
        name: functools.partial(of_jax, looped(step), logits) for name, step in steps.items()
    }
    want = routing.route(logits, bias, top_k=TOP_K, impl="reference")
    rows = []
    for name, found in race(contenders, samples=15).items():
        row = {"op": "route", "tokens": tokens, "experts": experts, "impl": name} | found
        if "ms" in found:
            row |= {key: round(found[key] / LOOPS, 5) for key in ("ms", "ms_min", "ms_max")}
        if not name.startswith("top_k alone"):
            run = functools.partial(routing.route, top_k=TOP_K, impl=name)
            got = jax.tree.leaves(jax.jit(run)(logits, bias))
            pairs = zip(got, jax.tree.leaves(want), strict=True)
            row["same"] = all(bool((a == b).all()) for a, b in pairs)
        rows.append(row)
        print(row, flush=True)
    return rows


def copy_rows(tokens: int, experts: int, ceiling: float) -> list[dict[str, Any]]:
    """`permute` and `combine` in bfloat16, beside the speed of a copy."""
    logits = jax.random.normal(jax.random.key(0), (tokens, experts), jnp.float32)
    r = jax.jit(lambda x: routing.route(x, jnp.zeros(experts), top_k=TOP_K))(logits)
    x = jax.random.normal(jax.random.key(2), (tokens, WIDTH), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(3), (tokens * TOP_K, WIDTH), jnp.bfloat16)

    def combine(y: jax.Array) -> jax.Array:
        return routing.combine(y, r.gate_MA, r.order_R).astype(y.dtype)

    one = 2 * WIDTH * tokens  # bytes of a row a token
    cases = {
        "permute": (lambda x: routing.permute(x, r.order_R), x, one * (1 + TOP_K)),
        "permute backward": (
            lambda y: jax.vjp(lambda x: routing.permute(x, r.order_R), x)[1](y)[0],
            y,
            one * (1 + TOP_K),
        ),
        "combine": (combine, y, one * (1 + TOP_K)),
        # Reads the gradient, y and the gates' sums; writes a gradient a row.
        "combine backward": (
            lambda g: jax.vjp(combine, y)[1](g)[0],
            x,
            one * (1 + TOP_K),
        ),
    }
    if not routing_gpu.refuses_rows(x):
        gates = r.gate_MA.reshape(-1)[r.order_R]
        take = functools.partial(routing_gpu.take_rows, from_R=r.order_R // TOP_K)
        both = one * (1 + TOP_K)
        for sizes in (routing_gpu.Rows(), routing_gpu.Rows(16, 4), routing_gpu.Rows(64, 8)):
            how = f"block {sizes.block}, {sizes.at_once} at once"
            cases[f"permute, mosaic, {how}"] = (functools.partial(take, rows=sizes), x, both)
            scaled = functools.partial(take, scale_R=gates, rows=sizes)
            cases[f"rows times gates, mosaic, {how}"] = (scaled, x, both)
    rows = []
    for name, (f, arg, nbytes) in cases.items():
        (found,) = race({name: functools.partial(of_jax, f, arg)}, samples=10).values()
        row = {"op": name, "tokens": tokens, "experts": experts} | found
        if "ms" in found:
            gbs = nbytes / found["ms"] / 1e6
            row |= {"gbs": round(gbs), "pct_of_copy": round(100 * gbs / ceiling, 1)}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    tokens, began = parser.parse_args().tokens, time.perf_counter()
    ceiling = copy_gbs()
    rows = [row for experts in (128, 160) for row in routing_rows(tokens, experts)]
    rows += copy_rows(tokens, 128, ceiling)
    ours = [r["ms"] for r in rows if r["op"] == "route" and "same" in r and "ms" in r]
    value = {
        "command": "python -m experiments.bench.kernels_routing",
        "jax": jax.__version__,
        "copy_gbs": round(ceiling),
        "target_ms": TARGET_MS,
        "meets_target": bool(np.min(ours) <= TARGET_MS),
        "seconds": round(time.perf_counter() - began),
        "rows": rows,
    }
    print(f"wrote {merge_result(device_name(), 'kernels_routing', value)}", flush=True)


if __name__ == "__main__":
    main()
