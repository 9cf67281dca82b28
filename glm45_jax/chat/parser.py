"""A model's text to reasoning, content and tool calls, whole or while it grows.

`parse` is `Stream` fed once, so the two agree however a text is cut. Nothing a model writes raises:
what is neither reasoning, content nor a call is kept in `dropped`. The format has no escaping; a
value ends at the first `</arg_value>` that is followed by `<arg_key>` or `</tool_call>` (white
space between them or not), so all other tags may stand inside a string. Where there is none, the
text is broken and is read as the publisher does. Source: spec 4.4, 4.5.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypedDict

from glm45_jax.chat.template import family_of

_THINK, _THINK_END = "<think>", "</think>"
_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_VALUE_END = "</arg_value>"
_NAME = re.compile(r"\s*+([^\n<]*)[\n<]")
_NEXT_PAIR = re.compile(r"<arg_key>|</tool_call>")
_KEY_END = re.compile(r"</arg_key>\s*<arg_value>|</tool_call>")
_LAST_OF_VALUE = re.compile(r"</arg_value>(?=\s*(?:<arg_key>|</tool_call>))")
_MAX_REFERENCES = 16  # of a schema, one inside the other


class ToolCall(TypedDict):
    """One call; `render` takes it as it is."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Parsed:
    """What a model's text says; a part that is not there is empty.

    dropped: text after the first call that belongs to no call, calls that never end, calls without
    a name. Empty where the model kept to the format.
    """

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    dropped: str = ""

    def message(self) -> dict[str, Any]:
        """The assistant message, without the parts that are empty; `render` takes it back."""
        message: dict[str, Any] = {"role": "assistant"}
        # Empty but stated: else `render` would look for reasoning in the content.
        if self.reasoning or _THINK_END in self.content:
            message["reasoning_content"] = self.reasoning
        if self.content:
            message["content"] = self.content
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


@dataclass(frozen=True)
class Reading:
    """Where public parsers differ.

    last_think: reasoning goes on to the last `</think>` (of those before the first complete call
    that follows one), so nothing of an answer is known before its end. Otherwise to the first.
    strip: white space around string arguments is removed. Otherwise it is kept: code needs it.
    """

    last_think: bool
    strip: bool


PUBLISHED = Reading(last_think=True, strip=True)  # the publisher's manual parser (spec 4.4, 4.5)
STREAMED = Reading(last_think=False, strip=False)  # what can be shown at once; loses no character


class Delta(NamedTuple):
    """A piece of `Parsed`: pieces of one field, or of one call, are joined in order.

    arguments: JSON text of the call's arguments; one name comes before it. A `dropped` with a call
    says that this call was broken: forget it.
    """

    reasoning: str = ""
    content: str = ""
    call: int | None = None
    name: str = ""
    arguments: str = ""
    dropped: str = ""


def parse(
    text: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    family: str = "glm-4.5",
    in_think: bool | None = None,
    reading: Reading = PUBLISHED,
) -> Parsed:
    """Reasoning, content and calls of what the model wrote after the prompt, without stop tokens.

    Reasoning and content are stripped. Content ends at the first call. An argument whose schema
    allows only strings stays text (`null` is None where null is allowed too); any other is read as
    JSON, and stays text if it is not JSON. A call that never ends, or has no name, is no call.
    tools: bare functions, or wrapped as the OpenAI API does; a call of another tool is kept.
    in_think: whether the prompt has opened the reasoning (4.7's does when thinking). None finds
    out: by a leading `<think>`, in 4.7 also by any `</think>`.

    Raises: ValueError for an unknown family or a tool without a name; never for the text.
    Source: spec 4.4, 4.5; zai-org/GLM-4.5 resources/glm_4.6_tir_guide.md.
    """
    stream = Stream(tools=tools, family=family, in_think=in_think, reading=reading)
    return joined([*stream.feed(text), *stream.close()])


def joined(deltas: Iterable[Delta]) -> Parsed:
    """What a whole stream said."""
    deltas = list(deltas)
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        if delta.call is None:
            continue
        name, arguments = calls.get(delta.call, ("", ""))
        calls[delta.call] = [name + delta.name, arguments + delta.arguments]
        if delta.dropped:
            del calls[delta.call]
    return Parsed(
        reasoning="".join(delta.reasoning for delta in deltas),
        content="".join(delta.content for delta in deltas),
        tool_calls=[
            {"name": name, "arguments": json.loads(arguments)} for name, arguments in calls.values()
        ],
        dropped="".join(delta.dropped for delta in deltas),
    )


class Stream:
    """Reads a text as it grows: `feed` every piece, then `close`.

    With a reading of last_think the answer comes at the close, for only then is the reasoning known
    to have ended; so it may in 4.7 with in_think None. Both are at home in `parse`. String
    arguments grow with the text, others come whole.

    Raises: ValueError as `parse`, and for text after the close.
    """

    def __init__(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        family: str = "glm-4.5",
        in_think: bool | None = None,
        reading: Reading = STREAMED,
    ):
        """As `parse`."""
        opened_by_prompt = bool(family_of(family).opening)
        self._in_think = False if in_think is None and not opened_by_prompt else in_think
        self._parameters = _parameters_of(tools or ())
        self._reading = reading
        self._text = ""  # not yet told; from the start of a call to its end all of it
        self._at = 0  # how far into _text we have read; 0 outside a call
        self._closed = False
        self._step: Callable[[], bool] = self._start  # True: went on to another step
        self._out: list[Delta] = []
        self._trim = _Trim(True)
        self._calls = 0
        self._name = ""
        self._arguments: list[str] = []  # JSON of this call, as far as told
        self._sure = 0  # of these pieces, those before the value that is being read
        self._kind: _Kind = "json"
        self._value_at = 0
        self._searched = 0

    def feed(self, text: str) -> list[Delta]:
        """What this piece of text adds."""
        if self._closed:
            raise ValueError(f"{len(text)} characters after the close; use one Stream per answer")
        self._text += text
        return self._told()

    def close(self) -> list[Delta]:
        """What the end of the text adds: all that was held back."""
        if self._closed:
            return []
        self._closed = True
        out = self._told()
        while self._step == self._call_value and self._text.find(_CALL_END, self._value_at) >= 0:
            self._give_value_up()
            out += self._told()
        if self._step == self._after_call and self._text.strip():
            out.append(Delta(dropped=self._text.strip()))
        elif self._step in (self._call_name, self._call_body, self._call_key, self._call_value):
            out.append(Delta(call=self._calls - 1 if self._name else None, dropped=self._text))
        return out

    def _told(self) -> list[Delta]:
        while self._step():
            pass
        out, self._out = self._out, []
        return out

    def _start(self) -> bool:
        self._text = self._text.lstrip()
        if self._text.startswith(_THINK):
            self._text = self._text.removeprefix(_THINK)
            self._step = self._reasoning
        elif _THINK.startswith(self._text) and not self._closed:
            return False
        elif self._in_think is not None:
            self._step = self._reasoning if self._in_think else self._content
        elif _THINK_END in self._text:
            self._step = self._reasoning
        elif self._closed:
            self._step = self._content
        else:
            return False
        return True

    def _reasoning(self) -> bool:
        end = self._text.find(_THINK_END)
        if end < 0:
            self._tell("reasoning", self._safe(_THINK_END))
            return False
        self._tell("reasoning", end)
        self._step = self._end_of_reasoning
        return True

    def _end_of_reasoning(self) -> bool:
        if self._reading.last_think:
            if not self._closed:
                return False
            call = self._text.find(_CALL)
            whole = call >= 0 and parse(self._text[call:], reading=self._reading).tool_calls
            last = self._text.rfind(_THINK_END, 0, call if whole else None)
            self._tell("reasoning", last)
        self._text = self._text.removeprefix(_THINK_END)
        self._trim = _Trim(True)
        self._step = self._content
        return True

    def _content(self) -> bool:
        end = self._text.find(_CALL)
        if end < 0:
            self._tell("content", self._safe(_CALL))
            return False
        self._tell("content", end)
        self._begin_call()
        return True

    def _after_call(self) -> bool:
        start = self._text.find(_CALL)
        if start < 0:
            return False
        if between := self._text[:start].strip():
            self._out.append(Delta(dropped=between))
        self._text = self._text[start:]
        self._begin_call()
        return True

    def _begin_call(self) -> None:
        self._at, self._name, self._arguments = len(_CALL), "", []
        self._step = self._call_name

    def _call_name(self) -> bool:
        found = _NAME.match(self._text, self._at)
        if not found:
            return False
        self._at, self._name = found.end(1), found[1].strip()
        if self._name:
            self._out.append(Delta(call=self._calls, name=self._name))
            self._calls += 1
        self._step = self._call_body
        return True

    def _call_body(self) -> bool:
        found = _NEXT_PAIR.search(self._text, self._at)
        if not found:
            return False
        self._at = found.end()
        if found[0] == _CALL_END:
            self._end_call()
        else:
            self._step = self._call_key
        return True

    def _call_key(self) -> bool:
        found = _KEY_END.search(self._text, self._at)
        if not found:
            return False
        key = self._text[self._at : found.start()].strip()
        self._at = found.end()
        if found[0] == _CALL_END:
            self._end_call()
            return True
        self._kind = _kind(self._parameters.get(self._name, {}), key)
        self._sure = len(self._arguments)
        self._argue((", " if self._sure else "{") + _json(key) + ": ")
        self._argue('"' if self._kind == "text" else "")
        self._value_at = self._searched = self._at
        self._trim = _Trim(self._reading.strip)
        self._step = self._call_value
        return True

    def _call_value(self) -> bool:
        found = _LAST_OF_VALUE.search(self._text, self._searched)
        close = self._text.find(_VALUE_END, self._at)
        end = found.start() if found else -1
        if (
            self._closed
            and not found
            and _CALL_END not in self._text[self._value_at : max(close, 0)]
        ):
            end = close
        if end < 0:
            # Look again from the last `</arg_value>`, whose follower may be on its way.
            latest = self._text.rfind(_VALUE_END, self._searched)
            self._searched = latest if latest >= 0 else self._safe(_VALUE_END, self._searched)
            if self._kind == "text":
                self._argue_text(close if close >= 0 else self._safe(_VALUE_END, self._at))
            return False
        if self._kind == "text":
            self._argue_text(end)
            self._argue('"')
        else:
            value = _value(self._text[self._at : end], self._kind, self._reading.strip)
            self._argue(_json(value))
        self._at = end + len(_VALUE_END)
        self._step = self._call_body
        return True

    def _give_value_up(self) -> None:
        """No value end, but a call end: the call is told again, without this argument."""
        end = self._text.find(_CALL_END, self._value_at)
        if self._name:
            lost = "<arg_value>" + self._text[self._value_at : end]
            self._out.append(Delta(call=self._calls - 1, dropped=lost))
            self._out.append(Delta(call=self._calls, name=self._name))
            self._calls += 1
            sure, self._arguments = "".join(self._arguments[: self._sure]), []
            self._argue(sure)
        self._at = end + len(_CALL_END)
        self._end_call()

    def _end_call(self) -> None:
        if self._name:
            self._argue("}" if self._arguments else "{}")
        else:
            self._out.append(Delta(dropped=self._text[: self._at]))
        self._text, self._at, self._step = self._text[self._at :], 0, self._after_call

    def _tell(self, part: Literal["reasoning", "content"], end: int) -> None:
        if piece := self._trim.push(self._text[:end]):
            told = Delta(reasoning=piece) if part == "reasoning" else Delta(content=piece)
            self._out.append(told)
        self._text = self._text[end:]

    def _argue_text(self, end: int) -> None:
        self._argue(_json(self._trim.push(self._text[self._at : end]))[1:-1])
        self._at = end

    def _argue(self, piece: str) -> None:
        if self._name and piece:
            self._out.append(Delta(call=self._calls - 1, arguments=piece))
            self._arguments.append(piece)

    def _safe(self, tag: str, start: int = 0) -> int:
        """Up to where the text cannot be the beginning of `tag`; all of it at the close."""
        if not self._closed:
            for size in range(min(len(tag) - 1, len(self._text) - start), 0, -1):
                if self._text.endswith(tag[:size]):
                    return len(self._text) - size
        return len(self._text)


class _Trim:
    """Strips a text that comes in pieces: white space waits for what follows it."""

    def __init__(self, on: bool):
        self.on = on
        self.begun = False
        self.waiting = ""

    def push(self, piece: str) -> str:
        if not self.on:
            return piece
        piece = self.waiting + piece if self.begun else piece.lstrip()
        shown = piece.rstrip()
        self.begun = self.begun or bool(shown)
        self.waiting = piece[len(shown) :]
        return shown


_Kind = Literal["text", "text or null", "json"]


def _parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    found = {}
    for at, tool in enumerate(tools):
        function = (tool.get("function") or tool) if isinstance(tool, Mapping) else {}
        if not isinstance(function.get("name"), str):
            raise ValueError(f"tool {at} is {tool!r}; give a mapping with name and parameters")
        found[function["name"]] = function.get("parameters") or {}
    return found


def _kind(parameters: Any, key: str) -> _Kind:
    """How a value is read; anything but strings and null is the publisher's JSON-or-text."""
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    match _types(schema, parameters, _MAX_REFERENCES):
        case ["string"]:
            return "text"
        case ["null", "string"]:
            return "text or null"
    return "json"


def _types(schema: Any, root: Any, depth: int) -> list[str]:
    """The JSON types a schema allows, sorted; empty where it does not say."""
    if not isinstance(schema, Mapping) or not depth:
        return []
    if "type" in schema:
        kind = schema["type"]
        return sorted({kind} if isinstance(kind, str) else {str(name) for name in _listed(kind)})
    if "enum" in schema or "const" in schema:
        values = _listed(schema.get("enum")) or [schema.get("const")]
        names = {str: "string", type(None): "null"}
        return sorted({names.get(type(value), "other") for value in values})
    if isinstance(schema.get("$ref"), str):
        target = root
        for name in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target.get(name) if isinstance(target, Mapping) else None
        return _types(target, root, depth - 1)
    every = [_types(part, root, depth - 1) for part in _listed(schema.get("allOf"))]
    if any(every):
        return next(types for types in every if types)
    options = _listed(schema.get("anyOf")) or _listed(schema.get("oneOf"))
    each = [_types(part, root, depth - 1) for part in options]
    return sorted({name for types in each for name in types}) if all(each) else []


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _value(text: str, kind: _Kind, strip: bool) -> Any:
    bare = text.strip()
    as_text = bare if strip else text
    if kind == "text or null":
        return None if bare == "null" else as_text
    try:
        value = json.loads(bare, parse_constant=_not_json)
        # Finite, writable as UTF-8, and not nested to the limit: what we emit must be read again.
        json.loads(json.dumps([[value]], ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError):
        return as_text
    return value


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
