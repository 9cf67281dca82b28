"""Dispatch never falls back in silence."""

import logging

import pytest

from glm45_jax.kernels import dispatch
from glm45_jax.kernels.dispatch import Implementation, anything

FAST = Implementation(
    "fast", lambda x: "fast", lambda x: "needs x < 3" if x >= 3 else None, ("cpu",)
)
ELSEWHERE = Implementation("elsewhere", lambda x: "elsewhere", anything, ("gpu",))
SLOW = Implementation("slow", lambda x: "slow", anything, ("cpu", "gpu", "tpu"))
IMPLS = (ELSEWHERE, FAST, SLOW)


def test_auto_takes_the_first_that_can_and_says_why_not_the_others(caplog):
    caplog.set_level(logging.INFO)
    dispatch.say_once.cache_clear()
    assert dispatch.pick("op", IMPLS, "auto", 1)(1) == "fast"
    assert dispatch.pick("op", IMPLS, "auto", 3)(3) == "slow"
    assert dispatch.pick("op", IMPLS, "auto", 3)(3) == "slow"
    said = [r.message for r in caplog.records]
    assert len(said) == 2
    assert "fast: needs x < 3" in said[1] and "elsewhere: not taken by itself on cpu" in said[1]


def test_auto_passes_over_one_that_yields_and_a_name_still_gets_it(caplog):
    caplog.set_level(logging.INFO)
    dispatch.say_once.cache_clear()
    shy = Implementation("shy", lambda x: "shy", anything, ("cpu",), lambda x: "slower from 2 on")
    assert dispatch.pick("op", (shy, SLOW), "auto", 2)(2) == "slow"
    assert dispatch.pick("op", (shy, SLOW), "shy", 2)(2) == "shy"
    assert [r.message for r in caplog.records] == ["op on cpu: slow (shy: slower from 2 on)"]


def test_a_kernel_asked_for_by_name_that_cannot_run_raises():
    with pytest.raises(ValueError, match="needs x < 3; impl='auto' picks for you"):
        dispatch.pick("op", IMPLS, "fast", 3)
    with pytest.raises(ValueError, match="no implementation 'quick'"):
        dispatch.pick("op", IMPLS, "quick", 1)
