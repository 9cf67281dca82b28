"""Multi-head latent attention of GLM-4.7-Flash (spec 2.2, end). The types to know are `Mla`
(numbers) and `MlaParams` (arrays).

Letters: B T S D N L, and here Q query latents, Z key-value latents, R entries that rotate, Y = Z +
R, H = unrotated + R entries of a query or key, U entries of a value, X = unrotated + U.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from glm45_jax.kernels import fp8
from glm45_jax.kernels.attention import attention
from glm45_jax.kernels.linear import linear
from glm45_jax.model.cache import LayerCache, Slots
from glm45_jax.model.norm import rms_norm
from glm45_jax.model.rope import Rotation, deinterleave, rotate, rotation
from glm45_jax.params import ParamSpec


@struct.dataclass
class MlaParams:
    """Weights of one layer's latent attention. Order of entries, as in the released files: in H
    unrotated, rotated; in Y latents, rotated; in X of the key, of the value.
    """

    q_down_DQ: jax.Array
    q_norm_Q: jax.Array
    q_up_QNH: jax.Array
    kv_down_DY: jax.Array
    kv_norm_Z: jax.Array
    kv_up_ZNX: jax.Array
    out_NUD: jax.Array


@dataclasses.dataclass(frozen=True)
class Mla:
    """Latent attention with interleaved RoPE on one key part that all heads share.

    Defaults are GLM-4.7-Flash's (spec 1.1). latent_eps: of both latent norms; transformers has 1e-6
    whatever the config's rms_norm_eps says, engines in DeepSeek's style take the latter (spec 12,
    point 14).
    """

    heads: int = 20
    q_rank: int = 768
    kv_rank: int = 512
    nope_dim: int = 192
    rope_dim: int = 64
    v_dim: int = 256
    rope_theta: float = 1e6
    latent_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = (self.heads, self.q_rank, self.kv_rank, self.nope_dim, self.rope_dim, self.v_dim)
        if min(sizes) < 1:
            raise ValueError(f"{self}: every size must be positive; the smallest is {min(sizes)}")
        if self.rope_dim % 2:
            raise ValueError(
                f"rope_dim {self.rope_dim} is odd, but RoPE turns pairs; use {self.rope_dim + 1}"
            )

    @property
    def qk_dim(self) -> int:
        """Entries of a head's query and key, H."""
        return self.nope_dim + self.rope_dim

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, width) of what one token leaves in a layer's cache: its rotated key entries in
        the place of a key, its normed latents in that of a value.
        """
        return (1, self.rope_dim), (1, self.kv_rank)

    @property
    def pair_flops(self) -> int:
        """Forward FLOPs of one query that meets one key, expanded as in training."""
        return 2 * self.heads * (self.qk_dim + self.v_dim)

    @property
    def dots_width(self) -> int:
        """Activations a token that come out of products with weights, the last one's apart."""
        up = self.heads * (self.qk_dim + self.nope_dim + self.v_dim)
        return self.q_rank + self.kv_rank + self.rope_dim + up

    def residual_bytes(self, act: int) -> int:
        """Bytes a token that the backward pass reads between the block's norm and the residual add,
        the scores of attention apart. act: bytes of an activation.
        """
        latents = (self.q_rank + self.kv_rank) * (2 * act + 4)
        return latents + 2 * self.heads * (self.qk_dim + self.v_dim) * act

    def specs(self, layers: int, d_model: int, std: float) -> MlaParams:
        """Plan of `layers` stacked layers. Latents are split over no device; the input side of an
        up-projection is stored as the model's width is, so that fsdp splits every matrix.
        """
        L, D, N, Q, Z = layers, d_model, self.heads, self.q_rank, self.kv_rank
        Y, X, U = Z + self.rope_dim, self.nope_dim + self.v_dim, self.v_dim
        down, up = ("layers", "embed", None), ("layers", "embed", "heads", "head_dim")
        out = ("layers", "heads", "head_dim", "embed")
        return MlaParams(
            q_down_DQ=ParamSpec((L, D, Q), down, "matrix", D, init=std),
            q_norm_Q=ParamSpec((L, Q), ("layers", None), "norm", init="ones"),
            q_up_QNH=ParamSpec((L, Q, N, self.qk_dim), up, "matrix", Q, init=std),
            kv_down_DY=ParamSpec((L, D, Y), down, "matrix", D, init=std),
            kv_norm_Z=ParamSpec((L, Z), ("layers", None), "norm", init="ones"),
            kv_up_ZNX=ParamSpec((L, Z, N, X), up, "matrix", Z, init=std),
            out_NUD=ParamSpec((L, N, U, D), out, "matrix", N * U, init=std),
        )

    def rotation(self, positions_BT: jax.Array, dtype: jnp.dtype) -> Rotation:
        """What every layer of this attention shares: the rotation of the batch's positions."""
        return rotation(positions_BT, rotary_dim=self.rope_dim, theta=self.rope_theta, dtype=dtype)

    def __call__(
        self,
        p: MlaParams,
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
        """Attention output [B, T, D] and, when decoding, the layer's cache with the new latents and
        rotated key entries in it.

        eps: of the block's norms; not used, see `latent_eps`. x[B/data, T, D] · q_down[D/fsdp, Q]
        -> [B/data, T, Q] · q_up[Q/fsdp, N/tensor, H] -> [B/data, T, N/tensor, H]; keys and values
        alike. attend: `attention` of rows as they lie on the devices.
        """
        p = jax.tree.map(lambda w: fp8.cast(w, x_BTD.dtype), p, is_leaf=fp8.is_fp8)
        # Absorbed, its product with the latents is no product of its own: as an array both ways.
        p = p.replace(kv_up_ZNX=fp8.to_array(p.kv_up_ZNX, x_BTD.dtype))
        q_BTNH = self._queries(p, x_BTD, turn)
        latent_BT1Z, rotated_BT1R = self._latents(p, x_BTD, turn)
        if cache is not None and slots is not None:
            cache = cache.append(rotated_BT1R, latent_BT1Z, slots)
        if cache is None or slots is None or slots.fresh:
            k_BTNH, v_BTNU = self._expand(p, latent_BT1Z, rotated_BT1R)
            mixed_BTNU = attend(
                q_BTNH,
                k_BTNH,
                v_BTNU,
                segments_BT=segments_BT,
                positions_BT=positions_BT,
                positions_BS=positions_BT,
                impl=impl,
            )
        else:
            from_cache = functools.partial(
                cache.attend, slots=slots, impl=impl, impl_decode=impl_decode, latent=True
            )
            mixed_BTNU = self._absorbed(p, q_BTNH, from_cache)
        return linear("btnu,nud->btd", mixed_BTNU, p.out_NUD), cache

    def _queries(self, p: MlaParams, x_BTD: jax.Array, turn: Rotation) -> jax.Array:
        q_BTQ = linear("btd,dq->btq", x_BTD, p.q_down_DQ)
        q_BTQ = rms_norm(q_BTQ, p.q_norm_Q, self.latent_eps)
        q_BTNH = linear("btq,qnh->btnh", q_BTQ, p.q_up_QNH)
        still, turning = jnp.split(q_BTNH, [self.nope_dim], axis=-1)
        return jnp.concatenate([still, rotate(deinterleave(turning), turn)], axis=-1)

    def _latents(
        self, p: MlaParams, x_BTD: jax.Array, turn: Rotation
    ) -> tuple[jax.Array, jax.Array]:
        """Normed latents [B, T, 1, Z] and rotated key entries [B, T, 1, R]: all that a token's keys
        and values are made of.
        """
        y_BT1Y = linear("btd,dy->bty", x_BTD, p.kv_down_DY)[:, :, None, :]
        latent_BT1Z, key_BT1R = jnp.split(y_BT1Y, [self.kv_rank], axis=-1)
        latent_BT1Z = rms_norm(latent_BT1Z, p.kv_norm_Z, self.latent_eps)
        return latent_BT1Z, rotate(deinterleave(key_BT1R), turn)

    def _expand(
        self, p: MlaParams, latent_BT1Z: jax.Array, rotated_BT1R: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys [B, T, N, H] and values [B, T, N, U] of every head."""
        x_BTNX = jnp.einsum("btz,znx->btnx", latent_BT1Z[:, :, 0], p.kv_up_ZNX)
        still, v_BTNU = jnp.split(x_BTNX, [self.nope_dim], axis=-1)
        shared = jnp.broadcast_to(rotated_BT1R, (*still.shape[:-1], self.rope_dim))
        return jnp.concatenate([still, shared], axis=-1), v_BTNU

    def _absorbed(
        self, p: MlaParams, q_BTNH: jax.Array, attend: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """Attention [B, T, N, U] over a cache as one head of keys [latents; rotated], whose
        values are the latents: what multiplies a latent moves to the query and to the output.

        A prompt goes this way too: its scores cost (Y + Z) / (H + U) of the expanded form's.
        """
        key_ZNH, value_ZNU = jnp.split(p.kv_up_ZNX, [self.nope_dim], axis=-1)
        still, turned = jnp.split(q_BTNH, [self.nope_dim], axis=-1)
        q_BTNZ = jnp.einsum("btnh,znh->btnz", still, key_ZNH)
        # `attend` divides by the root of the width it sees; the scale is that of H.
        rescale = math.sqrt((self.kv_rank + self.rope_dim) / self.qk_dim)
        q_BTNY = jnp.concatenate([q_BTNZ, turned], axis=-1) * jnp.asarray(rescale, q_BTNH.dtype)
        return jnp.einsum("btnz,znu->btnu", attend(q_BTNY), value_ZNU)
