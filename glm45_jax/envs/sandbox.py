"""Runs programs that nobody trusts: `run`, and `start` for one that is talked to meanwhile.

A box has no network, no host files but programs (read-only), an empty environment, one small
folder, and `Limits` on all it uses; when a call returns, nothing of the program is left. Bubblewrap
by default, `box=Docker(image)` by option; never without a box.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

from glm45_jax.envs.box import GO, HOME, READY, Files, Launch, Limits, Result, SandboxError, Status
from glm45_jax.envs.bwrap import Bwrap, found, mode_of
from glm45_jax.envs.docker import Docker
from glm45_jax.envs.watch import Watch, children

__all__ = [
    "HOME",
    "Bwrap",
    "Docker",
    "Limits",
    "Result",
    "Running",
    "SandboxError",
    "missing",
    "run",
    "start",
]

Box = Bwrap | Docker

POLL_S = 0.02  # how often a program's use is looked at
DRAIN_S = 1.0  # for what is in the pipes when a program has ended
DEATH_S = 10.0  # for a killed box to be gone
CHUNK = 65_536
XCPU, KILL = 128 + signal.SIGXCPU, 128 + signal.SIGKILL


def run(
    files: Files,
    command: Sequence[str],
    *,
    stdin: bytes = b"",
    limits: Limits = Limits(),
    box: Box = Bwrap(),
    fds: Sequence[int] = (),
) -> Result:
    """What a command did in a box of its own, with these files in its folder.

    files: relative name: content. fds: descriptors that the program inherits, under their numbers;
    give none but what it may use. May be called from many threads at once.

    Raises: SandboxError where no box can be made (nothing was run then); ValueError for names that
    leave the folder, files over the limits, and a command that is no command.
    """
    return start(files, command, stdin=stdin, limits=limits, box=box, fds=fds).wait()


def start(
    files: Files,
    command: Sequence[str],
    *,
    stdin: bytes = b"",
    limits: Limits = Limits(),
    box: Box = Bwrap(),
    fds: Sequence[int] = (),
) -> Running:
    """The same, running; call `wait`, from any thread, while the one that started it lives on.

    Raises: as `run`; ValueError for fds with docker, whose programs inherit nothing.
    """
    launch = box.launch(files, command, limits, fds)
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            launch.argv,
            env=launch.env,
            pass_fds=launch.fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
    except OSError as error:
        if launch.status_fd is not None:
            os.close(launch.status_fd)
        launch.close()
        raise SandboxError(f"{launch.argv[0]} did not start: {error}") from error
    finally:
        for fd in launch.opened:
            os.close(fd)
    return Running(launch, process, limits, stdin, began)


def missing(box: Box = Bwrap()) -> str | None:
    """Why no box of this kind can be made here; None where one can."""
    try:
        if isinstance(box, Docker):
            box.check()
        else:
            mode_of(found(box.path))
    except SandboxError as error:
        return str(error)
    return None


@dataclasses.dataclass
class _Told:
    """What bwrap wrote on its status pipe."""

    text: bytes = b""

    def get(self, name: str) -> Any:
        """The last value of a name; None where there is none."""
        found = None
        for line in self.text.decode().splitlines():
            with contextlib.suppress(ValueError):  # half a line
                found = json.loads(line).get(name, found)
        return found


class Running:
    """A started program. `wait` once; `kill` from any thread."""

    def __init__(
        self,
        launch: Launch,
        process: subprocess.Popen,
        limits: Limits,
        stdin: bytes,
        began: float,
    ):
        """Made by `start`."""
        self._launch, self._process, self._limits = launch, process, limits
        self._left, self._began = memoryview(GO + stdin), began
        self._ready = False  # the box is made, and its program waits for a line
        self._out: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._told = _Told()
        self._watch = Watch(launch, limits)
        self._why: Status | None = None
        self._killed = threading.Event()
        self._child = -1  # pidfd of the first process in the box

    def kill(self) -> None:
        """Ends it soon; `wait` then says "killed", unless it had ended by itself."""
        self._killed.set()

    def wait(self) -> Result:
        """Runs it to its end, which the limits bound.

        Raises: SandboxError where the box could not be made.
        """
        exited = os.pidfd_open(self._process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                self._register(selector, exited)
                self._loop(selector)
            return self._result()
        finally:
            self._end()
            for fd in (exited, self._child):
                if fd >= 0:
                    os.close(fd)

    def _register(self, selector: selectors.BaseSelector, exited: int) -> None:
        process = self._process
        assert process.stdin and process.stdout and process.stderr
        selector.register(exited, selectors.EVENT_READ, "exit")
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            selector.register(pipe, selectors.EVENT_READ, name)
        if self._launch.status_fd is not None:
            selector.register(self._launch.status_fd, selectors.EVENT_READ, "status")
        os.set_blocking(process.stdin.fileno(), False)

    def _loop(self, selector: selectors.BaseSelector) -> None:
        """Reads, writes and watches until the program has ended and its pipes are empty."""
        deadline = self._began + self._limits.wall_s
        over: float | None = None  # when to stop reading what a dead program wrote
        while True:
            now = time.monotonic()
            names = {key.data for key in selector.get_map().values()}
            if over is not None and (now > over or not names & {"stdout", "stderr", "status"}):
                return
            for key, _ in selector.select(POLL_S):
                if key.data == "exit":
                    over = time.monotonic() + DRAIN_S
                    selector.unregister(key.fileobj)
                else:
                    self._serve(selector, key)
            if over is None and self._why is None:
                self._check(time.monotonic(), deadline)

    def _check(self, now: float, deadline: float) -> None:
        """Stops the program where it is over a limit."""
        if self._killed.is_set():
            self._stop("killed")
        elif now > deadline:
            self._stop("time")
        elif (status := self._watch.look(now)) is not None:
            self._stop(status)

    def _stop(self, why: Status) -> None:
        """Kills the box, and all that is in it with it."""
        self._why = self._why or why
        self._launch.kill()
        self._process.kill()

    def _serve(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        """Moves bytes of one pipe."""
        if key.data == "stdin":
            self._feed(selector)
            return
        data = os.read(key.fd, CHUNK)
        if not data:
            selector.unregister(key.fileobj)
        elif key.data == "status":
            self._told.text += data
            self._meet()
        else:
            if key.data == "stdout" and not self._ready:
                self._ready, data = True, data[len(READY) :]
                assert self._process.stdin
                selector.register(self._process.stdin, selectors.EVENT_WRITE, "stdin")
            kept = self._out[key.data]
            kept += data[: self._limits.output - len(kept)]
            if len(kept) >= self._limits.output:
                self._stop("output")
                selector.unregister(key.fileobj)

    def _feed(self, selector: selectors.BaseSelector) -> None:
        """Writes stdin; a program need not read it."""
        pipe = self._process.stdin
        assert pipe
        try:
            self._left = self._left[os.write(pipe.fileno(), self._left[:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._left = self._left[:0]
        if not self._left:
            selector.unregister(pipe)
            pipe.close()

    def _meet(self) -> None:
        """Takes hold of the box's first process once bwrap has told its number."""
        pid = self._told.get("child-pid")
        if pid is not None and self._child < 0:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):
                if self._launch.nested:
                    pid = children(children(self._process.pid)[0])[0]
                self._child = os.pidfd_open(pid)
                self._watch.pid = pid

    def _end(self) -> None:
        """Leaves nothing: kills, waits, closes. All in the box dies with its first process."""
        self._launch.kill()
        self._process.kill()
        self._process.wait()
        if self._child >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._child, signal.SIGKILL)
            with selectors.DefaultSelector() as gone:
                gone.register(self._child, selectors.EVENT_READ)
                if not gone.select(DEATH_S):
                    raise TimeoutError(f"a box is still there {DEATH_S} s after it was killed")
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()
        if self._launch.status_fd is not None:
            os.close(self._launch.status_fd)
        self._launch.close()

    def _result(self) -> Result:
        """How it ended, told from what was killed, what the kernel counted and the exit code."""
        code = self._process.wait()
        if self._launch.status_fd is not None:
            told = self._told.get("exit-code")
            unmade = told is None or not self._ready
            if unmade and self._why is None and self._launch.hit() is None:
                said = bytes(self._out["stderr"]).decode(errors="replace").strip()[-500:]
                raise SandboxError(f"bwrap ended with {code} before the program ran: {said}")
            code = -1 if told is None else told
        self._watch.last()
        status: Status = "ok" if code == 0 else "cpu" if code == XCPU else "failed"
        return Result(
            status=self._why or self._launch.hit() or status,
            code=code,
            stdout=bytes(self._out["stdout"]),
            stderr=bytes(self._out["stderr"]),
            seconds=time.monotonic() - self._began,
            max_rss=self._watch.peak,
        )
