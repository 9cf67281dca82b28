"""Rotary position embedding (spec 2.2): the first `rotary_dim` entries of a head rotate, in
half-split pairs; interleaved pairs are brought into that order first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Rotation:
    """Cosines and sines of one batch of positions, [B, T, 1, rotary_dim / 2], in the activations'
    dtype.
    """

    cos_BT1R: jax.Array
    sin_BT1R: jax.Array


def rotation(
    positions_BT: jax.Array, *, rotary_dim: int, theta: float, dtype: jnp.dtype
) -> Rotation:
    """Angles p * theta^(-2j / rotary_dim), computed in float32. The denominator is rotary_dim, not
    the head's width.
    """
    half = rotary_dim // 2
    inverse_R = theta ** (-jnp.arange(half, dtype=jnp.float32) * 2.0 / rotary_dim)
    angle_BT1R = positions_BT.astype(jnp.float32)[:, :, None, None] * inverse_R[None, None, None, :]
    return Rotation(jnp.cos(angle_BT1R).astype(dtype), jnp.sin(angle_BT1R).astype(dtype))


def rotate(x_BTNH: jax.Array, r: Rotation) -> jax.Array:
    """`x` with entry j of the first rotary_dim turned against entry j + rotary_dim / 2; the rest
    passes through.
    """
    half = r.cos_BT1R.shape[-1]
    a, b, rest = x_BTNH[..., :half], x_BTNH[..., half : 2 * half], x_BTNH[..., 2 * half :]
    return jnp.concatenate(
        [a * r.cos_BT1R - b * r.sin_BT1R, b * r.cos_BT1R + a * r.sin_BT1R, rest], axis=-1
    )


def deinterleave(x_BTNH: jax.Array) -> jax.Array:
    """`x` with its pairs (2j, 2j + 1) at (j, j + H / 2), where `rotate` turns them.

    They stay there: q·k does not ask in which order the entries of both lie.
    """
    return jnp.concatenate([x_BTNH[..., 0::2], x_BTNH[..., 1::2]], axis=-1)
