"""Released checkpoints in and out, at true width: `python -m experiments.bench.checkpoints`.

Makes a folder in the released layout (random bfloat16, layers of GLM-4.5-Air: 3 dense, 1 MoE with
128 experts, the whole vocabulary: 8.4 GB), then, each in a process of its own: copies it with `cp`,
converts it to a checkpoint of ours, back, to FP8, and loads it onto 8 virtual devices. Prints MB/s
beside the copy's, and the peak of resident memory. Writes the key "checkpoints" of the device's
results. `--tiny` takes seconds. Needs four times the folder's size of disk.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from experiments.bench.results import cpu_name, merge_result
from glm45_jax.hf.convert import account
from glm45_jax.hf.names import Entry, table
from glm45_jax.hf.sources import Ranges, Source
from glm45_jax.hf.writer import write_folder
from glm45_jax.model.config import ModelConfig, glm45_air, tiny

DEVICES = 8
CONVERT_LIMIT_BYTES = 3e9  # resident, in all
LOAD_LIMIT_BYTES = 2.5e9  # resident, beside the arrays


def model(small: bool) -> ModelConfig:
    """The model of the folder."""
    if small:
        return dataclasses.replace(tiny(), dtype="bfloat16")
    return dataclasses.replace(glm45_air(), n_dense=3, n_moe=1, n_mtp=0)


def random_source(cfg: ModelConfig) -> Source:
    """Every tensor of `cfg`: bfloat16 bits at random below 2 in size, the router's bias float32."""
    entries = table(cfg)
    bf16, float32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    dtype = {e.name: float32 if e.state else bf16 for e in entries}

    def rows(entry: Entry, ranges: Ranges) -> Iterator[tuple[int, int, np.ndarray]]:
        for first, last in ranges:
            # A copy repeats what it copies: the seed is the leaf's, not the name's.
            seed = [*entry.leaf.encode(), *entry.index, first]
            shape = (last - first, *entry.shape[1:])
            bits = np.random.default_rng(seed).integers(0, 2**16, shape, np.uint16)
            values = (bits & 0xBFFF).view(bf16)  # without the top bit of the exponent
            yield first, last, values.astype(dtype[entry.name], copy=False)

    return Source(cfg, entries, dtype, rows)


def timed(command: list[str], env: dict[str, str] | None = None) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and output of a process.

    Raises: RuntimeError with its output where it fails.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        out.seek(0)
        text = out.read()
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}:\n{text}")
    return seconds, usage.ru_maxrss * 1024, text


def load_here(path: str) -> None:
    """Loads onto a mesh of every device and prints the bytes of the arrays."""
    import jax

    from glm45_jax import hf
    from glm45_jax.sharding import MeshShape, make_mesh

    _, params = hf.load(path, mesh=make_mesh(MeshShape(fsdp=DEVICES // 2, expert=2)))
    jax.block_until_ready(params)
    held = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
    print(f"arrays {held}")


def measure(folder: Path, small: bool) -> dict[str, dict[str, float]]:
    """Each step: bytes, seconds, MB/s, peak resident bytes, share of the copy's speed."""
    cfg = model(small)
    source = random_source(cfg)
    nbytes = account(source).nbytes
    out: dict[str, dict[str, float]] = {}
    hf, ours, back, eight = (str(folder / name) for name in ("hf", "ours", "back", "fp8"))

    def note(name: str, run: Callable[[], tuple[float, int, str]]) -> str:
        seconds, peak, text = run()
        out[name] = {
            "bytes": nbytes,
            "seconds": round(seconds, 2),
            "mb_per_s": round(nbytes / seconds / 1e6, 1),
            "peak_rss_bytes": peak,
        }
        print(f"{name:24}{out[name]['mb_per_s']:9.1f} MB/s   peak {peak / 1e9:6.2f} GB", flush=True)
        return text

    began = time.perf_counter()
    write_folder(hf, source, what="make")
    print(f"{nbytes / 1e9:.2f} GB made in {time.perf_counter() - began:.0f} s", flush=True)
    cli = [sys.executable, "-m", "glm45_jax.hf"]
    note("copy (cp)", lambda: timed(["cp", "-r", hf, back]))
    shutil.rmtree(back)
    note("to ours", lambda: timed([*cli, "convert", hf, ours]))
    note("back", lambda: timed([*cli, "convert", ours, back]))
    said = timed([*cli, "diff", hf, back])[2]
    print(said.splitlines()[-1])
    shutil.rmtree(ours)
    shutil.rmtree(back)
    note("to fp8", lambda: timed([*cli, "convert", hf, eight, "--to", "hf", "--dtype", "fp8"]))
    shutil.rmtree(eight)
    env = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
    }
    me = [sys.executable, "-m", "experiments.bench.checkpoints", "--load", hf]
    text = note("load, 8 devices", lambda: timed(me, env))
    out["load, 8 devices"]["array_bytes"] = int(text.split("arrays ")[1].split()[0])
    return out


def failures(rows: dict[str, dict[str, float]]) -> list[str]:
    """What missed its limit."""
    bad = [
        f"{name}: peak {row['peak_rss_bytes'] / 1e9:.2f} GB, limit {CONVERT_LIMIT_BYTES / 1e9} GB"
        for name, row in rows.items()
        if name in ("to ours", "back", "to fp8") and row["peak_rss_bytes"] > CONVERT_LIMIT_BYTES
    ]
    load = rows["load, 8 devices"]
    beside = load["peak_rss_bytes"] - load["array_bytes"]
    if beside > LOAD_LIMIT_BYTES:
        bad.append(f"load: {beside / 1e9:.2f} GB beside the arrays, limit {LOAD_LIMIT_BYTES / 1e9}")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, help="scratch space; default a temporary folder")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load_here(args.load)
        return 0
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        rows = measure(Path(scratch), args.tiny)
    bad = failures(rows)
    for line in bad:
        print(f"over its limit: {line}")
    if not args.tiny:
        merge_result(cpu_name(), "checkpoints", rows)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
