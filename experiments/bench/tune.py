"""Tuner of our kernels for this GPU: times their sizes against each other at the models' shapes and
keeps the fastest in glm45_jax/kernels/tuned/, which the kernels read.

    python -m experiments.bench.tune [--ops rows_by_matrix product ...] [--seconds 500] [--again]

A candidate must give what the kernel's own sizes give, and be 2% faster than these; both times stay
in the table. What the table has is measured again only with --again.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.kernels import Contender, normal, of_jax, race, skewed
from experiments.bench.seconds import BEGAN, said
from glm45_jax.kernels import attention_gpu, decode_attention_gpu, hopper, tuning
from glm45_jax.kernels import fp8_matmul_gpu as fp8_gpu
from glm45_jax.kernels import grouped_matmul_gpu as grouped_gpu
from glm45_jax.kernels import newton_schulz_gpu as product_gpu
from glm45_jax.kernels.dispatch import not_hopper
from glm45_jax.kernels.fp8 import to_fp8
from glm45_jax.kernels.row_tiles_gpu import lay_tiles, tile_rows
from glm45_jax.kernels.shapes import (
    ATTENTION,
    DECODE,
    GROUPED,
    NEWTON_SCHULZ,
    AttentionShape,
    DecodeShape,
    GroupedShape,
    MatricesShape,
)

GAIN = 0.98  # of the time of the kernel's own sizes, or less
TOLERANCE = 2e-2  # of the largest number: other sizes sum in another order, and round
OWN = "own"
HALF = jnp.bfloat16
STAGES = {128: (6, 5), 256: (4, 3)}  # by the columns of a tile: as many as fit, and fewer
OVERLAPS = {128: (1, 2), 256: (1, 4)}  # by the columns: steps over which a tile is stored


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a table. own: sizes by the kernel's rule; others: candidates. inputs() -> arrays,
    and run(sizes)(*arrays) is what is compared and timed.
    """

    op: str
    key: dict[str, int]
    own: Any
    others: tuple[Any, ...]
    inputs: Callable[[], tuple[Any, ...]]
    run: Callable[[Any], Callable[..., Any]]

    @property
    def name(self) -> str:
        """For the log."""
        return f"{self.op} {' '.join(f'{k}={v}' for k, v in self.key.items())}"


def tiles_of(s: GroupedShape) -> Any:
    """Tiles of the groups that `bench.kernels` multiplies."""
    return lay_tiles(jnp.asarray(skewed(s.R)), n_rows=s.R, rows=tile_rows(s.R, s.E))


def plans() -> tuple[grouped_gpu.Plan, ...]:
    """Candidates of both grouped products."""
    return tuple(grouped_gpu.Plan(*sizes) for sizes in cuts())


def cuts() -> list[tuple[int, int, int]]:
    """Columns, stages and overlap of tiles."""
    return [(c, n, o) for c, stages in STAGES.items() for n in stages for o in OVERLAPS[c]]


def by_matrix(s: GroupedShape, transposed: bool) -> Case:
    """Rows times the matrix of their expert; transposed: the gradient by rows."""
    rows = tile_rows(s.R, s.E)
    K, N = (s.F, s.D) if transposed else (s.D, s.F)
    return Case(
        "rows_by_matrix",
        {"K": K, "N": N, "rows": rows, "transposed": int(transposed)},
        grouped_gpu.plan_for(N, rows),
        plans(),
        lambda: (normal(1, (s.R, K)), normal(2, (s.E, s.D, s.F)), tiles_of(s)),
        lambda plan: partial(grouped_gpu.rows_by_matrix, transposed=transposed, plan=plan),
    )


def by_rows(s: GroupedShape) -> Case:
    """The gradient by the matrices."""
    return Case(
        "rows_by_rows",
        {"D": s.D, "F": s.F},
        grouped_gpu.plan_for(s.F),
        plans(),
        lambda: (normal(1, (s.R, s.D)), normal(2, (s.R, s.F)), tiles_of(s)),
        lambda plan: partial(grouped_gpu.rows_by_rows, plan=plan),
    )


def product(s: MatricesShape, what: str) -> Case:
    """Newton-Schulz of a stack: its inner products, a polynomial of these, or that into the stack.
    A symmetric product is of a matrix with itself.
    """
    side, tall = min(s.m, s.n), s.m > s.n
    one_B = partial(jnp.ones, (s.B,), jnp.float32)
    kwargs: dict[str, Any] = {"dtype": jnp.float16, "symmetric": True}

    def square(dtype: Any) -> jax.Array:
        x = normal(1, (s.B, side, side))
        return (x + x.mT).astype(dtype)

    def inputs() -> tuple[Any, ...]:
        x, q = normal(2, (s.B, s.m, s.n)), square(HALF if what == "into" else jnp.float16)
        pairs = {"inner": (x, x), "polynomial": (q, q), "into": (x, q) if tall else (q, x)}
        return *pairs[what], one_B(), one_B()

    m, n, k = side, side, side
    if what == "inner":
        k, kwargs = max(s.m, s.n), kwargs | {"lhs_t": tall, "rhs_t": not tall}
    elif what == "into":
        m, n, kwargs = s.m, s.n, {}
    symmetric = what != "into"
    return Case(
        "product",
        {"B": s.B, "m": m, "n": n, "k": k, "symmetric": int(symmetric)},
        product_gpu.plan_for(s.B, m, n, symmetric=symmetric),
        tuple(product_gpu.Plan(*sizes) for sizes in cuts()),
        inputs,
        lambda plan: partial(product_gpu.product, **kwargs, plan=plan),
    )


def attention(s: AttentionShape) -> Case:
    """Forward and backward together, a document a row."""
    q, k, v = (s.B, s.T, s.N, s.H), (s.B, s.T, s.K, s.H), s.values
    out, width = (s.B, s.T, s.N, s.values[-1]), s.values[-1]
    own = attention_gpu.tuning_of(s.H, width)
    changes: list[dict[str, Any]] = [{"stages": 3}, {"stages_dq": 2}, {"stages_dkv": 3}]
    changes += [{"stages_dkv": 2}, {"queries": 128, "stages_dkv": 2}]
    changes += [{"keys_dq": 128, "stages_dq": 2}]
    if s.H == width <= hopper.TILE:
        changes += [{"fused": True}, {"fused": False}]
        changes += [{"fused": True, "stages_fused": 3, "parts_fused": 1}]

    def run(sizes: Any) -> Callable[..., Any]:
        def both_ways(q: Any, k: Any, v: Any, g: Any) -> Any:
            flash = partial(attention_gpu.flash_attention, tuning=sizes)
            out, back = jax.vjp(flash, q, k, v)
            return out, back(g)

        return both_ways

    return Case(
        "flash_attention",
        {"T": s.T, "G": s.N // s.K, "H": s.H} | ({} if width == s.H else {"U": width}),
        own,
        tuple(dataclasses.replace(own, **change) for change in changes),
        lambda: (normal(1, q), normal(2, k), normal(3, v), normal(4, out)),
        run,
    )


def decode(s: DecodeShape) -> Case:
    """Full rows of pages."""
    pages, dtype = s.B * s.S // s.page, jnp.float8_e4m3fn if s.fp8 else HALF
    kv, own = (1, pages, s.page, s.K, s.H), decode_attention_gpu.Tuning()

    def inputs() -> tuple[Any, ...]:
        table_BP = jnp.arange(pages, dtype=jnp.int32).reshape(s.B, -1)
        start_B = jnp.full(s.B, s.S - s.T, jnp.int32)
        q_BTNH = normal(1, (s.B, s.T, s.N, s.H))
        return q_BTNH, normal(2, kv).astype(dtype), normal(3, kv).astype(dtype), table_BP, start_B

    def run(sizes: Any) -> Callable[..., Any]:
        def attend(q: Any, k: Any, v: Any, table_BP: Any, start_B: Any) -> Any:
            where = {"layer": jnp.int32(0), "table_BP": table_BP, "start_B": start_B}
            return decode_attention_gpu.paged_attention(q, k, v, **where, tuning=sizes)

        return attend

    key = {"B": s.B, "K": s.K, "M": s.T * (s.N // s.K), "H": s.H, "S": s.S}
    return Case(
        "paged_attention",
        key | {"bytes": jnp.dtype(dtype).itemsize},
        own,
        tuple(
            dataclasses.replace(own, keys=keys, stages=stages)
            for keys, stages in itertools.product((64, 128), (2, 3, 4))
        ),
        inputs,
        run,
    )


def fp8(M: int, I: int, O: int) -> Case:
    """Rows times one matrix, both in FP8."""
    own = fp8_gpu.dense_plan(M, I, [O])
    splits = {own.splits, max(1, own.splits // 2), 1}
    pairs = itertools.product(range(own.stages, 3, -2), sorted(splits))
    others = [dataclasses.replace(own, stages=stages, splits=n) for stages, n in pairs]
    if own.rows == fp8_gpu.MANY:
        others.append(fp8_gpu.plan_for(fp8_gpu.ROWS))
        others += [dataclasses.replace(own, band=n * own.rows) for n in (3, 6)]
    return Case(
        "fp8 matmul",
        {"M": M, "I": I, "O": O},
        own,
        tuple(others),
        lambda: (
            *jax.jit(fp8_gpu.quantized)(normal(1, (M, I))),
            jax.jit(to_fp8)(normal(2, (I, O))),
        ),
        lambda plan: partial(fp8_gpu.matmul_quantized, plan=plan),
    )


def fp8_grouped(s: GroupedShape) -> Case:
    """Rows of experts times their matrices in FP8."""
    own = fp8_gpu.plan_for(tile_rows(s.R, s.E))

    def run(plan: Any) -> Callable[..., Any]:
        return partial(fp8_gpu.grouped_matmul, plan=plan)

    return Case(
        "fp8 grouped_matmul",
        {"R": s.R, "E": s.E, "I": s.D, "O": s.F},
        own,
        (
            *(dataclasses.replace(own, stages=n) for n in range(own.stages, 3, -1)),
            fp8_gpu.plan_for(fp8_gpu.MANY),
        ),
        lambda: (
            normal(1, (s.R, s.D)),
            jax.jit(to_fp8)(normal(2, (s.E, s.D, s.F))),
            tiles_of(s).rows_E,
        ),
        run,
    )


def cases() -> Iterator[Case]:
    """All rows of a table, those of training first."""
    grouped = [s for s in GROUPED.values() if s.R >= 4096]
    for s in grouped:
        yield from (by_matrix(s, False), by_matrix(s, True), by_rows(s))
    yield from (attention(s) for s in ATTENTION.values() if not s.small)
    for stack in NEWTON_SCHULZ.values():
        sides = stack.m, stack.n
        if not (product_gpu.refuses(*sides) or product_gpu.idles(stack.B, *sides)):
            yield from (product(stack, what) for what in ("inner", "polynomial", "into"))
    yield from (decode(s) for s in DECODE.values() if s.S >= 2048)
    yield from itertools.starmap(
        fp8,
        ((8192, 8192, 8192), (8192, 4096, 12_288), (64, 4096, 12_288), (64, 12_288, 4096)),
    )
    few = [dataclasses.replace(s, R=512) for s in grouped]
    yield from (fp8_grouped(s) for s in [*grouped, *few])


def difference(out: Any, right: Any) -> float:
    """Largest difference of any number, relative to the largest number of its array."""
    pairs = zip(jax.tree.leaves(out), jax.tree.leaves(right), strict=True)
    return max(float(_difference(a, b)) for a, b in pairs)


@jax.jit
def _difference(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-30)


def measured(case: Case) -> dict[str, Any]:
    """A row of the table: the sizes that differ from the kernel's own, nothing where these win."""
    args = case.inputs()
    sizes = {OWN: case.own} | {str(one): one for one in case.others if one != case.own}
    ready = {name: of_jax(case.run(one), *args) for name, one in sizes.items()}
    with ThreadPoolExecutor(8) as pool:  # compiles; who fails there fails in the race as well
        for job in [pool.submit(one.call) for one in ready.values()]:
            job.exception()
    right = jax.block_until_ready(ready[OWN].call())

    def made(contender: Contender) -> Callable[[], Contender]:
        return lambda: contender

    found = race(
        {name: made(contender) for name, contender in ready.items()},
        samples=10,
        error=lambda out: difference(out, right),
    )
    return case_row(case, sizes, found)


def case_row(case: Case, sizes: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of what a race found. Raises: RuntimeError where the kernel's own sizes failed."""
    own = found[OWN]
    if "ms" not in own:
        raise RuntimeError(f"{case.name}: {own['error']}")
    right = {n: r for n, r in found.items() if "ms" in r and r["err"] <= TOLERANCE}
    best = min(right, key=lambda name: right[name]["ms"])
    if right[best]["ms"] > GAIN * own["ms"]:
        best = OWN
    ours, chosen = dataclasses.asdict(case.own), dataclasses.asdict(sizes[best])
    row = {"op": case.op, "key": case.key}
    row["sizes"] = {name: size for name, size in chosen.items() if size != ours[name]}
    times = {"ms": right[best]["ms"], "default_ms": own["ms"]}
    counts = {"tried": len(found), "failed": len(found) - len(right)}
    return row | {name: round(ms, 5) for name, ms in times.items()} | counts


def keep(kind: str, row: dict[str, Any]) -> None:
    """None; the row stands in the table of this kind of device, in the place of an older one."""
    file = tuning.path(kind)
    same = lambda other: (other["op"], other["key"]) == (row["op"], row["key"])  # noqa: E731
    rows = [other for other in tuning.rows(kind) if not same(other)]
    table = {"device": kind, "jax": jax.__version__, "rows": [*rows, row]}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    """Measures, prints, keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ops", nargs="+", help="those alone, by the first word of what is printed"
    )
    parser.add_argument("--seconds", type=float, default=500.0, help="after which nothing begins")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    if why := not_hopper():
        raise SystemExit(f"nothing to tune: {why}")
    kind = jax.devices()[0].device_kind
    have = [] if args.again else [(row["op"], row["key"]) for row in tuning.rows(kind)]
    for case in cases():
        if (args.ops and case.op not in args.ops) or (case.op, case.key) in have:
            continue
        if time.monotonic() - BEGAN > args.seconds:
            said("no time for more; again goes on")
            break
        row = measured(case)
        keep(kind, row)
        said(f"{case.name}: {row['default_ms']} -> {row['ms']} ms, {row['sizes'] or OWN}")
    print(f"wrote {tuning.path(kind)}")


if __name__ == "__main__":
    main()
