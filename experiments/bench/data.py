"""How fast the loader makes batches: `python -m experiments.bench.data [--cache DIR]`.

Prepares the quickstart's text (real files of this machine), then times `Loader.iterate` for cut and
packed rows beside a limit taken in the same run: gathering as many rows from an array in memory.
Writes experiments/bench/results/<device>.json under the key "data".
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.results import cpu_name, merge_result
from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.data.prepare import Data, Prepared, prepare, rows
from glm45_jax.data.sources import Docstrings, PackageDocs, PydocTopics, PythonSources

BATCH_TOKENS = 64 * 1024
SECONDS = 3.0  # of timing for each number
TARGET_TOKENS_PER_S = 1_000_000
CASES: dict[str, tuple[Cut | BestFit, int]] = {
    "cut_4096": (Cut(), 4096),
    "cut_4096_document_mask": (Cut(document_mask=True), 4096),
    "best_fit_4096": (BestFit(), 4096),
    "cut_128": (Cut(), 128),
    "best_fit_128": (BestFit(), 128),
}


def bench_data() -> Data:
    """Real text of this machine in four sources, at the quickstart's vocabulary."""
    sources = ((PythonSources(), 0.8), (Docstrings(), 0.1), (PydocTopics(), 0.05))
    return Data(sources=(*sources, (PackageDocs(), 0.05)))


def measure(data: Data, prepared: Prepared, packing: Cut | BestFit, seq_len: int) -> dict[str, Any]:
    """Places a second of the loader, padding included, and of a gather in memory."""
    n_rows = BATCH_TOKENS // seq_len
    started = time.perf_counter()
    mixture = rows(replace(data, packing=packing, seq_len=seq_len), prepared)
    packed = time.perf_counter()
    loader = Loader(
        mixture, seed=0, span=lambda step: (step * n_rows, n_rows), fingerprint=prepared.fingerprint
    )
    padding = np.mean([(loader.batch(step).segments_BT == 0).mean() for step in range(4)])
    iterator = loader.iterate()
    next(iterator)  # starts the thread
    speed = BATCH_TOKENS * calls_per_second(lambda: next(iterator))
    iterator.close()
    limit = BATCH_TOKENS * calls_per_second(memory_gather(seq_len, n_rows))
    return {
        "rows": sum(len(source) for source, _ in mixture),
        "rows_per_batch": n_rows,
        "row_building_s": round(packed - started, 3),
        "padding_percent": round(100 * float(padding), 2),
        "tokens_per_s": round(speed),
        "memory_gather_tokens_per_s": round(limit),
        "meets_target": speed >= TARGET_TOKENS_PER_S,
    }


def memory_gather(seq_len: int, n_rows: int) -> Callable[[], np.ndarray]:
    """A function that copies n_rows random rows out of 4M tokens in memory."""
    tokens_N = np.zeros(4_000_000, np.int32)
    random = np.random.default_rng(0)
    counting_T = np.arange(seq_len)
    return lambda: tokens_N[random.integers(0, 3_900_000, n_rows)[:, None] + counting_T]


def calls_per_second(call: Callable[[], Any]) -> float:
    """Mean rate over SECONDS of calling."""
    started, n = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < SECONDS:
        call()
        n += 1
    return n / elapsed


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
        print(f"prepare: {seconds:.1f} s  {prepared.report['seconds']}")
        results = {}
        for name, (packing, seq_len) in CASES.items():
            results[name] = measure(data, prepared, packing, seq_len)
            print(
                f"{name:24s} {results[name]['tokens_per_s'] / 1e6:7.2f} M tokens/s {results[name]}"
            )
    value = {
        "command": "python -m experiments.bench.data",
        "prepare_s": None if cache else round(seconds, 1),
        "prepared": prepared.report["sources"],
        "target_tokens_per_s": TARGET_TOKENS_PER_S,
        "loader": results,
    }
    print(f"wrote {merge_result(cpu_name(), 'data', value)}")


if __name__ == "__main__":
    main()
