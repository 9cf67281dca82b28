"""What a rollout leaves behind: `Trajectory`. Numpy only. Letters: T L A."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

STATUSES = ("done", "length", "aborted", "error")


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """One sample, token by token, as the engine read and drew it; never tokenised again.

    - group: samples of one prompt share it; advantages are within a group.
    - tokens_T: int32, prompt, answers and what the environment said, in order.
    - sampled_T: bool, the policy drew this token. Never the first: nothing comes before it.
    - logp_T: float32, the engine's log-probability when it drew it; elsewhere it means nothing.
    - versions_T: int32, of the weights that drew it; elsewhere it means nothing.
    - reward: of the whole trajectory.
    - routes_TLA: integers, experts that the engine chose for each token, -1 where it read none
      (the last token); None unless asked for.
    - messages: the conversation that was judged, the policy's messages as parsed.
    - parts: named parts of the reward.
    - status: "done"; "length", cut by the longest output; "aborted", it may go on; "error", of the
      environment or the engine, to be left out of training.
    - temperature: over 0, at which the policy's tokens were drawn; logp_T is at it.

    Raises: ValueError where these do not fit together.
    """

    task_id: str
    group: str
    tokens_T: np.ndarray
    sampled_T: np.ndarray
    logp_T: np.ndarray
    versions_T: np.ndarray
    reward: float
    routes_TLA: np.ndarray | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    status: str = "done"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        T = len(self.tokens_T)
        if self.status not in STATUSES:
            raise ValueError(f"{self.task_id}: status {self.status!r} is none of {STATUSES}")
        for name in ("tokens_T", "sampled_T", "logp_T", "versions_T"):
            if (shape := getattr(self, name).shape) != (T,):
                raise ValueError(f"{self.task_id}: {name} is {shape}, tokens_T is ({T},)")
        if self.routes_TLA is not None and self.routes_TLA.shape[0] != T:
            raise ValueError(
                f"{self.task_id}: routes_TLA is {self.routes_TLA.shape}, tokens are {T}; "
                "fill up with -1 where the engine read no token"
            )
        if self.sampled_T.dtype != np.bool_:
            raise ValueError(f"{self.task_id}: sampled_T is {self.sampled_T.dtype}, not bool")
        if T and self.sampled_T[0]:
            raise ValueError(f"{self.task_id}: token 0 is sampled from nothing; keep the prompt")
        if not np.isfinite(self.logp_T[self.sampled_T]).all():
            t = int(np.flatnonzero(self.sampled_T & ~np.isfinite(self.logp_T))[0])
            raise ValueError(f"{self.task_id}: sampled token {t} has log-prob {self.logp_T[t]}")
