"""The policy loss over packed rows (spec 7.2, 7.5). Types: `PolicyCounts`, `TokenMean`,
`SequenceMean`. Letters: B T.

Sums of a share divided by counts of the *global* batch, as in `train.loss` (docs/adr/0008): losses,
parts and gradients of micro-batches, rows and devices add up, however rows are packed or padded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from glm45_jax.rl.batch import RlBatch
from glm45_jax.rl.correction import Correction, compares_with_engine
from glm45_jax.rl.objective import Clip, Kl, Objective, Tokens, excess
from glm45_jax.rl.sequences import sequence_sum, starts
from glm45_jax.train.loss import LossOut


@struct.dataclass
class PolicyCounts:
    """Counts of a batch, float32: the sum of token weights, and sequences with a counted token."""

    tokens: jax.Array
    sequences: jax.Array


@dataclasses.dataclass(frozen=True)
class TokenMean:
    """Every token counts the same: sum over tokens / global tokens.

    Less length bias and steadier than the mean of sequences. Source: spec 7.2.5 (GLM-4.5, code).
    """

    def share(self, t: Tokens, counts: PolicyCounts) -> jax.Array:
        """What each token's cost is multiplied by, float32 [B, T]."""
        return t.weight_BT / _or_one(counts.tokens)


@dataclasses.dataclass(frozen=True)
class SequenceMean:
    """Every sequence counts the same: sum over sequences of the mean over its tokens / global
    sequences. Sequences without a counted token do not count. Source: spec 7.2.5.
    """

    def share(self, t: Tokens, counts: PolicyCounts) -> jax.Array:
        """What each token's cost is multiplied by, float32 [B, T]."""
        length_BT = sequence_sum(t.weight_BT, t.segments_BT)
        counted_BT = t.weight_BT > 0
        weight_BT = t.weight_BT / jnp.where(counted_BT, length_BT, 1)
        return weight_BT / _or_one(counts.sequences)


Reduction = TokenMean | SequenceMean


def count(batch: RlBatch) -> PolicyCounts:
    """Counts of this batch; sum them over micro-batches and devices before use."""
    segments_BT, weight_BT = jnp.asarray(batch.batch.segments_BT), jnp.asarray(batch.weight_BT)
    counted_BT = sequence_sum((weight_BT > 0).astype(jnp.int32), segments_BT) > 0
    return PolicyCounts(
        tokens=weight_BT.sum(dtype=jnp.float32),
        sequences=(starts(segments_BT) & counted_BT).sum(dtype=jnp.float32),
    )


def policy_loss(
    logp_BT: jax.Array,
    batch: RlBatch,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
    objective: Objective | None = None,
    corrections: Sequence[Correction] = (),
    kl: Kl | None = None,
    reduction: Reduction = TokenMean(),
    counts: PolicyCounts | None = None,
) -> LossOut:
    """GRPO without KL, unless told otherwise: this batch's share of the global loss.

    logp_BT: [B, T], log-prob of targets_BT under the policy, at the temperature of the rollout;
    where weight_BT is 0 it may be anything, and its gradient is exactly 0. clip_low, clip_high:
    short for objective=Clip(clip_low, clip_high). corrections: their weights multiply the cost of a
    token; tokens they drop stay in the counts. counts: of the global batch; None where this is it.

    `LossOut.tokens` is of this share and `load_LE` is empty ([0, 1]): the step that ran the model
    fills it in. Parts, which add up over shares like the loss: policy; kl; and per token
    clip_fraction, drift_kl (old to policy), and with old_logp_BT or fresh_B mismatch_kl (engine to
    old), with corrections dropped (share of tokens of weight 0).

    Raises: ValueError for shapes that differ, two objectives, or log-probs that a correction or KL
    term needs and the batch has not. Source: spec 7.2, 7.5.
    """
    objective = _objective(objective, clip_low, clip_high)
    _check(logp_BT, batch, corrections, kl)
    counts = count(batch) if counts is None else counts
    t = _counted(logp_BT, batch)
    share_BT, token_BT = reduction.share(t, counts), TokenMean().share(t, counts)
    loss_BT, clipped_BT = objective.token_loss(t)
    kept_BT = jnp.ones_like(loss_BT)
    for correction in corrections:
        kept_BT = kept_BT * correction.weight(t)
    total = (share_BT * kept_BT * loss_BT).sum()
    parts = {"policy": total}
    if kl is not None:
        reference_BT = jnp.where(t.weight_BT > 0, _float32(batch.reference_logp_BT), 0)
        parts["kl"] = (share_BT * kl.token_kl(t.logp_BT, reference_BT)).sum()
        total = total + kl.weight * parts["kl"]
    if corrections:
        parts["dropped"] = (token_BT * (kept_BT == 0).astype(jnp.float32)).sum()
    parts["clip_fraction"] = (token_BT * clipped_BT.astype(jnp.float32)).sum()
    parts |= _distances(jax.lax.stop_gradient(t), token_BT, _has_old(batch))
    return LossOut(total, count(batch).tokens, parts, jnp.zeros((0, 1), jnp.float32))


def _distances(t: Tokens, token_BT: jax.Array, has_old: bool) -> dict[str, jax.Array]:
    """Estimates of how far the policy is from the old one, and that from the engine."""
    parts = {"drift_kl": (token_BT * excess(t.logp_BT - t.old_logp_BT)).sum()}
    if has_old:
        parts["mismatch_kl"] = (token_BT * excess(t.old_logp_BT - t.engine_logp_BT)).sum()
    return parts


def _counted(logp_BT: jax.Array, batch: RlBatch) -> Tokens:
    """What is known of the counted tokens; 0 on the others, before anything can overflow there."""
    weight_BT = _float32(batch.weight_BT)

    def counted(x_BT: jax.Array) -> jax.Array:
        return jnp.where(weight_BT > 0, _float32(x_BT), 0)

    old_logp_BT = batch.logp_BT if batch.old_logp_BT is None else batch.old_logp_BT
    if batch.fresh_B is not None:
        old_logp_BT = jax.lax.stop_gradient(logp_BT)
    return Tokens(
        logp_BT=counted(logp_BT),
        old_logp_BT=counted(old_logp_BT),
        engine_logp_BT=counted(batch.logp_BT),
        advantage_BT=counted(batch.advantage_BT),
        weight_BT=weight_BT,
        segments_BT=jnp.asarray(batch.batch.segments_BT),
    )


def _objective(
    objective: Objective | None, clip_low: float | None, clip_high: float | None
) -> Objective:
    bounds = {"low": clip_low, "high": clip_high}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    if objective is None:
        return Clip(**given)
    if given:
        raise ValueError(
            f"objective {objective} and clip_low {clip_low}, clip_high {clip_high}: give one; "
            "an objective has bounds of its own"
        )
    return objective


def _has_old(batch: RlBatch) -> bool:
    return batch.old_logp_BT is not None or batch.fresh_B is not None


def _check(logp_BT, batch: RlBatch, corrections: Sequence[Correction], kl: Kl | None) -> None:
    if logp_BT.shape != batch.weight_BT.shape:
        raise ValueError(
            f"logp_BT is {logp_BT.shape}, weight_BT is {batch.weight_BT.shape}; "
            "give one log-prob for every place of the rows"
        )
    if kl is not None and batch.reference_logp_BT is None:
        raise ValueError(f"{kl} needs reference_logp_BT; batch.replace it in, or use kl=None")
    for correction in corrections:
        if compares_with_engine(correction) and not _has_old(batch):
            raise ValueError(
                f"{correction} needs old_logp_BT, the trainer's log-probs before its first step; "
                "batch.replace it in, or leave the correction out"
            )


def _float32(x_BT) -> jax.Array:
    return jnp.asarray(x_BT).astype(jnp.float32)


def _or_one(n: jax.Array) -> jax.Array:
    """n, and 1 for nothing. Not maximum(n, 1): weights may be fractions."""
    return jnp.where(n > 0, n, jnp.float32(1))
