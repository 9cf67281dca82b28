"""`make quickstart`: the whole pipeline with a tiny GLM-4.5, on a CPU, in minutes.

    pretrain    English and Python from what is installed
    sft         cold start: sums worked out digit by digit, and sums answered at once
    rl          GRPO on sums, samples by the rollout engine (JetStream's prefill, insert, generate)

Then sums that no stage has seen, before and after RL, and one report over all. Each stage has a
folder of its own below the workdir; what ended is not run again, what was killed goes on.
`quickstart` is the first stage, with a `run` that goes on to the others; `sft` and `rl` are values
too: `main` runs them in a workdir of their own, on what runs/quickstart has.

3 in 10 demonstrations of the cold start carry, the others forget to. RL selects what some of them
show; it does not discover how to carry.
"""

import dataclasses
import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping

import jax

from experiments.quickstart_report import write_quickstart_report
from experiments.rl_reasoning import Sums
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.data.chats import MadeChats
from glm45_jax.data.pack import Cut
from glm45_jax.data.prepare import Data, prepare
from glm45_jax.data.sft import Chats
from glm45_jax.data.sources import Docstrings, PydocTopics, PythonSources
from glm45_jax.envs.types import Message
from glm45_jax.evals.generate import Outcome as Scored
from glm45_jax.evals.generate import evaluate
from glm45_jax.evals.report import write_report as write_scores
from glm45_jax.evals.types import EvalTask
from glm45_jax.experiment import BadInput, Experiment, FromRun, Report, run_rl, run_training
from glm45_jax.integrity import write_whole
from glm45_jax.model.config import Gqa, ModelConfig, Moe
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant, Cosine
from glm45_jax.rl.config import Evaluation, Rl, Serving, Split
from glm45_jax.rl.loop import Outcome as RlOutcome
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.episode import Format
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.server.model import open_model
from glm45_jax.sharding import MeshShape
from glm45_jax.start import check_claim
from glm45_jax.train.loop import Outcome
from glm45_jax.train.parallel import Pmap
from glm45_jax.train.state import Train

log = logging.getLogger(__name__)

WORKDIR, TIMES = "runs/quickstart", "times.json"
VOCAB, SEQ_LEN, ROWS, STEPS = 2048, 128, 16, 330
PROMPTS = (
    "def read(self, path):\n",
    "import os\nimport sys\n\nclass ",
    "The following functions are ",
    "Return the ",
)
DEMONSTRATIONS = 20_000
# Shares of the cold start's rows. All that is thought is right but for the carry.
RIGHT, FORGETS, AT_ONCE = 0.21, 0.49, 0.3
TASKS = 512  # held-out sums that are scored
# Name, whether the prompt asks to think, temperature.
MODES = (
    ("thinking_sampled", True, 1.0),
    ("thinking_greedy", True, 0.0),
    ("direct_sampled", False, 1.0),
    ("direct_greedy", False, 0.0),
)


@dataclasses.dataclass(frozen=True)
class Worked:
    """Demonstrations of two-digit sums. thinks: digit by digit before the answer, "7+5+0=12
    2+3+1=6"; else the answer alone, in direct mode. carries: else every carry is forgotten.
    """

    thinks: bool = True
    carries: bool = True

    def __call__(self, n: int) -> list[Message]:
        """The n-th conversation, about a sum of the training side."""
        task = Sums(seed=1)().tasks(n)
        left, right = task.id.removesuffix("=").split("+")
        steps, said, carry = [], "", 0
        for a, b in zip(reversed(left), reversed(right), strict=True):
            total = int(a) + int(b) + carry
            steps.append(f"{a}+{b}+{carry}={total}")
            said = f"{total % 10}{said}"
            carry = total // 10 if self.carries else 0
        answer = {"role": "assistant", "content": f"{carry or ''}{said}"}
        if self.thinks:
            answer["reasoning_content"] = " ".join(steps)
        return [{"role": "user", "content": task.id}, answer]


def quickstart() -> Experiment:
    """1.9M parameters with every part of GLM-4.5: MoE, shared expert, router bias, QK-norm, GQA,
    MTP, Muon. What `--set` changes is this stage.
    """
    tokens = float(SEQ_LEN * ROWS * STEPS)
    return Experiment(
        name="quickstart",
        model=ModelConfig(
            vocab=VOCAB,
            d_model=128,
            n_dense=1,
            n_moe=2,
            d_mlp=384,
            mixer=Gqa(heads=4, kv_heads=2, head_dim=32, rope_theta=1e4),
            moe=Moe(experts=8, top_k=2, d_expert=128, scale=1.0),
            dtype="float32",
            remat="none",
        ),
        data=Data(
            sources=((PythonSources(), 0.7), (Docstrings(), 0.2), (PydocTopics(), 0.1)),
            seq_len=SEQ_LEN,
            packing=Cut(),
            vocab=VOCAB,
        ),
        optim=Muon(
            lr=1e-2,
            schedule=Cosine(warmup=0.06 * tokens, total=tokens, end=0.02),
            dtype="float32",
        ),
        train=Train(
            steps=STEPS,
            rows=ROWS,
            mtp_weight=Constant(0.3),
            bias_rate=Constant(5e-3),
            validate_every=50,
            validate_rows=192,
            save_every=110,
        ),
        mesh=MeshShape(data=1, fsdp=-1),
        report=Report(prompts=PROMPTS, max_tokens=64, temperature=0.7, ngrams=True),
        run=run_quickstart,
    )


def sft(workdir: str = WORKDIR) -> Experiment:
    """The cold start: thinking and direct mode mixed. From here on without the MTP layer, which
    would be a third of the time.
    """
    steps, rows = 260, 8
    tokens = float(steps * rows * SEQ_LEN)
    kinds = (
        ("carries", RIGHT, Worked()),
        ("forgets", FORGETS, Worked(carries=False)),
        ("at_once", AT_ONCE, Worked(thinks=False)),
    )
    return Experiment(
        name="quickstart_sft",
        model=dataclasses.replace(quickstart().model, n_mtp=0),
        data=Chats(
            sources=tuple((MadeChats(w, DEMONSTRATIONS, name=name), x) for name, x, w in kinds),
            seq_len=SEQ_LEN,
            vocab=VOCAB,
            tokenizer=f"{workdir}/tokenizer.json",
        ),
        optim=Muon(
            lr=1e-2,
            schedule=Cosine(warmup=0.05 * tokens, total=tokens, end=0.02),
            dtype="float32",
        ),
        train=Train(
            steps=steps,
            rows=rows,
            mtp_weight=Constant(0.0),
            bias_rate=Constant(1e-3),
            validate_every=130,
            validate_rows=16,
        ),
        mesh=MeshShape(data=1, fsdp=-1),
        init=FromRun(f"{workdir}/pretrain"),
        report=Report(prompts=("27+35=", "58+67="), max_tokens=32),
    )


def rl(workdir: str = WORKDIR) -> Experiment:
    """GRPO in thinking mode: 32 batches of 16 sums x 8 samples."""
    cold = sft(workdir)
    return Experiment(
        name="quickstart_rl",
        model=cold.model,
        data=dataclasses.replace(cold.data, seq_len=256),
        optim=AdamW(lr=3e-4, schedule=Constant(), b2=0.999, weight_decay=0.0),
        train=Train(
            steps=32, rows=24, mtp_weight=Constant(0.0), bias_rate=Constant(0.0), save_every=8
        ),
        mesh=Pmap(1),
        init=FromRun(f"{workdir}/sft"),
        rl=Rl(
            world=Sums(),
            groups=16,
            samples=8,
            sampling=Sampling(max_tokens=32),
            serving=Serving(
                slots=128, pages=1024, page=8, max_tokens=64, buckets=(16,), reuse=False
            ),
            split=Split(first=0),
            evaluation=Evaluation(world=Sums(held_out=True), tasks=128, every=8),
            dynamic=False,
        ),
        run=run_rl,
    )


def run_quickstart(exp: Experiment, workdir: pathlib.Path) -> Outcome | RlOutcome:
    """All stages, beginning with `exp`; how the last one ended.

    Raises: BadInput, also where a stage's folder holds another experiment.
    """
    stages = {
        "pretrain": dataclasses.replace(exp, run=run_training),
        "sft": sft(str(workdir)),
        "rl": rl(str(workdir)),
    }
    return run_stages(stages, workdir, tasks=TASKS)


def run_stages(
    stages: Mapping[str, Experiment], workdir: pathlib.Path, *, tasks: int
) -> Outcome | RlOutcome:
    """How the last stage ended; the report is written where all are done.

    stages: by the names of their folders; the first trains the tokenizer of all, the last is RL.
    tasks: held-out sums of the scores.
    """
    outcome: Outcome | RlOutcome = Outcome(0, "done", 0.0, 0)
    for name, exp in stages.items():
        folder = workdir / name
        if _ended(exp, folder):
            log.info("%s: done before", name)
        else:
            log.info("%s", name)
            with _Timed(workdir, name):
                outcome = exp.run(exp, folder)
            if outcome.why != "done":
                return outcome
        if isinstance(exp.data, Data):
            prepare(exp.data, folder / "data").tokenizer.save(workdir)
        else:  # so that the folder can be served
            write_whole(folder / "tokenizer.json", (workdir / "tokenizer.json").read_bytes())
    with _Timed(workdir, "eval"):
        scores = {name: score(stages["rl"], workdir / name, tasks) for name in ("sft", "rl")}
    path = write_quickstart_report(workdir, scores, times_of(workdir), RIGHT / (RIGHT + FORGETS))
    for name, scored in scores.items():
        said = ", ".join(f"{mode} {one.score}" for mode, one in scored.items())
        log.info("held-out sums after %s: %s", name, said)
    log.info("report: %s", path)
    return outcome


def _ended(exp: Experiment, folder: pathlib.Path) -> bool:
    """Whether all steps of the stage are there and its report too."""
    try:
        check_claim(exp, folder)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if not (folder / "report.md").exists():
        return False
    with Checkpoints(folder / "checkpoints") as saved:
        return saved.latest() == exp.train.steps


class _Timed:
    """Adds what happens inside to `workdir`/times.json: seconds by the clock and of processors. A
    session that is killed outright leaves nothing there.
    """

    def __init__(self, workdir: pathlib.Path, name: str) -> None:
        self._workdir, self._name = workdir, name

    def __enter__(self) -> None:
        self._began = time.monotonic(), sum(os.times()[:4])

    def __exit__(self, *_: object) -> None:
        known = times_of(self._workdir)
        clock, cpu = known.get(self._name, (0.0, 0.0))
        began, began_cpu = self._began
        clock, cpu = clock + time.monotonic() - began, cpu + sum(os.times()[:4]) - began_cpu
        known[self._name] = (clock, cpu)
        write_whole(self._workdir / TIMES, json.dumps(known).encode())


def times_of(workdir: pathlib.Path) -> dict[str, tuple[float, float]]:
    """(seconds by the clock, of processors) of each stage, over all sessions."""
    file = workdir / TIMES
    return json.loads(file.read_text()) if file.exists() else {}


def score(exp: Experiment, folder: pathlib.Path, tasks: int) -> dict[str, Scored]:
    """Held-out sums by the weights of a stage, by mode. `folder`/eval keeps all episodes, so what
    was killed goes on. exp: the RL stage, whose engine and world are used.
    """
    assert exp.rl is not None and exp.rl.evaluation.world is not None
    world, served = exp.rl.evaluation.world(), exp.rl.serving
    model = open_model(folder, device=jax.local_devices()[0], mtp=False, family=exp.rl.family)
    driver = Driver(served.engine(model.cfg, routes=False), model.params, reuse=served.reuse)
    found = {
        name: evaluate(
            EvalTask(
                dataclasses.replace(world, name=name),
                range(tasks),
                sampling=dataclasses.replace(exp.rl.sampling, temperature=temperature),
            ),
            driver,
            Format(model.tokenizer, model.family, thinking),
            out=folder / "eval",
            model=exp.name,
        )
        for name, thinking, temperature in MODES
    }
    write_scores(list(found.values()), folder / "eval", model=folder.name)
    return found
