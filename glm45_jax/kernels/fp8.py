"""FP8 (e4m3fn) weights: quantise by blocks or by output channels, and back. The type to know is
`Fp8`, a weight that the model takes in the place of an array; products: fp8_matmul.py.

A weight lies as in released files, [O, I] = [out, in]. Block layout (DeepSeek style): one scale
for each block, float32 [ceil(O / bo), ceil(I / bi)]; channel layout (compressed-tensors): [O, 1].
Scales multiply on the way back, whatever their name in the files. Source: spec 3.2.
Letters: O outputs, I inputs (P, Q: blocks of them), M rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-12  # of the converter: an all-zero block gets a tiny scale, not 0 / 0
ROW_FLOOR = 1e-10  # of online kernels, for activations
BLOCK = (128, 128)


@struct.dataclass
class Fp8:
    """A weight as e4m3fn numbers and a float32 scale for each block of 128 x 128.

    values_OI: [.., outputs, inputs] with inputs contiguous, as wgmma wants them, whatever the order
    of the weight's own axes; inputs are filled up to whole blocks with zeros. scales_PQ: [..,
    ceil(O / 128), ceil(I / 128)]. The leading axes are those of a stack (L, or L and E): `lax.scan`
    slices them. inner: shape of the weight behind them, inputs first, as in (D, N, H) of q_DNH.
    inputs: how many axes of `inner` are inputs.
    """

    values_OI: jax.Array
    scales_PQ: jax.Array
    inner: tuple[int, ...] = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False, default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that this stands for."""
        return (*self.values_OI.shape[:-2], *self.inner)


def is_fp8(x: Any) -> bool:
    """True for a quantised weight: `is_leaf` of tree maps over weights."""
    return isinstance(x, Fp8)


def to_fp8(w: jax.Array, *, inputs: int = 1, outputs: int = 1) -> Fp8:
    """The weight quantised by blocks of 128 x 128, each matrix as by `quantize_blocks`.

    w: [.., inputs, outputs], that many axes of each, any float.
    """
    lead, inner = w.shape[: -inputs - outputs], w.shape[-inputs - outputs :]
    I, O = math.prod(inner[:inputs]), math.prod(inner[inputs:])
    (P, Q), (bo, bi) = scale_shape((O, I), BLOCK), BLOCK
    # Blocks are found where the weight lies and only bytes are turned: no copy in float32.
    w_IO = w.reshape(*lead, I, O).astype(jnp.float32)
    edge = [(0, 0)] * len(lead) + [(0, Q * bi - I), (0, P * bo - O)]
    tiles_QiPo = jnp.pad(w_IO, edge).reshape(*lead, Q, bi, P, bo)
    amax_QP = jnp.maximum(jnp.abs(tiles_QiPo).max(axis=(-3, -1)), AMAX_FLOOR)
    scale_QP = _divide(amax_QP, E4M3_MAX)
    q_QiPo = _clip_e4m3(_divide(tiles_QiPo, scale_QP[..., :, None, :, None]))
    q_IO = q_QiPo.reshape(*lead, Q * bi, P * bo)[..., :O]
    return Fp8(jnp.swapaxes(q_IO, -1, -2), jnp.swapaxes(scale_QP, -1, -2), inner, inputs)


def to_array(w: Any, dtype: Any) -> jax.Array:
    """The weight in its own shape: values times scales in float32, then `dtype`. Of an array, the
    array in `dtype`.
    """
    if not is_fp8(w):
        return jnp.asarray(w, dtype)
    scale_OQ = jnp.repeat(w.scales_PQ, BLOCK[0], axis=-2)[..., : w.values_OI.shape[-2], :]
    w_OI = w.values_OI.astype(jnp.float32) * jnp.repeat(scale_OQ, BLOCK[1], axis=-1)
    w_OI = w_OI[..., : math.prod(w.inner[: w.inputs])]
    return jnp.swapaxes(w_OI, -1, -2).reshape(w.shape).astype(dtype)


def cast(w: Any, dtype: Any) -> Any:
    """An array in `dtype`; a quantised weight as it is."""
    return w if is_fp8(w) else jnp.asarray(w, dtype)


def quantize_rows(x_MI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations as e4m3fn [M, I], I filled up to whole blocks with zeros, and float32 scales
    [M, ceil(I / 128)], one for each 128 entries of a row. Source: spec 3.2 (activation_scheme
    dynamic).
    """
    (M, I), size = x_MI.shape, BLOCK[1]
    Q = -(-I // size)
    x_MQi = jnp.pad(x_MI.astype(jnp.float32), ((0, 0), (0, Q * size - I))).reshape(M, Q, size)
    scale_MQ = jnp.maximum(jnp.abs(x_MQi).max(axis=-1), ROW_FLOOR) / E4M3_MAX
    q_MQi = _clip_e4m3(x_MQi / scale_MQ[:, :, None])
    return q_MQi.reshape(M, Q * size), scale_MQ


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
    return jax.lax.bitcast_convert_type(_clip_e4m3(x), jnp.uint8)


def _clip_e4m3(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
