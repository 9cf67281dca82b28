"""One decoder layer, and a stack of equal layers by `lax.scan` (spec 2.1). Types to know: `Block`,
`Flow`, `BlockOut`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from glm45_jax.kernels.attention import attention
from glm45_jax.model.cache import LayerCache, Slots
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.moe import MlpParams, mlp_specs, swiglu
from glm45_jax.model.norm import rms_norm
from glm45_jax.params import ParamSpec
from glm45_jax.sharding import constrain

# What a block keeps for its backward pass, besides its input. "none" keeps everything.
POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "outputs": jax.checkpoint_policies.save_only_these_names("attention_out", "ffn_out"),
}


@struct.dataclass
class Block:
    """Weights of one layer (stacked: a leading L). ffn is a `MlpParams` or a `MoeParams`."""

    norm_mixer_D: jax.Array
    mixer: Any
    norm_ffn_D: jax.Array
    ffn: Any


@struct.dataclass
class Flow:
    """What every layer of one forward pass shares: rotation, segments, positions, cache slots when
    decoding, and how rows meet their keys as they lie on the devices.

    valid_BT: which places are counted; None for those of a segment above 0, or all.
    """

    turn: Any
    positions_BT: jax.Array | None
    segments_BT: jax.Array | None
    slots: Slots | None = None
    valid_BT: jax.Array | None = None
    attend: Any = struct.field(pytree_node=False, default=attention)


@struct.dataclass
class BlockOut:
    """What a layer returns beside its output; None in a dense layer. Stacked: a leading L, the
    cache aside. spilled: rows that took a further pass of the exchange, see `MoeOut`.
    """

    load_E: jax.Array | None
    balance_B: jax.Array | None
    logits_BTE: jax.Array | None
    cache: LayerCache | None
    spilled: jax.Array | None = None


def block_specs(cfg: ModelConfig, layers: int, *, dense: bool) -> Block:
    """Plan of `layers` stacked dense or MoE layers."""
    norm = ParamSpec((layers, cfg.d_model), ("layers", None), "norm", init="ones")
    ffn = (
        mlp_specs(layers, cfg.d_model, cfg.d_mlp, cfg.init_std)
        if dense
        else cfg.moe.specs(layers, cfg.d_model, cfg.init_std)
    )
    return Block(norm, cfg.mixer.specs(layers, cfg.d_model, cfg.init_std), norm, ffn)


def block(
    p: Block,
    x_BTD: jax.Array,
    flow: Flow,
    *,
    cfg: ModelConfig,
    cache: LayerCache | None = None,
    routes_BTA: jax.Array | None = None,
) -> tuple[jax.Array, BlockOut]:
    """x + mixer(norm x), then + ffn(norm x). Returns the residual stream [B, T, D] and the layer's
    `BlockOut`. routes_BTA: experts of a MoE layer chosen elsewhere.
    """
    with jax.named_scope("attention"):
        mixed_BTD, cache = cfg.mixer(
            p.mixer,
            rms_norm(x_BTD, p.norm_mixer_D, cfg.norm_eps),
            turn=flow.turn,
            positions_BT=flow.positions_BT,
            segments_BT=flow.segments_BT,
            eps=cfg.norm_eps,
            impl=cfg.impl.attention,
            impl_decode=cfg.impl.decode_attention,
            cache=cache,
            slots=flow.slots,
            attend=flow.attend,
        )
        x_BTD = x_BTD + checkpoint_name(mixed_BTD, "attention_out")
    with jax.named_scope("mlp" if isinstance(p.ffn, MlpParams) else "experts"):
        normed_BTD = rms_norm(x_BTD, p.norm_ffn_D, cfg.norm_eps)
        if isinstance(p.ffn, MlpParams):
            y_BTD, out = swiglu(p.ffn, normed_BTD), BlockOut(None, None, None, cache)
        else:
            moe = cfg.moe(
                p.ffn,
                normed_BTD,
                segments_BT=flow.segments_BT,
                valid_BT=flow.valid_BT,
                impl_route=cfg.impl.routing,
                impl_matmul=cfg.impl.grouped_matmul,
                routes_BTA=routes_BTA,
            )
            y_BTD = moe.y_BTD
            out = BlockOut(moe.load_E, moe.balance_B, moe.logits_BTE, cache, moe.spilled)
        x_BTD = x_BTD + checkpoint_name(y_BTD, "ffn_out")
    return constrain(x_BTD, ("batch", "seq", None)), out


def stack(
    p: Block,
    x_BTD: jax.Array,
    flow: Flow,
    *,
    cfg: ModelConfig,
    cache: LayerCache | None = None,
    first: int = 0,
    keep_logits: bool = True,
    routes_LBTA: jax.Array | None = None,
) -> tuple[jax.Array, BlockOut]:
    """Layers one after another; `BlockOut` leaves gain a leading L, but for the cache, which is
    that of all layers. Router logits are dropped unless kept.

    first: the number of the first of these layers in the cache. routes_LBTA: experts of each of
    them (MoE layers) chosen elsewhere.
    """

    def one(carry, layer):
        x_BTD, cache = carry
        p, at, routes_BTA = layer
        cache = None if cache is None else cache.replace(layer=at)
        x_BTD, out = block(p, x_BTD, flow, cfg=cfg, cache=cache, routes_BTA=routes_BTA)
        out = out if keep_logits else out.replace(logits_BTE=None)
        return (x_BTD, out.cache), out.replace(cache=None)

    if cfg.remat != "none" and cache is None:
        one = jax.checkpoint(one, policy=POLICIES[cfg.remat], prevent_cse=False)
    at_L = first + jnp.arange(p.norm_ffn_D.shape[0], dtype=jnp.int32)
    (x_BTD, cache), out = jax.lax.scan(one, (x_BTD, cache), (p, at_L, routes_LBTA))
    return x_BTD, out.replace(cache=cache)


def compute_dtype(cfg: ModelConfig) -> jnp.dtype:
    """The dtype of activations and matmuls."""
    return jnp.dtype(cfg.dtype)
