"""What lies between HTTP and the endpoints: bodies with a limit, clients that leave, event streams,
errors in the form of the OpenAI API, one line a request in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm45_jax.rollout.server.answers import Answer, Choice, Update
from glm45_jax.rollout.server.fields import ApiError, shown

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 * 2**20
READ_BYTES = 64 * 2**20  # of a body that is too large, read so that its sender hears why
BODY_SECONDS = 60.0
SEND_SECONDS = 60.0  # a client that reads nothing for so long has left
CLIENT_GONE = 499  # in the log: nobody reads the status
_FACTS = "glm45_jax.facts"  # of a request's scope: what its line in the log says


Updates = list[tuple[Choice, Update]]


class Gone(Exception):
    """The client has left."""


def application(
    doors: Mapping[tuple[str, str], Callable[[Request], Any]], counts: dict[tuple[str, int], int]
) -> ASGIApp:
    """The ASGI application of endpoints by (method, path). counts: of requests by path and status,
    kept up to date.
    """
    routes = [Route(path, door, methods=[method]) for (method, path), door in doors.items()]
    handlers: dict[Any, Any] = {
        ApiError: _refused,
        HTTPException: _no_such_door,
        Gone: _nobody,
        Exception: _bug,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return _Logged(app, counts)


def note(request: Request, answer: Answer) -> None:
    """None; the line of this request in the log tells of the answer."""
    request.scope[_FACTS]["answer"] = answer


async def unless_gone[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; it is cancelled where the client leaves first.

    receive: of a request whose body has been read. Raises: Gone.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request) -> bytes:
    """The body. Raises: ApiError for one that is too large or too slow; Gone."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY_BYTES:
                    parts.append(part)
                elif size > READ_BYTES:
                    break
    except TimeoutError:
        message = f"the body did not come within {BODY_SECONDS:.0f} s; send it at once"
        raise ApiError(message, status=408) from None
    except ClientDisconnect:
        raise Gone from None
    if size > MAX_BODY_BYTES:
        message = (
            f"the body is larger than {MAX_BODY_BYTES} bytes; send a shorter prompt, or token ids"
        )
        raise ApiError(message, code="body_too_large", status=413)
    return b"".join(parts)


class EventStream:
    """A response of server-sent events. updates: what comes after the first; closed at the end."""

    def __init__(
        self,
        answer: Answer,
        first: Updates,
        updates: AsyncGenerator[Updates],
    ) -> None:
        self._answer, self._first, self._updates = answer, first, updates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """None; everything was told, or the client has left."""
        async with contextlib.aclosing(self._updates):
            try:
                await unless_gone(receive, self._tell(send))
            except (Gone, TimeoutError):
                scope[_FACTS]["status"] = CLIENT_GONE

    async def _tell(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers.append((b"cache-control", b"no-cache"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await _send(send, *self._answer.begun(), *self._chunks(self._first))
            async for updates in self._updates:
                await _send(send, *self._chunks(updates))
        except ApiError as error:  # the status is sent: the client is told by an event
            await _send(send, error.body())
        else:
            await _send(send, *self._answer.ended(), "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _chunks(self, updates: Updates) -> Iterator[dict[str, Any]]:
        for choice, update in updates:
            yield from self._answer.chunks(choice, update)


async def _send(send: Send, *events: Any) -> None:
    texts = (event if isinstance(event, str) else _json(event) for event in events)
    body = "".join(f"data: {text}\n\n" for text in texts).encode()
    if body:
        async with asyncio.timeout(SEND_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": True})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def _refused(request: Request, error: ApiError) -> Response:
    if error.status >= 500:
        log.error("%s: %s", request.url.path, error.message)
    return JSONResponse(error.body(), error.status)


async def _no_such_door(request: Request, error: HTTPException) -> Response:
    path = shown(request.url.path)
    if error.status_code == 405:
        allowed = " or ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        message = f"{request.method} is not a method of {path}; use {allowed}"
    else:
        message = f"there is no {path} here; /v1/chat/completions is the usual door"
    given = ApiError(message, code="unknown_url", status=error.status_code)
    return JSONResponse(given.body(), error.status_code, error.headers)


async def _nobody(request: Request, error: Gone) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _bug(request: Request, error: Exception) -> Response:
    message = f"a bug of the server: {type(error).__name__}; its log has the traceback"
    return JSONResponse(ApiError(message, status=500).body(), 500)


class _Logged:
    """One line a request in the log, and a count by path and status."""

    def __init__(self, app: Starlette, counts: dict[tuple[str, int], int]) -> None:
        self._app, self._counts = app, counts
        self._paths = {route.path for route in app.routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts: dict[str, Any] = {"status": CLIENT_GONE}
        scope[_FACTS] = facts
        began = time.monotonic()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            path, status = scope["path"], facts["status"]
            known = path if path in self._paths else "other"
            self._counts[known, status] = self._counts.get((known, status), 0) + 1
            said = "".join(_said(facts.get("answer")))
            seconds = time.monotonic() - began
            log.info("%s %s %d %.3f s%s", scope["method"], shown(path), status, seconds, said)


def _said(answer: Answer | None) -> Iterator[str]:
    if answer is not None:
        usage = answer.usage
        yield f" prompt {usage['prompt_tokens']} output {usage['completion_tokens']} finish "
        yield ",".join(choice.finish or "none" for choice in answer.choices)
