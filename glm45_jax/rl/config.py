"""What an RL run is told, as values: `Rl` and its parts. Numbers and named functions only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from glm45_jax.envs.types import Env
from glm45_jax.model.config import ModelConfig
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.rl import advantage
from glm45_jax.rl.alarms import RULES, Rule
from glm45_jax.rl.correction import compares_with_engine
from glm45_jax.rl.curriculum import HARD, MODERATE, Stage
from glm45_jax.rl.temperature import Dynamic
from glm45_jax.rl.update import Update
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.weights import Push
from glm45_jax.train.state import Train

LEAST_STORE = 75 * 2**20  # bytes; Ray refuses less


@dataclasses.dataclass(frozen=True)
class Sync:
    """Sample a batch, train on it, push, and again, on the same devices: every trained token is of
    the weights that it trains, which is asserted.
    """

    @property
    def staleness(self) -> int:
        """Batches that weights may be behind those they train."""
        return 0


@dataclasses.dataclass(frozen=True)
class Async:
    """Sample while the trainer trains. staleness: batches that sampling weights may be behind.

    thread: sampling has a thread of its own; else it stands still during a step, which is slower
    and the same every time. devices: the last so many of this host are the engine's alone; 0: it
    shares the trainer's.
    """

    staleness: int = 1
    thread: bool = True
    devices: int = 0

    def __post_init__(self) -> None:
        if self.staleness < 1 or self.devices not in (0, 1):
            raise ValueError(
                f"{self}: staleness must be at least 1 (0 is Sync()), devices 0 or 1: an engine "
                "has one device"
            )


@dataclasses.dataclass(frozen=True)
class Here:
    """One engine and the worlds, in the trainer's process."""


@dataclasses.dataclass(frozen=True)
class Ray:
    """Engines and worlds in processes of their own, on this host or many, by Ray (`rl.cluster`).

    engines: each with `serving` of its own, and with cpus and gpus of its own (Ray's resources;
    gpus 0: on CPU). worlds: processes of one cpu that step and judge; 0: the engines' processes do.
    restarts: how often an engine may die between two pushes of weights; once more ends the run, and
    so does a prompt that kills whoever samples it. patience_s: in which an engine answers, its
    start and a push included; one that does not is taken for dead. store_bytes: of the object
    store, where this run starts Ray itself; three versions of the weights have room in it, or Ray
    spills to disk. The last three are UNVERIFIED.
    """

    engines: int = 1
    worlds: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    restarts: int = 3
    patience_s: float = 600.0
    store_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.engines < 1 or min(self.worlds, self.restarts) < 0 or self.patience_s <= 0:
            raise ValueError(f"{self}: engines >= 1, worlds and restarts >= 0, patience_s > 0")
        if min(self.cpus, self.gpus) < 0 or self.store_bytes < LEAST_STORE:
            raise ValueError(f"{self}: cpus and gpus >= 0, store_bytes >= {LEAST_STORE}")


@dataclasses.dataclass(frozen=True)
class Serving:
    """Sizes of the rollout engine; fields as in `rollout.engine.GlmEngine`.

    prefill_tokens: prompt tokens of a tick. reuse: of pages over requests.
    """

    slots: int = 64
    pages: int = 1024
    page: int = 16
    max_tokens: int = 512
    buckets: tuple[int, ...] = (16, 64, 256)
    spans: tuple[int, ...] = ()
    draft: int = 0
    steps: int = 1
    together: int = 1
    kv_dtype: str | None = None
    prefill_tokens: int = 1024
    reuse: bool = True

    def engine(self, cfg: ModelConfig, *, routes: bool) -> GlmEngine:
        """The engine of a model."""
        names = {f.name for f in dataclasses.fields(GlmEngine)}
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}
        return GlmEngine(cfg, routes=routes, **sizes)


@dataclasses.dataclass(frozen=True)
class Split:
    """Which numbers of the world's tasks are trained on: from `first` on, `train` different ones,
    each visited once before any is visited again; None: without end. verified: their answers are,
    for the curriculum.
    """

    first: int = 256
    train: int | None = None
    verified: bool = False

    def number(self, n: int) -> tuple[int, int]:
        """(task, earlier visits) of the n-th prompt of a run that takes them in order."""
        visit, at = (0, n) if self.train is None else divmod(n, self.train)
        return self.first + at, visit


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """Supervised steps on the run's own data before the first batch. Source: spec 7.1.1."""

    optim: Muon | AdamW
    train: Train


@dataclasses.dataclass(frozen=True)
class Grades:
    """Tasks by difficulty (`rl.curriculum`). A stage ends where the mean reward over `window`
    batches has a slope within ± tolerance a batch; both UNVERIFIED. probe_samples: of each batch at
    most so many more, which are not trained, where a stage needs to know of tasks what the trained
    samples do not tell: of 8 that fail nobody knows pass@512. 0: none, and the nearest tasks that
    are known fill up (UNVERIFIED: the paper does not say how its second stage was found).
    """

    stages: tuple[Stage, ...] = (MODERATE, HARD)
    window: int = 50
    tolerance: float = 1e-3
    probe_samples: int = 256


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out tasks every so many batches, and before and after. every: 0: before and after only.

    tasks: 0 to tasks - 1, of `world`, or of the world that is trained on, below `split.first`.
    samples: of each, at the temperature of training; greedy: one more at temperature 0. max_tokens
    is that of training. canaries: so many of the tasks once more with the answer of another one, to
    see whether wrong answers are paid for (`alarms.Canary`); only after batches.
    """

    world: Callable[[], Env] | None = None
    every: int = 0
    tasks: int = 256
    samples: int = 1
    greedy: bool = True
    canaries: int = 0


@dataclasses.dataclass(frozen=True)
class Rl:
    """One RL run over one world. The paper's settings are the defaults where it says them (spec
    7.2); where it does not, those of slime's GLM-4.7 script (UNVERIFIED for GLM-4.5).

    world: gives the `Env`: a function at the top of its module, or a frozen dataclass that is
    called. update: what a token costs, replay of the engine's experts (R3), micro-batches. groups:
    prompts of a batch; samples: of each. sampling: temperature and longest output, over all turns;
    the format says where a turn stops. where: engines and worlds are. split, grades: which tasks;
    grades None takes them in order. rule: rewards to advantages. updates: optimizer steps that
    share a batch, with whole groups. recompute: the trainer's own log-probs stand for the old
    policy, which corrections need; else the engine's word. most_mismatch: KL of engine to trainer,
    in nats a token, of tokens drawn by the very weights that are trained, beyond which the run
    ends; None looks away. dynamic: groups that agree are replaced by others, at most `most_dropped`
    times a batch; oversample: of those that will be dropped, by the share that was so far, the part
    that is begun at once and not when they are missed: 1 fills a batch in a wave or two, for some
    groups too many, which sync mode samples anew for the next batch. temperature: how it rises when
    the reward stands still. alarms: of reward hacking, which are logged. judges: threads in which
    worlds step and judge, for those that run programs; 0: between two steps of the engine.
    thinking, family: of the chat format. cold_start: what comes before the first batch.
    """

    world: Callable[[], Env]
    sampling: Sampling
    serving: Serving
    update: Update = Update()
    groups: int = 128
    samples: int = 8
    mode: Sync | Async = Sync()
    where: Here | Ray = Here()
    push: Push = Push()
    split: Split = Split()
    grades: Grades | None = None
    evaluation: Evaluation = Evaluation()
    rule: advantage.Rule = advantage.Centred()
    updates: int = 1
    recompute: bool = True
    most_mismatch: float | None = 1e-2
    dynamic: bool = True
    most_dropped: float = 20.0
    oversample: float = 0.0
    temperature: Dynamic | None = None
    alarms: tuple[Rule, ...] = RULES
    judges: int = 0
    thinking: bool | None = None
    family: str = "glm-4.5"
    cold_start: ColdStart | None = None

    def __post_init__(self) -> None:
        if self.groups < 1 or self.samples < 2:
            raise ValueError(
                f"groups {self.groups}, samples {self.samples}: a batch needs a group, and a group "
                "two samples to differ"
            )
        if not 0 <= self.oversample <= 1:
            raise ValueError(
                f"oversample {self.oversample} is not in 0 to 1: a part of the dropped"
            )
        if not 1 <= self.updates <= self.groups:
            raise ValueError(f"updates {self.updates} of {self.groups} groups: each needs one")
        if not self.recompute and any(map(compares_with_engine, self.update.corrections)):
            raise ValueError(
                f"{self.update.corrections} compare the engine with the trainer's own log-probs: "
                "use recompute=True"
            )
        if self.evaluation.world is None and self.evaluation.tasks > self.split.first:
            raise ValueError(
                f"evaluation.tasks {self.evaluation.tasks} reach into those that are trained on, "
                f"from split.first {self.split.first} on"
            )
        asynchronous = isinstance(self.mode, Async)
        if isinstance(self.where, Ray) and asynchronous and self.mode != Async(self.mode.staleness):
            raise ValueError(
                f"{self.mode} with {self.where}: engines of Ray sample by themselves and on "
                f"devices of their own; use Async({self.mode.staleness})"
            )
        if self.grades is not None and self.split.train is None:
            raise ValueError("grades need to know how many tasks there are; set split.train")
        asked = self.sampling
        if asked.temperature == 0 or (asked.top_p, asked.top_k, asked.min_p) != (1.0, 0, 0.0):
            raise ValueError(
                f"{asked}: samples are drawn from the whole distribution at a temperature above 0; "
                "else their log-probs are not those of the policy that is trained"
            )
        if asked.max_tokens >= self.serving.max_tokens:
            raise ValueError(
                f"sampling.max_tokens {asked.max_tokens} leaves no room for a prompt in rows of "
                f"serving.max_tokens {self.serving.max_tokens}"
            )

    def check_row(self, seq_len: int) -> None:
        """None. Raises: ValueError where a packed row does not hold the longest episode."""
        if seq_len < self.serving.max_tokens:
            raise ValueError(
                f"data.seq_len {seq_len} is shorter than rl.serving.max_tokens "
                f"{self.serving.max_tokens}: a packed row has to hold the longest episode"
            )
