"""The one tiny model, once."""

import functools

import jax
import pytest

from glm45_jax import params as params_lib
from glm45_jax.model import config, transformer


@functools.cache
def _tiny():
    cfg = config.tiny()
    params = params_lib.init(transformer.specs(cfg), jax.random.key(0))
    # Larger than at the start of training, so that experts and documents differ by more than
    # rounding.
    params = jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, params)
    return cfg, params


@pytest.fixture
def tiny():
    return _tiny()
