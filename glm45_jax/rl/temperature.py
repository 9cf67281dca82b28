"""The sampling temperature of the rollouts, raised when the reward stands still (spec 7.2.4).

A stable mean reward means that the policy has converged and explores too little. Then a held-out
set is scored at several temperatures, and the next phase uses the largest one whose score is within
a point of the best. Types: `Dynamic`, the numbers; `Phase`, the state. Pure functions on the host.

    phase = observe(dynamic, phase, mean_reward)                # after every round
    if due(dynamic, phase):
        phase = settle(dynamic, phase, {T: score(T) for T in dynamic.grid})
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """When to look, and what to choose from. Grid, window, tolerance and period: UNVERIFIED.

    grid: temperatures, rising. within: how far below the best score the chosen one's may be; in
    points of a score from 0 to 1, or of the best score where `relative` (which of them the paper
    means by 1%: UNVERIFIED). window: rounds whose trend is looked at; the reward is stable where
    the moving mean over half of them rises and falls by less than `tolerance` a round.
    period: rounds after which the scores are asked for even if the reward moves; None: never.

    The scores' own noise has to be well below `within`: of n answers, half of them right, the
    standard error is 0.5 / sqrt(n), so a point takes thousands.
    """

    grid: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    within: float = 0.01
    relative: bool = False
    window: int = 20
    tolerance: float = 1e-3
    period: int | None = 100

    def __post_init__(self) -> None:
        if not self.grid or list(self.grid) != sorted(set(self.grid)) or self.grid[0] <= 0:
            raise ValueError(f"grid {self.grid}: give rising temperatures over 0")
        if self.within < 0 or self.tolerance < 0 or self.window < 4:
            raise ValueError(
                f"within {self.within} and tolerance {self.tolerance} >= 0, window {self.window} "
                ">= 4 rounds"
            )
        if self.period is not None and self.period < 1:
            raise ValueError(f"period {self.period}: give 1 or more rounds, or None")


@dataclasses.dataclass(frozen=True)
class Phase:
    """Where a run is. rounds: with this temperature, since the scores were looked at last; rewards:
    the mean rewards of the latest of them, not more than the window. Numbers only: JSON keeps it.
    """

    temperature: float
    rounds: int = 0
    rewards: tuple[float, ...] = ()


def observe(dynamic: Dynamic, phase: Phase, mean_reward: float) -> Phase:
    """The phase after one more round with this mean reward, of all samples, dropped ones too.

    Raises: ValueError for a reward that is not finite.
    """
    if not math.isfinite(mean_reward):
        raise ValueError(f"the mean reward of round {phase.rounds} is {mean_reward}")
    rewards = (*phase.rewards, float(mean_reward))[-dynamic.window :]
    return Phase(phase.temperature, phase.rounds + 1, rewards)


def due(dynamic: Dynamic, phase: Phase) -> bool:
    """Whether it is time to score the held-out set at every temperature of the grid."""
    if dynamic.period is not None and phase.rounds >= dynamic.period:
        return True
    return len(phase.rewards) == dynamic.window and stable(phase.rewards, dynamic.tolerance)


def settle(dynamic: Dynamic, phase: Phase, score: Mapping[float, float]) -> Phase:
    """A new phase, at the largest temperature whose score is close enough to the best.

    It may be lower than before: that is the guard. Rewards are counted anew.

    Raises: ValueError where scores are not those of the grid, or not finite.
    """
    if set(score) != set(dynamic.grid):
        raise ValueError(f"scores are of {sorted(score)}, the grid is {list(dynamic.grid)}")
    return Phase(largest(score, within=dynamic.within, relative=dynamic.relative))


def largest(score: Mapping[float, float], *, within: float, relative: bool = False) -> float:
    """max{T : score(T) >= best - within}; best x (1 - within) where relative.

    Raises: ValueError for no scores, or one that is not finite.
    """
    if not score or not all(math.isfinite(one) for one in score.values()):
        raise ValueError(f"scores by temperature are {dict(score)}; every one has to be finite")
    best = max(score.values())
    least = best - within * (abs(best) if relative else 1.0)
    slack = 1e-12  # 0.8 - 0.01 is 0.79 here, not a bit more
    return max(temperature for temperature, one in score.items() if one >= least - slack)


def stable(rewards: Sequence[float], tolerance: float) -> bool:
    """Whether the moving mean over half of the rounds has a slope within ± tolerance a round."""
    half = max(len(rewards) // 2, 1)
    means = np.convolve(rewards, np.ones(half) / half, mode="valid")
    if len(means) < 2:
        return False
    slope = np.polyfit(np.arange(len(means)), means, 1)[0]
    return bool(abs(slope) <= tolerance)
