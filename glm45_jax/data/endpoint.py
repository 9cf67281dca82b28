"""Answers of a served model, each asked for once: an OpenAI-compatible endpoint behind a cache.

`Endpoint` is a value (address, model, limits); `Answers(endpoint, file)` asks many requests at once
and gives replies in their order. Each is kept on disk under the hash of its request, so a run that
was stopped goes on where it was and a second one costs nothing. What may pass (429, 5xx, no
connection) is tried again with growing waits; a bad answer is a `Reply` with a failure, counted and
kept like any other. Keys come from the environment and are never written.
"""

import email.utils
import hashlib
import http.client
import json
import logging
import math
import os
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

log = logging.getLogger(__name__)

ENDPOINT_FORMAT = 1  # part of every key: raise it when the same request is kept in another form

Message = Mapping[str, Any]
Body = Mapping[str, Any]  # fields of a chat completion, without the model
UNREACHABLE = "unreachable"  # the one failure that is never taken for an answer

_PASSING = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
_MISCONFIGURED = frozenset((401, 403, 404, 405))  # what every other request would get too
_KEPT_CHARS = 2000  # of a bad answer
_AHEAD = 4  # requests read ahead, times those that are out at once


class Received(NamedTuple):
    """What came back: an HTTP status, the header Retry-After ("" without), the body."""

    status: int
    retry_after: str
    text: str


class Transport(Protocol):
    """How a request gets there: `Http`, `OpenAiClient`, or one of your own, a hashable value."""

    def send(self, url: str, key: str, body: Body, timeout_s: float) -> Received:
        """Posts `body` to url/chat/completions; from several threads at once.

        Raises: OSError where nothing came back.
        """
        ...


@dataclass(frozen=True)
class Http:
    """Plain HTTP by the standard library."""

    def send(self, url: str, key: str, body: Body, timeout_s: float) -> Received:
        """One connection a request."""
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return Received(answer.status, "", answer.read().decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode("utf-8", "replace")
                return Received(error.code, error.headers.get("Retry-After", ""), text)
        except http.client.HTTPException as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class OpenAiClient:
    """The `openai` package, for what it does beyond HTTP (its proxies, certificates, logging)."""

    def send(self, url: str, key: str, body: Body, timeout_s: float) -> Received:
        """By a client of its own, without that client's retries."""
        import openai

        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
        with openai.OpenAI(
            base_url=url, api_key=key or "none", max_retries=0, timeout=timeout_s
        ) as client:
            try:
                answer = client.chat.completions.with_raw_response.create(
                    model=body["model"], messages=body["messages"], extra_body=rest
                )
            except openai.APIStatusError as error:
                retry_after = error.response.headers.get("Retry-After", "")
                return Received(error.status_code, retry_after, error.response.text)
            except openai.APIConnectionError as error:
                raise OSError(f"{type(error).__name__}: {error.__cause__ or error}") from error
            return Received(answer.status_code, "", answer.text)


@dataclass(frozen=True)
class Endpoint:
    """A model that is served somewhere.

    url: up to and with /v1. model: its name there. served: what stands behind the name, say a
    digest of the weights; both are part of the key of an answer, the url is not, since servers
    move. key_variable: of the environment, "" for a server that asks for none.
    at_once: requests that are out together. per_minute: of all attempts. attempts: for each
    request, with waits of backoff_s, doubled each time up to backoff_max_s (or as long as the
    server says). down_after: so many requests in a row that got no answer end the run.
    """

    url: str
    model: str
    served: str = ""
    key_variable: str = ""
    transport: Transport = Http()
    at_once: int = 8
    per_minute: float = math.inf
    attempts: int = 6
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    timeout_s: float = 600.0
    down_after: int = 8

    def __post_init__(self):
        if min(self.at_once, self.attempts, self.down_after) < 1 or not self.per_minute > 0:
            raise ValueError(
                f"at_once {self.at_once}, attempts {self.attempts}, down_after {self.down_after} "
                f"and per_minute {self.per_minute} must be above 0"
            )

    def key_of(self, body: Body) -> str:
        """sha256 (hex) of all that an answer depends on."""
        return hashlib.sha256(self._canonical(body).encode()).hexdigest()

    def version(self) -> str:
        """What a source that asks it depends on besides the requests."""
        return f"endpoint={ENDPOINT_FORMAT} model={self.model} served={self.served}"

    def _canonical(self, body: Body) -> str:
        parts = {"format": ENDPOINT_FORMAT, "model": self.model, "served": self.served}
        return json.dumps(parts | {"body": body}, sort_keys=True)


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn. extra: other fields of the request, as pairs."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4096
    seed: int = 0
    extra: tuple[tuple[str, Any], ...] = ()

    def body(self, messages: Sequence[Message], sample: int = 0) -> dict[str, Any]:
        """The request; each sample of one prompt has a seed, and so an answer, of its own."""
        return {
            "messages": [dict(message) for message in messages],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": self.seed + sample,
            **dict(self.extra),
        }


@dataclass(frozen=True)
class Reply:
    """An answer. failure: "" or why there is none (status_400, not_json, no_choice, no_content,
    unreachable); `detail` then holds the beginning of what came. cached: known before.

    finish: as the server says, "stop" or "length" mostly. tokens: of the completion, -1 where the
    server does not count them. calls: of tools, as they came in "tool_calls".
    """

    key: str
    content: str = ""
    reasoning: str = ""
    finish: str = ""
    tokens: int = -1
    failure: str = ""
    detail: str = ""
    cached: bool = False
    calls: Sequence[Mapping[str, Any]] = ()


class Answers:
    """Replies of an endpoint, kept in one SQLite file that processes of one machine may share.

    counts: requests, cached, sent (attempts), retried, answered, failed_*; of this object.
    """

    def __init__(self, endpoint: Endpoint, file: str | Path, *, again: bool = False):
        """Opens the file. again: ask once more for what is kept as a failure.

        Raises: ValueError where the key is not in the environment.
        """
        self._key = os.environ.get(endpoint.key_variable, "") if endpoint.key_variable else ""
        if endpoint.key_variable and not self._key:
            raise ValueError(
                f"the environment has no {endpoint.key_variable}, which {endpoint.url} needs; set "
                "it, or key_variable='' for a server without keys"
            )
        self.endpoint, self.file, self._again = endpoint, Path(file), again
        self.counts: Counter[str] = Counter()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._next_s, self._unanswered = 0.0, 0  # when the next attempt may go; in a row
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.file, timeout=60, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")  # a killed process loses nothing
        with self._db:
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS replies"
                " (key TEXT PRIMARY KEY, request TEXT, reply TEXT, failure TEXT)"
            )
        self._pool = ThreadPoolExecutor(endpoint.at_once, thread_name_prefix="ask")

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for what is out, keeps it, closes the file."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._db.close()

    def ask(self, requests: Iterable[Body]) -> Iterator[Reply]:
        """A reply to each request, in their order; the requests are read a little ahead.

        Raises: ConnectionError when `down_after` requests in a row got no answer; ValueError when
        the server refuses all requests (key, address, model). What has come until then is kept.
        """
        waiting: deque[Reply | Future[Reply]] = deque()
        out: dict[str, Future[Reply]] = {}  # a request that is out is not sent twice
        try:
            for body in requests:
                waiting.append(self._begin(body, out))
                if len(waiting) >= _AHEAD * self.endpoint.at_once:
                    yield self._finish(waiting.popleft(), out)
            while waiting:
                yield self._finish(waiting.popleft(), out)
        finally:
            for future in out.values():
                future.cancel()

    def failures(self) -> Iterator[tuple[dict[str, Any], Reply]]:
        """(request, reply) of every failure in the file, in the order of their keys."""
        with self._lock:
            found = self._db.execute(
                "SELECT request, reply FROM replies WHERE failure != '' ORDER BY key"
            ).fetchall()
        for request, reply in found:
            yield json.loads(request)["body"], Reply(**json.loads(reply))

    def _begin(self, body: Body, out: dict[str, Future[Reply]]) -> "Reply | Future[Reply]":
        self.counts["requests"] += 1
        key = self.endpoint.key_of(body)
        if key in out:
            return out[key]
        known = self._known(key)
        if known is not None:
            self.counts["cached"] += 1
            return replace(known, cached=True)
        out[key] = self._pool.submit(self._fetch, key, body)
        return out[key]

    def _finish(self, one: "Reply | Future[Reply]", out: dict[str, Future[Reply]]) -> Reply:
        if isinstance(one, Reply):
            return one
        reply = one.result()
        out.pop(reply.key, None)
        return reply

    def _known(self, key: str) -> Reply | None:
        with self._lock:
            row = self._db.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        reply = Reply(**json.loads(row[0]))
        return None if reply.failure == UNREACHABLE or (reply.failure and self._again) else reply

    def _fetch(self, key: str, body: Body) -> Reply:
        """The reply to one request after as many attempts as it takes; kept before it is given."""
        with self._lock:
            down = self._unanswered >= self.endpoint.down_after
        if down:  # another thread found it so; do not wait for the same
            raise self._down("")
        reply = self._attempts(key, body)
        with self._lock:
            with self._db:
                self._db.execute(
                    "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)",
                    (key, self.endpoint._canonical(body), json.dumps(asdict(reply)), reply.failure),
                )
            self.counts[f"failed_{reply.failure}" if reply.failure else "answered"] += 1
            self._unanswered = self._unanswered + 1 if reply.failure == UNREACHABLE else 0
            down = self._unanswered >= self.endpoint.down_after
        if down:
            raise self._down(reply.detail)
        return reply

    def _attempts(self, key: str, body: Body) -> Reply:
        said = ""
        for attempt in range(self.endpoint.attempts):
            if attempt:
                self._count("retried")
            self._wait_for_turn()
            self._count("sent")
            retry_after = ""
            try:
                status, retry_after, text = self.endpoint.transport.send(
                    self.endpoint.url,
                    self._key,
                    {"model": self.endpoint.model, **body},
                    self.endpoint.timeout_s,
                )
            except OSError as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if status in _MISCONFIGURED:
                    raise ValueError(
                        f"{self.endpoint.url} answers {status} for model {self.endpoint.model!r}: "
                        f"{text[:300]}; check url, model and key_variable"
                    )
                if status not in _PASSING:
                    return read_reply(key, status, text)
                said = f"{status}: {text[:_KEPT_CHARS]}"
            log.warning("%s, attempt %d: %s", self.endpoint.url, attempt + 1, said[:200])
            if attempt + 1 < self.endpoint.attempts:
                self._back_off(key, attempt, retry_after)
        return Reply(key, failure=UNREACHABLE, detail=said[:_KEPT_CHARS])

    def _wait_for_turn(self) -> None:
        """Until the rate allows an attempt, and no server's wish to be left alone stands."""
        with self._lock:
            at_s = max(self._next_s, time.monotonic())
            self._next_s = at_s + 60 / self.endpoint.per_minute
        if self._closed.wait(max(0.0, at_s - time.monotonic())):
            raise ConnectionError("closed while requests were waiting")

    def _back_off(self, key: str, attempt: int, retry_after: str) -> None:
        wait_s = min(self.endpoint.backoff_s * 2**attempt, self.endpoint.backoff_max_s)
        # Half to all of it, by hash: threads that failed together do not come back together.
        wait_s *= 0.5 + int(hashlib.sha256(f"{key}{attempt}".encode()).hexdigest()[:8], 16) / 2**33
        told_s = seconds_of(retry_after)
        if told_s > 0:  # then it holds for all threads
            with self._lock:
                self._next_s = max(self._next_s, time.monotonic() + told_s)
        if self._closed.wait(max(wait_s, told_s)):
            raise ConnectionError("closed while requests were waiting")

    def _count(self, name: str) -> None:
        with self._lock:
            self.counts[name] += 1

    def _down(self, said: str) -> ConnectionError:
        return ConnectionError(
            f"{self.endpoint.url}: {self.endpoint.down_after} requests in a row got no answer in "
            f"{self.endpoint.attempts} attempts each ({said[:200] or 'see above'}); what was "
            f"answered is kept in {self.file}, run again when the server is back"
        )


def read_reply(key: str, status: int, text: str) -> Reply:
    """The reply in the body of a response that is final."""

    def failed(why: str) -> Reply:
        return Reply(key, failure=why, detail=text[:_KEPT_CHARS])

    if status != 200:
        return failed(f"status_{status}")
    try:
        answer = json.loads(text)
    except ValueError:
        return failed("not_json")
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        said = [message.get(name) for name in ("content", "reasoning_content")]
    except (TypeError, KeyError, IndexError, AttributeError):
        return failed("no_choice")
    content, reasoning = (part if isinstance(part, str) else "" for part in said)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return failed("no_choice")
    if not content.strip() and not reasoning.strip() and not calls:
        return failed("no_content")
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    finish = choice.get("finish_reason")
    return Reply(
        key,
        content,
        reasoning,
        finish if isinstance(finish, str) else "",
        tokens if isinstance(tokens, int) else -1,
        calls=calls,
    )


def json_lines(content: str) -> list[str]:
    """Lines of an answer that may be JSON objects, without the fences that models put around."""
    return [line for each in content.split("\n") if (line := each.strip()).startswith("{")]


def seconds_of(retry_after: str) -> float:
    """The wait that a header Retry-After asks for, in seconds or as a date; 0 where it is neither.

    At most ten minutes: who wants more is down.
    """
    try:
        wait_s = float(retry_after)
    except ValueError:
        try:
            wait_s = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(wait_s, 0.0), 600.0) if math.isfinite(wait_s) else 0.0
