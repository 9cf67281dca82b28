"""The model under the driver: prefill, insert and decode as pure jitted functions of (params,
state) over a paged cache. Types to know: `EngineState`, `GlmEngine`.

The host says with each call which pages a row has; the device knows lengths, last tokens and knobs.
A state is given up to the call that changes it (its buffers are donated).
Letters: B slots, T tokens of a chunk or of a step, P pages of a row (of the cache in k_, v_), S K H
L A V.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from glm45_jax.kernels.routing import route
from glm45_jax.model import transformer
from glm45_jax.model.block import compute_dtype
from glm45_jax.model.cache import KVCache, init_cache
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.transformer import Hidden, Params
from glm45_jax.rollout import speculative
from glm45_jax.rollout.sampling import Knobs, Sampling, knobs, sample, sample_each
from glm45_jax.rollout.speculative import Ahead
from glm45_jax.rollout.types import Prefilled, Seat, Step

# What a scan takes of stacked weights is copied before Triton reads it, and products of one input
# are merged by copying their weights side by side: a fifth of a decode step (docs/log.md). cuBLAS
# reads each where it lies. No other platform looks at these.
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}

# Rows of one insert, which is small kernels and waits of the host, for one row as for a few.
SEATS = 16


@struct.dataclass
class EngineState:
    """All slots and all pages.

    length_B: tokens in the cache, int32. token_B: the last one drawn, not in it yet. index_B: how
    many were drawn. ahead: what drafts follow from, None without them; with them the cache has a
    layer more, MTP's.
    """

    k_LPSKH: jax.Array
    v_LPSKH: jax.Array
    length_B: jax.Array
    token_B: jax.Array
    index_B: jax.Array
    knobs: Knobs
    ahead: Ahead | None = None


@dataclasses.dataclass(frozen=True)
class GlmEngine:
    """A `SlotEngine` of one model: numbers only.

    page: tokens of a page. buckets: lengths a chunk is padded to, rising; a longer prompt goes in
    chunks of the last. spans: pages of a row that a call may read, rising; the smallest that holds
    every row is taken, so that short rows do not read to the end of long ones; () is the whole row.
    routes: whether experts are returned. top_logprobs: of how many of the likeliest tokens. draft:
    tokens that MTP drafts a step, 0 to 3; a step then draws 1 to draft + 1, the same ones that it
    would draw without. steps: decode steps of one call, whose tokens the host gets together: it is
    waited for less often, and what a row draws past its end is dropped; 1 with drafts. together:
    short prompts that one call may read, where so many wait; 1 with drafts. kv_dtype: of
    the cache, None for the model's, or "float8_e4m3fn" for half of its bytes (model/cache.py says
    what it costs). It compiles at most buckets x spans prefills, spans decodes and one insert.
    """

    cfg: ModelConfig
    slots: int = 8
    pages: int = 256
    page: int = 16
    max_tokens: int = 512
    buckets: tuple[int, ...] = (16, 64, 256)
    spans: tuple[int, ...] = ()
    routes: bool = False
    top_logprobs: int = 0
    draft: int = 0
    steps: int = 1
    together: int = 1
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that do not fit each other."""
        if min(self.slots, self.pages, self.page, self.max_tokens) < 1:
            raise ValueError(f"{self}: slots, pages, page and max_tokens must be positive")
        if self.row_pages > self.pages:
            raise ValueError(
                f"max_tokens {self.max_tokens} takes {self.row_pages} pages of {self.page}, "
                f"there are {self.pages}; use at most {self.pages * self.page}"
            )
        for name, sizes in (("buckets", self.buckets), ("spans", self.spans)):
            if list(sizes) != sorted({n for n in sizes if n > 0}):
                raise ValueError(f"{name} {sizes} do not rise from a positive number")
        if not self.buckets:
            raise ValueError("buckets are empty; give the lengths to compile a prefill for")
        if not 0 <= self.top_logprobs <= self.cfg.vocab:
            raise ValueError(
                f"top_logprobs {self.top_logprobs} is not a count of tokens up to the vocabulary's "
                f"{self.cfg.vocab}"
            )
        if self.kv_dtype not in (None, "float8_e4m3fn"):
            raise ValueError(f"kv_dtype {self.kv_dtype!r} is neither None nor 'float8_e4m3fn'")
        if not 0 <= self.draft <= speculative.MOST:
            raise ValueError(f"draft {self.draft} is not in 0 to {speculative.MOST} tokens a step")
        if self.draft and not self.cfg.n_mtp:
            raise ValueError(
                f"draft {self.draft} needs the MTP layer, and this model has none (n_mtp = 0); use "
                "draft=0"
            )
        if self.steps < 1 or (self.steps > 1 and self.draft):
            raise ValueError(
                f"steps {self.steps} with draft {self.draft}: there is at least 1 step, and one "
                "with drafts"
            )
        if self.together < 1 or (self.together > 1 and self.draft):
            raise ValueError(
                f"together {self.together} with draft {self.draft}: a call reads at least 1 "
                "prompt, and one with drafts"
            )
        if self.routes and not self.cfg.n_moe:
            raise ValueError("routes of a model without MoE layers (n_moe = 0); use routes=False")

    @property
    def row_pages(self) -> int:
        """Pages of the longest row."""
        return -(-self.max_tokens // self.page)

    @property
    def beyond(self) -> int:
        """Tokens that a call of `decode` may draw beyond one."""
        return self.draft + self.steps - 1

    @property
    def seats(self) -> int:
        """Most rows of one insert."""
        return min(self.slots, SEATS)

    @property
    def chunk(self) -> int:
        """Most tokens of one prefill."""
        return self.buckets[-1]

    @property
    def vocab(self) -> int:
        """Token ids are below it."""
        return self.cfg.vocab

    def init(self) -> EngineState:
        """Every slot idle, every page empty."""
        key, value = self.cfg.mixer.kv_shapes
        cache = init_cache(
            layers=self.cfg.n_layers + (self.draft > 0),
            rows=1,
            max_tokens=self.pages * self.page,
            key=key,
            value=value,
            dtype=jnp.dtype(self.kv_dtype or compute_dtype(self.cfg)),
            page=self.page,
        )
        idle = jax.tree.map(jnp.asarray, knobs([Sampling()] * self.slots))
        zeros = functools.partial(jnp.zeros, self.slots, jnp.int32)
        ahead = None
        if self.draft:
            ahead = speculative.init_ahead(
                self.cfg, slots=self.slots, pages=self.pages, draft=self.draft
            )
        return EngineState(cache.k_LPSKH, cache.v_LPSKH, zeros(), zeros(), zeros(), idle, ahead)

    def prefill(
        self,
        params: Params,
        state: EngineState,
        tokens: Sequence[int],
        start: int,
        row: Sequence[int],
    ) -> tuple[EngineState, Prefilled]:
        """Tokens `start`, `start` + 1, ... of a row written to its pages, and what `insert` needs.

        Raises: ValueError for no token, or more than the largest bucket.
        """
        state, (last,) = self._read(params, state, [tokens], [row], start=start)
        return state, last

    def prefill_whole(
        self,
        params: Params,
        state: EngineState,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
    ) -> tuple[EngineState, list[Prefilled]]:
        """Prompts of one chunk each, all of their tokens written to the pages of their rows, in one
        call that costs what `together` of the longest do.

        Raises: ValueError for no prompt or more than `together`, or one that is no chunk.
        """
        if not 1 <= len(prompts) <= self.together:
            raise ValueError(f"{len(prompts)} prompts are not 1 to {self.together}, of `together`")
        return self._read(params, state, prompts, rows, places=self.together)

    def _read(
        self,
        params: Params,
        state: EngineState,
        pieces: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        *,
        start: int = 0,
        places: int = 1,
    ) -> tuple[EngineState, list[Prefilled]]:
        longest = max(map(len, pieces))
        if not 1 <= min(map(len, pieces)) <= longest <= self.chunk:
            raise ValueError(
                f"{longest} tokens are not a chunk of 1 to {self.chunk}; split them, or change "
                "buckets"
            )
        tokens_NT = np.zeros((places, next(n for n in self.buckets if n >= longest)), np.int32)
        count_N = np.zeros(places, np.int32)
        # Only what the chunk reads: a row may own pages further on.
        reach = self._span(-(-(start + longest) // self.page))
        table_NP = np.full((places, reach), self.pages, np.int32)
        for n, (tokens, row) in enumerate(zip(pieces, rows, strict=True)):
            tokens_NT[n, : len(tokens)], count_N[n] = tokens, len(tokens)
            table_NP[n, : min(len(row), reach)] = row[:reach]
        state, found = prefill(
            params,
            state,
            tokens_NT,
            count_N,
            np.full(places, start, np.int32),
            table_NP,
            cfg=self.cfg,
            routes=self.routes,
            fresh=bool(start == 0),
        )
        read = list(found[: len(pieces)])
        if self.routes:
            whole = jax.device_get([one.routes_TLA for one in read])
            read = [
                one.replace(routes_TLA=routes_TLA[: len(tokens)])
                for one, tokens, routes_TLA in zip(read, pieces, whole, strict=True)
            ]
        return state, read

    def insert(self, state: EngineState, seats: Sequence[Seat]) -> tuple[EngineState, Step]:
        """Rows take slots and draw the next token of their outputs, which is on its way. It costs
        what `self.seats` rows do: those that are seated together share it.

        Raises: ValueError for no row, or more than `seats`.
        """
        if not 1 <= len(seats) <= self.seats:
            raise ValueError(f"{len(seats)} rows are not 1 to {self.seats}; seat them in turns")
        idle = self.seats - len(seats)
        whole = [*seats, *[dataclasses.replace(seats[0], slot=self.slots, copy=None)] * idle]
        copies = [seat.copy or (0, self.pages) for seat in whole]  # past the end: not kept
        numbers = [
            [s.slot, s.length, s.index, *copy] for s, copy in zip(whole, copies, strict=True)
        ]
        given = tuple(s.prefilled.replace(routes_TLA=None) for s in whole)  # of any length
        return insert(
            state,
            given,
            knobs([seat.sampling for seat in whole]),
            np.asarray(numbers, np.int32).T,
            top=self.top_logprobs,
        )

    def decode(
        self, params: Params, state: EngineState, table_BP: np.ndarray, active_B: np.ndarray
    ) -> tuple[EngineState, Step]:
        """The next tokens of every active slot: one, and up to `beyond` more. table_BP: int32, -1
        where a row has no page.
        """
        used = int((table_BP >= 0).sum(axis=1).max())
        table_BP = np.where(table_BP < 0, self.pages, table_BP)[:, : self._span(used)]
        state, step = decode(
            params,
            state,
            table_BP,
            active_B,
            cfg=self.cfg,
            routes=self.routes,
            top=self.top_logprobs,
            steps=self.steps,
        )
        return state, jax.device_get(step)

    def _span(self, pages: int) -> int:
        spans = (*(n for n in self.spans if n < self.row_pages), self.row_pages)
        return next(n for n in spans if n >= pages)


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "routes", "fresh"),
    donate_argnames="state",
    compiler_options=OPTIONS,
)
def prefill(
    params: Params,
    state: EngineState,
    tokens_NT: jax.Array,
    count_N: jax.Array,
    start_N: jax.Array,
    table_NP: jax.Array,
    *,
    cfg: ModelConfig,
    routes: bool,
    fresh: bool,
) -> tuple[EngineState, tuple[Prefilled, ...]]:
    """The state with chunks of N rows in it, their keys and values; of each the logits after its
    last token, float32, and with `routes` the experts of all T tokens.

    tokens_NT: right-padded, `count_N` of them valid, the first at position `start_N`. table_NP:
    pages of the rows; ids past the last page mean none. fresh: starts are 0: the tokens see each
    other alone, by the kernel of training.
    """
    valid_NT = jnp.arange(tokens_NT.shape[1], dtype=jnp.int32)[None, :] < count_N[:, None]
    cache = KVCache(state.k_LPSKH, state.v_LPSKH, table_NP, start_N, fresh=fresh)
    hidden, after = transformer.decode(params, tokens_NT, cache, cfg=cfg, valid_BT=valid_NT)
    cache, ahead = after.replace(length_B=start_N, fresh=False), state.ahead
    if ahead is not None:
        ahead, cache = speculative.read_chunk(
            params, ahead, hidden.hidden_BTD, tokens_NT, cache, valid_NT, cfg=cfg
        )
    last_N11 = jnp.maximum(count_N - 1, 0)[:, None, None]
    last_N1D = jnp.take_along_axis(hidden.hidden_BTD, last_N11, axis=1)
    logits_NV = transformer.logits(params, last_N1D, cfg=cfg)[:, 0]
    routes_NTLA = chosen(params, hidden, cfg) if routes else None
    state = state.replace(k_LPSKH=cache.k_LPSKH, v_LPSKH=cache.v_LPSKH, ahead=ahead)
    return state, tuple(
        Prefilled(
            logits_NV[n : n + 1],
            None if routes_NTLA is None else routes_NTLA[n],
            None if ahead is None else last_N1D[n],
        )
        for n in range(tokens_NT.shape[0])
    )


@functools.partial(jax.jit, static_argnames="top", donate_argnames="state")
def insert(
    state: EngineState,
    prefilled: tuple[Prefilled, ...],
    row: Knobs,
    numbers_5N: jax.Array,
    *,
    top: int,
) -> tuple[EngineState, Step]:
    """The state with N prefilled rows in their slots, and the next token of each, drawn (B = N).

    numbers_5N: slot, length, index of the token, the page to copy and where to, int32: the
    half-filled page of a prompt that several rows share. What lies past the end is not written.
    """
    slot_N, length_N, index_N, source_N, target_N = numbers_5N
    logits_NV = jnp.concatenate([one.logits_1V for one in prefilled])
    draw, ahead = sample(logits_NV, row, index_N, top=top), state.ahead

    def put(x_B: jax.Array, x_N: jax.Array) -> jax.Array:
        return x_B.at[slot_N].set(x_N, mode="drop")

    def copied(page_LPSKH: jax.Array) -> jax.Array:
        return page_LPSKH.at[:, target_N].set(page_LPSKH[:, source_N], mode="drop")

    if ahead is not None:
        hidden_ND = jnp.concatenate([one.hidden_1D for one in prefilled])
        tail_PD = ahead.tail_PD.at[target_N].set(ahead.tail_PD[source_N], mode="drop")
        ahead = speculative.seat(ahead.replace(tail_PD=tail_PD), hidden_ND, draw.token_B, slot_N)
    state = state.replace(
        k_LPSKH=copied(state.k_LPSKH),
        v_LPSKH=copied(state.v_LPSKH),
        length_B=put(state.length_B, length_N),
        token_B=put(state.token_B, draw.token_B),
        index_B=put(state.index_B, index_N + 1),
        knobs=jax.tree.map(put, state.knobs, row),
        ahead=ahead,
    )
    return state, Step(draw)


@functools.partial(
    jax.jit,
    static_argnames=("cfg", "routes", "top", "steps"),
    donate_argnames="state",
    compiler_options=OPTIONS,
)
def decode(
    params: Params,
    state: EngineState,
    table_BP: jax.Array,
    active_B: jax.Array,
    *,
    cfg: ModelConfig,
    routes: bool,
    top: int,
    steps: int = 1,
) -> tuple[EngineState, Step]:
    """`steps` steps of every active slot, as far as its pages reach: its last token goes into the
    cache, and after it those of its drafts that are the tokens drawn; one more is drawn after them.

    An active row must have the page its token goes to; drafts past its pages are not believed. Idle
    rows compute, but store and change nothing.
    """
    one = functools.partial(_step, cfg=cfg, routes=routes, top=top)
    if steps == 1:
        return one(params, state, table_BP, active_B)
    room_B = speculative.room(KVCache(state.k_LPSKH, state.v_LPSKH, table_BP, state.length_B))
    state, step_N = jax.lax.scan(
        lambda state, n: one(params, state, table_BP, active_B & (n < room_B)),
        state,
        jnp.arange(steps, dtype=jnp.int32),
    )
    count_B = jnp.where(active_B, jnp.minimum(steps, room_B), 0)
    step = jax.tree.map(lambda x_NB: jnp.moveaxis(x_NB, 0, 1), step_N)
    return state, step.replace(count_B=count_B)


def _step(
    params: Params,
    state: EngineState,
    table_BP: jax.Array,
    active_B: jax.Array,
    *,
    cfg: ModelConfig,
    routes: bool,
    top: int,
) -> tuple[EngineState, Step]:
    """One of `decode`'s."""
    cache = KVCache(state.k_LPSKH, state.v_LPSKH, table_BP, state.length_B)
    tokens_BT, ahead = state.token_B[:, None], state.ahead
    if ahead is not None:
        drafts_BT, cache = speculative.propose(
            params, ahead, state.knobs, state.index_B, cache, active_B, cfg=cfg
        )
        tokens_BT = jnp.concatenate([tokens_BT, drafts_BT], axis=1)
    valid_BT = jnp.broadcast_to(active_B[:, None], tokens_BT.shape)
    hidden, after = transformer.decode(params, tokens_BT, cache, cfg=cfg, valid_BT=valid_BT)
    logits_BTV = transformer.logits(params, hidden, cfg=cfg)
    draw = sample_each(logits_BTV, state.knobs, state.index_B, top=top)
    step = Step(draw, chosen(params, hidden, cfg) if routes else None)
    if ahead is None:
        step = jax.tree.map(lambda x_B1: x_B1[:, 0], step)
        count_B, last_B = active_B.astype(jnp.int32), step.draw.token_B
    else:
        count_B = speculative.accept(drafts_BT, draw.token_B, cache)
        ahead = speculative.remember(
            ahead, hidden.hidden_BTD, draw.token_B, count_B, cache, active_B
        )
        step = step.replace(count_B=count_B)
        last_B = jnp.take_along_axis(draw.token_B, count_B[:, None] - 1, axis=1)[:, 0]
        count_B = jnp.where(active_B, count_B, 0)
    state = state.replace(
        k_LPSKH=after.k_LPSKH,
        v_LPSKH=after.v_LPSKH,
        length_B=state.length_B + count_B,
        token_B=jnp.where(active_B, last_B, state.token_B),
        index_B=state.index_B + count_B,
        ahead=ahead,
    )
    return state, step


def chosen(params: Params, hidden: Hidden, cfg: ModelConfig) -> jax.Array:
    """Experts each token took, best first, [B, T, L, A] in the smallest unsigned type: the router's
    own rule on the logits it used.
    """
    assert params.moe is not None and hidden.router_logits_LBTE is not None
    L, B, T, E = hidden.router_logits_LBTE.shape
    moe = cfg.moe

    def one(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits_ME, bias_E = layer
        return route(
            logits_ME,
            bias_E,
            top_k=moe.top_k,
            groups=moe.groups,
            top_groups=moe.top_groups,
            impl=cfg.impl.routing,
        ).expert_MA

    logits_LME = hidden.router_logits_LBTE.reshape(L, B * T, E)
    expert_LMA = jax.lax.map(one, (logits_LME, params.moe.ffn.bias_E))
    expert_LBTA = expert_LMA.reshape(L, B, T, moe.top_k).transpose(1, 2, 0, 3)
    return expert_LBTA.astype(jnp.uint8 if E <= 256 else jnp.uint16)
