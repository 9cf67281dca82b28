"""How long answers are, and how many were cut. One longest output from the start (spec 7.2.3):
growing it in steps makes a model unlearn length that SFT has taught, and it does not come back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glm45_jax.rl.trajectory import Trajectory

OUTPUT_TOKENS = 65_536  # 64K, spec 7.2.3


def answer_tokens(one: Trajectory) -> int:
    """Tokens that the policy drew."""
    return int(one.sampled_T.sum())


def lengths(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """For the metrics: mean, median, 95th percentile and largest number of answer tokens; the share
    of samples that were cut by the longest output, their mean reward, that of the others. What has
    no samples is left out.
    """
    if not trajectories:
        return {}
    tokens_N = np.array([answer_tokens(one) for one in trajectories])
    cut_N = np.array([one.status == "length" for one in trajectories])
    reward_N = np.array([one.reward for one in trajectories])
    scalars = {
        "length/mean": float(tokens_N.mean()),
        "length/median": float(np.median(tokens_N)),
        "length/p95": float(np.percentile(tokens_N, 95)),
        "length/max": float(tokens_N.max()),
        "length/cut": float(cut_N.mean()),
    }
    for name, of_N in (("reward_cut", cut_N), ("reward_whole", ~cut_N)):
        if of_N.any():
            scalars[f"length/{name}"] = float(reward_N[of_N].mean())
    return scalars
