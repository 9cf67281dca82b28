"""Accelerators that serve a model: weights in BF16 or FP8 and a cache, against the memory of 80 GB
cards. Reproduces the table of spec 9.5, and that the full context takes twice as many.
"""

from __future__ import annotations

import dataclasses
import math

from glm45_jax import params as plan
from glm45_jax.model import config
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.transformer import specs

CARD_BYTES = 80e9
SHARE = 0.85  # of a card that weights and cache may fill; the rest is activations: UNVERIFIED
ROWS = 8  # "batch size at most 8" (spec 9.5)
SHORT, FULL = 8_192, 131_072  # tokens of a row; what a short one is, is UNVERIFIED
SIZES = (1, 2, 4, 8, 16, 32, 64)
MODELS = {
    "GLM-4.5": config.glm45,
    "GLM-4.5-Air": config.glm45_air,
    "GLM-4.7-Flash": config.glm47_flash,
}


@dataclasses.dataclass(frozen=True)
class Need:
    """weights, cache: bytes in all. cards: the smallest power of two of them that hold both."""

    weights: float
    cache: float
    cards: int


def need(cfg: ModelConfig, *, fp8: bool, tokens: int = SHORT) -> Need:
    """What one copy of the model with its MTP layer needs for `ROWS` rows of `tokens` tokens.

    fp8: linear weights of the blocks in one byte, with a float32 scale for each block of 128 x 128,
    and a cache of one byte; embedding, head, norms and router stay in BF16.
    """
    weights = 0.0
    for path, spec in plan.leaves_with_path(specs(cfg)):
        narrow = fp8 and spec.kind == "matrix" and path != "head_DV" and ".router" not in path
        weights += spec.size * ((1 + 4 / 128**2) if narrow else 2)
    token = sum(heads * width for heads, width in cfg.mixer.kv_shapes) * (1 if fp8 else 2)
    cache = float(ROWS * tokens * token * (cfg.n_layers + cfg.n_mtp))
    held = (weights + cache) / (SHARE * CARD_BYTES)
    return Need(weights, cache, next((n for n in SIZES if n >= held), math.ceil(held)))


def table() -> str:
    """A line for each model and precision: cards for short rows and for the full context."""
    lines = [
        f"H100 cards of 80 GB for one copy, MTP layer included, {ROWS} rows; weights and cache in "
        f"{SHARE:g} of the memory",
        f"{'model':<16}{'weights':<9}{'GB':>8}"
        + "".join(f"{f'cache {n:,}':>15}{'cards':>7}" for n in (SHORT, FULL)),
    ]
    for name, make in MODELS.items():
        for fp8 in (False, True):
            needs = [need(make(), fp8=fp8, tokens=n) for n in (SHORT, FULL)]
            lines.append(
                f"{name:<16}{'FP8' if fp8 else 'BF16':<9}{needs[0].weights / 1e9:>8.1f}"
                + "".join(f"{n.cache / 1e9:>15.1f}{n.cards:>7}" for n in needs)
            )
    return "\n".join(lines)
