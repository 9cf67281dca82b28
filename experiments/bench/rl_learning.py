"""Does RL learn, and only where it should? Two-digit sums, one cold start a seed, with controls.

Arms: GRPO as it is; a learning rate of 0; rewards dealt out at random; an engine 8 versions behind,
without correction and with truncated importance weights; an engine whose log-probs are wrong. All
arms of a seed begin with the same weights and see the same prompts in the same order; pass@1 is of
the trainer's weights on held-out sums, before and after.

    python -m experiments.bench.rl_learning --workdir runs/rl_learning

takes about half an hour on two cores; what a workdir has is not done again.
"""

import argparse
import collections
import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import rl_reasoning
from experiments.bench.results import cpu_name, merge_result
from glm45_jax.envs.scores import Score
from glm45_jax.experiment import Experiment, FromRun, run_training
from glm45_jax.metrics import read_jsonl
from glm45_jax.rl import run as rl_run
from glm45_jax.rl.config import Async
from glm45_jax.rl.correction import Tis
from glm45_jax.rl.sampler import HELD_OUT, Sampler
from glm45_jax.rl.update import Update
from glm45_jax.rl.workers import Done, Workers
from glm45_jax.start import initial
from glm45_jax.train.document import table as markdown_table

LAG = 8
TASKS, SAMPLES = 1024, 4  # of the scores before and after
STEPS = 60
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


def experiment(seed: int, cold: pathlib.Path, arm: Arm) -> Experiment:
    """The tiny experiment of one arm, from the cold start that is there."""
    exp = rl_reasoning.tiny()
    assert exp.rl is not None
    rl = dataclasses.replace(exp.rl, cold_start=None)
    train = dataclasses.replace(exp.train, steps=STEPS)
    exp = dataclasses.replace(
        exp, name=f"rl_learning_{arm.name}", rl=rl, train=train, seed=seed, init=FromRun(str(cold))
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


def run_arm(seed: int, arm: Arm, workdir: pathlib.Path) -> dict[str, Any]:
    """What became of one arm: scores, curve, seconds; read back where it was run before."""
    folder = workdir / f"seed{seed}"
    done = folder / arm.name / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    exp = experiment(seed, folder / "cold_start", arm)
    updater = rl_run.updater_of(exp)
    tokenizer = rl_run.tokenizer_of(exp, folder / "cold_start")
    began = time.monotonic()
    state, outcome = rl_run.run(
        exp,
        folder / arm.name,
        tokenizer=tokenizer,
        updater=updater,
        initial=lambda trainer: initial(exp, trainer),
        through=arm.through,
    )
    seconds = time.monotonic() - began
    assert state is not None
    first = updater.params(initial(exp, updater.trainer))
    rows = read_jsonl(folder / arm.name / "metrics.jsonl")
    result = {
        "why": outcome.why,
        "steps": outcome.step,
        "seconds": seconds,
        "before": score(exp, folder / arm.name, first),
        "after": score(exp, folder / arm.name, updater.params(state)),
        "reward": [[row.step, row.scalars["reward"]] for row in rows if "reward" in row.scalars],
        "eval": [[r.step, r.scalars["eval/sampled"]] for r in rows if "eval/sampled" in r.scalars],
        "staleness": [r.scalars["staleness"] for r in rows if "staleness" in r.scalars],
        "mismatch": max((r.scalars.get("mismatch/max", 0.0) for r in rows), default=0.0),
        "phases": phases(rows),
    }
    done.write_text(json.dumps(result))
    return result


def phases(rows: Sequence[Any]) -> dict[str, float]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/rl_learning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS])
    parser.add_argument("--write", action="store_true", help="figure, table and result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    results: dict[str, dict[str, Any]] = {}
    for seed in args.seeds:
        first = dataclasses.replace(rl_reasoning.tiny(), seed=seed)
        rl_run.cold_start(first, args.workdir / f"seed{seed}", run_training)
        for arm in ARMS:
            if arm.name in args.arms:
                found = run_arm(seed, arm, args.workdir)
                results.setdefault(arm.name, {})[str(seed)] = found
                print(seed, arm.name, found["why"], found["before"], found["after"], flush=True)
    said = verdicts(results)
    print(table(results))
    print(json.dumps(said, indent=1))
    if args.write:
        draw(results)
        text = "\n".join(f"- {'yes' if ok else 'NO'}: {what}" for what, ok in said.items())
        TABLE.write_text(f"# RL with controls\n\n{table(results)}\n\n{text}\n")
        merge_result(cpu_name(), "rl_learning", {"arms": results, "verdicts": said})


if __name__ == "__main__":
    main()
