"""FP8 (e4m3fn) weights: quantise by blocks or by output channels, and back. XLA so far, no Pallas.

A weight lies as in released files, [O, I] = [out, in]. Block layout (DeepSeek style): one scale
for each block, float32 [ceil(O / bo), ceil(I / bi)]; channel layout (compressed-tensors): [O, 1].
Scales multiply on the way back, whatever their name in the files. Source: spec 3.2.
Letters: O outputs, I inputs (p, q: blocks of them).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-12  # of the converter: an all-zero block gets a tiny scale, not 0 / 0
BLOCK = (128, 128)


def quantize_blocks(w_OI: Any, block: tuple[int, int] = BLOCK) -> tuple[jax.Array, jax.Array]:
    """Bytes (uint8 [O, I], each an e4m3fn) and `scale_inv`, float32, one for each block.

    w_OI: float weights, numpy or jax. The edge blocks of a size that `block` does not divide are
    smaller. scale = max |w| / 448, q = w / scale. Byte-exact with the converter of spec 3.2.
    """
    w_OI = jnp.asarray(w_OI)
    if w_OI.ndim != 2 or not jnp.issubdtype(w_OI.dtype, jnp.floating):
        raise ValueError(f"w is {w_OI.dtype}{list(w_OI.shape)}; give a float matrix [out, in]")
    return _quantize_blocks(w_OI, block)


@functools.partial(jax.jit, static_argnums=1)
def _quantize_blocks(w_OI: jax.Array, block: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    (O, I), (bo, bi) = w_OI.shape, block
    P, Q = -(-O // bo), -(-I // bi)
    padded_OI = jnp.pad(w_OI.astype(jnp.float32), ((0, P * bo - O), (0, Q * bi - I)))
    tiles_PoQi = padded_OI.reshape(P, bo, Q, bi)
    amax_PQ = jnp.maximum(jnp.abs(tiles_PoQi).max(axis=(1, 3)), AMAX_FLOOR)
    scale_PQ = _divide(amax_PQ, E4M3_MAX)
    q_PoQi = _to_e4m3(_divide(tiles_PoQi, scale_PQ[:, None, :, None]))
    return q_PoQi.reshape(P * bo, Q * bi)[:O, :I], scale_PQ


@jax.jit
def quantize_channels(w_OI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bytes (uint8 [O, I]) and float32 scales [O, 1], one for each output channel."""
    w_OI = w_OI.astype(jnp.float32)
    amax_O1 = jnp.maximum(jnp.abs(w_OI).max(axis=1, keepdims=True), AMAX_FLOOR)
    scale_O1 = _divide(amax_O1, E4M3_MAX)
    return _to_e4m3(_divide(w_OI, scale_O1)), scale_O1


@functools.partial(jax.jit, static_argnames=("block", "dtype"))
def dequantize(
    q_OI: jax.Array,
    scale: jax.Array,
    *,
    block: tuple[int, int] | None = BLOCK,
    dtype: Any = jnp.bfloat16,
) -> jax.Array:
    """q * scale in float32, as `dtype`. block None: scale is [O, 1], one for each channel.

    q_OI: e4m3fn, or its bytes as uint8.
    """
    if q_OI.dtype == jnp.uint8:
        q_OI = jax.lax.bitcast_convert_type(q_OI, jnp.float8_e4m3fn)
    O, I = q_OI.shape
    scale = scale.astype(jnp.float32)
    if block is not None:
        scale = jnp.repeat(jnp.repeat(scale, block[0], axis=0)[:O], block[1], axis=1)[:, :I]
    return (q_OI.astype(jnp.float32) * scale).astype(dtype)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
    """Shape of the scales of a weight [O, I]."""
    if block is None:
        return (shape[0], 1)
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def _divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """x / y, correctly rounded.

    XLA turns the division by a broadcast value into a product with its inverse, one bit off at
    times; a divisor that hangs on every element of x it leaves alone.
    """
    return x / jnp.where(jnp.isnan(x), x, y)


def _to_e4m3(x: jax.Array) -> jax.Array:
    """Bytes of the nearest e4m3fn, saturating at ±448 (the bare cast gives NaN above)."""
    q = jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(q, jnp.uint8)
