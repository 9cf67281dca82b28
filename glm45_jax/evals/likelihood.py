"""How likely a model finds given texts: log-probabilities of targets after their inputs.

Letters: `B` rows of a call, `T` tokens of a row, `D` width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import batched

import jax
import jax.numpy as jnp
import numpy as np

from glm45_jax.model import transformer
from glm45_jax.model.config import ModelConfig
from glm45_jax.train.loss import target_nll

Pair = tuple[Sequence[int], Sequence[int]]  # ids of the inputs, ids of the target


@functools.partial(jax.jit, static_argnames="cfg")
def _logp(
    params: transformer.Params, tokens_BT: jax.Array, mask_BT: jax.Array, *, cfg: ModelConfig
) -> jax.Array:
    """[B], float32: the sum of log p of tokens 1 .. T - 1 where their mask is 1."""
    hidden = transformer.forward(params, tokens_BT, cfg=cfg)
    nll_BT = target_nll(params, hidden.hidden_BTD, jnp.roll(tokens_BT, -1, axis=1), cfg=cfg)
    return -(nll_BT[:, :-1] * mask_BT[:, 1:]).sum(axis=1)


def target_scores(
    params: transformer.Params,
    pairs: Sequence[Pair],
    *,
    cfg: ModelConfig,
    rows: int = 8,
    multiple: int = 64,
) -> list[float]:
    """log p(target | inputs) of each pair, in nats, float32.

    rows: of one call. Rows are padded at their end, to a multiple of `multiple` tokens, so that few
    lengths compile; a token never sees what comes after it.

    Raises: ValueError for inputs without a token (nothing predicts the first one).
    """
    for at, (inputs, _) in enumerate(pairs):
        if not len(inputs):
            raise ValueError(f"pair {at} has 0 input tokens, needs 1; begin with a special token")
    order = sorted(range(len(pairs)), key=lambda at: sum(map(len, pairs[at])))
    scores = [0.0] * len(pairs)
    for some in batched(order, rows):
        longest = max(sum(map(len, pairs[at])) for at in some)
        T = -(-longest // multiple) * multiple
        tokens_BT, mask_BT = np.zeros((rows, T), np.int32), np.zeros((rows, T), np.float32)
        for row, at in enumerate(some):
            inputs, target = pairs[at]
            end = len(inputs) + len(target)
            tokens_BT[row, :end] = [*inputs, *target]
            mask_BT[row, len(inputs) : end] = 1
        logp_B = np.asarray(_logp(params, tokens_BT, mask_BT, cfg=cfg))
        for row, at in enumerate(some):
            scores[at] = float(logp_B[row])
    return scores
