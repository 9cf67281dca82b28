"""Paged decode attention on one GPU beside its peers in the same run, a row each.

Peers: cuDNN through jax on keys and values that lie contiguous, a token a row; the reference, which
XLA turns into a gather of the pages and two products. GB/s count the keys and values that are seen,
once, at the size they are stored in; the ceiling is a copy of 2 GiB in the same run. Pages lie in
random order. `--tune` tries sizes of the kernel instead.
"""

import argparse
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

# Nothing timed here is a product that XLA picks an algorithm for, the reference's apart.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernels import Contender, copy_gbs, of_jax, race
from experiments.bench.results import device_name, merge_result
from glm45_jax.kernels.decode_attention import decode_attention, reference

OURS, GATHER, CUDNN = "ours", "xla gather", "jax cudnn, contiguous bf16"
LAYERS = 2  # in the pages; read in turn
LOOPS = 10  # calls of one program, each on what the last one gave: a kernel is timed, not Python


@dataclasses.dataclass(frozen=True)
class Case:
    """B rows that hold S tokens (ragged: 1 to S, uniform), the last T of them new; N query and K kv
    heads of width H; pages of `page` tokens.
    """

    B: int
    S: int
    T: int = 1
    N: int = 96
    K: int = 8
    H: int = 128
    page: int = 16
    fp8: bool = False
    ragged: bool = False

    def __str__(self) -> str:
        kind = "fp8" if self.fp8 else "bf16"
        ragged = " ragged" if self.ragged else ""
        sizes = f"B{self.B} S{self.S} T{self.T} {self.N}/{self.K} d{self.H}"
        return f"{sizes} {kind} pages of {self.page}{ragged}"

    @property
    def held_B(self) -> np.ndarray:
        """Tokens of each row, the new ones too."""
        if not self.ragged:
            return np.full(self.B, self.S, np.int32)
        return np.random.default_rng(0).integers(self.T, self.S + 1, self.B).astype(np.int32)

    @property
    def nbytes(self) -> float:
        """Of the keys and values that are seen."""
        return float(self.held_B.sum()) * self.K * self.H * 2 * (1 if self.fp8 else 2)

    def where(self) -> dict[str, jax.Array]:
        """Layer, table and starts; pages in random order."""
        pages = self.B * (self.S // self.page)
        table_BP = np.random.default_rng(1).permutation(pages).astype(np.int32).reshape(self.B, -1)
        start_B = self.held_B - self.T
        return {
            "layer": jnp.int32(LAYERS - 1),
            "table_BP": jnp.asarray(table_BP),
            "start_B": jnp.asarray(start_B),
        }

    def draw(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, and pages of keys and values, all in bfloat16."""
        pages = (LAYERS, self.B * (self.S // self.page), self.page, self.K, self.H)
        return normal((self.B, self.T, self.N, self.H), 0), normal(pages, 1), normal(pages, 2)


@functools.lru_cache(maxsize=3)
def normal(shape: tuple[int, ...], seed: int) -> jax.Array:
    """bfloat16; the last few are kept for the next case."""
    return _normal(jax.random.key(seed, impl="rbg"), shape)


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A part at a time, so that nothing wider is held."""
    parts = math.gcd(shape[1], 8)
    part = (shape[0], shape[1] // parts, *shape[2:])
    keys = jax.random.split(key, parts)
    drawn = jax.lax.map(lambda key: jax.random.normal(key, part, jnp.bfloat16), keys)
    return jnp.moveaxis(drawn, 0, 1).reshape(shape)


exact_attention = jax.jit(reference)


def exact_rows(case: Case, args, where: dict[str, jax.Array]) -> np.ndarray:
    """The first and the last row by the definition in float32."""
    q, k, v = args
    rows = np.array([0, case.B - 1])
    table = where["table_BP"][rows]
    k, v = (x[-1:, table.reshape(-1)].astype(jnp.float32) for x in (k, v))
    out = exact_attention(
        q[rows].astype(jnp.float32),
        k,
        v,
        layer=jnp.int32(0),
        table_BP=jnp.arange(table.size, dtype=jnp.int32).reshape(2, -1),
        start_B=where["start_B"][rows],
    )
    return np.asarray(out)


def distance(rows: Any, exact: np.ndarray) -> float:
    """Relative, of the first and the last row."""
    return float(np.linalg.norm(np.asarray(rows, np.float32) - exact) / np.linalg.norm(exact))


def looped(f: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """LOOPS calls of `f`, layers in turn from the last: the last result, and two rows of the first,
    which cost a copy of a few KiB a call.
    """

    def run(q, k, v, where):
        def one(i, carry):
            q, first = carry
            out = f(q, k, v, **(where | {"layer": (i + LAYERS - 1) % LAYERS})).astype(q.dtype)
            return out, jnp.where(i == 0, out[jnp.array([0, -1])], first)

        return jax.lax.fori_loop(0, LOOPS, one, (q, jnp.zeros((2, *q.shape[1:]), q.dtype)))

    return jax.jit(run)


def cudnn(q, k_BSKH, v_BSKH, *, length_B=None, **_):
    """One token a row over keys and values that lie contiguous."""
    return jax.nn.dot_product_attention(
        q, k_BSKH, v_BSKH, key_value_seq_lengths=length_B, implementation="cudnn"
    )


PROGRAMS = {
    OURS: looped(functools.partial(decode_attention, impl="mosaic")),
    GATHER: looped(reference),
    CUDNN: looped(cudnn),
}


def contenders(case: Case, args, where, wide) -> dict[str, Callable[[], Contender]]:
    """Ways to compute it. args: queries and pages; wide: bfloat16 pages, which in cuDNN's order of
    tokens are other rows.
    """

    def of(name, *args):
        return lambda: of_jax(PROGRAMS[name], *args)

    found = {OURS: of(OURS, *args, where), GATHER: of(GATHER, *args, where)}
    if case.T == 1:
        flat = (case.B, case.S, case.K, case.H)
        k, v = (x[0].reshape(flat) for x in wide)
        lengths = {"length_B": jnp.asarray(case.held_B)} if case.ragged else {}
        found[CUDNN] = of(CUDNN, args[0], k, v, lengths)
    return found


def timed(made: dict[str, Callable[[], Contender]], **kwargs: Any) -> dict[str, dict[str, Any]]:
    """`race`, one of the LOOPS."""
    found = race(made, **kwargs)
    for result in found.values():
        result |= {x: result[x] / LOOPS for x in ("ms", "ms_min", "ms_max") if x in result}
    return found


def measure(case: Case, ceiling: float) -> list[dict[str, Any]]:
    """A row for each contender; ours with its error on what the pages hold, and in fp8 with that of
    the pages too.
    """
    q, *wide = case.draw()
    where = case.where()
    pages = [x.astype(jnp.float8_e4m3fn) for x in wide] if case.fp8 else wide
    exact = exact_rows(case, (q, *pages), where)
    first = []

    def error(out: Any) -> float:
        first.append(out[1])
        return distance(out[1], exact)

    found = timed(contenders(case, (q, *pages), where, wide), samples=4, error=error)
    found.get(CUDNN, {}).pop("err", None)  # of other rows
    if case.fp8 and "ms" in found[OURS]:
        of_pages = distance(first[0], exact_rows(case, (q, *wide), where))
        found[OURS]["err_with_pages"] = float(f"{of_pages:.3g}")
    peers = [r["ms"] for name, r in found.items() if "ms" in r and name != OURS]
    table = []
    for name, result in found.items():
        row = {"op": "decode_attention", "shape": str(case), "impl": name} | result
        if "ms" in result:
            ms = result["ms"]
            nbytes = case.nbytes * (2 if case.fp8 and name == CUDNN else 1)  # what it reads
            row |= {x: round(row[x], 4) for x in ("ms", "ms_min", "ms_max")}
            row |= {
                "gbs": round(nbytes / ms / 1e6),
                "pct_of_ceiling": round(nbytes / ms / 1e4 / ceiling, 1),
                "ratio_to_best_peer": round(min(peers) / ms, 3) if peers else None,
            }
        print(f"{time.perf_counter():8.0f} {row}", flush=True)
        table.append(row)
    return table


CASES = (
    Case(64, 8192),
    Case(64, 8192, fp8=True),
    Case(64, 32768),
    Case(64, 32768, fp8=True),
    Case(64, 8192, T=4),
    Case(64, 8192, T=4, fp8=True),
    Case(64, 8192, ragged=True),
    Case(64, 8192, fp8=True, ragged=True),
    Case(1, 32768),
    Case(64, 2048, N=16, K=4, H=64, page=32),
)


def tune() -> None:
    """Prints the time of other sizes of the kernel."""
    from glm45_jax.kernels.decode_attention_gpu import Tuning, paged_attention

    ceiling = copy_gbs()
    sizes: tuple[dict[str, Any], ...] = (
        {},
        {"stages": 3},
        {"keys": 128},
        {"edges": (0, 4096, 8192)},
    )
    for case in (Case(64, 8192), Case(64, 8192, fp8=True), Case(64, 8192, T=4, fp8=True)):
        q, *pages = case.draw()
        where = case.where()
        pages = [x.astype(jnp.float8_e4m3fn) for x in pages] if case.fp8 else pages
        for size in sizes:
            f = looped(functools.partial(paged_attention, tuning=Tuning(**size)))
            call: Callable[[], Contender] = functools.partial(of_jax, f, q, *pages, where)
            found = timed({OURS: call}, samples=4)[OURS]
            gbs = case.nbytes / found["ms"] / 1e6 if "ms" in found else 0
            print(f"{case} {size}: {found} {100 * gbs / ceiling:.1f}%", flush=True)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="try other sizes, write nothing")
    if parser.parse_args().tune:
        return tune()
    ceiling = copy_gbs()
    print(f"copy {ceiling:.0f} GB/s", flush=True)
    table: list[dict[str, Any]] = []
    for case in CASES:  # written after each: a run that is cut leaves what it has
        table += measure(case, ceiling)
        value = {
            "command": "python -m experiments.bench.kernels_decode",
            "jax": jax.__version__,
            "copy_gbs": round(ceiling),
            "rows": table,
        }
        file = merge_result(device_name(), "kernels_decode", value)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
