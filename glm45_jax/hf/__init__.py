"""Hugging Face checkpoints of the GLM-4.5 family, in and out (spec 3): one name table both ways.

`names` the table, `config_json` config.json, `files` safetensors, `sources` where weights come
from, `place` onto devices, `writer` into a folder, `convert` to a checkpoint of ours and back.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from glm45_jax.hf.config_json import model_config as config
from glm45_jax.hf.names import Entry, table
from glm45_jax.hf.place import load, restore
from glm45_jax.hf.sources import carried, of_params
from glm45_jax.hf.writer import write_folder
from glm45_jax.model.config import ModelConfig

__all__ = ["Entry", "config", "load", "restore", "save", "table"]


def save(
    path: str | os.PathLike,
    cfg: ModelConfig,
    params: Any,
    *,
    max_shard_bytes: int = 5 * 2**30,
    dtype: Any = None,
    fp8_block: tuple[int, int] | None = None,
    files: str | os.PathLike | None = None,
) -> None:
    """None, once `path` is a released-style folder of these weights: vLLM and transformers read it.

    params: `transformer.Params` of one host's arrays. dtype: of the tensors (the router's bias is
    float32 in any case); default as they are. fp8_block: write matrices block-wise in e4m3fn, as
    (128, 128). files: a folder whose tokenizer and config keys go along.

    Raises: ValueError where `path` holds something already or `params` are not of `cfg`.
    """
    source = of_params(cfg, params, () if files is None else carried(pathlib.Path(files)))
    write_folder(
        path, source, dtype=dtype, fp8_block=fp8_block, max_shard_bytes=max_shard_bytes, what="save"
    )
