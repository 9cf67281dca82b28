"""The half of the RL loop that samples: leases out, trajectories back into the pool, batches for
the trainer, held-out tasks. The type to know is `Sampler`; `Prompts` says what is asked next.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from glm45_jax.rl.config import Grades, Rl, Split
from glm45_jax.rl.curriculum import Curriculum, Probe
from glm45_jax.rl.pool import Lease, Pool, Prompt
from glm45_jax.rl.temperature import stable
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.rl.workers import Job, Workers, seed_of
from glm45_jax.rollout.sampling import Sampling

# Groups that end within so many polls are committed together: a commit waits for the disk. Not
# seconds: a run that samples in the loop's thread is the same every time.
COMMIT_POLLS = 8
HELD_OUT = "held-out"  # the world of tasks that are not trained on


class StarvedError(RuntimeError):
    """Sampling does not come to a batch: nothing is left to ask, or nearly all groups agree."""


class Prompts(Protocol):
    """What is asked next: `InOrder`, or `Graded` by a curriculum."""

    def more(self, pool: Pool) -> int:
        """How many prompts it added to the end of the queue, because few wait there; 0: there are
        no more. What it has to remember it notes in the pool, in the same transaction.
        """

    def observe(self, reward: float) -> None:
        """None; told the mean reward of each batch, of all samples that ended."""

    def probes(self) -> Sequence[Probe]:
        """Tasks to be sampled after this batch without being trained, to know how hard they are."""

    def probed(self, pool: Pool, given: Sequence[tuple[Probe, Sequence[float]]], step: int) -> None:
        """None; told the rewards of the samples of each that ended, of weights of `step`."""

    def scalars(self) -> Mapping[str, float]:
        """For the metrics."""


@dataclasses.dataclass(frozen=True)
class InOrder:
    """Tasks by number, `chunk` at a time."""

    env: str
    samples: int
    split: Split
    chunk: int = 64

    def more(self, pool: Pool) -> int:
        """As `Prompts`."""
        begin = pool.note("next") or 0
        found = []
        for n in range(begin, begin + self.chunk):
            task, visit = self.split.number(n)
            found.append(Prompt(self.env, task, self.samples, f"{self.env}/{task}@{visit + 1}"))
        return pool.add(found, notes={"next": begin + self.chunk})

    def observe(self, reward: float) -> None:
        """None; order does not hang on rewards."""

    def probes(self) -> Sequence[Probe]:
        """None."""
        return ()

    def probed(self, pool: Pool, given: Sequence[tuple[Probe, Sequence[float]]], step: int) -> None:
        """None; nothing was asked."""

    def scalars(self) -> Mapping[str, float]:
        """Nothing."""
        return {}


class Graded:
    """Tasks by a curriculum, a round's worth at a time. It goes on from what the pool has noted.

    grades: when the next stage begins: where the reward stands still (`temperature.stable`).
    """

    def __init__(self, curriculum: Curriculum, pool: Pool, grades: Grades, *, groups: int) -> None:
        self.curriculum, self._grades, self._groups = curriculum, grades, groups
        self._rewards: list[float] = []
        self._filled = 0
        if (noted := pool.note("curriculum")) is not None:
            curriculum.restore(noted)

    def more(self, pool: Pool) -> int:
        """As `Prompts`."""
        self.curriculum.catch_up(pool.results(self.curriculum.seen))
        drawn = self.curriculum.draw(self.curriculum.ask_for(self._groups))
        self._filled = drawn.filled
        return pool.add(drawn.prompts, notes={"curriculum": self.curriculum.state()})

    def observe(self, reward: float) -> None:
        """None; the next stage begins where the reward stands still."""
        self._rewards = [*self._rewards, reward][-self._grades.window :]
        last = self.curriculum.stage + 1 == len(self.curriculum.stages)
        full = len(self._rewards) == self._grades.window
        if not last and full and stable(self._rewards, self._grades.tolerance):
            self.curriculum.advance()
            self._rewards = []

    def probes(self) -> Sequence[Probe]:
        """Of a stage that unseen tasks are not of, at most `grades.probe_samples` samples."""
        left, found = self._grades.probe_samples, list[Probe]()
        if self.curriculum.stages[self.curriculum.stage].unseen:
            return found
        for probe in self.curriculum.probes(left):
            if left == 0:
                break
            found.append(dataclasses.replace(probe, samples=min(left, probe.samples)))
            left -= found[-1].samples
        return found

    def probed(self, pool: Pool, given: Sequence[tuple[Probe, Sequence[float]]], step: int) -> None:
        """None; noted in the pool as well."""
        for probe, rewards in given:
            self.curriculum.record(probe.env, probe.number, rewards, step)
        pool.add((), notes={"curriculum": self.curriculum.state()})

    def scalars(self) -> Mapping[str, float]:
        """As `Prompts`. filled: of the prompts drawn last, those that are not of the stage."""
        return self.curriculum.scalars() | {"curriculum/filled": self._filled}


class Sampler:
    """Leases, jobs and the pool of one run. One thread at a time.

    finished: trajectories that ended since somebody last emptied the list, of dropped groups too.
    temperature: of samples that begin from now on.
    """

    def __init__(
        self,
        pool: Pool,
        workers: Workers,
        prompts: Prompts,
        rl: Rl,
        *,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool, self.workers, self.finished = pool, workers, list[Trajectory]()
        self.temperature = rl.sampling.temperature
        self.prompts, self._rl, self._seed, self._clock = prompts, rl, seed, clock
        self._leases: dict[str, tuple[Lease, dict[int, Trajectory]]] = {}
        self._asked: dict[tuple[str, int], Trajectory | None] = {}  # of `_answers`
        self._whole: list[tuple[Lease, dict[int, Trajectory]]] = []  # not committed yet
        self._polls = 0  # since there are any
        self._beat = clock()

    def gather(self, batch: int, *, stop: Callable[[], bool] = bool) -> list[Trajectory] | None:
        """The trajectories of this batch; None where `stop` says so first.

        Raises: StarvedError.
        """
        spent, failed, groups = 0, 0, self._rl.groups
        while (taken := self.pool.take(batch)) is None:
            ready = self.pool.counts()["ready"]
            self._fill(batch)
            while ready < groups or self._late():
                if not self._leases:
                    raise StarvedError(f"batch {batch}: no prompt waits; {self.pool.counts()}")
                ended = self._settle(stop, max(groups - ready, 1))
                if stop():
                    return None
                ready += ended.count("ready")
                spent += ended.count("dropped")
                failed += ended.count("failed")
                if failed > self._rl.most_dropped * groups:
                    raise StarvedError(
                        f"batch {batch}: {failed} groups failed for {groups}; the world or the "
                        "engine breaks on them, its errors are in the log"
                    )
                if spent > self._rl.most_dropped * groups:
                    raise StarvedError(
                        f"batch {batch}: {spent} groups were dropped for {groups}; use other "
                        "tasks, or rl.dynamic=false to train on what there is"
                    )
                if ready < groups and ended.count("ready") < len(ended):
                    self._fill(batch)
        return taken

    def _late(self) -> bool:
        """Whether a batch has to wait for groups that it may not need. In sync mode nothing is
        under way while the weights change, and the first groups in the queue's order are the batch,
        not those that were quick.
        """
        return self._rl.oversample > 0 and self.pool.rules.staleness == 0 and bool(self._leases)

    def _spare(self) -> int:
        """Groups to be under way beyond those that the batch misses: so many of them will go."""
        if not self._rl.oversample:
            return 0
        counts = self.pool.counts()
        kept = 1 + counts["ready"] + counts["taken"] + counts["trained"]
        share = counts["dropped"] / (kept + counts["dropped"])
        missed = max(self._rl.groups - counts["ready"], 0)
        return math.ceil(self._rl.oversample * missed * share / (1 - share))

    def held_out(self, numbers: Sequence[int], samples: int, sampling: Sampling) -> np.ndarray:
        """Rewards of tasks that are not trained on, [C, J]; what else is under way goes on.

        Raises: RuntimeError where an environment or the engine fails.
        """
        rewards = [one.reward for one in self.ask(numbers, samples, sampling)]
        return np.asarray(rewards, np.float64).reshape(len(numbers), samples)

    def ask(self, numbers: Sequence[int], samples: int, sampling: Sampling) -> list[Trajectory]:
        """Samples of tasks that are not trained on, task by task. Raises: as `held_out`."""
        prompts = [Prompt(HELD_OUT, n, samples, f"{HELD_OUT}/{n}") for n in numbers]
        found = self._answers(prompts, sampling)
        bad = [one for one in found if one.status in ("error", "aborted")]
        if bad:
            raise RuntimeError(f"{len(bad)} held-out episodes failed, {bad[0].task_id} among them")
        return found

    def probe(self, step: int) -> dict[str, float]:
        """For the metrics, once the tasks that `prompts` wants to know of have been sampled with
        weights of this step. A sample that failed counts as none.
        """
        asked = self.prompts.probes()
        if not asked:
            return {}
        prompts = [
            Prompt(p.env, p.number, p.samples, f"probe/{p.env}/{p.number}@{step}") for p in asked
        ]
        sampling = dataclasses.replace(self._rl.sampling, temperature=self.temperature)
        answers, given = iter(self._answers(prompts, sampling)), []
        for one in asked:
            found = itertools.islice(answers, one.samples)
            given.append((one, [t.reward for t in found if t.status in ("done", "length")]))
        self.prompts.probed(self.pool, given, step)
        return {
            "curriculum/probed": len(given),
            "curriculum/probe_samples": sum(len(rewards) for _, rewards in given),
        }

    def _answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Trajectory]:
        """Samples of prompts that no ledger knows, in their order; what else is under way goes
        on.
        """
        jobs = [
            Job(p.key, p, j, dataclasses.replace(sampling, seed=seed_of(self._seed, p.key, j)))
            for p in prompts
            for j in range(p.samples)
        ]
        self._asked = dict.fromkeys(job.name for job in jobs)
        for job in jobs:
            self.workers.start(job)
        while any(one is None for one in self._asked.values()):
            self._absorb()
        found, self._asked = self._asked, {}
        return [one for job in jobs if (one := found[job.name]) is not None]

    def park(self) -> None:
        """None; nothing is under way, and the pool has all that was drawn."""
        self.workers.abort()
        while self.workers.running:
            self._absorb()

    def _fill(self, version: int) -> None:
        """None; as many groups are under way as the capacity rule lets."""
        spare = self._spare()
        while (room := self.pool.room(version) + spare) > 0:
            leases = self.pool.lease(room, version=version, spare=spare)
            for lease in leases:
                self._leases[lease.token] = lease, {}
                for sample in lease.samples:
                    self.workers.start(self._job(lease, sample))
            if len(leases) < room and not self.prompts.more(self.pool):
                return

    def _job(self, lease: Lease, sample: int) -> Job:
        seed = seed_of(self._seed, lease.prompt.key, sample)
        sampling = dataclasses.replace(self._rl.sampling, seed=seed, temperature=self.temperature)
        return Job(lease.token, lease.prompt, sample, sampling, lease.begun.get(sample))

    def _settle(self, stop: Callable[[], bool], wanted: int) -> list[str]:
        """What became of the groups that ended now; waits for at least one, or for `stop`."""
        while not (ended := self._absorb(wanted)) and not stop():
            pass
        return ended

    def _absorb(self, wanted: int = 1) -> list[str]:
        """What became of groups whose last sample has ended: once that many have, or no other is
        under way, or `COMMIT_POLLS` after the first of them.
        """
        for job, one in self.workers.poll():
            if job.name in self._asked:
                self._asked[job.name] = one
                continue
            if job.key not in self._leases:
                continue  # the lease was lost: another try has its place
            lease, have = self._leases[job.key]
            have[job.sample] = one
            if one.status in ("done", "length"):
                self.finished.append(one)
            if len(have) == len(lease.samples):
                del self._leases[job.key]
                self._whole.append((lease, have))
        self._heartbeat()
        self._polls += bool(self._whole)
        waits = len(self._whole) < wanted and self._leases and self._polls < COMMIT_POLLS
        if not self._whole or waits:
            return []
        whole, self._whole, self._polls = self._whole, [], 0
        return list(self.pool.commit_all(whole))

    def _heartbeat(self) -> None:
        if self._clock() - self._beat < self.pool.rules.lease_s / 4:
            return
        self._beat = self._clock()
        for lost in self.pool.heartbeat([lease for lease, _ in self._leases.values()]):
            del self._leases[lost.token]
