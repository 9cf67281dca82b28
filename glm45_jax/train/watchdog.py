"""Ends a process whose steps have stopped coming, so that its launcher starts it again. Type:
`Watchdog`.

A collective that waits for a host that is gone waits for ever, and no exception comes. Imports
nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

HUNG = 6  # exit code; launch scripts start such a run again
FIRST = 10.0  # times the limit, for the first step, which compiles
BACKSTOP = 2.0  # times the limit: then faulthandler's own thread acts, which needs no Python

log = logging.getLogger(__name__)


class Watchdog:
    """Within `with`: ends the process with `HUNG` where `beat` is not called for `seconds`.

    path: where the stacks of all threads go first; no file is left where nothing hung. Where Python
    itself is stuck (a call into C that holds the lock), faulthandler writes them after twice the
    time and ends the process with 1. seconds 0: nothing is watched. The first `beat` may take ten
    times as long. leave: for tests.
    """

    def __init__(
        self, path: pathlib.Path, seconds: float, *, leave: Callable[[int], Any] = os._exit
    ):
        if seconds < 0:
            raise ValueError(f"a step cannot take {seconds} seconds at most; 0 watches nothing")
        self._path, self._seconds, self._leave = path, seconds, leave
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._deadline = self._armed = 0.0

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            self._set(FIRST * self._seconds)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.stat().st_size == 0:
            self._path.unlink()
            with contextlib.suppress(OSError):  # other hosts may have a file there
                self._path.parent.rmdir()

    def beat(self) -> None:
        """None; a step has finished, or something else that may take its time."""
        if self._thread is not None:
            self._set(self._seconds)

    def _set(self, seconds: float) -> None:
        now = time.monotonic()
        with self._lock:
            self._deadline = now + seconds
        # Each time is a new thread of faulthandler's: not for every step.
        if seconds > self._seconds or now - self._armed > self._seconds / 4:
            self._armed = now
            faulthandler.dump_traceback_later(BACKSTOP * seconds, exit=True, file=self._file)

    def _watch(self) -> None:
        while True:
            with self._lock:
                left = self._deadline - time.monotonic()
            if left <= 0:
                break
            # Not all of it: the first beat brings the end nearer.
            if self._over.wait(min(left, self._seconds / 4)):
                return
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"{when}: no step for {self._seconds:g} s; process {os.getpid()}\n")
        self._file.flush()
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        self._file.flush()
        log.critical(
            "no step has finished for %g s; stacks are in %s; leaving with %d",
            *(self._seconds, self._path, HUNG),
        )
        self._leave(HUNG)
