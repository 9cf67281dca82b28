"""The policy update: `train`'s trainers, by `pmap` or on a mesh, with the loss of `rl.loss`. Types:
`Update`, `Updater`. Letters: B T D L A E.

`make_updater(where, ...)` is what a loop holds. A round is `pack` -> `logp` (the trainer's word on
what the engine drew, where a correction needs it) -> one or more `step`s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from glm45_jax import sharding
from glm45_jax.model import mtp, transformer
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.transformer import Params
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.rl.batch import RlBatch
from glm45_jax.rl.correction import Correction
from glm45_jax.rl.loss import PolicyCounts, Reduction, TokenMean, count, policy_loss
from glm45_jax.rl.objective import Clip, Kl, Objective, excess
from glm45_jax.sharding import MeshShape, Rules
from glm45_jax.train.loss import LossOut, mtp_mask, mtp_nll_sum, target_nll
from glm45_jax.train.parallel import Pmap, Trainer, make_trainer
from glm45_jax.train.state import TrainState
from glm45_jax.train.step import StepOut, descend, row_by_row, summed, vocabulary_in_float32

LOSSES = ("policy", "kl", "mtp")  # parts that are losses; the others are how the policy stands


@dataclasses.dataclass(frozen=True)
class Update:
    """How a policy learns from a batch. GRPO without KL unless told otherwise.

    mtp_weight: of the MTP layer's own cross-entropy on the tokens that the policy drew, which
    reaches that layer alone (the gradients of both are clipped together); None leaves it be. slime
    has 0.2. replay: MoE layers use the experts of `RlBatch.routes_BTLA` (R3). micro_rows: at most
    this many rows a forward pass, over all devices; None: all of them. Router biases stand still,
    and there is no balance loss (UNVERIFIED: the paper says nothing of them in RL).
    Source: spec 7.2, 7.5, 8.
    """

    objective: Objective = Clip()
    corrections: tuple[Correction, ...] = ()
    kl: Kl | None = None
    reduction: Reduction = TokenMean()
    mtp_weight: float | None = None
    replay: bool = False
    micro_rows: int | None = None

    def __post_init__(self) -> None:
        if self.mtp_weight is not None and self.mtp_weight <= 0:
            raise ValueError(f"mtp_weight {self.mtp_weight} is not over 0; None leaves MTP alone")
        if self.micro_rows is not None and self.micro_rows < 1:
            raise ValueError(f"micro_rows {self.micro_rows} is not positive; None takes all rows")


@struct.dataclass
class Counts:
    """Denominators of the global batch: of the policy, tokens that the MTP layer predicts, and
    tokens of fresh rows.
    """

    policy: PolicyCounts
    mtp_tokens: jax.Array
    fresh_tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class Updater:
    """Functions of one policy. Batches are numpy, this host's rows, a multiple of `multiple`.

    - init: the state at step 0 with a copy of these weights, wherever they lie.
    - step: the state after one batch, and what to log (`PolicyWork.step`). Donates the state.
    - logp: float32 [B, T] of weights as a state holds them (`state.params`, `place(params)`), at
      the batch's temperatures and with its routes; 0 where weight_BT is 0. For old_logp_BT and
      reference_logp_BT.
    - place: a copy of weights as a state holds them, say of a reference model.
    - params: the weights of a state as `transformer.Params`, for `rollout.weights.update`.
    - trainer: the rest (`save_view`, `load_view`, `abstract` for checkpoints, `n_devices`).
    """

    init: Callable[[Params], TrainState]
    step: Callable[[TrainState, RlBatch], tuple[TrainState, StepOut]]
    logp: Callable[[Any, RlBatch], np.ndarray]
    place: Callable[[Params], Any]
    params: Callable[[TrainState], Params]
    trainer: Trainer
    multiple: int


@dataclasses.dataclass(frozen=True)
class PolicyWork:
    """What a trainer is told (`train.parallel.Work`). most_mismatch: as in `make_updater`."""

    cfg: ModelConfig
    optim: Muon | AdamW
    update: Update
    most_mismatch: float | None = None

    def __post_init__(self) -> None:
        if self.update.mtp_weight is not None and not self.cfg.n_mtp:
            raise ValueError(
                f"mtp_weight {self.update.mtp_weight}, but the model has no MTP layer (n_mtp = 0); "
                "use None"
            )
        if self.update.replay and not self.cfg.n_moe:
            raise ValueError("replay of routes, but the model has no MoE layers (n_moe = 0)")

    @functools.cached_property
    def specs(self) -> Any:
        """Plan of the weights, in the dtypes that the optimizer keeps them in."""
        return self.optim.stored(transformer.specs(self.cfg))

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer at a learning rate of one."""
        return self.optim.build(self.specs)

    def accum(self, rows: int) -> int:
        """Micro-batches of a batch of so many rows. Raises: ValueError where it is uneven."""
        most = rows if self.update.micro_rows is None else min(self.update.micro_rows, rows)
        if rows % most:
            raise ValueError(
                f"a batch of {rows} rows is not a multiple of micro_rows {most}; "
                "pack with multiple=updater.multiple"
            )
        return rows // most

    def step(
        self, state: TrainState, batch: RlBatch, *, accum: int, axis_name: str | None = None
    ) -> tuple[TrainState, StepOut]:
        """One optimizer step. Scalars beside those of `train.step.descend`: loss/policy, loss/kl,
        loss/mtp; policy/clip_fraction, drift_kl, mismatch_kl, dropped (`rl.loss`), rollout_kl and
        rollout_gap (policy against engine: estimate of the KL, mean |difference|), entropy (an
        estimate from the drawn tokens, unbiased while on policy); policy/tokens, sequences: counts.
        With fresh_B, fresh_kl and fresh_gap: rollout_kl and rollout_gap over the tokens of those
        rows; where the first is not within `most_mismatch`, the step is not taken (`ok` is False).
        """
        counts = count_all(batch)
        if axis_name is not None:
            counts = jax.lax.psum(counts, axis_name)
        params, batch, counts = _counts_first(state.params, batch, counts)

        def one(micro: RlBatch) -> tuple[Params, LossOut]:
            def scalar(params: Params) -> tuple[jax.Array, LossOut]:
                out = loss(params, micro, counts, cfg=self.cfg, update=self.update)
                return out.loss, out

            whole = vocabulary_in_float32(params)
            (_, out), grads = jax.value_and_grad(scalar, has_aux=True)(whole)
            # Of bfloat16 weights they are bfloat16: their sum over micro-batches is not.
            return jax.tree.map(lambda g: g.astype(jnp.float32), grads), out

        grads, out = summed(one, batch, accum)
        devices, loss_of_all = 1, out.loss
        if axis_name is not None:
            grads, out = jax.lax.psum((grads, out), axis_name)
            devices, loss_of_all = jax.lax.axis_size(axis_name), out.loss
        if self.most_mismatch is not None and batch.fresh_B is not None:
            agree = out.parts["fresh_kl"] <= self.most_mismatch
            # A loss that is not finite is a step that is not taken.
            out = out.replace(loss=jnp.where(agree, out.loss, jnp.nan))
        state, stepped = descend(
            state,
            grads,
            out,
            optim=self.optim,
            tx=self.tx,
            specs=self.specs,
            tokens=batch.weight_BT.size * devices,
            bias_rate=None,
        )
        named = {f"{'loss' if n in LOSSES else 'policy'}/{n}": x for n, x in out.parts.items()}
        named["loss"] = loss_of_all
        named["policy/tokens"] = counts.policy.tokens
        named["policy/sequences"] = counts.policy.sequences
        return state, stepped.replace(scalars=stepped.scalars | named)

    def nll(self, params: Params, batch: RlBatch) -> tuple[jax.Array, jax.Array]:
        """Sum of -log p over what the policy drew, by its weights, and the sum of these."""
        return -(self.logp(params, batch, accum=1) * batch.weight_BT).sum(), batch.weight_BT.sum()

    def logp(self, params: Params, batch: RlBatch, *, accum: int) -> jax.Array:
        """log p of each token that the policy drew, float32 [B, T]; 0 elsewhere."""

        def one(micro: RlBatch) -> jax.Array:
            hidden = trunk(params, micro, cfg=self.cfg, replay=self.update.replay)
            logp_BT = token_logp(params, hidden.hidden_BTD, micro, cfg=self.cfg)
            return jnp.where(micro.weight_BT > 0, logp_BT, 0)

        return row_by_row(one, batch, accum)


def make_updater(
    cfg: ModelConfig,
    optim: Muon | AdamW,
    update: Update = Update(),
    *,
    where: Pmap | MeshShape = Pmap(),
    rules: Rules = Rules(),
    devices: Any = None,
    seed: int = 0,
    most_mismatch: float | None = None,
) -> Updater:
    """The updater of a policy on these devices; all of this host by default, weights whole on each.

    most_mismatch: KL of engine to trainer, in nats a token of fresh rows, beyond which a step is
    not taken.

    Raises: ValueError where the mesh does not fit the devices, or the update not the model.
    """
    work = PolicyWork(cfg, optim, update, most_mismatch)
    trainer = make_trainer(where, work, rules, devices)

    def step(state: TrainState, batch: RlBatch) -> tuple[TrainState, StepOut]:
        trainer.check_rows(batch.weight_BT.shape[0] * jax.process_count())
        return trainer.step(state, _admitted(batch, cfg, update))

    def logp(params: Any, batch: RlBatch) -> np.ndarray:
        trainer.check_rows(batch.weight_BT.shape[0] * jax.process_count())
        batch = batch.replace(old_logp_BT=None, reference_logp_BT=None, fresh_B=None)
        return trainer.logp(params, _admitted(batch, cfg, update))

    return Updater(
        init=lambda params: trainer.begin(params, jax.random.key(seed)),
        step=step,
        logp=logp,
        place=trainer.place,
        params=lambda state: trainer.save_view(state.replace(opt=())).params,
        trainer=trainer,
        multiple=_multiple(trainer, update),
    )


def loss(
    params: Params, batch: RlBatch, counts: Counts, *, cfg: ModelConfig, update: Update
) -> LossOut:
    """Policy loss, and MTP's where asked for: this batch's share of the global one."""
    hidden = trunk(params, batch, cfg=cfg, replay=update.replay)
    out = loss_of_hidden(params, hidden.hidden_BTD, batch, counts, cfg=cfg, update=update)
    if update.mtp_weight is None:
        return out.replace(load_LE=hidden.load_LE, spilled=hidden.spilled)
    nll, ahead = mtp_nll(params, hidden.hidden_BTD, batch, cfg=cfg)
    part = nll / jnp.maximum(counts.mtp_tokens, jnp.float32(1))
    return out.replace(
        loss=out.loss + update.mtp_weight * part,
        parts=out.parts | {"mtp": part},
        load_LE=jnp.concatenate([hidden.load_LE, ahead.load_LE]),
        spilled=hidden.spilled + ahead.spilled,
    )


def loss_of_hidden(
    params: Params,
    hidden_BTD: jax.Array,
    batch: RlBatch,
    counts: Counts,
    *,
    cfg: ModelConfig,
    update: Update,
) -> LossOut:
    """The policy's part of `loss`, from the trunk's hidden states. Its gradient is exactly 0 in
    those that predict a token which the policy did not draw.
    """
    logp_BT = token_logp(params, hidden_BTD, batch, cfg=cfg)
    out = policy_loss(
        logp_BT,
        batch,
        objective=update.objective,
        corrections=update.corrections,
        kl=update.kl,
        reduction=update.reduction,
        counts=counts.policy,
    )
    return out.replace(parts=out.parts | _stand(jax.lax.stop_gradient(logp_BT), batch, counts))


def mtp_nll(
    params: Params, hidden_BTD: jax.Array, batch: RlBatch, *, cfg: ModelConfig
) -> tuple[jax.Array, transformer.Hidden]:
    """Sum of the MTP layer's -log p over drawn tokens, and what its router did. The trunk,
    embedding and head are held still: only the layer itself has a gradient.
    """
    rows = batch.batch
    still = jax.lax.stop_gradient(params).replace(mtp=params.mtp)
    ahead = mtp.forward_all(
        still,
        jax.lax.stop_gradient(hidden_BTD),
        rows.tokens_BT,
        cfg=cfg,
        positions_BT=rows.positions_BT,
        segments_BT=rows.segments_BT,
    )
    return mtp_nll_sum(still, ahead.hidden_BTD, rows, cfg=cfg), ahead


def trunk(params: Params, batch: RlBatch, *, cfg: ModelConfig, replay: bool) -> transformer.Hidden:
    """`transformer.forward` of the rows, with the engine's experts where they are replayed."""
    return transformer.forward(
        params,
        batch.batch.tokens_BT,
        cfg=cfg,
        positions_BT=batch.batch.positions_BT,
        segments_BT=batch.batch.segments_BT,
        keep_router_logits=False,
        routes_BTLA=batch.routes_BTLA if replay else None,
    )


def token_logp(
    params: Params, hidden_BTD: jax.Array, batch: RlBatch, *, cfg: ModelConfig
) -> jax.Array:
    """log p of each target at the temperature it was drawn at, float32 [B, T], over chunks of the
    vocabulary.
    """
    return -target_nll(
        params,
        hidden_BTD,
        batch.batch.targets_BT,
        cfg=cfg,
        temperature_BT=batch.temperature_BT,
    )


def count_all(batch: RlBatch) -> Counts:
    """Counts of this batch; sum them over devices before use."""
    fresh_tokens = _fresh(batch).sum(dtype=jnp.float32)
    return Counts(count(batch), mtp_mask(batch.batch).sum(dtype=jnp.float32), fresh_tokens)


def _fresh(batch: RlBatch) -> jax.Array:
    """Counted tokens of fresh rows, bool [B, T]."""
    if batch.fresh_B is None:
        return jnp.zeros(batch.weight_BT.shape, bool)
    return (jnp.asarray(batch.weight_BT) > 0) & jnp.asarray(batch.fresh_B)[:, None]


def _counts_first(*trees: Any) -> tuple[Any, ...]:
    """The same. On a mesh of CPUs none of it is there before all of it is: XLA's runtime does not
    order collectives that do not depend on each other, and devices that sum the counts wait for
    ever for devices that gather weights (docs/adr/0011 met the same in Muon).
    """
    ambient = sharding.current()
    if ambient is None or ambient[0].devices.flat[0].platform != "cpu":
        return trees
    return jax.lax.optimization_barrier(trees)


def _stand(logp_BT: jax.Array, batch: RlBatch, counts: Counts) -> dict[str, jax.Array]:
    """How the policy stands to the engine that drew the tokens, and how spread it is: means over
    tokens, which add up over shares like the loss.
    """
    counted_BT = batch.weight_BT > 0
    share_BT = batch.weight_BT / jnp.where(counts.policy.tokens > 0, counts.policy.tokens, 1)
    logp_BT = jnp.where(counted_BT, logp_BT, 0)
    change_BT = logp_BT - jnp.where(counted_BT, batch.logp_BT, 0)
    parts = {
        "rollout_kl": (share_BT * excess(change_BT)).sum(),
        "rollout_gap": (share_BT * jnp.abs(change_BT)).sum(),
        "entropy": -(share_BT * logp_BT).sum(),
    }
    if batch.fresh_B is not None:
        fresh_BT = _fresh(batch).astype(jnp.float32) / jnp.maximum(counts.fresh_tokens, 1.0)
        parts["fresh_kl"] = (fresh_BT * excess(change_BT)).sum()
        parts["fresh_gap"] = (fresh_BT * jnp.abs(change_BT)).sum()
    return parts


def _admitted(batch: RlBatch, cfg: ModelConfig, update: Update) -> RlBatch:
    """The batch as it goes to the devices: without routes, unless they are replayed.

    Raises: ValueError for routes that are missing, or are not those of this model.
    """
    if not update.replay:
        return batch.replace(routes_BTLA=None)
    if batch.routes_BTLA is None:
        raise ValueError(
            "replay of routes, but the batch has none; use GlmEngine(routes=True) and put "
            "routes_TLA into the trajectories, or Update(replay=False)"
        )
    routes_BTLA = np.asarray(batch.routes_BTLA)
    want = (*batch.weight_BT.shape, cfg.n_moe, cfg.moe.top_k)
    if routes_BTLA.shape != want:
        raise ValueError(
            f"routes_BTLA is {routes_BTLA.shape}, the rows and the model want {want}: "
            "rows, tokens, MoE layers, experts of a token"
        )
    if routes_BTLA.max(initial=-1) >= cfg.moe.experts:
        raise ValueError(
            f"routes name expert {routes_BTLA.max()}, the model has {cfg.moe.experts}; "
            "the engine serves another model"
        )
    known_BTL = (routes_BTLA >= 0).all(axis=-1)
    sorted_BTLA = np.sort(routes_BTLA, axis=-1)
    twice_BTL = (sorted_BTLA[..., 1:] == sorted_BTLA[..., :-1]).any(axis=-1) & known_BTL
    if twice_BTL.any():
        at = tuple(int(i) for i in np.argwhere(twice_BTL)[0])
        raise ValueError(
            f"row, token, layer {at} was routed to {routes_BTLA[at].tolist()}: the experts of a "
            "token must differ"
        )
    return batch


def _multiple(trainer: Trainer, update: Update) -> int:
    """Rows of this host come in multiples of it: every device has as many of a micro-batch."""
    rows = trainer.row_parts if update.micro_rows is None else update.micro_rows
    if rows % trainer.row_parts:
        raise ValueError(
            f"micro_rows {rows} do not divide over the {trainer.row_parts} devices that share "
            f"rows; use {-(-rows // trainer.row_parts) * trainer.row_parts}"
        )
    return max(1, rows // jax.process_count())
