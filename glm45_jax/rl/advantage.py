"""Rewards of groups of samples to advantages (spec 7.2). On the host: numpy only. Letters: C J.

A rule is a value: `Centred` (the default), `Normalised`, `LeaveOneOut`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

SAME_REWARD = 1e-6  # rewards that differ by no more are equal


@dataclasses.dataclass(frozen=True)
class Centred:
    """Reward minus the mean of its group.

    No division by the deviation: it would favour groups that are nearly always or nearly never
    solved. Source: spec 7.3.4, the objective as GLM-4.5 prints it.
    """

    def advantage(self, reward_CJ: np.ndarray) -> np.ndarray:
        """float64 [C, J]."""
        return reward_CJ - reward_CJ.mean(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Normalised:
    """`Centred`, divided by the group's unbiased standard deviation + eps, as in GRPO.

    Source: spec 7.2.1 (slime's estimator and eps).
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"eps {self.eps} is negative; use 0 or more")

    def advantage(self, reward_CJ: np.ndarray) -> np.ndarray:
        """float64 [C, J]."""
        deviation_C1 = reward_CJ.std(axis=1, ddof=1, keepdims=True)
        return Centred().advantage(reward_CJ) / (deviation_C1 + self.eps)


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """Reward minus the mean of the group's other samples, an unbiased baseline.

    `Centred` times J / (J - 1). Source: Ahmadian et al. 2024 (RLOO), arXiv 2402.14740.
    """

    def advantage(self, reward_CJ: np.ndarray) -> np.ndarray:
        """float64 [C, J]."""
        J = reward_CJ.shape[1]
        return Centred().advantage(reward_CJ) * (J / (J - 1))


Rule = Centred | Normalised | LeaveOneOut


def group_advantage(reward_CJ: np.ndarray, rule: Rule = Centred()) -> np.ndarray:
    """Advantage of every sample, float32 [C, J]; exactly zero where a group agrees.

    reward_CJ: one row a prompt, J samples each, finite, any scale.

    Raises: ValueError for another shape, or a reward that is not finite.
    """
    reward_CJ = _checked(reward_CJ)
    varied_C = varies(reward_CJ)
    advantage_CJ = np.zeros(reward_CJ.shape, np.float32)
    if varied_C.any():
        advantage_CJ[varied_C] = rule.advantage(reward_CJ[varied_C])
    return advantage_CJ


def varies(reward_CJ: np.ndarray) -> np.ndarray:
    """Whether a group's samples differ in reward, bool [C]; without it there is no gradient."""
    reward_CJ = _checked(reward_CJ)
    return reward_CJ.max(axis=1) - reward_CJ.min(axis=1) > SAME_REWARD


def _checked(reward_CJ: np.ndarray) -> np.ndarray:
    reward_CJ = np.asarray(reward_CJ, np.float64)  # large common offsets leave small differences
    if reward_CJ.ndim != 2 or reward_CJ.shape[1] == 0:
        raise ValueError(f"rewards have shape {reward_CJ.shape}; give [prompts, samples of each]")
    if not np.isfinite(reward_CJ).all():
        c, j = np.argwhere(~np.isfinite(reward_CJ))[0]
        raise ValueError(
            f"reward of group {c}, sample {j} is {reward_CJ[c, j]}; "
            "drop samples whose environment failed before they get here"
        )
    return reward_CJ
