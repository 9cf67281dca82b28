"""Short prompts that are read in one call are read as one by one, and cost fewer calls."""

import dataclasses

import numpy as np
import pytest

from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.sampling import Sampling
from tests.rollout.arithmetic import Arithmetic, answer
from tests.rollout.common import CLOSE, check, mixed, random_prompts, serve
from tests.rollout.test_steps import engine, model


@dataclasses.dataclass(frozen=True)
class Counted(Arithmetic):
    """`Arithmetic` that remembers how many prompts each call read."""

    calls: list = dataclasses.field(default_factory=list)

    def prefill(self, params, state, tokens, start, row):
        self.calls.append(1)
        return super().prefill(params, state, tokens, start, row)

    def prefill_whole(self, params, state, prompts, rows):
        found = super().prefill_whole(params, state, prompts, rows)
        del self.calls[-len(prompts) :]
        self.calls.append(len(prompts))
        return found


def served(engine, prompts, **driver):
    driver = Driver(engine, 0, prefill_tokens=1000, **driver)
    requests = [driver.submit(p, Sampling(max_tokens=4, seed=n)) for n, p in enumerate(prompts)]
    driver.run()
    for request in requests:
        want, _ = answer(request.prompt, request.sampling, engine.vocab)
        assert request.out == want
    return driver


@pytest.mark.parametrize("reuse", [True, False])
def test_prompts_of_a_chunk_are_read_together_and_groups_count_once(reuse):
    prompts = [[n, n + 1, 5] for n in range(10) for _ in range(8)]
    counted = Counted(80, 400, together=4)
    served(counted, prompts, reuse=reuse)
    assert counted.calls == [4, 4, 2]


def test_a_longer_prompt_goes_by_itself_and_none_overtakes_it():
    counted = Counted(8, 100, together=4)
    served(counted, [[1, 2], [3, 4], [7] * 9, [5, 6], [8, 9]])
    assert counted.calls == [2, 1, 1, 2]


def test_pages_that_running_rows_will_need_are_not_taken_for_those_behind():
    prompts = [[n, 2, 3] for n in range(8)]
    together, singly = Counted(8, 10, together=8, page=4), Arithmetic(8, 10, page=4)
    preempted = served(singly, prompts).stats.preempted
    assert served(together, prompts).stats.preempted <= preempted
    assert 1 < max(together.calls) < 8


def test_outputs_are_those_of_prompts_read_one_by_one():
    cfg, params = model()
    asked = mixed(6, 16, least=3)
    asked += [(p, Sampling(max_tokens=4, seed=n)) for n, p in enumerate(random_prompts(5, [3, 8]))]
    plain, _ = serve(engine(1), params, asked)
    requests, stats = serve(engine(1, together=3), params, asked)
    assert stats.prefill_chunks > 0
    for one, many in zip(plain, requests, strict=True):
        assert one.out == many.out
        np.testing.assert_allclose(many.completion.logp_T, one.completion.logp_T, **CLOSE)
        check((cfg, params), many)


def test_prompts_beyond_the_number_are_refused():
    _, params = model()
    small = engine(1, together=2)
    for prompts in ([], [[1]] * 3):
        with pytest.raises(ValueError, match="together"):
            small.prefill_whole(params, small.init(), prompts, [[0]] * len(prompts))
    with pytest.raises(ValueError, match="draft"):
        engine(1, together=2, draft=1)
