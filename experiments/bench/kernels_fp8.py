"""Products with FP8 weights and products of few rows on one GPU, beside their peers in the same run.

A row: op, shape, impl, ms, tflops, gbs, pct_of_ceiling, ratio_to_best_peer, err. GB/s count the
weights that are met, once, at the size they are stored in. The ceiling is a copy of 2 GiB for few
rows, a bfloat16 product of 8192^3 for many. Few rows are timed as a model meets them: a scan over a
stack of layers, several times round, in one program; torch replays a graph of the same. Ours
quantises its rows within the time, peers get theirs quantised. `--tiny` shows on a CPU that it runs.
"""

import argparse
import dataclasses
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
    matmul_ceiling,
    normal,
    of_jax,
    of_torch,
    race,
    torch_or_none,
)
from experiments.bench.results import device_name, merge_result
from glm45_jax.kernels import fp8, fp8_matmul, grouped_matmul_gpu
from glm45_jax.kernels.fp8_matmul import as_quantized, grouped_matmul_fp8
from glm45_jax.kernels.grouped_matmul import grouped_matmul

OURS = ("ours fp8", "ours bf16")
EXPERTS, TOP_K = 128, 8
E4M3 = jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: widths of GLM-4.5-Air, or of something that a CPU does in seconds. loops:
    rounds over the stack in one program; stack: bytes of it, beyond the L2 cache.
    """

    dense: dict[str, tuple[int, tuple[int, ...]]]
    experts: dict[str, tuple[int, int]]
    rows: tuple[int, ...]
    routed: tuple[int, ...]
    many: int
    many_routed: int
    loops: int = 10
    stack: int = 400 * 2**20


AIR = Sizes(
    dense={"qkv": (4096, (12288, 1024, 1024)), "out": (12288, (4096,)), "down": (10944, (4096,))},
    experts={"gate": (4096, 1408), "down": (1408, 4096)},
    rows=(1, 64, 256),
    routed=(8, 128, 512, 2048),
    many=8192,
    many_routed=65_536,
)
TINY = Sizes(
    {"qkv": (256, (256, 128, 128))}, {"gate": (256, 128)}, (8,), (8,), 256, 256, 2, 2**20
)


def repeated(f: Callable, loops: int) -> Callable:
    """f(x, weights of a layer, *rest) for each layer of a stack, `loops` times round. x hangs on
    what came before: nothing moves out of the loops.
    """

    def program(x: jax.Array, stack: Any, *rest: Any) -> jax.Array:
        def layer(nought: jax.Array, w: Any) -> tuple[jax.Array, None]:
            first = jax.tree.leaves(f(x + nought, w, *rest))[0]
            return first[0, 0].astype(x.dtype) * 0, None

        def round_(_: Any, nought: jax.Array) -> jax.Array:
            return jax.lax.scan(layer, nought, stack)[0]

        return jax.lax.fori_loop(0, loops, round_, jnp.zeros((), x.dtype))

    return program


def graph(calls: list[Callable[[], Any]], loops: int) -> Contender:
    """All calls `loops` times as one CUDA graph of torch."""
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        for _ in range(loops):
            for call in calls:
                call()
    return Contender(made.replay, lambda _: torch.cuda.synchronize())


def scaled_mm(x_MI: Any, w_OI: Any) -> Callable[[], Any]:
    """torch's product with the same scales, of torch tensors, quantised here."""
    import torch
    from torch.nn.functional import ScalingType
    from torch.nn.functional import scaled_mm as product

    (M, I), O = x_MI.shape, w_OI.shape[0]
    x, w = x_MI.float().view(M, I // 128, 128), w_OI.float().view(O // 128, 128, I // 128, 128)
    sx, sw = x.abs().amax(2) / 448, w.abs().amax((1, 3)) / 448
    x8 = (x / sx[..., None]).to(torch.float8_e4m3fn).view(M, I)
    w8 = (w / sw[:, None, :, None]).to(torch.float8_e4m3fn).view(O, I)
    sx, kinds = sx.t().contiguous().t(), (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
    return lambda: product(
        x8, w8.t(), sx, kinds[0], sw.t(), kinds[1], output_dtype=torch.bfloat16
    )


@functools.cache
def copy_gbs(tiny: bool) -> float:
    """GB/s of a copy of 2 GiB, read and written."""
    n = 2**20 if tiny else 2**30
    found = race({"copy": lambda: of_jax(jnp.negative, jnp.zeros(n, jnp.bfloat16))}, samples=10)
    return 4 * n / found["copy"]["ms"] / 1e6


def table(
    op: str, shape: str, found: dict, *, calls: int, flops: float, weights: dict, ceiling: Any
) -> list[dict[str, Any]]:
    """Rows of one race of programs of `calls` products. weights: bytes of each contender's; where
    it is empty, the ceiling is of TFLOP/s.
    """
    for result in found.values():
        result |= {k: result[k] / calls for k in ("ms", "ms_min", "ms_max") if k in result}
    peers = [r["ms"] for name, r in found.items() if "ms" in r and not name.startswith(OURS)]
    rows = []
    for name, result in found.items():
        row = {"op": op, "shape": shape, "impl": name} | result
        if "ms" in result:
            ms, nbytes = result["ms"], weights.get(name)
            gbs = None if nbytes is None else nbytes / ms / 1e6
            row |= {k: round(v, 5) for k, v in result.items() if k.startswith("ms")}
            row |= {
                "tflops": round(flops / ms / 1e9, 1),
                "gbs": gbs and round(gbs),
                "pct_of_ceiling": round(100 * (gbs or flops / ms / 1e9) / ceiling, 1),
                "ratio_to_best_peer": round(min(peers) / ms, 3) if peers else None,
            }
        keys = ("ms", "gbs", "tflops", "pct_of_ceiling", "ratio_to_best_peer", "err", "error")
        print(f"{op:14} {shape:28} {name:26}", {k: row[k] for k in keys if row.get(k)}, flush=True)
        rows.append(row)
    return rows


def distance(ours: jax.Array, exact: jax.Array) -> float:
    """Root mean square of the difference over that of `exact`."""
    ours, exact = ours.astype(jnp.float32), exact.astype(jnp.float32)
    return float(f"{jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact):.3g}")


def dense_rows(sizes: Sizes, tiny: bool) -> list[dict[str, Any]]:
    """Few rows by one or several matrices, at each width and number of rows."""
    rows = []
    for name, (I, widths) in sizes.items_of_dense():
        numbers = I * sum(widths)
        L = max(2, sizes.stack // numbers)
        w = tuple(normal(i, (L, I, O), 0.02) for i, O in enumerate(widths))
        packed = tuple(jax.jit(fp8.to_fp8)(a) for a in w)
        whole = jnp.concatenate([a.swapaxes(1, 2) for a in w], axis=1)  # [L, O, I], for f8 dots
        for M in sizes.rows:
            x = normal(9, (M, I))
            found = race(
                dense_contenders(x, w, packed, whole, sizes.loops, tiny), samples=5
            )
            for ours, err in dense_errors(x, w, packed, tiny).items():
                found[ours]["err"] = err
            weights = {n: numbers * (1 if "8" in n.split()[1] else 2) for n in found}
            rows += table(
                "few rows",
                f"{name} {I}->{'+'.join(map(str, widths))} M{M}",
                found,
                calls=sizes.loops * L,
                flops=2.0 * M * numbers,
                weights=weights,
                ceiling=copy_gbs(tiny),
            )
        del w, packed, whole
    return rows
