"""One request from its door to its completion: `Request`. Letters: T tokens of an output, L A, K
best tokens.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from glm45_jax.rollout.pages import Prefix
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Completion, Finish, Piece, SlotEngine, Step

LOOK = 16  # requests of one prompt that are looked through for the next


@dataclasses.dataclass(eq=False)
class Request:
    """What a driver knows of one request. `completion` is None until it ends, and then stays.

    seq: order of arrival. expires: on the driver's clock. slot, pages: while it runs. key: the
    tokens to prefill, while it waits. logp, logp_raw, versions: one each token of `out`; top: ids
    and log-probs of the likeliest there, where the engine says them. routes: experts of the tokens
    in the cache, in pieces. names: of its full pages, as far as they are known. seated: tokens in
    the cache when it last took a slot; tail_TLA: experts of those in the page begun then. arrived,
    admitted, first: when it came, its prompt was begun and its first token drawn, by the driver's
    clock.
    """

    seq: int
    prompt: list[int]
    sampling: Sampling
    expires: float = math.inf
    on_done: Callable[[Completion], None] | None = None
    on_token: Callable[[Request], None] | None = None
    status: Literal["new", "waiting", "running", "done"] = "new"
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    key: bytes = b""
    out: list[int] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)
    logp_raw: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    top: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    routes: list[np.ndarray] = dataclasses.field(default_factory=list)
    names: list[bytes] = dataclasses.field(default_factory=list)
    seated: int = 0
    tail_TLA: np.ndarray | None = None
    arrived: float = 0.0
    admitted: float | None = None
    first: float = 0.0
    completion: Completion | None = None

    @property
    def cached(self) -> int:
        """Tokens in the cache while it runs: all but the last one drawn."""
        return len(self.prompt) + len(self.out) - 1

    def tokens(self) -> list[int]:
        """Prompt and output: what is to be prefilled when it (again) gets a slot."""
        return self.prompt + self.out

    @property
    def length(self) -> int:
        """Of `tokens`."""
        return len(self.prompt) + len(self.out)

    def refusal(self, engine: SlotEngine) -> str | None:
        """Why this engine cannot serve it, with the way out; None where it can."""
        tokens, room = len(self.prompt), engine.max_tokens
        if not tokens:
            return "the prompt is empty; give one token"
        if tokens >= room:
            return f"a prompt of {tokens} tokens leaves no room for an answer; a row holds {room}"
        if tokens + self.sampling.max_tokens > room:
            return (
                f"a prompt of {tokens} tokens and max_tokens {self.sampling.max_tokens} are more "
                f"than the {room} a row holds; use max_tokens {room - tokens}"
            )
        low, high = min(self.prompt), max(self.prompt)
        if low < 0 or high >= engine.vocab:
            bad = low if low < 0 else high
            return f"token {bad} of the prompt is not in [0, {engine.vocab})"
        return None

    def take(self, prefix: Prefix, page: int) -> None:
        """None; it has what is known of the prefix it sits on, in pages of so many tokens. Of the
        experts it keeps those of tokens of which it has none yet: after a preemption the first ones
        stand, they drew the output.
        """
        self.names, self.seated = prefix.names, len(prefix.tokens)
        known = sum(map(len, self.routes))
        if prefix.routes:
            routes_TLA = np.concatenate(prefix.routes)
            self.routes.append(routes_TLA[known:])
            self.tail_TLA = routes_TLA[self.seated // page * page :].copy()

    def routes_since_seated(self) -> np.ndarray | None:
        """Experts of the tokens in the cache, from the page on that was begun when it took its
        slot, by the weights that wrote them there; None where they are not kept.
        """
        if self.tail_TLA is None:
            return None
        return np.concatenate([self.tail_TLA, np.concatenate(self.routes)[self.seated :]])

    def append(self, step: Step, place: Any, version: int) -> Finish | None:
        """What the token at a place of a step ends, if it does; the token is kept either way.

        Raises: ArithmeticError for a log-prob that is not finite; that token is not kept.
        """
        draw = step.draw
        logp, raw = float(draw.logp_B[place]), float(draw.logp_raw_B[place])
        if not (math.isfinite(logp) and math.isfinite(raw)):
            raise ArithmeticError(
                f"log-prob {logp} (raw {raw}) of output token {len(self.out)}, weights of version "
                f"{version}: the logits are not finite; look at the weights"
            )
        token = int(draw.token_B[place])
        self.out.append(token)
        self.logp.append(logp)
        self.logp_raw.append(raw)
        self.versions.append(version)
        if draw.top_ids_BK is not None and draw.top_logp_BK is not None:
            self.top.append((draw.top_ids_BK[place], draw.top_logp_BK[place]))
        if token in self.sampling.stop:
            return "stop"
        return "length" if len(self.out) == self.sampling.max_tokens else None

    def piece(self, start: int) -> Piece:
        """Its output from token `start` on."""
        return Piece(
            np.asarray(self.out[start:], np.int32),
            np.asarray(self.logp[start:], np.float32),
            np.asarray(self.logp_raw[start:], np.float32),
            tuple(self.versions[start:]),
            *self._tops(start),
        )

    def end(self, finish: Finish, error: str = "") -> Completion:
        """Its completion, with what it has; who holds its slot and pages frees them."""
        assert self.completion is None
        self.status = "done"
        ids_TK, logp_TK = self._tops(0)
        self.completion = Completion(
            tokens_T=np.asarray(self.out, np.int32),
            logp_T=np.asarray(self.logp, np.float32),
            logp_raw_T=np.asarray(self.logp_raw, np.float32),
            versions=tuple(self.versions),
            finish=finish,
            error=error,
            routes_TLA=np.concatenate(self.routes) if self.routes else None,
            top_ids_TK=ids_TK,
            top_logp_TK=logp_TK,
        )
        return self.completion

    def _tops(self, start: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not self.top[start:]:
            return None, None
        ids, logps = zip(*self.top[start:], strict=True)
        return np.asarray(ids, np.int32), np.asarray(logps, np.float32)


def key_of(tokens: Sequence[int]) -> bytes:
    """Tokens as something that hashes once."""
    return np.asarray(tokens, np.int32).tobytes()


def others_behind(
    waiting: list[tuple[int, Request]], request: Request, count: int
) -> Iterator[Request]:
    """Requests that wait behind one, of each other prompt the first, in their order; as far as
    `count` prompts may be, whose groups are not larger than `LOOK`. waiting: a heap.
    """
    keys = {request.key}
    for _, one in heapq.nsmallest(LOOK * (count + 1), waiting):
        if one.status == "waiting" and one.key not in keys:
            keys.add(one.key)
            yield one
