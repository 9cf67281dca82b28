"""Environments in processes of their own: `World` is what runs there, `Worlds` asks it, `Far` is an
`Env` whose messages are answered and judged there. No jax; Ray only through what it is given.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from glm45_jax.envs.types import Env, Message, Task, Verdict

SAID = 300  # characters of an error in a message
TRIES = 3  # of a call whose process dies; it may be the call that kills it

Makers = Mapping[str, Callable[[], Env]]


def make_all(makers: Makers) -> dict[str, Env]:
    """The environments by name; one maker makes one, under however many names."""
    made = {make: make() for make in dict.fromkeys(makers.values())}
    return {name: made[make] for name, make in makers.items()}


class World:
    """All environments of a run in one process, a call at a time."""

    def __init__(self, makers: Makers) -> None:
        self._envs = make_all(makers)

    def names(self) -> list[str]:
        """Of the environments; that it answers says that they could be made."""
        return list(self._envs)

    def step(self, name: str, task: Task, messages: Sequence[Message]) -> Sequence[Message] | None:
        """What `Env.step` says."""
        step = self._envs[name].step
        assert step is not None
        return step(task, messages)

    def judge(self, name: str, task: Task, messages: Sequence[Message]) -> Verdict:
        """What `Env.judge` says."""
        return self._envs[name].judge(task, messages)


class Worlds:
    """Calls of several `World` actors in turn, from any thread. asked_again: how many calls went
    to another process because theirs died.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self.asked_again = 0
        self._actors, self._turn, self._lock = actors, itertools.count(), threading.Lock()

    def ask(self, method: str, name: str, task: Task, messages: Sequence[Message]) -> Any:
        """What the method of a `World` returns, or raises.

        Raises: RuntimeError where every process that it was asked in died.
        """
        ray = importlib.import_module("ray")
        for _ in range(TRIES):
            actor = self._actors[next(self._turn) % len(self._actors)]
            try:
                return ray.get(getattr(actor, method).remote(name, task, messages))
            except ray.exceptions.RayTaskError as error:
                raise error.cause or error from None
            except ray.exceptions.RayActorError as error:
                last = said(error)
                with self._lock:
                    self.asked_again += 1
        raise RuntimeError(f"{method} of {task.id}: {TRIES} processes died over it: {last}")


@dataclasses.dataclass(frozen=True)
class Far:
    """What an episode needs of an `Env`: its tasks are here, its steps and verdicts far away."""

    env: Env
    key: str
    worlds: Worlds

    @property
    def name(self) -> str:
        """As `Env`."""
        return self.env.name

    @property
    def tools(self) -> tuple[Mapping[str, Any], ...]:
        """As `Env`."""
        return self.env.tools

    @property
    def max_turns(self) -> int:
        """As `Env`."""
        return self.env.max_turns

    def tasks(self, n: int) -> Task:
        """As `Env`."""
        return self.env.tasks(n)

    @property
    def step(self) -> Callable[[Task, Sequence[Message]], Sequence[Message] | None] | None:
        """As `Env`."""
        return None if self.env.step is None else self._step

    def judge(self, task: Task, messages: Sequence[Message]) -> Verdict:
        """As `Env`."""
        return self.worlds.ask("judge", self.key, task, messages)

    def _step(self, task: Task, messages: Sequence[Message]) -> Sequence[Message] | None:
        return self.worlds.ask("step", self.key, task, messages)


def said(error: Exception) -> str:
    """What an actor raised or died of, in one line: Ray tells it in many, some of them coloured."""
    text = re.sub(r"\x1b\[\d+m", "", str(getattr(error, "cause", None) or error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [repr(error)]
    return " … ".join(dict.fromkeys((lines[0], lines[-1])))[:SAID]
