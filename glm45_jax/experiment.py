"""The one value that describes a run, and what running it means. The type to know is `Experiment`.

`run_training` is the run of pretraining, mid-training and SFT: it opens data, checkpoints and
writers, wires the hooks, and hands all of it to `train.loop`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from glm45_jax import hf, metrics, values
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.data import ngram
from glm45_jax.data.prepare import Data, Prepared, prepare
from glm45_jax.data.prepare import rows as data_rows
from glm45_jax.data.types import Batch
from glm45_jax.model import cost
from glm45_jax.model.config import ModelConfig
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.rollout.sampling import generate
from glm45_jax.sharding import MeshShape, Rules
from glm45_jax.tokenizer import END_OF_TEXT, Tokenizer
from glm45_jax.train.loop import Outcome, Validate, resume, run_steps
from glm45_jax.train.parallel import Pmap, Recipe, Trainer, make_trainer
from glm45_jax.train.report import write_report
from glm45_jax.train.state import Train, TrainState

log = logging.getLogger(__name__)

MAX_PADDING_ROWS = 1024  # of the embedding beyond the tokenizer's ids; the released table has 187
# What may change in a workdir that goes on.
MAY_CHANGE = ("mesh", "rules", "train.log_every", "train.save_every", "train.keep")


class BadInput(ValueError):
    """What the user gave cannot be run: one message for people, no traceback."""


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
class Report:
    """What the report shows beside the curves: continuations of prompts, and n-gram models fitted
    on the training tokens.
    """

    prompts: tuple[str, ...] = ()
    max_tokens: int = 64
    temperature: float = 0.8
    ngrams: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole run as a value. `run(experiment, workdir)` returns how it ended.

    mesh: `MeshShape` for jit on a mesh, `Pmap` for pmap on this host. rl and evals belong to later
    loops.
    """

    name: str
    model: ModelConfig
    data: Data
    optim: Muon | AdamW
    train: Train
    mesh: MeshShape | Pmap = MeshShape()
    rules: Rules = Rules()
    init: Scratch | FromRun | FromHF = Scratch()
    report: Report = Report()
    seed: int = 0
    rl: None = None
    evals: tuple[Any, ...] = ()
    run: Callable[[Experiment, pathlib.Path], Outcome] = dataclasses.field(
        default_factory=lambda: run_training
    )

    def __post_init__(self) -> None:
        spare = self.model.vocab - self.data.vocab
        if not 0 <= spare <= MAX_PADDING_ROWS:
            raise ValueError(
                f"the tokenizer has {self.data.vocab} ids, the model {self.model.vocab} rows; "
                f"make model.vocab equal to data.vocab, or up to {MAX_PADDING_ROWS} larger"
            )
        for _, rows in self.batch_sizes():
            self.train.accum(rows)

    def batch_sizes(self) -> list[tuple[int, int]]:
        """(first step, rows of the global batch) of every piece of the batch ramp."""
        pieces = self.train.ramp(self.data.seq_len).pieces
        return [(first, rows) for first, _, rows in pieces if first < self.train.steps]

    def devices(self) -> int:
        """Devices the mesh asks for; those that are here where it says -1."""
        if isinstance(self.mesh, Pmap):
            return jax.local_device_count() if self.mesh.devices == -1 else self.mesh.devices
        sizes = dataclasses.astuple(self.mesh)
        return jax.device_count() if -1 in sizes else int(np.prod(sizes))


def run_training(exp: Experiment, workdir: pathlib.Path) -> Outcome:
    """Trains, resuming where `workdir` holds this experiment already; ends with a report.

    Raises: BadInput for anything that is wrong before the first step, with nothing overwritten.
    """
    began = time.monotonic()
    try:
        ready = _open(exp, workdir)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(str(error)) from error
    log.info("%d devices, step %d of %d", ready.trainer.n_devices, ready.start, exp.train.steps)
    state, outcome = _train(ready)
    if jax.process_index() == 0 and outcome.why != "not finite":
        path = _write_report(ready, state, outcome, time.monotonic() - began)
        log.info("report: %s", path)
    return outcome


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A run whose every door has been passed."""

    exp: Experiment
    workdir: pathlib.Path
    prepared: Prepared
    source: Any
    validation: Batch
    trainer: Trainer
    checkpoints: Checkpoints
    state: TrainState
    start: int


def _open(exp: Experiment, workdir: pathlib.Path) -> _Ready:
    """Every check first, what is written last: a run that is refused leaves no mark."""
    _check_claim(exp, workdir)
    recipe = Recipe(exp.model, exp.optim, exp.train, packed=_packed(exp.data))
    trainer = make_trainer(exp.mesh, recipe, exp.rules)
    for _, rows in exp.batch_sizes():
        trainer.check_rows(rows)
    trainer.check_rows(exp.train.validate_rows)
    prepared = prepare(exp.data, workdir / "data")
    _check_tokenizer(exp, prepared.tokenizer)
    source = _loader(exp, prepared, "train", exp.seed, exp.train.ramp(exp.data.seq_len).span)
    # Fixed rows, the same on every run.
    validation = _loader(exp, prepared, "val", 0, lambda step: (0, exp.train.validate_rows)).batch(
        0
    )
    checkpoints = Checkpoints(workdir / "checkpoints", keep=exp.train.keep)
    resumed = resume(trainer, checkpoints)
    if resumed is None:
        state, start = _initial(exp, trainer), 0
    else:
        state, sidecars, start = resumed
        source.check_state(sidecars["loader"])
        log.info("resuming at step %d", start)
    _write_claim(exp, workdir)
    return _Ready(exp, workdir, prepared, source, validation, trainer, checkpoints, state, start)


def _check_tokenizer(exp: Experiment, tokenizer: Tokenizer) -> None:
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


def _check_claim(exp: Experiment, workdir: pathlib.Path) -> None:
    """The workdir is new, or holds this experiment.

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
    differ = [
        f"{key}: {there!r} there, {here!r} here"
        for key, there, here in values.diff(old, exp)
        if not key.startswith(MAY_CHANGE)
    ]
    if differ:
        raise ValueError(
            f"{workdir} holds another experiment ({'; '.join(differ[:5])}); "
            "nothing was touched; give another --workdir, or the old values"
        )


def _write_claim(exp: Experiment, workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "experiment.json").write_text(json.dumps(values.to_json(exp), indent=1))


def _packed(data: Data) -> bool:
    """False where every row is one document to the model: joined and cut, without a document
    mask.
    """
    return getattr(data.packing, "document_mask", True)


def _loader(
    exp: Experiment,
    prepared: Prepared,
    split: str,
    seed: int,
    span: Callable[[int], tuple[int, int]],
) -> Any:
    from glm45_jax.data.loader import Loader  # grain is not on every machine that trains

    return Loader(
        data_rows(exp.data, prepared, split),
        seed=seed,
        span=span,
        host=(jax.process_index(), jax.process_count()),
        fingerprint=prepared.fingerprint,
    )


def _initial(exp: Experiment, trainer: Trainer) -> TrainState:
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


def _warn_of_numbers(cfg: ModelConfig, exp: Experiment) -> None:
    """None; logs what the weights were trained with and the experiment has otherwise (a stage may
    want that: the RoPE base is raised before long contexts).
    """
    for key, theirs, ours in values.diff(cfg, exp.model):
        if key.startswith(("mixer", "moe", "norm_eps")):
            log.warning("%s: %s %r there, %r in the experiment", exp.name, key, theirs, ours)


def _train(ready: _Ready) -> tuple[TrainState, Outcome]:
    exp = ready.exp
    peak, source_of_peak = cost.peak_flops(jax.devices()[0])
    log.info("peak of a device: %.3g FLOP/s (%s)", peak, source_of_peak)
    main_host = jax.process_index() == 0
    writers: list[metrics.Writer] = []
    if main_host:
        writers = [
            metrics.Jsonl.open_resumed(ready.workdir / "metrics.jsonl", ready.start + 1),
            metrics.TensorBoard(ready.workdir / "tensorboard", purge_step=ready.start + 1),
        ]
    progress = metrics.Progress(exp.train.steps, ready.start) if main_host else None
    # Also after step 10, where the report starts counting, and at the end.
    at = (min(10, exp.train.steps), exp.train.steps)
    validate = Validate([ready.validation], exp.train.validate_every, at)
    n_devices = ready.trainer.n_devices
    mfu_of_one = cost.mfu(1.0, exp.model, exp.data.seq_len, n_devices, peak)
    try:
        return run_steps(
            ready.trainer,
            ready.state,
            ready.source,
            train=exp.train,
            start=ready.start,
            workdir=ready.workdir,
            checkpoints=ready.checkpoints,
            sidecars={"experiment": values.to_json(exp)},
            writers=writers,
            progress=progress,
            hooks=[validate],
            utilisation=lambda tokens_per_s: tokens_per_s * mfu_of_one,
        )
    finally:
        for writer in [*writers, *([progress] if progress else [])]:
            writer.close()
        ready.checkpoints.close()


def _write_report(
    ready: _Ready, state: TrainState, outcome: Outcome, seconds: float
) -> pathlib.Path:
    exp = ready.exp
    counts = cost.param_counts(exp.model)
    active = counts.active_body_and_head
    train_tokens = sum(s.manifest.n_tokens for s in ready.prepared.train.values())
    facts = {
        "experiment": exp.name,
        "ended": f"{outcome.why}, at step {outcome.step} of {exp.train.steps}",
        "device": f"{ready.trainer.n_devices} x {jax.devices()[0].device_kind}",
        "parameters": f"{counts.total_stored:,} stored, {active:,} active a token",
        "tokens": f"{outcome.tokens:,} in this session",
        "time": f"{outcome.seconds:.0f} s training and compiling, {seconds:.0f} s with data",
        "training tokens": f"{train_tokens:,} there (vocabulary {exp.data.vocab:,})",
    }
    baselines = (
        ngram_losses(ready.prepared, ready.validation, exp.data.vocab) if exp.report.ngrams else {}
    )
    samples = _samples(ready, state) if exp.report.prompts else []
    path = write_report(
        ready.workdir, title=exp.name, facts=facts, baselines=baselines, samples=samples
    )
    for name, nats in baselines.items():
        log.info("%s: %.4f nats a token", name, nats)
    return path


def ngram_losses(prepared: Prepared, batch: Batch, vocab: int) -> dict[str, float]:
    """Nats a token of a unigram and a Kneser-Ney bigram model fitted on all training tokens, on the
    validation targets.
    """
    train = np.concatenate(
        [store.read(0, store.manifest.n_tokens) for store in prepared.train.values()]
    )
    rows_BT1 = np.concatenate([batch.tokens_BT, batch.targets_BT[:, -1:]], axis=1)
    return {
        "unigram": float(ngram.unigram_nats(train, rows_BT1, vocab)),
        "bigram": float(ngram.bigram_nats(train, rows_BT1, vocab)),
    }


def _samples(ready: _Ready, state: TrainState) -> list[tuple[str, str]]:
    exp, tokenizer = ready.exp, ready.prepared.tokenizer
    params = ready.trainer.save_view(state).params
    ids = generate(
        params,
        [tokenizer.encode(text) for text in exp.report.prompts],
        cfg=exp.model,
        max_tokens=exp.report.max_tokens,
        temperature=exp.report.temperature,
        stop=(tokenizer.id_of(END_OF_TEXT),),
        key=jax.random.key(exp.seed),
    )
    return [
        (prompt, tokenizer.decode(out)) for prompt, out in zip(exp.report.prompts, ids, strict=True)
    ]
