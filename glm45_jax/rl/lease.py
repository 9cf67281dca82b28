"""What the data pool hands over: `Rules`, `Prompt`, `Lease`, `Result`; filters. No jax."""

from __future__ import annotations

import base64
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from glm45_jax.rl.advantage import varies
from glm45_jax.rl.record import from_bytes, plain, to_bytes
from glm45_jax.rl.trajectory import Trajectory

FINAL = ("done", "length")  # statuses of samples that may be trained on

# What became of a lease. waiting: some samples are still wanted; lost: the lease was another's by
# then, or over, and nothing was written.
Outcome = Literal["ready", "waiting", "dropped", "failed", "lost"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Numbers of a pool; another run of the same pool may have others.

    groups: prompts of a batch. staleness: batches that weights may be behind those they train.
    masked: tokens of older weights get no weight (`rl.batch.pack(oldest=)`), so that a continued
    sample is as old as its newest token, not as its oldest. lease_s: seconds without a heartbeat
    after which a lease is given to another. errors: leases of a prompt that may end in an error
    before it is given up. The last two are UNVERIFIED choices.
    """

    groups: int
    staleness: int = 0
    masked: bool = False
    lease_s: float = 600.0
    errors: int = 3

    def __post_init__(self) -> None:
        if self.groups < 1 or self.staleness < 0 or self.lease_s <= 0 or self.errors < 1:
            raise ValueError(f"{self}: groups and errors >= 1, staleness >= 0, lease_s > 0")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A task of an environment, to be sampled `samples` times. key: unique in the pool, and the
    `group` of its trajectories; say "maths/17@2" for the third visit. meta: JSON.
    """

    env: str
    number: int
    samples: int
    key: str
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Why a finished group is not to be trained on, or "" to keep it. Asked again if it fails: pure.
Filter = Callable[[Prompt, Sequence[Trajectory]], str]


@dataclasses.dataclass(frozen=True, eq=False)
class Lease:
    """A prompt that is yours until `expires` (seconds since 1970); heartbeats move that.

    samples: indices that are wanted. begun: what aborted ones of them have so far: tokens,
    log-probs and versions to go on from. token: proves that it is yours.
    """

    prompt: Prompt
    samples: tuple[int, ...]
    begun: Mapping[int, Trajectory]
    token: str
    expires: float

    def seed(self, sample: int) -> int:
        """For the engine's draws, in [0, 2**32): of the key and the sample, so the same in every
        lease. A run that died and goes on by the same weights draws the same.
        """
        return zlib.crc32(f"{self.prompt.key}\0{sample}".encode())

    def to_json(self) -> dict[str, Any]:
        """For the wire; trajectories in base64."""
        begun = {str(j): base64.b64encode(to_bytes(one)).decode() for j, one in self.begun.items()}
        return plain(dataclasses.asdict(dataclasses.replace(self, begun={}))) | {"begun": begun}

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Lease:
        """What `to_json` gave."""
        begun = {int(j): from_bytes(base64.b64decode(text)) for j, text in body["begun"].items()}
        given = {**body, "samples": tuple(body["samples"]), "begun": begun}
        return Lease(**given | {"prompt": Prompt(**body["prompt"])})


@dataclasses.dataclass(frozen=True)
class Result:
    """Rewards of a finished group, kept or dropped. finished: counts up through the run; versions:
    of the oldest and the newest token that was drawn, -1 where none was.
    """

    finished: int
    prompt: Prompt
    rewards: tuple[float, ...]
    state: str
    why: str
    versions: tuple[int, int]


def varied(prompt: Prompt, group: Sequence[Trajectory]) -> str:
    """The filter of dynamic sampling: a group whose rewards agree has no gradient (spec 7.2.2)."""
    return "" if varies(np.array([[one.reward for one in group]]))[0] else "no_variance"
