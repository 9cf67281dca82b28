"""Laws of the order: every place has one row, every row one place an epoch, and grain's mixture."""

import grain
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glm45_jax.data.order import ENDLESS, Order, permuted

weights_of = st.lists(st.integers(1, 400).map(lambda w: w / 100), min_size=1, max_size=6)


def order(lengths=(50, 7, 20), weights=(5.0, 1.0, 2.0), seed=3, drawn=None):
    seeds = np.random.SeedSequence(seed).generate_state(len(lengths))
    return Order(lengths, weights, seeds, drawn or [0] * len(lengths))


def permutation(n, key):
    keys = np.full(n, key, np.uint64)
    return permuted(np.arange(n), np.full(n, n), keys).tolist()


@settings(max_examples=30, deadline=None)
@given(weights=weights_of, first=st.integers(0, 20_000))
@example(weights=[1 / 3, 0.5, 1 / 7], first=4_000)
def test_the_mixture_is_grains(weights, first):
    def named(s):
        return grain.MapDataset.range(1).map(lambda _: s).repeat()

    mixed = grain.MapDataset.mix([named(s) for s in range(len(weights))], weights=weights)
    mine = order(lengths=[5] * len(weights), weights=weights).at(first, 200)
    assert mine.source_N.tolist() == [mixed[place] for place in range(first, first + 200)]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
@example(n=1, key=0)
@example(n=256, key=1)
@example(n=257, key=1)
def test_a_key_and_a_length_give_a_permutation(n, key):
    assert sorted(permutation(n, key)) == list(range(n))


@pytest.mark.parametrize("n", [3, 5, 8, 13, 40])
def test_over_many_keys_every_row_is_as_likely_at_every_place(n):
    keys = 3000
    key_N = np.repeat(np.arange(keys, dtype=np.uint64), n)
    placed = permuted(np.tile(np.arange(n), keys), np.full(keys * n, n), key_N).reshape(keys, n)
    counts = np.stack([np.bincount(placed[:, place], minlength=n) for place in range(n)])
    # Four standard deviations of a fair count, and the small bias of a cipher of four bits.
    expected = keys / n
    assert np.abs(counts - expected).max() < 4.5 * np.sqrt(expected) + 0.04 * expected
    steps = np.bincount(((placed[:, 1:] - placed[:, :-1]) % n).ravel(), minlength=n)
    assert steps[0] == 0 and steps[1:].max() < 1.15 * keys


def test_long_sources_are_permuted_beyond_32_bits():
    n = 2**40 + 5
    place_N = np.arange(n - 2000, n)
    found = permuted(place_N, np.full(2000, n), np.full(2000, 9, np.uint64))
    assert len(set(found.tolist())) == 2000 and 0 <= found.min() and found.max() < n
    assert abs(found.mean() / n - 0.5) < 0.03


@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 30_000), n=st.integers(1, 9_000))
def test_a_place_does_not_depend_on_what_was_asked_before(first, n):
    together, alone = order().at(first, n), order().at(first + n - 1, 1)
    assert len(together.row_N) == n
    for many, one in zip(together, alone, strict=True):
        assert many[-1] == one[0]


def test_every_epoch_of_every_source_holds_each_row_once():
    drawn = order().at(0, 4000)
    for s, length in enumerate((50, 7, 20)):
        rows, epochs = drawn.row_N[drawn.source_N == s], drawn.epoch_N[drawn.source_N == s]
        assert epochs.tolist() == [i // length for i in range(len(rows))]
        for epoch in range(len(rows) // length):
            assert sorted(rows[epochs == epoch].tolist()) == list(range(length))


@settings(max_examples=25, deadline=None)
@given(place=st.integers(0, 20_000))
def test_rows_drawn_before_a_place_are_counted_without_looking(place):
    counted = np.bincount(order().at(0, max(place, 1)).source_N[:place], minlength=3)
    assert order().drawn_before(place) == counted.tolist()
    later = order(drawn=[4, 5, 6])
    assert later.drawn_before(place) == (counted + np.array([4, 5, 6])).tolist()


@pytest.mark.parametrize("place", [1, 333, 5000])
def test_other_weights_from_a_place_on_draw_every_source_further(place):
    first = order()
    second = order(weights=(1.0, 4.0, 1.0), drawn=first.drawn_before(place))
    unbroken, rest = first.at(0, 20_000), second.at(0, 500)
    for s in range(3):
        own = unbroken.source_N == s
        rows, at = unbroken.row_N[own], first.drawn_before(place)[s]
        going_on = rest.row_N[rest.source_N == s]
        assert going_on.tolist() == rows[at : at + len(going_on)].tolist()


def test_an_endless_source_comes_in_its_own_order():
    drawn = order(lengths=(ENDLESS, 7), weights=(1.0, 1.0)).at(0, 100)
    own = drawn.source_N == 0
    assert drawn.row_N[own].tolist() == list(range(50)) and not drawn.epoch_N[own].any()


def test_weights_too_far_apart_are_refused_where_the_sums_would_overflow():
    with pytest.raises(ValueError, match="beyond 64 bits; use weights that are less far apart"):
        order(lengths=(5, 5), weights=(1e9, 1.0)).at(2**33, 1)
