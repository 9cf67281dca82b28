"""The quickstart: what its demonstrations show, that its stages follow each other and go on where
they stopped, and all of it once, small.
"""

import dataclasses
import json
import os
import pathlib

import pytest

from experiments import quickstart, quickstart_report
from experiments.quickstart import Worked, run_stages
from experiments.rl_reasoning import Sums
from glm45_jax.evals.generate import Outcome as Scored
from glm45_jax.evals.types import Score
from glm45_jax.experiment import BadInput, Report
from glm45_jax.hf.convert import open_source
from glm45_jax.metrics import read_jsonl
from glm45_jax.rl.config import Evaluation
from glm45_jax.start import write_claim
from glm45_jax.train.loop import Outcome

ROOT = pathlib.Path(__file__).parent.parent
SOME = range(400)


@pytest.fixture(scope="module", autouse=True)
def from_the_root():
    before = os.getcwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


def split(messages):
    left, right = messages[0]["content"].removesuffix("=").split("+")
    return int(left), int(right), messages[1]


def test_demonstrations_that_carry_are_right_and_their_steps_are_true():
    for n in SOME:
        left, right, answer = split(Worked()(n))
        assert answer["content"] == str(left + right)
        for step in answer["reasoning_content"].split():
            digits, total = step.split("=")
            assert sum(map(int, digits.split("+"))) == int(total)


def test_demonstrations_that_forget_are_wrong_where_a_carry_is_due_and_only_there():
    wrong = 0
    for n in SOME:
        left, right, answer = split(Worked(carries=False)(n))
        units, tens = left % 10 + right % 10, left // 10 + right // 10
        due = units >= 10 or tens >= 10
        assert (answer["content"] != str(left + right)) == due
        assert answer["content"] == f"{tens % 10}{units % 10}"
        wrong += due
    assert 0.5 < wrong / len(SOME) < 0.9  # else there is nothing for RL to select


def test_answers_at_once_are_in_direct_mode_and_no_demonstration_is_held_out():
    held_out = {Sums(held_out=True)().tasks(n).id for n in range(2000)}
    for n in SOME:
        messages = Worked(thinks=False)(n)
        left, right, answer = split(messages)
        assert answer == {"role": "assistant", "content": str(left + right)}
        assert messages[0]["content"] not in held_out


def stages_of(workdir, calls, why):
    """The real stages, whose runs only note that they were asked."""

    def run(exp, folder):
        calls.append(folder.name)
        return Outcome(0, why.get(folder.name, "done"), 0.0, 0)

    stages = {"sft": quickstart.sft(str(workdir)), "rl": quickstart.rl(str(workdir))}
    return {name: dataclasses.replace(exp, run=run) for name, exp in stages.items()}


def test_a_stage_that_stops_stops_the_chain_and_its_time_is_kept(tmp_path):
    calls = []
    stages = stages_of(tmp_path, calls, {"sft": "stopped"})
    assert run_stages(stages, tmp_path, tasks=1).why == "stopped"
    assert run_stages(stages, tmp_path, tasks=1).why == "stopped"
    assert calls == ["sft", "sft"]
    clock, cpu = quickstart.times_of(tmp_path)["sft"]
    assert clock >= 0 and cpu >= 0


def test_a_folder_of_another_experiment_is_refused(tmp_path):
    stages = stages_of(tmp_path, [], {})
    other = dataclasses.replace(quickstart.sft(str(tmp_path)), seed=5)
    write_claim(other, tmp_path / "sft")
    with pytest.raises(BadInput, match="seed: 5 there, 0 here"):
        run_stages(stages, tmp_path, tasks=1)


def episode(number, task, thought, reward):
    message = {"role": "assistant", "reasoning_content": thought, "content": "1"}
    return {"number": number, "task": task, "reward": reward, "messages": [{}, message]}


def scored(folder, name, lines):
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in [{}, *lines]))
    return Scored(name, Score(0.5, 0.1, len(lines)), {}, 0.0, 0, 1, file)


def test_the_report_counts_carries_where_they_are_due(tmp_path):
    lines = [
        episode(1, "58+67=", "8+7+0=15 5+6+1=12", 1.0),  # carried
        episode(0, "58+67=", "8+7+0=15 5+6+0=11", 0.0),  # forgot
        episode(2, "21+31=", "1+1+0=2 2+3+0=5", 1.0),  # nothing to carry
    ]
    one = scored(tmp_path, "thinking_sampled", lines)
    assert quickstart_report._carried(one) == (1, 2)
    scores = {name: {"thinking_sampled": one} for name in ("sft", "rl")}
    said = quickstart_report._selected(scores, 0.3)
    assert "30 % of the worked demonstrations" in said and "50 % (1 of 2)" in said
    assert "does not discover" in said


def small(workdir):
    """Every stage of the quickstart at a few steps."""
    first = dataclasses.replace(quickstart.quickstart(), run=quickstart.run_training)
    stages = {"pretrain": first, "sft": quickstart.sft(workdir), "rl": quickstart.rl(workdir)}
    for name, exp in stages.items():
        train = dataclasses.replace(
            exp.train, steps=2, validate_rows=min(exp.train.validate_rows, 16), save_every=0
        )
        rl = exp.rl and dataclasses.replace(
            exp.rl, groups=2, evaluation=Evaluation(Sums(held_out=True), tasks=4)
        )
        stages[name] = dataclasses.replace(exp, train=train, rl=rl, report=Report())
    return stages


@pytest.mark.slow
def test_all_stages_leave_reports_and_a_second_call_runs_none_of_them(tmp_path):
    stages = small(str(tmp_path))
    assert run_stages(stages, tmp_path, tasks=6).why == "done"
    text = (tmp_path / "report.md").read_text()
    for link in ("pretrain/report.md", "sft/report.md", "rl/report.md", "rl/trace.html"):
        assert f"({link})" in text and (tmp_path / link).exists()
    for mode in ("thinking, sampled", "thinking, greedy", "direct, sampled", "direct, greedy"):
        assert f"| {mode} |" in text
    assert {"loss.png", "reward.png", "accuracy.png"} == {
        p.name for p in (tmp_path / "plots").iterdir()
    }
    for name in stages:  # each can be served and converted
        assert open_source(tmp_path / name).files[0].name == "tokenizer.json"
    assert "unigram" not in text and "validation loss" in text
    assert [row.step for row in read_jsonl(tmp_path / "rl/metrics.jsonl")] == [0, 1, 2]
    kept = ("metrics.jsonl", "report.md", "trace.html", "thinking_greedy.jsonl")

    def state():
        files = [p for p in sorted(tmp_path.rglob("*")) if p.name in kept and p.parent != tmp_path]
        return {p: p.read_bytes() for p in files}

    before = state()
    (tmp_path / "rl/eval/direct_greedy.jsonl").unlink()  # as a kill during the scores leaves it
    assert run_stages(stages, tmp_path, tasks=6).why == "done"
    assert state() == before
    assert (tmp_path / "rl/eval/direct_greedy.jsonl").exists()
