"""What a rollout leaves behind: `Trajectory`. Numpy only. Letters: T L A."""

from __future__ import annotations

import dataclasses

import numpy as np


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

    def __post_init__(self) -> None:
        T = len(self.tokens_T)
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
