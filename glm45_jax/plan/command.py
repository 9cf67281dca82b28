"""`python -m glm45_jax.plan experiments.pretrain:glm45 --target v5p:8x8x8`: compiles the real train
step for a machine that is not here and says whether it fits and how fast it can be.

Exit code: 0 fits, 1 does not, 2 bad input, 3 nothing was compiled, the estimates are printed; 4 the
compiler failed or met a limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from glm45_jax import values
from glm45_jax.plan import compile as compiling
from glm45_jax.plan import inference, nearest, report, targets, wheels


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m glm45_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("experiment", nargs="?", help="module:function, say experiments.pretrain:glm45")
    p.add_argument("--target", help="v5p:8x8x8, v6e:16x16, h100:64x8 (64 hosts of 8 GPUs)")
    p.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override")
    p.add_argument("--stage", help="of a staged experiment, by name; without it the first")
    p.add_argument(
        "--install", action="store_true", help="fetch the target's compiler where it is missing"
    )
    p.add_argument("--estimate", action="store_true", help="compile nothing; exit code 3")
    p.add_argument(
        "--choose-remat",
        action="store_true",
        help="keep as much of a block as fits by estimate, whatever the experiment says",
    )
    p.add_argument("--limit-s", type=float, default=3600.0, help="of the compiling, by the clock")
    p.add_argument("--limit-gib", type=float, default=16.0, help="of its memory on this machine")
    p.add_argument("--inference", action="store_true", help="print the cards that serve each model")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; see the module for the exit codes."""
    args = parser().parse_args(argv)
    if args.inference:
        sys.stdout.write(inference.table() + "\n")
        return report.FITS
    try:
        text, code = _plan(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return report.BAD_INPUT
    sys.stdout.write(text + "\n")
    return code


def _plan(args: argparse.Namespace) -> tuple[str, int]:
    """(what to print, exit code). Raises: ValueError for input that cannot be planned."""
    if args.experiment is None or args.target is None:
        raise ValueError(
            "give module:function and --target, say experiments.pretrain:glm45 --target v5p:8x8x8; "
            "or --inference"
        )
    target = targets.parse(args.target)
    exp = values.override(values.find(args.experiment)(), args.set)
    first = exp.spans[0].stage
    stage = args.stage or (first.name if first is not None else None)
    part, rows = compiling.part(exp, stage)
    nearest.check(part, rows, target)
    sets = list(args.set)
    if args.choose_remat:
        fitting = [p.name for p in nearest.policies(part, rows, target) if p.fits]
        sets.append(f"model.remat={fitting[0] if fitting else nearest.REMAT[-1]}")
        part, rows = compiling.part(values.override(exp, sets[-1:]), stage)
    job = compiling.Job(args.experiment, str(target), tuple(sets), stage)
    missing = wheels.missing(target.chip.platform)
    if missing and args.install:
        sys.stderr.write(f"fetching into {wheels.folder(target.chip.platform)}\n")
        wheels.install(target.chip.platform)
        missing = ""
    if args.estimate:
        missing = "--estimate was given"
    compiled = None
    if not missing:
        compiled = compiling.run(
            job, limit_s=args.limit_s, limit_bytes=args.limit_gib * targets.GIB
        )
    return report.report(part, rows, job, target, compiled, missing)
