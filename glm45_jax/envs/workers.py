"""Checks that may hang, eat memory or raise signals, in processes of their own: `ask`.

math-verify keeps time by SIGALRM, which works in a main thread only, and sympy can neither be
interrupted nor trusted to end. A worker imports what it needs once, answers one question after
another, and is killed and replaced when it is late. No jax in it, and none of our environment.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import pickle
import resource
import select
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

AT_MOST = 4  # processes
READY_S = 120.0  # to import sympy or reasoning-gym on a busy machine
MEMORY = 4 * 2**30  # bytes of address space


class Late(Exception):
    """A worker did not answer in time, or died."""


def ask(kind: str, question: Any, *, seconds: float) -> Any:
    """A worker's answer, JSON values; None where it was late, died or raised.

    kind: "equal" takes (gold, answer) -> bool; "score" takes (dataset, answer, entry) -> float.
    seconds: of the check itself, starting and importing apart. Safe in threads and after a fork.

    Raises: RuntimeError where no worker can be started.
    """
    return _pool().ask(kind, question, seconds)


class _Worker:
    """One process. kind is what it has imported."""

    def __init__(self, kind: str):
        """Starts it; returns when it is ready."""
        self.kind = kind
        package = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({kind!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(package)},
            cwd="/",
        )
        try:
            if self._read(READY_S) != "ready":
                raise Late
        except Late:
            self.kill()
            raise RuntimeError(f"no process for {kind} checks: is its package installed?") from None

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer.

        Raises: Late.
        """
        data = pickle.dumps(question)
        assert self._process.stdin
        try:
            self._process.stdin.write(struct.pack(">I", len(data)) + data)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Late from None
        return self._read(seconds)

    def _read(self, seconds: float) -> Any:
        """One line of JSON."""
        assert self._process.stdout
        until, line = time.monotonic() + seconds, b""
        fd = self._process.stdout.fileno()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([fd], [], [], max(0.0, until - time.monotonic()))
            data = os.read(fd, 65_536) if ready else b""
            if not data:
                raise Late
            line += data
        return json.loads(line)

    def kill(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


class _Pool:
    """Workers that wait for work, by kind; as many at work at once as there are cores."""

    def __init__(self, at_most: int):
        self._room = threading.Semaphore(at_most)
        self._lock = threading.Lock()
        self._at_most = at_most
        self._idle: list[_Worker] = []

    def ask(self, kind: str, question: Any, seconds: float) -> Any:
        with self._room:
            worker = self._take(kind) or _Worker(kind)
            try:
                answer = worker.ask(question, seconds)
            except Late:
                worker.kill()
                return None
            except BaseException:
                worker.kill()
                raise
            self._give(worker)
            return answer

    def _take(self, kind: str) -> _Worker | None:
        with self._lock:
            for at in range(len(self._idle) - 1, -1, -1):
                if self._idle[at].kind == kind:
                    return self._idle.pop(at)
        return None

    def _give(self, worker: _Worker) -> None:
        with self._lock:
            self._idle.append(worker)
            extra = self._idle[: -2 * self._at_most]
            self._idle = self._idle[-2 * self._at_most :]
        for old in extra:
            old.kill()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()


@functools.lru_cache(maxsize=1)
def _pool() -> _Pool:
    pool = _Pool(min(AT_MOST, os.cpu_count() or 1))
    atexit.register(pool.close)
    return pool


# A child of a fork must not talk through its parent's pipes.
os.register_at_fork(after_in_child=_pool.cache_clear)


def serve(kind: str) -> None:
    """A worker's life: questions on stdin, answers on what was stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # libraries print
    check = {"equal": _load_equal, "score": _load_score}[kind]()
    answers.write(b'"ready"\n')
    while len(head := sys.stdin.buffer.read(4)) == 4:
        question = pickle.loads(sys.stdin.buffer.read(struct.unpack(">I", head)[0]))
        try:
            answer = check(*question)
        except Exception:  # of any kind, of foreign code on foreign text: it is not an answer
            answer = None
        answers.write(json.dumps(answer).encode() + b"\n")


def _load_equal() -> Any:
    """math-verify with its own clocks off: ours is outside."""
    from math_verify import parse, verify

    def equal(gold: str, answer: str) -> bool:
        left = parse(f"${gold}$", parsing_timeout=None)
        right = parse(f"${answer}$", parsing_timeout=None)
        return bool(left and right and verify(left, right, timeout_seconds=None))

    return equal


def _load_score() -> Any:
    """reasoning-gym's own check of an answer."""
    import reasoning_gym

    def score(dataset: str, answer: str, entry: dict[str, Any]) -> float:
        return float(reasoning_gym.get_score_answer_fn(dataset)(answer, entry))

    return score
