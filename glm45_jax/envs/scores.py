"""Scores and shares of passed tries: what curricula and evaluations reckon with. No jax.

Letters: `C` tasks.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


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
    def half(self) -> float:
        """Half of the 95% interval, by the normal approximation."""
        return 1.96 * self.stderr

    @property
    def interval(self) -> tuple[float, float]:
        """95%; it may reach over what a score can be."""
        return self.value - self.half, self.value + self.half

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.half:.4f} ({self.n} tasks)"


def pass_at_k(tries: int, passes: int, k: int) -> float:
    """Estimate of the chance that one of k samples passes, from `tries` samples.

    Unbiased, 1 - C(tries - passes, k) / C(tries, k), where there are k tries (Chen et al. 2021,
    arXiv 2107.03374); with fewer, 1 - (1 - passes / tries)^k, which is too low on average.

    Raises: ValueError for more passes than tries, or no tries.
    """
    if not 0 <= passes <= tries or tries < 1 or k < 1:
        raise ValueError(f"{passes} passes of {tries} tries, k {k}: give at least one of each")
    if tries < k:
        return 1 - (1 - passes / tries) ** k
    return 1 - math.prod(1 - k / i for i in range(tries - passes + 1, tries + 1))
