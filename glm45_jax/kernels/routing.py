"""Sigmoid routing with a selection bias, and the order that groups rows by expert. Letters: M E A
R.

The type to know is `Routing`. All of it float32 (spec 2.3).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from glm45_jax.kernels.dispatch import Implementation, anything, not_tpu, pick

TILE = 128  # tokens that are counted together
MANY = 1024  # tokens from which "auto" takes the kernels for Hopper


@struct.dataclass
class Routing:
    """Where each token goes.

    expert_MA: chosen experts, best biased score first, int32. gate_MA: their weights, float32.
    order_R: for each of the R = M * A rows in expert order, its index m * A + a. place_MA: the
    other way round, the row of each. rows_E: rows of each expert, int32, padding included. copies:
    the implementation of `permute` and `combine` for these rows: that asked for by name where they
    have it, else "auto".
    """

    expert_MA: jax.Array
    gate_MA: jax.Array
    order_R: jax.Array
    place_MA: jax.Array
    rows_E: jax.Array
    copies: str = struct.field(pytree_node=False, default="auto")


def route(
    logits_ME: jax.Array,
    bias_E: jax.Array,
    *,
    top_k: int,
    groups: int = 1,
    top_groups: int = 1,
    norm_topk: bool = True,
    scale: float = 1.0,
    impl: str = "auto",
    routes_MA: jax.Array | None = None,
) -> Routing:
    """The `top_k` experts of the largest sigmoid(logit) + bias, gated by the unbiased sigmoid.

    Gradients flow to the logits through the gates alone; the bias has none. Source: spec 2.3 steps
    2-7.

    routes_MA: integers, experts that another router chose (routing replay, spec 8). A token goes
    there, with the gates that this router gives them; where any is negative it chooses itself.
    The A experts of a token must differ: buffers of the exchanges count on that.
    """
    kwargs = dict(
        top_k=top_k, groups=groups, top_groups=top_groups, norm_topk=norm_topk, scale=scale
    )
    own = pick("routing", IMPLS, impl, logits_ME, bias_E, **kwargs)(logits_ME, bias_E, **kwargs)
    own = own.replace(copies=impl if impl in {i.name for i in PERMUTES} else "auto")
    if routes_MA is None:
        return own
    routes_MA = routes_MA.astype(jnp.int32)
    known_M1 = (routes_MA >= 0).all(axis=1, keepdims=True)
    expert_MA = jnp.where(known_M1, routes_MA, own.expert_MA)
    score_ME = jax.nn.sigmoid(logits_ME.astype(jnp.float32))
    # Sorted, for these may name an expert twice, and counting needs them to differ.
    sent = _sent_to(expert_MA, score_ME, by_sorting, norm_topk, scale)
    return sent.replace(copies=own.copies)


def reference(logits_ME, bias_E, *, top_k, groups, top_groups, norm_topk, scale) -> Routing:
    """The definition, by `lax.top_k` and a stable sort."""
    score_ME, expert_MA = _chosen(logits_ME, bias_E, top_k, groups, top_groups)
    return _sent_to(expert_MA, score_ME, by_sorting, norm_topk, scale)


def counting(logits_ME, bias_E, *, top_k, groups, top_groups, norm_topk, scale) -> Routing:
    """The same, its rows ordered by counting."""
    score_ME, expert_MA = _chosen(logits_ME, bias_E, top_k, groups, top_groups)
    return _sent_to(expert_MA, score_ME, by_counting, norm_topk, scale)


def mosaic(logits_ME, bias_E, *, top_k, groups, top_groups, norm_topk, scale) -> Routing:
    """The same in one Pallas kernel for Hopper (routing_gpu.py)."""
    from glm45_jax.kernels import routing_gpu  # Pallas is imported where it is used

    run = functools.partial(routing_gpu.route, top_k=top_k, norm_topk=norm_topk, scale=scale)
    return by_kernel(run, norm_topk, scale, logits_ME, bias_E)


def _mosaic_supports(logits_ME, bias_E, *, top_k, groups=1, **_: Any) -> str | None:
    from glm45_jax.kernels import routing_gpu

    return routing_gpu.refuses(logits_ME, top_k, groups)


def mosaic_tpu(logits_ME, bias_E, **kwargs) -> Routing:
    """The same in one Pallas kernel for TPU (routing_tpu.py), and a sort for the order."""
    from glm45_jax.kernels import routing_tpu  # Pallas is imported where it is used

    return routing_tpu.route(logits_ME, bias_E, **kwargs)


def _mosaic_tpu_supports(logits_ME, bias_E, **kwargs) -> str | None:
    from glm45_jax.kernels import routing_tpu

    return not_tpu() or routing_tpu.refuses(logits_ME, bias_E, **kwargs)


def _chosen(logits_ME, bias_E, top_k, groups, top_groups) -> tuple[jax.Array, jax.Array]:
    """Scores, and the experts of the best biased ones."""
    score_ME = jax.nn.sigmoid(logits_ME.astype(jnp.float32))
    choice_ME = jax.lax.stop_gradient(score_ME + bias_E[None, :].astype(jnp.float32))
    choice_ME = keep_groups(choice_ME, groups=groups, top_groups=top_groups)
    return score_ME, jax.lax.top_k(choice_ME, top_k)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def by_kernel(run: Any, norm_topk: bool, scale: float, logits_ME, bias_E) -> Routing:
    """`Routing` of what `run(logits_ME, bias_E)` gives: its fields in order. The gradient is XLA's,
    of one pass over the logits, none of it a scatter.
    """
    return Routing(*run(logits_ME, bias_E))


def _by_kernel_fwd(run, norm_topk, scale, logits_ME, bias_E):
    routing = by_kernel(run, norm_topk, scale, logits_ME, bias_E)
    return routing, (logits_ME, bias_E, routing.expert_MA)


def _by_kernel_bwd(run, norm_topk, scale, saved, g: Routing):
    logits_ME, bias_E, expert_MA = saved
    hit_MAE = expert_MA[:, :, None] == jnp.arange(logits_ME.shape[1])[None, None]

    def gates(logits_ME):
        score_ME = jax.nn.sigmoid(logits_ME.astype(jnp.float32))
        gate_MA = jnp.where(hit_MAE, score_ME[:, None, :], 0).sum(axis=2)
        return _weighed_gates(gate_MA, norm_topk, scale)

    return *jax.vjp(gates, logits_ME)[1](g.gate_MA), jnp.zeros_like(bias_E)


by_kernel.defvjp(_by_kernel_fwd, _by_kernel_bwd)


def _sent_to(expert_MA, score_ME, order, norm_topk, scale) -> Routing:
    """Tokens sent to these experts, gated by these scores, in expert order by `order`."""
    gate_MA = jnp.take_along_axis(score_ME, expert_MA, axis=-1)
    gate_MA = _weighed_gates(gate_MA, norm_topk, scale)
    return Routing(expert_MA, gate_MA, *order(expert_MA, score_ME.shape[-1]))


def _weighed_gates(gate_MA, norm_topk, scale) -> jax.Array:
    """Scores of the chosen experts as weights: spec 2.3 steps 6 and 7."""
    if norm_topk:
        gate_MA = gate_MA / (gate_MA.sum(axis=-1, keepdims=True) + 1e-20)
    return gate_MA * scale


def by_sorting(expert_MA: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """order_R, place_MA and rows_E of `Routing`."""
    order_R = jnp.argsort(expert_MA.reshape(-1), stable=True).astype(jnp.int32)
    place_MA = inverse(order_R).reshape(expert_MA.shape)
    return order_R, place_MA, count_rows(expert_MA, experts)


def by_counting(expert_MA: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, bit for bit, where the experts of a token differ, without a sort.

    The place of a row is the start of its expert's rows, plus the tokens before it that go there: a
    triangular product inside a tile of tokens, sums of whole tiles before it.
    """
    M = expert_MA.shape[0]
    tiles = -(-M // TILE)
    expert_MA = expert_MA.astype(jnp.int32)
    padded_MA = jnp.pad(expert_MA, ((0, tiles * TILE - M), (0, 0)), constant_values=-1)
    hit_ME = (padded_MA[:, :, None] == jnp.arange(experts)[None, None, :]).any(axis=1)
    hit_PTE = hit_ME.reshape(tiles, TILE, experts)
    # Counts up to TILE, exact in the float32 that products of bfloat16 sum to.
    before_TS = jnp.tril(jnp.ones((TILE, TILE), jnp.bfloat16), -1)
    inside_PTE = jnp.einsum(
        "ts,pse->pte",
        before_TS,
        hit_PTE.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    ).astype(jnp.int32)
    count_PE = hit_PTE.sum(axis=1, dtype=jnp.int32)
    before_PE = _sums_before(count_PE)
    rows_E = before_PE[-1] + count_PE[-1]
    place_PTE = _sums_before(rows_E)[None, None, :] + before_PE[:, None, :] + inside_PTE
    place_ME = place_PTE.reshape(tiles * TILE, experts)[:M]
    place_MA = jnp.take_along_axis(place_ME, expert_MA, axis=1)
    return inverse(place_MA.reshape(-1)), place_MA, rows_E


def _sums_before(x: jax.Array) -> jax.Array:
    """Sums of what stands before, along the first axis: compared and summed, for XLA scans in many
    kernels.
    """
    at = jnp.arange(x.shape[0])
    before = (at[None, :] < at[:, None]).reshape(x.shape[0], x.shape[0], *(1,) * (x.ndim - 1))
    return jnp.where(before, x[None], 0).sum(axis=1)


def keep_groups(choice_ME: jax.Array, *, groups: int, top_groups: int) -> jax.Array:
    """Scores with -inf outside the `top_groups` groups whose two best experts sum highest (spec 2.3
    step 3).
    """
    if groups == 1:
        return choice_ME
    M, E = choice_ME.shape
    choice_MGI = choice_ME.reshape(M, groups, E // groups)
    best_MG2, _ = jax.lax.top_k(choice_MGI, 2)
    _, kept_MI = jax.lax.top_k(best_MG2.sum(axis=-1), top_groups)
    kept_MG = jax.nn.one_hot(kept_MI, groups, dtype=jnp.float32).sum(axis=1) > 0
    return jnp.where(kept_MG[:, :, None], choice_MGI, -jnp.inf).reshape(M, E)


def count_rows(expert_MA: jax.Array, experts: int, valid_M: jax.Array | None = None) -> jax.Array:
    """Tokens sent to each expert, int32 [E]; with `valid_M` only those of valid tokens."""
    weight_MA = jnp.ones(expert_MA.shape, jnp.int32)
    if valid_M is not None:
        weight_MA = weight_MA * valid_M.astype(jnp.int32)[:, None]
    return jnp.zeros(experts, jnp.int32).at[expert_MA].add(weight_MA)


def permute(
    x_MD: jax.Array, order_R: jax.Array, place_MA: jax.Array | None = None, *, impl: str = "auto"
) -> jax.Array:
    """Rows in expert order: x_RD[r] = x_MD[order_R[r] // A]. Its backward gathers and sums, it
    never scatters. place_MA: the inverse of the order where it is known, else it is made.
    """
    place_MA = _placed(order_R, place_MA, x_MD.shape[0])
    return pick("permute", PERMUTES, impl, x_MD, order_R, place_MA)(x_MD, order_R, place_MA)


def _placed(order_R: jax.Array, place_MA: jax.Array | None, M: int) -> jax.Array:
    return inverse(order_R).reshape(M, -1) if place_MA is None else place_MA


@jax.custom_vjp
def _gathered(x_MD, order_R, place_MA):
    """`permute` by XLA's gather: row by row of the result, each token read A times."""
    return x_MD[order_R // place_MA.shape[1]]


def _gathered_fwd(x_MD, order_R, place_MA):
    return _gathered(x_MD, order_R, place_MA), place_MA


def _gathered_bwd(place_MA, g_RD):
    return _summed(g_RD, place_MA), None, None


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def _summed(g_RD: jax.Array, place_MA: jax.Array) -> jax.Array:
    """Sums over the A copies of a token, in float32: [M, D] in the dtype of g."""
    return g_RD[place_MA].astype(jnp.float32).sum(axis=1).astype(g_RD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def copied(
    x_MD: jax.Array, order_R: jax.Array, place_MA: jax.Array, interpret: bool = False
) -> jax.Array:
    """`permute` by the Pallas kernel for Hopper (routing_gpu.py): each token read once."""
    return _copied_fwd(x_MD, order_R, place_MA, interpret)[0]


def _copied_fwd(x_MD, order_R, place_MA, interpret):
    from glm45_jax.kernels import routing_gpu

    return routing_gpu.copy_rows(x_MD, place_MA, interpret=interpret), place_MA


def _copied_bwd(interpret, place_MA, g_RD):
    return _summed(g_RD, place_MA), None, None


copied.defvjp(_copied_fwd, _copied_bwd)


def combine(
    y_RD: jax.Array,
    gate_MA: jax.Array,
    order_R: jax.Array,
    place_MA: jax.Array | None = None,
    *,
    impl: str = "auto",
) -> jax.Array:
    """Sum over a token's experts of gate times output, in float32: [M, D]. Inverse of `permute`, by
    gathers alone. place_MA: as of `permute`.

    impl: of the backward pass. "mosaic" first rounds the gradient to the dtype of y, which changes
    nothing where the caller rounded this result to it, and frees XLA from writing it in float32.
    """
    args = y_RD, gate_MA, order_R, _placed(order_R, place_MA, gate_MA.shape[0])
    return pick("combine", COMBINES, impl, *args)(*args)


@jax.custom_vjp
def _weighed(y_RD, gate_MA, order_R, place_MA):
    """`combine` by XLA, its backward too."""
    return _weighed_fwd(y_RD, gate_MA, order_R, place_MA)[0]


def _weighed_fwd(y_RD, gate_MA, order_R, place_MA):
    y_MAD = y_RD[place_MA].astype(jnp.float32)
    return jnp.einsum("ma,mad->md", gate_MA, y_MAD), (y_RD, gate_MA, order_R, place_MA)


def _weighed_bwd(saved, g_MD):
    y_RD, gate_MA, order_R, place_MA = saved
    g_RD = g_MD[order_R // gate_MA.shape[1]]
    dy_RD = (g_RD * gate_MA.reshape(-1)[order_R][:, None]).astype(y_RD.dtype)
    y_MAD = y_RD[place_MA].astype(jnp.float32)
    return dy_RD, jnp.einsum("md,mad->ma", g_MD, y_MAD), None, None


_weighed.defvjp(_weighed_fwd, _weighed_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def put_back(
    y_RD: jax.Array,
    gate_MA: jax.Array,
    order_R: jax.Array,
    place_MA: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """`combine` with a backward in one pass by the Pallas kernel for Hopper (routing_gpu.py)."""
    return _put_back_fwd(y_RD, gate_MA, order_R, place_MA, interpret)[0]


def _put_back_fwd(y_RD, gate_MA, order_R, place_MA, interpret):
    out_MD, _ = _weighed_fwd(y_RD, gate_MA, order_R, place_MA)
    return out_MD, (y_RD, gate_MA, place_MA)


def _put_back_bwd(interpret, saved, g_MD):
    from glm45_jax.kernels import routing_gpu

    y_RD, gate_MA, place_MA = saved
    g_MD = g_MD.astype(y_RD.dtype)
    dy_RD, dgate_MA = routing_gpu.put_rows(g_MD, place_MA, gate_MA, y_RD, interpret=interpret)
    return dy_RD, dgate_MA, None, None


put_back.defvjp(_put_back_fwd, _put_back_bwd)


def _rows_supports(rows: jax.Array, *_: Any) -> str | None:
    from glm45_jax.kernels import routing_gpu

    return routing_gpu.refuses_places(rows)


def _few(x_M: jax.Array, *_: Any, **__: Any) -> str | None:
    """Copies were measured with thousands of tokens; routing of 64 and 256 takes XLA's kernels 16
    and 19 us and ours 24 (H200, experiments/bench/kernels_routing.py).
    """
    M = x_M.shape[0]
    return f"{M} tokens are fewer than {MANY}" if M < MANY else None


def inverse(order_R: jax.Array) -> jax.Array:
    """Place of each m * A + a in the expert order; also the other way round."""
    R = order_R.shape[0]
    return (
        jnp.zeros(R, jnp.int32).at[order_R].set(jnp.arange(R, dtype=jnp.int32), unique_indices=True)
    )


IMPLS = (
    Implementation("mosaic_tpu", mosaic_tpu, _mosaic_tpu_supports, ("tpu",)),
    Implementation("mosaic", mosaic, _mosaic_supports, ("gpu",), _few),
    Implementation("counting", counting, anything, ("gpu",)),
    Implementation("reference", reference, anything, ("cpu", "gpu", "tpu")),
)
PERMUTES = (
    Implementation("mosaic", copied, _rows_supports, ("gpu",), _few),
    Implementation("reference", _gathered, anything, ("cpu", "gpu", "tpu")),
)
COMBINES = (
    # By name: faster alone, and the block with all three kernels was no faster (docs/log.md).
    Implementation("mosaic", put_back, _rows_supports, ()),
    Implementation("reference", _weighed, anything, ("cpu", "gpu", "tpu")),
)
