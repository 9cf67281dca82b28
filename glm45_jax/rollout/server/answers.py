"""Outputs as they come, to the answers of the OpenAI API, whole or in pieces.

Types to know: `Choice`, one output under way; `Answer`, all of one request. A whole answer is what
its pieces say, joined. Text of a call that the model did not finish is told as `dropped`, a field
that the API has not.
"""

from __future__ import annotations

import base64
import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm45_jax import chat
from glm45_jax.chat import Delta
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.server.fields import ApiError
from glm45_jax.rollout.server.requests import Ask, Served
from glm45_jax.rollout.text_stream import TextStream, TokenBytes, unmarked
from glm45_jax.rollout.types import Completion, Piece

LEAST_LOGPROB = -9999.0  # for -inf, which JSON has not; as in the OpenAI API
_ID_BYTES = 12


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token: its log-prob at temperature 1, the likeliest ones there, and where its text starts
    in the output.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]
    offset: int


@dataclasses.dataclass(frozen=True)
class Update:
    """What some tokens added to an output. versions: of the weights, one a token. finish: why the
    output ended, in its last update.
    """

    deltas: list[Delta]
    drawn: list[Drawn]
    versions: list[int]
    finish: str | None


class Choice:
    """One output. `take` what the driver tells until `finish` is there.

    finish: as the API says it. deltas, drawn, versions: of all that was taken. completion: the
    driver's last word, where it was heard: a stop string comes before it.
    """

    def __init__(
        self, ask: Ask, served: Served, index: int, prompt: list[int], sampling: Sampling
    ) -> None:
        self.index, self.prompt, self.sampling = index, prompt, sampling
        table = served.table
        tags = (table.tags if ask.tools else table.think_tags) if ask.chat else None
        self._text = TextStream(table, stops=ask.stops, tags=tags)
        self._reader = None
        if ask.chat:
            self._reader = chat.Stream(
                tools=ask.tools, family=served.family, in_think=ask.in_think, reading=chat.STREAMED
            )
        self._top = ask.top
        self._call_ids: dict[int, str] = {}
        self.deltas: list[Delta] = []
        self.drawn: list[Drawn] = []
        self.versions: list[int] = []
        self.finish: str | None = None
        self.completion: Completion | None = None

    @property
    def tokens(self) -> list[int]:
        """Ids that were drawn, the one that ends it included."""
        return [one.token for one in self.drawn]

    def take(self, item: Piece | Completion) -> Update:
        """What a piece adds; the whole output, which comes last, adds what was not told before.

        Raises: ApiError where the output ended by no doing of the model or the client.
        """
        told = len(self.drawn)
        if isinstance(item, Completion):
            if item.finish not in ("stop", "length"):
                raise _failure(item)
            self.completion = item
        deltas: list[Delta] = []
        for at in range(told if isinstance(item, Completion) else 0, len(item.tokens_T)):
            self.drawn.append(_drawn(item, at, self._top, self._text.length))
            self.versions.append(item.versions[at])
            deltas += self._read(self._text.feed(self.drawn[-1].token))
            if self._text.hit:
                self.finish = "stop"
                break
        if self.finish is None and isinstance(item, Completion):
            self.finish = item.finish
        if self.finish is not None:
            deltas += self._read(self._text.close())
            deltas += self._reader.close() if self._reader else []
        deltas = [_unmarked(delta) for delta in deltas]
        self.deltas += deltas
        if self.finish == "stop" and said(self.deltas).calls:
            self.finish = "tool_calls"
        return Update(deltas, self.drawn[told:], self.versions[told:], self.finish)

    def call_id(self, call: int) -> str:
        """The id that a call of this output goes by."""
        return self._call_ids.setdefault(call, f"call_{secrets.token_hex(_ID_BYTES)}")

    def _read(self, text: str) -> list[Delta]:
        if self._reader is not None:
            return self._reader.feed(text) if text else []
        return [Delta(content=text)] if text else []


@dataclasses.dataclass(frozen=True)
class Said:
    """Deltas joined. calls: (name, JSON text of the arguments) of whole calls, by number."""

    reasoning: str
    content: str
    calls: dict[int, tuple[str, str]]
    dropped: str


def said(deltas: Sequence[Delta]) -> Said:
    """What a reader of all these deltas knows."""
    names: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        if delta.call is None:
            continue
        if delta.name:
            names[delta.call], arguments[delta.call] = delta.name, []
        arguments[delta.call].append(delta.arguments)
        if delta.dropped:
            del names[delta.call], arguments[delta.call]
    calls = {call: (name, "".join(arguments[call])) for call, name in names.items()}
    return Said(
        reasoning="".join(delta.reasoning for delta in deltas),
        content="".join(delta.content for delta in deltas),
        calls=calls,
        dropped="".join(delta.dropped for delta in deltas),
    )


class Answer:
    """All outputs of one request, and the bodies that tell them."""

    def __init__(self, ask: Ask, served: Served) -> None:
        self.ask, self._served = ask, served
        self.choices = [
            Choice(ask, served, row * len(samplings) + at, prompt, sampling)
            for row, (prompt, samplings) in enumerate(zip(ask.prompts, ask.samplings, strict=True))
            for at, sampling in enumerate(samplings)
        ]
        self._id = secrets.token_hex(_ID_BYTES)
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{self._id}",
            "created": int(time.time()),
            "model": served.name,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Counts of tokens; the one that ends an output counts."""
        prompt = sum(map(len, self.ask.prompts))
        out = sum(len(choice.drawn) for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": out,
            "total_tokens": prompt + out,
        }

    def whole(self) -> dict[str, Any]:
        """The body of an answer at the end."""
        kind = "chat.completion" if self.ask.chat else "text_completion"
        body = self._head | {"object": kind, "usage": self.usage}
        body["choices"] = [self._whole(choice) for choice in self.choices]
        if self.ask.ids:
            prompts = self.ask.prompts
            body["prompt_token_ids"] = prompts[0] if len(prompts) == 1 else prompts
        return body

    def begun(self) -> list[dict[str, Any]]:
        """What a stream begins with: whose turn it is, and the prompts where ids are asked for."""
        first = {"role": "assistant", "content": ""}
        chunks = [self._chunk([self._piece(c, first)]) for c in self.choices if self.ask.chat]
        if self.ask.ids:
            prompts = self.ask.prompts
            found = {"prompt_token_ids": prompts[0] if len(prompts) == 1 else prompts}
            chunks = [chunks[0] | found, *chunks[1:]] if chunks else [self._chunk([]) | found]
        return chunks

    def chunks(self, choice: Choice, update: Update) -> list[dict[str, Any]]:
        """What an update adds to a stream; its last has the reason why the output ended."""
        told: list[Any]
        if self.ask.chat:
            told = [_chat_delta(choice, delta) for delta in update.deltas]
        else:
            told = ["".join(delta.content for delta in update.deltas)] if update.deltas else []
        facts = self._facts(update.drawn, update.versions)
        if facts and not told:
            told = [{} if self.ask.chat else ""]
        pieces = [self._piece(choice, one) for one in told]
        if pieces:
            pieces[0] |= facts
        if update.finish is not None:
            if self.ask.chat or not pieces:
                pieces.append(self._piece(choice, {} if self.ask.chat else ""))
            pieces[-1]["finish_reason"] = update.finish
        return [self._chunk([piece]) for piece in pieces]

    def ended(self) -> list[dict[str, Any]]:
        """What a stream ends with, before its `[DONE]`."""
        return [self._chunk([]) | {"usage": self.usage}] if self.ask.usage else []

    def outputs(self) -> dict[str, Any]:
        """The body of /generate: tokens with all that the engine says of them."""
        head = {"id": f"gen-{self._id}", "model": self._served.name}
        return head | {"usage": self.usage, "outputs": [self._output(c) for c in self.choices]}

    def _output(self, choice: Choice) -> dict[str, Any]:
        done = choice.completion
        assert done is not None
        output: dict[str, Any] = {
            "index": choice.index,
            "tokens": done.tokens_T.tolist(),
            "logp": done.logp_T.tolist(),
            "logp_raw": done.logp_raw_T.tolist(),
            "versions": list(done.versions),
            "finish": done.finish,
            "seed": choice.sampling.seed,
        }
        if self.ask.top:
            output["top_ids"] = [[token for token, _ in one.top] for one in choice.drawn]
            output["top_logp"] = [[logp for _, logp in one.top] for one in choice.drawn]
        if self.ask.routes:
            output["routes"] = _packed(done.routes_TLA)
        return output

    def _whole(self, choice: Choice) -> dict[str, Any]:
        found = said(choice.deltas)
        body: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish}
        body["logprobs"] = None
        body |= self._facts(choice.drawn, choice.versions)
        if not self.ask.chat:
            return body | {"text": found.content}
        message: dict[str, Any] = {"role": "assistant", "content": found.content or None}
        if not found.calls:
            message["content"] = found.content
        if found.reasoning:
            message["reasoning_content"] = found.reasoning
        if found.calls:
            message["tool_calls"] = [
                {"id": choice.call_id(call), "type": "function"}
                | {"function": {"name": name, "arguments": arguments}}
                for call, (name, arguments) in found.calls.items()
            ]
        if found.dropped:
            message["dropped"] = found.dropped
        return body | {"message": message}

    def _facts(self, drawn: Sequence[Drawn], versions: Sequence[int]) -> dict[str, Any]:
        """Log-probs and ids of tokens, where they are asked for."""
        facts: dict[str, Any] = {}
        if self.ask.logprobs and drawn:
            table = self._served.table
            facts["logprobs"] = (
                {"content": [_chat_logprob(table, one) for one in drawn], "refusal": None}
                if self.ask.chat
                else _text_logprobs(table, drawn, self.ask.top)
            )
        if self.ask.ids and drawn:
            facts["token_ids"] = [one.token for one in drawn]
            facts["versions"] = list(versions)
        return facts

    def _piece(self, choice: Choice, told: Any) -> dict[str, Any]:
        key = "delta" if self.ask.chat else "text"
        return {"index": choice.index, key: told, "logprobs": None, "finish_reason": None}

    def _chunk(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.ask.chat else "text_completion"
        body = self._head | {"object": kind, "choices": pieces}
        return body | {"usage": None} if self.ask.usage else body


def _failure(done: Completion) -> ApiError:
    if done.finish == "error":
        return ApiError(done.error, code="engine_error", status=500)
    message = f"the server ended this request ({done.finish}); send it again"
    return ApiError(message, code=done.finish, status=503)


def _drawn(item: Piece | Completion, at: int, top: int, offset: int) -> Drawn:
    likeliest: list[tuple[int, float]] = []
    if top:
        assert item.top_ids_TK is not None and item.top_logp_TK is not None
        pairs = zip(item.top_ids_TK[at, :top], item.top_logp_TK[at, :top], strict=True)
        likeliest = [(int(token), _finite(logp)) for token, logp in pairs]
    return Drawn(int(item.tokens_T[at]), _finite(item.logp_raw_T[at]), likeliest, offset)


def _finite(logp: Any) -> float:
    return max(float(logp), LEAST_LOGPROB)


def _unmarked(delta: Delta) -> Delta:
    return Delta(
        reasoning=unmarked(delta.reasoning),
        content=unmarked(delta.content),
        call=delta.call,
        name=unmarked(delta.name),
        arguments=unmarked(delta.arguments),
        dropped=unmarked(delta.dropped),
    )


def _chat_delta(choice: Choice, delta: Delta) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if delta.reasoning:
        told["reasoning_content"] = delta.reasoning
    if delta.content:
        told["content"] = delta.content
    if delta.dropped:
        told["dropped"] = delta.dropped
    if delta.call is not None and (delta.name or delta.arguments):
        call: dict[str, Any] = {"index": delta.call, "function": {"arguments": delta.arguments}}
        if delta.name:
            call |= {"id": choice.call_id(delta.call), "type": "function"}
            call["function"] = {"name": delta.name, "arguments": delta.arguments}
        told["tool_calls"] = [call]
    return told


def _chat_logprob(table: TokenBytes, one: Drawn) -> dict[str, Any]:
    top = [_token(table, token, logprob) for token, logprob in one.top]
    return _token(table, one.token, one.logprob) | {"top_logprobs": top}


def _token(table: TokenBytes, token: int, logprob: float) -> dict[str, Any]:
    return {"token": table.text(token), "logprob": logprob, "bytes": list(table.of(token))}


def _text_logprobs(table: TokenBytes, drawn: Sequence[Drawn], top: int) -> dict[str, Any]:
    likeliest = [{_key(table, token): logprob for token, logprob in one.top} for one in drawn]
    return {
        "tokens": [_key(table, one.token) for one in drawn],
        "token_logprobs": [one.logprob for one in drawn],
        "top_logprobs": likeliest if top else None,
        "text_offset": [one.offset for one in drawn],
    }


def _key(table: TokenBytes, token: int) -> str:
    """A token as text; where it is a cut character, its bytes, so that no two are the same key."""
    try:
        return table.of(token).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in table.of(token))


def _packed(routes_TLA: np.ndarray | None) -> dict[str, Any] | None:
    """An array for JSON: bytes in C order, little-endian, as base64."""
    if routes_TLA is None:
        return None
    routes_TLA = np.ascontiguousarray(routes_TLA)
    return {
        "dtype": str(routes_TLA.dtype),
        "shape": list(routes_TLA.shape),
        "base64": base64.b64encode(routes_TLA.tobytes()).decode(),
    }
