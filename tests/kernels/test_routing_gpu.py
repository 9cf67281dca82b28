"""Routing, and rows put in their places and taken from them on Hopper, equal XLA's: here in an
interpreter, on a GPU by `make gpu`.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.kernels import routing, routing_gpu
from glm45_jax.kernels.shapes import ROUTING
from tests.kernels.routes import assert_equals_go_to_the_first, assert_same_route, skewed


def interpreted(logits, bias, *, groups, top_groups, most=routing_gpu.CTAS, **how):
    """Our kernel as an implementation of `route`."""
    assert groups == top_groups == 1
    run = functools.partial(routing_gpu.route, most=most, interpret=True, **how)
    return routing.by_kernel(run, how["norm_topk"], how["scale"], logits, bias)


# One tile, many with a ragged last one, experts that no tile of columns divides, all of them taken.
@pytest.mark.parametrize("M, E, A, norm", [(1, 8, 1, True), (130, 40, 8, True), (64, 3, 3, False)])
def test_one_kernel_routes_as_top_k_and_a_stable_sort_do(M, E, A, norm):
    assert_same_route(interpreted, *skewed(M, E), A, norm)


def test_a_block_of_many_tiles_counts_on():
    for most in (2, 1):  # of three tiles each, the last one empty; of all five
        some = functools.partial(interpreted, most=most)
        assert_same_route(some, *skewed(300, 24), 5)


def test_equals_go_to_the_first_expert():
    assert_equals_go_to_the_first(interpreted, 70)


def test_a_nan_is_the_largest_and_names_an_expert():
    logits = jax.random.normal(jax.random.key(0), (64, 24)).at[7, 4].set(jnp.nan).at[9].set(jnp.nan)
    how = dict(top_k=3, norm_topk=True, scale=1.0, interpret=True)
    expert, gate, *_ = routing_gpu.route(logits, jnp.zeros(24), **how)
    right = jax.lax.top_k(logits.at[7, 4].set(99.0).at[9].set(0.0), 3)[1]
    np.testing.assert_array_equal(expert, right)
    assert np.isnan(gate[jnp.array([7, 9])]).all() and np.isfinite(np.delete(gate, [7, 9], 0)).all()


def test_what_the_kernels_cannot_do_is_said(monkeypatch):
    def said(E, A=2, groups=1):
        return routing_gpu.refuses(jax.ShapeDtypeStruct((4, E), jnp.float32), A, groups)

    assert "needs compute capability 9.0" in said(8)
    monkeypatch.setattr(routing_gpu, "not_hopper", lambda: None)
    assert said(128) is None
    assert "300 experts are more than 256" in said(300)
    assert "top_k 9 is above 8 experts" in said(8, 9)
    assert "experts come in 4 groups, the kernel knows one" in said(8, 2, 4)
    many = jax.ShapeDtypeStruct((1 << 19, 8), jnp.float32)
    assert "524288 tokens are more than 262144" in routing_gpu.refuses(many, 2)
    small = types.SimpleNamespace(core_count=32)
    monkeypatch.setattr(routing_gpu, "device", lambda: small)
    assert "32 multiprocessors, 128 blocks must run at once, two on each" in said(8)


SMALL = [(s.M, s.A) for s in ROUTING.values() if s.small] + [(5, 8)]  # of tokens, of their experts


def drawn(M, A, D, dtype):
    """Rows of tokens, outputs in expert order, gates, and the order."""
    keys = jax.random.split(jax.random.key(M), 4)
    x = jax.random.normal(keys[0], (M, D), dtype)
    y = jax.random.normal(keys[1], (M * A, D), dtype)
    gates = jax.random.uniform(keys[2], (M, A))
    return x, y, gates, jax.random.permutation(keys[3], M * A).astype(jnp.int32)


def pulled(run, *args):
    """What it gives, and the gradients of all but the order, from the gradient of that, jitted."""

    def both(cotangent, *args):
        out, pull = jax.vjp(lambda *some: run(*some, args[-1]), *args[:-1])
        return out, *pull(cotangent)

    # An argument: drawn inside, XLA may keep more digits of it than its dtype has.
    like = jax.eval_shape(run, *args)
    cotangent = jax.random.normal(jax.random.key(9), like.shape, like.dtype)
    return jax.jit(both)(cotangent, *args)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("M, A", SMALL)
def test_rows_copied_to_their_places_are_those_gathered_and_so_are_gradients(M, A, dtype):
    x, _, _, order = drawn(M, A, 128, dtype)
    place = routing.inverse(order).reshape(M, A)
    ours = pulled(lambda x, order: routing.copied(x, order, place, True), x, order)
    right = pulled(functools.partial(routing.permute, impl="reference"), x, order)
    for a, b in zip(ours, right, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("M, A", SMALL)
def test_the_backward_of_combine_in_one_pass_is_that_of_two(M, A, dtype):
    _, y, gates, order = drawn(M, A, 256, dtype)

    def rounded(run):  # the gradient then has no more digits than y
        return lambda *args: run(*args).astype(dtype)

    place = routing.inverse(order).reshape(M, A)
    ours = pulled(rounded(lambda *args: routing.put_back(*args, place, True)), y, gates, order)
    right = pulled(rounded(functools.partial(routing.combine, impl="reference")), y, gates, order)
    for a, b in zip(ours[:2], right[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(ours[2], right[2], atol=1e-4)  # sums of 256 float32


@pytest.mark.parametrize("block, at_once", [(1, 1), (2, 3), (8, 8)])
def test_no_size_of_blocks_changes_the_rows_put(block, at_once):
    x, y, gates, order = drawn(5, 3, 128, jnp.bfloat16)
    place = routing.inverse(order).reshape(5, 3)
    how = dict(tokens=routing_gpu.Tokens(block, at_once), interpret=True)
    wide = x.astype(jnp.float32)
    put, dots = routing_gpu.put_rows(wide, place, gates, y, dtype=jnp.bfloat16, **how)
    want = (wide[:, None] * gates[:, :, None]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(put[place], want)
    exact = jnp.einsum("md,mad->ma", wide, y[place].astype(jnp.float32))
    np.testing.assert_allclose(dots, exact, atol=1e-4)
    for ours in (routing_gpu.copy_rows(x, place, **how), routing_gpu.put_rows(x, place, **how)[0]):
        np.testing.assert_array_equal(ours, x[order // 3])


def test_copies_by_name_follow_the_routing_and_say_why_they_cannot_run(monkeypatch):
    x, y, gates, order = drawn(4, 2, 96, jnp.float32)
    monkeypatch.setattr(routing_gpu, "not_hopper", lambda: None)
    for run in (
        lambda: routing.permute(x, order, impl="mosaic"),
        lambda: routing.combine(y, gates, order, impl="mosaic"),
    ):
        with pytest.raises(ValueError, match="rows of 96 are not a multiple of 128"):
            run()
    logits, bias = jnp.zeros((4, 8)), jnp.zeros(8)

    def copies(impl):
        asked = functools.partial(routing.route, top_k=2, impl=impl)
        return jax.eval_shape(asked, logits, bias).copies

    assert [copies(impl) for impl in ("auto", "counting", "mosaic")] == ["auto", "auto", "mosaic"]
    assert copies("reference") == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "M, E, A",
    [(s.M, s.E, s.A) for s in ROUTING.values() if s.groups == 1]
    + [(33_000, 64, 4), (256, 160, 8), (7, 256, 8)],
)
def test_the_kernel_routes_as_the_reference_does_on_a_gpu(M, E, A):
    # Scores of a grid, and biases further apart than these: equal or far, however sigmoid rounds.
    logits = jax.random.randint(jax.random.key(0), (M, E), -1000, 1000).astype(jnp.float32) / 256
    bias = 2 * jax.random.randint(jax.random.key(1), (E,), 0, 2).astype(jnp.float32)

    by = {
        impl: jax.jit(functools.partial(routing.route, top_k=A, impl=impl))
        for impl in ("mosaic", "reference")
    }
    ours, right = (run(logits, bias) for run in by.values())
    for field in ("expert_MA", "order_R", "place_MA", "rows_E"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(right, field), err_msg=field)
    np.testing.assert_allclose(ours.gate_MA, right.gate_MA, atol=1e-6)
    cotangent = jax.random.normal(jax.random.key(2), (M, A))
    slopes = [
        jax.jit(jax.grad(lambda x, run=run: (run(x, bias).gate_MA * cotangent).sum()))(logits)
        for run in by.values()
    ]
    np.testing.assert_allclose(*slopes, atol=2e-6)  # float32, summed in another order
    for _ in range(20):  # blocks meet in another order each time
        jax.tree.map(np.testing.assert_array_equal, by["mosaic"](logits, bias), ours)


@pytest.mark.gpu
@pytest.mark.parametrize("M, A, D", [(515, 8, 4096), (131, 8, 5120), (333, 6, 2048), (7, 1, 512)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("op", [routing.permute, routing.combine])
def test_rows_by_name_equal_those_by_xla_on_a_gpu_three_times(op, M, A, D, dtype):
    x, y, gates, order = drawn(M, A, D, dtype)
    args = (x, order) if op is routing.permute else (y, gates, order)

    def run(impl):
        return pulled(lambda *some: op(*some, impl=impl).astype(dtype), *args)

    right, first = run("reference"), run("mosaic")
    for a, b in zip(first[:2], right[:2], strict=True):  # sums of A numbers, in any order
        step = 16 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(*(v.astype(jnp.float32) for v in (a, b)), rtol=step, atol=step)
    if op is routing.combine:  # sums of D float32 numbers of size 1
        np.testing.assert_allclose(first[2], right[2], atol=2e-5 * D)
    for _ in range(2):
        for a, b in zip(run("mosaic"), first, strict=True):
            np.testing.assert_array_equal(a, b)
