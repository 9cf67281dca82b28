"""Several decode steps in one call change when the host hears of tokens, never which they are."""

import dataclasses
import functools

import numpy as np
import pytest

from glm45_jax.model import config
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from tests.rollout.common import CLOSE, ROW, check, mixed, random_prompts, serve, weights


@functools.cache
def model():
    cfg = config.tiny()
    return cfg, weights(cfg, 0)


def engine(steps, **options):
    """Fewer pages than the rows could fill."""
    sizes = dict(slots=3, pages=11, page=4, max_tokens=ROW, buckets=(8,), routes=True)
    return GlmEngine(model()[0], steps=steps, **(sizes | options))


def test_outputs_are_those_of_single_steps_and_of_one_forward_pass():
    cfg, params = model()
    asked = mixed(6, 16, least=9)
    asked += [(asked[0][0], dataclasses.replace(asked[2][1], seed=i)) for i in range(4)]
    full = Sampling(max_tokens=12, temperature=2.0)  # to the last slot of a row
    asked += [(prompt, full) for prompt in random_prompts(3, [20])]
    plain, _ = serve(engine(1), params, asked)
    requests, stats = serve(engine(3), params, asked)
    assert min(stats.preempted, stats.shared_tokens) > 0
    assert stats.drafted == 0
    for one, many in zip(plain, requests, strict=True):
        assert one.out == many.out
        np.testing.assert_allclose(many.completion.logp_T, one.completion.logp_T, **CLOSE)
        check((cfg, params), many)


def test_a_call_draws_as_many_tokens_as_it_has_steps():
    (prompt,) = random_prompts(1, [5])
    asked = [(prompt, Sampling(temperature=1.0, max_tokens=12))]
    _, stats = serve(engine(3), model()[1], asked)
    assert stats.decode_steps == 4  # the first token comes with the seat: 11 in threes
    assert stats.output_tokens == 12


@pytest.mark.parametrize("at", [4, 5, 6])  # first, second and last of a call
def test_a_row_ends_at_its_stop_id_and_what_was_drawn_after_it_is_found_by_nobody(at):
    params = model()[1]
    (prompt,) = random_prompts(2, [7])
    knobs = Sampling(temperature=1.7, max_tokens=12, seed=3)
    ((whole, *_), _) = serve(engine(1), params, [(prompt, knobs)])
    stop = (whole.out[at],)
    end = whole.out.index(stop[0]) + 1
    driver = Driver(engine(3), params)
    stopped = driver.submit(prompt, dataclasses.replace(knobs, stop=stop))
    driver.run()
    assert stopped.out == whole.out[:end]
    assert stopped.completion.finish == "stop"
    again = driver.submit(prompt + stopped.out, dataclasses.replace(knobs, max_tokens=4, seed=9))
    driver.run()
    assert driver.stats.prefix_hits == 1
    check(model(), again)


def test_all_tokens_of_a_call_are_of_the_weights_it_began_with():
    cfg, params = model()
    (prompt,) = random_prompts(4, [6])
    driver = Driver(engine(3), params)
    request = driver.submit(prompt, Sampling(temperature=1.0, max_tokens=11))
    driver.tick()
    driver.push(weights(cfg, 1), 1)
    driver.run()
    assert request.versions == [0] * 4 + [1] * 7


@pytest.mark.parametrize(("steps", "draft"), [(0, 0), (2, 1)])
def test_steps_that_cannot_be_are_refused_at_the_door(steps, draft):
    with pytest.raises(ValueError, match=f"steps {steps} with draft {draft}"):
        engine(steps, draft=draft)
