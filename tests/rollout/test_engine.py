"""Engine = trainer: whatever the buckets, chunks, pages, slots and neighbours of a request, its
log-probs are those of one forward pass over its tokens, and its draws are its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.rollout import engine as engine_lib
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling, generate
from glm45_jax.rollout.types import Seat
from tests.rollout.common import (
    CLOSE,
    MIXERS,
    check,
    forward,
    mixed,
    random_prompts,
    reference,
    serve,
    weights,
)


@pytest.mark.parametrize("chunks", [(8, 8, 7), (4, 4, 4, 4, 4, 3), (1,) * 23, (3, 8, 1, 8, 3)])
def test_every_bucket_and_chunk_size_gives_the_log_probs_of_one_forward_pass(tiny, engine, chunks):
    _, params = tiny
    (prompt,) = random_prompts(1, [23])
    pages = np.random.default_rng(2).permutation(engine.pages)[:8].tolist()
    state, at, asked = engine.init(), 0, Sampling(temperature=0.7, max_tokens=9, seed=3)
    for n in chunks:
        state, last = engine.prefill(params, state, prompt[at : at + n], at, pages)
        at += n
    slot = len(chunks) % engine.slots
    state, step = engine.insert(state, [Seat(last, slot, at, 0, asked)])
    draws = [[np.asarray(x)[0] for x in jax.tree.leaves(step.draw)]]
    table_BP = np.full((engine.slots, 8), -1, np.int32)
    table_BP[slot] = pages
    active_B = np.arange(engine.slots) == slot
    for _ in range(8):
        state, step = engine.decode(params, state, table_BP, active_B)
        draws.append([x[slot] for x in jax.tree.leaves(step.draw)])
    out, logp_T, raw_T = (np.asarray(x) for x in zip(*draws, strict=True))
    want_T, want_raw_T, _ = reference(tiny, prompt, out.tolist(), 0.7)
    np.testing.assert_allclose(logp_T, want_T, **CLOSE)
    np.testing.assert_allclose(raw_T, want_raw_T, **CLOSE)


def test_rows_that_join_leave_and_are_cancelled_have_the_log_probs_and_routes_of_one_forward(
    tiny, engine
):
    driver = Driver(engine, tiny[1], prefill_tokens=8)
    requests = []
    for i, (tokens, sampling) in enumerate(mixed(5, 20)):
        requests.append(driver.submit(tokens, sampling))
        driver.tick()
        if i % 6 == 5:
            driver.cancel(requests[-2])
    driver.run()
    stats = driver.stats
    assert stats.cancelled and stats.cancelled + stats.length == 20
    assert stats.decode_steps < stats.output_tokens  # several rows a step
    assert (stats.free_slots, stats.free_pages) == (engine.slots, engine.pages)
    for request in requests:
        if request.out:
            check(tiny, request)


def test_draws_do_not_depend_on_slot_neighbours_or_preemption(tiny, engine):
    asked = mixed(6, 12, least=9)
    alone, quiet = serve(engine, tiny[1], asked, together=False)
    moved, stats = serve(engine, tiny[1], asked)
    assert quiet.preempted == 0 < stats.preempted
    for one, two in zip(alone, moved, strict=True):
        assert one.out == two.out
        np.testing.assert_allclose(two.completion.logp_T, one.completion.logp_T, **CLOSE)
        np.testing.assert_array_equal(two.completion.routes_TLA, one.completion.routes_TLA)
        check(tiny, two)


def test_greedy_tokens_are_those_of_generate_up_to_the_stop_id(tiny, engine):
    cfg, params = tiny
    given = random_prompts(7, [1, 4, 9, 17, 3])
    free = generate(params, given, cfg=cfg, max_tokens=8, key=jax.random.key(0))
    stop = (free[1][2], free[3][4])
    want = generate(params, given, cfg=cfg, max_tokens=8, stop=stop, key=jax.random.key(0))
    ask = Sampling(temperature=0, max_tokens=8, stop=stop)
    requests, _ = serve(engine, params, [(p, ask) for p in given])
    assert [r.out for r in requests] == want
    for request in requests:
        ended = request.out[-1] in stop
        assert request.completion.finish == ("stop" if ended else "length")
        assert len(request.completion.logp_raw_T) == len(request.out)  # the stop id has its own
        check(tiny, request)


def test_the_likeliest_tokens_come_with_each_draw_as_the_forward_pass_ranks_them(tiny, engine):
    top = dataclasses.replace(engine, top_logprobs=5)
    asked = mixed(12, 6, least=3)
    plain, _ = serve(engine, tiny[1], asked)
    requests, _ = serve(top, tiny[1], asked)
    assert [r.out for r in requests] == [r.out for r in plain]
    assert plain[0].completion.top_ids_TK is plain[0].piece(0).top_logp_TK is None
    for request in requests:
        done, n = request.completion, len(request.out)
        logits_TV, _ = forward(tiny, request.prompt + request.out)
        raw_TV = np.asarray(jax.nn.log_softmax(logits_TV[len(request.prompt) - 1 : -1]))
        want_TK = -np.sort(-raw_TV, axis=-1)[:, :5]
        assert done.top_ids_TK.shape == done.top_logp_TK.shape == (n, 5)
        assert (done.top_ids_TK.dtype, done.top_logp_TK.dtype) == (np.int32, np.float32)
        np.testing.assert_allclose(done.top_logp_TK, want_TK, **CLOSE)
        at_TK = np.take_along_axis(raw_TV, done.top_ids_TK, axis=-1)
        np.testing.assert_allclose(done.top_logp_TK, at_TK, **CLOSE)
        piece = request.piece(n - 1)
        np.testing.assert_array_equal(piece.top_ids_TK, done.top_ids_TK[-1:])
        np.testing.assert_array_equal(piece.top_logp_TK, done.top_logp_TK[-1:])


def test_samples_of_a_group_share_the_pages_of_their_prompt_and_nothing_else(tiny, engine):
    (prompt,) = random_prompts(8, [14])
    asked = [(prompt, Sampling(max_tokens=5 + i, seed=i)) for i in range(5)]
    alone, _ = serve(engine, tiny[1], asked, together=False)
    group, stats = serve(engine, tiny[1], asked)
    assert (stats.prefill_tokens, stats.shared_tokens) == (14, 4 * 14)
    assert [r.out for r in group] == [r.out for r in alone]
    assert len({tuple(r.out[:5]) for r in group}) == 5
    for request in group:
        check(tiny, request)


@pytest.mark.parametrize("flush", (False, True), ids=("in_flight", "flush"))
def test_a_push_changes_the_weights_of_later_tokens_and_says_so(tiny, engine, flush):
    cfg, old = tiny
    new = weights(cfg, 1)
    (prompt,) = random_prompts(9, [6])
    driver = Driver(engine, old, version=4)
    request = driver.submit(prompt, Sampling(max_tokens=10, seed=1))
    for _ in range(3):
        driver.tick()
    driver.push(new, 7)
    if flush:
        driver.flush()
    driver.run()
    done = request.completion
    assert done.versions == (4,) * 4 + (7,) * 6
    before_T = reference((cfg, old), prompt, request.out, 1.0)[0]
    after_T = reference((cfg, new), prompt, request.out, 1.0)[0]
    np.testing.assert_allclose(done.logp_T[:4], before_T[:4], **CLOSE)
    # Over old keys and values the new weights are not those of any forward pass.
    assert np.allclose(done.logp_T[4:], after_T[4:], **CLOSE) == flush
    assert not np.allclose(done.logp_T[4:], before_T[4:], atol=1e-3)


def test_it_compiles_no_more_than_buckets_and_spans_whatever_it_served_before(tiny, engine):
    serve(engine, tiny[1], mixed(10, 20))
    spans = len(engine.spans) + 1  # and the whole row
    limits = {
        engine_lib.prefill: len(engine.buckets) * spans,
        engine_lib.insert: 1,
        engine_lib.decode: spans,
    }
    kinds = 2 * len(MIXERS)  # with and without top log-probs
    for function, limit in limits.items():  # all other tests of this file are in the count
        assert function._cache_size() <= limit * kinds


def test_logits_that_are_not_finite_fail_the_request_and_leave_nothing_in_the_pages(tiny, engine):
    _, params = tiny
    driver = Driver(engine, params.replace(embed_VD=params.embed_VD * jnp.nan), version=3)
    asked = [(p, Sampling(max_tokens=12, seed=2)) for p in random_prompts(13, [20, 3, 17])]
    for request in [driver.submit(*ask) for ask in asked]:
        driver.run()
        assert request.completion.finish == "error"
        assert "weights of version 3" in request.completion.error
    driver.push(params, 4)
    for request in [driver.submit(*ask) for ask in asked]:
        driver.run()
        assert request.completion.finish == "length"
        check(tiny, request)
    assert driver.stats.free_pages == engine.pages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pages=3), "max_tokens 32 takes 8 pages of 4, there are 3; use at most 12"),
        (dict(buckets=(8, 4)), "do not rise"),
        (dict(spans=(0, 4)), "do not rise"),
        (dict(buckets=()), "buckets are empty"),
        (dict(slots=0), "must be positive"),
        (dict(top_logprobs=257), "257 is not a count of tokens up to the vocabulary's 256"),
        (dict(top_logprobs=-1), "top_logprobs -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_at_the_door(engine, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(engine, **change)


def test_routes_need_experts(engine):
    dense = dataclasses.replace(engine.cfg, n_dense=2, n_moe=0)
    with pytest.raises(ValueError, match="without MoE layers"):
        GlmEngine(dense, routes=True)
