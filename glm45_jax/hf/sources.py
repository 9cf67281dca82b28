"""Where weights come from: a released folder, a checkpoint of ours, or arrays. One type: `Source`.

A source hands out every tensor of the name table in rows, as it lies in released files, so that a
reader holds no more than a block of it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax import values
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.hf import config_json
from glm45_jax.hf.files import CHECKSUMS, CONFIG, INDEX, Folder, Problems, open_folder
from glm45_jax.hf.names import Entry, table
from glm45_jax.kernels import fp8
from glm45_jax.model import transformer
from glm45_jax.model.config import ModelConfig
from glm45_jax.streamed import open_arrays
from glm45_jax.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

Ranges = Iterable[tuple[int, int]]
Rows = Iterator[tuple[int, int, np.ndarray]]
BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
_CARRIED = (".json", ".jinja", ".txt", ".md", ".model")
_COMPRESSED, _BLOCKWISE = "compressed-tensors", "fp8"  # quant_method of config.json


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights of `cfg`, to be read tensor by tensor.

    entries: all of them. dtype: of each tensor, after dequantisation. rows: (first, last, values)
    of an entry's row ranges, in order. files: small files that go along, a config.json among them.
    """

    cfg: ModelConfig
    entries: list[Entry]
    dtype: dict[str, np.dtype]
    rows: Callable[[Entry, Ranges], Rows]
    files: tuple[pathlib.Path, ...] = ()

    @property
    def config_file(self) -> pathlib.Path | None:
        """The config.json that goes along."""
        return next((file for file in self.files if file.name == CONFIG), None)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the rows of an entry lie in a folder, and their scales if they are FP8."""

    tensor: str
    first: int = 0
    scale: str | None = None
    block: tuple[int, int] | None = None


def of_folder(path: str | os.PathLike) -> Source:
    """A released folder, checked: every tensor accounted for, none too many.

    Raises: ValueError listing everything that is wrong with it.
    """
    folder = open_folder(path)
    try:
        cfg = config_json.model_config(folder.config)
    except ValueError as error:
        raise ValueError(f"{folder.path}: {error}") from error
    entries = table(cfg)
    places = _places(folder, entries)
    dtypes = {
        e.name: BF16 if places[e.name].scale else folder.tensors[places[e.name].tensor].dtype
        for e in entries
    }
    cfg = dataclasses.replace(cfg, dtype=activations(dtypes["model.embed_tokens.weight"]))
    _check_copies(folder, entries)
    _check_tokenizer(folder, cfg)

    def rows(entry: Entry, ranges: Ranges) -> Rows:
        place = places[entry.name]
        shifted = ((place.first + a, place.first + b) for a, b in ranges)
        scale = None if place.scale is None else folder.whole(place.scale)
        for first, last, block in folder.blocks(place.tensor, shifted):
            first, last = first - place.first, last - place.first
            yield first, last, block if scale is None else _dequantized(block, scale, place, first)

    return Source(cfg, entries, dtypes, rows, carried(folder.path))


def of_params(cfg: ModelConfig, params: Any, files: tuple[pathlib.Path, ...] = ()) -> Source:
    """Arrays in memory: `Params` of numpy or jax arrays, on one host.

    Raises: ValueError for leaves that are not of `cfg`, or lie on other hosts too.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    leaves = {params_lib.path_name(path): leaf for path, leaf in flat}
    entries = table(cfg)
    problems = Problems(pathlib.Path("params"))
    for name, spec in params_lib.leaves_with_path(transformer.specs(cfg)):
        found = leaves.get(name)
        if found is None or found.shape != spec.shape:
            shape = None if found is None else found.shape
            problems.add(f"{name} has shape {shape}, the config needs {spec.shape}")
    problems.check()
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"{name} is spread over several hosts; save a checkpoint and convert it"
            )
    dtypes = {e.name: np.dtype(leaves[e.leaf].dtype) for e in entries}
    return Source(cfg, entries, dtypes, _rows_of(lambda e, at: leaves[e.leaf][at]), files)


def of_checkpoint(path: str | os.PathLike, step: int | None = None) -> Source:
    """The weights of a run's workdir, or of a converted folder: the newest step, or `step`.

    Every file is checked once before.
    Raises: FileNotFoundError without a checkpoint; DamagedError; ValueError without a model.
    """
    path = pathlib.Path(path)
    saved = Checkpoints(path / "checkpoints").verified(step)
    sidecars = saved.sidecars
    try:
        said = sidecars.get("model") or sidecars["experiment"]["fields"]["model"]
    except KeyError as error:
        raise ValueError(f"{path}: no sidecar {error} says which model this is") from error
    cfg = values.from_json(said)
    entries = table(cfg)
    names = sorted({entry.leaf for entry in entries})
    stored = {name: f"params/{name.replace('.', '/')}" for name in names}
    arrays = open_arrays(saved.item, list(stored.values()))
    leaves = {name: arrays[key] for name, key in stored.items()}
    dtypes = {e.name: np.dtype(leaves[e.leaf].dtype.numpy_dtype) for e in entries}
    # Tensors that lay in another dtype than the rest of their leaf.
    dtypes |= {name: np.dtype(dtype) for name, dtype in sidecars.get("hf_dtypes", {}).items()}
    read = _rows_of(lambda e, at: leaves[e.leaf][at].read().result())
    return Source(cfg, entries, dtypes, read, _files_of(path, sidecars))


def activations(dtype: Any) -> Literal["bfloat16", "float32"]:
    """What a model whose weights are `dtype` computes in."""
    return "float32" if np.dtype(dtype) == np.float32 else "bfloat16"


def carried(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Small files of a released folder: config, generation config, tokenizer, template, licence."""
    return tuple(
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.name not in (INDEX, CHECKSUMS)
        and not file.name.startswith(".")
        and (file.suffix in _CARRIED or file.name.startswith("LICENSE"))
    )


def leaf_dtypes(source: Source, dtype: Any = None) -> dict[str, np.dtype]:
    """Dtype of each leaf: `dtype`, or the one its tensors share, float32 where they differ.

    The router's bias is always float32.
    """
    shared: dict[str, set[np.dtype]] = {}
    for entry in source.entries:
        found = np.dtype(np.float32) if entry.state else np.dtype(dtype or source.dtype[entry.name])
        shared.setdefault(entry.leaf, set()).add(found)
    float32 = np.dtype(np.float32)
    return {leaf: kinds.pop() if len(kinds) == 1 else float32 for leaf, kinds in shared.items()}


def turned(view: np.ndarray) -> np.ndarray:
    """A transposed view as a plain array. XLA's copy is several times faster than numpy's."""
    cpu = _cpu()
    if view.flags.c_contiguous or view.ndim < 2 or cpu is None:
        return np.ascontiguousarray(view)
    return np.asarray(jax.device_put(view, cpu))


@functools.cache
def _cpu() -> jax.Device | None:
    """A CPU device; None where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _rows_of(part: Callable[[Entry, tuple[slice, ...]], Any]) -> Callable[[Entry, Ranges], Rows]:
    """`Source.rows` of something that gives parts of leaves."""

    def rows(entry: Entry, ranges: Ranges) -> Rows:
        for first, last in ranges:
            values = np.asarray(part(entry, entry.part(first, last)))
            values = values.reshape(values.shape[len(entry.index) :])
            yield first, last, turned(entry.to_theirs(values))

    return rows


def _files_of(workdir: pathlib.Path, sidecars: dict[str, Any]) -> tuple[pathlib.Path, ...]:
    """The released files that a conversion kept, or the tokenizer a run was trained with."""
    if (workdir / "hf").is_dir():
        return carried(workdir / "hf")
    fingerprint = str(sidecars.get("loader", {}).get("fingerprint", ""))
    mine = [f"{kind}-{fingerprint[:16]}" for kind in ("data", "sft")]  # of text, of conversations
    for file in (workdir / "data").glob("*/tokenizer.json"):
        if fingerprint and file.parent.name in mine:
            return (file,)
    if (beside := workdir / "tokenizer.json").exists():  # of a run that was given it
        return (beside,)
    _logger.warning("%s: no tokenizer of this run was found; add it to the folder", workdir)
    return ()


def _places(folder: Folder, entries: list[Entry]) -> dict[str, _Place]:
    problems = Problems(folder.path)
    places: dict[str, _Place] = {}
    missing, used = [], set()
    block = _block(folder, problems)
    for entry in entries:
        place = _place(folder, entry, block, problems)
        if place is None:
            missing.append(entry.name)
            continue
        places[entry.name] = place
        used |= {place.tensor, place.scale}
    problems.add_all("missing", missing)
    problems.add_all("unknown", sorted(folder.tensors.keys() - used))
    mtp = [name for name in missing if name.endswith(".eh_proj.weight")]
    if mtp:
        problems.add(
            f"the MTP layer ({mtp[0]}) is not there: some exporters drop it. To go on without, set "
            "num_nextn_predict_layers to 0 in config.json"
        )
    problems.check()
    return places


def _place(
    folder: Folder, entry: Entry, block: tuple[int, int] | None, problems: Problems
) -> _Place | None:
    tensor = folder.tensors.get(entry.name)
    if tensor is None:
        return _fused(folder, entry, problems)
    if tensor.shape != entry.shape:
        problems.add(f"{entry.name} has shape {tensor.shape}, the config needs {entry.shape}")
    if tensor.dtype != FP8:
        return _Place(entry.name)
    suffix = "_scale_inv" if block is not None else "_scale"
    scale = folder.tensors.get(entry.name + suffix)
    if scale is None:
        problems.add(f"{entry.name} is FP8, but {entry.name + suffix} is missing")
        return _Place(entry.name)
    wanted = fp8.scale_shape(entry.shape, block)
    if scale.shape != wanted or scale.dtype == FP8:
        problems.add(
            f"{entry.name + suffix} is {scale.dtype}{list(scale.shape)}, needs {list(wanted)}"
        )
    else:
        bad = ~np.isfinite(values := folder.whole(entry.name + suffix).astype(np.float32))
        if bad.any() or (values < 0).any():
            problems.add(f"{entry.name + suffix}: {int(bad.sum())} NaN or infinite, or negative")
    return _Place(entry.name, 0, entry.name + suffix, block)


def _fused(folder: Folder, entry: Entry, problems: Problems) -> _Place | None:
    """Transformers 5 stacks experts: gate_up_proj [E, 2F, D], gate first; down_proj [E, D, F]."""
    if len(entry.index) != 2:
        return None
    prefix, kind = entry.name.split(".experts.")[0] + ".experts.", entry.name.split(".")[-2]
    name = prefix + ("down_proj" if kind == "down_proj" else "gate_up_proj")
    tensor = folder.tensors.get(name)
    if tensor is None:
        return None
    rows, columns = entry.shape
    parts = 1 if kind == "down_proj" else 2
    expert = entry.index[1]
    if len(tensor.shape) != 3 or tensor.shape[1:] != (parts * rows, columns):
        if expert == 0:
            problems.add(f"{name} has shape {tensor.shape}, needs (E, {parts * rows}, {columns})")
    elif expert >= tensor.shape[0]:
        problems.add(f"{name} has {tensor.shape[0]} experts, {entry.name} is asked for")
    return _Place(name, (expert * parts + (kind == "up_proj")) * rows)


def _block(folder: Folder, problems: Problems) -> tuple[int, int] | None:
    """Block of the FP8 scales; None for a scale a channel, and where nothing is quantised."""
    q = folder.config.get("quantization_config") if isinstance(folder.config, dict) else None
    if q is None:
        return None
    method = q.get("quant_method") if isinstance(q, dict) else q
    if method == _COMPRESSED:
        return None
    block = q.get("weight_block_size") if method == _BLOCKWISE else None
    if isinstance(block, list) and len(block) == 2:
        rows, columns = block
        if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
            return rows, columns
    problems.add(
        f"quantization_config: {method!r} with weight_block_size {block!r}; this code reads "
        f"{_COMPRESSED!r} (a scale a channel) and {_BLOCKWISE!r} with [rows, columns]"
    )
    return fp8.BLOCK


def _dequantized(block: np.ndarray, scale: np.ndarray, place: _Place, first: int) -> np.ndarray:
    """Rows `first`... of an FP8 weight in bfloat16."""
    last = first + block.shape[0]
    if place.block is None:
        part = scale[first:last]
    else:
        step = place.block[0]
        if first % step:
            raise ValueError(f"row {first} of {place.tensor} is inside a block of {step}")
        part = scale[first // step : math.ceil(last / step)]
    return np.asarray(fp8.dequantize(block.view(np.uint8), part, block=place.block))


def _check_tokenizer(folder: Folder, cfg: ModelConfig) -> None:
    """Raises: ValueError where a tokenizer lies beside the weights and has other ids."""
    file = folder.path / "tokenizer.json"
    if file.exists():
        c = folder.config
        Tokenizer.load(file).check_model(
            rows=cfg.vocab, eos=c.get("eos_token_id"), pad=c.get("pad_token_id")
        )


def _check_copies(folder: Folder, entries: list[Entry]) -> None:
    """The MTP layer's embedding and head must be the main model's: they are one array here.

    Raises: ValueError naming the pair that differs.
    """
    first_of = {e.leaf: e for e in entries if not e.copy}
    for copy in (e for e in entries if e.copy):
        original = first_of[copy.leaf]
        ours, theirs = folder.tensors[original.name], folder.tensors[copy.name]
        same = ours.dtype == theirs.dtype
        ranges = list(copy.blocks(ours.dtype.itemsize)) if same else []
        for (_, _, a), (_, _, b) in zip(
            folder.blocks(original.name, ranges), folder.blocks(copy.name, ranges), strict=True
        ):
            same = same and np.array_equal(a.view(np.uint8), b.view(np.uint8))
        if not same:
            raise ValueError(
                f"{folder.path}: {copy.name} is not a copy of {original.name}; here they are one "
                "array, so one of the two would be lost"
            )
