"""What the first stage of long rows is worth: the recipe to the end of its 32K-equivalent stage,
against the same tokens spent on short rows.

    python -m experiments.bench.long_rows --seeds 0 1 2            tiny_recipe, on a CPU
    python -m experiments.bench.long_rows --mini --seeds 0         mini_recipe, on one accelerator

All arms of a seed go on from one checkpoint, the end of the second stage. `long` takes the third
stage; `more` takes as many tokens of the second; `short` those of the third's text in rows as the
second has them. Judged on held-out rows of the third stage: all of their tokens, and those that
stand beyond the short length in their document. What a workdir has is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import midtrain
from experiments.ablations import text_of
from experiments.bench import recipe
from experiments.bench.results import device_name, merge_rows
from glm45_jax import metrics
from glm45_jax.data.prepare import prepare
from glm45_jax.data.types import Batch
from glm45_jax.experiment import Experiment
from glm45_jax.start import FromRun, initial
from glm45_jax.train.parallel import Recipe, make_trainer
from glm45_jax.train.stages import Stage, total_steps
from glm45_jax.train.trackers import Untracked

BEFORE = 2  # stages of short rows
CASE = ("recipe", "arm", "seed")


def arms(exp: Experiment) -> dict[str, Experiment]:
    """By name; `before` is where the others begin."""
    first = exp.stages[:BEFORE]
    short, long = exp.stages[BEFORE - 1], exp.stages[BEFORE]
    as_short = ("seq_len", "packing", "rope_theta", "batch_tokens")
    last = {
        "before": (),
        "long": (long,),
        "more": (dataclasses.replace(short, name="more", tokens=long.tokens),),
        "short": (
            dataclasses.replace(
                long, name="short", **{name: getattr(short, name) for name in as_short}
            ),
        ),
    }
    return {name: _with(exp, (*first, *stages)) for name, stages in last.items()}


def _with(exp: Experiment, stages: tuple[Stage, ...]) -> Experiment:
    train = dataclasses.replace(exp.train, steps=total_steps(stages), validate_every=0)
    return dataclasses.replace(exp, stages=stages, train=train, report=None, tracker=Untracked())


def run_seed(exp: Experiment, seed: int, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """A row an arm."""
    rows, found = arms(dataclasses.replace(exp, seed=seed)), []
    before = workdir / f"before_{seed}"
    for name, arm in rows.items():
        folder = workdir / f"{name}_{seed}"
        done = folder / "result.json"
        if not done.exists():
            if name != "before" and not folder.exists():
                shutil.copytree(before, folder, symlinks=True)
                (folder / "result.json").unlink()
            folder.mkdir(parents=True, exist_ok=True)
            _share_data(folder, workdir)
            began = time.monotonic()
            outcome = arm.run(arm, folder)
            if outcome.why != "done":
                raise SystemExit(f"{folder}: {outcome.why} at step {outcome.step}; start it again")
            row = {
                "recipe": exp.name,
                "arm": name,
                "seed": seed,
                "tokens": arm.spans[-1].tokens_at(arm.train.steps),
                "command": "python -m experiments.bench.long_rows",
                "seconds": round(time.monotonic() - began, 1),
                **judged(arm, folder, judges(exp, folder)),
            }
            done.write_text(json.dumps(row))
        found.append(json.loads(done.read_text()))
    return found


def _share_data(folder: pathlib.Path, workdir: pathlib.Path) -> None:
    (workdir / "data").mkdir(exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to((workdir / "data").absolute(), target_is_directory=True)


def judges(exp: Experiment, folder: pathlib.Path) -> dict[str, Batch]:
    """Held-out rows of the third stage, and the same where only tokens far from the start of their
    document count.
    """
    data = text_of(exp.of(exp.spans[BEFORE]))
    prepared = prepare(text_of(exp), folder / "data")  # of all stages' sources, as the run's is
    tokens = exp.train.validate_rows * exp.stages[0].seq_len
    whole = recipe.loader_of(data, prepared, "val", 0, tokens // data.seq_len).batch(0)
    far_BT = np.asarray(whole.positions_BT) >= exp.stages[0].seq_len
    return {"whole": whole, "far": whole.replace(mask_BT=whole.mask_BT * far_BT)}


def judged(exp: Experiment, folder: pathlib.Path, batches: Mapping[str, Batch]) -> dict[str, Any]:
    """Nats a token of a run's newest weights, by judge; documents do not see each other."""
    last = exp.of(exp.spans[-1])
    trainer = make_trainer(exp.mesh, Recipe(last.model, last.optim, last.train, packed=True))
    state = initial(dataclasses.replace(exp, init=FromRun(str(folder))), trainer)
    found = {}
    for name, batch in batches.items():
        total, n = trainer.nll(state, batch)
        found[name] = round(total / n, 4)
        found[f"{name}_tokens"] = int(n)
    return found


def told(rows: Sequence[Mapping[str, Any]]) -> str:
    """Losses by arm, means over seeds; and what `long` is better by, seed by seed."""
    seeds = sorted({row["seed"] for row in rows})
    at = {(row["arm"], row["seed"]): row for row in rows}
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        means = [f"{kind} {np.mean([at[arm, s][kind] for s in seeds]):.4f}" for kind in KINDS]
        better = [
            f"{kind} " + ", ".join(f"{at[arm, s][kind] - at['long', s][kind]:+.4f}" for s in seeds)
            for kind in KINDS
        ]
        lines.append(f"{arm:7} {', '.join(means)}; above `long` by seed: {'; '.join(better)}")
    return "\n".join(lines)


KINDS = ("whole", "far")


def main() -> None:
    """Runs every arm of the seeds, prints, and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mini", action="store_true", help="mini_recipe, over the carried store")
    parser.add_argument("--workdir", type=pathlib.Path)
    args = parser.parse_args()
    metrics.setup_logging()
    workdir = args.workdir or pathlib.Path(f"runs/long_rows_{'mini' if args.mini else 'tiny'}")
    exp = midtrain.tiny_recipe()
    if args.mini:
        recipe.unpack()
        exp = recipe.experiment(tiny=False)
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / "data").exists():
            (workdir / "data").symlink_to(recipe.UNPACKED.absolute())
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    rows = [row for seed in args.seeds for row in run_seed(exp, seed, workdir)]
    print(told(rows))
    print(f"wrote {merge_rows(device_name(), 'long_rows', rows, CASE)}")


if __name__ == "__main__":
    main()
