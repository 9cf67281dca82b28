"""Tokens straight from the chunk files of a store: `Chunks`.

Chunks are written uncompressed (data/store.py), so a span of tokens is a span of bytes, and one
`preadv` a span puts it where it is wanted. Nothing is kept but open files: the pages read belong to
the kernel, not to this process, whose memory stays the same however many stores it reads. Through
TensorStore the same rows took 10 times as long and a cache of chunks a store. Letters: `N` spans.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_OPEN_FILES = 256  # of all stores together; the usual limit of a process is 1024


class _File:
    """An open file that closes when nobody reads it any more."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close=os.close):  # bound here: at exit the module may be gone before us
        if hasattr(self, "number"):
            close(self.number)


class Chunks:
    """The chunk files of one store. Safe to read from several threads, cheap to send elsewhere."""

    def __init__(self, folder: Path, dtype: str, chunk_tokens: int):
        """folder: holds files 0, 1, ... of chunk_tokens tokens each, little-endian `dtype`."""
        self._made_of = (folder, dtype, chunk_tokens)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._folder, self._chunk_tokens = folder, chunk_tokens

    def __reduce__(self):
        return Chunks, self._made_of

    def path(self, chunk: int) -> Path:
        """The file of a chunk."""
        return self._folder / str(chunk)

    def read_into(
        self,
        out: np.ndarray,
        at_N: Sequence[int] | np.ndarray,
        start_N: Sequence[int] | np.ndarray,
        length_N: Sequence[int] | np.ndarray,
    ) -> None:
        """Puts tokens start .. start + length of every span at its place `at` of `out`.

        out: one-dimensional, contiguous, of `dtype`. Spans are inside the store: callers check.

        Raises: OSError when a file is gone or too short.
        """
        width, size = self.dtype.itemsize, self._chunk_tokens
        view, read = memoryview(out).cast("B"), os.preadv
        spans = zip(*(np.asarray(x).tolist() for x in (at_N, start_N, length_N)), strict=True)
        for at, start, length in spans:
            chunk, inside = divmod(start, size)
            while length:
                n = length if inside + length <= size else size - inside
                part = view[at * width : (at + n) * width]
                file = _opened(self, chunk)  # held: two threads may open it, and one file is let go
                got = read(file.number, (part,), inside * width)
                if got != n * width:
                    raise OSError(
                        f"{self.path(chunk)} gave {got} bytes where {n * width} were "
                        "asked; it was cut short since it was opened: copy the store anew"
                    )
                at, length, chunk, inside = at + n, length - n, chunk + 1, 0


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(chunks: Chunks, chunk: int) -> _File:
    return _File(chunks.path(chunk))
