"""What `bench.rl_smollm2` trains: sizes, arms, and the experiment that each is. Types: `Sizes`,
`Arm`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments import rl_reasoning
from glm45_jax.data.chats import MadeChats
from glm45_jax.envs.types import Env, Message, Part, Task
from glm45_jax.experiment import Experiment, FromRun
from glm45_jax.optim.schedules import Cosine
from glm45_jax.rl.config import Async, Evaluation, Split
from glm45_jax.rl.correction import Tis
from glm45_jax.rollout.weights import Push
from glm45_jax.sharding import MeshShape
from glm45_jax.train.trackers import Untracked

APART = 1_000_000  # between the first prompts of two seeds
MODES = {"direct": False, "thinking": True}


@dataclasses.dataclass(frozen=True)
class Even:
    """The school's tasks, where every other answer is right whatever it says: two samples differ
    soon, also where no model can learn anything yet.
    """

    held_out: bool = False

    def __call__(self) -> Env:
        return dataclasses.replace(
            rl_reasoning.School(self.held_out)(), rewards=(Part("answer", even),)
        )


def even(task: Task, messages: Sequence[Message]) -> float:
    """1 for an even number of characters."""
    del task
    return float(len(str(messages[-1].get("content"))) % 2 == 0)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large all of it is. batches: of an arm, by mode. rows: a batch is padded to a multiple of
    it, by mode, so that nearly all batches have one shape. out: longest answer, by mode. tasks: of
    a score; the stock model, which answers at length, gets a quarter. micro: rows of a forward pass
    of the mixture. slots: all samples of a batch, so that its longest answer is waited for once.
    steps, together: decode steps and prompts of one call of the engine. each_s: of an arm, without
    its scores.
    """

    groups: int = 64
    samples: int = 8
    updates: int = 2
    batches: tuple[int, int] = (60, 40)
    rows: tuple[int, int] = (64, 96)
    out: tuple[int, int] = (32, 224)
    row: int = 512
    micro: int = 32
    tasks: int = 1024
    slots: int = 512
    steps: int = 4
    together: int = 16
    pages: int = 12_288
    buckets: tuple[int, ...] = (96, 224)
    prefill_tokens: int = 32_768
    cold_steps: int = 100
    cold_rows: int = 32
    shown: int = 8000
    lr: float = 4e-5  # some 40 updates have to show what RL gives
    each_s: float = 60.0
    world: type[rl_reasoning.School] | type[Even] = rl_reasoning.School


TINY = Sizes(
    groups=4,
    samples=2,
    updates=1,
    batches=(2, 2),
    rows=(4, 4),
    out=(16, 16),
    row=320,
    micro=4,
    tasks=4,
    slots=4,
    together=2,
    pages=128,
    prefill_tokens=256,
    cold_steps=2,
    cold_rows=4,
    shown=64,
    each_s=1e6,
    world=Even,
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train. told: for the table. change: of the experiment, from GRPO in step."""

    name: str
    told: str
    mode: str = "direct"
    moe: bool = False
    change: Callable[[Experiment], Experiment] = lambda exp: exp

    @property
    def model(self) -> str:
        """Whose cold start it begins with."""
        return "moe" if self.moe else "dense"


def _rl(**changes: Any) -> Callable[[Experiment], Experiment]:
    def change(exp: Experiment) -> Experiment:
        assert exp.rl is not None
        return dataclasses.replace(exp, rl=dataclasses.replace(exp.rl, **changes))

    return change


def arms() -> dict[str, Arm]:
    """By name; async and fp8 differ from `thinking` in one thing each."""
    found = (
        Arm("direct", "dense, direct"),
        Arm("thinking", "dense, thinking", "thinking"),
        Arm("async", "thinking, sampled beside training", "thinking", change=_rl(mode=Async())),
        Arm("fp8", "thinking, FP8 rollouts", "thinking", change=_rl(push=Push(fp8=True))),
        Arm("still", "thinking, learning rate 0", "thinking", change=_still),
        Arm("moe", "8 experts, direct", moe=True),
        Arm("moe_thinking", "8 experts, thinking", "thinking", moe=True),
    )
    return {arm.name: arm for arm in found}


def _still(exp: Experiment) -> Experiment:
    return dataclasses.replace(exp, optim=dataclasses.replace(exp.optim, lr=0.0))


def base(model: str, mode: str, sizes: Sizes, workdir: pathlib.Path) -> Experiment:
    """`experiments.rl_reasoning.smollm2`, or the mixture, at these sizes."""
    exp = rl_reasoning.smollm2_moe() if model == "moe" else rl_reasoning.smollm2()
    assert exp.rl is not None and exp.rl.cold_start is not None
    at = list(MODES).index(mode)
    shown = MadeChats(rl_reasoning.Worked(), sizes.shown, name="worked")
    cold = exp.rl.cold_start
    places = float(sizes.cold_steps * sizes.cold_rows * sizes.row)
    schedule = Cosine(total=places, warmup=0.1 * places, end=0.1)
    micro = sizes.micro if model == "moe" else None
    rl = dataclasses.replace(
        exp.rl,
        update=dataclasses.replace(exp.rl.update, corrections=(Tis(),), micro_rows=micro),
        groups=sizes.groups,
        samples=sizes.samples,
        updates=sizes.updates,
        sampling=dataclasses.replace(exp.rl.sampling, max_tokens=sizes.out[at]),
        serving=dataclasses.replace(
            exp.rl.serving,
            slots=sizes.slots,
            pages=sizes.pages,
            steps=sizes.steps,
            together=sizes.together,
            max_tokens=sizes.row,
            buckets=sizes.buckets,
            prefill_tokens=sizes.prefill_tokens,
            reuse=False,
        ),
        world=sizes.world(),
        evaluation=Evaluation(world=sizes.world(held_out=True), tasks=0),
        most_mismatch=None,  # compared after every batch, and told
        thinking=None if MODES[mode] else False,
        cold_start=dataclasses.replace(
            cold,
            optim=dataclasses.replace(cold.optim, schedule=schedule),
            train=dataclasses.replace(
                cold.train, steps=sizes.cold_steps, rows=sizes.cold_rows, micro_rows=micro
            ),
        ),
    )
    return dataclasses.replace(
        exp,
        name=f"smollm2_{model}_{mode}",
        data=dataclasses.replace(
            exp.data,
            sources=((shown, 1.0),),
            seq_len=sizes.row,
            tokenizer=str(workdir / "tokenizer.json"),
        ),
        optim=dataclasses.replace(exp.optim, lr=sizes.lr),
        train=dataclasses.replace(
            exp.train, steps=sizes.batches[at], rows=sizes.rows[at], save_every=0
        ),
        # No kernel for Hopper was ever run under `pmap`, as rl_reasoning has it.
        mesh=exp.mesh if jax.default_backend() == "cpu" else MeshShape(data=-1, fsdp=1),
        tracker=Untracked(),
        rl=rl,
    )


def experiment(arm: Arm, seed: int, sizes: Sizes, workdir: pathlib.Path) -> Experiment:
    """What one arm runs, from the cold start of its model."""
    exp = base(arm.model, arm.mode, sizes, workdir)
    assert exp.rl is not None
    shown = exp.rl.split.first
    rl = dataclasses.replace(exp.rl, cold_start=None, split=Split(first=shown + APART * seed))
    cold = FromRun(str(cold_folder(arm.model, workdir)))
    return arm.change(
        dataclasses.replace(exp, name=f"smollm2_{arm.name}", seed=seed, init=cold, rl=rl)
    )


def cold_folder(model: str, workdir: pathlib.Path) -> pathlib.Path:
    """Of the cold start of a model."""
    return workdir / f"cold_{model}"
