"""Folders of safetensors: every header checked at the door, bytes read where they are wanted.

The type to know is `Folder`. Nothing is mapped into memory: a block is read when it is asked for,
so that what a process holds is what it asked for. A folder that we wrote has `checksums.json`
beside the tensors, and every byte that is read is checked against it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from glm45_jax import integrity

_logger = logging.getLogger(__name__)

INDEX, CONFIG, CHECKSUMS = "model.safetensors.index.json", "config.json", "checksums.json"
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT_BYTES = 100 * 2**20  # as the safetensors library has it
_SHOWN = 200  # problems that a message spells out


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `nbytes` bytes at `start` of `file`, C order."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Rows, where all dimensions but the last are one; elements of a vector."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one of these rows."""
        return self.shape[-1:] if len(self.shape) > 1 else ()


@dataclasses.dataclass(frozen=True)
class Folder:
    """A checked folder: its tensors by name, config.json as text and parsed, checksums if written.

    crc: CRC-32 of each tensor's bytes, empty where the folder has no `checksums.json`.
    """

    path: pathlib.Path
    tensors: dict[str, Tensor]
    config_text: str
    config: Any
    crc: dict[str, int]

    def read(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows [first, last) of a tensor (see `Tensor.rows`), in the dtype of the file.

        Raises: ValueError where the file has become shorter than its header says.
        """
        t = self.tensors[name]
        out = np.empty(((t.rows if last is None else last) - first, *t.row_shape), t.dtype)
        row_bytes = math.prod(t.row_shape) * t.dtype.itemsize
        with t.file.open("rb", buffering=0) as file:
            file.seek(t.start + first * row_bytes)
            _read_into(file, out.reshape(-1).view(np.uint8), t.file)
        return out

    def whole(self, name: str) -> np.ndarray:
        """All rows of a tensor, checked as by `blocks`."""
        every = list(self.blocks(name, [(0, self.tensors[name].rows)]))
        return every[0][2]

    def blocks(
        self, name: str, ranges: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first, last, rows [first, last)) of a tensor, range by range.

        Raises: ValueError after the last one, where the ranges were the whole tensor, in order, and
        its bytes are not those that were written.
        """
        crc, at = 0, 0
        for first, last in ranges:
            block = self.read(name, first, last)
            if self.crc and at == first:
                crc, at = zlib.crc32(block.reshape(-1).view(np.uint8), crc), last
            yield first, last, block
        if self.crc and at == self.tensors[name].rows and crc != self.crc[name]:
            raise ValueError(
                f"{self.tensors[name].file}: {name} has CRC-32 {crc}, {self.crc[name]} was "
                "written; copy the file again"
            )


class Problems:
    """What is wrong with a folder, gathered, so that one error lists all of it."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        """None; remembers one problem."""
        self._lines.append(line)

    def add_all(self, what: str, names: list[str]) -> None:
        """None; remembers one problem of many tensors, alike names drawn together by number."""
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(digits_out(name), []).append(name)
        for group in alike.values():
            if len(group) <= 3:
                self._lines += [f"{what}: {name}" for name in group]
            else:
                self._lines.append(
                    f"{what}: {len(group)} like {digits_out(group[0])} ({group[0]} ... {group[-1]})"
                )

    def check(self) -> None:
        """Raises: ValueError with every problem, if there is one."""
        if not self._lines:
            return
        lines = self._lines[:_SHOWN]
        if len(self._lines) > _SHOWN:
            lines.append(f"and {len(self._lines) - _SHOWN} more")
        raise ValueError(
            f"{self._path}: {len(self._lines)} problem(s), nothing was loaded:\n  "
            + "\n  ".join(lines)
        )


def open_folder(path: str | os.PathLike) -> Folder:
    """The folder, after its config, its index and the header of every file have been checked.

    Raises: ValueError listing every problem; FileNotFoundError where there is no such folder.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; give the folder that holds {CONFIG}")
    problems = Problems(path)
    text, config = _config(path, problems)
    found: dict[str, Tensor] = {}
    for file, promised in _shards(path, problems).items():
        _add_tensors(found, file, promised, path, problems)
    crc = _checked_sums(path, problems)
    problems.check()
    if not crc:
        _logger.info("%s has no %s: its bytes are read as they are", path, CHECKSUMS)
    elif missing := sorted(found.keys() - crc.keys()):
        raise ValueError(f"{path}: {CHECKSUMS} knows nothing of {missing[:3]}; write it anew")
    return Folder(path, found, text, config, crc)


def header_end(path: pathlib.Path) -> int:
    """Where the data of a safetensors file begin."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def parse_json(text: str) -> Any:
    """JSON without doubled keys or NaN.

    Raises: ValueError.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            names = [key for key, _ in items]
            twice = sorted({key for key in names if names.count(key) > 1})
            raise ValueError(f"{twice[:3]} stand there twice")
        return out

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@contextlib.contextmanager
def _named(problems: Problems, what: str) -> Iterator[None]:
    """Problems that reading `what` meets, as one line each."""
    try:
        yield
    except OSError as error:
        problems.add(f"{what}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        problems.add(f"{what} is not what it should be: {type(error).__name__}: {error}")


def _config(path: pathlib.Path, problems: Problems) -> tuple[str, Any]:
    with _named(problems, CONFIG):
        text = (path / CONFIG).read_text(encoding="utf-8")
        return text, parse_json(text)
    return "", None


def _shards(path: pathlib.Path, problems: Problems) -> dict[str, set[str] | None]:
    """File name -> the tensors the index promises in it; None where there is no index."""
    here = sorted(file.name for file in path.glob("*.safetensors"))
    if not (path / INDEX).exists():
        if len(here) != 1 or "-of-" in here[0]:
            problems.add(f"{INDEX} is missing beside {len(here)} .safetensors files")
        return dict.fromkeys(here)
    promised: dict[str, set[str] | None] = {}
    with _named(problems, INDEX):
        index = parse_json((path / INDEX).read_text(encoding="utf-8"))
        for name, file in index["weight_map"].items():
            if not isinstance(file, str) or pathlib.PurePath(file).name != file or "\\" in file:
                problems.add(f"{INDEX}: {name} lies in {file!r}, which is no file name of a folder")
                continue
            names = promised.setdefault(file, set())
            assert names is not None
            names.add(name)
    for file in sorted(promised.keys() - set(here)):
        problems.add(f"{file} is in {INDEX}, but not in the folder")
    for file in sorted(set(here) - promised.keys()):
        problems.add(f"{file} is in the folder, but not in {INDEX}")
    return {file: promised[file] for file in here if file in promised}


def _add_tensors(
    found: dict[str, Tensor],
    file: str,
    promised: set[str] | None,
    path: pathlib.Path,
    problems: Problems,
) -> None:
    """None; the tensors of one file join `found`."""
    here: dict[str, Tensor] = {}
    with _named(problems, file):
        here = read_header(path / file)
    if not here:
        return
    problems.add_all(f"{file} repeats a tensor of another file", sorted(found.keys() & here.keys()))
    if promised is not None:
        problems.add_all(f"{INDEX} promises, but {file} has not", sorted(promised - here.keys()))
        problems.add_all(f"{file} has, but not in {INDEX}", sorted(here.keys() - promised))
    found.update(here)


def read_header(file: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    Raises: ValueError where the header is none, or its tensors do not tile the file exactly.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT_BYTES, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}; copy the file again")
        header = parse_json(stream.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        shape, (begin, end) = _shape(name, entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {entry['dtype']}, this code reads {sorted(DTYPES)}")
        dtype = DTYPES[entry["dtype"]]
        nbytes = math.prod(shape) * dtype.itemsize
        if end - begin != nbytes:
            raise ValueError(f"{name} {entry['dtype']}{list(shape)} in {end - begin} bytes")
        tensors[name] = Tensor(file, dtype, shape, 8 + length + begin)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise ValueError(f"{name} begins at byte {begin}, the tensor before ends at {at}")
        at = end
    if 8 + length + at != size:
        raise ValueError(
            f"the file has {size} bytes, its header tells of {8 + length + at}; copy it again"
        )
    return tensors


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    good = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not good or len(shape) == 0:
        raise ValueError(f"{name} has shape {shape!r}")
    return tuple(shape)


def _checked_sums(path: pathlib.Path, problems: Problems) -> dict[str, int]:
    """CRC-32 by tensor, after small files and headers have been checked; empty without the file."""
    if not (path / CHECKSUMS).exists():
        return {}
    with _named(problems, CHECKSUMS):
        whole = parse_json((path / CHECKSUMS).read_text(encoding="utf-8"))
        body = whole["body"]
        if whole["crc32"] != integrity.of_json(body):
            raise ValueError(
                f"its own CRC-32 is {integrity.of_json(body)}, {whole['crc32']} was written"
            )
        for name, (size, _) in body["files"].items():
            if (path / name).stat().st_size != size:
                problems.add(f"{name} has {(path / name).stat().st_size} bytes, {size} written")
        for name, (span, crc) in {**body["files"], **body["headers"]}.items():
            _, found = integrity.of_file(path / name, span)
            if found != crc:
                problems.add(f"{name}: its first {span} bytes have CRC-32 {found}, {crc} written")
        return {str(name): int(crc) for name, crc in body["tensors"].items()}
    return {}


def _read_into(file: BinaryIO, out: np.ndarray, path: pathlib.Path) -> None:
    view, at = memoryview(out), 0
    while at < len(view):
        n = file.readinto(view[at:])  # type: ignore[attr-defined]
        if not n:
            raise ValueError(f"{path} ended {len(view) - at} bytes early; copy it again")
        at += n


def digits_out(name: str) -> str:
    """A tensor's name with its layer and expert numbers as `*`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
