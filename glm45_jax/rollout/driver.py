"""Continuous batching for many callers: the type to know is `Driver`, an `Engine` over a
`SlotEngine`.

`tick()` is one synchronous step of a `Batcher`. What is asked of the driver (submit, cancel, push,
pause, ...) happens between two ticks: at once where none is under way, else before the next. So
every method but `tick` and `run` may be called from any thread, and nothing else locks.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import operator
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from glm45_jax.rollout.batching import Batcher
from glm45_jax.rollout.prometheus import exposition
from glm45_jax.rollout.request import Request
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Completion, Piece, Policy, SlotEngine, Stats

log = logging.getLogger(__name__)

PAUSE_S = 0.005  # between two looks of the async loop at a driver that stands still


class Driver:
    """Requests in, completions out.

    prefill_tokens: prompt tokens read in one tick before the running rows go on, at least a chunk.
    max_waiting: requests that may queue; one more fails. reuse: whether pages of rows that ended
    are kept while there is room, for later prompts that begin with the same tokens. clock: seconds.
    """

    def __init__(
        self,
        engine: SlotEngine,
        params: Any,
        *,
        version: int = 0,
        prefill_tokens: int = 1024,
        max_waiting: int = 100_000,
        reuse: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batch = Batcher(
            engine,
            params,
            version=version,
            prefill_tokens=prefill_tokens,
            max_waiting=max_waiting,
            reuse=reuse,
            clock=clock,
        )
        self._clock = clock
        self._pushed = version  # the newest version asked for
        self._seq = itertools.count()
        self._inbox: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # held by a tick
        self._door = threading.RLock()  # a callback of one request may submit the next
        self._pump: asyncio.Task[None] | None = None

    def submit(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        deadline: float | None = None,
        on_done: Callable[[Completion], None] | None = None,
        on_token: Callable[[Request], None] | None = None,
    ) -> Request:
        """The request; its `completion` comes with a later tick, or at once with finish "error"
        where the engine cannot serve it.

        deadline: seconds from now. on_done, on_token: called in the thread of the tick, the
        second after every token that `out` gained; they must not raise.

        Raises: TypeError for tokens that are not integers, ValueError for a deadline that is NaN.
        """
        if deadline is not None and math.isnan(deadline):
            raise ValueError("deadline nan is no time; give seconds from now, or None")
        expires = math.inf if deadline is None else self._clock() + deadline
        prompt = [operator.index(token) for token in tokens]
        with self._door:
            request = Request(next(self._seq), prompt, sampling, expires, on_done, on_token)
            request.arrived = self._clock()
            self._batch.unfinished[request.seq] = request
            self._post(lambda: self._batch.enter(request))
        return request

    def cancel(self, request: Request) -> None:
        """None; its slot and pages are free before the next step. Of one that has ended nothing
        changes.
        """
        self._post(lambda: self._batch.finish(request, "cancelled"))

    def push(self, params: Any, version: int, *, policy: Policy = "in_flight") -> None:
        """None; every token drawn from the next step on is of these weights.

        policy: "in_flight": running rows go on over the keys and values they have.
        "abort_and_resume": these are made anew by the new weights, from the tokens there are.
        "drain": rows that have begun end by the old weights first, and none is begun; a newer push
        takes the place of one that waits for that.

        Raises: ValueError for a version that is not newer than the last one pushed.
        """
        with self._door:
            self.check_newer(version)
            self._pushed = version
            self._post(lambda: self._batch.offer(params, version, policy))

    def check_newer(self, version: int) -> None:
        """None. Raises: ValueError for a version that is not newer than the last one pushed."""
        if version <= self._pushed:
            raise ValueError(
                f"version {version} is not newer than {self._pushed}; versions rise, so that a "
                "token's version says which weights drew it"
            )

    def pause(self, *, drain: bool = False) -> None:
        """None; no request is begun until `resume`. Running ones stand still, or with `drain` run
        to their end.
        """
        self._post(lambda: self._set(closed=True, paused=not drain))

    def resume(self) -> None:
        """None; the opposite of `pause`."""
        self._post(lambda: self._set(closed=False, paused=False))

    def flush(self) -> None:
        """None; every page is empty. Running requests wait again with the tokens they have, whose
        keys and values the weights of then will make.
        """
        self._post(self._batch.flush)

    @property
    def busy(self) -> bool:
        """Whether a request has not ended, or something asked for has not happened."""
        return bool(self._batch.unfinished or self._inbox or self._batch.drains)

    @property
    def engine(self) -> SlotEngine:
        """The engine under it."""
        return self._batch.engine

    @property
    def broken(self) -> str:
        """Why nothing is served any more; empty where all is well."""
        return self._batch.broken

    @property
    def paused(self) -> bool:
        """Whether a `pause` holds requests back."""
        return self._batch.closed or self._batch.paused

    @property
    def stats(self) -> Stats:
        """Numbers of now, a copy."""
        return self._batch.stats

    @property
    def pages_by_version(self) -> dict[int | None, int]:
        """Pages of the cache in use, held or kept, by the version of the weights that wrote them;
        None for those that two versions wrote.
        """
        return self._batch.pages_by_version

    def metrics(self) -> str:
        """Counts, pages and times in the text format of Prometheus."""
        return exposition(self.stats, self.pages_by_version, self._batch.times)

    def tick(self) -> bool:
        """Whether there is more to do, after one step: what was asked for, deadlines, prefills, one
        token of every running row.
        """
        with self._lock:
            self._drain()
            self._batch.step()
        return self.busy

    def run(self) -> None:
        """None; ticks until every request has ended.

        Raises: RuntimeError where a pause keeps them from it.
        """
        while self.tick():
            if not self._inbox and not self._batch.moves:
                raise RuntimeError(
                    f"{len(self._batch.unfinished)} requests wait for a paused driver; resume it"
                )

    async def generate(
        self, tokens: Sequence[int], sampling: Sampling, *, deadline: float | None = None
    ) -> Completion:
        """The continuation of a prompt. A task that is cancelled cancels its request."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Completion] = loop.create_future()

        def settle(completion: Completion) -> None:
            if not done.done():
                done.set_result(completion)

        def on_done(completion: Completion) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, completion)

        request = self.submit(tokens, sampling, deadline=deadline, on_done=on_done)
        self._start(loop)
        try:
            return await done
        except asyncio.CancelledError:
            self.cancel(request)
            raise

    async def stream(
        self, tokens: Sequence[int], sampling: Sampling, *, deadline: float | None = None
    ) -> AsyncGenerator[Piece | Completion]:
        """Pieces of the continuation as they are drawn, and the whole `Completion` last. Closing
        the generator, or cancelling its task, cancels the request.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Piece | Completion] = asyncio.Queue()
        told = 0

        def tell(item: Piece | Completion) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def on_token(request: Request) -> None:
            nonlocal told
            tell(request.piece(told))
            told = len(request.out)

        request = self.submit(tokens, sampling, deadline=deadline, on_done=tell, on_token=on_token)
        self._start(loop)
        try:
            while not isinstance(item := await queue.get(), Completion):
                yield item
            yield item
        finally:
            self.cancel(request)  # of one that has ended nothing changes

    async def update(self, params: Any, version: int, *, policy: Policy = "in_flight") -> None:
        """`push`, awaited: every token that is drawn after it returns is of these weights."""
        self.push(params, version, policy=policy)
        self._start(asyncio.get_running_loop())
        while self.stats.version < version:
            await asyncio.sleep(PAUSE_S)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        """None; a task ticks, in a thread, while there is anything to do, unless one does."""
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._tick_while_busy())
            self._pump.add_done_callback(self._pump_ended)

    async def _tick_while_busy(self) -> None:
        while self.busy:  # nobody submits from this loop between the last look and the end
            await asyncio.to_thread(self.tick)
            if not self._batch.moves:
                await asyncio.sleep(PAUSE_S)

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        """A bug must not leave anyone waiting for ever, now or later."""
        if not pump.cancelled() and (error := pump.exception()):
            log.error("the rollout loop ended", exc_info=error)
            self._batch.broken = f"the rollout loop ended: {error!r}"
            for request in list(self._batch.unfinished.values()):
                self._batch.end(request, "error", self._batch.broken)

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def _drain(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _set(self, *, closed: bool, paused: bool) -> None:
        self._batch.closed, self._batch.paused = closed, paused
