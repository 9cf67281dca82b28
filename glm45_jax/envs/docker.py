"""Boxes by docker: `Docker`. For hosts without user namespaces, and other systems than ours.

Slower to start than bubblewrap (a second or so) and as safe as its daemon. Its argument list is
tested everywhere, a run only where a daemon answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

from glm45_jax.envs.box import (
    HOME,
    Files,
    Launch,
    Limits,
    SandboxError,
    Status,
    archive,
    checked,
    guarded,
)

FILES_AT = "/.files.tar"
NOBODY = 61234
ASK_S = 20.0


@dataclasses.dataclass(frozen=True)
class Docker:
    """A box by docker. image: has sh and tar, and what the command needs. path: of the client."""

    image: str
    path: str = "docker"

    def check(self) -> None:
        """Asks the daemon.

        Raises: SandboxError where the client is missing or no daemon answers.
        """
        if shutil.which(self.path) is None:
            raise SandboxError(f"{self.path} is not on PATH; install docker, or use box=Bwrap()")
        done = self._ask("version", "--format", "{{.Server.Version}}")
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-300:]
            raise SandboxError(f"no docker daemon answers ({said}); start one, or use box=Bwrap()")

    def _ask(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.path, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ASK_S,
            check=False,
        )

    def arguments(self, name: str, archived: str | None, limits: Limits) -> list[str]:
        """`docker run` and its options, up to the image. archived: the files, on the host."""
        cpu = math.ceil(limits.cpu_s)
        folder = f"rw,exec,nosuid,nodev,mode=1777,size={limits.disk},nr_inodes={limits.files}"
        words = [
            *(self.path, "run", "--interactive", "--init", "--name", name, "--network", "none"),
            *("--memory", str(limits.memory), "--memory-swap", str(limits.memory)),
            *("--pids-limit", str(limits.processes + 1), "--cpus", f"{limits.cpus:g}"),
            *("--read-only", "--tmpfs", f"{HOME}:{folder}", "--shm-size", str(limits.disk)),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--ipc", "private"),
            *("--user", f"{NOBODY}:{NOBODY}", "--workdir", HOME, "--env", f"HOME={HOME}"),
            *("--hostname", "box", "--pull", "never", "--log-driver", "none"),
            *("--ulimit", f"cpu={cpu}:{cpu + 1}", "--ulimit", f"fsize={limits.disk}"),
            *("--ulimit", "core=1", "--ulimit", f"nofile={limits.open_files}"),
        ]
        if archived:
            words += ["--mount", f"type=bind,source={archived},target={FILES_AT},readonly"]
        return words

    def launch(
        self, files: Files, command: Sequence[str], limits: Limits, fds: Sequence[int] = ()
    ) -> Launch:
        """See `sandbox.start`. Address space has no limit here, and the daemon must be local.

        Raises: SandboxError where no daemon answers; ValueError for fds.
        """
        if fds:
            raise ValueError(f"fds {tuple(fds)}: a container inherits none; use box=Bwrap()")
        content, program = archive(files, limits), checked(command)
        self.check()
        name = f"glm45-box-{os.getpid()}-{secrets.token_hex(6)}"
        place = None
        if files:
            handle, place = tempfile.mkstemp(prefix=name, suffix=".tar")
            with open(handle, "wb") as file:
                file.write(content)
            os.chmod(place, 0o444)

        def hit() -> Status | None:
            done = self._ask("inspect", "--format", "{{.State.OOMKilled}}", name)
            return "memory" if done.stdout.strip() == b"true" else None

        def kill() -> None:
            self._ask("kill", name)

        def close() -> None:
            self._ask("rm", "--force", "--volumes", name)
            if place:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(place)

        return Launch(
            argv=[
                *self.arguments(name, place, limits),
                self.image,
                *guarded(program, FILES_AT if place else None),
            ],
            env={key: os.environ[key] for key in _CLIENT if key in os.environ},
            tree=False,
            hit=hit,
            kill=kill,
            close=close,
        )


_CLIENT = ("PATH", "HOME", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "XDG_RUNTIME_DIR")
