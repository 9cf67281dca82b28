"""Compiles the real train step for a target, in a process of its own with limits of time and
memory. Types to know: `Job`, `Compiled`; `run` is what the command calls.

libtpu can abort its process and takes memory as it likes, so that nothing but a child asks it:
`python -m glm45_jax.plan.compile` reads a job and writes what came out.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from glm45_jax import values
from glm45_jax.plan import hlo, roofline, targets, wheels

POLL_S = 0.2
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# libtpu asks for a machine it runs on; with these it does not, and two may be loaded at once.
TPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile. sets: overrides as `--set` takes them. stage: its name, of a staged run."""

    experiment: str
    target: str
    sets: tuple[str, ...] = ()
    stage: str | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of one device. error: why nothing came out, else "". used: bytes that
    an overflow asked for, 0 where there was none.

    peak, arguments, temporary: bytes. lower_s, compile_s, cpu_s, rss: of the compiling itself, two
    by the clock, seconds of all cores, bytes. sends: {kind: (runs, bytes, seconds)} of a step.
    picked: which kernels, line by line.
    """

    error: str = ""
    used: float = 0.0
    peak: float = 0.0
    arguments: float = 0.0
    temporary: float = 0.0
    lower_s: float = 0.0
    compile_s: float = 0.0
    cpu_s: float = 0.0
    rss: float = 0.0
    sends: dict[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    picked: tuple[str, ...] = ()


def part(exp: Any, stage: str | None) -> tuple[Any, int]:
    """(what one stage trains, rows of its largest batch); without a name the first stage, or the
    whole run.

    Raises: ValueError for a stage that the run does not have.
    """
    names = [span.stage.name for span in exp.spans if span.stage is not None]
    if stage is not None and stage not in names:
        raise ValueError(f"no stage {stage!r} in {exp.name}; its stages are {names}")
    span = exp.spans[names.index(stage) if stage is not None else 0]
    return exp.of(span), max(rows for _, rows in span.sizes())


def run(job: Job, *, limit_s: float, limit_bytes: float) -> Compiled:
    """Compiles in a child; `error` says where it was killed, and why."""
    target = targets.parse(job.target)
    with tempfile.TemporaryDirectory() as folder:
        out, log = pathlib.Path(folder, "out.json"), pathlib.Path(folder, "log.txt")
        command = [sys.executable, "-m", "glm45_jax.plan.compile"]
        command += [json.dumps(dataclasses.asdict(job)), str(out)]
        began = time.monotonic()
        with log.open("w") as stream:
            child = subprocess.Popen(
                command, env=environment(target), stdout=stream, stderr=subprocess.STDOUT
            )
            why = _watch(child, began, limit_s, limit_bytes)
        if why:
            return Compiled(error=why)
        if not out.exists():
            last = last_words(log.read_text(errors="replace"))
            return Compiled(error=f"the compiler ended with code {child.returncode}: {last}")
        found = json.loads(out.read_text())
    sends = {kind: (row[0], row[1], row[2]) for kind, row in found.pop("sends").items()}
    return Compiled(sends=sends, picked=tuple(found.pop("picked")), **found)


def last_words(text: str) -> str:
    """The last lines of what a child wrote, without jax's remark on tracebacks."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    lines = [line for line in lines if "JAX_TRACEBACK_FILTERING" not in line and "^^^" not in line]
    return " | ".join(lines[-4:])


def environment(target: targets.Target) -> dict[str, str]:
    """Variables of the child: no accelerator, the target's compiler on the path, no cache."""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR",)}
    env.pop("XLA_FLAGS", None)  # of this machine's devices, not of the target's
    paths = [os.getcwd(), *wheels.paths(target.chip.platform), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    env["JAX_PLATFORMS"] = "cpu"
    return env | (TPU_ENV if target.chip.platform == "tpu" else {})


def _watch(child: subprocess.Popen, began: float, limit_s: float, limit_bytes: float) -> str:
    """Waits; kills at a limit and says which."""
    why = ""
    while child.poll() is None:
        time.sleep(POLL_S)
        held = _resident(child.pid)
        if time.monotonic() - began > limit_s:
            why = f"stopped: not compiled within {limit_s:g} s; give more with --limit-s"
        elif held > limit_bytes:
            why = (
                f"stopped: the compiler held {held / 2**30:.1f} GiB, the limit is "
                f"{limit_bytes / 2**30:g}; give more with --limit-gib"
            )
        if why:
            child.kill()
            child.wait()
    return why


def _resident(pid: int) -> float:
    """Bytes in memory of a process; 0 once it has ended."""
    try:
        text = pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return float(found[1]) * 1024 if found else 0.0


class _Lines(logging.Handler):
    """Keeps what the kernels say they picked."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _child(job: Job) -> Compiled:
    """Lowers and compiles here."""
    import jax

    said = _Lines()
    logging.getLogger("glm45_jax").setLevel(logging.INFO)
    logging.getLogger("glm45_jax").addHandler(said)
    target = targets.parse(job.target)
    exp, rows = part(values.override(values.find(job.experiment)(), list(job.sets)), job.stage)
    began = time.monotonic()
    try:
        lowered = lower(exp, rows, targets.topology(target).devices)
        lower_s = time.monotonic() - began
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Compiled(error=str(error), used=overflow(str(error)), picked=tuple(said.lines))
    compile_s, used = time.monotonic() - began - lower_s, resource.getrusage(resource.RUSAGE_SELF)
    memory = compiled.memory_analysis()
    counted = hlo.count(compiled.as_text(), target.devices)
    return Compiled(
        peak=float(memory.peak_memory_in_bytes),
        arguments=float(memory.argument_size_in_bytes),
        temporary=float(memory.temp_size_in_bytes),
        lower_s=lower_s,
        compile_s=compile_s,
        cpu_s=used.ru_utime + used.ru_stime,
        rss=used.ru_maxrss * 1024.0,
        sends=roofline.sends(counted, target),
        unknown_loops=counted.unknown_loops,
        picked=tuple(said.lines),
    )


def lower(exp: Any, rows: int, devices: Any) -> Any:
    """The step of `exp` on a batch of `rows` rows over these devices, as `jax.stages.Lowered`: the
    one that trains, its state donated.
    """
    from glm45_jax.train.ahead import batch_shapes
    from glm45_jax.train.parallel import Recipe, make_trainer

    packed = getattr(exp.data.packing, "document_mask", True)
    recipe = Recipe(exp.model, exp.optim, exp.train, packed)
    trainer = make_trainer(exp.mesh, recipe, exp.rules, devices)
    trainer.check_rows(rows)
    return trainer.lower(batch_shapes(rows, exp.data.seq_len))


def overflow(message: str) -> float:
    """Bytes that XLA wanted where it says that HBM is too small; 0 where it says something else."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
    return float(found[1]) * UNITS[found[2]] if found else 0.0


def main() -> None:
    """The child: argv is a job as JSON and the file that the result goes to."""
    told = json.loads(sys.argv[1])
    job = Job(**{**told, "sets": tuple(told["sets"])})
    compiled = _child(job)
    pathlib.Path(sys.argv[2]).write_text(json.dumps(dataclasses.asdict(compiled)))


if __name__ == "__main__":
    main()
