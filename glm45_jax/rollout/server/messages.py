"""The chat part of a request, as `chat` takes it: messages, tools, the switch for reasoning."""

from __future__ import annotations

import re
from typing import Any

from glm45_jax.rollout.server.fields import ApiError, Fields, parsed, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NOT_FORCED = (
    "is not supported: nothing holds the model to a call; use auto, say in the prompt which tool "
    "to use, and ask again where it did not"
)
# Of a message that came from an API of this kind; nothing of it is shown to the model.
_CHANGES_NOTHING = ("name", "refusal", "annotations", "dropped", "id")
_UNSUPPORTED = {
    "audio": ((), "the model reads text"),
    "function_call": ((), "it is the old name; use tool_calls"),
}
_MESSAGE_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id")


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages as `chat.encode` takes them: text content, arguments as objects, answers of
    tools in the order of their calls.
    """
    given = fields.must("messages", list)
    if not given:
        raise fields.error("messages", "messages is empty; give at least one")
    read, ids = [], []
    for at, message in enumerate(given):
        one, call_id = _message(Fields(message, f"messages.{at}"))
        read.append(one)
        ids.append(call_id)
    return _in_order_of_calls(read, ids)


def read_tools(fields: Fields) -> list[dict[str, Any]] | None:
    """The tools as they came, for the prompt prints what it gets; None where there are none, or
    tool_choice is "none".
    """
    given = fields.take("tools", list)
    choice = fields.take("tool_choice", str, dict, default="auto")
    if choice not in ("auto", "none"):
        raise fields.error(
            "tool_choice", f"tool_choice {shown(choice)} {_NOT_FORCED}", "unsupported_parameter"
        )
    names: set[str] = set()
    for at, tool in enumerate(given or ()):
        name = _tool(tool, f"tools.{at}")
        if name in names:
            raise ApiError(
                f"tools.{at} is a second {shown(name)}; a name says which", param="tools"
            )
        names.add(name)
    return given if given and choice == "auto" else None


def read_thinking(fields: Fields) -> tuple[bool | None, bool | None]:
    """(enable_thinking, clear_thinking) of the template; None where nothing is said.

    Either chat_template_kwargs: {enable_thinking, clear_thinking} or thinking: {type: enabled or
    disabled, clear_thinking}.
    """
    names = ("enable_thinking", "clear_thinking")
    kwargs = Fields(fields.take("chat_template_kwargs", dict, default={}), "chat_template_kwargs")
    enabled, clear = (kwargs.take(name, bool) for name in names)
    kwargs.close(names)
    if not fields.has("thinking"):
        return enabled, clear
    other = Fields(fields.take("thinking", dict), "thinking")
    kind = other.must("type", str)
    if kind not in ("enabled", "disabled"):
        raise other.error("type", f"thinking.type {shown(kind)} is neither enabled nor disabled")
    other_clear = other.take("clear_thinking", bool)
    other.close(("type", "clear_thinking"))
    for name, a, b in zip(names, (enabled, clear), (kind == "enabled", other_clear), strict=True):
        if a is not None and b is not None and a != b:
            message = f"thinking and chat_template_kwargs say two things of {name}; give one"
            raise ApiError(message, param="thinking")
    return kind == "enabled", clear if other_clear is None else other_clear


def _message(fields: Fields) -> tuple[dict[str, Any], str | None]:
    """A message, and the id of the call it answers. Calls carry their ids as `id`."""
    role = fields.must("role", str)
    if role not in ROLES:
        raise fields.error("role", f"role {shown(role)} is none of {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    content = fields.take("content", str, list)
    if content is None and role != "assistant":
        raise fields.error("content", f"{fields.path('content')} is missing; give text")
    message["content"] = content if isinstance(content, str) else _text(fields, content or ())
    call_id = None
    if role == "assistant":
        reasoning = fields.take("reasoning_content", str)
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        message["tool_calls"] = _calls(fields)
    elif role == "tool":
        call_id = fields.take("tool_call_id", str)
    fields.drop(*_CHANGES_NOTHING)
    fields.refuse(_UNSUPPORTED)
    fields.close(_MESSAGE_FIELDS)
    return message, call_id


def _text(fields: Fields, parts: Any) -> str:
    texts = []
    for at, part in enumerate(parts):
        one = Fields(part, fields.path(f"content.{at}"))
        kind = one.must("type", str)
        if kind != "text":
            raise one.error("type", f"a part of type {shown(kind)}: the model reads text only")
        texts.append(one.must("text", str))
        one.close(("type", "text"))
    return "".join(texts)


def _calls(fields: Fields) -> list[dict[str, Any]]:
    calls = []
    for at, given in enumerate(fields.take("tool_calls", list, default=[])):
        call = Fields(given, fields.path(f"tool_calls.{at}"))
        call.drop("index")
        kind = call.take("type", str, default="function")
        if kind != "function":
            raise call.error("type", f"a call of type {shown(kind)}; functions are what is known")
        found = {"id": call.take("id", str)}
        function = Fields(call.must("function", dict), call.path("function"))
        found["name"] = function.must("name", str)
        found["arguments"] = _arguments(function)
        function.close(("name", "arguments"))
        call.close(("id", "type", "function"))
        calls.append(found)
    return calls


def _arguments(function: Fields) -> dict[str, Any]:
    """Arguments of a call, which are JSON text in this API; none is an empty text."""
    given = function.must("arguments", str, dict)
    if isinstance(given, dict):
        return given
    value = parsed((given or "{}").encode(), function.path("arguments"))
    if not isinstance(value, dict):
        message = f"{function.path('arguments')} is {shown(value)}; give the JSON of an object"
        raise function.error("arguments", message)
    return value


def _tool(tool: Any, where: str) -> str:
    """The name of a tool that is well formed, wrapped or bare."""
    outer = Fields(tool, where)
    if not outer.has("name"):
        kind = outer.must("type", str)
        if kind != "function":
            raise outer.error("type", f"a tool of type {shown(kind)}; give a function")
        function = outer.must("function", dict)
        outer.close(("type", "function"))
        outer = Fields(function, f"{where}.function")
    outer.drop("type")
    name = outer.must("name", str)
    if not TOOL_NAME.fullmatch(name):
        message = f"{outer.path('name')} {shown(name)}: use 1 to 128 letters, digits, _ . or -"
        raise outer.error("name", message)
    outer.take("description", str)
    outer.take("parameters", dict)
    if outer.take("strict", bool):
        message = (
            f"{outer.path('strict')} true is not supported: nothing holds the model to a schema"
        )
        raise outer.error("strict", f"{message}; set it to false", "unsupported_parameter")
    outer.close(("name", "description", "parameters", "strict"))
    return name


def _in_order_of_calls(
    messages: list[dict[str, Any]], ids: list[str | None]
) -> list[dict[str, Any]]:
    """The model is told no ids, it knows an answer by its place; so answers of one turn are put in
    the order of its calls.
    """
    out: list[dict[str, Any]] = []
    order: dict[str, int] = {}  # of the calls of the turn that is answered
    answers: list[tuple[int, int]] = []  # (place of its call, index in messages)
    for at, (message, call_id) in enumerate(zip(messages, ids, strict=True)):
        if message["role"] == "tool":
            if call_id is not None and order and call_id not in order:
                raise ApiError(
                    f"tool_call_id {shown(call_id)} is of no call of the turn before it; those are "
                    f"{', '.join(map(shown, order))}",
                    param=f"messages.{at}.tool_call_id",
                )
            answers.append((order.get(call_id or "", len(answers)), at))
            continue
        out += [messages[i] for _, i in sorted(answers)]
        answers = []
        if message["role"] == "assistant":
            calls = message["tool_calls"]
            order = {c["id"]: i for i, c in enumerate(calls) if c["id"] is not None}
        out.append(message)
    return out + [messages[i] for _, i in sorted(answers)]
