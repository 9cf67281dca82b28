"""The backward pass of attention in one kernel beside that in two, and cuDNN's, on one GPU.

First whether the gradients agree and repeat, then nominal TFLOP/s of forward and backward together
and of backward alone: 4·H a pair of a query and a key that it sees and head forward, 2.5 times that
backward. Each part runs in a process that is ended if it says nothing for `PATIENCE_S`: the parts
after it run in a new one.
"""

import argparse
import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

# Before jax is imported; `kernels_attention` sets the rest.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "/tmp/glm45_jax_gpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.kernels import forward_and_backward
from experiments.bench.kernels_attention import Case, draw, of_sdpa
from experiments.bench.seconds import BEGAN, median_ms, said
from glm45_jax.kernels.attention import attention
from glm45_jax.kernels.attention_gpu import Tuning, flash_attention

PATIENCE_S = 40.0
SMALL = Case(1, 1024, 16, 2, 128), Case(1, 1024, 16, 2, 128, documents=8)
SHORT, LONG = Case(8, 4096, 96, 8, 128), Case(1, 32768, 96, 8, 128)
PACKED, NARROW = Case(8, 4096, 96, 8, 128, documents=8), Case(8, 4096, 96, 8, 64)

TWO = Tuning(fused=False)
ONE = Tuning(fused=True)
WAYS: dict[str, Tuning | str] = {
    "two kernels": TWO,
    "one kernel": ONE,
    "one kernel, 3 stages 1 part": dataclasses.replace(ONE, stages_fused=3, parts_fused=1),
    "jax cudnn": "cudnn",
    "torch cudnn": "torch",
}
OURS = tuple(WAYS)[:3]
Part = tuple[str, Case, str]
PARTS: list[Part] = [  # what is to be known first comes first
    *(("check", case, "one kernel") for case in SMALL),
    *(("time", case, name) for case in (LONG, SHORT, PACKED, NARROW) for name in OURS),
    *(("time", case, name) for case in (LONG, SHORT) for name in ("jax cudnn", "torch cudnn")),
    ("time", NARROW, "jax cudnn"),
]


def op(case: Case, way: Tuning | str) -> Callable[..., jax.Array]:
    """Attention of q, k and v."""
    if isinstance(way, str):
        return functools.partial(attention, impl=way)
    at_BT = None
    if case.documents > 1:
        at_BT = jnp.asarray(np.cumsum(case.starts_BT, axis=1, dtype=np.int32) + 1)
    return functools.partial(flash_attention, segments_BT=at_BT, tuning=way)


@functools.cache
def inputs(case: Case) -> list[jax.Array]:
    """Those of the last case only: they are gigabytes."""
    return draw(case, jnp.bfloat16)


def backward(case: Case, way: Tuning | str) -> Callable[[], tuple[jax.Array, ...]]:
    """Gradients of q, k and v from what forward left, which is computed here."""
    *args, cotangent = inputs(case)
    _, pull = jax.jit(functools.partial(jax.vjp, op(case, way)))(*args)
    run = jax.jit(lambda pull, cotangent: pull(cotangent))
    return functools.partial(run, pull, cotangent)


@functools.cache
def in_two_kernels(case: Case) -> tuple[jax.Array, ...]:
    """The gradients to compare with."""
    return backward(case, TWO)()


@jax.jit
def gaps(ours, theirs) -> list[tuple[jax.Array, jax.Array]]:
    """Largest and root mean square differences of each gradient, relative to the other's."""

    def both(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        worst = jnp.abs(x - y).max() / jnp.abs(y).max()
        return worst, jnp.sqrt(jnp.square(x - y).sum() / jnp.square(y).sum())

    return [both(x, y) for x, y in zip(ours, theirs, strict=True)]


@jax.jit
def same(x, y) -> jax.Array:
    """Whether all bits are."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return jnp.stack([(a == b).all() for a, b in pairs]).all()


def agreement(case: Case, run: Callable[[], tuple[jax.Array, ...]], repeats: int = 3) -> str:
    """Gradients against those of two kernels, and against themselves."""
    first = run()
    equal = [bool(same(first, run())) for _ in range(repeats - 1)]
    found = jax.device_get(gaps(first, in_two_kernels(case)))
    shown = " ".join(
        f"{name} {worst:.1e}/{rms:.1e}"
        for name, (worst, rms) in zip(("dq", "dk", "dv"), found, strict=True)
    )
    wrong = "" if all(rms < 6e-3 for _, rms in found) else " WRONG"  # NaN is not less
    bits = f"bits of {repeats} runs {'equal' if all(equal) else 'DIFFER'}"
    return f"max/rms gap {shown}{wrong}, {bits}"


def measured(part: Part) -> Iterator[str]:
    """Lines about a part."""
    kind, case, name = part
    way, repeats = WAYS[name], 3 if case.T > 8192 else 10
    forward, nominal = case.flops(backward=False), "TFLOP/s"
    if way == "torch":
        theirs = of_sdpa(inputs(case), backward=True)
        ms = median_ms(theirs.call, theirs.wait, repeats)
        yield f"fwd+bwd {ms:.3f} ms {3.5 * forward / ms / 1e9:.1f} {nominal}"
        return
    run = backward(case, way)
    if kind == "check":
        yield agreement(case, run)
        return
    ms = median_ms(run, jax.block_until_ready, repeats)
    yield f"backward {ms:.3f} ms {2.5 * forward / ms / 1e9:.1f} {nominal}"
    call = functools.partial(jax.jit(forward_and_backward(op(case, way))), *inputs(case))
    ms = median_ms(call, jax.block_until_ready, repeats)
    yield f"fwd+bwd {ms:.3f} ms {3.5 * forward / ms / 1e9:.1f} {nominal}"
    if isinstance(way, Tuning) and way != TWO:
        yield agreement(case, run)


def work(parts: list[Part], pipe: Connection) -> None:
    """In a process of its own: each line of each part; None ends a part."""
    last = None
    for part in parts:
        if last not in (None, part[1]):
            inputs.cache_clear()
            in_two_kernels.cache_clear()
        last = part[1]
        try:
            for line in measured(part):
                pipe.send(line)
        except Exception as error:  # one way's failure is a line, others still run
            pipe.send(f"FAILED {type(error).__name__}: {error}"[:600])
        pipe.send(None)
    pipe.close()


def run_parts(parts: list[Part], seconds: float) -> int:
    """How many parts one process did or died of, a line for each thing it tells."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    worker = spawn.Process(target=work, args=(parts, theirs), daemon=True)
    worker.start()
    theirs.close()
    done = 0
    try:
        while done < len(parts):
            kind, case, name = parts[done]
            left = BEGAN + seconds - time.monotonic()
            about = f"{kind} {case} · {name}: "
            line: str | None = None
            if left <= 0 or not ours.poll(min(left, PATIENCE_S)):
                line = "TIME IS UP" if left <= PATIENCE_S else f"HANGS: silent for {PATIENCE_S} s"
                said(about + line)
                return done + 1
            try:
                line = ours.recv()
            except EOFError:
                said(about + "DIED")
                return done + 1
            if line is None:
                done += 1
            else:
                said(about + line)
        return done
    finally:
        worker.kill()
        worker.join()


def main() -> None:
    """All parts, as far as the time goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150.0)
    seconds, parts = parser.parse_args().seconds, list(PARTS)
    while parts and time.monotonic() - BEGAN < seconds:
        parts = parts[run_parts(parts, seconds) :]
    said(f"{len(parts)} parts left")


if __name__ == "__main__":
    main()
