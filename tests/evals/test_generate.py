"""Every episode is kept, an evaluation that was killed goes on, and its score is the same."""

import json

import pytest

from glm45_jax.envs.types import Env, Part, Task
from glm45_jax.evals.generate import evaluate
from glm45_jax.evals.report import write_report
from glm45_jax.evals.types import EvalTask, PassAt
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.episode import Format
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.tokenizer import train_bpe
from tests.rollout.arithmetic import Arithmetic

TOKENIZER = train_bpe(["add two numbers"], 292)
DIRECT = Format(TOKENIZER, thinking=False)


def world(judged=None, dies_at=None):
    """Rewards of many sizes, by what was said."""

    def size(task, messages):
        judged.append(task.id) if judged is not None else None
        if dies_at is not None and len(judged) == dies_at:
            raise KeyboardInterrupt
        return float(len(messages[-1].get("content") or "") % 3 == 0)

    def asked(n):
        return Task(id=f"t{n}", prompt=f"{n}+{n}=", answer=2 * n)

    return Env("sizes", asked, (Part("size", size), Part("one", lambda *_: 1.0, 0.0)))


def scored(out, env=None, **kwargs):
    driver = Driver(Arithmetic(slots=3, pages=60, max_tokens=80, vocab=292), 5)
    task = EvalTask(env or world(), range(7), samples=4, sampling=Sampling(max_tokens=12))
    return evaluate(task, driver, DIRECT, out=out, model="m", progress=False, **kwargs)


def lines_of(outcome):
    head, *lines = map(json.loads, outcome.file.read_text().splitlines())
    return head, sorted(lines, key=lambda line: (line["number"], line["sample"]))


def test_every_sample_is_on_disk_and_the_score_follows_from_them(tmp_path):
    outcome = scored(tmp_path)
    head, lines = lines_of(outcome)
    assert head["model"] == "m" and head["sampling"]["max_tokens"] == 12
    assert [(one["number"], one["sample"]) for one in lines] == [
        (n, j) for n in range(7) for j in range(4)
    ]
    rewards = [one["reward"] for one in lines]
    assert 0 < sum(rewards) < len(rewards)
    assert outcome.score.value == pytest.approx(sum(rewards) / 28) and outcome.score.n == 7
    assert outcome.parts["one"].value == 1 and outcome.errors == 0
    assert outcome.tokens == sum(sum(one["sampled"]) for one in lines) > 0
    assert outcome.cut == sum(one["status"] == "length" for one in lines) / 28
    assert len({tuple(one["tokens"]) for one in lines if one["number"] == 3}) > 1  # own draws
    assert scored(tmp_path / "again").score == outcome.score
    other = scored(tmp_path / "seed", seed=1)
    assert lines_of(other)[1] != lines
    page = write_report([outcome, other], tmp_path, model="m").read_text()
    assert f"| sizes | {outcome.score.value:.4f} |" in page and "| · one | 1.0000 |" in page


@pytest.mark.parametrize("broken", [False, True], ids=["whole lines", "a line broken off"])
def test_a_killed_evaluation_goes_on_where_it_was(tmp_path, broken):
    want = scored(tmp_path / "whole")
    judged = []
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path / "part", world(judged, dies_at=11))
    file = tmp_path / "part" / "sizes.jsonl"
    kept = len(file.read_text().splitlines()) - 1
    assert 0 < kept < 12
    if broken:
        file.write_bytes(file.read_bytes()[:-20])
        kept -= 1
    judged = []
    outcome = scored(tmp_path / "part", world(judged))
    assert len(judged) == 28 - kept
    assert lines_of(outcome) == lines_of(want)
    assert (outcome.score, outcome.parts) == (want.score, want.parts)


def test_the_file_of_another_evaluation_is_refused(tmp_path):
    scored(tmp_path)
    with pytest.raises(ValueError, match=r"holds another evaluation: \['seed'\] are \[0\] there"):
        scored(tmp_path, seed=1)


def test_a_world_that_fails_counts_as_wrong_and_is_counted(tmp_path):
    def fails(task, messages):
        if task.id != "t3":
            raise OSError("no judge")
        return 1.0

    env = Env("fails", world().tasks, (Part("p", fails),))
    outcome = scored(tmp_path, env)
    assert outcome.errors == 24 and outcome.score.value == pytest.approx(1 / 7)
    assert "OSError" in lines_of(outcome)[1][0]["error"]
    broken = Env("broken", world().tasks, (Part("p", lambda *_: 1 / 0),))
    with pytest.raises(RuntimeError, match=r"broken: all 28 samples failed, the first .*ZeroDiv"):
        scored(tmp_path, broken)


def test_pass_at_k_is_a_reduce(tmp_path):
    driver = Driver(Arithmetic(slots=3, pages=60, max_tokens=80, vocab=292), 5)
    task = EvalTask(
        world(), range(7), samples=4, sampling=Sampling(max_tokens=12), reduce=PassAt(4)
    )
    outcome = evaluate(task, driver, DIRECT, out=tmp_path, model="m", progress=False)
    lines = lines_of(outcome)[1]
    right = {line["number"] for line in lines if line["reward"] == 1}
    assert outcome.score.value == pytest.approx(len(right) / 7)
