"""The streaming face of the driver: pieces are the completion cut up; leaving frees the slot."""

import asyncio

import numpy as np

from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Completion
from tests.rollout.arithmetic import Arithmetic, answer


def test_the_pieces_of_a_stream_are_its_completion():
    engine = Arithmetic(slots=2, pages=40)
    driver = Driver(engine, 0)
    asks = [([3 + i, 5, 7], Sampling(max_tokens=6 + i, seed=i)) for i in range(5)]

    async def one(tokens, sampling):
        return [item async for item in driver.stream(tokens, sampling)]

    async def scene():
        return await asyncio.gather(*(one(*ask) for ask in asks))

    for (tokens, sampling), items in zip(
        asks, asyncio.run(asyncio.wait_for(scene(), 30)), strict=True
    ):
        *pieces, done = items
        assert isinstance(done, Completion) and (len(pieces), done.finish) == (
            len(done.tokens_T),
            "length",
        )
        assert done.tokens_T.tolist() == answer(tokens, sampling, engine.vocab)[0]
        for name in ("tokens_T", "logp_T", "logp_raw_T", "versions"):
            whole = np.concatenate([getattr(piece, name) for piece in pieces])
            np.testing.assert_array_equal(whole, getattr(done, name))


def test_who_leaves_a_stream_frees_its_slot():
    driver = Driver(Arithmetic(slots=1, pages=40), 0)

    async def scene():
        stream = driver.stream([1, 2], Sampling(max_tokens=30))
        first = await anext(stream)
        await stream.aclose()
        return first, await driver.generate([4], Sampling(max_tokens=3))

    first, after = asyncio.run(asyncio.wait_for(scene(), 30))
    assert len(first.tokens_T) == 1 and after.finish == "length"
    stats = driver.stats
    assert (stats.cancelled, stats.running, stats.free_slots, stats.free_pages) == (1, 0, 1, 40)
