"""Grouped-query attention of GLM-4.5 (spec 2.2). The types to know are `Gqa` (numbers) and
`GqaParams` (arrays).

Arrays are named by the shape one layer sees; stacked, they have a leading L. Letters: B T D N K H
L.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from glm45_jax.kernels.attention import attention
from glm45_jax.kernels.linear import linear, linears
from glm45_jax.model.cache import LayerCache, Slots
from glm45_jax.model.norm import rms_norm
from glm45_jax.model.rope import Rotation, rotate, rotation
from glm45_jax.params import ParamSpec


@struct.dataclass
class GqaParams:
    """Weights of one layer's attention; None where the model has no such weight."""

    q_DNH: jax.Array
    k_DKH: jax.Array
    v_DKH: jax.Array
    out_NHD: jax.Array
    q_bias_NH: jax.Array | None
    k_bias_KH: jax.Array | None
    v_bias_KH: jax.Array | None
    q_norm_H: jax.Array | None
    k_norm_H: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Gqa:
    """Grouped-query attention with partial half-split RoPE. `rotary` is the share of a head that
    rotates.
    """

    heads: int = 96
    kv_heads: int = 8
    head_dim: int = 128
    rotary: float = 0.5
    rope_theta: float = 1e6
    qkv_bias: bool = True
    qk_norm: bool = True

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.rotary_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} x rotary {self.rotary} is {self.rotary_dim}: odd, "
                "but RoPE turns pairs"
            )

    @property
    def rotary_dim(self) -> int:
        """Entries of a head that rotate, R of spec 2.2."""
        return int(self.head_dim * self.rotary)

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, width) of the key and of the value that one token leaves in a layer's cache."""
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)

    @property
    def pair_flops(self) -> int:
        """Forward FLOPs of one query that meets one key: q·k and p·v."""
        return 2 * self.heads * 2 * self.head_dim

    @property
    def dots_width(self) -> int:
        """Activations a token that come out of products with weights, the last one's apart."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def residual_bytes(self, act: int) -> int:
        """Bytes a token that the backward pass reads between the block's norm and the residual add,
        the scores of attention apart. act: bytes of an activation.
        """
        return (self.heads + self.kv_heads) * self.head_dim * (3 * act + 4)

    def specs(self, layers: int, d_model: int, std: float) -> GqaParams:
        """Plan of `layers` stacked layers."""
        L, D, N, K, H = layers, d_model, self.heads, self.kv_heads, self.head_dim
        kv_axes = ("layers", "embed", "kv_heads", "head_dim")
        kv = ParamSpec((L, D, K, H), kv_axes, "matrix", D, init=std)
        kv_bias = ParamSpec((L, K, H), ("layers", "kv_heads", "head_dim"), "bias", init="zeros")
        norm = ParamSpec((L, H), ("layers", None), "norm", init="ones")
        return GqaParams(
            q_DNH=ParamSpec(
                (L, D, N, H), ("layers", "embed", "heads", "head_dim"), "matrix", D, init=std
            ),
            k_DKH=kv,
            v_DKH=kv,
            out_NHD=ParamSpec(
                (L, N, H, D), ("layers", "heads", "head_dim", "embed"), "matrix", N * H, init=std
            ),
            q_bias_NH=ParamSpec((L, N, H), ("layers", "heads", "head_dim"), "bias", init="zeros")
            if self.qkv_bias
            else None,
            k_bias_KH=kv_bias if self.qkv_bias else None,
            v_bias_KH=kv_bias if self.qkv_bias else None,
            q_norm_H=norm if self.qk_norm else None,
            k_norm_H=norm if self.qk_norm else None,
        )

    def rotation(self, positions_BT: jax.Array, dtype: jnp.dtype) -> Rotation:
        """What every layer of this attention shares: the rotation of the batch's positions."""
        return rotation(
            positions_BT, rotary_dim=self.rotary_dim, theta=self.rope_theta, dtype=dtype
        )

    def __call__(
        self,
        p: GqaParams,
        x_BTD: jax.Array,
        *,
        turn: Rotation,
        positions_BT: jax.Array | None,
        segments_BT: jax.Array | None,
        eps: float,
        impl: str,
        impl_decode: str = "auto",
        cache: LayerCache | None = None,
        slots: Slots | None = None,
        attend: Callable[..., jax.Array] = attention,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention output [B, T, D] and, when decoding, the layer's cache with the new keys and
        values in it. attend: `attention` of rows as they lie on the devices.
        """
        q_BTNH, k_BTKH, v_BTKH = self._project(p, x_BTD, turn, eps)
        if cache is not None and slots is not None:
            cache = cache.append(k_BTKH, v_BTKH, slots)
        if cache is None or slots is None or slots.fresh:
            mixed_BTNH = attend(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                segments_BT=segments_BT,
                positions_BT=positions_BT,
                positions_BS=positions_BT,
                impl=impl,
            )
        else:
            mixed_BTNH = cache.attend(q_BTNH, slots, impl=impl, impl_decode=impl_decode)
        return linear("btnh,nhd->btd", mixed_BTNH, p.out_NHD), cache

    def _project(self, p: GqaParams, x_BTD: jax.Array, turn: Rotation, eps: float):
        cast = functools.partial(jnp.asarray, dtype=x_BTD.dtype)
        q_BTNH, k_BTKH, v_BTKH = linears(
            x_BTD, ("btd,dnh->btnh", p.q_DNH), (kv := "btd,dkh->btkh", p.k_DKH), (kv, p.v_DKH)
        )
        if p.q_bias_NH is not None:
            q_BTNH = q_BTNH + cast(p.q_bias_NH)[None, None]
            k_BTKH = k_BTKH + cast(p.k_bias_KH)[None, None]
            v_BTKH = v_BTKH + cast(p.v_bias_KH)[None, None]
        if p.q_norm_H is not None and p.k_norm_H is not None:  # over the head, before the rotation
            q_BTNH, k_BTKH = rms_norm(q_BTNH, p.q_norm_H, eps), rms_norm(k_BTKH, p.k_norm_H, eps)
        return rotate(q_BTNH, turn), rotate(k_BTKH, turn), v_BTKH
