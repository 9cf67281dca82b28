"""Workers: a group's samples are of one task, which is drawn once."""

import itertools

import pytest

from glm45_jax.envs.types import Env, Part, Task
from glm45_jax.model import config
from glm45_jax.rl.lease import Prompt
from glm45_jax.rl.workers import Job, Local
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.episode import Episodes, Format
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.tokenizer import train_bpe
from tests.rollout.arithmetic import Arithmetic

TOKENIZER = train_bpe(["add two numbers"], 292)


def world(name, drawn):
    def tasks(n):
        drawn.append((name, n))
        if n == 13:
            raise ValueError("no such task")
        return Task(id=f"{name}/{n}", prompt=f"{n}+{n}=", answer=2 * n)

    return Env(name, tasks, (Part("size", lambda task, messages: float(len(task.id))),))


def local(drawn):
    driver = Driver(Arithmetic(slots=4, pages=160, max_tokens=120, vocab=292), 1)
    envs = {name: world(name, drawn) for name in ("a", "b")}
    return Local(Episodes(driver, Format(TOKENIZER, thinking=False)), envs, cfg=config.tiny())


def job(env, number, sample):
    prompt = Prompt(env, number, 3, f"{env}/{number}")
    return Job(prompt.key, prompt, sample, Sampling(max_tokens=4, seed=sample))


def test_the_task_of_a_group_is_drawn_once_and_no_other_group_gets_it():
    drawn = []
    workers = local(drawn)
    groups = [("a", 1), ("b", 1), ("b", 2)]
    for (env, number), sample in itertools.product(groups, range(3)):
        workers.start(job(env, number, sample))
    assert drawn == groups
    done = {}
    while workers.running:
        done |= {job.name: one for job, one in workers.poll()}
    assert {key: one.task_id for (key, _), one in done.items()} == {
        f"{env}/{number}": f"{env}/{number}" for env, number in groups
    }
    assert {one.status for one in done.values()} <= {"done", "length"}


def test_a_task_that_cannot_be_drawn_fails_again_and_leaves_the_next_alone():
    drawn = []
    workers = local(drawn)
    for sample in range(2):
        with pytest.raises(ValueError, match="no such task"):
            workers.start(job("a", 13, sample))
    workers.start(job("a", 1, 0))
    assert drawn == [("a", 13)] * 2 + [("a", 1)] and workers.running == 1
