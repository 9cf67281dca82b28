"""What is asked of a model: `EvalTask`. No jax; `Score` is that of `envs/scores.py`.

Letters: `C` tasks, `J` samples of a task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from glm45_jax.envs.scores import Score, pass_at_k
from glm45_jax.envs.types import Env
from glm45_jax.rollout.sampling import Sampling

__all__ = ["PUBLISHED", "EvalTask", "PassAt", "Reduce", "Score", "mean"]

# Rewards of all samples, [C, J], to one number a task, [C].
Reduce = Callable[[np.ndarray], np.ndarray]

# The publisher's evaluation tool (spec 9).
PUBLISHED = Sampling(temperature=0.6, top_p=0.95, max_tokens=81_920)


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
