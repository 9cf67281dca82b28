"""Bodies of requests, field by field: JSON that is JSON, types that are right, no field unread.

Types to know: `ApiError`, what a client is told, and `Fields`, one object of a body.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 64  # of objects and lists inside each other; a tool's schema is far from it
SHOWN = 80  # characters of a wrong value that a message repeats

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_NAMES |= {list: "a list", dict: "an object"}


class ApiError(Exception):
    """Why a request failed, in the words of the OpenAI API. param: the field that is wrong."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`, as clients know it."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        found = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": found}


class Fields:
    """One JSON object; `take` what is known, `close` refuses the rest. null is not given.

    where: its place in the body, for messages.
    """

    def __init__(self, given: Any, where: str = "") -> None:
        self._where = where
        if not isinstance(given, dict):
            raise self.error("", f"{where or 'the body'} is {shown(given)}; send an object")
        self._left = {name: value for name, value in given.items() if value is not None}

    def error(self, name: str, message: str, code: str | None = None) -> ApiError:
        """A refusal that names the field."""
        return ApiError(message, param=self.path(name) or None, code=code)

    def path(self, name: str) -> str:
        """Where a field stands in the body."""
        return ".".join(part for part in (self._where, name) if part)

    def has(self, name: str) -> bool:
        """Whether a field is given and not taken yet."""
        return name in self._left

    def take(self, name: str, *kinds: type, default: Any = None) -> Any:
        """The value of a field of one of these types, a float where float is one of them; the
        default where it is not given.
        """
        value = self._left.pop(name, None)
        if value is None:
            return default
        if isinstance(value, bool) and bool not in kinds:
            raise self._wrong(name, value, kinds)
        if float in kinds and isinstance(value, int):
            try:
                return float(value)
            except OverflowError:
                raise self._wrong(name, value, kinds) from None
        if not isinstance(value, kinds):
            raise self._wrong(name, value, kinds)
        return value

    def must(self, name: str, *kinds: type) -> Any:
        """As `take`, of a field that has to be given."""
        value = self.take(name, *kinds)
        if value is None:
            raise self.error(name, f"{self.path(name)} is missing; give {_kinds(kinds)}")
        return value

    def drop(self, *names: str) -> None:
        """None; these change nothing here, whatever they are."""
        for name in names:
            self._left.pop(name, None)

    def refuse(self, unsupported: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
        """None where none of these is given but by a value that asks for nothing. unsupported: by
        name, such values and the way out.
        """
        for name, (nothing, way_out) in unsupported.items():
            value = self._left.pop(name, None)
            if value is None or value in nothing:
                continue
            message = f"{self.path(name)} {shown(value)} is not supported: {way_out}"
            raise self.error(name, message, "unsupported_parameter")

    def close(self, known: tuple[str, ...] = ()) -> None:
        """None where every field was taken. known: names to compare an unknown one with."""
        for name in self._left:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            message = f"{shown(self.path(name))} is not a field that is known here; {hint}"
            raise self.error(name, message, "unknown_parameter")

    def _wrong(self, name: str, value: Any, kinds: tuple[type, ...]) -> ApiError:
        return self.error(name, f"{self.path(name)} is {shown(value)}; give {_kinds(kinds)}")


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def parsed(raw: bytes, what: str = "the body") -> Any:
    """The JSON value of a body, or of text inside one.

    Raises: ApiError for bytes that are not JSON (NaN and Infinity are not), for text that is no
    Unicode, and for what is nested deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_not_json)
    except RecursionError:
        raise ApiError(f"{what} is nested deeper than {MAX_DEPTH}; flatten it") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, integers of 4,300 digits
        raise ApiError(f"{what} is not JSON: {error}", code="invalid_json") from None
    _check(value, what)
    return value


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON; give a finite one")


def _check(value: Any, what: str) -> None:
    waiting = [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise ApiError(f"{what} is nested deeper than {MAX_DEPTH}; flatten it")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                message = f"{what} holds text that is not Unicode: {error}"
                raise ApiError(message, code="invalid_json") from None
        elif isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value if isinstance(part, str | dict | list)]


def _kinds(kinds: tuple[type, ...]) -> str:
    return " or ".join(_NAMES[kind] for kind in kinds)
