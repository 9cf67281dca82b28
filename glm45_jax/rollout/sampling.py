"""Text from a model: greedy or at a temperature, through the KV cache. Letters: B rows, T prompt
length.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from glm45_jax.model import transformer
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.transformer import Params


def sample_token(logits_BV: jax.Array, key: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """One token a row, int32 [B]: the best one at temperature 0, else a draw from softmax(logits /
    temperature).
    """
    warm_B = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6), axis=-1)
    return jnp.where(temperature > 0, warm_B, logits_BV.argmax(axis=-1)).astype(jnp.int32)


def generate(
    params: Params,
    prompts: list[list[int]],
    *,
    cfg: ModelConfig,
    max_tokens: int,
    temperature: float = 0.0,
    stop: tuple[int, ...] = (),
    key: jax.Array,
) -> list[list[int]]:
    """A continuation of each prompt, without it, up to and including the first stop id.

    Prompts may differ in length; ids stay below the model's vocabulary.

    Raises: ValueError for an empty prompt.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError(
            f"{len(prompts)} prompts, the shortest of {min(map(len, prompts), default=0)} tokens; "
            "give one token each"
        )
    width = max(map(len, prompts))
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    valid_BT = np.zeros((len(prompts), width), bool)
    for i, prompt in enumerate(prompts):
        tokens_BT[i, : len(prompt)], valid_BT[i, : len(prompt)] = prompt, True
    out_BT = np.asarray(
        _generate(
            params,
            tokens_BT,
            valid_BT,
            key,
            jnp.float32(temperature),
            cfg=cfg,
            max_tokens=max_tokens,
        )
    )
    return [_until_stop(row, stop) for row in out_BT.tolist()]


@functools.partial(jax.jit, static_argnames=("cfg", "max_tokens"))
def _generate(params, tokens_BT, valid_BT, key, temperature, *, cfg: ModelConfig, max_tokens: int):
    B, T = tokens_BT.shape
    cache = transformer.empty_cache(cfg, rows=B, max_tokens=T + max_tokens)
    hidden, cache = transformer.decode(params, tokens_BT, cache, cfg=cfg, valid_BT=valid_BT)
    last_B1 = valid_BT.sum(axis=1, dtype=jnp.int32)[:, None] - 1
    last_B1D = jnp.take_along_axis(hidden.hidden_BTD, last_B1[:, :, None], axis=1)
    first_key, key = jax.random.split(key)
    first_B = sample_token(
        transformer.logits(params, last_B1D, cfg=cfg)[:, 0], first_key, temperature
    )

    def one(carry, step_key):
        token_B, cache = carry
        hidden, cache = transformer.decode(params, token_B[:, None], cache, cfg=cfg)
        next_B = sample_token(
            transformer.logits(params, hidden, cfg=cfg)[:, 0], step_key, temperature
        )
        return (next_B, cache), token_B

    _, out_TB = jax.lax.scan(one, (first_B, cache), jax.random.split(key, max_tokens))
    return out_TB.T


def _until_stop(row: list[int], stop: tuple[int, ...]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in stop]
    return row[: ends[0] + 1] if ends else row
