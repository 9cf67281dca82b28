"""The bench of the recipe: what is carried, what is said of a run, and the arms that differ."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import midtrain
from experiments.bench import long_rows, recipe, recipe_page
from glm45_jax.data.prepare import data_fingerprint
from glm45_jax.data.sources import PackageDocs
from glm45_jax.metrics import Row
from glm45_jax.tokenizer import train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a text to train on"], 300)


def test_the_carried_store_has_one_name_whatever_is_installed(tokenizer, monkeypatch):
    data = recipe.carried(midtrain.mini_recipe().data)
    here = data_fingerprint(data, tokenizer)
    monkeypatch.setattr(PackageDocs, "version", lambda self: "another machine")
    assert data_fingerprint(data, tokenizer) == here
    plain = midtrain.mini_recipe().data
    assert data_fingerprint(plain, tokenizer) != here
    with pytest.raises(ValueError, match="--prepare"):
        next(data.sources[0][0].docs())


@pytest.mark.parametrize("tiny", [True, False])
def test_what_runs_is_the_recipe_over_the_carried_store(tiny):
    exp, mini = recipe.experiment(tiny), midtrain.mini_recipe()
    assert [s.name for s in exp.stages] == [s.name for s in midtrain.STAGES]
    assert [s.name for s, _ in exp.data.sources] == [s.name for s, _ in mini.data.sources]
    assert exp.data.vocab == exp.model.vocab == mini.model.vocab
    if not tiny:
        assert (exp.model, exp.optim, exp.stages, exp.train) == (
            *(mini.model, mini.optim, mini.stages, mini.train),
        )


def logged(exp):
    """Rows of a run whose loss at a step is the step's number."""
    rows = []
    for span in exp.spans:
        for step in range(span.first_step + 1, span.end_step + 1):
            scalars = {"loss/ce": float(step), "lr": 1.0, "load_max_over_mean": 2.0}
            scalars["tokens"] = float(span.tokens_at(step))
            if step > span.first_step + 1:
                scalars |= {"tokens_per_s": 1000.0 * span.stage.seq_len, "mfu": 0.25}
            if step == span.end_step:
                scalars["val/loss"] = span.stage.seq_len + step / 1e4
                for other in {s.seq_len for s in exp.stages} - {span.stage.seq_len}:
                    scalars[f"val/loss_{other}"] = other + step / 1e4
            rows.append(Row(step, scalars, {}))
    return rows


def test_a_run_is_told_by_stage_with_few_points():
    exp = recipe.experiment(tiny=False)
    told = recipe_page.described(exp, logged(exp))
    for stage, span in zip(told["stages"], exp.spans, strict=True):
        first, last = span.first_step + 1, span.end_step
        n = min(recipe_page.ENDS, (last - first + 1) // 2)
        np.testing.assert_allclose(
            stage["loss"], [first + (n - 1) / 2, last - (n - 1) / 2], rtol=1e-4
        )
        assert stage["tokens_per_s"] == pytest.approx(1000 * stage["seq_len"], rel=1e-4)
        for length, loss in stage["validation"].items():
            assert loss == pytest.approx(int(length) + last / 1e4, rel=1e-4)
    assert told["tokens"] == exp.spans[-1].tokens_at(exp.train.steps)
    assert told["curve"]["tokens"][-1] == told["tokens"]
    assert 100 < len(told["curve"]["loss/ce"]) <= 300


def arm(optimizer, lr, seed, held_out):
    curve = {"tokens_per_step": 100, "train": [], "held_out": [[1, 9.0], [2, held_out]]}
    row = {"optimizer": optimizer, "lr": lr, "seed": seed, "held_out": held_out, "curve": curve}
    return row | {"command": "c", "tokens": 200, "tokens_per_s": 5}


def test_the_page_says_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(recipe_page, "FIGURE", tmp_path / "images/figure.png")
    exp = recipe.experiment(tiny=False)
    row = {"command": "c", "jax": "1", "parameters": 5, "active": 3, "peak": "p"}
    row |= {"seconds": {"productive": 6.0, "start": 4.0}}
    row |= recipe_page.described(exp, logged(exp))
    arms = [arm("muon", 2e-3, 0, 3.25), arm("muon", 2e-3, 1, 3.5), arm("adamw", 1e-3, 0, 4.75)]
    text = recipe_page.write_page(json.loads(json.dumps(row)), {"rows": arms}, "a-device")
    assert "10 s in all, compiling included (productive 6 s, start 4 s)" in text
    assert "| muon | 0.002 | 0, 1 | 3.2500, 3.5000 | 5 |" in text
    assert all(f"| {stage.name} |" in text for stage in exp.stages)
    assert (tmp_path / "images/figure.png").stat().st_size > 10_000


def test_the_best_rate_is_that_of_the_lowest_arm():
    arms = [arm("muon", 2e-3, 0, 3.5), arm("muon", 4e-3, 0, 3.25), arm("adamw", 1e-3, 0, 3.0)]
    assert recipe.best(arms, "muon") == 4e-3
    assert recipe.parsed("muon_best:1") == ("muon", 0.0, 1)
    assert [recipe.parsed(one)[0] for one in recipe.ARMS].count("muon") == 3
    for wrong in ("sgd_1e-3:0", "muon:0", "muon_1e-3", "muon_-1:0"):
        with pytest.raises(SystemExit, match="give arms as"):
            recipe.parsed(wrong)
    with pytest.raises(SystemExit, match="no arm of muon was run"):
        recipe.best([], "muon")


@pytest.mark.parametrize("base", [midtrain.tiny_recipe, midtrain.mini_recipe])
def test_what_long_rows_are_compared_with_differs_in_the_third_stage_alone(base):
    exp = base()
    arms = long_rows.arms(exp)
    before, long = arms["before"], arms["long"]
    assert long.stages == exp.stages[:3] and before.stages == exp.stages[:2]
    for name in ("more", "short"):
        assert arms[name].stages[:2] == before.stages
        ends = [one.spans[-1].tokens_at(one.train.steps) for one in (arms[name], long)]
        assert ends[0] == ends[1]
        assert arms[name].optim == long.optim
        # A workdir of `before` takes it.
        train = dataclasses.replace(arms[name].train, steps=before.train.steps)
        assert dataclasses.replace(arms[name], stages=before.stages, train=train) == before
    short, third, second = arms["short"].stages[2], long.stages[2], before.stages[1]
    assert short.mixture == third.mixture
    assert (short.seq_len, short.packing) == (second.seq_len, second.packing)
    assert arms["more"].stages[2] == dataclasses.replace(second, name="more", tokens=third.tokens)


def test_what_long_rows_give_is_told_seed_by_seed():
    rows = [
        {"arm": name, "seed": seed, "whole": 5.0 + worse + seed, "far": 4.0 + 2 * worse}
        for name, worse in (("before", 1.0), ("long", 0.0), ("more", 0.25))
        for seed in (0, 1)
    ]
    text = long_rows.told(rows).splitlines()
    assert text[2].startswith("more    whole 5.7500, far 4.5000; above `long` by seed: whole +0.25")
    assert text[2].endswith("far +0.5000, +0.5000")
