"""What one call of an engine costs: a prefill of a bucket, an insert, a decode call, each on its
way (the host's time, as calls follow each other) and to its end (the host waits for every one).

    python -m experiments.bench.engine_calls [--model smollm2|mini] [--slots 512] [--steps 4]

Weights are drawn at random, rows hold `--filled` tokens. Rows go to the result file of the device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # the kept rows had it

import jax
import numpy as np

from experiments.bench.results import device_name, merge_rows
from experiments.bench.seconds import median_ms
from glm45_jax import params as params_lib
from glm45_jax.hf import smollm2
from glm45_jax.metrics import setup_logging
from glm45_jax.model import config, transformer
from glm45_jax.rollout import weights
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Seat

MODELS = {"smollm2": smollm2.smollm2, "mini": config.mini, "tiny": config.tiny}
CALLS = 20  # of each kind, after two that are not counted


def served(name: str) -> tuple[config.ModelConfig, Any]:
    """A model and weights for its engine."""
    cfg = MODELS[name]()
    drawn = params_lib.init(transformer.specs(cfg), key=jax.random.key(0))
    return cfg, weights.stage(weights.prepare(drawn, 0, cfg=cfg), jax.local_devices()[0]).params


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of a call: on its way, and to its end. The engine's state passes through."""
    ended = median_ms(call, jax.block_until_ready, CALLS)
    began = time.perf_counter()
    for _ in range(CALLS):
        out = call()
    told = time.perf_counter() - began
    jax.block_until_ready(out)
    return 1e3 * told / CALLS, ended


def measure(name: str, *, slots: int, steps: int, filled: int) -> list[dict[str, Any]]:
    """A row a call."""
    cfg, params = served(name)
    width = -(-(filled + 2 * steps * (2 * CALLS + 4)) // 16)
    engine = GlmEngine(
        cfg,
        slots=slots,
        pages=slots * width,
        max_tokens=16 * width,
        buckets=(96, 224),
        steps=steps,
        together=min(16, slots),
    )
    state, last = engine.init(), None
    pages = np.arange(slots * width, dtype=np.int32).reshape(slots, width)
    active_B = np.ones(slots, bool)
    rng = np.random.default_rng(0)

    def prefill(tokens: int) -> Any:
        nonlocal state, last
        ids = rng.integers(0, 1000, tokens).tolist()
        state, last = engine.prefill(params, state, ids, 0, pages[0].tolist())
        return last.logits_1V

    def insert(rows: int, at: int = 0) -> Any:
        nonlocal state
        assert last is not None
        seats = [Seat(last, at + n, filled, 0, Sampling(seed=n)) for n in range(rows)]
        state, step = engine.insert(state, seats)
        return step.draw.token_B

    def decode() -> Any:
        nonlocal state
        state, step = engine.decode(params, state, pages, active_B)
        return step.draw.token_B

    def together(tokens: int) -> Any:
        nonlocal state, last
        ids = rng.integers(0, 1000, (engine.together, tokens)).tolist()
        rows = pages[: engine.together].tolist()
        state, lasts = engine.prefill_whole(params, state, ids, rows)
        last = lasts[-1]
        return last.logits_1V

    calls: dict[str, Callable[[], Any]] = {
        f"prefill {n}": functools.partial(prefill, n) for n in engine.buckets
    }
    calls |= {
        f"prefill {engine.together} x {n}": functools.partial(together, n) for n in engine.buckets
    }
    calls |= {f"insert {engine.seats}": functools.partial(insert, engine.seats)}
    rows = []
    for call, run in calls.items():
        rows.append(row_of(name, call, run))
    for at in range(0, slots, engine.seats):
        insert(min(engine.seats, slots - at), at)
    rows.append(row_of(name, f"decode {slots} x {steps}", decode))
    return rows


def row_of(name: str, call: str, run: Callable[[], Any]) -> dict[str, Any]:
    """Of one call, said as it is there."""
    told, ended = timed(run)
    row = {"model": name, "call": call, "on_its_way_ms": round(told, 3), "ms": round(ended, 3)}
    print(row, flush=True)
    return row


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--filled", type=int, default=64)
    parser.add_argument("--trace", help="folder for a profile of the same calls")
    args = parser.parse_args()
    setup_logging()
    with jax.profiler.trace(args.trace) if args.trace else contextlib.nullcontext():
        rows = measure(args.model, slots=args.slots, steps=args.steps, filled=args.filled)
    if args.model != "tiny":
        merge_rows(device_name(), "engine_calls", rows, ("model", "call"))


if __name__ == "__main__":
    main()
