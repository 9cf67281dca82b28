"""Laws of the loop: a killed run that goes on is the run that was never killed; nothing that was
saved is lost.
"""

import os
import shutil
import signal

import jax
import numpy as np
import pytest

from glm45_jax.checkpoint import Checkpoints
from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import BestFit
from glm45_jax.data.store import open_store, write_store
from glm45_jax.metrics import Jsonl, read_jsonl
from glm45_jax.sharding import MeshShape
from glm45_jax.train.loop import Validate, resume, run_steps
from tests.train.common import LANES, MESH, ONE, Pmap, packed_batch, trainer

TRAIN_STEPS, ROWS, T = 6, 16, 24


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("store") / "tokens"
    documents = [rng.integers(0, 255, rng.integers(3, 20)).tolist() for _ in range(200)]
    write_store(path, documents, end=255, vocab=256, tokenizer_fingerprint="test", meta={})
    rows = BestFit().rows(open_store(path), T, 255)
    return Loader([(rows, 1.0)], seed=1, span=lambda step: (step * ROWS, ROWS), fingerprint="test")


def run(workdir, loader, run_trainer, *, hooks=(), steps=TRAIN_STEPS, source=None):
    workdir.mkdir(exist_ok=True)
    train = _train(steps)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        found = resume(run_trainer, checkpoints)
        state, start = (
            (run_trainer.init(jax.random.key(0)), 0) if found is None else (found[0], found[2])
        )
        if found is not None:
            loader.check_state(found[1]["loader"])
        writer = Jsonl.open_resumed(workdir / "metrics.jsonl", start + 1)
        state, outcome = run_steps(
            run_trainer,
            state,
            source or loader,
            train=train,
            start=start,
            workdir=workdir,
            checkpoints=checkpoints,
            sidecars={},
            writers=[writer],
            hooks=hooks,
        )
        writer.close()
    return jax.device_get(run_trainer.save_view(state)), outcome


def _train(steps):
    from glm45_jax.train.state import Train

    return Train(steps=steps, rows=ROWS, save_every=2)


class KillAt:
    """A hook that sends this process the signal a scheduler would."""

    def __init__(self, step):
        self.step = step

    def due(self, step):
        return step == self.step

    def __call__(self, step, state, trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}


def same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def losses(workdir):
    return [
        (r.step, r.scalars["loss"], r.scalars["grad_norm"])
        for r in read_jsonl(workdir / "metrics.jsonl")
    ]


@pytest.mark.parametrize("where", [ONE, Pmap()], ids=["mesh of one", "pmap"])
def test_three_steps_a_kill_and_three_more_are_six_steps_bit_for_bit(tmp_path, loader, where):
    whole, done = run(tmp_path / "whole", loader, trainer(where))
    _, killed = run(tmp_path / "cut", loader, trainer(where), hooks=[KillAt(3)])
    assert (killed.why, killed.step) == ("stopped", 3)
    resumed, done_too = run(tmp_path / "cut", loader, trainer(where))
    assert done.why == done_too.why == "done"
    same_bits(resumed, whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "cut")) == 6


def test_a_run_goes_on_under_pmap_after_a_mesh_and_back(tmp_path, loader):
    run(tmp_path / "mixed", loader, trainer(MESH), steps=2)
    run(tmp_path / "mixed", loader, trainer(Pmap()), steps=4)
    mixed, _ = run(tmp_path / "mixed", loader, trainer(ONE), steps=6)
    whole, _ = run(tmp_path / "one", loader, trainer(ONE))
    for ours, theirs in zip(
        jax.tree.leaves(mixed.params), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_allclose(
            ours, theirs, atol=2e-4
        )  # Muon turns float32 rounding into directions


# Not fsdp alone on two CPU devices: there an all-reduce and an all-to-all of the step waited for
# each other in three runs of four, and XLA aborts (docs/adr/0011).
FEWER = [
    pytest.param(ONE, id="1 device"),
    pytest.param(MeshShape(data=2, fsdp=1), id="2 devices", marks=pytest.mark.slow),
    pytest.param(MeshShape(data=2, fsdp=2), id="4 devices", marks=pytest.mark.slow),
]
SMALLER = (ONE, MeshShape(1, fsdp=2), MeshShape(1, fsdp=4), MeshShape(1, fsdp=2, tensor=2), LANES)


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory, loader):
    """A run on 8 devices, and a copy of it that ended after two of its steps."""
    whole, cut = (tmp_path_factory.mktemp(name) for name in ("whole", "cut"))
    run(whole, loader, trainer(MESH))
    state, _ = run(cut, loader, trainer(MESH), steps=2)
    return state, losses(whole), cut


@pytest.mark.parametrize("where", SMALLER, ids=str)
def test_a_checkpoint_of_eight_devices_is_the_same_state_on_others(eight_devices, where):
    saved, _, cut = eight_devices
    other = trainer(where)
    with Checkpoints(cut / "checkpoints") as checkpoints:
        restored, _, step = resume(other, checkpoints)
    assert step == 2
    same_bits(jax.device_get(other.save_view(restored)), saved)
    for leaf, expected in zip(
        jax.tree.leaves(restored), jax.tree.leaves(other.abstract), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


@pytest.mark.parametrize("where", FEWER)
def test_a_run_of_eight_devices_goes_on_with_fewer(tmp_path, loader, eight_devices, where):
    _, expected, cut = eight_devices
    shutil.copytree(cut, tmp_path / "fewer")
    run(tmp_path / "fewer", loader, trainer(where))
    found = losses(tmp_path / "fewer")
    assert [step for step, *_ in found] == [step for step, *_ in expected]
    np.testing.assert_allclose(
        [loss for _, loss, _ in found], [loss for _, loss, _ in expected], rtol=2e-4
    )  # Muon turns float32 rounding into directions


def test_a_run_stops_before_the_step_that_is_not_finite_and_keeps_its_batch(tmp_path, loader):
    class Poisoned:
        def iterate(self, start=0):
            for step, batch in enumerate(loader.iterate(start), start):
                yield (
                    batch.replace(mask_BT=batch.mask_BT * np.float32(np.nan))
                    if step == 3
                    else batch
                )

        def state(self, step):
            return loader.state(step)

    state, outcome = run(tmp_path / "bad", loader, trainer(ONE), source=Poisoned())
    good, _ = run(tmp_path / "good", loader, trainer(ONE), steps=3)
    assert (outcome.why, outcome.step) == ("skips spent", 3)
    same_bits(state, good)
    kept = np.load(outcome.kept[0])
    np.testing.assert_array_equal(kept["tokens_BT"], loader.batch(3).tokens_BT)
    assert Checkpoints(tmp_path / "bad" / "checkpoints").latest() == 3


def test_validation_is_a_mean_over_targets_not_over_batches():
    run_trainer = trainer(ONE)
    state = run_trainer.init(jax.random.key(0))
    whole, half = packed_batch(), jax.tree.map(lambda x: x[:8], packed_batch())
    rest = jax.tree.map(lambda x: x[8:], packed_batch())
    together = Validate([whole], every=1)(1, state, run_trainer)["val/loss"]
    apart = Validate([half, rest], every=1)(1, state, run_trainer)["val/loss"]
    np.testing.assert_allclose(together, apart, rtol=1e-6)
