"""Sums over the trajectories of packed rows, as arrays of the rows' shape. Letters: B T."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sequence_sum(x_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Sum of x over the segment that each place is of, [B, T], at each of its places.

    Two segmented scans, there and back: a scatter-add, and the gradient of a gather, have no fixed
    order on GPUs, and a step has to be the same bits twice.
    """

    def join(a, b):
        (sum_a, start_a), (sum_b, start_b) = a, b
        return jnp.where(start_b, sum_b, sum_a + sum_b), start_a | start_b

    there_BT, _ = jax.lax.associative_scan(join, (x_BT, starts(segments_BT)), axis=1)
    back_BT, _ = jax.lax.associative_scan(join, (x_BT, ends(segments_BT)), axis=1, reverse=True)
    return there_BT + back_BT - x_BT


def sequence_mean(x_BT: jax.Array, counted_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Mean of x over the counted places of each segment, float32 [B, T]; 0 where there are none."""
    counted_BT = counted_BT.astype(jnp.float32)
    total_BT = sequence_sum(x_BT * counted_BT, segments_BT)
    return total_BT / jnp.maximum(sequence_sum(counted_BT, segments_BT), 1)


def starts(segments_BT: jax.Array) -> jax.Array:
    """Whether a place is the first of its segment, bool [B, T]; padding is a segment too."""
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    return jnp.pad(changes_BT, ((0, 0), (1, 0)), constant_values=True)


def ends(segments_BT: jax.Array) -> jax.Array:
    """Whether a place is the last of its segment, bool [B, T]."""
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    return jnp.pad(changes_BT, ((0, 0), (0, 1)), constant_values=True)
