"""Attention of a few new tokens a row over a paged cache of keys and values. Letters: B T N K G H,
L layers, P S pages and their slots.

A row's tokens lie in the pages its line of the table names, in order; its new tokens are already
there. Softmax in float32 (spec 2.2).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from glm45_jax import sharding
from glm45_jax.kernels import attention
from glm45_jax.kernels.dispatch import Implementation, anything, not_hopper, not_tpu, pick

NEW_TOKENS = 4  # most that decoding has at once: one drawn, three drafted (spec 2.4)


def decode_attention(
    q_BTNH: jax.Array,
    k_LPSKH: jax.Array,
    v_LPSKH: jax.Array,
    *,
    layer: jax.Array,
    table_BP: jax.Array,
    start_B: jax.Array,
    skip: int = 0,
    latent: bool = False,
    impl: str = "auto",
) -> jax.Array:
    """Attention output [B, T, N, H] in the dtype of q; scores scaled by H^-0.5; N a multiple of K,
    query head n reads n // G.

    k, v: pages of all layers, of which `layer` is read; in the dtype of q, or float8_e4m3fn, which
    is taken as it is. table_BP: pages of each row; ids that are no page may stand where no key is.
    start_B: place of a row's first new token: query t sees the keys at skip .. start + t. One that
    sees none (a row with start <= -T is idle) gives finite numbers without meaning.
    latent: a token's key is [its value; its entry in k], as MLA stores it; then H is both widths
    together and the output as wide as v. Not differentiable but by the reference.
    q[B/batch, T, N/tensor, H] and pages[L, P, S, K/tensor, H]: every device has all pages.

    Raises: ValueError where a named implementation cannot run on these arguments.
    """
    args = (q_BTNH, k_LPSKH, v_LPSKH)
    layer = jnp.asarray(layer, jnp.int32)
    where = dict(layer=layer, table_BP=table_BP, start_B=start_B, skip=skip, latent=latent)
    return pick("decode_attention", IMPLS, impl, *args, **where)(*args, **where)


def gather(pages_LPSKH: jax.Array, layer: jax.Array, table_BP: jax.Array) -> jax.Array:
    """What each row's pages hold, in order, [B, S, K, H]: a copy. Ids past the last page read
    that one.
    """
    x_BPSKH = pages_LPSKH[layer, table_BP]
    return x_BPSKH.reshape(x_BPSKH.shape[0], -1, *x_BPSKH.shape[3:])


def reference(q_BTNH, k_LPSKH, v_LPSKH, *, layer, table_BP, start_B, skip=0, latent=False):
    """The definition: rows are copied together and their scores held in memory."""
    k_BSKH, v_BSKH = (
        gather(x, layer, table_BP).astype(q_BTNH.dtype)  # from 8 bits exactly
        for x in (k_LPSKH, v_LPSKH)
    )
    if latent:
        k_BSKH = jnp.concatenate([v_BSKH, k_BSKH], axis=-1)
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    at_1S = jnp.arange(S, dtype=jnp.int32)[None]
    return attention.reference(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        positions_BT=start_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None],
        positions_BS=jnp.where(at_1S < skip, jnp.iinfo(jnp.int32).max, at_1S),
    )


def _mosaic(q_BTNH, k_LPSKH, v_LPSKH, *, latent=False, **where):
    """Pallas on Hopper."""
    from glm45_jax.kernels.decode_attention_gpu import paged_attention  # imports 0.9 s

    del latent  # refused
    return _each_device(paged_attention, q_BTNH, k_LPSKH, v_LPSKH, **where)


def _mosaic_tpu(q_BTNH, k_LPSKH, v_LPSKH, *, latent=False, **where):
    """Pallas on TPU."""
    from glm45_jax.kernels.decode_attention_tpu import paged_attention

    paged = functools.partial(paged_attention, latent=latent)
    return _each_device(paged, q_BTNH, k_LPSKH, v_LPSKH, **where)


def _each_device(paged, q_BTNH, k_LPSKH, v_LPSKH, *, layer, table_BP, start_B, skip=0):
    """On a mesh each device runs its own rows and heads."""

    def local(q, k, v, layer, table, start):
        return paged(q, k, v, layer=layer, table_BP=table, start_B=start, skip=skip)

    args = (q_BTNH, k_LPSKH, v_LPSKH, layer, table_BP, start_B)
    if (ambient := sharding.current()) is None:
        return local(*args)
    spec, pages = _spread(q_BTNH, k_LPSKH)
    rows = PartitionSpec(spec[0])
    return jax.shard_map(
        local,
        mesh=ambient[0],
        in_specs=(spec, pages, pages, PartitionSpec(), rows, rows),
        out_specs=spec,
        check_vma=False,
    )(*args)


def _spread(q_BTNH, k_LPSKH) -> tuple[PartitionSpec, PartitionSpec]:
    """How the mesh set by `sharding.use` holds queries, and pages. A group stays with its keys; the
    one head of latents is everywhere, and queries split as they are.
    """
    ambient = sharding.current()
    assert ambient is not None
    mesh, rules = ambient
    one = k_LPSKH.shape[3] == 1
    axes = rules.spec(("batch", None, "heads" if one else "kv_heads", "head_dim"))
    shape = q_BTNH.shape if one else (q_BTNH.shape[0], 1, *k_LPSKH.shape[3:])
    spec = sharding.fitting(axes, shape, mesh.shape)
    return spec, PartitionSpec(None, None, None, None if one else spec[2])


def _part(x, mesh, spec) -> jax.ShapeDtypeStruct:
    """What one device of the mesh holds of an array."""
    return jax.ShapeDtypeStruct(NamedSharding(mesh, spec).shard_shape(x.shape), x.dtype)


def _mosaic_supports(
    q_BTNH, k_LPSKH, v_LPSKH, *, layer, table_BP, start_B, skip=0, latent=False
) -> str | None:
    if why := not_hopper():
        return why
    return _mosaic_refuses(q_BTNH, k_LPSKH, v_LPSKH, latent)


def _mosaic_refuses(q_BTNH, k_LPSKH, v_LPSKH, latent) -> str | None:
    """Why the kernel cannot take these arguments, whatever the device."""
    if latent:
        return "mosaic reads keys and values apart; latents are both at once"
    if q_BTNH.dtype != jnp.bfloat16:
        return f"mosaic takes queries in bfloat16, not {q_BTNH.dtype}"
    kinds = {str(x.dtype) for x in (k_LPSKH, v_LPSKH)}
    if kinds not in ({"bfloat16"}, {"float8_e4m3fn"}):
        return f"mosaic takes pages in bfloat16 or float8_e4m3fn, not {sorted(kinds)}"
    widths = (k_LPSKH.shape[-1], v_LPSKH.shape[-1])
    if widths not in ((64, 64), (128, 128)):
        return f"mosaic takes heads 64 or 128 wide, not keys and values {widths}"
    if (size := k_LPSKH.shape[2]) not in (16, 32, 64):
        return f"mosaic takes pages of 16, 32 or 64 tokens, not {size}"
    if (columns := q_BTNH.shape[1] * q_BTNH.shape[2] // k_LPSKH.shape[3]) > 64:
        return f"mosaic takes up to 64 queries of a kv head (tokens x group), not {columns}"
    return None


def _mosaic_tpu_supports(
    q_BTNH, k_LPSKH, v_LPSKH, *, layer, table_BP, start_B, skip=0, latent=False
) -> str | None:
    if why := not_tpu():
        return why
    from glm45_jax.kernels.decode_attention_tpu import refuses

    args: tuple[Any, ...] = (q_BTNH, k_LPSKH, v_LPSKH, table_BP)
    if (ambient := sharding.current()) is not None:
        spec, pages = _spread(q_BTNH, k_LPSKH)
        specs = (spec, pages, pages, PartitionSpec(spec[0]))
        args = tuple(_part(x, ambient[0], p) for x, p in zip(args, specs, strict=True))
    return refuses(*args, latent=latent)


IMPLS = (
    Implementation("mosaic", _mosaic, _mosaic_supports, ("gpu",)),
    Implementation("mosaic_tpu", _mosaic_tpu, _mosaic_tpu_supports, ("tpu",)),
    Implementation("reference", reference, anything, ("cpu", "gpu", "tpu")),
)
