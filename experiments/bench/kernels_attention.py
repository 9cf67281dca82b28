"""Attention on one GPU: this project's kernels beside their peers in the same run, a row each.

Peers: cuDNN through jax, the Pallas kernel that jax ships (float16 and forward only), torch's SDPA
on cuDNN, tokamax where it is carried (`tokamax_peer`); with several documents a row, the reference.
TFLOP/s count the pairs of a query and a key that it sees: 2·(H + U) a pair and head forward, and
2·(3·H + 2·U) backward; 3.5 times as much together, where values are as wide as keys.
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some
# Nothing timed here is a product that XLA picks an algorithm for, the ceiling apart, which is the
# better one of jax's and torch's; autotuning the reference took most of a minute a shape.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import tokamax_peer
from experiments.bench.results import device_name, merge_result
from glm45_jax.kernels.attention import attention, reference

COMMAND = "python -m experiments.bench.kernels_attention"
SIDE = 8192  # of the square product that is the ceiling


@dataclasses.dataclass(frozen=True)
class Case:
    """B rows of T, N query and K kv heads of width H, `documents` of random lengths a row. U: width
    of values, if not H.
    """

    B: int
    T: int
    N: int
    K: int
    H: int
    documents: int = 1
    U: int | None = None

    def __str__(self) -> str:
        packed = f" {self.documents} documents" if self.documents > 1 else ""
        values = f" v{self.U}" if self.U else ""
        return f"B{self.B} T{self.T} {self.N}/{self.K} d{self.H}{values}{packed}"

    def shapes(self, heads_first: bool = False) -> list[tuple[int, int, int, int]]:
        """Of q, k, v and a cotangent."""
        U = self.U or self.H
        sizes = (self.N, self.H), (self.K, self.H), (self.K, U), (self.N, U)
        return [(self.B, n, self.T, H) if heads_first else (self.B, self.T, n, H) for n, H in sizes]

    @functools.cached_property
    def starts_BT(self) -> np.ndarray:
        """Whether a document begins at a position."""
        rng = np.random.default_rng(0)
        starts = np.zeros((self.B, self.T), np.int32)
        for row in starts:
            row[rng.choice(np.arange(1, self.T), self.documents - 1, replace=False)] = 1
        return starts

    def flops(self, backward: bool) -> float:
        """Of the pairs that are seen, half of the square of each document."""
        pairs = 0.0
        for row in self.starts_BT:
            edges = np.flatnonzero(np.r_[1, row[1:], 1])
            pairs += float((np.diff(edges) ** 2).sum()) / 2
        H, U = self.H, self.U or self.H
        return 2 * pairs * self.N * (H + U + (3 * H + 2 * U if backward else 0))


def draw(case: Case, dtype: Any) -> list[jax.Array]:
    """q, k, v and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    pairs = zip(keys, case.shapes(), strict=True)
    return [jax.random.normal(key, shape, dtype) for key, shape in pairs]


def median_ms(f: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> float:
    """Of `repeats` calls, each waited for, after two that warm up."""
    wait(f()), wait(f())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(f())
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def forward_and_backward(f: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Output and gradients from q, k, v and a cotangent."""

    def both(q, k, v, cotangent):
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(cotangent)

    return jax.jit(both)


def jax_impls(case: Case) -> dict[str, Callable[..., jax.Array]]:
    """Ways to compute it in jax."""
    if case.documents > 1:
        segment = jnp.asarray(np.cumsum(case.starts_BT, axis=1, dtype=np.int32) + 1)
        ours = functools.partial(attention, segments_BT=segment, impl="mosaic")
        return {"ours": ours, "reference": functools.partial(reference, segments_BT=segment)}
    peer = "cudnn" if case.U is None else "tiles"  # cudnn takes one width
    return {
        "ours": functools.partial(attention, impl="mosaic"),
        f"jax {peer}": functools.partial(attention, impl=peer),
    }


def error(case: Case, f: Callable[..., jax.Array], args: list[jax.Array]) -> float:
    """Relative, of one group of heads over the first tokens, which see nothing later."""
    T, G = min(case.T, 4096), case.N // case.K
    q, k, v = args[0][:1, :, :G], args[1][:1, :, :1], args[2][:1, :, :1]
    found = f(*args[:3])[:1, :T, :G].astype(jnp.float32)
    segment = jnp.asarray(np.cumsum(case.starts_BT[:1, :T], axis=1, dtype=np.int32))
    cut = (x[:, :T].astype(jnp.float32) for x in (q, k, v))
    exact = jax.jit(functools.partial(reference, segments_BT=segment))(*cut)
    return float(jnp.linalg.norm((found - exact).ravel()) / jnp.linalg.norm(exact.ravel()))


def measure_jax(case: Case, repeats: int, skip: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each way and direction."""
    args = draw(case, jnp.bfloat16)
    rows = []
    for name, f in jax_impls(case).items():
        if name in skip:
            continue
        g = jax.jit(f)
        err = round(error(case, g, args), 5) if name == "ours" else None
        both = forward_and_backward(f)
        rows += [
            row(case, name, False, lambda g=g: g(*args[:3]), jax.block_until_ready, repeats, err),
            row(case, name, True, lambda h=both: h(*args), jax.block_until_ready, repeats),
        ]
    return rows


def measure_shipped(case: Case, repeats: int) -> list[dict[str, Any]]:
    """The Pallas kernel in jax's wheel: float16, forward; it applies no scale."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
    )
    args = draw(case, jnp.float16)[:3]
    f = functools.partial(attention_mgpu.attention, config=config)
    return [
        row(case, "jax pallas f16", False, lambda: f(*args), jax.block_until_ready, repeats),
    ]


def measure_tokamax(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Forward alone, where it is: its backward pass did not finish within a minute."""
    if (f := tokamax_peer.attention()) is None:
        return []
    args, g = draw(case, jnp.bfloat16)[:3], jax.jit(f)
    call = functools.partial(g, *args)
    return [row(case, tokamax_peer.NAME, False, call, jax.block_until_ready, repeats)]


def measure_torch(case: Case, repeats: int) -> list[dict[str, Any]]:
    """SDPA on cuDNN, heads before tokens."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shapes = case.shapes(heads_first=True)
    q, k, v, cotangent = (torch.randn(s, dtype=torch.bfloat16, device="cuda") for s in shapes)
    sdpa = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True
    )

    def wait(_):
        torch.cuda.synchronize()

    def both():
        return torch.autograd.grad(sdpa(q, k, v), (q, k, v), cotangent)

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        rows = [row(case, "torch cudnn", False, lambda: sdpa(q, k, v), wait, repeats)]
        for x in (q, k, v):
            x.requires_grad_()
        rows.append(row(case, "torch cudnn", True, both, wait, repeats))
    return rows


def row(case, impl, backward, f, wait, repeats, err=None) -> dict[str, Any]:
    """One measurement, or why there is none."""
    op = f"attention {'fwd+bwd' if backward else 'fwd'}"
    found: dict[str, Any] = {"op": op, "shape": str(case), "impl": impl, "gbs": None, "err": err}
    try:
        ms = median_ms(f, wait, repeats)
        found |= {"ms": round(ms, 3), "tflops": round(case.flops(backward) / ms / 1e9, 1)}
    except (RuntimeError, ValueError) as error:  # out of memory, no plan: a row that says so
        found |= {"ms": None, "tflops": None, "failed": f"{type(error).__name__}: {error}"[:200]}
    print(f"{time.perf_counter():8.0f} {found}", flush=True)
    return found


def matmul_ceiling() -> float:
    """TFLOP/s of a square product in bfloat16, the better of jax's and torch's."""
    import torch

    a = jax.random.normal(jax.random.key(0), (SIDE, SIDE), jnp.bfloat16)
    f = jax.jit(lambda a: a @ a)
    b = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda")
    ms = [
        median_ms(lambda: f(a), jax.block_until_ready, 10),
        median_ms(lambda: b @ b, lambda _: torch.cuda.synchronize(), 10),
    ]
    return 2 * SIDE**3 / min(ms) / 1e9


def compare(rows: list[dict[str, Any]], ceiling: float) -> None:
    """Adds the share of the ceiling, and of the best other one on the same op and shape."""
    for r in rows:
        same = [
            x["tflops"]
            for x in rows
            if x["tflops"] and (x["op"], x["shape"]) == (r["op"], r["shape"]) and x is not r
        ]
        r["pct_of_ceiling"] = r["tflops"] and round(100 * r["tflops"] / ceiling, 1)
        r["ratio_to_best_peer"] = (
            round(r["tflops"] / max(same), 3) if r["tflops"] and same else None
        )


def main() -> None:
    """Measures, prints, writes."""
    ceiling = matmul_ceiling()
    print(f"matmul {SIDE}^3: {ceiling:.0f} TFLOP/s", flush=True)
    short, long = Case(8, 4096, 96, 8, 128), Case(1, 32768, 96, 8, 128)
    narrow = Case(8, 4096, 96, 8, 64)
    wide, latent = Case(8, 4096, 20, 20, 256), Case(8, 4096, 20, 20, 192, U=128)
    packed, one = Case(8, 4096, 96, 8, 128, documents=8), Case(1, 4096, 96, 8, 128, documents=8)
    parts = [  # what is to be known first comes first
        functools.partial(measure_jax, long, 3, ()),
        functools.partial(measure_torch, long, 3),
        functools.partial(measure_jax, short, 10, ()),
        functools.partial(measure_torch, short, 10),
        *(functools.partial(measure_jax, case, 10, ()) for case in (wide, latent)),
        *(functools.partial(measure_torch, case, 10) for case in (wide, latent)),
        functools.partial(measure_jax, packed, 10, ("reference",)),
        functools.partial(measure_jax, narrow, 10, ()),
        functools.partial(measure_shipped, short, 10),
        functools.partial(measure_tokamax, short, 10),
        functools.partial(measure_shipped, long, 3),
        functools.partial(measure_jax, one, 10, ()),
    ]
    value = {"command": COMMAND, "jax": jax.__version__, "matmul_tflops": round(ceiling, 1)}
    rows: list[dict[str, Any]] = []
    for part in parts:  # written after each: a run that is cut leaves what it has
        rows += part()
        compare(rows, ceiling)
        file = merge_result(device_name(), "attention", value | {"rows": rows})
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
