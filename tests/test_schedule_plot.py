"""The plot of `--dry-run` can be read back: it is the schedule, and shows all that changes."""

import dataclasses

import pytest

from experiments import midtrain, pretrain
from glm45_jax.optim.schedules import Constant
from glm45_jax.plan import table
from glm45_jax.plan.plot import HEIGHT, WIDTH, plot

BLOCKS = " ▁▂▃▄▅▆▇█"
START = 29  # where the curves begin
EXPERIMENTS = [midtrain.tiny_recipe, midtrain.glm45, pretrain.glm45, pretrain.tiny]


def parts_of(exp):
    return [(span, exp.of(span)) for span in exp.spans if span.first_step < exp.train.steps]


def read(exp):
    """(eighths of the whole height by column, bars by name, columns of a stage)."""
    parts = parts_of(exp)
    columns = WIDTH // len(parts) * len(parts)
    lines = plot(parts, exp.train.steps)
    bars = [line.ljust(200)[START : START + columns] for line in lines]
    rates = [sum(BLOCKS.index(bar[n]) for bar in bars[:HEIGHT]) for n in range(columns)]
    named = {line.split()[0]: bar for line, bar in zip(lines[HEIGHT:], bars[HEIGHT:], strict=True)}
    return rates, named, columns // len(parts)


@pytest.mark.parametrize("make", EXPERIMENTS)
def test_the_learning_rate_can_be_read_back(make):
    exp = make()
    rates, _, width = read(exp)
    found = []
    for span, _ in parts_of(exp):
        end = min(span.end_step, exp.train.steps)
        for n in range(width):
            step = span.first_step + round(n * (end - 1 - span.first_step) / (width - 1))
            found.append(float(exp.optim.lr_at(float(span.tokens_at(step)))))
    top = max(found)
    for eighths, rate in zip(rates, found, strict=True):
        assert abs(eighths / (8 * HEIGHT) - rate / top) <= 1 / (16 * HEIGHT) + 1e-6


@pytest.mark.parametrize("make", EXPERIMENTS)
def test_what_changes_from_stage_to_stage_changes_in_the_plot(make):
    exp = make()
    _, bars, width = read(exp)
    lengths = [sub.data.seq_len for _, sub in parts_of(exp)]
    assert ("seq_len" in bars) == (len(set(lengths)) > 1)
    for one in range(1, len(lengths)):
        if "seq_len" in bars:
            before, after = (BLOCKS.index(bars["seq_len"][width * one + n]) for n in (-1, 0))
            assert (before < after) == (lengths[one - 1] < lengths[one])


def test_what_stays_has_no_line_and_a_run_without_a_rate_is_drawn():
    exp = pretrain.tiny()
    exp = dataclasses.replace(
        exp,
        optim=dataclasses.replace(exp.optim, schedule=Constant(0.0)),
        train=dataclasses.replace(exp.train, bias_rate=Constant(0.1), mtp_weight=Constant(0.1)),
    )
    rates, bars, _ = read(exp)
    assert set(rates) == {0} and not bars


def test_the_dry_run_ends_with_the_plot():
    exp = midtrain.tiny_recipe()
    lines = plot(parts_of(exp), exp.train.steps)
    assert table(exp).splitlines()[-len(lines) :] == lines
    assert [stage.name in lines[-1] for stage in exp.stages] == [True] * len(exp.stages)
