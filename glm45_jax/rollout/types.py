"""What crosses the doors of the rollout room: `Completion`, `Piece`, `Stats`, and the two engines,
`Engine` as the rest of the house sees it and `SlotEngine` as the driver sees it.

Letters: B slots, P pages of a row, T tokens of an output, L MoE layers, A, V, K best tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from flax import struct

from glm45_jax.rollout.sampling import Draw, Sampling

Finish = Literal["stop", "length", "cancelled", "deadline", "error"]

# What an engine may raise for a request or a device (jax's own errors are among them). Any other is
# a bug in this room.
ENGINE_ERRORS = (
    *(ValueError, TypeError, RuntimeError, ArithmeticError),
    *(LookupError, MemoryError, OSError, AttributeError),
)

# What a push does to running rows: they end before it, go on over the keys they have, or have them
# made anew.
Policy = Literal["drain", "in_flight", "abort_and_resume"]


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """What became of one request; of a failed or cancelled one, what it had until then.

    tokens_T: int32, the stop id included. logp_T: float32, at the sampling temperature, of the
    whole distribution: what the policy gradient recomputes. logp_raw_T: the same at temperature 1.
    versions: of the weights that drew each token, never falling. error: why, where finish is
    "error". routes_TLA: experts of every token that went through the model, the prompt's and all
    but the last of the output's, None unless asked for. top_ids_TK, top_logp_TK: the K likeliest
    tokens at each place, best first, int32, and their log-probs at temperature 1, float32; None
    where the engine's `top_logprobs` is 0, or there is no token.
    """

    tokens_T: np.ndarray
    logp_T: np.ndarray
    logp_raw_T: np.ndarray
    versions: tuple[int, ...]
    finish: Finish
    error: str = ""
    routes_TLA: np.ndarray | None = None
    top_ids_TK: np.ndarray | None = None
    top_logp_TK: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """The next tokens of an output that is under way; fields as in `Completion`."""

    tokens_T: np.ndarray
    logp_T: np.ndarray
    logp_raw_T: np.ndarray
    versions: tuple[int, ...]
    top_ids_TK: np.ndarray | None = None
    top_logp_TK: np.ndarray | None = None


@dataclasses.dataclass
class Stats:
    """Plain numbers of a driver: down to `version` those of now, the rest count since its start.

    kept_pages: of the free ones, those that later requests may find. shared_tokens: prompt tokens
    that a request took over from one that waited beside it. reused_tokens: those that began a row
    and were found in kept pages, `prefix_hits` times. failures: exceptions that came out of the
    engine. drafted: times that all drafts of a row were verified; accepted_1, _2, _3: times of
    these that the first was right, the first two, all three.
    """

    waiting: int = 0
    running: int = 0
    free_slots: int = 0
    free_pages: int = 0
    kept_pages: int = 0
    version: int = 0
    ticks: int = 0
    decode_steps: int = 0
    prefill_chunks: int = 0
    prefill_tokens: int = 0
    shared_tokens: int = 0
    reused_tokens: int = 0
    prefix_hits: int = 0
    output_tokens: int = 0
    drafted: int = 0
    accepted_1: int = 0
    accepted_2: int = 0
    accepted_3: int = 0
    submitted: int = 0
    preempted: int = 0
    pushes: int = 0
    failures: int = 0
    stop: int = 0
    length: int = 0
    cancelled: int = 0
    deadline: int = 0
    error: int = 0

    def count_drafts(self, count_R: np.ndarray) -> None:
        """None; rows that had room for all drafts of a step drew so many tokens each."""
        self.drafted += len(count_R)
        self.accepted_1 += int((count_R > 1).sum())
        self.accepted_2 += int((count_R > 2).sum())
        self.accepted_3 += int((count_R > 3).sum())


@struct.dataclass
class Prefilled:
    """What a prefill leaves for `insert`: scores of the next token and, for drafts, what they came
    from (the engine's own affair); the experts of the tokens read, [T, L, A] on the host or None.
    """

    logits_1V: Any
    routes_TLA: Any = None
    hidden_1D: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Seat:
    """A row of `length` tokens that takes a slot and draws token `index` of its output. copy: a
    page, and where to copy it for this row.
    """

    prefilled: Prefilled
    slot: int
    length: int
    index: int
    sampling: Sampling
    copy: tuple[int, int] | None = None


@struct.dataclass
class Step:
    """The next token of every slot, on the host where the driver sees it; rows of idle slots mean
    nothing. routes_BLA: experts of the token that was read, not of the one that was drawn, or None.

    count_B: None for one token each. A step that may draw more says how many each slot got, at
    least one, and every other leaf has an axis after B that holds them in order.
    """

    draw: Draw
    routes_BLA: Any = None
    count_B: Any = None

    def places(self, row: int) -> list[Any]:
        """Where a slot's tokens lie in the leaves, in order: what to index them with."""
        if self.count_B is None:
            return [row]
        return [(row, i) for i in range(int(self.count_B[row]))]


class Engine(Protocol):
    """Tokens in, tokens out: the one seam to swap."""

    async def generate(self, tokens: Sequence[int], sampling: Sampling) -> Completion:
        """The continuation of a prompt."""

    async def update(self, params: Any, version: int) -> None:
        """Returns when every later token is drawn by these weights."""


class SlotEngine(Protocol):
    """Prefill, insert, decode as functions of (params, state); the driver owns both, and what page
    holds what.

    page, pages: tokens of a page, pages there are. max_tokens: that one row may hold. chunk: most
    tokens of one prefill. seats: most rows of one insert. beyond: tokens that a call of `decode`
    may draw beyond one, where the row has pages for them; draft: those of them that are drafted
    first. A row is a list of page ids, its tokens in order.
    """

    @property
    def slots(self) -> int:
        """Rows that decode together."""

    @property
    def page(self) -> int:
        """Tokens of a page."""

    @property
    def pages(self) -> int:
        """Pages there are."""

    @property
    def max_tokens(self) -> int:
        """Tokens that one row may hold."""

    @property
    def chunk(self) -> int:
        """Most tokens of one prefill."""

    @property
    def together(self) -> int:
        """Most prompts of one `prefill_whole`."""

    @property
    def seats(self) -> int:
        """Most rows of one `insert`."""

    @property
    def beyond(self) -> int:
        """Tokens that a call of `decode` may draw beyond one."""

    @property
    def draft(self) -> int:
        """Tokens that are drafted in a step."""

    @property
    def vocab(self) -> int:
        """Token ids are below it."""

    def init(self) -> Any:
        """A state with every slot idle and every page empty."""

    def prefill(
        self, params: Any, state: Any, tokens: Sequence[int], start: int, row: Sequence[int]
    ) -> tuple[Any, Prefilled]:
        """Tokens `start`, `start` + 1, ... of a row written to its pages."""

    def prefill_whole(
        self,
        params: Any,
        state: Any,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
    ) -> tuple[Any, list[Prefilled]]:
        """Prompts of at most a chunk, at most `together`, each whole, to the pages of its row."""

    def insert(self, state: Any, seats: Sequence[Seat]) -> tuple[Any, Step]:
        """Rows take slots, at most `seats` of them, and draw a token each (a step whose B is their
        number, or more; it may still be on the device). All pages are read before one is written.
        """

    def decode(
        self, params: Any, state: Any, table_BP: np.ndarray, active_B: np.ndarray
    ) -> tuple[Any, Step]:
        """The next tokens of every active slot. table_BP: int32, -1 where a row has no page; it has
        one for the last token drawn.
        """
