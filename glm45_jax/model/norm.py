"""RMSNorm (spec 2.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, in float32, cast back to x's dtype before the product with
    `weight`.
    """
    x32 = x.astype(jnp.float32)  # norm
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    broadcast = weight.reshape((1,) * (x.ndim - weight.ndim) + weight.shape)
    return (x32 * scale).astype(x.dtype) * broadcast.astype(x.dtype)
