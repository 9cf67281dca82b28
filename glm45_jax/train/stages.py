"""A run as a tuple of `Stage` values over tokens seen, and the one place where they become steps.

Types to know: `Stage` (what is told) and `Span` (what follows: first step, rows of each step). A
switch happens at the first step that starts with at least the tokens of the stages before it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.optim.schedules import BatchRamp


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    tokens: how many it sees. mixture: (source name, weight) pairs. batch_tokens: tokens of a global
    batch, a multiple of seq_len; it starts at start_batch_tokens (None: no ramp) and rises over
    ramp_tokens of the stage, in multiples of ramp_multiple rows.
    Source: spec 5.1, 5.2.
    """

    name: str
    tokens: float
    seq_len: int
    mixture: tuple[tuple[str, float], ...]
    packing: Cut | BestFit
    rope_theta: float
    bias_rate: float
    mtp_weight: float
    batch_tokens: int
    start_batch_tokens: int | None = None
    ramp_tokens: float = 0.0
    ramp_multiple: int = 1

    def __post_init__(self) -> None:
        if self.tokens <= 0 or self.seq_len < 2:
            raise ValueError(f"stage {self.name}: {self.tokens} tokens in rows of {self.seq_len}")
        for size in (self.batch_tokens, self.start_batch_tokens or self.batch_tokens):
            if size < self.seq_len or size % self.seq_len:
                raise ValueError(
                    f"stage {self.name}: a batch of {size} tokens is no multiple of seq_len "
                    f"{self.seq_len}; use {max(1, size // self.seq_len) * self.seq_len}"
                )
        if not self.mixture or min(weight for _, weight in self.mixture) <= 0:
            raise ValueError(f"stage {self.name}: mixture {self.mixture}; weights are above 0")

    @property
    def facts(self) -> dict[str, float]:
        """What the metrics of its steps say of it."""
        return {
            "seq_len": float(self.seq_len),
            "rope_theta": self.rope_theta,
            "bias_rate": self.bias_rate,
            "mtp_weight": self.mtp_weight,
        }

    @functools.cached_property
    def ramp(self) -> BatchRamp:
        """Rows of each step, counted from the start of the stage."""
        start = self.start_batch_tokens or self.batch_tokens
        rows = self.seq_len
        return BatchRamp(
            start // rows,
            self.batch_tokens // rows,
            int(self.ramp_tokens),
            rows,
            self.ramp_multiple,
        )


@dataclasses.dataclass(frozen=True)
class Span:
    """Steps of a run that train alike: first_step up to, not including, end_step.

    ramp: rows of each step, counted from first_step. stage: None in a run without stages.
    """

    ramp: BatchRamp
    first_step: int
    end_step: int
    first_tokens: int = 0
    stage: Stage | None = None

    def rows(self, step: int) -> tuple[int, int]:
        """(first row, rows) of a step of the run; rows are counted within the span."""
        return self.ramp.span(step - self.first_step)

    def tokens_at(self, step: int) -> int:
        """Tokens the run has seen before this step."""
        return self.first_tokens + self.ramp.tokens_at(step - self.first_step)

    def sizes(self) -> list[tuple[int, int]]:
        """(first step of the run, rows) of each size of the batch."""
        found = [(self.first_step + first, rows) for first, _, rows in self.ramp.pieces]
        return [(first, rows) for first, rows in found if first < self.end_step]


def spans(stages: tuple[Stage, ...]) -> tuple[Span, ...]:
    """The stages one after another.

    A stage ends with the step that completes its tokens, counted from the start of the run: what
    the batch makes one stage see too much, the next sees less.
    """
    out: list[Span] = []
    step = tokens = 0
    for index, stage in enumerate(stages):
        wanted = math.ceil(sum(s.tokens for s in stages[: index + 1])) - tokens
        steps = max(1, stage.ramp.steps_for(wanted))
        out.append(Span(stage.ramp, step, step + steps, tokens, stage))
        step, tokens = step + steps, tokens + stage.ramp.tokens_at(steps)
    return tuple(out)


def total_steps(stages: tuple[Stage, ...]) -> int:
    """Steps of all stages."""
    return spans(stages)[-1].end_step


def scaled(
    stages: tuple[Stage, ...],
    *,
    tokens: float,
    batch_tokens: int,
    seq_len: int,
    least_steps: int = 1,
) -> tuple[Stage, ...]:
    """The same recipe in small: every ratio of tokens, batches and lengths is kept.

    tokens: of all stages together. batch_tokens: of the full batch; seq_len: of the first stage.
    least_steps: a stage that would come out shorter gets this many steps of its batch, the one
    ratio that is given up.
    """
    total, first = sum(s.tokens for s in stages), stages[0]
    largest = max(s.batch_tokens for s in stages)
    out = []
    for s in stages:
        length = s.seq_len * seq_len // first.seq_len
        size = _rounded(s.batch_tokens * batch_tokens / largest, length)
        change: dict[str, Any] = {"seq_len": length, "batch_tokens": size}
        change["tokens"] = max(s.tokens * tokens / total, float(least_steps * size))
        if s.start_batch_tokens is not None:
            change["start_batch_tokens"] = _rounded(
                s.start_batch_tokens * batch_tokens / largest, length
            )
            change["ramp_tokens"] = s.ramp_tokens * tokens / total
            change["ramp_multiple"] = max(
                1, round(s.ramp_multiple * (size / length) / (s.batch_tokens / s.seq_len))
            )
        out.append(dataclasses.replace(s, **change))
    return tuple(out)


def _rounded(tokens: float, seq_len: int) -> int:
    """The nearest batch of whole rows, at least one."""
    return max(1, round(tokens / seq_len)) * seq_len
