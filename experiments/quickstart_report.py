"""The report of the quickstart: what its stages came to, on one page, with links to theirs."""

import json
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from glm45_jax.evals.generate import Outcome
from glm45_jax.metrics import read_jsonl
from glm45_jax.rl.report import reward_figure
from glm45_jax.train.curves import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    Curves,
    draw_curve,
    figure_of,
    write_plots,
)
from glm45_jax.train.document import block, table, write_text

SHOWN = 4  # sums whose transcripts are shown: the first ones, whatever became of them
COLD, AFTER = "sft", "rl"
STAGES = (
    ("pretrain", "Pretraining", "a GLM-4.5 of 1.9M parameters on English and Python"),
    (COLD, "Cold start", "demonstrations of sums, thinking and direct mode mixed"),
    (AFTER, "GRPO", "sums, in thinking mode, by the rewards of what the engine draws"),
)
Scores = Mapping[str, Mapping[str, Outcome]]  # by stage, by mode


def write_quickstart_report(
    workdir: pathlib.Path,
    scores: Scores,
    times: Mapping[str, Sequence[float]],
    carrying: float,
) -> pathlib.Path:
    """Path of `workdir`/report.md.

    scores: of held-out sums, after the cold start and after RL. times: (seconds by the clock, of
    processors) by stage. carrying: share of the worked demonstrations that carry.
    """
    runs = {name: Curves(read_jsonl(workdir / name / "metrics.jsonl")) for name, *_ in STAGES}
    plots = workdir / "plots"
    write_plots(
        runs["pretrain"],
        plots,
        [
            ("loss.png", "", lambda _: _loss_figure([(name, runs[name]) for name in runs][:2])),
            ("reward.png", "", lambda _: reward_figure(runs[AFTER])),
            ("accuracy.png", "", lambda _: _accuracy_figure(scores)),
        ],
    )
    parts = ["# Quickstart", _time_table(times)]
    parts += ["## Held-out sums, before and after RL", _score_table(scores)]
    parts += ["![accuracy before and after, with 95% intervals](plots/accuracy.png)"]
    parts += ["## What RL selects, and what it discovers", _selected(scores, carrying)]
    parts += ["## Curves", "![loss of pretraining and of the cold start](plots/loss.png)"]
    parts += ["![reward of GRPO by batch](plots/reward.png)"]
    parts += ["## Transcripts", _told(scores), *_transcripts(scores)]
    for name, title, what in STAGES:
        parts += [f"## {title}", f"{what}: [the whole report]({name}/report.md)"]
        parts += [_results_of(workdir / name / "report.md")]
    files = [f"{AFTER}/trace.html", f"{COLD}/eval/report.md", f"{AFTER}/eval/report.md"]
    parts += ["## More", "\n".join(f"- [{file}]({file})" for file in files)]
    return write_text(workdir / "report.md", parts)


def _time_table(times: Mapping[str, Sequence[float]]) -> str:
    rows = [
        (name, f"{clock:.0f} s, {cpu:.0f} s of processors") for name, (clock, cpu) in times.items()
    ]
    clock, cpu = (sum(one[i] for one in times.values()) for i in range(2))
    machine = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}"
    rows += [("all", f"{clock:.0f} s, {cpu:.0f} s of processors"), ("device", machine)]
    return table(("stage", "time"), rows)


def _score_table(scores: Scores) -> str:
    rows = []
    for mode, before in scores[COLD].items():
        after = scores[AFTER][mode]
        gain = 100 * (after.score.value - before.score.value)
        rows.append((_words(mode), _percent(before), _percent(after), f"{gain:+.1f}"))
    n = next(iter(scores[COLD].values())).score.n
    said = f"Exact answers to {n} two-digit sums that no stage has seen, 95% intervals."
    head = ("mode", "after the cold start", "after RL", "gain, points")
    return f"{table(head, rows)}\n\n{said}"


def _percent(one: Outcome) -> str:
    low, high = (100 * min(max(x, 0.0), 1.0) for x in one.score.interval)
    return f"{100 * one.score.value:.1f} % ({low:.1f} to {high:.1f})"


def _words(mode: str) -> str:
    return mode.replace("_", ", ")


def _selected(scores: Scores, carrying: float) -> str:
    before, after = (scores[name]["thinking_sampled"] for name in (COLD, AFTER))
    cold, learnt = _carried(before), _carried(after)
    return (
        f"{100 * carrying:.0f} % of the worked demonstrations of the cold start carry, the others "
        "forget to. What the model thinks says which habit it followed: where a carry was due, "
        f"it carried in {_share(cold)} of the sampled answers after the cold start, and in "
        f"{_share(learnt)} after RL. So RL selects the habit that earns the reward. It does not "
        "discover how to carry: that was shown. No stage after the cold start trains direct mode; "
        "what changes there comes along."
    )


def _share(counts: tuple[int, int]) -> str:
    did, due = counts
    return f"{100 * did / due:.0f} % ({did} of {due})" if due else "none (0 due)"


def _carried(one: Outcome) -> tuple[int, int]:
    """(answers whose second step adds a carry of 1, answers to sums whose units make one)."""
    did = due = 0
    for line in _lines(one):
        left, right = line["task"].removesuffix("=").split("+")
        if int(left[-1]) + int(right[-1]) < 10:
            continue
        due += 1
        thought = line["messages"][-1].get("reasoning_content") or ""
        did += f"{left[-2]}+{right[-2]}+1=" in thought
    return did, due


def _lines(one: Outcome) -> list[dict[str, Any]]:
    """Its episodes by the number of the task."""
    with one.file.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file][1:]
    return sorted(lines, key=lambda line: line["number"])


def _told(scores: Scores) -> str:
    n = min(SHOWN, next(iter(scores[COLD].values())).score.n)
    return f"The first {n} held-out sums, greedy, as they came."


def _transcripts(scores: Scores) -> list[str]:
    found = []
    for mode in ("thinking_greedy", "direct_greedy"):
        before, after = (_lines(scores[name][mode])[:SHOWN] for name in (COLD, AFTER))
        said = []
        for a, b in zip(before, after, strict=True):
            said += [a["task"]]
            said += [f"  before RL  {_answer(a)}", f"  after RL   {_answer(b)}"]
        found += [f"{_words(mode)}:", block("\n".join(said))]
    return found


def _answer(line: Mapping[str, Any]) -> str:
    message = line["messages"][-1]
    thought = message.get("reasoning_content") or ""
    said = f"<think>{thought}</think> " if thought else ""
    verdict = "right" if line["reward"] == 1 else "wrong"
    return f"{said}{message.get('content') or ''}  [{verdict}]"


def _results_of(file: pathlib.Path) -> str:
    """The table of results of a stage's report."""
    text = file.read_text(encoding="utf-8")
    return text.partition("## Results\n")[2].partition("\n## ")[0].strip()


def _loss_figure(runs: Sequence[tuple[str, Curves]]) -> Any:
    figure = figure_of(9, 3.8)
    titles = {name: title for name, title, _ in STAGES}
    for place, (name, run) in enumerate(runs, start=1):
        axes = figure.add_subplot(1, len(runs), place)
        draw_curve(axes, run, "loss/ce", "training", BLUE)
        steps, values = run.series("val/loss")
        axes.plot(steps, values, color=ORANGE, marker="o", markersize=4, label="validation")
        axes.set_title(titles[name])
        axes.set_xlabel("step")
        axes.set_ylabel("cross-entropy, nats a token")
        axes.legend(loc="best", fontsize=9)
    return figure


def _accuracy_figure(scores: Scores) -> Any:
    figure = figure_of(9, 3.6)
    axes = figure.add_subplot()
    for place, (name, color) in enumerate(((COLD, MUTED), (AFTER, GREEN))):
        modes = list(scores[name])
        means = [scores[name][mode].score.value for mode in modes]
        halves = [scores[name][mode].score.half for mode in modes]
        at = [n + 0.38 * (place - 0.5) for n in range(len(modes))]
        label = "after RL" if name == AFTER else "after the cold start"
        axes.bar(at, means, 0.36, yerr=halves, capsize=4, color=color, label=label)
        axes.set_xticks(range(len(modes)), [_words(mode) for mode in modes])
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("exact answers")
    axes.set_title("Held-out sums")
    axes.legend(loc="upper right", fontsize=9)
    return figure
