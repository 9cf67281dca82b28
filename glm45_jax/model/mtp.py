"""Multi-token prediction: one more MoE layer that guesses token i + 2 (spec 2.4): of whole rows
in training, over a cache as a drafter. Letters: B T D.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm45_jax.model.block import compute_dtype, stack
from glm45_jax.model.cache import KVCache
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.context_parallel import spread
from glm45_jax.model.norm import rms_norm
from glm45_jax.model.transformer import (
    Hidden,
    Mtp,
    Params,
    embed,
    joined,
    make_flow,
    spread_flow,
)


def forward(
    params: Params,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    *,
    cfg: ModelConfig,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """MTP hidden states [B, T - 1, D] after the shared head's norm; position i predicts token i +
    2.

    hidden_BTD: the main model's, *after* its final norm. Position i reads hidden[i] and the
    embedding of token i + 1.
    """
    return forward_all(
        params, hidden_BTD, tokens_BT, cfg=cfg, positions_BT=positions_BT, segments_BT=segments_BT
    ).hidden_BTD[:, :-1]


def forward_all(
    params: Params,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    *,
    cfg: ModelConfig,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    keep_router_logits: bool = False,
) -> Hidden:
    """`forward`, with the load and balance term of the layer's own router (L = 1). All T places:
    the last one, which has no next token, means nothing and counts nowhere. It stays so that the
    shapes are the trunk's, whose kernels serve again, and divide over devices as those do.

    Whether GLM balances this router is UNVERIFIED; its checkpoint has a bias for it, and Megatron
    balances it.

    Raises: ValueError for a model without the layer.
    """
    mtp, inner_BT = _layer(params), None
    if segments_BT is not None:
        inner_BT = one_more(inner_segments(segments_BT))
    next_BT = one_more(tokens_BT[:, 1:])
    x_BTD = _join(params, spread(hidden_BTD), spread(next_BT), cfg)
    flow = spread_flow(cfg, next_BT.shape, positions_BT, inner_BT)
    if inner_BT is None:
        flow = flow.replace(valid_BT=spread(one_more(jnp.ones_like(tokens_BT[:, 1:], bool))))
    v_BTD, out = stack(mtp.block, x_BTD, flow, cfg=cfg, keep_logits=keep_router_logits)
    normed_BTD = rms_norm(v_BTD, mtp.norm_D[0], cfg.norm_eps)
    assert out.spilled is not None
    ahead = Hidden(normed_BTD, out.load_E, out.balance_B, out.logits_BTE, out.spilled.sum())
    return joined(ahead)


def decode(
    params: Params,
    before_BTD: jax.Array,
    tokens_BT: jax.Array,
    cache: KVCache,
    *,
    cfg: ModelConfig,
    valid_BT: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """MTP hidden states [B, T, D] of the next T tokens of each row, after the shared head's norm,
    each a guess of the token that follows its own; and the cache with their keys and values in it.

    before_BTD: of the token *before* each, the main model's after its final norm, or this layer's
    own where the main model has not read it yet. cache: of one layer more than the main model, the
    last; its `length_B` says where the first of the T tokens goes, and stays. The pair of a hidden
    state and its next token lies at that token's own slot, so that a page holds what follows from
    its tokens and those before, and can be shared. The first token of a row makes no pair.

    Raises: ValueError for a model without the layer.
    """
    mtp = _layer(params)
    # Pair i, of hidden i and token i + 1, stands at position i, as in training, and lies a slot on.
    pairs = cache.replace(lead=1, length_B=cache.length_B - 1)
    slots = pairs.slots(tokens_BT.shape[1], valid_BT)
    flow = make_flow(cfg, tokens_BT.shape, slots.positions_BT, valid_BT.astype(jnp.int32))
    v_BTD, out = stack(
        mtp.block,
        _join(params, before_BTD, tokens_BT, cfg),
        flow.replace(slots=slots),
        cfg=cfg,
        cache=pairs.pages(),
        first=cfg.n_layers,
        keep_logits=False,
    )
    assert out.cache is not None
    cache = cache.replace(k_LPSKH=out.cache.k_LPSKH, v_LPSKH=out.cache.v_LPSKH)
    return rms_norm(v_BTD, mtp.norm_D[0], cfg.norm_eps), cache


def inner_segments(segments_BT: jax.Array) -> jax.Array:
    """Segments of the T - 1 MTP positions; 0 where token i + 1 belongs to another document, so that
    it counts nowhere.
    """
    here_BT, next_BT = segments_BT[:, :-1], segments_BT[:, 1:]
    return jnp.where(here_BT == next_BT, here_BT, 0)


def one_more(x_BT: jax.Array) -> jax.Array:
    """What is of T - 1 places with the last of T, which is 0."""
    return jnp.pad(x_BT, ((0, 0), (0, 1)))


def _layer(params: Params) -> Mtp:
    if params.mtp is None:
        raise ValueError("this model has no MTP layer (n_mtp = 0); use a config with n_mtp = 1")
    return params.mtp


def _join(params: Params, before_BTD, tokens_BT, cfg: ModelConfig) -> jax.Array:
    """What the layer reads, [B, T, D]: a token's embedding and the hidden state before it."""
    p = _layer(params)
    token_BTD = rms_norm(embed(params, tokens_BT, cfg), p.norm_embed_D[0], cfg.norm_eps)
    before_BTD = rms_norm(before_BTD, p.norm_hidden_D[0], cfg.norm_eps)
    join_2DD = p.join_2DD[0].astype(compute_dtype(cfg))  # embedding half first
    return jnp.einsum("btd,de->bte", token_BTD, join_2DD[0]) + jnp.einsum(
        "btd,de->bte", before_BTD, join_2DD[1]
    )
