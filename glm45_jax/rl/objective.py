"""What a token costs (spec 7.5): clipped objectives, KL estimators. Values that compute, one type
a choice: `Clip`, `Gspo`, `Cispo`; `K1`, `K2`, `K3`. Letters: B T.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from glm45_jax.rl.sequences import sequence_mean

# exp(20) = 5e8 is far outside every clip; beyond it float32 overflows, and 0 * inf is no gradient.
MOST_LOG_RATIO = 20.0


@struct.dataclass
class Tokens:
    """Log-probabilities of drawn tokens, float32 [B, T] each.

    logp_BT: of the policy, what gradients flow through. old_logp_BT: of the trainer before its
    first step on these rows; engine_logp_BT: of the engine as it drew. weight_BT: 0 where a token
    does not count.
    """

    logp_BT: jax.Array
    old_logp_BT: jax.Array
    engine_logp_BT: jax.Array
    advantage_BT: jax.Array
    weight_BT: jax.Array
    segments_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class Clip:
    """PPO's clip of the token's ratio to [1 - low, 1 + high]; a higher high is clip-higher.

    dual: c > 1, for A < 0 a token costs at most -c A. GLM-4.5's numbers are UNVERIFIED: the
    defaults are DAPO's (arXiv 2503.14476). Source: spec 7.2.1, 7.5.
    """

    low: float = 0.2
    high: float = 0.28
    dual: float | None = None

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)
        if self.dual is not None and self.dual <= 1:
            raise ValueError(f"dual {self.dual} must be over 1: it bounds -ratio A from above")

    def token_loss(self, t: Tokens) -> tuple[jax.Array, jax.Array]:
        """Cost of each token, float32 [B, T], and whether the clip took its gradient, bool."""
        ratio_BT = jnp.exp(_bounded(t.logp_BT - t.old_logp_BT))
        loss_BT, clipped_BT = _clipped(ratio_BT, t.advantage_BT, self.low, self.high)
        if self.dual is not None:
            most_BT = -self.dual * t.advantage_BT
            over_BT = (t.advantage_BT < 0) & (loss_BT > most_BT)
            loss_BT, clipped_BT = jnp.where(over_BT, most_BT, loss_BT), clipped_BT | over_BT
        return loss_BT, clipped_BT


@dataclasses.dataclass(frozen=True)
class Gspo:
    """The clip on the sequence's ratio, exp of the mean log-ratio of its counted tokens.

    Defaults: the paper's (arXiv 2507.18071); slime's GLM-4.7 script has 1e-4 and 2e-4. With
    `SequenceMean` it is the paper's objective. Source: spec 7.5.
    """

    low: float = 3e-4
    high: float = 4e-4

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def token_loss(self, t: Tokens) -> tuple[jax.Array, jax.Array]:
        """Cost of each token, float32 [B, T], and whether the clip took its gradient, bool."""
        change_BT = t.logp_BT - t.old_logp_BT
        mean_BT = sequence_mean(change_BT, t.weight_BT > 0, t.segments_BT)
        return _clipped(jnp.exp(_bounded(mean_BT)), t.advantage_BT, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Cispo:
    """REINFORCE weighted by the clipped ratio, which has no gradient: no token is silenced.

    Defaults: those of the golden; the paper (arXiv 2506.13585) sets no lower bound, low=1.
    Source: spec 7.5.
    """

    low: float = 0.2
    high: float = 0.28

    def __post_init__(self) -> None:
        _check_range(self.low, self.high)

    def token_loss(self, t: Tokens) -> tuple[jax.Array, jax.Array]:
        """Cost of each token, float32 [B, T], and whether its ratio was clipped, bool."""
        ratio_BT = jnp.exp(_bounded(jax.lax.stop_gradient(t.logp_BT) - t.old_logp_BT))
        weight_BT = jnp.clip(ratio_BT, 1 - self.low, 1 + self.high)
        return -weight_BT * t.advantage_BT * t.logp_BT, weight_BT != ratio_BT


Objective = Clip | Gspo | Cispo


@dataclasses.dataclass(frozen=True)
class K1:
    """log(p / ref): unbiased, as a loss without a pull (its gradient has mean zero on-policy)."""

    weight: float

    def token_kl(self, logp_BT: jax.Array, reference_logp_BT: jax.Array) -> jax.Array:
        """Estimate of KL(p | ref) from each token that p drew, [B, T]."""
        return logp_BT - reference_logp_BT


@dataclasses.dataclass(frozen=True)
class K2:
    """log(p / ref)² / 2: small bias, and on-policy the gradient of the KL itself."""

    weight: float

    def token_kl(self, logp_BT: jax.Array, reference_logp_BT: jax.Array) -> jax.Array:
        """Estimate of KL(p | ref) from each token that p drew, [B, T]."""
        return (logp_BT - reference_logp_BT) ** 2 / 2


@dataclasses.dataclass(frozen=True)
class K3:
    """ref / p - 1 - log(ref / p): unbiased and never negative; limited to ± most, if given.

    As a loss it pulls like KL(ref | p): on-policy it has that gradient. K3(weight, most=10)
    is slime's low_var_kl. Source: spec 7.5.
    """

    weight: float
    most: float | None = None

    def token_kl(self, logp_BT: jax.Array, reference_logp_BT: jax.Array) -> jax.Array:
        """Estimate of KL(p | ref) from each token that p drew, [B, T]."""
        kl_BT = excess(reference_logp_BT - logp_BT)
        return kl_BT if self.most is None else jnp.clip(kl_BT, -self.most, self.most)


Kl = K1 | K2 | K3


def excess(d_BT: jax.Array) -> jax.Array:
    """exp(d) - 1 - d, >= 0: with d = log(q / p) of what p drew, an unbiased KL(p | q)."""
    d_BT = _bounded(d_BT)
    return jnp.expm1(d_BT) - d_BT


def _clipped(ratio_BT, advantage_BT, low, high):
    """max(-ratio A, -clip(ratio) A), and where the second is larger. Not jnp.maximum: in a tie, as
    at ratio 1 with high = 0, it would halve the gradient.
    """
    plain_BT = -ratio_BT * advantage_BT
    within_BT = -jnp.clip(ratio_BT, 1 - low, 1 + high) * advantage_BT
    clipped_BT = within_BT > plain_BT
    return jnp.where(clipped_BT, within_BT, plain_BT), clipped_BT


def _bounded(d_BT):
    return jnp.clip(d_BT, -MOST_LOG_RATIO, MOST_LOG_RATIO)


def _check_range(low: float, high: float) -> None:
    if not 0 <= low <= 1 or high < 0:
        raise ValueError(
            f"low {low} must be in [0, 1] and high {high} >= 0: ratios 1 - low, 1 + high"
        )
