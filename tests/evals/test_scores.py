"""What a score is: means over tasks, their errors, pass@k."""

import itertools
import math

import numpy as np
import pytest

from glm45_jax.envs.types import Env, Part, Task
from glm45_jax.evals.types import EvalTask, PassAt, Score, mean


def test_a_score_is_a_mean_over_tasks_with_its_standard_error():
    score = Score.of(np.array([0.0, 1.0, 1.0, 0.0]))
    assert (score.value, score.n) == (0.5, 4)
    assert math.isclose(score.stderr, math.sqrt(1 / 3) / 2)
    assert score.interval == (0.5 - 1.96 * score.stderr, 0.5 + 1.96 * score.stderr)
    assert str(score) == f"0.5000 ± {1.96 * score.stderr:.4f} (4 tasks)"
    assert Score.of(np.ones(1)).stderr == Score.of(np.ones(1)).half == math.inf
    with pytest.raises(ValueError, match="0 tasks"):
        Score.of(np.ones(0))


def test_the_interval_holds_the_truth_19_times_of_20():
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        low, high = Score.of(draw.random(200) < 0.3).interval
        inside += low <= 0.3 <= high
    assert 0.92 < inside / 400 < 0.98


def test_avg_and_pass_at_k_of_samples():
    reward_CJ = np.array([[1.0, 0.0, 0.0], [0.5, 0.0, 1.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(mean(reward_CJ), [1 / 3, 0.5, 0])
    pairs = list(itertools.combinations(range(3), 2))
    want = [np.mean([max(row[i], row[j]) >= 1 for i, j in pairs]) for row in reward_CJ]
    np.testing.assert_allclose(PassAt(2)(reward_CJ), want)
    np.testing.assert_allclose(PassAt(1)(reward_CJ), (reward_CJ >= 1).mean(axis=1))
    with pytest.raises(ValueError, match="pass@4 of 3 samples; ask for at least 4"):
        PassAt(4)(reward_CJ)


def test_a_task_asks_each_number_once():
    env = Env("e", lambda n: Task(str(n), "", 0), (Part("p", lambda task, messages: 0),))
    with pytest.raises(ValueError, match="e: 3 tasks, 2 of them different"):
        EvalTask(env, [1, 2, 1])
    with pytest.raises(ValueError, match="0 samples"):
        EvalTask(env, range(3), samples=0)
