"""Losses of pretraining and their denominators (spec 2.5). Types: `Denominators`, `Weights`,
`LossOut`.

Every part is a sum divided by a count over the *global* batch, known before the backward pass:
parts, losses and gradients of micro-batches and devices then simply add up (docs/adr/0008).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from glm45_jax import sharding
from glm45_jax.data.types import Batch
from glm45_jax.kernels.cross_entropy import nll_sum, token_nll
from glm45_jax.model import mtp, transformer
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.transformer import Params


@struct.dataclass
class Denominators:
    """Counts of a batch, float32: targets of the next token, targets of MTP, documents."""

    tokens: jax.Array
    mtp_tokens: jax.Array
    documents: jax.Array


@struct.dataclass
class Weights:
    """Weights of the parts at this step, float32: lambda of MTP and alpha of the balance loss."""

    mtp: jax.Array
    balance: jax.Array


@struct.dataclass
class LossOut:
    """loss: the sum of the weighted parts. tokens: targets counted. parts: each unweighted.
    load_LE: MoE layers, then MTP. spilled: routed rows that took a further pass of the exchange of
    experts, int32; None where nobody counts them.
    """

    loss: jax.Array
    tokens: jax.Array
    parts: dict[str, jax.Array]
    load_LE: jax.Array
    spilled: jax.Array | None = None


def count(batch: Batch) -> Denominators:
    """Counts of this batch; sum them over micro-batches and devices before use. Documents end where
    the segment changes.
    """
    segment_BT = batch.segments_BT
    before_BT = jnp.pad(segment_BT[:, :-1], ((0, 0), (1, 0)))
    return Denominators(
        tokens=batch.mask_BT.sum(dtype=jnp.float32),
        mtp_tokens=mtp_mask(batch).sum(dtype=jnp.float32),
        documents=((segment_BT > 0) & (segment_BT != before_BT)).sum(dtype=jnp.float32),
    )


def mtp_mask(batch: Batch) -> jax.Array:
    """1 where MTP position i has a target: token i + 2 counts, and i, i + 1 are of one document.
    [B, T - 1].
    """
    same_BT = mtp.inner_segments(batch.segments_BT) > 0
    return batch.mask_BT[:, 1:] * same_BT.astype(jnp.float32)


def loss(
    params: Params,
    batch: Batch,
    denominators: Denominators,
    weights: Weights,
    *,
    cfg: ModelConfig,
    packed: bool,
) -> LossOut:
    """CE + lambda * MTP + alpha * balance of this batch's share of the global one.

    packed: rows hold several documents, or padding; False lets kernels treat a row as one document.
    Whether GLM balances per document or per packed row is UNVERIFIED: here per document
    (docs/adr/0007).
    """
    hidden = trunk(params, batch, cfg=cfg, packed=packed)
    ce = cross_entropy_sum(params, hidden.hidden_BTD, batch.targets_BT, batch.mask_BT, cfg=cfg)
    parts = {"ce": ce / _at_least_one(denominators.tokens)}
    balance, load_LE, spilled = hidden.balance_LB.sum(), hidden.load_LE, hidden.spilled
    total = parts["ce"]
    if cfg.n_mtp:
        ahead = mtp.forward_all(
            params,
            hidden.hidden_BTD,
            batch.tokens_BT,
            cfg=cfg,
            **_documents(batch, packed),
        )
        nll = mtp_nll_sum(params, ahead.hidden_BTD, batch, cfg=cfg)
        parts["mtp"] = nll / _at_least_one(denominators.mtp_tokens)
        total = total + weights.mtp * parts["mtp"]
        balance, load_LE = (
            balance + ahead.balance_LB.sum(),
            jnp.concatenate([load_LE, ahead.load_LE]),
        )
        spilled = spilled + ahead.spilled
    parts["balance"] = balance / _at_least_one(denominators.documents)
    total = total + weights.balance * parts["balance"]
    return LossOut(total, denominators.tokens, parts, load_LE, spilled)


def trunk(params: Params, batch: Batch, *, cfg: ModelConfig, packed: bool) -> transformer.Hidden:
    """`transformer.forward` of a batch, without the router's logits."""
    where = _documents(batch, packed)
    return transformer.forward(params, batch.tokens_BT, cfg=cfg, keep_router_logits=False, **where)


def _documents(batch: Batch, packed: bool) -> dict[str, Any]:
    """Segments and positions, where a row is more than one document."""
    if not packed:
        return {}
    return {"positions_BT": batch.positions_BT, "segments_BT": batch.segments_BT}


def cross_entropy_sum(
    params: Params,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    cfg: ModelConfig,
) -> jax.Array:
    """Sum of -log p(target) where the mask is 1, float32; no gradient in the mask."""
    with jax.named_scope("head"):
        return nll_sum(
            sharding.flat(hidden_BTD),
            params.head_DV,
            sharding.flat(targets_BT),
            sharding.flat(mask_BT),
            impl=cfg.impl.cross_entropy,
        )


def mtp_nll_sum(
    params: Params, ahead_BTD: jax.Array, batch: Batch, *, cfg: ModelConfig
) -> jax.Array:
    """Sum of MTP's -log p(token i + 2) where `mtp_mask` is 1, float32. ahead_BTD: all T places."""
    targets_BT, mask_BT = mtp.one_more(batch.targets_BT[:, 1:]), mtp.one_more(mtp_mask(batch))
    return cross_entropy_sum(params, ahead_BTD, targets_BT, mask_BT, cfg=cfg)


def target_nll(
    params: Params,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    cfg: ModelConfig,
    temperature_BT: jax.Array | None = None,
) -> jax.Array:
    """-log p(target) of every place, float32 [B, T].

    temperature_BT: float32, that the logits are divided by; None for 1.
    """
    scale_BT = None if temperature_BT is None else 1 / temperature_BT
    with jax.named_scope("head"):
        nll_M = token_nll(
            sharding.flat(hidden_BTD),
            params.head_DV,
            sharding.flat(targets_BT),
            impl=cfg.impl.cross_entropy,
            scale_M=None if scale_BT is None else sharding.flat(scale_BT),
        )
        return sharding.unflat(nll_M, targets_BT.shape)


def _at_least_one(n: Any) -> jax.Array:
    return jnp.maximum(n, jnp.float32(1))
