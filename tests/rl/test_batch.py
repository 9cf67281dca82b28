"""Laws of packed trajectories: every token once, at the place that predicts it; nothing counts
that the policy did not write."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from glm45_jax.rl.advantage import LeaveOneOut, group_advantage
from glm45_jax.rl.batch import choose, pack
from tests.rl.common import trajectories, trajectory

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=10)


def unpack(rows):
    """(tokens, targets, positions, logp, advantage, weight, mask) of every segment of every row."""
    found = []
    for b in range(len(rows.weight_BT)):
        for segment in range(1, rows.batch.segments_BT[b].max() + 1):
            inside = rows.batch.segments_BT[b] == segment
            arrays = (
                rows.batch.tokens_BT,
                rows.batch.targets_BT,
                rows.batch.positions_BT,
                rows.logp_BT,
                rows.advantage_BT,
                rows.weight_BT,
                rows.batch.mask_BT,
            )
            found.append([array[b][inside] for array in arrays])
    return found


@given(lengths=lengths, seed=st.integers(0, 99))
def test_every_trajectory_is_whole_in_one_segment_with_its_own_numbers(lengths, seed):
    given_ = trajectories(np.random.default_rng(seed), lengths)
    advantage_N = np.arange(1, len(given_) + 1, dtype=np.float32)
    rows = pack(given_, advantage_N, seq_len=12, pad_id=0)
    of = {one.tokens_T.tobytes(): (one, a) for one, a in zip(given_, advantage_N, strict=True)}
    found = unpack(rows)
    assert len(found) == len(given_)
    for tokens, targets, positions, logp, advantage, weight, mask in found:
        one, a = of[tokens.tobytes()]
        assert_array_equal(positions, np.arange(len(tokens)))
        assert_array_equal(targets[:-1], tokens[1:])
        assert_array_equal(weight, [*one.sampled_T[1:], False])
        assert_array_equal(mask, weight)
        assert_array_equal(logp[weight > 0], one.logp_T[one.sampled_T])
        assert_array_equal(advantage, a * weight)
        assert not logp[weight == 0].any()


@given(lengths=lengths, multiple=st.integers(1, 4))
def test_padding_counts_nothing_and_rows_come_in_multiples(lengths, multiple):
    given_ = trajectories(np.random.default_rng(0), lengths)
    rows = pack(given_, np.ones(len(given_), np.float32), seq_len=12, pad_id=7, multiple=multiple)
    assert len(rows.weight_BT) % multiple == 0
    padding_BT = rows.batch.segments_BT == 0
    assert (rows.batch.tokens_BT[padding_BT] == 7).all()
    for array in (rows.weight_BT, rows.batch.mask_BT, rows.logp_BT, rows.advantage_BT):
        assert array.dtype == np.float32 and not array[padding_BT].any()


def test_a_row_tells_its_oldest_weights_and_an_empty_one_none():
    rng = np.random.default_rng(1)
    given_ = [trajectory(rng, 5, version=v) for v in (3, 2)] + [trajectory(rng, 9, version=4)]
    rows = pack(given_, np.ones(3, np.float32), seq_len=10, pad_id=0, multiple=4)
    assert_array_equal(rows.version_B, [4, 2, -1, -1])


def test_tokens_of_weights_too_old_get_no_weight():
    one = trajectory(np.random.default_rng(1), 8)
    one = dataclasses.replace(one, versions_T=np.arange(8, dtype=np.int32))
    rows = pack([one], np.ones(1, np.float32), seq_len=8, pad_id=0, oldest=5)
    assert_array_equal(rows.weight_BT[0, :-1], one.sampled_T[1:] & (np.arange(1, 8) >= 5))
    assert rows.version_B[0] >= 5


def test_routes_travel_with_their_tokens_and_are_unknown_elsewhere():
    given_ = trajectories(np.random.default_rng(2), [6, 4, 3], routes=(2, 3))
    rows = pack(given_, np.ones(3, np.float32), seq_len=8, pad_id=0)
    assert rows.routes_BTLA.shape == (2, 8, 2, 3) and rows.routes_BTLA.dtype == np.int16
    assert_array_equal(rows.routes_BTLA[0, :6], given_[0].routes_TLA)
    assert_array_equal(rows.routes_BTLA[1, :4], given_[1].routes_TLA)
    assert_array_equal(rows.routes_BTLA[1, 4:7], given_[2].routes_TLA)
    assert (rows.routes_BTLA[rows.batch.segments_BT == 0] == -1).all()


def test_groups_that_agree_are_dropped_and_counted_and_order_is_kept():
    rng = np.random.default_rng(3)
    rewards = {"a": (1.0, 0.0, 0.0), "b": (1.0, 1.0), "c": (0.5,), "d": (0.0, 1.0)}
    made = [
        dataclasses.replace(trajectory(rng, 4, group=group), reward=r)
        for group, rewards_J in rewards.items()
        for r in rewards_J
    ]
    mixed = [made[i] for i in rng.permutation(len(made))]
    chosen = choose(mixed, LeaveOneOut())
    assert (chosen.groups, chosen.dropped) == (4, 2)
    assert list(chosen.trajectories) == [one for one in mixed if one.group in "ad"]
    for group in "ad":
        of_group = [one.group == group for one in chosen.trajectories]
        reward_1J = np.array([[one.reward for one in mixed if one.group == group]])
        assert_array_equal(
            chosen.advantage_N[of_group], group_advantage(reward_1J, LeaveOneOut())[0]
        )


def test_nothing_to_learn_is_a_row_of_padding():
    chosen = choose([])
    rows = pack(chosen.trajectories, chosen.advantage_N, seq_len=4, pad_id=0, multiple=2)
    assert rows.weight_BT.shape == (2, 4) and not rows.weight_BT.any()


def test_what_does_not_fit_together_is_refused():
    rng = np.random.default_rng(4)
    one, routed = trajectory(rng, 6), trajectory(rng, 6, routes=(1, 2))
    ones = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="6 tokens, a row holds 5"):
        pack([one], ones[:1], seq_len=5, pad_id=0)
    with pytest.raises(ValueError, match="1 of 2 trajectories have routes"):
        pack([one, routed], ones, seq_len=8, pad_id=0)
    with pytest.raises(ValueError, match="advantages of shape"):
        pack([one], ones, seq_len=8, pad_id=0)
    with pytest.raises(ValueError, match="sampled from nothing"):
        dataclasses.replace(one, sampled_T=np.ones(6, np.bool_))
    with pytest.raises(ValueError, match=r"logp_T is \(5,\)"):
        dataclasses.replace(one, logp_T=one.logp_T[:5])
    with pytest.raises(ValueError, match="not bool"):
        dataclasses.replace(one, sampled_T=one.sampled_T.astype(np.int32))
    with pytest.raises(ValueError, match="token 5 has log-prob nan"):
        dataclasses.replace(one, logp_T=np.where(np.arange(6) < 5, -1.0, np.nan))
    with pytest.raises(ValueError, match="fill up with -1"):
        dataclasses.replace(routed, routes_TLA=routed.routes_TLA[:5])
