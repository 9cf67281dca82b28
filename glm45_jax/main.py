"""Runs an experiment: `python -m glm45_jax.main module:function --workdir W [--set path=value]
[--dry-run]`.

Four flags, and a test that keeps it so: everything else is a Python value in an experiment file.
"""

from __future__ import annotations

import argparse
import logging
import os
import pathlib
import sys
from collections.abc import Sequence

from glm45_jax.values import find

__all__ = ["find", "main", "parser"]

# Exit codes; the last is that of SIGTERM.
BAD_INPUT, NOT_FINITE, GATE, STARVED, STOPPED = 2, 3, 4, 5, 128 + 15

log = logging.getLogger("glm45_jax")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m glm45_jax.main", description=__doc__)
    p.add_argument("experiment", help="module:function, say experiments.quickstart:quickstart")
    p.add_argument(
        "--workdir",
        type=pathlib.Path,
        help="where everything the run writes goes; resumes what is there",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override, say optim.lr=2e-4",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would be; no accelerator, no files",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 3 a step was not finite (of pretraining: and the budget for
    such steps is spent), 4 engine and trainer of an RL run disagree, 5 its sampling came to no
    batch, 6 no step finished in time, 143 stopped by a signal with a checkpoint saved.
    """
    args = parser().parse_args(argv)
    _use_compile_cache()
    _wait_for_late_cpu_devices()
    from glm45_jax import hosts, metrics, plan, values
    from glm45_jax.experiment import BadInput

    metrics.setup_logging()
    try:
        experiment = values.override(find(args.experiment)(), args.set)
        experiment.tracker.check()
        if args.dry_run:
            sys.stdout.write(plan.table(experiment) + "\n")
            return 0
        if args.workdir is None:
            raise ValueError(
                "--workdir is missing; name a folder for checkpoints, metrics and the report"
            )
        hosts.join()
    except ValueError as error:
        return _refuse(error)
    try:
        outcome = experiment.run(experiment, args.workdir)
    except BadInput as error:
        return _refuse(error)
    codes = {"not finite": NOT_FINITE, "skips spent": NOT_FINITE, "gate": GATE}
    codes |= {"starved": STARVED, "stopped": STOPPED}
    return codes.get(outcome.why, 0)


def _refuse(error: ValueError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return BAD_INPUT


def _use_compile_cache() -> None:
    """Compiled programs outlive the process, unless the environment says where they go."""
    cache = (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        / "glm45_jax"
        / "compiled"
    )
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))


def _wait_for_late_cpu_devices() -> None:
    """Several devices of one CPU share its cores: where the machine is busy one may come to a
    collective minutes after the others, and XLA aborts the process after 40 seconds. Flags of the
    environment win.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    name = "--xla_cpu_collective_call_terminate_timeout_seconds"
    several = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in flags
    if several and name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {name}=300".strip()


if __name__ == "__main__":
    sys.exit(main())
