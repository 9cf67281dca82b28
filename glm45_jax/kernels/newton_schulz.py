"""Nearly orthogonal factors of stacks of matrices: Muon's Newton-Schulz iteration. Letters: B
matrices, m and n their sides; k the shorter one.

Implementations: "xla" iterates on the matrices themselves, in their dtype. "gram" and "mosaic"
iterate on the k x k matrices of inner products and multiply into the matrix twice, see `by_gram`;
they differ in who multiplies, XLA or the kernel of newton_schulz_gpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from glm45_jax.kernels.dispatch import Implementation, anything, not_hopper, pick

QUINTIC = (3.4445, -4.7750, 2.0315)  # Source: spec 2.7
EPS = 1e-7
# Inner products of a matrix of Frobenius norm 1 times this: float16 keeps 11 bits of numbers from
# 6e-5 on, and the largest that comes up is about 2 of it.
GRAM_SCALE = 256.0
RESTART = 3  # iterations on one set of inner products


def newton_schulz(x_Bmn: jax.Array, *, steps: int = 5, impl: str = "auto") -> jax.Array:
    """Nearly orthogonal factor of each matrix, in its dtype; singular values about 0.5 to 1.5.

    x_Bmn: any leading dims, one problem each. The transpose gives the transpose, zero gives zero.
    impl: "xla", "gram", "mosaic", or "auto" by platform, dtype and shape.

    Raises: ValueError where a named implementation cannot run on these arguments.
    Source: spec 2.7 (five quintic steps after division by the Frobenius norm, as Moonlight).
    """
    return pick("newton_schulz", IMPLS, impl, x_Bmn)(x_Bmn, steps=steps)


def iterate(x_Bmn: jax.Array, *, steps: int, split: tuple[str, ...] = ()) -> jax.Array:
    """The definition, in the dtype of x.

    split: mesh axes that cut the last side in `shard_map`, which then is the longer one.
    """
    a, b, c = QUINTIC
    exact = jax.lax.Precision.HIGHEST if x_Bmn.dtype == jnp.float32 else None  # no TF32 in float32
    dot = partial(jnp.matmul, precision=exact)

    def total(y: jax.Array) -> jax.Array:
        return jax.lax.psum(y, split) if split else y

    # A cut side looks short here.
    tall = not split and x_Bmn.shape[-2] > x_Bmn.shape[-1]
    x = x_Bmn
    squares = total(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True))
    norm = jnp.sqrt(squares).astype(x.dtype).astype(jnp.float32)
    x = (x.astype(jnp.float32) / (norm + EPS)).astype(x.dtype)

    def step(_: Any, x: jax.Array) -> jax.Array:
        gram = dot(*((x.mT, x) if tall else (x, x.mT)), preferred_element_type=jnp.float32)
        gram = total(gram).astype(x.dtype)
        more = _times(b, gram) + dot(_times(c, gram), gram)
        return _times(a, x) + (dot(x, more) if tall else dot(more, x))

    # A loop, not unrolled: a model has dozens of shapes of matrix, and each would compile five
    # times.
    return jax.lax.fori_loop(0, steps, step, x)


def _times(scalar: float, x: jax.Array) -> jax.Array:
    """scalar * x, the scalar in float32: 3.4445 in bfloat16 is 3.4375, another polynomial."""
    return (scalar * x.astype(jnp.float32)).astype(x.dtype)


def by_gram(
    x_Bmn: jax.Array,
    *,
    steps: int,
    product: Callable[..., jax.Array],
    restart: int = RESTART,
) -> jax.Array:
    """The same polynomial of the same matrix by way of its inner products.

    With G = x xT a step multiplies x by P = aI + bG + cGG, and G by PP; all of these are symmetric
    and commute. So up to `restart` steps go on G alone, in float16 where x is bfloat16, and then
    the product Q of their P meets x. Rounding grows by aa = 12 a step in directions whose inner
    products are small, which is what new ones from the x that was reached are for.

    product: as newton_schulz_gpu.product. Work: 6 kkn + 14 kkk where the definition has 20 kkn +
    10 kkk, in halves if symmetric products are cheap (k the shorter side, 5 steps).
    Accuracy: docs/log.md; with bfloat16 closer to float32 than the definition in bfloat16.
    """
    m, n = x_Bmn.shape[-2:]
    tall, x = m > n, x_Bmn.reshape(-1, m, n)
    norm_B = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(1, 2)))
    scale_B = 1.0 / (norm_B + EPS)
    while steps > 0:
        q = _segment(x, scale_B, min(steps, restart), product=product, tall=tall)
        x = product(*((x, q) if tall else (q, x)), scale_B, scale_B, dtype=x.dtype)
        scale_B, steps = jnp.ones_like(scale_B), steps - restart
    return x.reshape(x_Bmn.shape)


def _segment(
    x: jax.Array, scale_B: jax.Array, steps: int, *, product: Callable[..., jax.Array], tall: bool
) -> jax.Array:
    """Q with Q x the result of so many steps from scale * x; x Q where x is tall."""
    a, b, c = QUINTIC
    half = jnp.float16 if x.dtype == jnp.bfloat16 else x.dtype
    one_B = jnp.ones_like(scale_B)
    symmetric = partial(product, symmetric=True)
    gram = symmetric(x, x, GRAM_SCALE * scale_B**2, one_B, lhs_t=tall, rhs_t=not tall, dtype=half)
    shift_B, outer_B = (b / c * GRAM_SCALE) * one_B, (c / GRAM_SCALE**2) * one_B
    q = None
    for i in range(steps):
        last = i + 1 == steps
        # aI + (c GG + b G), the bracket as c (G + b/c I) G
        kept = x.dtype if last and q is None else half
        p = symmetric(gram, gram, outer_B, shift_B, shifted=True, diagonal=a, dtype=kept)
        if q is None:
            q = p
        else:
            q = symmetric(p, q, one_B, one_B, dtype=x.dtype if last else half)
        if not last:
            turned = symmetric(p, gram, one_B, one_B, dtype=half)
            gram = symmetric(p, turned, one_B, one_B, dtype=half)
    assert q is not None
    return q


def product(
    lhs: jax.Array,
    rhs: jax.Array,
    scale_B: jax.Array,
    shift_B: jax.Array,
    *,
    symmetric: bool = False,
    lhs_t: bool = False,
    rhs_t: bool = False,
    shifted: bool = False,
    diagonal: float = 0.0,
    dtype: Any = jnp.bfloat16,
) -> jax.Array:
    """What newton_schulz_gpu.product computes, by XLA, all of it where that computes a half."""
    del symmetric
    exact = jax.lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    if shifted:
        eye = jnp.eye(lhs.shape[-1], dtype=jnp.float32)[None]
        lhs = (lhs.astype(jnp.float32) + shift_B[:, None, None] * eye).astype(lhs.dtype)
    lhs, rhs = lhs.mT if lhs_t else lhs, rhs.mT if rhs_t else rhs
    sums = jnp.matmul(lhs, rhs, precision=exact, preferred_element_type=jnp.float32)
    sums = scale_B[:, None, None] * sums
    if diagonal:
        sums = sums + diagonal * jnp.eye(sums.shape[-1], dtype=jnp.float32)[None]
    return sums.astype(dtype)


def gram(x_Bmn: jax.Array, *, steps: int) -> jax.Array:
    """`by_gram`, multiplied by XLA: any dtype and shape."""
    return by_gram(x_Bmn, steps=steps, product=product)


def mosaic(x_Bmn: jax.Array, *, steps: int) -> jax.Array:
    """`by_gram`, multiplied by a Pallas kernel for Hopper: symmetric products at half the work."""
    from glm45_jax.kernels import newton_schulz_gpu  # Pallas is imported where it is used

    return by_gram(x_Bmn, steps=steps, product=newton_schulz_gpu.product)


def unfit(x_Bmn: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why a stack of such sides is none for the kernel for Hopper, or None. It may be able to, and
    XLA faster; whether there is a Hopper is another question.
    """
    from glm45_jax.kernels import newton_schulz_gpu

    m, n = x_Bmn.shape[-2:]
    count = math.prod(x_Bmn.shape[:-2])
    return newton_schulz_gpu.refuses(m, n) or newton_schulz_gpu.idles(count, m, n)


def _mosaic_supports(x_Bmn: jax.Array) -> str | None:
    if why := not_hopper():
        return why
    if x_Bmn.dtype != jnp.bfloat16:
        return f"matrices are {x_Bmn.dtype}, must be bfloat16"
    from glm45_jax.kernels import newton_schulz_gpu

    return newton_schulz_gpu.refuses(*x_Bmn.shape[-2:])


IMPLS = (
    Implementation("mosaic", mosaic, _mosaic_supports, ("gpu",), unfit),
    # By name: on an H100 faster than "xla" too, elsewhere it was not measured (docs/log.md).
    Implementation("gram", gram, anything, ()),
    Implementation("xla", iterate, anything, ("cpu", "gpu", "tpu")),
)
