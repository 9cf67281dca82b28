"""Who samples. The seam of the RL loop: `Workers`. Types: `Job`, one sample to draw; `Local`, one
driver that this thread ticks; `Threaded`, the same in a thread of its own.

Workers in other processes and on other machines are one more implementation, `rl.cluster`: a `Job`
and a `Trajectory` are plain data, and the loop does not look behind `start`, `poll` and `push`. The
ledger stays with the loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from glm45_jax.envs.types import Env, Task
from glm45_jax.model.config import ModelConfig
from glm45_jax.rl.lease import Prompt
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.rollout import weights
from glm45_jax.rollout.episode import Episode, Episodes
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.weights import Parcel, Push

WAIT_S = 0.02  # of a thread for work, and of the loop for what a thread has done


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One sample of a prompt. key: with `sample` unique among jobs under way. begun: what an
    aborted try has, to go on from.
    """

    key: str
    prompt: Prompt
    sample: int
    sampling: Sampling
    begun: Trajectory | None = None

    @property
    def name(self) -> tuple[str, int]:
        """Unique among jobs under way."""
        return self.key, self.sample


Done = tuple[Job, Trajectory]


class WorkersError(RuntimeError):
    """Who samples is gone and does not come back. After `abort`, `poll` gives all jobs back."""


class Workers(Protocol):
    """Samplers of one policy."""

    @property
    def running(self) -> int:
        """Jobs that `poll` has not given back."""

    def start(self, job: Job) -> None:
        """None; the job is under way. Raises: ValueError for one whose name is under way."""

    def poll(self) -> list[Done]:
        """Jobs that ended, in any order; waits or works a little. Every job comes back once, with
        status "error" or "aborted" where it could not end. Raises: WorkersError.
        """

    def push(self, params: Any, version: int) -> None:
        """None; later tokens are drawn by these weights, of which no buffer is kept.

        Raises: WorkersError.
        """

    def abort(self) -> None:
        """None; what is under way comes back soon, as it is."""

    def counts(self) -> Mapping[str, float]:
        """What was done since the start, in numbers that only grow: tokens drawn, seconds spent,
        episodes, those of them that a rendering of their messages does not give (inexact).
        """

    def close(self) -> None:
        """None; threads and machines are given back."""


class Local:
    """One driver in this thread. envs: by name. cfg: of the engine's model. to: where the engine's
    weights lie. how: a push goes. at_close: gives back what else there is.
    """

    def __init__(
        self,
        episodes: Episodes,
        envs: Mapping[str, Env],
        *,
        cfg: ModelConfig,
        to: Any = None,
        how: Push = Push(),
        at_close: Callable[[], object] = bool,
    ) -> None:
        self.episodes, self._at_close = episodes, at_close
        self._envs, self._cfg, self._to, self._how = dict(envs), cfg, to, how
        self._jobs: dict[tuple[str, int], Job] = {}
        self._last: tuple[tuple[str, int], Task] | None = None
        self._counts = dict.fromkeys(("episodes", "inexact", "tokens", "seconds"), 0.0)

    @property
    def running(self) -> int:
        """Jobs that `poll` has not given back."""
        return len(self._jobs)

    def start(self, job: Job) -> None:
        """As `Workers`. Raises: ValueError for an environment that is not here."""
        if job.prompt.env not in self._envs:
            raise ValueError(f"environment {job.prompt.env!r} is none of {sorted(self._envs)}")
        if job.name in self._jobs:
            raise ValueError(f"job {job.name} is under way; give each a key of its own")
        env = self._envs[job.prompt.env]
        task = self._task(env, job.prompt)
        begun = None
        if job.begun is not None and job.begun.sampled_T.any():
            begun = _episode(job.begun, len(task.messages))
        self.episodes.start(job.name, env, task, job.sampling, begun=begun)
        self._jobs[job.name] = job

    def _task(self, env: Env, prompt: Prompt) -> Task:
        """Samples of a group start one after another: their task is drawn once."""
        wanted = prompt.env, prompt.number
        if self._last is None or self._last[0] != wanted:
            self._last = wanted, env.tasks(prompt.number)
        return self._last[1]

    def poll(self) -> list[Done]:
        """One tick of the driver."""
        began = time.monotonic()
        before = self.episodes.driver.stats.output_tokens
        done = []
        for name, episode in self.episodes.tick():
            job = self._jobs.pop(name)  # type: ignore[call-overload]
            self._counts["episodes"] += 1
            self._counts["inexact"] += not episode.exact
            done.append((job, trajectory_of(episode, job)))
        self._counts["tokens"] += self.episodes.driver.stats.output_tokens - before
        self._counts["seconds"] += time.monotonic() - began
        return done

    def push(self, params: Any, version: int) -> None:
        """As `Workers`; copies the weights, checks that they are finite and arrive whole."""
        driver = self.episodes.driver
        weights.push(driver, params, version, cfg=self._cfg, to=self._to, how=self._how)

    def receive(self, parcel: Parcel) -> None:
        """`push` of weights that were prepared elsewhere."""
        self.episodes.driver.check_newer(parcel.version)
        staged = weights.stage(parcel, self._to)
        weights.publish(self.episodes.driver, staged, self._how.policy)

    def abort(self) -> None:
        """As `Workers`."""
        self.episodes.abort()

    def counts(self) -> Mapping[str, float]:
        """As `Workers`."""
        return dict(self._counts)

    def close(self) -> None:
        """As `Workers`."""
        self._at_close()


class Threaded:
    """A `Local` that a thread of its own ticks, so that it samples while the loop trains.

    device: where what the thread makes lies; None: the default one.
    """

    def __init__(self, local: Local, *, device: jax.Device | None = None) -> None:
        self._local, self._device = local, device
        self._asked: queue.Queue[Job] = queue.Queue()
        self._ended: queue.Queue[Done] = queue.Queue()
        self._under_way: set[tuple[str, int]] = set()
        self._stop, self._abort = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Jobs that `poll` has not given back."""
        return len(self._under_way)

    def start(self, job: Job) -> None:
        """As `Workers`."""
        if job.name in self._under_way:
            raise ValueError(f"job {job.name} is under way; give each a key of its own")
        self._under_way.add(job.name)
        self._asked.put(job)

    def poll(self) -> list[Done]:
        """As `Workers`. Raises: RuntimeError where the thread died."""
        done = []
        with contextlib.suppress(queue.Empty):
            done.append(self._ended.get(timeout=WAIT_S))
            while True:
                done.append(self._ended.get_nowait())
        if self._error is not None and not done:
            raise RuntimeError(f"the rollout thread died: {self._error!r}") from self._error
        self._under_way -= {job.name for job, _ in done}
        return done

    def push(self, params: Any, version: int) -> None:
        """As `Workers`; the copies are made in the caller's thread."""
        self._local.push(params, version)

    def abort(self) -> None:
        """As `Workers`."""
        self._abort.set()

    def counts(self) -> Mapping[str, float]:
        """As `Workers`."""
        return self._local.counts()

    def close(self) -> None:
        """None; the thread has ended."""
        self._stop.set()
        self._thread.join()
        self._local.close()

    def _run(self) -> None:
        try:
            with jax.default_device(self._device) if self._device else contextlib.nullcontext():
                while not self._stop.is_set():
                    self._turn()
        except BaseException as error:  # told to the loop by its next poll
            self._error = error

    def _turn(self) -> None:
        with contextlib.suppress(queue.Empty):
            if not self._local.running:
                self._local.start(self._asked.get(timeout=WAIT_S))
            while True:
                self._local.start(self._asked.get_nowait())
        if self._abort.is_set():
            self._abort.clear()
            self._local.abort()
        if self._local.running:
            for done in self._local.poll():
                self._ended.put(done)


def seed_of(seed: int, key: str, sample: int) -> int:
    """Seed of one sample of a prompt, below 2**32: the same in every process and every time."""
    return zlib.crc32(f"{seed}/{key}/{sample}".encode())


def trajectory_of(episode: Episode, job: Job) -> Trajectory:
    """The episode as RL keeps it; without a verdict the reward is 0."""
    verdict = episode.verdict
    return Trajectory(
        task_id=episode.task_id,
        group=job.prompt.key,
        tokens_T=episode.tokens_T,
        sampled_T=episode.sampled_T,
        logp_T=episode.logp_T,
        versions_T=episode.versions_T,
        reward=0.0 if verdict is None else verdict.reward,
        routes_TLA=episode.routes_TLA,
        messages=episode.messages,
        parts={} if verdict is None else dict(verdict.parts),
        status=episode.status,
        temperature=job.sampling.temperature,
    )


def _episode(begun: Trajectory, given: int) -> Episode:
    """What `Talk` goes on from. given: messages of the task itself."""
    said = begun.messages[given:]
    return Episode(
        task_id=begun.task_id,
        messages=begun.messages,
        tokens_T=begun.tokens_T,
        sampled_T=begun.sampled_T,
        logp_T=np.where(begun.sampled_T, begun.logp_T, 0),
        versions_T=begun.versions_T,
        status="aborted",
        turns=sum(message["role"] == "assistant" for message in said),
        routes_TLA=begun.routes_TLA,
    )
