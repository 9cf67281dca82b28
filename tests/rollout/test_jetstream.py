"""JetStream's own driver and orchestrator, as they come in the wheel, on our engine."""

import asyncio
import dataclasses
import logging
import sys

import jax
import numpy as np
import pytest

if sys.version_info >= (3, 13):
    pytest.skip("JetStream's packages have no wheels for this Python", allow_module_level=True)

from glm45_jax.rollout import jetstream
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from tests.rollout.common import weights
from tests.rollout.jetstream_common import (
    PATIENCE_S,
    ROOM,
    SLOTS,
    VOCAB,
    by_ids,
    by_text,
    greedy,
    ids_of,
    model,
    prompts,
    text_of,
)


@pytest.fixture(scope="module")
def served_model():
    return model()


@pytest.fixture(scope="module")
def tokenizer(served_model):
    return served_model[0]


@pytest.fixture(scope="module")
def engine(served_model):
    return served_model[1]


@pytest.fixture(scope="module")
def params(served_model):
    return served_model[2]


@pytest.fixture(scope="module")
def stock():
    """JetStream's orchestrator module, imported by us."""
    return jetstream.orchestrator()


def through_stock(stock, adapter, scene, *, interleaved=True):
    """What an async function of an LLMOrchestrator returns.

    Two races of JetStream 0.2.2, each of which kills the process, are kept away: a request that
    does not end holds a slot, since the last one to be freed may trip an assertion; the driver is
    stopped inside the loop, which its threads call once more when a request has ended.
    """

    async def main():
        held = adapter.load_params()
        driver = stock.Driver([adapter], [adapter], [held], [held], interleaved_mode=interleaved)
        orchestrator = stock.LLMOrchestrator(driver)
        endless = asyncio.create_task(every(orchestrator, by_ids([9], ROOM)))
        try:
            return await asyncio.wait_for(scene(orchestrator), PATIENCE_S)
        finally:
            driver.stop()
            endless.cancel()

    return asyncio.run(main())


async def every(orchestrator, request):
    return [response async for response in orchestrator.Decode(request)]


def all_at_once(requests):
    """A scene: the responses to each."""
    return lambda stock: asyncio.gather(*(every(stock, request) for request in requests))


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "disaggregated"])
def test_stock_jetstream_on_our_engine_says_what_our_driver_says(
    stock, engine, params, tokenizer, interleaved
):
    text = "def exit_stack(self):"
    asks = [(p, 6 + i) for i, p in enumerate(prompts(1, [1, 3, 15, 16, 17, 40, 63, 64, 65, 130]))]
    asks.append((tokenizer.encode(text), 20))
    long = greedy(engine, params, asks)
    stop = (long[0][4], long[6][7])
    ours = greedy(engine, params, asks, stop)
    assert any(out[-1] in stop for out in ours) and any(out[-1] not in stop for out in ours)
    knobs = Sampling(temperature=0, stop=stop)
    adapter = jetstream.jetstream_engine(engine, params, tokenizer, sampling=knobs)
    requests = [by_ids(*ask) for ask in asks[:-1]] + [by_text(text, 20)]
    told = through_stock(stock, adapter, all_at_once(requests), interleaved=interleaved)
    # EOS is not in what JetStream 0.2.2 returns.
    assert [ids_of(t) for t in told] == [[i for i in out if i not in stop] for out in ours]
    assert text_of(told[-1]).rstrip("\ufffd") == tokenizer.decode(ids_of(told[-1])).rstrip("\ufffd")
    assert not any(map(text_of, told[:-1]))


def test_a_prompt_that_cannot_be_served_gets_an_empty_answer_and_hurts_nobody(
    stock, engine, params, tokenizer, caplog
):
    good, full = (prompts(2, [9])[0], 5), ([5] * (ROOM - 1), 1)
    bad = [[5] * (ROOM + 1), [5] * ROOM, [7, VOCAB], [7, -1], []]
    adapter = jetstream.jetstream_engine(engine, params, tokenizer)
    requests = [by_ids(*good), by_ids(full[0], 9), *(by_ids(ids, 4) for ids in bad)]
    told = through_stock(stock, adapter, all_at_once(requests))
    ours = greedy(engine, params, [good, full], tokenizer.stop_ids)
    assert [ids_of(t) for t in told] == [*ours, [], [], [], [], []]
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(said) == len(bad)
    assert sum(f"of {n} ids JetStream took" in s for s in said for n in (ROOM + 1, ROOM + 2)) == 2


def test_it_is_an_engine_of_jetstream_and_leaves_the_process_as_it_was(
    stock, engine, params, tokenizer
):
    from jetstream.engine import engine_api, tokenizer_api

    adapter = jetstream.jetstream_engine(engine, params, tokenizer)
    assert isinstance(adapter, engine_api.Engine)
    assert isinstance(adapter.build_tokenizer(adapter.get_tokenizer()), tokenizer_api.Tokenizer)
    assert (adapter.max_concurrent_decodes, adapter.samples_per_slot) == (SLOTS, 1)
    assert adapter.max_prefill_length == ROOM and adapter.mesh.size == 1
    assert not hasattr(jax, "tree_map") and stock.delete_pytree is jetstream.delete_pytree
    root = logging.getLogger()
    assert root.level > logging.DEBUG and stock.handler not in root.handlers
    short = dataclasses.replace(engine, max_tokens=12)
    with pytest.raises(ValueError, match=r"rows of 12 tokens are shorter than .* 16; raise"):
        jetstream.jetstream_engine(short, params, tokenizer)


def seated(adapter, prompt):
    """Slots with one prompt in the third."""
    padded = np.pad(prompt, (0, 16 - len(prompt)))
    prefix = adapter.prefill(
        params=adapter.load_params(), padded_tokens=padded, true_length=len(prompt)
    )
    return adapter.insert(prefix, adapter.init_decode_state(), slot=2)


def stepped(adapter, slots, n):
    """Slots after n steps, and the ids that they told."""
    ids = []
    for _ in range(n):
        slots, result = adapter.generate(adapter.load_params(), slots)
        ids.append(result.convert_to_numpy().get_result_at_slot(2).tokens.item())
    return slots, ids


def swapped(engine, params, others, prompt, at, n):
    """What our own driver says in n tokens, with other weights after `at`."""
    driver = Driver(engine, params)
    request = driver.submit(prompt, Sampling(temperature=0, max_tokens=n))
    while len(request.out) < at:
        driver.tick()
    driver.push(others, 1)
    driver.run()
    return request.out


def test_weights_that_are_held_change_in_the_middle_of_a_request(engine, params, tokenizer):
    (prompt,), others = prompts(3, [11]), weights(engine.cfg, 1)
    adapter = jetstream.jetstream_engine(engine, params, tokenizer)
    slots, ids = stepped(adapter, seated(adapter, prompt), 7)
    adapter.load_params().params = others
    ids += stepped(adapter, slots, 9)[1]
    # A step told one token and drew the same one.
    assert ids == swapped(engine, params, others, prompt, 7, 16)
    assert ids != greedy(engine, params, [(prompt, 16)])[0]


def test_they_change_under_stock_jetstream_too(stock, engine, params, tokenizer):
    (prompt,), others = prompts(3, [11]), weights(engine.cfg, 1)
    knobs = Sampling(temperature=0)
    adapter = jetstream.jetstream_engine(engine, params, tokenizer, sampling=knobs)

    async def scene(orchestrator):
        told = []
        async for response in orchestrator.Decode(by_ids(prompt, 300)):
            told.append(response)
            if len(told) == 5:
                adapter.load_params().params = others
        return ids_of(told)

    ids = through_stock(stock, adapter, scene)
    (old,) = greedy(engine, params, [(prompt, 300)])
    same = next(i for i in range(300) if ids[i] != old[i])
    # JetStream's threads run ahead of what it has told, by how much nobody knows.
    assert same >= 5 and any(
        ids == swapped(engine, params, others, prompt, at, 300) for at in range(same, 4, -1)
    )


class Twice(GlmEngine):
    """Two tokens a step, as an engine with drafts may draw."""

    def decode(self, params, state, table_BP, active_B):
        whole_BP = np.arange(self.pages, dtype=np.int32).reshape(self.slots, -1)
        state, one = super().decode(params, state, whole_BP, active_B)
        state, two = super().decode(params, state, whole_BP, active_B)
        both = jax.tree.map(lambda *x_B: np.stack(x_B, axis=1), one, two)
        return state, both.replace(count_B=np.full(self.slots, 2))


@pytest.mark.parametrize("n", [7, 8])
def test_rows_that_draw_two_tokens_a_step_tell_one_and_none_after_the_stop_id(
    engine, params, tokenizer, n
):
    (prompt,) = prompts(5, [7])
    knobs = Sampling(temperature=0.9, seed=5)

    def ours(stop):
        driver = Driver(engine, params)
        ask = dataclasses.replace(knobs, max_tokens=n, stop=stop)
        request = driver.submit(prompt, ask)
        driver.run()
        return request.out

    stop = (ours(())[-1],)
    assert len(ours(stop)) == n  # now and then the first, now and then the second of a step
    adapter = jetstream.jetstream_engine(
        Twice(**vars(engine)), params, tokenizer, sampling=dataclasses.replace(knobs, stop=stop)
    )
    slots, ids = stepped(adapter, seated(adapter, prompt), n)
    assert ids == ours(stop)
    result = adapter.generate(adapter.load_params(), slots)[1]
    assert not result.get_result_at_slot(2).valid.any()
