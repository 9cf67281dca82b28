"""Reinforcement learning: advantages, packed rows of trajectories, policy losses."""
