"""Control groups of Linux, version 2 or 1, for one confined program each. Type: `Cgroup`.

Only what can be had without asking anyone: as root, or in a tree that was delegated to us.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import signal
import time
from pathlib import Path

from glm45_jax.envs.box import Limits, Status

NAME = "glm45-box"
STALE_S = 3600.0  # age at which a group of a dead process is taken away
GONE_S = 5.0  # for the processes of a killed group to leave it
PERIOD_US = 100_000


@dataclasses.dataclass(frozen=True)
class Parents:
    """Folders in which we can make groups: by controller, all the same one in version 2."""

    version: int
    folders: dict[str, Path]


@functools.lru_cache(maxsize=1)
def parents(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Parents:
    """Where groups can be made; without folders where they cannot."""
    lines = own.read_text().splitlines() if own.exists() else []
    paths = {}
    for line in lines:
        _, names, path = line.split(":", 2)
        paths.update({name: path for name in names.split(",")})
    if (root / "cgroup.controllers").exists():
        found = _unified(root, paths.get("", "/"))
        return Parents(2, {name: found for name in ("memory", "pids", "cpu")} if found else {})
    folders = {}
    for name in ("memory", "pids", "cpu", "cpuacct"):
        for folder in (root / name / paths.get(name, "/").lstrip("/"), root / name):
            if _can_make(folder):
                folders[name] = folder
                break
    return Parents(1, folders)


def _can_make(folder: Path) -> bool:
    """Whether a group can be made and joined there: tried, for a mount may be read-only."""
    probe = folder / f"{NAME}-{os.getpid()}-probe{secrets.token_hex(3)}"
    try:
        probe.mkdir()
    except OSError:
        return False
    usable = (probe / "cgroup.procs").exists() and os.access(probe / "cgroup.procs", os.W_OK)
    with contextlib.suppress(OSError):
        probe.rmdir()
    return usable


def _unified(root: Path, own: str) -> Path | None:
    """A folder of version 2 whose children have the memory and pids controllers."""
    for folder in (root / own.lstrip("/"), root):
        control = folder / "cgroup.subtree_control"
        with contextlib.suppress(OSError):
            missing = {"memory", "pids", "cpu"} - set(control.read_text().split())
            if missing:  # refused with EBUSY where processes live in this group itself
                control.write_text(" ".join(f"+{name}" for name in sorted(missing)))
            if {"memory", "pids"} <= set(control.read_text().split()) and _can_make(folder):
                return folder
    return None


@dataclasses.dataclass(frozen=True)
class Cgroup:
    """The groups of one program. Whatever it counts not is None."""

    version: int
    folders: dict[str, Path]

    @property
    def joins(self) -> list[str]:
        """Files that take the number of a process to put it into the groups."""
        return sorted({str(folder / "cgroup.procs") for folder in self.folders.values()})

    def _read(self, controller: str, *names: str) -> str | None:
        """The first of these files that there is."""
        for name in names if controller in self.folders else ():
            with contextlib.suppress(OSError):
                return (self.folders[controller] / name).read_text()
        return None

    def cpu(self) -> float | None:
        """Seconds of CPU so far."""
        if self.version == 1:
            text = self._read("cpuacct", "cpuacct.usage")
            return int(text) / 1e9 if text else None
        text = self._read("cpu", "cpu.stat")
        return int(text.split()[1]) / 1e6 if text else None

    def peak(self) -> int | None:
        """Bytes at the highest moment."""
        text = self._read("memory", "memory.peak", "memory.max_usage_in_bytes")
        return int(text) if text else None

    def hit(self) -> Status | None:
        """ "memory" where the kernel killed one of its processes for it."""
        text = self._read("memory", "memory.events", "memory.oom_control") or ""
        counts = dict(line.split() for line in text.splitlines())
        return "memory" if int(counts.get("oom_kill", 0)) else None

    def close(self) -> None:
        """Kills what is left in the groups, and takes them away.

        Raises: TimeoutError where processes stay.
        """
        until = time.monotonic() + GONE_S
        for folder in set(self.folders.values()):
            while folder.exists():
                with contextlib.suppress(OSError):
                    for pid in (folder / "cgroup.procs").read_text().split():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), signal.SIGKILL)
                    folder.rmdir()
                    break
                if time.monotonic() > until:
                    raise TimeoutError(f"{folder}: its processes are still there, {GONE_S} s later")
                time.sleep(0.002)


def make(limits: Limits, own: int) -> Cgroup | None:
    """Groups with these limits; None where no group can be made here. own: processes of the box.

    Raises: OSError where one could be made but not set.
    """
    where = parents()
    if not where.folders:
        return None
    name = f"{NAME}-{os.getpid()}-{secrets.token_hex(6)}"
    group = Cgroup(where.version, {key: folder / name for key, folder in where.folders.items()})
    try:
        for folder in set(group.folders.values()):
            folder.mkdir()
        _set(group, limits, own)
    except OSError:
        group.close()
        raise
    return group


def _set(group: Cgroup, limits: Limits, own: int) -> None:
    """Writes the limits; swap where the kernel counts it."""
    quota = max(1000, round(limits.cpus * PERIOD_US))
    one = {
        ("memory", "memory.limit_in_bytes"): str(limits.memory),
        ("memory", "memory.memsw.limit_in_bytes"): str(limits.memory),
        ("pids", "pids.max"): str(limits.processes + own),
        ("cpu", "cpu.cfs_quota_us"): str(quota),
    }
    two = {
        ("memory", "memory.max"): str(limits.memory),
        ("memory", "memory.swap.max"): "0",
        ("pids", "pids.max"): str(limits.processes + own),
        ("cpu", "cpu.max"): f"{quota} {PERIOD_US}",
    }
    for (controller, file), value in (one if group.version == 1 else two).items():
        folder = group.folders.get(controller)
        optional = "sw" in file or controller == "cpu"
        if folder and ((folder / file).exists() or not optional):
            (folder / file).write_text(value)


def sweep() -> None:
    """Takes away empty groups that processes which died have left behind."""
    for folder in set(parents().folders.values()):
        for old in folder.glob(f"{NAME}-*"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(old.name.split("-")[2])
                if not Path(f"/proc/{pid}").exists():
                    if time.time() - old.stat().st_mtime > STALE_S:
                        old.rmdir()
