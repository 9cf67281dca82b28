"""Laws of routing by kind and of AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from glm45_jax.optim.mixed import AdamW, adamw, by_kind, scale_by_adam
from glm45_jax.optim.schedules import Constant
from glm45_jax.params import ParamSpec

SPECS = {
    "w": ParamSpec((4, 6), (None, None), "matrix"),
    "embed": ParamSpec((5, 4), (None, None), "embed"),
    "norm": ParamSpec((4,), (None,), "norm"),
    "counter": ParamSpec((3,), (None,), "state"),
}


def draw(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), len(SPECS))
    return {
        n: scale * jax.random.normal(k, s.shape)
        for k, (n, s) in zip(keys, SPECS.items(), strict=True)
    }


def test_each_kind_goes_to_its_own_transformation_and_state_to_zero():
    tx = by_kind(SPECS, {"matrix": optax.scale(2.0), ("embed", "norm"): optax.scale(-3.0)})
    grads = draw(0)
    updates, _ = tx.update(grads, tx.init(grads))
    for name, factor in {"w": 2.0, "embed": -3.0, "norm": -3.0, "counter": 0.0}.items():
        assert_allclose(updates[name], factor * grads[name], rtol=1e-6, err_msg=name)


def test_a_kind_without_a_rule_or_with_two_is_refused():
    with pytest.raises(ValueError, match="norm"):
        by_kind(SPECS, {"matrix": optax.scale(1.0), "embed": optax.scale(1.0)})
    with pytest.raises(ValueError, match="another group"):
        by_kind(SPECS, {"matrix": optax.scale(1.0), ("matrix", "norm"): optax.scale(1.0)})


def test_adamw_follows_its_equations():
    lr, b1, b2, eps, decay = 0.01, 0.9, 0.95, 1e-3, 0.1
    tx = adamw(lr, b1=b1, b2=b2, eps=eps, weight_decay=decay, specs=SPECS)
    weights = draw(0)
    state, w = tx.init(weights), np.asarray(weights["w"], np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, 4):
        grads = draw(t)
        updates, state = tx.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        g = np.asarray(grads["w"], np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        scale = (1 - b1**t) / np.sqrt(1 - b2**t)
        w = (1 - lr * decay) * w - lr / scale * m / (eps + np.sqrt(v))
        assert_allclose(weights["w"], w, rtol=1e-5, atol=1e-6)


def test_adam_equals_optax_where_eps_does_not_matter_and_not_where_it_does():
    ours, theirs = (
        scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        optax.scale_by_adam(0.9, 0.95, 1e-8),
    )
    for scale, same in ((1.0, True), (1e-8, False)):
        grads = {"w": scale * (1.0 + jnp.arange(4.0))}
        a, _ = ours.update(grads, ours.init(grads))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes in its bias correction
            b, _ = theirs.update(grads, theirs.init(grads))
        assert np.allclose(a["w"], b["w"], rtol=1e-5) is same


def test_bfloat16_weights_and_gradients_give_float32_updates_and_moments():
    config = AdamW(schedule=Constant(), clip_norm=1.0)
    tx = config.build(SPECS)
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw(0))
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw(1))
    updates, state = tx.update(grads, tx.init(weights), weights)
    del updates["counter"]
    floats = [x for x in jax.tree.leaves((updates, state)) if x.ndim]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}


def test_adamw_value_is_adamw_and_decays_only_its_kinds():
    config = AdamW(lr=0.5, schedule=Constant(0.25), decay_kinds=("matrix",), clip_norm=None)
    weights, zeros = draw(0), jax.tree.map(jnp.zeros_like, draw(0))
    tx = config.build(SPECS)
    updates, _ = tx.update(zeros, tx.init(weights), weights)
    assert_allclose(config.lr_at(1e12) * updates["w"], -0.0125 * weights["w"], rtol=1e-6)
    assert_array_equal(updates["norm"], np.zeros(4))


def test_weight_decay_without_weights_is_refused():
    tx = adamw(1.0, specs=SPECS)
    with pytest.raises(ValueError, match="params"):
        tx.update(draw(0), tx.init(draw(0)))
