"""What each choice of the recipe is worth: runs that differ in one thing, at any size.

An ablation is a function of a base experiment; `ABLATIONS` names them. Every arm is trained as any
experiment is, and its final weights are scored on rows that all arms share, because the rows of a
run's own validation may be what differs.

    python -m experiments.ablations optimizer --workdir runs/ablation --seeds 2

runs one at tiny size on a CPU; `--base experiments.pretrain:mini` (or any other `module:function`)
and `--set path=value` make it larger. What a workdir has is not done again.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments import pretrain
from experiments.sweep import Ablation, figure, only, run, table
from glm45_jax import main as door
from glm45_jax import metrics, values
from glm45_jax.data.fim import Fim, WithFim
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.data.prepare import Data
from glm45_jax.data.sources import PydocTopics, PythonSources
from glm45_jax.experiment import BadInput, Experiment, Report
from glm45_jax.model import cost
from glm45_jax.model.config import Gqa, ModelConfig
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant, Cosine, Wsd

WIDTH_MULTIPLE = 8  # of widths that are searched for


def tiny() -> Experiment:
    """`pretrain:tiny`, with Python files to read, longer rows and more steps: seconds an arm on a
    CPU, and compiling.
    """
    base = pretrain.tiny()
    steps, seq_len = 150, 64
    tokens = float(steps * base.train.rows * seq_len)
    return dataclasses.replace(
        base,
        name="ablation_tiny",
        data=dataclasses.replace(
            base.data,
            sources=((PydocTopics(), 0.5), (PythonSources(), 0.5)),
            seq_len=seq_len,
            max_docs=300,
        ),
        optim=dataclasses.replace(
            base.optim, schedule=Cosine(warmup=0.1 * tokens, total=tokens, end=0.1)
        ),
        train=dataclasses.replace(
            base.train, steps=steps, save_every=0, validate_every=50, validate_rows=64
        ),
        report=Report(),
    )


def optimizer(base: Experiment, factors: Sequence[float] = (1.0, 0.3, 3.0)) -> Ablation:
    """Muon against AdamW for every weight, each at its peak rate times these factors: the best of
    one is compared with the best of the other.

    Muon's updates have AdamW's size (rms 0.2), so one scale of rates suits both. Source: spec 2.7.
    """
    others = AdamW(
        lr=base.optim.lr,
        schedule=base.optim.schedule,
        weight_decay=base.optim.weight_decay,
        decay_kinds=base.optim.decay_kinds,
        clip_norm=base.optim.clip_norm,
    )
    kinds: tuple[tuple[str, Muon | AdamW], ...] = (
        ("muon", base.optim if isinstance(base.optim, Muon) else _muon_like(base.optim)),
        ("adamw", others),
    )
    arms = tuple(
        (f"{name}_lr_x{f:g}", dataclasses.replace(base, optim=_times(optim, f)))
        for name, optim in kinds
        for f in factors
    )
    return _judged("Does Muon learn more from the same tokens than AdamW?", base, arms)


def schedule(base: Experiment, decay_fractions: Sequence[float] = (0.2, 0.4)) -> Ablation:
    """One cosine against warmup, stable, decay to the same end. Source: spec 5.2."""
    of = base.optim.schedule
    if not isinstance(of, Cosine):
        raise ValueError(f"the base's schedule is {of!r}; give a base whose schedule is a Cosine")
    arms = [("cosine", base)]
    for fraction in decay_fractions:
        stable = Wsd(warmup=of.warmup, total=of.total, decay_fraction=fraction, end=of.end)
        optim = dataclasses.replace(base.optim, schedule=stable)
        arms.append((f"wsd_decay_{fraction:g}", dataclasses.replace(base, optim=optim)))
    return _judged("Is one cosine better than holding the rate and decaying?", base, tuple(arms))


def bias(
    base: Experiment, rates: Sequence[float] = (1e-3, 1e-2, 0.0), heavy: float = 1e-2
) -> Ablation:
    """Loss-free balancing at several rates and off, and off with no balance loss or a heavy one.

    A run of few steps needs a larger rate than the paper's 1e-3 to come as far. Source: spec 2.6.
    """
    _refuse_stages(base, "bias_rate")
    arms = [(f"bias_{rate:g}", _train(base, bias_rate=Constant(rate))) for rate in rates]
    for name, weight in (("no_balancing", 0.0), (f"balance_loss_{heavy:g}", heavy)):
        both = _train(base, bias_rate=Constant(0.0), balance_weight=Constant(weight))
        arms.append((name, both))
    question = "Does moving the router's bias even out the experts, and what does it cost?"
    return _judged(question, base, tuple(arms), watch=("load_max_over_mean", "bias_drift"))


def mtp_weight(base: Experiment, weights: Sequence[float] = (0.3, 0.1, 0.0)) -> Ablation:
    """The weight of the MTP loss; 0 keeps the layer and teaches it nothing. Source: spec 2.5."""
    _refuse_stages(base, "mtp_weight")
    arms = tuple((f"mtp_{w:g}", _train(base, mtp_weight=Constant(w))) for w in weights)
    question = "Does guessing the token after the next help the next one?"
    return _judged(question, base, arms, watch=("loss/mtp",))


def qk_norm(base: Experiment, factors: Sequence[float] = (1.0, 4.0)) -> Ablation:
    """With and without QK-norm, at rates where it may matter: it is there for stable attention
    logits. GLM-4.5 has it, Air has not. Source: spec 1.1.
    """
    arms = tuple(
        (
            f"{'with' if norm else 'without'}_lr_x{f:g}",
            dataclasses.replace(
                base, model=_mixed(base.model, qk_norm=norm), optim=_times(base.optim, f)
            ),
        )
        for norm in (True, False)
        for f in factors
    )
    return _judged("Does normalising queries and keys help, and at which rate?", base, arms)


def heads(base: Experiment, ratios: Sequence[float] = (2.4, 1.0)) -> Ablation:
    """Query heads so that heads x head_dim is about this many times the width; key-value heads, and
    so the cache, stay. GLM-4.5 has 96 x 128 for 5,120, which is 2.4. Source: spec 2.2.
    """
    mixer, width = _gqa(base.model), base.model.d_model
    arms = []
    for ratio in ratios:
        n = _heads_near(ratio * width / mixer.head_dim, mixer.kv_heads)
        arms.append((f"heads_{n}", dataclasses.replace(base, model=_mixed(base.model, heads=n))))
    question = "Are more heads worth it? The paper sees no lower loss, but better reasoning."
    return _judged(question, base, tuple(dict(arms).items()))


def depth_width(base: Experiment, factors: Sequence[float] = (2.0, 1.0, 0.5)) -> Ablation:
    """This many times the MoE layers, and a width at which a token still meets as many parameters
    of the body; heads, MLP and experts shrink and grow with the width. GLM-4.5 is the deep one.
    """
    arms = []
    for factor in factors:
        model = with_depth(base.model, max(1, round(base.model.n_moe * factor)))
        name = f"layers_{model.n_layers}_width_{model.d_model}"
        arms.append((name, dataclasses.replace(base, model=model)))
    question = "Deep and narrow, or wide and shallow, at equal active parameters?"
    return _judged(question, base, tuple(dict(arms).items()))


def fim_rate(
    base: Experiment, rates: Sequence[float] = (0.5, 0.0, 0.9), names: tuple[str, ...] = ("python",)
) -> Ablation:
    """How many documents of the code sources are turned to fill in the middle. Judged twice: on
    plain documents and on documents to fill in. GLM-4.5's rate is not published.

    names: of the sources that are code. Source: spec 6.1 (D10).
    """
    arms = tuple(
        (f"fim_{rate:g}", dataclasses.replace(base, data=with_fim(text_of(base), rate, names)))
        for rate in rates
    )
    judges = (
        ("plain", with_fim(text_of(base), 0.0, names)),
        ("infill", with_fim(text_of(base), 1.0, names)),
    )
    question = "Does learning to infill cost left-to-right loss?"
    return _judged(question, base, arms, judges=judges)


def packing(base: Experiment) -> Ablation:
    """Cut anywhere, cut with a document mask, or best fit of whole documents, at equal places of
    the batch (padding is part of them). Judged on rows of both kinds. Source: spec 5.3.
    """
    _refuse_stages(base, "packing")
    kinds = (
        ("cut", Cut()),
        ("cut_masked", Cut(document_mask=True)),
        ("best_fit", BestFit()),
    )
    made = {name: dataclasses.replace(text_of(base), packing=kind) for name, kind in kinds}
    arms = tuple((name, dataclasses.replace(base, data=data)) for name, data in made.items())
    judges = (("joined rows", made["cut"]), ("whole documents", made["best_fit"]))
    return _judged("Should documents be cut or fitted?", base, arms, judges=judges)


ABLATIONS: dict[str, Callable[[Experiment], Ablation]] = {
    "optimizer": optimizer,
    "schedule": schedule,
    "bias": bias,
    "mtp_weight": mtp_weight,
    "qk_norm": qk_norm,
    "heads": heads,
    "depth_width": depth_width,
    "fim_rate": fim_rate,
    "packing": packing,
}


def text_of(base: Experiment) -> Data:
    """What a run reads. Raises: ValueError for one that reads conversations."""
    if not isinstance(base.data, Data):
        raise ValueError(
            f"{base.name} reads {type(base.data).__name__}; give a base that reads Data"
        )
    return base.data


def with_depth(model: ModelConfig, n_moe: int) -> ModelConfig:
    """So many MoE layers, and the width whose active body is nearest to that of this model."""
    wanted = cost.param_counts(model).active_body

    def at(width: int) -> ModelConfig:
        return _with_width(dataclasses.replace(model, n_moe=n_moe), width)

    widths = range(WIDTH_MULTIPLE, 4 * model.d_model + 1, WIDTH_MULTIPLE)
    if n_moe == model.n_moe:
        return model
    return min(map(at, widths), key=lambda m: abs(cost.param_counts(m).active_body - wanted))


def with_fim(data: Data, rate: float, names: tuple[str, ...]) -> Data:
    """Data with the sources of these names in fill-in-the-middle form; documents are cut at about
    two rows first, so that a row holds much of one.
    """
    known = [source.name for source, _ in data.sources]
    if missing := sorted(set(names) - set(known)):
        raise ValueError(f"no source {missing} to infill; the base has {known}: give names=")
    how = Fim(rate=rate)
    sources = tuple(
        (WithFim(s, how, max_chars=6 * data.seq_len) if s.name in names else s, weight)
        for s, weight in data.sources
    )
    return dataclasses.replace(data, sources=sources)


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, 2 for bad input, 143 stopped by a signal; start it again to go on."""
    parser = argparse.ArgumentParser(prog="python -m experiments.ablations")
    parser.add_argument("name", choices=sorted(ABLATIONS))
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--base", default="experiments.ablations:tiny", help="module:function")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", help="only these; default all")
    args = parser.parse_args(argv)
    metrics.setup_logging()
    try:
        base = values.override(door.find(args.base)(), args.set)
        ablation = only(ABLATIONS[args.name](base), args.arms)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return door.BAD_INPUT
    # Arms and seeds share most of their programs.
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(args.workdir / "compiled"))
    try:
        results = run(ablation, args.workdir, range(args.seeds))
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        return door.BAD_INPUT
    except KeyboardInterrupt as stopped:
        sys.stderr.write(f"{stopped}\n")
        return door.STOPPED
    text = table(ablation, results)
    (args.workdir / "table.md").write_text(text + "\n", encoding="utf-8")
    figure(ablation, args.workdir).savefig(args.workdir / "curves.png", dpi=150)
    sys.stdout.write(text + "\n")
    return 0


def _judged(
    question: str,
    base: Experiment,
    arms: tuple[tuple[str, Experiment], ...],
    judges: tuple[tuple[str, Data], ...] | None = None,
    watch: tuple[str, ...] = (),
) -> Ablation:
    """The ablation, judged by the validation rows of the base's last stage where nothing else is
    said.
    """
    if judges is None:
        judges = (("validation", text_of(base.of(base.spans[-1]))),)
    return Ablation(question, arms, judges, watch)


def _train(base: Experiment, **changes: Any) -> Experiment:
    return dataclasses.replace(base, train=dataclasses.replace(base.train, **changes))


def _times(optim: Muon | AdamW, factor: float) -> Muon | AdamW:
    return dataclasses.replace(optim, lr=optim.lr * factor)


def _muon_like(other: AdamW) -> Muon:
    return Muon(
        lr=other.lr,
        schedule=other.schedule,
        weight_decay=other.weight_decay,
        decay_kinds=other.decay_kinds,
        clip_norm=other.clip_norm,
    )


def _gqa(model: ModelConfig) -> Gqa:
    if not isinstance(model.mixer, Gqa):
        raise ValueError(f"the base's attention is {type(model.mixer).__name__}; give one of Gqa")
    return model.mixer


def _mixed(model: ModelConfig, **changes: Any) -> ModelConfig:
    return dataclasses.replace(model, mixer=dataclasses.replace(_gqa(model), **changes))


def _with_width(model: ModelConfig, width: int) -> ModelConfig:
    """The model at another width, all that stands in proportion to it too."""
    mixer, share = _gqa(model), width / model.d_model

    def near(size: int) -> int:
        return max(WIDTH_MULTIPLE, round(size * share / WIDTH_MULTIPLE) * WIDTH_MULTIPLE)

    return dataclasses.replace(
        model,
        d_model=width,
        d_mlp=near(model.d_mlp),
        moe=dataclasses.replace(model.moe, d_expert=near(model.moe.d_expert)),
        mixer=dataclasses.replace(mixer, heads=_heads_near(mixer.heads * share, mixer.kv_heads)),
    )


def _heads_near(wanted: float, kv_heads: int) -> int:
    return max(1, round(wanted / kv_heads)) * kv_heads


def _refuse_stages(base: Experiment, what: str) -> None:
    if base.stages:
        raise ValueError(
            f"{base.name} sets {what} stage by stage; give a base without stages, or edit them"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
