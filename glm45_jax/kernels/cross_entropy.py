"""Cross-entropy from hidden states, a chunk of the logits at a time. Letters: M D V; C of a chunk.

With 151,552 words and 65,536 tokens the logits would be 40 GB in float32. `chunked` walks over the
vocabulary, in the forward and again in the backward pass: four products. `fused` walks over the
tokens and makes the gradient of the weighted sum in the forward pass, while a chunk's logits are
there: three products. It needs the weights then, so it gives the sum alone, and a head that is
whole where the tokens are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from glm45_jax import sharding
from glm45_jax.kernels.dispatch import Implementation, anything, pick

CHUNK_ELEMENTS = 2**27  # of logits that live at once in `chunked`: 512 MiB in float32
# In `fused` the head's gradient, 8·D·V bytes there and back, is added to once a chunk: at 4,096
# tokens that is a twelfth of the chunk's products on an H100, so more are no use.
FUSED_ELEMENTS, FUSED_TOKENS = 2**30, 4096


def token_nll(
    h_MD: jax.Array,
    w_DV: jax.Array,
    target_M: jax.Array,
    *,
    impl: str = "auto",
    scale_M: jax.Array | None = None,
) -> jax.Array:
    """-log softmax(h @ w)[target], float32 [M]. Products in the dtype of h, accumulated in float32.

    Differentiable in h and w; targets outside [0, V) are the caller's error. scale_M: float32,
    without a gradient, that each token's logits are multiplied by: 1 / temperature.
    Source: spec 2.5.
    """
    nll = pick("cross_entropy", IMPLS, impl, h_MD, w_DV, target_M)
    return nll(h_MD, w_DV, target_M, scale_M=scale_M)


def nll_sum(
    h_MD: jax.Array,
    w_DV: jax.Array,
    target_M: jax.Array,
    weight_M: jax.Array,
    *,
    impl: str = "auto",
) -> jax.Array:
    """Sum of weight * `token_nll`, a float32 scalar.

    Differentiable in h and w, not in weight_M, float32. Source: spec 2.5.
    """
    total = pick("cross_entropy", SUMS, impl, h_MD, w_DV, target_M, weight_M)
    return total(h_MD, w_DV, target_M, jax.lax.stop_gradient(weight_M))


def reference(
    h_MD: jax.Array, w_DV: jax.Array, target_M: jax.Array, scale_M: jax.Array | None = None
) -> jax.Array:
    """The definition, with all logits in memory."""
    logits_MV = _product(h_MD, w_DV.astype(h_MD.dtype), scale_M)
    picked_M = jnp.take_along_axis(logits_MV, target_M[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits_MV, axis=1) - picked_M


def chunked(
    h_MD: jax.Array,
    w_DV: jax.Array,
    target_M: jax.Array,
    chunk: int | None = None,
    scale_M: jax.Array | None = None,
) -> jax.Array:
    """`reference` over chunks of the vocabulary with an online log-sum-exp and a backward of its
    own.
    """
    chunk = min(chunk or chunk_words(h_MD.shape[0]), w_DV.shape[1])
    return _chunked(chunk, h_MD, w_DV, target_M, scale_M)


def chunk_words(tokens: int) -> int:
    """Words of a chunk for this many tokens: a power of two between 512 and 32,768."""
    return max(512, min(32_768, 1 << (CHUNK_ELEMENTS // max(tokens, 1)).bit_length() - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk, h_MD, w_DV, target_M, scale_M):
    return _chunked_fwd(chunk, h_MD, w_DV, target_M, scale_M)[0]


def _chunked_fwd(chunk, h_MD, w_DV, target_M, scale_M):
    M = h_MD.shape[0]

    def one(carry, i):
        top_M, sum_M, picked_M = carry
        logits_MC, word_C, new_C = _logits(h_MD, w_DV, i, chunk, scale_M)
        logits_MC = jnp.where(new_C[None, :], logits_MC, -jnp.inf)
        higher_M = jnp.maximum(top_M, logits_MC.max(axis=1))
        sum_M = sum_M * jnp.exp(top_M - higher_M) + jnp.exp(logits_MC - higher_M[:, None]).sum(
            axis=1
        )
        is_target_MC = (word_C[None, :] == target_M[:, None]) & new_C[None, :]
        picked_M = picked_M + jnp.where(is_target_MC, logits_MC, jnp.float32(0)).sum(axis=1)
        return (higher_M, sum_M, picked_M), None

    zero_M = jnp.zeros(M, jnp.float32)
    start = (jnp.full(M, -jnp.inf, jnp.float32), zero_M, zero_M)
    (top_M, sum_M, picked_M), _ = jax.lax.scan(one, start, _chunk_ids(w_DV, chunk))
    lse_M = top_M + jnp.log(sum_M)
    return lse_M - picked_M, (h_MD, w_DV, target_M, scale_M, lse_M)


def _chunked_bwd(chunk, saved, g_M):
    h_MD, w_DV, target_M, scale_M, lse_M = saved
    slope_M = g_M if scale_M is None else g_M * scale_M

    def one(carry, i):
        dh_MD, dw_DV = carry
        logits_MC, word_C, new_C = _logits(h_MD, w_DV, i, chunk, scale_M)
        p_MC = jnp.exp(logits_MC - lse_M[:, None])
        hit_MC = (word_C[None, :] == target_M[:, None]).astype(jnp.float32)
        d_MC = ((p_MC - hit_MC) * slope_M[:, None] * new_C[None, :].astype(jnp.float32)).astype(
            h_MD.dtype
        )  # products in h's dtype
        first = word_C[0]
        w_DC = jax.lax.dynamic_slice_in_dim(w_DV, first, chunk, axis=1).astype(h_MD.dtype)
        dh_MD = dh_MD + jnp.einsum("mc,dc->md", d_MC, w_DC, preferred_element_type=jnp.float32)
        dw_DC = jnp.einsum("md,mc->dc", h_MD, d_MC, preferred_element_type=jnp.float32)
        old_DC = jax.lax.dynamic_slice_in_dim(dw_DV, first, chunk, axis=1)
        return (
            dh_MD,
            jax.lax.dynamic_update_slice_in_dim(dw_DV, old_DC + dw_DC, first, axis=1),
        ), None

    start = (jnp.zeros(h_MD.shape, jnp.float32), jnp.zeros(w_DV.shape, jnp.float32))
    (dh_MD, dw_DV), _ = jax.lax.scan(one, start, _chunk_ids(w_DV, chunk))
    none = None if scale_M is None else jnp.zeros_like(scale_M)
    return dh_MD.astype(h_MD.dtype), dw_DV.astype(w_DV.dtype), None, none


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _chunk_ids(w_DV: jax.Array, chunk: int) -> jax.Array:
    return jnp.arange(-(-w_DV.shape[1] // chunk), dtype=jnp.int32)


def _logits(h_MD, w_DV, i, chunk, scale_M):
    """Logits of chunk i, its words, and which of them no earlier chunk held: the last chunk is
    moved back to end at V.
    """
    V = w_DV.shape[1]
    first = jnp.minimum(i * chunk, V - chunk)
    word_C = first + jnp.arange(chunk, dtype=jnp.int32)
    w_DC = jax.lax.dynamic_slice_in_dim(w_DV, first, chunk, axis=1).astype(h_MD.dtype)
    return _product(h_MD, w_DC, scale_M), word_C, word_C >= i * chunk


def _product(h_MD, w_DC, scale_M):
    logits_MC = jnp.einsum("md,dc->mc", h_MD, w_DC, preferred_element_type=jnp.float32)
    return logits_MC if scale_M is None else logits_MC * jax.lax.stop_gradient(scale_M)[:, None]


def fused(
    h_MD: jax.Array,
    w_DV: jax.Array,
    target_M: jax.Array,
    weight_M: jax.Array,
    chunk: int | None = None,
) -> jax.Array:
    """`nll_sum` over chunks of the tokens, its gradient made beside it."""
    M, V = h_MD.shape[0], w_DV.shape[1]
    return _fused(min(chunk or fused_tokens(M, V), M), h_MD, w_DV, target_M, weight_M)


def fused_tokens(tokens: int, words: int) -> int:
    """Tokens of a chunk: a multiple of 128, as many as FUSED_ELEMENTS and FUSED_TOKENS let be, in
    chunks as even as they go.
    """
    most = max(128, min(FUSED_TOKENS, FUSED_ELEMENTS // words) // 128 * 128)
    chunks = -(-tokens // most)
    return -(-tokens // (128 * chunks)) * 128


def on_one_device(*_: jax.Array) -> str | None:
    """Why `fused` cannot run here, or None: of a split head each chunk's part would be summed."""
    ambient = sharding.current()
    if ambient is None or ambient[0].size == 1:
        return None
    return f"needs tokens and head on one device; the mesh has {ambient[0].size}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(chunk, h_MD, w_DV, target_M, weight_M):
    del chunk
    return (chunked(h_MD, w_DV, target_M) * weight_M).sum()


def _fused_fwd(chunk, h_MD, w_DV, target_M, weight_M):
    M, D = h_MD.shape
    n = -(-M // chunk)
    w16_DV = w_DV.astype(h_MD.dtype)  # products in h's dtype

    def one(carry, rows):
        total, dw_DV = carry
        h_CD, target_C, weight_C = rows
        logits_CV = _product(h_CD, w16_DV, None)
        lse_C = jax.nn.logsumexp(logits_CV, axis=1)
        picked_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=1)[:, 0]
        hit_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) == target_C[:, None]
        p_CV = jnp.exp(logits_CV - lse_C[:, None])
        d_CV = ((p_CV - hit_CV.astype(jnp.float32)) * weight_C[:, None]).astype(h_CD.dtype)
        dh_CD = jnp.einsum("cv,dv->cd", d_CV, w16_DV, preferred_element_type=jnp.float32)
        dw_DV = dw_DV + jnp.einsum("cd,cv->dv", h_CD, d_CV, preferred_element_type=jnp.float32)
        total = total + ((lse_C - picked_C) * weight_C).sum()
        return (total, dw_DV), dh_CD.astype(h_CD.dtype)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(w_DV.shape, jnp.float32))
    padded = (_chunks(x, n, chunk) for x in (h_MD, target_M, weight_M))  # weight 0 past M
    (total, dw_DV), dh_nCD = jax.lax.scan(one, start, tuple(padded))
    return total, (dh_nCD.reshape(n * chunk, D)[:M], dw_DV.astype(w_DV.dtype), weight_M)


def _fused_bwd(chunk, saved, g):
    del chunk
    dh_MD, dw_DV, weight_M = saved
    scaled = (g * dh_MD.astype(jnp.float32)).astype(dh_MD.dtype)
    return scaled, (g * dw_DV).astype(dw_DV.dtype), None, jnp.zeros_like(weight_M)


_fused.defvjp(_fused_fwd, _fused_bwd)


def _chunks(x_M: jax.Array, n: int, chunk: int) -> jax.Array:
    padded = jnp.pad(x_M, ((0, n * chunk - x_M.shape[0]), *((0, 0),) * (x_M.ndim - 1)))
    return padded.reshape(n, chunk, *x_M.shape[1:])


def _weighted(nll: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda h_MD, w_DV, target_M, weight_M: (nll(h_MD, w_DV, target_M) * weight_M).sum()


ALL = ("cpu", "gpu", "tpu")
IMPLS = (
    Implementation("chunked", chunked, anything, ALL),
    Implementation("reference", reference, anything, ALL),
    Implementation("fused", chunked, anything, ()),  # what it is for one token
)
SUMS = (
    Implementation("fused", fused, on_one_device, ALL),
    Implementation("chunked", _weighted(chunked), anything, ALL),
    Implementation("reference", _weighted(reference), anything, ALL),
)
