"""Laws of schedules, of the batch ramp and of the token counter."""

import time

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import (
    BatchRamp,
    Constant,
    Cosine,
    Steps,
    Wsd,
    tokens_add,
    tokens_float,
    tokens_int,
    tokens_zero,
)

T = 1e12
SCHEDULES = [
    Constant(0.3),
    Cosine(),
    Cosine(warmup=0.0, total=10 * T, end=0.0),
    Wsd(warmup=T, total=10 * T, decay_fraction=0.2, end=0.1),
    Steps(((0, 0.3), (15 * T, 0.1))),
]


def test_learning_rates_are_the_papers():
    optim = Muon(schedule=Cosine(warmup=0.0, total=23.1 * T, end=0.1))
    for tokens, lr in ((0.0, 2.5e-4), (15 * T, 8.7e-5), (22 * T, 2.6e-5), (23.1 * T, 2.5e-5)):
        assert_allclose(optim.lr_at(tokens), lr, atol=0.5e-6)


def test_warmup_starts_at_zero_and_meets_the_cosine():
    f = Cosine(warmup=T, total=10 * T, end=0.1)
    assert_allclose([f(0.0), f(0.25 * T), f(T), f(20 * T)], [0.0, 0.25, 1.0, 0.1], rtol=1e-6)
    assert_allclose(f(T * (1 - 1e-6)), f(T), rtol=1e-5)
    assert_allclose(f(5.5 * T), 0.55, rtol=1e-6)  # half way down


def test_wsd_is_flat_then_straight():
    f = Wsd(warmup=T, total=10 * T, decay_fraction=0.2, end=0.1)
    found = [f(x * T) for x in (0.5, 1, 4, 8, 9, 10, 11)]
    assert_allclose(found, [0.5, 1, 1, 1, 0.55, 0.1, 0.1], rtol=1e-5)


def test_steps_change_exactly_at_their_tokens():
    f = Steps(((0, 0.3), (15 * T, 0.1), (20 * T, 0.0)))
    found = [f(x * T) for x in (0, 14.99, 15, 19.99, 20, 99)]
    assert_allclose(found, [0.3, 0.3, 0.1, 0.1, 0, 0], atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_trace_to_a_float32_scalar_and_stay_between_zero_and_one(schedule):
    traced = jax.jit(jax.vmap(schedule))(jnp.linspace(0.0, 30 * T, 50))
    assert traced.dtype == jnp.float32
    assert traced.min() >= 0.0
    assert traced.max() <= 1.0
    assert schedule(3.0 * T).shape == ()
    assert_allclose(traced[7], schedule(jnp.linspace(0.0, 30 * T, 50)[7]), rtol=1e-6)


def test_impossible_schedules_are_refused():
    for bad in (
        lambda: Cosine(warmup=2.0, total=1.0),
        lambda: Cosine(end=1.5),
        lambda: Wsd(warmup=0.9, total=1.0, decay_fraction=0.2),
        lambda: Steps(((1.0, 0.3),)),
        lambda: Steps(((0, 0.3), (0, 0.1))),
        lambda: BatchRamp(8, 4, 100, 16),
        lambda: BatchRamp(8, 16, 0, 16),
        lambda: BatchRamp(8, 8, 100, 16),
        lambda: BatchRamp(6, 16, 100, 16, multiple_of=4),
        lambda: BatchRamp(4, 4, 0, 16).span(-1),
        lambda: tokens_add(tokens_zero(), -1),
    ):
        with pytest.raises(ValueError):
            bad()


ramps = st.builds(
    lambda start, rise, tokens, seq, k: BatchRamp(start * k, (start + rise) * k, tokens, seq, k),
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(1, 10**6),
    st.integers(1, 64),
    st.integers(1, 8),
)


@given(ramps)
def test_spans_tile_the_rows_and_follow_the_line(ramp):
    at, last = 0, 0
    for step in range(300):
        first, rows = ramp.span(step)
        assert (first, rows) == (at, ramp.rows_at(step))
        assert ramp.tokens_at(step) == at * ramp.seq_len
        tokens, rise = at * ramp.seq_len, ramp.end_rows - ramp.start_rows
        line = ramp.start_rows + rise * min(tokens, ramp.ramp_tokens) // ramp.ramp_tokens
        assert rows == line // ramp.multiple_of * ramp.multiple_of
        assert rows >= last
        at, last = at + rows, rows


@given(ramps, st.integers(1, 10**7))
def test_steps_for_is_the_smallest_number_of_steps(ramp, tokens):
    steps = ramp.steps_for(tokens)
    assert ramp.tokens_at(steps) >= tokens > ramp.tokens_at(steps - 1)


def test_the_papers_ramp_reaches_its_end_at_its_tokens():
    ramp = BatchRamp(4096, 16384, 500 * 10**9, 4096, multiple_of=512)
    assert ramp.rows_at(0) * 4096 == 16 * 2**20
    assert len({rows for _, _, rows in ramp.pieces}) == 25
    end, _, rows = ramp.pieces[-1]
    assert rows * 4096 == 64 * 2**20
    assert 500e9 <= ramp.tokens_at(end) < 500e9 + 64 * 2**20
    start = time.perf_counter()
    for step in range(0, 10**6, 1000):
        ramp.span(step)
    assert time.perf_counter() - start < 0.5  # a lookup, not a sum over a million steps


def test_a_constant_batch_is_a_ramp_that_does_not_rise():
    ramp = BatchRamp(8, 8, 0, 128)
    assert [ramp.span(s) for s in (0, 1, 10**6)] == [(0, 8), (8, 8), (8 * 10**6, 8)]
    assert ramp.steps_for(1025) == 2
    assert ramp.steps_for(0) == 0


def test_token_counter_is_exact_past_int32_and_past_float32():
    add = jax.jit(tokens_add)
    counter, total = tokens_zero(), 0
    for n in (2**31 - 1, 2**32 - 1, 1, 0, 64 * 2**20 + 1, 2**31):
        counter = add(counter, jnp.uint32(n))
        total += n
        assert tokens_int(counter) == total
    counter = tokens_add(counter, 23_100_000_000_001)
    assert tokens_int(counter) == total + 23_100_000_000_001
    assert counter.dtype == jnp.uint32
    assert_allclose(tokens_float(counter), total + 23.1e12, rtol=1e-6)


def test_token_counter_takes_int32_counts():
    assert tokens_int(tokens_add(tokens_zero(), jnp.int32(2**31 - 1))) == 2**31 - 1
