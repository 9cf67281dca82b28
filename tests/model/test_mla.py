"""Latent attention: parity with the public reference on a tiny GLM-4.7-Flash, and the laws of a
mixer: causal, packed = apart, absorbed decoding = the forward pass.

A golden fails? The files are inputs, not outputs: ask first which equation of spec 2.2 changed, and
why (tests/golden/README.md).
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from glm45_jax import hf
from glm45_jax import params as plan
from glm45_jax.kernels.attention import attention
from glm45_jax.model import config, mtp, transformer
from glm45_jax.model.block import block
from glm45_jax.model.config import Mla
from glm45_jax.model.norm import rms_norm
from glm45_jax.model.rope import deinterleave, rotate, rotation
from glm45_jax.optim.muon import Muon

LITE = pathlib.Path(__file__).parent.parent / "golden" / "lite"
CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # advised for float32 activations
T = 24
# Every width differs from every other, so that no two can be exchanged.
SMALL = Mla(heads=3, q_rank=20, kv_rank=14, nope_dim=12, rope_dim=6, v_dim=10, rope_theta=1e4)


@functools.cache
def golden():
    cfg, params = hf.load(LITE)
    return cfg, params, np.load(LITE / "io.npz")


@functools.cache
def tiny_mla():
    cfg = dataclasses.replace(config.tiny(), mixer=SMALL)
    params = plan.init(transformer.specs(cfg), jax.random.key(0))
    # Larger than at the start of training, so that what attends differs by more than rounding.
    return cfg, jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, params)


@functools.cache
def forward(cfg):
    return jax.jit(functools.partial(transformer.forward, cfg=cfg))


def tokens(rows=2, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, T), 0, 256)


def golden_layers(cfg, params, ids):
    """(attention output, state after the layer) of every layer in turn."""
    x_BTD, flow = (
        transformer.embed(params, ids, cfg),
        transformer.make_flow(cfg, ids.shape, None, None),
    )
    for layer in range(cfg.n_layers):
        dense = layer < cfg.n_dense
        stacked, at = (params.dense, layer) if dense else (params.moe, layer - cfg.n_dense)
        p = jax.tree.map(lambda w, at=at: w[at], stacked)
        mixed_BTD, _ = cfg.mixer(
            p.mixer,
            rms_norm(x_BTD, p.norm_mixer_D, cfg.norm_eps),
            turn=flow.turn,
            positions_BT=None,
            segments_BT=None,
            eps=cfg.norm_eps,
            impl="auto",
        )
        x_BTD, _ = block(p, x_BTD, flow, cfg=cfg)
        yield mixed_BTD, x_BTD


def test_golden_logits():
    cfg, params, io = golden()
    hidden = forward(cfg)(params, jnp.asarray(io["input_ids"]))
    np.testing.assert_allclose(transformer.logits(params, hidden, cfg=cfg), io["logits"], **CLOSE)


def test_golden_attention_outputs_and_layer_states():
    cfg, params, io = golden()
    layers = golden_layers(cfg, params, jnp.asarray(io["input_ids"]))
    for i, (mixed_BTD, x_BTD) in enumerate(layers):
        np.testing.assert_allclose(mixed_BTD, io[f"attn_out_{i}"], **CLOSE)
        np.testing.assert_allclose(x_BTD, io[f"h_layer_{i}"], **CLOSE)


def test_golden_logits_through_the_latent_cache():
    cfg, params, io = golden()
    ids = jnp.asarray(io["input_ids"])
    cache = transformer.empty_cache(cfg, rows=ids.shape[0], max_tokens=ids.shape[1])
    hidden, _ = transformer.decode(params, ids, cache, cfg=cfg)
    np.testing.assert_allclose(transformer.logits(params, hidden, cfg=cfg), io["logits"], **CLOSE)


def test_the_config_s_eps_in_the_latent_norms_is_seen_in_the_golden():
    cfg, params, io = golden()
    assert (cfg.norm_eps, cfg.mixer.latent_eps) == (1e-5, 1e-6)
    other = dataclasses.replace(cfg, mixer=dataclasses.replace(cfg.mixer, latent_eps=1e-5))
    ids = jnp.asarray(io["input_ids"])

    def off(cfg):
        logits = transformer.logits(params, forward(cfg)(params, ids), cfg=cfg)
        return np.abs(np.asarray(logits) - io["logits"]).max()

    assert off(cfg) < 1e-5 < off(other)


def test_future_tokens_have_no_gradient_on_the_past():
    cfg, params = tiny_mla()
    ids = tokens()

    def early(embedded_BTD):
        flow = transformer.make_flow(cfg, ids.shape, None, None)
        x_BTD, outs = transformer._trunk(params, embedded_BTD, flow, cfg, None, False)
        return (transformer._hidden(params, x_BTD, outs, cfg).hidden_BTD[:, :9] ** 2).sum()

    grad_BTD = np.asarray(jax.jit(jax.grad(early))(transformer.embed(params, ids, cfg)))
    assert (grad_BTD[:, 9:] == 0).all()
    assert (np.abs(grad_BTD[:, :9]).max(axis=(0, 2)) > 0).all()


def test_a_packed_row_is_its_documents_apart():
    cfg, params = tiny_mla()
    ids, lengths = tokens(1), (10, 9, 5)
    segments_BT = jnp.asarray(np.repeat([1, 2, 3], lengths)[None].astype(np.int32))
    positions_BT = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None], jnp.int32)
    whole = forward(cfg)(params, ids, segments_BT=segments_BT, positions_BT=positions_BT)
    start = 0
    for n in lengths:
        alone = transformer.forward(params, ids[:, start : start + n], cfg=cfg)
        np.testing.assert_allclose(
            whole.hidden_BTD[:, start : start + n], alone.hidden_BTD, atol=1e-5
        )
        start += n


@pytest.mark.parametrize("mixer", [SMALL, dataclasses.replace(SMALL, rope_theta=1e6)])
def test_positions_shift_freely(mixer):
    cfg, params = tiny_mla()
    cfg, ids = dataclasses.replace(cfg, mixer=mixer), tokens()
    at_BT = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None, :], (2, 1))
    here = forward(cfg)(params, ids).hidden_BTD
    shifted = forward(cfg)(params, ids, positions_BT=at_BT + 100).hidden_BTD
    np.testing.assert_allclose(shifted, here, atol=2e-5)
    stretched = forward(cfg)(params, ids, positions_BT=at_BT * 3).hidden_BTD
    assert np.abs(stretched - here).max() > 1e-3


def test_interleaved_rotation_turns_pair_j_by_position_times_frequency_j():
    R, theta = 6, 1e4
    x_BTNH = jax.random.normal(jax.random.key(0), (1, 4, 2, R))
    at_BT = jnp.asarray([[0, 1, 5, 40]], jnp.int32)
    turn = rotation(at_BT, rotary_dim=R, theta=theta, dtype=jnp.dtype("float32"))
    ours = np.asarray(rotate(deinterleave(x_BTNH), turn))
    pairs = np.asarray(x_BTNH).reshape(1, 4, 2, R // 2, 2)
    frequency = theta ** (-2 * np.arange(R // 2) / R)
    angle = np.asarray(at_BT)[:, :, None, None] * frequency
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
    np.testing.assert_allclose(ours, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 9, 14])
def test_absorbed_decoding_through_the_latent_cache_is_the_expanded_forward_pass(prompt):
    cfg, params = tiny_mla()
    ids = tokens()
    whole = forward(cfg)(params, ids).hidden_BTD
    step = jax.jit(functools.partial(transformer.decode, cfg=cfg))
    cache, parts = transformer.empty_cache(cfg, rows=2, max_tokens=T, page=5), []
    for piece in (ids[:, :prompt], *(ids[:, t : t + 1] for t in range(prompt, 14))):
        hidden, cache = step(params, piece, cache)
        parts.append(hidden.hidden_BTD)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole[:, :14], atol=1e-5)
    np.testing.assert_array_equal(cache.length_B, [14, 14])


def test_ragged_prompts_decode_as_each_alone():
    cfg, params = tiny_mla()
    ids, lengths = tokens(), (5, 9)
    valid_BT = jnp.asarray([[t < n for t in range(9)] for n in lengths])
    cache = transformer.empty_cache(cfg, rows=2, max_tokens=T)
    hidden, cache = transformer.decode(params, ids[:, :9], cache, cfg=cfg, valid_BT=valid_BT)
    after, cache = transformer.decode(params, ids[:, 20:21], cache, cfg=cfg)
    for row, n in enumerate(lengths):
        own = jnp.concatenate([ids[row : row + 1, :n], ids[row : row + 1, 20:21]], axis=1)
        alone = transformer.forward(params, own, cfg=cfg).hidden_BTD
        np.testing.assert_allclose(hidden.hidden_BTD[row, :n], alone[0, :n], atol=1e-5)
        np.testing.assert_allclose(after.hidden_BTD[row, 0], alone[0, n], atol=1e-5)


def test_a_token_of_flash_leaves_576_numbers_a_layer_where_keys_and_values_would_be_10240():
    cfg = config.glm47_flash()
    cache = jax.eval_shape(lambda: transformer.empty_cache(cfg, rows=2, max_tokens=32))
    held = cache.k_LPSKH.size + cache.v_LPSKH.size
    assert held == cfg.n_layers * 2 * 32 * 576
    mixer = cfg.mixer
    assert mixer.heads * (mixer.qk_dim + mixer.v_dim) == 10_240


def test_no_key_or_value_of_a_head_exists_while_decoding():
    cfg, params = tiny_mla()
    S, mixer = 48, cfg.mixer
    cache = transformer.empty_cache(cfg, rows=2, max_tokens=S)
    jaxpr = jax.make_jaxpr(functools.partial(transformer.decode, cfg=cfg))(
        params, tokens()[:, :1], cache
    )
    per_head = S * mixer.heads * min(mixer.qk_dim, mixer.v_dim)
    shapes = [v.aval.shape for v in every_result(jaxpr.jaxpr) if v.aval.shape[:2] == (2, S)]
    assert shapes  # the gathered latents are there
    assert max(int(np.prod(s[1:])) for s in shapes) < per_head


def every_result(jaxpr):
    """Variables that some equation gives, inner programs included."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jaxprs_in_params(equation.params):
            yield from every_result(inner)


def test_values_narrower_than_keys_are_values_padded_with_zeros():
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 8, n, h))
        for i, (n, h) in enumerate(((4, 6), (2, 6), (2, 4)))
    )
    padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 2)))
    np.testing.assert_allclose(attention(q, k, v), attention(q, k, padded)[..., :4], atol=1e-6)


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dots", "outputs"))]
)
def test_a_loss_with_mtp_has_finite_gradients_everywhere_and_remat_does_not_matter(remat):
    cfg, params = tiny_mla()
    ids = tokens()

    def loss(cfg):
        def f(params):
            out = transformer.forward(params, ids, cfg=cfg, keep_router_logits=False)
            ahead = mtp.forward_all(params, out.hidden_BTD, ids, cfg=cfg)
            return (out.hidden_BTD**2).sum() + (ahead.hidden_BTD**2).sum()

        return jax.jit(jax.grad(f))(params)

    grads = loss(dataclasses.replace(cfg, remat=remat))
    plain = loss(cfg)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5, rtol=1e-4), grads, plain)
    for path, grad in plan.leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        if ".mixer." in path:
            assert (np.asarray(grad) != 0).any(), path


def test_muon_sees_each_projection_as_inputs_by_outputs_and_a_step_moves_all():
    cfg, params = tiny_mla()
    specs = transformer.specs(cfg)
    shapes = {path.split(".")[-1]: s.matrix_shape for path, s in mixer_matrices(specs.moe)}
    L, D = cfg.n_moe, cfg.d_model
    assert shapes == {
        "q_down_DQ": (L, D, 20),
        "q_up_QNH": (L, 20, 3 * 18),
        "kv_down_DY": (L, D, 14 + 6),
        "kv_up_ZNX": (L, 14, 3 * 22),
        "out_NUD": (L, 3 * 10, D),
    }
    tx = Muon(lr=1e-2, dtype="float32").build(specs)
    updates, _ = tx.update(params, tx.init(params), params)  # any gradient will do
    moved = optax.apply_updates(params, updates)
    for (path, old), (_, new) in zip(
        plan.leaves_with_path(params), plan.leaves_with_path(moved), strict=True
    ):
        if ".mixer." in path:
            assert np.isfinite(new).all() and (np.asarray(new) != np.asarray(old)).any(), path


def mixer_matrices(block_specs):
    leaves = plan.leaves_with_path(block_specs)
    return [(path, s) for path, s in leaves if path.startswith("mixer.") and s.kind == "matrix"]


def test_sizes_that_cannot_be_are_refused_with_the_value():
    with pytest.raises(ValueError, match="rope_dim 7 is odd"):
        Mla(rope_dim=7)
    with pytest.raises(ValueError, match="the smallest is 0"):
        Mla(v_dim=0)
