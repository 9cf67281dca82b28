"""Trajectories to packed rows for the policy loss. Types: `RlBatch`, `Chosen`.

Letters: B rows, T, L, A; N trajectories. Everything here is numpy; the step puts it on devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import flax.struct
import numpy as np

from glm45_jax.data.pack import best_fit
from glm45_jax.data.types import Array, Batch
from glm45_jax.rl.advantage import Centred, Rule, group_advantage, varies
from glm45_jax.rl.trajectory import Trajectory


@flax.struct.dataclass
class RlBatch:
    """Rows of trajectories. Place t of a row is about the token that it predicts, targets_BT[b, t].

    - batch: a segment is a trajectory; mask_BT is 1 where weight_BT is not 0.
    - logp_BT: float32, of the engine that drew the token; 0 where weight_BT is 0.
    - advantage_BT: float32; 0 where weight_BT is 0.
    - weight_BT: float32, how much the token counts. 0 on all that the policy did not write; else
      1, or what makes another mean: 1 / (tokens of the sample) makes the token mean one of samples.
    - version_B: int32, the oldest weights that drew a counted token of the row; -1 in a row of
      none.
    - routes_BTLA: int16, experts that the engine chose for tokens_BT (R3), -1 where unknown.
    - old_logp_BT: float32, of the trainer before its first step on this batch; None takes the
      engine's word. Corrections of the mismatch compare the two.
    - fresh_B: bool, rows that the weights of this very step drew. Where it is given, this is the
      first step on the batch: the policy's own log-probs, without their gradient, stand for
      old_logp_BT, and the engine's are compared with them on these rows.
    - reference_logp_BT: float32, of the model that a KL term pulls towards.
    - temperature_BT: float32, over 0, at which the engine drew the token, and 1 where it drew none;
      None: 1 everywhere. All log-probs of a batch are at these.
    """

    batch: Batch
    logp_BT: Array
    advantage_BT: Array
    weight_BT: Array
    version_B: Array
    routes_BTLA: Array | None = None
    old_logp_BT: Array | None = None
    fresh_B: Array | None = None
    reference_logp_BT: Array | None = None
    temperature_BT: Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Chosen:
    """Trajectories that have something to teach, and float32 advantages. groups: looked at;
    dropped: those whose samples all had the same reward.
    """

    trajectories: tuple[Trajectory, ...]
    advantage_N: np.ndarray
    groups: int
    dropped: int


def choose(trajectories: Sequence[Trajectory], rule: Rule = Centred()) -> Chosen:
    """Advantages within groups, of any size each; groups that agree are dropped and counted.

    Order is kept. Source: spec 7.2.2 (a group of equal rewards has no gradient).
    """
    members: dict[str, list[int]] = {}
    for i, one in enumerate(trajectories):
        members.setdefault(one.group, []).append(i)
    advantage_of: dict[int, float] = {}
    dropped = 0
    for inside in members.values():
        reward_1J = np.array([[trajectories[i].reward for i in inside]])
        if varies(reward_1J)[0]:
            advantages = group_advantage(reward_1J, rule)[0].tolist()
            advantage_of |= dict(zip(inside, advantages, strict=True))
        else:
            dropped += 1
    kept = sorted(advantage_of)
    return Chosen(
        trajectories=tuple(trajectories[i] for i in kept),
        advantage_N=np.array([advantage_of[i] for i in kept], np.float32),
        groups=len(members),
        dropped=dropped,
    )


def pack(
    trajectories: Sequence[Trajectory],
    advantage_N: np.ndarray,
    *,
    seq_len: int,
    pad_id: int,
    multiple: int = 1,
    oldest: int = 0,
    temperature_N: np.ndarray | None = None,
) -> RlBatch:
    """Rows of `seq_len` tokens, each trajectory whole in one of them, best-fit decreasing.

    multiple: empty rows are added up to a multiple of it (devices x micro-batches). oldest: tokens
    drawn by weights before this version get no weight (partial rollouts that went on).
    temperature_N: at which each trajectory was drawn; None: 1, all of them.

    Raises: ValueError for a trajectory longer than a row (cutting it would be silent), for another
    number of advantages or temperatures, for a temperature that is not over 0 (its log-probs say
    nothing of a distribution), and where only some of the trajectories have routes.
    """
    _check(trajectories, advantage_N, seq_len)
    _check_temperatures(trajectories, temperature_N)
    bins = best_fit([len(one.tokens_T) for one in trajectories], seq_len)
    B = -(-max(len(bins), 1) // multiple) * multiple
    rows = _empty(B, seq_len, pad_id, trajectories)
    temperature_BT = None if temperature_N is None else np.ones((B, seq_len), np.float32)
    for b, inside in enumerate(bins):
        begin = 0
        for segment, i in enumerate(inside, start=1):
            place = (b, slice(begin, begin + len(trajectories[i].tokens_T)))
            _write(rows, place, trajectories[i], advantage_N[i], segment, oldest)
            if temperature_BT is not None and temperature_N is not None:
                drawn_T = rows.weight_BT[place] > 0
                temperature_BT[place] = np.where(drawn_T, temperature_N[i], 1)
            begin = place[1].stop
    return rows.replace(temperature_BT=temperature_BT)


def _write(rows, place, one: Trajectory, advantage, segment: int, oldest: int) -> None:
    """One trajectory into its place: what token t + 1 was stands at t."""
    b, span = place
    before = (b, slice(span.start, span.stop - 1))
    rows.batch.tokens_BT[place] = one.tokens_T
    rows.batch.targets_BT[before] = one.tokens_T[1:]
    rows.batch.segments_BT[place] = segment
    rows.batch.positions_BT[place] = np.arange(len(one.tokens_T), dtype=np.int32)
    if one.routes_TLA is not None:
        rows.routes_BTLA[place] = one.routes_TLA
    counts_T = (one.sampled_T & (one.versions_T >= oldest))[1:]
    rows.weight_BT[before] = rows.batch.mask_BT[before] = counts_T
    rows.logp_BT[before] = np.where(counts_T, one.logp_T[1:], 0)
    rows.advantage_BT[before] = np.where(counts_T, advantage, 0)
    if counts_T.any():
        version, known = one.versions_T[1:][counts_T].min(), rows.version_B[b]
        rows.version_B[b] = version if known < 0 else min(version, known)


def _empty(B: int, T: int, pad_id: int, trajectories: Sequence[Trajectory]) -> RlBatch:
    """Rows of padding."""
    routes_BTLA = None
    if trajectories and trajectories[0].routes_TLA is not None:
        routes_BTLA = np.full((B, T, *trajectories[0].routes_TLA.shape[1:]), -1, np.int16)
    return RlBatch(
        batch=Batch(
            tokens_BT=np.full((B, T), pad_id, np.int32),
            targets_BT=np.full((B, T), pad_id, np.int32),
            segments_BT=np.zeros((B, T), np.int32),
            positions_BT=np.zeros((B, T), np.int32),
            mask_BT=np.zeros((B, T), np.float32),
        ),
        logp_BT=np.zeros((B, T), np.float32),
        advantage_BT=np.zeros((B, T), np.float32),
        weight_BT=np.zeros((B, T), np.float32),
        version_B=np.full(B, -1, np.int32),
        routes_BTLA=routes_BTLA,
    )


def _check_temperatures(
    trajectories: Sequence[Trajectory], temperature_N: np.ndarray | None
) -> None:
    if temperature_N is None:
        return
    if temperature_N.shape != (len(trajectories),):
        raise ValueError(
            f"{len(trajectories)} trajectories, temperatures of shape {temperature_N.shape}"
        )
    if not (np.isfinite(temperature_N) & (temperature_N > 0)).all():
        i = int(np.flatnonzero(~(np.isfinite(temperature_N) & (temperature_N > 0)))[0])
        raise ValueError(
            f"trajectory {trajectories[i].task_id} was drawn at temperature {temperature_N[i]}; "
            "only tokens drawn at one over 0 teach a policy"
        )


def _check(trajectories: Sequence[Trajectory], advantage_N: np.ndarray, seq_len: int) -> None:
    if advantage_N.shape != (len(trajectories),):
        raise ValueError(
            f"{len(trajectories)} trajectories, advantages of shape {advantage_N.shape}"
        )
    for one in trajectories:
        if len(one.tokens_T) > seq_len:
            raise ValueError(
                f"trajectory {one.task_id} has {len(one.tokens_T)} tokens, a row holds {seq_len}; "
                "raise seq_len or lower the rollout's maximum length"
            )
    routed = sum(one.routes_TLA is not None for one in trajectories)
    if routed not in (0, len(trajectories)):
        raise ValueError(
            f"{routed} of {len(trajectories)} trajectories have routes; replay needs all or none"
        )
