"""Looks at a running box from outside, for the limits that the kernel does not keep. Type: `Watch`.

By `/proc`, over the tree of processes below the box's first one: orphans become its children, so
all are in it. Whatever a cgroup counts is asked from the cgroup.
"""

from __future__ import annotations

import os
from pathlib import Path

from glm45_jax.envs.box import HOME, Launch, Limits, Status

PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")
LOOK_S = 0.02
SLACK = 2  # processes of the box itself: its first one, and one that has just ended


class Watch:
    """What a box has used so far. pid: of its first process, None until it is known."""

    def __init__(self, launch: Launch, limits: Limits):
        """Nothing is looked at yet."""
        self._launch, self._limits = launch, limits
        self._next = 0.0
        self.pid: int | None = None
        self.peak = 0

    def look(self, now: float) -> Status | None:
        """The limit that it is over; None within them, or too soon after the last look."""
        if now < self._next:
            return None
        self._next = now + LOOK_S
        if (hit := self._launch.hit()) is not None:
            return hit
        cpu, counted = self._launch.cpu(), self._launch.peak()
        self.peak = max(self.peak, counted or 0)
        if self.pid is None or not self._launch.tree:
            return self._over(cpu or 0.0, 0, 0)
        used, files = _stored(self.pid, self._limits.disk)
        if files > self._limits.files:
            return "files"
        if cpu is not None and counted is not None:
            return self._over(cpu, 0, 0)
        most = self._limits.processes + SLACK
        pids, seconds, resident, threads = _tree(self.pid, most)
        if resident + used > self._limits.memory:  # pages that several share were counted often
            resident = sum(_share(pid) for pid in pids)
        resident += used
        self.peak = max(self.peak, resident)
        return self._over(seconds if cpu is None else cpu, resident, threads)

    def last(self) -> None:
        """The highest use, once it has ended."""
        self.peak = max(self.peak, self._launch.peak() or 0)

    def _over(self, seconds: float, resident: int, processes: int) -> Status | None:
        limits = self._limits
        if seconds > limits.cpu_s:
            return "cpu"
        if resident > limits.memory:
            return "memory"
        return "processes" if processes > limits.processes + SLACK else None


def children(pid: int) -> list[int]:
    """Numbers of a process's children, of all of its threads.

    Raises: FileNotFoundError, ProcessLookupError where it has ended.
    """
    tasks = Path(f"/proc/{pid}/task")
    return [
        int(word) for task in tasks.iterdir() for word in (task / "children").read_text().split()
    ]


def _stored(pid: int, disk: int) -> tuple[int, int]:
    """Bytes and files in the folders of a box; disk: their size, by which they are known."""
    size = count = 0
    for folder in (HOME, "/dev/shm"):
        try:
            stat = os.statvfs(f"/proc/{pid}/root{folder}")
        except OSError:  # it ends, or it is not ours to look into
            continue
        # Until the box is made, this is the host's folder.
        if stat.f_blocks * stat.f_frsize == -(-disk // PAGE) * PAGE:
            size += (stat.f_blocks - stat.f_bfree) * stat.f_frsize
            count += stat.f_files - stat.f_ffree
    return size, count


def _share(pid: int) -> int:
    """Bytes of a process, of shared pages its share; all that it maps where that is kept secret."""
    here = Path(f"/proc/{pid}")
    try:
        for line in (here / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except PermissionError:
        return int((here / "statm").read_text().split()[1]) * PAGE
    except OSError:
        pass  # it ended meanwhile
    return 0


def _tree(pid: int, most: int) -> tuple[list[int], float, int, int]:
    """A process and all below it: their numbers, CPU seconds, resident bytes and threads.

    It stops looking at more than `most` threads: to count a bomb would take longer than it grows.
    """
    found: list[int] = []
    seconds, resident, threads = 0.0, 0, 0
    left = [pid]
    while left and threads <= most:
        here = Path(f"/proc/{left.pop()}")
        try:
            fields = (here / "stat").read_text().rpartition(")")[2].split()
            left += children(int(here.name))
        except (OSError, ValueError):  # it ended meanwhile
            continue
        found.append(int(here.name))
        seconds += sum(int(field) for field in fields[11:15]) / TICK
        threads += int(fields[17])
        resident += int(fields[21]) * PAGE
    return found, seconds, resident, threads
