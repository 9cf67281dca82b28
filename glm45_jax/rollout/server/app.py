"""HTTP endpoints over a driver: the OpenAI API, tokens in and out, health, metrics, admin.

The type to know is `Service`. A request that its client has left is cancelled, streamed or not, so
that nobody holds a slot for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
import typing
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.server.answers import Answer, Choice
from glm45_jax.rollout.server.fields import ApiError, Fields, parsed, shown
from glm45_jax.rollout.server.http import (
    EventStream,
    Updates,
    application,
    note,
    read_body,
    unless_gone,
)
from glm45_jax.rollout.server.requests import (
    Ask,
    Served,
    read_chat,
    read_completion,
    read_tokens,
)
from glm45_jax.rollout.types import Policy

log = logging.getLogger(__name__)

MAX_OPEN = 4096  # outputs that run or wait; one more is refused
TELL_SECONDS = 1.0  # for clients to be told that the server ends
ADMIN_TOKEN = "GLM45_ADMIN_TOKEN"  # name of the environment variable
POLICIES = typing.get_args(Policy)


class Service:
    """The endpoints.

    admin_token: what admin calls must bring; without one they are refused. push: has the driver
    draw from the weights of a checkpoint (path, step or None for the newest, version, policy); it
    raises ValueError or OSError where they cannot be had.
    """

    def __init__(
        self,
        driver: Driver,
        served: Served,
        *,
        admin_token: str | None = None,
        push: Callable[[str, int | None, int, Policy], Awaitable[None]] | None = None,
    ) -> None:
        self._driver, self._served = driver, served
        self._admin_token, self._push = admin_token, push
        # Apart from the threads of the event loop, in which the driver ticks.
        self._pool = ThreadPoolExecutor(2, "requests")
        self._pushing = False
        self._open: dict[asyncio.Queue[Any], int] = {}
        self._closing = False
        self._counts: dict[tuple[str, int], int] = {}

    @property
    def open_outputs(self) -> int:
        """Outputs that run or wait."""
        return sum(self._open.values())

    def app(self) -> ASGIApp:
        """The ASGI application."""
        doors = {
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/generate"): self._generate,
            ("GET", "/v1/models"): self._models,
            ("GET", "/v1/models/{name:path}"): self._model,
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/admin/pause"): self._pause,
            ("POST", "/admin/resume"): self._resume,
            ("POST", "/admin/flush"): self._flush,
            ("POST", "/admin/weights"): self._weights,
        }
        return application(doors, self._counts)

    async def drain(self, seconds: float) -> None:
        """None; new requests are refused, and open outputs have so many seconds to end before they
        are cancelled and their clients told.
        """
        self._closing = True
        await self._none_open(seconds)
        for queue in self._open:
            queue.put_nowait(_closed())
        await self._none_open(TELL_SECONDS)
        self._pool.shutdown(wait=False)

    async def _none_open(self, seconds: float) -> None:
        """None, when no output is open, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def _chat(self, request: Request) -> Any:
        return await self._answered(request, read_chat)

    async def _completions(self, request: Request) -> Any:
        return await self._answered(request, read_completion)

    async def _generate(self, request: Request) -> Any:
        answer = await self._asked(request, read_tokens)
        await unless_gone(request.receive, self._finished(answer))
        return JSONResponse(answer.outputs())

    async def _answered(self, request: Request, read: Callable[[Any, Served], Ask]) -> Any:
        answer = await self._asked(request, read)
        if not answer.ask.stream:
            await unless_gone(request.receive, self._finished(answer))
            return JSONResponse(answer.whole())
        updates = self._updates(answer, live=True)
        # The first token is awaited before the status is sent: until then an error has its own.
        first = await unless_gone(request.receive, _next(updates))
        return EventStream(answer, first, updates)

    async def _asked(self, request: Request, read: Callable[[Any, Served], Ask]) -> Answer:
        """A request that is understood; reading, tokenising and checking block no one."""
        raw = await read_body(request)
        loop = asyncio.get_running_loop()
        if self._closing:
            raise _closed()
        ask = await loop.run_in_executor(self._pool, lambda: read(parsed(raw), self._served))
        answer = Answer(ask, self._served)
        note(request, answer)
        return answer

    async def _finished(self, answer: Answer) -> None:
        """None; every output of an answer has ended."""
        live = bool(answer.ask.stops)
        async with contextlib.aclosing(self._updates(answer, live=live)) as updates:
            async for _ in updates:
                pass

    async def _updates(self, answer: Answer, *, live: bool) -> AsyncGenerator[Updates]:
        """What every output of an answer tells, all that has come at a time. live: token by token,
        else at the end, which costs less. Closing it cancels what runs.

        Raises: ApiError where an output fails, too many are open, or the server is closing.
        """
        if self._closing:
            raise _closed()
        count = len(answer.choices)
        if self.open_outputs + count > MAX_OPEN:
            message = f"{self.open_outputs} outputs are open, at most {MAX_OPEN} may be; try later"
            raise ApiError(message, code="too_many_requests", status=429)
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._open[queue] = count
        tasks = [asyncio.create_task(self._run(one, queue, live)) for one in answer.choices]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)
        try:
            while count:
                items = [await queue.get()]
                while not queue.empty():
                    items.append(queue.get_nowait())
                told = [item for item in items if isinstance(item, tuple)]
                if told:
                    yield told
                for item in items:
                    if isinstance(item, ApiError):
                        raise item
                    if isinstance(item, asyncio.Task):
                        item.result()  # raises what ended it
                        count -= 1
        finally:
            del self._open[queue]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, choice: Choice, queue: asyncio.Queue[Any], live: bool) -> None:
        """None; an output has ended. Where this task is cancelled, its request is."""
        prompt, sampling = choice.prompt, choice.sampling
        if not live:
            done = await self._driver.generate(prompt, sampling)
            queue.put_nowait((choice, choice.take(done)))
            return
        async with contextlib.aclosing(self._driver.stream(prompt, sampling)) as items:
            async for item in items:
                queue.put_nowait((choice, choice.take(item)))
                if choice.finish is not None:
                    return

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._served.name:
            message = f"model {shown(name)} is not served here; use {shown(self._served.name)}"
            raise ApiError(message, param="model", code="model_not_found", status=404)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "glm45_jax",
            "max_model_len": served.engine.max_tokens,
        }

    async def _health(self, request: Request) -> Response:
        stats = self._driver.stats
        body = {"version": stats.version, "running": stats.running, "waiting": stats.waiting}
        if why := self._driver.broken:
            return JSONResponse({"status": "broken", "reason": why} | body, 503)
        if self._closing:
            return JSONResponse({"status": "closing"} | body, 503)
        paused = self._driver.paused
        return JSONResponse({"status": "paused" if paused else "ok"} | body)

    async def _metrics(self, request: Request) -> Response:
        name = "glm45_rollout_http_requests_total"
        lines = [f"# TYPE {name} counter"]
        for (path, status), count in sorted(self._counts.items()):
            lines.append(f'{name}{{path="{path}",status="{status}"}} {count}')
        text = self._driver.metrics() + "\n".join(lines) + "\n"
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _pause(self, request: Request) -> Response:
        fields = await self._admin(request)
        drain = fields.take("drain", bool, default=False)
        fields.close(("drain",))
        self._driver.pause(drain=drain)
        return JSONResponse({"status": "paused"})

    async def _resume(self, request: Request) -> Response:
        (await self._admin(request)).close()
        self._driver.resume()
        return JSONResponse({"status": "ok"})

    async def _flush(self, request: Request) -> Response:
        (await self._admin(request)).close()
        self._driver.flush()
        return JSONResponse({"status": "ok"})

    async def _weights(self, request: Request) -> Response:
        """Loads a checkpoint and has it drawn from, one at a time."""
        fields = await self._admin(request)
        path, step = fields.must("path", str), fields.take("step", int)
        version = fields.take("version", int, default=self._driver.stats.version + 1)
        policy = fields.take("policy", str, default="in_flight")
        fields.close(("path", "step", "version", "policy"))
        if policy not in POLICIES:
            raise fields.error("policy", f"policy {shown(policy)} is none of {', '.join(POLICIES)}")
        if self._push is None:
            raise ApiError("this server was started without a way to load weights", status=501)
        if self._pushing:
            raise ApiError("other weights are on their way; wait for them", status=409)
        began, self._pushing = time.monotonic(), True
        try:
            await self._push(path, step, version, policy)
        except (ValueError, OSError, RuntimeError) as error:
            raise ApiError(f"{error}; the old weights go on", param="path") from error
        finally:
            self._pushing = False
        seconds = time.monotonic() - began
        log.info("weights of version %d from %s in %.1f s", version, path, seconds)
        return JSONResponse({"version": version, "policy": policy, "seconds": seconds})

    async def _admin(self, request: Request) -> Fields:
        """The body of an admin call, which may be empty.

        Raises: ApiError for a caller without the token.
        """
        if self._admin_token is None:
            raise ApiError(
                "admin calls are off: there is no admin token; start the server with one in the "
                f"environment variable {ADMIN_TOKEN}, or in a file named by --admin-token",
                code="no_admin_token",
                status=403,
            )
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self._admin_token.encode())
        if kind.lower() != "bearer" or not same:
            message = "this needs the admin token; send it as Authorization: Bearer TOKEN"
            raise ApiError(message, code="invalid_admin_token", status=401)
        return Fields(parsed(await read_body(request) or b"{}"))


async def _next(updates: AsyncGenerator[Updates]) -> Updates:
    return await anext(updates)


def _closed() -> ApiError:
    return ApiError("the server is closing; ask another one", code="closing", status=503)
