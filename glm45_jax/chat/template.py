"""Messages to text, and to ids with a loss mask.

Two formats: 4.5 and 4.6 put new lines around every block, 4.7 and 4.7-Flash do not. One writer
makes pieces that know whether they are a GLM token and whether the model writes them; `render`
joins them, `encode` and `bridge` turn them into ids. Source: spec 4.1-4.3.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from glm45_jax.tokenizer import SPECIAL_TOKENS, Tokenizer

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """How one family writes what both have."""

    newline: str  # after a role and around every block
    empty: str  # the think block of a turn without reasoning
    opening: str  # what a thinking prompt has already written of the think block
    switch: str  # what a direct prompt appends to user turns
    preserves: bool  # whether clear_thinking=False keeps earlier reasoning


_GLM45 = Family("\n", "<think></think>", "", "/nothink", False)
_GLM47 = Family("", "</think>", "<think>", "", True)
FAMILIES = {
    **dict.fromkeys(("glm-4.5", "glm-4.5-air", "glm-4.6", "glm-4.5/4.6"), _GLM45),
    **dict.fromkeys(("glm-4.7", "glm-4.7-flash"), _GLM47),
}
ROLES = ("system", "user", "assistant", "tool")

_TOOLS = """<|system|>
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_CALL_FORMAT = """</tools>

For each function call, output the function name and arguments within the following XML format:
"""
_CALL_LINES = (
    "<tool_call>{function-name}",
    "<arg_key>{arg-key-1}</arg_key>",
    "<arg_value>{arg-value-1}</arg_value>",
    "<arg_key>{arg-key-2}</arg_key>",
    "<arg_value>{arg-value-2}</arg_value>",
    "...",
    "</tool_call>",
)
_TOKEN = re.compile("(" + "|".join(re.escape(token.text) for token in SPECIAL_TOKENS) + ")")


class Encoded(NamedTuple):
    """Ids, and for each whether the model writes it (and so is trained on it)."""

    tokens: list[int]
    mask: list[bool]


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    clear_thinking: bool | None = None,
    family: str = "glm-4.5",
    add_generation_prompt: bool = True,
) -> str:
    """The prompt, character for character as the released template writes it.

    Reasoning is shown after the last user message only; clear_thinking=False keeps all of it (4.7;
    4.5 has no such mode). Where the template would print `None` or a Python dict (null content of
    an assistant, text parts of a tool message) the text is what was meant.

    Raises: ValueError for an unknown family, role or kind of content, a tool message before any
    call, or arguments that are not a mapping.
    Source: spec 4.1, 4.2.
    """
    writer = _Writer(family_of(family), enable_thinking, clear_thinking)
    writer.begin(tools)
    writer.write(messages)
    if add_generation_prompt:
        writer.prompt()
    return "".join(piece.text for piece in writer.pieces)


def encode(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    clear_thinking: bool | None = None,
    family: str = "glm-4.5",
    add_generation_prompt: bool = False,
) -> Encoded:
    """Ids of the rendered conversation and the loss mask.

    The mask covers what the model writes after a prompt of this mode: reasoning, content, calls and
    the decision to stop, which is the next role token (`<|observation|>` after calls, else
    `<|user|>`). That token is appended after a last assistant turn. What the prompt writes is not
    covered: 4.7's `<think>` or `</think>`, 4.5's empty pair when enable_thinking is False. A turn
    that does not show what the model wrote (its reasoning is dropped, or it has reasoning in direct
    mode) is not covered either: split the conversation to train on it.

    Only the template writes GLM tokens. `<|user|>` inside a message, a tool's output or an argument
    stays plain text, so nobody can forge a turn; the released tokenizer would read it as the token.
    One exception: `/nothink` at the end of a user message (4.5), which is the user's own switch.

    Raises: ValueError as `render`.
    Source: spec 4.3.
    """
    writer = _Writer(family_of(family), enable_thinking, clear_thinking)
    writer.begin(tools)
    writer.write(messages)
    if add_generation_prompt:
        writer.prompt()
    elif writer.stop:
        writer.role(writer.stop)
    return _ids(tokenizer, writer.pieces)


def bridge(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    last: int | None,
    enable_thinking: bool | None = None,
    family: str = "glm-4.5",
) -> list[int]:
    """Ids from what the model sampled to its next turn: the environment's messages and the prompt.

    last: the id sampled last. Where it is the role token that comes next, it is not repeated, so
    prompt + sampled ids + bridge is the whole conversation and nothing is tokenised twice.

    Raises: ValueError for an assistant message, and as `render`.
    """
    if any(message.get("role") == "assistant" for message in messages):
        raise ValueError("bridge got an assistant message; keep its sampled ids, pass what follows")
    writer = _Writer(family_of(family), enable_thinking, None)
    writer.called = True
    writer.write(messages)
    writer.prompt()
    tokens = _ids(tokenizer, writer.pieces).tokens
    return tokens[1:] if tokens[0] == last else tokens


class _Piece(NamedTuple):
    text: str
    token: bool  # a GLM token, written by the template
    written: bool  # by the model


class _Writer:
    """The template: pieces of text, each with who writes it."""

    def __init__(self, family: Family, thinking: bool | None, clear: bool | None):
        self.family = family
        self.direct = thinking is False
        self.keep_all = family.preserves and clear is False
        self.pieces: list[_Piece] = []
        self.called = False  # whether any assistant turn has called a tool
        self.stop = ""  # the token that ends the assistant turn just written, if it is one
        self.trained = False  # whether that turn is what the model wrote
        self.written = False

    def template(self, text: str) -> None:
        written = self.written
        self.pieces += [_Piece(part, token, written) for part, token in _parts(text)]

    def plain(self, text: str) -> None:
        self.pieces.append(_Piece(text, False, self.written))

    def role(self, token: str) -> None:
        self.written = self.trained and token == self.stop
        self.template(token)
        self.written, self.stop, self.trained = False, "", False

    def begin(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self.template("[gMASK]<sop>")
        if not tools:
            return
        self.template(_TOOLS)
        for tool in tools:
            self.plain(_json(tool) + "\n")
        self.template(_CALL_FORMAT + self.family.newline.join(_CALL_LINES))

    def prompt(self) -> None:
        self.role("<|assistant|>")
        if self.direct:
            self.template(self.family.newline + self.family.empty)
        else:
            self.template(self.family.opening)

    def write(self, messages: Sequence[Message]) -> None:
        for at, message in enumerate(messages):
            if not isinstance(message, Mapping) or message.get("role") not in ROLES:
                got = message.get("role") if isinstance(message, Mapping) else message
                raise ValueError(f"message {at}: role {got!r} is none of {', '.join(ROLES)}")
        roles = [message["role"] for message in messages]
        last_user = max((at for at, role in enumerate(roles) if role == "user"), default=-1)
        for at, (role, message) in enumerate(zip(roles, messages, strict=True)):
            where = f"message {at} ({role})"
            if role == "assistant":
                self.assistant(message, at > last_user, where)
            elif role == "tool":
                self.tool(message, at > 0 and roles[at - 1] == "tool", where)
            else:
                self.role(f"<|{role}|>")
                self.template(self.family.newline)
                self.turn(_visible(message.get("content"), where), role == "user")

    def turn(self, text: str, user: bool) -> None:
        switch = self.family.switch if user else ""
        bare = text.removesuffix(switch)
        self.plain(bare)
        if switch and (self.direct or bare != text):
            self.template(switch)

    def assistant(self, message: Message, recent: bool, where: str) -> None:
        reasoning, content = _reasoning_of(message, where)
        calls = [_call_of(call, where) for call in message.get("tool_calls") or ()]
        shown = bool(reasoning) and (recent or self.keep_all)
        newline, by_prompt = self.family.newline, bool(self.family.opening)
        self.role("<|assistant|>")
        self.trained = not (reasoning and not shown) and not (shown and self.direct)
        if shown:
            self.written = self.trained and not by_prompt
            self.template(newline + "<think>")
            self.written = self.trained
            self.plain(reasoning.strip())
            self.template("</think>")
        else:
            self.written = self.trained and not by_prompt and not self.direct
            self.template(newline + self.family.empty)
            self.written = self.trained
        if content.strip():
            self.plain(newline + content.strip())
        for name, arguments in calls:
            self.call(name, arguments)
        self.called = self.called or bool(calls)
        self.stop = "<|observation|>" if calls else "<|user|>"

    def call(self, name: str, arguments: Mapping[str, Any]) -> None:
        newline = self.family.newline
        self.template(newline + "<tool_call>")
        self.plain(name + newline)
        for key, value in arguments.items():
            self.template("<arg_key>")
            self.plain(key)
            self.template("</arg_key>" + newline + "<arg_value>")
            self.plain(value if isinstance(value, str) else _json(value))
            self.template("</arg_value>" + newline)
        self.template("</tool_call>")

    def tool(self, message: Message, after_tool: bool, where: str) -> None:
        if not self.called:
            raise ValueError(f"{where}: a tool answers before any call; add the assistant's call")
        content, newline = message.get("content"), self.family.newline
        if not after_tool or not isinstance(content, str):
            self.role("<|observation|>")
        for text in [content] if isinstance(content, str) else _outputs(content, where):
            self.template(newline + "<tool_response>" + newline)
            self.plain(text)
            self.template(newline + "</tool_response>")


@functools.lru_cache(maxsize=256)
def _parts(text: str) -> tuple[tuple[str, bool], ...]:
    """What the template writes, cut at GLM tokens; whether a part is one. It writes few texts."""
    parts = [part for part in _TOKEN.split(text) if part]
    return tuple((part, _TOKEN.fullmatch(part) is not None) for part in parts)


def _ids(tokenizer: Tokenizer, pieces: Iterable[_Piece]) -> Encoded:
    """Plain text between two GLM tokens is encoded in one go: a merge may cross two pieces."""
    tokens: list[int] = []
    mask: list[bool] = []
    waiting, written = "", False

    def put(text: str, by_model: bool) -> None:
        ids = tokenizer.encode(text)
        tokens.extend(ids)
        mask.extend([by_model] * len(ids))

    for text, token, by_model in pieces:
        if not token:
            waiting, written = waiting + text, by_model
            continue
        if waiting:
            put(waiting, written)
            waiting = ""
        tokens.append(tokenizer.id_of(text))
        mask.append(by_model)
    if waiting:
        put(waiting, written)
    return Encoded(tokens, mask)


def family_of(name: str) -> Family:
    """How the family of that name writes.

    Raises: ValueError when there is none.
    """
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is none of {', '.join(FAMILIES)}; choose one of them")
    return FAMILIES[name]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _visible(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}: content is {type(content).__name__}; give text or text parts")
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise ValueError(f"{where}: part {part!r} has no text; the model reads text only")
        texts.append(text)
    return "".join(texts)


def _outputs(content: Any, where: str) -> list[str]:
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}: content is {type(content).__name__}; give text or a list")
    return [
        str(entry["output"])
        if isinstance(entry, Mapping) and "output" in entry
        else _visible([entry], where)
        for entry in content
    ]


def _reasoning_of(message: Message, where: str) -> tuple[str, str]:
    content = message.get("content")
    content = "" if content is None else _visible(content, where)
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str):
        return reasoning, content
    if reasoning is not None:
        raise ValueError(f"{where}: reasoning_content is {type(reasoning).__name__}; give text")
    if "</think>" not in content:
        return "", content
    first, last = content.split("</think>")[0], content.split("</think>")[-1]
    return first.rstrip("\n").split("<think>")[-1].lstrip("\n"), last.lstrip("\n")


def _call_of(call: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    function = call.get("function") or call if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        raise ValueError(f"{where}: tool call {call!r} has no name; give name and arguments")
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"{where}: arguments of {name!r} are {type(arguments).__name__}, expected a mapping; "
            "an OpenAI client sends JSON text: json.loads it first"
        )
    return name, arguments
