"""Fixtures of the tests that run the RL loop."""

import pytest

from glm45_jax.rl import loop


@pytest.fixture
def batches(monkeypatch):
    """Batch and trajectories of everything that a run of a test trained on."""
    found = []

    def noted(run, now, taken, clock):
        found.append((now.step, taken))
        return before(run, now, taken, clock)

    before = loop._train
    monkeypatch.setattr(loop, "_train", noted)
    return found
