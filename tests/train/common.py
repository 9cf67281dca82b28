"""One batch of packed rows, and trainers of the tiny model shared by the tests of this room."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from glm45_jax.data.types import Batch
from glm45_jax.model import config
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant
from glm45_jax.sharding import MeshShape
from glm45_jax.train.guard import Guard
from glm45_jax.train.parallel import Pmap, Recipe, make_trainer
from glm45_jax.train.state import Train

ROWS, T = 16, 24
ONE, MESH, SPLIT, LANES = (
    MeshShape(1, 1),
    MeshShape(data=2, fsdp=4),
    MeshShape(1, fsdp=2, expert=2, tensor=2),
    MeshShape(1, fsdp=2, context=2, tensor=2),
)

NO_SKIPS = Guard(budget=0)  # the first step that is not finite ends the run


def packed_batch(seed=0, rows=ROWS, length=T):
    """Rows of one to three documents and some padding, different in every row."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, 256, (2, rows, length)).astype(np.int32)
    segments, positions = np.zeros((2, rows, length), np.int32)
    mask = np.zeros((rows, length), np.float32)
    for row in range(rows):
        start = 0
        for document in range(rng.integers(1, 4)):
            stop = min(start + rng.integers(2, 9), length)
            segments[row, start:stop] = document + 1
            positions[row, start:stop] = np.arange(stop - start)
            mask[row, start : stop - 1] = 1
            start = stop
    targets[:, :-1] = tokens[:, 1:]
    return Batch(tokens, targets, segments, positions, mask)


@functools.cache
def trainer(where=ONE, micro_rows=None, rows=ROWS, steps=6, mtp_weight=0.3, guard=NO_SKIPS):
    recipe = Recipe(
        config.tiny(),
        Muon(lr=3e-3, schedule=Constant(1.0), dtype="float32"),
        Train(
            steps=steps,
            rows=rows,
            micro_rows=micro_rows,
            mtp_weight=Constant(mtp_weight),
            bias_rate=Constant(1e-2),
            balance_weight=Constant(1e-2),
            guard=guard,
        ),
        packed=True,
    )
    if isinstance(where, Pmap):
        return make_trainer(where, recipe)
    devices = jax.devices()[: math.prod(dataclasses.astuple(where))]
    return make_trainer(where, recipe, devices=devices)


@pytest.fixture
def batch():
    return packed_batch()


__all__ = ["LANES", "MESH", "ONE", "SPLIT", "Pmap", "packed_batch", "trainer"]
