"""Laws of the curriculum: only tasks of the stage while there are any, each once a lap; never an
answer that nobody verified where that is asked; a saved state goes on to the same draws."""

import dataclasses
import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.envs.scores import pass_at_k
from glm45_jax.rl.curriculum import (
    HARD,
    MODERATE,
    Band,
    Curriculum,
    Probe,
    Stage,
    Tasks,
    oversampled,
)
from glm45_jax.rl.lengths import lengths
from glm45_jax.rl.pool import Pool, Rules
from tests.rl.common import trajectory
from tests.rl.pool_run import TOKENS, drawn

ANY = Stage((Band(1, 0.0, 1.0),))


def made(count=20, *, verified=True, **options):
    return Curriculum([Tasks("sums", count, verified=verified)], samples=8, **options)


def numbers(drawn_):
    return [prompt.number for prompt in drawn_.prompts]


@given(n=st.integers(1, 9), k=st.integers(1, 9), data=st.data())
def test_pass_at_k_is_the_share_of_k_tries_out_of_n_that_hold_a_pass(n, k, data):
    passes = data.draw(st.integers(0, n))
    if k <= n:
        tries = [1] * passes + [0] * (n - passes)
        subsets = list(itertools.combinations(tries, k))
        assert math.isclose(
            pass_at_k(n, passes, k), sum(map(any, subsets)) / len(subsets), abs_tol=1e-12
        )
    else:
        assert math.isclose(pass_at_k(n, passes, k), 1 - (1 - passes / n) ** k, abs_tol=1e-12)


def test_the_stages_are_what_they_are_meant_to_be():
    inside = [c for c in range(9) if not MODERATE.distance(8, c)]
    assert inside == list(range(1, 8)) and not MODERATE.distance(0, 0)
    assert [c for c in range(513) if not HARD.distance(512, c)] == list(range(1, 9))
    assert HARD.distance(0, 0) and HARD.verified and not HARD.unseen


@given(count=st.integers(1, 30), seed=st.integers(0, 9), laps=st.integers(1, 3))
def test_a_lap_draws_every_task_once_and_laps_differ_in_order(count, seed, laps):
    curriculum = made(count, seed=seed, stages=[ANY])
    orders = [[numbers(curriculum.draw(1))[0] for _ in range(count)] for _ in range(laps)]
    for order in orders:
        assert sorted(order) == list(range(count))
    if count > 8:
        assert len({tuple(order) for order in orders}) == laps


@settings(max_examples=50)
@given(
    seed=st.integers(0, 99),
    n=st.integers(1, 12),
    passes=st.lists(st.integers(-1, 8), min_size=12, max_size=12),
)
def test_what_is_drawn_is_of_the_stage_and_fills_up_with_the_nearest(seed, n, passes):
    curriculum = made(12, seed=seed)
    for number, c in enumerate(passes):
        if c >= 0:
            curriculum.record("sums", number, [1.0] * c + [0.0] * (8 - c), version=0)
    inside = {number for number, c in enumerate(passes) if 0 < c < 8 or c < 0}
    got = curriculum.draw(n)
    assert len(set(numbers(got))) == n
    assert got.filled == max(n - len(inside), 0)
    assert set(numbers(got)[: n - got.filled]) <= inside
    if got.filled:
        assert inside <= set(numbers(got))


def test_keys_are_new_on_every_visit():
    curriculum = made(5, stages=[ANY])
    keys = [prompt.key for _ in range(4) for prompt in curriculum.draw(5).prompts]
    assert len(set(keys)) == 20 and "sums/3@4" in keys


def test_stage_two_takes_hard_tasks_with_verified_answers_only():
    tasks = [Tasks("sums", 10, verified=True), Tasks("web", 10, first=5)]
    curriculum = Curriculum(tasks, samples=8, seed=1)
    for env, number in [("sums", i) for i in range(10)] + [("web", 5 + i) for i in range(10)]:
        for version in range(64):
            passes = int(version == 0 and number in (2, 4, 7, 9))  # one of 512
            curriculum.record(env, number, [1.0] * passes + [0.0] * (8 - passes), version)
    curriculum.advance()
    got = curriculum.draw(3)
    assert got.filled == 0 and set(numbers(got)) < {2, 4, 7, 9}
    assert all(p.env == "sums" and p.meta["stage"] == 2 for p in got.prompts)
    assert all(p.env == "sums" for p in curriculum.draw(10).prompts)
    with pytest.raises(ValueError, match="11 prompts, but only 10 tasks may be used in stage 2"):
        curriculum.draw(11)
    with pytest.raises(ValueError, match="stage 1 is the last of 2"):
        curriculum.advance()


def test_probes_are_the_tasks_that_more_tries_would_decide():
    tasks = [Tasks("sums", 4, verified=True), Tasks("web", 4)]
    curriculum = Curriculum(tasks, samples=8)
    curriculum.record("sums", 0, [0.0] * 8, 0)  # may be hard, or hopeless
    curriculum.record("sums", 1, [1.0] * 4 + [0.0] * 4, 0)  # too easy
    curriculum.record("sums", 2, [0.0] * 512, 0)  # hopeless
    curriculum.advance()
    found = sorted(curriculum.probes(9), key=lambda probe: probe.number)
    assert found == [Probe("sums", 0, 504), Probe("sums", 3, 512)]
    assert len(curriculum.probes(1)) == 1


def test_results_of_old_weights_say_nothing_of_the_policy_of_now():
    curriculum = made(3, window=10)
    curriculum.record("sums", 0, [0.0] * 8, version=0)
    assert 0 not in numbers(curriculum.draw(2))
    curriculum.record("sums", 1, [1.0, 0.0], version=11)
    curriculum = reloaded(curriculum)
    assert curriculum.draw(3).filled == 0


def reloaded(curriculum):
    """Another one with the state of this, through JSON."""
    other = Curriculum(
        curriculum.tasks,
        samples=curriculum.samples,
        seed=curriculum.seed,
        stages=curriculum.stages,
        window=curriculum.window,
    )
    other.restore(json.loads(json.dumps(curriculum.state())))
    return other


@settings(max_examples=30)
@given(seed=st.integers(0, 99), cut=st.integers(0, 14))
def test_a_restored_curriculum_draws_what_it_would_have_drawn(seed, cut):
    rng = np.random.default_rng(seed)
    steps = [(int(rng.integers(1, 5)), rng.integers(0, 2, (5, 8)).tolist()) for _ in range(15)]

    def run(curriculum, steps, cut):
        for i, (n, rewards) in enumerate(steps):
            if i == cut:
                curriculum = reloaded(curriculum)
            got = curriculum.draw(n)
            for prompt, reward in zip(got.prompts, rewards, strict=False):
                curriculum.record(prompt.env, prompt.number, reward, version=i)
            if i == 8:
                curriculum.advance()
            yield got

    stages = [MODERATE, Stage((Band(1, 0.0, 0.5),), unseen=False, verified=True)]
    plain = list(run(made(seed=seed, stages=stages), steps, None))
    assert list(run(made(seed=seed, stages=stages), steps, cut)) == plain


def test_a_state_of_other_tasks_is_refused():
    with pytest.raises(ValueError, match="the state is of tasks and seed"):
        made(20).restore(made(21).state())
    with pytest.raises(ValueError, match="the state is of tasks and seed"):
        made(20, seed=1).restore(made(20).state())


@given(p=st.floats(0.1, 0.95), groups=st.integers(1, 128))
def test_enough_groups_are_begun_nineteen_times_of_twenty_and_not_many_more(p, groups):
    n = oversampled(groups, kept=round(1000 * p), tried=1000, most=1000)
    kept = np.random.default_rng(0).binomial(n, p, 4000)
    assert (kept >= groups).mean() > 0.93
    assert n >= groups and n <= groups / p + 3 * math.sqrt(groups) / p + 6


def test_with_nothing_kept_so_far_a_bounded_number_is_asked_for():
    assert oversampled(10, kept=0, tried=500) == 40
    assert oversampled(10, kept=500, tried=500) in (10, 11)
    assert made().ask_for(8) == oversampled(8, kept=0, tried=0)


def test_the_pool_and_the_curriculum_go_on_together_after_a_crash(tmp_path):
    """Rounds of a run that starts again, now and then beside its own ghost, after every step."""
    rng = random.Random(0)

    def start():
        pool = Pool(tmp_path, run="r", rules=Rules(groups=4, staleness=9))
        curriculum = Curriculum([Tasks("sums", 30)], samples=2, stages=[ANY])
        if (state := pool.note("curriculum")) is not None:
            curriculum.restore(state)
        curriculum.catch_up(pool.results(curriculum.seen))
        return pool, curriculum

    pool, curriculum = start()
    batch = 0
    for _ in range(12):
        pool.add(
            curriculum.draw(curriculum.ask_for(4)).prompts,
            notes={"curriculum": curriculum.state()},
        )
        pool, curriculum = restarted(pool, start, rng)
        for lease in pool.lease(99, version=batch):
            pool.commit(
                lease, [drawn(lease.prompt.key, j, TOKENS, version=batch) for j in lease.samples]
            )
        pool, curriculum = restarted(pool, start, rng)
        if pool.take(batch) is not None:
            pool.trained(batch)
            batch += 1
    counts = pool.counts()
    results = pool.results()
    pool.close()
    assert counts["dropped_no_variance"] > 0 and batch > 5
    visits = Counter(result.prompt.key for result in results)
    assert set(visits.values()) == {1} and len(results) == counts["finished"]
    assert curriculum.seen == max(result.finished for result in results)
    assert curriculum.scalars()["curriculum/kept_groups"] == pytest.approx(
        1 - counts["dropped_no_variance"] / counts["finished"]
    )
    tries = [sum(block[1] for block in t) for t in curriculum.state()["tallies"].values()]
    assert sum(tries) == 2 * counts["finished"]  # every result counted once


def restarted(pool, start, rng):
    if rng.random() < 0.5:
        pool.close()
        return start()
    fresh = start()
    pool.close()
    return fresh


def test_tasks_and_stages_that_cannot_be_meant_are_refused():
    with pytest.raises(ValueError, match="overlap"):
        Curriculum([Tasks("a", 5), Tasks("a", 5, first=4)], samples=8, stages=[ANY])
    with pytest.raises(ValueError, match="verified answers, and none are"):
        made(verified=False)
    with pytest.raises(ValueError, match="1 or more"):
        Curriculum([], samples=8)
    with pytest.raises(ValueError, match="count >= 1"):
        Tasks("a", 0)
    with pytest.raises(ValueError, match="low <= high"):
        Band(8, 0.5, 0.1)
    with pytest.raises(ValueError, match="9 passes of 8 tries"):
        pass_at_k(8, 9, 1)
    with pytest.raises(ValueError, match="sums has no task 20 here"):
        made().record("sums", 20, [1.0], 0)


def test_cut_answers_are_reported():
    rng = np.random.default_rng(0)
    some = [trajectory(rng, 6) for _ in range(4)]
    some[0] = dataclasses.replace(some[0], status="length", reward=0.25)
    scalars = lengths(some)
    assert scalars["length/cut"] == 0.25 and scalars["length/reward_cut"] == 0.25
    assert scalars["length/max"] == max(one.sampled_T.sum() for one in some)
    assert "length/reward_cut" not in lengths(some[1:]) and lengths([]) == {}
