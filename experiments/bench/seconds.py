"""The seconds that a benchmark has: what it says with those since its start, and runs that are
stopped when they are spent.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

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
