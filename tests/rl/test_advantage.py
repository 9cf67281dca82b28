"""Laws of group advantages: goldens, shifts, scales, groups that agree."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from glm45_jax.rl.advantage import Centred, LeaveOneOut, Normalised, group_advantage, varies

# Fixed numbers of a public implementation (spec 7.5): never refreshed from this code.
GOLDEN = Path(__file__).parents[1] / "golden" / "extra" / "rl_loss.npz"
RULES = [Centred(), Normalised(), LeaveOneOut()]

shapes = st.tuples(st.integers(1, 5), st.integers(2, 9))
# Quarters: sums of a few are exact, so that equal means equal.
rewards = hnp.arrays(np.float64, shapes, elements=st.integers(-8, 8).map(lambda x: x / 4))


@pytest.mark.parametrize(
    "name, rule", [("adv_mean_only", Centred()), ("adv_normalised", Normalised())]
)
def test_advantages_equal_the_golden(name, rule):
    golden = np.load(GOLDEN)
    ours = group_advantage(golden["rewards"].reshape(2, 4), rule)
    assert ours.dtype == np.float32
    assert_allclose(ours.ravel(), golden[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@given(reward_CJ=rewards, shift=st.integers(-1000, 1000))
def test_a_constant_added_to_a_group_changes_nothing(rule, reward_CJ, shift):
    assert_array_equal(
        group_advantage(reward_CJ, rule), group_advantage(reward_CJ + float(shift), rule)
    )


@pytest.mark.parametrize("rule", RULES)
@given(reward_CJ=rewards)
def test_advantages_of_a_group_sum_to_zero_and_order_its_samples(rule, reward_CJ):
    advantage_CJ = group_advantage(reward_CJ, rule)
    assert_allclose(advantage_CJ.sum(axis=1), 0, atol=1e-5)
    better_CJJ = reward_CJ[:, :, None] > reward_CJ[:, None, :]
    assert (advantage_CJ[:, :, None] > advantage_CJ[:, None, :])[better_CJJ].all()


@pytest.mark.parametrize("rule", RULES)
@given(value=st.floats(-1e6, 1e6), J=st.integers(1, 9))
def test_a_group_that_agrees_has_advantage_exactly_zero(rule, value, J):
    reward_CJ = np.full((1, J), value)
    assert_array_equal(group_advantage(reward_CJ, rule), 0)
    assert not varies(reward_CJ).any()


@pytest.mark.parametrize("rule", RULES)
def test_groups_do_not_see_each_other(rule):
    reward_CJ = np.random.default_rng(0).random((4, 5))
    apart = [group_advantage(row[None], rule)[0] for row in reward_CJ]
    assert_array_equal(group_advantage(reward_CJ, rule), apart)


@given(reward_CJ=rewards)
def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others(reward_CJ):
    J = reward_CJ.shape[1]
    others_CJ = (reward_CJ.sum(axis=1, keepdims=True) - reward_CJ) / (J - 1)
    assert_allclose(group_advantage(reward_CJ, LeaveOneOut()), reward_CJ - others_CJ, atol=1e-5)


@given(reward_CJ=rewards, scale=st.integers(1, 100))
def test_division_by_the_deviation_takes_the_scale_away(reward_CJ, scale):
    rule = Normalised(eps=0.0)
    assert_allclose(
        group_advantage(reward_CJ, rule), group_advantage(reward_CJ * scale, rule), rtol=1e-6
    )


@pytest.mark.parametrize("reward", [np.nan, np.inf])
def test_a_reward_that_is_no_number_is_refused_with_its_place(reward):
    with pytest.raises(ValueError, match="group 1, sample 0"):
        group_advantage(np.array([[0.0, 1.0], [reward, 1.0]]))


def test_rewards_without_groups_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        group_advantage(np.ones(3))
