"""The paged cache: where the first token lies does not matter, rows without a new token touch
nobody, and pages of 8 bits are a rounding, not another model.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax import params as plan
from glm45_jax.model import config, transformer
from glm45_jax.model.cache import init_cache, stored
from glm45_jax.rollout.engine import GlmEngine

MIXERS = {
    "gqa": config.tiny().mixer,
    "mla": config.Mla(heads=3, q_rank=20, kv_rank=14, nope_dim=12, rope_dim=6, v_dim=10),
}
PAGE, STEPS = 4, (6, 4, 1)  # a prompt in one piece, then what decoding does


@functools.cache
def model(mixer):
    cfg = dataclasses.replace(config.tiny(), mixer=MIXERS[mixer], n_moe=0, n_mtp=0)
    params = plan.init(transformer.specs(cfg), jax.random.key(0))
    return cfg, jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, params)


@functools.cache
def step(cfg):
    return jax.jit(functools.partial(transformer.decode, cfg=cfg))


def decoded(mixer, *, lead=0, dtype=jnp.float32, idle=False):
    """Hidden states of two rows of the same steps, [2, 11, D]; idle: the second has no token."""
    cfg, params = model(mixer)
    tokens = jax.random.randint(jax.random.key(1), (2, sum(STEPS)), 0, cfg.vocab)
    key, value = cfg.mixer.kv_shapes
    cache = init_cache(
        layers=cfg.n_layers, rows=2, max_tokens=20, key=key, value=value, dtype=dtype, page=PAGE
    )
    cache = cache.replace(lead=lead)
    found, at = [], 0
    for n in STEPS:
        valid = jnp.asarray([True, not idle])[:, None] & jnp.ones((2, n), bool)
        hidden, cache = step(cfg)(params, tokens[:, at : at + n], cache, valid_BT=valid)
        found.append(hidden.hidden_BTD)
        at += n
    np.testing.assert_array_equal(cache.length_B, [at, 0 if idle else at])
    return np.asarray(jnp.concatenate(found, axis=1))


@pytest.mark.parametrize("mixer", MIXERS)
def test_slots_before_the_first_token_change_nothing(mixer):
    np.testing.assert_allclose(decoded(mixer, lead=1), decoded(mixer), atol=1e-5)  # float32


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_row_without_a_token_changes_no_other_and_is_finite(mixer):
    beside, alone = decoded(mixer), decoded(mixer, idle=True)
    np.testing.assert_array_equal(alone[0], beside[0])
    assert np.isfinite(alone).all()


@pytest.mark.parametrize("mixer", MIXERS)
def test_pages_of_8_bits_are_a_rounding_of_keys_and_values(mixer):
    exact, rounded = decoded(mixer), decoded(mixer, dtype=jnp.float8_e4m3fn)
    gap = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-3 < gap < 0.1, gap


def test_an_engine_keeps_its_pages_in_8_bits_where_it_is_told_to():
    engine = GlmEngine(model("gqa")[0], pages=2, max_tokens=32, kv_dtype="float8_e4m3fn")
    state = engine.init()
    assert state.k_LPSKH.dtype == state.v_LPSKH.dtype == jnp.float8_e4m3fn
    with pytest.raises(ValueError, match="'int8' is neither None nor 'float8_e4m3fn'"):
        dataclasses.replace(engine, kv_dtype="int8")


def test_what_8_bits_cannot_hold_becomes_the_largest_number_not_nan():
    x = jnp.asarray([0.0, 1.0, -448.0, 500.0, -1e30, 2.0**-9], jnp.bfloat16)
    found = stored(x, jnp.dtype(jnp.float8_e4m3fn))
    assert found.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(
        found.astype(jnp.float32), [0.0, 1.0, -448.0, 448.0, -448.0, 2.0**-9]
    )
    np.testing.assert_array_equal(stored(x, jnp.dtype(jnp.bfloat16)), x)
