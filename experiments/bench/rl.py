"""Time of a synchronous RL batch by phase, beside its floor, on whatever device is here.

The floor is what the two halves need by themselves, measured in the same run: the tokens of the
batch drawn by the bare engine (the same prompts and lengths, without episodes, worlds, ledger and
pushes), and its tokens at the rate of the train step on full rows. All else is overhead: scoring by
the trainer, packing and its padding, the ledger, the push, the loop. The target is 15%. Scoring is
a part of the method, so the overhead without it is told too. The same in seconds of this process's
CPUs, which what else the machine does disturbs less; on a CPU alone, where they are all there is.

Weights are random, the world asks for an even number of characters. Nothing is read but a tokenizer
that is made here; needs neither grain nor seqio, JetStream or Ray. Programs are compiled before the
run, several at a time.

    python -m experiments.bench.rl [--batches 12] [--write]
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench.results import device_name, merge_result
from experiments.bench.rl_ahead import Ahead, ask_all, batch_of, served, without_mesh
from experiments.bench.seconds import said
from glm45_jax.envs.types import Env, Message, Part, Task
from glm45_jax.metrics import Row, read_jsonl, setup_logging
from glm45_jax.model import config
from glm45_jax.model.config import ModelConfig
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.schedules import Constant
from glm45_jax.rl import run as rl_run
from glm45_jax.rl.config import Evaluation, Rl, Serving, Split
from glm45_jax.rl.lengths import answer_tokens
from glm45_jax.rl.report import PHASES
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.rl.update import Update, Updater
from glm45_jax.rl.workers import Done, Workers
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.episode import Format
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.sharding import MeshShape, Rules
from glm45_jax.tokenizer import Tokenizer, train_bpe
from glm45_jax.train.ahead import batch_shapes
from glm45_jax.train.parallel import Pmap, Recipe, Trainer, make_trainer
from glm45_jax.train.state import Train
from glm45_jax.train.trackers import Untracked

WARM = 3  # batches that compile and are not counted
REPLAYED = 4  # batches that the bare engine draws again
THREADS = 8  # that compile
TOKENIZER_IDS = 256 + 36
TARGET = 0.15


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the loop asks of its data: the length of a row. `Experiment` would bring grain."""

    seq_len: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One timed run; fields as in `Experiment`."""

    name: str
    model: ModelConfig
    data: Rows
    train: Train
    rl: Rl
    mesh: Pmap | MeshShape
    optim: AdamW = AdamW(lr=1e-6, schedule=Constant())
    rules: Rules = Rules()
    tracker: Untracked = Untracked()
    seed: int = 0


def even(task: Task, messages: Sequence[Message]) -> float:
    """1 for an answer of an even number of characters, as half of the random ones are."""
    del task
    return float(len(messages[-1].get("content") or "") % 2 == 0)


def counting(number: int) -> Task:
    """Numbers in a row; the prompts are as long as they are asked to be."""
    words = " ".join(str(number + i) for i in range(PROMPT_WORDS[jax.default_backend()]))
    return Task(f"counting/{number}", words, number)


PROMPT_WORDS = {"cpu": 4, "gpu": 48, "tpu": 48}  # 48 of four digits are 248 tokens


def world() -> Env:
    """Random answers get different rewards there, so every group trains."""
    return Env("counting", counting, (Part("even", even),))


def case_of(backend: str, batches: int) -> Case:
    """Tiny on a CPU; mini, 64 prompts x 8 samples of up to 256 tokens, on an accelerator: with its
    prompt a sample is 504, and all batches are 64 rows.
    """
    cpu = backend == "cpu"
    none, rows = Constant(0.0), 2 if cpu else 8
    return Case(
        name="bench_rl",
        model=config.tiny(vocab=512) if cpu else config.mini(),
        data=Rows(256 if cpu else 4096),
        train=Train(steps=batches, rows=rows, mtp_weight=none, bias_rate=none),
        rl=Rl(
            world=world,
            update=Update(micro_rows=None if cpu else rows),
            groups=8 if cpu else 64,
            samples=8,
            sampling=Sampling(max_tokens=32 if cpu else 256),
            serving=Serving(slots=32, pages=512, page=8, max_tokens=128, buckets=(32,))
            if cpu
            else Serving(
                slots=512,
                pages=6144,
                page=64,
                max_tokens=512,
                buckets=(256,),
                steps=4,
                together=8,
                prefill_tokens=16_384,
            ),
            split=Split(first=0 if cpu else 1000),  # numbers of as many digits
            evaluation=Evaluation(tasks=0),
            most_mismatch=None,  # random weights in bfloat16; compared all the same
            dynamic=False,
            thinking=False,
        ),
        mesh=Pmap(1) if cpu else MeshShape(data=-1, fsdp=1),
    )


def rows_of(case: Case, tokenizer: Tokenizer) -> int:
    """Of a batch in which every answer is as long as it may be and no group agrees."""
    first = case.rl.world().tasks(case.rl.split.first)
    prompt = Format(tokenizer, case.rl.family, False).prompt(case.rl.world(), first.messages)
    a_row = case.data.seq_len // (len(prompt) + case.rl.sampling.max_tokens)
    return math.ceil(case.rl.groups * case.rl.samples / a_row / case.train.rows) * case.train.rows


class Kept:
    """Workers that keep what they gave. cpu_s: of this process at every push, one a batch."""

    def __init__(self, workers: Workers, given: list[Trajectory], cpu_s: list[float]) -> None:
        self._workers, self._given, self._cpu_s = workers, given, cpu_s
        self.start, self.abort = workers.start, workers.abort
        self.counts, self.close = workers.counts, workers.close

    @property
    def running(self) -> int:
        """As `Workers`."""
        return self._workers.running

    def push(self, params: Any, version: int) -> None:
        """As `Workers`."""
        self._workers.push(params, version)
        self._cpu_s.append(time.process_time())

    def poll(self) -> list[Done]:
        """As `Workers`."""
        done = self._workers.poll()
        self._given += [one for _, one in done]
        return done


def timed_run(
    case: Case, tokenizer: Tokenizer, updater: Updater, folder: pathlib.Path
) -> tuple[list[Row], list[Trajectory], Any, float]:
    """(rows of the metrics, all trajectories in the order in which they ended, the weights, CPU
    seconds of a batch).
    """
    given, cpu_s = list[Trajectory](), list[float]()
    state, outcome = rl_run.run(
        case,
        folder,
        tokenizer=tokenizer,
        updater=updater,
        initial=lambda trainer: trainer.init(jax.random.key(case.seed)),
        through=lambda workers: Kept(workers, given, cpu_s),
    )
    if state is None or outcome.why != "done":
        raise RuntimeError(f"the run ended after {outcome.step} batches: {outcome.why}")
    cpu = statistics.median(np.diff(cpu_s[WARM - 1 :]).tolist())
    return read_jsonl(folder / "metrics.jsonl"), given, updater.params(state), cpu


def both_clocks() -> np.ndarray:
    """Seconds now: of the wall, of this process's CPUs."""
    return np.array([time.perf_counter(), time.process_time()])


def bare_engine(case: Case, params: Any, given: Sequence[Trajectory]) -> np.ndarray:
    """Tokens a second of the engine alone, by both clocks: the last batches again, each at once."""
    served, size = case.rl.serving, case.rl.groups * case.rl.samples
    driver = Driver(
        served.engine(case.model, routes=False),
        params,
        prefill_tokens=served.prefill_tokens,
        reuse=served.reuse,
    )
    rates = []
    for batch in range(REPLAYED + 1):
        inside = given[len(given) - (batch + 1) * size :][:size]
        inside = sorted(inside, key=lambda one: one.group)
        began, tokens = both_clocks(), 0
        for seed, one in enumerate(inside):
            n, first = answer_tokens(one), int(np.argmax(one.sampled_T))
            driver.submit(one.tokens_T[:first].tolist(), Sampling(max_tokens=n, seed=seed))
            tokens += n
        driver.run()
        rates.append(tokens / (both_clocks() - began))
    return np.median(rates[1:], axis=0)  # the first one warms up


def pretrainer(case: Case, rows: int) -> Trainer:
    """Of the pretraining step that is the floor's other half."""
    recipe = Recipe(
        dataclasses.replace(case.model, n_mtp=0),
        case.optim,
        dataclasses.replace(case.train, rows=rows, micro_rows=case.rl.update.micro_rows),
        packed=True,
    )
    return make_trainer(case.mesh, recipe)


def train_rate(case: Case, trainer: Trainer, rows: int) -> np.ndarray:
    """Tokens a second of the pretraining step on full rows, by both clocks."""
    from experiments.bench.train_step import Case as Step
    from experiments.bench.train_step import random_batch

    seq_len = case.data.seq_len
    state = trainer.init(jax.random.key(0))
    batch = random_batch(Step(rows, seq_len, 1, "float32"), case.model.vocab)
    times = []
    for _ in range(10):
        began = both_clocks()
        state, out = trainer.step(state, batch)
        float(out.scalars["loss"])
        times.append(both_clocks() - began)
    return rows * seq_len / np.median(times[2:], axis=0)


def median_of(rows: Sequence[Row], name: str) -> float:
    """Over the batches after `WARM`."""
    return statistics.median(row.scalars.get(name, 0.0) for row in rows if row.step > WARM)


def against_floor(
    rows: Sequence[Row], drawn_rates: np.ndarray, trained_rates: np.ndarray, cpu: float
) -> dict[str, Any]:
    """Medians over the batches after `WARM`, their floor, and what is over it as a share of it.
    Rates by both clocks. cpu: seconds of a batch.
    """
    drawn_per_s, trained_per_s = float(drawn_rates[0]), float(trained_rates[0])
    median = functools.partial(median_of, rows)
    whole = median("seconds")
    phases = {name: round(median(f"seconds/{name}"), 4) for name in PHASES}
    drawn, trained = median("rollout/tokens"), median("tokens/trained")
    floor = {"rollout": drawn / drawn_per_s, "train": trained / trained_per_s}
    least = sum(floor.values())
    least_cpu = float(drawn / drawn_rates[1] + trained / trained_rates[1])
    return {
        "batches": sum(row.step > WARM for row in rows),
        "seconds": round(whole, 4),
        "phases": phases,
        "tokens": {"drawn": drawn, "trained": trained},
        "rates": {"engine": round(drawn_per_s), "train_step": round(trained_per_s)},
        "floor": {name: round(x, 4) for name, x in floor.items()} | {"sum": round(least, 4)},
        "overhead_percent": round(100 * (whole / least - 1), 1),
        "overhead_percent_beside_scoring": round(
            100 * ((whole - median("seconds/score")) / least - 1), 1
        ),
        "cpu": {
            "seconds": round(cpu, 4),
            "floor": round(least_cpu, 4),
            "overhead_percent": round(100 * (cpu / least_cpu - 1), 1),
        },
        "target_percent": 100 * TARGET,
    }


def text(found: Mapping[str, Any]) -> str:
    """The result as people read it."""
    lines = [f"{'phase':<10}{'seconds':>9}{'floor':>9}"]
    for name, seconds in found["phases"].items():
        floor = found["floor"].get(name)
        lines.append(f"{name:<10}{seconds:>9.3f}" + (f"{floor:>9.3f}" if floor else ""))
    lines.append(f"{'whole':<10}{found['seconds']:>9.3f}{found['floor']['sum']:>9.3f}")
    lines.append(
        f"over the floor: {found['overhead_percent']}% (target {found['target_percent']:g}%), "
        f"{found['overhead_percent_beside_scoring']}% beside scoring"
    )
    cpu = found["cpu"]
    lines.append(
        f"in CPU seconds {cpu['seconds']:.3f}, floor {cpu['floor']:.3f}: "
        f"{cpu['overhead_percent']}% over"
    )
    return "\n".join(lines)


def measure(case: Case) -> dict[str, Any]:
    """What `against_floor` says of a run in a scratch folder."""
    tokenizer = train_bpe(["a few words"], TOKENIZER_IDS)
    rows, updater = rows_of(case, tokenizer), without_mesh(rl_run.updater_of(case))
    trainer, seq_len = pretrainer(case, rows), case.data.seq_len
    batch = batch_of(rows, seq_len, case.model, case.rl)
    ahead = Ahead(THREADS)
    ahead.ask("update", lambda: updater.trainer.compile_step(batch))
    ahead.ask("pretraining step", lambda: trainer.compile_step(batch_shapes(rows, seq_len)))
    ask_all(ahead, "", served(case.model, case.rl, jax.local_devices()[0]))
    ahead.wait("")
    ahead.close()
    said(f"compiled for batches of {rows} rows")
    with tempfile.TemporaryDirectory() as folder:
        done, given, params, cpu = timed_run(case, tokenizer, updater, pathlib.Path(folder))
    said(f"{case.train.steps} batches")
    engine = bare_engine(case, params, given)
    said(f"{REPLAYED} of them by the engine alone")
    return against_floor(done, engine, train_rate(case, trainer, rows), cpu)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--write", action="store_true", help="into the result file")
    args = parser.parse_args()
    setup_logging()
    if args.batches < WARM + REPLAYED + 1:
        raise SystemExit(f"--batches {args.batches}: at least {WARM + REPLAYED + 1}")
    found = measure(case_of(jax.default_backend(), args.batches))
    print(text(found))
    if args.write:
        command = f"python -m experiments.bench.rl --batches {args.batches} --write"
        print(merge_result(device_name(), "rl", {"command": command, **found}))


if __name__ == "__main__":
    from experiments.bench import rl  # not as __main__: values name their module

    rl.main()
