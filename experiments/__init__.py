"""Experiments: Python functions that return one frozen `Experiment`, run by `glm45_jax.main`."""
