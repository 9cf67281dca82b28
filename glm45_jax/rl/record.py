"""A `Trajectory` as bytes and back, for the pool's ledger and for the wire. Numpy only.

A line of JSON, then the bytes of the arrays, in the order in which the line names them with their
dtype and shape. Nothing is pickled, so bytes of a stranger are only ever data, and no array is
larger than they are. Fields are those of the dataclass, whatever they are: one that the bytes lack
gets its default, one that the dataclass lacks is refused. (npz would do as well, ten times slower
for a short sample: docs/log.md.)
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from glm45_jax.rl.trajectory import Trajectory

FIELDS = tuple(field.name for field in dataclasses.fields(Trajectory))
KINDS = "biuf"  # of arrays: bool, integers, floats
_PLAIN = frozenset((str, int, float, bool, type(None)))
_JSON = json.JSONEncoder(allow_nan=False)


def to_bytes(one: Trajectory) -> bytes:
    """The trajectory, whole and bit by bit: arrays keep their dtype; equal ones give equal bytes.

    Raises: ValueError for a field without such a form (an object array, a reward that is NaN).
    """
    arrays: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    bodies = []
    for name in FIELDS:
        value = getattr(one, name)
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in KINDS:
                raise ValueError(f"{one.task_id}: {name} is {value.dtype}; give numbers")
            arrays[name] = [value.dtype.str, value.shape]
            bodies.append(value.tobytes())
        else:
            rest[name] = plain(value)
    try:
        line = _JSON.encode({"arrays": arrays, "fields": rest})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{one.task_id}: {error}; give numbers, strings and lists") from error
    return b"".join([line.encode(), b"\n", *bodies])


def from_bytes(body: bytes) -> Trajectory:
    """The trajectory that `to_bytes` wrote.

    Raises: ValueError for other bytes, fields that `Trajectory` does not have or what it refuses.
    """
    line, _, data = body.partition(b"\n")
    try:
        said = json.loads(line)
        arrays, rest = _arrays(said["arrays"], data), dict(said["fields"])
        if repeated := arrays.keys() & rest.keys():
            raise ValueError(f"{sorted(repeated)} come twice")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the bytes of a trajectory: {error}") from error
    values = arrays | {name: tuple(v) if isinstance(v, list) else v for name, v in rest.items()}
    if unknown := values.keys() - set(FIELDS):
        raise ValueError(
            f"a trajectory has no {sorted(unknown)}; these bytes are of another version"
        )
    try:
        return Trajectory(**values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a whole trajectory: {error}") from error


def _arrays(told: Mapping[str, Any], data: bytes) -> dict[str, Any]:
    """Arrays that may be written to. Raises: ValueError where the bytes are not just theirs."""
    found, at, owned = {}, 0, bytearray(data)
    for name, (dtype, shape) in told.items():
        kind = np.dtype(dtype)
        if kind.kind not in KINDS or min(shape, default=0) < 0:
            raise ValueError(f"{name} is {dtype} {shape}")
        count = math.prod(shape)
        found[name] = np.frombuffer(owned, kind, count, at).reshape(shape)
        at += count * kind.itemsize
    if at != len(data):
        raise ValueError(f"{len(data)} bytes of arrays, and {at} are named")
    return found


def plain(value: Any) -> Any:
    """`value` with mappings as dicts, sequences as lists and numpy's numbers as Python's."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value
