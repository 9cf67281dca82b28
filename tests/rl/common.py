"""Random trajectories, rows of them, and workers that answer at once, for this folder's tests."""

import numpy as np

from glm45_jax.data.types import Batch
from glm45_jax.rl.batch import RlBatch
from glm45_jax.rl.trajectory import Trajectory


def trajectory(rng, length, *, group="g", name="t", version=0, routes=None):
    """A prompt of one token at least, then turns of the policy and of the environment."""
    sampled_T = rng.random(length) < 0.6
    sampled_T[0], sampled_T[-1] = False, length > 1
    routes_TLA = None
    if routes is not None:
        routes_TLA = rng.integers(0, 16, (length, *routes)).astype(np.int32)
        routes_TLA[-1] = -1
    return Trajectory(
        task_id=name,
        group=group,
        tokens_T=rng.integers(1, 100, length).astype(np.int32),
        sampled_T=sampled_T,
        logp_T=np.where(sampled_T, -rng.exponential(size=length), np.nan).astype(np.float32),
        versions_T=np.where(sampled_T, version, -9).astype(np.int32),
        reward=float(rng.integers(0, 2)),
        routes_TLA=routes_TLA,
    )


def trajectories(rng, lengths, **options):
    return [
        trajectory(rng, length, name=f"t{i}", group=f"g{i // 2}", **options)
        for i, length in enumerate(lengths)
    ]


def rows_of(logp_BT, advantage_BT, weight_BT, segments_BT=None, **options):
    """An RlBatch of these arrays, one segment a row unless told."""
    shape = np.shape(logp_BT)
    if segments_BT is None:
        segments_BT = np.ones(shape, np.int32)
    zero_BT = np.zeros(shape, np.int32)
    batch = Batch(zero_BT, zero_BT, segments_BT, zero_BT, weight_BT)
    version_B = np.zeros(shape[0], np.int32)
    return RlBatch(batch, logp_BT, advantage_BT, weight_BT, version_B, **options)


class Answers:
    """Workers that end every sample at the second poll; a task's first samples pass, as many as
    `passes` says. failing: tasks whose samples end as errors.
    """

    def __init__(self, passes, failing=()):
        self.passes, self.failing, self.jobs = passes, failing, []
        self._begun, self._ended = [], []
        self.polls = self.version = 0

    def start(self, job):
        self.jobs.append(job)
        self._begun.append(job)

    def poll(self):
        self.polls += 1
        done, self._ended, self._begun = self._ended, self._begun, []
        return [(job, self._answer(job)) for job in done]

    def _answer(self, job):
        number = job.prompt.number
        return Trajectory(
            task_id=str(number),
            group=job.prompt.key,
            tokens_T=np.zeros(2, np.int32),
            sampled_T=np.array([False, True]),
            logp_T=np.zeros(2, np.float32),
            versions_T=np.full(2, self.version, np.int32),
            reward=float(job.sample < self.passes.get(number, 0)),
            status="error" if number in self.failing else "done",
        )
