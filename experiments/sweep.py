"""Running an ablation: arms that differ in one thing, judged by rows that all of them share.

Types to know: `Ablation` (what is compared) and `Result` (one arm of one seed). The ablations are
in `experiments/ablations.py`.
"""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from glm45_jax import metrics
from glm45_jax.data.loader import Loader
from glm45_jax.data.prepare import Data, prepare, rows
from glm45_jax.experiment import Experiment, same_rows
from glm45_jax.model import cost
from glm45_jax.start import FromRun, initial
from glm45_jax.train.parallel import Recipe, make_trainer

log = logging.getLogger("glm45_jax")

DECIMALS = 4


@dataclasses.dataclass(frozen=True)
class Ablation:
    """arms: (name, experiment), names fit for folders; the first is what GLM-4.5 does or comes
    nearest to it. judges: (name, data) whose validation rows score every arm; all have one
    tokenizer. watch: training metrics shown beside the scores, as they are at the end.
    """

    question: str
    arms: tuple[tuple[str, Experiment], ...]
    judges: tuple[tuple[str, Data], ...]
    watch: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Result:
    """One arm of one seed. losses: nats a token by judge; not a number where the run did not end.
    watched: by metric. tokens: places that were trained on, padding included.
    """

    arm: str
    seed: int
    ended: str
    losses: dict[str, float]
    watched: dict[str, float]
    tokens: int
    body: int
    active_body: int


def only(ablation: Ablation, names: Sequence[str] | None) -> Ablation:
    """The ablation with these arms alone; None keeps all. Raises: ValueError for unknown names."""
    if names is None:
        return ablation
    known = dict(ablation.arms)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"no arms {unknown}; there are {list(known)}")
    return dataclasses.replace(ablation, arms=tuple((n, known[n]) for n in names))


def run(ablation: Ablation, workdir: pathlib.Path, seeds: Sequence[int] = (0,)) -> list[Result]:
    """Trains and scores every arm of every seed, in `workdir/<arm>/<seed>`; corpora are made once
    for all arms. Writes `workdir/results.json` after each.

    Raises: KeyboardInterrupt after a signal; the arm's checkpoint is there, and goes on next time.
    """
    found: list[Result] = []
    for seed in seeds:
        for name, arm in ablation.arms:
            folder = workdir / name / str(seed)
            _share_data(folder, workdir)
            exp = dataclasses.replace(arm, name=f"{arm.name}_{name}", seed=seed)
            log.info("arm %s, seed %d", name, seed)
            outcome = exp.run(exp, folder)
            if outcome.why == "stopped":
                raise KeyboardInterrupt(f"stopped in {folder} at step {outcome.step}")
            found.append(_result(ablation, exp, name, folder, outcome.why))
            report = [dataclasses.asdict(one) for one in found]
            (workdir / "results.json").write_text(json.dumps(report, indent=1))
    return found


def score(exp: Experiment, folder: pathlib.Path, judges: Mapping[str, Data]) -> dict[str, float]:
    """Nats a token, by judge, of the newest weights in a run's folder, on as many validation tokens
    as the run's own.
    """
    first, last = exp.of(exp.spans[0]), exp.of(exp.spans[-1])
    losses = {}
    for name, data in judges.items():
        packed = getattr(data.packing, "document_mask", True)
        trainer = make_trainer(
            exp.mesh, Recipe(last.model, last.optim, last.train, packed=packed), exp.rules
        )
        state = initial(dataclasses.replace(exp, init=FromRun(str(folder))), trainer)
        n = exp.train.validate_rows * first.data.seq_len // data.seq_len
        prepared = prepare(read_by(exp, data), folder / "data")
        loader = Loader(
            rows(data, prepared, "val"),
            seed=0,
            span=functools.partial(same_rows, n),
            host=(jax.process_index(), jax.process_count()),
            fingerprint=prepared.fingerprint,
        )
        total, targets = trainer.nll(state, loader.batch(0))
        losses[name] = total / targets
    return losses


def read_by(exp: Experiment, judge: Data) -> Data:
    """What a judge's rows are read from: the run's own data where that has all of its sources, as
    those of a stage are some of the run's, whose tokenizer the weights know; else its own.
    """
    own = [source for source, _ in exp.data.sources]
    if isinstance(exp.data, Data) and all(source in own for source, _ in judge.sources):
        return exp.data
    return judge


def table(ablation: Ablation, results: Sequence[Result]) -> str:
    """Markdown: a row an arm, means over its seeds, and half the range of them where there are
    several.
    """
    judges, watch = [name for name, _ in ablation.judges], ablation.watch
    head = ["arm", *(f"{name}, nats a token" for name in judges), *watch, "active body", "seeds"]
    lines = [_line(head), "|" + "---|" * len(head)]
    for name, _ in ablation.arms:
        own = [one for one in results if one.arm == name]
        if own:
            cells = [_mean([one.losses[judge] for one in own]) for judge in judges]
            cells += [_mean([one.watched[metric] for one in own]) for metric in watch]
            lines.append(_line([name, *cells, f"{own[0].active_body:,}", str(len(own))]))
    return "\n".join([ablation.question, "", *lines])


def figure(ablation: Ablation, workdir: pathlib.Path) -> Any:
    """A matplotlib figure of what `run` left: next-token loss by tokens, an arm a colour, a seed a
    line; means over a twentieth of the run.
    """
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawn.add_subplot()
    for number, (name, _) in enumerate(ablation.arms):
        for seed, path in enumerate(sorted((workdir / name).glob("*/metrics.jsonl"))):
            logged = metrics.read_jsonl(path)
            width = max(1, len(logged) // 20)
            smooth = np.convolve(
                [r.scalars["loss/ce"] for r in logged], np.ones(width) / width, "valid"
            )
            seen = [r.scalars["tokens"] for r in logged[width - 1 :]]
            axes.plot(seen, smooth, color=f"C{number}", label=None if seed else name, linewidth=1.3)
    axes.set(title=ablation.question, xlabel="tokens", ylabel="training loss, nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return drawn


def _result(
    ablation: Ablation, exp: Experiment, name: str, folder: pathlib.Path, ended: str
) -> Result:
    judges = dict(ablation.judges)
    finite = ended == "done"
    losses = score(exp, folder, judges) if finite else dict.fromkeys(judges, float("nan"))
    logged = metrics.read_jsonl(folder / "metrics.jsonl")
    last = logged[-1].scalars if logged else {}
    counts = cost.param_counts(exp.model)
    return Result(
        arm=name,
        seed=exp.seed,
        ended=ended,
        losses=losses,
        watched={metric: last.get(metric, float("nan")) for metric in ablation.watch},
        tokens=int(last.get("tokens", 0)),
        body=counts.body,
        active_body=counts.active_body,
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _share_data(folder: pathlib.Path, workdir: pathlib.Path) -> None:
    """One data folder for all arms: stores are named by what they are made of."""
    folder.mkdir(parents=True, exist_ok=True)
    (workdir / "data").mkdir(exist_ok=True)
    link = folder / "data"
    if not link.exists():
        link.symlink_to(pathlib.Path("..") / ".." / "data", target_is_directory=True)


def _mean(numbers: Sequence[float]) -> str:
    half = (max(numbers) - min(numbers)) / 2
    spread = f" ± {half:.{DECIMALS}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{DECIMALS}f}{spread}"
