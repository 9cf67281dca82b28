"""What is served, from disk: a run's workdir, a converted or a released folder. The type to know is
`Model`.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from glm45_jax import hf, values
from glm45_jax import params as params_lib
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.hf import convert
from glm45_jax.hf.sources import Source, leaf_dtypes
from glm45_jax.model import transformer
from glm45_jax.model.config import FLASH_VOCAB, ModelConfig
from glm45_jax.model.transformer import Params
from glm45_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Parts of a ModelConfig that say how it runs, not what it is.
HOW = ("dtype", "remat", "impl", "init_std")


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights as they are stored, and what turns text into ids for them."""

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer
    family: str


def open_model(
    path: pathlib.Path,
    *,
    device: jax.Device,
    step: int | None = None,
    mtp: bool = True,
    rope_theta: float | None = None,
    family: str | None = None,
) -> Model:
    """The model of a folder, its weights on a device.

    step: of a workdir, None for the newest. mtp: whether the MTP layer is wanted. rope_theta: of a
    run whose stages had several. family: None finds it out.

    Raises: FileNotFoundError, DamagedError; ValueError for a folder that is none, or holds no
    tokenizer.
    """
    source = convert.open_source(path, step)
    tokenizer = _tokenizer(path, source)
    if source.cfg.vocab < tokenizer.vocab:
        raise ValueError(
            f"the tokenizer of {path} has {tokenizer.vocab} ids, the model {source.cfg.vocab} "
            "rows; copy the tokenizer that the weights were trained with"
        )
    cfg, params = _read(path, source, device, step, mtp, rope_theta)
    return Model(cfg, params, tokenizer, family or family_of(path, source))


def open_weights(
    path: pathlib.Path, cfg: ModelConfig, *, device: jax.Device, step: int | None = None
) -> Params:
    """Weights of a folder for the model `cfg`.

    Raises: as `open_model`; ValueError where they are of another model.
    """
    source = convert.open_source(path, step)
    theirs, params = _read(path, source, device, step, cfg.n_mtp > 0, cfg.mixer.rope_theta)
    differ = [
        f"{key}: {there!r} there, {here!r} here"
        for key, there, here in values.diff(theirs, cfg)
        if not key.startswith(HOW)
    ]
    if differ:
        raise ValueError(f"{path} holds another model: {'; '.join(differ[:5])}")
    return params


def family_of(path: pathlib.Path, source: Source) -> str:
    """Which chat format a model was trained on: by the template beside it, else by its size."""
    if source.cfg.vocab == FLASH_VOCAB:
        return "glm-4.7-flash"
    for file in source.files:
        if file.suffix == ".jinja":
            # The switch for direct answers went with 4.7.
            return "glm-4.5" if "/nothink" in file.read_text(encoding="utf-8") else "glm-4.7"
    log.warning("%s has no chat template: the chat format is that of glm-4.5 (--family)", path)
    return "glm-4.5"


def _read(
    path: pathlib.Path,
    source: Source,
    device: jax.Device,
    step: int | None,
    mtp: bool,
    rope_theta: float | None,
) -> tuple[ModelConfig, Params]:
    wanted = _wanted(source, device)
    if convert.is_released(path):
        cfg = _with_base(source.cfg, path, (), rope_theta)
        params = hf.restore(path, wanted)[1]
    else:
        with Checkpoints(path / "checkpoints") as saved:
            experiment = saved.sidecars(step).get("experiment", {})
            stages = experiment.get("fields", {}).get("stages") or ()
            cfg = _with_base(source.cfg, path, stages, rope_theta)
            params = saved.restore({"params": wanted}, step=step, partial=True).state["params"]
    if cfg.n_mtp and not mtp:
        return dataclasses.replace(cfg, n_mtp=0), params.replace(mtp=None)
    return cfg, params


def _tokenizer(path: pathlib.Path, source: Source) -> Tokenizer:
    beside = path / "tokenizer.json"
    files = [file for file in source.files if file.name == "tokenizer.json"]
    if not files and beside.exists():
        files = [beside]
    if not files:
        raise ValueError(f"{path} has no tokenizer; copy the tokenizer.json of the run into it")
    return Tokenizer.load(files[0])


def _wanted(source: Source, device: jax.Device) -> Any:
    """The weights of a source on a device, each in the dtype it is stored in."""
    dtypes = leaf_dtypes(source)
    here = jax.sharding.SingleDeviceSharding(device)

    def one(at: Any, spec: params_lib.ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, dtypes[params_lib.path_name(at)], sharding=here)

    specs = transformer.specs(source.cfg)
    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=params_lib.is_spec)


def _with_base(
    cfg: ModelConfig, path: pathlib.Path, stages: Sequence[Any], rope_theta: float | None
) -> ModelConfig:
    """The model with the RoPE base that its last step had: stages have bases of their own, and the
    model of an experiment knows only its own.
    """
    bases = sorted({float(stage["fields"]["rope_theta"]) for stage in stages})
    bases = bases or [float(cfg.mixer.rope_theta)]
    if rope_theta is None and len(bases) > 1:
        raise ValueError(
            f"{path} was trained in stages with RoPE bases {bases}; say by --rope-theta which one "
            "the step had"
        )
    base = bases[0] if rope_theta is None else rope_theta
    if base not in bases:
        raise ValueError(f"RoPE base {base}: {path} was trained with {bases}; use one of them")
    return dataclasses.replace(cfg, mixer=dataclasses.replace(cfg.mixer, rope_theta=base))
