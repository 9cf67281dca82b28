"""The kernels of a device beside their peers: a table of all rows and a roofline, from the result
file.

    python -m experiments.bench.kernels_page

Writes a page for each device of `PAGES`, and the roofline of the first. Needs matplotlib and no
accelerator.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.bench.results import known
from glm45_jax.train.document import table

DEVICE = "nvidia-h100-80gb-hbm3-x1"  # of the figure
PAGES = {
    DEVICE: pathlib.Path("docs/kernels.md"),
    "nvidia-h200-x1": pathlib.Path("docs/kernels_h200.md"),
}
FIGURE = pathlib.Path("docs/images/kernels_roofline.png")
# Of the datasheet: dense bfloat16 TFLOP/s and TB/s of one H100 SXM.
PEAK_TFLOPS, PEAK_TBS = 989.0, 3.35
SECTIONS = (
    ("kernels_grouped_matmul", "Products of experts", "python -m experiments.bench.kernels"),
    (
        "kernels_moe_block",
        "The block of experts",
        "python -m experiments.bench.kernels_routing --block",
    ),
    ("kernels_routing", "Routing, copies of rows", "python -m experiments.bench.kernels_routing"),
    ("attention", "Attention", "python -m experiments.bench.kernels_attention"),
    (
        "kernels_decode",
        "Attention of a decoding step",
        "python -m experiments.bench.kernels_decode",
    ),
    ("kernels_cross_entropy", "Cross-entropy with the head", "python -m experiments.bench.kernels"),
    ("kernels_fp8_many", "FP8, many rows", "python -m experiments.bench.kernels_fp8 --only many"),
    ("kernels_fp8_few", "FP8, few rows", "python -m experiments.bench.kernels_fp8 --only few"),
    ("muon", "Muon", "python -m experiments.bench.muon"),
)
HEAD = (
    "op",
    "shape",
    "implementation",
    "ms",
    "TFLOP/s",
    "GB/s",
    "% of ceiling",
    "of the best peer",
    "error",
)


@dataclasses.dataclass(frozen=True)
class Point:
    """A row in the roofline. flop_per_byte: of the arrays that must be read and written."""

    what: str
    flop_per_byte: float
    tflops: float
    ours: bool


def is_offered(impl: str) -> bool:
    """Whether an implementation is what this project takes on the device; its plain forms, which
    run anywhere, are compared like peers.
    """
    return impl.split(",")[0] in ("ours", "mosaic", "glm45_jax mosaic", "glm45_jax fused")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table; what the benchmark did not tell is a dash."""
    percent = row.get("pct_of_ceiling", row.get("pct_of_copy"))
    ratio = row.get("ratio_to_best_peer", row.get("ratio_to_torch"))
    shape = row.get("shape") or f"{row.get('tokens', 0):,} tokens, {row.get('experts')} experts"
    if row.get("momentum"):
        shape += f", momentum {row['momentum']}"
    impl = row.get("impl", "xla" if "mosaic" not in row["op"] else "mosaic")
    if "error" in row:
        return (row["op"], shape, impl, "-", "-", "-", "-", "-", f"failed: {row['error'][:60]}")
    shown = (
        _number(row.get("ms"), 4),
        _number(row.get("tflops"), 4),
        _number(row.get("gbs"), 4),
        _number(percent, 3),
        _number(ratio, 3),
        _number(row.get("err"), 2),
    )
    return (row["op"], shape, impl, *shown)


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def points(key: str, rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Those rows of a section whose work is known."""
    found = []
    for row in rows:
        if "ms" not in row or str(row.get("impl")).startswith("bound"):
            continue
        if (intensity := flop_per_byte(key, row)) is None:
            continue
        tflops = row.get("tflops") or intensity * row["gbs"] / 1e3
        what = f"{row['op']} {row.get('shape', '')}"
        found.append(Point(what, intensity, tflops, is_offered(str(row.get("impl")))))
    return found


def flop_per_byte(key: str, row: Mapping[str, Any]) -> float | None:
    """FLOPs over the bytes that must move, from the row or its shape; None where neither says."""
    shape = str(row.get("shape"))
    if key == "attention" and (sizes := re.fullmatch(r"B(\d+) T(\d+) (\d+)/(\d+) d(\d+)", shape)):
        _, T, N, K, _ = (int(n) for n in sizes.groups())
        forward = 2.0 * T * N / (2 * 2 * (N + K))  # 4·B·T·T/2·N·H over q, k, v and the output
        return forward if row["op"] == "attention fwd" else 3.5 * forward / 3
    if key == "kernels_decode" and (
        sizes := re.search(r" T(\d+) (\d+)/(\d+) d\d+ (bf16|fp8)", shape)
    ):
        T, N, K = (int(n) for n in sizes.groups()[:3])
        stored = 2 if "contiguous bf16" in str(row["impl"]) or sizes[4] == "bf16" else 1
        return 2.0 * N * T / (K * stored)
    if key in ("kernels_grouped_matmul", "kernels_cross_entropy") and row.get("gbs"):
        return 1e3 * row["tflops"] / row["gbs"]
    return None


def figure(groups: Mapping[str, Sequence[Point]], copy_gbs: float, matmul_tflops: float) -> Any:
    """Every row over its intensity: ours filled, others hollow; the datasheet's roof and the one
    that was measured.
    """
    import numpy as np
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8.5, 5), layout="constrained")
    axes = drawn.subplots()
    x = np.geomspace(3, 3e5, 200)
    roof = np.minimum(PEAK_TBS * x, PEAK_TFLOPS)
    axes.plot(x, roof, color="0.3", linewidth=1, label="datasheet, dense bfloat16")
    measured = np.minimum(copy_gbs / 1e3 * x, matmul_tflops)
    label = f"measured: copy {copy_gbs:,.0f} GB/s, 8192³ product {matmul_tflops:.0f} TFLOP/s"
    axes.plot(x, measured, color="0.3", linewidth=1, linestyle="--", label=label)
    for number, (name, own) in enumerate(groups.items()):
        for ours in (False, True):
            chosen = [p for p in own if p.ours is ours]
            face = f"C{number}" if ours else "none"
            axes.scatter(
                [p.flop_per_byte for p in chosen],
                [p.tflops for p in chosen],
                s=34,
                facecolors=face,
                edgecolors=f"C{number}",
                label=name if ours else None,
            )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must move", ylabel="TFLOP/s")
    axes.set_ylim(1, 1500)
    axes.set_title("Kernels on one H100: ours filled, peers and plain forms hollow")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def page(device: str) -> str:
    """The page's text. Raises: SystemExit where the device has no rows."""
    parts = [
        "# Kernels beside their peers",
        "Written by `python -m experiments.bench.kernels_page` from the result file of "
        f"`{device}`; nothing here is typed by hand. Contenders of a table ran in one process, in "
        "turns where nothing else is said. The ceiling of arithmetic is an 8192³ product, of "
        "copies and decoding a copy of 2 GiB, both in the same run. Error: distance from float32, "
        "relative, where checked.",
        *([f"![FLOPs a byte, TFLOP/s]({FIGURE.relative_to('docs')})"] if device == DEVICE else []),
    ]
    head = len(parts)
    for key, title, command in SECTIONS:
        rows = known(device, key).get("rows", [])
        if not rows:
            continue
        versions = {row.get("jax") for row in rows} | {known(device, key).get("jax")}
        told = ", ".join(sorted(v for v in versions if v))
        # Who went first on a cool chip had more power than the next.
        alone = "" if all("ms_min" in r for r in rows if r.get("ms")) else "; one after another"
        about = f"`{command}`, jax {told}{alone}"
        parts += [f"## {title}", about, table(HEAD, [cells(r) for r in rows])]
    if len(parts) == head:
        raise SystemExit(f"no rows of kernels for {device}; experiments/bench/gpu.sh makes them")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes the pages and the figure."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for device, file in PAGES.items():
        file.write_text(page(device), encoding="utf-8")
    groups = {
        title: found
        for key, title, _ in SECTIONS
        if (found := points(key, known(DEVICE, key).get("rows", [])))
    }
    ceiling = known(DEVICE, "kernels_grouped_matmul")["ceiling_tflops"]
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure(groups, known(DEVICE, "kernels_decode")["copy_gbs"], ceiling).savefig(FIGURE, dpi=130)
    print(f"wrote {FIGURE} and {', '.join(map(str, PAGES.values()))}")


if __name__ == "__main__":
    main()
