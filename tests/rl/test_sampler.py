"""Laws of over-sampling: fewer waves to a batch, and in sync mode the same kind of batch."""

import dataclasses

import pytest

from glm45_jax.rl.config import Split
from glm45_jax.rl.lease import Rules
from glm45_jax.rl.pool import Pool
from glm45_jax.rl.sampler import InOrder, Sampler
from tests.rl.common import Answers
from tests.rl.loop_run import RL

VARIES = {n: 2 for n in range(0, 2000, 8)}  # of four samples; the others agree


def gathered(folder, oversample, batches=3):
    """Task ids of each batch, and the polls that each took."""
    rl = dataclasses.replace(RL, groups=16, samples=4, oversample=oversample)
    found = []
    with Pool(folder, run="r", rules=Rules(groups=16)) as pool:
        sampler = Sampler(pool, Answers(VARIES), InOrder("sums", 4, Split()), rl, seed=0)
        for batch in range(batches):
            before, sampler.workers.version = sampler.workers.polls, batch
            taken = sampler.gather(batch)
            found.append(([int(one.task_id) for one in taken], sampler.workers.polls - before))
            assert not sampler._leases or not oversample
            pool.trained(batch)
    return found


def test_over_sampling_fills_a_batch_in_few_waves_with_the_first_groups_that_vary(tmp_path):
    plain, over = gathered(tmp_path / "plain", 0.0), gathered(tmp_path / "over", 1.0)
    for tasks, _ in (*plain, *over):
        firsts = tasks[::4]
        assert len(tasks) == 64 and firsts == sorted(set(firsts)) and not any(n % 8 for n in firsts)
    assert over[0][0] == plain[0][0]  # of the queue the first ones that vary, not the quick ones
    assert sum(polls for _, polls in over) < sum(polls for _, polls in plain) / 2


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_over_sampling_is_a_part(bad):
    with pytest.raises(ValueError, match="oversample"):
        dataclasses.replace(RL, oversample=bad)
