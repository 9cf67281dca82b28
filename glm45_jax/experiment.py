"""The one value that describes a run, and what running it means. The type to know is `Experiment`.

`run_training` is the run of pretraining, mid-training and SFT: it opens data, checkpoints and
writers, wires the hooks, and hands all of it to `train.loop`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from glm45_jax import hosts, metrics, values
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.data import ngram
from glm45_jax.data.prepare import Data, Prepared
from glm45_jax.data.sft import Chats, prepare_any, prompt_ids, rows_of_any
from glm45_jax.data.types import Batch
from glm45_jax.model import cost
from glm45_jax.model.config import ModelConfig
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant
from glm45_jax.rl import run as rl_run
from glm45_jax.rl.config import Rl
from glm45_jax.rl.loop import Outcome as RlOutcome
from glm45_jax.rl.report import report_run
from glm45_jax.rollout.sampling import generate
from glm45_jax.sharding import MeshShape, Rules
from glm45_jax.start import (
    FromHF,
    FromRun,
    FromSmolLM2,
    Scratch,
    check_claim,
    check_tokenizer,
    initial,
    trainers_of,
    write_claim,
)
from glm45_jax.train.ahead import Asked, compiling, of_span
from glm45_jax.train.goodput import Goodput
from glm45_jax.train.loop import Outcome, Validate, resume, run_steps
from glm45_jax.train.parallel import Pmap, Trainer
from glm45_jax.train.report import write_report
from glm45_jax.train.stages import Span, Stage, spans, total_steps
from glm45_jax.train.state import Train, TrainState
from glm45_jax.train.trackers import ClearML, TensorBoard, Untracked, Wandb

log = logging.getLogger(__name__)

MAX_PADDING_ROWS = 1024  # of the embedding beyond the tokenizer's ids; the released table has 187


class BadInput(ValueError):
    """What the user gave cannot be run: one message for people, no traceback."""


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

    mesh: `MeshShape` for jit on a mesh, `Pmap` for pmap on this host. stages: a run of several
    stages; each sets the sequence length, mixture, packing, batch, RoPE base, bias rate and MTP
    weight that `data`, `train` and `model` otherwise say (see `Experiment.of`). rl: of runs of the
    second loop, whose `run` is `run_rl`; train.steps are its batches then, train.rows what a batch
    of packed rows is a multiple of. evals belong to a later loop. tracker: where to watch it.
    report: None writes none, and needs no matplotlib.
    """

    name: str
    model: ModelConfig
    data: Data | Chats
    optim: Muon | AdamW
    train: Train
    mesh: MeshShape | Pmap = MeshShape()
    rules: Rules = Rules()
    init: Scratch | FromRun | FromHF | FromSmolLM2 = Scratch()
    report: Report | None = Report()
    tracker: TensorBoard | Wandb | ClearML | Untracked = TensorBoard()
    seed: int = 0
    stages: tuple[Stage, ...] = ()
    rl: Rl | None = None
    evals: tuple[Any, ...] = ()
    run: Callable[[Experiment, pathlib.Path], Outcome | RlOutcome] = dataclasses.field(
        default_factory=lambda: run_training
    )

    def __post_init__(self) -> None:
        spare = self.model.vocab - self.data.vocab
        if not 0 <= spare <= MAX_PADDING_ROWS:
            raise ValueError(
                f"the tokenizer has {self.data.vocab} ids, the model {self.model.vocab} rows; "
                f"make model.vocab equal to data.vocab, or up to {MAX_PADDING_ROWS} larger"
            )
        if self.stages:
            self._check_stages()
        if self.rl is not None:
            self.rl.check_row(self.data.seq_len)
        for _, rows in self.batch_sizes():
            self.train.accum(rows)

    def _check_stages(self) -> None:
        if self.train.steps > total_steps(self.stages):
            raise ValueError(
                f"train.steps {self.train.steps} is beyond the {total_steps(self.stages)} steps of "
                "the stages"
            )
        known = {source.name for source, _ in self.data.sources}
        for stage in self.stages:
            if unknown := sorted({name for name, _ in stage.mixture} - known):
                raise ValueError(
                    f"stage {stage.name} mixes {unknown}, data.sources has {sorted(known)}"
                )

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """The stages in steps; without stages, one span that is the whole run."""
        if self.stages:
            return spans(self.stages)
        return (Span(self.train.ramp(self.data.seq_len), 0, self.train.steps),)

    def of(self, span: Span) -> Experiment:
        """What one stage trains: the one place where a stage becomes model, data and train."""
        stage = span.stage
        if stage is None:
            return self
        weights = dict(stage.mixture)
        sources = tuple((s, weights[s.name]) for s, _ in self.data.sources if s.name in weights)
        mixer = dataclasses.replace(self.model.mixer, rope_theta=stage.rope_theta)
        return dataclasses.replace(
            self,
            stages=(),
            model=dataclasses.replace(self.model, mixer=mixer),
            data=dataclasses.replace(
                self.data, sources=sources, seq_len=stage.seq_len, packing=stage.packing
            ),
            train=dataclasses.replace(
                self.train,
                steps=min(span.end_step, self.train.steps),
                rows=span.ramp.end_rows,
                start_rows=None,
                ramp_tokens=0.0,
                ramp_multiple=1,
                bias_rate=Constant(stage.bias_rate),
                mtp_weight=Constant(stage.mtp_weight),
                guard=dataclasses.replace(self.train.guard, since_step=span.first_step),
            ),
        )

    def batch_sizes(self) -> list[tuple[int, int]]:
        """(first step, rows of the global batch) of every size the batch has in the run."""
        pieces = [piece for span in self.spans for piece in span.sizes()]
        return [(first, rows) for first, rows in pieces if first < self.train.steps]

    def devices(self) -> int:
        """Devices the mesh asks for; those that are here where it says -1."""
        if isinstance(self.mesh, Pmap):
            return jax.local_device_count() if self.mesh.devices == -1 else self.mesh.devices
        sizes = dataclasses.astuple(self.mesh)
        return jax.device_count() if -1 in sizes else int(np.prod(sizes))


def run_training(exp: Experiment, workdir: pathlib.Path) -> Outcome:
    """Trains stage by stage, resuming where `workdir` holds this experiment; ends with a report.

    Raises: BadInput for anything that is wrong before the first step, with nothing overwritten.
    """
    began = time.monotonic()
    try:
        goodput = Goodput(workdir / "goodput.json" if jax.process_index() == 0 else None)
        ready = _open(exp, workdir, goodput)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(str(error)) from error
    leg = ready.legs[0]
    log.info("%d devices, step %d of %d", leg.trainer.n_devices, ready.start, exp.train.steps)
    state, outcome = _train(ready)
    if exp.report is not None and outcome.why != "skips spent":
        params = _for_samples(ready, exp.report, state)
        if jax.process_index() == 0:
            path = _write_report(ready, exp.report, params, outcome, time.monotonic() - began)
            log.info("report: %s", path)
        goodput.spent("hooks")
    log.info("time: %s", goodput.text())
    goodput.write(done=outcome.why == "done")
    return outcome


def run_rl(exp: Experiment, workdir: pathlib.Path) -> RlOutcome:
    """Samples and trains batch by batch, resuming where `workdir` holds this experiment; a cold
    start comes before it, in a workdir of its own. Raises: BadInput, as `run_training`.
    """
    try:
        check_claim(exp, workdir)
        tokenizer, updater = rl_run.tokenizer_of(exp, workdir), rl_run.updater_of(exp)
        check_tokenizer(exp, tokenizer)
    except (ValueError, FileNotFoundError) as error:
        raise BadInput(str(error)) from error
    write_claim(exp, workdir)
    begin = functools.partial(_begin_rl, exp, workdir)
    outcome = rl_run.run(exp, workdir, tokenizer=tokenizer, updater=updater, initial=begin)[1]
    if jax.process_index() == 0:
        log.info("report: %s", report_run(exp, workdir, outcome, tokenizer))
    return outcome


def _begin_rl(exp: Experiment, workdir: pathlib.Path, trainer: Trainer) -> TrainState:
    if (folder := rl_run.cold_start(exp, workdir, run_training)) is not None:
        exp = dataclasses.replace(exp, init=FromRun(folder))
    return initial(exp, trainer)


@dataclasses.dataclass(frozen=True)
class _Leg:
    """A span of the run with what it trains with. validations: fixed rows by length."""

    span: Span
    exp: Experiment
    trainer: Trainer
    source: Any
    validations: dict[int, Batch]


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A run whose every door has been passed. legs: those that still have steps to take."""

    exp: Experiment
    workdir: pathlib.Path
    prepared: Prepared
    legs: list[_Leg]
    checkpoints: Checkpoints
    state: TrainState
    start: int
    goodput: Goodput


def _open(exp: Experiment, workdir: pathlib.Path, goodput: Goodput) -> _Ready:
    """Every check first, what is written last: a run that is refused leaves no mark."""
    check_claim(exp, workdir)
    used = [span for span in exp.spans if span.first_step < exp.train.steps]
    trainers = trainers_of(exp, used)
    prepared = hosts.first_then_others(lambda: prepare_any(exp.data, workdir / "data"), "prepared")
    check_tokenizer(exp, prepared.tokenizer)
    validations = _validations(exp, prepared, trainers[0])
    sources = _sources(exp, prepared, used)
    legs = [
        _Leg(span, exp.of(span), trainer, source, validations)
        for span, trainer, source in zip(used, trainers, sources, strict=True)
    ]
    checkpoints = Checkpoints(workdir / "checkpoints", keep=exp.train.keep)
    goodput.spent("start")
    resumed = resume(trainers[0], checkpoints)
    if resumed is None:
        state, start = initial(exp, trainers[0]), 0
    else:
        state, sidecars, start = resumed
        # The step of a checkpoint belongs to the stage that took it.
        taken = next(leg for leg in legs if start <= leg.span.end_step)
        taken.source.check_state(sidecars["loader"])
        log.info("resuming at step %d", start)
    goodput.spent("restore")
    goodput.resumed(start)
    write_claim(exp, workdir)
    legs = [leg for leg in legs if start < leg.span.end_step] or legs[-1:]
    return _Ready(exp, workdir, prepared, legs, checkpoints, state, start, goodput)


def _sources(exp: Experiment, prepared: Prepared, used: list[Span]) -> list[Any]:
    """Batches of every stage by the steps of the run.

    A stage whose rows are made as those of an earlier one goes on where that one stopped, source by
    source; other rows have an order of their own.
    """
    numbers = {source.name: number for number, (source, _) in enumerate(exp.data.sources)}
    seeds: dict[Any, int] = {}
    drawn: dict[Any, int] = {}
    found = []
    for span in used:
        sub = exp.of(span)
        kind: tuple[Any, ...] = (sub.data.seq_len, sub.data.packing)
        own = [numbers[source.name] for source, _ in sub.data.sources]
        if getattr(sub.data.packing, "window", None) is not None:
            # All sources are packed together: as one, which other weights make another one.
            kind, own = (*kind, tuple((s.name, weight) for s, weight in sub.data.sources)), [0]
        loader = _loader(
            sub,
            prepared,
            "train",
            seeds.setdefault(kind, exp.seed + span.first_step),
            span.rows,
            numbers=own,
            drawn=[drawn.get((kind, number), 0) for number in own],
        )
        for number, rows in zip(own, loader.rows_drawn(span.end_step), strict=True):
            drawn[kind, number] = rows
        found.append(loader)
    return found


def _validations(exp: Experiment, prepared: Prepared, trainer: Trainer) -> dict[int, Batch]:
    """Fixed rows, the same on every run and in every stage: as many tokens of each length."""
    found: dict[int, Batch] = {}
    tokens = exp.train.validate_rows * exp.of(exp.spans[0]).data.seq_len
    for span in exp.spans:
        sub = exp.of(span)
        length = sub.data.seq_len
        if length in found:
            continue
        rows = tokens // length
        trainer.check_rows(rows)
        found[length] = _loader(sub, prepared, "val", 0, functools.partial(same_rows, rows)).batch(
            0
        )
    return found


def same_rows(rows: int, step: int) -> tuple[int, int]:
    """A span of a loader that gives the same rows at every step."""
    del step
    return 0, rows


def _loader(
    exp: Experiment,
    prepared: Prepared,
    split: str,
    seed: int,
    span: Callable[[int], tuple[int, int]],
    **going_on: Any,
) -> Any:
    from glm45_jax.data.loader import Loader

    return Loader(
        rows_of_any(exp.data, prepared, split),
        seed=seed,
        span=span,
        host=(jax.process_index(), jax.process_count()),
        fingerprint=prepared.fingerprint,
        **going_on,
    )


def _train(ready: _Ready) -> tuple[TrainState, Outcome]:
    exp = ready.exp
    peak, source_of_peak = cost.peak_flops(jax.devices()[0])
    log.info("peak of a device: %.3g FLOP/s (%s)", peak, source_of_peak)
    main_host = jax.process_index() == 0
    writers: list[metrics.Writer] = []
    if main_host:
        writers = [
            exp.tracker.open(exp, ready.workdir, ready.start + 1),
            metrics.Jsonl.open_resumed(ready.workdir / "metrics.jsonl", ready.start + 1),
        ]
    progress = metrics.Progress(exp.train.steps, ready.start) if main_host else None
    state, outcomes = ready.state, []
    step = ready.start
    try:
        with compiling(_programs(ready), exp.train.compile_ahead):
            for leg in ready.legs:
                state, outcome = _train_leg(ready, leg, state, step, writers, progress, peak)
                outcomes.append(outcome)
                step = outcome.step
                if outcome.why != "done":
                    break
    finally:
        for writer in [*writers, *([progress] if progress else [])]:
            writer.close()
        ready.checkpoints.close()
    seconds, tokens = sum(o.seconds for o in outcomes), sum(o.tokens for o in outcomes)
    return state, dataclasses.replace(outcomes[-1], seconds=seconds, tokens=tokens)


def _programs(ready: _Ready) -> list[Asked]:
    """What the run has still to compile, in the order in which it needs it."""
    return [
        one
        for leg in ready.legs
        for one in of_span(
            leg.trainer, leg.span, leg.exp.train.steps, ready.start, leg.validations.values()
        )
    ]


def _train_leg(
    ready: _Ready,
    leg: _Leg,
    state: TrainState,
    start: int,
    writers: list[metrics.Writer],
    progress: metrics.Progress | None,
    peak: float,
) -> tuple[TrainState, Outcome]:
    exp, whole = leg.exp, ready.exp.train
    # Also after step 10, where the report starts counting, and at the end of every stage.
    at = (min(10, whole.steps), exp.train.steps)
    own = exp.data.seq_len
    hooks = [
        Validate([batch], whole.validate_every, at, "val/loss" if n == own else f"val/loss_{n}")
        for n, batch in leg.validations.items()
    ]
    n_devices = leg.trainer.n_devices
    mfu_of_one = cost.mfu(1.0, exp.model, own, n_devices, peak)
    facts: dict[str, float] = {}
    if (stage := leg.span.stage) is not None:
        log.info("stage %s: steps %d to %d", stage.name, start, exp.train.steps)
        facts = {"stage": float(ready.exp.stages.index(stage) + 1), **stage.facts}
    return run_steps(
        leg.trainer,
        state,
        leg.source,
        train=exp.train,
        start=start,
        workdir=ready.workdir,
        checkpoints=ready.checkpoints,
        sidecars={"experiment": values.to_json(ready.exp)},
        writers=writers,
        progress=progress,
        hooks=hooks,
        utilisation=lambda tokens_per_s: tokens_per_s * mfu_of_one,
        facts=facts,
        goodput=ready.goodput,
    )


def _write_report(
    ready: _Ready, shown: Report, params: Any, outcome: Outcome, seconds: float
) -> pathlib.Path:
    exp = ready.exp
    counts = cost.param_counts(exp.model)
    active = counts.active_body_and_head
    train_tokens = sum(s.manifest.n_tokens for s in ready.prepared.train.values())
    facts = {
        "experiment": exp.name,
        "ended": f"{outcome.why}, at step {outcome.step} of {exp.train.steps}",
        "device": f"{ready.legs[0].trainer.n_devices} x {jax.devices()[0].device_kind}",
        "parameters": f"{counts.total_stored:,} stored, {active:,} active a token",
        "tokens": f"{outcome.tokens:,} in this session",
        "time": f"{outcome.seconds:.0f} s training and compiling, {seconds:.0f} s with data",
        "all sessions": ready.goodput.text(),
        "training tokens": f"{train_tokens:,} there (vocabulary {exp.data.vocab:,})",
    }
    validation = next(iter(ready.legs[0].validations.values()))
    rows_BT1 = np.concatenate([validation.tokens_BT, validation.targets_BT[:, -1:]], axis=1)
    fit = functools.partial(ngram.losses, ready.prepared.train.values(), rows_BT1, exp.data.vocab)
    baselines = fit() if shown.ngrams else {}
    stages = [(s.stage.name, s.first_step + 1) for s in exp.spans if s.stage is not None]
    path = write_report(
        ready.workdir,
        title=exp.name,
        facts=facts,
        baselines=baselines,
        samples=_samples(ready, shown, params) if shown.prompts else [],
        stages=stages,
    )
    for name, nats in baselines.items():
        log.info("%s: %.4f nats a token", name, nats)
    return path


def _for_samples(ready: _Ready, shown: Report, state: TrainState) -> Any:
    """Weights that one process can sample from; None where no prompt asks for it."""
    if not shown.prompts:
        return None
    return hosts.whole(ready.legs[-1].trainer.save_view(state).params)


def _samples(ready: _Ready, shown: Report, params: Any) -> list[tuple[str, str]]:
    exp, tokenizer = ready.exp, ready.prepared.tokenizer
    ids = generate(
        params,
        [prompt_ids(exp.data, tokenizer, text) for text in shown.prompts],
        cfg=ready.legs[-1].exp.model,
        max_tokens=shown.max_tokens,
        temperature=shown.temperature,
        stop=tokenizer.stop_ids,
        key=jax.random.key(exp.seed),
    )
    return [(prompt, tokenizer.decode(out)) for prompt, out in zip(shown.prompts, ids, strict=True)]
