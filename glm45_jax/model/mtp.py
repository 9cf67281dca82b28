"""Multi-token prediction: one more MoE layer that guesses token i + 2 (spec 2.4). Letters: B T
D.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm45_jax.model.block import compute_dtype, stack
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.norm import rms_norm
from glm45_jax.model.transformer import Hidden, Params, embed, make_flow


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
    ).hidden_BTD


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
    """`forward`, with the load and balance term of the layer's own router (L = 1).

    Whether GLM balances this router is UNVERIFIED; its checkpoint has a bias for it, and Megatron
    balances it.

    Raises: ValueError for a model without the layer.
    """
    if params.mtp is None:
        raise ValueError("this model has no MTP layer (n_mtp = 0); use a config with n_mtp = 1")
    p = jax.tree.map(lambda w: w[0], params.mtp.replace(block=None))
    next_BTD = rms_norm(embed(params, tokens_BT[:, 1:], cfg), p.norm_embed_D, cfg.norm_eps)
    here_BTD = rms_norm(hidden_BTD[:, :-1], p.norm_hidden_D, cfg.norm_eps)
    join_2DD = p.join_2DD.astype(compute_dtype(cfg))  # embedding half first
    x_BTD = jnp.einsum("btd,de->bte", next_BTD, join_2DD[0]) + jnp.einsum(
        "btd,de->bte", here_BTD, join_2DD[1]
    )
    flow = make_flow(
        cfg,
        next_BTD.shape[:2],
        None if positions_BT is None else positions_BT[:, :-1],
        None if segments_BT is None else inner_segments(segments_BT),
    )
    v_BTD, out = stack(params.mtp.block, x_BTD, flow, cfg=cfg, keep_logits=keep_router_logits)
    return Hidden(
        rms_norm(v_BTD, p.norm_D, cfg.norm_eps), out.load_E, out.balance_B, out.logits_BTE
    )


def inner_segments(segments_BT: jax.Array) -> jax.Array:
    """Segments of the T - 1 MTP positions; 0 where token i + 1 belongs to another document, so that
    it counts nowhere.
    """
    here_BT, next_BT = segments_BT[:, :-1], segments_BT[:, 1:]
    return jnp.where(here_BT == next_BT, here_BT, 0)
