"""What a kernel that routes owes the reference: its choice, order, counts, gates and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from glm45_jax.kernels.routing import reference


@functools.partial(jax.jit, static_argnames=("run", "top_k", "norm_topk"))
def both_ways(logits, bias, cotangent, *, run, top_k, norm_topk=True):
    """The routing, its gates and the gradients of logits and bias."""
    how = dict(top_k=top_k, groups=1, top_groups=1, norm_topk=norm_topk, scale=2.5)
    out, pull = jax.vjp(lambda *args: run(*args, **how).gate_MA, logits, bias)
    return run(logits, bias, **how), out, pull(cotangent)


def assert_same_route(run, logits, bias, top_k, norm_topk=True):
    cotangent = jax.random.normal(jax.random.key(1), (logits.shape[0], top_k))
    args, how = (logits, bias, cotangent), dict(top_k=top_k, norm_topk=norm_topk)
    ours, gate, (dlogits, dbias) = both_ways(*args, run=run, **how)
    exact, exact_gate, (exact_dlogits, _) = both_ways(*args, run=reference, **how)
    for field in ("expert_MA", "order_R", "place_MA", "rows_E"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(exact, field), err_msg=field)
    # float32: the sigmoid and sums of two compilers differ in the last bits.
    np.testing.assert_allclose(gate, exact_gate, atol=1e-6)
    np.testing.assert_array_equal(gate, ours.gate_MA)
    np.testing.assert_allclose(dlogits, exact_dlogits, atol=2e-6)
    assert not np.asarray(dbias).any()


def skewed(M, E):
    """Logits and biases by which some experts get no row."""
    rng = np.random.default_rng(M)
    logits = rng.normal(size=(M, E)) + np.linspace(-2, 2, E)
    return jnp.asarray(logits, jnp.float32), jnp.asarray(rng.normal(size=E), jnp.float32)


def equal(M):
    """Logits of 24 experts of which many are equal."""
    return jnp.asarray(np.random.default_rng(0).integers(-2, 3, size=(M, 24)), jnp.float32)


def assert_equals_go_to_the_first(run, M):
    assert_same_route(run, equal(M), jnp.zeros(24), 8)
    shut = jnp.full(24, -jnp.inf).at[jnp.array([3, 5])].set(0.0)  # two are left, eight are asked
    assert_same_route(run, equal(M), shut, 8)
