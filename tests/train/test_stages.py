"""Laws of stages: every switch at its step, ratios kept in small, a resumed run is the whole."""

import bisect
import dataclasses
import itertools
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import midtrain, pretrain
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.experiment import BadInput
from glm45_jax.metrics import read_jsonl
from glm45_jax.plan import table as dry_run
from glm45_jax.start import check_claim, write_claim
from glm45_jax.streamed import open_arrays
from glm45_jax.train.parallel import Pmap
from glm45_jax.train.stages import Stage, scaled, spans, total_steps

FULL_BATCH = 16384 * 4096
# What each stage reads, and most of; the weights are UNVERIFIED. Source: spec 5.1.
MIXTURES = {
    "general": ("web", {"web", "code", "science"}),
    "code_reasoning": ("web", {"web", "code", "science"}),
    "repositories": ("repositories", {"repositories", "code"}),
    "reasoning": ("reasoning", {"reasoning", "science", "web"}),
    "long_agent": ("long", {"long", "agent"}),
}
# Tokens seen -> stage, rows, seq_len, RoPE base, bias rate, MTP weight. Source: spec 5.1, 5.2.
TABLE = (
    (0, "general", 4096, 4096, 1e4, 1e-3, 0.3),
    (250e9, "general", 10240, 4096, 1e4, 1e-3, 0.3),
    (500e9, "general", 16384, 4096, 1e4, 1e-3, 0.3),
    (15e12 - FULL_BATCH, "general", 16384, 4096, 1e4, 1e-3, 0.3),
    (15e12, "code_reasoning", 16384, 4096, 1e4, 0.0, 0.1),
    (22e12 - FULL_BATCH, "code_reasoning", 16384, 4096, 1e4, 0.0, 0.1),
    (22e12, "repositories", 2048, 32768, 1e6, 0.0, 0.1),
    (22.5e12, "reasoning", 2048, 32768, 1e6, 0.0, 0.1),
    (23e12, "long_agent", 512, 131072, 1e6, 0.0, 0.1),
    (23.1e12 - FULL_BATCH, "long_agent", 512, 131072, 1e6, 0.0, 0.1),
)


def step_of(found, tokens):
    """The first step that starts with at least this many tokens seen, and its span."""

    def seen(step):
        span = next(s for s in found if step < s.end_step)
        return span.tokens_at(step)

    step = bisect.bisect_left(range(found[-1].end_step), tokens, key=seen)
    return step, next(s for s in found if step < s.end_step)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]:.6g}")
def test_the_full_recipe_at_any_token_is_the_paper_s(row):
    tokens, name, rows, seq_len, rope, bias_rate, mtp_weight = row
    exp = midtrain.glm45()
    step, span = step_of(exp.spans, tokens)
    sub = exp.of(span)
    assert span.stage.name == name
    assert span.rows(step)[1] == rows
    assert (sub.data.seq_len, sub.model.mixer.rope_theta) == (seq_len, rope)
    assert isinstance(sub.data.packing, Cut if seq_len == 4096 else BestFit)
    shares = {source.name: share for source, share in sub.data.sources}
    assert (max(shares, key=shares.get), set(shares)) == MIXTURES[name]
    assert sum(shares.values()) == pytest.approx(1)
    seen = jnp.float32(tokens)
    np.testing.assert_allclose(sub.train.bias_rate(seen), bias_rate, rtol=1e-6)
    np.testing.assert_allclose(sub.train.mtp_weight(seen), mtp_weight, rtol=1e-6)
    warmup = 8e9
    after = (tokens - warmup) / (23.1e12 - warmup)
    lr = 2.5e-5 + 0.5 * (2.5e-4 - 2.5e-5) * (1 + math.cos(math.pi * after)) if tokens else 0.0
    got = float(sub.optim.lr * sub.optim.schedule(seen))
    np.testing.assert_allclose(got, lr, rtol=2e-5, atol=1e-12)
    assert abs(span.tokens_at(step) - tokens) <= rows * seq_len


def test_more_code_and_science_are_read_in_the_second_stage_than_in_the_first():
    first, second = (dict(stage.mixture) for stage in midtrain.STAGES[:2])
    assert second["code"] > first["code"] and second["science"] > first["science"]


@pytest.mark.parametrize("at", [15e12, 22e12, 22.5e12, 23e12])
def test_the_step_before_a_switch_is_all_of_the_stage_before(at):
    exp = midtrain.glm45()
    step, span = step_of(exp.spans, at)
    assert step == span.first_step
    before = next(s for s in exp.spans if step - 1 < s.end_step)
    index = exp.spans.index(span)
    assert before is exp.spans[index - 1]
    assert exp.of(before).data.sources != exp.of(span).data.sources


def test_a_switch_happens_at_the_step_that_completes_the_stage_and_not_before():
    found = midtrain.glm45().spans
    ends = np.cumsum([15e12, 7e12, 500e9, 500e9, 100e9])
    for span, end in zip(found, ends, strict=True):
        last = span.end_step - 1
        assert span.tokens_at(last) < end <= span.tokens_at(span.end_step)
        assert span.tokens_at(span.end_step) - end < span.rows(last)[1] * span.stage.seq_len
    assert found[-1].end_step == midtrain.glm45().train.steps


def stage_lines(exp):
    """The words of every stage's line of the dry run, by its name."""
    words = [line.split() for line in dry_run(exp).splitlines()]
    names = {stage.name for stage in exp.stages}
    return {line[0]: line for line in words if line and line[0] in names}


def test_the_dry_run_tells_every_stage_its_step_its_rate_and_its_memory():
    told = stage_lines(midtrain.glm45())
    assert list(told) == [stage.name for stage in midtrain.STAGES]
    assert told["repositories"][1:6] == ["335,127", "22.00T", "32,768", "2,048", "1,000,000"]
    assert told["general"][-4:] == ["0", "to", "8.67e-05", told["general"][-1]]
    assert float(told["long_agent"][-1]) > 80  # needs rows split over devices: no H100 holds it


@pytest.mark.parametrize("name", ["glm45", "glm45_air"])
def test_the_stage_of_128k_goes_on_in_its_workdir_with_rows_split_over_devices(name, tmp_path):
    whole, long = (getattr(midtrain, f"{name}{end}")() for end in ("", "_long"))
    assert whole.devices() == long.devices()
    write_claim(whole, tmp_path)
    check_claim(long, tmp_path)
    assert float(stage_lines(long)["long_agent"][-1]) < 71  # GiB: an H100 holds it


def test_spans_tile_steps_and_tokens():
    found = midtrain.mini_recipe().spans
    for before, after in itertools.pairwise(found):
        assert after.first_step == before.end_step
        assert after.first_tokens == before.tokens_at(before.end_step)
    assert found[0].first_step == found[0].first_tokens == 0
    assert [first for s in found for first, _ in s.sizes()] == sorted(
        {first for s in found for first, _ in s.sizes()}
    )


@pytest.mark.parametrize("small", [midtrain.mini_recipe, midtrain.tiny_recipe])
def test_the_small_recipes_keep_lengths_batches_and_what_does_not_scale(small):
    for mine, theirs in zip(small().stages, midtrain.STAGES, strict=True):
        first, full = small().stages[0], midtrain.STAGES[0]
        assert mine.seq_len / first.seq_len == theirs.seq_len / full.seq_len
        assert mine.batch_tokens / first.batch_tokens == theirs.batch_tokens / full.batch_tokens
        for name in ("name", "packing", "rope_theta", "bias_rate", "mtp_weight"):
            assert getattr(mine, name) == getattr(theirs, name)
    long = scaled(midtrain.STAGES, tokens=23.1e12, batch_tokens=FULL_BATCH, seq_len=4096)
    for mine, theirs in zip(long, midtrain.STAGES, strict=True):
        floats = {"tokens": theirs.tokens, "ramp_tokens": theirs.ramp_tokens}
        assert dataclasses.replace(mine, **floats) == theirs
        np.testing.assert_allclose([mine.tokens, mine.ramp_tokens], list(floats.values()))


def test_a_stage_that_cannot_be_is_named():
    good = midtrain.STAGES[0]
    with pytest.raises(ValueError, match="a batch of 5000 tokens is no multiple of seq_len 4096"):
        dataclasses.replace(good, batch_tokens=5000, start_batch_tokens=None, ramp_tokens=0)
    with pytest.raises(ValueError, match="weights are above 0"):
        dataclasses.replace(good, mixture=(("web", 0.0),))
    exp = staged()
    web = dataclasses.replace(exp.stages[0], mixture=(("topics", 1.0), ("web", 1.0)))
    with pytest.raises(ValueError, match=r"short mixes \['web'\], data.sources has"):
        dataclasses.replace(exp, stages=(web, exp.stages[1]))
    with pytest.raises(ValueError, match=r"train.steps 99 is beyond the 4 steps of the stages"):
        dataclasses.replace(exp, train=dataclasses.replace(exp.train, steps=99))


def staged(n_stages=2, steps=None, report=None):
    """Two steps of 32-token rows, then two of 64-token rows, best-fit, another RoPE base."""
    base = pretrain.tiny()
    common = {"mtp_weight": 0.1, "bias_rate": 0.0, "batch_tokens": 512, "tokens": 1024.0}
    stages = (
        Stage(
            "short",
            seq_len=32,
            mixture=(("topics", 0.5), ("docstrings", 0.5)),
            packing=Cut(),
            rope_theta=1e4,
            **{**common, "mtp_weight": 0.3, "bias_rate": 1e-3},
        ),
        Stage(
            "long",
            seq_len=64,
            mixture=(("topics", 1.0),),
            packing=BestFit(),
            rope_theta=1e6,
            **common,
        ),
    )[:n_stages]
    train = dataclasses.replace(
        base.train, steps=steps or total_steps(stages), save_every=1, keep=9, validate_every=0
    )
    return dataclasses.replace(base, stages=stages, train=train, report=report, mesh=Pmap(1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("staged") / "whole"
    exp = staged(report=pretrain.Report())
    assert exp.run(exp, workdir).step == 4
    return workdir


def params_at(workdir, step):
    item = Checkpoints(workdir / "checkpoints").verified(step)
    names = [name for name in item.leaves if name.startswith("params/")]
    return {k: v.read().result() for k, v in open_arrays(item.item, names).items()}


def test_stages_are_visible_in_the_metrics(whole):
    rows = read_jsonl(whole / "metrics.jsonl")
    assert [row.scalars["stage"] for row in rows] == [1, 1, 2, 2]
    assert [row.scalars["seq_len"] for row in rows] == [32, 32, 64, 64]
    assert [row.scalars["rope_theta"] for row in rows] == [1e4, 1e4, 1e6, 1e6]
    assert [row.scalars["mtp_weight"] for row in rows] == [0.3, 0.3, 0.1, 0.1]
    assert [row.scalars["bias_rate"] for row in rows] == [1e-3, 1e-3, 0, 0]
    assert [row.scalars["batch_tokens"] for row in rows] == [512] * 4
    assert {"val/loss", "val/loss_64"} <= rows[1].scalars.keys()
    assert {"val/loss", "val/loss_32"} <= rows[3].scalars.keys()


def test_every_stage_has_its_row_in_the_report_and_its_curve(whole):
    lines = (whole / "report.md").read_text().splitlines()
    for name, steps in (("short", "1 to 2"), ("long", "3 to 4")):
        assert any(line.startswith(f"| {name} | {steps} |") for line in lines)
    plots = {path.stem for path in (whole / "plots").iterdir()}
    assert {"loss", "stages", "lr", "load", "bias", "update", "speed", "goodput"} == plots
    assert (whole / "report.html").read_text().count("data:image/png") == len(plots)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_was_stopped_in_any_stage_goes_on_bit_for_bit(whole, stop, tmp_path):
    shutil.copytree(whole / "data", tmp_path / "run/data")
    first = staged(steps=stop)
    first.run(first, tmp_path / "run")
    again = staged()
    assert again.run(again, tmp_path / "run").step == 4
    mine, theirs = params_at(tmp_path / "run", 4), params_at(whole, 4)
    assert mine.keys() == theirs.keys()
    assert all(mine[k].tobytes() == theirs[k].tobytes() for k in mine)


def test_a_workdir_takes_more_stages_but_no_other_ones(whole, tmp_path):
    shutil.copytree(whole / "data", tmp_path / "run/data")
    one = staged(n_stages=1)
    one.run(one, tmp_path / "run")
    two = staged()
    ahead = dataclasses.replace(two.train, compile_ahead=2)  # changes nothing but the time
    two = dataclasses.replace(two, train=ahead)
    two.run(two, tmp_path / "run")
    mine, theirs = params_at(tmp_path / "run", 4), params_at(whole, 4)
    assert all(mine[k].tobytes() == theirs[k].tobytes() for k in mine)
    changed = dataclasses.replace(two.stages[0], mtp_weight=0.2)
    other = dataclasses.replace(two, stages=(changed, two.stages[1]))
    with pytest.raises(BadInput, match="holds another experiment"):
        other.run(other, tmp_path / "run")
    assert spans(two.stages)[1].first_step == 2
