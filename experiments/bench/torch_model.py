"""A model of transformers that has our weights, on the GPU, without a file between: the peer of the
rollout benchmark. The only bench file that imports torch at its head.
"""

import math
from typing import Any

import jax
import torch
import transformers

from glm45_jax.hf import table
from glm45_jax.model import config, transformer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def glm4_config(cfg: config.ModelConfig, **options: Any) -> Any:
    """The shape of `cfg`, MTP aside, as transformers has it."""
    assert isinstance(cfg.mixer, config.Gqa), cfg.mixer
    return transformers.Glm4MoeConfig(
        vocab_size=cfg.vocab,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_mlp,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.mixer.heads,
        num_key_value_heads=cfg.mixer.kv_heads,
        head_dim=cfg.mixer.head_dim,
        attention_bias=cfg.mixer.qkv_bias,
        use_qk_norm=cfg.mixer.qk_norm,
        moe_intermediate_size=cfg.moe.d_expert,
        n_routed_experts=cfg.moe.experts,
        num_experts_per_tok=cfg.moe.top_k,
        first_k_dense_replace=cfg.n_dense,
        routed_scaling_factor=cfg.moe.scale,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": cfg.mixer.rope_theta,
            "partial_rotary_factor": cfg.mixer.rotary,
        },
        **options,
    )


def glm4_moe(params: transformer.Params, cfg: config.ModelConfig) -> Any:
    """`Glm4MoeForCausalLM` of this shape with these weights, grouped experts, in eval mode."""
    with torch.device("cuda"):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            glm4_config(cfg, pad_token_id=0, eos_token_id=None),
            dtype=DTYPES[cfg.dtype],
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    theirs = dict(model.named_parameters()) | dict(model.named_buffers())
    left = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, ours in _tensors(params, cfg):
            target = theirs[name]
            assert tuple(target.shape) == ours.shape, (name, tuple(target.shape), ours.shape)
            target.copy_(torch.from_dlpack(ours).to(target.dtype))
            left.discard(name)
    assert not left, f"weights that nothing filled: {sorted(left)[:5]}"
    return model.eval()


def _tensors(params: transformer.Params, cfg: config.ModelConfig):
    """(name, array) in the layout of transformers 5: experts of a layer are two tensors."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for entry in table(cfg):
        if ".experts." in entry.name or entry.copy or entry.leaf.startswith("mtp."):
            continue
        piece = leaves[entry.leaf][entry.index]
        if entry.inputs:
            rows_in = math.prod(entry.piece[: entry.inputs])
            piece = piece.reshape(rows_in, -1).T
        yield entry.name, jax.block_until_ready(piece.reshape(entry.shape))
    if params.moe is None:
        return
    for at in range(cfg.n_moe):
        stem = f"model.layers.{cfg.n_dense + at}.mlp.experts."
        ffn = jax.tree.map(lambda w, at=at: w[at], params.moe.ffn)
        halves = [w.swapaxes(1, 2) for w in (ffn.gate_EDF, ffn.up_EDF)]
        yield stem + "gate_up_proj", jax.block_until_ready(jax.numpy.concatenate(halves, 1))
        yield stem + "down_proj", jax.block_until_ready(ffn.down_EFD.swapaxes(1, 2) + 0)
