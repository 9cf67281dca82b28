"""Several processes as one run: who joins whom, and what all of them must agree on.

A launch script sets GLM45_DISTRIBUTED; a run without it is one process. Nothing here costs anything
then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

VARIABLE = "GLM45_DISTRIBUTED"
_FORMS = '"auto" (Slurm, TPU and Kubernetes are found by JAX), or HOST:PORT,PROCESSES,THIS_ONE'


def join(environ: Mapping[str, str] = os.environ) -> None:
    """None; this process is one of those that the environment names. Call it before anything asks
    JAX for devices.

    Raises: ValueError for a value of another form. JAX's own errors where the others do not come.
    """
    text = environ.get(VARIABLE, "")
    if not text:
        return
    where = address(text)
    if where is None:
        jax.distributed.initialize()
    else:
        coordinator, processes, process = where
        jax.distributed.initialize(coordinator, processes, process)
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # A CPU program from the cache may run its collectives in another order than the same one
        # compiled, and the first process alone writes the cache: one waits in an all-to-all, the
        # other in an all-reduce, for ever (seen in four of five starts, never without the cache).
        jax.config.update("jax_enable_compilation_cache", False)


def address(text: str) -> tuple[str, int, int] | None:
    """(coordinator, number of processes, which one this is), or None for "auto".

    Raises: ValueError for another form.
    """
    if text == "auto":
        return None
    try:
        coordinator, processes, process = text.split(",")
        host, port = coordinator.rsplit(":", 1)
        found = coordinator, int(processes), int(process)
        if not host or not 0 < int(port) < 2**16 or not 0 <= found[2] < found[1]:
            raise ValueError
    except ValueError:
        raise ValueError(f"{VARIABLE} is {text!r}; give {_FORMS}") from None
    return found


def first_then_others[T](make: Callable[[], T], what: str) -> T:
    """`make()`, of process 0 before that of the others, which find what it left on a shared disk
    (and make their own where there is none).
    """
    if jax.process_count() == 1:
        return make()
    made = make() if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices(what)
    return make() if made is None else made


def anyone(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call it, at the same place."""
    if jax.process_count() == 1:
        return flag
    return bool(np.asarray(multihost_utils.process_allgather(np.int32(flag))).any())


def whole(tree: Any) -> Any:
    """The arrays whole in the memory of every process, which need not hold their shards; as they
    are, if there is one process. All must call it.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(jnp.asarray, multihost_utils.process_allgather(tree, tiled=True))
