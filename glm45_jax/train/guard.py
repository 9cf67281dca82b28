"""Steps that would hurt are left out: which, how many, and the batch kept for replay. Types:
`Guard`, the rule; `Level`, what the rule remembers from step to step.

All of it is decided inside the step, from numbers that are the same on every device: nothing waits
for a host, and a run that resumes decides as one that was never stopped.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from glm45_jax.data.types import Batch
from glm45_jax.integrity import write_whole

FOLDER = "skipped"  # of a run's folder: a batch a file


@dataclasses.dataclass(frozen=True)
class Guard:
    """A step is left out where its loss or gradient norm is not finite, or its loss is above the
    level by `sigmas` deviations and by at least `min_rise` nats. It counts as a step, and its
    tokens as seen: the schedules and stages stay where they are.

    window: steps the level is a mean over; with fewer there is no limit. budget: steps that may be
    left out; each is forgiven after `forgiven_after` good ones. One more ends the run. since_step:
    where the level starts anew (a stage's first step).
    Source: none in the paper; that spikes are seen against the last 128 losses by 6 deviations is
    common practice. All defaults UNVERIFIED.
    """

    sigmas: float = 6.0  # UNVERIFIED
    min_rise: float = 0.1  # nats, UNVERIFIED
    window: int = 128  # UNVERIFIED
    budget: int = 8  # UNVERIFIED
    forgiven_after: int = 1000  # UNVERIFIED
    since_step: int = 0

    def __post_init__(self) -> None:
        if not (self.sigmas > 0 and self.min_rise >= 0 and self.window > 1):
            raise ValueError(
                f"sigmas {self.sigmas} must be positive, min_rise {self.min_rise} not negative, "
                f"window {self.window} at least 2; sigmas=inf leaves the spikes in"
            )
        if self.budget < 0 or not 0 < self.forgiven_after < 2**30 // (self.budget + 1):
            raise ValueError(
                f"budget {self.budget} must not be negative, forgiven_after {self.forgiven_after} "
                f"between 1 and {2**30 // (max(self.budget, 0) + 1)}"
            )


@struct.dataclass
class Level:
    """Running mean and variance of the loss, float32; steps they are made of, at most the window;
    debt: good steps until all that was left out is forgiven; skipped: steps left out. int32.
    """

    mean: jax.Array
    var: jax.Array
    steps: jax.Array
    debt: jax.Array
    skipped: jax.Array


@struct.dataclass
class Verdict:
    """take: the step is taken. spent: it is not, and the budget has nothing left for it. level:
    with the step in it.
    """

    take: jax.Array
    spent: jax.Array
    level: Level


def no_level() -> Level:
    """Before the first step."""
    return Level(jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def judge(
    guard: Guard | None, level: Level, step: jax.Array, loss: jax.Array, grad_norm: jax.Array
) -> Verdict:
    """Whether step number `step` (from 0) is taken. Without a guard: where it is finite, and the
    first that is not is one too many.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if guard is None:
        return Verdict(finite, ~finite, level)
    loss = loss.astype(jnp.float32)
    steps = jnp.where(step == guard.since_step, 0, level.steps)
    deviation = jnp.sqrt(jnp.maximum(level.var, 1e-30))  # inf * 0 would be no limit to compare with
    rise = jnp.maximum(guard.sigmas * deviation, guard.min_rise)
    take = finite & ((steps < guard.window) | (loss <= level.mean + rise))
    weight = 1.0 / jnp.minimum(steps + 1, guard.window).astype(jnp.float32)
    change = loss - level.mean
    good = Level(
        mean=level.mean + weight * change,
        var=jnp.where(steps == 0, 0.0, (1 - weight) * (level.var + weight * change**2)),
        steps=jnp.minimum(steps + 1, guard.window),
        debt=jnp.maximum(level.debt - 1, 0),
        skipped=level.skipped,
    )
    bad = level.replace(
        steps=steps, debt=level.debt + guard.forgiven_after, skipped=level.skipped + 1
    )
    spent = ~take & (bad.debt > guard.budget * guard.forgiven_after)
    return Verdict(take, spent, select(take, good, bad))


def select(flag: jax.Array, yes: Any, no: Any) -> Any:
    """The one tree or the other, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(flag, a, b), yes, no)


def keep_batch(workdir: pathlib.Path, step: int, batch: Batch) -> pathlib.Path:
    """Where the rows of this host are now, whole or not at all: an npz of the batch's arrays.

    step: number of the batch, which is that of the steps before it.
    """
    folder = workdir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"batch{step}_host{jax.process_index()}.npz"
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in vars(batch).items()}
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_whole(path, file.getvalue())
    return path


def read_batch(path: str | os.PathLike) -> Batch:
    """The batch that `keep_batch` wrote, for `trainer.step`, bit for bit; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as arrays:
        return Batch(**{name: arrays[name] for name in arrays.files})


def kept_batches(workdir: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Every batch kept, by number then host."""

    def numbers(path: pathlib.Path) -> tuple[int, ...]:
        number, host = path.stem.split("_")
        return int(number.removeprefix("batch")), int(host.removeprefix("host"))

    return tuple(sorted((workdir / FOLDER).glob("batch*_host*.npz"), key=numbers))
