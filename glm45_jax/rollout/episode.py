"""A policy's conversation with a world, token by token. Types to know: `Episode`, what is left of
one; `Format`, how messages are written; `Episodes`, many at once over one driver.

Nothing that was sampled is tokenised again: a next turn is the ids so far and the environment's,
whatever a rendering of the messages would give. Letters: T L A.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np

from glm45_jax import chat
from glm45_jax.envs.types import Env, Message, Task, Verdict
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.sampling import SEEDS, Sampling
from glm45_jax.rollout.types import Completion
from glm45_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Status = Literal["done", "length", "aborted", "error"]
Ask = Callable[[Sequence[int], Sampling], Completion]

SEED_STRIDE = 2_654_435_761  # 2**32 over the golden ratio: seeds of turns lie far apart
WAIT_S = 0.01  # for a judge, where the driver has nothing to do
ENDS: dict[str, Status] = {
    **{"stop": "done", "length": "length"},
    **{"cancelled": "aborted", "deadline": "aborted", "error": "error"},
}


@dataclasses.dataclass(frozen=True)
class Format:
    """How messages become ids and ids messages. thinking: as `chat.render`'s enable_thinking."""

    tokenizer: Tokenizer
    family: str = "glm-4.5"
    thinking: bool | None = None

    def prompt(self, env: Env, messages: Sequence[Message]) -> list[int]:
        """Ids of the first prompt."""
        return chat.encode(
            self.tokenizer,
            messages,
            tools=env.tools,
            enable_thinking=self.thinking,
            family=self.family,
            add_generation_prompt=True,
        ).tokens

    def bridge(self, messages: Sequence[Message], last: int | None) -> list[int]:
        """Ids of what the environment said, and of the next prompt; last: the last id sampled."""
        return chat.bridge(
            self.tokenizer,
            messages,
            last=last,
            enable_thinking=self.thinking,
            family=self.family,
        )

    def message(self, env: Env, sampled: Sequence[int]) -> dict[str, Any]:
        """The policy's message; ids of padding rows, which a young model may draw, say nothing."""
        stop, vocab = self.tokenizer.stop_ids, self.tokenizer.vocab
        inside = sampled[:-1] if sampled and sampled[-1] in stop else sampled
        text = self.tokenizer.decode([i for i in inside if i < vocab])
        opened = self.thinking is not False if chat.FAMILIES[self.family].opening else None
        parsed = chat.parse(text, tools=env.tools, family=self.family, in_think=opened)
        return parsed.message()

    def extends(self, env: Env, messages: Sequence[Message], tokens: Sequence[int]) -> bool:
        """Whether the rendered conversation is these ids, but for the last, which ended it."""
        rendered = chat.encode(
            self.tokenizer,
            messages,
            tools=env.tools,
            enable_thinking=self.thinking,
            family=self.family,
        ).tokens
        return rendered[:-1] == list(tokens[:-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """One conversation, as the engine read and drew it.

    tokens_T, sampled_T, logp_T, versions_T, routes_TLA: as in `rl.trajectory.Trajectory`; 0 and -1
    stand where the policy drew nothing. verdict: None where nothing could be judged. status:
    "length": the policy's tokens or the row ran out, which is judged too; "aborted": cancelled or
    late, `Talk` takes it up again; "error": of the engine or the environment, see `error`. turns:
    of the policy. exact: whether rendering the messages gives these tokens; False is a drift of
    format (or reasoning that the template drops), and harmless to training.
    """

    task_id: str
    messages: tuple[Message, ...]
    tokens_T: np.ndarray
    sampled_T: np.ndarray
    logp_T: np.ndarray
    versions_T: np.ndarray
    status: Status
    verdict: Verdict | None = None
    error: str = ""
    turns: int = 0
    exact: bool = True
    routes_TLA: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Reaction:
    """What a world does after a message: it says something, or judges, or fails."""

    said: tuple[Message, ...] | None = None
    verdict: Verdict | None = None
    error: str = ""


def react(env: Env, task: Task, messages: Sequence[Message], *, last: bool) -> Reaction:
    """What the world does. last: the policy has no other turn, so it only judges.

    An environment is foreign code: what it raises ends its own episode.
    """
    try:
        if not last and env.step is not None:
            said = env.step(task, messages)
            if said is not None:
                return Reaction(said=tuple(said))
        return Reaction(verdict=env.judge(task, messages))
    except Exception as error:  # of any kind: it is not our code
        log.warning("environment %s, task %s: %r", env.name, task.id, error)
        return Reaction(error=f"{type(error).__name__}: {error}")


class Talk:
    """An episode under way: `question`, then `hear` its completion, then `settle` the reaction,
    until `status` says that it is over.

    sampling: max_tokens is of all that the policy writes, over all turns; the format says where a
    turn stops. room: tokens that a row may hold. begun: an aborted episode of this task, to go on.
    prompt: ids of the first prompt, where they are known.
    """

    def __init__(
        self,
        env: Env,
        task: Task,
        format: Format,
        sampling: Sampling,
        *,
        room: int,
        begun: Episode | None = None,
        prompt: Sequence[int] | None = None,
    ) -> None:
        self.env, self.task, self.format, self.room = env, task, format, room
        self._sampling = sampling
        self.status: Status | None = None
        self.error = ""
        self._verdict: Verdict | None = None
        self._routes: list[np.ndarray] = []
        if begun is None:
            self.messages = list(task.messages)
            self.tokens = list(format.prompt(env, self.messages) if prompt is None else prompt)
            self._sampled = [False] * len(self.tokens)
            self._logp = [0.0] * len(self.tokens)
            self._versions = [-1] * len(self.tokens)
            self._turns = 0
            self._turn_at = len(self.tokens)
        else:
            self._take_up(begun)
        if self.left < 1:
            self.status = "length"

    def _take_up(self, begun: Episode) -> None:
        if begun.status != "aborted":
            raise ValueError(f"{begun.task_id} is {begun.status}; only an aborted one goes on")
        self.messages, self.tokens = list(begun.messages), begun.tokens_T.tolist()
        self._sampled, self._logp = begun.sampled_T.tolist(), begun.logp_T.tolist()
        self._versions, self._turns = begun.versions_T.tolist(), begun.turns
        given = np.flatnonzero(~begun.sampled_T)
        self._turn_at = int(given[-1]) + 1
        if begun.routes_TLA is not None:
            self._routes = [begun.routes_TLA[begun.routes_TLA.min(axis=(1, 2)) >= 0]]

    @property
    def drawn(self) -> int:
        """Tokens that the policy has written."""
        return sum(self._sampled)

    @property
    def left(self) -> int:
        """Tokens that it may still write."""
        return min(self._sampling.max_tokens - self.drawn, self.room - len(self.tokens))

    def question(self) -> tuple[list[int], Sampling]:
        """What the engine is asked next. Draws of turns are independent, and hang on the seed."""
        seed = (self._sampling.seed + SEED_STRIDE * self.drawn) % SEEDS
        stop = self.format.tokenizer.stop_ids
        asked = dataclasses.replace(self._sampling, max_tokens=self.left, stop=stop, seed=seed)
        return list(self.tokens), asked

    def hear(self, completion: Completion) -> Callable[[], Reaction] | None:
        """What has to happen before `settle`, in any thread; None where the episode is over."""
        drawn = completion.tokens_T.tolist()
        self.tokens += drawn
        self._sampled += [True] * len(drawn)
        self._logp += completion.logp_T.tolist()
        self._versions += completion.versions
        if completion.routes_TLA is not None:
            known = sum(map(len, self._routes))
            self._routes.append(completion.routes_TLA[known:])
        status = ENDS[completion.finish]
        if status in ("aborted", "error"):
            self.status, self.error = status, completion.error
            return None
        self._turns += 1
        self.messages.append(self.format.message(self.env, self.tokens[self._turn_at :]))
        if status == "length":
            self.status = status
        last = status == "length" or self._turns >= self.env.max_turns
        messages = tuple(self.messages)
        return lambda: react(self.env, self.task, messages, last=last)

    def settle(self, reaction: Reaction) -> None:
        """None; the world's words are in the conversation, or the episode is over."""
        if reaction.error:
            self.status, self.error = "error", reaction.error
        elif reaction.said is None:
            self.status, self._verdict = self.status or "done", reaction.verdict
        else:
            said = self.format.bridge(reaction.said, self.tokens[-1])
            self.messages += reaction.said
            self.tokens += said
            self._sampled += [False] * len(said)
            self._logp += [0.0] * len(said)
            self._versions += [-1] * len(said)
            self._turn_at = len(self.tokens)
            if self.left < 1:
                self._out_of_room()

    def _out_of_room(self) -> None:
        reaction = react(self.env, self.task, tuple(self.messages), last=True)
        self.status, self._verdict = "length", reaction.verdict
        if reaction.error:
            self.status, self.error = "error", reaction.error

    def episode(self) -> Episode:
        """What is left of it. Raises: ValueError where it is not over."""
        if self.status is None:
            raise ValueError(f"{self.task.id} is not over; settle its last reaction first")
        whole = self.status == "done"
        return Episode(
            task_id=self.task.id,
            messages=tuple(self.messages),
            tokens_T=np.asarray(self.tokens, np.int32),
            sampled_T=np.asarray(self._sampled, bool),
            logp_T=np.asarray(self._logp, np.float32),
            versions_T=np.asarray(self._versions, np.int32),
            status=self.status,
            verdict=self._verdict,
            error=self.error,
            turns=self._turns,
            exact=not whole or self.format.extends(self.env, self.messages, self.tokens),
            routes_TLA=self._all_routes(),
        )

    def _all_routes(self) -> np.ndarray | None:
        """Experts of every token, -1 where the engine read none."""
        if not self._routes:
            return None
        known_TLA = np.concatenate(self._routes).astype(np.int16)
        missing = len(self.tokens) - len(known_TLA)
        return np.pad(known_TLA, ((0, missing), (0, 0), (0, 0)), constant_values=-1)


def run(
    env: Env, task: Task, ask: Ask, *, format: Format, sampling: Sampling, room: int
) -> Episode:
    """One episode from its first prompt to its verdict. ask: waits for the completion.

    sampling, room: as in `Talk`.
    """
    talk = Talk(env, task, format, sampling, room=room)
    while talk.status is None:
        answer = talk.hear(ask(*talk.question()))
        if answer is not None:
            talk.settle(answer())
    return talk.episode()


def ask_driver(driver: Driver) -> Ask:
    """Asks a driver and ticks it to the end."""

    def ask(tokens: Sequence[int], sampling: Sampling) -> Completion:
        request = driver.submit(tokens, sampling)
        driver.run()
        assert request.completion is not None
        return request.completion

    return ask


class Episodes:
    """Many episodes over one driver: `start` them, `tick` until they end.

    executor: where environments step and judge; None: in the tick. deadline: seconds for a turn of
    the policy. One thread at a time.
    """

    def __init__(
        self,
        driver: Driver,
        format: Format,
        *,
        executor: concurrent.futures.Executor | None = None,
        deadline: float | None = None,
    ) -> None:
        self.driver, self._format = driver, format
        self._executor, self._deadline = executor, deadline
        self._heard: deque[tuple[Hashable, Talk, Completion]] = deque()
        self._asked: dict[Hashable, tuple[Talk, Any]] = {}
        self._judging: dict[Hashable, tuple[Talk, concurrent.futures.Future[Reaction]]] = {}
        self._ended: list[tuple[Hashable, Episode]] = []
        self._last: tuple[Env, tuple[Message, ...], list[int]] | None = None

    @property
    def running(self) -> int:
        """Episodes that `tick` has not given back."""
        heard = {key for key, _, _ in self._heard}
        return len(self._asked.keys() | self._judging.keys() | heard) + len(self._ended)

    def start(
        self,
        key: Hashable,
        env: Env,
        task: Task,
        sampling: Sampling,
        *,
        begun: Episode | None = None,
    ) -> None:
        """None; the episode is under way, and comes back from a `tick` with its key.

        Raises: ValueError for a key that is under way.
        """
        if key in self._asked or key in self._judging:
            raise ValueError(f"episode {key} is under way; give each a key of its own")
        room = self.driver.engine.max_tokens
        prompt = self._prompt(env, task) if begun is None else None
        talk = Talk(env, task, self._format, sampling, room=room, begun=begun, prompt=prompt)
        self._go_on(key, talk)

    def _prompt(self, env: Env, task: Task) -> list[int]:
        """Ids of the first prompt. Samples of a group start one after another: it is made once."""
        messages = tuple(task.messages)
        if self._last is None or self._last[0] is not env or self._last[1] != messages:
            self._last = env, messages, self._format.prompt(env, list(messages))
        return self._last[2]

    def tick(self) -> list[tuple[Hashable, Episode]]:
        """The episodes that ended, after one step of the driver."""
        if self.driver.busy:
            self.driver.tick()
        elif self._judging and not self._ended:
            futures = [future for _, future in self._judging.values()]
            concurrent.futures.wait(futures, WAIT_S, concurrent.futures.FIRST_COMPLETED)
        while self._heard:
            self._hear(*self._heard.popleft())
        for key, (talk, future) in list(self._judging.items()):
            if future.done():
                del self._judging[key]
                talk.settle(future.result())
                self._go_on(key, talk)
        while self._heard:  # what the driver refused at the door
            self._hear(*self._heard.popleft())
        ended, self._ended = self._ended, []
        return ended

    def abort(self) -> None:
        """None; what the driver has not finished ends as "aborted" with the next tick."""
        for _, request in list(self._asked.values()):
            self.driver.cancel(request)

    def _go_on(self, key: Hashable, talk: Talk) -> None:
        if talk.status is not None:
            self._ended.append((key, talk.episode()))
            return
        tokens, sampling = talk.question()
        done = self._listener(key, talk)
        request = self.driver.submit(tokens, sampling, deadline=self._deadline, on_done=done)
        if request.completion is None:
            self._asked[key] = talk, request

    def _listener(self, key: Hashable, talk: Talk) -> Callable[[Completion], None]:
        return lambda completion: self._heard.append((key, talk, completion))

    def _hear(self, key: Hashable, talk: Talk, completion: Completion) -> None:
        self._asked.pop(key, None)
        answer = talk.hear(completion)
        if answer is None:
            self._go_on(key, talk)
        elif self._executor is None:
            talk.settle(answer())
            self._go_on(key, talk)
        else:
            self._judging[key] = talk, self._executor.submit(answer)
