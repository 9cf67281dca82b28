"""The driver over an engine of integers: nothing is lost, doubled, crossed or leaked, whoever
cancels, expires, fails or pushes weights, and whenever.
"""

import random
import typing

import pytest

from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Finish, Policy
from tests.rollout.arithmetic import BREAKS_INSERT
from tests.rollout.integers import Clock, Tagged, check, idle, largest_table

FINISHES = typing.get_args(Finish)
POLICIES = typing.get_args(Policy)


def random_group(rng):
    """Prompts and knobs of one group; a few are impossible."""
    kind = rng.random()
    length = 41 if kind < 0.005 else 0 if kind < 0.01 else rng.randint(1, 20)
    prompt = [rng.randrange(96) for _ in range(length)]
    if kind > 0.985 and prompt:
        prompt[-1] = 96  # breaks the device
    stop = tuple(rng.sample(range(96), 5)) if rng.random() < 0.5 else ()
    size = rng.choice((1, 1, 2, 4))
    seeds = [BREAKS_INSERT if 0.97 < kind < 0.98 else rng.randrange(1000) for _ in range(size)]
    return [
        (prompt, Sampling(max_tokens=rng.randint(1, 20), stop=stop, seed=seed)) for seed in seeds
    ]


class Storm:
    """Random requests, turns of episodes, cancels, deadlines, pushes of every policy, pauses and
    flushes, and what came of them.
    """

    def __init__(self, slots, requests, reuse, draft):
        self.rng, self.clock = random.Random(slots), Clock()
        # Less pages than the rows could fill: some are preempted.
        self.engine = Tagged(slots, max(10, 4 * slots), draft=draft, together=1 + slots % 3)
        options = dict(version=0, prefill_tokens=8 * slots, reuse=reuse, clock=self.clock)
        self.driver = Driver(self.engine, 0, **options)
        self.left, self.version = requests, 0
        self.requests, self.completions = [], []

    def group(self):
        """Prompts and knobs of some requests: a group, or the next turn of what ended lately."""
        last = self.rng.choice(self.requests[-50:]) if self.requests else None
        if last and last.out and len(last.prompt + last.out) < 30 and self.rng.random() < 0.5:
            prompt = last.prompt + last.out + [self.rng.randrange(96) for _ in range(4)]
            most = self.rng.randint(1, 40 - len(prompt))
            return [(prompt, Sampling(max_tokens=most, seed=self.rng.randrange(1000)))]
        return random_group(self.rng)

    def submit(self):
        for tokens, sampling in self.group()[: self.left]:
            done = []
            soon = self.rng.choice((5.0, 40.0)) if self.rng.random() < 0.1 else None
            request = self.driver.submit(tokens, sampling, deadline=soon, on_done=done.append)
            self.requests.append(request)
            self.completions.append(done)
            self.left -= 1

    def disturb(self):
        rng, driver = self.rng, self.driver
        if rng.random() < 0.15 and self.requests:
            driver.cancel(rng.choice(self.requests[-100:]))
        if rng.random() < 0.02:
            self.version += rng.randint(1, 3)
            driver.push(self.version, self.version, policy=rng.choice(POLICIES))
        if rng.random() < 0.005:
            driver.flush()
        if rng.random() < 0.01:
            driver.pause(drain=rng.random() < 0.5)
        elif rng.random() < 0.3:
            driver.resume()

    def run(self):
        while self.left or self.driver.busy:
            if self.left and self.driver.stats.waiting < 50:
                self.submit()
            self.disturb()
            self.driver.tick()
            self.clock.now += 1
        return self.driver.stats


@pytest.mark.parametrize(
    ("reuse", "draft"),
    [(True, 0), (False, 0), (True, 3), (False, 1)],
    ids=("reuse", "no_reuse", "reuse_3_drafts", "no_reuse_1_draft"),
)
@pytest.mark.parametrize(("slots", "requests"), [(1, 1000), (2, 1000), (8, 3000), (64, 5000)])
def test_of_ten_thousand_disturbed_requests_none_is_lost_doubled_crossed_or_leaked(
    slots, requests, reuse, draft
):
    storm = Storm(slots, requests, reuse, draft)
    stats = storm.run()
    assert idle(storm.driver, storm.engine)
    assert (stats.prefix_hits > 0) == (stats.reused_tokens > 0) == reuse
    assert stats.submitted == requests == sum(getattr(stats, f) for f in FINISHES)
    assert min(getattr(stats, f) for f in FINISHES) > 0
    assert min(stats.preempted, stats.pushes, stats.failures, stats.shared_tokens) > 0
    assert stats.output_tokens == sum(len(r.out) for r in storm.requests)
    right = [stats.drafted, stats.accepted_1, stats.accepted_2, stats.accepted_3][: draft + 1]
    assert sorted(right, reverse=True) == right and (right[-1] > 0) == (draft > 0)
    for request, done in zip(storm.requests, storm.completions, strict=True):
        assert done == [request.completion]
        check(request, storm.engine)
    assert largest_table(storm.driver) <= 2 * storm.engine.pages + 200
