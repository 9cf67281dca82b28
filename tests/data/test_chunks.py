"""Laws of reading chunk files: the bytes that were written, from any thread, or a clear error."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from glm45_jax.data import chunks as chunks_module
from glm45_jax.data.chunks import Chunks

SIZE = 7


@pytest.fixture
def chunked(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60_000, 90 * SIZE).astype(np.uint16)
    for i in range(90):
        (tmp_path / str(i)).write_bytes(tokens[i * SIZE : (i + 1) * SIZE].tobytes())
    return Chunks(tmp_path, "uint16", SIZE), tokens


def read(chunks, start, length):
    out = np.zeros(length + 2, chunks.dtype)
    chunks.read_into(out, [1], [start], [length])
    assert out[0] == out[-1] == 0
    return out[1:-1]


def test_a_span_over_any_number_of_chunks_is_what_was_written(chunked):
    chunks, tokens = chunked
    for start in (0, 3, SIZE, 100):
        for length in (0, 1, SIZE - 3, SIZE, 5 * SIZE + 2):
            np.testing.assert_array_equal(
                read(chunks, start, length), tokens[start : start + length]
            )
    again = pickle.loads(pickle.dumps(chunks))
    np.testing.assert_array_equal(read(again, 0, len(tokens)), tokens)


def test_threads_that_open_and_drop_the_same_files_read_what_was_written(chunked, monkeypatch):
    # Two threads may open a file at once, and one of the two is forgotten: it must not close, and
    # its number not go to another file, before it was read.
    chunks, tokens = chunked

    def opened(chunks, chunk):
        return chunks_module._File(chunks.path(chunk))  # as if nothing stayed in the cache

    monkeypatch.setattr(chunks_module, "_opened", opened)
    before = len(os.listdir("/proc/self/fd"))

    def work(seed):
        for start in np.random.default_rng(seed).integers(0, len(tokens) - 30, 400).tolist():
            np.testing.assert_array_equal(read(chunks, start, 30), tokens[start : start + 30])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_more_files_stay_open_than_the_cache_holds(chunked):
    chunks, tokens = chunked
    chunks_module._opened.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    read(chunks, 0, len(tokens))
    assert len(os.listdir("/proc/self/fd")) - before == 90 <= chunks_module._OPEN_FILES
    chunks_module._opened.cache_clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_was_cut_short_or_is_gone_is_an_error_that_names_it(chunked, tmp_path):
    chunks, _ = chunked
    os.truncate(tmp_path / "5", 6)
    with pytest.raises(OSError, match=r"/5 gave 6 bytes where 14 were asked; .* copy the store"):
        read(chunks, 4 * SIZE, 2 * SIZE)
    (tmp_path / "8").unlink()
    with pytest.raises(FileNotFoundError, match=r"/8'"):
        read(chunks, 8 * SIZE, 1)
