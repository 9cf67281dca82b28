"""Laws of a run's stages as a reader sees them: the switch is exact, and sources go on over it."""

import dataclasses

import numpy as np
import pytest

from experiments import pretrain
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.data.prepare import prepare
from glm45_jax.experiment import _sources
from glm45_jax.train.parallel import Pmap
from glm45_jax.train.stages import Stage, total_steps


def staged(*stages):
    base = pretrain.tiny()
    common = {"rope_theta": 1e4, "bias_rate": 0.0, "mtp_weight": 0.1, "batch_tokens": 512}
    made = tuple(
        Stage(name, tokens=2048.0, seq_len=seq_len, mixture=mixture, packing=packing, **common)
        for name, seq_len, mixture, packing in stages
    )
    train = dataclasses.replace(base.train, steps=total_steps(made), validate_every=0)
    return dataclasses.replace(
        base, stages=made, train=train, report=pretrain.Report(), mesh=Pmap(1)
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    exp = pretrain.tiny()
    return prepare(exp.data, tmp_path_factory.mktemp("stages"))


BOTH = (("topics", 0.5), ("docstrings", 0.5))
ONE = (("docstrings", 1.0),)


def rows_of(loader, span):
    """(source of the run, row) at every place that the span's steps read."""
    first, n = span.rows(span.end_step)
    drawn = loader._order.at(0, first)
    assert n and not drawn.epoch_N.any()
    numbers = np.array(loader._numbers)[drawn.source_N]
    return list(zip(numbers.tolist(), drawn.row_N.tolist(), strict=True))


@pytest.mark.parametrize("packing", [Cut(), Cut(moving=True), BestFit()], ids=repr)
def test_a_stage_that_makes_rows_alike_reads_on_where_the_one_before_stopped(prepared, packing):
    exp = staged(
        ("one", 32, BOTH, packing), ("two", 32, ONE, packing), ("three", 32, BOTH, packing)
    )
    loaders = _sources(exp, prepared, list(exp.spans))
    read = [rows_of(loader, span) for loader, span in zip(loaders, exp.spans, strict=True)]
    together = [row for stage in read for row in stage]
    assert len(set(together)) == len(together) == 3 * 2048 // 32
    assert len({source for source, _ in read[0]}) == 2 and len({s for s, _ in read[1]}) == 1
    # What a stage reads does not depend on whether others follow.
    alone = _sources(exp, prepared, list(exp.spans)[:1])[0]
    assert alone.state(2) == loaders[0].state(2)


def test_a_stage_that_makes_other_rows_has_an_order_of_its_own(prepared):
    exp = staged(
        ("short", 32, BOTH, Cut()),
        ("long", 64, BOTH, Cut()),
        ("windows", 32, BOTH, BestFit(window=8)),
        ("other windows", 32, ONE, BestFit(window=8)),
        ("short again", 32, BOTH, Cut()),
    )
    loaders = _sources(exp, prepared, list(exp.spans))
    assert [loader._drawn for loader in loaders[1:4]] == [(0, 0), (0,), (0,)]
    assert loaders[4]._drawn == (32, 32)
    for loader, span in zip(loaders, exp.spans, strict=True):
        batch = loader.batch(span.first_step)
        assert batch.tokens_BT.shape == (512 // span.stage.seq_len, span.stage.seq_len)
