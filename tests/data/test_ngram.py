"""Laws of the n-gram baselines: they are distributions, and they find the entropy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.data.ngram import bigram_nats, fit_bigram, unigram_nats


def markov_chain(key: int, vocab: int, length: int) -> tuple[np.ndarray, float]:
    """Tokens of a random chain and its entropy rate in nats."""
    random = np.random.default_rng(key)
    step_VV = random.dirichlet(np.full(vocab, 0.3), size=vocab)
    cumulative_VV = np.cumsum(step_VV, axis=1)
    tokens, uniform = [0], random.random(length)
    for u in uniform:
        tokens.append(min(int(np.searchsorted(cumulative_VV[tokens[-1]], u)), vocab - 1))
    values, vectors = np.linalg.eig(step_VV.T)
    stationary_V = np.real(vectors[:, np.argmax(np.real(values))])
    stationary_V = stationary_V / stationary_V.sum()
    entropy_V = -(step_VV * np.log(np.maximum(step_VV, 1e-300))).sum(axis=1)
    return np.array(tokens), float(stationary_V @ entropy_V)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12).flatmap(lambda v: st.tuples(st.just(v), token_lists(v))))
def test_the_probabilities_after_every_token_sum_to_one(case):
    vocab, tokens = case
    bigram = fit_bigram(np.array(tokens), vocab)
    prev_VV, next_VV = np.meshgrid(np.arange(vocab), np.arange(vocab), indexing="ij")
    p_VV = np.exp(bigram.log_prob(prev_VV, next_VV))
    np.testing.assert_allclose(p_VV.sum(axis=1), 1, rtol=1e-12)
    assert (p_VV > 0).all()


def token_lists(vocab):
    return st.lists(st.integers(0, vocab - 1), min_size=2, max_size=60)


def test_the_bigram_reaches_the_entropy_rate_of_a_markov_chain():
    tokens, entropy = markov_chain(key=3, vocab=24, length=300_000)
    train, val = tokens[:250_000], tokens[250_000:]
    found = bigram_nats(train, val, 24)
    assert abs(found - entropy) < 0.01
    assert unigram_nats(train, val, 24) > entropy + 0.3
    little = bigram_nats(train[:2_000], val, 24)
    assert little > found + 0.02


def test_without_any_order_both_baselines_find_the_entropy_of_the_unigram():
    random = np.random.default_rng(0)
    p_V = random.dirichlet(np.ones(50))
    train, val = random.choice(50, size=400_000, p=p_V), random.choice(50, size=40_000, p=p_V)
    entropy = -(p_V * np.log(p_V)).sum()
    assert abs(unigram_nats(train, val, 50) - entropy) < 0.02
    assert abs(bigram_nats(train, val, 50) - entropy) < 0.03


def test_windows_count_the_targets_of_a_model_that_reads_them():
    random = np.random.default_rng(1)
    train, val = random.integers(0, 9, 500), random.integers(0, 9, (6, 11))
    pairs = [w[i : i + 2] for w in val for i in range(10)]
    one_by_one = [bigram_nats(train, pair, 9) for pair in pairs]
    assert bigram_nats(train, val, 9) == pytest.approx(np.mean(one_by_one))
    targets = [unigram_nats(train, pair, 9) for pair in pairs]
    assert unigram_nats(train, val, 9) == pytest.approx(np.mean(targets))


def test_a_hand_counted_bigram():
    # pairs ab ab ac: discount = 1/(1 + 2*1) for pairs (ba, ac once; ab twice) with n1=2, n2=1.
    bigram = fit_bigram(np.array([0, 1, 0, 1, 0, 2]), 3)
    discount = 1 / 3  # of continuation counts: a after b only, b and c after a only
    pairs = {(0, 1): 2, (1, 0): 2, (0, 2): 1}
    ones, twos = 1, 2
    pair_discount = ones / (ones + 2 * twos)
    lower = (1 - 1.0) / 3 + 1.0 * 3 / 3 / 3  # three ids, one context each: discount 3/(3+0) = 1
    assert discount == pytest.approx(lower)
    expected = (pairs[0, 1] - pair_discount) / 3 + pair_discount * 2 / 3 * lower
    assert np.exp(bigram.log_prob(np.array(0), np.array(1))) == pytest.approx(expected)
    unseen = np.exp(bigram.log_prob(np.array(2), np.array([0, 1, 2])))
    np.testing.assert_allclose(unseen, lower)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=r"ids 0\.\.9 are outside vocab 9"):
        bigram_nats(np.arange(10), np.arange(5), 9)
    with pytest.raises(ValueError, match=r"ids -1\.\.3 are outside vocab 9"):
        unigram_nats(np.arange(9), np.array([3, -1]), 9)
    with pytest.raises(ValueError, match="give one stream of >= 2"):
        fit_bigram(np.zeros((2, 3)), 4)
    with pytest.raises(ValueError, match="windows need >= 2 tokens"):
        bigram_nats(np.arange(5), np.array([1]), 5)
