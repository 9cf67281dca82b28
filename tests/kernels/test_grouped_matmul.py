"""Grouped matmul: every implementation equals a loop over groups, forward and backward, at any
group sizes.
"""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.kernels import grouped_matmul as op
from glm45_jax.kernels.shapes import GROUPED

SMALL = [name for name, shape in GROUPED.items() if shape.small]
NAMES = [i.name for i in op.IMPLS]


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    busy = int(shape.R * shape.skew)
    sizes = np.bincount(rng.integers(0, shape.E, shape.R - busy), minlength=shape.E)
    sizes[shape.E // 2] += busy
    x = rng.normal(size=(shape.R, shape.D)).astype(np.float32)
    w = rng.normal(size=(shape.E, shape.D, shape.F)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes, jnp.int32)


def by_hand(x, w, sizes):
    edges = np.cumsum([0, *sizes])
    return np.concatenate([x[a:b] @ w[e] for e, (a, b) in enumerate(itertools.pairwise(edges))])


@functools.partial(jax.jit, static_argnames="impl")
def both_ways(x, w, sizes, cotangent, impl):
    out, pull = jax.vjp(lambda x, w: op.grouped_matmul(x, w, sizes, impl=impl), x, w)
    return out, pull(cotangent)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("impl", NAMES)
def test_every_implementation_equals_a_loop_over_groups(name, impl):
    x, w, sizes = draw(GROUPED[name])
    cotangent = jax.random.normal(jax.random.key(1), (x.shape[0], w.shape[2]))
    out, (dx, dw) = both_ways(x, w, sizes, cotangent, impl)
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, cotangent))
    np.testing.assert_allclose(out, by_hand(x64, w64, sizes), atol=2e-5)
    np.testing.assert_allclose(dx, by_hand(g64, w64.swapaxes(1, 2), sizes), atol=2e-5)
    edges = np.cumsum([0, *sizes])
    for e in range(w.shape[0]):
        rows = slice(edges[e], edges[e + 1])
        np.testing.assert_allclose(dw[e], x64[rows].T @ g64[rows], atol=5e-5)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.lists(st.integers(0, 200), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
)
def test_blocks_hold_every_row_once_and_each_block_one_expert(sizes):
    n, block = sum(sizes), 64
    layout = op.lay_out(jnp.asarray(sizes, jnp.int32), n_rows=n, block=block)
    held = np.asarray(layout.row_PQ)
    assert sorted(held[held < n].tolist()) == list(range(n))
    np.testing.assert_array_equal(held.reshape(-1)[np.asarray(layout.slot_R)], np.arange(n))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for rows, expert in zip(held, np.asarray(layout.expert_P), strict=True):
        assert set(owner[rows[rows < n]]) <= {int(expert)}


def test_products_in_bfloat16_accumulate_in_float32():
    x, w, sizes = draw(GROUPED["tiny"])
    half = jnp.bfloat16
    for impl in NAMES:
        out = op.grouped_matmul(x.astype(half), w.astype(half), sizes, impl=impl)
        assert out.dtype == half
        exact = by_hand(
            np.asarray(x.astype(half), np.float64), np.asarray(w.astype(half), np.float64), sizes
        )
        np.testing.assert_allclose(
            np.asarray(out, np.float64), exact, rtol=2**-8, atol=2**-8
        )  # one bf16 rounding


@pytest.mark.gpu
def test_implementations_agree_on_a_gpu_in_bfloat16():
    x, w, sizes = draw(GROUPED["ragged"])
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    cotangent = jax.random.normal(jax.random.key(1), (x.shape[0], w.shape[2]), jnp.bfloat16)
    results = [jax.tree.leaves(both_ways(x, w, sizes, cotangent, impl)) for impl in NAMES]
    for ours, theirs in zip(*results, strict=True):
        ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
        assert jnp.linalg.norm((ours - theirs).ravel()) / jnp.linalg.norm(theirs.ravel()) < 1e-2
