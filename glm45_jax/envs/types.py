"""Tasks, and the worlds that set them and judge answers: `Task`, `Env`, `Reward`, `Verdict`.

No jax: environments run in worker processes. A message is a mapping as `glm45_jax.chat` takes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked.

    id: unique in its environment and the same on every machine. prompt: a user's text, or messages.
    answer: what rewards compare with; never shown. meta: numbers and strings (say difficulty).
    """

    id: str
    prompt: str | tuple[Message, ...]
    answer: Any
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def messages(self) -> list[Message]:
        """The prompt as messages."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return list(self.prompt)


# Takes the task and the whole conversation, the policy's messages with `reasoning_content`,
# `content` and `tool_calls`. Any finite number; 1 is right and 0 is wrong where it is of that kind.
Reward = Callable[[Task, Sequence[Message]], float]


@dataclasses.dataclass(frozen=True)
class Part:
    """A named share of a reward; of weight 0 it is only reported."""

    name: str
    reward: Reward
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """reward: the weighted sum of the parts."""

    reward: float
    parts: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Env:
    """A world.

    tasks: a pure function of a number >= 0, without end; which of them are for training and which
    are held out is the caller's choice of numbers. rewards: named parts, never one opaque number.
    step: what the world says after a message of the policy, None where the episode is over; None
    for worlds of one turn. tools: their JSON schemas, as `chat.render` takes them. max_turns: of
    the policy.
    """

    name: str
    tasks: Callable[[int], Task]
    rewards: tuple[Part, ...]
    step: Callable[[Task, Sequence[Message]], Sequence[Message] | None] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    max_turns: int = 1

    def __post_init__(self) -> None:
        names = [part.name for part in self.rewards]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{self.name}: reward parts are {names}; give one or more, all named")
        if self.max_turns < 1 or (self.step is None and self.max_turns > 1):
            raise ValueError(
                f"{self.name}: max_turns {self.max_turns} needs a step, and at least 1"
            )

    def judge(self, task: Task, messages: Sequence[Message]) -> Verdict:
        """The parts of a conversation's reward, and their weighted sum.

        Raises: ValueError for a part that is not finite.
        """
        parts = {part.name: float(part.reward(task, messages)) for part in self.rewards}
        for name, value in parts.items():
            if not math.isfinite(value):
                raise ValueError(f"{self.name}, {task.id}: reward part {name} is {value}")
        return Verdict(sum(part.weight * parts[part.name] for part in self.rewards), parts)
