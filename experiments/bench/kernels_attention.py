"""Attention on one GPU: this project's kernels beside their peers in turns, a row each.

Peers: cuDNN through jax, the Pallas kernel that jax ships (float16 and forward only), torch's SDPA
on cuDNN, tokamax where it is carried (`tokamax_peer`); with several documents a row, the reference.
TFLOP/s count the pairs of a query and a key that it sees: 2·(H + U) a pair and head forward, and
2·(3·H + 2·U) backward; 3.5 times as much together, where values are as wide as keys.
"""

import dataclasses
import functools
import math
import os
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
from experiments.bench.kernels import (
    OURS,
    Contender,
    forward_and_backward,
    matmul_ceiling,
    of_jax,
    of_torch,
    race,
    rows,
    to_host,
    torch_or_none,
)
from experiments.bench.results import device_name, merge_result
from glm45_jax.kernels.attention import attention, reference

COMMAND = "python -m experiments.bench.kernels_attention"
TORCH = "torch cudnn"


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

    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Of q, k, v and a cotangent."""
        U = self.U or self.H
        sizes = (self.N, self.H), (self.K, self.H), (self.K, U), (self.N, U)
        return [(self.B, self.T, n, H) for n, H in sizes]

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

    def nbytes(self, backward: bool) -> float:
        """Of q, k, v and the output in bfloat16; backward once more, and their gradients."""
        return 2.0 * sum(map(math.prod, self.shapes())) * (3 if backward else 1)


def draw(case: Case, dtype: Any) -> list[jax.Array]:
    """q, k, v and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    pairs = zip(keys, case.shapes(), strict=True)
    return [jax.random.normal(key, shape, dtype) for key, shape in pairs]


def jax_impls(case: Case) -> dict[str, Callable[..., jax.Array]]:
    """Ways to compute it in jax."""
    if case.documents > 1:
        segment = jnp.asarray(np.cumsum(case.starts_BT, axis=1, dtype=np.int32) + 1)
        ours = functools.partial(attention, segments_BT=segment, impl="mosaic")
        return {OURS: ours, "reference": functools.partial(reference, segments_BT=segment)}
    peer = "cudnn" if case.U is None else "tiles"  # cudnn takes one width
    return {
        OURS: functools.partial(attention, impl="mosaic"),
        f"jax {peer}": functools.partial(attention, impl=peer),
    }


def error_of(case: Case, args: list[jax.Array]) -> Callable[[Any], float]:
    """Relative error of an output, alone or before its gradients: of one group of heads over the
    first tokens, which see nothing later, against float32.
    """
    T, G = min(case.T, 4096), case.N // case.K
    segment = jnp.asarray(np.cumsum(case.starts_BT[:1, :T], axis=1, dtype=np.int32))
    cut = (x[:1, :T, :n].astype(jnp.float32) for x, n in zip(args, (G, 1, 1), strict=False))
    exact = np.asarray(jax.jit(functools.partial(reference, segments_BT=segment))(*cut))[0]

    def error(out: Any) -> float:
        y = out[0] if isinstance(out, tuple) else out
        if isinstance(y, jax.Array):
            found = to_host(y, (0, slice(T), slice(G)))
        else:
            found = to_host(y, (0, slice(G), slice(T))).swapaxes(0, 1)
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    return error


def shipped(args: list[jax.Array]) -> Contender:
    """The Pallas kernel in jax's wheel: float16, forward; it applies no scale, so q has it."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
    )
    q, k, v = (x.astype(jnp.float16) for x in args[:3])
    f = functools.partial(attention_mgpu.attention, config=config)
    return of_jax(f, (q * q.shape[-1] ** -0.5).astype(jnp.float16), k, v)


def of_sdpa(args: list[jax.Array], backward: bool) -> Contender:
    """torch's, on cuDNN, heads before tokens."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, cotangent = (torch.from_dlpack(x).transpose(1, 2).contiguous() for x in args)

    def forward(*some: Any) -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                *some, is_causal=True, enable_gqa=True
            )

    def both(*some: Any) -> Any:
        out = forward(*some)
        return out.detach(), *torch.autograd.grad(out, some, cotangent)

    if not backward:
        return of_torch(forward, q, k, v)
    return of_torch(both, *(x.requires_grad_() for x in (q, k, v)))


def contenders(
    case: Case, args: list[jax.Array], skip: tuple[str, ...], backward: bool
) -> dict[str, Callable[[], Contender]]:
    """All that take the case in that direction. tokamax forward alone: its backward pass did not
    finish within a minute.
    """
    ways = {name: f for name, f in jax_impls(case).items() if name not in skip}
    found: dict[str, Callable[[], Contender]] = {}
    for name, f in ways.items():
        run, some = (forward_and_backward(f), args) if backward else (f, args[:3])
        found[name] = functools.partial(of_jax, run, *some)
    if case.documents > 1:
        return found
    if torch_or_none():
        found[TORCH] = functools.partial(of_sdpa, args, backward)
    if case.H == 128 and not backward:
        found["jax pallas f16"] = functools.partial(shipped, args)
        if case.T <= 4096 and (foreign := tokamax_peer.attention()):
            found[tokamax_peer.NAME] = functools.partial(of_jax, foreign, *args[:3])
    return found


def measure(case: Case, samples: int, skip: tuple[str, ...], ceiling: float) -> list[dict]:
    """A row for each contender and direction."""
    args, table = draw(case, jnp.bfloat16), []
    error = error_of(case, args)
    for backward in (False, True):
        found = race(contenders(case, args, skip, backward), samples=samples, error=error)
        table += rows(
            f"attention {'fwd+bwd' if backward else 'fwd'}",
            str(case),
            found,
            flops=case.flops(backward),
            nbytes=case.nbytes(backward),
            ceiling=ceiling,
        )
    return table


def main() -> None:
    """Measures, prints, writes."""
    short, long = Case(8, 4096, 96, 8, 128), Case(1, 32768, 96, 8, 128)
    narrow = Case(8, 4096, 96, 8, 64)
    wide, latent = Case(8, 4096, 20, 20, 256), Case(8, 4096, 20, 20, 192, U=128)
    packed, one = Case(8, 4096, 96, 8, 128, documents=8), Case(1, 4096, 96, 8, 128, documents=8)
    parts: list[tuple[Case, int, tuple[str, ...]]] = [  # what is to be known first comes first
        (long, 4, ()),
        (short, 10, ()),
        (wide, 10, ()),
        (latent, 3, ()),
        (packed, 10, ("reference",)),
        (narrow, 10, ()),
        (one, 3, ()),
    ]
    ceiling = matmul_ceiling()
    value = {"command": COMMAND, "jax": jax.__version__, "matmul_tflops": round(ceiling, 1)}
    table: list[dict[str, Any]] = []
    for part in parts:  # written after each: a run that is cut leaves what it has
        table += measure(*part, ceiling)
        file = merge_result(device_name(), "attention", value | {"rows": table})
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
