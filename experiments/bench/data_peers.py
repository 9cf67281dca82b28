"""The same tokens read in other ways, for `experiments.bench.data`: numpy's memmap and plain grain.

Every peer is a function that gives the next batch of shuffled rows. `memmap` and `plain_grain` make
the five arrays that `Loader` makes; `memmap_xy` makes what nanoGPT's get_batch does: tokens and
targets as int64, from random starts.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from glm45_jax.data.pack import Row
from glm45_jax.data.store import TokenStore

Next = Callable[[], Any]


def write_flat(store: TokenStore, path: Path) -> Path:
    """All tokens of the store as one file of its dtype."""
    with path.open("wb") as file:
        for start in range(0, store.manifest.n_tokens, 2**20):
            stop = min(start + 2**20, store.manifest.n_tokens)
            file.write(store.read(start, stop).astype(store.chunks.dtype).tobytes())
    return path


def write_records(store: TokenStore, seq_len: int, path: Path) -> Path:
    """An ArrayRecord of rows: seq_len + 1 tokens of the store's dtype each."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i in range((store.manifest.n_tokens - 1) // seq_len):
        tokens = store.read(i * seq_len, (i + 1) * seq_len + 1)
        writer.write(tokens.astype(store.chunks.dtype).tobytes())
    writer.close()
    return path


def memmap(flat: Path, dtype: np.dtype, seq_len: int, n_rows: int) -> Next:
    """Rows in a random order of each epoch, cast a batch at a time."""
    tokens = np.memmap(flat, dtype, "r")
    random, total = np.random.default_rng(0), (len(tokens) - 1) // seq_len
    order: list[int] = []

    def batch() -> tuple[np.ndarray, ...]:
        nonlocal order
        while len(order) < n_rows:
            order += (random.permutation(total) * seq_len).tolist()
        starts, order = order[:n_rows], order[n_rows:]
        both = np.stack([tokens[start : start + seq_len + 1] for start in starts]).astype(np.int32)
        shape = (n_rows, seq_len)
        positions = np.tile(np.arange(seq_len, dtype=np.int32), (n_rows, 1))
        ones = np.ones(shape, np.int32)
        return both[:, :-1], both[:, 1:], ones, positions, np.ones(shape, np.float32)

    return batch


def memmap_xy(flat: Path, dtype: np.dtype, seq_len: int, n_rows: int) -> Next:
    """Tokens and targets only, as int64, from random starts."""
    tokens, random = np.memmap(flat, dtype, "r"), np.random.default_rng(0)

    def batch() -> tuple[np.ndarray, np.ndarray]:
        starts = random.integers(0, len(tokens) - seq_len - 1, n_rows).tolist()
        x = np.stack([tokens[i : i + seq_len].astype(np.int64) for i in starts])
        y = np.stack([tokens[i + 1 : i + 1 + seq_len].astype(np.int64) for i in starts])
        return x, y

    return batch


class Decode:
    """A record to a row of five arrays."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def __call__(self, record: bytes) -> Row:
        tokens = np.frombuffer(record, self.dtype).astype(np.int32)
        n = len(tokens) - 1
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "segments": np.ones(n, np.int32),
            "positions": np.arange(n, dtype=np.int32),
            "mask": np.ones(n, np.float32),
        }


def plain_grain(records: Path, dtype: np.dtype, n_rows: int, processes: int) -> Generator[Any]:
    """grain's own source, shuffle, repeat, map, batch and prefetch, in its fastest order here.

    Batches made behind `to_iter_dataset`, as its documentation has it, are six times slower; made
    before it they need a smaller buffer than the 500 elements it holds by default.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    rows = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(str(records)))
    shuffled = rows.shuffle(seed=0).repeat().map(Decode(dtype))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches: Any = shuffled.batch(n_rows, drop_remainder=True).to_iter_dataset(options)
    if processes:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(processes))
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()


class RecordRows:
    """The same ArrayRecord as rows for `Loader`."""

    def __init__(self, records: Path, dtype: np.dtype):
        self.records, self.decode = records, Decode(dtype)
        self.source = grain.sources.ArrayRecordDataSource(str(records))

    def __reduce__(self):
        return RecordRows, (self.records, self.decode.dtype)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.decode(self.source[i])

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def take(self, indices: Sequence[int] | np.ndarray) -> Row:
        """Many rows, read in one call."""
        rows = [self.decode(record) for record in self.source.__getitems__(list(map(int, indices)))]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
