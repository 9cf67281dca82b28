"""What the tests of JetStream share: requests of its protocol, one model, and what our driver says.

Imported after a look at the Python: on 3.13 and later its packages are not there.
"""

import contextlib
import inspect

import numpy as np
from jetstream.core.proto import jetstream_pb2

from glm45_jax.model import config
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.tokenizer import train_bpe
from tests.rollout.common import weights

VOCAB = 330
ROOM = 1024  # tokens of a row
SLOTS = 8
PATIENCE_S = 300  # of a test that would wait for ever
DecodeRequest = jetstream_pb2.DecodeRequest


def model():
    """Tokenizer, engine and weights."""
    tokenizer = train_bpe([inspect.getsource(contextlib)], VOCAB)
    engine = GlmEngine(
        config.tiny(VOCAB),
        slots=SLOTS,
        pages=SLOTS * 64,
        page=16,
        max_tokens=ROOM,
        buckets=(16, 64),
        spans=(8,),
    )
    return tokenizer, engine, weights(engine.cfg, 0)


def prompts(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n).tolist() for n in lengths]


def greedy(engine, params, asks, stop=()):
    """What our own driver answers: ids of each (prompt, max_tokens)."""
    driver = Driver(engine, params)
    knobs = [Sampling(temperature=0, max_tokens=n, stop=stop) for _, n in asks]
    requests = [driver.submit(ask[0], one) for ask, one in zip(asks, knobs, strict=True)]
    driver.run()
    return [request.completion.tokens_T.tolist() for request in requests]


def by_ids(ids, max_tokens):
    content = DecodeRequest.TokenContent(token_ids=ids)
    return DecodeRequest(token_content=content, max_tokens=max_tokens)


def by_text(text, max_tokens):
    return DecodeRequest(text_content=DecodeRequest.TextContent(text=text), max_tokens=max_tokens)


def ids_of(responses):
    return [i for r in responses for i in r.stream_content.samples[0].token_ids]


def text_of(responses):
    return "".join(r.stream_content.samples[0].text for r in responses)
