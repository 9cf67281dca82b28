"""SmolLM2-135M on sums and grade-school stories, on one H100: what a cold start gives, what GRPO
gives on top of it, and how fast; thinking against direct mode, async against sync, FP8 rollouts
against bfloat16, and the model upcycled to a mixture of experts.

    python -m experiments.bench.rl_smollm2 direct:0 thinking:0 async:0 fp8:0 --seconds 570
    python -m experiments.bench.rl_smollm2 --write --device nvidia-h100-80gb-hbm3-x1

An arm is `name:seed`; `arms()` lists them. All arms of a model begin with the weights of one cold
start; seeds differ in prompts and draws. An arm ends after its batches or its seconds (--each).
Scores are of the trainer's weights in bfloat16, on tasks that neither the cold start nor RL sees;
stories that are held out have other names and numbers, but are of the same 100 kinds. What a
workdir has is not done again, and what --seconds ends goes on in the next call. Needs neither grain
nor tensorboardX; --write needs no accelerator.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench.results import device_name, known, merge_rows
from experiments.bench.rl_ahead import Ahead, ask_all, batch_of, first_device, served, without_mesh
from experiments.bench.rl_smollm2_arms import (
    MODES,
    TINY,
    Arm,
    Sizes,
    arms,
    base,
    cold_folder,
    experiment,
)
from experiments.bench.rl_smollm2_page import WARM, described, measured, write_page
from experiments.bench.seconds import BEGAN, said, stopped_at
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.data.loader import Loader
from glm45_jax.data.sft import prepare_any, rows_of_any
from glm45_jax.envs.scores import Score
from glm45_jax.experiment import Experiment
from glm45_jax.hf import smollm2 as smol
from glm45_jax.metrics import read_jsonl, setup_logging
from glm45_jax.rl import run as rl_run
from glm45_jax.rl.config import Sync
from glm45_jax.rl.sampler import Sampler
from glm45_jax.rl.update import Updater
from glm45_jax.rollout.weights import Push
from glm45_jax.start import initial
from glm45_jax.train.ahead import batch_shapes
from glm45_jax.train.parallel import Recipe, Trainer, make_trainer
from glm45_jax.train.state import TrainState

LEAST_S, COLD_S = 60.0, 90.0  # with less left, no arm and no cold start begin
AFTER_S = 40.0  # kept for what follows the last batch: a checkpoint, a score
THREADS = 8  # that compile


def cold_trainer(exp: Experiment) -> Trainer:
    """Of a model's supervised steps."""
    assert exp.rl is not None and exp.rl.cold_start is not None
    cold = exp.rl.cold_start
    return make_trainer(exp.mesh, Recipe(exp.model, cold.optim, cold.train, packed=True))


def cold_start(
    model: str, sizes: Sizes, workdir: pathlib.Path, trainer: Trainer, ahead: Ahead
) -> dict[str, Any]:
    """The row of a model's supervised steps, with scores before and after by mode."""
    began = time.monotonic()
    folder, rows = cold_folder(model, workdir), sizes.cold_rows
    exps = {mode: base(model, mode, sizes, workdir) for mode in MODES}
    exp = exps["direct"]
    prepared = prepare_any(exp.data, workdir / "data")
    loader = Loader(
        rows_of_any(exp.data, prepared),
        seed=exp.seed,
        span=lambda step: (step * rows, rows),
        fingerprint=prepared.fingerprint,
    )
    state = initial(exp, trainer)
    ahead.wait(f"{model} bf16 ")
    said(f"cold start of {model}: ready after {time.monotonic() - began:.0f} s")
    scores: dict[str, Any] = {}
    if model == "dense":  # the mixture says the same at first
        few = max(sizes.tasks // 4, 1)
        for mode, one in exps.items():
            scores[f"{mode}/stock"] = score(one, folder, params_of(trainer, state), few)
    times, losses = [], []
    for _, batch in zip(range(sizes.cold_steps), loader.iterate(), strict=False):
        at = time.perf_counter()
        state, out = trainer.step(state, batch)
        losses.append(float(out.scalars["loss"]))
        times.append(time.perf_counter() - at)
    said(
        f"{sizes.cold_steps} steps in {sum(times):.0f} s, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )
    with Checkpoints(folder / "checkpoints") as checkpoints:
        weights = {"params": trainer.save_view(state).params}
        checkpoints.save(sizes.cold_steps, weights, sidecars={})
    for mode, one in exps.items():
        scores[f"{mode}/cold"] = score(one, folder, params_of(trainer, state), sizes.tasks)
    row = {
        "arm": f"cold_{model}",
        "seed": 0,
        "steps": sizes.cold_steps,
        "tokens_per_s": round(rows * sizes.row / float(np.median(times[WARM:] or times))),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "seconds": round(time.monotonic() - began, 1),
        "scores": scores,
    }
    (folder / "result.json").write_text(json.dumps(row))
    return row


def params_of(trainer: Trainer, state: TrainState) -> Any:
    """Weights for an engine of the first device."""
    return first_device(trainer.save_view(state).params)


def score(exp: Experiment, folder: pathlib.Path, params: Any, tasks: int) -> dict[str, Any]:
    """Held-out pass@1 of these weights in bfloat16, sampled and greedy, with half of its 95%
    interval; greedy by dataset; tokens of a greedy answer; shares in the right form and cut.
    """
    assert exp.rl is not None
    began = time.monotonic()
    rl = dataclasses.replace(exp.rl, cold_start=None, push=Push(), mode=Sync())
    plain = dataclasses.replace(exp, rl=rl)
    tokenizer = rl_run.tokenizer_of(plain, folder)
    workers = rl_run.workers_of(plain, tokenizer, params, 0)
    found: dict[str, Any] = {"tasks": tasks}
    with (
        tempfile.TemporaryDirectory() as scratch,
        rl_run.pool_of(plain, pathlib.Path(scratch)) as pool,
        contextlib.closing(workers),
    ):
        sampler = Sampler(pool, workers, rl_run.prompts_of(plain, pool), rl, seed=0)
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            sampling = dataclasses.replace(rl.sampling, temperature=temperature)
            given = sampler.ask(range(tasks), 1, sampling)
            one = Score.of(np.array([each.reward for each in given]))
            found[name] = [round(one.value, 4), round(one.half, 4)]
    found |= described(given)
    said(f"{exp.name}: {found}, {time.monotonic() - began:.0f} s")
    return found


_UPDATERS: dict[Any, Updater] = {}


def updater_of(exp: Experiment) -> Updater:
    """One for all arms that may share it: its programs compile once."""
    assert exp.rl is not None
    key = (exp.model, exp.optim, exp.rl.update, exp.mesh)
    if key not in _UPDATERS:
        _UPDATERS[key] = without_mesh(rl_run.updater_of(exp))
    return _UPDATERS[key]


def arm_folder(arm: Arm, seed: int, workdir: pathlib.Path) -> pathlib.Path:
    """Of a run."""
    return workdir / f"{arm.name}_{seed}"


def row_of(folder: pathlib.Path) -> dict[str, Any] | None:
    """What a run left there that has come to its end."""
    file = folder / "result.json"
    return json.loads(file.read_text()) if file.exists() else None


def spent_s(folder: pathlib.Path) -> float:
    """Seconds of the batches that a run has made there."""
    file = folder / "metrics.jsonl"
    rows = read_jsonl(file) if file.exists() else []
    return sum(row.scalars.get("seconds", 0.0) for row in rows)


def run_arm(
    arm: Arm, seed: int, sizes: Sizes, workdir: pathlib.Path, ends: float
) -> dict[str, Any] | None:
    """The row of an arm; None where the time ended it before its own seconds did.

    ends: when, on the monotonic clock.
    """
    folder = arm_folder(arm, seed, workdir)
    exp = experiment(arm, seed, sizes, workdir)
    updater, tokenizer = updater_of(exp), rl_run.tokenizer_of(exp, folder)
    began = time.monotonic()
    own, last = began + sizes.each_s - spent_s(folder), ends - AFTER_S
    with stopped_at(min(own, last)):
        state, outcome = rl_run.run(
            exp,
            folder,
            tokenizer=tokenizer,
            updater=updater,
            initial=lambda trainer: initial(exp, trainer),
        )
    said(f"{arm.name}:{seed}: {outcome.why} after batch {outcome.step}, {outcome.seconds:.0f} s")
    stopped = outcome.why == "stopped"
    if state is None or (stopped and last < own):
        return None
    params = updater.params(state)
    why = f"after {sizes.each_s:.0f} s" if stopped else outcome.why
    row = {
        "arm": arm.name,
        "seed": seed,
        "why": why + (f": {outcome.said}" if outcome.said else ""),
        "batches": outcome.step,
        "seconds": round(time.monotonic() - began, 1),
        "after": score(base(arm.model, arm.mode, sizes, workdir), folder, params, sizes.tasks),
        **measured(read_jsonl(folder / "metrics.jsonl")),
    }
    (folder / "result.json").write_text(json.dumps(row))
    shutil.rmtree(folder / "checkpoints")
    return row


def ask_ahead(
    ahead: Ahead, arm: Arm, sizes: Sizes, workdir: pathlib.Path, cold: Trainer | None
) -> None:
    """None; what an arm will call is being compiled: the engine for scores and, where it is
    another, its own; the cold start's step, if any; its update.
    """
    exp, model = experiment(arm, 0, sizes, workdir), arm.model
    assert exp.rl is not None
    device = jax.local_devices()[0]
    plain = dataclasses.replace(exp.rl, push=Push())
    ask_all(ahead, f"{model} bf16 ", served(exp.model, plain, device))
    if cold is not None:
        shapes = batch_shapes(sizes.cold_rows, sizes.row)
        ahead.ask(f"{model} cold start", lambda: cold.compile_step(shapes))
    batch = batch_of(exp.train.rows, sizes.row, exp.model, exp.rl)
    step, lr = updater_of(exp).trainer.compile_step, exp.optim.lr
    ahead.ask(f"{model} update of {exp.train.rows} rows at {lr:g}", lambda: step(batch))
    if exp.rl.push.fp8:
        ask_all(ahead, f"{model} fp8 ", served(exp.model, exp.rl, device))


@contextlib.contextmanager
def compiling_ahead(
    asked: Sequence[tuple[Arm, int]], sizes: Sizes, workdir: pathlib.Path
) -> Iterator[tuple[Ahead, dict[str, Trainer]]]:
    """Inside, what arms that are not done need is being compiled; and trainers of the cold starts
    that are not.
    """
    left = [arm for arm, seed in asked if row_of(arm_folder(arm, seed, workdir)) is None]
    colds = {
        model: cold_trainer(base(model, "direct", sizes, workdir))
        for model in dict.fromkeys(arm.model for arm, _ in asked)
        if row_of(cold_folder(model, workdir)) is None
    }
    ahead = Ahead(THREADS)
    try:
        for arm in left:
            ask_ahead(ahead, arm, sizes, workdir, colds.get(arm.model))
        yield ahead, colds
    finally:
        ahead.close()


def measure(asked: Sequence[str], sizes: Sizes, workdir: pathlib.Path, seconds: float) -> None:
    """Runs what was asked, each row into the result file as soon as it is there."""
    ends = BEGAN + seconds
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "tokenizer.json").exists():
        smol.tokenizer().save(workdir)
    wanted = [(arms()[name], seed) for name, seed in map(parsed, asked)]
    with compiling_ahead(wanted, sizes, workdir) as (ahead, colds):
        for arm, seed in wanted:
            cold, row = (
                row_of(f) for f in (cold_folder(arm.model, workdir), arm_folder(arm, seed, workdir))
            )
            left = ends - time.monotonic()
            if row is None and left < (LEAST_S if cold else COLD_S + LEAST_S):
                said(f"{arm.name}:{seed} does not begin: {left:.0f} s are left")
                continue
            if cold is None:
                cold = cold_start(arm.model, sizes, workdir, colds[arm.model], ahead)
            keep(cold, sizes)
            if row is None:
                ahead.wait(f"{arm.model} ")
                row = run_arm(arm, seed, sizes, workdir, ends)
            if row is not None:
                keep(row | {"before": cold["scores"][f"{arm.mode}/cold"]}, sizes)
                said(json.dumps({k: row[k] for k in ("arm", "seed", "why", "after", "rates")}))


def keep(row: Mapping[str, Any], sizes: Sizes) -> None:
    """None; the row is in the result file of this device, but of tiny ones nothing is kept."""
    if sizes != TINY:
        sized = {"sizes": dataclasses.asdict(sizes) | {"world": sizes.world.__name__}}
        merge_rows(device_name(), "rl_smollm2", [dict(row) | sized], ("arm", "seed"))


def parsed(asked: str) -> tuple[str, int]:
    """Name and seed of an arm. Raises: SystemExit for what is none."""
    name, _, seed = asked.partition(":")
    if name not in arms() or not (seed or "0").isdigit():
        raise SystemExit(f"{asked}: give name:seed, with a name of {', '.join(arms())}")
    return name, int(seed or 0)


def main() -> None:
    """Measures, or draws what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arms", nargs="*", help="name:seed, in this order")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/rl_smollm2"))
    parser.add_argument("--seconds", type=float, default=570.0, help="after which nothing begins")
    parser.add_argument("--tiny", action="store_true", help="to see whether it runs; keeps nothing")
    parser.add_argument("--write", action="store_true", help="page and figure of what was measured")
    parser.add_argument("--device", help="whose results --write draws; default this one")
    for name, kind in (("lr", float), ("tasks", int), ("cold-steps", int), ("groups", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--each", type=float, dest="each_s", help="seconds of an arm")
    parser.add_argument("--batches", type=int, nargs=2, metavar=("DIRECT", "THINKING"))
    args = parser.parse_args()
    setup_logging()
    names = ("lr", "tasks", "cold_steps", "groups", "batches", "each_s")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if "batches" in given:
        given["batches"] = tuple(given["batches"])
    for one in args.arms:
        parsed(one)
    sizes = dataclasses.replace(TINY if args.tiny else Sizes(), **given)
    if args.arms:
        measure(args.arms, sizes, args.workdir, args.seconds)
    if args.write:
        device = args.device or device_name()
        rows = known(device, "rl_smollm2")["rows"]
        told = {name: arm.told for name, arm in arms().items()}
        print(write_page(rows, told, device))


if __name__ == "__main__":
    from experiments.bench import rl_smollm2  # not as __main__: values name their module

    rl_smollm2.main()
