"""Drafts change how many tokens a step draws, never which: an engine with drafts is the engine
without them, greedy or sampled, whatever MTP guesses and whoever shares pages with whom.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.model import config, mtp, transformer
from glm45_jax.model.cache import KVCache
from glm45_jax.rollout import engine as engine_lib
from glm45_jax.rollout import speculative
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Seat
from tests.rollout.common import (
    CLOSE,
    MIXERS,
    ROW,
    check,
    mixed,
    random_prompts,
    reference,
    serve,
    weights,
)

JITTED = (engine_lib.prefill, engine_lib.insert, engine_lib.decode)


@pytest.fixture(scope="module", params=MIXERS)
def drafter(request):
    cfg = dataclasses.replace(config.tiny(), mixer=MIXERS[request.param])
    return cfg, weights(cfg, 0)


def small(cfg, draft=3, **options):
    """Fewer pages than the rows could fill: long outputs meet preemption."""
    sizes = dict(slots=3, pages=11, page=4, max_tokens=ROW, buckets=(8,), routes=True)
    return GlmEngine(cfg, draft=draft, **(sizes | options))


def roomy(cfg):
    """Pages for all rows."""
    return small(cfg, pages=32, top_logprobs=2)


def clairvoyant(cfg):
    """Weights whose MTP knows what the model will say: no layer does anything, and MTP reads the
    token alone, as the model does.
    """
    params = weights(cfg, 1)

    def idle(block):
        zeros = jnp.zeros_like(block.norm_mixer_D)
        return block.replace(norm_mixer_D=zeros, norm_ffn_D=zeros)

    eye_DD = jnp.eye(cfg.d_model)
    join_12DD = jnp.stack([eye_DD, 0 * eye_DD])[None]
    return params.replace(
        embed_VD=params.embed_VD * 100,  # or the norm's epsilon shows
        dense=idle(params.dense),
        moe=idle(params.moe),
        mtp=params.mtp.replace(block=idle(params.mtp.block), join_2DD=join_12DD),
    )


@pytest.mark.parametrize(
    ("mixer", "draft"),
    [("gqa", 1), pytest.param("gqa", 2, marks=pytest.mark.slow), ("gqa", 3), ("mla", 3)],
)
def test_outputs_are_those_of_the_engine_without_drafts_and_of_one_forward_pass(mixer, draft):
    cfg = dataclasses.replace(config.tiny(), mixer=MIXERS[mixer])
    params, asked = weights(cfg, 0), mixed(6, 16, least=9)
    asked += [(asked[0][0], dataclasses.replace(asked[2][1], seed=i)) for i in range(4)]
    full = Sampling(max_tokens=12, temperature=2.0)  # to the last slot of a row
    asked += [(prompt, full) for prompt in random_prompts(3, [20])]
    plain, _ = serve(small(cfg, 0), params, asked)
    requests, stats = serve(small(cfg, draft), params, asked)
    assert min(stats.preempted, stats.shared_tokens) > 0
    right = [stats.drafted, stats.accepted_1, stats.accepted_2, stats.accepted_3]
    assert stats.drafted > stats.accepted_1 and (right[draft] > 0) and not any(right[draft + 1 :])
    for one, two in zip(plain, requests, strict=True):
        assert one.out == two.out
        np.testing.assert_allclose(two.completion.logp_T, one.completion.logp_T, **CLOSE)
        check((cfg, params), two)


@pytest.mark.parametrize("chunks", [(8, 8, 7), (4, 4, 4, 4, 4, 3), (1,) * 23, (3, 8, 1, 8, 3)])
def test_every_bucket_and_chunk_size_gives_the_log_probs_of_one_forward_pass(drafter, chunks):
    cfg, params = drafter
    engine, asked = small(cfg, buckets=(4, 8)), Sampling(temperature=2.0, seed=3)
    (prompt,) = random_prompts(1, [23])
    pages = np.random.default_rng(2).permutation(engine.pages)[:8].tolist()
    state, at = engine.init(), 0
    for n in chunks:
        state, last = engine.prefill(params, state, prompt[at : at + n], at, pages)
        at += n
    slot = len(chunks) % engine.slots
    state, step = engine.insert(state, [Seat(last, slot, at, 0, asked)])
    draws = [[x[0] for x in jax.tree.leaves(step.draw)]]
    table_BP = np.full((engine.slots, 8), -1, np.int32)
    table_BP[slot] = pages
    while len(draws) < 9:
        state, step = engine.decode(params, state, table_BP, np.arange(3) == slot)
        places = step.places(slot)
        assert 1 <= len(places) <= 4
        draws += [[x[place] for x in jax.tree.leaves(step.draw)] for place in places]
    out, logp_T, raw_T = (np.asarray(x) for x in zip(*draws[:9], strict=True))
    want_T, want_raw_T, _ = reference(drafter, prompt, out.tolist(), 2.0)
    np.testing.assert_allclose(logp_T, want_T, **CLOSE)
    np.testing.assert_allclose(raw_T, want_raw_T, **CLOSE)


@functools.partial(jax.jit, static_argnames="cfg")
def next_guess(params, state, table_BP, cfg):
    """MTP's logits of each slot's next draft."""
    table_BP = jnp.where(table_BP < 0, state.k_LPSKH.shape[1], table_BP)
    cache = KVCache(state.k_LPSKH, state.v_LPSKH, table_BP, state.length_B)
    everyone_B = jnp.ones_like(state.length_B, bool)
    guess_BD, _ = speculative.catch_up(params, state.ahead, cache, everyone_B, cfg=cfg)
    return transformer.logits(params, guess_BD[:, None], cfg=cfg)[:, 0]


@functools.partial(jax.jit, static_argnames="cfg")
def guesses(params, tokens_BT, cfg):
    """MTP's logits of every token, as the trainer computes them."""
    hidden = transformer.forward(params, tokens_BT, cfg=cfg)
    ahead_BTD = mtp.forward(params, hidden.hidden_BTD, tokens_BT, cfg=cfg)
    return transformer.logits(params, ahead_BTD, cfg=cfg)


def test_mtp_reads_what_the_trainer_gives_it_whatever_was_drafted_shared_or_preempted(drafter):
    cfg, params = drafter
    seen = []

    class Watched(GlmEngine):
        def decode(self, params, state, table_BP, active_B):
            running = [r for r in requests if r.status == "running"]
            tokens_BT = np.zeros((3, ROW), np.int32)
            for r in running:
                tokens_BT[r.slot, : len(r.tokens())] = r.tokens()
            want_BTV = np.asarray(guesses(params, tokens_BT, cfg))
            ours_BV = np.asarray(next_guess(params, state, table_BP, cfg))
            for r in running:
                np.testing.assert_allclose(ours_BV[r.slot], want_BTV[r.slot, r.cached - 1], **CLOSE)
            seen.extend(running)
            return super().decode(params, state, table_BP, active_B)

    sizes = {f.name: getattr(small(cfg), f.name) for f in dataclasses.fields(GlmEngine)}
    # Of rows that ended, the last tokens keep the entries of their drafts: nobody finds them here.
    driver = Driver(Watched(**sizes), params, reuse=False)
    asked = mixed(7, 8, least=9)
    asked += [(asked[1][0], dataclasses.replace(asked[2][1], seed=i)) for i in range(4)]
    requests = [driver.submit(*ask) for ask in asked]
    driver.run()
    stats = driver.stats
    assert min(stats.preempted, stats.shared_tokens, stats.accepted_2) > 0 and len(seen) > 50
    assert all(r.completion.finish == "length" for r in requests)


def test_a_drafter_that_knows_the_model_is_always_believed():
    cfg = config.tiny()
    params, engine = clairvoyant(cfg), roomy(cfg)
    (prompt,) = random_prompts(4, [7])
    compiled = [f._cache_size() for f in JITTED]
    asked = [(prompt, Sampling(max_tokens=21, seed=i, temperature=i % 2)) for i in range(4)]
    for ask in asked:
        (request,), stats = serve(engine, params, [ask])
        assert len(request.out) == 21 and stats.decode_steps == 5  # 1 + 5 x 4 tokens
        assert stats.drafted >= 4 and stats.accepted_3 == stats.drafted
        check((cfg, params), request)
    together, _ = serve(engine, params, asked)
    assert [f._cache_size() - n for f, n in zip(JITTED, compiled, strict=True)] == [1, 1, 1]
    plain, _ = serve(small(cfg, 0), params, asked)
    assert [r.out for r in together] == [r.out for r in plain]


def test_drafts_past_the_pages_of_a_row_are_not_believed():
    cfg = config.tiny()
    params, engine = clairvoyant(cfg), small(cfg)
    (prompt,) = random_prompts(4, [7])
    state, last = engine.prefill(params, engine.init(), prompt, 0, [5, 2])
    ask = Sampling(seed=1)
    state, step = engine.insert(state, [Seat(last, 1, 7, 0, ask)])
    out, counts = [int(step.draw.token_B[0])], []
    table_BP = np.full((3, 8), -1, np.int32)
    for row in ([5, 2], [5, 2, 7], [5, 2, 7, 0]):
        table_BP[1, : len(row)] = row
        state, step = engine.decode(params, state, table_BP, np.arange(3) == 1)
        out += [int(step.draw.token_B[place]) for place in step.places(1)]
        counts.append(int(step.count_B[1]))
    assert counts == [1, 4, 4]
    (plain,), _ = serve(small(cfg, 0), params, [(prompt, dataclasses.replace(ask, max_tokens=10))])
    assert out == plain.out


def test_a_stop_id_within_a_step_ends_the_output_there():
    cfg = config.tiny()
    params = clairvoyant(cfg)
    (prompt,) = random_prompts(4, [7])
    ask = Sampling(max_tokens=9, seed=5)
    (whole,), _ = serve(small(cfg, 0), params, [(prompt, ask)])
    assert len(set(whole.out)) == 9
    driver, told = Driver(roomy(cfg), params), []
    ends = [dataclasses.replace(ask, stop=(token,)) for token in whole.out]
    requests = [
        driver.submit(prompt, end, on_token=lambda r: told.append((r.seq, len(r.out))))
        for end in ends
    ]
    driver.run()
    for n, request in enumerate(requests, 1):
        done = request.completion
        assert (request.out, done.finish) == (whole.out[:n], "stop")
        assert [t for i, t in told if i == request.seq] == list(range(1, n + 1))
        lengths = map(len, (done.tokens_T, done.logp_T, done.versions, done.top_ids_TK))
        assert set(lengths) == {n}
        check((cfg, params), request)
    assert (driver.stats.free_pages, driver.stats.output_tokens) == (32, 45)


@pytest.mark.parametrize("asked", [dict(temperature=1.3), dict(top_k=3)], ids=str)
def test_sampled_outputs_with_drafts_follow_the_distribution_of_the_model(asked):
    """Pearson's chi-square over all three-token outputs."""
    n, V = 1500, 6
    cfg = dataclasses.replace(config.tiny(vocab=V), n_dense=0, n_moe=1)
    params, prompt = weights(cfg, 2), [3, 1, 4, 1, 5]
    engine = GlmEngine(cfg, slots=16, pages=64, page=8, max_tokens=8, buckets=(8,), draft=2)
    asks = [(prompt, Sampling(max_tokens=3, seed=i, **asked)) for i in range(n)]
    requests, stats = serve(engine, params, asks, prefill_tokens=64)
    assert stats.drafted > stats.accepted_1 > stats.accepted_2 > 0
    share_VVV = np.zeros((V, V, V))
    np.add.at(share_VVV, tuple(np.asarray([r.out for r in requests]).T), 1)

    pairs = list(itertools.product(range(V), range(V)))
    rows_BT = jnp.asarray([[*prompt, *pair] for pair in pairs], jnp.int32)
    logits_BTV = transformer.logits(params, transformer.forward(params, rows_BT, cfg=cfg), cfg=cfg)
    warm_BTV = np.array(logits_BTV[:, 4:]).reshape(V, V, 3, V) / asked.get("temperature", 1.0)
    least = np.sort(warm_BTV, axis=-1)[..., -asked.get("top_k", V), None]
    p = np.asarray(jax.nn.softmax(jnp.where(warm_BTV >= least, warm_BTV, -jnp.inf), axis=-1))
    want_VVV = n * p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]
    assert not share_VVV[want_VVV == 0].any()
    often = want_VVV >= 5
    cells = [(share_VVV[~often].sum(), want_VVV[~often].sum())]
    cells += zip(share_VVV[often], want_VVV[often], strict=True)
    chi2 = sum((got - want) ** 2 / want for got, want in cells if want > 0)
    freedom = len(cells) - 1
    assert freedom > 20 and chi2 < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("n_mtp", "draft", "message"),
    [
        (0, 1, "draft 1 needs the MTP layer, and this model has none"),
        (1, 4, "draft 4 is not in 0 to 3 tokens a step"),
        (1, -1, "draft -1 is not in 0 to 3"),
    ],
)
def test_drafts_that_cannot_be_are_refused_at_the_door(n_mtp, draft, message):
    cfg = dataclasses.replace(config.tiny(), n_mtp=n_mtp)
    with pytest.raises(ValueError, match=message):
        GlmEngine(cfg, draft=draft)
