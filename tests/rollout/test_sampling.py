"""Sampling: greedy is the model's own argmax, slots do not matter to each other, draws follow the
distribution asked for, and the log-probs are those of the whole one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.rollout.sampling import Sampling, generate, knobs, sample, sample_each
from tests.rollout.common import forward

N = 20_000  # draws: four standard errors of a share are below 0.015


def draws(logits_V, sampling, n=N):
    """Shares of n draws with seeds of their own."""
    logits_BV = jnp.tile(jnp.asarray(logits_V, jnp.float32)[None], (n, 1))
    rows = knobs([sampling] * n).replace(seed_B=np.arange(n, dtype=np.uint32))
    draw = sample(logits_BV, rows, jnp.zeros(n, jnp.int32))
    return np.bincount(np.asarray(draw.token_B), minlength=len(logits_V)) / n, draw


def test_greedy_continuations_are_the_argmax_of_the_forward_pass_whatever_the_other_rows(tiny):
    cfg, params = tiny
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6]]

    def run(seed=0, **asked):
        return generate(params, prompts, cfg=cfg, max_tokens=4, key=jax.random.key(seed), **asked)

    out = run()
    for prompt, continuation in zip(prompts, out, strict=True):
        logits_TV, _ = forward(tiny, prompt + continuation)
        assert continuation == logits_TV.argmax(axis=-1)[len(prompt) - 1 : -1].tolist()
    cut = run(stop=(out[0][1],))[0]  # a stop id ends a row and is kept
    assert cut == out[0][: out[0].index(out[0][1]) + 1]
    warm = run(temperature=3.0)  # the key decides, and each row draws its own
    assert warm == run(temperature=3.0) != run(seed=1, temperature=3.0)


def test_an_empty_prompt_is_refused(tiny):
    cfg, params = tiny
    with pytest.raises(ValueError, match="the shortest of 0 tokens"):
        generate(params, [[1], []], cfg=cfg, max_tokens=1, key=jax.random.key(0))


P = np.asarray([0.05, 0.4, 0.15, 0.3, 0.1])


def kept(*tokens, power=1.0):
    """P^power over these tokens alone."""
    share = np.where(np.isin(np.arange(5), tokens), P, 0) ** power
    return share / share.sum()


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        (dict(), P),
        (dict(temperature=2.0), kept(0, 1, 2, 3, 4, power=0.5)),
        (dict(top_k=2), kept(1, 3)),
        (dict(top_k=9), P),
        (dict(top_p=0.69), kept(1, 3)),
        (dict(top_p=0.71), kept(1, 2, 3)),  # the token that passes the mark stays
        (dict(top_p=1e-9), kept(1)),
        (dict(min_p=0.3), kept(1, 2, 3)),
        (dict(min_p=1.0), kept(1)),
        (dict(top_k=3, top_p=0.8), kept(1, 3)),  # 0.7 of the 0.85 that top_k leaves
        (dict(temperature=0.5, top_p=0.85), kept(1, 3, power=2.0)),  # at the temperature
        (dict(temperature=0.0), kept(1)),
    ],
    ids=str,
)
def test_draws_follow_the_distribution_asked_for(asked, want):
    share, draw = draws(np.log(P), Sampling(**asked))
    np.testing.assert_allclose(share, want, atol=0.015)
    assert not share[want == 0].any()
    heat = asked.get("temperature", 1.0)
    token_B = np.asarray(draw.token_B)
    np.testing.assert_allclose(draw.logp_raw_B, np.log(P)[token_B], atol=1e-6)
    whole = np.log(P ** (1 / heat) / (P ** (1 / heat)).sum())[token_B] if heat else 0 * token_B
    np.testing.assert_allclose(draw.logp_B, whole, atol=1e-6)  # not the truncated distribution
    assert draw.logp_B.dtype == draw.logp_raw_B.dtype == jnp.float32


def test_ties_with_the_last_token_kept_stay():
    share, _ = draws([0.0, 1.0, 1.0, 1.0], Sampling(top_k=2))
    np.testing.assert_allclose(share, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.015)


def test_a_draw_depends_on_its_seed_and_index_alone():
    rng = np.random.default_rng(0)
    asks = [
        Sampling(
            temperature=rng.choice([0.0, 0.5, 1.0, 3.0]),
            top_p=rng.choice([1.0, 0.7]),
            top_k=int(rng.choice([0, 7])),
            min_p=rng.choice([0.0, 0.1]),
            seed=int(rng.integers(2**32)),
        )
        for _ in range(16)
    ]
    logits_BV = jnp.asarray(rng.normal(size=(16, 300)) * 3, jnp.float32)
    index_B = jnp.asarray(rng.integers(0, 1000, 16), jnp.int32)
    together = sample(logits_BV, knobs(asks), index_B)
    order = rng.permutation(16)  # other slots
    moved = sample(logits_BV[order], knobs([asks[i] for i in order]), index_B[order])
    for one, two in zip(jax.tree.leaves(together), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[order], two)
    for i in range(16):  # another batch: neither what is sorted nor what is drawn is the same
        alone = sample(logits_BV[i : i + 1], knobs(asks[i : i + 1]), index_B[i : i + 1])
        assert alone.token_B[0] == together.token_B[i]
        np.testing.assert_allclose(alone.logp_B[0], together.logp_B[i], atol=1e-6)


def test_draws_in_a_row_are_those_of_one_token_after_another_and_so_are_the_likeliest():
    rng = np.random.default_rng(1)
    asks = [Sampling(temperature=t, top_k=k, seed=i) for i, (t, k) in enumerate([(1, 0), (0, 5)])]
    logits_BTV = jnp.asarray(rng.normal(size=(2, 3, 50)) * 3, jnp.float32)
    index_B = jnp.asarray([7, 0], jnp.int32)
    row = sample_each(logits_BTV, knobs(asks), index_B, top=4)
    for t in range(3):
        one = sample(logits_BTV[:, t], knobs(asks), index_B + t, top=4)
        for together, alone in zip(jax.tree.leaves(row), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(together[:, t], alone, atol=1e-6)
    logp_BTV = np.asarray(jax.nn.log_softmax(logits_BTV, axis=-1))
    best_BTK = np.argsort(-logp_BTV, axis=-1)[:, :, :4]
    np.testing.assert_array_equal(row.top_ids_BK, best_BTK)
    want_BTK = np.take_along_axis(logp_BTV, best_BTK, axis=-1)  # at temperature 1, nothing cut
    np.testing.assert_allclose(row.top_logp_BK, want_BTK, atol=1e-6)


def test_other_seeds_and_other_indices_are_other_draws():
    logits_BV = jnp.zeros((64, 1000), jnp.float32)
    seeds = knobs([Sampling(seed=i) for i in range(64)])
    same = knobs([Sampling(seed=5)] * 64)
    step_B, zero_B = jnp.arange(64, dtype=jnp.int32), jnp.zeros(64, jnp.int32)
    for rows, index_B, least in ((seeds, zero_B, 50), (same, step_B, 50)):
        assert len(set(np.asarray(sample(logits_BV, rows, index_B).token_B).tolist())) > least
    assert len(set(np.asarray(sample(logits_BV, same, zero_B).token_B).tolist())) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(temperature=float("nan")), "temperature nan is neither 0 nor"),
        (dict(temperature=float("inf")), "temperature inf"),
        (dict(temperature=-1.0), "temperature -1.0"),
        (dict(temperature=1e-9), "use 0 for greedy"),
        (dict(top_p=0.0), r"top_p 0.0 is not in \(0, 1\]"),
        (dict(top_p=1.01), "top_p 1.01"),
        (dict(top_p=float("nan")), "top_p nan"),
        (dict(min_p=-0.1), "min_p -0.1"),
        (dict(min_p=float("nan")), "min_p nan"),
        (dict(top_k=-1), "top_k -1"),
        (dict(top_k=2.0), "top_k 2.0"),
        (dict(top_k=2**31), "below 2"),
        (dict(max_tokens=0), "max_tokens 0"),
        (dict(seed=-1), "seed -1"),
        (dict(seed=2**32), "seed 4294967296"),
        (dict(stop=[1]), r"stop \[1\] is not a tuple"),
        (dict(stop=(-1,)), "stop"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_at_the_door(asked, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**asked)
