"""Products with FP8 weights and products of few rows on one GPU, beside peers in the same run.

A row: op, shape, impl, ms, tflops, gbs, pct_of_ceiling, ratio_to_best_peer, err. GB/s count the
weights that are met, once, at the size they are stored in. The ceiling is a copy of 2 GiB for few
rows, a bfloat16 product of 8192^3 for many. Few rows are timed as a model meets them: a scan over a
stack of layers, several times round, in one program; torch replays a graph of the same. Ours
quantises its rows within the time, but for "rows in FP8"; peers get theirs quantised. `--tiny` runs
it on a CPU.
"""

import argparse
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernels import (
    Contender,
    copy_gbs,
    matmul_ceiling,
    normal,
    of_jax,
    of_torch,
    race,
    torch_or_none,
)
from experiments.bench.results import device_name, merge_result
from glm45_jax.kernels import fp8, fp8_matmul, fp8_matmul_gpu
from glm45_jax.kernels.fp8_matmul import as_quantized, grouped_matmul_fp8
from glm45_jax.kernels.grouped_matmul import grouped_matmul
from glm45_jax.kernels.linear import linears

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
    dense={
        "qkv": (4096, (12288, 1024, 1024)),
        "out": (12288, (4096,)),
        "shared": (4096, (1408, 1408)),
    },
    experts={"gate": (4096, 1408), "down": (1408, 4096)},
    rows=(1, 64, 256),
    routed=(8, 128, 512, 2048),
    many=8192,
    many_routed=65_536,
)
TINY = Sizes({"qkv": (256, (256, 128, 128))}, {"gate": (256, 128)}, (8,), (8,), 256, 256, 2, 2**20)


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


def graph(calls: Sequence[Callable[[], Any]], loops: int) -> Contender:
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
    w_OI = w_OI.contiguous()  # a transposed one stays so through the division, and cuBLAS refuses
    x, w = x_MI.float().view(M, I // 128, 128), w_OI.float().view(O // 128, 128, I // 128, 128)
    sx, sw = x.abs().amax(2) / 448, w.abs().amax((1, 3)) / 448
    x8 = (x / sx[..., None]).to(torch.float8_e4m3fn).view(M, I)
    w8 = (w / sw[:, None, :, None]).to(torch.float8_e4m3fn).view(O, I)
    sx = sx.t().clone(memory_format=torch.contiguous_format).t()  # of one row too: strides (1, M)
    kinds = (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)
    return lambda: product(x8, w8.t(), sx, kinds[0], sw.t(), kinds[1], output_dtype=torch.bfloat16)


def ceiling_gbs(tiny: bool) -> float:
    """GB/s of a copy in this run."""
    return copy_gbs(2**20) if tiny else copy_gbs()


def table(
    op: str, shape: str, found: dict, *, calls: int, flops: float, weights: dict, ceiling: Any
) -> list[dict[str, Any]]:
    """Rows of one race of programs of `calls` products. weights: bytes of each contender's; where
    it is empty, the ceiling is of TFLOP/s.
    """
    for result in found.values():
        result |= {k: result[k] / calls for k in ("ms", "ms_min", "ms_max") if k in result}
    peers = [r["ms"] for name, r in found.items() if "ms" in r and not name.startswith("ours")]
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


def is_fp8(name: str) -> bool:
    """Whether the contender reads a byte a weight."""
    return "fp8" in name or "f8" in name


SPEC = "mi,io->mo"


def by_fp8(x: jax.Array, ws: tuple[fp8.Fp8, ...]) -> tuple[jax.Array, ...]:
    return linears(x, *((SPEC, w) for w in ws))


def by_kernel(q: jax.Array, scale: jax.Array, w: fp8.Fp8) -> jax.Array:
    return fp8_matmul_gpu.matmul_quantized(q, scale, w)[0]


def by_bf16(x: jax.Array, ws: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return linears(x, *((SPEC, w) for w in ws))


def by_xla(x: jax.Array, ws: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.dot(x, w) for w in ws)


def by_f8_dot(x: jax.Array, ws: tuple[fp8.Fp8, ...]) -> tuple[jax.Array, ...]:
    """XLA's product of e4m3 numbers, for its time: the scales are left out."""
    x8, numbers = x.astype(E4M3), (((1,), (1,)), ((), ()))
    half = jnp.bfloat16
    return tuple(
        jax.lax.dot_general(x8, w.values_OI, numbers, preferred_element_type=half) for w in ws
    )


def dense_contenders(x: jax.Array, ws: Any, packed: Any, loops: int) -> dict[str, Callable]:
    """Everybody who multiplies few rows by the matrices of every layer, as they lie in a stack."""
    found: dict[str, Callable[[], Contender]] = {
        "ours fp8": lambda: of_jax(repeated(by_fp8, loops), x, packed),
        "ours bf16": lambda: of_jax(repeated(by_bf16, loops), x, ws),
        "xla bf16": lambda: of_jax(repeated(by_xla, loops), x, ws),
        "xla f8, no scales": lambda: of_jax(repeated(by_f8_dot, loops), x, packed),
    }
    if torch := torch_or_none():
        xt, wt = torch.from_dlpack(x), [torch.from_dlpack(w) for w in ws]
        layers = range(wt[0].shape[0])
        plain = [functools.partial(torch.mm, xt, w[i]) for i in layers for w in wt]
        found["torch bf16"] = lambda: graph(plain, loops)
        found["torch fp8 1x128"] = lambda: graph(
            [scaled_mm(xt, w[i].t()) for i in layers for w in wt], loops
        )
    return found


def dense_rows(sizes: Sizes, tiny: bool) -> list[dict[str, Any]]:
    """Few rows by one or several matrices, at each width and number of rows."""
    rows = []
    for name, (I, widths) in sizes.dense.items():
        numbers = I * sum(widths)
        L = max(2, sizes.stack // numbers)
        ws = tuple(normal(i, (L, I, O), 0.02) for i, O in enumerate(widths))
        packed = tuple(jax.jit(fp8.to_fp8)(w) for w in ws)
        first, first8 = (jax.tree.map(lambda a: a[0], t) for t in (ws, packed))
        for M in sizes.rows:
            x = normal(9, (M, I))
            found = race(dense_contenders(x, ws, packed, sizes.loops), samples=5)
            exact8 = fp8_matmul.reference(x.astype(jnp.float32), *first8)
            exact = jnp.dot(x, first[0], preferred_element_type=jnp.float32)
            found["ours fp8"]["err"] = max(map(distance, by_fp8(x, first8), exact8))
            found["ours bf16"]["err"] = distance(by_bf16(x, first)[0], exact)
            rows += table(
                "few rows",
                f"{name} {I}->{'+'.join(map(str, widths))} M{M}",
                found,
                calls=sizes.loops * L,
                flops=2.0 * M * numbers,
                weights={n: numbers * (1 if is_fp8(n) else 2) for n in found},
                ceiling=ceiling_gbs(tiny),
            )
        del ws, packed
    return rows


def routed(n_rows: int) -> np.ndarray:
    """Rows of each expert when n_rows / 8 tokens choose eight of 128, lognormal skew 0.6."""
    rng = np.random.default_rng(0)
    share = np.exp(0.6 * rng.standard_normal(EXPERTS))
    choose = functools.partial(rng.choice, EXPERTS, TOP_K, replace=False, p=share / share.sum())
    chosen = np.concatenate([choose() for _ in range(n_rows // TOP_K)])
    return np.bincount(chosen, minlength=EXPERTS).astype(np.int32)


def grouped_contenders(x: Any, w: Any, packed: Any, sizes_E: Any, loops: int) -> dict[str, Any]:
    """Everybody who multiplies grouped rows by the matrices of every layer."""
    rows_E = jnp.asarray(sizes_E)
    found: dict[str, Callable[[], Contender]] = {
        "ours fp8": lambda: of_jax(repeated(grouped_matmul_fp8, loops), x, packed, rows_E),
        "ours bf16": lambda: of_jax(repeated(grouped_matmul, loops), x, w, rows_E),
    }
    if torch := torch_or_none():
        ends = torch.tensor(np.cumsum(sizes_E), dtype=torch.int32, device="cuda")
        grouped = functools.partial(torch.nn.functional.grouped_mm, offs=ends)
        xt, wt = torch.from_dlpack(x), torch.from_dlpack(w)
        calls = [functools.partial(grouped, xt, wt[i]) for i in range(wt.shape[0])]
        found["torch F.grouped_mm bf16"] = lambda: graph(calls, loops)
    return found


def grouped_errors(x: Any, w: Any, packed: Any, sizes_E: np.ndarray) -> dict[str, float]:
    """Of the expert with most rows, of layer 0."""
    e, end = int(sizes_E.argmax()), np.cumsum(sizes_E)
    rows = slice(int(end[e] - sizes_E[e]), int(end[e]))
    rows_E, first8 = jnp.asarray(sizes_E), jax.tree.map(lambda a: a[0], packed)
    one = fp8.to_array(jax.tree.map(lambda a: a[e], first8), jnp.float32)
    exact8 = jnp.dot(as_quantized(x[rows]), one, precision=jax.lax.Precision.HIGHEST)
    exact = jnp.dot(x[rows], w[0, e], preferred_element_type=jnp.float32)
    return {
        "ours fp8": distance(grouped_matmul_fp8(x, first8, rows_E)[rows], exact8),
        "ours bf16": distance(grouped_matmul(x, w[0], rows_E)[rows], exact),
    }


def grouped_rows(sizes: Sizes, tiny: bool) -> list[dict[str, Any]]:
    """Rows of decoding by the experts that they touch, two layers in turn."""
    rows = []
    for name, (I, O) in sizes.experts.items():
        w = normal(0, (2, EXPERTS, I, O), 0.02)
        packed = jax.jit(fp8.to_fp8)(w)
        for R in sizes.routed:
            x, sizes_E = normal(9, (R, I)), routed(R)
            touched = int((sizes_E > 0).sum())
            found = race(grouped_contenders(x, w, packed, sizes_E, sizes.loops), samples=5)
            for ours, err in grouped_errors(x, w, packed, sizes_E).items():
                found[ours]["err"] = err
            rows += table(
                "grouped",
                f"{name} {I}->{O} R{R}, {touched} of {EXPERTS}",
                found,
                calls=2 * sizes.loops,
                flops=2.0 * R * I * O,
                weights={n: touched * I * O * (1 if is_fp8(n) else 2) for n in found},
                ceiling=ceiling_gbs(tiny),
            )
        del w, packed
    return rows


def many_rows(sizes: Sizes, tiny: bool) -> list[dict[str, Any]]:
    """A square product, and the rows of a prompt's tokens by all experts."""
    n = sizes.many
    x, w = normal(0, (n, n)), normal(1, (n, n), 0.02)
    packed = jax.jit(fp8.to_fp8)(w)
    contenders: dict[str, Callable[[], Contender]] = {
        "ours fp8": lambda: of_jax(by_fp8, x, (packed,)),
        "ours fp8, rows in FP8": lambda: of_jax(
            by_kernel, *jax.jit(fp8_matmul_gpu.quantized)(x), packed
        ),
        "xla bf16": lambda: of_jax(by_xla, x, (w,)),
        "xla f8, no scales": lambda: of_jax(by_f8_dot, x, (packed,)),
    }
    if torch := torch_or_none():
        xt, wt = torch.from_dlpack(x), torch.from_dlpack(w)
        contenders["torch fp8 1x128"] = lambda: of_torch(scaled_mm(xt, wt.t()))
    exact = fp8_matmul.reference(x[:256].astype(jnp.float32), packed)[0]
    found = race(contenders, samples=8)
    found["ours fp8"]["err"] = distance(by_fp8(x, (packed,))[0][:256], exact)
    ceiling = 1.0 if tiny else matmul_ceiling()
    more: dict[str, Any] = {"calls": 1, "weights": {}, "ceiling": ceiling}
    rows = table("many rows", f"{n}^3", found, flops=2.0 * n**3, **more)
    del x, w, packed
    for name, (I, O) in sizes.experts.items():
        w, R = normal(0, (1, EXPERTS, I, O), 0.02), sizes.many_routed
        packed, x, sizes_E = jax.jit(fp8.to_fp8)(w), normal(9, (R, I)), routed(R)
        found = race(grouped_contenders(x, w, packed, sizes_E, 1), samples=5)
        for ours, err in grouped_errors(x, w, packed, sizes_E).items():
            found[ours]["err"] = err
        rows += table("many grouped", f"{name} {I}->{O} R{R}", found, flops=2.0 * R * I * O, **more)
    return rows


def quantise_rows(sizes: Sizes, tiny: bool) -> list[dict[str, Any]]:
    """A leaf of experts to FP8, bytes read and written."""
    rows = []
    for name, (I, O) in sizes.experts.items():
        w = normal(0, (2, EXPERTS, I, O), 0.02)
        found = race({"ours fp8": functools.partial(of_jax, fp8.to_fp8, w)}, samples=8)
        nbytes = {"ours fp8": 3 * w.size}
        more: dict[str, Any] = {"calls": 1, "weights": nbytes, "ceiling": ceiling_gbs(tiny)}
        rows += table("quantise", f"{name} {list(w.shape)}", found, flops=0.0, **more)
    return rows


OPS = {"few": dense_rows, "grouped": grouped_rows, "many": many_rows, "quantise": quantise_rows}


def main() -> None:
    """Measures, prints, writes."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=OPS, nargs="*", default=list(OPS))
    parser.add_argument("--tiny", action="store_true", help="small sizes, nothing written")
    args = parser.parse_args()
    began, sizes = time.perf_counter(), TINY if args.tiny else AIR
    for op in args.only:
        rows = OPS[op](sizes, args.tiny)
        torch = torch_or_none()
        value = {
            "command": f"python -m experiments.bench.kernels_fp8 --only {op}",
            "jax": jax.__version__,
            "torch": torch.__version__ if torch else None,
            "copy_gbs": round(ceiling_gbs(args.tiny)),
            "seconds": round(time.perf_counter() - began),
            "rows": rows,
        }
        if not args.tiny:
            print(f"wrote {merge_result(device_name(), f'kernels_fp8_{op}', value)}", flush=True)


if __name__ == "__main__":
    main()
