"""How fast rows are packed and read: `python -m experiments.bench.data [--cache DIR]`.

Prepares the text of the third stage (spec 5.1: repositories and code) from what is installed, then
measures packing (1M lengths on one core, padding of the mixture at 32K), the loader beside numpy's
memmap and plain grain over the same tokens, threads beside processes, and every packing. Readers
take turns in rounds, so that a busy machine is busy for all of them; ratios are medians of rounds.
Writes experiments/bench/results/<device>.json under the key "data".
"""

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench import data_peers as peers
from experiments.bench.results import cpu_name, merge_result
from glm45_jax.data.fit import best_fit
from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import BestFit, Cut, RowSource
from glm45_jax.data.prepare import Data, Prepared, prepare, rows
from glm45_jax.data.repositories import Repositories
from glm45_jax.data.sources import PythonSources

SEQ_LEN = 4096  # of the readers that are compared
BATCH_TOKENS = {"64k": 2**16, "1m": 2**20}
ROUNDS, SECONDS = 9, 0.4  # of each reader in each round
PAUSE_S = 0.1  # between turns
TARGET_TOKENS_PER_S, TARGET_OF_MEMMAP = 1_000_000, 0.9
PACK_DOCS, PACK_TRIES, PACK_TARGET_S = 1_000_000, 3, 10.0  # the fastest try counts
LONG, WINDOW, PADDING_TARGET_PERCENT = 32768, 1024, 0.5
CHARS_PER_TOKEN = 4.0  # of this vocabulary: a document of 32K tokens fills a row of 32K
CASES: dict[str, tuple[Cut | BestFit, int]] = {
    "cut_4096": (Cut(), 4096),
    "cut_moving_4096": (Cut(moving=True), 4096),
    "cut_document_mask_4096": (Cut(document_mask=True), 4096),
    "best_fit_4096": (BestFit(), 4096),
    "best_fit_32768": (BestFit(), LONG),
    "best_fit_window_32768": (BestFit(window=WINDOW), LONG),
    "cut_128": (Cut(), 128),
    "best_fit_128": (BestFit(), 128),
}


def bench_data() -> Data:
    """The third stage on installed packages: repositories in dependency order, and their files."""
    trees = PythonSources(name="code", include=("stdlib", "site"))
    repositories = Repositories(trees, repository_splits=False, chars_per_token=CHARS_PER_TOKEN)
    return Data(
        sources=((repositories, 0.8), (trees, 0.2)), seq_len=LONG, packing=BestFit(), vocab=16_384
    )


def pack_seconds() -> dict[str, Any]:
    """Seconds of one core to pack 1M documents; lengths as documents have them, and the worst."""
    random = np.random.default_rng(0)
    out: dict[str, Any] = {}
    for capacity in (LONG, 131_072):
        natural = np.minimum(random.lognormal(7.0, 1.5, PACK_DOCS).astype(int) + 1, capacity)
        uniform = random.integers(1, capacity + 1, PACK_DOCS)
        halves = random.integers(capacity // 2 + 1, capacity + 1, PACK_DOCS)
        for name, lengths in (("lognormal", natural), ("uniform", uniform), ("upper half", halves)):
            tries = []
            for _ in range(PACK_TRIES):
                wall, cpu = time.perf_counter(), time.process_time()
                bins = best_fit(lengths, capacity)
                tries.append((time.perf_counter() - wall, time.process_time() - cpu))
            out[f"{name}_{capacity}"] = {
                "wall_s": round(min(wall for wall, _ in tries), 2),
                "cpu_s": round(min(cpu for _, cpu in tries), 2),
                "padding_percent": round(
                    float(100 * (1 - lengths.sum() / len(bins) / capacity)), 4
                ),
            }
    out["meets_target"] = max(case["wall_s"] for case in out.values()) < PACK_TARGET_S
    return out


def padding(data: Data, prepared: Prepared) -> dict[str, Any]:
    """Percent of places that are padding at 32K, in the rows as mixed, over an epoch of both."""
    n_rows = sum(store.manifest.n_tokens for store in prepared.train.values()) // LONG
    out: dict[str, Any] = {"rows": n_rows}
    for name, packing in (("best_fit", BestFit()), (f"window_{WINDOW}", BestFit(window=WINDOW))):
        mixture = rows(replace(data, packing=packing, seq_len=LONG), prepared)
        loader = Loader(mixture, seed=0, span=Steps(1), fingerprint=prepared.fingerprint)
        empty = [float((loader.batch(step).segments_BT == 0).mean()) for step in range(n_rows)]
        found: dict[str, Any] = {"percent": round(100 * float(np.mean(empty)), 3)}
        if len(mixture) == len(prepared.train):  # not packed together
            for (source, _), (kind, store) in zip(mixture, prepared.train.items(), strict=True):
                used = store.manifest.n_tokens / (len(source) * LONG)
                found[kind] = {"rows": len(source), "percent": round(100 * (1 - used), 3)}
        out[name] = found
    out["meets_target"] = out[f"window_{WINDOW}"]["percent"] < PADDING_TARGET_PERCENT
    return out


class Steps:
    """Spans of always n rows; a class, because worker processes are sent it."""

    def __init__(self, n: int):
        self.n = n

    def __call__(self, step: int) -> tuple[int, int]:
        return step * self.n, self.n


@contextlib.contextmanager
def readers(prepared: Prepared, folder: Path, batch_tokens: int) -> Generator[dict[str, Any]]:
    """Functions that give the next batch, by name, all of the same tokens and rows."""
    store, n_rows = prepared.train["repositories"], batch_tokens // SEQ_LEN
    flat, records = folder / "tokens.bin", folder / "rows.arrayrecord"
    if not flat.exists():
        peers.write_flat(store, flat)
        peers.write_records(store, SEQ_LEN, records)
    cut: RowSource = Cut().rows(store, SEQ_LEN, 0)

    def loader(source: RowSource) -> Loader:
        return Loader([(source, 1.0)], seed=0, span=Steps(n_rows), fingerprint="")

    inline, dtype = loader(cut), store.chunks.dtype
    iterators: dict[str, Any] = {
        "loader": loader(cut).iterate(),  # one thread
        "loader, 2 threads": loader(cut).iterate(threads=2),
        "loader, 2 processes": loader(cut).iterate(processes=2),
        "loader over ArrayRecord": loader(peers.RecordRows(records, dtype)).iterate(),
        "grain over ArrayRecord": peers.plain_grain(records, dtype, n_rows, 0),
        "grain over ArrayRecord, 2 processes": peers.plain_grain(records, dtype, n_rows, 2),
    }
    steps = iter(range(2**40))
    try:
        yield {
            "memmap": peers.memmap(flat, dtype, SEQ_LEN, n_rows),
            "memmap, x and y": peers.memmap_xy(flat, dtype, SEQ_LEN, n_rows),
            "loader, no thread": lambda: inline.batch(next(steps)),
        } | {name: iterator.__next__ for name, iterator in iterators.items()}
    finally:
        for iterator in iterators.values():
            iterator.close()


def compare(nexts: Mapping[str, Callable[[], Any]], batch_tokens: int) -> dict[str, Any]:
    """Tokens a second of each reader, and the share of memmap's: medians of rounds by turns."""
    for call in nexts.values():
        call()  # starts threads and processes
    rates: dict[str, list[float]] = {name: [] for name in nexts}
    for _ in range(ROUNDS):
        for name, call in nexts.items():
            time.sleep(PAUSE_S)  # while the one before fills its queue again
            rates[name].append(batch_tokens * calls_per_second(call, SECONDS))
    base = np.array(rates["memmap"])
    return {
        name: {
            "tokens_per_s": round(float(np.median(rate))),
            "best_tokens_per_s": round(max(rate)),
            "of_memmap": round(float(np.median(np.array(rate) / base)), 3),
        }
        for name, rate in rates.items()
    }


def measure(data: Data, prepared: Prepared, packing: Cut | BestFit, seq_len: int) -> dict[str, Any]:
    """Tokens a second of the mixture's rows, padding included, as a run reads them."""
    n_rows = max(1, BATCH_TOKENS["64k"] // seq_len)
    started = time.perf_counter()
    mixture = rows(replace(data, packing=packing, seq_len=seq_len), prepared)
    loader = Loader(mixture, seed=0, span=Steps(n_rows), fingerprint=prepared.fingerprint)
    built = time.perf_counter() - started
    iterator = loader.iterate()
    next(iterator)
    speeds = [
        n_rows * seq_len * calls_per_second(lambda: next(iterator), SECONDS) for _ in range(ROUNDS)
    ]
    iterator.close()
    return {
        "building_s": round(built, 3),
        "tokens_per_s": round(float(np.median(speeds))),
        "meets_target": float(np.median(speeds)) >= TARGET_TOKENS_PER_S,
    }


def calls_per_second(call: Callable[[], Any], seconds: float) -> float:
    """Mean rate of calling."""
    started, n = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        call()
        n += 1
    return n / elapsed


def run(data: Data, prepared: Prepared, folder: Path) -> dict[str, Any]:
    """All measurements, printed as they come."""
    packed = pack_seconds()
    show("packing 1M documents", packed)
    padded = padding(data, prepared)
    show("padding of the mixture at 32K", padded)
    compared = {}
    for name, batch_tokens in BATCH_TOKENS.items():
        with readers(prepared, folder, batch_tokens) as nexts:
            compared[name] = compare(nexts, batch_tokens)
        show(f"readers, batches of {name} tokens in rows of {SEQ_LEN}", compared[name])
    cases = {
        name: measure(data, prepared, packing, seq_len)
        for name, (packing, seq_len) in CASES.items()
    }
    show("the mixture's rows", cases)
    ours = [found["loader"] for found in compared.values()]
    return {
        "packing": packed,
        "padding_32768": padded,
        "readers": compared,
        "loader": cases,
        "meets_targets": {
            "tokens_per_s": min(one["tokens_per_s"] for one in ours) >= TARGET_TOKENS_PER_S,
            "of_memmap": min(one["of_memmap"] for one in ours) >= TARGET_OF_MEMMAP,
        },
    }


def show(title: str, found: Mapping[str, Any]) -> None:
    """Prints one line a case."""
    print(title)
    for name, value in found.items():
        print(f"  {name:36s} {value}", flush=True)


def main() -> None:
    """Prepares, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="where prepared data is kept (default: nowhere)")
    cache = parser.parse_args().cache
    data = bench_data()
    with tempfile.TemporaryDirectory() as fresh:
        started = time.perf_counter()
        prepared = prepare(data, cache or Path(fresh))
        seconds = time.perf_counter() - started
        print(f"prepare: {seconds:.1f} s  {prepared.report['seconds']}", flush=True)
        busy_before = os.getloadavg()[0]
        value = run(data, prepared, Path(fresh))
    value |= {
        "command": "python -m experiments.bench.data",
        "prepare_s": None if cache else round(seconds, 1),
        "prepared": prepared.report["sources"],
        "targets": {"tokens_per_s": TARGET_TOKENS_PER_S, "of_memmap": TARGET_OF_MEMMAP},
        "load_average": [round(busy_before, 1), round(os.getloadavg()[0], 1)],
    }
    print(f"meets targets: {value['meets_targets']}")
    print(f"wrote {merge_result(cpu_name(), 'data', value)}")


if __name__ == "__main__":
    main()
