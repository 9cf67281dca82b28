"""Routing: Megatron's numbers, a plain-Python router, and the laws of permuting and combining.

The Pallas kernel for TPU runs in an interpreter; test_grouped_matmul_tpu.py compiles it.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.kernels_routing import difference
from glm45_jax.kernels import routing as op
from glm45_jax.kernels import routing_tpu as tpu
from glm45_jax.kernels.shapes import ROUTING
from tests.kernels.routes import (
    assert_equals_go_to_the_first,
    assert_same_route,
    both_ways,
    equal,
    skewed,
)

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "extra" / "moe.npz"
SMALL = [name for name, shape in ROUTING.items() if shape.small]
NAMES = ["counting", "reference"]  # those that run anywhere


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(shape.M, shape.E)).astype(np.float32)
    bias = rng.normal(size=shape.E).astype(np.float32)
    kwargs = {"top_k": shape.A, "groups": shape.groups, "top_groups": shape.top_groups}
    return jnp.asarray(logits), jnp.asarray(bias), kwargs


def by_hand(logits, bias, top_k, groups, top_groups, scale):
    """Spec 2.3, a token at a time."""
    chosen, gates = [], []
    for z in np.asarray(logits, np.float64):
        score = 1 / (1 + np.exp(-z))
        choice = score + bias
        by_group = choice.reshape(groups, -1)
        worth = np.sort(by_group, axis=1)[:, -2:].sum(axis=1)
        kept = np.argsort(-worth)[:top_groups] if groups > 1 else range(groups)
        masked = np.full_like(by_group, -np.inf)
        masked[kept] = by_group[kept]
        experts = np.argsort(-masked.reshape(-1))[:top_k]
        chosen.append(experts)
        gates.append(scale * score[experts] / (score[experts].sum() + 1e-20))
    return np.array(chosen), np.array(gates)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("impl", NAMES)
def test_every_implementation_equals_a_token_at_a_time(name, impl):
    logits, bias, kwargs = draw(ROUTING[name])
    r = op.route(logits, bias, scale=2.5, impl=impl, **kwargs)
    experts, gates = by_hand(logits, np.asarray(bias, np.float64), scale=2.5, **kwargs)
    np.testing.assert_array_equal(r.expert_MA, experts)
    np.testing.assert_allclose(r.gate_MA, gates, atol=1e-6)
    np.testing.assert_array_equal(
        r.rows_E, np.bincount(experts.reshape(-1), minlength=logits.shape[1])
    )
    flat = np.asarray(r.expert_MA).reshape(-1)[np.asarray(r.order_R)]
    assert (np.diff(flat) >= 0).all()
    np.testing.assert_array_equal(np.argsort(r.order_R).reshape(r.expert_MA.shape), r.place_MA)


@pytest.mark.parametrize("M, E, A", [(1, 1, 1), (127, 8, 3), (128, 16, 8), (700, 160, 8)])
def test_counting_orders_rows_as_a_stable_sort_does(M, E, A):
    rng = np.random.default_rng(M)
    skewed = rng.normal(size=(M, E)) + np.linspace(0, 3, E)  # some experts get no row
    expert = jnp.asarray(np.argsort(-skewed, axis=1)[:, :A].astype(np.int32))
    orders = (op.by_sorting, op.by_counting)
    for a, b in zip(*(jax.jit(f, static_argnums=1)(expert, E) for f in orders), strict=True):
        np.testing.assert_array_equal(a, b)


INTERPRETED = functools.partial(tpu.route, interpret=True)


# Less than a tile, a tile and a bit, many tiles, experts that no register's height divides.
@pytest.mark.parametrize(
    "M, E, A, norm",
    [(48, 8, 3, True), (10, 1, 1, True), (513, 20, 20, False), (1300, 160, 8, True)],
)
def test_the_tpu_kernel_equals_top_k_and_a_stable_sort_in_the_interpreter(M, E, A, norm):
    assert_same_route(INTERPRETED, *skewed(M, E), A, norm)


def test_the_tpu_kernel_breaks_ties_as_top_k_does():
    assert_equals_go_to_the_first(INTERPRETED, 300)
    lost = equal(300).at[7, 4].set(jnp.nan).at[7, 9].set(-jnp.nan)
    ours, exact = (
        both_ways(lost, jnp.zeros(24), jnp.ones((300, 8)), run=run, top_k=8)[0].expert_MA
        for run in (INTERPRETED, op.reference)
    )
    assert ours[7, :2].tolist() == [4, 9]
    np.testing.assert_array_equal(np.delete(ours, 7, 0), np.delete(exact, 7, 0))


def test_the_tpu_kernel_says_what_it_cannot_take():
    logits, bias, kwargs = draw(ROUTING["grouped"])
    how = dict(norm_topk=True, scale=1.0)
    assert "4 groups, the kernel knows one" in tpu.refuses(logits, bias, **kwargs, **how)
    how |= dict(top_k=8, groups=1, top_groups=1)
    assert tpu.refuses(logits, bias, **how) is None
    many, long = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 1024), (2**22, 128)))
    assert "at most 512" in tpu.refuses(many, bias, **how)
    assert "VMEM keeps 1048576 at most" in tpu.refuses(long, bias, **how)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="needs a TPU; this is cpu"):
            op.route(logits, bias, top_k=2, impl="mosaic_tpu")


def test_megatron_routes_alike():
    g = np.load(GOLDEN)
    B, S, E = g["logits"].shape
    top_k, scale, _, _ = g["hyper_topk_scale_alpha_u"]
    logits, bias = jnp.asarray(g["logits"].reshape(B * S, E)), jnp.asarray(g["bias"])
    r = op.route(logits, bias, top_k=int(top_k), scale=float(scale))
    dense = np.zeros((B * S, E), np.float32)
    np.put_along_axis(dense, np.asarray(r.expert_MA), np.asarray(r.gate_MA), axis=1)
    np.testing.assert_allclose(dense, g["routing_probs"].reshape(B * S, E), atol=1e-6)
    np.testing.assert_array_equal(op.count_rows(r.expert_MA, E), g["expert_load"])


def test_the_bias_steers_selection_but_has_no_gradient_and_no_part_in_the_gates():
    logits, bias, kwargs = draw(ROUTING["tiny"])
    assert (
        np.asarray(jax.grad(lambda b: op.route(logits, b, **kwargs).gate_MA.sum())(bias)) == 0
    ).all()
    plain, steered = op.route(logits, 0 * bias, **kwargs), op.route(logits, bias, **kwargs)
    assert (np.asarray(plain.expert_MA) != np.asarray(steered.expert_MA)).any()
    score = np.take_along_axis(
        np.asarray(jax.nn.sigmoid(logits)), np.asarray(steered.expert_MA), axis=1
    )
    np.testing.assert_allclose(steered.gate_MA, score / score.sum(axis=1, keepdims=True), atol=1e-6)


def test_combine_after_permute_weighs_each_token_by_its_gates():
    logits, bias, kwargs = draw(ROUTING["tiny"])
    r = op.route(logits, bias, **kwargs)
    x = jax.random.normal(jax.random.key(0), (logits.shape[0], 5))
    for where in ((r.order_R,), (r.order_R, r.place_MA)):
        out = op.combine(op.permute(x, *where), r.gate_MA, *where)
        np.testing.assert_allclose(out, x * r.gate_MA.sum(axis=1, keepdims=True), atol=1e-6)


def test_hand_written_backward_passes_equal_those_of_plain_indexing():
    logits, bias, kwargs = draw(ROUTING["tiny"])
    r = op.route(logits, bias, **kwargs)
    M, A = r.gate_MA.shape
    x = jax.random.normal(jax.random.key(0), (M, 5))

    def ours(x, gate):
        return jnp.sin(op.combine(op.permute(x, r.order_R) ** 2, gate, r.order_R)).sum()

    def plain(x, gate):
        y = (x[r.order_R // A] ** 2) * gate.reshape(-1)[r.order_R][:, None]
        return jnp.sin(jnp.zeros((M, 5)).at[r.order_R // A].add(y)).sum()

    for a, b in zip(
        jax.grad(ours, (0, 1))(x, r.gate_MA), jax.grad(plain, (0, 1))(x, r.gate_MA), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_the_bench_says_which_part_of_a_routing_differs():
    logits = jnp.asarray([[3.0, 2.0, 2.0, -1.0], [0.0, 1.0, 2.0, 3.0]])
    r = op.route(logits, jnp.zeros(4), top_k=2)
    swapped = r.expert_MA.at[0, 1].set(2)  # a tie
    other = r.expert_MA.at[0, 1].set(3)

    def said(**changed):
        found = difference(r.replace(**changed), r, jax.nn.sigmoid(logits))
        return {name: value for name, value in found.items() if value}

    assert said() == {"same": True}
    assert said(gate_MA=r.gate_MA + 2e-7) == {"gates": pytest.approx(2e-7, rel=0.2), "same": True}
    assert said(gate_MA=r.gate_MA + 1e-3) == {"gates": pytest.approx(1e-3, rel=0.01)}
    assert said(expert_MA=swapped) == {"chosen": 1, "same": True}
    assert said(expert_MA=other) == {"chosen": 1, "wrong": 1}
    assert said(order_R=r.order_R[::-1]) == {"order": 4}
    assert said(rows_E=r.rows_E + 1) == {"counts": 4}
