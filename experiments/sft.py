"""Supervised fine-tuning: `tiny` (sums with and without thinking, a CPU, seconds), `glm45_air`
(a cluster, planned).

A run is `python -m glm45_jax.main experiments.sft:tiny --workdir ...`, as any other. The cold start
of an RL run is such a run too, from which RL begins with `FromRun`.
"""

import dataclasses
import random

from glm45_jax.data.chats import ChatFile, MadeChats
from glm45_jax.data.sft import Chats
from glm45_jax.experiment import Experiment, FromHF, Report
from glm45_jax.model import config
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant, Cosine
from glm45_jax.sharding import MeshShape
from glm45_jax.train.state import Train

BYTES_AND_TOKENS = 256 + 36  # a tokenizer without merges: every digit is a token
GLM_VOCAB = 151_365  # ids of the released tokenizer
LONGEST = 131_072  # "up to 128K tokens" (spec 7.1.2)
BATCH_TOKENS = 2**25  # UNVERIFIED, and so is the number of steps: "millions of samples"


@dataclasses.dataclass(frozen=True)
class Sums:
    """Conversations about sums of two numbers of so many digits; a share of them thinks first."""

    digits: int = 2
    thinking: float = 0.5

    def __call__(self, n: int) -> list[dict[str, str]]:
        """The n-th conversation."""
        draw = random.Random(f"sums/{self.digits}/{n}")
        left, right = (draw.randrange(10**self.digits) for _ in range(2))
        answer = {"role": "assistant", "content": str(left + right)}
        if draw.random() < self.thinking:
            answer["reasoning_content"] = self._worked(left, right)
        return [{"role": "user", "content": f"{left}+{right}="}, answer]

    def _worked(self, left: int, right: int) -> str:
        steps, carry = [], 0
        for place in range(self.digits):
            a, b = (number // 10**place % 10 for number in (left, right))
            total = a + b + carry
            steps.append(f"{a}+{b}+{carry}={total}")
            carry = total // 10
        return " ".join(steps)


def tiny() -> Experiment:
    """The tiny model on sums, half of them with the working shown; what tests run."""
    steps, rows, seq_len = 20, 16, 96
    tokens = float(steps * rows * seq_len)
    return Experiment(
        name="sft_tiny",
        model=config.tiny(vocab=BYTES_AND_TOKENS),
        data=Chats(
            sources=((MadeChats(Sums(), 600, name="sums"), 1.0),),
            seq_len=seq_len,
            vocab=BYTES_AND_TOKENS,
        ),
        optim=Muon(
            lr=5e-3,
            schedule=Cosine(warmup=0.1 * tokens, total=tokens, end=0.1),
            dtype="float32",
        ),
        train=Train(
            steps=steps,
            rows=rows,
            mtp_weight=Constant(0.3),
            bias_rate=Constant(1e-3),
            save_every=10,
            validate_every=10,
            validate_rows=8,
        ),
        report=Report(prompts=("27+35=",), max_tokens=24),
    )


def glm45_air() -> Experiment:
    """Overall SFT of GLM-4.5-Air from its base model, on 256 accelerators (spec 7.1.2).

    The conversations and the base model are yours to put under corpus/. Learning rate, batch,
    steps and weights of the mixture are UNVERIFIED; the length and the kinds are the paper's. The
    rows of 128K are not split over devices yet: `--dry-run` says what they need.
    """
    steps, rows = 4000, BATCH_TOKENS // LONGEST
    tokens = float(steps * BATCH_TOKENS)
    kinds = (("reasoning", 0.4), ("general", 0.2), ("agent", 0.3), ("long", 0.1))
    return Experiment(
        name="sft_glm45_air",
        model=config.glm45_air(),
        data=Chats(
            sources=tuple((ChatFile(f"corpus/sft/{k}", name=k), w) for k, w in kinds),
            seq_len=LONGEST,
            vocab=GLM_VOCAB,
            tokenizer="corpus/base/tokenizer.json",
            val_fraction=0.005,
        ),
        optim=Muon(lr=2.5e-5, schedule=Cosine(warmup=0.02 * tokens, total=tokens, end=0.1)),
        train=Train(
            steps=steps,
            rows=rows,
            mtp_weight=Constant(0.1),  # as mid-training ends; SFT's own is UNVERIFIED
            bias_rate=Constant(0.0),
            save_every=200,
            validate_every=500,
            validate_rows=rows,
        ),
        mesh=MeshShape(data=1, fsdp=32, expert=8),
        init=FromHF("corpus/base"),
    )
