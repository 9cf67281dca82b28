"""The whole model: embedding, dense layers, MoE layers, final norm, head (spec 2). Types to know:
`Params`, `Hidden`.

Everything is a pure function of (params, tokens). Letters: B T D V L E.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from glm45_jax.kernels.linear import linear
from glm45_jax.model.block import Block, BlockOut, Flow, block_specs, compute_dtype, stack
from glm45_jax.model.cache import KVCache, init_cache
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.context_parallel import attend, join, spread
from glm45_jax.model.norm import rms_norm
from glm45_jax.params import ParamSpec
from glm45_jax.sharding import constrain


@struct.dataclass
class Mtp:
    """Weights of the multi-token prediction layer (spec 2.4); all with a leading L = 1.

    join_2DD: projection of [embedding half; hidden half]. Embedding and head are the main model's.
    """

    norm_embed_D: jax.Array
    norm_hidden_D: jax.Array
    join_2DD: jax.Array
    block: Block
    norm_D: jax.Array


@struct.dataclass
class Params:
    """All weights of a model; `dense`, `moe`, `mtp` are None where it has no such layers. The
    blocks are stacked.
    """

    embed_VD: jax.Array
    dense: Block | None
    moe: Block | None
    mtp: Mtp | None
    norm_D: jax.Array
    head_DV: jax.Array


@struct.dataclass
class Hidden:
    """What the trunk computes.

    hidden_BTD: after the final norm. load_LE: valid tokens each expert of each MoE layer took,
    int32. balance_LB: balance terms with alpha = 1, a sum over each row's documents.
    router_logits_LBTE: float32, None unless kept. spilled: rows of all MoE layers that took a
    further pass of the exchange, int32.
    """

    hidden_BTD: jax.Array
    load_LE: jax.Array
    balance_LB: jax.Array
    router_logits_LBTE: jax.Array | None
    spilled: jax.Array


def specs(cfg: ModelConfig) -> Params:
    """Plan of every weight of the model. Source: spec 2, 3.1."""
    D, V, std = cfg.d_model, cfg.vocab, cfg.init_std
    norm_L = ParamSpec((1, D), ("layers", None), "norm", init="ones")
    mtp = Mtp(
        norm_embed_D=norm_L,
        norm_hidden_D=norm_L,
        join_2DD=ParamSpec(
            (1, 2, D, D), ("layers", None, "embed", None), "matrix", 2 * D, init=std
        ),
        block=block_specs(cfg, 1, dense=False),
        norm_D=norm_L,
    )
    return Params(
        embed_VD=ParamSpec((V, D), ("vocab", "embed"), "embed", init=std),
        dense=block_specs(cfg, cfg.n_dense, dense=True) if cfg.n_dense else None,
        moe=block_specs(cfg, cfg.n_moe, dense=False) if cfg.n_moe else None,
        mtp=mtp if cfg.n_mtp else None,
        norm_D=ParamSpec((D,), (None,), "norm", init="ones"),
        head_DV=ParamSpec((D, V), ("embed", "vocab"), "matrix", D, init=std),
    )


def forward(
    params: Params,
    tokens_BT: jax.Array,
    *,
    cfg: ModelConfig,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    keep_router_logits: bool = True,
    routes_BTLA: jax.Array | None = None,
) -> Hidden:
    """Hidden states after the final norm, in `cfg.dtype`, and what the router did.

    tokens_BT: int32 ids in [0, vocab). positions_BT: default 0..T-1. segments_BT: documents of a
    packed row, 0 for padding; no token sees another document, padding counts nowhere.
    routes_BTLA: experts of each MoE layer that another router chose, -1 where this one shall; the
    gates are always this one's (routing replay). The A of a token must differ.
    tokens[B/batch, T/seq] -> hidden[B/batch, T/seq, D].
    """
    x_BTD = embed(params, spread(tokens_BT), cfg)
    flow = spread_flow(cfg, tokens_BT.shape, positions_BT, segments_BT)
    routes_LBTA = None if routes_BTLA is None else jnp.moveaxis(spread(routes_BTLA), 2, 0)
    x_BTD, outs = _trunk(params, x_BTD, flow, cfg, None, keep_router_logits, routes_LBTA)
    return joined(_hidden(params, x_BTD, outs, cfg))


def decode(
    params: Params,
    tokens_BT: jax.Array,
    cache: KVCache,
    *,
    cfg: ModelConfig,
    valid_BT: jax.Array | None = None,
) -> tuple[Hidden, KVCache]:
    """`forward` of the next T tokens of each row after those the cache holds, and the cache with
    them in it.

    T may be a prompt or one token. valid_BT: bool, False for right padding of ragged prompts. The
    caller sees to it that a row never outgrows its pages: tokens past them are not stored.
    """
    slots = cache.slots(tokens_BT.shape[1], valid_BT)
    segments_BT = None if valid_BT is None else valid_BT.astype(jnp.int32)
    flow = make_flow(cfg, tokens_BT.shape, slots.positions_BT, segments_BT).replace(slots=slots)
    x_BTD, outs = _trunk(params, embed(params, tokens_BT, cfg), flow, cfg, cache, True)
    pages = outs[-1].cache
    assert pages is not None
    length_B = cache.length_B + slots.new_B
    cache = cache.replace(k_LPSKH=pages.k_LPSKH, v_LPSKH=pages.v_LPSKH, length_B=length_B)
    return _hidden(params, x_BTD, outs, cfg), cache


def logits(params: Params, hidden: Hidden | jax.Array, *, cfg: ModelConfig) -> jax.Array:
    """Scores of the next token, float32 [B, T, V]; of a `Hidden` or of normed hidden states such as
    MTP's.

    For decoding and tests: training goes through `kernels.cross_entropy`, where all logits never
    exist at once.
    """
    hidden_BTD = hidden.hidden_BTD if isinstance(hidden, Hidden) else hidden
    head_DV = params.head_DV.astype(compute_dtype(cfg))
    return linear("btd,dv->btv", hidden_BTD, head_DV, dtype=jnp.float32)


def embed(params: Params, tokens_BT: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Token embeddings [B/batch, T/seq, D] in `cfg.dtype`; the table is gathered over fsdp first,
    as every weight is.
    """
    with jax.named_scope("embed"):
        table_VD = constrain(params.embed_VD.astype(compute_dtype(cfg)), ("vocab", None))
        return constrain(table_VD[tokens_BT], ("batch", "seq", None))


def make_flow(
    cfg: ModelConfig,
    shape: tuple[int, ...],
    positions_BT: jax.Array | None,
    segments_BT: jax.Array | None,
) -> Flow:
    """What all layers share. Without positions the mask goes by index, which the fast kernels can
    use.
    """
    at_BT = _by_index(shape) if positions_BT is None else positions_BT
    return Flow(cfg.mixer.rotation(at_BT, compute_dtype(cfg)), positions_BT, segments_BT)


def spread_flow(
    cfg: ModelConfig,
    shape: tuple[int, ...],
    positions_BT: jax.Array | None,
    segments_BT: jax.Array | None,
) -> Flow:
    """`make_flow` of rows in the order in which the devices of a mesh hold them (ADR 0015)."""
    positions_BT, segments_BT = spread(positions_BT), spread(segments_BT)
    at_BT = spread(_by_index(shape)) if positions_BT is None else positions_BT
    turn = cfg.mixer.rotation(at_BT, compute_dtype(cfg))
    return Flow(turn, positions_BT, segments_BT, attend=attend())


def joined(hidden: Hidden) -> Hidden:
    """Of rows in the order of the devices, in their own."""
    logits_LBTE = join(hidden.router_logits_LBTE, axis=2)
    return hidden.replace(hidden_BTD=join(hidden.hidden_BTD), router_logits_LBTE=logits_LBTE)


def empty_cache(cfg: ModelConfig, *, rows: int, max_tokens: int, page: int = 16) -> KVCache:
    """A cache for `decode`: `rows` rows of up to `max_tokens` tokens."""
    key, value = cfg.mixer.kv_shapes
    return init_cache(
        layers=cfg.n_layers,
        rows=rows,
        max_tokens=max_tokens,
        key=key,
        value=value,
        dtype=compute_dtype(cfg),
        page=page,
    )


def _by_index(shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None, :], shape)


def _trunk(
    params: Params,
    x_BTD,
    flow: Flow,
    cfg: ModelConfig,
    cache: KVCache | None,
    keep_logits: bool,
    routes_LBTA: jax.Array | None = None,
):
    outs: list[BlockOut] = []
    pages = None if cache is None else cache.pages()
    for p, first, routes in ((params.dense, 0, None), (params.moe, cfg.n_dense, routes_LBTA)):
        if p is not None:
            x_BTD, out = stack(
                p,
                x_BTD,
                flow,
                cfg=cfg,
                cache=pages,
                first=first,
                keep_logits=keep_logits,
                routes_LBTA=routes,
            )
            pages = out.cache
            outs.append(out)
    return x_BTD, outs


def _hidden(params: Params, x_BTD, outs: list[BlockOut], cfg: ModelConfig) -> Hidden:
    hidden_BTD = constrain(rms_norm(x_BTD, params.norm_D, cfg.norm_eps), ("batch", "seq", None))
    if params.moe is None:
        B = x_BTD.shape[0]
        empty_LE, empty_LB = (
            jnp.zeros((0, cfg.moe.experts), jnp.int32),
            jnp.zeros((0, B), jnp.float32),
        )
        return Hidden(hidden_BTD, empty_LE, empty_LB, None, jnp.int32(0))
    out = outs[-1]
    assert out.spilled is not None
    return Hidden(hidden_BTD, out.load_E, out.balance_B, out.logits_BTE, out.spilled.sum())
