"""What a prompt finds of earlier rows changes how much is read and nothing else."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.model import config
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Stats
from tests.rollout.common import CLOSE, ROW, check, random_prompts, weights
from tests.rollout.integers import Tagged, idle, largest_table
from tests.rollout.integers import check as check_integers


def serve(driver, tokens, **asked):
    request = driver.submit(tokens, Sampling(**asked))
    driver.run()
    return request


def turns_of(driver, turns, seed=0):
    """(request, stats after it) of an episode: each prompt is what was said until then and some new
    tokens. turns: (new tokens, most tokens of the answer) of each.
    """
    rng, said = random.Random(seed), []
    for i, (new, most) in enumerate(turns):
        said = said + [rng.randrange(96) for _ in range(new)]
        request = serve(driver, said, max_tokens=most, seed=i)
        said = said + request.out
        yield request, driver.stats


@given(
    turns=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    page=st.integers(1, 5),
    chunk=st.integers(1, 7),
)
def test_an_episode_reads_every_token_once_and_less_than_a_page_again_each_turn(turns, page, chunk):
    engine = Tagged(2, 400 // page, page=page, max_tokens=200, chunk=chunk)
    driver = Driver(engine, 0)
    cached, before = 0, Stats()
    for request, stats in turns_of(driver, turns):
        new = len(request.prompt) - cached
        assert 0 <= stats.prefill_tokens - before.prefill_tokens - new < page
        assert stats.reused_tokens - before.reused_tokens == cached // page * page
        cached, before = len(request.prompt) + len(request.out) - 1, stats
        check_integers(request, engine)
    assert stats.prefix_hits <= len(turns) - 1
    assert idle(driver, engine)


def test_episodes_of_the_model_have_the_tokens_log_probs_and_experts_they_have_without_reuse(
    tiny, engine
):
    turns = [(5, 4), (3, 4), (1, 3), (4, 5)]
    answers = {}
    for reuse in (True, False):
        driver = Driver(engine, tiny[1], reuse=reuse)
        answers[reuse] = [request for request, _ in turns_of(driver, turns)]
        stats = driver.stats
        assert (stats.reused_tokens, stats.prefix_hits) == ((8 + 12 + 16, 3) if reuse else (0, 0))
        assert (stats.free_pages, stats.kept_pages > 0) == (engine.pages, reuse)
    for found, read in zip(answers[True], answers[False], strict=True):
        assert found.out == read.out
        np.testing.assert_allclose(found.completion.logp_T, read.completion.logp_T, **CLOSE)
        check(tiny, found)
        check(tiny, read)


def test_samples_that_come_late_find_the_prompt_of_one_that_runs_or_has_ended():
    engine = Tagged(2, 20)
    driver = Driver(engine, 0)
    prompt = list(range(11))
    first = driver.submit(prompt, Sampling(max_tokens=20, seed=0))
    driver.tick()
    late = serve(driver, prompt, max_tokens=3, seed=1)
    assert first.completion and driver.stats.prefill_tokens == 11 + 3
    later = serve(driver, prompt, max_tokens=3, seed=2)
    assert driver.stats.prefill_tokens == 11 + 3 + 3
    for request in (first, late, later):
        check_integers(request, engine)


def test_a_preempted_row_finds_what_nobody_needed_in_between():
    engine = Tagged(2, 10)
    driver = Driver(engine, 0)
    rows = [driver.submit([i] * 3, Sampling(max_tokens=20)) for i in range(2)]
    driver.run()
    stats = driver.stats
    assert stats.preempted == 1 and stats.reused_tokens > 0
    for request in rows:
        check_integers(request, engine)


def test_pages_of_other_weights_are_found_by_nobody_new():
    engine = Tagged(2, 20)
    driver = Driver(engine, 0)
    old = serve(driver, list(range(9)), max_tokens=8)
    crossing = driver.submit(list(range(20, 29)), Sampling(max_tokens=12))
    for _ in range(5):
        driver.tick()
    assert driver.stats.kept_pages == 4 and driver.pages_by_version == {0: 4 + 4}
    driver.push(1, 1)
    # Two tokens of the fourth page of the row are of version 0, two will be of version 1.
    assert driver.stats.kept_pages == 0 and driver.pages_by_version == {0: 3, None: 1}
    driver.run()
    assert crossing.completion.versions == (0,) * 6 + (1,) * 6
    assert driver.stats.kept_pages == 0  # the last page is of version 1, but over keys of version 0
    for said in (old, crossing):
        again = serve(driver, said.prompt + said.out, max_tokens=2, seed=1)
        check_integers(again, engine)
    assert driver.stats.reused_tokens == 0 < driver.stats.kept_pages


@given(st.randoms(use_true_random=False))
def test_every_page_says_which_version_wrote_it(rng):
    engine = Tagged(3, 16)
    driver, version = Driver(engine, 0, prefill_tokens=8), 0
    for _ in range(60):
        if rng.random() < 0.4:
            tokens = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
            driver.submit(tokens, Sampling(max_tokens=rng.randint(1, 20)))
        if rng.random() < 0.15:
            version += 1
            policy = rng.choice(("drain", "in_flight", "abort_and_resume"))
            driver.push(version, version, policy=policy)
        driver.tick()
        core = driver._batch
        wrote_PS = core._state.by_PS
        for request in core._running():
            for start in range(0, request.cached, 4):
                page = request.pages[start // 4]
                said = core._pages._writer[page]
                wrote = set(wrote_PS[page, : request.cached - start])
                assert wrote == {said} or said is None
                assert said is not None or len(wrote | {driver.stats.version}) > 1
        for page in core._pages._kept:
            assert set(wrote_PS[page]) == {driver.stats.version}


@pytest.mark.parametrize("how", ("flush", "failure", "push"))
def test_a_flush_a_failure_and_a_push_leave_nothing_to_find(how):
    engine = Tagged(2, 20)
    driver = Driver(engine, 0)
    request = serve(driver, list(range(9)), max_tokens=8)
    running = driver.submit(list(range(30, 39)), Sampling(max_tokens=9))
    driver.tick()
    assert driver.stats.kept_pages == 4
    match how:
        case "flush":
            driver.flush()
        case "failure":
            driver.submit([96], Sampling(max_tokens=1))
            driver.tick()
        case "push":
            driver.push(1, 1, policy="abort_and_resume")
    assert driver.stats.kept_pages == 0
    driver.run()
    again = serve(driver, request.prompt + request.out, max_tokens=2)
    assert driver.stats.reused_tokens == 0
    for served in (running, again):
        check_integers(served, engine)


def test_what_was_written_before_logits_broke_is_found_by_nobody():
    class Breaking(Tagged):
        def decode(self, params, state, table_BP, active_B):
            state, step = super().decode(params, state, table_BP, active_B)
            if state.index_B.max() == 12:
                step.draw.logp_B[:] = np.nan
            return state, step

    driver = Driver(Breaking(1, 10), 0)
    serve(driver, list(range(9)), max_tokens=2)
    assert driver.stats.kept_pages == 2
    request = serve(driver, list(range(9)), max_tokens=20)
    assert request.completion.finish == "error" and len(request.out) == 11
    assert driver.stats.kept_pages == 0


def test_without_reuse_nothing_is_kept():
    driver = Driver(Tagged(2, 20), 0, reuse=False)
    for _, stats in turns_of(driver, [(9, 9), (2, 9)]):
        assert (stats.kept_pages, stats.reused_tokens, stats.prefix_hits) == (0, 0, 0)


def test_what_is_kept_makes_room_for_any_row_and_no_table_grows():
    engine = Tagged(2, 10)
    driver = Driver(engine, 0)
    for i in range(400):
        request = serve(driver, [i % 96, i // 96, *range(i % 30)], max_tokens=1 + i % 8)
        check_integers(request, engine)
        assert driver.stats.kept_pages <= engine.pages and largest_table(driver) < 100
    assert idle(driver, engine)


def test_experts_of_a_row_that_other_weights_began_are_not_those_kept_with_its_pages(tiny, engine):
    cfg, new = tiny[0], weights(tiny[0], 5)
    driver = Driver(engine, tiny[1])
    (prompt,) = random_prompts(3, [6])
    row = driver.submit(prompt, Sampling(max_tokens=12, seed=1))
    for _ in range(4):
        driver.tick()
    driver.push(new, 1, policy="abort_and_resume")
    driver.run()
    after = serve(driver, prompt + row.out, max_tokens=3)
    assert driver.stats.reused_tokens == 16
    check((cfg, new), after)


def test_an_engine_with_drafts_finds_prefixes_and_draws_as_one_without():
    cfg = config.tiny()
    params, turns = weights(cfg, 0), [(5, 4), (3, 4), (1, 3), (4, 5)]
    sizes = dict(slots=3, pages=11, page=4, max_tokens=ROW, buckets=(8,), routes=True)
    drafting = Driver(GlmEngine(cfg, draft=3, **sizes), params)
    plain = Driver(GlmEngine(cfg, **sizes), params, reuse=False)
    both = turns_of(drafting, turns), turns_of(plain, turns)
    for (one, _), (two, _) in zip(*both, strict=True):
        assert one.out == two.out
        check((cfg, params), one)
    stats = drafting.stats
    assert (stats.reused_tokens, stats.prefix_hits) == (8 + 12 + 16, 3)
    assert stats.drafted > 0
