"""Which tasks come next: two stages of difficulty, by pass@k of the policy of now (spec 7.2.2).

Where all samples of a group pass, or none, there is no gradient. Stage 1 has tasks of moderate
difficulty, stage 2 the very hard ones that can be solved at all, with verified answers only.
Types: `Tasks`, `Band`, `Stage`, the numbers; `Curriculum`, what is known. No jax.

    curriculum.catch_up(pool.results(curriculum.seen))
    drawn = curriculum.draw(curriculum.ask_for(groups))
    pool.add(drawn.prompts, notes={"curriculum": curriculum.state()})

The state is written with the prompts that it chose, in one transaction; a run that starts again
calls `curriculum.restore(pool.note("curriculum"))`.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from glm45_jax.envs.scores import pass_at_k
from glm45_jax.rl.lease import Prompt, Result

SURE = 1.645  # standard deviations: 95 of 100 rounds have enough
RECENT_GROUPS = 512  # whose share without variance says how many more to ask for
BEYOND = 1.0  # distance of a task whose pass rate is not known from a stage that needs to know


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tasks `first` to `first + count - 1` of an environment. verified: somebody, or something
    other than a model's guess, has made sure of their answers.
    """

    env: str
    count: int
    first: int = 0
    verified: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or self.first < 0:
            raise ValueError(f"{self}: count >= 1 and first >= 0")


@dataclasses.dataclass(frozen=True)
class Band:
    """low <= pass@k <= high."""

    k: int
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"{self}: k >= 1 and 0 <= low <= high <= 1")

    def distance(self, tries: int, passes: int) -> float:
        """0 inside; else how far outside pass@k is."""
        p = pass_at_k(tries, passes, self.k)
        return max(self.low - p, p - self.high, 0.0)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Tasks inside all bands. unseen: those never tried count as inside. verified: only those."""

    bands: tuple[Band, ...]
    unseen: bool = True
    verified: bool = False

    def distance(self, tries: int, passes: int) -> float:
        """0 for a task of the stage; else by how much it is too easy or too hard."""
        if not tries:
            return 0.0 if self.unseen else BEYOND
        return max(band.distance(tries, passes) for band in self.bands)


# UNVERIFIED numbers: the paper says moderate, and is remembered to say pass@8 = 0 with pass@512 > 0
# for the second. As estimates from the same tries these two exclude each other (8 of 512 is more
# than none), so 0 is "up to 8 of 512" here: 1 - (1 - 8/512)^8 = 0.12.
MODERATE = Stage((Band(1, 0.1, 0.9),))
HARD = Stage((Band(8, 0.0, 0.125), Band(512, 1e-6, 1.0)), unseen=False, verified=True)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Prompts, and how many of them are not of the stage: the nearest, because it had no more."""

    prompts: tuple[Prompt, ...]
    filled: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """A task to be sampled `samples` times more, not to be trained, to know its pass@k."""

    env: str
    number: int
    samples: int


class Curriculum:
    """What is known of the tasks, and where in them the run is. `draw` and `catch_up` change it.

    samples: of a prompt. passed: the reward from which a sample passes. window: versions of the
    weights after which a result says nothing of the policy of now (UNVERIFIED choice).

    Raises: ValueError for tasks that overlap, and for a stage that no tasks fit.
    """

    def __init__(
        self,
        tasks: Sequence[Tasks],
        *,
        samples: int,
        seed: int = 0,
        stages: Sequence[Stage] = (MODERATE, HARD),
        passed: float = 1.0,
        window: int = 100,
    ):
        self.tasks, self.stages = tuple(tasks), tuple(stages)
        self.samples, self.seed, self.passed, self.window = samples, seed, passed, window
        self.stage = self.seen = self._epoch = self._at = self._version = 0
        self._tallies: dict[int, list[list[int]]] = {}  # [version, tries, passes] of each task
        self._visits: dict[int, int] = {}
        self._kept: list[int] = []  # 1 for a group that was kept, 0 for one without variance
        self._starts = list(itertools.accumulate((one.count for one in tasks), initial=0))
        self._orders: dict[int, np.ndarray] = {}
        _check(self.tasks, self.stages, samples)

    @property
    def size(self) -> int:
        """Number of tasks."""
        return self._starts[-1]

    def ask_for(self, groups: int) -> int:
        """How many prompts to begin so that `groups` of them have variance, 19 times of 20."""
        return oversampled(groups, kept=sum(self._kept), tried=len(self._kept))

    def draw(self, n: int) -> Drawn:
        """n prompts of n tasks. A lap goes through all tasks of the stage, each lap in an order of
        its own. Where less than n are of the stage, the nearest to it fill up: nothing starves.

        Raises: ValueError for more prompts than there are tasks that may be used.
        """
        chosen: list[int] = []
        for _ in range(2 * self.size):  # a lap from anywhere may meet a task twice
            if len(chosen) == n:
                break
            task = self._next()
            if task not in chosen and self._usable(task) and not self._distance(task):
                chosen.append(task)
        filled = n - len(chosen)
        if filled:
            chosen += self._nearest(filled, set(chosen))
        return Drawn(tuple(self._prompt(task) for task in chosen), filled)

    def probes(self, n: int) -> list[Probe]:
        """Up to n tasks that may be of this stage, which more tries would tell: in a band so far,
        and with fewer tries than its largest k. For stage 2, before it begins and during it.
        """
        k = max(band.k for band in self.stages[self.stage].bands)
        found: list[Probe] = []
        for task in self._order(self._epoch).tolist():
            tries, passes = self._tally(task)
            if len(found) < n and tries < k and self._usable(task) and self._may_be(tries, passes):
                found.append(Probe(*self._place(task), k - tries))
        return found

    def record(self, env: str, number: int, rewards: Sequence[float], version: int) -> None:
        """Counts samples of a task, of weights of this version.

        Raises: ValueError for a task that is not of this curriculum.
        """
        task = self._index(env, number)
        if task is None:
            raise ValueError(f"{env} has no task {number} here; tasks are {self.tasks}")
        self._version = max(self._version, version)
        tally = self._tallies.setdefault(task, [])
        passes = sum(reward >= self.passed for reward in rewards)
        tally.append([version, len(rewards), passes])
        tally[:] = [one for one in tally if one[0] >= self._version - self.window]

    def catch_up(self, results: Iterable[Result]) -> None:
        """Records what the pool has finished; tasks of others (canaries, say) are passed over."""
        for one in results:
            self.seen = max(self.seen, one.finished)
            if self._index(one.prompt.env, one.prompt.number) is None:
                continue
            self.record(one.prompt.env, one.prompt.number, one.rewards, one.versions[1])
            if one.state != "failed":
                self._kept = [*self._kept, int(one.why != "no_variance")][-RECENT_GROUPS:]

    def advance(self) -> None:
        """Goes to the next stage, for good: where the reward of this one stands still.

        Raises: ValueError on the last.
        """
        if self.stage + 1 == len(self.stages):
            raise ValueError(f"stage {self.stage} is the last of {len(self.stages)}")
        self.stage += 1

    def scalars(self) -> dict[str, float]:
        """For the metrics: tasks by what is known of them."""
        distances = [self._distance(task) for task in self._tallies if self._usable(task)]
        return {
            "curriculum/stage": self.stage + 1,
            "curriculum/lap": self._epoch,
            "curriculum/tried": len(self._tallies),
            "curriculum/tried_inside": sum(not one for one in distances),
            "curriculum/kept_groups": sum(self._kept) / max(len(self._kept), 1),
        }

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "tasks": [dataclasses.astuple(one) for one in self.tasks],
            "seed": self.seed,
            "stage": self.stage,
            "seen": self.seen,
            "epoch": self._epoch,
            "at": self._at,
            "version": self._version,
            "tallies": {str(task): tally for task, tally in self._tallies.items()},
            "visits": {str(task): n for task, n in self._visits.items()},
            "kept": self._kept,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state` was read.

        Raises: ValueError for a state of other tasks or of another seed.
        """
        mine = [list(dataclasses.astuple(one)) for one in self.tasks], self.seed
        theirs = [list(one) for one in state["tasks"]], state["seed"]
        if mine != theirs:
            raise ValueError(f"the state is of tasks and seed {theirs}, these are {mine}")
        self.stage, self.seen = state["stage"], state["seen"]
        self._epoch, self._at, self._version = state["epoch"], state["at"], state["version"]
        self._tallies = {int(task): [list(b) for b in t] for task, t in state["tallies"].items()}
        self._visits = {int(task): n for task, n in state["visits"].items()}
        self._kept = list(state["kept"])

    def _next(self) -> int:
        """The next task of the lap."""
        task = int(self._order(self._epoch)[self._at])
        self._at += 1
        if self._at == self.size:
            self._epoch, self._at = self._epoch + 1, 0
        return task

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
            self._orders = {epoch: order}
        return self._orders[epoch]

    def _usable(self, task: int) -> bool:
        return self._of(task).verified or not self.stages[self.stage].verified

    def _may_be(self, tries: int, passes: int) -> bool:
        """Whether no band says already that the task is too easy."""
        bands = self.stages[self.stage].bands
        return not tries or all(pass_at_k(tries, passes, b.k) <= b.high for b in bands)

    def _nearest(self, n: int, without: set[int]) -> list[int]:
        left = [t for t in self._order(self._epoch).tolist() if self._usable(t)]
        left = sorted((t for t in left if t not in without), key=self._distance)  # stable
        if len(left) < n:
            raise ValueError(
                f"{n + len(without)} prompts, but only {len(left) + len(without)} tasks may be "
                f"used in stage {self.stage + 1}; give more tasks or ask for fewer"
            )
        return left[:n]

    def _distance(self, task: int) -> float:
        return self.stages[self.stage].distance(*self._tally(task))

    def _tally(self, task: int) -> tuple[int, int]:
        """(tries, passes) of the policy of now."""
        oldest = self._version - self.window
        recent = [one for one in self._tallies.get(task, []) if one[0] >= oldest]
        return sum(one[1] for one in recent), sum(one[2] for one in recent)

    def _prompt(self, task: int) -> Prompt:
        visit = self._visits[task] = self._visits.get(task, 0) + 1
        env, number = self._place(task)
        meta = {"stage": self.stage + 1, "visit": visit}
        return Prompt(env, number, self.samples, f"{env}/{number}@{visit}", meta)

    def _of(self, task: int) -> Tasks:
        return self.tasks[bisect.bisect_right(self._starts, task) - 1]

    def _place(self, task: int) -> tuple[str, int]:
        i = bisect.bisect_right(self._starts, task) - 1
        return self.tasks[i].env, self.tasks[i].first + task - self._starts[i]

    def _index(self, env: str, number: int) -> int | None:
        for start, one in zip(self._starts, self.tasks, strict=False):
            if one.env == env and one.first <= number < one.first + one.count:
                return start + number - one.first
        return None


def oversampled(groups: int, *, kept: int, tried: int, sure: float = SURE, most: int = 4) -> int:
    """Groups to begin so that `groups` are kept, where `kept` of the last `tried` were.

    The smallest n with mean - sure x deviation of Binomial(n, p) >= groups, p = (kept + 1) /
    (tried + 2), so that a round of bad luck is not for ever; at most `most` x groups.
    """
    p = (kept + 1) / (tried + 2)
    spread = sure * math.sqrt(p * (1 - p))
    root = (spread + math.sqrt(spread**2 + 4 * p * groups)) / (2 * p)
    return min(max(math.ceil(root**2), groups), most * groups)


def _check(tasks: tuple[Tasks, ...], stages: tuple[Stage, ...], samples: int) -> None:
    if not tasks or not stages or samples < 1:
        raise ValueError(f"{len(tasks)} tasks, {len(stages)} stages, {samples} samples: 1 or more")
    for a, b in itertools.combinations(tasks, 2):
        if a.env == b.env and a.first < b.first + b.count and b.first < a.first + a.count:
            raise ValueError(f"{a} and {b} overlap; name every task once")
    if not any(one.verified for one in tasks) and any(stage.verified for stage in stages):
        raise ValueError(
            "a stage takes only tasks with verified answers, and none are; set verified=True on "
            "those that are, or give other stages"
        )
