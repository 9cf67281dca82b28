"""What `bench.recipe` says of its runs: rows from metrics (`described`), and from rows the page and
the figure (`write_page`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm45_jax.experiment import Experiment
from glm45_jax.metrics import Row
from glm45_jax.train.document import table

POINTS = 100  # of a stage's curve that are kept, each a mean of as many steps as that takes
ENDS = 5  # steps whose mean loss stands for the begin and the end of a stage
CASE = ("optimizer", "lr", "seed")  # what tells arms of the ablation apart
PAGE = pathlib.Path("docs/mini_recipe.md")
FIGURE = pathlib.Path("docs/images/mini_recipe.png")


def described(exp: Experiment, logged: Sequence[Row]) -> dict[str, Any]:
    """Stages, curves and validation losses of a run of all its steps."""
    by_step = {row.step: row.scalars for row in logged}
    lengths = sorted({stage.seq_len for stage in exp.stages})
    found: dict[str, Any] = {"stages": [], "tokens": int(logged[-1].scalars["tokens"])}
    validation, parts = [], []
    for span in exp.spans:
        assert span.stage is not None
        own = [by_step[step] for step in range(span.first_step + 1, span.end_step + 1)]
        n = min(ENDS, max(1, len(own) // 2))
        losses = [row["loss/ce"] for row in own]
        # Steps that wait for a program, or share the devices with a compiler, are a few of many.
        speeds = [row for row in own if "tokens_per_s" in row] or [{}]
        stage = {
            "name": span.stage.name,
            "seq_len": span.stage.seq_len,
            "rows": span.ramp.end_rows,
            "first_step": span.first_step + 1,
            "last_step": span.end_step,
            "loss": [_short(np.mean(losses[:n])), _short(np.mean(losses[-n:]))],
            "tokens_per_s": _short(_median(speeds, "tokens_per_s")),
            "mfu": _short(_median(speeds, "mfu")),
        }
        found["stages"].append(stage)
        for step, row in zip(range(span.first_step + 1, span.end_step + 1), own, strict=True):
            names = {f"val/loss_{m}": m for m in lengths} | {"val/loss": span.stage.seq_len}
            taken = {str(m): _short(row[name]) for name, m in names.items() if name in row}
            if taken:
                validation.append({"step": step, "tokens": int(row["tokens"]), **taken})
        width = -(-len(own) // POINTS)
        parts += [own[at : at + width] for at in range(0, len(own), width)]
        stage["validation"] = {k: v for k, v in validation[-1].items() if k not in _PLACE}
    found["curve"] = {
        "tokens": [int(part[-1]["tokens"]) for part in parts],
        **{
            name: [_short(np.mean([row[name] for row in part])) for part in parts]
            for name in ("loss/ce", "lr", "load_max_over_mean")
        },
    }
    return found | {"validation": validation}


_PLACE = ("step", "tokens")


def _short(x: Any) -> float:
    return float(f"{float(x):.5g}")


def _median(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return float(np.median([row.get(name, np.nan) for row in rows]))


def write_page(run: Mapping[str, Any], ablation: Mapping[str, Any], device: str) -> str:
    """The page's text, written with the figure."""
    arms = sorted(ablation.get("rows", ()), key=lambda row: tuple(row[name] for name in CASE))
    parts = [
        "# The five stages on one accelerator",
        "Written by `python -m experiments.bench.recipe --write` from the result file of "
        f"`{device}`; nothing here is typed by hand.",
        *_run_parts(run),
        *_arm_parts(arms),
    ]
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    _figure(run, arms).savefig(FIGURE, dpi=150)
    text = "\n\n".join(parts) + "\n"
    PAGE.write_text(text, encoding="utf-8")
    return text


def _run_parts(run: Mapping[str, Any]) -> list[str]:
    seconds = run["seconds"]
    lengths = sorted({stage["seq_len"] for stage in run["stages"]})
    rows = []
    for stage in run["stages"]:
        first, last = stage["loss"]
        steps = f"{stage['first_step']:,} to {stage['last_step']:,}"
        cells = [stage["name"], steps, f"{stage['rows']} x {stage['seq_len']:,}"]
        cells += [f"{first:.3f}", f"{last:.3f}"]
        cells += [f"{stage['validation'][str(m)]:.3f}" for m in lengths]
        cells += [f"{stage['tokens_per_s']:,.0f}", f"{100 * stage['mfu']:.1f}%"]
        rows.append(tuple(cells))
    judged = tuple(f"validation, rows of {m:,}" for m in lengths)
    head = (
        "stage",
        "steps",
        "batch",
        "loss, first steps",
        "last steps",
        *judged,
        "tokens/s",
        "MFU",
    )
    lost = sorted(seconds.items(), key=lambda item: -item[1])
    return [
        f"![Loss, rate and the ablation]({FIGURE.relative_to(PAGE.parent)})",
        f"`{run['command']}`: {run['parameters']:,} parameters, of which a token meets "
        f"{run['active']:,} in the body; {run['tokens']:,} tokens; {sum(seconds.values()):.0f} s "
        f"in all, compiling included ({', '.join(f'{k} {s:.0f} s' for k, s in lost)}). "
        f"jax {run['jax']}.",
        table(head, rows),
        "Losses are cross-entropy of the next token, nats: the mean of a stage's first and last "
        f"{ENDS} steps, and of fixed held-out rows of each length after its last. Rows of each "
        "length are of the mixture of the first stage with that length, so columns do not compare. "
        "tokens/s and MFU are medians of a stage's steps; peak: " + f"{run['peak']}.",
    ]


def _arm_parts(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    if not arms:
        return ["## Muon against AdamW", "Not measured on this device."]
    rows = []
    for optimizer, lr in dict.fromkeys((arm["optimizer"], arm["lr"]) for arm in arms):
        own = [arm for arm in arms if (arm["optimizer"], arm["lr"]) == (optimizer, lr)]
        losses = ", ".join(f"{arm['held_out']:.4f}" for arm in own)
        speed = np.median([arm["tokens_per_s"] for arm in own])
        seeds = ", ".join(str(arm["seed"]) for arm in own)
        rows.append((optimizer, f"{lr:g}", seeds, losses, f"{speed:,.0f}"))
    return [
        "## Muon against AdamW",
        f"`{arms[0]['command']}`: the same model, {arms[0]['tokens']:,} tokens an arm in rows "
        "of one length, the first stage's mixture; a seed fixes weights and rows, so arms of one "
        "seed read the same. One cosine to a tenth of the peak rate, 5% of warmup.",
        table(("optimizer", "peak rate", "seeds", "held-out loss", "tokens/s"), rows),
    ]


def _figure(run: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> Any:
    """The whole run; its stages of long rows by themselves, which are a twentieth of it; the
    ablation.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13, 4.6), layout="constrained")
    whole, late, right = drawn.subplots(1, 3, width_ratios=(1.5, 1, 1))
    stages = run["stages"]
    long = next(n for n, stage in enumerate(stages) if stage["seq_len"] > stages[0]["seq_len"])
    rate = _draw_run(whole, run, 0)
    rate.set_ylabel("learning rate (dotted)", color="C4")
    whole.set(title="The five stages", ylabel="nats a token")
    whole.legend(frameon=False, fontsize=8, loc="upper right")
    _draw_run(late, run, long).set_yticks([])
    late.set_title("The stages of long rows")
    _draw_arms(right, arms)
    for axes in (whole, late, right):
        axes.set_xlabel("million tokens")
        axes.spines[["top"]].set_visible(False)
    return drawn


def _draw_run(axes: Any, run: Mapping[str, Any], first: int) -> Any:
    """Losses by tokens from a stage on, every other stage shaded; the axes of the rate."""
    curve, stages = run["curve"], run["stages"]
    tokens_at = {row["step"]: row["tokens"] / 1e6 for row in run["validation"]}
    ends = [0.0, *(tokens_at[stage["last_step"]] for stage in stages)]
    for number in range(1, len(stages), 2):
        axes.axvspan(ends[number], ends[number + 1], color="0.93", zorder=0)
    begin = ends[first]
    seen = np.array(curve["tokens"]) / 1e6
    own = seen >= begin
    axes.plot(
        seen[own], np.array(curve["loss/ce"])[own], color="0.35", linewidth=0.9, label="training"
    )
    for number, length in enumerate(sorted({stage["seq_len"] for stage in stages})):
        points = [(row["tokens"] / 1e6, row[str(length)]) for row in run["validation"]]
        x, y = zip(*(point for point in points if point[0] >= begin), strict=True)
        label = f"held out, rows of {length:,}"
        axes.plot(x, y, "o-", color=f"C{number}", markersize=2.5, linewidth=1, label=label)
    axes.set_xlim(begin, ends[-1])
    rate = axes.twinx()
    rate.plot(seen, curve["lr"], color="C4", linewidth=1, linestyle=":")
    rate.set_ylim(bottom=0)
    rate.spines[["top"]].set_visible(False)
    return rate


def _draw_arms(axes: Any, arms: Sequence[Mapping[str, Any]]) -> None:
    for arm in arms:
        rates = sorted({a["lr"] for a in arms if a["optimizer"] == arm["optimizer"]})
        curve = arm["curve"]
        seen = [step * curve["tokens_per_step"] / 1e6 for step, _ in curve["held_out"]]
        axes.plot(
            seen,
            [loss for _, loss in curve["held_out"]],
            ("-", "--", ":")[rates.index(arm["lr"]) % 3],
            color="C0" if arm["optimizer"] == "muon" else "C1",
            label=f"{arm['optimizer']}, {arm['lr']:g}" if arm["seed"] == 0 else None,
            linewidth=1.3,
        )
    axes.set(title="Muon against AdamW, held out", ylabel="nats a token")
    if arms:
        axes.legend(frameon=False)
