"""The choice of experts and the taking of rows on Hopper equal XLA's, bit for bit: here in an
interpreter, on a GPU by `make gpu`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.kernels import routing, routing_gpu
from glm45_jax.kernels.shapes import ROUTING


def choices(M, E, seed):
    """Choices of which many are equal, some of them outside of every group."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(1, 9, (M, E)).astype(np.float32) / 4
    return jnp.asarray(np.where(rng.random((M, E)) < 0.3, -np.inf, drawn))


@pytest.mark.parametrize("M, E, A", [(1, 8, 1), (130, 16, 8), (64, 24, 3)])
def test_the_largest_are_those_of_a_sort_and_of_equals_the_first(M, E, A):
    for seed in range(3):
        choice = choices(M, E, seed)
        ours = routing_gpu.top_k(choice, A, interpret=True)
        np.testing.assert_array_equal(ours, jax.lax.top_k(choice, A)[1])


def test_a_nan_is_the_largest_and_names_an_expert():
    choice = choices(64, 8, 0).at[3, 5].set(jnp.nan).at[9].set(jnp.nan)
    ours = routing_gpu.top_k(choice, 3, interpret=True)
    np.testing.assert_array_equal(ours, jax.lax.top_k(choice, 3)[1])


@pytest.mark.parametrize("R", [4, 75])
def test_rows_are_taken_by_number(R):
    rng = np.random.default_rng(R)
    x = jnp.asarray(rng.normal(size=(20, 1024)), jnp.bfloat16)
    rows = jnp.asarray(rng.integers(0, 20, R), jnp.int32)
    scale = jnp.asarray(rng.normal(size=R), jnp.float32)
    np.testing.assert_array_equal(routing_gpu.take_rows(x, rows, interpret=True), x[rows])
    wide = x.astype(jnp.float32)
    ours = routing_gpu.take_rows(wide, rows, scale, dtype=jnp.bfloat16, interpret=True)
    np.testing.assert_array_equal(ours, (wide[rows] * scale[:, None]).astype(jnp.bfloat16))


def test_what_the_kernels_cannot_do_is_said(monkeypatch):
    def said(E, A=2):
        return routing_gpu.refuses_top_k(jax.ShapeDtypeStruct((4, E), jnp.float32), A)

    assert "needs compute capability 9.0" in said(8)
    monkeypatch.setattr(routing_gpu, "not_hopper", lambda: None)
    assert said(128) is None
    assert "12 experts are not a multiple of 8" in said(12)
    assert "top_k 9 is above 8 experts" in said(8, 9)
    narrow = jax.ShapeDtypeStruct((4, 96), jnp.bfloat16)
    assert "rows of 96 are not whole steps of 1024" in routing_gpu.refuses_rows(narrow)
    with pytest.raises(ValueError, match="3 rows are fewer than 4 at once"):
        rows = jnp.arange(3, dtype=jnp.int32)
        routing_gpu.take_rows(jnp.zeros((4, 1024), jnp.bfloat16), rows, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tiny", "air", "glm45"])
def test_the_kernel_routes_as_the_reference_does_on_a_gpu(name):
    shape = ROUTING[name]
    logits = jax.random.normal(jax.random.key(0), (shape.M, shape.E))
    bias = jax.random.normal(jax.random.key(1), (shape.E,)) / 8
    ours, right = (
        routing.route(logits, bias, top_k=shape.A, impl=impl) for impl in ("mosaic", "reference")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [1024, 4096, 5120])
def test_rows_are_taken_by_number_on_a_gpu(D):
    x = jax.random.normal(jax.random.key(0), (300, D), jnp.bfloat16)
    rows = jax.random.randint(jax.random.key(1), (4099,), 0, 300)
    np.testing.assert_array_equal(routing_gpu.take_rows(x, rows), x[rows])
