"""Routing: Megatron's numbers, a plain-Python router, and the laws of permuting and combining."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.kernels import routing as op
from glm45_jax.kernels.shapes import ROUTING

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "extra" / "moe.npz"
SMALL = [name for name, shape in ROUTING.items() if shape.small]


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
@pytest.mark.parametrize("impl", [i.name for i in op.IMPLS])
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


@pytest.mark.parametrize("M, E, A", [(1, 1, 1), (127, 8, 3), (128, 16, 8), (700, 160, 8)])
def test_counting_orders_rows_as_a_stable_sort_does(M, E, A):
    rng = np.random.default_rng(M)
    skewed = rng.normal(size=(M, E)) + np.linspace(0, 3, E)  # some experts get no row
    expert = jnp.asarray(np.argsort(-skewed, axis=1)[:, :A].astype(np.int32))
    orders = (op.by_sorting, op.by_counting)
    for a, b in zip(*(jax.jit(f, static_argnums=1)(expert, E) for f in orders), strict=True):
        np.testing.assert_array_equal(a, b)


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
    out = op.combine(op.permute(x, r.order_R), r.gate_MA, r.order_R)
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
