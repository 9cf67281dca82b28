"""What a client asks, checked: bodies of the OpenAI API to an `Ask`, prompts in tokens.

A request that is not understood to the last field is refused with the reason and the way out.
Types to know: `Served`, what is asked; `Ask`.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm45_jax import chat
from glm45_jax.chat.template import family_of
from glm45_jax.rollout.request import Request
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.server import messages as chat_messages
from glm45_jax.rollout.server.fields import ApiError, Fields, shown
from glm45_jax.rollout.text_stream import TokenBytes
from glm45_jax.rollout.types import SlotEngine
from glm45_jax.tokenizer import Tokenizer

MAX_CHOICES = 128  # outputs of one request, as in the OpenAI API
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1000
COMPLETION_TOKENS = 16  # of /v1/completions where nothing is said, as in the OpenAI API

_CHANGES_NOTHING = (
    *("user", "metadata", "service_tier", "safety_identifier", "store"),
    *("prompt_cache_key", "prompt_cache_retention"),
)
_NO_PENALTY = "tokens are drawn from the model's own distribution; use temperature, top_p or min_p"
_NO_GRAMMAR = "output is not held to a grammar; ask for the form in the prompt and check it"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
_UNSUPPORTED = {
    "presence_penalty": ((0,), _NO_PENALTY),
    "frequency_penalty": ((0,), _NO_PENALTY),
    "repetition_penalty": ((1,), _NO_PENALTY),
    "logit_bias": (({},), _NO_PENALTY),
}
_UNSUPPORTED_CHAT = _UNSUPPORTED | {
    "response_format": (({"type": "text"},), _NO_GRAMMAR),
    "parallel_tool_calls": ((True,), f"{_NO_GRAMMAR}; take the first call"),
    "functions": ((), "it is the old name; use tools"),
    "function_call": ((), "it is the old name; use tool_choice"),
    "reasoning_effort": ((), "chat_template_kwargs.enable_thinking turns reasoning on or off"),
    "verbosity": ((), "ask for it in the prompt"),
    "modalities": ((["text"],), "the model reads and writes text"),
    "audio": ((), "the model reads and writes text"),
    "prediction": ((), "mtp drafts are the engine's own affair"),
    "web_search_options": ((), "give the model a tool"),
}
_UNSUPPORTED_COMPLETION = _UNSUPPORTED | {
    "best_of": ((1,), "use n and choose by logprobs"),
    "suffix": ((), "write the fill-in-the-middle prompt as token ids"),
    "echo": ((False,), "put the prompt before the text; prompts are not scored"),
}
_UNSUPPORTED_TOKENS = _UNSUPPORTED | {
    "stop": ((), "stop strings are text; give stop_token_ids"),
    "stream": ((False,), "/generate answers at the end; stream by /v1/completions"),
}
_CHAT_FIELDS = (
    *("model", "messages", "tools", "tool_choice", "n", "stop", "stream", "stream_options"),
    *("logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "chat_template_kwargs"),
    *("thinking", "stop_token_ids", "ignore_eos", "return_token_ids", *_SAMPLING),
)
_COMPLETION_FIELDS = (
    *("model", "prompt", "n", "stop", "stream", "stream_options", "logprobs", "max_tokens"),
    *("allow_special", "stop_token_ids", "ignore_eos", "return_token_ids", *_SAMPLING),
)
_TOKEN_FIELDS = (
    *("model", "tokens", "n", "max_tokens", "stop_token_ids", "ignore_eos", "top_logprobs"),
    *("routes", *_SAMPLING),
)


@dataclasses.dataclass(frozen=True)
class Served:
    """The model behind the door. name: what clients call it. created: seconds since 1970."""

    name: str
    family: str
    tokenizer: Tokenizer
    engine: SlotEngine
    table: TokenBytes
    created: int

    @classmethod
    def of(cls, name: str, family: str, tokenizer: Tokenizer, engine: SlotEngine) -> Served:
        """The same with a table of its own, from now on. Raises: ValueError for the family."""
        family_of(family)
        table = TokenBytes(tokenizer)
        return cls(name, family, tokenizer, engine, table, int(time.time()))


@dataclasses.dataclass(frozen=True)
class Ask:
    """Outputs that are wanted.

    prompts: in tokens. samplings: of each prompt, one an output. stops: strings. logprobs: whether
    those of the tokens are told, and of how many likeliest ones (`top`). usage: whether a stream
    ends with counts. ids: whether tokens and versions are told. chat: whether the output is read as
    an assistant's turn, with these tools and in_think as `chat.parse` has them.
    """

    prompts: list[list[int]]
    samplings: list[list[Sampling]]
    stops: tuple[str, ...] = ()
    logprobs: bool = False
    top: int = 0
    stream: bool = False
    usage: bool = False
    ids: bool = False
    routes: bool = False
    chat: bool = False
    tools: list[dict[str, Any]] | None = None
    in_think: bool | None = None


def read_chat(body: Any, served: Served) -> Ask:
    """Of /v1/chat/completions. Raises: ApiError."""
    fields = _opened(body, served, _UNSUPPORTED_CHAT)
    messages = chat_messages.read_messages(fields)
    tools = chat_messages.read_tools(fields)
    thinking, clear = chat_messages.read_thinking(fields)
    limit = _chat_limit(fields)
    logprobs = fields.take("logprobs", bool, default=False)
    top = fields.take("top_logprobs", int, default=0)
    if top and not logprobs:
        raise fields.error("top_logprobs", "top_logprobs without logprobs; set logprobs to true")
    check_top(top, "top_logprobs", served)
    try:
        prompt = chat.encode(
            served.tokenizer,
            messages,
            tools=tools,
            enable_thinking=thinking,
            clear_thinking=clear,
            family=served.family,
            add_generation_prompt=True,
        ).tokens
    except ValueError as error:
        raise ApiError(str(error), param="messages") from None
    opened = bool(family_of(served.family).opening)
    common = _common(fields, served, [prompt], limit, _CHAT_FIELDS)
    return Ask(
        **common,
        logprobs=logprobs,
        top=top,
        chat=True,
        tools=tools,
        in_think=(thinking is not False) if opened else None,
    )


def read_completion(body: Any, served: Served) -> Ask:
    """Of /v1/completions. Raises: ApiError."""
    fields = _opened(body, served, _UNSUPPORTED_COMPLETION)
    special = fields.take("allow_special", bool, default=False)
    given = fields.must("prompt", str, list)
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given or len(given) > MAX_CHOICES:
        raise fields.error("prompt", f"{len(given)} prompts; give 1 to {MAX_CHOICES}")
    prompts = [
        served.tokenizer.encode(one, allow_special=special)
        if isinstance(one, str)
        else _tokens(one, "prompt")
        for one in given
    ]
    top = fields.take("logprobs", int)
    check_top(top or 0, "logprobs", served)
    limit = fields.take("max_tokens", int, default=COMPLETION_TOKENS)
    common = _common(fields, served, prompts, limit, _COMPLETION_FIELDS)
    return Ask(**common, logprobs=top is not None, top=top or 0)


def read_tokens(body: Any, served: Served) -> Ask:
    """Of /generate: one prompt in tokens, outputs in tokens. Raises: ApiError."""
    fields = _opened(body, served, _UNSUPPORTED_TOKENS)
    prompt = _tokens(fields.must("tokens", list), "tokens")
    top = fields.take("top_logprobs", int, default=0)
    check_top(top, "top_logprobs", served)
    routes = fields.take("routes", bool, default=False)
    if routes and not getattr(served.engine, "routes", False):
        raise fields.error("routes", "this engine keeps no routes; start the server with --routes")
    limit = fields.take("max_tokens", int)
    common = _common(fields, served, [prompt], limit, _TOKEN_FIELDS, text=False)
    return Ask(**common, top=top, routes=routes, ids=True, logprobs=True)


def check_top(top: int, param: str, served: Served) -> None:
    """Raises: ApiError where more likeliest tokens are asked for than the engine tells."""
    most = getattr(served.engine, "top_logprobs", 0)
    if top < 0:
        raise ApiError(f"{param} {top} is negative; give a count", param=param)
    if top > most:
        way_out = f"ask for at most {most}" if most else "ask for those of the drawn tokens alone"
        message = (
            f"{param} {top}: this engine tells {most} of the likeliest tokens; {way_out}, or start "
            f"the server with --top-logprobs {top}"
        )
        raise ApiError(message, param=param, code="unsupported_parameter")


def _opened(body: Any, served: Served, unsupported: Any) -> Fields:
    fields = Fields(body)
    name = fields.take("model", str)
    if name is not None and name != served.name:
        message = f"model {shown(name)} is not served here; use {shown(served.name)}"
        raise ApiError(message, param="model", code="model_not_found", status=404)
    fields.refuse(unsupported)
    fields.drop(*_CHANGES_NOTHING)
    return fields


def _chat_limit(fields: Fields) -> int | None:
    old = fields.take("max_tokens", int)
    new = fields.take("max_completion_tokens", int)
    if old is not None and new is not None and old != new:
        message = f"max_tokens {old} and max_completion_tokens {new} are two limits; give one"
        raise fields.error("max_tokens", message)
    return old if new is None else new


def _common(
    fields: Fields,
    served: Served,
    prompts: list[list[int]],
    limit: int | None,
    known: tuple[str, ...],
    *,
    text: bool = True,
) -> dict[str, Any]:
    """The fields of `Ask` that every door has; the last ones to be read."""
    found: dict[str, Any] = {}
    if text:
        found["stops"] = _stops(fields)
        found["stream"] = fields.take("stream", bool, default=False)
        found["usage"] = _include_usage(fields, found["stream"])
        found["ids"] = fields.take("return_token_ids", bool, default=False)
    n = fields.take("n", int, default=1)
    if not 1 <= n * len(prompts) <= MAX_CHOICES or n < 1:
        most = MAX_CHOICES // len(prompts)
        raise fields.error("n", f"n {n} of {len(prompts)} prompts; give 1 to {most}")
    asked = _sampling(fields, served)
    fields.close(known)
    seeds = iter(seeds_of(asked.pop("seed", None), n * len(prompts)))
    samplings = []
    for prompt in prompts:
        room = max(1, served.engine.max_tokens - len(prompt))
        length = room if limit is None else limit
        try:
            rows = [Sampling(**asked, max_tokens=length, seed=next(seeds)) for _ in range(n)]
        except ValueError as error:
            raise ApiError(str(error), param="max_tokens") from None
        check_fits(prompt, rows[0], served)
        samplings.append(rows)
    return found | {"prompts": prompts, "samplings": samplings}


def check_fits(prompt: list[int], sampling: Sampling, served: Served) -> None:
    """Raises: ApiError where the engine cannot serve it, before it waits in line for that."""
    why = Request(0, prompt, sampling).refusal(served.engine)
    if why is None:
        return
    too_long = len(prompt) + sampling.max_tokens > served.engine.max_tokens
    code = "context_length_exceeded" if too_long else None
    raise ApiError(why, param="max_tokens" if too_long else "prompt", code=code)


def seeds_of(seed: int | None, count: int) -> list[int]:
    """A seed each output; the first is the one given, so that a request for one output more repeats
    the others. Without one they are drawn.
    """
    first = secrets.randbits(32) if seed is None else seed
    rest = (np.random.SeedSequence([first, at]).generate_state(1) for at in range(1, count))
    return [first, *(int(state[0]) for state in rest)]


def _sampling(fields: Fields, served: Served) -> dict[str, Any]:
    kinds = {"temperature": float, "top_p": float, "min_p": float, "top_k": int, "seed": int}
    asked = {
        name: value
        for name, kind in kinds.items()
        if (value := fields.take(name, kind)) is not None
    }
    for name, value in asked.items():
        try:
            Sampling(**{name: value})
        except ValueError as error:
            raise fields.error(name, str(error)) from None
    ignore = fields.take("ignore_eos", bool, default=False)
    more = _tokens(fields.take("stop_token_ids", list, default=[]), "stop_token_ids")
    asked["stop"] = (*(() if ignore else served.tokenizer.stop_ids), *more)
    return asked


def _tokens(given: Any, param: str) -> list[int]:
    """Ids; whether the model has them, the engine says."""
    if not isinstance(given, list):
        raise ApiError(f"{param} holds {shown(given)}; give a list of token ids", param=param)
    for at, token in enumerate(given):
        if type(token) is not int or not 0 <= token < 2**31:
            message = f"{param}[{at}] is {shown(token)}; a token id is an integer from 0 on"
            raise ApiError(message, param=param)
    return given


def _stops(fields: Fields) -> tuple[str, ...]:
    given = fields.take("stop", str, list, default=[])
    stops: Sequence[Any] = [given] if isinstance(given, str) else given
    if len(stops) > MAX_STOPS:
        raise fields.error("stop", f"{len(stops)} stop strings; give at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise fields.error(
                "stop", f"stop {shown(stop)}: give 1 to {MAX_STOP_CHARACTERS} characters"
            )
    return tuple(stops)


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.take("stream_options", dict)
    if given is None:
        return False
    if not stream:
        raise fields.error("stream_options", "stream_options without stream; set stream to true")
    options = Fields(given, "stream_options")
    options.drop("include_obfuscation")
    usage = options.take("include_usage", bool, default=False)
    options.close(("include_usage",))
    return usage
