"""What a request asks of the sampler, one draw a slot, and text from a model without an engine.
Types to know: `Sampling`, `Knobs`, `Draw`. Letters: B slots or rows, T prompt length, V, K best
tokens.

A draw is a function of (logits, seed, index of the token in its own output) alone: neither the slot
nor what else is in the batch matters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from glm45_jax.model import transformer
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.transformer import Params

MIN_TEMPERATURE = 1e-3  # logits / temperature stays finite in float32
SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one output is drawn and where it ends.

    temperature: 0 is greedy. top_k: 0 is all. top_p, min_p: of the distribution at the temperature,
    after top_k. max_tokens: of the output, the stop id included. stop: ids that end it and stay in
    it. seed: equal seeds on equal prompts give equal outputs, so the samples of a group need seeds
    of their own.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 1024
    stop: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range, NaN among them."""
        heat = self.temperature
        if not (heat == 0 or MIN_TEMPERATURE <= heat < math.inf):
            raise ValueError(
                f"temperature {heat} is neither 0 nor a finite number from {MIN_TEMPERATURE} on; "
                "use 0 for greedy"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]; 1 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} is not in [0, 1]; 0 keeps every token")
        if not _is_count(self.top_k) or self.top_k >= 2**31:
            raise ValueError(
                f"top_k {self.top_k!r} is not a count below 2**31; 0 keeps every token"
            )
        if not _is_count(self.max_tokens) or self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens!r} is not a positive integer")
        if not _is_count(self.seed) or self.seed >= SEEDS:
            raise ValueError(f"seed {self.seed!r} is not an integer in [0, 2**32)")
        if not isinstance(self.stop, tuple) or not all(_is_count(i) for i in self.stop):
            raise ValueError(f"stop {self.stop!r} is not a tuple of token ids")


@struct.dataclass
class Knobs:
    """`Sampling` of every slot as arrays: float32, top_k int32, seed uint32."""

    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array
    min_p_B: jax.Array
    seed_B: jax.Array


@struct.dataclass
class Draw:
    """One token a slot, int32, and its log-probs, float32, both of the model's whole distribution.

    logp_B: of softmax(logits / temperature), whatever top_k, top_p and min_p took out: this is what
    the policy gradient recomputes. At temperature 0 the distribution is the one token: 0.
    logp_raw_B: of softmax(logits), temperature 1. top_ids_BK, top_logp_BK: the K likeliest tokens,
    best first, int32, and their log-probs at temperature 1; None unless asked for.
    """

    token_B: jax.Array
    logp_B: jax.Array
    logp_raw_B: jax.Array
    top_ids_BK: jax.Array | None = None
    top_logp_BK: jax.Array | None = None


def knobs(samplings: Sequence[Sampling]) -> Knobs:
    """NumPy knobs, one row a sampling."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.asarray([getattr(s, name) for s in samplings], dtype)

    return Knobs(
        temperature_B=column("temperature", np.float32),
        top_p_B=column("top_p", np.float32),
        top_k_B=column("top_k", np.int32),
        min_p_B=column("min_p", np.float32),
        seed_B=column("seed", np.uint32),
    )


@functools.partial(jax.jit, static_argnames="top")
def sample(logits_BV: jax.Array, knobs: Knobs, index_B: jax.Array, *, top: int = 0) -> Draw:
    """One draw a slot by its own knobs. logits_BV: float32. index_B: int32, how many tokens the
    slot's output holds already. top: how many of the likeliest tokens are returned beside it.
    """
    heat_B = jnp.where(knobs.temperature_B > 0, knobs.temperature_B, 1.0)
    warm_BV = logits_BV / heat_B[:, None]
    cuts_B = (knobs.top_k_B > 0) | (knobs.top_p_B < 1) | (knobs.min_p_B > 0)
    best_B = logits_BV.argmax(axis=-1)
    drawn_B = jax.lax.cond(
        (knobs.temperature_B > 0).any(),
        lambda: _draw(
            # Sorting a vocabulary costs more than the rest: only where a slot asks for it.
            jax.lax.cond(cuts_B.any(), _truncated, lambda warm_BV, _: warm_BV, warm_BV, knobs),
            knobs.seed_B,
            index_B,
        ),
        lambda: best_B,
    )
    token_B = jnp.where(knobs.temperature_B > 0, drawn_B, best_B).astype(jnp.int32)
    logp_B = jnp.where(knobs.temperature_B > 0, _of(token_B, warm_BV), 0.0)
    return Draw(token_B, logp_B, _of(token_B, logits_BV), *_best(logits_BV, top))


def sample_each(logits_BTV: jax.Array, knobs: Knobs, index_B: jax.Array, *, top: int = 0) -> Draw:
    """Draws of T tokens in a row of each slot, leaves [B, T, ..]: `sample` of token t by its own
    logits and index_B + t.
    """
    B, T, V = logits_BTV.shape
    index_BT = index_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    rows = jax.tree.map(lambda x_B: jnp.repeat(x_B, T), knobs)
    draw = sample(logits_BTV.reshape(B * T, V), rows, index_BT.reshape(-1), top=top)
    return jax.tree.map(lambda x_M: x_M.reshape(B, T, *x_M.shape[1:]), draw)


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

    Prompts may differ in length; ids stay below the model's vocabulary. All rows run to the end
    together: `engine` is for many requests.

    Raises: ValueError for an empty prompt or a number out of range.
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
    asked = Sampling(temperature=temperature, max_tokens=max_tokens, stop=stop)
    seed_B = jax.random.bits(key, (len(prompts),), jnp.uint32)
    rows = knobs([asked] * len(prompts)).replace(seed_B=seed_B)
    out_BT = np.asarray(
        _generate(params, tokens_BT, valid_BT, rows, cfg=cfg, max_tokens=max_tokens)
    )
    return [_until_stop(row, stop) for row in out_BT.tolist()]


@functools.partial(jax.jit, static_argnames=("cfg", "max_tokens"))
def _generate(params, tokens_BT, valid_BT, rows: Knobs, *, cfg: ModelConfig, max_tokens: int):
    B, T = tokens_BT.shape
    cache = transformer.empty_cache(cfg, rows=B, max_tokens=T + max_tokens)
    hidden, cache = transformer.decode(params, tokens_BT, cache, cfg=cfg, valid_BT=valid_BT)
    last_B1 = valid_BT.sum(axis=1, dtype=jnp.int32)[:, None] - 1
    last_B1D = jnp.take_along_axis(hidden.hidden_BTD, last_B1[:, :, None], axis=1)
    first_BV = transformer.logits(params, last_B1D, cfg=cfg)[:, 0]
    first_B = sample(first_BV, rows, jnp.zeros(B, jnp.int32)).token_B

    def one(carry, index):
        token_B, cache = carry
        hidden, cache = transformer.decode(params, token_B[:, None], cache, cfg=cfg)
        logits_BV = transformer.logits(params, hidden, cfg=cfg)[:, 0]
        next_B = sample(logits_BV, rows, jnp.broadcast_to(index, (B,))).token_B
        return (next_B, cache), token_B

    _, out_TB = jax.lax.scan(one, (first_B, cache), jnp.arange(1, max_tokens + 1, dtype=jnp.int32))
    return out_TB.T


def _of(token_B: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """Log-prob of each row's token, float32."""
    logp_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]


def _best(logits_BV: jax.Array, top: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Ids and log-probs, [B, K] each, of the `top` likeliest tokens; None for 0."""
    if not top:
        return None, None
    logits_BK, ids_BK = jax.lax.top_k(logits_BV, top)
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    return ids_BK, logits_BK - total_B1


def _draw(warm_BV: jax.Array, seed_B: jax.Array, index_B: jax.Array) -> jax.Array:
    """Gumbel draws; a row's noise is that of its own key. Threefry by name: its bits, unlike those
    of hardware generators, do not change under `vmap`.
    """

    def noise(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
        return jax.random.gumbel(key, warm_BV.shape[1:], jnp.float32)

    return (warm_BV + jax.vmap(noise)(seed_B, index_B)).argmax(axis=-1)


def _truncated(warm_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Logits with -inf outside top_k, then top_p, then min_p of each row; ties with the last token
    kept stay. A row that asks for none of them is returned as it is, to the bit.
    """
    V = warm_BV.shape[1]
    best_BV = jnp.sort(warm_BV, axis=-1, descending=True)
    rank_1V = jnp.arange(V, dtype=jnp.int32)[None, :]
    in_k_BV = rank_1V < jnp.where(knobs.top_k_B > 0, knobs.top_k_B, V)[:, None]
    p_BV = jax.nn.softmax(jnp.where(in_k_BV, best_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    # Rounding may bring the sum to 1 early: top_p = 1 means all, not "until the sum is 1".
    in_p_BV = (before_BV < knobs.top_p_B[:, None]) | (knobs.top_p_B >= 1)[:, None]
    kept_BV = in_k_BV & in_p_BV & (p_BV >= knobs.min_p_B[:, None] * p_BV[:, :1])
    count_B1 = jnp.maximum(kept_BV.sum(axis=-1, keepdims=True), 1)
    least_B1 = jnp.take_along_axis(best_BV, count_B1 - 1, axis=-1)
    return jnp.where(warm_BV >= least_B1, warm_BV, -jnp.inf)


def _is_count(x: object) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool) and int(x) >= 0


def _until_stop(row: list[int], stop: tuple[int, ...]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in stop]
    return row[: ends[0] + 1] if ends else row
