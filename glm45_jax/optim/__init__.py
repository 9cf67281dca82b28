"""Optimizers: Muon for matrices, AdamW for the rest, schedules in tokens."""
