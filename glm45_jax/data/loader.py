"""Batches as a pure function of (seed, step): `Loader`.

Which row stands where is a grain `MapDataset` (shuffle, reshuffle each epoch, mix by weight); which
rows make a step is a function `span(step)`, so batch-size ramps and resumes are exact, on any
number of hosts. Only numbers go through grain; rows are read together, a batch at a time.
Letters: `B` rows of this host, `T` tokens of a row, `S` sources, `N` rows asked for.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from glm45_jax.data.pack import Row, RowSource, take
from glm45_jax.data.types import Batch

_PROBE_ROWS = 8  # rows named in a saved state, to notice a changed order


class Loader:
    """Batches of a mixture of row sources for one host of several."""

    def __init__(
        self,
        rows: Sequence[tuple[RowSource, float]],
        *,
        seed: int,
        span: Callable[[int], tuple[int, int]],
        host: tuple[int, int] = (0, 1),
        fingerprint: str,
    ):
        """Fixes the order of all rows; reads one row of each source.

        rows: sources with their shares of the rows (any positive scale). span: step -> (first row,
        number of rows) of the global batch. host: (index, count); each takes its contiguous part.
        fingerprint: names the data, compared on resume.

        Raises: ValueError for an empty or mismatched source, a bad weight, seed or host.
        """
        _check_mixture(rows, seed, host)
        self._sources = tuple(source for source, _ in rows)
        self._weights = tuple(float(weight) for _, weight in rows)
        self._first_row_S = np.cumsum([0] + [len(source) for source in self._sources])
        self._order = _order(self._first_row_S, self._weights, seed)
        self._seed, self._span, self._host, self._fingerprint = seed, span, host, fingerprint

    def row_ids(self, first: int, n: int) -> np.ndarray:
        """Rows at places first .. first + n of the endless order, numbered through the sources."""
        return np.array([self._order[place] for place in range(first, first + n)], np.int64)

    def batch(self, step: int) -> Batch:
        """This host's rows of the step, as numpy.

        Raises: ValueError when the step's rows do not divide among the hosts.
        """
        index, count = self._host
        first, n = self._span(step)
        if n <= 0 or n % count:
            raise ValueError(
                f"step {step} has {n} rows for {count} hosts; make the batch a positive multiple "
                f"of {count} at every step (also inside a ramp)"
            )
        local = n // count
        row = self._take(self.row_ids(first + index * local, local))
        return Batch(
            tokens_BT=row["tokens"],
            targets_BT=row["targets"],
            segments_BT=row["segments"],
            positions_BT=row["positions"],
            mask_BT=row["mask"],
        )

    def iterate(self, start_step: int = 0, *, ahead: int = 4, threads: int = 1) -> Generator[Batch]:
        """Batches of start_step, start_step + 1, ... without end, at most `ahead` made in advance.

        An exception while making a batch is raised here, at the step it belongs to. Close the
        iterator (or let it go) to end the threads.
        """
        pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        try:
            pending = deque(pool.submit(self.batch, start_step + k) for k in range(ahead))
            step = start_step + ahead
            while True:
                batch = pending.popleft().result()
                pending.append(pool.submit(self.batch, step))
                step += 1
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps: JSON-able, the same on every host, good for any host count."""
        first, n = (int(x) for x in self._span(step))
        return {
            "step": step,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
            "mixture": [
                [len(source), weight]
                for source, weight in zip(self._sources, self._weights, strict=True)
            ],
            "span": [first, n],
            "next_rows": self.row_ids(first, _PROBE_ROWS).tolist(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Nothing, when this loader would go on exactly where the saved one stopped.

        Raises: ValueError naming what differs, with both values.
        """
        if "step" not in state:
            raise ValueError(f"loader state has {sorted(state)}, but no 'step'; not a loader state")
        for key, mine in self.state(state["step"]).items():
            if state.get(key) != mine:
                raise ValueError(
                    f"loader state differs in {key}: saved {state.get(key)}, now {mine}; restore "
                    f"the {_WAY_OUT[key]} of the saved run, or start a new run from its weights"
                )

    def _take(self, id_N: np.ndarray) -> Row:
        source_N = np.searchsorted(self._first_row_S, id_N, side="right") - 1
        out: Row = {}
        for s in np.unique(source_N):
            at = np.flatnonzero(source_N == s)
            found = take(self._sources[s], id_N[at] - self._first_row_S[s])
            for name, array in found.items():
                if name not in out:
                    out[name] = np.empty((len(id_N), *array.shape[1:]), array.dtype)
                out[name][at] = array
        return out


_WAY_OUT = {
    "step": "step",
    "seed": "seed",
    "fingerprint": "data",
    "mixture": "sources and weights",
    "span": "batch size schedule",
    "next_rows": "version of grain",
}


def _order(first_row_S: np.ndarray, weights: Sequence[float], seed: int) -> grain.MapDataset:
    # A seed for each source: grain counts the seed up with every epoch, so neighbouring seeds would
    # repeat each other's orders. Its shuffle costs about 10 us a row; for n < 1000 rows, 33 ms / n.
    seeds = np.random.SeedSequence(seed).generate_state(len(weights))
    shuffled = [
        grain.MapDataset.range(int(start), int(stop)).shuffle(seed=int(s)).repeat()
        for start, stop, s in zip(first_row_S[:-1], first_row_S[1:], seeds, strict=True)
    ]
    return grain.MapDataset.mix(shuffled, weights=list(weights))


def _check_mixture(
    rows: Sequence[tuple[RowSource, float]], seed: int, host: tuple[int, int]
) -> None:
    if not rows:
        raise ValueError("the mixture has 0 sources; give at least one (rows, weight)")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is outside 0..{2**32 - 1}; use a smaller one")
    index, count = host
    if not 0 <= index < count:
        raise ValueError(f"host {index} of {count}: the index must be in 0..{count - 1}")
    shapes = []
    for i, (source, weight) in enumerate(rows):
        if not weight > 0:
            raise ValueError(f"source {i} has weight {weight}; weights are > 0, or leave it out")
        if len(source) == 0:
            raise ValueError(f"source {i} has 0 rows; give it more text, or leave it out")
        shapes.append(source[0]["tokens"].shape)
        if shapes[i] != shapes[0]:
            raise ValueError(
                f"source {i} has rows of {shapes[i]} tokens, source 0 of {shapes[0]}; build all "
                "with one seq_len"
            )
