"""Speculative decoding with the MTP layer: what it drafts, the model verifies in one call. The type
to know is `Ahead`.

Lossless by coupling (ADR 0013): a draw is a function of (logits, seed, index), so the verified
token is the one that would have been drawn without drafts, and a draft is believed where it is that
token. MTP draws its drafts with the same knobs and the same noise. Letters: B slots, P pages (of a
row in table_BP), T tokens of a step (drafts + 1) or of a chunk, D V.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from glm45_jax.model import mtp, transformer
from glm45_jax.model.block import compute_dtype
from glm45_jax.model.cache import KVCache
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.transformer import Params
from glm45_jax.rollout.sampling import Knobs, sample

MOST = 3  # drafts a step: one layer, trained to look one token ahead, knows little further on


@struct.dataclass
class Ahead:
    """What the next drafts follow from: each slot's tokens of its last step, which MTP has not yet
    read.

    token_BT: as drawn, int32, `count_B` of them valid. hidden_BTD: the main model's before each, of
    the token that was read when it was drawn. tail_PD: the main model's of the last token in each
    page: what a chunk reads that begins after it.

    MTP's keys and values of a row are those of the main model's hidden states, but for the tokens
    of the last step, which are still those of its drafts. Where a row ends they stay.
    """

    token_BT: jax.Array
    hidden_BTD: jax.Array
    count_B: jax.Array
    tail_PD: jax.Array


def init_ahead(cfg: ModelConfig, *, slots: int, pages: int, draft: int) -> Ahead:
    """Nothing drawn yet."""
    return Ahead(
        token_BT=jnp.zeros((slots, draft + 1), jnp.int32),
        hidden_BTD=jnp.zeros((slots, draft + 1, cfg.d_model), compute_dtype(cfg)),
        count_B=jnp.ones(slots, jnp.int32),
        tail_PD=jnp.zeros((pages, cfg.d_model), compute_dtype(cfg)),
    )


def read_chunk(
    params: Params,
    ahead: Ahead,
    hidden_1TD: jax.Array,
    tokens_1T: jax.Array,
    cache: KVCache,
    valid_1T: jax.Array,
    *,
    cfg: ModelConfig,
) -> tuple[Ahead, KVCache]:
    """The cache with MTP's keys and values of a chunk of a prompt, whose first token goes to
    `cache.length_B`, and the tails of its pages. hidden_1TD: the main model's of the chunk.
    """
    start_11, size = cache.length_B[:, None], cache.k_LPSKH.shape[2]
    page_11 = jnp.take_along_axis(cache.table_BP, (start_11 - 1) // size, axis=1)
    tail_11D = ahead.tail_PD.at[page_11].get(mode="fill", fill_value=0)
    first_11D = jnp.where(start_11[:, :, None] > 0, tail_11D, 0)
    before_1TD = jnp.concatenate([first_11D, hidden_1TD[:, :-1]], axis=1)
    _, cache = mtp.decode(params, before_1TD, tokens_1T, cache, cfg=cfg, valid_BT=valid_1T)
    return ahead.replace(tail_PD=_tails(ahead.tail_PD, hidden_1TD, cache, valid_1T)), cache


def seat(ahead: Ahead, hidden_ND: jax.Array, token_N: jax.Array, slot_N: jax.Array) -> Ahead:
    """Rows take slots with their first tokens drawn; a slot past the last is none. hidden_ND: of
    the last token of each that was read.
    """
    return ahead.replace(
        token_BT=ahead.token_BT.at[slot_N, 0].set(token_N, mode="drop"),
        hidden_BTD=ahead.hidden_BTD.at[slot_N, 0].set(hidden_ND, mode="drop"),
        count_B=ahead.count_B.at[slot_N].set(1, mode="drop"),
    )


def propose(
    params: Params,
    ahead: Ahead,
    knobs: Knobs,
    index_B: jax.Array,
    cache: KVCache,
    active_B: jax.Array,
    *,
    cfg: ModelConfig,
) -> tuple[jax.Array, KVCache]:
    """Drafts of the next T - 1 tokens of each slot, int32, and the cache with what MTP has read.

    cache: its `length_B` is where the last token drawn goes. index_B: of the first draft in its
    output.
    """
    guess_BD, cache = catch_up(params, ahead, cache, active_B, cfg=cfg)
    drafts: list[jax.Array] = []
    for i in range(ahead.token_BT.shape[1] - 1):
        if drafts:
            at = cache.replace(length_B=cache.length_B + i)
            guess_B1D, at = mtp.decode(
                params,
                guess_BD[:, None],
                drafts[-1][:, None],
                at,
                cfg=cfg,
                valid_BT=active_B[:, None],
            )
            guess_BD, cache = guess_B1D[:, 0], at.replace(length_B=cache.length_B)
        logits_BV = transformer.logits(params, guess_BD[:, None], cfg=cfg)[:, 0]
        drafts.append(sample(logits_BV, knobs, index_B + i).token_B)
    return jnp.stack(drafts, axis=1), cache


def catch_up(
    params: Params, ahead: Ahead, cache: KVCache, active_B: jax.Array, *, cfg: ModelConfig
) -> tuple[jax.Array, KVCache]:
    """MTP's hidden state [B, D] at the last token drawn, all tokens read after the main model's
    hidden states, and the cache with them in it, over what the last drafts left there.
    """
    place_1T = jnp.arange(ahead.token_BT.shape[1], dtype=jnp.int32)[None, :]
    valid_BT = (place_1T < ahead.count_B[:, None]) & active_B[:, None]
    since = cache.replace(length_B=cache.length_B - ahead.count_B + 1)
    guess_BTD, since = mtp.decode(
        params, ahead.hidden_BTD, ahead.token_BT, since, cfg=cfg, valid_BT=valid_BT
    )
    last_B11 = ahead.count_B[:, None, None] - 1
    guess_BD = jnp.take_along_axis(guess_BTD, last_B11, axis=1)[:, 0]
    return guess_BD, since.replace(length_B=cache.length_B)


def accept(drafts_BT: jax.Array, token_BT: jax.Array, cache: KVCache) -> jax.Array:
    """How many of the verified tokens [B, drafts + 1] a step draws, int32: one, and one more for
    each leading draft that is the token verified in its place, as far as the row's pages reach.

    cache: as before the step; what was written past the pages is lost.
    """
    right_BT = (drafts_BT == token_BT[:, :-1]).astype(jnp.int32)
    drawn_B = 1 + jnp.cumprod(right_BT, axis=1).sum(axis=1, dtype=jnp.int32)
    return jnp.minimum(drawn_B, room(cache))


def room(cache: KVCache) -> jax.Array:
    """Tokens that each row's pages have places for beyond those in them, at least 1: int32 [B]."""
    n_pages, size = cache.k_LPSKH.shape[1:3]
    held_B = (cache.table_BP < n_pages).sum(axis=1, dtype=jnp.int32) * size
    return jnp.maximum(held_B - cache.length_B, 1)


def remember(
    ahead: Ahead,
    hidden_BTD: jax.Array,
    token_BT: jax.Array,
    count_B: jax.Array,
    cache: KVCache,
    active_B: jax.Array,
) -> Ahead:
    """What the next drafts follow from, after a step that began at `cache.length_B`; idle slots
    keep what they have.
    """
    place_1T = jnp.arange(token_BT.shape[1], dtype=jnp.int32)[None, :]
    valid_BT = (place_1T < count_B[:, None]) & active_B[:, None]
    return Ahead(
        token_BT=jnp.where(active_B[:, None], token_BT, ahead.token_BT),
        hidden_BTD=jnp.where(active_B[:, None, None], hidden_BTD, ahead.hidden_BTD),
        count_B=jnp.where(active_B, count_B, ahead.count_B),
        tail_PD=_tails(ahead.tail_PD, hidden_BTD, cache, valid_BT),
    )


def _tails(
    tail_PD: jax.Array, hidden_BTD: jax.Array, cache: KVCache, valid_BT: jax.Array
) -> jax.Array:
    """The tails with those of the tokens from `cache.length_B` on: of each page the last valid."""
    n_pages, size = cache.k_LPSKH.shape[1:3]
    slots = cache.slots(hidden_BTD.shape[1], valid_BT)
    fills_BT = (slots.positions_BT + 1) % size == 0
    ends_BT = slots.positions_BT + 1 == (cache.length_B + slots.new_B)[:, None]
    page_BT = jnp.where(fills_BT | ends_BT, slots.slot_BT // size, n_pages)
    return tail_PD.at[page_BT].set(hidden_BTD, mode="drop")
