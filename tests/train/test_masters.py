"""Laws of weights kept in bfloat16: a run that resumes rounds as one that did not, on any mesh; it
learns as float32 does; other weights are taken in its dtypes; loops that cannot are refused.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax import params as params_lib
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.model import config, transformer
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant
from glm45_jax.train.loss import Weights
from glm45_jax.train.parallel import Pmap, Recipe, make_trainer
from glm45_jax.train.state import Train
from glm45_jax.train.step import gradients
from tests.bits import UNFUSED
from tests.train.common import MESH, ONE, packed_batch

CFG = dataclasses.replace(config.tiny(), n_moe=1, n_mtp=0)
# A step of 4e-5 on weights of 0.02, whose neighbours in bfloat16 are 6e-5 to 1.2e-4 away.
MUON = Muon(lr=2e-4, schedule=Constant(1.0), dtype="float32", master_dtype="bfloat16")


@functools.cache
def trainer(where=ONE, optim=MUON):
    train = Train(steps=8, rows=16, bias_rate=Constant(1e-2))
    recipe = Recipe(CFG, optim, train, packed=True)
    if isinstance(where, Pmap):
        return make_trainer(where, recipe)
    devices = jax.devices()[: math.prod(dataclasses.astuple(where))]
    return make_trainer(where, recipe, devices=devices)


def steps(run, state, seeds):
    losses = []
    for seed in seeds:
        state, out = run.step(state, packed_batch(seed))
        losses.append(float(out.scalars["loss"]))
    return state, losses


def equal(a, b):
    a, b = (dataclasses.replace(s, key=jax.random.key_data(s.key)) for s in (a, b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_run_that_resumes_rounds_as_one_that_did_not(tmp_path):
    run = trainer()
    through, losses = steps(run, run.init(jax.random.key(0)), range(4))
    half, _ = steps(run, run.init(jax.random.key(0)), range(2))
    with Checkpoints(tmp_path) as saved:
        saved.save(2, run.save_view(half), sidecars={})
        saved.wait()
        back = run.load_view(saved.restore(run.abstract).state)
        equal(back, half)
        # Onto eight devices: the same bits of the same state, there and back.
        spread = trainer(MESH)
        there = spread.load_view(saved.restore(spread.abstract).state)
        equal(there, half)
    resumed, again = steps(run, back, range(2, 4))
    equal(resumed, through)
    assert again == losses[2:]
    low = [x for x in jax.tree.leaves(through.params) if x.dtype == jnp.bfloat16]
    assert sum(x.size for x in low) > 0.95 * params_lib.count(transformer.specs(CFG))


def test_a_mesh_changes_weights_by_no_more_than_a_rounding_the_other_way():
    """Gradients differ in float32's last bits, so few of the chances fall to the other side."""
    ends = []
    for run in (trainer(), trainer(MESH)):
        state, _ = steps(run, run.init(jax.random.key(0)), range(1))
        ends.append(jax.device_get(run.save_view(state).params))
    differ = total = 0
    for x, y in zip(*map(jax.tree.leaves, ends), strict=True):
        if x.dtype == jnp.bfloat16:
            x, y = (np.asarray(a, np.float32) for a in (x, y))
            differ, total = differ + np.sum(x != y), total + x.size
            neighbour = 2.0**-7 * np.maximum(np.abs(x), np.abs(y))
            assert np.all(np.abs(x - y) <= neighbour + 3e-5)  # as float32 weights (test_step.py)
    assert differ < 2e-3 * total


@pytest.mark.slow
def test_it_learns_as_float32_does():
    ends = {}
    for master in ("float32", "bfloat16"):
        run = trainer(ONE, dataclasses.replace(MUON, master_dtype=master))
        _, ends[master] = steps(run, run.init(jax.random.key(0)), [0] * 6)
    fall = {name: losses[0] - losses[-1] for name, losses in ends.items()}
    assert fall["float32"] > 0.01
    assert abs(fall["bfloat16"] - fall["float32"]) < 0.15 * fall["float32"], fall


@pytest.mark.parametrize("where", [ONE, Pmap(1)], ids=("mesh", "pmap"))
def test_float32_weights_are_taken_in_the_dtypes_of_the_run(where):
    run = trainer(where)
    weights = params_lib.init(transformer.specs(CFG), jax.random.key(3))
    state = run.begin(jax.tree.map(jnp.copy, weights), jax.random.key(1))
    loaded = run.load_view(run.save_view(run.init(jax.random.key(0))).replace(params=weights))
    for params in (run.save_view(state).params, run.save_view(loaded).params):
        for x, w, kept in zip(
            *map(jax.tree.leaves, (params, weights, run.abstract.params)), strict=True
        ):
            assert x.dtype == kept.dtype
            np.testing.assert_array_equal(np.asarray(x), np.asarray(w.astype(kept.dtype)))


def test_gradients_of_the_vocabulary_are_summed_over_trunk_and_mtp_in_float32():
    """They are those of float32 weights, bit for bit; those of a block are rounded first."""
    cfg = dataclasses.replace(CFG, n_mtp=1)
    kept = params_lib.init(MUON.stored(transformer.specs(cfg)), jax.random.key(0))
    whole = jax.tree.map(lambda w: w.astype(jnp.float32), kept)
    weights, batch = Weights(jnp.float32(0.3), jnp.float32(1e-2)), packed_batch()
    of = jax.jit(
        lambda params: gradients(params, batch, weights, cfg=cfg, packed=True)[0],
        compiler_options=UNFUSED,
    )
    low, high = of(kept), of(whole)
    for name in ("embed_VD", "head_DV"):
        assert getattr(kept, name).dtype == jnp.bfloat16
        np.testing.assert_array_equal(getattr(low, name), getattr(high, name))
    assert np.any(low.moe.ffn.gate_EDF != high.moe.ffn.gate_EDF)


def test_a_loop_whose_plan_is_of_float32_weights_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Unaware(Recipe):
        @functools.cached_property
        def specs(self):
            return transformer.specs(self.cfg)

    recipe = Unaware(CFG, MUON, Train(steps=1, rows=16), packed=True)
    run = make_trainer(ONE, recipe, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=r"master_dtype=bfloat16.*optim\.stored"):
        run.lower(packed_batch())
