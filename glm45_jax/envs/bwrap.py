"""Boxes by bubblewrap: `Bwrap`. Nothing of the host is in them but programs, read-only.

As root the box keeps root's identity only until its program starts, which then has a user id of its
own without any capability; other users get a user namespace. Source: `bwrap --help`, 0.8.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from glm45_jax.envs import cgroup, seccomp
from glm45_jax.envs.box import (
    GO,
    HOME,
    Files,
    Launch,
    Limits,
    SandboxError,
    archive,
    checked,
    guarded,
)

Mode = Literal["root", "user"]

FETCHED = Path(__file__).resolve().parents[2] / ".cache" / "bwrap" / "usr" / "bin" / "bwrap"
FILES_AT = "/.files.tar"
NOBODY = 61234  # inside a user namespace
USER_IDS = range(61184, 65520)  # systemd's range for services without an account
PROBE_S = 20.0
CORE = 1  # byte: unlike 0, it also stops a core dump that goes to a program
OUT_OF_MEMORY = 500  # of 1000: before any process of the trainer
OWN: dict[Mode, int] = {"root": 3, "user": 2}  # processes of a box itself
# bwrap's own --die-with-parent leaves its child waiting for ever if bwrap dies before it has told
# it to go on. In a namespace of processes of their own, all die with the first. Ordinary users have
# none to spare: a process of theirs, killed at such a moment, leaves a bwrap that does nothing.
DYING = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child=KILL")
WAY_OUT = (
    "install it (apt-get install bubblewrap), or run launch/sandbox.sh, which needs no root, or "
    "set GLM45_BWRAP to its path; box=Docker(image) is another way. Code is never run without a box"
)

# Linux exempts root from RLIMIT_NPROC, in its user namespaces too: a fork bomb would take the host.
NO_PIDS = "root's boxes in a user namespace need a pids cgroup, and none can be made here"

_taken: set[int] = set()
_taken_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Bwrap:
    """A box by bubblewrap.

    path: of bwrap; None looks at $GLM45_BWRAP, PATH, and where launch/sandbox.sh puts it.
    binds: folders of the host to be seen read-only, place in the box: place on the host. env: more
    variables. The Python that runs this is in every box, with what is installed beside it.
    """

    path: str | None = None
    binds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def launch(
        self, files: Files, command: Sequence[str], limits: Limits, fds: Sequence[int] = ()
    ) -> Launch:
        """See `sandbox.start`.

        Raises: SandboxError where bwrap is missing or cannot make a box here.
        """
        path = found(self.path)
        return _launch(self, path, mode_of(path), files, command, limits, fds)


def found(path: str | None = None) -> str:
    """Where bwrap is.

    Raises: SandboxError, with the way out, where it is not.
    """
    named = path or os.environ.get("GLM45_BWRAP")
    places = [named] if named else [shutil.which("bwrap"), str(FETCHED)]
    for place in places:
        if place and os.access(place, os.X_OK) and Path(place).is_file():
            return os.path.abspath(place)
    where = named or f"PATH nor at {FETCHED}"
    raise SandboxError(f"bubblewrap is not at {where}: {WAY_OUT}")


@functools.lru_cache(maxsize=8)
def mode_of(path: str) -> Mode:
    """How a box can be made on this machine, by making one.

    Raises: SandboxError, with what bwrap said, where none can.
    """
    cgroup.sweep()
    said = []
    modes: tuple[Mode, ...] = ("root", "user") if os.geteuid() == 0 else ("user",)
    for mode in modes:
        try:
            launch = _launch(Bwrap(), path, mode, {"a": b""}, ["test", "-f", "a"], Limits(), ())
        except SandboxError as error:
            said.append(f"as {mode}: {error}")
            continue
        try:
            done = subprocess.run(
                launch.argv,
                env=launch.env,
                pass_fds=launch.fds,
                input=GO,
                capture_output=True,
                timeout=PROBE_S,
                check=False,
            )
        finally:
            for fd in (*launch.opened, *([launch.status_fd] if launch.status_fd else ())):
                os.close(fd)
            launch.close()
        if done.returncode == 0:
            return mode
        said.append(f"as {mode}: {done.stderr.decode(errors='replace').strip()[-300:]}")
    raise SandboxError(f"{path} cannot make a box on this machine ({'; '.join(said)}): {WAY_OUT}")


def arguments(
    mode: Mode, binds: Mapping[str, str], env: Mapping[str, str], limits: Limits
) -> list[str]:
    """bwrap's arguments, but for descriptors and the command."""
    spaces = ["pid", "net", "ipc", "uts", *(["user"] if mode == "user" else [])]
    words = [f"--unshare-{name}" for name in spaces] + ["--unshare-cgroup-try"]
    words += ["--die-with-parent", "--new-session", "--clearenv", "--hostname", "box"]
    for name, value in env.items():
        words += ["--setenv", name, value]
    if mode == "user":
        words += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    words += ["--cap-drop", "ALL"]
    for capability in ("SETUID", "SETGID", "SETPCAP") if mode == "root" else ():
        words += ["--cap-add", f"CAP_{capability}"]  # until setpriv drops them
    words += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            words += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            words += ["--ro-bind", f"/{name}", f"/{name}"]
    bound = {**_python(), **binds}
    above = {place for inside in ("/etc/x", *bound) for place in Path(inside).parents}
    for folder in sorted(above - {Path("/")}):  # of themselves, they would be root's alone
        if folder.parts[1] not in ("usr", "proc", "dev", "tmp"):
            words += ["--perms", "0755", "--dir", str(folder)]
    for name in ("/etc/alternatives", "/etc/ld.so.cache"):
        words += ["--ro-bind-try", name, name]
    words += ["--proc", "/proc", "--dev", "/dev"]
    for place in (HOME, "/dev/shm"):
        words += ["--perms", "1777", "--size", str(limits.disk), "--tmpfs", place]
    for inside, outside in bound.items():
        words += ["--ro-bind", outside, inside]
    # The root and /dev are file systems in memory too, and of no size.
    return [*words, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", HOME]


def confined(mode: Mode, user: int, limits: Limits) -> list[str]:
    """What runs before the command: resource limits, and the end of root."""
    cpu = math.ceil(limits.cpu_s)
    words = [
        *("prlimit", f"--cpu={cpu}:{cpu + 1}", f"--fsize={limits.disk}", f"--core={CORE}"),
        *(f"--nofile={limits.open_files}", f"--nproc={limits.processes}", "--memlock=0"),
        *("--msgqueue=0", "--rtprio=0", "--sigpending=256"),
        *([f"--as={limits.address_space}"] if limits.address_space else []),
    ]
    if mode == "user":
        return words
    dropped = ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs"]
    identity = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    return [*words, "setpriv", *identity, *dropped]


def _python() -> dict[str, str]:
    """The running interpreter's folder, where /usr does not have it."""
    prefix = os.path.realpath(sys.base_prefix)
    return {} if prefix.startswith("/usr/") or prefix == "/usr" else {prefix: prefix}


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Variables in the box. One thread for numeric libraries: threads count as processes."""
    path = f"{os.path.realpath(sys.base_prefix)}/bin:/usr/local/bin:/usr/bin:/bin"
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    basics = {"PATH": path, "HOME": HOME, "TMPDIR": HOME, "LANG": "C.UTF-8", "USER": "box"}
    return {**basics, **threads, **more}


def _memory(name: str, content: bytes) -> int:
    """A descriptor of a file in memory, read from its beginning."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _entering(files: Sequence[str]) -> list[str]:
    """A command that puts itself into groups, then runs what follows; out of memory takes it first.

    As root writes it, what runs in the box cannot take that back.
    """
    enter = f"echo {OUT_OF_MEMORY} >/proc/self/oom_score_adj || exit 125; n=$1; shift; "
    enter += 'while [ "$n" -gt 0 ]; do echo $$ >"$1" || exit 125; shift; n=$((n-1)); done; '
    return ["/bin/sh", "-c", enter + 'exec "$@"', "sh", str(len(files)), *files]


@contextlib.contextmanager
def _closing_on_error(fds: list[int], undo: Callable[[], None]) -> Iterator[None]:
    """Closes descriptors where what is inside fails."""
    try:
        yield
    except BaseException:
        for fd in fds:
            os.close(fd)
        undo()
        raise


def _launch(
    box: Bwrap,
    path: str,
    mode: Mode,
    files: Files,
    command: Sequence[str],
    limits: Limits,
    fds: Sequence[int],
) -> Launch:
    """All of it, put together."""
    content = archive(files, limits)
    program = guarded(checked(command), FILES_AT if files else None)
    words = arguments(mode, box.binds, _environment(box.env), limits)
    try:
        rules = seccomp.program()
    except ValueError as error:
        raise SandboxError(f"{error}: {WAY_OUT}") from error
    user = _take_user()
    group = None
    opened: list[int] = []

    def close() -> None:
        with _taken_lock:
            _taken.discard(user)
        if group:
            group.close()

    with _closing_on_error(opened, close):
        group = cgroup.make(limits, OWN[mode])
        if mode == "user" and os.geteuid() == 0 and not (group and "pids" in group.folders):
            raise SandboxError(NO_PIDS)
        opened.append(_memory("seccomp", rules))
        words += ["--seccomp", str(opened[-1])]
        if files:
            opened.append(_memory("files", content))
            words[words.index("--remount-ro") : words.index("--remount-ro")] = [
                *("--perms", "0444", "--ro-bind-data", str(opened[-1]), FILES_AT)
            ]
        status, told = os.pipe()
        opened += [told, status]
        words += ["--json-status-fd", str(told)]
        opened.append(_memory("arguments", b"\0".join(os.fsencode(word) for word in words) + b"\0"))
        argv = [*_entering(group.joins if group else ()), *(DYING if mode == "root" else ())]
        argv += [path, "--args", str(opened[-1]), "--"]
        opened.remove(status)
    return Launch(
        argv=[*argv, *confined(mode, user, limits), *program],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        fds=(*opened, *fds),
        status_fd=status,
        nested=mode == "root",
        opened=tuple(opened),
        cpu=group.cpu if group else lambda: None,
        peak=group.peak if group else lambda: None,
        hit=group.hit if group else lambda: None,
        close=close,
    )


def _take_user() -> int:
    """A user id that no other box of this process has: the limit on processes counts by user."""
    with _taken_lock:
        free = [user for user in USER_IDS if user not in _taken]
        if not free:
            raise SandboxError(f"{len(_taken)} boxes are open at once; close some")
        user = random.SystemRandom().choice(free)
        _taken.add(user)
    return user
