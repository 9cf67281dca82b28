"""Between released folders and checkpoints of ours, streamed, without any device's memory.

`to_checkpoint` writes what `FromRun` starts from and `Checkpoints.restore` reads; `to_folder` what
vLLM and transformers read, from a run's workdir, a converted folder or another released folder.
`account` and `differences` look at either.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax import values
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.hf import files
from glm45_jax.hf.names import Entry, block_rows
from glm45_jax.hf.sources import Source, leaf_dtypes, of_checkpoint, of_folder, turned
from glm45_jax.hf.writer import published, write_folder
from glm45_jax.metrics import ByteProgress
from glm45_jax.model import transformer
from glm45_jax.streamed import Part, Streamed


def open_source(path: str | os.PathLike, step: int | None = None) -> Source:
    """A released folder (it has config.json), or a run's workdir or converted folder.

    Raises: ValueError where it is neither.
    """
    path = pathlib.Path(path)
    if is_released(path):
        return of_folder(path)
    if (path / "checkpoints").is_dir():
        return of_checkpoint(path, step)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    raise ValueError(
        f"{path} has neither {files.CONFIG} (a released folder) nor checkpoints/ (a run's workdir)"
    )


def is_released(path: pathlib.Path) -> bool:
    """Whether this is a folder of safetensors, whole or not, and no workdir."""
    return (path / files.CONFIG).exists() or any(path.glob("*.safetensors"))


def to_checkpoint(source: Source, path: str | os.PathLike, *, dtype: Any = None) -> None:
    """None, once `path/checkpoints` holds the weights as step 0 and `path/hf` the small files.

    dtype: of the leaves, but for the router's bias; default as the tensors are. The folder appears
    at the end by one rename.

    Raises: ValueError where `path` holds something already, or the source is damaged.
    """
    with published(path) as folder:
        dtypes = leaf_dtypes(source, dtype)
        total = sum(_nbytes(e, dtypes[e.leaf]) for e in source.entries if not e.copy)
        progress = ByteProgress(total, "convert")
        odd = {
            e.name: str(source.dtype[e.name])
            for e in source.entries
            if dtype is None and source.dtype[e.name] != dtypes[e.leaf]
        }
        sidecars = {"model": values.to_json(source.cfg), "hf_dtypes": odd}
        work = _Work(source, dtypes, progress)
        checkpoints = Checkpoints(folder / "checkpoints")
        try:
            checkpoints.save(0, {"params": _streamed(work)}, sidecars=sidecars)
            checkpoints.close()
        except BaseException as error:
            work.stop.set()  # an interrupt reaches this thread, not the one that writes
            with contextlib.suppress(ValueError):  # orbax: parts are missing
                checkpoints.close()
            if work.failed:
                raise work.failed[0] from error
            raise
        progress.close()
        (folder / "hf").mkdir()
        for file in source.files:
            shutil.copyfile(file, folder / "hf" / file.name)


def to_folder(source: Source, path: str | os.PathLike, **options: Any) -> None:
    """None, once `path` is a released folder; options as `write_folder`."""
    write_folder(path, source, what="convert", **options)


@dataclasses.dataclass(frozen=True)
class Account:
    """What a source holds: by kind of tensor (layer and expert numbers out) how many and bytes."""

    tensors: int
    nbytes: int
    kinds: dict[tuple[str, str, tuple[int, ...]], int]


def account(source: Source) -> Account:
    """Every tensor of a source, counted; opening it has checked that none is missing or unknown."""
    kinds: collections.Counter[tuple[str, str, tuple[int, ...]]] = collections.Counter()
    for e in source.entries:
        kinds[files.digits_out(e.name), str(source.dtype[e.name]), e.shape] += 1
    nbytes = sum(_nbytes(e, source.dtype[e.name]) for e in source.entries)
    return Account(len(source.entries), nbytes, dict(kinds))


@dataclasses.dataclass(frozen=True)
class Digest:
    """One tensor's contents: sha256 of its bytes, and how many are NaN or infinite."""

    name: str
    sha256: str
    not_finite: int


def digests(source: Source) -> Iterator[Digest]:
    """Every tensor, read whole."""
    progress = ByteProgress(account(source).nbytes, "check")
    for entry in source.entries:
        sha, bad = hashlib.sha256(), 0
        for block in _blocks(source, entry):
            sha.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
            bad += int(block.size - np.isfinite(block.astype(np.float32)).sum())
            progress.add(block.nbytes)
        yield Digest(entry.name, sha.hexdigest(), bad)
    progress.close()


def differences(a: Source, b: Source) -> Iterator[str]:
    """One line for each tensor that is not the same to the bit in both."""
    there = {e.name: e for e in b.entries}
    for name in sorted({e.name for e in a.entries} ^ there.keys()):
        yield f"{name}: only in the {'second' if name in there else 'first'}"
    progress = ByteProgress(account(a).nbytes, "diff")
    for entry in a.entries:
        other = there.get(entry.name)
        if other is None:
            continue
        kinds = [f"{s.dtype[entry.name]}{list(e.shape)}" for s, e in ((a, entry), (b, other))]
        if entry.shape != other.shape:
            yield f"{entry.name}: {kinds[0]} and {kinds[1]}"
            continue
        yield from _difference(a, b, entry, other, kinds)
        progress.add(_nbytes(entry, a.dtype[entry.name]))
    progress.close()


def _difference(
    a: Source, b: Source, entry: Entry, other: Entry, kinds: list[str]
) -> Iterator[str]:
    count, most = 0, 0.0
    itemsize = max(a.dtype[entry.name].itemsize, b.dtype[entry.name].itemsize)
    ranges = list(entry.blocks(itemsize))
    pairs = zip(a.rows(entry, ranges), b.rows(other, ranges), strict=True)
    for (_, _, mine), (_, _, theirs) in pairs:
        if kinds[0] == kinds[1] and mine.tobytes() == theirs.tobytes():
            continue
        x, y = mine.astype(np.float32), theirs.astype(np.float32)
        differ = x != y
        count += int(differ.sum())
        most = max(most, float(np.max(np.abs(x - y), initial=0.0, where=differ)))
    if count or kinds[0] != kinds[1]:
        yield f"{entry.name}: {' and '.join(kinds)}, {count} values differ, by {most:.3g} at most"


def _blocks(source: Source, entry: Entry) -> Iterator[np.ndarray]:
    for _, _, block in source.rows(entry, entry.blocks(source.dtype[entry.name].itemsize)):
        yield block


def _nbytes(entry: Entry, dtype: np.dtype) -> int:
    return int(np.prod(entry.shape)) * dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Work:
    """What the thread that writes shares with the one that waits."""

    source: Source
    dtypes: dict[str, np.dtype]
    progress: ByteProgress
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    failed: list[BaseException] = dataclasses.field(default_factory=list)

    def parts(self, entries: list[Entry]) -> Iterator[Part]:
        """The parts of one leaf; after a failure none, for what was written is thrown away."""
        try:
            for entry in entries:
                dtype = self.dtypes[entry.leaf]
                # The ranges are those of the chunks, in the dtype that is written.
                for low, high, block in self.source.rows(entry, entry.blocks(dtype.itemsize)):
                    if self.stop.is_set() or self.failed:
                        return
                    part = turned(entry.to_ours(block)).astype(dtype, copy=False)
                    self.progress.add(part.nbytes)
                    yield entry.part(low, high), part
        except BaseException as error:  # re-raised by the thread that waits
            self.failed.append(error)


def _streamed(work: _Work) -> Any:
    """`Params` of `Streamed` leaves."""
    entries: dict[str, list[Entry]] = {}
    for entry in work.source.entries:
        if not entry.copy:
            entries.setdefault(entry.leaf, []).append(entry)

    def one(path: Any, spec: params_lib.ParamSpec) -> Streamed:
        leaf = params_lib.path_name(path)
        first, dtype = entries[leaf][0], work.dtypes[leaf]
        rows = min(block_rows(first, dtype.itemsize), first.shape[0])
        chunk = tuple(s.stop - s.start for s in first.part(0, rows))
        return Streamed(spec.shape, dtype, chunk, functools.partial(work.parts, entries[leaf]))

    specs = transformer.specs(work.source.cfg)
    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=params_lib.is_spec)
