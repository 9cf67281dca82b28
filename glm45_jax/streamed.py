"""Arrays too large for a host's memory, into and out of a checkpoint, part by part.

`Streamed` is a leaf for `Checkpoints.save`: it says what the array is and hands its parts over one
after another. `open_arrays` opens the arrays of a saved step for reading, part by part. Both speak
the format of `checkpoint.py`: what one writes, `Checkpoints.restore` and plain orbax read.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import future, type_handlers

Part = tuple[tuple[slice, ...], np.ndarray]
_IN_FLIGHT = 4  # parts that are being written at once
_CACHE_BYTES = 2**28  # decoded chunks that are kept: a chunk may be larger than one read


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array that is written as it comes.

    parts: called once, in the thread that writes; yields (where, values), together the whole array,
    each part a union of whole chunks. It should not raise: orbax then prints its own traceback
    (`hf.convert` stops early and says so after). chunk: shape in which the array is cut on disk.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    parts: Callable[[], Iterator[Part]]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


class _StreamedHandler(type_handlers.NumpyHandler):
    """Writes `Streamed` leaves as orbax writes arrays, so that they are read back as arrays."""

    def typestr(self) -> str:
        return "jax.Array"

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        if jax.process_count() != 1:
            raise ValueError(
                f"{jax.process_count()} processes would each stream the whole array; run one"
            )
        writing = self._write(values, infos)
        return [future.CommitFutureAwaitingContractedSignals(writing, name="streamed arrays")]

    async def _write(self, values: Sequence[Any], infos: Sequence[Any]) -> None:
        for value, info in zip(values, infos, strict=True):
            spec = type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=value.shape,
                dtype=value.dtype,
                process_index=0,
            )
            # Weights hardly compress; the time it takes is more than the disk's.
            spec["metadata"] |= {"chunks": list(value.chunk), "compressor": None}
            await info.await_path_creation()
            store = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
            await _write_parts(store, value.parts())


def registry() -> Any:
    """Orbax's type handlers for arrays and for `Streamed`."""
    return type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler()), (Streamed, _StreamedHandler())
    )


def open_arrays(item: str | os.PathLike, names: Sequence[str]) -> dict[str, ts.TensorStore]:
    """The arrays `names` of a step's folder, open for reading; nothing is read yet.

    Chunks are cached by one small pool, so neighbouring reads of a large chunk decode it once.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    base = os.fspath(item)
    base = base if "://" in base else f"file://{os.path.abspath(base)}"

    def spec(name: str) -> dict[str, Any]:
        kvstore = {"driver": "ocdbt", "base": base, "path": name}
        return {"driver": "zarr", "kvstore": kvstore, "recheck_cached_data": "open"}

    opening = {name: ts.open(spec(name), read=True, context=context) for name in names}
    return {name: opened.result() for name, opened in opening.items()}


async def _write_parts(store: ts.TensorStore, parts: Iterator[Part]) -> None:
    pending: collections.deque[Any] = collections.deque()
    for where, values in parts:
        target = store[where]
        pending.append(target.write(values.reshape(target.shape)))
        while len(pending) >= _IN_FLIGHT:
            await pending.popleft()
    await asyncio.gather(*pending)
