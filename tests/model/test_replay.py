"""Routing replay: experts chosen elsewhere, gates by this router."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax import params as params_lib
from glm45_jax import sharding
from glm45_jax.kernels.routing import route
from glm45_jax.model import config, transformer
from glm45_jax.model.expert_parallel import GatherTokens, PaddedAllToAll
from glm45_jax.sharding import MeshShape, Rules
from tests.bits import UNFUSED

CFG = dataclasses.replace(config.tiny(), n_mtp=0, impl=config.Impl(grouped_matmul="reference"))
B, T, L, E, A = 4, 10, CFG.n_moe, CFG.moe.experts, CFG.moe.top_k


@functools.cache
def weights():
    params = params_lib.init(transformer.specs(CFG), jax.random.key(0))
    return jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, params)


def rows(seed=0):
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(0, CFG.vocab, (B, T)).astype(np.int32)
    segments_BT = np.repeat([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]], B, axis=0).astype(np.int32)
    routes_BTLA = rng.random((B, T, L, E)).argsort(axis=-1)[..., :A].astype(np.int16)
    return tokens_BT, segments_BT, routes_BTLA


@functools.cache
def passed(replays):
    """value, gradient and `Hidden` of a fixed function of the hidden states, compiled once."""

    def total(params, tokens_BT, segments_BT, routes_BTLA):
        hidden = transformer.forward(
            params,
            tokens_BT,
            cfg=CFG,
            segments_BT=segments_BT,
            routes_BTLA=routes_BTLA if replays else None,
        )
        return (hidden.hidden_BTD**2 * jnp.arange(1.0, 65)[None, None]).mean(), hidden

    return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=UNFUSED)


def own_routes(hidden):
    """What the router chose, [B, T, L, A]."""
    bias_LE = weights().moe.ffn.bias_E
    chosen = [
        route(logits_BTE.reshape(B * T, E), bias_E, top_k=A).expert_MA.reshape(B, T, A)
        for logits_BTE, bias_E in zip(hidden.router_logits_LBTE, bias_LE, strict=True)
    ]
    return np.stack(chosen, axis=2).astype(np.int16)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_routers_own_routes_replayed_change_no_bit_of_output_or_gradient():
    tokens_BT, segments_BT, _ = rows()
    free = passed(False)(weights(), tokens_BT, segments_BT, None)
    routes_BTLA = own_routes(free[0][1])
    assert_equal(passed(True)(weights(), tokens_BT, segments_BT, routes_BTLA), free)
    unknown_BTLA = np.where(np.arange(T)[None, :, None, None] % 2, routes_BTLA, -1)
    again = passed(True)(weights(), tokens_BT, segments_BT, unknown_BTLA.astype(np.int16))
    assert_equal(again, free)


def test_foreign_routes_are_where_the_tokens_go_and_unknown_ones_are_the_routers():
    tokens_BT, segments_BT, routes_BTLA = rows(1)
    (_, free), _ = passed(False)(weights(), tokens_BT, segments_BT, None)
    (_, forced), grads = passed(True)(weights(), tokens_BT, segments_BT, routes_BTLA)
    assert np.abs(np.asarray(forced.hidden_BTD - free.hidden_BTD))[segments_BT > 0].max() > 1e-2
    for layer in range(L):
        taken_E = np.bincount(routes_BTLA[segments_BT > 0][:, layer].reshape(-1), minlength=E)
        np.testing.assert_array_equal(forced.load_LE[layer], taken_E)
    assert np.abs(np.asarray(grads.moe.ffn.router_DE)).max() > 0  # the gates are the router's
    some_BTLA = np.where(np.arange(B)[:, None, None, None] < 2, routes_BTLA, -1).astype(np.int16)
    (_, half), _ = passed(True)(weights(), tokens_BT, segments_BT, some_BTLA)
    np.testing.assert_allclose(half.hidden_BTD[:2], forced.hidden_BTD[:2], atol=1e-5)
    np.testing.assert_allclose(half.hidden_BTD[2:], free.hidden_BTD[2:], atol=1e-5)


def test_gates_of_replayed_experts_are_the_unbiased_scores_normalised_and_scaled():
    rng = np.random.default_rng(2)
    logits_ME, bias_E = rng.normal(size=(5, E)).astype(np.float32), jnp.zeros(E).at[0].set(9.0)
    routes_MA = np.array([[6, 1, 3]] * 4 + [[2, -1, -1]], np.int16)
    found = route(jnp.asarray(logits_ME), bias_E, top_k=3, scale=2.5, routes_MA=routes_MA)
    score_MA = 1 / (1 + np.exp(-np.take_along_axis(logits_ME, np.abs(routes_MA).astype(int), 1)))
    expected_MA = 2.5 * score_MA / score_MA.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(found.expert_MA[:4], routes_MA[:4])
    np.testing.assert_allclose(found.gate_MA[:4], expected_MA[:4], rtol=1e-5)
    own = route(jnp.asarray(logits_ME), bias_E, top_k=3, scale=2.5)
    np.testing.assert_array_equal(found.expert_MA[4], own.expert_MA[4])  # one unknown: all its own
    np.testing.assert_array_equal(found.gate_MA[4], own.gate_MA[4])


@pytest.mark.parametrize("exchange", [None, GatherTokens(0.5), PaddedAllToAll(0.5)])
def test_routes_travel_with_their_tokens_over_a_mesh(exchange):
    # Nine positions over two devices: the last is padded, and buffers hold half of an even routing.
    tokens_BT, segments_BT, routes_BTLA = (x[:, :9] for x in rows(3))
    mesh = sharding.make_mesh(MeshShape(data=2, fsdp=1, expert=2, tensor=2))
    rules = Rules(batch=("data",), exchange=exchange)

    def forward(params, tokens_BT, segments_BT, routes_BTLA):
        return transformer.forward(
            params, tokens_BT, cfg=CFG, segments_BT=segments_BT, routes_BTLA=routes_BTLA
        )

    def meshed(*args):
        with sharding.use(mesh, rules):
            return forward(*args)

    arguments = weights(), tokens_BT, segments_BT, routes_BTLA
    alone, spread = jax.jit(forward)(*arguments), jax.jit(meshed)(*arguments)
    np.testing.assert_array_equal(spread.load_LE, alone.load_LE)
    valid_BT = segments_BT > 0
    ours, theirs = (np.asarray(x.hidden_BTD)[valid_BT] for x in (spread, alone))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
