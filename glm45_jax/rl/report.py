"""The report of an RL run: `report.md`, `report.html` and plots, made from its `metrics.jsonl`.
`write_report`; `report_run` also asks the checkpoint for alarms and the pool for `trace.html`.

Numbers are those of the file, as in `train.report`; the same file gives the same bytes. Seconds by
phase leave the first batches out, which compile.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm45_jax.checkpoint import Checkpoints
from glm45_jax.metrics import read_jsonl
from glm45_jax.model import cost
from glm45_jax.rl.alarms import from_json
from glm45_jax.rl.loop import Outcome
from glm45_jax.rl.viewer import write_page
from glm45_jax.tokenizer import Tokenizer
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
    write_plots,
)
from glm45_jax.train.document import (
    Heading,
    Items,
    Link,
    Paragraph,
    Part,
    Picture,
    Table,
    Verbatim,
    write_document,
)

WARM = 5  # batches, in which programs compile, that no statement of time counts; all if no more are
ENDS = 5  # batches whose mean is the reward at the start and at the end
PHASES = ("rollout", "pack", "score", "train", "push", "evaluate", "save", "other")
_COLORS = (BLUE, "#56B4E9", PINK, ORANGE, "#F0E442", GREEN, "#B0B0B0", MUTED)
_SCORES = (("sampled", "sampled at the temperature of training"), ("greedy", "greedy"))


TRACE = "trace.html"


def report_run(
    exp: Any, workdir: Path, outcome: Outcome, tokenizer: Tokenizer | None = None
) -> Path | None:
    """The report of a run, and its last batches token by token in `trace.html`; None where it came
    to no batch and no evaluation.

    exp: an `Experiment` (this floor does not know the type). tokenizer: None shows ids.
    """
    file = workdir / "metrics.jsonl"
    if not file.exists() or not file.stat().st_size:
        return None
    rl, counts = exp.rl, cost.param_counts(exp.model)
    active = counts.active_body_and_head
    facts = {
        "experiment": exp.name,
        "ended": f"{outcome.why}, after batch {outcome.step} of {exp.train.steps}",
        "said": outcome.said,
        "world": rl.world().name,
        "batch": f"{rl.groups} prompts x {rl.samples} samples, {rl.updates} updates",
        "mode": f"{rl.mode}",
        "parameters": f"{counts.total_stored:,} stored, {active:,} active a token",
        "tokens": f"{outcome.tokens:,} trained on in this session",
        "time": f"{outcome.seconds:.0f} s in this session",
    }
    with Checkpoints(workdir / "checkpoints") as saved:
        watched = from_json(saved.sidecars()["rl"]["watched"])
    rung = [alarm for rule in rl.alarms for alarm in rule.alarms(watched)]
    decode = None if tokenizer is None else functools.partial(_text_of, tokenizer)
    write_page(workdir / "pool", workdir / TRACE, decode=decode)
    return write_report(
        workdir,
        title=exp.name,
        facts={name: said for name, said in facts.items() if said},
        alarms=[f"{alarm.rule}: {alarm.message}" for alarm in rung],
        links=[("token by token", TRACE)],
    )


def write_report(
    workdir: Path | str,
    *,
    title: str,
    facts: Mapping[str, str],
    alarms: Sequence[str] = (),
    samples: Sequence[str] = (),
    links: Sequence[tuple[str, str]] = (),
) -> Path:
    """Path of `report.md`, written with `report.html` (one file, pictures inside) and `plots/*.png`
    beside `workdir/metrics.jsonl`.

    facts: rows of the first table. alarms: what the rules say at the end of the run. samples: texts
    that are shown as they are. links: (what it is, file beside the report).

    Raises: ValueError or FileNotFoundError where there are no metrics to report.
    """
    workdir = Path(workdir)
    rows = read_jsonl(workdir / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{workdir / 'metrics.jsonl'} is empty; train at least one batch")
    run = Curves(rows)
    plots = write_plots(run, workdir / "plots", _PLOTS)
    parts: list[Part] = [Table(("run", ""), list(facts.items()))]
    parts += [Link(said, name) for said, name in links]
    parts += [Heading("Results"), Table(("", "value"), results(run))]
    parts += [Heading("Alarms"), *_alarmed(run, alarms)]
    parts += [Heading("Time of a batch"), Table(("phase", "seconds, median"), _times(run))]
    if plots:
        parts += [Heading("Curves"), *(Picture(f"plots/{name}", alt) for name, alt in plots)]
    if samples:
        parts += [Heading("Samples"), *map(Verbatim, samples)]
    return write_document(workdir, title, parts)


def _text_of(tokenizer: Tokenizer, token: int) -> str:
    """Text of an id; a number for one of the padding of the table."""
    return tokenizer.decode([token]) if 0 <= token < tokenizer.vocab else f"<{token}>"


def results(run: Curves) -> list[tuple[str, str]]:
    """The rows of the results table; those that were logged."""
    found: list[tuple[str, str]] = []
    for name, told in _SCORES:
        steps, values = run.series(f"eval/{name}")
        halves = run.series(f"eval/{name}_half")[1]
        for at in dict.fromkeys((0, len(steps) - 1)) if len(steps) else ():
            score = f"{values[at]:.4f} ± {halves[at]:.4f} (95%)"
            found.append((f"held-out reward, {told}, after batch {steps[at]:.0f}", score))
    _, rewards = run.series("reward")
    if len(rewards):
        n = min(ENDS, len(rewards))
        found.append((f"reward, mean of the first {n} batches", f"{rewards[:n].mean():.4f}"))
        found.append((f"reward, mean of the last {n} batches", f"{rewards[-n:].mean():.4f}"))
    _, mismatch = run.series("mismatch/kl")
    if len(mismatch):
        told = "KL of engine to trainer on the same weights, largest"
        found.append((told, f"{np.nanmax(mismatch):.2e} nats a token"))
    for name, told in (("samples", "samples that ended"), ("tokens/trained", "tokens trained on")):
        _, counts = run.series(name)
        if len(counts):
            found.append((told, f"{np.nansum(counts):,.0f}"))
    return found + _rates(run)


def _rates(run: Curves) -> list[tuple[str, str]]:
    found = []
    for name, told in (
        ("rollout/tokens_per_s", "tokens drawn a second, median"),
        ("tokens_per_s", "tokens trained a second, median"),
    ):
        values = _late(run, name)
        if len(values):
            found.append((told, f"{np.median(values):,.0f}"))
    _, stale = run.series("pool/stale_samples")
    if len(stale):
        found.append(("samples dropped as too old", f"{stale[-1]:.0f}"))
    return found


def _late(run: Curves, name: str) -> np.ndarray:
    """Finite values after the first `WARM` batches; of all where there are no more."""
    steps, values = run.series(name)
    kept = values[(steps > WARM) & np.isfinite(values)]
    return kept if len(kept) else values[(steps > 0) & np.isfinite(values)]


def _times(run: Curves) -> list[tuple[str, str]]:
    """Median seconds and their share of the whole."""
    whole = _late(run, "seconds")
    if not len(whole):
        return []
    rows = [("whole", f"{np.median(whole):.2f}")]
    for name in PHASES:
        values = _late(run, f"seconds/{name}")
        if len(values):
            share = values.sum() / whole.sum()
            rows.append((name, f"{np.median(values):.2f} ({100 * share:.0f} % of all the time)"))
    return rows


def _alarmed(run: Curves, alarms: Sequence[str]) -> list[Part]:
    """What rang when, and what rings at the end."""
    steps, rung = run.series("watch/alarms")
    loud = [int(step) for step, n in zip(steps, rung, strict=True) if n]
    first = f"Rules spoke after {len(loud)} of {len(steps)} batches"
    parts: list[Part] = [Paragraph(first + (f": {_spans(loud)}." if loud else "."))]
    if alarms:
        parts += [Paragraph("At the end of the run:"), Items(alarms)]
    return parts


def _spans(steps: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    found = []
    for _, group in itertools.groupby(enumerate(steps), lambda pair: pair[1] - pair[0]):
        inside = [step for _, step in group]
        found.append(f"{inside[0]}-{inside[-1]}" if len(inside) > 1 else f"{inside[0]}")
    return ", ".join(found)


def reward_figure(run: Curves) -> Any:
    """Reward of every batch and of the held-out tasks; None where nothing was rewarded."""
    figure = figure_of(9, 4.2)
    axes = figure.add_subplot()
    drawn = draw_curve(axes, run, "reward", "reward, all samples of the batch", BLUE)
    for (name, told), color in zip(_SCORES, (ORANGE, GREEN), strict=True):
        steps, values = run.series(f"eval/{name}")
        if len(steps):
            drawn = True
            half = run.series(f"eval/{name}_half")[1]
            how: dict[str, Any] = {"color": color, "marker": "o", "markersize": 4, "capsize": 3}
            axes.errorbar(steps, values, half, label=f"held out, {told} (95%)", zorder=3, **how)
    if not drawn:
        return None
    axes.set_ylabel("reward")
    axes.set_title("Reward")
    _dress(axes, run)
    return figure


def _policy_figure(run: Curves) -> Any:
    """Entropy above, KLs below."""
    figure = figure_of(9, 5.6)
    above, below = figure.subplots(2, 1, sharex=True)
    drawn = draw_curve(above, run, "surprise", "-log p of what the engine drew", BLUE)
    drawn |= draw_curve(above, run, "policy/entropy", "same, by the trainer", ORANGE)
    above.set_title("Entropy, estimated from the drawn tokens")
    above.set_ylabel("nats a token")
    kinds = (
        ("mismatch/kl", "engine to trainer, same weights", BLUE),
        ("policy/drift_kl", "old policy to new, within a batch", ORANGE),
        ("policy/rollout_kl", "policy to engine", GREEN),
        ("loss/kl", "to the reference", PINK),
    )
    lines = [draw_curve(below, run, *kind) for kind in kinds]
    if not (drawn or any(lines)):
        return None
    below.set_title("KL")
    below.set_ylabel("nats a token")
    below.ticklabel_format(axis="y", scilimits=(-2, 3))
    for axes in (above, below):
        _dress(axes, run)
    return figure


def _length_figure(run: Curves) -> Any:
    """Tokens of an answer, and what was cut."""
    figure = figure_of(9, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    kinds = (("length/p95", "95th percentile", MUTED), ("length/mean", "mean", BLUE))
    if not any([draw_curve(above, run, *kind) for kind in kinds]):
        return None
    above.set_title("Tokens of an answer")
    above.set_ylim(bottom=0)
    draw_curve(below, run, "length/cut", "cut by the longest output", ORANGE)
    draw_curve(below, run, "watch/no_answer", "without an answer (latest rounds)", PINK)
    below.set_title("Share of samples")
    below.set_ylim(-0.02, 1.02)
    for axes in (above, below):
        _dress(axes, run)
    return figure


def _time_figure(run: Curves) -> Any:
    """Seconds of every batch by phase, stacked."""
    steps, whole = run.series("seconds")
    if not len(steps):
        return None
    figure = figure_of(9, 3.8)
    axes = figure.add_subplot()
    under = np.zeros(len(steps))
    for name, color in zip(PHASES, _COLORS, strict=True):
        at, values = run.series(f"seconds/{name}")
        if not len(at):
            continue
        spent = np.zeros(len(steps))
        spent[np.searchsorted(steps, at)] = np.nan_to_num(values)
        axes.bar(steps, spent, width=1.0, bottom=under, color=color, label=name)
        under += spent
    late = whole[steps > WARM]
    if len(late):
        axes.set_ylim(0, 1.1 * float(np.nanmax(late)))
    axes.set_ylabel("seconds")
    axes.set_title("Time by phase (compiling may reach over the top)")
    _dress(axes, run)
    return figure


def _dress(axes: Any, run: Curves) -> None:
    if handles := axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", fontsize=8, ncols=1 if len(handles) < 5 else 4)
    dress_steps(axes, run)
    axes.set_xlabel("batch")
    axes.tick_params(colors=INK)


_PLOTS: tuple[Plot, ...] = (
    ("reward.png", "reward by batch, and of held-out tasks", reward_figure),
    ("policy.png", "entropy and KL by batch", _policy_figure),
    ("length.png", "tokens of an answer by batch", _length_figure),
    ("time.png", "seconds by phase of every batch", _time_figure),
)
