"""Sizes of kernels that were measured fastest: kernels/tuned/ has a table for each kind of device,
made by `python -m experiments.bench.tune`. What a table does not have goes by the kernel's own
rule.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import pathlib
from typing import Any

from glm45_jax.kernels.dispatch import device, say_once

log = logging.getLogger(__name__)

FOLDER = pathlib.Path(__file__).parent / "tuned"
Key = tuple[tuple[str, int], ...]


def tuned[Sizes](op: str, default: Sizes, **key: int) -> Sizes:
    """The kernel's sizes with those that this device's table has for exactly this op and key.

    default: a frozen dataclass, by the kernel's own rule. Raises: ValueError for a table with a
    size that the kernel does not have.
    """
    sizes = table(device().device_kind).get((op, tuple(sorted(key.items()))))
    if not sizes:
        return default
    try:
        found: Any = dataclasses.replace(default, **sizes)  # type: ignore[type-var]
    except TypeError as error:
        raise ValueError(
            f"{FOLDER}: {op} {key} has {sizes}, the kernel takes {default}; tune it again"
        ) from error
    say_once(log, logging.INFO, f"{op} {key}: {sizes}, as measured")
    return found


def path(kind: str) -> pathlib.Path:
    """The table of a kind of device, as jax names it."""
    return FOLDER / f"{kind.lower().replace(' ', '-')}.json"


def rows(kind: str) -> list[dict[str, Any]]:
    """Rows of its table, {op, key, sizes, ms, default_ms}; none where there is no table. Without
    sizes the kernel's own were the fastest.
    """
    file = path(kind)
    return json.loads(file.read_text())["rows"] if file.exists() else []


@functools.cache
def table(kind: str) -> dict[tuple[str, Key], dict[str, Any]]:
    """{(op, key): sizes} of a kind of device."""
    return {
        (row["op"], tuple(sorted(row["key"].items()))): {
            name: tuple(size) if isinstance(size, list) else size
            for name, size in row["sizes"].items()
        }
        for row in rows(kind)
    }
