"""Causal grouped-query attention over packed rows. Letters: B T S N K G H.

A query sees a key of its own segment whose position is not later. Softmax in float32 (spec 2.2).
"""

from __future__ import annotations

import ctypes.util
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from glm45_jax import sharding
from glm45_jax.kernels.attention_tiles import WIDEST, tiled_attention
from glm45_jax.kernels.dispatch import (
    Implementation,
    anything,
    device,
    not_hopper,
    not_tpu,
    pick,
)

NEG = -1e30  # finite, so that a row without keys gives a mean, not NaN


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    segments_BS: jax.Array | None = None,
    positions_BT: jax.Array | None = None,
    positions_BS: jax.Array | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Attention output [B, T, N, H] in the dtype of q; scores scaled by H^-0.5; N a multiple of K,
    query head n reads n // G. Values, and so the output, may have a width H of their own.

    Without segments every key is of the same document; with them a document's tokens lie together,
    in order, and what comes out at padding (segment 0) has no meaning. Without positions query t
    and key s stand at t and s. Differentiable in q, k, v. Source: spec 2.2.

    Raises: ValueError where a named implementation cannot run on these arguments.
    """
    args = (q_BTNH, k_BSKH, v_BSKH)
    masks = dict(
        segments_BT=segments_BT,
        segments_BS=segments_BS,
        positions_BT=positions_BT,
        positions_BS=positions_BS,
    )
    return pick("attention", IMPLS, impl, *args, **masks)(*args, **masks)


def reference(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    *,
    segments_BT=None,
    segments_BS=None,
    positions_BT=None,
    positions_BS=None,
):
    """The definition, with all scores in memory: B * N * T * S floats."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    score_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    score_BKGTS = score_BKGTS * jnp.float32(1 / math.sqrt(H))
    seen_BTS = visible(T, S, segments_BT, segments_BS, positions_BT, positions_BS)
    score_BKGTS = jnp.where(seen_BTS[:, None, None, :, :], score_BKGTS, jnp.float32(NEG))
    weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(
        q_BTNH.dtype
    )  # fp32 softmax, then back
    return jnp.einsum("bkgts,bskh->btkgh", weight_BKGTS, v_BSKH).reshape(B, T, N, -1)


def visible(
    T, S, segments_BT=None, segments_BS=None, positions_BT=None, positions_BS=None
) -> jax.Array:
    """Which keys each query sees: bool [B or 1, T, S]."""
    at_BT = jnp.arange(T, dtype=jnp.int32)[None, :] if positions_BT is None else positions_BT
    at_BS = jnp.arange(S, dtype=jnp.int32)[None, :] if positions_BS is None else positions_BS
    seen_BTS = at_BS[:, None, :] <= at_BT[:, :, None]
    if segments_BT is None:
        return seen_BTS
    segments_BS = segments_BT if segments_BS is None else segments_BS
    return seen_BTS & (segments_BS[:, None, :] == segments_BT[:, :, None])


def _cudnn(q_BTNH, k_BSKH, v_BSKH, **_):
    """cuDNN trains on even lengths only; MTP's T - 1 is padded at the end, where causal queries do
    not look.
    """
    T = q_BTNH.shape[1]
    odd = ((0, 0), (0, T % 2), (0, 0), (0, 0))
    q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, odd) for x in (q_BTNH, k_BSKH, v_BSKH))
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn"
    )
    return out_BTNH[:, :T]


def _cudnn_supports(q_BTNH, k_BSKH, v_BSKH, **masks) -> str | None:
    if device().platform != "gpu":
        return "cudnn is for GPU"
    if not _cudnn_there():
        return "cuDNN is not installed here; pip install 'jax[cuda13]' brings it"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cudnn takes 16-bit floats, not {q_BTNH.dtype}"
    if q_BTNH.shape[1] != k_BSKH.shape[1]:
        return f"cudnn is used for whole rows, not {q_BTNH.shape[1]} queries of {k_BSKH.shape[1]}"
    if any(m is not None for m in masks.values()):
        return "cudnn is used for whole rows only; segments or positions were given"
    if q_BTNH.shape[-1] != v_BSKH.shape[-1]:
        return f"keys are {q_BTNH.shape[-1]} wide, values {v_BSKH.shape[-1]}; cudnn takes one width"
    widest = 256 if not_hopper() is None else 128  # jax.nn has the same rule; 192 and 256 never ran
    if q_BTNH.shape[-1] % 8 or q_BTNH.shape[-1] > widest:
        return f"cudnn takes heads a multiple of 8 up to {widest} wide, not {q_BTNH.shape[-1]}"
    return None


@functools.cache
def _cudnn_there() -> bool:
    """Whether its library can be found: a compiler without a GPU comes without it."""
    try:
        wheel = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:  # of the package that would hold it
        wheel = None
    return wheel is not None or ctypes.util.find_library("cudnn") is not None


def _mosaic(q_BTNH, k_BSKH, v_BSKH, *, segments_BT=None, **_):
    """Pallas on Hopper."""
    from glm45_jax.kernels.attention_gpu import flash_attention  # imports 0.9 s

    return _each_device(flash_attention, q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _mosaic_tpu(q_BTNH, k_BSKH, v_BSKH, *, segments_BT=None, **_):
    """Pallas on TPU."""
    from glm45_jax.kernels.attention_tpu import flash_attention  # Pallas is imported where used

    return _each_device(flash_attention, q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _tiles(q_BTNH, k_BSKH, v_BSKH, *, segments_BT=None, **_):
    """Plain XLA; left to the partitioner, its loops would be of the whole batch."""
    return _each_device(tiled_attention, q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _each_device(flash, q_BTNH, k_BSKH, v_BSKH, segments_BT):
    """On a mesh each device runs its own rows and heads: q[B/batch, T, N/tensor, H]. Rows are whole
    here; those split over the context axis meet in `model/context_parallel.py`.
    """

    def local(q, k, v, segments):
        return flash(q, k, v, segments_BT=segments)

    args = (q_BTNH, k_BSKH, v_BSKH, segments_BT)
    if (ambient := sharding.current()) is None:
        return local(*args)
    spec = _spread(k_BSKH.shape)
    return jax.shard_map(
        local,
        mesh=ambient[0],
        in_specs=(spec, spec, spec, PartitionSpec(spec[0])),
        out_specs=spec,
        check_vma=False,
    )(*args)


def _spread(shape) -> PartitionSpec:
    """How the mesh set by `sharding.use` holds keys."""
    ambient = sharding.current()
    assert ambient is not None
    mesh, rules = ambient
    axes = rules.spec(("batch", None, "kv_heads", "head_dim"))  # a group stays with its keys
    return sharding.fitting(axes, shape, mesh.shape)


def _mosaic_supports(q_BTNH, k_BSKH, v_BSKH, **masks) -> str | None:
    """With segments, positions only say the order inside a document, which the index says too."""
    if why := not_hopper():
        return why
    dtypes = [str(x.dtype) for x in (q_BTNH, k_BSKH, v_BSKH)]
    if set(dtypes) != {"bfloat16"}:
        return f"mosaic takes bfloat16, not {dtypes}"
    if why := _not_by_index("mosaic", q_BTNH, k_BSKH, **masks):
        return why
    from glm45_jax.kernels.attention_walk_gpu import WIDTHS  # Pallas is imported where used

    widths = (q_BTNH.shape[-1], v_BSKH.shape[-1])
    if widths not in WIDTHS:
        takes = ", ".join(map(str, WIDTHS))
        return f"mosaic takes heads with keys and values {takes} wide, not {widths}"
    return None


def _mosaic_tpu_supports(q_BTNH, k_BSKH, v_BSKH, **masks) -> str | None:
    if why := not_tpu():
        return why
    from glm45_jax.kernels.attention_tpu import refuses

    rows = k_BSKH.shape[0]
    if (ambient := sharding.current()) is not None:
        rows //= sharding.ways(_spread(k_BSKH.shape)[0], ambient[0].shape)
    why = _not_by_index("mosaic_tpu", q_BTNH, k_BSKH, **masks)
    return why or refuses(q_BTNH, k_BSKH, v_BSKH, rows=rows)


def _not_by_index(
    name,
    q_BTNH,
    k_BSKH,
    *,
    segments_BT=None,
    segments_BS=None,
    positions_BT=None,
    positions_BS=None,
) -> str | None:
    """Why a mask by the index in whole rows would be another mask."""
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if T != S or (segments_BS is not None and segments_BS is not segments_BT):
        return f"{name} is for whole rows, not {T} queries of {S} keys"
    if positions_BT is not positions_BS or (positions_BT is not None and segments_BT is None):
        return f"{name} masks by index; positions without segments or only of queries were given"
    return None


def _tiles_supports(q_BTNH, k_BSKH, v_BSKH, **masks) -> str | None:
    return _not_by_index("tiles", q_BTNH, k_BSKH, **masks)


def _tiles_yields(q_BTNH, k_BSKH, v_BSKH, **_) -> str | None:
    """Loops cost more to compile than they save where the scores of a row are one tile."""
    T = q_BTNH.shape[1]
    return f"a row of {T} is no longer than a tile" if T <= WIDEST else None


def _mosaic_yields(q_BTNH, k_BSKH, v_BSKH, *, segments_BT=None, **_) -> str | None:
    """Forward and backward in TFLOP/s, mosaic and cudnn in one run, a document a row: 503 · 452 at
    B8 T4096 and 560 · 533 at B1 T32768 with heads of 128, 416 · 367 with heads of 256, 340 · 369
    with heads of 64 (H200, jax 0.11.2, experiments/bench/kernels_attention.py).
    """
    if _cudnn_supports(q_BTNH, k_BSKH, v_BSKH, segments_BT=segments_BT):
        return None  # nothing to yield to
    if q_BTNH.shape[-1] == 64:
        return "mosaic is slower than cudnn with heads of 64 (340 · 369 TFLOP/s)"
    return None


IMPLS = (
    Implementation("mosaic", _mosaic, _mosaic_supports, ("gpu",), _mosaic_yields),
    Implementation("cudnn", _cudnn, _cudnn_supports, ("gpu",)),
    Implementation("mosaic_tpu", _mosaic_tpu, _mosaic_tpu_supports, ("tpu",)),
    Implementation("tiles", _tiles, _tiles_supports, ("cpu", "gpu", "tpu"), _tiles_yields),
    Implementation("reference", reference, anything, ("cpu", "gpu", "tpu")),
)
