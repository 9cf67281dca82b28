"""Tasks that are sampled without being trained, for the curriculum to know how hard they are."""

import dataclasses

import pytest

from glm45_jax.rl.config import Grades
from glm45_jax.rl.curriculum import Band, Curriculum, Stage, Tasks
from glm45_jax.rl.lease import Rules
from glm45_jax.rl.pool import Pool
from glm45_jax.rl.sampler import Graded, InOrder, Sampler
from tests.rl.common import Answers
from tests.rl.loop_run import RL

KNOWN = Stage((Band(1, 0.0, 0.5), Band(8, 1e-6, 1.0)), unseen=False)


@pytest.fixture
def pool(tmp_path):
    with Pool(tmp_path, run="r", rules=Rules(groups=4)) as pool:
        yield pool


def sampler_of(pool, workers, stages=(KNOWN,), **grades):
    curriculum = Curriculum([Tasks("sums", 6, first=10)], samples=4, stages=stages)
    graded = Graded(curriculum, pool, Grades(stages=stages, **grades), groups=4)
    return Sampler(pool, workers, graded, RL, seed=0), curriculum


def test_what_probes_find_decides_what_is_drawn(pool):
    workers = Answers({10: 1, 11: 8, 12: 2})
    sampler, curriculum = sampler_of(pool, workers, probe_samples=48)
    assert curriculum.draw(3).filled == 3  # nothing is known, so nothing is of the stage
    told = sampler.probe(step=5)
    assert told == {"curriculum/probed": 6, "curriculum/probe_samples": 48}
    drawn = curriculum.draw(3)
    assert {p.number for p in drawn.prompts[: 3 - drawn.filled]} == {10, 12}
    assert pool.counts()["ready"] == 0 and not sampler.finished  # nothing of it is trained


def test_no_batch_has_more_probes_than_it_may_and_later_ones_go_on(pool):
    workers = Answers({n: 1 for n in range(10, 16)})
    sampler, curriculum = sampler_of(pool, workers, probe_samples=20)
    for step in range(1, 4):
        assert sampler.probe(step)["curriculum/probe_samples"] == (20, 20, 8)[step - 1]
    assert sampler.probe(4) == {}
    assert len({(job.name, job.sampling.seed) for job in workers.jobs}) == 48
    assert len({job.sampling.seed for job in workers.jobs}) == 48  # the same task, other samples
    assert curriculum.scalars()["curriculum/tried"] == 6


def test_a_run_that_starts_again_knows_what_was_probed(pool):
    sampler, curriculum = sampler_of(pool, Answers({10: 1}), probe_samples=48)
    sampler.probe(1)
    again, known = sampler_of(pool, Answers({}))
    assert known.state() == curriculum.state()
    assert again.probe(2) == {}


def test_stages_that_take_unseen_tasks_and_runs_without_a_curriculum_ask_nothing(pool):
    workers = Answers({})
    sampler, _ = sampler_of(pool, workers, stages=(dataclasses.replace(KNOWN, unseen=True),))
    assert sampler.probe(1) == {}
    assert sampler_of(pool, workers, probe_samples=0)[0].probe(1) == {}
    assert Sampler(pool, workers, InOrder("sums", 4, RL.split), RL, seed=0).probe(1) == {}
    assert not workers.jobs


def test_a_sample_that_failed_is_no_try(pool):
    sampler, curriculum = sampler_of(pool, Answers({}, failing=(11,)), probe_samples=48)
    assert sampler.probe(1)["curriculum/probe_samples"] == 40
    assert [probe.number for probe in curriculum.probes(9)] == [11]
