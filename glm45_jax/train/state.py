"""What a training run carries from step to step, and the numbers that steer it. Types:
`TrainState`, `Train`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from glm45_jax import params as params_lib
from glm45_jax.optim.schedules import BatchRamp, Constant, Schedule, Steps, tokens_zero
from glm45_jax.train.guard import Guard, Level, no_level


@struct.dataclass
class TrainState:
    """step: int32, steps taken or left out. tokens_seen: uint32[2], exact
    (`optim.schedules.tokens_add`). level: of the loss, which `guard` compares with.
    """

    step: jax.Array
    params: Any
    opt: Any
    key: jax.Array
    tokens_seen: jax.Array
    level: Level


@dataclasses.dataclass(frozen=True)
class Train:
    """How a run trains. Schedules are over tokens seen.

    rows: sequences of a global batch at the end of the ramp; start_rows at its start (None: no
    ramp). micro_rows: at most this many sequences a forward pass, over all devices (None: the whole
    batch). save_every 0: only at the end. guard: which steps are left out. hung_after_s: ends the
    process where no step finishes for so many seconds (`train.watchdog`); 0 waits for ever.
    profile: steps, from 1, of which the first host writes a trace (`train.profile`).
    compile_ahead: threads that compile the steps of later batch sizes and stages while earlier ones
    train (`train.ahead`); 0 compiles each where it is first taken.
    Source: spec 5.2; the three switches at 15T tokens are `Steps` values.
    """

    steps: int
    rows: int
    start_rows: int | None = None
    ramp_tokens: float = 0.0
    ramp_multiple: int = 1
    micro_rows: int | None = None
    mtp_weight: Schedule = Steps(((0.0, 0.3), (15e12, 0.1)))
    bias_rate: Schedule = Steps(((0.0, 1e-3), (15e12, 0.0)))
    balance_weight: Schedule = Constant(1e-4)
    log_every: int = 1
    save_every: int = 0
    keep: int = 3
    validate_every: int = 0
    validate_rows: int = 64
    guard: Guard = Guard()
    hung_after_s: float = 0.0
    profile: tuple[int, ...] = ()
    compile_ahead: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 1:
            raise ValueError(f"steps {self.steps} and rows {self.rows} must be positive")
        if self.start_rows is not None and not 1 <= self.start_rows <= self.rows:
            raise ValueError(f"start_rows {self.start_rows} is not between 1 and rows {self.rows}")
        if self.hung_after_s < 0:
            raise ValueError(f"hung_after_s {self.hung_after_s} is negative; 0 waits for ever")
        if self.compile_ahead < 0:
            raise ValueError(f"compile_ahead {self.compile_ahead} is negative; 0 is without")
        if min(self.profile, default=1) < 1:
            raise ValueError(f"profile {self.profile}: steps are counted from 1")

    def ramp(self, seq_len: int) -> BatchRamp:
        """Rows of each step."""
        start = self.rows if self.start_rows is None else self.start_rows
        return BatchRamp(start, self.rows, int(self.ramp_tokens), seq_len, self.ramp_multiple)

    def accum(self, rows: int) -> int:
        """Micro-batches a step of `rows` rows is cut into.

        Raises: ValueError where they do not come out even.
        """
        if self.micro_rows is None or rows <= self.micro_rows:
            return 1
        if rows % self.micro_rows:
            raise ValueError(
                f"a batch of {rows} rows is not a multiple of micro_rows {self.micro_rows}; "
                f"use rows {rows // self.micro_rows * self.micro_rows} or change micro_rows"
            )
        return rows // self.micro_rows


def init_state(specs: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Fresh weights and optimizer, step 0."""
    weights_key, run_key = jax.random.split(key)
    return state_of(tx, params_lib.init(specs, weights_key), run_key)


def state_of(tx: optax.GradientTransformation, params: Any, key: jax.Array) -> TrainState:
    """These weights with a fresh optimizer, step 0."""
    return TrainState(jnp.int32(0), params, tx.init(params), key, tokens_zero(), no_level())
