"""Released weights onto devices: each device's part, straight from the files.

Every tensor is read once a host, block by block, and each block goes to the devices that hold a
part of it; so a host holds its shards and a few blocks, whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.hf.names import BLOCK_BYTES, Entry
from glm45_jax.hf.sources import Source, activations, leaf_dtypes, of_folder, turned
from glm45_jax.metrics import ByteProgress
from glm45_jax.model import transformer
from glm45_jax.model.config import ModelConfig
from glm45_jax.sharding import Rules, shardings

Box = tuple[slice, ...]


def load(
    path: str | os.PathLike, *, dtype: Any = None, mesh: Any = None, rules: Rules | None = None
) -> tuple[ModelConfig, transformer.Params]:
    """(ModelConfig, Params) of a released-style folder; with a mesh, laid out by `rules`.

    dtype: of weights and activations; default as stored. The router's bias is always float32. FP8
    weights come as bfloat16. A host never holds more than its shards and a few blocks.

    Raises: ValueError listing every tensor that is missing, unknown, doubled or misshapen, and
    whatever else is wrong with the folder; FileNotFoundError where there is none.
    """
    source = of_folder(path)
    cfg = source.cfg
    if dtype is not None:
        cfg = dataclasses.replace(cfg, dtype=activations(dtype))
    specs = transformer.specs(cfg)
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        layout = params_lib.tree_map(lambda _: one, specs)
    else:
        layout = shardings(specs, mesh, rules or Rules())
    dtypes = leaf_dtypes(source, dtype)
    return cfg, _placed(source, specs, layout, dtypes)


def restore(path: str | os.PathLike, abstract: Any) -> tuple[ModelConfig, transformer.Params]:
    """(ModelConfig, Params) in the dtypes and shardings of `abstract`, as `jax.ShapeDtypeStruct`s.

    Raises: ValueError as `load`, and where the folder's leaves or shapes are others.
    """
    source = of_folder(path)
    specs = transformer.specs(source.cfg)
    here = {name: spec.shape for name, spec in params_lib.leaves_with_path(specs)}
    wanted = {
        params_lib.path_name(at): leaf for at, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    differ = [
        f"{name}: {here.get(name)} there, {getattr(wanted.get(name), 'shape', None)} wanted"
        for name in sorted(here.keys() | wanted.keys())
        if here.get(name) != getattr(wanted.get(name), "shape", None)
    ]
    if differ:
        raise ValueError(
            f"{path} holds another model ({len(differ)} leaves differ): {'; '.join(differ[:5])}"
        )
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    dtypes = {name: np.dtype(leaf.dtype) for name, leaf in wanted.items()}
    return source.cfg, _placed(source, specs, layout, dtypes)


def _placed(source: Source, specs: Any, layout: Any, dtypes: dict[str, np.dtype]) -> Any:
    entries: dict[str, list[Entry]] = {}
    for entry in source.entries:
        if not entry.copy:
            entries.setdefault(entry.leaf, []).append(entry)
    total = sum(
        int(np.prod(e.shape)) * source.dtype[e.name].itemsize
        for group in entries.values()
        for e in group
    )
    progress = ByteProgress(total, "load")

    def one(path: Any, spec: params_lib.ParamSpec, sharding: Any) -> jax.Array:
        name = params_lib.path_name(path)
        return _leaf(source, entries[name], spec.shape, dtypes[name], sharding, progress)

    tree = jax.tree_util.tree_map_with_path(one, specs, layout, is_leaf=params_lib.is_spec)
    progress.close()
    return tree


def _leaf(
    source: Source,
    entries: Sequence[Entry],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Any,
    progress: ByteProgress,
) -> jax.Array:
    """One leaf: its shards filled entry by entry."""
    boxes = {
        device: tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    empty = jax.jit(lambda: jax.numpy.zeros(shape, dtype), out_shardings=sharding)()
    shards = {shard.device: shard.data for shard in empty.addressable_shards}
    del empty  # its buffers are the shards', which are filled in place
    pending = 0
    for entry in entries:
        itemsize = source.dtype[entry.name].itemsize
        wanted = [r for r in entry.blocks(itemsize) if _meets(entry.part(*r), boxes.values())]
        for first, last, block in source.rows(entry, wanted):
            part = entry.part(first, last)
            values = entry.to_ours(block)
            for device, box in boxes.items():
                shards[device] = _filled(shards[device], values, part, box, entry, device)
            progress.add(block.nbytes)
            pending += block.nbytes
            if pending > 2 * BLOCK_BYTES:  # blocks wait in memory until their copies are done
                jax.block_until_ready(list(shards.values()))
                pending = 0
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards.values()))


def _filled(
    shard: jax.Array, values: np.ndarray, part: Box, box: Box, entry: Entry, device: Any
) -> jax.Array:
    """The shard with its share of one block written in; the shard itself if it has none."""
    if not _meets(part, [box]):
        return shard
    lead = len(entry.index)
    cuts, starts = [], []
    for p, b in zip(part, box, strict=True):
        low, high = max(p.start, b.start), min(p.stop, b.stop)
        cuts.append(slice(low - p.start, high - p.start))
        starts.append(low - b.start)
    share = jax.device_put(turned(values[tuple(cuts[lead:])]), device)
    return _write(shard, share, tuple(np.int32(s) for s in starts))


def _meets(part: Box, boxes: Any) -> bool:
    return any(
        all(p.start < b.stop and b.start < p.stop for p, b in zip(part, box, strict=True))
        for box in boxes
    )


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, share: jax.Array, starts: tuple[Any, ...]) -> jax.Array:
    lead = shard.ndim - share.ndim
    update = share.astype(shard.dtype).reshape((1,) * lead + share.shape)
    return jax.lax.dynamic_update_slice(shard, update, starts)
