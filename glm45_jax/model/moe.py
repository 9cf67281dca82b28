"""Feed-forward layers: SwiGLU and the mixture of experts (spec 2.1, 2.3). Types to know: `Moe`,
`MoeParams`, `MoeOut`.

Arrays are named by the shape one layer sees; stacked, they have a leading L. Letters: B T M D F E A
R L.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from glm45_jax import sharding
from glm45_jax.kernels import fp8
from glm45_jax.kernels.fp8_matmul import grouped_matmul_fp8
from glm45_jax.kernels.grouped_matmul import gated_matmul, grouped_matmul, silu_product
from glm45_jax.kernels.linear import linear, linears
from glm45_jax.kernels.routing import route
from glm45_jax.model.expert_parallel import ExpertWeights, mixture
from glm45_jax.params import ParamSpec


@struct.dataclass
class MlpParams:
    """Weights of one SwiGLU."""

    gate_DF: jax.Array
    up_DF: jax.Array
    down_FD: jax.Array


@struct.dataclass
class MoeParams:
    """Weights of one mixture. bias_E steers selection and moves by rule, not by gradient (spec
    2.6).
    """

    router_DE: jax.Array
    bias_E: jax.Array
    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array
    shared: MlpParams | None


@struct.dataclass
class MoeOut:
    """What one mixture returns.

    y_BTD: output. load_E: valid tokens each expert took, int32, over all devices of the mesh.
    balance_B: sum over a row's documents of sum_e f_e P_e, float32 (spec 2.5, alpha = 1).
    logits_BTE: router logits, float32. spilled: rows that the buffers of the exchange did not hold
    and that took a further pass, int32, over all devices.
    """

    y_BTD: jax.Array
    load_E: jax.Array
    balance_B: jax.Array
    logits_BTE: jax.Array
    spilled: jax.Array


def mlp_specs(layers: int, d_model: int, width: int, std: float) -> MlpParams:
    """Plan of `layers` stacked SwiGLUs."""
    up = ParamSpec(
        (layers, d_model, width), ("layers", "embed", "mlp"), "matrix", d_model, init=std
    )
    down = ParamSpec(
        (layers, width, d_model), ("layers", "mlp", "embed"), "matrix", width, init=std
    )
    return MlpParams(up, up, down)


def swiglu(p: MlpParams, x_BTD: jax.Array) -> jax.Array:
    """down(silu(gate x) * up x): x[B, T, D] · w[D, F/tensor] -> [B, T, D]."""
    up = "btd,df->btf"
    gate_BTF, up_BTF = linears(x_BTD, (up, p.gate_DF), (up, p.up_DF))
    return linear("btf,fd->btd", silu_product(gate_BTF, up_BTF), p.down_FD)


@dataclasses.dataclass(frozen=True)
class Moe:
    """Mixture of experts with a sigmoid router, a selection bias and shared experts."""

    experts: int = 160
    top_k: int = 8
    d_expert: int = 1536
    shared: int = 1
    scale: float = 2.5
    norm_topk: bool = True
    groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if self.experts % self.groups:
            raise ValueError(f"experts {self.experts} is not a multiple of groups {self.groups}")
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(
                f"top_groups {self.top_groups} is not between 1 and groups {self.groups}"
            )
        reachable = self.experts // self.groups * self.top_groups
        if not 1 <= self.top_k <= reachable:
            raise ValueError(
                f"top_k {self.top_k} is not between 1 and the {reachable} experts in reach"
            )
        if self.groups > 1 and self.experts // self.groups < 2:
            raise ValueError(
                f"{self.experts} experts in {self.groups} groups: a group is scored by its best two"
            )

    def specs(self, layers: int, d_model: int, std: float) -> MoeParams:
        """Plan of `layers` stacked mixtures. Every expert matrix is a matrix of its own to Muon."""
        L, D, E, F = layers, d_model, self.experts, self.d_expert
        up = ParamSpec((L, E, D, F), ("layers", "experts", "embed", "mlp"), "matrix", D, init=std)
        return MoeParams(
            router_DE=ParamSpec((L, D, E), ("layers", "embed", None), "matrix", D, init=std),
            bias_E=ParamSpec((L, E), ("layers", None), "state", init="zeros"),
            gate_EDF=up,
            up_EDF=up,
            down_EFD=ParamSpec(
                (L, E, F, D), ("layers", "experts", "mlp", "embed"), "matrix", F, init=std
            ),
            shared=mlp_specs(L, D, self.shared * F, std) if self.shared else None,
        )

    def __call__(
        self,
        p: MoeParams,
        x_BTD: jax.Array,
        *,
        segments_BT: jax.Array | None,
        valid_BT: jax.Array | None = None,
        impl_route: str,
        impl_matmul: str,
        routes_BTA: jax.Array | None = None,
    ) -> MoeOut:
        """Routed plus shared experts. Dropless: every token meets its top_k experts, padding too.

        segments_BT: documents of a row, each balanced by itself. valid_BT: places that load and
        balance count; None for those of a segment above 0, or all. routes_BTA: experts of each
        token chosen elsewhere, -1 where this router shall choose.

        On a mesh tokens and experts meet as `Rules.exchange` says: x[B/batch, T/seq, D] -> y of the
        same layout.
        """
        if valid_BT is None and segments_BT is not None:
            valid_BT = segments_BT > 0
        logits_BTE = jnp.einsum(
            "btd,de->bte",
            x_BTD.astype(jnp.float32),  # router
            p.router_DE.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        weights = ExpertWeights(
            *(fp8.cast(w, x_BTD.dtype) for w in (p.gate_EDF, p.up_EDF, p.down_EFD))
        )
        quantized = fp8.is_fp8(p.gate_EDF)
        matmul = grouped_matmul_fp8 if quantized else grouped_matmul
        mixed = mixture(
            x_BTD,
            logits_BTE,
            valid_BT,
            p.bias_E,
            weights,
            top_k=self.top_k,
            route=functools.partial(
                route,
                top_k=self.top_k,
                groups=self.groups,
                top_groups=self.top_groups,
                norm_topk=self.norm_topk,
                scale=self.scale,
                impl=impl_route,
            ),
            matmul=functools.partial(matmul, impl=impl_matmul),
            gated=None if quantized else functools.partial(gated_matmul, impl=impl_matmul),
            routes_BTA=routes_BTA,
        )
        balance_B = _over_rows(functools.partial(balance, top_k=self.top_k))(
            logits_BTE, segments_BT, valid_BT
        )
        y_BTD = mixed.y_BTD if p.shared is None else mixed.y_BTD + swiglu(p.shared, x_BTD)
        return MoeOut(y_BTD, mixed.load_E, balance_B, logits_BTE, mixed.spilled)


def balance(
    logits_BTE: jax.Array,
    segments_BT: jax.Array | None,
    valid_BT: jax.Array | None = None,
    *,
    top_k: int,
) -> jax.Array:
    """Sequence-wise balance term, alpha = 1, summed over each row's documents: float32 [B].

    f counts the top_k of the *unbiased* scores and has no gradient; P is the mean of the normalised
    scores. Each document of a packed row is a sequence of its own (docs/adr/0007); places that are
    not valid are in none. Source: spec 2.5.
    """
    B, T, E = logits_BTE.shape
    valid_BT = jnp.ones((B, T), bool) if valid_BT is None else valid_BT
    score_BTE = jax.nn.sigmoid(logits_BTE)
    share_BTE = score_BTE / score_BTE.sum(axis=-1, keepdims=True)
    _, chosen_BTA = jax.lax.top_k(jax.lax.stop_gradient(score_BTE), top_k)
    hit_BTE = jax.nn.one_hot(chosen_BTA, E, dtype=jnp.float32).sum(axis=2)
    counted_BT = valid_BT.astype(jnp.float32)
    if segments_BT is None:
        tokens_B1 = counted_BT.sum(axis=1, keepdims=True)
        f_BE = (hit_BTE * counted_BT[..., None]).sum(axis=1) * (E / top_k) / tokens_B1
        p_BE = (share_BTE * counted_BT[..., None]).sum(axis=1) / tokens_B1
        return (f_BE * p_BE).sum(axis=1)

    def one(hit_TE, share_TE, segment_T, valid_T):
        total = functools.partial(jax.ops.segment_sum, segment_ids=segment_T, num_segments=T + 1)
        tokens_Z = jnp.maximum(total(valid_T), 1.0)  # Z: documents of the row; 0 is padding
        f_ZE = total(hit_TE * valid_T[:, None]) * (E / top_k) / tokens_Z[:, None]
        p_ZE = total(share_TE * valid_T[:, None]) / tokens_Z[:, None]
        return (f_ZE * p_ZE).sum()

    return jax.vmap(one)(hit_BTE, share_BTE, segments_BT, counted_BT)


def _over_rows(f):
    """`f` of whole rows, each device its own; plain `f` where no mesh is set."""
    ambient = sharding.current()
    if ambient is None:
        return f
    mesh, rules = ambient
    rows = PartitionSpec(sharding.batch_axes(mesh, rules) or None)
    return jax.shard_map(f, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
