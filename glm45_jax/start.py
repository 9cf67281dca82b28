"""Where a run starts from: random weights, another run's, or a released folder's.

`Scratch`, `FromRun` and `FromHF` are the values of `Experiment.init`; `initial` makes the state.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any

import jax

from glm45_jax import hf, values
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.model.config import ModelConfig
from glm45_jax.tokenizer import Tokenizer
from glm45_jax.train.parallel import Trainer
from glm45_jax.train.state import TrainState

log = logging.getLogger(__name__)


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


def _warn_of_numbers(cfg: ModelConfig, exp: Any) -> None:
    """None; logs what the weights were trained with and the experiment has otherwise (a stage may
    want that: the RoPE base is raised before long contexts).
    """
    for key, theirs, ours in values.diff(cfg, exp.model):
        if key.startswith(("mixer", "moe", "norm_eps")):
            log.warning("%s: %s %r there, %r in the experiment", exp.name, key, theirs, ours)
