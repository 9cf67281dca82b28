"""Does RL learn, and only where it should? Two-digit sums, one cold start a seed, with controls.

Arms: GRPO as it is; a learning rate of 0; rewards dealt out at random; an engine 8 versions behind,
without correction and with truncated importance weights; an engine whose log-probs are wrong. All
arms of a seed begin with the same weights and see the same prompts in the same order; pass@1 is of
the trainer's weights on held-out sums, before and after.

    python -m experiments.bench.rl_learning --workdir W --cpus 14 --parallel 14 --gather W/all.json
    python -m experiments.bench.rl_learning --write W/all.json

A job, one arm of one seed, takes five minutes of a core; without --parallel they run here, one
after the other. What a workdir has is not done again, and a job that was cut off goes on from its
checkpoint. The second line makes figure, table and result; it needs no workdir.
"""

import argparse
import collections
import dataclasses
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import rl_reasoning
from experiments.bench.results import cpu_name, merge_result
from experiments.bench.side_by_side import Task, run_tasks
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.data.loader import Loader
from glm45_jax.data.sft import prepare_any, rows_of_any
from glm45_jax.envs.scores import Score
from glm45_jax.experiment import Experiment, FromRun
from glm45_jax.metrics import Row, read_jsonl
from glm45_jax.rl import run as rl_run
from glm45_jax.rl.config import Async
from glm45_jax.rl.correction import Tis
from glm45_jax.rl.sampler import HELD_OUT, Sampler
from glm45_jax.rl.update import Update
from glm45_jax.rl.workers import Done, Workers
from glm45_jax.start import initial
from glm45_jax.train.document import table as markdown_table
from glm45_jax.train.parallel import Recipe, make_trainer
from glm45_jax.train.trackers import Untracked

LAG = 8
TASKS, SAMPLES = 1024, 4  # of the scores before and after
STEPS = 60
CURVES = ("reward", "surprise", "staleness", "mismatch/kl", "mismatch/gap", "seconds")
FIGURE = pathlib.Path("docs/images/rl_learning.png")
TABLE = pathlib.Path("docs/rl_learning.md")


class Between:
    """Workers with one thing changed. change: of what the loop hears of a sample. lag: updates
    after which the engine gets weights.
    """

    def __init__(
        self, workers: Workers, change: Callable[[Done], Done] | None = None, lag: int = 0
    ) -> None:
        self.workers, self._change, self._lag = workers, change, lag
        self.start, self.abort = workers.start, workers.abort
        self.counts, self.close = workers.counts, workers.close
        self._waiting: collections.deque[tuple[Any, int]] = collections.deque()

    @property
    def running(self) -> int:
        """As `Workers`."""
        return self.workers.running

    def poll(self) -> list[Done]:
        """As `Workers`."""
        done = self.workers.poll()
        if self._change is None:
            return done
        # Held-out samples are scored as they are.
        return [
            (job, one) if job.prompt.env == HELD_OUT else self._change((job, one))
            for job, one in done
        ]

    def push(self, params: Any, version: int) -> None:
        """As `Workers`; the trainer gives its buffers up, so those that wait are copies."""
        self._waiting.append((jax.tree.map(jnp.copy, params), version))
        if len(self._waiting) > self._lag:
            self.workers.push(*self._waiting.popleft())


def dealt(workers: Workers) -> Workers:
    """Every sample gets the reward of another one, drawn from the last 512."""
    draw = np.random.default_rng(0)
    known: collections.deque[float] = collections.deque(maxlen=512)

    def change(done: Done) -> Done:
        job, one = done
        known.append(one.reward)
        return job, dataclasses.replace(one, reward=known[int(draw.integers(len(known)))])

    return Between(workers, change)


def wrong(workers: Workers) -> Workers:
    """Log-probs with an error whose standard deviation is 0.3 nats."""
    draw = np.random.default_rng(0)

    def change(done: Done) -> Done:
        job, one = done
        noise_T = draw.normal(0, 0.3, one.logp_T.shape).astype(np.float32)
        return job, dataclasses.replace(one, logp_T=one.logp_T + noise_T)

    return Between(workers, change)


def late(workers: Workers) -> Workers:
    """An engine whose weights are `LAG` updates old."""
    return Between(workers, lag=LAG)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train. through: what stands between loop and engine; told: for the table."""

    name: str
    told: str
    change: Callable[[Experiment], Experiment] = lambda exp: exp
    through: Callable[[Workers], Workers] = lambda workers: workers


def _still(exp: Experiment) -> Experiment:
    return dataclasses.replace(exp, optim=dataclasses.replace(exp.optim, lr=0.0))


def _stale(*corrections: Any) -> Callable[[Experiment], Experiment]:
    def change(exp: Experiment) -> Experiment:
        assert exp.rl is not None
        rl = dataclasses.replace(
            exp.rl,
            # One more: a group that ends during a step is trained in the next.
            mode=Async(staleness=LAG + 1, thread=False),
            update=Update(corrections=corrections),
        )
        return dataclasses.replace(exp, rl=rl)

    return change


ARMS = (
    Arm("main", "GRPO"),
    Arm("lr0", "learning rate 0", _still),
    Arm("dealt", "rewards dealt out at random", through=dealt),
    Arm("stale", f"engine {LAG} versions behind", _stale(), late),
    Arm("stale_tis", f"engine {LAG} versions behind, TIS", _stale(Tis()), late),
    Arm("wrong", "log-probs off by 0.3 nats", through=wrong),
)


def experiment(seed: int, cold: pathlib.Path, arm: Arm, steps: int = STEPS) -> Experiment:
    """The tiny experiment of one arm, from the cold start that is there."""
    exp = rl_reasoning.tiny()
    assert exp.rl is not None
    evaluation = dataclasses.replace(exp.rl.evaluation, greedy=False)
    rl = dataclasses.replace(exp.rl, cold_start=None, evaluation=evaluation)
    train = dataclasses.replace(exp.train, steps=steps)
    exp = dataclasses.replace(
        exp,
        name=f"rl_learning_{arm.name}",
        rl=rl,
        train=train,
        seed=seed,
        init=FromRun(str(cold)),
        tracker=Untracked(),
    )
    return arm.change(exp)


def score(exp: Experiment, folder: pathlib.Path, params: Any) -> dict[str, list[float]]:
    """Held-out pass@1 of these weights, sampled and greedy, each with half of its 95% interval.

    folder: of the arm, whose ledger is opened and left as it is.
    """
    rl = rl_reasoning.tiny().rl
    assert rl is not None
    tokenizer = rl_run.tokenizer_of(exp, folder.parent / "cold_start")
    plain = dataclasses.replace(exp, rl=dataclasses.replace(rl, cold_start=None))
    workers = rl_run.workers_of(plain, tokenizer, params, 0)
    found = {}
    with rl_run.pool_of(plain, folder) as pool:
        sampler = Sampler(pool, workers, rl_run.prompts_of(plain, pool), rl, seed=0)
        for name, samples, temperature in (("sampled", SAMPLES, 1.0), ("greedy", 1, 0.0)):
            sampling = dataclasses.replace(rl.sampling, temperature=temperature)
            one = Score.of(sampler.held_out(range(TASKS), samples, sampling).mean(axis=1))
            found[name] = [one.value, one.half]
    return found


def begin(seed: int, workdir: pathlib.Path) -> dict[str, Any]:
    """Scores of the cold start that all arms of a seed begin with; it is run where it is not there:
    the supervised steps of `rl_reasoning.tiny`, without their report.
    """
    cold = workdir / f"seed{seed}" / "cold_start"
    if (cold / "result.json").exists():
        return json.loads((cold / "result.json").read_text())
    exp = dataclasses.replace(rl_reasoning.tiny(), seed=seed)
    assert exp.rl is not None and exp.rl.cold_start is not None
    optim, train = exp.rl.cold_start.optim, exp.rl.cold_start.train
    prepared = prepare_any(exp.data, cold / "data")
    trainer = make_trainer(exp.mesh, Recipe(exp.model, optim, train, packed=True))
    loader = Loader(
        rows_of_any(exp.data, prepared),
        seed=seed,
        span=lambda step: (step * train.rows, train.rows),
        fingerprint=prepared.fingerprint,
    )
    began = time.monotonic()
    state = initial(exp, trainer)
    for _, batch in zip(range(train.steps), loader.iterate(), strict=False):
        state, out = trainer.step(state, batch)
    params = trainer.save_view(state).params
    result = {
        "loss": float(jax.device_get(out.scalars["loss"])),
        "steps": train.steps,
        "seconds": time.monotonic() - began,
        **score(experiment(seed, cold, ARMS[0]), cold / "scored", params),
    }
    with Checkpoints(cold / "checkpoints") as checkpoints:
        checkpoints.save(train.steps, {"params": params}, sidecars={})
    (cold / "result.json").write_text(json.dumps(result))
    return result


def run_arm(
    seed: int, arm: Arm, workdir: pathlib.Path, steps: int = STEPS
) -> dict[str, Any] | None:
    """What became of one arm: scores, curves, seconds; read back where it was run before. None
    where a signal stopped it: called again, it goes on.
    """
    folder = workdir / f"seed{seed}"
    done = folder / arm.name / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    before = begin(seed, workdir)
    exp = experiment(seed, folder / "cold_start", arm, steps)
    updater = rl_run.updater_of(exp)
    state, outcome = rl_run.run(
        exp,
        folder / arm.name,
        tokenizer=rl_run.tokenizer_of(exp, folder / "cold_start"),
        updater=updater,
        initial=lambda trainer: initial(exp, trainer),
        through=arm.through,
    )
    if outcome.why == "stopped":
        return None
    assert state is not None
    rows = read_jsonl(folder / arm.name / "metrics.jsonl")
    same = outcome.step == 0
    result = {
        "why": outcome.why,
        "said": outcome.said,
        "steps": outcome.step,
        "seconds": sum(row.scalars["seconds"] for row in rows),
        "before": before,
        "after": before if same else score(exp, folder / arm.name, updater.params(state)),
        "eval": _curve(rows, "eval/sampled"),
        "curves": {name: _curve(rows, name) for name in CURVES},
        "phases": phases(rows),
    }
    done.write_text(json.dumps(result))
    return result


def _curve(rows: Sequence[Row], name: str) -> list[list[float]]:
    return [[row.step, round(row.scalars[name], 6)] for row in rows if name in row.scalars]


def phases(rows: Sequence[Row]) -> dict[str, float]:
    """Median seconds of a step by phase, from step 11 on, and tokens a second."""
    late = [row.scalars for row in rows if row.step > 10]
    names = [n for n in (late[-1] if late else {}) if n.startswith("seconds")]
    names += ["rollout/tokens_per_s", "tokens_per_s"] if late else []
    return {n: float(np.median([s[n] for s in late if n in s])) for n in names}


def gain(result: Mapping[str, Any], name: str) -> float:
    """Points of pass@1."""
    return result["after"][name][0] - result["before"][name][0]


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: an arm a row; pass@1 as mean over seeds, and the lowest and highest seed."""
    head = ("arm", "sampled, before", "after", "gain", "greedy, before", "after", "ended")
    rows = []
    for arm in ARMS:
        seeds = results.get(arm.name)
        if not seeds:
            continue
        cells = [arm.told]
        for name in ("sampled", "greedy"):
            for when in ("before", "after"):
                cells.append(_spread([one[when][name][0] for one in seeds.values()]))
            if name == "sampled":
                cells.append(_spread([gain(one, name) for one in seeds.values()]))
        ends = collections.Counter(f"{one['why']} at {one['steps']}" for one in seeds.values())
        cells.append(", ".join(ends))
        rows.append(cells)
    return markdown_table(head, rows)


def _spread(values: Sequence[float]) -> str:
    mean, low, high = 100 * np.mean(values), 100 * min(values), 100 * max(values)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def verdicts(results: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """What was to be shown, and whether every seed shows it."""

    def every(arm: str, says: Callable[[str, Any], bool]) -> bool:
        return bool(results.get(arm)) and all(says(s, one) for s, one in results[arm].items())

    def after(arm: str, seed: str) -> float:
        return results[arm][seed]["after"]["sampled"][0]

    found = {
        "main gains 30 points": every("main", lambda s, one: gain(one, "sampled") >= 0.3),
        "lr 0 gains less than 5": every("lr0", lambda s, one: abs(gain(one, "sampled")) < 0.05),
        "dealt rewards gain less than 5": every(
            "dealt", lambda s, one: gain(one, "sampled") < 0.05
        ),
        "wrong log-probs trip the gate": every("wrong", lambda s, one: one["why"] == "gate"),
    }
    if {"main", "stale", "stale_tis"} <= results.keys():
        found["stale is worse than main"] = every(
            "stale", lambda s, _: after("stale", s) < after("main", s)
        )
        found["correction recovers"] = every(
            "stale_tis", lambda s, _: after("stale_tis", s) > after("stale", s)
        )
    return found


def draw(results: Mapping[str, Mapping[str, Any]]) -> None:
    """The figure: held-out pass@1 by step, a thin line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, arm in enumerate(ARMS):
        curves = [np.array(one["eval"]) for one in results.get(arm.name, {}).values()]
        curves = [curve for curve in curves if len(curve) > 1]
        if not curves:
            continue
        color = f"C{number}"
        for curve in curves:
            axes.plot(curve[:, 0], curve[:, 1], color=color, alpha=0.3, linewidth=0.8)
        axes.plot(
            curves[0][:, 0],
            np.mean([curve[:, 1] for curve in curves], axis=0),
            color=color,
            label=arm.told,
            linewidth=2,
        )
    axes.set_xlabel("batch of 64 prompts x 8 samples")
    axes.set_ylabel("pass@1 on held-out sums, T = 1")
    axes.set_ylim(0, 1)
    axes.set_title("Two-digit sums: GRPO and its controls (scored by the engine's weights)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=150, metadata={"Software": None})


def gather(workdir: pathlib.Path, jobs: str) -> dict[str, Any]:
    """All results that a workdir has, and where they were made. jobs: how they ran, in words."""
    arms: dict[str, dict[str, Any]] = {}
    for file in sorted(workdir.glob("seed*/*/result.json")):
        seed, name = file.parent.parent.name.removeprefix("seed"), file.parent.name
        arms.setdefault(name, {})[seed] = json.loads(file.read_text())
    cold = arms.pop("cold_start", {})
    return {"device": cpu_name(), "jobs": jobs, "cold_start": cold, "arms": arms}


def write(gathered: Mapping[str, Any]) -> None:
    """None; figure, table and result."""
    results = gathered["arms"]
    said = verdicts(results)
    draw(results)
    lines = [f"- {'yes' if ok else 'NO'}: {what}" for what, ok in said.items()]
    seeds = sorted({seed for one in results.values() for seed in one})
    TABLE.write_text(
        f"# RL with controls\n\n{table(results)}\n\n"
        "Percent of held-out two-digit sums: mean over seeds (lowest to highest). Verdicts hold in "
        "every seed or not at all:\n\n"
        + "\n".join(lines)
        + f"\n\nSeeds {', '.join(seeds)}; {gathered['jobs']} on {gathered['device']}.\n"
    )
    print(merge_result(gathered["device"], "rl_learning", {**gathered, "verdicts": said}))


def _tasks(
    seeds: Sequence[int], arms: Sequence[Arm], workdir: pathlib.Path, steps: int
) -> list[Task]:
    """Cold starts, then arm by arm, the most important first: of each all seeds."""

    def task(name: str, seed: int, after: str = "") -> Task:
        module = ("-m", "experiments.bench.rl_learning", "--steps", str(steps))
        return Task(
            f"seed{seed}/{name}",
            (*module, "--workdir", str(workdir), "--seeds", str(seed), "--arms", name),
            workdir / f"seed{seed}" / name / "result.json",
            after and f"seed{seed}/{after}",
        )

    cold = [task("cold_start", seed) for seed in seeds]
    return cold + [task(arm.name, seed, "cold_start") for arm in arms for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/rl_learning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS])
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of an arm")
    parser.add_argument("--parallel", type=int, default=0, help="jobs at once; 0: here, in turn")
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="that jobs share")
    parser.add_argument("--seconds", type=float, help="then jobs save and leave; again goes on")
    parser.add_argument("--gather", type=pathlib.Path, help="file for all results of the workdir")
    parser.add_argument("--write", type=pathlib.Path, help="file that --gather made: to the docs")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if args.write:
        write(json.loads(args.write.read_text()))
        return
    arms = [arm for arm in ARMS if arm.name in args.arms]
    if args.parallel:
        how = f"{args.parallel} jobs at once on {args.cpus} cores"
        tasks = _tasks(args.seeds, arms, args.workdir, args.steps)
        run_tasks(tasks, args.workdir / "logs", args.parallel, args.cpus, args.seconds)
    else:
        how = "one job after the other"
        for seed in args.seeds:
            print(seed, begin(seed, args.workdir), flush=True)
        for arm in arms:
            for seed in args.seeds:
                if (found := run_arm(seed, arm, args.workdir, args.steps)) is None:
                    raise SystemExit(f"seed {seed}, {arm.name}: stopped; the same command goes on")
                print(seed, arm.name, found["why"], found["before"], found["after"], flush=True)
    gathered = gather(args.workdir, how)
    print(table(gathered["arms"]))
    print(json.dumps(verdicts(gathered["arms"]), indent=1))
    if args.gather:
        args.gather.write_text(json.dumps(gathered))


if __name__ == "__main__":
    main()
