"""Serving rollouts: sampling, the paged engine, continuous batching."""
