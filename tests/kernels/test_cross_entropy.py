"""Cross-entropy: chunks of the vocabulary change nothing, and all logits never exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from glm45_jax import sharding
from glm45_jax.kernels import cross_entropy as op
from glm45_jax.kernels.shapes import LOSS

SMALL = [name for name, shape in LOSS.items() if shape.small]


def draw(shape):
    keys = jax.random.split(jax.random.key(0), 4)
    h = jax.random.normal(keys[0], (shape.M, shape.D))
    w = jax.random.normal(keys[1], (shape.D, shape.V))
    target = jax.random.randint(keys[2], (shape.M,), 0, shape.V)
    return h, w, target.at[0].set(shape.V - 1), jax.random.uniform(keys[3], (shape.M,))


@pytest.mark.parametrize("name", SMALL)
def test_chunks_of_the_vocabulary_change_neither_loss_nor_gradient(name):
    shape = LOSS[name]
    h, w, target, weight = draw(shape)

    def total(f):
        return lambda h, w: (f(h, w, target) * weight).sum()

    chunked = lambda h, w, t: op.chunked(h, w, t, chunk=shape.chunk)  # noqa: E731
    np.testing.assert_allclose(chunked(h, w, target), op.reference(h, w, target), atol=1e-5)
    ours, plain = (jax.grad(total(f), (0, 1))(h, w) for f in (chunked, op.reference))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_scale_of_the_logits_is_that_of_the_hidden_states_in_value_and_gradient():
    shape = LOSS[SMALL[0]]
    h, w, target, weight = draw(shape)
    scale = jnp.linspace(0.4, 2.0, len(target))

    def total(f):
        return lambda h, w: (f(h, w) * weight).sum()

    ways = [
        lambda h, w: op.chunked(h, w, target, shape.chunk, scale),
        lambda h, w: op.reference(h, w, target, scale),
        lambda h, w: op.token_nll(h * scale[:, None], w, target),
    ]
    values, grads = zip(*(jax.value_and_grad(total(f), (0, 1))(h, w) for f in ways), strict=True)
    np.testing.assert_allclose(values, values[0], rtol=1e-5)
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("chunk", [None, 7])
def test_a_sum_made_with_its_gradient_is_the_sum_of_the_definition_and_its_gradient(name, chunk):
    h, w, target, weight = draw(LOSS[name])
    weight = weight.at[::3].set(0)
    chunk = chunk and min(chunk, len(target))

    def at(f):
        return jax.value_and_grad(lambda h, w: 0.3 * f(h, w, target, weight), (0, 1))(h, w)

    plain = at(lambda h, w, t, weight: (op.reference(h, w, t) * weight).sum())
    ways = [lambda *a: op.fused(*a, chunk=chunk), lambda *a: op.nll_sum(*a, impl="chunked")]
    for ours in (at(f) for f in ways):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert float(op.fused(h, w, target, weight)) == pytest.approx(float(plain[0]) / 0.3, rel=1e-5)


def test_where_a_token_does_not_count_its_hidden_state_has_no_gradient():
    h, w, target, weight = draw(LOSS[SMALL[0]])
    weight = weight.at[1].set(0)
    dh = jax.grad(lambda h: op.fused(h, w, target, weight))(h)
    assert not dh[1].any()
    assert dh[0].any()


def test_the_gradient_of_a_sum_in_bfloat16_is_as_near_as_that_of_chunks():
    h, w, target, weight = draw(LOSS[SMALL[-1]])
    h = h.astype(jnp.bfloat16)
    grads = {
        impl: jax.grad(lambda h, w, impl=impl: op.nll_sum(h, w, target, weight, impl=impl), (0, 1))(
            h, w
        )
        for impl in ("fused", "chunked", "reference")
    }
    for part in range(2):
        exact = np.asarray(grads["reference"][part], np.float32)
        off = {
            k: float(np.abs(np.asarray(g[part], np.float32) - exact).max())
            for k, g in grads.items()
        }
        assert off["fused"] <= 1.5 * off["chunked"] + 1e-6, off


def test_tokens_and_head_of_several_devices_are_left_to_chunks_of_the_vocabulary():
    h, w, target, weight = draw(LOSS[SMALL[0]])
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=2), jax.devices()[:2])
    with sharding.use(mesh, sharding.Rules()):
        with pytest.raises(ValueError, match="the mesh has 2; impl='auto' picks"):
            op.nll_sum(h, w, target, weight, impl="fused")
        auto = op.nll_sum(h, w, target, weight)
    np.testing.assert_allclose(auto, op.fused(h, w, target, weight), rtol=1e-5)


def arrays_in(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval for v in eqn.outvars)
        for sub in jaxprs_in_params(eqn.params):
            yield from arrays_in(sub)


def biggest(f, *args):
    return max(
        int(np.prod(a.shape))
        for a in arrays_in(jax.make_jaxpr(f)(*args).jaxpr)
        if hasattr(a, "shape")
    )


def test_all_logits_never_exist_forward_or_backward():
    M, D, V, chunk = 96, 4, 1000, 100
    h, w = jnp.ones((M, D)), jnp.ones((D, V))
    target = jnp.zeros(M, jnp.int32)
    step = jax.value_and_grad(lambda h, w: op.chunked(h, w, target, chunk=chunk).sum(), (0, 1))
    assert biggest(step, h, w) <= max(M * chunk, D * V)
    ones = jnp.ones(M)
    step = jax.value_and_grad(lambda h, w: op.fused(h, w, target, ones, chunk=12), (0, 1))
    assert biggest(step, h, w) <= max(12 * V, D * V)
    whole = jax.value_and_grad(lambda h, w: op.reference(h, w, target).sum(), (0, 1))
    assert biggest(whole, h, w) == M * V  # the check sees what it looks for


def test_chunks_stay_within_the_element_budget():
    for tokens in (1, 1000, 8192, 65_536):
        assert op.chunk_words(tokens) * tokens <= max(op.CHUNK_ELEMENTS, 512 * tokens)
        for words in (128, 16_384, 151_552):
            chunk = op.fused_tokens(tokens, words)
            assert chunk % 128 == 0
            assert chunk * words <= max(op.FUSED_ELEMENTS, 128 * words)
            assert -(-tokens // chunk) * chunk - tokens < 128 * -(
                -tokens // chunk
            )  # little padding
