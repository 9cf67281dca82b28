"""Runs an experiment: `python -m glm45_jax.main module:function --workdir W [--set path=value]
[--dry-run]`.

Four flags, and a test that keeps it so: everything else is a Python value in an experiment file.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import logging
import os
import pathlib
import sys
from collections.abc import Sequence

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
    from glm45_jax import hosts, metrics, plan, values
    from glm45_jax.experiment import BadInput

    metrics.setup_logging()
    try:
        experiment = values.override(find(args.experiment)(), args.set)
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


def find(name: str):
    """The function `module:function` names.

    Raises: ValueError where it is not there, with the nearest names.
    """
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise ValueError(
            f"experiment {name!r} is not module:function, say experiments.pretrain:glm45_air"
        )
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ValueError(
            f"no module {error.name!r} for experiment {name!r}; run from the repository's root"
        ) from error
    finally:
        sys.path.pop(0)
    functions = [
        n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module_name
    ]
    if function_name not in functions:
        near = difflib.get_close_matches(function_name, functions, 3, 0.3)
        raise ValueError(
            f"{module_name} has no function {function_name!r}; did you mean {near}? "
            f"It has {functions}"
        )
    return getattr(module, function_name)


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


if __name__ == "__main__":
    sys.exit(main())
