"""`config.json` of the family, both ways (spec 1.1): `model_config` reads, `to_json` writes."""

from __future__ import annotations

import math
from typing import Any

from glm45_jax.model.config import Gqa, Mla, ModelConfig, Moe

GLM4_MOE, GLM4_MOE_LITE = "glm4_moe", "glm4_moe_lite"
ARCHITECTURES = {
    GLM4_MOE: "Glm4MoeForCausalLM",
    GLM4_MOE_LITE: "Glm4MoeLiteForCausalLM",
}
# Rows of the released embeddings tell the tokenizer: (pad, eos ids, context). Source: spec 1.1.
RELEASED_IDS = {
    151_552: (151_329, (151_329, 151_336, 151_338), 131_072),
    154_880: (154_820, (154_820, 154_827, 154_829), 202_752),
}
# What must be there, and as what; a bool is no number here.
_COMMON: dict[str, type] = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "moe_intermediate_size": int,
    "num_hidden_layers": int,
    "first_k_dense_replace": int,
    "num_attention_heads": int,
    "n_routed_experts": int,
    "n_shared_experts": int,
    "num_experts_per_tok": int,
    "routed_scaling_factor": float,
    "norm_topk_prob": bool,
    "rms_norm_eps": float,
    "rope_theta": float,
}
_REQUIRED: dict[str, dict[str, type]] = {
    GLM4_MOE: {**_COMMON, "num_key_value_heads": int},
    GLM4_MOE_LITE: {
        **_COMMON,
        "q_lora_rank": int,
        "kv_lora_rank": int,
        "qk_nope_head_dim": int,
        "qk_rope_head_dim": int,
        "v_head_dim": int,
    },
}
_OPTIONAL: dict[str, type] = {
    "head_dim": int,
    "partial_rotary_factor": float,
    "attention_bias": bool,
    "use_qk_norm": bool,
    "num_nextn_predict_layers": int,
    "n_group": int,
    "topk_group": int,
    "initializer_range": float,
}
_MAY_BE_ZERO = {"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"} | {
    key for key, kind in {**_COMMON, **_OPTIONAL}.items() if kind is bool
}
_LIMIT = 10**9
_MOST_TENSORS = 10**7
# Features that would change the forward pass and that no model of the family has.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
    "rope_interleave": (True,),
    "attention_dropout": (0, 0.0),
    "sliding_window": (None,),
    "scoring_func": ("sigmoid",),
}


def model_config(c: Any) -> ModelConfig:
    """`ModelConfig` of a parsed config.json; flat as released, or with `rope_parameters`.

    Raises: ValueError, listing every key that is missing, of another type, or of a feature that no
    model of the family has.
    """
    if not isinstance(c, dict) or c.get("model_type") not in ARCHITECTURES:
        found = c.get("model_type") if isinstance(c, dict) else type(c).__name__
        raise ValueError(
            f"model_type {found!r} is none of {list(ARCHITECTURES)}; "
            "only the GLM-4.5 family is read"
        )
    c = _flat(c)
    problems = _problems(c)
    if problems:
        raise ValueError("config.json: " + "; ".join(problems))
    try:
        return _model(c)
    except ValueError as error:  # numbers that are no model together
        raise ValueError(f"config.json: {error}") from error


def to_json(cfg: ModelConfig, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A flat config.json, as released. `base`: another config whose other keys are kept.

    Without a base, pad, eos and context are the released ones of a vocabulary of this many rows;
    for another vocabulary they are left out.
    """
    kind = GLM4_MOE_LITE if isinstance(cfg.mixer, Mla) else GLM4_MOE
    written: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    written |= {
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "moe_intermediate_size": cfg.moe.d_expert,
        "num_hidden_layers": cfg.n_layers,
        "first_k_dense_replace": cfg.n_dense,
        "n_routed_experts": cfg.moe.experts,
        "n_shared_experts": cfg.moe.shared,
        "num_experts_per_tok": cfg.moe.top_k,
        "n_group": cfg.moe.groups,
        "topk_group": cfg.moe.top_groups,
        "routed_scaling_factor": cfg.moe.scale,
        "norm_topk_prob": cfg.moe.norm_topk,
        "num_nextn_predict_layers": cfg.n_mtp,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.mixer.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": cfg.init_std,
    }
    written |= _mixer_keys(cfg.mixer)
    if base is None:
        released = RELEASED_IDS.get(cfg.vocab)
        if released:
            pad, eos, context = released
            written |= {
                "pad_token_id": pad,
                "eos_token_id": list(eos),
                "max_position_embeddings": context,
            }
        return written | {"use_cache": True, "torch_dtype": cfg.dtype}
    return _into(base, written)


def _into(base: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """`base` with the written values in its own order and nesting, without its quantization."""
    out = {key: written.get(key, value) for key, value in base.items()}
    nested = base.get("rope_parameters")
    if isinstance(nested, dict):
        out["rope_parameters"] = {key: written.get(key, value) for key, value in nested.items()}
        known = {*nested, "rope_scaling"}
    else:
        known = set()
    out.pop("quantization_config", None)
    return out | {k: v for k, v in written.items() if k not in base and k not in known}


def _mixer_keys(mixer: Gqa | Mla) -> dict[str, Any]:
    if isinstance(mixer, Mla):
        return {
            "num_attention_heads": mixer.heads,
            "num_key_value_heads": mixer.heads,
            "q_lora_rank": mixer.q_rank,
            "kv_lora_rank": mixer.kv_rank,
            "qk_nope_head_dim": mixer.nope_dim,
            "qk_rope_head_dim": mixer.rope_dim,
            "v_head_dim": mixer.v_dim,
            "rope_interleave": True,
            "attention_bias": False,
        }
    return {
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "partial_rotary_factor": mixer.rotary,
        "attention_bias": mixer.qkv_bias,
        "use_qk_norm": mixer.qk_norm,
    }


def _flat(c: dict[str, Any]) -> dict[str, Any]:
    """The config with `rope_parameters`, as newer libraries write it, spread out."""
    nested = c.get("rope_parameters")
    if not isinstance(nested, dict):
        return c
    out = {**c, **{k: v for k, v in nested.items() if k in ("rope_theta", "partial_rotary_factor")}}
    if nested.get("rope_type", "default") != "default":
        out["rope_scaling"] = nested
    return out


def _problems(c: dict[str, Any]) -> list[str]:
    required = _REQUIRED[c["model_type"]]
    problems = [f"{key} is missing" for key in required if c.get(key) is None]
    for key, kind in {**required, **_OPTIONAL}.items():
        value = c.get(key)
        if value is not None and not _is(value, kind):
            problems.append(f"{key} is {value!r}, expected {kind.__name__}")
        elif value is not None and not (0 if key in _MAY_BE_ZERO else 1e-12) <= value <= _LIMIT:
            problems.append(f"{key} is {value!r}, out of range")
    if not problems and c["num_hidden_layers"] * c["n_routed_experts"] > _MOST_TENSORS:
        problems.append(
            f"num_hidden_layers {c['num_hidden_layers']} x n_routed_experts "
            f"{c['n_routed_experts']} is beyond any model"
        )
    for key, allowed in _MUST_BE.items():
        if key in c and c[key] not in allowed and c[key] is not None:
            problems.append(f"{key} is {c[key]!r}, this code has only {allowed[0]!r}")
    if c["model_type"] == GLM4_MOE_LITE and c.get("attention_bias"):
        problems.append("attention_bias is true, glm4_moe_lite has none here")
    return problems


def _is(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    whole = isinstance(value, int)
    return (whole or (kind is float and isinstance(value, float))) and math.isfinite(value)


def _model(c: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab=c["vocab_size"],
        d_model=c["hidden_size"],
        n_dense=c["first_k_dense_replace"],
        n_moe=c["num_hidden_layers"] - c["first_k_dense_replace"],
        n_mtp=c.get("num_nextn_predict_layers") or 0,
        d_mlp=c["intermediate_size"],
        norm_eps=c["rms_norm_eps"],
        mixer=_mixer(c),
        moe=Moe(
            experts=c["n_routed_experts"],
            top_k=c["num_experts_per_tok"],
            d_expert=c["moe_intermediate_size"],
            shared=c["n_shared_experts"],
            scale=c["routed_scaling_factor"],
            norm_topk=c["norm_topk_prob"],
            groups=c.get("n_group") or 1,
            top_groups=c.get("topk_group") or 1,
        ),
        init_std=c.get("initializer_range") or ModelConfig.init_std,
    )


def _mixer(c: dict[str, Any]) -> Gqa | Mla:
    if c["model_type"] == GLM4_MOE_LITE:
        return Mla(
            heads=c["num_attention_heads"],
            q_rank=c["q_lora_rank"],
            kv_rank=c["kv_lora_rank"],
            nope_dim=c["qk_nope_head_dim"],
            rope_dim=c["qk_rope_head_dim"],
            v_dim=c["v_head_dim"],
            rope_theta=float(c["rope_theta"]),
        )
    return Gqa(
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        # Not declared by the transformers config: absent, it is hidden / heads (spec 1.1).
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        rotary=0.5 if c.get("partial_rotary_factor") is None else c["partial_rotary_factor"],
        rope_theta=float(c["rope_theta"]),
        qkv_bias=bool(c.get("attention_bias")),
        qk_norm=bool(c.get("use_qk_norm")),
    )
