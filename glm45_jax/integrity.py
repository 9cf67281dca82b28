"""CRC-32 of files and of JSON values, the same for everything this library saves; files that appear
whole.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_READ_BYTES = 16 * 2**20
_READ_THREADS = 8


def write_whole(path: Path, data: bytes) -> None:
    """A file that appears with all its bytes or not at all, also when the machine stops."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    with temporary.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def of_file(path: Any, last: int | None = None) -> tuple[int, int]:
    """(bytes, CRC-32) of a file, or of its first `last` bytes. path: anything with `open`."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES if last is None else min(_READ_BYTES, last - size)):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def of_files(root: Any, names: list[str]) -> dict[str, tuple[int, int]]:
    """(bytes, CRC-32) by name of files below `root`, read side by side."""
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: of_file(root / name), names), strict=True))


def files_below(root: Any, below: str = "") -> list[str]:
    """Every file under `root / below`, relative to `root`; none if that is not there."""
    folder = root / below if below else root
    names: list[str] = []
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        name = f"{below}/{path.name}" if below else path.name
        names.extend(files_below(root, name) if path.is_dir() else [name])
    return names


def of_json(body: Any) -> int:
    """CRC-32 of a JSON value, however it is laid out."""
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
