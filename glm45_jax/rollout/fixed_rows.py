"""An engine cut the way JetStream cuts it: a prompt is read apart from the slots, a slot owns its
pages, and a step tells one token a slot. The type to know is `FixedRows`.

For a driver that knows nothing of pages; ours knows more and shares them. Letters: B slots, P pages
of a row.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from glm45_jax.model.transformer import Params
from glm45_jax.rollout.engine import EngineState, GlmEngine
from glm45_jax.rollout.request import Request
from glm45_jax.rollout.sampling import SEEDS, Sampling
from glm45_jax.rollout.types import Prefilled, Seat, Step

log = logging.getLogger(__name__)

TOLD, VALID, LENGTH = range(3)  # columns of what a step tells


@struct.dataclass
class Prefix:
    """A prompt on its way to a slot. cache: a row's pages. length: of the prompt, 0 where it cannot
    be served and the rest is None.
    """

    length: Any
    cache: EngineState | None = None
    last: Prefilled | None = None


@dataclasses.dataclass(eq=False)
class Row:
    """A slot's row. size: tokens of prompt and output. queue: drawn, not told yet. ended: nothing
    more is drawn.
    """

    size: int = 0
    queue: collections.deque[int] = dataclasses.field(default_factory=collections.deque)
    told: int = 0
    ended: bool = True


@dataclasses.dataclass
class Slots:
    """What passes from step to step, given up to the call that changes it. seated: rows so far."""

    state: EngineState
    rows: list[Row]
    seated: int = 0


class FixedRows:
    """Slots of one sampling. engine: its own `pages` do not matter. sampling: `seed` is of the
    first row, each later one has the next; `max_tokens` does not matter.
    """

    def __init__(self, engine: GlmEngine, sampling: Sampling) -> None:
        pages = engine.row_pages
        self.engine = dataclasses.replace(engine, pages=engine.slots * pages)
        self.single = dataclasses.replace(engine, slots=1, pages=pages)
        self.sampling = sampling

    def init(self) -> Slots:
        """Every slot idle."""
        return Slots(self.engine.init(), [Row() for _ in range(self.engine.slots)])

    def refusal(self, tokens: list[int]) -> str | None:
        """Why a prompt cannot be served; None where it can."""
        return Request(0, tokens, Sampling(max_tokens=1)).refusal(self.engine)

    def prefill(self, params: Params, tokens: list[int]) -> Prefix:
        """The keys and values of a prompt that can be served, in a row of its own."""
        state, row, last = self.single.init(), range(self.single.pages), None
        for start in range(0, len(tokens), self.single.chunk):
            piece = tokens[start : start + self.single.chunk]
            state, last = self.single.prefill(params, state, piece, start, row)
        assert last is not None
        return Prefix(np.int32(len(tokens)), state, last.replace(routes_TLA=None))

    def insert(self, prefix: Prefix, slots: Slots, slot: int) -> Slots:
        """A prompt takes a slot and draws its first token, which the next `generate` tells."""
        length = int(prefix.length)
        row = slots.rows[slot] = Row(size=length)
        if length == 0:
            return slots
        asked = dataclasses.replace(self.sampling, seed=(self.sampling.seed + slots.seated) % SEEDS)
        assert prefix.cache is not None and prefix.last is not None
        state = _with_row(slots.state, prefix.cache, np.int32(slot * self.single.pages))
        slots.state, step = self.engine.insert(state, [Seat(prefix.last, slot, length, 0, asked)])
        slots.seated += 1
        row.ended = False
        self._take(row, jax.device_get(step), 0)
        return slots

    def generate(self, params: Params, slots: Slots) -> tuple[Slots, np.ndarray]:
        """The next token of every slot, int32 [B, 3]: the token, whether there is one, how many
        there were.

        Rows that have one drawn already do not move on: a step may draw several, and `insert` draws
        one. No more valid ones: the row has ended, by a stop id or at its last page.
        """
        active_B = np.asarray([not row.ended and not row.queue for row in slots.rows])
        if active_B.any():
            slots.state, step = self.engine.decode(
                params, slots.state, self._table(slots.rows), active_B
            )
            for b in map(int, np.flatnonzero(active_B)):
                self._take(slots.rows[b], step, b)
        told = np.zeros((len(slots.rows), 3), np.int32)
        for b, row in enumerate(slots.rows):
            if row.queue:
                row.told += 1
                told[b, [TOLD, VALID, LENGTH]] = row.queue.popleft(), 1, row.told
        return slots, told

    def _take(self, row: Row, step: Step, b: int) -> None:
        """None; the row has what a step drew for it, up to what ends it."""
        for place in step.places(b):
            if not math.isfinite(step.draw.logp_raw_B[place]):
                log.error("a row ends at %d tokens: the logits are not finite", row.size)
                row.ended = True
                return
            token = int(step.draw.token_B[place])
            row.queue.append(token)
            row.size += 1
            if token in self.sampling.stop or row.size >= self.engine.max_tokens:
                row.ended = True
                return

    def _table(self, rows: Sequence[Row]) -> np.ndarray:
        """Pages of each slot as far as a step reaches, int32 [B, P]; -1 past that."""
        width = self.engine.row_pages
        table_BP = np.arange(self.engine.pages, dtype=np.int32).reshape(-1, width)
        reach_B = [0 if r.ended else r.size - 1 + self.engine.beyond for r in rows]
        kept_BP = np.arange(width)[None, :] <= np.asarray(reach_B)[:, None] // self.engine.page
        return np.where(kept_BP, table_BP, np.int32(-1))


@functools.partial(jax.jit, donate_argnames="state")
def _with_row(state: EngineState, row: EngineState, first: jax.Array) -> EngineState:
    """The state with all of a row's pages, in its own from `first` on. A leaf's name says where its
    pages are: P in its letters.
    """

    def one(path: tuple[Any, ...], whole: jax.Array, part: jax.Array) -> jax.Array:
        letters = path[-1].name.rpartition("_")[2]
        if "P" not in letters:
            return whole
        return jax.lax.dynamic_update_slice_in_dim(whole, part, first, letters.index("P"))

    return jax.tree_util.tree_map_with_path(one, state, row)
