"""Where a run may start from: its weights are those of the other run, or of the folder, bit for
bit.
"""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from experiments import pretrain
from glm45_jax import hf
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.model import config
from glm45_jax.optim.mixed import AdamW
from glm45_jax.sharding import MeshShape
from glm45_jax.start import FromHF, FromRun, initial
from glm45_jax.train.parallel import Pmap, Recipe, make_trainer

GOLDEN = pathlib.Path(__file__).parent / "golden" / "a"


def trainer(exp, where=MeshShape(data=1, fsdp=8)):
    return make_trainer(where, Recipe(exp.model, exp.optim, exp.train, packed=False))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_run_starts_from_another_s_weights_under_another_optimizer(tmp_path):
    first = pretrain.tiny()
    run = trainer(first)
    state = run.init(jax.random.key(7))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, run.save_view(state), sidecars={})
    second = dataclasses.replace(first, optim=AdamW(), init=FromRun(str(tmp_path)))
    run = trainer(second, Pmap())
    start = run.save_view(initial(second, run))
    same(start.params, state.params)
    assert int(start.step) == 0


def test_a_run_starts_from_a_released_style_folder_and_refuses_another_shape():
    cfg, params = hf.load(GOLDEN)
    first = pretrain.tiny()
    data = dataclasses.replace(first.data, vocab=cfg.vocab)
    exp = dataclasses.replace(first, model=cfg, data=data, init=FromHF(str(GOLDEN)))
    run = trainer(exp)
    same(run.save_view(initial(exp, run)).params, params)
    other = dataclasses.replace(exp, model=config.tiny(vocab=cfg.vocab + 1))
    with pytest.raises(ValueError, match=r"embed_VD: \(256, 64\) there, \(257, 64\)"):
        initial(other, trainer(other))
