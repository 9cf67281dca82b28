"""The loop of pretraining, mid-training and SFT: batches in, metrics and checkpoints out. Types:
`Hook`, `Outcome`.

It knows nothing of data preparation or evaluation: it takes an iterator of batches and hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
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
from glm45_jax.train.goodput import Goodput
from glm45_jax.train.guard import keep_batch, kept_batches
from glm45_jax.train.parallel import Trainer
from glm45_jax.train.profile import Tracing
from glm45_jax.train.state import Train, TrainState
from glm45_jax.train.step import StepOut
from glm45_jax.train.watchdog import Watchdog

log = logging.getLogger(__name__)

Why = Literal["done", "stopped", "skips spent"]


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
    """How a run ended. why: "done", "stopped" (a signal), or "skips spent" (a step had to be left
    out and the budget was spent). kept: batches of all steps left out so far, of those that this
    host sees.
    """

    step: int
    why: Why
    seconds: float
    tokens: int
    kept: tuple[pathlib.Path, ...] = ()


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
    goodput: Goodput | None = None,
) -> tuple[TrainState, Outcome]:
    """Steps start .. train.steps. The last state is saved however the run ends; where `train.guard`
    has no budget for another step left out, the state before that step is the last one.

    utilisation: tokens a second -> share of the devices' peak, logged as "mfu". facts: logged with
    every step (which stage this is). sidecars: saved beside every checkpoint. goodput: told where
    the time goes. SIGTERM and SIGINT end the run after the current step, with a checkpoint.
    """
    began, tokens, step = time.monotonic(), 0, start
    spent = goodput or Goodput()
    every = train.log_every
    seen = _Seen(trainer, writers, progress, hooks, utilisation, facts or {}, spent, every)
    saver = _Saver(checkpoints, trainer, source, sidecars, spent, train.save_every, start)
    why: Why = "done"
    watchdog = Watchdog(workdir / "hung" / f"host{jax.process_index()}.txt", train.hung_after_s)
    traced = Tracing(workdir / "profile", train.profile if jax.process_index() == 0 else ())
    spent.spent("start")
    batches = source.iterate(start)
    with stop_signals() as stop, contextlib.closing(batches), watchdog, contextlib.closing(traced):
        while step < train.steps:
            batch = next(batches)
            spent.spent("data")
            with traced.step(step + 1):
                state, out = trainer.step(state, batch)
                read = _read(out)
            watchdog.beat()
            if read.skipped or not read.ok:
                _leave_out(workdir, step, batch, read)
            if not read.ok:
                why = "skips spent"
                break
            step += 1
            spent.spent("skipped" if read.skipped else "productive" if tokens else "start", step)
            tokens += batch.tokens_BT.size * jax.process_count()
            seen.write(step, state, out, read, batch.tokens_BT.size * jax.process_count())
            saver.every(state, step)
            watchdog.beat()
            if hosts.anyone(stop.is_set()):
                why = "stopped" if step < train.steps else "done"
                break
    saver.end(state, step)
    return state, Outcome(step, why, time.monotonic() - began, tokens, kept_batches(workdir))


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


@dataclasses.dataclass(frozen=True)
class _Read:
    """What the host wants to know of a step."""

    scalars: dict[str, float]
    ok: bool
    skipped: bool


def _read(out: StepOut) -> _Read:
    """Of a step that has finished: the one wait for the devices."""
    scalars, ok, skipped = jax.device_get((dict(out.scalars), out.ok, out.skipped))
    return _Read({name: float(x) for name, x in scalars.items()}, bool(ok), bool(skipped))


@dataclasses.dataclass(frozen=True)
class _Seen:
    """Who is shown a step: hooks, then writers and the bar."""

    trainer: Trainer
    writers: Sequence[Any]
    progress: Any
    hooks: Sequence[Hook]
    utilisation: Callable[[float], float] | None
    facts: Mapping[str, float]
    goodput: Goodput
    log_every: int
    clock: _Clock = dataclasses.field(default_factory=lambda: _Clock())

    def write(self, step: int, state: TrainState, out: StepOut, read: _Read, tokens: int) -> None:
        """None; hooks have run, and the numbers of the step are handed over where it is their turn
        (a step left out is always shown).
        """
        rates = self.clock.rates(tokens, self.utilisation)
        scalars = {**self.facts, "batch_tokens": float(tokens), **read.scalars, **rates}
        hooked: dict[str, float] = {}
        for hook in self.hooks:
            if hook.due(step):
                hooked |= hook(step, state, self.trainer)
        if hooked:
            self.clock.skip()
        due = bool(hooked) or step % self.log_every == 0 or read.skipped
        scalars |= hooked
        if due:
            _write(self.writers, step, scalars | self.goodput.scalars(), out)
        if self.progress is not None:
            self.progress.update(step, scalars)
        self.goodput.spent("hooks")


@dataclasses.dataclass
class _Saver:
    """Saves the state at every so many steps, and at the end where that is not saved yet."""

    checkpoints: Checkpoints
    trainer: Trainer
    source: Source
    sidecars: dict[str, Any]
    goodput: Goodput
    save_every: int
    saved: int

    def __post_init__(self) -> None:
        if self.checkpoints.latest() is None:
            self.saved = -1

    def every(self, state: TrainState, step: int) -> None:
        """None; saved, where it is time for it."""
        if self.save_every and step % self.save_every == 0:
            self._save(state, step)

    def end(self, state: TrainState, step: int) -> None:
        """None; the state of `step` is on disk, and the ledger of time too."""
        if step > self.saved:
            self._save(state, step)
        self.checkpoints.wait()
        self.goodput.spent("checkpoint")
        self.goodput.write()

    def _save(self, state: TrainState, step: int) -> None:
        sidecars = {**self.sidecars, "loader": self.source.state(step)}
        self.checkpoints.save(step, self.trainer.save_view(state), sidecars=sidecars)
        self.saved = step
        self.goodput.spent("checkpoint")


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


def _write(writers: Sequence[Any], step: int, scalars: dict[str, float], out: StepOut) -> None:
    if not writers:
        return
    load_LE, bias_LE = jax.device_get((out.load_LE, out.bias_LE))
    share_LE = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1)
    for writer in writers:
        writer.write(step, scalars, {"load": share_LE, "bias": bias_LE})


def _leave_out(workdir: pathlib.Path, step: int, batch: Batch, read: _Read) -> None:
    """None; the batch of a step that is left out is on disk, and the log says why."""
    path = keep_batch(workdir, step, batch)
    loss, norm = read.scalars["loss"], read.scalars["grad_norm"]
    numbers = f"batch {step}: loss {loss:.4g}, gradient norm {norm:.4g}"
    if read.ok:
        log.warning("step %d left out (%s); its batch is kept in %s", step + 1, numbers, path)
        return
    kept = ", ".join(path.name for path in kept_batches(workdir))
    log.error(
        "step %d (%s) cannot be left out: the budget of skipped steps is spent. "
        "Batches of all steps left out are in %s: %s. Look at them (train.guard.read_batch); "
        "then lower the learning rate, or raise train.guard.budget to leave this one out too",
        *(step + 1, numbers, path.parent, kept),
    )
