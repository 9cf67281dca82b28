"""Kernels beside their peers on a GPU, all in one run: one function an op, which returns rows.

A row: op, shape, impl, ms, tflops, gbs, pct_of_ceiling, ratio_to_best_peer, err. The ceiling is an
8192^3 product in the same run; contenders take turns, so heat is shared. A peer that fails is a row
with its error. New op: a function in OPS.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import tokamax_peer
from experiments.bench.results import device_name, merge_result
from glm45_jax.kernels.cross_entropy import nll_sum
from glm45_jax.kernels.grouped_matmul import grouped_matmul

CALLS = 4  # queued a sample
OURS, BOUND = "glm45_jax mosaic", "bound: dense bmm, even groups (torch)"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute an op. wait: blocks until what `call` returned is there."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]

    def sample(self) -> float:
        """Milliseconds a call, of CALLS queued at once."""
        start = time.perf_counter()
        for _ in range(CALLS):
            out = self.call()
        self.wait(out)
        return (time.perf_counter() - start) / CALLS * 1e3


def of_jax(f: Callable, *args: Any) -> Contender:
    jitted = jax.jit(f)
    return Contender(lambda: jitted(*args), jax.block_until_ready)


def of_torch(f: Callable, *args: Any) -> Contender:
    import torch

    return Contender(lambda: f(*args), lambda _: torch.cuda.synchronize())


def forward_and_backward(f: Callable[..., Any]) -> Callable[..., Any]:
    """What f gives, and its gradients: a function of its arguments and a cotangent, the last."""

    def both(*args: Any) -> tuple[Any, tuple[Any, ...]]:
        *inputs, cotangent = args
        out, pull = jax.vjp(f, *inputs)
        return out, pull(cotangent)

    return both


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]


def race(
    contenders: dict[str, Callable[[], Contender]],
    *,
    samples: int,
    error: Callable[[Any], float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Median ms, spread and error of each; they take turns after two calls that warm up.

    In a new order each time: a chip at its limit of power is faster after a contender that used
    less of it.
    """
    ready: dict[str, Contender] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, make in contenders.items():
        try:
            contender = make()
            for _ in range(2):
                out = contender.call()
                contender.wait(out)
            check = None if name.startswith("bound") else error  # a bound computes something else
            found[name] = {"err": float(f"{check(out):.3g}")} if check else {}
            ready[name] = contender
            del out
        except Exception as why:  # foreign kernels raise what they like; the row says it
            found[name] = {"error": short(why)}
    times: dict[str, list[float]] = {name: [] for name in ready}
    order, turn = list(ready), random.Random(0)
    for _ in range(samples):
        turn.shuffle(order)
        for name in order:
            times[name].append(ready[name].sample())
    for name, ms in times.items():
        found[name] |= {"ms": statistics.median(ms), "ms_min": min(ms), "ms_max": max(ms)}
    return found


def device_ms(f: Callable[[], Any], calls: int = 20) -> float | None:
    """What all kernels of a call take, those without names too, by a trace of `calls` after one
    that warms up; None where a trace has none (a CPU).
    """
    jax.block_until_ready(f())
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        jax.block_until_ready([f() for _ in range(calls)])
        jax.profiler.stop_trace()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        streams = [
            line
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if "Stream" in line.name
        ]
        spent = sum(event.duration_ns for line in streams for event in line.events)
    return spent / calls / 1e6 if streams else None


@functools.cache
def copy_gbs(numbers: int = 2**30) -> float:
    """GB/s of a copy of so many bfloat16 numbers, 2 GiB, read and written: the best of ten."""
    shape = (2**14, numbers // 2**14)
    x = jax.random.normal(jax.random.key(0, impl="rbg"), shape, jnp.bfloat16)
    found = race({"copy": lambda: of_jax(jnp.negative, x)}, samples=10)
    return 2 * x.nbytes / found["copy"]["ms_min"] / 1e6


def rows(
    op: str,
    shape: str,
    found: dict[str, dict[str, Any]],
    *,
    flops: float,
    nbytes: float,
    ceiling: float,
) -> list[dict[str, Any]]:
    """Table rows of one race. A peer is neither ours nor a bound."""
    others = (r for name, r in found.items() if not name.startswith(("glm45_jax", "bound")))
    peers = [r["ms"] for r in others if "ms" in r]
    table = []
    for name, result in found.items():
        row: dict[str, Any] = {"op": op, "shape": shape, "impl": name}
        if "ms" in result:
            ms = result["ms"]
            row |= {k: round(v, 4) if k.startswith("ms") else v for k, v in result.items()}
            row |= {
                "tflops": round(flops / ms / 1e9, 1),
                "gbs": round(nbytes / ms / 1e6),
                "pct_of_ceiling": round(100 * flops / ms / 1e9 / ceiling, 1),
                "ratio_to_best_peer": round(min(peers) / ms, 3) if peers else None,
            }
        else:
            row |= result
        print(
            f"{op:12} {shape:40} {name:38} {row.get('tflops', '-'):>7} TFLOP/s "
            f"{row.get('ratio_to_best_peer') or '-':>6}x  err {row.get('err', '-')} "
            f"{row.get('error', '')}",
            flush=True,
        )
        table.append(row)
    return table


@functools.cache
def matmul_ceiling(n: int = 8192) -> float:
    """TFLOP/s of an n^3 product in bfloat16, the better of jax and torch."""
    x = normal(0, (n, n))
    contenders: dict[str, Callable[[], Contender]] = {"jax": lambda: of_jax(lambda x: x @ x, x)}
    if torch := torch_or_none():
        y = torch.from_dlpack(x)
        contenders["torch"] = lambda: of_torch(torch.matmul, y, y)
    found = race(contenders, samples=10)
    print({k: round(2 * n**3 / v["ms"] / 1e9, 1) for k, v in found.items()}, flush=True)
    return max(2 * n**3 / v["ms"] / 1e9 for v in found.values())


def torch_or_none() -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch if torch.cuda.is_available() else None


def to_host(array: Any, part: Any) -> np.ndarray:
    """A part of a jax or torch array in float32; by torch where it is, which compiles nothing."""
    if torch := torch_or_none():
        tensor = torch.from_dlpack(array) if isinstance(array, jax.Array) else array
        return tensor[part].float().cpu().numpy()
    return np.asarray(array[part], np.float32)


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale))
    return make(jax.random.key(seed))


# --- grouped matmul: Air's fused gate and up, and down; 128 groups, lognormal skew 0.6, seed 0.

EXPERTS = 128
WIDTHS = {"gate/up": (4096, 2816), "down": (1408, 4096)}
# Tiles (m, n, k, steps, columns) of jax's Pallas kernels: the best of up to four, docs/log.md.
SHIPPED_TILES = {
    ("gate/up", "fwd"): (128, 128, 64, 4, 2),
    ("gate/up", "dlhs"): (64, 256, 64, 3, 2),
    ("gate/up", "drhs"): (64, 256, 64, 3, 11),
    ("down", "fwd"): (64, 256, 64, 3, 2),
    ("down", "dlhs"): (128, 128, 64, 4, 11),
    ("down", "drhs"): (128, 128, 64, 4, 2),
}


def skewed(n_rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    share = np.exp(0.6 * rng.standard_normal(EXPERTS))
    return rng.multinomial(n_rows, share / share.sum()).astype(np.int32)


def product(impl: str, what: str) -> Callable:
    """f(x, w, sizes, g) of one of the three products of `grouped_matmul`."""
    if what == "fwd":
        return lambda x, w, sizes, g: grouped_matmul(x, w, sizes, impl=impl)
    if what == "dlhs":
        return lambda x, w, sizes, g: jax.vjp(lambda x: grouped_matmul(x, w, sizes, impl=impl), x)[
            1
        ](g)[0]
    return lambda x, w, sizes, g: jax.vjp(lambda w: grouped_matmul(x, w, sizes, impl=impl), w)[1](
        g
    )[0]


def shipped(what: str, tile: tuple[int, ...]) -> Callable:
    """The same of jax's own Pallas kernels."""
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    names = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")
    kwargs: dict[str, Any] = dict(zip(names, tile, strict=True))
    if what == "drhs":
        return lambda x, w, sizes, g: transposed_ragged_dot_mgpu.transposed_ragged_dot(
            x, g, group_sizes=sizes, **kwargs
        )
    return lambda x, w, sizes, g: ragged_dot_mgpu.ragged_dot(
        x if what == "fwd" else g, w, group_sizes=sizes, transpose_rhs=what == "dlhs", **kwargs
    )


def torch_contenders(what: str, x: Any, w: Any, sizes: np.ndarray, g: Any) -> dict[str, Callable]:
    """F.grouped_mm with both layouts of the matrices, and the dense product of even groups."""
    torch = torch_or_none()
    if torch is None:
        return {}
    x, w, g = (torch.from_dlpack(a) for a in (x, w, g))
    ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")
    grouped = functools.partial(torch.nn.functional.grouped_mm, offs=ends)
    x3, g3 = (a.view(EXPERTS, -1, a.shape[1]) for a in (x, g))
    wt = w.transpose(1, 2)
    made = {
        "fwd": (grouped, (x, w), (x3, w)),
        "dlhs": (grouped, (g, wt), (g3, wt)),
        "drhs": (grouped, (x.t(), g), (x3.transpose(1, 2), g3)),
    }
    f, args, dense = made[what]
    found = {
        "torch F.grouped_mm": lambda: of_torch(f, *args),
        BOUND: lambda: of_torch(torch.bmm, *dense),
    }
    if what == "fwd":
        found["torch F.grouped_mm, [E, F, D]"] = lambda: of_torch(
            f, x, wt.contiguous().transpose(1, 2)
        )
    return found


def grouped_error(what: str, x: Any, w: Any, sizes: np.ndarray, g: Any) -> Callable[[Any], float]:
    """Relative error over the smallest and the largest group, against float32."""
    ends = np.cumsum(sizes)
    exact = {}
    for e in (int(sizes.argmin()), int(sizes.argmax())):
        rows = slice(int(ends[e] - sizes[e]), int(ends[e]))
        x_e, w_e, g_e = to_host(x, rows), to_host(w, e), to_host(g, rows)
        right = {
            "fwd": lambda x=x_e, w=w_e, g=g_e: x @ w,
            "dlhs": lambda x=x_e, w=w_e, g=g_e: g @ w.T,
            "drhs": lambda x=x_e, w=w_e, g=g_e: x.T @ g,
        }
        exact[e if what == "drhs" else rows] = right[what]()

    def error(out: Any) -> float:
        ours = [to_host(out, i) for i in exact]
        wrong = sum(np.square(a - b).sum() for a, b in zip(ours, exact.values(), strict=True))
        return float(np.sqrt(wrong / sum(np.square(b).sum() for b in exact.values())))

    return error


def grouped_contenders(
    name: str, what: str, x: jax.Array, w: jax.Array, sizes: np.ndarray, g: jax.Array
) -> dict[str, Callable[[], Contender]]:
    """Everybody who computes one of the products, but for what takes a minute or does not fit."""
    args = x, w, jnp.asarray(sizes), g
    small = x.shape[0] == 65_536
    found: dict[str, Callable[[], Contender]] = {
        OURS: lambda: of_jax(product("mosaic", what), *args)
    }
    if small or what == "fwd":  # the others would take a minute to compile once more
        tile = SHIPPED_TILES[name, what]
        found["jax Pallas ragged_dot_mgpu"] = lambda: of_jax(shipped(what, tile), *args)
    if small and (foreign := tokamax_peer.grouped(what)):
        found[tokamax_peer.NAME] = lambda: of_jax(foreign, *args)
    if small and what == "fwd":  # its copies of the matrices do not fit beyond
        found["glm45_jax blocked"] = lambda: of_jax(product("blocked", what), *args)
    return found | torch_contenders(what, x, w, sizes, g)


def grouped_matmul_rows() -> list[dict[str, Any]]:
    """Forward, dlhs and drhs at 65,536 and 262,144 rows."""
    table = []
    ceiling = matmul_ceiling()
    for n_rows, samples in ((65_536, 10), (262_144, 6)):
        sizes = skewed(n_rows)
        for name, (D, F) in WIDTHS.items():
            x, w, g = (
                normal(0, (n_rows, D)),
                normal(1, (EXPERTS, D, F), 0.02),
                normal(2, (n_rows, F)),
            )
            for what in ("fwd", "dlhs", "drhs"):
                found = race(
                    grouped_contenders(name, what, x, w, sizes, g),
                    samples=samples,
                    error=grouped_error(what, x, w, sizes, g),
                )
                table += rows(
                    what,
                    f"{name} R{n_rows} D{D} F{F} E{EXPERTS} skewed",
                    found,
                    flops=2.0 * n_rows * D * F,
                    nbytes=2.0 * (n_rows * (D + F) + EXPERTS * D * F),
                    ceiling=ceiling,
                )
            del x, w, g
    return table


# --- cross-entropy with the head: M tokens of Air and of mini. The head is float32, as in training.

HEADS = {
    "air few": (8192, 4096, 151_552),
    "air": (65_536, 4096, 151_552),
    "mini": (65_536, 512, 16_384),
}


def head_loss(impl: str, what: str) -> Callable:
    """f(h, w, target, weight): the weighted sum, or that with its gradients."""

    def total(h: jax.Array, w: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
        return nll_sum(h, w, target, weight, impl=impl)

    return total if what == "fwd" else jax.value_and_grad(total, (0, 1))


def torch_heads(what: str, h: Any, w: Any, target: Any, weight: Any) -> dict[str, Callable]:
    """torch's compiled cross-entropy, all logits at once, and the products alone."""
    if not (torch := torch_or_none()):
        return {}
    x, v = torch.from_dlpack(h), torch.from_dlpack(w).bfloat16()
    goal, share = torch.from_dlpack(target).long(), torch.from_dlpack(weight)

    def total(x: Any, v: Any) -> Any:
        each = torch.nn.functional.cross_entropy((x @ v).float(), goal, reduction="none")
        return (each * share).sum()

    made = torch.compile(total)

    def both(x: Any, v: Any) -> Any:
        x.grad = v.grad = None
        out = made(x.requires_grad_(), v.requires_grad_())
        out.backward()
        return out

    def products(x: Any, v: Any) -> None:
        with torch.no_grad():
            logits = x @ v
            if what != "fwd":
                torch.matmul(logits, v.t()), torch.matmul(x.t(), logits)

    def alone(x: Any, v: Any) -> Any:
        with torch.no_grad():
            return made(x, v)

    return {
        "torch compiled": lambda: of_torch(alone if what == "fwd" else both, x, v),
        "bound: products alone (torch)": lambda: of_torch(products, x, v),
    }


def cross_entropy_rows() -> list[dict[str, Any]]:
    """Forward, and with the backward: three products of 2·M·D·V, whatever is made again."""
    table, ceiling = [], matmul_ceiling()
    for name, (M, D, V) in HEADS.items():
        h, w = normal(0, (M, D)), normal(1, (D, V), 0.02).astype(jnp.float32)
        target = jax.random.randint(jax.random.key(2), (M,), 0, V)
        weight = (jnp.arange(M) % 7 > 0).astype(jnp.float32)
        args = (h, w, target, weight)
        for what, products in (("fwd", 1), ("fwd+bwd", 3)):
            ours: dict[str, Callable[[], Contender]] = {
                f"glm45_jax {impl}": functools.partial(of_jax, head_loss(impl, what), *args)
                for impl in ("fused", "chunked")
            }
            found = race(ours | torch_heads(what, *args), samples=6)
            table += rows(
                f"head {what}",
                f"{name} M{M} D{D} V{V}",
                found,
                flops=2.0 * products * M * D * V,
                nbytes=4.0 * D * V * (2 if what != "fwd" else 1) + 2.0 * M * D,
                ceiling=ceiling,
            )
    return table


OPS = {"grouped_matmul": grouped_matmul_rows, "cross_entropy": cross_entropy_rows}


def main() -> None:
    """Measures, prints, writes."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=OPS, nargs="*", default=list(OPS))
    for op in parser.parse_args().only:
        began = time.perf_counter()
        table = OPS[op]()
        torch = torch_or_none()
        value = {
            "command": f"python -m experiments.bench.kernels --only {op}",
            "jax": jax.__version__,
            "torch": torch.__version__ if torch else None,
            "ceiling_tflops": round(matmul_ceiling(), 1),
            "seconds": round(time.perf_counter() - began),
            "rows": table,
        }
        print(f"wrote {merge_result(device_name(), f'kernels_{op}', value)}", flush=True)


if __name__ == "__main__":
    main()
