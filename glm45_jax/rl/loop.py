"""The second loop: sample, score, train, push. The type to know is `Run`.

One loop for both modes. A synchronous run is an asynchronous one of staleness 0: the capacity rule
(`rl.pool`) then begins a sample only for the batch that comes next, so nothing is under way when
weights change. Source: spec 7.2, 7.5, 8; AReaL (arXiv 2505.24298). Letters: B T, N trajectories.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from glm45_jax.checkpoint import Checkpoints
from glm45_jax.envs.scores import Score
from glm45_jax.rl import alarms
from glm45_jax.rl.batch import Chosen, RlBatch, choose, pack
from glm45_jax.rl.config import Rl, Sync
from glm45_jax.rl.lengths import lengths
from glm45_jax.rl.sampler import Sampler, StarvedError
from glm45_jax.rl.temperature import Phase, due, observe, settle
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.rl.update import Updater
from glm45_jax.rl.workers import WorkersError
from glm45_jax.train.loop import stop_signals
from glm45_jax.train.state import TrainState

log = logging.getLogger(__name__)

Why = Literal["done", "stopped", "not finite", "gate", "starved"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended, after `step` batches. why: "gate": engine and trainer disagree; "starved":
    no batch came together, or nobody samples any more; both are said in `said`.
    """

    step: int
    why: Why
    seconds: float
    tokens: int
    said: str = ""


class GateError(RuntimeError):
    """Engine and trainer do not agree on what the same weights say."""


class NotFiniteError(ArithmeticError):
    """A loss or gradient was not finite."""


WHY: dict[type[Exception], Why] = {
    StarvedError: "starved",
    GateError: "gate",
    NotFiniteError: "not finite",
    WorkersError: "starved",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What a run is wired from. rows: a batch is padded to a multiple of it, so that few shapes are
    compiled. steps: batches in all. phase, watched: of temperature and alarms, where the run
    goes on. hooks: called
    after each batch with its number, its trajectories and what was chosen of them; what they return
    is logged.
    """

    rl: Rl
    updater: Updater
    sampler: Sampler
    checkpoints: Checkpoints
    seq_len: int
    rows: int
    pad_id: int
    steps: int
    save_every: int = 0
    sidecars: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    phase: Phase | None = None
    watched: Mapping[str, alarms.Seen] = dataclasses.field(default_factory=dict)
    writers: Sequence[Any] = ()
    hooks: Sequence[Callable[[int, Sequence[Trajectory], Chosen], Mapping[str, float]]] = ()


@dataclasses.dataclass
class _Standing:
    """Where a run is. step: batches that the state has seen; saved: that a checkpoint has seen.
    watched: what alarms remember.
    """

    state: TrainState
    step: int
    saved: int
    phase: Phase
    watched: Mapping[str, alarms.Seen]
    tokens: int = 0


def run_steps(run: Run, state: TrainState, start: int) -> tuple[TrainState, Outcome]:
    """Batches start .. steps. The last state is saved however the run ends."""
    began = time.monotonic()
    phase = run.phase or Phase(run.rl.sampling.temperature)
    now = _Standing(state, start, start, phase, run.watched)
    run.sampler.temperature = phase.temperature
    why: Why = "done"
    said = ""
    with stop_signals() as stop:
        try:
            _evaluate_at_start(run, start)
            while now.step < run.steps:
                _step(run, now, stop.is_set)
                if stop.is_set() and now.step < run.steps:
                    why = "stopped"
                    break
        except (StarvedError, GateError, NotFiniteError, WorkersError) as error:
            why, said = WHY[type(error)], str(error)
            log.error("step %d: %s", now.step, error)
    run.sampler.park()
    if now.step > now.saved or run.checkpoints.latest() is None:
        _save(run, now)
    run.checkpoints.wait()
    return now.state, Outcome(now.step, why, time.monotonic() - began, now.tokens, said)


def _step(run: Run, now: _Standing, stop: Callable[[], bool]) -> None:
    """None; one batch further, or not where `stop` says so while it is sampled.

    Raises: StarvedError, GateError, NotFiniteError, WorkersError.
    """
    clock, rl, before = Clock(), run.rl, run.sampler.workers.counts()
    with clock.phase("rollout"):
        taken = run.sampler.gather(now.step, stop=stop)
    if taken is None:
        return
    scalars = _train(run, now, taken, clock)
    run.sampler.prompts.observe(scalars["reward"])
    now.step += 1
    now.tokens += int(scalars["tokens/trained"])
    with clock.phase("push"):
        run.sampler.workers.push(run.updater.params(now.state), now.step)
    with clock.phase("evaluate"):
        if rl.temperature is not None:
            scalars |= _look_at_temperature(run, now, scalars["reward"])
        if now.step < run.steps:  # nothing is drawn after the last batch
            scalars |= run.sampler.probe(now.step)
        if _due(rl.evaluation.every, now.step, run.steps):
            scalars |= evaluate(run) | _canaries(run, now)
    if run.save_every and now.step % run.save_every == 0:
        with clock.phase("save"):
            _save(run, now)
    scalars |= _speeds(run.sampler.workers.counts(), before)
    _write(run, now.step, scalars | clock.scalars())


def _speeds(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What the workers did in this step; evaluations are among it."""
    done = {name: n - before.get(name, 0) for name, n in after.items()}
    rate = done["tokens"] / max(done["seconds"], 1e-9)
    return {f"rollout/{name}": n for name, n in done.items()} | {"rollout/tokens_per_s": rate}


def _look_at_temperature(run: Run, now: _Standing, reward: float) -> dict[str, float]:
    """The temperature that sampled this batch; the next is set by the rule of spec 7.2.4."""
    rl = run.rl
    assert rl.temperature is not None
    used = now.phase.temperature
    now.phase = observe(rl.temperature, now.phase, reward)
    if due(rl.temperature, now.phase):
        score = {T: _held_out(run, rl.evaluation.samples, T).value for T in rl.temperature.grid}
        now.phase = settle(rl.temperature, now.phase, score)
        log.info("temperature %g after %g; scores %s", now.phase.temperature, used, score)
    run.sampler.temperature = now.phase.temperature
    return {"temperature": used}


def evaluate(run: Run) -> dict[str, float]:
    """Rewards of the held-out tasks: "eval/sampled" at the temperature of training, "eval/greedy";
    each with half of its 95% interval.
    """
    asked = run.rl.evaluation
    found: dict[str, float] = {}
    for name, samples, temperature in (
        ("sampled", asked.samples, run.sampler.temperature),
        ("greedy", int(asked.greedy), 0.0),
    ):
        if samples and asked.tasks:
            score = _held_out(run, samples, temperature)
            found |= {f"eval/{name}": score.value, f"eval/{name}_half": score.half}
    return found


def _held_out(run: Run, samples: int, temperature: float) -> Score:
    sampling = dataclasses.replace(run.rl.sampling, temperature=temperature)
    numbers = range(run.rl.evaluation.tasks)
    return Score.of(run.sampler.held_out(numbers, samples, sampling).mean(axis=1))


def _evaluate_at_start(run: Run, start: int) -> None:
    if start == 0 and run.steps > 0:
        clock = Clock()
        with clock.phase("evaluate"):
            scalars = evaluate(run)
        if scalars:
            scalars |= _speeds(run.sampler.workers.counts(), {})
            _write(run, 0, scalars | clock.scalars())


def _due(every: int, step: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def _train(run: Run, now: _Standing, taken: Sequence[Trajectory], clock: Clock) -> dict[str, float]:
    """What to log of the updates of one batch; the state has taken them.

    Raises: GateError, NotFiniteError, RuntimeError where a synchronous batch has tokens of other
    weights.
    """
    rl, step = run.rl, now.step
    if isinstance(rl.mode, Sync):
        check_versions(taken, step)
    chosen = choose(taken, rl.rule)
    finished, run.sampler.finished = run.sampler.finished or list(taken), []
    describe = functools.cache(lambda: _described(run, now, finished, taken, chosen))
    with clock.phase("pack"):
        batches = [_pack(run, part) for part in _parts(chosen, rl.updates)]
    # One update a batch needs no scores beside those it makes itself.
    alone = rl.recompute and len(batches) == 1
    found: dict[str, float] = {}
    with clock.phase("score"):
        if alone:
            batches = [b.replace(fresh_B=b.version_B == step) for b in batches]
        elif batches:
            batches, found = _scored(run, now.state, batches, step)
        else:  # nothing is trained, and yet engine and trainer are compared
            whole = _pack(run, (list(taken), np.zeros(len(taken), np.float32)))
            _, found = _scored(run, now.state, [whole], step)
    outs = []
    with clock.phase("train"):
        for batch in batches:
            now.state, out = run.updater.step(now.state, batch)
            describe()  # while the devices are at it
            said, ok = jax.device_get((out.scalars, out.ok))
            outs.append({name: float(x) for name, x in said.items()})
            if alone and (fresh := _fresh_tokens(batch, step)):
                found = {f"mismatch/{n}": outs[-1][f"policy/fresh_{n}"] for n in ("kl", "gap")}
                _check_mismatch(rl.most_mismatch, found, fresh)
            if not ok:
                if len(outs) > 1:
                    now.saved = step  # half of a batch is no place to go on from
                raise NotFiniteError(f"{outs[-1]} is not finite; this update was not applied")
    scalars = describe() | found | _means(outs)
    trained = sum(int((batch.batch.segments_BT > 0).sum()) for batch in batches)
    scalars["tokens/trained"] = float(trained)
    scalars["tokens_per_s"] = trained / max(clock.seconds["train"] + clock.seconds["score"], 1e-9)
    run.sampler.pool.trained(step, advantages=_aligned(taken, chosen), numbers=scalars)
    for hook in run.hooks:
        scalars |= hook(step, taken, chosen)
    return scalars


def check_versions(taken: Sequence[Trajectory], version: int) -> None:
    """None. Raises: RuntimeError where a token was drawn by weights of another version."""
    for one in taken:
        drawn = set(one.versions_T[one.sampled_T].tolist())
        if drawn - {version}:
            raise RuntimeError(
                f"{one.task_id}: a synchronous run of version {version} has tokens of versions "
                f"{sorted(drawn)}; the pool or the engine has lost count"
            )


def _parts(chosen: Chosen, updates: int) -> list[tuple[list[Trajectory], np.ndarray]]:
    """The trajectories in `updates` parts of whole groups; empty parts are left out."""
    groups = list(dict.fromkeys(one.group for one in chosen.trajectories))
    part_of = {group: at * updates // len(groups) for at, group in enumerate(groups)}
    found = []
    for part in range(updates):
        inside = [i for i, one in enumerate(chosen.trajectories) if part_of[one.group] == part]
        if inside:
            kept = [chosen.trajectories[i] for i in inside]
            found.append((kept, chosen.advantage_N[inside]))
    return found


def _pack(run: Run, part: tuple[list[Trajectory], np.ndarray]) -> RlBatch:
    kept, advantage_N = part
    temperature_N = np.array([one.temperature for one in kept], np.float32)
    return pack(
        kept,
        advantage_N,
        seq_len=run.seq_len,
        pad_id=run.pad_id,
        multiple=run.rows,
        temperature_N=temperature_N,
    )


def _scored(
    run: Run, state: TrainState, batches: list[RlBatch], step: int
) -> tuple[list[RlBatch], dict[str, float]]:
    """The batches with the trainer's log-probs, where they are asked for, and how far the engine's
    are from them. The first batch is always compared.

    Raises: GateError.
    """
    if step > 0 and not run.rl.recompute:
        return batches, {}
    old = [np.asarray(run.updater.logp(state.params, batch)) for batch in batches]
    found, fresh = mismatch(batches, old, step)
    if fresh:
        _check_mismatch(run.rl.most_mismatch, found, fresh)
    if not run.rl.recompute:
        return batches, found
    scored = [b.replace(old_logp_BT=x_BT) for b, x_BT in zip(batches, old, strict=True)]
    return scored, found


def _check_mismatch(limit: float | None, found: Mapping[str, float], fresh: int) -> None:
    """None. Raises: GateError; nothing has been trained then."""
    if limit is not None and not found["mismatch/kl"] <= limit:
        raise GateError(
            f"engine and trainer differ by {found['mismatch/kl']:.3g} nats a token (KL), "
            f"{found['mismatch/gap']:.3g} on average, on {fresh} tokens of the weights that are "
            f"trained; the limit is {limit:g} (rl.most_mismatch). Look for other weights, another "
            "temperature, or a kernel that is wrong, before anything is trained on them"
        )


def _fresh_tokens(batch: RlBatch, version: int) -> int:
    """Counted tokens of rows that these very weights drew."""
    return int(((batch.weight_BT > 0) & (batch.version_B == version)[:, None]).sum())


def mismatch(
    batches: Sequence[RlBatch], old: Sequence[np.ndarray], version: int
) -> tuple[dict[str, float], int]:
    """KL of the engine to the trainer in nats a token and the mean |difference|, "gap", over the
    counted tokens of rows that these very weights drew; and how many those are.
    """
    parts = []
    for batch, old_BT in zip(batches, old, strict=True):
        fresh_BT = (batch.weight_BT > 0) & (batch.version_B == version)[:, None]
        parts.append((old_BT - batch.logp_BT)[fresh_BT].astype(np.float64))
    difference_M = np.concatenate(parts)
    if not difference_M.size:
        return {}, 0
    kl = float((np.expm1(difference_M) - difference_M).mean())
    return {"mismatch/kl": kl, "mismatch/gap": float(abs(difference_M).mean())}, difference_M.size


def _alarms(run: Run, now: _Standing, finished: Sequence[Trajectory]) -> dict[str, float]:
    """What is watched, and the number of alarms, each of which is logged; the run goes on."""
    now.watched, rung = alarms.watch(run.rl.alarms, now.watched, finished)
    for alarm in rung:
        log.warning("batch %d, alarm %s: %s", now.step, alarm.rule, alarm.message)
    return alarms.scalars(now.watched, rung)


def _canaries(run: Run, now: _Standing) -> dict[str, float]:
    """Mean reward of tasks that only a wrong answer solves; rules that know them are asked. What
    they say is said again after every batch to come (`_alarms`), until canaries fail.
    """
    asked, T = run.rl.evaluation, run.sampler.temperature
    if not asked.canaries:
        return {}
    numbers = range(alarms.FIRST_CANARY, alarms.FIRST_CANARY + asked.canaries)
    sampling = dataclasses.replace(run.rl.sampling, temperature=T)
    given = run.sampler.ask(numbers, max(asked.samples, 1), sampling)
    rules = [rule for rule in run.rl.alarms if isinstance(rule, alarms.Canary)]
    now.watched, rung = alarms.watch(rules, now.watched, given)
    for alarm in rung:
        log.warning("batch %d, alarm %s: %s", now.step, alarm.rule, alarm.message)
    return {"eval/canary": float(np.mean([one.reward for one in given]))}


def _described(
    run: Run,
    now: _Standing,
    finished: Sequence[Trajectory],
    taken: Sequence[Trajectory],
    chosen: Chosen,
) -> dict[str, float]:
    """What was sampled since the step before, what of it is trained, and the alarms of it."""
    step = now.step
    scalars = {
        "reward": float(np.mean([one.reward for one in finished])),
        "reward/trained": float(np.mean([one.reward for one in taken])),
        "samples": float(len(finished)),
        "groups/trained": float(chosen.groups - chosen.dropped),
        "groups/agreed": float(chosen.dropped),
        **lengths(finished),
    }
    for name in dict.fromkeys(name for one in finished for name in one.parts):
        values = [one.parts[name] for one in finished if name in one.parts]
        scalars[f"reward/part/{name}"] = float(np.mean(values))
    drawn_M = np.concatenate([one.versions_T[one.sampled_T] for one in taken])
    logp_M = np.concatenate([one.logp_T[one.sampled_T] for one in taken])
    if drawn_M.size:
        scalars["staleness"] = float(step - drawn_M.mean())
        scalars["staleness/max"] = float(step - drawn_M.min())
        scalars["surprise"] = -float(logp_M.mean())  # an unbiased estimate of the entropy
    counts = run.sampler.pool.counts()
    names = ("dropped", "failed", "stale_samples", "stale_groups", "late_samples")
    scalars |= {f"pool/{name}": float(counts.get(name, 0)) for name in names}
    return scalars | dict(run.sampler.prompts.scalars()) | _alarms(run, now, finished)


def _aligned(taken: Sequence[Trajectory], chosen: Chosen) -> list[float | None]:
    """Advantages in the order in which the batch was taken, None for those that were left out."""
    known = {
        id(one): float(a) for one, a in zip(chosen.trajectories, chosen.advantage_N, strict=True)
    }
    return [known.get(id(one)) for one in taken]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else ())}


def _save(run: Run, now: _Standing) -> None:
    """None; the pool forgets what no checkpoint can come back to."""
    view = run.updater.trainer.save_view(now.state)
    rl = {
        "batches": now.step,
        "phase": dataclasses.asdict(now.phase),
        "watched": alarms.to_json(now.watched),
    }
    run.checkpoints.save(now.step, view, sidecars={**run.sidecars, "rl": rl})
    run.sampler.pool.prune(min(run.checkpoints.steps(), default=0))
    now.saved = now.step


def _write(run: Run, step: int, scalars: Mapping[str, float]) -> None:
    for writer in run.writers:
        writer.write(step, scalars, {})


class Clock:
    """Seconds by phase of one step; what no phase has is "other"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._began = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to a phase."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - began

    def scalars(self) -> dict[str, float]:
        """ "seconds" of the step so far, and "seconds/<phase>"."""
        whole = time.monotonic() - self._began
        parts = {f"seconds/{name}": spent for name, spent in self.seconds.items()}
        return {"seconds": whole, **parts, "seconds/other": whole - sum(parts.values())}
