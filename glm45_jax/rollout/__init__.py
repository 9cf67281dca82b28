"""Serving rollouts: sampling and, later, the engine."""
