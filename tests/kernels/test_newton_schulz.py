"""Newton-Schulz: the Gram form is the same polynomial, its kernel for Hopper the same products.

The kernel runs here in an interpreter; test_compile_gpu.py compiles it; on a GPU, for real.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from numpy.testing import assert_allclose, assert_array_equal

from glm45_jax.kernels import newton_schulz as op
from glm45_jax.kernels import newton_schulz_gpu as gpu
from glm45_jax.kernels.shapes import NEWTON_SCHULZ

SMALL = {name: (shape.B, shape.m, shape.n) for name, shape in NEWTON_SCHULZ.items() if shape.small}
INTERPRET = plgpu.InterpretGPUParams()


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def with_singular_values(values, n, seed=0):
    """A matrix of so many rows and n columns."""
    rng, m = np.random.default_rng(seed), len(values)
    u = np.linalg.qr(rng.normal(size=(m, m)))[0]
    v = np.linalg.qr(rng.normal(size=(n, m)))[0]
    return jnp.asarray((u * values) @ v.T, jnp.float32)


SPECTRA = {
    "equal": np.ones(96),
    "four decades": np.logspace(0, -4, 96),
    "two decades": np.logspace(0, -2, 96),
    "one over rank": 1 / np.arange(1.0, 97.0),
    "low rank": np.where(np.arange(96) < 6, 1.0, 0.0),
    "low rank and noise": np.where(np.arange(96) < 6, 1.0, 1e-3),
    "one and noise": np.where(np.arange(96) < 1, 1.0, 1e-2),
}


@pytest.mark.parametrize(
    ("shape", "steps"), [(s, 5) for s in SMALL.values()] + [((2, 2, 9, 3), n) for n in (1, 3, 5, 7)]
)
def test_the_gram_form_is_the_definition(shape, steps):
    x = draw(*shape)
    wanted = op.newton_schulz(x, steps=steps, impl="xla")
    ours = op.newton_schulz(x, steps=steps, impl="gram")
    assert ours.dtype == x.dtype
    assert_allclose(ours, wanted, atol=5e-5)


@pytest.mark.parametrize("impl", ["xla", "gram"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_transpose_gives_the_transpose_and_zero_gives_zero(impl, dtype):
    x = draw(3, 24, 40).astype(dtype).at[1].set(0)
    y = op.newton_schulz(x, impl=impl).astype(jnp.float32)
    assert_array_equal(y[1], 0)
    turned = op.newton_schulz(x.mT, impl=impl).mT.astype(jnp.float32)
    assert_allclose(turned, y, atol=1e-5 if dtype == jnp.float32 else 0.02)


@pytest.mark.parametrize("power", [-12, 12])
def test_the_size_of_a_gradient_does_not_matter(power):
    x = draw(2, 24, 40).astype(jnp.bfloat16)
    scaled = x * jnp.bfloat16(2.0**power)
    ours = op.newton_schulz(scaled, impl="gram").astype(jnp.float32)
    assert_allclose(ours, op.newton_schulz(x, impl="gram").astype(jnp.float32), atol=0.01)


@pytest.mark.parametrize("name", SPECTRA)
def test_in_bfloat16_the_gram_form_is_closer_to_float32_than_the_definition_is(name):
    x = with_singular_values(SPECTRA[name], 256).astype(jnp.bfloat16)
    wanted = op.newton_schulz(x.astype(jnp.float32), impl="xla")

    def far(impl):
        y = op.newton_schulz(x, impl=impl).astype(jnp.float32)
        return float(jnp.linalg.norm(y - wanted) / jnp.linalg.norm(wanted))

    assert far("gram") < far("xla"), (far("gram"), far("xla"))
    assert np.isfinite(far("gram"))


def test_a_kernel_asked_for_where_there_is_no_hopper_says_so():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine may have it")
    with pytest.raises(ValueError, match=r"mosaic.*needs compute capability 9.0.*auto"):
        op.newton_schulz(draw(1, 128, 128).astype(jnp.bfloat16), impl="mosaic")


@pytest.mark.parametrize(("m", "n"), [(96, 256), (64, 128), (256, 200)])
def test_sides_that_the_kernel_does_not_take_are_named(m, n):
    assert f"{m} x {n}" in str(op.unfit(jax.ShapeDtypeStruct((999, m, n), jnp.bfloat16)))


def test_few_small_matrices_are_left_to_xla():
    stack = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    assert "CTAs" in str(op.unfit(stack((1, 512, 32_768))))
    assert op.unfit(stack((1, 4096, 12_288))) is None
    assert op.unfit(stack((128, 4096, 1408))) is None


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("side", [128, 192, 320, 1408])
def test_tiles_of_a_symmetric_result_hold_each_block_from_the_diagonal_on_once(side, columns):
    seen = np.zeros((side // 64, side // 64), int)
    for row, column in gpu.lay_tiles(side, side, columns, symmetric=True).T:
        for down in range(row, min(row + 128, side), 64):
            for right in range(column, min(column + columns, side), 64):
                if right >= down:
                    seen[down // 64, right // 64] += 1
    assert_array_equal(seen, np.triu(np.ones_like(seen)))


# (what, keywords, transposed operands): every way the Gram form multiplies.
PRODUCTS = {
    "inner products of rows": dict(symmetric=True, rhs_t=True),
    "inner products of columns": dict(symmetric=True, lhs_t=True),
    "polynomial": dict(symmetric=True, shifted=True, diagonal=3.4445),
    "into the matrix": {},
}


@functools.cache
def operands(what):
    """lhs, rhs, scale, shift: two matrices with sides 192 and 256, half of a tile left over."""
    x = draw(2, 192, 256).astype(jnp.float16)
    gram = jnp.einsum("bmn,bkn->bmk", x, x).astype(jnp.float16) / 16
    pair = {
        "inner products of rows": (x, x),
        "inner products of columns": (x.mT, x.mT),
        "polynomial": (gram, gram),
        "into the matrix": (gram, x),
    }[what]
    return *pair, jnp.array([0.5, 2.0]) / 64, jnp.array([3.0, -1.0])


@pytest.mark.parametrize("what", PRODUCTS)
def test_products_of_the_kernel_are_those_of_xla(what):
    args = operands(what)
    ours = gpu.product(*args, **PRODUCTS[what], dtype=jnp.float16, interpret=INTERPRET)
    wanted = op.product(*args, **PRODUCTS[what], dtype=jnp.float32)
    assert ours.dtype == jnp.float16
    assert_allclose(ours.astype(jnp.float32), wanted, rtol=2e-3, atol=2e-3)
    if PRODUCTS[what].get("symmetric"):
        mirrored = np.kron(~np.eye(ours.shape[1] // 64, dtype=bool), np.ones((64, 64), bool))
        assert_array_equal(np.asarray(ours)[:, mirrored], np.asarray(ours.mT)[:, mirrored])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 128, 192), (2, 256, 192)])
def test_the_kernel_iterates_as_the_definition_does(shape):
    x = draw(*shape).astype(jnp.bfloat16)
    product = functools.partial(gpu.product, interpret=INTERPRET)
    ours = op.by_gram(x, steps=5, product=product).astype(jnp.float32)
    wanted = op.newton_schulz(x.astype(jnp.float32), impl="xla")
    by_xla = op.newton_schulz(x, impl="gram").astype(jnp.float32)
    assert float(jnp.linalg.norm(ours - wanted) / jnp.linalg.norm(wanted)) < 0.02
    assert_allclose(ours, by_xla, atol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 1408, 4096), (8, 4096, 1408), (3, 512, 256), (2, 192, 320)])
def test_on_a_hopper_the_kernel_iterates_as_float32_does(shape):
    x = draw(*shape).astype(jnp.bfloat16)
    wanted = op.newton_schulz(x.astype(jnp.float32), impl="xla")
    ours = op.newton_schulz(x, impl="mosaic").astype(jnp.float32)
    assert float(jnp.linalg.norm(ours - wanted) / jnp.linalg.norm(wanted)) < 0.02
