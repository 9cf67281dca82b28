"""The whole recipe: five stages of pre- and mid-training as values, full size and in small.

`glm45` and `glm45_air` are the paper's numbers (spec 5.1, 5.2); `mini_recipe` (one accelerator) and
`tiny_recipe` (a CPU, minutes) are the same stages through `stages.scaled`.
"""

import dataclasses
from collections.abc import Mapping

from experiments import pretrain
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.data.prepare import Data
from glm45_jax.data.sources import (
    Docstrings,
    PackageDocs,
    PydocTopics,
    PythonSources,
    Source,
    TextFiles,
)
from glm45_jax.experiment import Experiment, Report
from glm45_jax.model import config
from glm45_jax.model.config import Gqa, ModelConfig, Moe
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Cosine
from glm45_jax.sharding import MeshShape
from glm45_jax.train.parallel import Pmap
from glm45_jax.train.stages import Stage, scaled, total_steps
from glm45_jax.train.state import Train

BATCH_TOKENS = 16384 * 4096  # 64M; 2,048 rows of 32K, 512 of 128K (spec 5.1)
START_BATCH_TOKENS = 4096 * 4096  # 16M, over the first 500B tokens
RAMP_MULTIPLE = (
    1024  # rows; linear or in steps is UNVERIFIED, every size compiles a step of its own
)
PEAK_LR, END = 2.5e-4, 0.1  # one cosine to 2.5e-5 over all stages
WARMUP_SHARE = 8e9 / 23.1e12  # UNVERIFIED

# Documents that are packed together in mid-training; at 32K they leave 0.2% padding (docs/log.md).
WINDOW = 1024

# What each stage reads; the weights are UNVERIFIED, the kinds are those of spec 5.1.
WEB = (("web", 0.85), ("code", 0.1), ("science", 0.05))
CODE_AND_REASONING = (("web", 0.4), ("code", 0.4), ("science", 0.2))
REPOSITORIES = (("repositories", 0.8), ("code", 0.2))
REASONING = (("reasoning", 0.7), ("science", 0.2), ("web", 0.1))
LONG_AND_AGENT = (("long", 0.6), ("agent", 0.4))

# What stands in for them where only the installed text is there: documents as web, code as code.
STAND_IN = {
    "web": "topics",
    "code": "python",
    "science": "docstrings",
    "repositories": "python",
    "reasoning": "docstrings",
    "long": "packages",
    "agent": "python",
}
SITE = ("jax", "flax", "optax", "numpy", "scipy")  # packages that `mini_recipe` reads


def _stages() -> tuple[Stage, ...]:
    """The five stages of GLM-4.5, each by what it changes. Source: spec 5.1, 5.2."""
    general = Stage(
        "general",
        tokens=15e12,
        seq_len=4096,
        mixture=WEB,
        packing=Cut(moving=True),  # random truncation, elsewhere every epoch
        rope_theta=1e4,
        bias_rate=1e-3,
        mtp_weight=0.3,
        batch_tokens=BATCH_TOKENS,
        start_batch_tokens=START_BATCH_TOKENS,
        ramp_tokens=500e9,
        ramp_multiple=RAMP_MULTIPLE,
    )
    code_reasoning = dataclasses.replace(
        general,
        name="code_reasoning",
        tokens=7e12,
        mixture=CODE_AND_REASONING,
        bias_rate=0.0,  # this and the MTP weight switch after the first 15T tokens
        mtp_weight=0.1,
        start_batch_tokens=None,
        ramp_tokens=0.0,
        ramp_multiple=1,
    )
    repositories = dataclasses.replace(
        code_reasoning,
        name="repositories",
        tokens=500e9,
        seq_len=32768,
        mixture=REPOSITORIES,
        packing=BestFit(window=WINDOW),
        rope_theta=1e6,
    )
    reasoning = dataclasses.replace(repositories, name="reasoning", mixture=REASONING)
    long_agent = dataclasses.replace(
        repositories, name="long_agent", tokens=100e9, seq_len=131072, mixture=LONG_AND_AGENT
    )
    return general, code_reasoning, repositories, reasoning, long_agent


STAGES = _stages()


def glm45() -> Experiment:
    """All five stages of GLM-4.5 on 512 accelerators; `pretrain:glm45` has the first two. On H100s
    and v6e those of 32K and 128K do not fit so, on v5p the last one: `glm45_long` goes on in its
    workdir, on v6e `glm45_v6e_long` after that.
    """
    return _full(pretrain.glm45(), "glm45_recipe", MeshShape(data=1, fsdp=64, expert=8))


def glm45_air() -> Experiment:
    """All five stages of GLM-4.5-Air on 256 accelerators; `glm45_air_long` for the last one, on
    v6e `glm45_air_v6e_long` for the last three.
    """
    return _full(pretrain.glm45_air(), "glm45_air_recipe", MeshShape(data=1, fsdp=32, expert=8))


def glm45_long() -> Experiment:
    """`glm45` with rows split over 8 devices, which the experts share: for its stages of 32K and
    128K, from where `glm45` was stopped, in its workdir. h100:64x8, where a host holds a row,
    v5p:8x8x8, and for 32K 2*v6e:16x16.
    """
    return _split_rows(glm45())


def glm45_air_long() -> Experiment:
    """The same of `glm45_air`. h100:32x8, v5p:4x8x8."""
    return _split_rows(glm45_air())


def glm45_air_v6e_long() -> Experiment:
    """The same with rows over 16 chips, for the 31 GiB of a v6e. v6e:16x16."""
    return _split_rows(glm45_air(), over=16)


def glm45_v6e_long() -> Experiment:
    """`glm45_long` on twice as many chips, of 31 GiB, 32 of them a row: for the last stage, from
    where `glm45_long` was stopped, in its workdir. 4*v6e:16x16.
    """
    return _split_rows(glm45(), over=32, times=2)


def _split_rows(exp: Experiment, over: int = 8, times: int = 1) -> Experiment:
    """The same devices, or so many times as many, `over` of them a row."""
    assert isinstance(exp.mesh, MeshShape)
    rows = times * exp.mesh.fsdp * exp.mesh.expert // over
    return dataclasses.replace(
        exp,
        mesh=MeshShape(data=1, fsdp=rows, context=over),
        rules=dataclasses.replace(exp.rules, experts=("context",)),
        train=dataclasses.replace(exp.train, micro_rows=rows),
    )


def mini_recipe() -> Experiment:
    """The recipe on the 100M-class model and the Python and documents of this machine: ten minutes
    on one H100, compiling included. `experiments/bench/recipe.py` runs and draws it.
    """
    # What web text stands for must be the largest: two tokens of three come from there.
    stand_in = STAND_IN | {"web": "site", "repositories": "site", "long": "site"}
    small = scaled(
        _mixed(stand_in | {"agent": "packages"}),
        tokens=80e6,
        batch_tokens=65536,
        seq_len=512,
        least_steps=8,
    )
    small = (dataclasses.replace(small[0], ramp_multiple=32), *small[1:])  # as in `tiny_recipe`
    both = ("stdlib", "site")
    sources = (
        PythonSources(name="site", include=("site",), packages=SITE),
        PythonSources(),
        Docstrings(include=both, packages=SITE),
        PackageDocs(),
    )
    base = _small(
        "mini_recipe",
        config.mini(vocab=16_384),
        small,
        Muon(lr=2e-3, schedule=_cosine(small)),
        sources,
    )
    train = dataclasses.replace(base.train, validate_every=100, validate_rows=256, compile_ahead=8)
    return dataclasses.replace(base, train=train)


def tiny_recipe() -> Experiment:
    """The recipe on a 1M-parameter model and the installed text: minutes on a CPU."""
    small = scaled(_mixed(STAND_IN), tokens=500e3, batch_tokens=8192, seq_len=64, least_steps=10)
    # Four sizes of the batch instead of thirteen: each compiles a step.
    small = (dataclasses.replace(small[0], ramp_multiple=32), *small[1:])
    model = ModelConfig(
        vocab=2048,
        d_model=96,
        n_dense=1,
        n_moe=1,
        d_mlp=256,
        mixer=Gqa(heads=4, kv_heads=2, head_dim=24),
        moe=Moe(experts=8, top_k=2, d_expert=64, scale=1.0),
        dtype="float32",
        remat="none",
    )
    optim = Muon(lr=1e-2, schedule=_cosine(small, warmup_share=0.05), dtype="float32")
    sources = (PydocTopics(), PythonSources(), Docstrings(), PackageDocs())
    return _small("tiny_recipe", model, small, optim, sources)


def _cosine(chosen: tuple[Stage, ...], warmup_share: float = 0.02) -> Cosine:
    """One curve over all stages; a short run warms up over a larger share."""
    total = sum(stage.tokens for stage in chosen)
    return Cosine(warmup=warmup_share * total, total=total, end=END)


def _full(base: Experiment, name: str, mesh: MeshShape) -> Experiment:
    """The text and `tokenizer.json` are yours to put under corpus/."""
    chosen = STAGES
    names = dict.fromkeys(source for stage in chosen for source, _ in stage.mixture)
    devices = mesh.data * mesh.fsdp * mesh.expert
    return dataclasses.replace(
        base,
        name=name,
        stages=chosen,
        mesh=mesh,
        data=dataclasses.replace(
            base.data,
            sources=tuple((TextFiles(f"corpus/{name}", name=name), 1.0) for name in names),
        ),
        train=dataclasses.replace(
            base.train,
            steps=total_steps(chosen),
            micro_rows=devices,
            validate_rows=32 * devices,
            compile_ahead=1,  # UNVERIFIED on a cluster; without it every switch waits for XLA
        ),
        optim=Muon(lr=PEAK_LR, schedule=Cosine(WARMUP_SHARE * 23.1e12, total=23.1e12, end=END)),
    )


def _mixed(stand_in: Mapping[str, str]) -> tuple[Stage, ...]:
    """The stages over sources that stand in for those of the paper."""
    found = []
    for stage in STAGES:
        weights: dict[str, float] = {}
        for name, weight in stage.mixture:
            weights[stand_in[name]] = weights.get(stand_in[name], 0.0) + weight
        found.append(dataclasses.replace(stage, mixture=tuple(weights.items())))
    return tuple(found)


def _small(
    name: str,
    model: ModelConfig,
    chosen: tuple[Stage, ...],
    optim: Muon,
    sources: tuple[Source, ...],
) -> Experiment:
    rows = chosen[0].batch_tokens // chosen[0].seq_len
    return Experiment(
        name=name,
        model=model,
        data=Data(sources=tuple((s, 1.0) for s in sources), seq_len=64, vocab=model.vocab),
        optim=optim,
        train=Train(
            steps=total_steps(chosen), rows=rows, validate_every=50, validate_rows=4 * rows
        ),
        stages=chosen,
        mesh=Pmap(1),  # rows of the last stage are fewer than most hosts' devices
        report=Report(prompts=("def main():\n",), max_tokens=32, ngrams=True),
    )
