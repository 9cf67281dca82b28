"""Values that change with the tokens seen, the batch-size ramp, and an exact token counter.

A schedule is a frozen value that is called with tokens seen (float32) and gives a float32 scalar;
it traces under `jit`. `BatchRamp` is exact integer arithmetic on the host: the loader and the
checkpoint depend on it. Counters are uint32[2] (high, low), because 23.1T tokens overflow int32 and
float32 loses single tokens at 16.8M.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp

Tokens = jax.Array | float


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same value for ever."""

    value: float = 1.0

    def __call__(self, tokens: Tokens) -> jax.Array:
        """float32 scalar: `value`."""
        return jnp.full_like(_float(tokens), self.value)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear from 0 over `warmup` tokens, half a cosine down to `end` at `total`, then flat.

    The defaults are GLM-4.5's one curve over all stages.
    Source: spec 5.2 (the standard cosine form).
    """

    warmup: float = 8e9  # length UNVERIFIED
    total: float = 23.1e12
    end: float = 0.1

    def __post_init__(self) -> None:
        _check_span(self.warmup, self.total, self.end)

    def __call__(self, tokens: Tokens) -> jax.Array:
        """float32 scalar in [0, 1]."""
        tokens = _float(tokens)
        done = jnp.clip((tokens - self.warmup) / (self.total - self.warmup), 0.0, 1.0)
        after = self.end + 0.5 * (1.0 - self.end) * (1.0 + jnp.cos(math.pi * done))
        return _warmed(tokens, self.warmup, after)


@dataclasses.dataclass(frozen=True)
class Wsd:
    """Warmup, stable at 1, linear to `end` over the last `decay_fraction` of `total`, then flat.

    GLM-4.5 rejected it: models trained so scored lower on SimpleQA and MMLU (spec 5.2). Kept for
    ablations.
    """

    warmup: float
    total: float
    decay_fraction: float = 0.2
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_span(self.warmup, self.total, self.end)
        if not 0.0 < self.decay_fraction <= 1.0 - self.warmup / self.total:
            raise ValueError(
                f"decay_fraction {self.decay_fraction} must be above 0 and leave room for warmup; "
                f"at most {1.0 - self.warmup / self.total}"
            )

    def __call__(self, tokens: Tokens) -> jax.Array:
        """float32 scalar in [0, 1]."""
        tokens = _float(tokens)
        length = self.decay_fraction * self.total
        done = jnp.clip((tokens - (self.total - length)) / length, 0.0, 1.0)
        return _warmed(tokens, self.warmup, 1.0 - (1.0 - self.end) * done)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Piecewise constant: pairs (tokens, value), each value from its tokens on.

    `Steps(((0, 0.3), (15e12, 0.1)))` is GLM-4.5's MTP weight (spec 2.5).
    """

    pieces: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.pieces]
        if not starts or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
            raise ValueError(f"pieces start at {starts}; the first must be 0, the rest must rise")

    def __call__(self, tokens: Tokens) -> jax.Array:
        """float32 scalar: the value of the last piece that has started."""
        tokens = _float(tokens)
        out = jnp.full_like(tokens, self.pieces[0][1])
        for start, value in self.pieces[1:]:
            out = jnp.where(tokens >= start, jnp.float32(value), out)
        return out


Schedule = Constant | Cosine | Wsd | Steps


@dataclasses.dataclass(frozen=True)
class BatchRamp:
    """Rows of the global batch of each step, rising linearly in tokens over `ramp_tokens`.

    Rows are rounded down to a multiple of `multiple_of`; a step compiles once for each distinct row
    count, so keep them few. All arithmetic is in integers. `BatchRamp(n, n, 0, seq_len)` is a
    constant batch.
    Source: 16M to 64M tokens over the first 500B (spec 5.2); linear or in steps is UNVERIFIED.
    """

    start_rows: int
    end_rows: int
    ramp_tokens: int
    seq_len: int
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.start_rows <= self.end_rows or self.seq_len < 1 or self.multiple_of < 1:
            raise ValueError(f"{self}: needs 0 < start_rows <= end_rows, seq_len, multiple_of >= 1")
        if self.start_rows % self.multiple_of or self.end_rows % self.multiple_of:
            raise ValueError(
                f"rows {self.start_rows} to {self.end_rows} are not multiples of "
                f"multiple_of={self.multiple_of}"
            )
        if (self.ramp_tokens > 0) != (self.start_rows < self.end_rows):
            raise ValueError(
                f"{self.start_rows} to {self.end_rows} rows over {self.ramp_tokens} tokens: "
                "give a rise and its length, or neither"
            )

    @functools.cached_property
    def pieces(self) -> tuple[tuple[int, int, int], ...]:
        """(first step, first row, rows) of each run of steps with the same number of rows."""
        step, first, rows = 0, 0, self.start_rows
        out = [(step, first, rows)]
        while rows < self.end_rows:
            # Smallest token count whose linear interpolation reaches the next multiple, rounded up.
            rise = rows + self.multiple_of - self.start_rows
            needed = -(-rise * self.ramp_tokens // (self.end_rows - self.start_rows))
            steps = -(-(needed - first * self.seq_len) // (rows * self.seq_len))
            step, first = step + steps, first + steps * rows
            rows = self._rows_after(first * self.seq_len)
            out.append((step, first, rows))
        return tuple(out)

    def rows_at(self, step: int) -> int:
        """Rows of the global batch of this step (counted from 0)."""
        return self._piece(step)[2]

    def span(self, step: int) -> tuple[int, int]:
        """(first row, rows) of this step: the spans of all steps tile the integers."""
        start, first, rows = self._piece(step)
        return first + (step - start) * rows, rows

    def tokens_at(self, step: int) -> int:
        """Tokens seen before this step, padding included."""
        return self.span(step)[0] * self.seq_len

    def steps_for(self, tokens: int) -> int:
        """Smallest number of steps that see at least `tokens` tokens."""
        if tokens <= 0:
            return 0
        rows_needed = -(-int(tokens) // self.seq_len)
        at = bisect.bisect_left(self.pieces, rows_needed, key=lambda piece: piece[1]) - 1
        start, first, rows = self.pieces[max(at, 0)]
        return start + -(-(rows_needed - first) // rows)

    def _rows_after(self, tokens: int) -> int:
        """Rows of the step that starts at this token."""
        if tokens >= self.ramp_tokens:
            return self.end_rows
        rows = self.start_rows + (self.end_rows - self.start_rows) * tokens // self.ramp_tokens
        return rows // self.multiple_of * self.multiple_of

    def _piece(self, step: int) -> tuple[int, int, int]:
        """The piece that holds this step. Raises: ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step {step} is negative; steps count from 0")
        return self.pieces[bisect.bisect_right(self.pieces, step, key=lambda piece: piece[0]) - 1]


def tokens_zero() -> jax.Array:
    """uint32[2] counter at zero: (high word, low word)."""
    return jnp.zeros((2,), jnp.uint32)


def tokens_add(tokens_2: jax.Array, n: jax.Array | int) -> jax.Array:
    """uint32[2] counter with `n` more tokens, exact.

    n: 0 <= n < 2**63 as a Python int, or a non-negative integer array of at most 32 bits.
    Raises: ValueError for a negative Python int.
    """
    if isinstance(n, int):
        if not 0 <= n < 1 << 63:
            raise ValueError(f"cannot add {n} tokens; a step adds between 0 and 2**63 - 1")
        n_high, n_low = jnp.uint32(n >> 32), jnp.uint32(n & 0xFFFFFFFF)
    else:
        n_high, n_low = jnp.uint32(0), n.astype(jnp.uint32)
    low = tokens_2[1] + n_low  # wraps modulo 2**32
    carry = (low < n_low).astype(jnp.uint32)
    return jnp.stack([tokens_2[0] + n_high + carry, low])


def tokens_float(tokens_2: jax.Array) -> jax.Array:
    """float32 scalar of the counter, to 7 digits: what schedules take."""
    return tokens_2[0].astype(jnp.float32) * 2.0**32 + tokens_2[1].astype(jnp.float32)


def tokens_int(tokens_2: jax.Array) -> int:
    """Python int of the counter, exact; waits for the array."""
    high, low = jax.device_get(tokens_2).tolist()
    return (high << 32) + low


def _float(tokens: Tokens) -> jax.Array:
    return jnp.asarray(tokens, jnp.float32)


def _warmed(tokens: jax.Array, warmup: float, after: jax.Array) -> jax.Array:
    """`tokens / warmup` during warmup, `after` from then on."""
    return jnp.where(tokens < warmup, tokens / max(warmup, 1.0), after)


def _check_span(warmup: float, total: float, end: float) -> None:
    """Raises ValueError where warmup, total and end make no schedule."""
    if not 0 <= warmup < total:
        raise ValueError(f"warmup {warmup} must be at least 0 and below total {total} tokens")
    if not 0 <= end <= 1:
        raise ValueError(f"end {end} is a factor of the peak, between 0 and 1")
