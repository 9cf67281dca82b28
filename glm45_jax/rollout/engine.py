"""The model under the driver: prefill, insert and decode as pure jitted functions of (params,
state) over a paged cache. Types to know: `EngineState`, `GlmEngine`.

The host says with each call which pages a row has; the device knows lengths, last tokens and knobs.
A state is given up to the call that changes it (its buffers are donated).
Letters: B slots, T tokens of a chunk, P pages of a row (of the cache in k_, v_), S K H L A V.
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
from glm45_jax.rollout.sampling import Knobs, Sampling, knobs, sample
from glm45_jax.rollout.types import Prefilled, Step


@struct.dataclass
class EngineState:
    """All slots and all pages.

    length_B: tokens in the cache, int32. token_B: the last one drawn, not in it yet. index_B: how
    many were drawn.
    """

    k_LPSKH: jax.Array
    v_LPSKH: jax.Array
    length_B: jax.Array
    token_B: jax.Array
    index_B: jax.Array
    knobs: Knobs


@dataclasses.dataclass(frozen=True)
class GlmEngine:
    """A `SlotEngine` of one model: numbers only.

    page: tokens of a page. buckets: lengths a chunk is padded to, rising; a longer prompt goes in
    chunks of the last. spans: pages of a row that a call may read, rising; the smallest that holds
    every row is taken, so that short rows do not read to the end of long ones; () is the whole row.
    routes: whether experts are returned. It compiles at most buckets x spans prefills, spans
    decodes and one insert.
    """

    cfg: ModelConfig
    slots: int = 8
    pages: int = 256
    page: int = 16
    max_tokens: int = 512
    buckets: tuple[int, ...] = (16, 64, 256)
    spans: tuple[int, ...] = ()
    routes: bool = False

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
        if self.routes and not self.cfg.n_moe:
            raise ValueError("routes of a model without MoE layers (n_moe = 0); use routes=False")

    @property
    def row_pages(self) -> int:
        """Pages of the longest row."""
        return -(-self.max_tokens // self.page)

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
            layers=self.cfg.n_layers,
            rows=1,
            max_tokens=self.pages * self.page,
            key=key,
            value=value,
            dtype=compute_dtype(self.cfg),
            page=self.page,
        )
        idle = jax.tree.map(jnp.asarray, knobs([Sampling()] * self.slots))
        zeros = functools.partial(jnp.zeros, self.slots, jnp.int32)
        return EngineState(cache.k_LPSKH, cache.v_LPSKH, zeros(), zeros(), zeros(), idle)

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
        if not 1 <= len(tokens) <= self.chunk:
            raise ValueError(
                f"{len(tokens)} tokens are not a chunk of 1 to {self.chunk}; split them, or change "
                "buckets"
            )
        width = next(n for n in self.buckets if n >= len(tokens))
        tokens_1T = np.zeros((1, width), np.int32)
        tokens_1T[0, : len(tokens)] = tokens
        # Only what the chunk reads: a row may own pages further on.
        table_1P = np.full((1, self._span(-(-(start + len(tokens)) // self.page))), self.pages)
        reach = min(len(row), table_1P.shape[1])
        table_1P[0, :reach] = row[:reach]
        state, last = prefill(
            params,
            state,
            tokens_1T,
            np.int32(len(tokens)),
            np.int32(start),
            table_1P.astype(np.int32),
            cfg=self.cfg,
            routes=self.routes,
        )
        if last.routes_TLA is not None:
            last = last.replace(routes_TLA=np.asarray(last.routes_TLA)[: len(tokens)])
        return state, last

    def insert(
        self,
        state: EngineState,
        prefilled: Prefilled,
        *,
        slot: int,
        length: int,
        index: int,
        sampling: Sampling,
        copy: tuple[int, int] | None = None,
    ) -> tuple[EngineState, Step]:
        """A row of `length` tokens takes a slot and draws token `index` of its output."""
        source, target = copy or (0, self.pages)
        numbers = (np.int32(n) for n in (slot, length, index, source, target))
        state, step = insert(state, prefilled.logits_1V, knobs([sampling]), *numbers)
        return state, jax.device_get(step)

    def decode(
        self, params: Params, state: EngineState, table_BP: np.ndarray, active_B: np.ndarray
    ) -> tuple[EngineState, Step]:
        """One more token of every active slot. table_BP: int32, -1 where a row has no page."""
        used = int((table_BP >= 0).sum(axis=1).max())
        table_BP = np.where(table_BP < 0, self.pages, table_BP)[:, : self._span(used)]
        state, step = decode(params, state, table_BP, active_B, cfg=self.cfg, routes=self.routes)
        return state, jax.device_get(step)

    def _span(self, pages: int) -> int:
        spans = (*(n for n in self.spans if n < self.row_pages), self.row_pages)
        return next(n for n in spans if n >= pages)


@functools.partial(jax.jit, static_argnames=("cfg", "routes"), donate_argnames="state")
def prefill(
    params: Params,
    state: EngineState,
    tokens_1T: jax.Array,
    count: jax.Array,
    start: jax.Array,
    table_1P: jax.Array,
    *,
    cfg: ModelConfig,
    routes: bool,
) -> tuple[EngineState, Prefilled]:
    """The state with a chunk's keys and values in it, the logits after its last token, float32, and
    with `routes` the experts of all T tokens.

    tokens_1T: right-padded, `count` of them valid, the first at position `start`. table_1P: pages
    of the row; ids past the last page mean none.
    """
    valid_1T = jnp.arange(tokens_1T.shape[1], dtype=jnp.int32)[None, :] < count
    cache = KVCache(state.k_LPSKH, state.v_LPSKH, table_1P, start[None])
    hidden, cache = transformer.decode(params, tokens_1T, cache, cfg=cfg, valid_BT=valid_1T)
    last_11D = jax.lax.dynamic_slice_in_dim(hidden.hidden_BTD, count - 1, 1, axis=1)
    logits_1V = transformer.logits(params, last_11D, cfg=cfg)[:, 0]
    routes_TLA = chosen(params, hidden, cfg)[0] if routes else None
    state = state.replace(k_LPSKH=cache.k_LPSKH, v_LPSKH=cache.v_LPSKH)
    return state, Prefilled(logits_1V, routes_TLA)


@functools.partial(jax.jit, donate_argnames="state")
def insert(
    state: EngineState,
    logits_1V: jax.Array,
    row: Knobs,
    slot: jax.Array,
    length: jax.Array,
    index: jax.Array,
    source: jax.Array,
    target: jax.Array,
) -> tuple[EngineState, Step]:
    """The state with a prefilled row in `slot`, and token `index` of its output, drawn (B = 1).

    Page `source` is copied to page `target`: the half-filled page of a prompt that several rows
    share. A target past the last page copies nothing.
    """
    draw = sample(logits_1V, row, index[None])

    def copied(page_LPSKH: jax.Array) -> jax.Array:
        return page_LPSKH.at[:, target].set(page_LPSKH[:, source], mode="drop")

    state = state.replace(
        k_LPSKH=copied(state.k_LPSKH),
        v_LPSKH=copied(state.v_LPSKH),
        length_B=state.length_B.at[slot].set(length),
        token_B=state.token_B.at[slot].set(draw.token_B[0]),
        index_B=state.index_B.at[slot].set(index + 1),
        knobs=jax.tree.map(lambda x_B, x_1: x_B.at[slot].set(x_1[0]), state.knobs, row),
    )
    return state, Step(draw)


@functools.partial(jax.jit, static_argnames=("cfg", "routes"), donate_argnames="state")
def decode(
    params: Params,
    state: EngineState,
    table_BP: jax.Array,
    active_B: jax.Array,
    *,
    cfg: ModelConfig,
    routes: bool,
) -> tuple[EngineState, Step]:
    """One step of every active slot: its last token goes into the cache, the next is drawn.

    An active row must have the page its token goes to. Idle rows compute, but store and change
    nothing.
    """
    cache = KVCache(state.k_LPSKH, state.v_LPSKH, table_BP, state.length_B)
    hidden, cache = transformer.decode(
        params, state.token_B[:, None], cache, cfg=cfg, valid_BT=active_B[:, None]
    )
    logits_BV = transformer.logits(params, hidden, cfg=cfg)[:, 0]
    draw = sample(logits_BV, state.knobs, state.index_B)
    state = state.replace(
        k_LPSKH=cache.k_LPSKH,
        v_LPSKH=cache.v_LPSKH,
        length_B=cache.length_B,
        token_B=jnp.where(active_B, draw.token_B, state.token_B),
        index_B=state.index_B + active_B.astype(jnp.int32),
    )
    return state, Step(draw, chosen(params, hidden, cfg)[:, 0] if routes else None)


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
