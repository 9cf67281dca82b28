"""The steps that are asked for are in the trace, under their numbers, and no others."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from glm45_jax.checkpoint import Checkpoints
from glm45_jax.train.loop import run_steps
from glm45_jax.train.profile import Tracing
from glm45_jax.train.state import Train
from tests.train.common import ONE, packed_batch, trainer


def steps_in(folder):
    """The numbers of the steps in the one trace of a folder."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return sorted(int(e["args"]["step_num"]) for e in events if e.get("name") == "train")


@pytest.mark.parametrize(
    ("asked", "taken", "found"),
    [
        ((3, 4, 6), range(1, 9), {"step3": [3, 4], "step6": [6]}),
        ((1,), range(1, 3), {"step1": [1]}),
        ((2, 3, 4), range(3, 9), {"step3": [3, 4]}),  # resumed among them
        ((2, 3, 4), range(1, 4), {"step2": [2, 3]}),  # ended among them
        ((), range(1, 9), {}),
        ((20,), range(1, 9), {}),
    ],
    ids=str,
)
def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, asked, taken, found):
    square = jax.jit(lambda x: x @ x)
    tracing = Tracing(tmp_path / "profile", asked)
    for step in taken:
        with tracing.step(step):
            square(jnp.ones((4, 4))).block_until_ready()
    tracing.close()
    tracing.close()
    folder = tmp_path / "profile"
    made = sorted(folder.iterdir()) if folder.exists() else []
    assert {path.name: steps_in(path) for path in made} == found


class Source:
    """The same batch at every step."""

    def iterate(self, start_step=0):
        while True:
            yield packed_batch()

    def state(self, step):
        return {}


def test_the_loop_traces_the_steps_of_its_train(tmp_path):
    one = trainer(ONE)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        run_steps(
            one,
            one.init(jax.random.key(0)),
            Source(),
            train=Train(steps=4, rows=16, profile=(2, 3)),
            start=0,
            workdir=tmp_path,
            checkpoints=checkpoints,
            sidecars={},
        )
    assert steps_in(tmp_path / "profile" / "step2") == [2, 3]


def test_a_step_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="counted from 1"):
        Train(steps=4, rows=16, profile=(0,))
