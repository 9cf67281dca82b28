"""The loop: what a run trains on, when weights change, how it ends and how it goes on."""

import dataclasses
import os
import signal
import threading

import jax
import numpy as np
import pytest

from glm45_jax.rl import loop, sampler
from glm45_jax.rl.batch import choose, pack
from glm45_jax.rl.config import Async, Evaluation, Grades, Split
from glm45_jax.rl.correction import Tis
from glm45_jax.rl.curriculum import MODERATE
from glm45_jax.rl.lease import Prompt
from glm45_jax.rl.pool import Pool, Rules
from glm45_jax.rl.temperature import Dynamic
from glm45_jax.rl.update import Update
from glm45_jax.rl.workers import Job, Local, Threaded, seed_of
from glm45_jax.rollout.sampling import Sampling
from tests.rl import loop_run
from tests.rl.common import trajectories, trajectory
from tests.rl.loop_run import RL, experiment, numbers, start


@pytest.fixture
def watched(monkeypatch):
    """Largest number of groups under way or accepted, beyond what the capacity rule lets."""
    beyond = []

    def absorb(self, wanted=1):
        done = before(self, wanted)
        counts = self.pool.counts()
        busy = sum(counts[state] for state in ("ready", "taken", "trained", "leased"))
        rules, version = self.pool.rules, counts["batches"]
        beyond.append(busy - (rules.staleness + version + 1) * rules.groups)
        return done

    before = sampler.Sampler._absorb
    monkeypatch.setattr(sampler.Sampler, "_absorb", absorb)
    return beyond


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_synchronous_run_trains_tokens_of_its_own_weights_and_agrees_with_its_engine(
    tmp_path, batches, watched
):
    _, outcome, rows = start(experiment(tmp_path), tmp_path / "w")
    assert (outcome.step, outcome.why) == (3, "done")
    assert [row.step for row in rows] == [0, 1, 2, 3]
    for step, taken in batches:
        assert {int(v) for one in taken for v in one.versions_T[one.sampled_T]} == {step}
        assert len({one.group for one in taken}) == RL.groups and len(taken) == 12
    for row in rows[1:]:
        assert row.scalars["mismatch/gap"] < 1e-4 and row.scalars["mismatch/kl"] < 1e-8
        assert row.scalars["staleness/max"] == 0
    assert max(watched) <= 0


def test_metrics_say_what_was_sampled_what_was_cut_and_where_time_went(tmp_path, batches):
    _, _, rows = start(experiment(tmp_path, steps=2), tmp_path / "w")
    scalars = rows[1].scalars
    taken = batches[0][1]
    assert scalars["reward/trained"] == pytest.approx(np.mean([one.reward for one in taken]))
    assert scalars["reward"] == pytest.approx(scalars["reward/part/even"])
    assert scalars["reward/part/seen"] == 1
    assert scalars["length/cut"] > 0.5 and scalars["length/max"] == 5
    phases = [x for name, x in scalars.items() if name.startswith("seconds/")]
    assert sum(phases) == pytest.approx(scalars["seconds"], abs=1e-3)
    for name in ("rollout", "score", "train", "push"):
        assert scalars[f"seconds/{name}"] > 0
    assert scalars["rollout/tokens_per_s"] > 0 and scalars["tokens_per_s"] > 0
    assert rows[0].scalars.keys() >= {"eval/sampled", "eval/greedy", "eval/greedy_half"}
    assert "eval/greedy" in rows[-1].scalars and "eval/greedy" not in scalars


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    weights, _, rows = start(experiment(tmp_path, steps=4), tmp_path / "whole")
    start(experiment(tmp_path, steps=2), tmp_path / "parts")
    again, outcome, parts = start(experiment(tmp_path, steps=4), tmp_path / "parts")
    assert outcome.step == 4
    same(again, weights)
    # Of a run of two steps the last is evaluated too; what the workers did counts anew.
    cut = [{k: v for k, v in row.items() if k[:4] not in ("eval", "roll")} for row in numbers(rows)]
    got = [
        {k: v for k, v in row.items() if k[:4] not in ("eval", "roll")} for row in numbers(parts)
    ]
    assert got == cut


def test_a_crash_between_checkpoints_trains_the_same_batches_again(tmp_path, batches, monkeypatch):
    weights, _, _ = start(experiment(tmp_path, steps=4, save_every=2), tmp_path / "whole")
    whole = [(step, [one.tokens_T.tolist() for one in taken]) for step, taken in batches]
    batches.clear()
    before = loop._save

    def crash(run, now):
        if now.step == 4:
            raise KeyboardInterrupt
        before(run, now)

    monkeypatch.setattr(loop, "_save", crash)
    with pytest.raises(KeyboardInterrupt):
        start(experiment(tmp_path, steps=4, save_every=2), tmp_path / "parts")
    monkeypatch.setattr(loop, "_save", before)
    again, outcome, _ = start(experiment(tmp_path, steps=4, save_every=2), tmp_path / "parts")
    assert outcome.step == 4
    same(again, weights)
    got = [(step, [one.tokens_T.tolist() for one in taken]) for step, taken in batches]
    assert got == [*whole, *whole[2:]]


def test_an_asynchronous_run_keeps_to_its_capacity_and_its_staleness(tmp_path, batches, watched):
    rl = dataclasses.replace(
        RL,
        mode=Async(staleness=2, thread=False),
        update=Update(corrections=(Tis(),)),
    )
    _, outcome, rows = start(experiment(tmp_path, steps=6, rl=rl), tmp_path / "w")
    assert outcome.why == "done"
    assert max(watched) == 0
    late = [row.scalars["staleness/max"] for row in rows[1:]]
    assert late[0] == 0 and 0 < max(late) <= 2
    for step, taken in batches:
        assert all(step - one.versions_T[one.sampled_T].min() <= 2 for one in taken)
    seen = [(one.group, one.task_id) for _, taken in batches for one in taken]
    assert all(seen.count(one) == RL.samples for one in seen)


def test_a_thread_samples_while_the_loop_trains(tmp_path, batches, watched):
    rl = dataclasses.replace(RL, mode=Async(staleness=1))
    _, outcome, _ = start(experiment(tmp_path, steps=5, rl=rl), tmp_path / "w")
    assert (outcome.step, outcome.why) == (5, "done")
    assert max(watched) <= 0
    for step, taken in batches:
        assert all(step - one.versions_T[one.sampled_T].min() <= 1 for one in taken)
    assert "rollout" not in {thread.name for thread in threading.enumerate()}


def test_an_engine_that_lies_about_its_log_probs_trips_the_gate(tmp_path, monkeypatch):
    honest = Local.poll

    def lies(self):
        return [
            (job, dataclasses.replace(one, logp_T=one.logp_T - np.float32(0.3)))
            for job, one in honest(self)
        ]

    monkeypatch.setattr(Local, "poll", lies)
    exp = experiment(tmp_path)
    weights, outcome, _ = start(exp, tmp_path / "w")
    assert (outcome.step, outcome.why) == (0, "gate") and "nats a token" in outcome.said
    same(weights, loop_run.first_weights(exp))
    blind = dataclasses.replace(RL, most_mismatch=None)
    _, outcome, rows = start(experiment(tmp_path, steps=1, rl=blind), tmp_path / "blind")
    assert outcome.why == "done" and rows[1].scalars["mismatch/gap"] == pytest.approx(0.3, abs=1e-3)


def test_rewards_that_agree_starve_a_run_or_teach_nothing(tmp_path):
    rl = dataclasses.replace(RL, world=loop_run.agreeing_world, most_dropped=2)
    _, outcome, _ = start(experiment(tmp_path, rl=rl), tmp_path / "starved")
    assert (outcome.step, outcome.why) == (0, "starved") and "dynamic" in outcome.said
    rl = dataclasses.replace(rl, dynamic=False)
    exp = experiment(tmp_path, steps=2, rl=rl)
    weights, outcome, rows = start(exp, tmp_path / "flat")
    assert (outcome.step, outcome.why) == (2, "done")
    assert rows[1].scalars["groups/agreed"] == 3 and rows[1].scalars["groups/trained"] == 0
    same(weights, loop_run.first_weights(exp))


def test_a_world_that_breaks_on_some_tasks_costs_these_tasks_alone(tmp_path, batches):
    rl = dataclasses.replace(
        RL, world=loop_run.broken_world, evaluation=dataclasses.replace(RL.evaluation, tasks=0)
    )
    rl = dataclasses.replace(rl, split=Split(first=0), judges=2)
    _, outcome, rows = start(experiment(tmp_path, rl=rl), tmp_path / "w")
    assert outcome.why == "done" and rows[-1].scalars["pool/failed"] > 0
    assert all(int(one.task_id.split("/")[1]) % 3 for _, taken in batches for one in taken)


def test_a_world_that_breaks_on_every_task_ends_the_run(tmp_path):
    nothing = dataclasses.replace(RL.evaluation, tasks=0)
    rl = dataclasses.replace(
        RL, world=loop_run.dead_world, most_dropped=2, evaluation=nothing, split=Split(first=0)
    )
    _, outcome, _ = start(experiment(tmp_path, rl=rl), tmp_path / "w")
    assert (outcome.step, outcome.why) == (0, "starved") and "failed" in outcome.said


def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_later(tmp_path, monkeypatch):
    before = loop._write

    def told(run, step, scalars):
        before(run, step, scalars)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_write", told)
    _, outcome, _ = start(experiment(tmp_path), tmp_path / "w")
    assert (outcome.step, outcome.why) == (2, "stopped")
    monkeypatch.setattr(loop, "_write", before)
    _, outcome, rows = start(experiment(tmp_path), tmp_path / "w")
    assert (outcome.step, outcome.why) == (3, "done") and [r.step for r in rows] == [0, 1, 2, 3]


def test_a_step_that_is_not_finite_ends_the_run_before_it(tmp_path, monkeypatch):
    def poisoned(run, part):
        batch = before(run, part)
        return batch.replace(advantage_BT=batch.advantage_BT * np.float32(np.nan))

    before = loop._pack
    monkeypatch.setattr(loop, "_pack", poisoned)
    _, outcome, _ = start(experiment(tmp_path), tmp_path / "w")
    assert (outcome.step, outcome.why) == (0, "not finite")


def test_held_out_tasks_are_never_trained_and_a_curriculum_may_choose(tmp_path, batches):
    rl = dataclasses.replace(
        RL,
        split=Split(first=4, train=16),
        grades=Grades(stages=(MODERATE,)),
        updates=2,
    )
    _, outcome, rows = start(experiment(tmp_path, rl=rl), tmp_path / "w")
    assert outcome.why == "done"
    trained = {int(one.task_id.split("/")[1]) for _, taken in batches for one in taken}
    assert trained <= set(range(4, 20)) and len(trained) > 3
    assert rows[1].scalars["curriculum/stage"] == 1
    _, outcome, _ = start(experiment(tmp_path, steps=4, rl=rl), tmp_path / "w")
    assert outcome.step == 4


def test_the_temperature_rises_when_the_reward_stands_still(tmp_path, batches):
    dynamic = Dynamic(grid=(1.0, 1.5), within=1.0, window=4, tolerance=10.0)
    rl = dataclasses.replace(RL, temperature=dynamic)
    _, _, rows = start(experiment(tmp_path, steps=6, rl=rl), tmp_path / "w")
    assert [row.scalars["temperature"] for row in rows[1:]] == [1, 1, 1, 1, 1.5, 1.5]
    assert {one.temperature for step, taken in batches if step >= 4 for one in taken} == {1.5}
    for row in rows[1:]:  # the trainer scores at the temperature that sampled
        assert row.scalars["mismatch/gap"] < 1e-4


def test_parts_of_a_batch_have_whole_groups_and_every_trajectory_once():
    rng = np.random.default_rng(0)
    chosen = choose(trajectories(rng, [5] * 24))
    parts = loop._parts(chosen, 3)
    groups = [{one.group for one in kept} for kept, _ in parts]
    assert len(parts) == 3 and not groups[0] & groups[1] and not groups[1] & groups[2]
    kept = [one for part, _ in parts for one in part]
    assert sorted(map(id, kept)) == sorted(map(id, chosen.trajectories))


def test_the_mismatch_is_measured_on_tokens_of_these_weights_alone():
    rng = np.random.default_rng(1)
    old, new = trajectory(rng, 12, version=3), trajectory(rng, 12, version=4)
    batch = pack([old, new], np.ones(2, np.float32), seq_len=12, pad_id=0)
    shift_BT = np.where(batch.version_B == 4, 0.1, 5.0)[:, None]
    trainer_BT = batch.logp_BT + shift_BT
    found, n = loop.mismatch([batch], [trainer_BT], 4)
    assert n == new.sampled_T.sum() and found["mismatch/gap"] == pytest.approx(0.1, rel=1e-4)
    assert found["mismatch/kl"] == pytest.approx(np.expm1(0.1) - 0.1, rel=1e-3)
    assert loop.mismatch([batch], [trainer_BT], 9) == ({}, 0)


def test_tokens_of_other_weights_in_a_synchronous_batch_are_an_error():
    rng = np.random.default_rng(2)
    with pytest.raises(RuntimeError, match="version 1 has tokens of versions"):
        loop.check_versions([trajectory(rng, 9, version=0)], 1)


def test_samples_of_a_group_differ_and_are_the_same_in_every_process():
    seeds = {seed_of(0, "add/1@1", j) for j in range(8)}
    assert len(seeds) == 8 and seed_of(0, "add/1@1", 0) == 2100824179


def test_a_dead_thread_is_heard_of():
    closed = []

    class Dies(Local):
        def __init__(self):
            self._jobs = {}

        def start(self, job):
            raise KeyError("no such world")

        def close(self):
            closed.append(True)

    workers = Threaded(Dies())
    workers.start(Job("k", Prompt("e", 0, 1, "p"), 0, Sampling()))
    with pytest.raises(ValueError, match="under way"):
        workers.start(Job("k", Prompt("e", 0, 1, "p"), 0, Sampling()))
    with pytest.raises(RuntimeError, match="no such world"):
        for _ in range(1000):
            workers.poll()
    workers.close()
    assert closed


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="two samples"):
        dataclasses.replace(RL, samples=1)
    with pytest.raises(ValueError, match="whole distribution"):
        dataclasses.replace(RL, sampling=Sampling(top_p=0.9))
    with pytest.raises(ValueError, match="no room for a prompt"):
        dataclasses.replace(RL, sampling=Sampling(max_tokens=32))
    with pytest.raises(ValueError, match="recompute=True"):
        dataclasses.replace(RL, update=Update(corrections=(Tis(),)), recompute=False)
    with pytest.raises(ValueError, match=r"split\.train"):
        dataclasses.replace(RL, grades=Grades())
    with pytest.raises(ValueError, match="staleness"):
        Async(staleness=0)


def test_in_order_every_task_comes_once_before_any_comes_twice(tmp_path):
    split = Split(first=10, train=6)
    prompts = sampler.InOrder("e", 2, split, chunk=8)
    with Pool(tmp_path, run="r", rules=Rules(groups=4)) as pool:
        assert prompts.more(pool) == 8 and prompts.more(pool) == 8
        leases = pool.lease(16, version=3)
    assert [lease.prompt.number for lease in leases] == [*range(10, 16)] * 2 + [*range(10, 14)]
    assert len({lease.prompt.key for lease in leases}) == 16


def test_canaries_tell_of_a_world_that_pays_wrong_answers_and_change_nothing_else(tmp_path):
    """Parity looks at no answer, so canaries pass as often as honest tasks."""
    plain = dataclasses.replace(RL, evaluation=Evaluation(tasks=3, every=1))
    asked = dataclasses.replace(RL, evaluation=Evaluation(tasks=3, every=1, canaries=3))
    weights, _, rows = start(experiment(tmp_path, rl=plain), tmp_path / "plain")
    others, _, told = start(experiment(tmp_path, rl=asked), tmp_path / "asked")
    same(weights, others)
    assert [row.scalars["reward"] for row in rows[1:]] == [r.scalars["reward"] for r in told[1:]]
    assert all("eval/canary" not in row.scalars for row in (*rows, told[0]))
    assert max(row.scalars["eval/canary"] for row in told[1:]) > 0
    assert "watch/canary" not in rows[-1].scalars
    assert told[-1].scalars["watch/canary"] > 0 and told[-1].scalars["watch/alarms"] >= 1
