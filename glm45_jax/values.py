"""Tools for nested frozen dataclasses: override by path, differences, JSON and back, fingerprint.

A value is a dataclass of numbers, strings, None, tuples, other dataclasses and named functions.
A path is the field names and tuple indices down to a part of it, joined by dots: `optim.lr`,
`data.sources.0.1`. `override` is what `--set path=value` calls.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

PACKAGES = ("glm45_jax", "experiments")
_NONES = ("none", "null")
_BOOLS = {"true": True, "false": False}
_EDIT = "edit the Python file of the experiment instead"


def override[Value](value: Value, assignment: str | Sequence[str]) -> Value:
    """`value` with one or several `path=value` assignments applied, typed by the annotations.

    Several are applied together, so that `__post_init__` sees them all. Texts: `2e-4`, `1e6` (also
    for an int), `true`, `none`, `inf`, a string as it is or quoted, a tuple as `(1, 2)` or `1,2`.

    Raises:
        ValueError: an unknown path, a text of another type, or a value the dataclass refuses.
    """
    edits = []
    for whole in [assignment] if isinstance(assignment, str) else assignment:
        path, equals, text = whole.partition("=")
        if not equals or not path.strip():
            raise ValueError(f"{whole!r} is not path=value, as in optim.lr=2e-4")
        edits.append(_Edit(tuple(path.strip().split(".")), text.strip(), whole))
    return _rebuild(value, type(value), (), edits, value) if edits else value


def flatten(value: Any) -> dict[str, Any]:
    """Leaf by path; an empty tuple and a dataclass without fields are leaves."""
    return dict(_leaves(value, ""))


def diff(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """(path, in a, in b) of the outermost parts that differ in type or value; NaN equals NaN."""
    return list(_diff(a, b, ""))


def to_json(value: Any) -> Any:
    """`value` as strict JSON, losing nothing: the types are named in it as 'module:qualname'.

    Raises: ValueError names the path of a part that has no such form (a list, an array, a lambda).
    """
    return _to_json(value, "value")


def from_json(obj: Any, *, packages: Sequence[str] = PACKAGES) -> Any:
    """The value `to_json` wrote; a field it does not mention gets its default.

    Only dataclasses and functions defined in `packages` are looked up, nothing else is called.

    Raises:
        ValueError: a name outside of `packages`, one that is gone, or fields that do not fit.
    """
    if isinstance(obj, list):
        return tuple(from_json(part, packages=packages) for part in obj)
    if not isinstance(obj, dict):
        return obj
    if obj.keys() == {"float"}:
        return float(obj["float"])
    if obj.keys() == {"name"}:
        return _resolve(obj["name"], packages)
    if obj.keys() != {"dataclass", "fields"}:
        raise ValueError(f"{sorted(obj)} is not what to_json writes")
    cls = _resolve(obj["dataclass"], packages)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{obj['dataclass']} is not a dataclass")
    fields = {k: from_json(v, packages=packages) for k, v in obj["fields"].items()}
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(
            f"{obj['dataclass']} has no {', '.join(unknown)}, only {', '.join(sorted(known))}; "
            "it was written by another version of the code"
        )
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{obj['dataclass']} does not take {fields}: {error}") from error


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON: equal for equal values, in any process."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Edit:
    path: tuple[str, ...]
    text: str
    whole: str


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _parts(value: Any) -> dict[str, Any]:
    """What a path can step into, by its name; nothing for a leaf."""
    if _is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, tuple):
        return {str(index): part for index, part in enumerate(value)}
    return {}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    parts = _parts(value)
    if not parts:
        yield path, value
    for name, part in parts.items():
        yield from _leaves(part, _join(path, name))


def _paths(value: Any, path: str = "") -> Iterator[str]:
    for name, part in _parts(value).items():
        yield _join(path, name)
        yield from _paths(part, _join(path, name))


def _diff(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    mine, others = _parts(a), _parts(b)
    if type(a) is not type(b) or mine.keys() != others.keys():
        yield path, a, b
    elif mine:
        for name in mine:
            yield from _diff(mine[name], others[name], _join(path, name))
    elif repr(a) != repr(b) if isinstance(a, float) else a != b:  # NaN is itself, -0.0 is not 0.0
        yield path, a, b


def _rebuild(
    value: Any, hint: Any, path: tuple[str, ...], edits: Sequence[_Edit], root: Any
) -> Any:
    """`value`, which lies at `path` of `root`, with the edits at and below that path applied."""
    depth = len(path)
    whole = [edit for edit in edits if len(edit.path) == depth]
    if whole:
        value = _read(whole[-1], hint, value)
    below = [edit for edit in edits if len(edit.path) > depth]
    if not below:
        return value
    parts, hints, changed = _parts(value), _part_hints(value, hint), {}
    for name in dict.fromkeys(edit.path[depth] for edit in below):
        group = [edit for edit in below if edit.path[depth] == name]
        if name not in parts:
            raise ValueError(_unknown(group[0], value, path, root))
        changed[name] = _rebuild(parts[name], hints[name], (*path, name), group, root)
    if isinstance(value, tuple):
        return tuple((parts | changed).values())
    try:
        return dataclasses.replace(value, **changed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{', '.join(edit.whole for edit in below)}: {error}") from error


def _part_hints(value: Any, hint: Any) -> dict[str, Any]:
    """The annotation of every part of `value`; `Any` where there is none."""
    names = list(_parts(value))
    if _is_dataclass(value):
        return typing.get_type_hints(type(value))
    for member in _members(hint):
        inner = typing.get_args(member)
        if typing.get_origin(member) is tuple and len(inner) == 2 and inner[1] is Ellipsis:
            return dict.fromkeys(names, inner[0])
        if typing.get_origin(member) is tuple and len(inner) == len(names):
            return dict(zip(names, inner, strict=True))
    return dict.fromkeys(names, Any)


def _unknown(edit: _Edit, value: Any, path: tuple[str, ...], root: Any) -> str:
    wanted, paths = ".".join(edit.path), list(_paths(root))
    same_name = [p for p in paths if p.split(".")[-1] == edit.path[-1]]
    near = difflib.get_close_matches(wanted, paths, n=3)
    near = list(dict.fromkeys([*near, *same_name]))[:3]
    where = ".".join(path) or type(root).__name__
    there = ", ".join(_parts(value))
    has = f"has {there}" if there else f"is {value!r}, without parts; {_EDIT}"
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{edit.whole}: there is no {wanted}; {hint}{where} {has}"


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, strictest text first; of anything else, itself."""
    if isinstance(hint, typing.TypeAliasType):
        return _members(hint.__value__)
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return (hint,)
    members = [member for alternative in typing.get_args(hint) for member in _members(alternative)]
    order = [types.NoneType, bool, int, float]
    last = len(order) + 1
    rank = {member: n for n, member in enumerate(order)} | {str: last}
    return tuple(sorted(members, key=lambda member: rank.get(member, last - 1)))


def _read(edit: _Edit, hint: Any, current: Any) -> Any:
    """The text of an edit as what the annotation says, or as the type of what is there now."""
    hint = type(current) if hint in (Any, object) else hint
    try:
        return _of_text(edit.text, hint)
    except _MismatchError:
        members = _members(hint)
        last = types.NoneType  # None is tried first and named last
        name = " or ".join(_hint_name(m) for m in sorted(members, key=lambda m: m is last))
        why = f"{'.'.join(edit.path)} is {name}, now {current!r}"
        if any(_has_text(member) for member in members if member is not last):
            why += f", and {edit.text!r} is not"
        else:
            why += "; its parts can be set" * bool(_parts(current)) + f"; for another value {_EDIT}"
    raise ValueError(f"{edit.whole}: {why}")


class _MismatchError(ValueError):
    pass


def _hint_name(hint: Any) -> str:
    if hint is types.NoneType:
        return "None"
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if plain else str(hint).replace("typing.", "")


def _has_text(hint: Any) -> bool:
    scalars = (types.NoneType, bool, int, float, str, tuple)
    return hint in scalars or typing.get_origin(hint) in (tuple, typing.Literal)


def _of_text(text: str, hint: Any) -> Any:
    """`text` as the first alternative of `hint` that it fits.

    Raises: _MismatchError where it fits none.
    """
    for member in _members(hint):
        try:
            return _of_member(text, member)
        except _MismatchError:
            continue
    raise _MismatchError(text)


def _of_member(text: str, hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        found = _of_text(text, typing.Union[tuple(type(choice) for choice in choices)])  # noqa: UP007
        if found in choices:
            return choices[choices.index(found)]
    elif hint is tuple or typing.get_origin(hint) is tuple:
        return _tuple_of_text(text, typing.get_args(hint))
    elif hint is types.NoneType and text.lower() in _NONES:
        return None
    elif hint is bool and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    elif hint is str:
        return _unquoted(text)
    elif hint is int and (number := _number(text, int)) is not None:
        return number
    elif hint is int and (number := _number(text, float)) is not None and number.is_integer():
        return int(number)  # 1e6
    elif hint is float and (number := _number(text, float)) is not None:
        return number
    raise _MismatchError(text)


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if not quoted:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        return None


def _tuple_of_text(text: str, inner: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        parts = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise _MismatchError(text) from error
    if not isinstance(parts, tuple | list):
        raise _MismatchError(text)
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = (inner[0],) * len(parts)
    if not inner:
        inner = tuple(type(part) for part in parts)
    if len(inner) != len(parts):
        raise _MismatchError(text)
    return tuple(_of_text(repr(part), hint) for part, hint in zip(parts, inner, strict=True))


def _to_json(value: Any, path: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is tuple:
        return [_to_json(part, _join(path, str(n))) for n, part in enumerate(value)]
    if _is_dataclass(value):
        fields = {name: _to_json(part, _join(path, name)) for name, part in _parts(value).items()}
        return {"dataclass": _name_of(type(value), path), "fields": fields}
    if isinstance(value, type | types.FunctionType):
        return {"name": _name_of(value, path)}
    raise ValueError(
        f"{path} is a {type(value).__name__}, {value!r}; a value is made of frozen dataclasses, "
        "tuples, numbers, strings, None and named functions"
    )


def _name_of(named: Any, path: str) -> str:
    if "<" in named.__qualname__:
        raise ValueError(f"{path} is {named.__qualname__}; move it to the top of its module")
    if named.__module__ == "__main__":
        raise ValueError(
            f"{path} is {named.__qualname__} of the program itself, which no other process could "
            "look up; move it into a module, say one of experiments/"
        )
    return f"{named.__module__}:{named.__qualname__}"


def _resolve(name: str, packages: Sequence[str]) -> Any:
    """The function or class 'module:qualname', if that module of `packages` defines it."""
    module_name, _, qualname = name.partition(":")
    if module_name.split(".")[0] not in packages and module_name not in packages:
        raise ValueError(f"{name} is not in {' or '.join(packages)}; nothing else is looked up")
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} is gone: {error}; was it moved or renamed?") from error
    defined_there = (getattr(found, "__module__", None), getattr(found, "__qualname__", None))
    if defined_there != (module_name, qualname):
        raise ValueError(f"{name} is not defined there but in {defined_there[0]}")
    return found


def find(name: str) -> Any:
    """The function that `module:function` names; modules of the working directory are seen.

    Raises: ValueError where it is not there, with the nearest names.
    """
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise ValueError(
            f"experiment {name!r} is not module:function, say experiments.pretrain:glm45_air"
        )
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ValueError(
            f"no module {error.name!r} for experiment {name!r}; run from the repository's root"
        ) from error
    finally:
        sys.path.pop(0)
    functions = [
        n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module_name
    ]
    if function_name not in functions:
        near = difflib.get_close_matches(function_name, functions, 3, 0.3)
        raise ValueError(
            f"{module_name} has no function {function_name!r}; did you mean {near}? "
            f"It has {functions}"
        )
    return getattr(module, function_name)
