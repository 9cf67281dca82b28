"""Attention: every implementation that runs here equals the definition, and the definition keeps
its laws.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.kernels import attention as op
from glm45_jax.kernels.shapes import ATTENTION

SMALL = [name for name, shape in ATTENTION.items() if shape.small]


def draw(shape, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (shape.B, shape.T, shape.N, shape.H))
    k, v = (jax.random.normal(key, (shape.B, shape.T, shape.K, shape.H)) for key in keys[1:])
    return q, k, v


def segments(shape):
    row = np.repeat(np.arange(1, 6), 7)[: shape.T]
    return jnp.asarray(np.tile(row, (shape.B, 1)).astype(np.int32)) if shape.packed else None


def by_hand(q, k, v, segment):
    """float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    B, T, N, H = q.shape
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(t + 1) if segment is None or segment[b, s] == segment[b, t]]
        kv = n // (N // k.shape[2])
        score = k[b, seen, kv] @ q[b, t, n] / np.sqrt(H)
        weight = np.exp(score - score.max())
        out[b, t, n] = weight @ v[b, seen, kv] / weight.sum()
    return out


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("impl", [i.name for i in op.IMPLS])
def test_every_implementation_equals_a_query_at_a_time(name, impl):
    shape = ATTENTION[name]
    q, k, v = draw(shape)
    chosen = next(i for i in op.IMPLS if i.name == impl)
    if why := chosen.supports(q, k, v, segments_BT=segments(shape)):
        with pytest.raises(ValueError, match="impl='auto' picks for you"):
            op.attention(q, k, v, segments_BT=segments(shape), impl=impl)
        assert impl in why
        return
    out = op.attention(q, k, v, segments_BT=segments(shape), impl=impl)
    np.testing.assert_allclose(out, by_hand(q, k, v, segments(shape)), atol=2e-6)


def test_future_keys_have_no_gradient():
    q, k, v = draw(ATTENTION["tiny"])
    grads = jax.grad(lambda k, v: op.attention(q, k, v)[:, :9].sum(), argnums=(0, 1))(k, v)
    for grad in grads:
        assert (np.asarray(grad[:, 9:]) == 0).all()
        assert (np.abs(np.asarray(grad[:, :9])).max(axis=(0, 2, 3)) > 0).any()


def test_a_kv_head_serves_its_group_in_repeat_interleave_order():
    q, k, v = draw(ATTENTION["tiny"])
    group = q.shape[2] // k.shape[2]
    whole = op.attention(q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2))
    np.testing.assert_allclose(op.attention(q, k, v), whole, atol=1e-6)


def test_one_document_by_segments_equals_no_segments():
    q, k, v = draw(ATTENTION["tiny"])
    ones = jnp.ones(q.shape[:2], jnp.int32)
    np.testing.assert_array_equal(op.attention(q, k, v, segments_BT=ones), op.attention(q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [255, 256])
def test_cudnn_equals_the_reference_in_bfloat16_forward_and_backward(T):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, T, 8, 64), jnp.bfloat16)
    k, v = (jax.random.normal(key, (2, T, 2, 64), jnp.bfloat16) for key in keys[1:3])
    cotangent = jax.random.normal(keys[3], q.shape, jnp.bfloat16)
    exact, pull = jax.vjp(op.reference, *(x.astype(jnp.float32) for x in (q, k, v)))
    out, pull_out = jax.vjp(lambda q, k, v: op.attention(q, k, v, impl="cudnn"), q, k, v)
    pairs = [
        (out, exact),
        *zip(pull_out(cotangent), pull(cotangent.astype(jnp.float32)), strict=True),
    ]
    for ours, theirs in pairs:
        error = jnp.linalg.norm((ours.astype(jnp.float32) - theirs).ravel()) / jnp.linalg.norm(
            theirs.ravel()
        )
        assert error < 1e-2  # bf16 operands
