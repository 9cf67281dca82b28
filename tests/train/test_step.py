"""Laws of the step: however a batch is cut into devices, micro-batches or rows, the same loss,
gradient and bias.
"""

import contextlib
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax import params as params_lib
from glm45_jax.data.types import Batch
from glm45_jax.model import config, transformer
from glm45_jax.train.loss import Weights
from glm45_jax.train.step import gradients, move_bias
from tests.train.common import LANES, MESH, ONE, SPLIT, Pmap, packed_batch, trainer

WAYS = {
    "pmap": (Pmap(), None),
    "mesh": (MESH, None),
    "mesh with experts and tensor": (SPLIT, None),
    "micro-batches": (ONE, 4),
    "mesh and micro-batches": (MESH, 8),
}
SPLIT_ROWS = "mesh with rows split over devices"


@contextlib.contextmanager
def compilations():
    """A list that grows by one record for each program compiled inside."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record) if "Compiling" in record.msg else None
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(handler)
    with jax.log_compiles():
        yield records
    logger.removeHandler(handler)


@functools.cache
def after_two_steps(way):
    where, micro_rows = {"single": (ONE, None), SPLIT_ROWS: (LANES, 8), **WAYS}[way]
    run = trainer(where, micro_rows)
    state = run.init(jax.random.key(0))
    # Waited for: on a busy CPU, two programs with collectives wait for each other until XLA aborts.
    state, first = jax.block_until_ready(run.step(state, packed_batch(0)))
    with compilations() as compiled:
        state, second = run.step(state, packed_batch(1))
    outs = [jax.device_get(first), jax.device_get(second)]
    nll = run.nll(state, packed_batch(2))
    return jax.device_get(run.save_view(state)), outs, nll, len(compiled)


# The others hold what these do, one at a time.
IN_PARTS = ("mesh", "micro-batches", SPLIT_ROWS)
EVERY_WAY = [
    pytest.param(way, marks=pytest.mark.slow) if way in IN_PARTS else way
    for way in (*WAYS, SPLIT_ROWS)
]


@pytest.mark.parametrize("way", EVERY_WAY)
def test_devices_and_micro_batches_change_nothing(way):
    state, outs, nll, _ = after_two_steps(way)
    alone, alone_outs, alone_nll, _ = after_two_steps("single")
    for out, expected in zip(outs, alone_outs, strict=True):
        assert out.scalars["spilled"] == 0  # on CPU weights travel, and rows stay
        np.testing.assert_array_equal(out.load_LE, expected.load_LE)
        np.testing.assert_array_equal(out.bias_LE, expected.bias_LE)
        for name in expected.scalars:
            np.testing.assert_allclose(
                out.scalars[name], expected.scalars[name], rtol=2e-5, err_msg=name
            )
    # The optimizer's sums are the gradients. The weights may differ by more: Adam divides an
    # embedding row's tiny gradient by its own size, so float32 rounding shows at 1% of a step of
    # 3e-3.
    for ours, theirs in zip(jax.tree.leaves(state.opt), jax.tree.leaves(alone.opt), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)
    np.testing.assert_allclose(nll, alone_nll, rtol=1e-5)
    assert state.tokens_seen.tolist() == alone.tokens_seen.tolist() == [0, 2 * 16 * 24]


def test_log_probs_place_by_place_add_up_to_the_loss_on_any_devices():
    batch, found = packed_batch(), []
    for where, micro_rows in ((ONE, None), (ONE, 4), (Pmap(), None)):
        run = trainer(where, micro_rows)
        state = run.init(jax.random.key(0))
        found.append(run.logp(state.params, batch))
        nll, n = run.nll(state, batch)
        np.testing.assert_allclose(-(found[-1] * batch.mask_BT).sum(), nll, rtol=1e-5)
        assert n == batch.mask_BT.sum()
        again = run.begin(run.save_view(state).params, jax.random.key(1))
        np.testing.assert_array_equal(run.logp(again.params, batch), found[-1])
        np.testing.assert_allclose(found[-1], found[0], atol=1e-5)


@functools.cache
def initial():
    cfg = config.tiny()
    return cfg, params_lib.init(transformer.specs(cfg), jax.random.key(0))


@functools.cache
def gradient_of(packed):
    cfg, _ = initial()
    weights = Weights(jnp.float32(0.3), jnp.float32(1e-2))
    return jax.jit(lambda params, batch: gradients(params, batch, weights, cfg=cfg, packed=packed))


def apart(batch):
    """Every document of a packed batch in a row of its own."""
    rows = []
    for b, segments in enumerate(batch.segments_BT):
        for document in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == document)
            pad = len(segments) - len(at)
            rows.append([np.pad(x[b][at], (0, pad)) for x in vars(batch).values()])
            rows[-1][2] = np.minimum(rows[-1][2], 1)
    return Batch(*(np.stack(column) for column in zip(*rows, strict=True)))


def test_packed_rows_give_the_loss_and_gradient_of_their_documents_apart():
    _, params = initial()
    batch = packed_batch(rows=4)
    grads, out = gradient_of(True)(params, batch)
    alone_grads, alone = gradient_of(True)(params, apart(batch))
    assert apart(batch).tokens_BT.shape[0] > 4
    for name in out.parts:
        np.testing.assert_allclose(out.parts[name], alone.parts[name], rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(out.load_LE, alone.load_LE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, alone_grads)


def test_what_padding_and_masked_targets_hold_does_not_matter():
    _, params = initial()
    batch = packed_batch(rows=4)
    hole = batch.segments_BT == 0
    other = batch.replace(
        tokens_BT=np.where(hole, 7, batch.tokens_BT),
        targets_BT=np.where(batch.mask_BT > 0, batch.targets_BT, 9),
    )
    grads, out = gradient_of(True)(params, batch)
    same_grads, same = gradient_of(True)(params, other)
    assert (batch.tokens_BT != other.tokens_BT).any()
    np.testing.assert_array_equal(out.load_LE, same.load_LE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, same_grads)
    np.testing.assert_allclose(out.loss, same.loss, rtol=1e-6)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    _, params = initial()
    _, out = gradient_of(True)(params, packed_batch(rows=4))
    total = out.parts["ce"] + 0.3 * out.parts["mtp"] + 1e-2 * out.parts["balance"]
    np.testing.assert_allclose(out.loss, total, rtol=1e-6)


def test_the_bias_moves_once_toward_the_experts_that_took_less_than_the_mean():
    _, params = initial()
    load = jnp.asarray([[4, 0, 2, 2, 1, 3, 2, 2]] * 3)
    moved = move_bias(params, load, jnp.float32(0.5))
    expected = 0.5 * np.sign(2 - np.asarray(load[0]))
    np.testing.assert_array_equal(moved.moe.ffn.bias_E, np.tile(expected, (2, 1)))
    np.testing.assert_array_equal(moved.mtp.block.ffn.bias_E[0], expected)


def test_the_load_that_moves_the_bias_is_the_biased_one():
    cfg, params = initial()
    bias = (
        jnp.zeros((2, 8)).at[:, 3].set(10.0)
    )  # the router must now choose expert 3 for every token
    ffn = params.moe.ffn.replace(bias_E=bias)
    steered = params.replace(moe=params.moe.replace(ffn=ffn))
    batch = packed_batch(rows=4)
    _, out = gradient_of(True)(steered, batch)
    np.testing.assert_array_equal(out.load_LE[:2, 3], (batch.segments_BT > 0).sum())
    np.testing.assert_array_equal(
        out.load_LE.sum(axis=1)[:2], cfg.moe.top_k * (batch.segments_BT > 0).sum()
    )


def test_a_step_that_is_not_finite_changes_nothing():
    run = trainer(ONE)
    state = run.init(jax.random.key(0))
    poisoned = state.replace(
        params=state.params.replace(norm_D=state.params.norm_D.at[0].set(jnp.nan))
    )
    before = jax.device_get(poisoned)
    after, out = run.step(poisoned, packed_batch())
    assert not bool(out.ok)
    jax.tree.map(np.testing.assert_array_equal, _plain(jax.device_get(after)), _plain(before))


def _plain(state):
    return state.replace(key=jax.random.key_data(state.key))


def test_batches_that_do_not_divide_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"batch of 12 rows is not a multiple of 8 .* use 8 rows"):
        trainer(MESH).check_rows(12)
    with pytest.raises(ValueError, match="batch of 12 rows is not a multiple of 8 pmap devices"):
        trainer(Pmap()).check_rows(12)
    with pytest.raises(ValueError, match="16 rows is not a multiple of micro_rows 5"):
        trainer(ONE, 5).step(trainer(ONE).init(jax.random.key(0)), packed_batch())


@pytest.mark.parametrize("way", ["single", *EVERY_WAY])
def test_a_run_compiles_its_step_once(way):
    assert after_two_steps(way)[3] == 0
    with compilations() as compiled:  # the check sees what it looks for
        jax.jit(lambda x: x * 3 + 1)(np.ones(5))
    assert len(compiled) > 0
