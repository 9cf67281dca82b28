"""Evaluations: what a score is, and how sure we are of it."""
