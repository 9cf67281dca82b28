"""Chooses an implementation of a kernel: by name, or "auto" by platform and shape; says once what
it took and why.

Each op module has an ordered table `IMPLS` of `Implementation`s, fastest first. A kernel asked for
by name that cannot run raises; "auto" takes the first that can.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

from glm45_jax import sharding

log = logging.getLogger(__name__)


def anything(*_: Any, **__: Any) -> str | None:
    """`supports` of a reference: it always can."""
    return None


def device() -> Any:
    """A device that the traced code is for: of the mesh set by `sharding.use`, which may be of a
    machine that is not here (`glm45_jax.plan`), else of this process.
    """
    ambient = sharding.current()
    return jax.devices()[0] if ambient is None else ambient[0].devices.flat[0]


def not_hopper() -> str | None:
    """Why no kernel for Hopper runs on that device, or None."""
    target = device()
    capability = str(getattr(target, "compute_capability", "none"))
    if capability == "9.0":
        return None
    return (
        "needs compute capability 9.0; this is "
        f"{target.platform}, {capability} (mosaic is written for Hopper)"
    )


def not_tpu() -> str | None:
    """Why no kernel for TPU runs on that device, or None."""
    platform = device().platform
    return None if platform == "tpu" else f"mosaic_tpu needs a TPU; this is {platform}"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    supports: why it cannot run on these arguments, or None if it can. auto: platforms where "auto"
    may take it. yields: why "auto" leaves these arguments to the next one although it can run.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]
    auto: tuple[str, ...]
    yields: Callable[..., str | None] = anything


def pick(
    op: str, impls: tuple[Implementation, ...], name: str, *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    """The function to call.

    Raises: ValueError for an unknown name, or for a named implementation that cannot run here.
    """
    if name != "auto":
        chosen = next((i for i in impls if i.name == name), None)
        if chosen is None:
            raise ValueError(
                f"{op}: no implementation {name!r}; there are {[i.name for i in impls]} and 'auto'"
            )
        if why := chosen.supports(*args, **kwargs):
            raise ValueError(f"{op}: impl={name!r}: {why}; impl='auto' picks for you")
        return chosen.run
    platform = device().platform
    reasons: list[str] = []
    for i in impls:
        why = (
            i.supports(*args, **kwargs) or i.yields(*args, **kwargs)
            if platform in i.auto
            else f"not taken by itself on {platform}"
        )
        if why is None:
            passed = f" ({'; '.join(reasons)})" if reasons else ""
            say_once(log, logging.INFO, f"{op} on {platform}: {i.name}{passed}")
            return i.run
        reasons.append(f"{i.name}: {why}")
    raise ValueError(f"{op}: nothing runs on {platform}: {'; '.join(reasons)}")


@functools.cache
def say_once(logger: logging.Logger, level: int, text: str) -> None:
    """None; a line of the log that tells of a choice, the first time it is made."""
    logger.log(level, "%s", text)
