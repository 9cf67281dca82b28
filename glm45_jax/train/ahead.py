"""Programs that are compiled before they are needed, in threads, while other steps train.

Every size of the batch and every stage has a step of its own; without this each switch stalls all
devices for as long as XLA takes. Types: `Programs` (one function of a trainer), `Asked`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from glm45_jax.data.types import Batch
from glm45_jax.train.stages import Span

log = logging.getLogger(__name__)

# Tracing holds Python's lock: threads that trace in turns end all at once, the first as late as the
# last. One traces at a time, in the order asked, while XLA compiles those before it.
_TRACING = threading.Lock()


class Programs:
    """One jitted function, whose programs may be compiled ahead, by the shapes of a batch.

    A call waits for a program that is being compiled, and compiles in place one that nobody has
    begun; what was compiled in place is not compiled ahead any more.
    """

    def __init__(self, call: Callable[[Any, Any], Any], lower: Callable[[Any], jax.stages.Lowered]):
        """call: (state, batch) -> anything. lower: the same of batches of these shapes."""
        self._call, self.lower = call, lower
        self._asked: dict[Hashable, Future[jax.stages.Compiled] | None] = {}  # None: in place
        self._lock = threading.Lock()

    def compile(self, shapes: Any) -> float:
        """Seconds that the program of such batches took to compile; 0 where that was begun
        already.
        """
        key, made = shapes_of(shapes), Future[jax.stages.Compiled]()
        with self._lock:
            if key in self._asked:
                return 0.0
            self._asked[key] = made
        began = time.monotonic()
        try:
            made.set_result(compiled(lambda: self.lower(shapes)))
        except BaseException as error:
            made.set_exception(error)  # raised again where the program is called
            raise
        return time.monotonic() - began

    def __call__(self, state: Any, batch: Any) -> Any:
        """What the function returns of them."""
        with self._lock:
            asked = self._asked.setdefault(shapes_of(batch), None)
        return self._call(state, batch) if asked is None else asked.result()(state, batch)


def compiled(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
    """The program, traced while no other thread traces in here."""
    with _TRACING:
        lowered = lower()
    return lowered.compile()


def shapes_of(batch: Any) -> Hashable:
    """Shapes and dtypes of the leaves."""
    return tuple((x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(batch))


@dataclasses.dataclass(frozen=True)
class Asked:
    """A program to compile: `compile` is a trainer's `compile_step` or `compile_nll`. name: for the
    log.
    """

    name: str
    compile: Callable[[Any], float]
    batch: Any


def of_span(
    trainer: Any, span: Span, end: int, start: int, validations: Iterable[Batch]
) -> list[Asked]:
    """What a trainer needs for the steps of a span up to `end`, where a run begins after step
    `start`; and for validation on these batches, which are of one host.
    """
    sizes, asked = span.sizes(), []
    for (first, rows), until in zip(sizes, [*(f for f, _ in sizes[1:]), end], strict=True):
        if first < end and until > start:
            name = f"{rows} rows of {span.ramp.seq_len}, from step {max(first, start) + 1}"
            shapes = batch_shapes(rows // jax.process_count(), span.ramp.seq_len)
            asked.append(Asked(name, trainer.compile_step, shapes))
    for batch in validations:
        name = f"validation, {' x '.join(map(str, batch.tokens_BT.shape))}"
        asked.append(Asked(name, trainer.compile_nll, batch))
    return asked


@contextlib.contextmanager
def compiling(asked: Sequence[Asked], threads: int) -> Iterator[None]:
    """Inside, so many threads compile what is asked, in this order; what is not begun at the end
    is dropped. 0 threads: nothing is compiled ahead.
    """
    if threads == 0 or not asked:
        yield
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
    try:
        for one in asked:
            pool.submit(_compile, one)
        yield
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batch_shapes(rows: int, seq_len: int) -> Batch:
    """Shapes of a batch of so many rows, as a loader makes it."""
    ids = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    return Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct((rows, seq_len), jnp.float32))


def _compile(asked: Asked) -> None:
    try:
        seconds = asked.compile(asked.batch)
    except Exception:
        log.exception("%s does not compile ahead; its first call raises the same", asked.name)
        raise
    if seconds:
        log.info("compiled ahead in %.1f s: %s", seconds, asked.name)
