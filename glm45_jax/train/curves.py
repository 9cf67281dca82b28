"""What the plots of reports are drawn with: `Curves`, the metrics of a run, and the functions that
take one.

The same metrics give the same bytes. Letters: L MoE layers, E experts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm45_jax.metrics import Row, short

_SMOOTHED = 400  # points, beyond which a running mean is drawn over the raw curve
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
    stages: Sequence[tuple[str, int]] = ()  # (name, its first step)

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

    def names(self, prefix: str) -> list[str]:
        """What was logged as `prefix` and something more, in order; that something."""
        found = {name for row in self.rows for name in row.scalars if name.startswith(prefix)}
        return sorted(name.removeprefix(prefix) for name in found)

    def by_stage(self) -> list[tuple[str, "Curves"]]:
        """(name, its metrics) of every stage that logged something."""
        ends = [*(first for _, first in self.stages), math.inf][1:] if self.stages else []
        found = []
        for (name, first), end in zip(self.stages, ends, strict=True):
            rows = [row for row in self.rows if first <= row.step < end]
            if rows:
                found.append((name, Curves(rows)))
        return found


Plot = tuple[str, str, Callable[[Curves], Any]]  # file name, what it shows, what draws it


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
