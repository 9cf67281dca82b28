"""Laws of the steps left out: they change no weight, they are counted and kept, the same on every
device and after every resume, and there are only so many.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.checkpoint import Checkpoints
from glm45_jax.metrics import Jsonl, read_jsonl
from glm45_jax.train.guard import Guard, judge, keep_batch, kept_batches, no_level, read_batch
from glm45_jax.train.loop import resume, run_steps
from glm45_jax.train.state import Train
from tests.train.common import ONE, Pmap, packed_batch, trainer

GUARD = Guard(sigmas=3.0, min_rise=0.5, window=4, budget=2, forgiven_after=3)
BAD, STEPS = (3, 5), 8


@functools.cache
def _judge(guard):
    return jax.jit(functools.partial(judge, guard))


def judged(losses, guard=GUARD, norm=1.0):
    """What was said of each loss: "take", "skip" or "spent", which ends it; and the last level."""
    level, said = no_level(), []
    for step, loss in enumerate(losses):
        found = _judge(guard)(level, jnp.int32(step), jnp.float32(loss), jnp.float32(norm))
        level = found.level
        said.append("take" if found.take else "spent" if found.spent else "skip")
        if said[-1] == "spent":
            break
    return said, level


@pytest.mark.parametrize("bad", [np.nan, np.inf, 9.0])
def test_what_is_not_finite_or_far_above_its_level_is_left_out(bad):
    said, level = judged([5, 4, 3, 2, bad, 2, 2.2])
    assert said == ["take"] * 4 + ["skip"] + ["take"] * 2
    assert int(level.skipped) == 1
    assert judged([5, 4, 3, 2, 2, 2.2])[1].mean == level.mean  # as if it had not been there


def test_a_gradient_that_is_not_finite_is_left_out_before_there_is_a_level():
    assert judged([5.0], norm=np.nan)[0] == ["skip"]


def test_a_rise_without_a_level_or_below_the_limit_is_taken():
    assert judged([1, 50, 2])[0] == ["take"] * 3  # fewer steps than the window
    assert judged([5.0, 5.0, 5.0, 5.0, 5.49])[0][-1] == "take"
    assert judged([5.0, 5.0, 5.0, 5.0, 5.51])[0][-1] == "skip"


def test_the_level_is_the_mean_of_the_first_steps_and_forgets_the_old_ones():
    _, level = judged([1, 2, 3, 4])
    np.testing.assert_allclose(level.mean, 2.5, rtol=1e-6)
    np.testing.assert_allclose(level.var, 1.25, rtol=1e-6)
    _, level = judged([4.0] * 4 + [3.0] * 60, dataclasses.replace(GUARD, sigmas=np.inf))
    np.testing.assert_allclose(level.mean, 3, atol=1e-3)


def test_a_stage_starts_with_a_level_of_its_own():
    losses = [1.0] * 6 + [9.0] * 6
    assert "skip" in judged(losses)[0]
    assert judged(losses, dataclasses.replace(GUARD, since_step=6))[0] == ["take"] * 12


def test_the_budget_ends_the_run_and_good_steps_give_it_back():
    nan = np.nan
    assert judged([1, nan, nan, nan, 1])[0] == ["take", "skip", "skip", "spent"]
    assert judged([nan, 1, 1, 1, nan, nan, nan])[0][-3:] == ["skip", "skip", "spent"]
    assert judged([nan], dataclasses.replace(GUARD, budget=0))[0] == ["spent"]


@pytest.mark.parametrize(
    "bad", [{"sigmas": 0.0}, {"window": 1}, {"budget": -1}, {"forgiven_after": 2**30}]
)
def test_a_rule_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        Guard(**bad)


def test_a_kept_batch_comes_back_bit_for_bit(tmp_path):
    batch = packed_batch()
    for step in (10, 9):
        path = keep_batch(tmp_path, step, batch)
    jax.tree.map(np.testing.assert_array_equal, vars(read_batch(path)), vars(batch))
    assert [p.name for p in kept_batches(tmp_path)] == ["batch9_host0.npz", "batch10_host0.npz"]


class Batches:
    """A source of eight batches, of which those of `bad` give no finite loss."""

    def __init__(self, bad):
        self.bad = bad

    def iterate(self, start_step=0):
        for step in range(start_step, STEPS):
            batch = packed_batch(step)
            hole = np.float32(np.nan if step in self.bad else 1)
            yield batch.replace(mask_BT=batch.mask_BT * hole)

    def state(self, step):
        return {}


def run(workdir, *, bad=BAD, steps=STEPS, where=ONE, guard=GUARD):
    run_trainer = trainer(where, guard=guard)
    workdir.mkdir(exist_ok=True)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        found = resume(run_trainer, checkpoints)
        state, start = (run_trainer.init(jax.random.key(0)), 0) if found is None else found[::2]
        writer = Jsonl.open_resumed(workdir / "metrics.jsonl", start + 1)
        state, outcome = run_steps(
            run_trainer,
            state,
            Batches(bad),
            train=Train(steps=steps, rows=16, log_every=100),
            start=start,
            workdir=workdir,
            checkpoints=checkpoints,
            sidecars={},
            writers=[writer],
        )
        writer.close()
    return state, jax.device_get(run_trainer.save_view(state)), outcome


def moved(tree):
    return tree.params, tree.opt


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_step_left_out_moves_the_step_and_the_schedule_and_nothing_else(tmp_path):
    _, before, _ = run(tmp_path, steps=3)
    _, after, outcome = run(tmp_path, steps=4)
    same(moved(before), moved(after))  # router biases are among the weights
    assert (outcome.why, outcome.step) == ("done", 4)
    assert (int(before.step), int(after.step)) == (3, 4)
    assert int(after.tokens_seen[1]) == 4 * 16 * 24
    assert int(after.level.skipped) == 1
    assert [p.name for p in outcome.kept] == ["batch3_host0.npz"]
    kept = read_batch(outcome.kept[0])
    np.testing.assert_array_equal(kept.tokens_BT, packed_batch(3).tokens_BT)
    last = read_jsonl(tmp_path / "metrics.jsonl")[-1]  # shown though it was not its turn
    assert (last.step, last.scalars["skipped"]) == (4, 1.0)
    assert np.isnan(last.scalars["loss"])
    _, after_next, _ = run(tmp_path, steps=5)
    assert np.any(moved(after_next)[0].norm_D != moved(after)[0].norm_D)


def test_a_run_that_resumes_leaves_out_what_one_that_was_never_stopped_does(tmp_path):
    _, whole, done = run(tmp_path / "whole")
    for steps in (2, 4, 5, STEPS):  # before, right after and between the steps left out
        _, cut, again = run(tmp_path / "cut", steps=steps)
    plain = [x.replace(key=jax.random.key_data(x.key)) for x in (whole, cut)]
    same(*plain)
    assert int(whole.level.skipped) == 2
    assert [p.name for p in done.kept] == [p.name for p in again.kept]


def test_every_device_decides_the_same(tmp_path):
    state, _, _ = run(tmp_path, where=Pmap())
    for leaf in jax.tree.leaves((state.params, state.opt, state.level)):
        copies = np.asarray(leaf)
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))
    assert np.asarray(state.level.skipped).tolist() == [2] * 8


def test_a_spent_budget_ends_the_run_before_the_step_and_names_the_batches(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        _, state, outcome = run(tmp_path, bad=(2, 3, 4))
    assert (outcome.why, outcome.step, int(state.step)) == ("skips spent", 4, 4)
    names = [f"batch{step}_host0.npz" for step in (2, 3, 4)]
    assert [p.name for p in outcome.kept] == names
    message = caplog.records[-1].getMessage()
    assert ", ".join(names) in message and "train.guard.budget" in message
    assert Checkpoints(tmp_path / "checkpoints").latest() == 4
    _, _, outcome = run(tmp_path, bad=(2, 3, 4))  # the same batch, the same end
    assert (outcome.why, outcome.step) == ("skips spent", 4)


def test_a_spike_is_left_out_where_the_loss_is_computed():
    run_trainer = trainer(ONE, guard=GUARD)
    state = run_trainer.init(jax.random.key(0))
    state, out = run_trainer.step(state, packed_batch(0))
    assert bool(out.ok) and not bool(out.skipped)
    low = state.level.replace(mean=jnp.float32(1), var=jnp.float32(0), steps=jnp.int32(4))
    where = jax.tree.map(lambda x: x.sharding, state.level)  # else the step is compiled again
    state = state.replace(level=jax.device_put(low, where))
    before = jax.device_get(moved(state))
    state, out = run_trainer.step(state, packed_batch(1))
    assert bool(out.ok) and bool(out.skipped) and np.isfinite(out.scalars["loss"])
    same(jax.device_get(moved(state)), before)
