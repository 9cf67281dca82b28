"""A `Trajectory` as bytes and back, for the pool's ledger and for the wire. Numpy only.

An uncompressed npz: one member an array, and `fields`, the rest as JSON. Nothing is pickled, so
bytes of a stranger are only ever data. Fields are those of the dataclass, whatever they are: one
that the bytes lack gets its default, one that the dataclass lacks is refused.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from glm45_jax.rl.trajectory import Trajectory

FIELDS = "fields"


def to_bytes(one: Trajectory) -> bytes:
    """The trajectory, whole and bit by bit: arrays keep their dtype; equal ones give equal bytes.

    Raises: ValueError for a field without such a form (an object array, a reward that is NaN).
    """
    arrays: dict[str, np.ndarray] = {}
    rest: dict[str, Any] = {}
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = value
        else:
            rest[field.name] = plain(value)
    try:
        text = json.dumps(rest, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{one.task_id}: {error}; give numbers, strings and lists") from error
    file = io.BytesIO()
    arrays[FIELDS] = np.frombuffer(text.encode(), np.uint8)
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def from_bytes(body: bytes) -> Trajectory:
    """The trajectory that `to_bytes` wrote.

    Raises: ValueError for other bytes, fields that `Trajectory` does not have or what it refuses.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as members:
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.infolist()):
                raise ValueError("its arrays are compressed")  # it could grow without bounds
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            values: dict[str, Any] = {name: arrays[name] for name in arrays.files}
        rest = json.loads(values.pop(FIELDS).tobytes())
        repeated = values.keys() & rest.keys()
        if repeated:
            raise ValueError(f"{sorted(repeated)} come twice")
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, AttributeError) as error:
        raise ValueError(f"not the bytes of a trajectory: {error}") from error
    values |= {name: tuple(v) if isinstance(v, list) else v for name, v in rest.items()}
    fields = {field.name for field in dataclasses.fields(Trajectory)}
    if unknown := values.keys() - fields:
        raise ValueError(
            f"a trajectory has no {sorted(unknown)}; these bytes are of another version"
        )
    try:
        return Trajectory(**values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not a whole trajectory: {error}") from error


def plain(value: Any) -> Any:
    """`value` with mappings as dicts, sequences as lists and numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value
