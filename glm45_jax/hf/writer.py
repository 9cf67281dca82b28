"""Released folders out: sharded safetensors with an index, streamed, whole or not there at all.

`write_folder` takes a `Source`. The folder appears by one rename at the end; `checksums.json` lets
the next reader find any byte that has changed since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from glm45_jax import integrity
from glm45_jax.hf import config_json, files
from glm45_jax.hf.names import Entry
from glm45_jax.hf.sources import FP8, Source
from glm45_jax.kernels import fp8
from glm45_jax.metrics import ByteProgress
from glm45_jax.tokenizer import Tokenizer

GENERATION = "generation_config.json"
# Names that stay as they are in an FP8 folder (spec 3.2), and the MTP layer's copy of the head,
# which stays what it copies; `modules_to_not_convert` tells the engines.
NOT_CONVERTED = ("norm", "embed", "mlp.gate.", "lm_head", "eh_proj", "shared_head")


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One tensor of a file to be written; `weight` is its entry, None for the scales of one."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    entry: Entry | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    path: str | os.PathLike,
    source: Source,
    *,
    dtype: Any = None,
    fp8_block: tuple[int, int] | None = None,
    max_shard_bytes: int = 5 * 2**30,
    what: str = "write",
) -> None:
    """None, once the folder is there, whole.

    dtype: of all tensors but the router's bias; None keeps each one's. fp8_block: block-wise e4m3fn
    for the matrices that the released FP8 layout has in FP8. A tensor larger than `max_shard_bytes`
    gets a file of its own.

    Raises: ValueError where `path` holds something already, or an input is refused.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes {max_shard_bytes}: a file holds at least one byte")
    if fp8_block is not None and fp8.BLOCK[0] % fp8_block[0]:
        raise ValueError(f"fp8_block {fp8_block}: {fp8.BLOCK[0]} rows are streamed at once")
    with published(path) as folder:
        shards = _shards(_slots(source, dtype, fp8_block), max_shard_bytes)
        names = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        slots = [slot for shard in shards for slot in shard]
        progress = ByteProgress(sum(slot.nbytes for slot in slots), what)
        crc: dict[str, int] = {}
        for name, shard in zip(names, shards, strict=True):
            with (folder / name).open("wb") as file:
                file.write(_header(shard))
                _write_shard(file, shard, source, fp8_block, crc, progress)
        progress.close()
        weight_map = {s.name: n for n, shard in zip(names, shards, strict=True) for s in shard}
        total = {"total_size": sum(slot.nbytes for slot in slots)}
        index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / files.INDEX, index)
        _write_small_files(folder, source, fp8_block)
        _write_checksums(folder, names, crc)


@contextlib.contextmanager
def published(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder to fill beside `path`, which becomes `path` if all goes well and is gone if not.

    Raises: ValueError where `path` is there and not empty.
    """
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there and not empty; give another folder, or move it away")
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def converted(entry: Entry) -> bool:
    """Whether an FP8 folder holds this tensor in FP8. Source: spec 3.2."""
    is_matrix = len(entry.shape) == 2 and entry.name.endswith(".weight")
    return is_matrix and not any(part in entry.name for part in NOT_CONVERTED)


def _slots(source: Source, dtype: Any, fp8_block: tuple[int, int] | None) -> list[_Slot]:
    slots = []
    float32 = np.dtype(np.float32)
    for e in source.entries:
        if fp8_block is not None and converted(e):
            scales = fp8.scale_shape(e.shape, fp8_block)
            slots.append(_Slot(e.name, FP8, e.shape, e))
            slots.append(_Slot(f"{e.name}_scale_inv", float32, scales, None))
            continue
        kept = source.dtype[e.name] if dtype is None or e.state else np.dtype(dtype)
        slots.append(_Slot(e.name, kept, e.shape, e))
    return slots


def _shards(slots: list[_Slot], limit: int) -> list[list[_Slot]]:
    """Files in the order of the table; scales stay beside their weight."""
    shards: list[list[_Slot]] = [[]]
    size = 0
    for slot in slots:
        if shards[-1] and size + slot.nbytes > limit and slot.entry is not None:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += slot.nbytes
    return shards


def _header(shard: list[_Slot]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for slot in shard:
        header[slot.name] = {
            "dtype": files.DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [at, at + slot.nbytes],
        }
        at += slot.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _write_shard(
    file: BinaryIO,
    shard: list[_Slot],
    source: Source,
    fp8_block: tuple[int, int] | None,
    crc: dict[str, int],
    progress: ByteProgress,
) -> None:
    scales: list[np.ndarray] = []
    for slot in shard:
        if slot.entry is None:  # the scales of the weight before
            blocks: Iterator[np.ndarray] = iter([np.concatenate(scales)])
        else:
            scales = []
            blocks = _cast(slot, source, fp8_block, scales)
        crc[slot.name] = 0
        for block in blocks:
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
            crc[slot.name] = zlib.crc32(data, crc[slot.name])
            file.write(data)
            progress.add(data.nbytes)


def _cast(
    slot: _Slot, source: Source, fp8_block: tuple[int, int] | None, scales: list[np.ndarray]
) -> Iterator[np.ndarray]:
    """Blocks of one weight in the dtype of its slot; FP8 leaves the scales in `scales`."""
    entry = slot.entry
    assert entry is not None
    itemsize = source.dtype[entry.name].itemsize
    for _, _, block in source.rows(entry, entry.blocks(itemsize)):
        if slot.dtype == FP8 and fp8_block is not None:
            quantised, scale = fp8.quantize_blocks(block, fp8_block)
            scales.append(np.asarray(scale))
            yield np.asarray(quantised)
        else:
            yield block.astype(slot.dtype, copy=False)


def _write_small_files(
    folder: pathlib.Path, source: Source, fp8_block: tuple[int, int] | None
) -> None:
    """None; tokenizer files, config and generation config. An unchanged config keeps its bytes."""
    for file in source.files:
        shutil.copyfile(file, folder / file.name)
    old = source.config_file
    base = None if old is None else files.parse_json(old.read_text(encoding="utf-8"))
    config = config_json.to_json(source.cfg, base)
    tokenizer = folder / "tokenizer.json"
    if base is None and tokenizer.exists():
        stop = Tokenizer.load(tokenizer).stop_ids
        config |= {"eos_token_id": list(stop), "pad_token_id": stop[0]}
    if fp8_block is not None:
        config["quantization_config"] = _quantization(source, fp8_block)
    if config != base:
        _write_json(folder / files.CONFIG, config)
    if not (folder / GENERATION).exists() and config.get("eos_token_id") is not None:
        ids = {key: config[key] for key in ("eos_token_id", "pad_token_id") if key in config}
        _write_json(folder / GENERATION, {"_from_model_config": True, **ids})


def _quantization(source: Source, fp8_block: tuple[int, int]) -> dict[str, Any]:
    weights = (e.name for e in source.entries if len(e.shape) == 2 and not converted(e))
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(fp8_block),
        "modules_to_not_convert": [name.removesuffix(".weight") for name in weights],
    }


def _write_checksums(folder: pathlib.Path, shards: list[str], crc: dict[str, int]) -> None:
    small = sorted(file.name for file in folder.iterdir() if file.name not in shards)
    body = {
        "files": {name: integrity.of_file(folder / name) for name in small},
        "headers": {
            name: integrity.of_file(folder / name, files.header_end(folder / name))
            for name in shards
        },
        "tensors": crc,
    }
    _write_json(folder / files.CHECKSUMS, {"crc32": integrity.of_json(body), "body": body})


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
