"""The report of a run: `report.md` and plots, made from `metrics.jsonl` and what the caller adds.

The one function to know is `write_report`; the same inputs give the same bytes. A value is never
measured here: numbers are those of the file. Reports of other runs draw with `Curves` and the
functions that take one. Letters: L MoE layers, E experts.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm45_jax.metrics import Row, read_jsonl, short

_FIRST_STEPS = 10
_SMOOTHED = 400  # points, beyond which a running mean is drawn over the raw curve
_OCTAVES = 2  # the load map goes from a quarter of the mean to four times the mean
_MAPS = 1000
INK, MUTED = "#222222", "#8a8a8a"
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "image.interpolation": "nearest",
}


@dataclasses.dataclass(frozen=True)
class Curves:
    """What the plots draw: metrics, lines to compare with, and where the stages begin."""

    rows: list[Row]
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    stages: Sequence[tuple[str, int]] = ()

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) where `name` was logged; values that are not finite are NaN."""
        found = [(row.step, row.scalars[name]) for row in self.rows if name in row.scalars]
        steps, values = np.array(found, np.float64).reshape(-1, 2).T
        return steps, np.where(np.isfinite(values), values, np.nan)

    def stack(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, [steps, L, E]) where the array `name` was logged and has experts.

        Not finite becomes 0. Of very many steps some are left out, never the first or the last.
        """
        found = [(row.step, row.arrays[name]) for row in self.rows if name in row.arrays]
        found = [(step, array) for step, array in found if array.ndim == 2 and array.size]
        if len(found) > _MAPS:
            found = [found[n] for n in np.linspace(0, len(found) - 1, _MAPS).astype(int)]
        steps = np.array([step for step, _ in found], np.float64)
        arrays = np.array([array for _, array in found], np.float64)
        return steps, np.nan_to_num(arrays, posinf=0.0, neginf=0.0)


def write_report(
    workdir: Path | str,
    *,
    title: str,
    facts: Mapping[str, str],
    baselines: Mapping[str, float],
    samples: Sequence[tuple[str, str]],
    stages: Sequence[tuple[str, int]] = (),
) -> Path:
    """Path of `report.md`, written with `plots/*.png` beside `workdir/metrics.jsonl`.

    facts: rows of the first table. baselines: nats a token of simpler models on the validation
    tokens. samples: (prompt, continuation). stages: (name, its first step), drawn as lines.

    Raises: ValueError or FileNotFoundError where there are no metrics to report.
    """
    workdir = Path(workdir)
    rows = read_jsonl(workdir / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{workdir / 'metrics.jsonl'} is empty; log at least one step")
    run = Curves(rows, baselines, stages)
    plots = write_plots(run, workdir / "plots", _plots())
    parts = [f"# {cell(title)}", table(("run", ""), [(k, cell(v)) for k, v in facts.items()])]
    parts += ["## Results", table(("", "value"), _results(run))]
    if plots:
        parts += ["## Curves", *(f"![{alt}](plots/{name})" for name, alt in plots)]
    if samples:
        parts += ["## Samples", *(block("⟶".join(sample)) for sample in samples)]
    return write_text(workdir / "report.md", parts)


def cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns; "" without rows."""
    if not rows:
        return ""
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {cell(name)} | {value} |" for name, value in rows])


def block(text: str) -> str:
    """The text in a block, fenced by more backticks than it has in a row."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _results(run: Curves) -> list[tuple[str, str]]:
    """The rows of the results table; those that were logged."""
    rows: list[tuple[str, str]] = []
    steps, losses = run.series("val/loss")
    if len(steps):
        early = steps <= _FIRST_STEPS
        first = float(np.mean(losses[early])) if early.any() else float(losses[0])
        when = f"first {_FIRST_STEPS} steps" if early.any() else f"step {steps[0]:.0f}"
        final = float(losses[-1])
        rows.append((f"validation loss, {when}", f"{first:.4f} nats a token"))
        rows.append((f"validation loss, step {steps[-1]:.0f}", f"{final:.4f} nats a token"))
        rows.append(("drop of the validation loss", f"{100 * (first - final) / first:.1f} %"))
        for name, nats in run.baselines.items():
            side = "below it" if final < nats else "NOT below it"
            rows.append((f"{name} model", f"{nats:.4f} nats a token; the final loss is {side}"))
    for name, label in (("loss/ce", "cross-entropy"), ("loss", "whole loss")):
        steps, losses = run.series(name)
        if len(steps):
            last = losses[-_FIRST_STEPS:]
            label = f"training {label}, mean of the last {len(last)} logged steps"
            rows.append((label, f"{np.mean(last):.4f}"))
    return rows + _speeds(run)


def _speeds(run: Curves) -> list[tuple[str, str]]:
    kinds: list[tuple[str, str, Callable[[np.ndarray], str]]] = [
        ("tokens_per_s", "tokens a second, median", lambda x: f"{np.median(x):,.0f}"),
        ("mfu", "MFU, median", lambda x: f"{100 * np.median(x):.2f} %"),
        ("tokens", "tokens trained on", lambda x: f"{x[-1]:,.0f}"),
        (
            "load_max_over_mean",
            "busiest expert over the mean, at the end",
            lambda x: f"{x[-1]:.2f}",
        ),
    ]
    rows = []
    for name, label, show in kinds:
        _, values = run.series(name)
        values = values[np.isfinite(values)]
        if len(values):
            rows.append((label, show(values)))
    return rows


Plot = tuple[str, str, Callable[[Curves], Any]]  # file name, what it shows, what draws it


def _plots() -> list[Plot]:
    return [
        ("loss.png", "loss by step", _loss_figure),
        ("load.png", "share of tokens each expert takes", _load_figure),
        ("lr.png", "learning rate and gradient norm by step", _lr_figure),
        ("bias.png", "router bias", _bias_figure),
    ]


def write_plots(run: Curves, folder: Path, plots: Sequence[Plot]) -> list[tuple[str, str]]:
    """(file name, what it shows) of the plots that there are numbers for; what draws gives a
    figure, or None where there are none.
    """
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for name, alt, draw in plots:
            figure = draw(run)
            if figure is None:
                (folder / name).unlink(missing_ok=True)
                continue
            figure.savefig(folder / name, dpi=150, metadata={"Software": None})
            written.append((name, alt))
    return written


def write_text(path: Path, parts: Sequence[str]) -> Path:
    """The path, whose file has these parts with an empty line between; empty ones are left out."""
    text = "\n\n".join(part for part in parts if part) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return path


def figure_of(width: float, height: float) -> Any:
    """An empty figure, in inches, of no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` values at each place, of fewer at the start."""
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known).astype(np.float64)
    sums[width:] = sums[width:] - sums[:-width]
    counts[width:] = counts[width:] - counts[:-width]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def draw_curve(
    axes: Any, run: Curves, name: str, label: str, color: str, *, smooth: bool = True
) -> bool:
    """Whether there was something to draw; long curves are pale, with a running mean on top."""
    steps, values = run.series(name)
    if not np.isfinite(values).any():
        return False
    if smooth and len(steps) > _SMOOTHED:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values = _running_mean(values, max(2, len(steps) // 100))
    axes.plot(steps, values, color=color, label=label)
    return True


def dress_steps(axes: Any, run: Curves, *, first: bool = False) -> None:
    """None; stages as lines, steps below; on the first axes also their names, and tokens above."""
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    for name, step in run.stages:
        axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=":")
        if not first:
            continue
        axes.annotate(
            name,
            (step, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            color=MUTED,
            fontsize=8,
            rotation=90,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    steps, seen = run.series("tokens")
    if first and len(steps) > 1:
        low, high = axes.get_xlim()
        places = [x for x in axes.get_xticks() if max(low, steps[0]) <= x <= min(high, steps[-1])]
        above = axes.secondary_xaxis("top")
        above.set_xticks(places, [short(np.interp(x, steps, seen)) for x in places])
        above.tick_params(color=MUTED, labelcolor=MUTED, labelsize=8)
        above.set_xlabel("tokens", color=MUTED, fontsize=8)
        above.spines["top"].set_visible(False)


def _loss_figure(run: Curves) -> Any:
    balance = np.isfinite(run.series("loss/balance")[1]).any()
    figure = figure_of(9, 6.6 if balance else 5)
    grid = figure.add_gridspec(
        2 if balance else 1, 1, height_ratios=[3.4, 1][: 2 if balance else 1]
    )
    axes = figure.add_subplot(grid[0])
    curves = [
        ("loss/mtp", "multi-token prediction", PINK),
        ("loss", "whole training loss", MUTED),
        ("loss/ce", "training cross-entropy", BLUE),
    ]
    drawn = [draw_curve(axes, run, *curve) for curve in curves]
    steps, values = run.series("val/loss")
    if np.isfinite(values).any():
        drawn.append(True)
        axes.plot(
            steps,
            values,
            color=ORANGE,
            label="validation loss",
            marker="o",
            markersize=4,
            zorder=3,
        )
    if not any(drawn):
        return None
    for name, nats in run.baselines.items():
        axes.axhline(nats, color=INK, linewidth=1, linestyle=(0, (5, 3)))
        axes.annotate(
            f"{name} {nats:.3f}",
            (0.995, nats),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
    axes.set_ylabel("nats a token")
    axes.set_title("Loss")
    figure.legend(loc="outside upper right", ncols=4, fontsize=9)
    dress_steps(axes, run, first=True)
    if balance:
        below = figure.add_subplot(grid[1], sharex=axes)
        draw_curve(below, run, "loss/balance", "balance", GREEN)
        below.set_title(
            "Sequence balance term, unweighted, summed over layers (1 a layer is even)", fontsize=9
        )
        below.set_ylabel("sum f·P")
        below.ticklabel_format(axis="y", scilimits=(-2, 3))
        dress_steps(below, run)
    return figure


def _lr_figure(run: Curves) -> Any:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    norm = np.isfinite(run.series("grad_norm")[1]).any()
    figure = figure_of(9, 5.6 if norm else 3.4)
    axes = figure.add_subplot(2 if norm else 1, 1, 1)
    if not draw_curve(axes, run, "lr", "learning rate", BLUE, smooth=False):
        return None
    axes.set_title("Learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    dress_steps(axes, run, first=True)
    if norm:
        below = figure.add_subplot(2, 1, 2, sharex=axes)
        draw_curve(below, run, "grad_norm", "gradient norm", ORANGE)
        below.set_yscale("log")
        below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        below.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        below.yaxis.set_minor_formatter(NullFormatter())
        below.set_title("Gradient norm, before the update")
        dress_steps(below, run)
    return figure


def _load_figure(run: Curves) -> Any:
    """First and last load over the mean, and the busiest expert of each layer over time."""
    from matplotlib.colors import TwoSlopeNorm

    steps, load_SLE = run.stack("load")
    if not len(steps):
        return None
    relative_SLE = load_SLE / np.maximum(load_SLE.mean(axis=-1, keepdims=True), 1e-30)
    peak_SL = relative_SLE.max(axis=-1)
    titles = [
        f"Expert load, step {step:.0f} · max/mean {peak.max():.2f}"
        for step, peak in zip(steps, peak_SL, strict=True)
    ]
    norm = TwoSlopeNorm(vmin=-_OCTAVES, vcenter=0, vmax=_OCTAVES)
    with np.errstate(divide="ignore"):  # an expert without tokens is as dark as one with few
        octaves_SLE = np.maximum(np.log2(relative_SLE), -_OCTAVES)
    figure, axes, bar = _maps_over_curve(octaves_SLE, titles, norm)
    bar.set_ticks(range(-_OCTAVES, _OCTAVES + 1), labels=["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.set_label("load over its mean, 1/E", fontsize=9)
    _layer_lines(axes, steps, peak_SL)
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    axes.set_title("Busiest expert of each layer over the mean expert")
    axes.set_ylabel("max / mean")
    dress_steps(axes, run)
    return figure


def _bias_figure(run: Curves) -> Any:
    """First and last router bias, and its mean size over time."""
    from matplotlib.colors import TwoSlopeNorm

    steps, bias_SLE = run.stack("bias")
    if not len(steps):
        return None
    size_SL = np.abs(bias_SLE).mean(axis=-1)
    top = float(np.nanmax(np.abs(bias_SLE[[0, -1]]))) or 1.0
    titles = [
        f"Router bias, step {step:.0f} · mean |bias| {size.mean():.4f}"
        for step, size in zip(steps, size_SL, strict=True)
    ]
    norm = TwoSlopeNorm(vmin=-top, vcenter=0, vmax=top)
    figure, axes, bar = _maps_over_curve(bias_SLE, titles, norm)
    bar.set_label("bias, added to the scores for the choice alone", fontsize=9)
    _layer_lines(axes, steps, size_SL)
    axes.set_title("Mean |bias| of each layer")
    axes.set_ylim(bottom=0)
    dress_steps(axes, run)
    return figure


def _maps_over_curve(
    values_SLE: np.ndarray, titles: Sequence[str], norm: Any
) -> tuple[Any, Any, Any]:
    """A figure of the first and last [L, E] as heat maps, axes for a curve below, and the bar."""
    from matplotlib.ticker import MaxNLocator

    figure = figure_of(9, 6.4)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.2, 1])
    maps = []
    for column, index in enumerate((0, -1)):
        axes = figure.add_subplot(grid[0, column])
        image = axes.imshow(values_SLE[index], aspect="auto", cmap="RdBu_r", norm=norm)
        axes.grid(False)
        axes.set_title(titles[index], fontsize=10)
        axes.set_xlabel("expert")
        axes.set_ylabel("MoE layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        maps.append(axes)
    bar = figure.colorbar(image, ax=maps, pad=0.01)
    bar.outline.set_visible(False)
    return figure, figure.add_subplot(grid[1, :]), bar


def _layer_lines(axes: Any, steps: np.ndarray, values_SL: np.ndarray) -> None:
    """A line a layer, dark to light; named if there are few."""
    import matplotlib as mpl

    layers = values_SL.shape[1]
    colors = mpl.colormaps["viridis"](np.linspace(0, 0.85, layers))
    for layer in range(layers):
        marker = "o" if len(steps) == 1 else None
        axes.plot(
            steps,
            values_SL[:, layer],
            color=colors[layer],
            linewidth=1.2,
            marker=marker,
            label=f"layer {layer}",
        )
    if layers <= 8:
        axes.legend(loc="best", ncols=min(layers, 4), fontsize=8)
    else:
        note = f"dark: layer 0 · light: layer {layers - 1}"
        axes.set_title(note, loc="right", fontsize=8, fontweight="normal", color=MUTED)
