"""Laws of the model: the past does not see the future, documents do not see each other, the cache
and remat change nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.model import config, mtp, transformer
from glm45_jax.model.config import Gqa, Moe

T = 24
LENGTHS = (10, 7, 4)  # documents of a packed row; the rest is padding


def tokens(rows=2, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, T), 0, 256)


@functools.cache
def forward(cfg):
    return jax.jit(functools.partial(transformer.forward, cfg=cfg))


def packed_row(ids):
    segments = np.repeat(np.arange(1, 4), LENGTHS)
    positions = np.concatenate([np.arange(n) for n in LENGTHS])
    pad = T - len(segments)
    return (
        jnp.asarray(np.pad(segments, (0, pad))[None].astype(np.int32)),
        jnp.asarray(np.pad(positions, (0, pad))[None].astype(np.int32)),
        [ids[:, sum(LENGTHS[:i]) : sum(LENGTHS[: i + 1])] for i in range(3)],
    )


def test_future_tokens_have_no_gradient_on_the_past(tiny):
    cfg, params = tiny
    ids = tokens()

    def early(embedded):
        flow = transformer.make_flow(cfg, ids.shape, None, None)
        x, outs = transformer._trunk(params, embedded, flow, cfg, None, False)
        return (transformer._hidden(params, x, outs, cfg).hidden_BTD[:, :9] ** 2).sum()

    grad = np.asarray(jax.jit(jax.grad(early))(transformer.embed(params, ids, cfg)))
    assert (grad[:, 9:] == 0).all()
    assert (np.abs(grad[:, :9]).max(axis=(0, 2)) > 0).all()


@functools.cache
def forward_mtp(cfg):
    return jax.jit(functools.partial(mtp.forward_all, cfg=cfg))


def test_a_packed_row_is_its_documents_apart(tiny):
    cfg, params = tiny
    ids = tokens(1)
    segments, positions, documents = packed_row(ids)
    where = dict(segments_BT=segments, positions_BT=positions)
    whole = forward(cfg)(params, ids, **where)
    ahead = forward_mtp(cfg)(params, whole.hidden_BTD, ids, **where)
    start, apart = 0, []
    for document in documents:
        alone = forward(cfg)(params, document)
        guess = forward_mtp(cfg)(params, alone.hidden_BTD, document)
        apart.append((alone, guess))
        n = document.shape[1]
        for ours, its, places in ((whole, alone, n), (ahead, guess, n - 1)):
            np.testing.assert_allclose(
                ours.hidden_BTD[:, start : start + places], its.hidden_BTD[:, :places], atol=1e-5
            )
        start += n
    for ours, each in zip((whole, ahead), zip(*apart, strict=True), strict=True):
        np.testing.assert_array_equal(ours.load_LE, sum(one.load_LE for one in each))
        np.testing.assert_allclose(ours.balance_LB, sum(one.balance_LB for one in each), rtol=1e-5)


def test_the_last_place_of_mtp_counts_nowhere(tiny):
    cfg, params = tiny
    ids = tokens()
    hidden = forward(cfg)(params, ids).hidden_BTD
    ours = forward_mtp(cfg)(params, hidden, ids)
    other = forward_mtp(cfg)(params, hidden.at[:, -1].multiply(-3.0), ids)
    assert float(jnp.abs(other.hidden_BTD[:, -1] - ours.hidden_BTD[:, -1]).max()) > 0.1
    np.testing.assert_array_equal(other.hidden_BTD[:, :-1], ours.hidden_BTD[:, :-1])
    np.testing.assert_array_equal(other.load_LE, ours.load_LE)
    np.testing.assert_array_equal(other.balance_LB, ours.balance_LB)
    assert ours.load_LE.sum() == 2 * (T - 1) * cfg.moe.top_k


def test_positions_shift_freely_within_a_document(tiny):
    cfg, params = tiny
    ids = tokens()
    at = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None, :], (2, 1))
    here = forward(cfg)(params, ids).hidden_BTD
    np.testing.assert_allclose(
        forward(cfg)(params, ids, positions_BT=at + 100).hidden_BTD, here, atol=2e-5
    )


def test_rows_of_a_batch_do_not_see_each_other(tiny):
    cfg, params = tiny
    ids = tokens(4)
    order = jnp.asarray([2, 0, 3, 1])
    out = forward(cfg)(params, ids)
    mixed = forward(cfg)(params, ids[order])
    np.testing.assert_allclose(mixed.hidden_BTD, out.hidden_BTD[order], atol=1e-5)
    np.testing.assert_array_equal(mixed.load_LE, out.load_LE)


def test_renaming_experts_changes_nothing(tiny):
    cfg, params = tiny
    order = jnp.asarray([3, 1, 7, 0, 2, 6, 5, 4])
    ffn = params.moe.ffn
    renamed = ffn.replace(
        router_DE=ffn.router_DE[:, :, order],
        bias_E=ffn.bias_E[:, order],
        gate_EDF=ffn.gate_EDF[:, order],
        up_EDF=ffn.up_EDF[:, order],
        down_EFD=ffn.down_EFD[:, order],
    )
    ids = tokens()
    out = forward(cfg)(params, ids)
    other = forward(cfg)(params.replace(moe=params.moe.replace(ffn=renamed)), ids)
    np.testing.assert_allclose(other.hidden_BTD, out.hidden_BTD, atol=1e-5)
    np.testing.assert_array_equal(other.load_LE, out.load_LE[:, order])


@pytest.mark.parametrize("prompt", [1, 9])
def test_decoding_through_the_cache_is_the_forward_pass(tiny, prompt):
    cfg, params = tiny
    ids = tokens()
    whole = transformer.logits(params, forward(cfg)(params, ids), cfg=cfg)
    step = jax.jit(functools.partial(transformer.decode, cfg=cfg))
    cache = transformer.empty_cache(cfg, rows=2, max_tokens=T, page=5)
    parts = []
    for piece in (ids[:, :prompt], *(ids[:, t : t + 1] for t in range(prompt, 14))):
        hidden, cache = step(params, piece, cache)
        parts.append(transformer.logits(params, hidden, cfg=cfg))
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole[:, :14], atol=3e-5)
    np.testing.assert_array_equal(cache.length_B, [14, 14])


def test_ragged_prompts_decode_as_each_alone(tiny):
    cfg, params = tiny
    ids, lengths = tokens(), (5, 9)
    valid = jnp.asarray([[t < n for t in range(9)] for n in lengths])
    cache = transformer.empty_cache(cfg, rows=2, max_tokens=T)
    hidden, cache = transformer.decode(params, ids[:, :9], cache, cfg=cfg, valid_BT=valid)
    after, cache = transformer.decode(params, ids[:, 20:21], cache, cfg=cfg)
    for row, n in enumerate(lengths):
        own = jnp.concatenate([ids[row : row + 1, :n], ids[row : row + 1, 20:21]], axis=1)
        alone = transformer.forward(params, own, cfg=cfg).hidden_BTD
        np.testing.assert_allclose(hidden.hidden_BTD[row, :n], alone[0, :n], atol=1e-5)
        np.testing.assert_allclose(after.hidden_BTD[row, 0], alone[0, n], atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots", "outputs"])
def test_remat_changes_neither_output_nor_gradient(tiny, remat):
    cfg, params = tiny
    ids = tokens()

    def loss(cfg):
        def f(params):
            out = transformer.forward(params, ids, cfg=cfg, keep_router_logits=False)
            return (out.hidden_BTD**2).sum() + out.balance_LB.sum(), out.load_LE

        return jax.jit(jax.value_and_grad(f, has_aux=True))(params)

    (plain, load), grads = loss(cfg)
    (again, same_load), regrads = loss(dataclasses.replace(cfg, remat=remat))
    np.testing.assert_allclose(again, plain, rtol=1e-6)
    np.testing.assert_array_equal(same_load, load)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), regrads, grads
    )


def test_the_router_bias_has_no_gradient(tiny):
    cfg, params = tiny
    ids = tokens()
    grads = jax.jit(
        jax.grad(lambda p: (transformer.forward(p, ids, cfg=cfg).hidden_BTD ** 2).sum())
    )(params)
    assert (np.asarray(grads.moe.ffn.bias_E) == 0).all()
    assert (np.asarray(grads.moe.ffn.router_DE) != 0).any()


def test_configs_that_cannot_be_are_refused_with_both_values():
    for build, words in (
        (lambda: Gqa(heads=6, kv_heads=4), "heads 6 is not a multiple of kv_heads 4"),
        (lambda: Moe(experts=8, top_k=9), "top_k 9 is not between 1 and the 8"),
        (lambda: Moe(experts=8, groups=3), "experts 8 is not a multiple of groups 3"),
        (lambda: dataclasses.replace(config.tiny(), n_mtp=2), "n_mtp 2"),
    ):
        with pytest.raises(ValueError, match=words):
            build()


def test_a_decode_step_makes_no_copy_of_the_cache(tiny):
    cfg, params = tiny
    cache = transformer.empty_cache(cfg, rows=2, max_tokens=2**14)
    held = cache.k_LPSKH.nbytes + cache.v_LPSKH.nbytes
    cache = cache.replace(table_BP=cache.table_BP[:, :4])  # rows that reach little of it
    step = jax.jit(functools.partial(transformer.decode, cfg=cfg), donate_argnums=2)
    compiled = step.lower(params, jnp.ones((2, 1), jnp.int32), cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < held / 8
