"""What `bench.rl_smollm2` says of its runs: rows from trajectories and metrics (`described`,
`measured`), and from rows the page and the figure (`write_page`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm45_jax.metrics import Row
from glm45_jax.rl.report import PHASES
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.train.document import table

WARM = 3  # batches in which programs compile, which no statement of time counts
ENDS = 5  # batches whose mean reward stands for the start and the end
PAGE = pathlib.Path("docs/rl_smollm2.md")
FIGURE = pathlib.Path("docs/images/rl_smollm2.png")

# Names of arms, and what the tables call them.
Told = Mapping[str, str]
Rows = Sequence[Mapping[str, Any]]


def described(given: Sequence[Trajectory]) -> dict[str, Any]:
    """What there is to say of answers beside how many are right."""
    by: dict[str, list[float]] = {}
    for one in given:
        by.setdefault(one.task_id.partition(":")[0].split(".")[1], []).append(one.reward)
    return {
        "by": {name: round(float(np.mean(rewards)), 4) for name, rewards in sorted(by.items())},
        "tokens": round(float(np.mean([one.sampled_T.sum() for one in given])), 1),
        "form": round(float(np.mean([one.parts.get("form", 0.0) for one in given])), 4),
        "cut": round(float(np.mean([one.status == "length" for one in given])), 4),
    }


def measured(rows: Sequence[Row]) -> dict[str, Any]:
    """Curves by batch, and rates and shares of time over the batches after `WARM` (over all, where
    no more are).
    """
    batches = [row.scalars for row in rows if row.step > 0]
    late = batches[WARM:] or batches

    def curve(name: str) -> list[float]:
        return [float(f"{row[name]:.4g}") for row in batches if name in row]

    def total(name: str) -> float:
        return float(sum(row.get(name, 0.0) for row in late))

    def rate(of: str, *seconds: str) -> float:
        return float(f"{total(of) / max(sum(map(total, seconds)), 1e-9):.4g}")

    whole = total("seconds")
    return {
        "reward": curve("reward"),
        "mismatch_kl": curve("mismatch/kl"),
        "entropy": curve("surprise"),
        "length": curve("length/mean"),
        "at_s": np.cumsum([row.get("seconds", 0.0) for row in batches]).round(1).tolist(),
        "staleness": float(np.mean(curve("staleness") or [0.0])),
        "rates": {
            "batch_s": float(f"{whole / max(len(late), 1):.4g}"),
            "samples_per_s": rate("samples", "seconds"),
            "rollout_tokens_per_s": rate("rollout/tokens", "rollout/seconds"),
            "train_tokens_per_s": rate("tokens/trained", "seconds/train", "seconds/score"),
        },
        "phases": {name: round(total(f"seconds/{name}") / max(whole, 1e-9), 4) for name in PHASES},
    }


def write_page(rows: Rows, told: Told, device: str) -> str:
    """The page's text, written with the figure. Rows of arms that are not told are left out."""
    arms = [row for name in told for row in rows if row["arm"] == name]
    arms.sort(key=lambda row: (list(told).index(row["arm"]), row["seed"]))
    cold = {row["arm"].removeprefix("cold_"): row for row in rows if "scores" in row}
    text = "\n\n".join(
        [
            "# RL of SmolLM2-135M",
            f"Device: `{device}`. Written by `python -m experiments.bench.rl_smollm2 --write`.",
            "## What the cold start gives",
            cold_table(cold),
            "## What RL gives on top of it",
            score_table(arms, told),
            "## By kind of task, greedy",
            kind_table(arms, told),
            "## Time",
            time_table(arms, told),
            "## Engine against trainer",
            mismatch_table(arms, told),
            f"![reward, KL and time](images/{FIGURE.name})",
        ]
    )
    PAGE.write_text(text + "\n")
    draw(arms, told)
    return text


def cold_table(cold: Mapping[str, Mapping[str, Any]]) -> str:
    """The stock model and the supervised ones, by mode."""
    lines = [["model", "mode", "when", "tasks", "sampled", "greedy", "form", "tokens", "cut"]]
    for model, row in cold.items():
        for key, one in sorted(row["scores"].items(), reverse=True):
            mode, _, when = key.partition("/")
            told = "stock" if when == "stock" else f"after {row['steps']} steps of SFT"
            scores = [_percent(*one["sampled"]), _percent(*one["greedy"]), _percent(one["form"])]
            lines.append(
                [model, mode, told, str(one["tasks"]), *scores, str(one["tokens"]), str(one["cut"])]
            )
    return table(lines[0], lines[1:])


def score_table(arms: Rows, told: Told) -> str:
    """Held-out pass@1 of every arm and seed, before and after."""
    head = ["arm", "seed", "batches", "sampled before", "after", "gain"]
    lines = [[*head, "greedy before", "after", "gain", "ended"]]
    for row in arms:
        cells = [told[row["arm"]], str(row["seed"]), str(row["batches"])]
        for name in ("sampled", "greedy"):
            before, after = row["before"][name], row["after"][name]
            gain = 100 * (after[0] - before[0])
            cells += [_percent(*before), _percent(*after), f"{gain:+.1f}"]
        lines.append([*cells, row["why"]])
    return table(lines[0], lines[1:])


def kind_table(arms: Rows, told: Told) -> str:
    """Greedy pass@1 by dataset."""
    kinds = sorted({kind for row in arms for kind in row["after"]["by"]})
    lines = [["arm", "seed", *kinds]]
    for row in arms:
        pairs = [(row["before"]["by"].get(k, 0.0), row["after"]["by"].get(k, 0.0)) for k in kinds]
        cells = [f"{100 * before:.0f} to {100 * after:.0f}" for before, after in pairs]
        lines.append([told[row["arm"]], str(row["seed"]), *cells])
    return table(lines[0], lines[1:])


def time_table(arms: Rows, told: Told) -> str:
    """Rates, and shares of the time by phase."""
    head = ["arm", "seed", "s a batch", "samples/s", "drawn tokens/s", "trained tokens/s"]
    lines = [[*head, *(f"{name} %" for name in PHASES)]]
    for row in arms:
        rates = row["rates"]
        cells = [f"{rates['batch_s']:.2f}", f"{rates['samples_per_s']:.0f}"]
        cells += [f"{rates[f'{name}_tokens_per_s']:,.0f}" for name in ("rollout", "train")]
        cells += [f"{100 * row['phases'].get(name, 0.0):.0f}" for name in PHASES]
        lines.append([told[row["arm"]], str(row["seed"]), *cells])
    return table(lines[0], lines[1:])


def mismatch_table(arms: Rows, told: Told) -> str:
    """KL of engine to trainer in nats a token, beside the reward."""
    head = ["arm", "seed", "KL, first batch", "median", "largest", "staleness"]
    lines = [[*head, f"reward, first {ENDS}", f"last {ENDS}"]]
    for row in arms:
        kl = row["mismatch_kl"] or [float("nan")]
        cells = [f"{x:.1e}" for x in (kl[0], np.median(kl), max(kl))]
        cells += [f"{row['staleness']:.2f}"]
        cells += [f"{np.mean(part):.3f}" for part in (row["reward"][:ENDS], row["reward"][-ENDS:])]
        lines.append([told[row["arm"]], str(row["seed"]), *cells])
    return table(lines[0], lines[1:])


def _percent(value: float, half: float | None = None) -> str:
    return f"{100 * value:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def draw(arms: Rows, told: Told) -> None:
    """The figure: reward and KL by batch, a line an arm and seed, and shares of time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 10), layout="constrained")
    above, middle, below = figure.subplots(3, 1)
    names = list(told)
    for row in arms:
        how: dict[str, Any] = {
            "color": f"C{names.index(row['arm'])}",
            "linestyle": "-" if row["seed"] == 0 else "--",
            "label": f"{told[row['arm']]}, seed {row['seed']}",
        }
        above.plot(range(1, len(row["reward"]) + 1), row["reward"], **how)
        if row["mismatch_kl"]:
            middle.plot(range(1, len(row["mismatch_kl"]) + 1), row["mismatch_kl"], **how)
    above.set_ylabel("reward, all samples of the batch")
    above.set_ylim(0, 1)
    above.legend(fontsize=7, ncols=2)
    middle.set_ylabel("KL of engine to trainer, nats a token")
    middle.set_yscale("log")
    middle.set_xlabel("batch")
    labels = [f"{row['arm']}:{row['seed']}" for row in arms]
    left = np.zeros(len(arms))
    for name in PHASES:
        share = np.array([row["phases"].get(name, 0.0) for row in arms])
        below.barh(labels, share, left=left, label=name)
        left += share
    below.set_xlabel("share of time")
    below.legend(fontsize=7, ncols=len(PHASES))
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=150, metadata={"Software": None})
