"""One request from its door to its completion: `Request`. Letters: T tokens of an output, L A."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from glm45_jax.rollout.pages import Prefix
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Completion, Finish, Piece, SlotEngine, Step


@dataclasses.dataclass(eq=False)
class Request:
    """What a driver knows of one request. `completion` is None until it ends, and then stays.

    seq: order of arrival. expires: on the driver's clock. slot, pages: while it runs. key: the
    tokens to prefill, while it waits. logp, logp_raw, versions: one each token of `out`. routes:
    experts of the tokens in the cache, in pieces.
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
    routes: list[np.ndarray] = dataclasses.field(default_factory=list)
    completion: Completion | None = None

    @property
    def cached(self) -> int:
        """Tokens in the cache while it runs: all but the last one drawn."""
        return len(self.prompt) + len(self.out) - 1

    def tokens(self) -> list[int]:
        """Prompt and output: what is to be prefilled when it (again) gets a slot."""
        return self.prompt + self.out

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

    def take(self, prefix: Prefix) -> None:
        """None; keeps the experts of tokens of which it has none yet: after a preemption the first
        ones stand, they drew the output.
        """
        known = sum(map(len, self.routes))
        if prefix.routes:
            self.routes.append(np.concatenate(prefix.routes)[known:])

    def append(self, step: Step, row: int, version: int) -> Finish | None:
        """What the token ends, if it does; the token is kept either way.

        Raises: ArithmeticError for a log-prob that is not finite; that token is not kept.
        """
        logp, raw = float(step.draw.logp_B[row]), float(step.draw.logp_raw_B[row])
        if not (math.isfinite(logp) and math.isfinite(raw)):
            raise ArithmeticError(
                f"log-prob {logp} (raw {raw}) of output token {len(self.out)}, weights of version "
                f"{version}: the logits are not finite; look at the weights"
            )
        token = int(step.draw.token_B[row])
        self.out.append(token)
        self.logp.append(logp)
        self.logp_raw.append(raw)
        self.versions.append(version)
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
        )

    def end(self, finish: Finish, error: str = "") -> Completion:
        """Its completion, with what it has; who holds its slot and pages frees them."""
        assert self.completion is None
        self.status = "done"
        self.completion = Completion(
            tokens_T=np.asarray(self.out, np.int32),
            logp_T=np.asarray(self.logp, np.float32),
            logp_raw_T=np.asarray(self.logp_raw, np.float32),
            versions=tuple(self.versions),
            finish=finish,
            error=error,
            routes_TLA=np.concatenate(self.routes) if self.routes else None,
        )
        return self.completion


def key_of(tokens: Sequence[int]) -> bytes:
    """Tokens as something that hashes once."""
    return np.asarray(tokens, np.int32).tobytes()
