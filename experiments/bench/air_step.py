"""A train step of a slice of GLM-4.5-Air at its true width on one accelerator: MFU, and where the
time goes, phase by phase, from a trace.

The dense layer, one MoE layer with its 128 experts, the MTP layer with 128 more, both tables of
151,552 rows: 6.2B parameters in bfloat16 by stochastic rounding, Muon. Tokens are random, routing
is that of random weights with the bias rule on. One device does the Newton-Schulz iterations that
a cluster shares, so the update is told apart: MFU with it, and of forward and backward alone.

    python -m glm45_jax.plan experiments.bench.air_step:air_slice --target h100:1x1   # does it fit
    python -m experiments.bench.air_step
    python -m experiments.bench.air_step --mini        # the step of `mini`, 64K tokens, instead
"""

import argparse
import collections
import dataclasses
import gzip
import json
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from experiments import pretrain
from experiments.bench.results import device_name, merge_result
from experiments.bench.train_step import Case, matmul_ceiling, random_batch
from glm45_jax.data.prepare import Data
from glm45_jax.data.sources import PydocTopics
from glm45_jax.experiment import Experiment
from glm45_jax.model import config, cost
from glm45_jax.optim.muon import Muon, newton_schulz_flops
from glm45_jax.optim.schedules import Constant
from glm45_jax.sharding import MeshShape
from glm45_jax.train.parallel import Recipe, make_trainer
from glm45_jax.train.state import Train

PHASES = ("attention", "experts", "mlp", "head", "embed", "optimizer")  # named in the model
BACKWARD, AGAIN = "transpose(", "rematted_computation"  # how jax names what it makes of them


def air_slice(rows: int = 16, moe_layers: int = 1) -> Experiment:
    """One dense layer, `moe_layers` with experts and MTP, rows of 4,096 tokens."""
    model = dataclasses.replace(config.glm45_air(), n_dense=1, n_moe=moe_layers, remat="full")
    return Experiment(
        name="air_slice",
        model=model,
        data=Data(sources=((PydocTopics(), 1.0),), seq_len=4096, vocab=151_365),
        optim=Muon(momentum_dtype="bfloat16", master_dtype="bfloat16"),
        train=Train(steps=100, rows=rows, bias_rate=Constant(1e-3)),
        mesh=MeshShape(data=1, fsdp=1),
    )


def mini_step() -> Experiment:
    """`pretrain:mini` on one device."""
    return dataclasses.replace(pretrain.mini(), mesh=MeshShape(data=1, fsdp=1))


def tiny_slice() -> Experiment:
    """The same in small, for a CPU."""
    exp = air_slice(rows=2)
    return dataclasses.replace(
        exp,
        model=config.tiny(vocab=512),
        data=dataclasses.replace(exp.data, seq_len=64, vocab=512),
        optim=Muon(dtype="float32"),
    )


def phase_of(op_name: str) -> str:
    """The innermost phase that the name of an instruction says, and which of three passes it is:
    "experts backward" of jit(step)/transpose(jvp(...))/.../experts/dot. Everything else is "rest".
    """
    named = [part for part in re.split(r"[/()]", op_name) if part in PHASES]
    if not named:
        return "rest"
    if named[-1] in ("optimizer", "embed"):
        return named[-1]
    again, back = AGAIN in op_name, BACKWARD in op_name
    return f"{named[-1]} {'again' if again else 'backward' if back else 'forward'}"


def op_names(hlo: str) -> dict[str, str]:
    """Where each instruction of a compiled program comes from, by its name."""
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', hlo, re.MULTILINE)
    return dict(found)


def kernels(folder: pathlib.Path) -> Iterable[tuple[str, float]]:
    """(instruction, milliseconds) of every kernel in the trace of one device."""
    file = max(folder.rglob("*.trace.json.gz"), key=lambda f: f.stat().st_mtime)
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
        name = event.get("args", {}).get("hlo_op")
        if name and "dur" in event:
            yield name, event["dur"] / 1e3


def longest(
    times: Iterable[tuple[str, float]], names: Mapping[str, str], most: int = 25
) -> list[str]:
    """Where the time goes, by instruction: milliseconds, calls, name and where it comes from."""
    total: dict[str, list[float]] = collections.defaultdict(list)
    for name, ms in times:
        total[name].append(ms)
    order = sorted(total, key=lambda name: -sum(total[name]))[:most]
    return [
        f"{sum(total[n]):8.2f} ms {len(total[n]):4d} x {n:32} {names.get(n, '')[-100:]}"
        for n in order
    ]


def breakdown(times: Iterable[tuple[str, float]], names: Mapping[str, str]) -> dict[str, float]:
    """Milliseconds by phase, largest first."""
    total: dict[str, float] = collections.defaultdict(float)
    for name, ms in times:
        total[phase_of(names.get(name, ""))] += ms
    return {phase: round(total[phase], 2) for phase in sorted(total, key=total.__getitem__)[::-1]}


def run(exp: Experiment, steps: int) -> dict[str, Any]:
    """Median seconds of a step after two that warm up, MFU, and the phases of one traced step."""
    recipe = Recipe(exp.model, exp.optim, exp.train, packed=False)
    trainer = make_trainer(exp.mesh, recipe, devices=jax.devices()[:1])
    seq_len, rows, cfg = exp.data.seq_len, exp.train.rows, exp.model
    batch = random_batch(Case(rows, seq_len, steps, cfg.dtype), cfg.vocab)
    began = time.perf_counter()
    step = trainer.lower(batch).compile()  # once; the trainer's own would be traced again
    names = op_names(step.as_text() or "")
    batch = jax.device_put(batch, step.input_shardings[0][1])
    compile_s = time.perf_counter() - began
    state, times = trainer.init(jax.random.key(0)), []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, out = step(state, batch)
        loss = float(out.scalars["loss"])
        times.append(time.perf_counter() - start)
        print(f"step {len(times)}: {times[-1] * 1e3:.1f} ms, loss {loss:.3f}", flush=True)
    seconds = statistics.median(times[2:])
    phases = traced(step, state, batch, names)
    peak, source = cost.peak_flops(jax.devices()[0])
    rate = rows * seq_len / seconds
    mfu = cost.mfu(rate, cfg, seq_len, 1, peak)
    update = phases.get("optimizer", 0.0) / max(sum(phases.values()), 1e-9)
    held = jax.devices()[0].memory_stats() or {}
    return {
        "rows": rows,
        "seq_len": seq_len,
        "layers": f"{cfg.n_dense} dense, {cfg.n_moe} MoE, {cfg.n_mtp} MTP",
        "step_ms": round(seconds * 1e3, 1),
        "spread_ms": round((max(times[2:]) - min(times[2:])) * 1e3, 1),
        "tokens_per_s": round(rate),
        "step_tflops": round(cost.flops_per_token(cfg, seq_len).total * rows * seq_len / 1e12, 3),
        "newton_schulz_tflops": round(newton_schulz_flops(recipe.specs) / 1e12, 3),
        "mfu": round(mfu, 4),
        "mfu_without_update": round(mfu / (1 - update), 4),
        "peak": source,
        "phases_ms": phases,
        "compile_s": round(compile_s, 1),
        "peak_gib": round(held.get("peak_bytes_in_use", 0) / 2**30, 1),
        "loss": round(loss, 3),
        "load_max_over_mean": round(float(out.scalars["load_max_over_mean"]), 2),
    }


def traced(step: Any, state: Any, batch: Any, names: Mapping[str, str]) -> dict[str, float]:
    """`breakdown` of one step; empty where the trace has no kernels (a CPU)."""
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        _, out = step(state, batch)
        float(out.scalars["loss"])
        jax.profiler.stop_trace()
        times = list(kernels(pathlib.Path(folder)))
    print("\n".join(longest(times, names)))
    return breakdown(times, names)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="of Air's slice")
    parser.add_argument("--mini", action="store_true", help="the step of `mini` instead")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small, for a CPU; nothing is written")
    args = parser.parse_args()
    # Kernels of a CUDA graph have no names in a trace; at a second a step graphs save nothing.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    exp = tiny_slice() if args.tiny else mini_step() if args.mini else air_slice(args.rows)
    value = {
        "command": "python -m experiments.bench.air_step "
        + ("--mini" if args.mini else f"--rows {args.rows}"),
        "jax": jax.__version__,
        "matmul_tflops": round(matmul_ceiling(exp.model.dtype), 1),
    }
    value |= run(exp, args.steps)
    print(json.dumps(value, indent=1))
    if not args.tiny:
        key = "mini_step" if args.mini else "air_step"
        print(f"wrote {merge_result(device_name(), key, value)}")


if __name__ == "__main__":
    main()
