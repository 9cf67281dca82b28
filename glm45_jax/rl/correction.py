"""Weights that put tokens right, or out, which the policy would not have drawn itself (spec 7.5).

The engine and the trainer disagree on log-probabilities (other kernels, FP8, other experts), and
weights grow old. Values: `Tis`, `IcePop`, `SequenceBand` compare the trainer's old log-probs with
the engine's, `Opsm` the policy's with the old. Weights have no gradient. Letters: B T.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from glm45_jax.rl.objective import Tokens
from glm45_jax.rl.sequences import sequence_mean


@dataclasses.dataclass(frozen=True)
class Tis:
    """Truncated importance weight, clip(old / engine, low, cap). Source: spec 7.5, slime's 0..2."""

    cap: float = 2.0
    low: float = 0.0

    def __post_init__(self) -> None:
        _check_band(self.low, self.cap)

    def weight(self, t: Tokens) -> jax.Array:
        """float32 [B, T]."""
        return jnp.clip(_importance(t), self.low, self.cap)


@dataclasses.dataclass(frozen=True)
class IcePop:
    """Importance weight old / engine; 0 where outside [low, high]. Source: spec 7.5."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_band(self.low, self.high)

    def weight(self, t: Tokens) -> jax.Array:
        """float32 [B, T]."""
        weight_BT = _importance(t)
        return jnp.where(_inside(weight_BT, self.low, self.high), weight_BT, 0)


@dataclasses.dataclass(frozen=True)
class SequenceBand:
    """0 on sequences whose geometric mean of old / engine is outside [low, high], 1 on others.

    Source: spec 7.5, the MIS helper at its geometric level, with a mask.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_band(self.low, self.high)

    def weight(self, t: Tokens) -> jax.Array:
        """0 or 1, float32 [B, T]."""
        change_BT = t.old_logp_BT - t.engine_logp_BT
        mean_BT = jnp.exp(sequence_mean(change_BT, t.weight_BT > 0, t.segments_BT))
        keep_BT = _inside(mean_BT, self.low, self.high)
        return jax.lax.stop_gradient(keep_BT.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Opsm:
    """0 on tokens with A < 0 of sequences that the policy has left: mean log(old / policy) > delta.

    Pushing down what it would no longer write teaches nothing and breaks things.
    Source: spec 7.5 (slime's default 1e-4).
    """

    delta: float = 1e-4

    def weight(self, t: Tokens) -> jax.Array:
        """0 or 1, float32 [B, T]."""
        change_BT = t.old_logp_BT - jax.lax.stop_gradient(t.logp_BT)
        left_BT = sequence_mean(change_BT, t.weight_BT > 0, t.segments_BT) > self.delta
        return (~(left_BT & (t.advantage_BT < 0))).astype(jnp.float32)


Correction = Tis | IcePop | SequenceBand | Opsm


def compares_with_engine(correction: Correction) -> bool:
    """Whether it needs the trainer's old log-probs beside the engine's."""
    return not isinstance(correction, Opsm)


def _importance(t: Tokens) -> jax.Array:
    return jax.lax.stop_gradient(jnp.exp(t.old_logp_BT - t.engine_logp_BT))


def _inside(x_BT: jax.Array, low: float, high: float) -> jax.Array:
    return (x_BT >= low) & (x_BT <= high)


def _check_band(low: float, high: float) -> None:
    if not 0 <= low <= high:
        raise ValueError(f"low {low}, high {high}: weights lie in 0 <= low <= high")
