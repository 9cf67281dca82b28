"""The door: `experiments.rl_reasoning:tiny`, made smaller, from the command line to the end."""

import json

import jax
import numpy as np
import pytest

from experiments import rl_reasoning
from glm45_jax import main
from glm45_jax import params as params_lib
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.metrics import read_jsonl
from glm45_jax.model import transformer

TINY = "experiments.rl_reasoning:tiny"
SMALL = [
    *("train.steps=2", "train.save_every=1", "rl.groups=4", "rl.samples=2"),
    *("rl.evaluation.tasks=4", "rl.serving.slots=4", "rl.serving.pages=32"),
    *("data.sources.0.0.count=200", "data.sources.1.0.count=200"),
    *("rl.cold_start.train.steps=2", "rl.cold_start.train.rows=4"),
    "rl.cold_start.train.validate_rows=4",
]


def run(workdir, *more):
    sets = [part for one in (*SMALL, *more) for part in ("--set", one)]
    return main.main([TINY, "--workdir", str(workdir), *sets])


def saved(workdir):
    weights = params_lib.abstract(transformer.specs(rl_reasoning.tiny().model))
    restored = Checkpoints(workdir / "checkpoints").restore({"params": weights}, partial=True)
    return restored.state["params"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rl") / "tiny"
    assert run(workdir) == 0
    return workdir


def test_a_cold_start_comes_first_and_the_batches_go_on_from_it(done):
    supervised = read_jsonl(done / "cold_start" / "metrics.jsonl")
    assert [row.step for row in supervised] == [1, 2]
    rows = read_jsonl(done / "metrics.jsonl")
    assert [row.step for row in rows] == [0, 1, 2]
    assert rows[1].scalars["mismatch/gap"] < 1e-4
    # No sum is right yet, so nothing was trained, and the weights are still the cold start's.
    assert rows[1].scalars["groups/trained"] == 0
    jax.tree.map(np.testing.assert_array_equal, saved(done / "cold_start"), saved(done))
    claim = json.loads((done / "experiment.json").read_text())
    assert claim["fields"]["rl"]["fields"]["groups"] == 4


def test_a_run_leaves_a_report_and_its_tokens(done):
    text = (done / "report.md").read_text()
    assert "done, after batch 2 of 2" in text and "[token by token](trace.html)" in text
    assert "Rules spoke after 0 of 2 batches." in text
    assert "arithmetic.2+" in (done / "trace.html").read_text()
    assert (done / "plots" / "reward.png").exists()


def test_a_finished_run_trains_no_further_and_a_longer_one_goes_on(done):
    before = (done / "metrics.jsonl").read_bytes()
    assert run(done) == 0
    assert (done / "metrics.jsonl").read_bytes() == before
    assert run(done, "train.steps=3") == 0
    assert [row.step for row in read_jsonl(done / "metrics.jsonl")] == [0, 1, 2, 3]


def test_what_is_wrong_is_refused_before_anything_runs(done, tmp_path, capsys):
    assert run(done, "optim.lr=0.1") == main.BAD_INPUT
    assert "optim.lr" in capsys.readouterr().err
    assert run(tmp_path / "new", "data.seq_len=16") == main.BAD_INPUT
    assert "longest episode" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
