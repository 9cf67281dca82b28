"""Batches as a pure function of (seed, step): `Loader`.

Which row stands where is an `Order` (data/order.py: shuffle, reshuffle each epoch, mix by weight);
which rows make a step is a function `span(step)`, so batch-size ramps and resumes are exact, on any
number of hosts. Rows are read together, a batch at a time, in threads or in processes (grain).
Letters: `B` rows of this host, `T` tokens of a row, `S` sources, `N` rows asked for.
"""

import atexit
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from glm45_jax.data.order import ENDLESS, ORDER_FORMAT, Drawn, Order
from glm45_jax.data.pack import Row, RowSource, take
from glm45_jax.data.types import Batch
from glm45_jax.data.windows import WindowRows

_PROBE_ROWS = 8  # rows named in a saved state, to notice a changed order
_FIELDS = ("tokens", "targets", "segments", "positions", "mask")


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
        numbers: Sequence[int] | None = None,
        drawn: Sequence[int] | None = None,
    ):
        """Fixes the order of all rows; reads one row of each source.

        rows: sources with their shares of the rows (any positive scale). A source with `seeded`
        has rows of its own for every epoch. span: step -> (first row, number of rows) of the
        global batch. host: (index, count); each takes its contiguous part. fingerprint: names the
        data, compared on resume. numbers: which of the run's sources these are, which decides the
        order of each (default 0, 1, ...); drawn: rows of each that earlier stages have read.
        A stage that goes on from another gives the same seed, its own numbers, and what
        `rows_drawn` of the other said.

        Raises: ValueError for an empty or mismatched source, a bad weight, seed or host.
        """
        self._numbers = tuple(range(len(rows)) if numbers is None else numbers)
        self._drawn = tuple(len(rows) * (0,) if drawn is None else drawn)
        _check_mixture(rows, seed, host, self._numbers, self._drawn)
        self._made_of = (tuple(rows), seed, span, host, fingerprint, self._numbers, self._drawn)
        of_run = np.random.SeedSequence(seed).generate_state(max(self._numbers) + 1)
        seeds = [int(of_run[number]) for number in self._numbers]
        self._sources = tuple(
            source.seeded(own) if hasattr(source, "seeded") else source
            for (source, _), own in zip(rows, seeds, strict=True)
        )
        _check_shapes(self._sources)
        self._weights = tuple(float(weight) for _, weight in rows)
        lengths = [len(source) for source in self._sources]
        self._first_row_S = np.cumsum([0, *lengths])
        self._order = Order(lengths, self._weights, seeds, self._drawn)
        self._seed, self._span, self._host, self._fingerprint = seed, span, host, fingerprint
        self._fixed = _shared(self._sources)
        self._whole: dict[int, Row] = {}

    def __reduce__(self):
        return _loader, self._made_of

    def row_ids(self, first: int, n: int) -> np.ndarray:
        """Rows at places first .. first + n of the endless order, numbered through the sources."""
        drawn = self._order.at(first, n)
        return self._first_row_S[drawn.source_N] + drawn.row_N

    def rows_drawn(self, step: int) -> list[int]:
        """Rows of each source that the steps before this one read, earlier stages included."""
        return self._order.drawn_before(self._span(step)[0])

    def batch(self, step: int) -> Batch:
        """This host's rows of the step, as numpy; arrays that every batch shares are read-only.

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
        row = self._take(self._order.at(first + index * local, local))
        return Batch(**{f"{name}_BT": row[name] for name in _FIELDS})

    def iterate(
        self, start_step: int = 0, *, ahead: int = 6, threads: int = 1, processes: int = 0
    ) -> Generator[Batch]:
        """Batches of start_step, start_step + 1, ... without end, at most `ahead` made in advance.

        threads: one makes hundreds of millions of tokens a second; two are quicker for large
        batches and slower for small ones, whose hand-over costs more than they do.
        processes: make them in this many worker processes instead of threads: for a `RowSource` of
        your own that keeps Python busy. For stored rows threads are ten times faster.
        An exception while making a batch is raised here, at the step it belongs to. Close the
        iterator (or let it go) to end the threads or processes.

        Source: experiments/bench/data.py times both.
        """
        if processes:
            yield from _from_processes(self, start_step, ahead, processes)
            return
        together = 2 - ahead % 2  # batches of one hand-over, which costs a quarter of a small one
        workers = [_Worker(self.batch) for _ in range(threads)]

        def ask(part: int) -> None:
            first = start_step + part * together
            workers[part % threads].ask(range(first, first + together))

        try:
            for part in range(ahead // together):
                ask(part)
            for part in itertools.count():
                *before, last = workers[part % threads].answer()
                yield from map(_whole, before)
                ask(part + ahead // together)
                yield _whole(last)
        finally:
            for worker in workers:
                worker.close()

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps: JSON-able, the same on every host, good for any host count."""
        first, n = (int(x) for x in self._span(step))
        windows = [
            list(source.window_of(before)) if isinstance(source, WindowRows) else None
            for source, before in zip(self._sources, self._order.drawn_before(first), strict=True)
        ]
        return self._cheap_state(step) | {
            "span": [first, n],
            "windows": windows,
            "next_rows": self.row_ids(first, _PROBE_ROWS).tolist(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Nothing, when this loader would go on exactly where the saved one stopped.

        Sources that are packed while training go on from the window that the state names.

        Raises: ValueError naming what differs, with both values.
        """
        if "step" not in state:
            raise ValueError(f"loader state has {sorted(state)}, but no 'step'; not a loader state")
        state = {"format": 1} | state
        self._compare(state, self._cheap_state(state["step"]))
        for source, known in zip(self._sources, state.get("windows", ()), strict=True):
            if isinstance(source, WindowRows) and known:
                source.resume(*known)
        self._compare(state, self.state(state["step"]))

    def _cheap_state(self, step: int) -> dict[str, Any]:
        return {
            "format": ORDER_FORMAT,
            "step": step,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
            "mixture": [
                [len(source), weight, *getattr(source, "recipe", ())]
                for source, weight in zip(self._sources, self._weights, strict=True)
            ],
            "numbers": list(self._numbers),
            "drawn": list(self._drawn),
        }

    def _compare(self, state: dict[str, Any], mine: dict[str, Any]) -> None:
        for key, value in mine.items():
            if state.get(key) != value:
                raise ValueError(
                    f"loader state differs in {key}: saved {state.get(key)}, now {value}; restore "
                    f"the {_WAY_OUT[key]} of the saved run, or start a new run from its weights"
                )

    def _take(self, drawn: Drawn) -> Row:
        if len(self._sources) == 1:
            return {**self._rows_of(0, drawn.row_N, drawn.epoch_N), **self._shared_rows(drawn)}
        out: Row = dict(self._shared_rows(drawn))
        for s in np.unique(drawn.source_N):
            at = np.flatnonzero(drawn.source_N == s)
            found = self._rows_of(s, drawn.row_N[at], drawn.epoch_N[at])
            for name in (name for name in _FIELDS if name not in self._fixed):
                if len(at) == len(drawn.row_N):
                    out[name] = found[name]
                    continue
                if name not in out:
                    shape = (len(drawn.row_N), *found[name].shape[1:])
                    out[name] = np.empty(shape, found[name].dtype)
                out[name][at] = found[name]
        return out

    def _rows_of(self, s: int, row_N: np.ndarray, epoch_N: np.ndarray) -> Row:
        source = self._sources[s]
        if hasattr(source, "seeded"):
            row_N = row_N + epoch_N * len(source)
        return take(source, row_N)

    def _shared_rows(self, drawn: Drawn) -> Row:
        """What as many rows of any step have in common; read-only, made once for each number."""
        n = len(drawn.row_N)
        whole = self._whole.get(n)
        if whole is None:
            whole = {name: np.tile(row_T, (n, 1)) for name, row_T in self._fixed.items()}
            for array in whole.values():
                array.flags.writeable = False
            self._whole = {n: whole}
        return whole


class _Worker:
    """A thread that makes the batches it is asked for, in that order. An executor's futures cost
    20 us a batch more than these two queues.
    """

    def __init__(self, make: Callable[[int], Batch]):
        self._make, self._closed = make, False
        self._asked: SimpleQueue[range | None] = SimpleQueue()
        self._made: SimpleQueue[list[Batch | BaseException]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that reads while Python ends would abort it

    def ask(self, steps: range) -> None:
        self._asked.put(steps)

    def answer(self) -> list[Batch | BaseException]:
        return self._made.get()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._asked.put(None)
            self._thread.join()
            atexit.unregister(self.close)

    def _run(self) -> None:
        while (steps := self._asked.get()) is not None and not self._closed:
            self._made.put([self._try(step) for step in steps])

    def _try(self, step: int) -> Batch | BaseException:
        try:
            return self._make(step)
        except BaseException as error:  # raised again by _whole()
            return error


def _whole(made: Batch | BaseException) -> Batch:
    if isinstance(made, BaseException):
        raise made
    return made


_WAY_OUT = {
    "format": "version of this code",
    "step": "step",
    "seed": "seed",
    "fingerprint": "data",
    "mixture": "sources and weights",
    "numbers": "sources of the run",
    "drawn": "stages before this one",
    "span": "batch size schedule",
    "windows": "packing",
    "next_rows": "version of this code",
}


def _loader(rows, seed, span, host, fingerprint, numbers, drawn) -> Loader:
    return Loader(
        rows,
        seed=seed,
        span=span,
        host=host,
        fingerprint=fingerprint,
        numbers=numbers,
        drawn=drawn,
    )


def _from_processes(
    loader: Loader, start_step: int, ahead: int, processes: int
) -> Generator[Batch]:
    import grain  # here, because machines that only train in threads may lack it
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for a flag, and this program may have none
    steps = grain.MapDataset.range(start_step, 2**62).map(loader.batch)
    batches = iter(
        steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)).mp_prefetch(
            grain.MultiprocessingOptions(processes, per_worker_buffer_size=-(-ahead // processes)),
            worker_init_fn=_end_with_parent,
        )
    )
    try:
        yield from batches
    finally:
        batches.close()


def _end_with_parent(index: int, count: int) -> None:
    """Ends this worker process when the one that started it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _shared(sources: Sequence[RowSource]) -> Row:
    """What is the same in every row of every source, each [T]."""
    first, *others = [getattr(source, "fixed", {}) for source in sources]
    same = all(
        other.keys() == first.keys() and all(np.array_equal(other[k], first[k]) for k in first)
        for other in others
    )
    return first if same else {}


def _check_mixture(
    rows: Sequence[tuple[RowSource, float]],
    seed: int,
    host: tuple[int, int],
    numbers: Sequence[int],
    drawn: Sequence[int],
) -> None:
    if not rows:
        raise ValueError("the mixture has 0 sources; give at least one (rows, weight)")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is outside 0..{2**32 - 1}; use a smaller one")
    index, count = host
    if not 0 <= index < count:
        raise ValueError(f"host {index} of {count}: the index must be in 0..{count - 1}")
    if (
        not len(rows) == len(set(numbers)) == len(numbers) == len(drawn)
        or min(*numbers, *drawn) < 0
    ):
        raise ValueError(
            f"{len(rows)} sources, numbers {list(numbers)}, drawn {list(drawn)}; give each source "
            "a number of its own and the rows that were drawn of it, both at least 0"
        )
    for i, (source, weight) in enumerate(rows):
        if not weight > 0:
            raise ValueError(f"source {i} has weight {weight}; weights are > 0, or leave it out")
        if not 0 < len(source) <= ENDLESS:
            raise ValueError(
                f"source {i} has {len(source)} rows; give it more text, or leave it out"
            )


def _check_shapes(sources: Sequence[RowSource]) -> None:
    shapes = [source[0]["tokens"].shape for source in sources]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"source {i} has rows of {shape} tokens, source 0 of {shapes[0]}; build all "
                "with one seq_len"
            )
