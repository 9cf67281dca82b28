"""Tasks from files: rows of JSON lines, dealt like cards. Type: `Deck`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def rows(source: str | os.PathLike | Iterable[Row], needed: Sequence[str]) -> tuple[Row, ...]:
    """The rows of a .jsonl file, or those given.

    Raises: ValueError where there is none, or one lacks a key that is needed.
    """
    if isinstance(source, str | os.PathLike):
        lines = Path(source).read_text(encoding="utf-8").splitlines()
        found = tuple(json.loads(line) for line in lines if line.strip())
    else:
        found = tuple(source)
    if not found:
        raise ValueError(f"{source}: no rows")
    for at, row in enumerate(found):
        if lacking := [key for key in needed if key not in row]:
            raise ValueError(f"row {at} has {sorted(row)}, and no {lacking}; each needs {needed}")
    return found


def digest(*texts: str) -> str:
    """16 hexadecimal digits of texts; the same on every machine."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def held(text: str, share: float) -> bool:
    """Whether a task of this prompt is held out, as that share of all prompts is."""
    return int(digest("held out", text), 16) < share * 16**16


def side(source: Iterable[Row], key: str, *, held_out: bool, share: float) -> tuple[Row, ...]:
    """The rows whose text of that key is held out, or those whose is not."""
    return tuple(row for row in source if held(str(row[key]), share) == held_out)


@dataclasses.dataclass(frozen=True)
class Deck:
    """Row numbers without end: each once a round, every round in another order."""

    size: int
    seed: int = 0

    def __call__(self, number: int) -> int:
        """The row of a number >= 0."""
        if number < 0:
            raise ValueError(f"task number {number}; they begin at 0")
        return _order(self.size, self.seed, number // self.size)[number % self.size]


@functools.lru_cache(maxsize=16)
def _order(size: int, seed: int, turn: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(f"{seed}/{turn}").shuffle(order)
    return tuple(order)
