"""Mathematics with an answer that math-verify can compare: from files, or grade-school from
reasoning-gym.

Rows are {"question", "answer"}; of a worked answer that ends in "#### 42" the 42 counts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

from glm45_jax.envs import reasoning
from glm45_jax.envs.files import Deck, Row, digest, rows, side
from glm45_jax.envs.mixed import mix
from glm45_jax.envs.rewards import Equal, Form, Read, boxed
from glm45_jax.envs.types import Env, Part, Task

ASK = r"Reason step by step, and put the final answer in \boxed{}."
GRADE_SCHOOL = ("gsm_symbolic", "chain_sum", "products", "leg_counting", "gcd", "lcm")
WITHOUT_LEVELS = frozenset({"gsm_symbolic"})


def env(
    source: str | os.PathLike | Iterable[Row],
    *,
    name: str = "math",
    ask: str = ASK,
    read: Read = boxed,
    held_out: bool | None = None,
    share: float = 1 / 8,
    seed: int = 0,
) -> Env:
    """Problems of a .jsonl file, or rows, in another order every round.

    ask: what the prompt says after the question; read: where the answer stands then. held_out: only
    the share of questions that is held out, or only the others; None takes all. Parts: "answer";
    "form", reported only. Needs math-verify.

    Raises: ValueError for no rows, or rows that lack a key.
    """
    found = rows(source, ("question", "answer"))
    if held_out is not None:
        found = rows(side(found, "question", held_out=held_out, share=share), ())
    return Env(
        name=name,
        tasks=Tasks(found, ask, Deck(len(found), seed)),
        rewards=(Part("answer", Equal(read)), Part("form", Form(read), 0.0)),
    )


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Number to task."""

    rows: tuple[Row, ...]
    ask: str
    deck: Deck

    def __call__(self, number: int) -> Task:
        """The task of a number; the same row is the same task."""
        at = self.deck(number)
        question, answer = str(self.rows[at]["question"]), final(str(self.rows[at]["answer"]))
        return Task(digest(question), f"{question.rstrip()}\n\n{self.ask}", answer, {"row": at})


def final(answer: str) -> str:
    """The answer itself, of one that may be worked out."""
    return answer.rpartition("####")[2].strip() if "####" in answer else answer.strip()


def grade_school(*datasets: str, level: int = 0, seed: int = 0) -> Env:
    """Grade-school problems without end: word problems, sums, products, divisors and multiples.

    datasets: of reasoning-gym, those with a number for an answer; `GRADE_SCHOOL` unless named.
    level: of those that have levels.
    """
    return mix([_boxed(name, level, seed) for name in datasets or GRADE_SCHOOL], seed=seed)


def _boxed(dataset: str, level: int, seed: int) -> Env:
    """reasoning-gym's tasks, asked and compared as mathematics."""
    found = reasoning.env(
        dataset, level=None if dataset in WITHOUT_LEVELS else level, seed=seed, read=boxed
    )
    if dataset in reasoning.CHECKED:
        raise ValueError(f"dataset {dataset} has many right answers; use reasoning.env")
    return dataclasses.replace(
        found,
        name=f"math.{found.name.removeprefix('reasoning.')}",
        tasks=_Asked(found),
        rewards=(Part("answer", Equal(boxed)), Part("form", Form(boxed), 0.0)),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Asked:
    """The same questions, with another request after them."""

    env: Env

    def __call__(self, number: int) -> Task:
        task = self.env.tasks(number)
        prompt = str(task.prompt).removesuffix(reasoning.ASK) + ASK
        return dataclasses.replace(task, prompt=prompt, id=digest(prompt))
