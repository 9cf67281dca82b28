"""Model sizes as frozen values: numbers only, no arrays. The type to know is `ModelConfig`.

`glm45()`, `glm45_air()`, `glm46()`, `glm47()`, `glm47_flash()` are the released shapes (spec 1.1);
`mini()` and `tiny()` keep the form of GLM-4.5.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from glm45_jax.model.attention import Gqa
from glm45_jax.model.mla import Mla
from glm45_jax.model.moe import Moe

__all__ = ["Gqa", "Impl", "Mla", "ModelConfig", "Moe"]

Remat = Literal["none", "full", "dots", "outputs"]
VOCAB = 151_552  # rows of the released embedding; ids from 151,365 on are padding (spec 1.4)
FLASH_VOCAB = 154_880  # the same for GLM-4.7-Flash; ids from 154,856 on are padding


@dataclasses.dataclass(frozen=True)
class Impl:
    """Implementation of each kernel by name; "auto" picks by platform and shape and logs what it
    picked.
    """

    attention: str = "auto"
    decode_attention: str = "auto"
    grouped_matmul: str = "auto"
    routing: str = "auto"
    cross_entropy: str = "auto"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model. Hashable, so that it can be a static argument of `jit`.

    d_mlp: width of the dense layers. n_dense dense layers come first, then n_moe (spec 2.1). dtype:
    activations and matmuls; weights keep the dtype they are stored in. remat: what a block keeps
    for its backward pass, see `block.POLICIES`.
    """

    vocab: int = VOCAB
    d_model: int = 5120
    n_dense: int = 3
    n_moe: int = 89
    n_mtp: int = 1
    d_mlp: int = 12288
    norm_eps: float = 1e-5
    mixer: Gqa | Mla = Gqa()
    moe: Moe = Moe()
    init_std: float = 0.02
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Remat = "full"
    impl: Impl = Impl()

    def __post_init__(self) -> None:
        if self.n_mtp not in (0, 1):
            raise ValueError(f"n_mtp {self.n_mtp}: GLM-4.5 has depth 1, this code 0 or 1")
        if self.n_dense + self.n_moe < 1:
            raise ValueError("a model needs at least one layer; n_dense and n_moe are both 0")
        if min(self.vocab, self.d_model, self.d_mlp) < 1:
            raise ValueError(
                f"vocab {self.vocab}, d_model {self.d_model}, d_mlp {self.d_mlp} must be positive"
            )

    @property
    def n_layers(self) -> int:
        """Layers of the main model, the MTP layer not counted."""
        return self.n_dense + self.n_moe


def glm45() -> ModelConfig:
    """GLM-4.5, 355B-A32B. Source: spec 1.1 (official config copy)."""
    return ModelConfig()


def glm45_air() -> ModelConfig:
    """GLM-4.5-Air, 106B-A12B: no QK-norm, routed scale 1. Source: spec 1.1."""
    return ModelConfig(
        d_model=4096,
        n_dense=1,
        n_moe=45,
        d_mlp=10944,
        mixer=Gqa(qk_norm=False),
        moe=Moe(experts=128, d_expert=1408, scale=1.0),
    )


def glm46() -> ModelConfig:
    """GLM-4.6: the shapes of GLM-4.5. Only the context is longer, 202,752 for 131,072 tokens, and
    no weight knows it. Source: spec 1.1.
    """
    return glm45()


def glm47() -> ModelConfig:
    """GLM-4.7: the shapes and the context of GLM-4.6. Source: spec 1.1."""
    return glm46()


def glm47_flash() -> ModelConfig:
    """GLM-4.7-Flash, 30B-A3B: latent attention, a vocabulary of its own. Source: spec 1.1."""
    return ModelConfig(
        vocab=FLASH_VOCAB,
        d_model=2048,
        n_dense=1,
        n_moe=46,
        d_mlp=10240,
        mixer=Mla(),
        moe=Moe(experts=64, top_k=4, d_expert=1536, scale=1.8),
    )


def mini(vocab: int = 32768) -> ModelConfig:
    """A 100M-class GLM-4.5 for one accelerator: 27M active of 104M in the body, every part of the
    family in it.
    """
    return ModelConfig(
        vocab=vocab,
        d_model=512,
        n_dense=1,
        n_moe=7,
        d_mlp=1536,
        mixer=Gqa(heads=16, kv_heads=4, head_dim=64, rope_theta=1e4),
        moe=Moe(experts=32, top_k=4, d_expert=256, scale=2.5),
        remat="outputs",
    )


def tiny(vocab: int = 256) -> ModelConfig:
    """The smallest model with every part of GLM-4.5; float32; what the tests and the quickstart
    share in form.
    """
    return ModelConfig(
        vocab=vocab,
        d_model=64,
        n_dense=1,
        n_moe=2,
        d_mlp=96,
        mixer=Gqa(heads=6, kv_heads=2, head_dim=16, rope_theta=1e4),
        moe=Moe(experts=8, top_k=3, d_expert=32, scale=2.5),
        dtype="float32",
        remat="none",
    )
