"""What confined programs get and give: `Limits`, `Result`, and `Launch`, a box's way to start one.

A box (`bwrap.Bwrap`, `docker.Docker`) is a frozen value with `launch(files, command, limits)`.
"""

from __future__ import annotations

import dataclasses
import io
import os
import posixpath
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

HOME = "/tmp"  # the one folder of a box that can be written: files land here and it is the cwd
MIB = 2**20
MAX_COMMAND = 100_000  # bytes; the kernel takes 128 KiB an argument

Files = Mapping[str, bytes | str]
Status = Literal["ok", "failed", "time", "cpu", "memory", "output", "files", "processes", "killed"]


class SandboxError(RuntimeError):
    """The box itself could not be made: nothing was run, and nothing may be concluded."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much a program may use, its children included.

    wall_s, cpu_s: seconds. memory: bytes resident, of all processes and what they write to disk
    (it is in memory). address_space: bytes of one process; None for runtimes that reserve more than
    they use (Java, Go, JAX). processes: at once, threads count. disk: bytes. files: how many may
    exist. output: bytes of stdout, and of stderr. cpus: cores, where a cgroup can be had.
    """

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory: int = 512 * MIB
    address_space: int | None = 4096 * MIB
    processes: int = 32
    disk: int = 64 * MIB
    files: int = 4096
    open_files: int = 256
    output: int = MIB
    cpus: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"limit {name} is {value}; it must be above 0")


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended.

    status: "ok" with exit code 0, "failed" with another, "killed" from outside; else the limit that
    ended it ("output": it wrote too much; "files": too many exist). code: exit code, 128 + signal,
    or -1 where the box was killed. stdout and stderr: cut at the limit. seconds: of wall time.
    max_rss: bytes at the highest moment, of all processes together, with files; sampled every
    20 ms where there is no memory cgroup.
    """

    status: Status
    code: int
    stdout: bytes
    stderr: bytes
    seconds: float
    max_rss: int

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, with exit code 0."""
        return self.status == "ok"


@dataclasses.dataclass
class Launch:
    """A program ready to be started.

    argv, env: of the process to start. fds: what it inherits. status_fd: where bwrap writes what it
    does, None for docker. opened: descriptors of ours to close once it runs. tree: whether its
    processes can be watched from here. nested: whether bwrap has other numbers for processes than
    we have; the box's first one is then the child of argv's child. cpu, peak, hit: seconds and
    bytes so far, and the limit that the kernel enforced; None where nobody counts. kill, close:
    what to do beyond killing argv.
    """

    argv: list[str]
    env: dict[str, str]
    fds: tuple[int, ...] = ()
    status_fd: int | None = None
    opened: tuple[int, ...] = ()
    tree: bool = True
    nested: bool = False
    cpu: Callable[[], float | None] = lambda: None
    peak: Callable[[], int | None] = lambda: None
    hit: Callable[[], Status | None] = lambda: None
    kill: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None


def archive(files: Files, limits: Limits) -> bytes:
    """The files as a tar archive, with folders as their names say.

    Raises: ValueError for a name that leaves the folder, or more than the limits let exist.
    """
    total = 0
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            clean = posixpath.normpath(name)
            if not name or "\0" in name or clean.startswith(("/", "..")) or clean == ".":
                raise ValueError(f"file {name!r}: names are relative and stay in the folder")
            data = content.encode() if isinstance(content, str) else bytes(content)
            total += len(data)
            info = tarfile.TarInfo(clean)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    if total > limits.disk or len(files) > limits.files:
        raise ValueError(
            f"{len(files)} files of {total} bytes, limits are {limits.files} and {limits.disk}; "
            "raise Limits.files or Limits.disk"
        )
    return buffer.getvalue()


def checked(command: Sequence[str]) -> list[str]:
    """The command.

    Raises: ValueError where there is none, or it is too long for the kernel.
    """
    if isinstance(command, str) or not command or any("\0" in word for word in command):
        raise ValueError(f"command is {command!r}; give a sequence of words without NUL")
    size = sum(len(os.fsencode(word)) + 1 for word in command)
    if size > MAX_COMMAND:
        raise ValueError(f"command is {size} bytes, {MAX_COMMAND} at most; put it into a file")
    return list(command)


def guarded(command: Sequence[str], source: str | None) -> list[str]:
    """A command that says that it is there, waits for a line, unpacks `source`, then runs.

    A box takes milliseconds to be made, in which the death of who makes it may pass unseen; then
    the line never comes, and the program never runs. `read` takes no byte more than the line.
    """
    unpack = f"tar -xmf {source} && " if source else ""
    return ["sh", "-c", f'echo && read -r _ || exit 125; {unpack}exec "$@"', "sh", *command]


READY, GO = b"\n", b"\n"
