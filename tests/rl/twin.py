"""The policy loss in float64 NumPy, one sequence after another, written from spec 7.5."""

import numpy as np

from glm45_jax.rl.correction import IcePop, Opsm, SequenceBand, Tis
from glm45_jax.rl.loss import SequenceMean
from glm45_jax.rl.objective import K1, K2, Clip, Gspo


def twin_loss(logp_BT, rows, *, objective, corrections, kl, reduction):
    costs, weights = [], []
    for b, segments_T in enumerate(rows.batch.segments_BT):
        for segment in range(1, segments_T.max() + 1):
            counted_T = (segments_T == segment) & (rows.weight_BT[b] > 0)
            if not counted_T.any():
                continue
            arrays = (
                logp_BT,
                rows.old_logp_BT,
                rows.logp_BT,
                rows.advantage_BT,
                rows.reference_logp_BT,
            )
            new, old, engine, A, ref = (x[b][counted_T].astype(np.float64) for x in arrays)
            cost = _objective(objective, new, old, A)
            for correction in corrections:
                cost = cost * _weight(correction, new, old, engine, A)
            if kl is not None:
                cost = cost + kl.weight * _kl(kl, new - ref)
            costs.append(cost)
            weights.append(rows.weight_BT[b][counted_T].astype(np.float64))
    if not costs:
        return 0.0
    if isinstance(reduction, SequenceMean):
        return np.mean([(w * c).sum() / w.sum() for w, c in zip(weights, costs, strict=True)])
    return np.average(np.concatenate(costs), weights=np.concatenate(weights))


def _objective(objective, new, old, A):
    ratio = np.exp(new - old)
    if isinstance(objective, Gspo):
        ratio = np.exp(np.full_like(new, np.mean(new - old)))
    inside = np.clip(ratio, 1 - objective.low, 1 + objective.high)
    if not isinstance(objective, Clip | Gspo):
        return -inside * A * new
    cost = np.maximum(-ratio * A, -inside * A)
    if getattr(objective, "dual", None) is None:
        return cost
    return np.where(A < 0, np.minimum(-objective.dual * A, cost), cost)


def _weight(correction, new, old, engine, A):
    importance = np.exp(old - engine)
    match correction:
        case Tis(cap, low):
            return np.clip(importance, low, cap)
        case IcePop(low, high):
            return np.where((importance >= low) & (importance <= high), importance, 0)
        case SequenceBand(low, high):
            return float(low <= np.exp(np.mean(old - engine)) <= high)
        case Opsm(delta):
            return np.where((A < 0) & (np.mean(old - new) > delta), 0, 1)


def _kl(kl, d):
    if isinstance(kl, K1):
        return d
    if isinstance(kl, K2):
        return d**2 / 2
    k3 = np.exp(-d) - 1 + d
    return k3 if kl.most is None else np.clip(k3, -kl.most, kl.most)
