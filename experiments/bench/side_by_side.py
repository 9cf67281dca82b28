"""Python processes side by side on one host, each on cores of its own. The type to know is `Task`.

For benchmarks of many small runs, where one run does not fill the machine. No jax here: what a task
does is its own.
"""

import collections
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

MOST_CORES = 4  # of one task, when there are more cores than tasks
LEAVE_S = 15.0  # for a task to save and leave; then it is killed
LOOK_S = 0.25


@dataclasses.dataclass(frozen=True)
class Task:
    """One process. args: for Python. result: file that it leaves, which is there: it is done.
    after: name of the task that must be done before; empty: none.
    """

    name: str
    args: tuple[str, ...]
    result: pathlib.Path
    after: str = ""


def run_tasks(
    tasks: Sequence[Task],
    logs: pathlib.Path,
    parallel: int,
    cpus: int,
    seconds: float | None = None,
) -> list[str]:
    """Names of the tasks that are not done; the first of those that may begin begins first.

    logs: what tasks say goes there, a file each. parallel: at most so many at once. cpus: that they
    share; when few tasks are left each gets more, up to `MOST_CORES`. seconds: then those that run
    get SIGTERM, and have `LEAVE_S` to leave.

    Raises: ValueError for fewer cores than tasks at once.
    """
    free = sorted(os.sched_getaffinity(0))[:cpus]
    if not 1 <= parallel <= len(free):
        raise ValueError(f"{parallel} tasks at once on {len(free)} cores: each needs one")
    began, todo = time.monotonic(), collections.deque(t for t in tasks if not t.result.exists())
    done = {task.name for task in tasks if task.result.exists()}
    running: dict[Task, tuple[subprocess.Popen[bytes], list[int]]] = {}
    while todo or running:
        over = seconds is not None and time.monotonic() - began > seconds
        if over:
            _leave([process for process, _ in running.values()])
        for task, (process, cores) in list(running.items()):
            if process.poll() is None:
                continue
            del running[task]
            free += cores
            if task.result.exists():
                done.add(task.name)
            at = time.monotonic() - began
            print(f"{at:5.0f} s  {task.name}: {_end(task, process.returncode, logs)}", flush=True)
        if over:
            break
        ready = [task for task in todo if not task.after or task.after in done]
        if not ready and not running:
            break  # what they wait for has failed
        # Those that run may hold several cores each: as many begin as there are cores left.
        begin = ready[: min(parallel - len(running), len(free))]
        for at, task in enumerate(begin):
            waiting = len(begin) - at
            share = max(1, min(MOST_CORES, len(free) // waiting))
            cores, free = free[:share], free[share:]
            todo.remove(task)
            running[task] = _begin(task, cores, logs), cores
        time.sleep(LOOK_S)
    return [task.name for task in tasks if task.name not in done]


def _begin(task: Task, cores: Sequence[int], logs: pathlib.Path) -> "subprocess.Popen[bytes]":
    """On these cores from its first instruction on, so that every pool of threads fits them."""
    file = _log(task, logs)
    file.parent.mkdir(parents=True, exist_ok=True)
    cache = logs.parent / "jax_cache"
    mine = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    mine["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    pin = f"import os; os.sched_setaffinity(0, {list(cores)}); os.execv({sys.executable!r}, "
    command = pin + f"{[sys.executable, *task.args]!r})"
    with file.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-S", "-c", command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | mine,
        )


def _leave(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    until = time.monotonic() + LEAVE_S
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _log(task: Task, logs: pathlib.Path) -> pathlib.Path:
    return logs / f"{task.name.replace('/', '_')}.log"


def _end(task: Task, code: int, logs: pathlib.Path) -> str:
    if task.result.exists():
        return "done"
    return f"left with {code}; its log ends:\n{_log(task, logs).read_text()[-1500:]}"
