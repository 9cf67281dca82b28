"""The seconds that a benchmark has: what it says with those since its start, and runs that are
stopped when they are spent; and what a call takes.
"""

import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

BEGAN = time.monotonic()  # when this was imported, nearly the start of the process


def said(text: str) -> None:
    """None; a line with the seconds since the start, now."""
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


@contextlib.contextmanager
def stopped_at(ends: float) -> Iterator[None]:
    """Asks the run inside to stop after the step during which the monotonic clock says `ends`."""
    left = threading.Event()

    def wait() -> None:
        while not left.wait(max(ends - time.monotonic(), 0.5)):
            # The loop listens to it; before and after the loop it would end the process.
            if time.monotonic() >= ends and callable(signal.getsignal(signal.SIGTERM)):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def median_ms(f: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> float:
    """Of `repeats` calls, each waited for, after two that warm up."""
    wait(f()), wait(f())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(f())
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3
