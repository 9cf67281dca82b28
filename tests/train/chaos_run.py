"""A run to be killed, started by test_chaos.py: `chaos_run.py WORKDIR STEPS MOST_BYTES`.

It is the tiny model on one device, with checkpoints every two steps; a file of more than MOST_BYTES
(0: any) cannot be written, as on a disk that is full.
"""

import contextlib
import pathlib
import resource
import sys
import time

import jax
import numpy as np

from glm45_jax.checkpoint import Checkpoints
from glm45_jax.metrics import Jsonl
from glm45_jax.train.goodput import Goodput
from glm45_jax.train.loop import Outcome, resume, run_steps
from glm45_jax.train.state import Train
from tests import conftest  # noqa: F401  sets JAX up before it looks for devices
from tests.train.common import ONE, packed_batch, trainer

SAVE_EVERY = 2


class Batches:
    """Batch n of the seed n; `pause_s` apart, so that a kill finds a step."""

    def __init__(self, pause_s: float = 0.0):
        self.pause_s = pause_s

    def iterate(self, start_step=0):
        while True:
            time.sleep(self.pause_s)
            yield packed_batch(start_step)
            start_step += 1

    def state(self, step):
        return {"next": step}


def run(workdir: pathlib.Path, steps: int, hooks=(), pause_s: float = 0.0) -> Outcome:
    """Starts or goes on, as `experiment.run_training` does."""
    run_trainer = trainer(ONE)
    workdir.mkdir(exist_ok=True)
    goodput = Goodput(workdir / "goodput.json")
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=3))
        goodput.spent("start")
        found = resume(run_trainer, checkpoints)
        goodput.spent("restore")
        state, start = (run_trainer.init(jax.random.key(0)), 0) if found is None else found[::2]
        assert found is None or found[1]["loader"] == {"next": start}
        goodput.resumed(start)
        writer = Jsonl.open_resumed(workdir / "metrics.jsonl", start + 1)
        stack.callback(writer.close)
        _, outcome = run_steps(
            run_trainer,
            state,
            Batches(pause_s),
            train=Train(steps=steps, rows=16, save_every=SAVE_EVERY),
            start=start,
            workdir=workdir,
            checkpoints=checkpoints,
            sidecars={},
            writers=[writer],
            hooks=hooks,
            goodput=goodput,
        )
    goodput.write(done=outcome.why == "done")
    return outcome


def final(workdir: pathlib.Path) -> list[np.ndarray]:
    """Every array of the newest checkpoint, keys as numbers."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = checkpoints.restore(trainer(ONE).abstract).state
    state = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(x) for x in jax.tree.leaves(state)]


if __name__ == "__main__":
    most = int(sys.argv[3])
    if most:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    ended = run(pathlib.Path(sys.argv[1]), int(sys.argv[2]), pause_s=0.05)
    sys.exit({"done": 0, "stopped": 143}[ended.why])
