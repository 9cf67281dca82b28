"""Sums of whole numbers, "12+34=" and its answer alone: a world for learning runs on a CPU.

Pure ASCII, a token a character if need be. `chance` is what a policy gets that knows the answers'
distribution and nothing of the task.
"""

from __future__ import annotations

import dataclasses
import operator
import random
import re
from collections import Counter
from collections.abc import Sequence

from glm45_jax.envs.files import held
from glm45_jax.envs.rewards import Exact, said, whole
from glm45_jax.envs.types import Env, Message, Part, Task

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
TRIES = 10_000
MAX_DIGITS = 18


def env(
    *,
    digits: int = 2,
    operators: str = "+",
    held_out: bool = False,
    share: float = 1 / 8,
    seed: int = 0,
) -> Env:
    """Two numbers of exactly `digits` digits and one of the operators ("+-*").

    held_out: tasks of the share of all prompts that the other side never sees, whatever its seed.
    Parts: "answer", and "number", reported only: whether it is a number at all.
    """
    if not 1 <= digits <= MAX_DIGITS or not operators or set(operators) - set(OPERATORS):
        raise ValueError(
            f"digits {digits}, operators {operators!r}; give 1 to {MAX_DIGITS}, and some of +-*"
        )
    if not 0 < share < 1:
        raise ValueError(f"share {share} is held out; give a number between 0 and 1")
    return Env(
        name=f"arithmetic.{digits}{operators}",
        tasks=Tasks(digits, operators, held_out, share, seed),
        rewards=(Part("answer", Exact(whole)), Part("number", is_number, 0.0)),
    )


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Number of a task to task; numbers of different draws may give the same one."""

    digits: int
    operators: str
    held_out: bool
    share: float
    seed: int

    def __call__(self, number: int) -> Task:
        """The task of a number."""
        draw = random.Random(f"{self.seed}/{number}")
        least, most = _range(self.digits)
        for _ in range(TRIES):
            left, right = draw.randint(least, most), draw.randint(least, most)
            sign = draw.choice(self.operators)
            prompt = f"{left}{sign}{right}="
            if held(prompt, self.share) == self.held_out:
                answer = str(OPERATORS[sign](left, right))
                return Task(prompt, prompt, answer, {"digits": self.digits, "operator": sign})
        raise ValueError(f"no task of {self} is on its side; take more digits or another share")


def is_number(task: Task, messages: Sequence[Message]) -> float:
    """1 for a whole number in ASCII and nothing else."""
    return float(re.fullmatch(r"-?[0-9]+", said(messages).strip()) is not None)


def chance(digits: int = 2, operators: str = "+") -> float:
    """The share that the one most frequent answer gets: 0.0111 for two digits and "+" (it is 109).

    Counted over all pairs; digits up to 3.
    """
    least, most = _range(digits)
    counts = Counter(
        OPERATORS[sign](left, right)
        for sign in operators
        for left in range(least, most + 1)
        for right in range(least, most + 1)
    )
    return max(counts.values()) / counts.total()


def _range(digits: int) -> tuple[int, int]:
    return (0 if digits == 1 else 10 ** (digits - 1)), 10**digits - 1
