"""What is asked of a model, and what a score is: `EvalTask`, `Score`. No jax.

Letters: `C` tasks, `J` samples of a task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from glm45_jax.envs.scores import pass_at_k
from glm45_jax.envs.types import Env
from glm45_jax.rollout.sampling import Sampling

# Rewards of all samples, [C, J], to one number a task, [C].
Reduce = Callable[[np.ndarray], np.ndarray]

# The publisher's evaluation tool (spec 9).
PUBLISHED = Sampling(temperature=0.6, top_p=0.95, max_tokens=81_920)


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over tasks. stderr: its standard error, from the spread over tasks; infinite of one
    task. n: tasks.
    """

    value: float
    stderr: float
    n: int

    @staticmethod
    def of(value_C: np.ndarray) -> Score:
        """Of one number a task. Raises: ValueError for none."""
        if not len(value_C):
            raise ValueError("a score of 0 tasks; give at least 1")
        error = value_C.std(ddof=1) / np.sqrt(len(value_C)) if len(value_C) > 1 else np.inf
        return Score(float(value_C.mean()), float(error), len(value_C))

    @property
    def interval(self) -> tuple[float, float]:
        """95%, by the normal approximation; it may reach over what a score can be."""
        return self.value - 1.96 * self.stderr, self.value + 1.96 * self.stderr

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {1.96 * self.stderr:.4f} ({self.n} tasks)"


def mean(reward_CJ: np.ndarray) -> np.ndarray:
    """Avg@J: the mean reward of a task's samples."""
    return reward_CJ.mean(axis=1)


@dataclasses.dataclass(frozen=True)
class PassAt:
    """pass@k: the chance that one of k samples is right, unbiased. right: a reward from here on."""

    k: int
    right: float = 1.0

    def __call__(self, reward_CJ: np.ndarray) -> np.ndarray:
        """As `Reduce`. Raises: ValueError for fewer samples than k."""
        tries = reward_CJ.shape[1]
        if tries < self.k:
            raise ValueError(f"pass@{self.k} of {tries} samples; ask for at least {self.k}")
        passes_C = (reward_CJ >= self.right).sum(axis=1).tolist()
        return np.array([pass_at_k(tries, passes, self.k) for passes in passes_C])


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """An environment, which of its tasks, and how the rewards become a score.

    split: numbers of tasks, say `range(1000)`; held out is what training never leases. samples: of
    each task. reduce: the one number of a task.
    """

    env: Env
    split: Sequence[int]
    samples: int = 1
    sampling: Sampling = PUBLISHED
    reduce: Reduce = mean

    def __post_init__(self) -> None:
        if not len(self.split) or len(set(self.split)) != len(self.split):
            raise ValueError(
                f"{self.env.name}: {len(self.split)} tasks, {len(set(self.split))} of them "
                "different; give at least one, each once"
            )
        if self.samples < 1:
            raise ValueError(f"{self.env.name}: {self.samples} samples a task; give at least 1")
