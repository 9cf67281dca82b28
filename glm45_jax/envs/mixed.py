"""Worlds made of worlds: `mix` draws tasks from several, `split` keeps a share of one apart."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from glm45_jax.envs.files import held
from glm45_jax.envs.types import Env, Message, Part, Reward, Task

STRIDE = 64  # numbers of the world that one number of its side looks at first
FURTHER, TRIES = 2**40, 4096


def mix(worlds: Mapping[Env, float] | Sequence[Env], *, seed: int = 0, name: str = "mix") -> Env:
    """A world whose tasks are of the worlds, as often as their weights say (alike for a list).

    A task's meta names its world in "world", its id begins with it. Whatever parts a world has, all
    have a value: 0 where a task's world has none of that name.

    Raises: ValueError for worlds of one name, weights below 0, parts of one name that weigh
    differently, and worlds that take turns or have tools.
    """
    weights = dict(worlds) if isinstance(worlds, Mapping) else dict.fromkeys(worlds, 1.0)
    names = [world.name for world in weights]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"worlds are {names}; give one or more, all named differently")
    if min(weights.values()) < 0 or not sum(weights.values()):
        raise ValueError(f"weights are {list(weights.values())}; give none below 0, and one above")
    if talking := [w.name for w in weights if w.step or w.tools]:
        raise ValueError(f"{talking} take turns or have tools; only worlds of one answer mix")
    parts: dict[str, float] = {}
    for world in weights:
        for part in world.rewards:
            if parts.setdefault(part.name, part.weight) != part.weight:
                raise ValueError(
                    f"part {part.name} weighs {parts[part.name]} and, in {world.name}, "
                    f"{part.weight}; give it one weight, or another name"
                )
    ways = {
        part: {w.name: p.reward for w in weights for p in w.rewards if p.name == part}
        for part in parts
    }
    return Env(
        name=name,
        tasks=_Mixed(tuple(weights), tuple(weights.values()), seed),
        rewards=tuple(Part(part, _Of(ways[part]), weight) for part, weight in parts.items()),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Mixed:
    """Number to a task of one of the worlds."""

    worlds: tuple[Env, ...]
    weights: tuple[float, ...]
    seed: int

    def __call__(self, number: int) -> Task:
        draw = random.Random(f"{self.seed}/{number}")
        world = draw.choices(self.worlds, self.weights)[0]
        task = world.tasks(number)
        meta = {**task.meta, "world": world.name}
        return dataclasses.replace(task, id=f"{world.name}:{task.id}", meta=meta)


@dataclasses.dataclass(frozen=True, eq=False)
class _Of:
    """The part of the task's own world."""

    ways: Mapping[str, Reward]

    def __call__(self, task: Task, messages: Sequence[Message]) -> float:
        way = self.ways.get(task.meta["world"])
        return way(task, messages) if way else 0.0


def split(env: Env, *, held_out: bool, share: float = 1 / 8) -> Env:
    """The world with only the tasks that are held out, or only those that are not.

    Which they are is a matter of their prompts: no prompt is on both sides, whatever the numbers,
    the seed or the machine. A number of the held-out side makes 1 / share tasks on average.

    Raises: ValueError for a share that is not between 0 and 1; at a task, where a world has too few
    prompts for one to be on its side.
    """
    if not 0 < share < 1:
        raise ValueError(f"share {share} is held out; give a number between 0 and 1")
    return dataclasses.replace(env, tasks=_Side(env, held_out, share))


@dataclasses.dataclass(frozen=True, eq=False)
class _Side:
    """Number to a task on one side."""

    env: Env
    held_out: bool
    share: float

    def __call__(self, number: int) -> Task:
        near = range(number * STRIDE, (number + 1) * STRIDE)
        far = range(FURTHER + number * TRIES, FURTHER + (number + 1) * TRIES)
        for candidates in (near, far):
            for candidate in candidates:
                task = self.env.tasks(candidate)
                if held(repr(task.messages), self.share) == self.held_out:
                    return task
        raise ValueError(f"{self.env.name}: {STRIDE + TRIES} tasks are all on the other side")
