"""The one name table of the family (spec 3.1): our leaf <-> the tensors of a released folder.

`NAMES` is the whole mapping, used in both directions. The type to know is `Entry`: one tensor of a
released folder, the part of a leaf that it fills, and how it lies there. Released matrices are
[out, in], ours are [in..., out...]; the embedding is a table in both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.model import transformer
from glm45_jax.model.config import ModelConfig
from glm45_jax.params import ParamSpec

BLOCK_BYTES = 64 * 2**20  # of a tensor that is read, turned and written at once
_SCALE_ROWS = 128  # rows that share an FP8 scale

# Our path inside `Params` -> name. {layer} counts all layers, the MTP layer last.
NAMES = {
    "embed_VD": "model.embed_tokens.weight",
    "norm_D": "model.norm.weight",
    "head_DV": "lm_head.weight",
}
MTP_NAMES = {
    "norm_embed_D": "model.layers.{layer}.enorm.weight",
    "norm_hidden_D": "model.layers.{layer}.hnorm.weight",
    "join_2DD": "model.layers.{layer}.eh_proj.weight",  # embedding half first
    "norm_D": "model.layers.{layer}.shared_head.norm.weight",
}
# The MTP layer of a released folder repeats two tensors of the main model.
MTP_COPIES = {
    "embed_VD": "model.layers.{layer}.embed_tokens.weight",
    "head_DV": "model.layers.{layer}.shared_head.head.weight",
}
BLOCK_NAMES = {
    "norm_mixer_D": "input_layernorm.weight",
    "norm_ffn_D": "post_attention_layernorm.weight",
    # grouped-query attention
    "mixer.q_DNH": "self_attn.q_proj.weight",
    "mixer.k_DKH": "self_attn.k_proj.weight",
    "mixer.v_DKH": "self_attn.v_proj.weight",
    "mixer.out_NHD": "self_attn.o_proj.weight",
    "mixer.q_bias_NH": "self_attn.q_proj.bias",
    "mixer.k_bias_KH": "self_attn.k_proj.bias",
    "mixer.v_bias_KH": "self_attn.v_proj.bias",
    "mixer.q_norm_H": "self_attn.q_norm.weight",
    "mixer.k_norm_H": "self_attn.k_norm.weight",
    # multi-head latent attention
    "mixer.q_down_DQ": "self_attn.q_a_proj.weight",
    "mixer.q_norm_Q": "self_attn.q_a_layernorm.weight",
    "mixer.q_up_QNH": "self_attn.q_b_proj.weight",
    "mixer.kv_down_DY": "self_attn.kv_a_proj_with_mqa.weight",
    "mixer.kv_norm_Z": "self_attn.kv_a_layernorm.weight",
    "mixer.kv_up_ZNX": "self_attn.kv_b_proj.weight",
    "mixer.out_NUD": "self_attn.o_proj.weight",
    # dense layer
    "ffn.gate_DF": "mlp.gate_proj.weight",
    "ffn.up_DF": "mlp.up_proj.weight",
    "ffn.down_FD": "mlp.down_proj.weight",
    # mixture of experts
    "ffn.router_DE": "mlp.gate.weight",
    "ffn.bias_E": "mlp.gate.e_score_correction_bias",
    "ffn.gate_EDF": "mlp.experts.{expert}.gate_proj.weight",
    "ffn.up_EDF": "mlp.experts.{expert}.up_proj.weight",
    "ffn.down_EFD": "mlp.experts.{expert}.down_proj.weight",
    "ffn.shared.gate_DF": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.up_DF": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.down_FD": "mlp.shared_experts.down_proj.weight",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a released folder.

    leaf: path in `Params`. index: leading indices into the leaf (layer, expert). shape: as it lies
    in the files. piece: shape of `leaf[index]`. inputs: how many leading dimensions of the piece
    are the columns of the tensor; 0 where it lies in the files as it lies here. state: the
    router's bias, always float32. copy: repeats what another entry fills.
    """

    name: str
    leaf: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    piece: tuple[int, ...]
    inputs: int
    state: bool = False
    copy: bool = False

    @property
    def row_group(self) -> int:
        """Rows of the tensor that one step of the piece's first output dimension spans."""
        beyond = math.prod(self.piece[self.inputs + 1 :])
        return beyond if self.inputs else beyond // math.prod(self.shape[1:])

    def blocks(self, itemsize: int) -> Iterator[tuple[int, int]]:
        """Row ranges [first, last) of at most `BLOCK_BYTES`, whole steps of the piece."""
        step, rows = block_rows(self, itemsize), self.shape[0]
        for first in range(0, rows, step):
            yield first, min(first + step, rows)

    def to_ours(self, block: np.ndarray) -> np.ndarray:
        """Rows of the tensor as the part of the piece they fill: a view, nothing is copied."""
        if not self.inputs:
            return block.reshape(-1, *self.piece[1:])
        split = self.inputs
        ins, outs = self.piece[:split], (-1, *self.piece[split + 1 :])
        parted = block.reshape(*outs, *ins)
        n_outs = len(outs)
        order = (*range(n_outs, n_outs + split), *range(n_outs))
        return parted.transpose(order)

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """Part of a piece (all inputs, some outputs) as rows of the tensor: a view if it can be."""
        if not self.inputs:
            return part.reshape(-1, *self.shape[1:])
        split = self.inputs
        order = (*range(split, part.ndim), *range(split))
        return part.transpose(order).reshape(-1, self.shape[1])

    def part(self, first: int, last: int) -> tuple[slice, ...]:
        """Where rows [first, last) of the tensor lie in the leaf, leading indices included."""
        lead = tuple(slice(i, i + 1) for i in self.index)
        whole = [slice(0, n) for n in self.piece]
        group = self.row_group
        whole[self.inputs] = slice(first // group, last // group)
        return (*lead, *whole)


def block_rows(entry: Entry, itemsize: int) -> int:
    """Rows of one block: whole steps of the piece, and whole blocks of FP8 scales."""
    row_bytes = math.prod(entry.shape[1:]) * itemsize
    group = math.lcm(entry.row_group, _SCALE_ROWS)
    return max(1, BLOCK_BYTES // (row_bytes * group)) * group


def table(cfg: ModelConfig) -> list[Entry]:
    """Every tensor of a released folder of this model, MTP layer included, layer by layer.

    Source: spec 3.1.
    """
    plan = dict(params_lib.leaves_with_path(transformer.specs(cfg)))
    entries: list[tuple[int, Entry]] = []
    for leaf, spec in plan.items():
        entries += _entries(leaf, spec, cfg)
    if cfg.n_mtp:
        for leaf, template in MTP_COPIES.items():
            name = template.format(layer=cfg.n_layers)
            entries.append((cfg.n_layers, _entry(name, leaf, (), plan[leaf], copy=True)))
    # A stable sort: in a layer, the order of `Params`, expert by expert.
    return [entry for _, entry in sorted(entries, key=lambda item: item[0])]


def _entries(leaf: str, spec: ParamSpec, cfg: ModelConfig) -> Iterator[tuple[int, Entry]]:
    """(layer to sort by, entry) of every tensor of one leaf."""
    group, _, rest = leaf.partition(".")
    if leaf in NAMES:
        last = cfg.n_layers + 1
        yield (-1 if leaf == "embed_VD" else last), _entry(NAMES[leaf], leaf, (), spec)
        return
    first_layer = {"dense": 0, "moe": cfg.n_dense, "mtp": cfg.n_layers}[group]
    if group == "mtp" and rest in MTP_NAMES:
        template = MTP_NAMES[rest]
    else:
        template = "model.layers.{layer}." + BLOCK_NAMES[rest.removeprefix("block.")]
    for at in range(spec.shape[0]):
        layer = first_layer + at
        if "{expert}" not in template:
            yield layer, _entry(template.format(layer=layer), leaf, (at,), spec)
            continue
        for expert in range(spec.shape[1]):
            name = template.format(layer=layer, expert=expert)
            yield layer, _entry(name, leaf, (at, expert), spec)


def _entry(
    name: str, leaf: str, index: tuple[int, ...], spec: ParamSpec, *, copy: bool = False
) -> Entry:
    piece = spec.shape[len(index) :]
    state = spec.kind == "state"
    if spec.kind == "matrix":
        _, rows_in, rows_out = spec.matrix_shape
        inputs = next(i for i in range(1, len(piece)) if math.prod(piece[:i]) == rows_in)
        return Entry(name, leaf, index, (rows_out, rows_in), piece, inputs, state, copy)
    # A bias of [heads, width] is one line in the files.
    shape = piece if spec.kind == "embed" else (math.prod(piece),)
    return Entry(name, leaf, index, shape, piece, 0, state, copy)
