"""The figures of a training run, each drawn from its `Curves`; None where nothing of it was logged.
`PLOTS` is all of them. Letters: S logged steps, L MoE layers, E experts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from glm45_jax.train.curves import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PINK,
    Curves,
    Plot,
    draw_curve,
    dress_steps,
    figure_of,
)

_COLUMNS = 5  # of stages side by side; GLM-4.5 has five
_OCTAVES = 2  # the load map goes from a quarter of the mean to four times the mean


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
    drawn.append(_validation(axes, run))
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


def _stages_figure(run: Curves) -> Any:
    """The loss of every stage on axes of its own: what falls in it is seen beside a first stage
    that falls by much more.
    """
    from matplotlib.ticker import MaxNLocator

    parts = run.by_stage()
    if len(parts) < 2:
        return None
    columns = min(len(parts), _COLUMNS)
    lines = -(-len(parts) // columns)
    figure = figure_of(9, 1 + 2.6 * lines)
    drawn = False
    for place, (name, part) in enumerate(parts, start=1):
        axes = figure.add_subplot(lines, columns, place)
        drawn |= draw_curve(axes, part, "loss/ce", "training cross-entropy", BLUE)
        drawn |= _validation(axes, part)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        dress_steps(axes, part)
    if not drawn:
        return None
    first = figure.axes[0]
    first.set_ylabel("nats a token")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=9)
    return figure


def _validation(axes: Any, run: Curves) -> bool:
    """Whether there was a validation loss to draw: seldom taken, so with a mark each time."""
    steps, values = run.series("val/loss")
    if not np.isfinite(values).any():
        return False
    marks = {"marker": "o", "markersize": 4, "zorder": 3}
    axes.plot(steps, values, color=ORANGE, label="validation loss", **marks)
    return True


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


def _update_figure(run: Curves) -> Any:
    """How far a step moves each kind of weight."""
    figure = figure_of(9, 3.8)
    axes = figure.add_subplot()
    colors = (BLUE, ORANGE, GREEN, PINK, MUTED, INK)
    kinds = run.names("update_rms/")
    drawn = [
        draw_curve(axes, run, f"update_rms/{kind}", kind, colors[n % len(colors)])
        for n, kind in enumerate(kinds)
    ]
    if not any(drawn):
        return None
    axes.set_yscale("log")
    axes.set_ylabel("RMS of the update")
    axes.set_title("Update of the weights by kind")
    axes.legend(loc="best", fontsize=8, ncols=max(1, sum(drawn)))
    dress_steps(axes, run, first=True)
    return figure


def _speed_figure(run: Curves) -> Any:
    """MFU above, tokens a second below."""
    kinds = [
        ("mfu", "MFU: share of the peak of the devices", BLUE, "MFU"),
        ("tokens_per_s", "Tokens a second", GREEN, "tokens/s"),
    ]
    kinds = [kind for kind in kinds if np.isfinite(run.series(kind[0])[1]).any()]
    if not kinds:
        return None
    figure = figure_of(9, 1 + 2.3 * len(kinds))
    for place, (name, title, color, label) in enumerate(kinds, start=1):
        axes = figure.add_subplot(len(kinds), 1, place)
        draw_curve(axes, run, name, label, color)
        axes.set_ylim(0, 1.1 * float(np.nanmax(run.series(name)[1])) or 1.0)
        axes.set_ylabel(label)
        axes.set_title(title)
        dress_steps(axes, run, first=place == 1)
    return figure


def _goodput_figure(run: Curves) -> Any:
    """Productive share of all time so far, and what the rest went to."""
    if not np.isfinite(run.series("goodput")[1]).any():
        return None
    figure = figure_of(9, 5.6)
    axes = figure.add_subplot(2, 1, 1)
    draw_curve(axes, run, "goodput", "goodput", BLUE, smooth=False)
    axes.set_ylim(0, 1.02)
    axes.set_title("Goodput: productive share of the time since the first start")
    dress_steps(axes, run, first=True)
    below = figure.add_subplot(2, 1, 2, sharex=axes)
    colors = ("#56B4E9", ORANGE, PINK, "#F0E442", GREEN, "#B0B0B0", MUTED, INK)
    for cause, color in zip(run.names("lost_s/"), colors, strict=False):
        draw_curve(below, run, f"lost_s/{cause}", cause, color, smooth=False)
    below.set_title("Time lost so far, by cause")
    below.set_ylabel("seconds")
    below.set_ylim(bottom=0)
    if below.lines:
        below.legend(loc="upper left", fontsize=8, ncols=4)
    dress_steps(below, run)
    return figure


PLOTS: tuple[Plot, ...] = (
    ("loss.png", "loss by step", _loss_figure),
    ("stages.png", "loss of every stage", _stages_figure),
    ("load.png", "share of tokens each expert takes", _load_figure),
    ("bias.png", "router bias", _bias_figure),
    ("lr.png", "learning rate and gradient norm by step", _lr_figure),
    ("update.png", "size of the update by kind of weight", _update_figure),
    ("speed.png", "MFU and tokens a second", _speed_figure),
    ("goodput.png", "goodput, and lost time by cause", _goodput_figure),
)
