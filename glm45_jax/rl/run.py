"""From an experiment to a running RL loop: trainer, engine, workers and pool, wired. `run`.

This floor does not know the type `Experiment`; it takes anything with its fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from glm45_jax import metrics, values
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.data.sft import prepare_any
from glm45_jax.envs.types import Env
from glm45_jax.model.config import ModelConfig
from glm45_jax.rl import alarms, cluster
from glm45_jax.rl.cluster import Cluster
from glm45_jax.rl.config import Async, Ray, Rl
from glm45_jax.rl.curriculum import Curriculum, Tasks
from glm45_jax.rl.loop import Outcome, Run, run_steps
from glm45_jax.rl.pool import Pool, Rules, varied
from glm45_jax.rl.sampler import HELD_OUT, Graded, InOrder, Prompts, Sampler
from glm45_jax.rl.temperature import Phase
from glm45_jax.rl.update import Updater, make_updater
from glm45_jax.rl.workers import Local, Threaded, Workers
from glm45_jax.rl.worlds import Makers, make_all
from glm45_jax.rollout import weights
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.episode import Episodes, Format
from glm45_jax.rollout.weights import Parcel
from glm45_jax.tokenizer import END_OF_TEXT, Tokenizer
from glm45_jax.train.loop import resume
from glm45_jax.train.parallel import Trainer
from glm45_jax.train.state import TrainState

log = logging.getLogger(__name__)


def run(
    exp: Any,
    workdir: pathlib.Path,
    *,
    tokenizer: Tokenizer,
    updater: Updater,
    initial: Callable[[Trainer], TrainState],
    through: Callable[[Workers], Workers] = lambda workers: workers,
) -> tuple[TrainState | None, Outcome]:
    """The state and how the run ended; it goes on where `workdir` holds one.

    tokenizer, updater: of `tokenizer_of` and `updater_of`. initial: the state to begin with, as the
    trainer keeps it. through: what stands between the loop and the workers, in controls.
    """
    rl, trainer = exp.rl, updater.trainer
    checkpoints = Checkpoints(workdir / "checkpoints", keep=exp.train.keep)
    resumed = resume(trainer, checkpoints)
    phase, watched = None, {}
    if resumed is None:
        try:
            state, start = initial(trainer), 0
        except NotBegunError as error:
            checkpoints.close()
            return None, Outcome(0, error.args[0], 0.0, 0, "the cold start did not end")
    else:
        state, sidecars, _ = resumed
        said = sidecars["rl"]
        start, phase = said["batches"], Phase(**_tuples(said["phase"]))
        watched = alarms.from_json(said["watched"])
        log.info("resuming after batch %d of %d", start, exp.train.steps)
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        workers = through(workers_of(exp, tokenizer, updater.params(state), start))
        stack.callback(workers.close)
        pool = stack.enter_context(pool_of(exp, workdir))
        pool.resume(start)
        writers = _writers(exp, workdir, start)
        for writer in writers:
            stack.callback(writer.close)
        wired = Run(
            rl=rl,
            updater=updater,
            sampler=Sampler(pool, workers, prompts_of(exp, pool), rl, seed=exp.seed),
            checkpoints=checkpoints,
            seq_len=exp.data.seq_len,
            rows=exp.train.rows,
            pad_id=tokenizer.id_of(END_OF_TEXT),
            steps=exp.train.steps,
            save_every=exp.train.save_every,
            sidecars={"experiment": values.to_json(exp)},
            phase=phase,
            watched=watched,
            writers=writers,
        )
        stack.enter_context(_frozen())
        return run_steps(wired, state, start)


class NotBegunError(RuntimeError):
    """The cold start did not come to its end; its argument says how it ended."""


def cold_start(exp: Any, workdir: pathlib.Path, run_training: Callable[..., Any]) -> str | None:
    """The workdir of the cold start, which has been run to its end; None where there is none.

    Raises: NotBegunError.
    """
    cold = exp.rl.cold_start
    if cold is None:
        return None
    changes = {"optim": cold.optim, "train": cold.train, "rl": None, "run": run_training}
    supervised = dataclasses.replace(exp, name=f"{exp.name}_cold_start", **changes)
    outcome = run_training(supervised, cold_folder(workdir))
    if outcome.why != "done":
        raise NotBegunError(outcome.why)
    return str(cold_folder(workdir))


def cold_folder(workdir: pathlib.Path) -> pathlib.Path:
    """The workdir of the cold start."""
    return workdir / "cold_start"


def tokenizer_of(exp: Any, workdir: pathlib.Path) -> Tokenizer:
    """The tokenizer of the run's data.

    Raises: ValueError for one of another size, and for an experiment without rl.
    """
    if exp.rl is None:
        raise ValueError(f"{exp.name} has no rl; give it an Rl value, or run=run_training")
    if exp.data.tokenizer is None:
        folder = workdir if exp.rl.cold_start is None else cold_folder(workdir)
        return prepare_any(exp.data, folder / "data").tokenizer
    tokenizer = Tokenizer.load(exp.data.tokenizer)
    if tokenizer.vocab != exp.data.vocab:
        raise ValueError(
            f"{exp.data.tokenizer} has {tokenizer.vocab} ids, data.vocab is {exp.data.vocab}"
        )
    return tokenizer


def updater_of(exp: Any) -> Updater:
    """The trainer on the devices that the engine leaves it.

    Raises: ValueError for a batch that these do not share evenly, and where Ray is asked for and
    not there.
    """
    if isinstance(exp.rl.where, Ray):
        cluster.check(exp.rl.where)
    devices = None
    if isinstance(exp.rl.mode, Async) and exp.rl.mode.devices:
        devices = jax.local_devices()[: -exp.rl.mode.devices]
        if not devices:
            raise ValueError(f"{exp.rl.mode} leaves the trainer no device")
    updater = make_updater(
        exp.model,
        exp.optim,
        exp.rl.update,
        where=exp.mesh,
        rules=exp.rules,
        devices=devices,
        seed=exp.seed,
        most_mismatch=exp.rl.most_mismatch,
    )
    if exp.train.rows % updater.multiple:
        raise ValueError(
            f"train.rows {exp.train.rows} is not a multiple of {updater.multiple}, the rows that "
            "devices and micro-batches share"
        )
    return updater


def workers_of(exp: Any, tokenizer: Tokenizer, params: Any, version: int) -> Workers:
    """Samplers that serve these weights as that version."""
    rl: Rl = exp.rl
    parcel = weights.prepare(params, version, cfg=exp.model, fp8=rl.push.fp8)
    if isinstance(rl.where, Ray):
        build = functools.partial(local_of, rl, exp.model, tokenizer)
        return Cluster(
            rl.where, parcel, build=build, makers=makers_of(rl), cfg=exp.model, how=rl.push
        )
    device = jax.local_devices()[-1 if isinstance(rl.mode, Async) and rl.mode.devices else 0]
    local = local_of(rl, exp.model, tokenizer, parcel, make_all(makers_of(rl)), device=device)
    if isinstance(rl.mode, Async) and rl.mode.thread:
        # Under a default device that is named, jax compiles all of the engine's programs once more.
        return Threaded(local, device=device if rl.mode.devices else None)
    return local


def local_of(
    rl: Rl,
    model: ModelConfig,
    tokenizer: Tokenizer,
    parcel: Parcel,
    envs: Mapping[str, Env],
    judges: int = 0,
    *,
    device: jax.Device | None = None,
) -> Local:
    """A sampler of this process. judges: threads where `rl` names none; device: the first one."""
    device = device or jax.local_devices()[0]
    with jax.default_device(device):
        driver = Driver(
            rl.serving.engine(model, routes=rl.update.replay),
            weights.stage(parcel, device).params,
            version=parcel.version,
            prefill_tokens=rl.serving.prefill_tokens,
            reuse=rl.serving.reuse,
        )
    judges = rl.judges or judges
    pool = ThreadPoolExecutor(judges, "judge") if judges else None
    return Local(
        Episodes(driver, Format(tokenizer, rl.family, rl.thinking), executor=pool),
        envs,
        cfg=model,
        to=device,
        how=rl.push,
        at_close=pool.shutdown if pool else bool,
    )


def makers_of(rl: Rl) -> Makers:
    """What makes the worlds of a run, by the names that its prompts use."""
    held_out = rl.evaluation.world or rl.world
    if rl.evaluation.canaries:
        held_out = alarms.Beside(held_out)
    return {rl.world().name: rl.world, HELD_OUT: held_out}


def pool_of(exp: Any, workdir: pathlib.Path) -> Pool:
    """The ledger of the run, under its workdir."""
    rules = Rules(groups=exp.rl.groups, staleness=exp.rl.mode.staleness)
    filters = (varied,) if exp.rl.dynamic else ()
    return Pool(workdir / "pool", run=f"{exp.name}/{exp.seed}", rules=rules, filters=filters)


def prompts_of(exp: Any, pool: Pool) -> Prompts:
    """Tasks in order, or by a curriculum."""
    rl: Rl = exp.rl
    name = rl.world().name
    if rl.grades is None:
        return InOrder(name, rl.samples, rl.split)
    assert rl.split.train is not None
    tasks = Tasks(name, rl.split.train, rl.split.first, rl.split.verified)
    curriculum = Curriculum((tasks,), samples=rl.samples, seed=exp.seed, stages=rl.grades.stages)
    return Graded(curriculum, pool, rl.grades, groups=rl.groups)


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """The garbage collector passes over what is there when this begins, until it ends: jax and its
    programs are hundreds of thousands of objects that stay, and samples make it look again and
    again.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _writers(exp: Any, workdir: pathlib.Path, start: int) -> list[metrics.Writer]:
    """Of the first host; step 0 is the evaluation before the first batch."""
    if jax.process_index() != 0:
        return []
    return [
        exp.tracker.open(exp, workdir, start + 1),
        metrics.Jsonl.open_resumed(workdir / "metrics.jsonl", start + 1 if start else 0),
        metrics.Progress(exp.train.steps, start),
    ]


def _tuples(phase: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in phase.items()}
