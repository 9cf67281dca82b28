"""`midtrain.mini_recipe` on one accelerator, all five stages; Muon against AdamW at equal tokens.

    python -m experiments.bench.recipe --prepare     where the packages are: .cache/recipe, 9 MB
    python -m experiments.bench.recipe recipe --seconds 580
    python -m experiments.bench.recipe ablation --seconds 580
    python -m experiments.bench.recipe --write --device nvidia-h100-80gb-hbm3-x1

The parts need .cache/recipe/corpus.tar.xz alone: neither the packages that the text is of, nor
grain, tensorboardX or matplotlib; --write needs matplotlib and no accelerator. What --seconds ends
goes on in the next call, from runs/recipe.
`ablation` takes arms as optimizer_rate:seed, or optimizer_best:seed for the best rate of those that
were run with seed 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import tarfile
import tempfile
import time
from collections.abc import Generator, Sequence
from typing import Any

import jax
import numpy as np

from experiments import midtrain
from experiments.ablations import text_of
from experiments.bench.recipe_page import CASE, described, write_page
from experiments.bench.results import device_name, known, merge_result, merge_rows
from experiments.bench.seconds import BEGAN, said, stopped_at
from glm45_jax import metrics
from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import Cut
from glm45_jax.data.prepare import Data, Prepared, data_fingerprint, prepare, rows
from glm45_jax.data.sources import Doc, Source
from glm45_jax.data.types import Batch
from glm45_jax.experiment import Experiment
from glm45_jax.integrity import write_whole
from glm45_jax.model import cost
from glm45_jax.model.config import ModelConfig
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant, Cosine
from glm45_jax.sharding import MeshShape
from glm45_jax.tokenizer import Tokenizer
from glm45_jax.train.ahead import Asked, batch_shapes, compiling
from glm45_jax.train.parallel import Recipe, Trainer, make_trainer
from glm45_jax.train.stages import scaled, total_steps
from glm45_jax.train.state import Train
from glm45_jax.train.trackers import Untracked

CORPUS = pathlib.Path(".cache/recipe/corpus.tar.xz")
UNPACKED = pathlib.Path("runs/recipe_corpus")
AFTER_S = 30.0  # kept for what follows the last step: a checkpoint of 1.5 GB
LEAST_S = 45.0  # with less left, no arm begins
ARMS = ("muon_2e-3:0", "adamw_1e-3:0", "adamw_2e-3:0", "muon_4e-3:0", "muon_best:1", "adamw_best:1")
THREADS = 8  # that compile


@dataclasses.dataclass(frozen=True)
class Kept:
    """A source whose documents are in the carried store: only `--prepare` reads them, so that a
    machine without its packages calls it by the same fingerprint.
    """

    source: Source

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Raises: ValueError; the text is not here."""
        raise ValueError(
            f"{CORPUS} has no store of these sources; make it, where the packages are, by "
            "python -m experiments.bench.recipe --prepare"
        )
        yield  # a generator, as sources are

    def version(self) -> str:
        """The same everywhere."""
        return "kept"


@dataclasses.dataclass(frozen=True)
class Arms:
    """What every arm of the ablation is: so many steps, batches of rows of seq_len tokens; judged
    on other rows every few steps.
    """

    model: ModelConfig
    rows: int
    seq_len: int
    steps: int
    judge_rows: int
    judge_every: int

    @property
    def tokens(self) -> float:
        """Of an arm."""
        return float(self.rows * self.seq_len * self.steps)


def experiment(tiny: bool) -> Experiment:
    """`mini_recipe` over the carried store; tiny: `tiny_recipe`, a tenth of it, over the same."""
    mini = midtrain.mini_recipe()
    text = text_of(mini)
    exp = midtrain.tiny_recipe() if tiny else mini
    if tiny:
        stages = scaled(mini.stages, tokens=20e3, batch_tokens=1024, seq_len=16, least_steps=2)
        # One size of the batch: on a CPU, each takes half a minute to compile.
        first = dataclasses.replace(stages[0], start_batch_tokens=None, ramp_tokens=0.0)
        stages = (first, *stages[1:])
        total = sum(stage.tokens for stage in stages)
        exp = dataclasses.replace(
            exp,
            model=dataclasses.replace(exp.model, vocab=mini.model.vocab),
            data=text,
            stages=stages,
            optim=dataclasses.replace(exp.optim, schedule=Cosine(0.1 * total, total, end=0.1)),
            train=dataclasses.replace(
                exp.train,
                steps=total_steps(stages),
                rows=stages[0].batch_tokens // stages[0].seq_len,
                validate_every=0,
                validate_rows=64,
                compile_ahead=1,
            ),
        )
    return dataclasses.replace(
        exp,
        data=carried(text),
        mesh=MeshShape(data=-1, fsdp=1),
        report=None,
        tracker=Untracked(),
    )


def arms_of(exp: Experiment) -> Arms:
    """12M tokens an arm in rows of 2,048; of the tiny recipe, two thousand in rows of 32."""
    if exp.name == "tiny_recipe":
        return Arms(exp.model, rows=8, seq_len=32, steps=8, judge_rows=16, judge_every=4)
    return Arms(exp.model, rows=32, seq_len=2048, steps=184, judge_rows=64, judge_every=23)


def carried(data: Data) -> Data:
    """The same data under a name that does not depend on this machine's packages."""
    kept = tuple((Kept(source), weight) for source, weight in data.sources)
    return dataclasses.replace(data, sources=kept, tokenizer=str(UNPACKED / "tokenizer.json"))


def prepare_corpus() -> None:
    """None; the stores of `mini_recipe` are in one file that may be carried elsewhere."""
    data = text_of(midtrain.mini_recipe())
    CORPUS.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CORPUS.parent) as folder:
        made = prepare(data, pathlib.Path(folder))
        made.tokenizer.save(folder)
        fingerprint = data_fingerprint(carried(data), made.tokenizer)
        whole = pathlib.Path(folder, CORPUS.name)
        with tarfile.open(whole, "w:xz", preset=6) as tar:
            tar.add(f"{folder}/tokenizer.json", "tokenizer.json")
            tar.add(f"{folder}/data-{made.fingerprint[:16]}", f"data-{fingerprint[:16]}")
        whole.rename(CORPUS)
    counts = {k: f"{v['train']['tokens']:,}" for k, v in made.report["sources"].items()}
    print(f"{CORPUS}: {CORPUS.stat().st_size:,} bytes; training tokens {counts}")


def unpack() -> None:
    """None; the stores are in UNPACKED, those of the file. Raises: SystemExit where it is not there
    or holds others than this code asks for.
    """
    if not CORPUS.exists():
        raise SystemExit(f"no {CORPUS}; make it by python -m experiments.bench.recipe --prepare")
    with tarfile.open(CORPUS) as tar:
        names = {name.partition("/")[0] for name in tar.getnames()}
        if not all((UNPACKED / name).exists() for name in names):
            tar.extractall(UNPACKED, filter="data")
    wanted = data_fingerprint(carried(text_of(midtrain.mini_recipe())), Tokenizer.load(UNPACKED))
    if f"data-{wanted[:16]}" not in names:
        raise SystemExit(f"{CORPUS} has {sorted(names)}, wanted data-{wanted[:16]}; prepare again")


def run_recipe(exp: Experiment, workdir: pathlib.Path, ends: float) -> dict[str, Any] | None:
    """The row of all five stages; None where the time ended them, to go on later."""
    folder = workdir / exp.name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to(UNPACKED.absolute(), target_is_directory=True)
    with stopped_at(ends - AFTER_S):
        outcome = exp.run(exp, folder)
    said(f"{exp.name}: {outcome.why} at step {outcome.step} of {exp.train.steps}")
    if outcome.why != "done":
        return None
    seconds = json.loads((folder / "goodput.json").read_text())["seconds"]
    return {
        "command": "python -m experiments.bench.recipe recipe",
        "jax": jax.__version__,
        "parameters": cost.param_counts(exp.model).total_stored,
        "active": cost.param_counts(exp.model).active_body,
        "peak": cost.peak_flops(jax.devices()[0])[1],
        "seconds": {name: round(s, 1) for name, s in seconds.items() if s},
        **described(exp, metrics.read_jsonl(folder / "metrics.jsonl")),
    }


def run_arms(asked: Sequence[str], exp: Experiment, ends: float, done: list[dict]) -> None:
    """None; every arm that is not done yet is run while there is time, and put into `done`."""
    sizes, first = arms_of(exp), text_of(exp.of(exp.spans[0]))
    data = dataclasses.replace(first, seq_len=sizes.seq_len, packing=Cut(moving=True))
    prepared = prepare(text_of(exp), UNPACKED)  # of all stages' sources, as the run's is
    judge = loader_of(data, prepared, "val", 0, sizes.judge_rows).batch(0)
    wanted = [parsed(one) for one in asked]
    trainers = {kind: trainer_of(sizes, *kind) for kind in {w[:2] for w in wanted if w[1]}}
    shapes = batch_shapes(sizes.rows, sizes.seq_len)
    programs = [Asked(f"{k}", trainers[k].compile_step, shapes) for k in trainers]
    programs += [Asked(f"judge of {k}", trainers[k].compile_nll, judge) for k in trainers]
    with compiling(programs, THREADS):
        for optimizer, lr, seed in wanted:
            lr = lr or best(done, optimizer)
            ran = [(row["optimizer"], row["lr"], row["seed"]) for row in done]
            if (optimizer, lr, seed) in ran:
                continue
            if ends - time.monotonic() < LEAST_S:
                said(f"{optimizer} {lr:g} seed {seed} does not begin: the time is spent")
                return
            trainer = trainers.setdefault((optimizer, lr), trainer_of(sizes, optimizer, lr))
            rows_of = loader_of(data, prepared, "train", seed, sizes.rows)
            row = run_arm(trainer, rows_of, judge, sizes, seed)
            row = {"optimizer": optimizer, "lr": lr, "seed": seed, **row}
            said(json.dumps({k: v for k, v in row.items() if k != "curve"}))
            done.append(row)


def run_arm(
    trainer: Trainer, source: Loader, judge: Batch, sizes: Arms, seed: int
) -> dict[str, Any]:
    """Losses of an arm on its own rows and on the judge's, nats a token, and its speed."""
    state, losses, held_out, times = trainer.init(jax.random.key(seed)), [], [], []
    for step, batch in zip(range(1, sizes.steps + 1), source.iterate(), strict=False):
        began = time.perf_counter()
        state, out = trainer.step(state, batch)
        losses.append(float(out.scalars["loss/ce"]))
        times.append(time.perf_counter() - began)
        if step % sizes.judge_every == 0 or step == sizes.steps:
            total, n = trainer.nll(state, judge)
            held_out.append([step, round(total / n, 4)])
    per_step = sizes.rows * sizes.seq_len
    return {
        "command": "python -m experiments.bench.recipe ablation",
        "tokens": int(sizes.tokens),
        "held_out": held_out[-1][1],
        "tokens_per_s": round(per_step / float(np.median(times[2:]))),
        "curve": {
            "tokens_per_step": per_step,
            "train": [round(loss, 4) for loss in losses],
            "held_out": held_out,
        },
    }


def trainer_of(sizes: Arms, optimizer: str, lr: float) -> Trainer:
    """All but the optimizer is the same: one cosine to a tenth, 5% of warmup."""
    schedule = Cosine(warmup=0.05 * sizes.tokens, total=sizes.tokens, end=0.1)
    optim: Muon | AdamW = AdamW(lr=lr, schedule=schedule)
    if optimizer == "muon":
        optim = Muon(lr=lr, schedule=schedule, dtype=sizes.model.dtype)
    train = Train(sizes.steps, sizes.rows, mtp_weight=Constant(0.3), bias_rate=Constant(1e-3))
    return make_trainer(MeshShape(data=-1, fsdp=1), Recipe(sizes.model, optim, train, packed=False))


def loader_of(data: Data, prepared: Prepared, split: str, seed: int, n: int) -> Loader:
    """Batches of n rows."""
    return Loader(
        rows(data, prepared, split),
        seed=seed,
        span=lambda step: (step * n, n),
        fingerprint=prepared.fingerprint,
    )


def best(done: Sequence[dict[str, Any]], optimizer: str) -> float:
    """The rate whose arm of seed 0 ended lowest. Raises: SystemExit where none was run."""
    found = [(row["held_out"], row["lr"]) for row in done if row["optimizer"] == optimizer]
    if not found:
        raise SystemExit(f"no arm of {optimizer} was run; ask for {optimizer}_2e-3:0 first")
    return min(found)[1]


def parsed(asked: str) -> tuple[str, float, int]:
    """Optimizer, rate (0 for the best) and seed of an arm. Raises: SystemExit for what is none."""
    name, _, seed = asked.partition(":")
    optimizer, _, lr = name.partition("_")
    try:
        rate = 0.0 if lr == "best" else float(lr)
        number = int(seed)
    except ValueError:
        rate, number = -1.0, -1
    if optimizer not in ("muon", "adamw") or rate < 0 or number < 0:
        raise SystemExit(f"{asked}: give arms as {', '.join(ARMS)}")
    return optimizer, rate, number


def measure(parts: Sequence[str], arms: Sequence[str], tiny: bool, ends: float) -> None:
    """None; each part's rows are in the result file as soon as they are there, tiny ones beside the
    run.
    """
    unpack()
    workdir = pathlib.Path("runs/recipe_tiny" if tiny else "runs/recipe")
    workdir.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    exp, device = experiment(tiny), device_name()
    name = str((workdir / device).absolute()) if tiny else device
    if "recipe" in parts:
        row = run_recipe(exp, workdir, ends)
        if row is not None:
            print(f"wrote {merge_result(name, 'recipe', row)}")
    if "ablation" in parts:
        # Beside the run too: a result file may be another's when a later call goes on.
        file = workdir / "arms.json"
        done = json.loads(file.read_text()) if file.exists() else []
        try:
            run_arms(arms, exp, ends, done)
        finally:
            write_whole(file, json.dumps(done).encode())
            if done:
                print(f"wrote {merge_rows(name, 'ablation_muon_adamw', done, CASE)}")


def main() -> None:
    """Prepares, measures, or draws what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="recipe, ablation")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--seconds", type=float, default=580.0, help="after which nothing begins")
    parser.add_argument("--tiny", action="store_true", help="to see whether it runs; keeps nothing")
    parser.add_argument("--prepare", action="store_true", help="make the corpus to be carried")
    parser.add_argument("--write", action="store_true", help="page and figure of what was measured")
    parser.add_argument("--device", help="whose results --write draws; default this one")
    args = parser.parse_args()
    metrics.setup_logging()
    if unknown := sorted(set(args.parts) - {"recipe", "ablation"}):
        parser.error(f"no part {unknown}; there are recipe and ablation")
    for one in args.arms:
        parsed(one)
    if args.prepare:
        prepare_corpus()
    if args.parts:
        measure(args.parts, args.arms, args.tiny, BEGAN + args.seconds)
    if args.write:
        device = args.device or device_name()
        print(write_page(known(device, "recipe"), known(device, "ablation_muon_adamw"), device))


if __name__ == "__main__":
    from experiments.bench import recipe  # not as __main__: values name their module

    recipe.main()
