"""Routing and the copies around the grouped products on one GPU, a row each, in one run.

    python -m experiments.bench.kernels_routing
    python -m experiments.bench.kernels_routing --block

`route` from logits to the expert order, by each implementation; then the copies: `permute` and
`combine` forward and backward, whose floor is the bytes they must move at the speed of a copy of 2
GiB. A program of routing makes LOOPS calls, each on what the last one gave. `--block` times the
whole mixture of one layer of Air in their place, beside torch's, router to weighted sum.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernels import (
    Contender,
    copy_gbs,
    device_ms,
    forward_and_backward,
    matmul_ceiling,
    normal,
    of_jax,
    of_torch,
    race,
    to_host,
    torch_or_none,
)
from experiments.bench.results import device_name, merge_result
from glm45_jax.kernels import routing, routing_gpu
from glm45_jax.kernels.grouped_matmul import gated_matmul, grouped_matmul, products
from glm45_jax.model.expert_parallel import ExpertWeights, mixture

LOOPS = 20
WIDTH, TOP_K = 4096, 8
EXPERTS, EXPERT_WIDTH = 128, 1408  # of the block
TORCH = "torch compiled grouped_mm"
SMALLEST = 1e-6  # scores and gates that differ by less are equal
FEW = (64, 256)  # tokens of a step of decoding
TARGET_MS = 0.05  # of routing 8,192 tokens


def looped(step: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """LOOPS times the step; what it returns enters the next."""
    return lambda x: jax.lax.fori_loop(0, LOOPS, lambda _, x: step(x), x)


def route_step(impl: str, bias_E: jax.Array, logits_ME: jax.Array) -> jax.Array:
    """Logits again, which depend on all that a routing gives."""
    r = routing.route(logits_ME, bias_E, top_k=TOP_K, impl=impl)
    ends = r.order_R[:1] + r.place_MA[0, :1] + r.rows_E[:1] + r.expert_MA[0, :1]
    seen = r.gate_MA.sum() + ends.sum().astype(jnp.float32)
    return logits_ME + 1e-9 * seen


def difference(got: routing.Routing, want: routing.Routing, choice: jax.Array) -> dict[str, Any]:
    """How two routings of these biased scores differ. chosen: choices that do; wrong: those of
    scores that are no tie; gates: the largest difference; order, counts: entries that do. same:
    nothing is wrong, and without a tie nothing differs but the last bits of gates.
    """
    a, b = (jax.tree.map(np.asarray, r) for r in (got, want))
    score = np.asarray(choice)
    far = np.abs(
        np.take_along_axis(score, a.expert_MA, 1) - np.take_along_axis(score, b.expert_MA, 1)
    )
    found: dict[str, Any] = {
        "chosen": int((a.expert_MA != b.expert_MA).sum()),
        "wrong": int((far > SMALLEST).sum()),
        "gates": float(f"{np.abs(a.gate_MA - b.gate_MA).max():.3g}"),
        "order": int((a.order_R != b.order_R).sum()),
        "counts": int((a.rows_E != b.rows_E).sum()),
    }
    moved = found["order"] + found["counts"]
    tied = found["chosen"] > 0
    fits = found["gates"] <= SMALLEST and not found["wrong"] and (tied or not moved)
    return found | {"same": fits}


def routing_rows(tokens: int, experts: int) -> list[dict[str, Any]]:
    """Each implementation, and what `lax.top_k` alone takes, and what of all of them the loop; then
    the kernels of each implementation alone, as a trace has them.
    """
    logits = jax.random.normal(jax.random.key(0), (tokens, experts), jnp.float32)
    bias = 0.01 * jax.random.normal(jax.random.key(1), (experts,), jnp.float32)
    names = [i.name for i in routing.IMPLS if not i.supports(logits, bias, top_k=TOP_K)]
    steps: dict[str, Callable[[jax.Array], jax.Array]] = {
        name: functools.partial(route_step, name, bias) for name in names
    }
    steps["the loop alone"] = lambda x: x + 1e-9 * x[:1, :1]
    steps["top_k alone"] = lambda x: x + 1e-9 * jax.lax.top_k(x, TOP_K)[1][:1, :1].astype(x.dtype)
    contenders: dict[str, Callable[[], Contender]] = {
        name: functools.partial(of_jax, looped(step), logits) for name, step in steps.items()
    }
    runs = {
        name: jax.jit(functools.partial(routing.route, top_k=TOP_K, impl=name)) for name in names
    }
    of, want = {"tokens": tokens, "experts": experts}, runs["reference"](logits, bias)
    rows: list[dict[str, Any]] = []
    for name, found in race(contenders, samples=15).items():
        row = {"op": "route", **of, "impl": name} | found
        if "ms" in found:
            row |= {key: round(found[key] / LOOPS, 5) for key in ("ms", "ms_min", "ms_max")}
        if name in runs:
            row |= difference(runs[name](logits, bias), want, jax.nn.sigmoid(logits) + bias[None])
        rows.append(row)
    for name, run in runs.items():
        if ms := device_ms(functools.partial(run, logits, bias)):
            rows.append({"op": "route, kernels alone", **of, "impl": name, "ms": round(ms, 5)})
    for row in rows:
        print(row, flush=True)
    return rows


Case = tuple[Callable[..., Any], tuple[Any, ...], int]  # a function, arguments, bytes it must move


def permute_by(impl: str) -> Callable[..., Any]:
    return functools.partial(routing.permute, impl=impl)


def permute_backward(g: jax.Array, x: jax.Array, *where: jax.Array) -> jax.Array:
    return jax.vjp(lambda x: permute_by("reference")(x, *where), x)[1](g)[0]


def combine_by(impl: str) -> Callable[..., Any]:
    return lambda y, *args: routing.combine(y, *args, impl=impl).astype(y.dtype)


def combine_backward(impl: str, parts: int) -> Callable[..., Any]:
    """The gradients of the outputs and, with two parts, of the gates."""

    def run(g: jax.Array, y: jax.Array, gate: jax.Array, *where: jax.Array) -> Any:
        return jax.vjp(lambda *some: combine_by(impl)(*some, *where), y, gate)[1](g)[:parts]

    return run


def copy_cases(tokens: int, experts: int) -> dict[str, Case]:
    """`permute` and `combine` of a real routing, which has the order and the places, bfloat16: by
    XLA, by name, by each kernel alone.
    """
    logits = jax.random.normal(jax.random.key(0), (tokens, experts), jnp.float32)
    r = jax.jit(lambda x: routing.route(x, jnp.zeros(experts), top_k=TOP_K))(logits)
    x, y = normal(2, (tokens, WIDTH)), normal(3, (tokens * TOP_K, WIDTH))
    one = 2 * WIDTH * tokens  # bytes of a row a token
    some, both = one * (1 + TOP_K), one * (1 + 2 * TOP_K)
    place = r.place_MA
    rows, sent = (x, r.order_R, place), (y, r.gate_MA, r.order_R, place)
    cases: dict[str, Case] = {
        "permute": (permute_by("reference"), rows, some),
        "permute backward": (permute_backward, (y, *rows), some),
        "combine": (combine_by("reference"), sent, some),
        "combine backward, outputs alone": (combine_backward("reference", 1), (x, *sent), some),
        "combine backward": (combine_backward("reference", 2), (x, *sent), both),
    }
    if routing_gpu.refuses_places(x):
        return cases
    cases["permute, mosaic"] = (permute_by("mosaic"), rows, some)
    cases["combine backward, mosaic"] = (combine_backward("mosaic", 2), (x, *sent), both)
    for block in (1, 2, 4, 8):
        copy = functools.partial(routing_gpu.copy_rows, tokens=routing_gpu.Tokens(block))
        cases[f"permute, copy_rows {block}"] = (copy, (x, place), some)
    for block in (1, 4, 8):
        put = functools.partial(routing_gpu.put_rows, tokens=routing_gpu.Tokens(block))
        cases[f"permute, put_rows {block}"] = (put, (x, place), some)
        name = f"combine backward, outputs alone, put_rows {block}"
        cases[name] = (put, (x, place, r.gate_MA), some)
    for block, at_once in ((1, 4), (4, 4), (4, 8), (8, 2)):
        put = functools.partial(routing_gpu.put_rows, tokens=routing_gpu.Tokens(block, at_once))
        name = f"combine backward, put_rows {block}, {at_once} at once"
        cases[name] = (put, (x, place, r.gate_MA, y), both)
    return cases


def copy_rows(tokens: int, experts: int, ceiling: float) -> list[dict[str, Any]]:
    """Each case beside the speed of a copy."""
    cases, rows = copy_cases(tokens, experts), []
    contenders: dict[str, Callable[[], Contender]] = {
        name: functools.partial(of_jax, f, *args) for name, (f, args, _) in cases.items()
    }
    for name, found in race(contenders, samples=10).items():
        nbytes = cases[name][2]
        row = {"op": name, "tokens": tokens, "experts": experts} | found
        if "ms" in found:
            gbs = nbytes / found["ms"] / 1e6
            row |= {"gbs": round(gbs), "pct_of_copy": round(100 * gbs / ceiling, 1)}
        rows.append(row)
        print(row, flush=True)
    return rows


def block(
    impl: str, gated: Callable[..., Any], x: jax.Array, router: jax.Array, *weights: jax.Array
) -> jax.Array:
    """Router, choice, three products, weighted sum: [M, D] -> [M, D]."""
    logits = jnp.einsum(
        "md,de->me",
        x.astype(jnp.float32),  # router
        router,
        precision=jax.lax.Precision.HIGHEST,
    )
    route = functools.partial(routing.route, top_k=TOP_K, impl=impl)
    bias = jnp.zeros(router.shape[1])
    mixed = mixture(
        x[None],
        logits[None],
        None,
        bias,
        ExpertWeights(*weights),
        top_k=TOP_K,
        route=route,
        matmul=grouped_matmul,
        gated=gated,
    )
    return mixed.y_BTD[0]


def torch_block(x: Any, router: Any, gate: Any, up: Any, down: Any) -> Any:
    """The same by torch's grouped products; a gather of rows both ways."""
    import torch

    experts = router.shape[1]
    product = torch.nn.functional.grouped_mm
    score = (x.float() @ router).sigmoid()
    gates, chosen = score.topk(TOP_K, dim=-1)
    gates = gates / gates.sum(-1, keepdim=True)
    order = chosen.reshape(-1).argsort(stable=True)
    ends = torch.bincount(chosen.reshape(-1), minlength=experts).cumsum(0).to(torch.int32)
    rows = x.index_select(0, order // TOP_K)
    h = torch.nn.functional.silu(product(rows, gate, offs=ends)) * product(rows, up, offs=ends)
    y = product(h, down, offs=ends).index_select(0, order.argsort())
    return torch.einsum("ma,mad->md", gates.to(x.dtype), y.view(x.shape[0], TOP_K, -1))


def block_error(x: jax.Array, router: jax.Array, weights: tuple[jax.Array, ...]) -> Callable:
    """Relative error of the first tokens, against float64."""
    few = slice(0, 4)
    x_few, scores = to_host(x, few).astype(np.float64), np.asarray(router, np.float64)
    scores = 1 / (1 + np.exp(-x_few @ scores))
    chosen = np.argsort(-scores, axis=1)[:, :TOP_K]
    exact = np.zeros_like(x_few)
    for m, experts in enumerate(chosen):
        for e in experts:
            gate, up, down = (to_host(w, int(e)).astype(np.float64) for w in weights)
            z = x_few[m] @ gate
            out = (z / (1 + np.exp(-z)) * (x_few[m] @ up)) @ down
            exact[m] += scores[m, e] / scores[m, experts].sum() * out

    def error(out: Any) -> float:
        wrong = to_host(out[0] if isinstance(out, tuple) else out, few) - exact
        return float(np.sqrt(np.square(wrong).sum() / np.square(exact).sum()))

    return error


def block_rows(tokens: int) -> list[dict[str, Any]]:
    """Forward, and forward and backward to the tokens and all weights; router counted in the time
    alone.
    """
    E, D, F = EXPERTS, WIDTH, EXPERT_WIDTH
    x, g = normal(0, (tokens, D)), normal(5, (tokens, D))
    router = 0.05 * jax.random.normal(jax.random.key(1), (D, E), jnp.float32)
    weights = tuple(normal(i, s, 0.02) for i, s in ((2, (E, D, F)), (3, (E, D, F)), (4, (E, F, D))))
    args = x, router, *weights

    forward: dict[str, Callable[[], Contender]] = {}
    backward: dict[str, Callable[[], Contender]] = {}
    ours: dict[str, Callable[..., Any]] = {
        "glm45_jax": functools.partial(block, "auto", gated_matmul),
    }
    if not routing_gpu.refuses_places(x):
        ours["glm45_jax, gate and up apart"] = functools.partial(block, "auto", products)
        ours["glm45_jax, routing mosaic"] = functools.partial(block, "mosaic", gated_matmul)
    for name, run in ours.items():
        forward[name] = functools.partial(of_jax, run, *args)
        backward[name] = functools.partial(of_jax, forward_and_backward(run), *args, g)
    if torch := torch_or_none():
        theirs = [torch.from_dlpack(a) for a in args]
        wanted = [a.clone().requires_grad_() for a in theirs]
        cotangent = torch.from_dlpack(g)
        compiled = torch.compile(torch_block, dynamic=False)

        def torch_both(*args: Any) -> Any:
            out = compiled(*args)
            return out.detach(), *torch.autograd.grad(out, args, cotangent)

        forward[TORCH] = functools.partial(of_torch, compiled, *theirs)
        backward[TORCH] = functools.partial(of_torch, torch_both, *wanted)
    table, error, ceiling = [], block_error(x, router, weights), matmul_ceiling()
    for op, contenders, times in (("block fwd", forward, 1), ("block fwd+bwd", backward, 3)):
        found = race(contenders, samples=24, error=error)
        theirs_ms: Any = found.get(TORCH, {}).get("ms")
        for name, result in found.items():
            row = {"op": op, "tokens": tokens, "experts": E, "impl": name} | result
            if "ms" in result:
                ms = result["ms"]
                tflops = times * 6.0 * tokens * TOP_K * D * F / ms / 1e9
                row |= {"tflops": round(tflops, 1)}
                row |= {"pct_of_ceiling": round(100 * tflops / ceiling, 1)}
                row |= {"ratio_to_torch": round(theirs_ms / ms, 3) if theirs_ms else None}
            print(row, flush=True)
            table.append(row)
    return table


def main() -> None:
    """Measures, prints, writes."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--block", action="store_true")
    args, began = parser.parse_args(), time.perf_counter()
    value: dict[str, Any] = {"jax": jax.__version__}
    if args.block:
        key, torch = "kernels_moe_block", torch_or_none()
        value |= {
            "command": "python -m experiments.bench.kernels_routing --block",
            "torch": torch.__version__ if torch else None,
            "ceiling_tflops": round(matmul_ceiling(), 1),
            "rows": block_rows(args.tokens),
        }
    else:
        key, ceiling = "kernels_routing", copy_gbs()
        few = [row for tokens in FEW for row in routing_rows(tokens, EXPERTS)]
        rows = [row for experts in (128, 160) for row in routing_rows(args.tokens, experts)]
        rows += copy_rows(args.tokens, 128, ceiling)
        ours = [r["ms"] for r in rows if r["op"] == "route" and "same" in r and "ms" in r]
        value |= {
            "command": "python -m experiments.bench.kernels_routing",
            "copy_gbs": round(ceiling),
            "target_ms": TARGET_MS,
            "meets_target": bool(np.min(ours) <= TARGET_MS),
            "rows": rows + few,
        }
    value["seconds"] = round(time.perf_counter() - began)
    print(f"wrote {merge_result(device_name(), key, value)}", flush=True)


if __name__ == "__main__":
    main()
