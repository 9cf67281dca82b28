"""The loop of pretraining, mid-training and SFT: batches in, metrics and checkpoints out. Types:
`Hook`, `Outcome`.

It knows nothing of data preparation or evaluation: it takes an iterator of batches and hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np

from glm45_jax import hosts
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.data.types import Batch
from glm45_jax.metrics import Window
from glm45_jax.train.parallel import Trainer
from glm45_jax.train.state import Train, TrainState
from glm45_jax.train.step import StepOut

log = logging.getLogger(__name__)


class Hook(Protocol):
    """Something to do after some steps; what it returns is logged with the step."""

    def due(self, step: int) -> bool:
        """True where the hook wants to run after this step."""
        ...

    def __call__(self, step: int, state: TrainState, trainer: Trainer) -> dict[str, float]:
        """Scalars to log. It must not change or keep the state: the next step donates it."""
        ...


class Source(Protocol):
    """Where batches come from: `data.loader.Loader`, or anything with its two faces."""

    def iterate(self, start_step: int = 0) -> Generator[Batch]:
        """Batches of start_step, start_step + 1, ...; closed when the run ends."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. why: "done", "stopped" (a signal), or "not finite" (the batch is saved at
    `batch_file`).
    """

    step: int
    why: Literal["done", "stopped", "not finite"]
    seconds: float
    tokens: int
    batch_file: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Validate:
    """Mean loss over fixed batches, as `name`, in nats a token."""

    batches: Sequence[Batch]
    every: int
    at: tuple[int, ...] = ()
    name: str = "val/loss"

    def due(self, step: int) -> bool:
        """Every `every` steps, and at the steps named."""
        return step in self.at or (self.every > 0 and step % self.every == 0)

    def __call__(self, step: int, state: TrainState, trainer: Trainer) -> dict[str, float]:
        """{name: ...}: a sum over all targets, divided by their number."""
        sums = np.sum([trainer.nll(state, batch) for batch in self.batches], axis=0)
        return {self.name: float(sums[0] / sums[1])}


def run_steps(
    trainer: Trainer,
    state: TrainState,
    source: Source,
    *,
    train: Train,
    start: int,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    sidecars: dict[str, Any],
    writers: Sequence[Any] = (),
    progress: Any = None,
    hooks: Sequence[Hook] = (),
    utilisation: Callable[[float], float] | None = None,
    facts: Mapping[str, float] | None = None,
) -> tuple[TrainState, Outcome]:
    """Steps start .. train.steps. The last state is saved however the run ends; after a step that
    is not finite the state before it is the last one.

    utilisation: tokens a second -> share of the devices' peak, logged as "mfu". facts: logged with
    every step (which stage this is). sidecars: saved beside every checkpoint. SIGTERM and SIGINT
    end the run after the current step, with a checkpoint.
    """
    began, tokens = time.monotonic(), 0
    saved = -1 if checkpoints.latest() is None else start
    clock = _Clock()
    why: Literal["done", "stopped", "not finite"] = "done"
    batch_file = None
    step = start
    with stop_signals() as stop, contextlib.closing(source.iterate(start)) as batches:
        while step < train.steps:
            batch = next(batches)
            state, out = trainer.step(state, batch)
            if not bool(jax.device_get(out.ok)):
                batch_file = _save_batch(workdir, step, batch, out)
                why = "not finite"
                break
            step += 1
            tokens += batch.tokens_BT.size * jax.process_count()
            scalars = {**(facts or {}), **_floats(out.scalars)}
            scalars |= clock.rates(batch.tokens_BT.size * jax.process_count(), utilisation)
            hooked = {
                k: v for h in hooks if h.due(step) for k, v in h(step, state, trainer).items()
            }
            if hooked:
                clock.skip()
            due = bool(hooked) or step % train.log_every == 0
            _write(writers, step, scalars | hooked, out, due)
            if progress is not None:
                progress.update(step, scalars | hooked)
            if train.save_every and step % train.save_every == 0:
                _save(checkpoints, trainer, state, step, source, sidecars)
                saved = step
            if hosts.anyone(stop.is_set()):
                why = "stopped" if step < train.steps else "done"
                break
    if step > saved:
        _save(checkpoints, trainer, state, step, source, sidecars)
    checkpoints.wait()
    return state, Outcome(step, why, time.monotonic() - began, tokens, batch_file)


def resume(
    trainer: Trainer, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any], int] | None:
    """(state, sidecars, step) of the newest checkpoint that is whole, or None where there is
    none.
    """
    if checkpoints.latest() is None:
        return None
    restored = checkpoints.restore(trainer.abstract)
    return trainer.load_view(restored.state), restored.sidecars, restored.step


def _floats(scalars: Mapping[str, jax.Array]) -> dict[str, float]:
    return {name: float(x) for name, x in jax.device_get(dict(scalars)).items()}


class _Clock:
    """Tokens a second between calls; the first step, which compiles, is not counted."""

    def __init__(self) -> None:
        self._last: float | None = None

    def rates(self, tokens: int, utilisation: Callable[[float], float] | None) -> dict[str, float]:
        now, last = time.monotonic(), self._last
        self._last = now
        if last is None:
            return {}
        rate = Window(tokens, max(now - last, 1e-9)).tokens_per_s
        return {"tokens_per_s": rate} | ({"mfu": utilisation(rate)} if utilisation else {})

    def skip(self) -> None:
        """Time spent in hooks is not training time."""
        self._last = time.monotonic()


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets; the old handlers are back afterwards. In a thread:
    never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(number: int, _: Any) -> None:
        log.warning("%s: saving after this step, then leaving", signal.Signals(number).name)
        event.set()

    old = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _write(
    writers: Sequence[Any], step: int, scalars: dict[str, float], out: StepOut, due: bool
) -> None:
    if not due or not writers:
        return
    load_LE, bias_LE = jax.device_get((out.load_LE, out.bias_LE))
    share_LE = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1)
    for writer in writers:
        writer.write(step, scalars, {"load": share_LE, "bias": bias_LE})


def _save(
    checkpoints: Checkpoints,
    trainer: Trainer,
    state: TrainState,
    step: int,
    source: Source,
    sidecars: dict[str, Any],
) -> None:
    checkpoints.save(
        step, trainer.save_view(state), sidecars={**sidecars, "loader": source.state(step)}
    )


def _save_batch(workdir: pathlib.Path, step: int, batch: Batch, out: StepOut) -> pathlib.Path:
    """The batch of a step that was not finite, for replay, one file a host."""
    path = workdir / f"not_finite_step{step}_host{jax.process_index()}.npz"
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in vars(batch).items()}
    np.savez(path, **arrays)
    bad = [name for name, x in jax.device_get(out.scalars).items() if not math.isfinite(x)]
    log.error(
        "step %d is not finite in %s; its update was not applied; batch saved to %s",
        step,
        bad,
        path,
    )
    return path
