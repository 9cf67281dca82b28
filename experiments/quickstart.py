"""`make quickstart`: a tiny GLM-4.5 learns English and Python from what is installed, on a CPU, in
minutes.
"""

from glm45_jax.data.pack import Cut
from glm45_jax.data.prepare import Data
from glm45_jax.data.sources import Docstrings, PydocTopics, PythonSources
from glm45_jax.experiment import Experiment, Report
from glm45_jax.model.config import Gqa, ModelConfig, Moe
from glm45_jax.optim.muon import Muon
from glm45_jax.optim.schedules import Constant, Cosine
from glm45_jax.sharding import MeshShape
from glm45_jax.train.state import Train

VOCAB, SEQ_LEN, ROWS, STEPS = 2048, 128, 16, 330
PROMPTS = (
    "def read(self, path):\n",
    "import os\nimport sys\n\nclass ",
    "The following functions are ",
    "Return the ",
)


def quickstart() -> Experiment:
    """1.9M parameters with every part of GLM-4.5: MoE, shared expert, router bias, QK-norm, GQA,
    MTP, Muon.
    """
    tokens = float(SEQ_LEN * ROWS * STEPS)
    return Experiment(
        name="quickstart",
        model=ModelConfig(
            vocab=VOCAB,
            d_model=128,
            n_dense=1,
            n_moe=2,
            d_mlp=384,
            mixer=Gqa(heads=4, kv_heads=2, head_dim=32, rope_theta=1e4),
            moe=Moe(experts=8, top_k=2, d_expert=128, scale=1.0),
            dtype="float32",
            remat="none",
        ),
        data=Data(
            sources=((PythonSources(), 0.7), (Docstrings(), 0.2), (PydocTopics(), 0.1)),
            seq_len=SEQ_LEN,
            packing=Cut(),
            vocab=VOCAB,
        ),
        optim=Muon(
            lr=1e-2,
            schedule=Cosine(warmup=0.06 * tokens, total=tokens, end=0.02),
            dtype="float32",
        ),
        train=Train(
            steps=STEPS,
            rows=ROWS,
            mtp_weight=Constant(0.3),
            bias_rate=Constant(5e-3),
            validate_every=50,
            validate_rows=192,
        ),
        mesh=MeshShape(data=1, fsdp=-1),
        report=Report(prompts=PROMPTS, max_tokens=64, temperature=0.7, ngrams=True),
    )
