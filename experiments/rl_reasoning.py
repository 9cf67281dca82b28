"""Reasoning RL: `tiny` (two-digit sums, a CPU, minutes), `smollm2` and `smollm2_moe` (a real model,
one H100, planned), `glm45_air`, `glm45` (clusters, planned).

`tiny` begins with demonstrations of which 3 in 10 are right and the others never carry. RL then
selects what these show; it does not discover how to carry. The large ones are plans: the paper's
numbers where it says them (spec 7.2), else those of slime's GLM-4.7 script. Their rollouts need an
engine over many devices, which is not there yet.
"""

import ast
import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any

from glm45_jax.data.chats import MadeChats
from glm45_jax.data.prepare import Data
from glm45_jax.data.sft import Chats
from glm45_jax.data.sources import TextFiles
from glm45_jax.envs import arithmetic, code, math, reasoning, science
from glm45_jax.envs.files import held
from glm45_jax.envs.mixed import mix, split
from glm45_jax.envs.types import Env, Message
from glm45_jax.experiment import Experiment, FromRun, FromSmolLM2, run_rl
from glm45_jax.hf import smollm2 as smol
from glm45_jax.model import config
from glm45_jax.model.config import Gqa, ModelConfig, Moe
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant, Cosine
from glm45_jax.rl.config import ColdStart, Evaluation, Grades, Ray, Rl, Serving, Split
from glm45_jax.rl.correction import Tis
from glm45_jax.rl.lengths import OUTPUT_TOKENS
from glm45_jax.rl.temperature import Dynamic
from glm45_jax.rl.update import Update
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.weights import Push
from glm45_jax.sharding import MeshShape
from glm45_jax.train.parallel import Pmap
from glm45_jax.train.state import Train

BYTES_AND_TOKENS = 256 + 36  # a tokenizer without merges: every digit is a token
GLM_VOCAB = 151_365  # ids of the released tokenizer
PROMPT_TOKENS = 8192  # of the longest prompt; UNVERIFIED
MTP_WEIGHT = 0.2  # of the drafter, trained online (spec 8)
ROW, SMOL_ROW = 256, 512
HELD_OUT_SHARE = 1 / 8  # of the school; that of `mixed.split`
# Nearly all of the 7,000 sums that are not held out, drawn with replacement; and how many rows of
# the cold start show them right.
DEMONSTRATIONS, RIGHT = 20_000, 0.3


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of two numbers of so many digits."""

    digits: int = 2
    held_out: bool = False
    seed: int = 0

    def __call__(self) -> Env:
        return arithmetic.env(digits=self.digits, held_out=self.held_out, seed=self.seed)


@dataclasses.dataclass(frozen=True)
class Shown:
    """Demonstrations of `world`. carries: else digits are added one by one, and 27+35= is 52."""

    world: Sums = Sums(seed=1)
    carries: bool = True

    def __call__(self, n: int) -> list[dict[str, str]]:
        task = self.world().tasks(n)
        left, right = task.id.removesuffix("=").split("+")
        digits = [str((int(a) + int(b)) % 10) for a, b in zip(left, right, strict=True)]
        answer = str(task.answer) if self.carries else "".join(digits)
        return [
            {"role": "user", "content": task.id},
            {"role": "assistant", "content": answer},
        ]


@dataclasses.dataclass(frozen=True)
class Verified:
    """Mathematics, code and science with programmatic rewards, alike often. The files are yours to
    put under tasks/; a share of each is held out. Source: spec 7.2.
    """

    held_out: bool = False

    def __call__(self) -> Env:
        worlds = [
            math.env("tasks/math.jsonl", held_out=self.held_out),
            code.env("tasks/code.jsonl", held_out=self.held_out),
            science.env("tasks/science.jsonl", held_out=self.held_out),
        ]
        return mix(worlds, name="reasoning")


def tiny() -> Experiment:
    """Two-digit sums by a GLM of 0.2M parameters: cold start, then 60 batches of 64 x 8 samples."""
    steps, rows = 500, 20
    places = float(steps * rows * ROW)
    cosine = Cosine(warmup=0.02 * places, total=places, end=0.0)
    return Experiment(
        name="rl_tiny",
        model=ModelConfig(
            vocab=BYTES_AND_TOKENS,
            d_model=64,
            n_dense=1,
            n_moe=1,
            n_mtp=0,
            d_mlp=192,
            mixer=Gqa(heads=4, kv_heads=2, head_dim=16, rope_theta=1e4),
            moe=Moe(experts=8, top_k=2, d_expert=64, scale=1.0),
            dtype="float32",
            remat="none",
        ),
        data=Chats(
            sources=(
                (MadeChats(Shown(), DEMONSTRATIONS, name="right"), RIGHT),
                (MadeChats(Shown(carries=False), DEMONSTRATIONS, name="carryless"), 1 - RIGHT),
            ),
            seq_len=ROW,
            vocab=BYTES_AND_TOKENS,
        ),
        optim=AdamW(lr=3e-4, schedule=Constant(), b2=0.999, weight_decay=0.0),
        train=Train(
            steps=60, rows=24, mtp_weight=Constant(0.0), bias_rate=Constant(0.0), save_every=20
        ),
        mesh=Pmap(1),
        rl=Rl(
            world=Sums(),
            groups=64,
            samples=8,
            sampling=Sampling(max_tokens=8),
            serving=Serving(
                slots=128, pages=1024, page=8, max_tokens=32, buckets=(16, 32), reuse=False
            ),
            split=Split(first=0),
            evaluation=Evaluation(world=Sums(held_out=True), tasks=512, every=10),
            dynamic=False,
            thinking=False,
            cold_start=ColdStart(
                optim=Muon(lr=5e-3, schedule=cosine, dtype="float32"),
                train=Train(
                    steps=steps,
                    rows=rows,
                    mtp_weight=Constant(0.0),
                    bias_rate=Constant(1e-3),
                    validate_every=100,
                    validate_rows=20,
                ),
            ),
        ),
        run=run_rl,
    )


def tiny_ray() -> Experiment:
    """`tiny` with two engines and two processes of worlds by Ray: launch/ray.sh, or by itself."""
    exp = tiny()
    assert exp.rl is not None
    where = Ray(engines=2, worlds=2, store_bytes=2**28)
    return dataclasses.replace(exp, rl=dataclasses.replace(exp.rl, where=where))


# Sums of up to four numbers of up to three digits, small formulas with brackets, products of two
# numbers up to 99, and grade-school stories: 100 of them, with other names and numbers each time.
SCHOOL: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("chain_sum", {"level": 2}),
    ("basic_arithmetic", {"level": 1}),
    ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    ("gsm_symbolic", {}),
)
STORIES = "gsm_symbolic"
FORMULA = re.compile(r"[-(0-9][-+*/() 0-9]*")  # the first of a question


@dataclasses.dataclass(frozen=True)
class School:
    """Sums and grade-school stories of reasoning-gym; a share is held out."""

    held_out: bool = False

    @functools.cache  # noqa: B019  (two values, and a call a task)
    def __call__(self) -> Env:
        worlds = [reasoning.env(name, **settings) for name, settings in SCHOOL]
        return split(mix(worlds, name="school"), held_out=self.held_out, share=HELD_OUT_SHARE)


@dataclasses.dataclass(frozen=True)
class Worked:
    """Tasks of the training side, worked step by step and right: lines of reasoning, then the
    answer. They teach the form and the stop, and show that long sums come apart.
    """

    def __call__(self, n: int) -> list[Message]:
        task = School()().tasks(n)
        if task.meta["dataset"] == STORIES:
            question, lines, answer = story(n)
        else:
            question, answer = str(task.prompt), str(task.answer)
            found = FORMULA.search(question)
            assert found is not None
            lines = working(found[0])
        return [
            {"role": "user", "content": question},
            {
                "role": "assistant",
                "reasoning_content": "\n".join(lines),
                "content": f"<answer>{answer}</answer>",
            },
        ]


def story(n: int) -> tuple[str, list[str], str]:
    """Question, lines and answer of a grade-school story that is not held out. The lines are
    reasoning-gym's, without the last, which says the answer again.
    """
    for number in itertools.count(16 * n):
        entry = _stories(number // reasoning.BLOCK)[number % reasoning.BLOCK]
        question = f"{entry['question'].rstrip()}\n\n{reasoning.ASK}"
        if not held(repr([{"role": "user", "content": question}]), HELD_OUT_SHARE):
            lines = entry["metadata"]["answer_cot"].strip().splitlines()
            return (
                question,
                [line for line in lines if not line.startswith("####")],
                entry["answer"],
            )
    raise AssertionError("itertools.count ends")


@functools.lru_cache(maxsize=4)
def _stories(block: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(STORIES, size=reasoning.BLOCK, seed=block)


def working(formula: str) -> list[str]:
    """One operation of whole numbers a line, as in school; a product of two numbers over 9 goes by
    tens and ones. Raises: ValueError for anything but + - * / of whole numbers.
    """
    lines: list[str] = []

    def did(left: int, sign: str, right: int, result: int) -> int:
        lines.append(f"{left} {sign} {right} = {result}")
        return result

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
                return -number
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                within = value(inner)
                lines.append(f"-({within}) = {-within}")
                return -within
            case ast.BinOp(left=one, op=ast.Add(), right=two):
                left, right = value(one), value(two)
                return did(left, "+", right, left + right)
            case ast.BinOp(left=one, op=ast.Sub(), right=two):
                left, right = value(one), value(two)
                return did(left, "-", right, left - right)
            case ast.BinOp(left=one, op=ast.Mult(), right=two):
                left, right = value(one), value(two)
                if min(left, right) < 10 or right % 10 == 0:
                    return did(left, "*", right, left * right)
                ones = right % 10
                high = did(left, "*", right - ones, left * (right - ones))
                low = did(left, "*", ones, left * ones)
                return did(high, "+", low, high + low)
            case ast.BinOp(left=one, op=ast.Div(), right=two):
                left, right = value(one), value(two)
                if right and left % right == 0:
                    return did(left, "/", right, left // right)
        raise ValueError(f"{formula!r}: not + - * / of whole numbers with whole results")

    value(ast.parse(formula.strip(), mode="eval").body)
    return lines


def smollm2(model: ModelConfig = smol.smollm2(), name: str = "rl_smollm2") -> Experiment:
    """SmolLM2-135M on one H100: a short cold start into GLM's format, half of it without the
    reasoning, then 100 batches of 64 x 8 in direct mode.

    `python -m glm45_jax.hf.smollm2 corpus/smollm2` writes the tokenizer. All numbers UNVERIFIED.
    """
    rows, cold_steps, none = 32, 100, Constant(0.0)
    cosine = Cosine(total=float(cold_steps * rows * SMOL_ROW), warmup=1e5, end=0.1)
    train = Train(steps=100, rows=rows, mtp_weight=none, bias_rate=none, save_every=50)
    return Experiment(
        name=name,
        model=model,
        data=Chats(
            sources=((MadeChats(Worked(), 8000, name="worked"), 1.0),),
            seq_len=SMOL_ROW,
            vocab=smol.IDS,
            tokenizer="corpus/smollm2/tokenizer.json",
            direct=0.5,
        ),
        optim=AdamW(lr=1e-5, schedule=Constant(), b2=0.98, weight_decay=0.0),
        train=train,
        mesh=Pmap(1),
        init=FromSmolLM2(),
        rl=Rl(
            world=School(),
            update=Update(replay=model.n_moe > 0),
            groups=64,
            sampling=Sampling(max_tokens=256),
            serving=Serving(slots=256, pages=8192, max_tokens=SMOL_ROW, buckets=(64, 256)),
            split=Split(first=10_000),  # those before are shown
            oversample=1.0,  # of sums and stories most are right, or wrong, every time
            evaluation=Evaluation(world=School(held_out=True), tasks=512, every=25),
            thinking=False,
            cold_start=ColdStart(
                AdamW(lr=1e-4, schedule=cosine), dataclasses.replace(train, steps=cold_steps)
            ),
        ),
        run=run_rl,
    )


def smollm2_moe() -> Experiment:
    """The same from SmolLM2 upcycled to 8 experts; the engine's choices of them are replayed."""
    return smollm2(smol.smollm2_moe(), "rl_smollm2_moe")


def glm45_air() -> Experiment:
    """GLM-4.5-Air after its cold start, on 256 accelerators."""
    return _full(config.glm45_air(), "rl_glm45_air", MeshShape(data=1, fsdp=8, expert=8, context=4))


def glm45() -> Experiment:
    """GLM-4.5 after its cold start, on 1,024 accelerators."""
    return _full(config.glm45(), "rl_glm45", MeshShape(data=1, fsdp=32, expert=8, context=4))


def _full(model: ModelConfig, name: str, mesh: MeshShape) -> Experiment:
    """Single-stage RL at 64K output over two stages of difficulty, GRPO without KL. What the paper
    does not say is UNVERIFIED: group sizes, clip, updates a batch, optimizer and its rate.
    """
    rows = mesh.data * mesh.fsdp * mesh.expert
    row = OUTPUT_TOKENS + PROMPT_TOKENS
    return Experiment(
        name=name,
        model=model,
        data=Data(
            sources=((TextFiles("corpus/web", name="web"), 1.0),),  # not read: the tokenizer counts
            seq_len=row,
            vocab=GLM_VOCAB,
            tokenizer="corpus/tokenizer.json",
        ),
        optim=AdamW(lr=1e-6, schedule=Constant(), b1=0.9, b2=0.98, weight_decay=0.1),
        train=Train(
            steps=1000,
            rows=rows,
            mtp_weight=Constant(MTP_WEIGHT),
            bias_rate=Constant(0.0),
            balance_weight=Constant(0.0),
            save_every=20,
            keep=5,
        ),
        mesh=mesh,
        init=FromRun(f"runs/{name.removeprefix('rl_')}_cold_start"),
        rl=Rl(
            world=Verified(),
            update=Update(
                corrections=(Tis(),), mtp_weight=MTP_WEIGHT, replay=True, micro_rows=rows
            ),
            groups=128,
            samples=8,
            updates=4,
            sampling=Sampling(temperature=1.0, max_tokens=OUTPUT_TOKENS),
            serving=Serving(
                slots=64,
                pages=16_384,
                page=64,
                max_tokens=row,
                buckets=(1024, 4096, 8192),
                spans=(64, 256, 1024),
                draft=3,
                prefill_tokens=8192,
            ),
            push=Push(fp8=True),
            split=Split(first=0, train=100_000, verified=True),
            evaluation=Evaluation(world=Verified(held_out=True), every=50, tasks=1024),
            grades=Grades(),
            temperature=Dynamic(),
            judges=64,
        ),
        run=run_rl,
    )
