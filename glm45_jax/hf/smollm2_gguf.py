"""A GGUF file: facts, and tensors as numpy arrays; nothing is executed. Types: `Gguf`, `Tensor`.

Only the three layouts of SmolLM2's file: plain float32, and blocks of 32 values that share a scale
(Q8_0), or a scale and a minimum (Q4_1). Source: ggml's docs/gguf.md and ggml-common.h, version 3.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

MAGIC, VERSION = b"GGUF", 3
BLOCK = 32  # values that share a scale
# Layout number: (name, values of a block, its bytes in the file).
LAYOUTS = {
    0: ("F32", 1, np.dtype("<f4")),
    3: ("Q4_1", BLOCK, np.dtype([("scale", "<f2"), ("least", "<f2"), ("halves", "u1", (16,))])),
    8: ("Q8_0", BLOCK, np.dtype([("scale", "<f2"), ("levels", "i1", (BLOCK,))])),
}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST_DIMS = 8


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies. shape: in numpy's order, rows first."""

    shape: tuple[int, ...]
    layout: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Gguf:
    """An open file. facts: its key-value pairs. Nothing of a tensor is read before `array`."""

    path: pathlib.Path
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def array(self, name: str) -> np.ndarray:
        """One tensor in float32, dequantised.

        Raises: ValueError for a tensor that is not there.
        """
        found = self.tensors.get(name)
        if found is None:
            raise ValueError(f"{self.path} has no tensor {name}; it has {sorted(self.tensors)[:8]}")
        _, block, dtype = LAYOUTS[found.layout]
        count = math.prod(found.shape) // block
        stored = np.fromfile(self.path, dtype, count, offset=found.offset)
        return dequantized(stored, found.layout).reshape(found.shape)


def dequantized(stored: np.ndarray, layout: int) -> np.ndarray:
    """Values of blocks in order, float32: level · scale (Q8_0), level · scale + least (Q4_1).

    The low halves of a Q4_1 block's bytes are its first 16 values, the high halves the others.
    """
    if layout == 0:
        return stored.astype(np.float32)
    scale = stored["scale"].astype(np.float32)[:, None]
    if layout == 8:
        return (stored["levels"].astype(np.float32) * scale).reshape(-1)
    levels = np.concatenate([stored["halves"] & 15, stored["halves"] >> 4], axis=1)
    least = stored["least"].astype(np.float32)[:, None]
    return (levels.astype(np.float32) * scale + least).reshape(-1)


def open_gguf(path: pathlib.Path) -> Gguf:
    """The file's facts and where its tensors lie.

    Raises: ValueError for a file that is no GGUF of version 3, that is cut short, or that has
    tensors in another layout.
    """
    data = np.memmap(path, np.uint8, mode="r")
    try:
        return _read(path, _Cursor(memoryview(data)))
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); install its wheel again") from error


class _Cursor:
    """A place in the bytes that moves on with each read."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def text(self) -> str:
        size = self.number("Q")
        if size > len(self.data) - self.at:
            raise struct.error(f"a text of {size} bytes at {self.at}")
        self.at += size
        return bytes(self.data[self.at - size : self.at]).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(_NUMBERS[kind])


def _read(path: pathlib.Path, cursor: _Cursor) -> Gguf:
    size = len(cursor.data)
    if bytes(cursor.data[:4]) != MAGIC:
        raise ValueError(f"{path} begins with {bytes(cursor.data[:4])!r}, a GGUF with {MAGIC!r}")
    cursor.at = len(MAGIC)
    version = cursor.number("I")
    if version != VERSION:
        raise ValueError(f"{path} is GGUF version {version}, this code reads {VERSION}")
    n_tensors, n_facts = cursor.number("Q"), cursor.number("Q")
    facts = {}
    for _ in range(n_facts):
        key = cursor.text()
        facts[key] = cursor.value(cursor.number("I"))
    found: dict[str, Tensor] = {}
    for _ in range(n_tensors):
        name, dims = cursor.text(), cursor.number("I")
        if dims > _MOST_DIMS:
            raise struct.error(f"{name} has {dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
        found[name] = Tensor(shape, cursor.number("I"), cursor.number("Q"))
    align = facts.get("general.alignment", 32)
    start = -(-cursor.at // align) * align
    tensors = {name: _placed(path, name, t, start, size) for name, t in found.items()}
    return Gguf(path, facts, tensors)


def _placed(path: pathlib.Path, name: str, found: Tensor, start: int, size: int) -> Tensor:
    """The tensor with its offset in the file. Raises: ValueError where it cannot be read."""
    if found.layout not in LAYOUTS:
        known = {number: layout[0] for number, layout in LAYOUTS.items()}
        raise ValueError(f"{path}: {name} has layout {found.layout}, this code reads {known}")
    _, block, dtype = LAYOUTS[found.layout]
    count, first = math.prod(found.shape), start + found.offset
    if not found.shape or found.shape[-1] % block:
        raise ValueError(f"{path}: rows of {name} {found.shape} are not whole blocks of {block}")
    last = first + count // block * dtype.itemsize
    if last > size:
        raise ValueError(
            f"{path} is cut short: {name} ends at byte {last:,}, the file at {size:,}; "
            "install its wheel again"
        )
    return dataclasses.replace(found, offset=first)
