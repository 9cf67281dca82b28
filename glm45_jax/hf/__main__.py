"""`python -m glm45_jax.hf convert SRC DST`, `check SRC`, `diff A B`.

SRC is a released folder, a converted one or a run's workdir; DST is the other kind, or a released
folder with `--to hf`. Exit code 0, 1 for a difference, 2 for bad input with one message.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import sys

from glm45_jax.checkpoint import DamagedError
from glm45_jax.hf import convert
from glm45_jax.kernels import fp8
from glm45_jax.metrics import setup_logging, short

_DTYPES = {"bfloat16": "bfloat16", "float32": "float32", "stored": None, "fp8": None}


def main(argv: list[str] | None = None) -> int:
    """Exit code of one command."""
    args = _parser().parse_args(argv)
    setup_logging()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # one message, not orbax's traceback too
    try:
        return args.run(args)
    except (ValueError, OSError, DamagedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m glm45_jax.hf", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("convert", help="a released folder to a checkpoint of ours, or back")
    one.add_argument("src")
    one.add_argument("dst")
    one.add_argument("--to", choices=("ours", "hf"), help="default: the kind SRC is not")
    one.add_argument(
        "--dtype", choices=tuple(_DTYPES), default="stored", help="of the weights written"
    )
    one.add_argument("--step", type=int, help="of a workdir; default the newest")
    one.add_argument("--max-shard-bytes", type=int, default=5 * 2**30)
    one.set_defaults(run=_convert)
    one = commands.add_parser("check", help="account for every tensor")
    one.add_argument("src")
    one.add_argument("--sha256", action="store_true", help="read everything, print a sum a tensor")
    one.add_argument("--step", type=int)
    one.set_defaults(run=_check)
    one = commands.add_parser("diff", help="tensors that are not the same to the bit")
    one.add_argument("a")
    one.add_argument("b")
    one.set_defaults(run=_diff)
    return parser


def _convert(args: argparse.Namespace) -> int:
    source = convert.open_source(args.src, args.step)
    to = args.to or ("ours" if convert.is_released(pathlib.Path(args.src)) else "hf")
    dtype = _DTYPES[args.dtype]
    if to == "ours":
        if args.dtype == "fp8":
            raise ValueError("--dtype fp8 is a layout of released folders; add --to hf")
        convert.to_checkpoint(source, args.dst, dtype=dtype)
    else:
        convert.to_folder(
            source,
            args.dst,
            dtype=dtype,
            fp8_block=fp8.BLOCK if args.dtype == "fp8" else None,
            max_shard_bytes=args.max_shard_bytes,
        )
    found = convert.account(source)
    print(f"{found.tensors} tensors, {short(found.nbytes)}B: {args.src} -> {args.dst} ({to})")
    return 0


def _check(args: argparse.Namespace) -> int:
    source = convert.open_source(args.src, args.step)
    found = convert.account(source)
    width = max(len(name) for name, _, _ in found.kinds)
    for (name, dtype, shape), count in found.kinds.items():
        print(f"{count:7d}  {name:{width}}  {dtype}{list(shape)}")
    damaged = 0
    if args.sha256:
        for digest in convert.digests(source):
            print(f"{digest.sha256}  {digest.name}")
            if digest.not_finite:
                damaged += 1
                print(f"error: {digest.name} has {digest.not_finite} NaN or infinite values")
    print(
        f"{found.tensors} tensors, {short(found.nbytes)}B: all accounted for"
        f"{'' if args.sha256 else ', bytes not read (--sha256 reads them)'}"
    )
    return 2 if damaged else 0


def _diff(args: argparse.Namespace) -> int:
    a, b = convert.open_source(args.a), convert.open_source(args.b)
    lines = 0
    for line in convert.differences(a, b):
        print(line)
        lines += 1
    print(f"{lines} differences" if lines else f"{len(a.entries)} tensors, the same to the bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
