"""Quantisation is the converter's, to the byte; the way back is q * scale."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.kernels import fp8

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "extra" / "fp8.npz")


@pytest.mark.parametrize("i", range(3))
def test_blocks_and_scales_are_the_golden_bytes(i):
    block = tuple(int(n) for n in GOLDEN[f"block_size_{i}"])
    q, scale = fp8.quantize_blocks(GOLDEN[f"w_{i}"], block=block)
    np.testing.assert_array_equal(q, GOLDEN[f"block_q_bytes_{i}"])
    np.testing.assert_array_equal(scale, GOLDEN[f"block_scale_inv_{i}"])
    back = fp8.dequantize(q, scale, block=block, dtype=jnp.float32)
    np.testing.assert_array_equal(back, GOLDEN[f"block_dequant_{i}"])


@pytest.mark.parametrize("i", range(3))
def test_channels_and_scales_are_the_golden_bytes(i):
    q, scale = fp8.quantize_channels(GOLDEN[f"w_{i}"])
    np.testing.assert_array_equal(q, GOLDEN[f"channel_q_bytes_{i}"])
    np.testing.assert_array_equal(scale, GOLDEN[f"channel_scale_{i}"])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**16), st.floats(1e-6, 1e6))
def test_a_weight_comes_back_within_half_a_step_of_its_block(rows, columns, seed, size):
    w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * size
    q, scale = fp8.quantize_blocks(w, (16, 16))
    assert scale.shape == fp8.scale_shape(w.shape, (16, 16))
    back = np.asarray(fp8.dequantize(q, scale, block=(16, 16), dtype=jnp.float32))
    full = np.kron(scale, np.ones((16, 16)))[:rows, :columns]
    # Three bits of mantissa: half a step is 2^-4 of the value, or of the smallest normal, 2^-6.
    step = np.maximum(np.abs(w), full * 2**-6) * (2**-4 * (1 + 1e-5))
    assert (np.abs(back - w) <= step).all()


def test_a_shard_quantises_as_the_whole_where_its_edges_are_the_blocks():
    w = np.random.default_rng(0).standard_normal((256, 384)).astype(ml_dtypes.bfloat16)
    q, scale = fp8.quantize_blocks(w)
    upper_q, upper_scale = fp8.quantize_blocks(w[:128])
    np.testing.assert_array_equal(q[:128], upper_q)
    np.testing.assert_array_equal(scale[:1], upper_scale)


def test_bytes_and_e4m3_are_dequantised_alike_and_other_inputs_are_refused():
    w = jax.random.normal(jax.random.key(0), (8, 8))
    q, scale = fp8.quantize_blocks(w, (4, 4))
    as_float = jax.lax.bitcast_convert_type(q, jnp.float8_e4m3fn)
    np.testing.assert_array_equal(
        fp8.dequantize(q, scale, block=(4, 4)), fp8.dequantize(as_float, scale, block=(4, 4))
    )
    with pytest.raises(ValueError, match=r"int32\[8\]"):
        fp8.quantize_blocks(jnp.arange(8, dtype=jnp.int32))
