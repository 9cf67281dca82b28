"""One tiny model of each mixer and one small engine of each, compiled once for the whole room."""

import dataclasses

import pytest

from glm45_jax.model import config
from glm45_jax.rollout.engine import GlmEngine
from tests.rollout.common import MIXERS, ROW, weights


@pytest.fixture(scope="session", params=MIXERS)
def tiny(request):
    cfg = dataclasses.replace(config.tiny(), mixer=MIXERS[request.param], n_mtp=0)
    return cfg, weights(cfg, 0)


@pytest.fixture(scope="session")
def engine(tiny):
    # Pages for fewer rows than there are slots: long outputs meet preemption.
    return GlmEngine(
        tiny[0], slots=3, pages=11, page=4, max_tokens=ROW, buckets=(4, 8), spans=(4,), routes=True
    )
