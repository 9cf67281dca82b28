"""Laws of the dynamic temperature: never a hotter one than the guard allows, never one before the
reward stands still."""

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.rl.temperature import Dynamic, Phase, due, largest, observe, settle, stable

scores = st.dictionaries(
    st.sampled_from([0.6, 0.8, 1.0, 1.2, 1.4]), st.floats(0, 1), min_size=1, max_size=5
)


@given(score=scores, within=st.floats(0, 0.5), relative=st.booleans())
def test_the_choice_is_within_the_guard_and_no_hotter_one_is(score, within, relative):
    best = max(score.values())
    least = best * (1 - within) if relative else best - within
    chosen = largest(score, within=within, relative=relative)
    assert score[chosen] >= least - 1e-9
    assert all(one < least + 1e-9 for hot, one in score.items() if hot > chosen)


@given(score=scores, smaller=st.floats(0, 0.2), larger=st.floats(0, 0.2))
def test_a_wider_guard_is_never_colder(score, smaller, larger):
    smaller, larger = sorted((smaller, larger))
    assert largest(score, within=smaller) <= largest(score, within=larger)


def test_a_score_one_point_below_the_best_is_within_and_points_are_absolute():
    score = {0.8: 0.80, 1.0: 0.79, 1.2: 0.789, 1.4: 0.5}
    assert largest(score, within=0.01) == 1.0
    low = {0.8: 0.100, 1.0: 0.091, 1.2: 0.08}
    assert largest(low, within=0.01) == 1.0
    assert largest(low, within=0.01, relative=True) == 0.8


def rounds(dynamic, phase, rewards):
    """The phases after each round."""
    for reward in rewards:
        phase = observe(dynamic, phase, reward)
        yield phase


def test_a_rising_reward_is_left_alone_and_a_flat_one_is_not():
    dynamic = Dynamic(period=None)
    rising = rounds(dynamic, Phase(1.0), [0.01 * i for i in range(60)])
    assert not any(due(dynamic, phase) for phase in rising)
    *before, last = rounds(dynamic, Phase(1.0), [0.5] * dynamic.window)
    assert due(dynamic, last) and not any(due(dynamic, phase) for phase in before)


def test_noise_without_a_trend_is_stable_and_noise_with_one_is_not():
    rng = random.Random(0)
    flat = [[0.5 + rng.uniform(-0.02, 0.02) for _ in range(40)] for _ in range(50)]
    risen = [[x + 0.005 * i for i, x in enumerate(one)] for one in flat]
    assert sum(stable(one, 1e-3) for one in flat) >= 48
    assert not any(stable(one, 1e-3) for one in risen)
    assert not any(stable(one[::-1], 1e-3) for one in risen)  # a fall is no convergence


def test_the_period_asks_for_scores_even_while_the_reward_moves():
    dynamic = Dynamic(period=30)
    seen = list(rounds(dynamic, Phase(1.0), [0.01 * i for i in range(30)]))
    assert [due(dynamic, phase) for phase in seen] == [False] * 29 + [True]


def test_a_new_phase_counts_anew_and_may_be_colder():
    dynamic = Dynamic(grid=(0.8, 1.0, 1.2), window=4)
    *_, flat = rounds(dynamic, Phase(1.0), [0.5] * 4)
    hot = settle(dynamic, flat, {0.8: 0.60, 1.0: 0.61, 1.2: 0.605})
    assert hot == Phase(1.2) and not due(dynamic, hot)
    cold = settle(dynamic, hot, {0.8: 0.60, 1.0: 0.55, 1.2: 0.1})
    assert cold == Phase(0.8)


@given(rewards=st.lists(st.floats(0, 1), max_size=30), cut=st.integers(0, 30))
def test_a_phase_survives_as_json(rewards, cut):
    dynamic = Dynamic(window=6)
    whole = Phase(1.0)
    for reward in rewards:
        whole = observe(dynamic, whole, reward)
    half = Phase(1.0)
    for i, reward in enumerate(rewards):
        if i == cut:
            body = json.loads(json.dumps(dataclasses.asdict(half)))
            half = Phase(**body | {"rewards": tuple(body["rewards"])})
        half = observe(dynamic, half, reward)
    assert half == whole and len(whole.rewards) <= 6


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match=r"scores are of \[1.0\], the grid is"):
        settle(Dynamic(), Phase(1.0), {1.0: 0.5})
    for score in ({}, {1.0: float("nan")}):
        with pytest.raises(ValueError, match="has to be finite"):
            largest(score, within=0.01)
    with pytest.raises(ValueError, match="reward of round 0 is inf"):
        observe(Dynamic(), Phase(1.0), float("inf"))
    for wrong in ({"grid": (1.0, 0.8)}, {"grid": ()}, {"grid": (0.0, 1.0)}):
        with pytest.raises(ValueError, match="rising temperatures over 0"):
            Dynamic(**wrong)
    with pytest.raises(ValueError, match=">= 4 rounds"):
        Dynamic(window=3)
    with pytest.raises(ValueError, match="period 0"):
        Dynamic(period=0)
