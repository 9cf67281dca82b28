"""Hugging Face checkpoints of the GLM-4.5 family, by one name table (spec 3.1). Reading only so
far.

`table(cfg)` is the whole mapping: every tensor of a released folder, the leaf it belongs to, and
how it lies there.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (lets safetensors hand out bfloat16)
import numpy as np

from glm45_jax import params as params_lib
from glm45_jax.model import transformer
from glm45_jax.model.config import Gqa, ModelConfig, Moe
from glm45_jax.sharding import Rules, shardings


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its name in the files, the leaf of `Params` that holds it, and where in that
    leaf.

    index: leading indices into the leaf (layer, expert). copy: repeats what another entry reads.
    """

    name: str
    leaf: str
    index: tuple[int, ...] = ()
    copy: bool = False


def table(cfg: ModelConfig) -> list[Entry]:
    """Every tensor of a released checkpoint of this shape, MTP layer included. Source: spec 3.1."""
    entries = [
        Entry("model.embed_tokens.weight", "embed_VD"),
        Entry("model.norm.weight", "norm_D"),
        Entry("lm_head.weight", "head_DV"),
    ]
    for layer in range(cfg.n_layers):
        dense = layer < cfg.n_dense
        at = layer if dense else layer - cfg.n_dense
        entries += _layer(cfg, f"model.layers.{layer}", "dense" if dense else "moe", at, dense)
    if cfg.n_mtp:
        name = f"model.layers.{cfg.n_layers}"
        entries += [
            Entry(f"{name}.enorm.weight", "mtp.norm_embed_D", (0,)),
            Entry(f"{name}.hnorm.weight", "mtp.norm_hidden_D", (0,)),
            Entry(f"{name}.eh_proj.weight", "mtp.join_2DD", (0,)),
            Entry(f"{name}.shared_head.norm.weight", "mtp.norm_D", (0,)),
            Entry(f"{name}.embed_tokens.weight", "embed_VD", copy=True),
            Entry(f"{name}.shared_head.head.weight", "head_DV", copy=True),
            *_layer(cfg, name, "mtp.block", 0, dense=False),
        ]
    return entries


def _layer(cfg: ModelConfig, name: str, leaf: str, at: int, dense: bool) -> Iterator[Entry]:
    yield Entry(f"{name}.input_layernorm.weight", f"{leaf}.norm_mixer_D", (at,))
    yield Entry(f"{name}.post_attention_layernorm.weight", f"{leaf}.norm_ffn_D", (at,))
    mixer = {
        "q_proj.weight": "q_DNH",
        "k_proj.weight": "k_DKH",
        "v_proj.weight": "v_DKH",
        "o_proj.weight": "out_NHD",
    }
    if cfg.mixer.qkv_bias:
        mixer |= {
            "q_proj.bias": "q_bias_NH",
            "k_proj.bias": "k_bias_KH",
            "v_proj.bias": "v_bias_KH",
        }
    if cfg.mixer.qk_norm:
        mixer |= {"q_norm.weight": "q_norm_H", "k_norm.weight": "k_norm_H"}
    for theirs, ours in mixer.items():
        yield Entry(f"{name}.self_attn.{theirs}", f"{leaf}.mixer.{ours}", (at,))
    mlp = {"gate_proj": "gate_{}DF", "up_proj": "up_{}DF", "down_proj": "down_{}FD"}
    if dense:
        for theirs, ours in mlp.items():
            yield Entry(f"{name}.mlp.{theirs}.weight", f"{leaf}.ffn.{ours.format('')}", (at,))
        return
    yield Entry(f"{name}.mlp.gate.weight", f"{leaf}.ffn.router_DE", (at,))
    yield Entry(f"{name}.mlp.gate.e_score_correction_bias", f"{leaf}.ffn.bias_E", (at,))
    for e in range(cfg.moe.experts):
        for theirs, ours in mlp.items():
            yield Entry(
                f"{name}.mlp.experts.{e}.{theirs}.weight", f"{leaf}.ffn.{ours.format('E')}", (at, e)
            )
    if cfg.moe.shared:
        for theirs, ours in mlp.items():
            yield Entry(
                f"{name}.mlp.shared_experts.{theirs}.weight",
                f"{leaf}.ffn.shared.{ours.format('')}",
                (at,),
            )


def load(path: str | pathlib.Path, *, dtype: Any = None, mesh: Any = None, rules: Any = None):
    """(ModelConfig, Params) of a released-style folder.

    dtype: of weights and activations; default as stored. The router's bias is always float32. Reads
    every tensor to the host once; with a mesh the leaves are laid out by `rules`.

    Raises: ValueError for a missing tensor or a shape that is not the config's.
    """
    path = pathlib.Path(path)
    tensors = _read(path)
    cfg = config(json.loads((path / "config.json").read_text()))
    computed = np.dtype(dtype or tensors["model.embed_tokens.weight"].dtype)
    cfg = dataclasses.replace(cfg, dtype="float32" if computed == np.float32 else "bfloat16")
    specs = transformer.specs(cfg)
    plan = dict(params_lib.leaves_with_path(specs))
    leaves: dict[str, np.ndarray] = {}
    for entry in table(cfg):
        if entry.copy:
            continue
        if entry.name not in tensors:
            raise ValueError(
                f"{path}: tensor {entry.name} is missing; {len(tensors)} tensors were found"
            )
        spec = plan[entry.leaf]
        value = _to_ours(tensors[entry.name], entry, spec.shape[len(entry.index) :])
        leaf_dtype = np.float32 if spec.kind == "state" else (dtype or value.dtype)
        leaf = leaves.setdefault(entry.leaf, np.empty(spec.shape, leaf_dtype))
        leaf[entry.index] = value.astype(leaf_dtype)
    values = [leaves[name] for name in plan]
    tree = jax.tree.unflatten(jax.tree.structure(specs, is_leaf=params_lib.is_spec), values)
    if mesh is None:
        return cfg, jax.tree.map(jax.numpy.asarray, tree)
    return cfg, jax.device_put(tree, shardings(specs, mesh, rules or Rules()))


def config(c: dict[str, Any]) -> ModelConfig:
    """`ModelConfig` of a config.json; flat or with `rope_parameters`.

    Raises: ValueError for another architecture, or a feature that GLM-4.5 does not have.
    """
    if c.get("model_type") != "glm4_moe":
        raise ValueError(
            f"model_type {c.get('model_type')!r} is not 'glm4_moe'; only the GLM-4.5 family is read"
        )
    if c.get("tie_word_embeddings"):
        raise ValueError(
            "tie_word_embeddings is true; GLM-4.5 checkpoints have a head of their own"
        )
    rope = {**c, **(c.get("rope_parameters") or {})}
    heads = c["num_attention_heads"]
    return ModelConfig(
        vocab=c["vocab_size"],
        d_model=c["hidden_size"],
        n_dense=c["first_k_dense_replace"],
        n_moe=c["num_hidden_layers"] - c["first_k_dense_replace"],
        n_mtp=c.get("num_nextn_predict_layers", 0),
        d_mlp=c["intermediate_size"],
        norm_eps=c["rms_norm_eps"],
        mixer=Gqa(
            heads=heads,
            kv_heads=c["num_key_value_heads"],
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            rotary=rope.get("partial_rotary_factor", 0.5),
            rope_theta=float(rope["rope_theta"]),
            qkv_bias=c.get("attention_bias", False),
            qk_norm=c.get("use_qk_norm", False),
        ),
        moe=Moe(
            experts=c["n_routed_experts"],
            top_k=c["num_experts_per_tok"],
            d_expert=c["moe_intermediate_size"],
            shared=c["n_shared_experts"],
            scale=c["routed_scaling_factor"],
            norm_topk=c["norm_topk_prob"],
            groups=c["n_group"],
            top_groups=c["topk_group"],
        ),
    )


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    tensors: dict[str, np.ndarray] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors:
        raise ValueError(f"{path}: no .safetensors file here")
    return tensors


def _to_ours(value: np.ndarray, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
    """HF stores [out, in]; ours is [in..., out...]. The embedding is a table in both."""
    turned = value.T if value.ndim == 2 and entry.leaf != "embed_VD" else value
    if turned.size != int(np.prod(shape)):
        raise ValueError(
            f"{entry.name} has shape {value.shape}; {entry.leaf} of this config needs {shape}"
        )
    return turned.reshape(shape)
