"""A tiny RL run for test_loop.py: a random model, a world of parity, everything else as it is."""

import dataclasses
import functools

import jax
import numpy as np

from glm45_jax.data.prepare import Data
from glm45_jax.data.sources import PydocTopics
from glm45_jax.envs.types import Env, Part, Task
from glm45_jax.experiment import Experiment, run_rl
from glm45_jax.metrics import read_jsonl
from glm45_jax.model import config
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.schedules import Constant
from glm45_jax.rl import run as rl_run
from glm45_jax.rl.config import Evaluation, Rl, Serving, Split
from glm45_jax.rl.update import make_updater
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.tokenizer import train_bpe
from glm45_jax.train.parallel import Pmap
from glm45_jax.train.state import Train

TOKENIZER = train_bpe(["a few words"], 292)
MODEL = dataclasses.replace(
    config.tiny(vocab=292), d_model=32, d_mlp=48, n_moe=1, n_mtp=0, mixer=config.tiny().mixer
)


def parity(task, messages):
    """Whether the answer has an even number of characters: half of random answers do."""
    return float(len(messages[-1].get("content") or "") % 2 == 0)


def task(n):
    return Task(f"parity/{n}", f"{n} {n}", n)


def world():
    return Env("parity", task, (Part("even", parity), Part("seen", lambda t, m: 1.0, weight=0)))


def agreeing_world():
    return Env("parity", task, (Part("same", lambda t, m: 1.0),))


def broken(task, messages):
    if int(task.id.split("/")[1]) % 3 == 0:
        raise OSError("the world is gone")
    return parity(task, messages)


def dead(task, messages):
    raise OSError("the world is gone")


def dead_world():
    return Env("parity", task, (Part("even", dead),))


def broken_world():
    return Env("parity", task, (Part("even", broken),))


RL = Rl(
    world=world,
    groups=3,
    samples=4,
    sampling=Sampling(max_tokens=5),
    serving=Serving(slots=6, pages=64, page=4, max_tokens=32, buckets=(8, 32)),
    split=Split(first=4),
    evaluation=Evaluation(tasks=3),
    thinking=False,
)


def experiment(folder, *, steps=3, save_every=0, rl=RL, **changes):
    TOKENIZER.save(folder / "tokenizer.json")
    return Experiment(
        name="loop",
        model=MODEL,
        data=Data(
            sources=((PydocTopics(), 1.0),),
            seq_len=32,
            vocab=292,
            tokenizer=str(folder / "tokenizer.json"),
        ),
        optim=AdamW(lr=1e-3, schedule=Constant(), weight_decay=0.0),
        train=Train(steps=steps, rows=4, save_every=save_every),
        mesh=Pmap(1),
        rl=rl,
        run=run_rl,
        **changes,
    )


@functools.cache
def updater_of(model, optim, update, mesh, most_mismatch):
    """One updater for all runs that differ in nothing else: each compiles its own step."""
    return make_updater(model, optim, update, where=mesh, most_mismatch=most_mismatch)


def first_weights(exp):
    updater = updater_of(exp.model, exp.optim, exp.rl.update, exp.mesh, exp.rl.most_mismatch)
    state = updater.trainer.init(jax.random.key(exp.seed))
    return jax.tree.map(np.asarray, updater.params(state))


def start(exp, workdir):
    """(weights, outcome, rows of the metrics) of a run in this workdir."""
    updater = updater_of(exp.model, exp.optim, exp.rl.update, exp.mesh, exp.rl.most_mismatch)
    state, outcome = rl_run.run(
        exp,
        workdir,
        tokenizer=TOKENIZER,
        updater=updater,
        initial=lambda trainer: trainer.init(jax.random.key(exp.seed)),
    )
    weights = jax.tree.map(np.asarray, updater.params(state))
    return weights, outcome, read_jsonl(workdir / "metrics.jsonl")


def numbers(rows):
    """What a run logged, but for what a clock says."""
    clocks = ("seconds", "tokens_per_s")
    return [
        {k: v for k, v in row.scalars.items() if not any(word in k for word in clocks)}
        for row in rows
    ]
