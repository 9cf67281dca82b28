"""Pretraining on 4,096-token rows: `tiny` (a CPU, a minute), `mini` (one accelerator), `glm45_air`,
`glm45`, `glm46`, `glm47`, `glm47_flash` (clusters).

Numbers of the large ones are those of the GLM-4.5 paper (spec 5.2); how the later models were
pretrained is not published. Mid-training's stages follow in `experiments/midtrain.py`.
"""

import dataclasses

from glm45_jax.data.pack import Cut
from glm45_jax.data.prepare import Data
from glm45_jax.data.sources import Docstrings, PackageDocs, PydocTopics, PythonSources, TextFiles
from glm45_jax.experiment import Experiment, Report
from glm45_jax.model import config
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import BatchRamp, Constant, Cosine
from glm45_jax.sharding import MeshShape
from glm45_jax.train.state import Train

SEQ_LEN = 4096
GLM_VOCAB = 151_365  # ids of the released tokenizer; the table is padded to 151,552 rows (spec 1.4)
FLASH_VOCAB = 154_856  # ids of GLM-4.7-Flash's; padded to 154,880 rows
ALL_STAGES_TOKENS, PRETRAIN_TOKENS = 23.1e12, 22e12  # one cosine ends with mid-training
START_ROWS, ROWS, RAMP_TOKENS = 4096, 16384, 500e9  # 16M to 64M tokens
PRETRAIN_ROPE_THETA = 1e4  # until the 32K extension


def tiny() -> Experiment:
    """The tiny model on a slice of the installed Python; what tests and notebooks run."""
    tokens = 32.0 * 16 * 20
    return Experiment(
        name="pretrain_tiny",
        model=config.tiny(vocab=512),
        data=Data(
            sources=((PydocTopics(), 0.5), (Docstrings(), 0.5)), seq_len=32, vocab=512, max_docs=40
        ),
        optim=Muon(
            lr=5e-3,
            schedule=Cosine(warmup=0.1 * tokens, total=tokens, end=0.1),
            dtype="float32",
        ),
        train=Train(
            steps=20,
            rows=16,
            mtp_weight=Constant(0.3),
            save_every=10,
            validate_every=10,
            validate_rows=16,
        ),
        report=Report(prompts=("The ",), max_tokens=8),
    )


def mini() -> Experiment:
    """A 100M-class model on the installed Python sources and documents: half an hour on one
    H100.
    """
    steps, rows, seq_len = 2000, 32, 2048
    tokens = float(steps * rows * seq_len)
    sources = (
        (PythonSources(), 0.6),
        (Docstrings(), 0.1),
        (PydocTopics(), 0.1),
        (PackageDocs(), 0.2),
    )
    return Experiment(
        name="pretrain_mini",
        model=config.mini(vocab=16_384),
        data=Data(sources=sources, seq_len=seq_len, vocab=16_384),
        optim=Muon(lr=2e-3, schedule=Cosine(warmup=0.02 * tokens, total=tokens, end=0.1)),
        train=Train(
            steps=steps,
            rows=rows,
            mtp_weight=Constant(0.3),
            bias_rate=Constant(1e-3),
            save_every=500,
            validate_every=200,
            validate_rows=32,
        ),
        report=Report(prompts=("def main():\n", "The following "), ngrams=True),
    )


def glm45_air() -> Experiment:
    """GLM-4.5-Air, 106B-A12B, on 64 accelerators: v5p:4x4x4, h100:8x8."""
    return _full(config.glm45_air(), "glm45_air", MeshShape(data=1, fsdp=8, expert=8))


def glm45_air_v6e() -> Experiment:
    """GLM-4.5-Air on 256 chips of 31 GiB: v6e:16x16."""
    return _full(config.glm45_air(), "glm45_air_v6e", MeshShape(data=1, fsdp=32, expert=8))


def glm45() -> Experiment:
    """GLM-4.5, 355B-A32B, on 512 accelerators: v5p:8x8x8, 2*v6e:16x16, h100:64x8."""
    return _full(config.glm45(), "glm45", MeshShape(data=1, fsdp=64, expert=8))


def glm46() -> Experiment:
    """GLM-4.6's shapes, which are GLM-4.5's, with GLM-4.5's recipe: this run is `glm45` by another
    name. What differs, a context of 202,752 tokens for 131,072, comes after these stages.
    """
    return _full(config.glm46(), "glm46", MeshShape(data=1, fsdp=64, expert=8))


def glm47() -> Experiment:
    """GLM-4.7's shapes, which are GLM-4.5's, with GLM-4.5's recipe; see `glm46`."""
    return _full(config.glm47(), "glm47", MeshShape(data=1, fsdp=64, expert=8))


def glm47_flash() -> Experiment:
    """GLM-4.7-Flash, 30B-A3B, on 64 accelerators, with GLM-4.5's recipe and its own tokenizer."""
    mesh = MeshShape(data=1, fsdp=8, expert=8)
    return _full(config.glm47_flash(), "glm47_flash", mesh, vocab=FLASH_VOCAB)


def _full(
    model: config.ModelConfig, name: str, mesh: MeshShape, vocab: int = GLM_VOCAB
) -> Experiment:
    """Stages 1 and 2 of the paper. The text and `tokenizer.json` are yours to put under corpus/.

    vocab: ids of that tokenizer.
    """
    devices = mesh.fsdp * mesh.expert * mesh.data
    ramp = BatchRamp(START_ROWS, ROWS, int(RAMP_TOKENS), SEQ_LEN, 1024)
    return Experiment(
        name=name,
        model=dataclasses.replace(
            model, mixer=dataclasses.replace(model.mixer, rope_theta=PRETRAIN_ROPE_THETA)
        ),
        data=Data(
            sources=(
                (TextFiles("corpus/web", name="web"), 0.7),  # mixture weights UNVERIFIED
                (TextFiles("corpus/code", "**/*.py", name="code"), 0.3),
            ),
            seq_len=SEQ_LEN,
            packing=Cut(moving=True),  # random truncation is wanted in pretraining (spec 5.1)
            vocab=vocab,
            tokenizer="corpus/tokenizer.json",
        ),
        optim=Muon(lr=2.5e-4, schedule=Cosine(total=ALL_STAGES_TOKENS, end=0.1)),
        train=Train(
            steps=ramp.steps_for(int(PRETRAIN_TOKENS)),
            rows=ROWS,
            start_rows=START_ROWS,
            ramp_tokens=RAMP_TOKENS,
            ramp_multiple=1024,
            micro_rows=devices,
            save_every=500,
            keep=5,
            validate_every=1000,
            validate_rows=devices,
            hung_after_s=1800.0,
        ),
        mesh=mesh,
    )
