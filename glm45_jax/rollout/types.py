"""What crosses the doors of the rollout room: `Completion`, `Piece`, `Stats`, and the two engines,
`Engine` as the rest of the house sees it and `SlotEngine` as the driver sees it.

Letters: B slots, P pages of a row, T tokens of an output, L MoE layers, A, V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from flax import struct

from glm45_jax.rollout.sampling import Draw, Sampling

Finish = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """What became of one request; of a failed or cancelled one, what it had until then.

    tokens_T: int32, the stop id included. logp_T: float32, at the sampling temperature, of the
    whole distribution: what the policy gradient recomputes. logp_raw_T: the same at temperature 1.
    versions: of the weights that drew each token, never falling. error: why, where finish is
    "error". routes_TLA: experts of every token that went through the model, the prompt's and all
    but the last of the output's, None unless asked for.
    """

    tokens_T: np.ndarray
    logp_T: np.ndarray
    logp_raw_T: np.ndarray
    versions: tuple[int, ...]
    finish: Finish
    error: str = ""
    routes_TLA: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """The next tokens of an output that is under way; fields as in `Completion`."""

    tokens_T: np.ndarray
    logp_T: np.ndarray
    logp_raw_T: np.ndarray
    versions: tuple[int, ...]


@dataclasses.dataclass
class Stats:
    """Plain numbers of a driver. The first five are of now, the rest count since its start.

    shared_tokens: prompt tokens that a request took over from another's pages. failures: exceptions
    that came out of the engine.
    """

    waiting: int = 0
    running: int = 0
    free_slots: int = 0
    free_pages: int = 0
    version: int = 0
    ticks: int = 0
    decode_steps: int = 0
    prefill_chunks: int = 0
    prefill_tokens: int = 0
    shared_tokens: int = 0
    output_tokens: int = 0
    submitted: int = 0
    preempted: int = 0
    pushes: int = 0
    failures: int = 0
    stop: int = 0
    length: int = 0
    cancelled: int = 0
    deadline: int = 0
    error: int = 0


@struct.dataclass
class Prefilled:
    """What a prefill leaves for `insert`: scores of the next token (the engine's own affair) and
    the experts of the tokens read, [T, L, A] on the host or None.
    """

    logits_1V: Any
    routes_TLA: Any = None


@struct.dataclass
class Step:
    """One token of every slot, on the host where the driver sees it; rows of idle slots mean
    nothing. routes_BLA: experts of the token that was read, not of the one that was drawn, or None.
    """

    draw: Draw
    routes_BLA: Any = None


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
    tokens of one prefill. A row is a list of page ids, its tokens in order.
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
    def vocab(self) -> int:
        """Token ids are below it."""

    def init(self) -> Any:
        """A state with every slot idle and every page empty."""

    def prefill(
        self, params: Any, state: Any, tokens: Sequence[int], start: int, row: Sequence[int]
    ) -> tuple[Any, Prefilled]:
        """Tokens `start`, `start` + 1, ... of a row written to its pages."""

    def insert(
        self,
        state: Any,
        prefilled: Prefilled,
        *,
        slot: int,
        length: int,
        index: int,
        sampling: Sampling,
        copy: tuple[int, int] | None,
    ) -> tuple[Any, Step]:
        """A row of `length` tokens takes a slot and draws token `index` of its output (a step whose
        B is 1). copy: (from, to), a page to copy first.
        """

    def decode(
        self, params: Any, state: Any, table_BP: np.ndarray, active_B: np.ndarray
    ) -> tuple[Any, Step]:
        """One more token of every active slot. table_BP: int32, -1 where a row has no page."""
