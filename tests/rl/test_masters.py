"""A policy whose weights are kept in bfloat16: its updates move it as float32's do, in the mean and
over micro-batches and devices, and an engine serves its weights.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax import params as params_lib
from glm45_jax.model import config, transformer
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant
from glm45_jax.rl.update import Update, make_updater
from glm45_jax.rollout import weights as pushed
from glm45_jax.sharding import MeshShape
from glm45_jax.train.parallel import Pmap
from tests.rl.test_update import random_rows

CFG = dataclasses.replace(
    config.tiny(),
    n_dense=0,
    n_moe=1,
    n_mtp=0,
    impl=config.Impl(grouped_matmul="reference"),
)
# A step of 4e-5 on weights of 0.02, whose neighbours in bfloat16 are 6e-5 to 1.2e-4 away.
MUON = Muon(lr=2e-4, schedule=Constant(1.0), dtype="float32", weight_decay=0.0)
WAYS = {
    "one": (MeshShape(1, 1), None),
    "pmap and micro-batches": (Pmap(), 8),
    "mesh": (MeshShape(1, fsdp=4, expert=2), None),
}


@functools.cache
def begun():
    """Weights that bfloat16 holds exactly, as float32."""
    params = params_lib.init(transformer.specs(CFG), jax.random.key(0))
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(w.dtype), params)


@functools.cache
def after(way, master):
    """(weights after one step, its gradient's norm, dtypes before the step)."""
    where, micro_rows = WAYS[way]
    devices = jax.devices()[:1] if way == "one" else None
    optim = dataclasses.replace(MUON, master_dtype=master)
    run = make_updater(CFG, optim, Update(micro_rows=micro_rows), where=where, devices=devices)
    state = run.init(begun())
    held = jax.tree.map(lambda w: w.dtype, state.params)
    state, out = run.step(state, random_rows())
    assert bool(out.ok)
    return jax.device_get(run.params(state)), float(out.scalars["grad_norm"]), held


def low(weights):
    """The leaves that are kept in bfloat16, as float32, in one row."""
    return np.concatenate(
        [np.asarray(w, np.float32).ravel() for w in jax.tree.leaves(weights) if w.dtype != "f4"]
    )


def test_the_policy_moves_in_the_mean_as_it_does_in_float32():
    exact, norm, _ = after("one", "float32")
    rounded, low_norm, held = after("one", "bfloat16")
    assert jax.tree.leaves(held) == [w.dtype for w in jax.tree.leaves(rounded)]
    kept = jax.tree.map(lambda w, like: jnp.asarray(w, like.dtype), begun(), rounded)
    start, now = low(kept), low(rounded)
    same = [
        w
        for w, r in zip(*map(jax.tree.leaves, (exact, rounded)), strict=True)
        if r.dtype != w.dtype
    ]
    wanted = np.concatenate([np.ravel(w) for w in same]) - start
    assert start.size > 0.9 * params_lib.count(transformer.specs(CFG))
    assert low_norm == pytest.approx(norm, rel=0.01)
    moved = now - start
    stood_still = (moved == 0) & (wanted != 0)
    assert stood_still.mean() > 0.1  # steps are smaller than the next weight is far
    share = (moved * wanted).sum() / (wanted * wanted).sum()
    assert share == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("way", ["pmap and micro-batches", "mesh"])
def test_micro_batches_and_devices_round_few_weights_the_other_way(way):
    """Their gradients differ in the last bits of bfloat16, one micro-batch's each."""
    (ours, norm, _), (alone, alone_norm, _) = after(way, "bfloat16"), after("one", "bfloat16")
    ours, alone = low(ours), low(alone)
    assert norm == pytest.approx(alone_norm, rel=0.01)
    neighbour = 2.0**-7 * np.maximum(np.abs(ours), np.abs(alone))
    assert np.all(np.abs(ours - alone) <= neighbour + 1e-4)
    assert np.mean(ours != alone) < 0.1


def test_an_engine_takes_the_weights_of_such_a_policy():
    rounded, _, _ = after("one", "bfloat16")
    parcel = pushed.prepare(rounded, 1, cfg=CFG)
    for sent, kept in zip(*map(jax.tree.leaves, (parcel.params, rounded)), strict=True):
        np.testing.assert_array_equal(np.asarray(sent, np.float32), np.asarray(kept, np.float32))
