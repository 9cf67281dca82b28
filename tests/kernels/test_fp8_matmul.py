"""Products with FP8 weights: the numbers of blocks and scales by hand, and laws: rows apart, scales
by powers of two, a stack its slices.

The Pallas kernels for Hopper run here in an interpreter and are lowered for CUDA; on a GPU, for
real.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from glm45_jax import sharding
from glm45_jax.kernels import fp8, fp8_rows_gpu
from glm45_jax.kernels import fp8_matmul as op
from glm45_jax.kernels import fp8_matmul_gpu as gpu
from glm45_jax.kernels import linear as linear_lib
from glm45_jax.kernels.grouped_matmul_gpu import refuses_few as mosaic_refuses
from glm45_jax.kernels.linear import linear, linears

NAMES = [i.name for i in op.GROUPED_IMPLS if i.name != "mosaic"]  # those that run anywhere


def draw(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def rounded(x):
    """The nearest e4m3fn, in float64."""
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def rows_by_hand(x_MI):
    """What a row stands for after quantisation by 128 entries."""
    parts = []
    for start in range(0, x_MI.shape[1], 128):
        part = x_MI[:, start : start + 128]
        scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(448)
        parts.append(rounded(part / scale) * scale)
    return np.concatenate(parts, axis=1)


def weight_by_hand(w_OI):
    q, scale = fp8.quantize_blocks(w_OI)
    return np.asarray(fp8.dequantize(q, scale, dtype=jnp.float32), np.float64)


def test_an_array_is_multiplied_by_einsum_itself():
    x, w = draw(2, 3, 40), draw(40, 4, 5, seed=1)
    ours = linear("btd,dnh->btnh", jnp.asarray(x), jnp.asarray(w))
    np.testing.assert_array_equal(ours, jnp.einsum("btd,dnh->btnh", x, w))
    short = jnp.asarray(x, jnp.bfloat16)
    assert linear("btd,dnh->btnh", short, jnp.asarray(w)).dtype == jnp.bfloat16
    for weight in (jnp.asarray(w), fp8.to_fp8(jnp.asarray(w), outputs=2)):
        assert linear("btd,dnh->btnh", short, weight, dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("D, N, H", [(200, 3, 50), (128, 2, 64), (40, 1, 7)])
def test_a_product_is_that_of_the_numbers_that_bytes_and_scales_stand_for(dtype, D, N, H):
    x, w = jnp.asarray(draw(2, 3, D), dtype), draw(D, N, H, seed=1)
    exact = (
        rows_by_hand(np.asarray(x, np.float32).reshape(6, D))
        @ weight_by_hand(w.reshape(D, N * H).T).T
    )
    packed = fp8.to_fp8(jnp.asarray(w), outputs=2)
    assert packed.shape == w.shape
    ours = linear("btd,dnh->btnh", x, packed)
    assert (ours.shape, ours.dtype) == ((2, 3, N, H), dtype)
    size = 1e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(
        np.asarray(ours, np.float64).reshape(6, -1), exact, rtol=size, atol=size * 10
    )


def test_two_axes_of_inputs_are_one():
    x, w = draw(4, 6, 30), draw(6, 30, 20, seed=1)
    ours = linear("bnh,nhd->bd", jnp.asarray(x), fp8.to_fp8(jnp.asarray(w), inputs=2))
    flat = linear(
        "bi,id->bd", jnp.asarray(x.reshape(4, 180)), fp8.to_fp8(jnp.asarray(w.reshape(180, 20)))
    )
    np.testing.assert_array_equal(ours, flat)


@settings(max_examples=8)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 3), st.integers(0, 99))
def test_a_weight_is_quantised_as_its_matrices_are_and_comes_back(I, O, E, seed):
    w = draw(E, I, O, seed=seed, scale=10.0 ** (seed % 7 - 3))
    packed = fp8.to_fp8(jnp.asarray(w))
    back = np.asarray(fp8.to_array(packed, jnp.float32))
    for e in range(E):
        q, scale = fp8.quantize_blocks(w[e].T)
        ours = jax.lax.bitcast_convert_type(packed.values_OI[e], jnp.uint8)
        np.testing.assert_array_equal(ours, np.pad(q, ((0, 0), (0, -I % 128))))
        np.testing.assert_array_equal(packed.scales_PQ[e], scale)
        np.testing.assert_array_equal(back[e].T, fp8.dequantize(q, scale, dtype=jnp.float32))


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(0, 99), st.integers(-40, 40))
def test_rows_come_back_within_half_a_step_and_scale_by_powers_of_two(I, seed, power):
    x = draw(3, I, seed=seed)
    q, scale = fp8.quantize_rows(jnp.asarray(x))
    blocks = -(-I // 128)
    assert (q.shape, scale.shape) == ((3, blocks * 128), (3, blocks))
    full = np.repeat(np.asarray(scale), 128, axis=1)
    padded = np.pad(x, ((0, 0), (0, -I % 128)))
    step = np.maximum(np.abs(padded), full * 2**-6) * (2**-4 * (1 + 1e-5))
    assert (np.abs(np.asarray(q, np.float32) * full - padded) <= step).all()
    if power > -20:  # above the floor of 1e-10
        scaled_q, scaled = fp8.quantize_rows(jnp.asarray(x * np.float32(2.0) ** power))
        np.testing.assert_array_equal(np.asarray(q, np.float32), np.asarray(scaled_q, np.float32))
        np.testing.assert_array_equal(scale * np.float32(2.0) ** power, scaled)


def test_rows_of_zeros_give_zeros():
    w = fp8.to_fp8(jnp.asarray(draw(130, 20)))
    (y,) = op.fp8_matmul(jnp.zeros((2, 130)), w)
    np.testing.assert_array_equal(y, np.zeros((2, 20)))


def test_the_slices_of_a_stack_are_its_matrices():
    x, w = jnp.asarray(draw(5, 150)), jnp.asarray(draw(3, 150, 4, 10, seed=1))
    stacked = fp8.to_fp8(w, outputs=2)
    assert stacked.shape == w.shape
    ours = jax.lax.scan(lambda _, w: (None, linear("bd,dnh->bnh", x, w)), None, stacked)[1]
    for one, y in zip(w, ours, strict=True):
        # The compiler may sum in another order inside a loop.
        right = linear("bd,dnh->bnh", x, fp8.to_fp8(one, outputs=2))
        np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"stacked axes \(3,\) must be gone"):
        linear("bd,dnh->bnh", x, stacked)
    with pytest.raises(ValueError, match=r"ends in \(140,\), the weight takes \(150,\)"):
        linear("bd,dnh->bnh", x[:, :140], fp8.to_fp8(w[0], outputs=2))


def test_several_weights_give_what_each_gives_and_arrays_do_not_mix_with_them():
    x, v, w = jnp.asarray(draw(5, 150)), jnp.asarray(draw(150, 30)), jnp.asarray(draw(150, 2, 7))
    specs = "bd,df->bf", "bd,dnh->bnh"
    for one, two in ((v, w), (fp8.to_fp8(v), fp8.to_fp8(w, outputs=2))):
        both = linears(x, (specs[0], one), (specs[1], two))
        np.testing.assert_array_equal(both[0], linear(specs[0], x, one))
        np.testing.assert_array_equal(both[1], linear(specs[1], x, two))
    with pytest.raises(ValueError, match="an array of float32 beside FP8 weights"):
        linears(x, (specs[0], fp8.to_fp8(v)), (specs[1], w))


def test_the_kernel_of_few_rows_takes_bfloat16_few_rows_and_one_device():
    mosaic = linear_lib.IMPLS[0]
    x, w = jnp.zeros((2, 128, 256), jnp.bfloat16), jnp.zeros((256, 4, 64), jnp.bfloat16)
    spec = "btd,dnh->btnh"
    assert mosaic.yields(spec, x, w) is None
    assert "more than 256 rows" in mosaic.yields(spec, jnp.zeros((3, 128, 256)), w)
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=2), jax.devices()[:2])
    with sharding.use(mesh, sharding.Rules()):
        assert "over 2 devices" in mosaic.yields(spec, x, w)
        assert "over 2 devices" in op.IMPLS[0].yields(x.reshape(256, 256), packed(256, 192))
    flat = jnp.zeros((256, 256), jnp.bfloat16), jnp.zeros((256, 256), jnp.bfloat16)
    assert mosaic_refuses(*flat) is None
    assert "must be bfloat16" in mosaic_refuses(flat[0], flat[1].astype(jnp.float32))
    assert "256 x 72" in mosaic_refuses(flat[0], flat[1][:, :72])
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match=r"linear: impl='mosaic': needs compute capability"):
            linear(spec, x, w, impl="mosaic")


SIZES = {"mixed": [3, 0, 1, 9], "ends early": [0, 5, 0, 0], "none": [0, 0, 0, 0]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_grouped_rows_meet_the_matrix_of_their_expert(name, sizes):
    x, w = draw(13, 140), draw(4, 140, 30, seed=1)
    ours = op.grouped_matmul_fp8(
        jnp.asarray(x), fp8.to_fp8(jnp.asarray(w)), jnp.asarray(sizes, jnp.int32), impl=name
    )
    edges = np.cumsum([0, *sizes])
    parts = [
        rows_by_hand(x[a:b]) @ weight_by_hand(w[e].T).T
        for e, (a, b) in enumerate(itertools.pairwise(edges))
        if b > a
    ]
    exact = np.concatenate([*parts, np.zeros((13 - edges[-1], 30))])
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-4)


def test_an_implementation_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        op.fp8_matmul(jnp.ones((2, 128)), fp8.to_fp8(jnp.ones((128, 8))), impl="cuda")


def half(*shape, seed=0):
    return jnp.asarray(draw(*shape, seed=seed), jnp.bfloat16)


def packed(*shape, seed=1):
    return fp8.to_fp8(jnp.asarray(draw(*shape, seed=seed)))


def assert_rounded_once(ours, exact, size=2**-8):
    """bfloat16 of the definition: 2^-9 at most, and what tensor cores lose in a sum of 128."""
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    assert np.linalg.norm(ours - exact) <= size * np.linalg.norm(exact)


# Of 72 rows: a group of a tile and more, short ones, empty ones, rows past the last.
RAGGED = {"mixed": [3, 0, 65, 4], "short": [1, 2, 0, 7], "none": [0, 0, 0, 0]}


@pytest.mark.parametrize("rows, splits", [(64, 1), (64, 2), (128, 1), (128, 3), (192, 1)])
def test_the_mosaic_kernel_is_the_definition_in_the_interpreter(rows, splits):
    x, ws = half(72, 600), [packed(600, O, seed=O) for O in (192, 128)]
    run = functools.partial(gpu.matmul, plan=gpu.plan_for(rows, splits))
    ours = run(x, *ws, interpret=plgpu.InterpretGPUParams())
    for y, exact in zip(ours, op.reference(x.astype(jnp.float32), *ws), strict=True):
        assert (y.shape, y.dtype) == (exact.shape, jnp.bfloat16)
        assert_rounded_once(y, exact)


@pytest.mark.parametrize("rows", [64, 128, 192])
@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
def test_the_grouped_mosaic_kernel_is_the_definition_in_the_interpreter(sizes, rows):
    # Not shown here but by the gpu tests: two views of the same bytes, TMA past an edge.
    x, w, sizes = half(72, 256), packed(4, 256, 192), jnp.asarray(sizes, jnp.int32)
    run = functools.partial(gpu.grouped_matmul, plan=gpu.plan_for(rows))
    ours = run(x, w, sizes, interpret=plgpu.InterpretGPUParams())
    assert_rounded_once(ours, op.grouped_reference(x.astype(jnp.float32), w, sizes))


@settings(max_examples=12)
@given(st.integers(1, 5000), st.sampled_from([64, 128, 192]))
def test_bands_are_the_tiles_of_groups_of_their_rows(n_rows, rows):
    bands = gpu.lay_bands(n_rows, band=gpu.plan_for(rows).band, rows=rows)
    tiles = gpu.lay_tiles(jnp.asarray(bands.rows_E), n_rows=n_rows, rows=rows)
    total = int(tiles.next_P[-1])
    assert len(bands.next_P) == bands.next_P[-1] == total
    for ours, theirs in zip(jax.tree.leaves(bands), jax.tree.leaves(tiles), strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs)[: len(ours)])


def test_the_mosaic_kernel_says_what_it_cannot_take():
    x, w = half(8, 256), packed(256, 192)
    assert gpu.refuses(x, w) is None
    assert "must be bfloat16" in gpu.refuses(x.astype(jnp.float32), w)
    assert "there are 200 outputs" in gpu.refuses(x, packed(256, 200))
    assert "no rows" in gpu.refuses(x[:0], w)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match=r"compute capability 9\.0; this is cpu"):
            op.fp8_matmul(x, w, impl="mosaic")


def shapes(*shape, lead=()):
    I, O = shape
    blocks = -(-O // 128), -(-I // 128)
    return fp8.Fp8(
        jax.ShapeDtypeStruct((*lead, O, blocks[1] * 128), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((*lead, *blocks), jnp.float32),
        shape,
    )


@pytest.mark.parametrize("rows", [1, 64, 8192])
def test_the_mosaic_kernels_lower_for_cuda_at_air_shapes(rows):
    def layer(x_MD, x_MI, qkv, out, gate_up, down, experts, sizes):
        attention = gpu.matmul(x_MD, *qkv), gpu.matmul(x_MI, out)
        x_RD = jnp.repeat(x_MD, 8, axis=0)
        routed = gpu.grouped_matmul(x_RD, experts, sizes)
        return attention, gpu.matmul(x_MD, *gate_up), gpu.matmul(x_MI[:, :10944], down), routed

    x_MD, x_MI = (jax.ShapeDtypeStruct((rows, n), jnp.bfloat16) for n in (4096, 12288))
    args = (
        (shapes(4096, 12288), shapes(4096, 1024), shapes(4096, 1024)),
        shapes(12288, 4096),
        (shapes(4096, 10944), shapes(4096, 10944)),
        shapes(10944, 4096),
        shapes(4096, 1408, lead=(128,)),
        jax.ShapeDtypeStruct((128,), jnp.int32),
    )
    lowered = jax.jit(layer).trace(x_MD, x_MI, *args).lower(lowering_platforms=("cuda",))
    quantised = 3 if rows >= fp8_rows_gpu.LEAST else 0  # of their sizes, by a kernel of their own
    assert lowered.as_text().count("mosaic_gpu_v2") == 5 + quantised


@pytest.mark.parametrize("blocks", [1, 6, 8])
def test_the_kernel_of_rows_gives_the_bytes_and_scales_of_the_definition(blocks):
    x = half(128, 128 * blocks) * jnp.exp2(half(128, 1) * 8).astype(jnp.bfloat16)
    x = x.at[3, :70].set(0).at[5].set(0)
    ours, ours_QM = fp8_rows_gpu.quantize_rows(x, interpret=True)
    exact, exact_MQ = fp8.quantize_rows(x)
    np.testing.assert_array_equal(ours.astype(jnp.float32), exact.astype(jnp.float32))
    np.testing.assert_array_equal(ours_QM.T, exact_MQ)


def test_the_kernel_of_rows_says_what_it_leaves_to_xla():
    assert fp8_rows_gpu.refuses(half(1024, 256)) is None
    for x in (half(960, 256), half(1030, 256), half(1024, 200)):
        assert "are fewer than 1024, or no whole blocks of 64 by 128" in fp8_rows_gpu.refuses(x)
    with pytest.raises(ValueError, match="rows are float32, must be bfloat16"):
        fp8_rows_gpu.quantize_rows(jnp.zeros((1024, 256)))


@pytest.mark.gpu
def test_the_kernel_of_rows_is_the_definition_on_a_gpu():
    x = half(8192, 4096) * jnp.exp2(half(8192, 1) * 8).astype(jnp.bfloat16)
    ours, ours_QM = jax.jit(fp8_rows_gpu.quantize_rows)(x)
    exact, exact_MQ = jax.jit(fp8.quantize_rows)(x)
    np.testing.assert_allclose(ours_QM.T, exact_MQ, rtol=3e-7)  # divisions are approximate
    unlike = ours.astype(jnp.float32) != exact.astype(jnp.float32)
    assert jnp.mean(unlike) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 10, 64, 200, 1000, 8192])
def test_the_mosaic_kernel_is_the_definition_on_a_gpu(M):
    x, ws = half(M, 1408), [packed(1408, O, seed=O) for O in (1024, 192, 320)]
    for y, exact in zip(
        op.fp8_matmul(x, *ws, impl="mosaic"), op.reference(x.astype(jnp.float32), *ws), strict=True
    ):
        assert_rounded_once(y, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("R", [8, 512, 4096])
def test_the_grouped_mosaic_kernel_is_the_definition_on_a_gpu_and_the_same_every_time(R):
    rng = np.random.default_rng(R)
    sizes = jnp.asarray(rng.multinomial(R - R // 8, rng.dirichlet(np.ones(32))), jnp.int32)
    x, w = half(R, 1408), packed(32, 1408, 512)
    n = int(sizes.sum())
    runs = [op.grouped_matmul_fp8(x.at[n:].set(1e30), w, sizes, impl="mosaic") for _ in range(3)]
    assert_rounded_once(runs[0], op.grouped_blocked(x.astype(jnp.float32), w, sizes))
    for again in runs[1:]:
        np.testing.assert_array_equal(np.asarray(again), np.asarray(runs[0]))
