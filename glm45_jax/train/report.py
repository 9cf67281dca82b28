"""The report of a run: `report.md`, `report.html` and plots, made from `metrics.jsonl` and what the
caller adds.

The one function to know is `write_report`; the same inputs give the same bytes. A value is never
measured here: numbers are those of the file.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from glm45_jax.metrics import read_jsonl
from glm45_jax.train.curves import Curves, write_plots
from glm45_jax.train.document import Heading, Part, Picture, Table, Verbatim, write_document
from glm45_jax.train.figures import PLOTS

_FIRST_STEPS = 10
_STAGE_HEAD = (
    *("stage", "steps logged", "cross-entropy, first of them", "last of them"),
    *("tokens/s, median", "MFU, median"),
)


def write_report(
    workdir: Path | str,
    *,
    title: str,
    facts: Mapping[str, str],
    baselines: Mapping[str, float],
    samples: Sequence[tuple[str, str]],
    stages: Sequence[tuple[str, int]] = (),
) -> Path:
    """Path of `report.md`, written with `report.html` (one file, pictures inside) and `plots/*.png`
    beside `workdir/metrics.jsonl`.

    facts: rows of the first table. baselines: nats a token of simpler models on the validation
    tokens. samples: (prompt, continuation). stages: (name, its first step).

    Raises: ValueError or FileNotFoundError where there are no metrics to report.
    """
    workdir = Path(workdir)
    rows = read_jsonl(workdir / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{workdir / 'metrics.jsonl'} is empty; log at least one step")
    run = Curves(rows, baselines, stages)
    plots = write_plots(run, workdir / "plots", PLOTS)
    parts: list[Part] = [Table(("run", ""), list(facts.items()))]
    parts += [Heading("Results"), Table(("", "value"), _results(run))]
    if by_stage := _stage_rows(run):
        parts += [Heading("Stages"), Table(_STAGE_HEAD, by_stage)]
    if plots:
        parts += [Heading("Curves"), *(Picture(f"plots/{name}", alt) for name, alt in plots)]
    if samples:
        parts += [Heading("Samples"), *(Verbatim("⟶".join(sample)) for sample in samples)]
    return write_document(workdir, title, parts)


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


def _stage_rows(run: Curves) -> list[tuple[str, ...]]:
    """A row a stage: name, steps, loss at its two ends, tokens a second and MFU."""
    rows = []
    for name, part in run.by_stage():
        _, losses = part.series("loss/ce")
        n = min(_FIRST_STEPS, max(1, len(losses) // 2))
        first, last = (f"{np.mean(x):.4f}" if len(x) else "" for x in (losses[:n], losses[-n:]))
        speeds = dict(_speeds(part))
        rows.append(
            (
                *(name, f"{part.rows[0].step:,} to {part.rows[-1].step:,}", first, last),
                *(speeds.get(label, "") for label in ("tokens a second, median", "MFU, median")),
            )
        )
    return rows
