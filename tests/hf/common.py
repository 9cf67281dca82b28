"""Folders for the tests of this room: random weights of small models, raw access to their files."""

import dataclasses
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from glm45_jax import params as params_lib
from glm45_jax.model import transformer
from glm45_jax.model.config import Mla, ModelConfig, Moe, tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FOLDERS = ("a", "b", "lite")
SMALL = dataclasses.replace(tiny(vocab=48), d_model=16, n_moe=1, moe=Moe(4, 2, 8, scale=2.5))
SMALL_MLA = dataclasses.replace(
    SMALL, mixer=Mla(heads=2, q_rank=12, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=6)
)


def params_of(cfg: ModelConfig, dtype=np.float32, seed: int = 0) -> transformer.Params:
    """Numpy weights, each element another; the router's bias float32."""
    rng = np.random.default_rng(seed)

    def one(spec):
        kind = np.float32 if spec.kind == "state" else dtype
        return rng.standard_normal(spec.shape).astype(kind)

    return params_lib.tree_map(one, transformer.specs(cfg))


def bf16(cfg: ModelConfig) -> ModelConfig:
    """The config of the same model in bfloat16."""
    return dataclasses.replace(cfg, dtype="bfloat16")


BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
DTYPES = {"F32": np.float32, "BF16": BF16, "F8_E4M3": E4M3}


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, as another library reads it."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            flat = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
            found[name] = flat.reshape(entry["shape"])
    return found


def write(folder: pathlib.Path, named: dict[str, np.ndarray], config: dict) -> pathlib.Path:
    """A folder of one file, as another library writes it."""
    folder.mkdir(parents=True)
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(folder: pathlib.Path) -> dict:
    """Its config.json."""
    return json.loads((folder / "config.json").read_text())


def bits(x) -> tuple:
    """Equal only if dtype, shape and every bit are."""
    x = np.asarray(x)
    return str(x.dtype), x.shape, x.tobytes()


def same(a, b) -> bool:
    """Whether two trees are the same to the bit."""
    return jax.tree.all(jax.tree.map(lambda x, y: bits(x) == bits(y), a, b))
