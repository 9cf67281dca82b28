"""What a push of weights costs: `python -m experiments.bench.weights_push` on an accelerator.

A slice of GLM-4.5-Air at its true width (`--layers`, the first dense, the others MoE with all 128
experts; random bfloat16 weights, made on the device) goes to a driver that holds an older version:
prepare, stage, publish, in bfloat16 and as FP8, from the first device to the last. GB/s are bytes
of the trainer's weights over seconds. The floor reads them once and writes what is served once, at
the copy bandwidth of the same run. Writes the key "weights_push" of the device's results; `--tiny`
runs anywhere in seconds and writes nothing.
"""

import argparse
import statistics
import time
from typing import Any

import jax

from experiments.bench.results import device_name, merge_result
from experiments.bench.rollout import air, copy_bandwidth, weights
from glm45_jax.model import config, transformer
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.weights import Push, prepare, publish, stage


def nbytes(tree: Any) -> int:
    """Of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def measure(
    params: transformer.Params, cfg: config.ModelConfig, how: Push, bandwidth: float, times: int
) -> dict[str, Any]:
    """Seconds of each part, the median of some pushes after one that compiles."""
    to = jax.devices()[-1]
    first = stage(prepare(params, 0, cfg=cfg, fp8=how.fp8), to)
    engine = GlmEngine(cfg, slots=1, pages=2, page=16, max_tokens=32)
    driver, served = Driver(engine, first.params), nbytes(first.params)
    del first
    seconds: dict[str, list[float]] = {"prepare": [], "stage": [], "publish": []}
    for version in range(1, times + 1):
        marks = [time.perf_counter()]
        parcel = prepare(params, version, cfg=cfg, fp8=how.fp8)
        marks.append(time.perf_counter())
        parcel = stage(parcel, to)
        marks.append(time.perf_counter())
        publish(driver, parcel, how.policy)
        marks.append(time.perf_counter())
        for name, a, b in zip(seconds, marks[:-1], marks[1:], strict=True):
            seconds[name].append(b - a)
    assert driver.stats.version == times
    sent, parts = nbytes(params), {k: statistics.median(v) for k, v in seconds.items()}
    total = sum(parts.values())
    return {
        "served": "fp8" if how.fp8 else "bf16",
        "sent_gb": round(sent / 1e9, 3),
        "served_gb": round(served / 1e9, 3),
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in parts.items()},
        "gbs": round(sent / total / 1e9, 1),
        "floor_share": round((sent + served) / bandwidth / total, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of Air, the dense one included")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    cfg = config.tiny() if args.tiny else air(args.layers)
    params, bandwidth = weights(cfg), copy_bandwidth()
    rows = [measure(params, cfg, Push(fp8=fp8), bandwidth, args.times) for fp8 in (False, True)]
    result = {
        "model": "tiny" if args.tiny else f"glm45_air, {args.layers} layers",
        "devices": [str(jax.devices()[0]), str(jax.devices()[-1])],
        "copy_gbs": round(bandwidth / 1e9, 1),
        "rows": rows,
    }
    for row in rows:
        print(row)
    print(f"copy bandwidth {result['copy_gbs']} GB/s")
    if not args.tiny:
        print(merge_result(device_name(), "weights_push", result))


if __name__ == "__main__":
    main()
