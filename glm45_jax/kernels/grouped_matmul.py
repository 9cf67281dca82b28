"""Rows grouped by expert times each expert's matrix. Letters: R E D F; P blocks of Q rows.

Dropless: group sizes are data, shapes are not. The op sees one shard; sharding is the caller's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from glm45_jax.kernels.dispatch import Implementation, anything, not_hopper, pick


def grouped_matmul(
    x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array, *, impl: str = "auto"
) -> jax.Array:
    """y[R, F] with row r times the matrix of its group: the first rows_E[0] rows meet w[0], and so
    on.

    rows_E: int32, sums to R or less; rows past the last group give zeros and get none. Accumulates
    in float32, returns the dtype of x. Differentiable in x and w; the gradient of w has w's dtype.

    Raises: ValueError where a named implementation cannot run on these arguments.
    """
    return pick("grouped_matmul", IMPLS, impl, x_RD, w_EDF, rows_E)(x_RD, w_EDF, rows_E)


def gated_matmul(
    x_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    rows_E: jax.Array,
    *,
    impl: str = "auto",
) -> jax.Array:
    """h[R, F] = silu(x gate) * (x up), each row with the matrices of its group; as two of
    `grouped_matmul`, whose `impl` it takes. "auto" and "mosaic" fuse both on Hopper, where rows
    fill its tiles: a block of Air is 4% faster forward, 2.5% with its backward (H200, docs/log.md).
    """
    args = x_RD, gate_EDF, up_EDF, rows_E
    apart = functools.partial(products, matmul=functools.partial(grouped_matmul, impl=impl))
    if impl not in ("auto", "mosaic"):
        return apart(*args)
    ways = (
        Implementation("mosaic", fused, _fused_supports, ("gpu",)),
        Implementation("products", apart, anything, ("cpu", "gpu", "tpu")),
    )
    return pick("gated_matmul", ways, "auto", *args)(*args)


def products(
    x_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    rows_E: jax.Array,
    *,
    matmul: Callable[..., jax.Array] = grouped_matmul,
) -> jax.Array:
    """The definition of `gated_matmul`: two products, each rounded to the dtype of x, and
    `silu_product` of them.
    """
    return silu_product(matmul(x_RD, gate_EDF, rows_E), matmul(x_RD, up_EDF, rows_E))


@jax.custom_vjp
def silu_product(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in their dtype, float32 inside: rounded once. Keeps its arguments alone."""
    gate32, up32 = gate.astype(jnp.float32), up.astype(jnp.float32)  # float32 from here
    return (jax.nn.silu(gate32) * up32).astype(gate.dtype)


def silu_product_bwd(
    saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of gate and up, from both and the cotangent; float32 inside."""
    gate, up, h = (a.astype(jnp.float32) for a in (*saved, cotangent))
    s = jax.nn.sigmoid(gate)
    d_gate, d_up = h * up * s * (1 + gate * (1 - s)), h * gate * s
    return d_gate.astype(saved[0].dtype), d_up.astype(saved[1].dtype)


silu_product.defvjp(lambda gate, up: (silu_product(gate, up), (gate, up)), silu_product_bwd)


def fused(x_RD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, rows_E: jax.Array) -> jax.Array:
    """One Pallas kernel for Hopper (grouped_matmul_gpu.py): rows are loaded once for both, and the
    backward pass sums the gradients of x inside its product.
    """
    from glm45_jax.kernels import grouped_matmul_gpu

    return grouped_matmul_gpu.gated_matmul(x_RD, gate_EDF, up_EDF, rows_E)


def _fused_supports(x_RD, gate_EDF, up_EDF, rows_E) -> str | None:
    if why := not_hopper():
        return why
    from glm45_jax.kernels import grouped_matmul_gpu

    return grouped_matmul_gpu.refuses_gated(x_RD, gate_EDF, up_EDF, rows_E)


def reference(x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array) -> jax.Array:
    """The definition: `lax.ragged_dot`. On GPU XLA expands it to a dense R x (E*D) product, see
    docs/log.md.
    """
    y_RF = jax.lax.ragged_dot(
        x_RD, w_EDF.astype(x_RD.dtype), rows_E, preferred_element_type=jnp.float32
    )
    return y_RF.astype(x_RD.dtype)


@struct.dataclass
class Blocks:
    """Groups padded to whole blocks of Q rows, so that each block meets one matrix.

    expert_P: matrix of each block. row_PQ: row held by each slot, R for padding. slot_R: slot of
    each row.
    """

    expert_P: jax.Array
    row_PQ: jax.Array
    slot_R: jax.Array


def lay_out(rows_E: jax.Array, *, n_rows: int, block: int) -> Blocks:
    """The padded layout. R // block + E blocks always suffice; those left over are all padding."""
    E = rows_E.shape[0]
    n_blocks = n_rows // block + E
    blocks_E = -(-rows_E // block)
    end_row_E, end_block_E = jnp.cumsum(rows_E), jnp.cumsum(blocks_E)
    start_row_E, start_block_E = end_row_E - rows_E, end_block_E - blocks_E
    block_P = jnp.arange(n_blocks, dtype=jnp.int32)
    expert_P = jnp.searchsorted(end_block_E, block_P, side="right").astype(jnp.int32)
    expert_P = jnp.minimum(expert_P, E - 1)
    within_P = (block_P - start_block_E[expert_P]) * block
    within_PQ = within_P[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :]
    row_PQ = jnp.where(
        within_PQ < rows_E[expert_P][:, None], start_row_E[expert_P][:, None] + within_PQ, n_rows
    )
    row_R = jnp.arange(n_rows, dtype=jnp.int32)
    expert_R = jnp.searchsorted(end_row_E, row_R, side="right").astype(jnp.int32)
    slot_R = start_block_E[expert_R] * block + row_R - start_row_E[expert_R]
    return Blocks(expert_P, row_PQ, slot_R)


def block_rows(n_rows: int, experts: int) -> int:
    """Rows of a block: about an eighth of a mean group, so padding costs some 6%; a multiple of 64
    up to 1024.
    """
    return max(64, min(1024, n_rows // (8 * experts) // 64 * 64))


def blocked(x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array) -> jax.Array:
    """Groups padded to blocks, one batched product: dense matmuls on any backend, at the price of
    copied matrices.
    """
    block = block_rows(x_RD.shape[0], w_EDF.shape[0])
    layout = lay_out(rows_E, n_rows=x_RD.shape[0], block=block)
    return _blocked(x_RD, w_EDF, layout)


@jax.custom_vjp
def _blocked(x_RD, w_EDF, layout: Blocks):
    return _blocked_fwd(x_RD, w_EDF, layout)[0]


def _blocked_fwd(x_RD, w_EDF, layout: Blocks):
    x_PQD = _to_blocks(x_RD, layout)
    w_PDF = w_EDF.astype(x_RD.dtype)[layout.expert_P]
    y_PQF = jnp.einsum("pqd,pdf->pqf", x_PQD, w_PDF, preferred_element_type=jnp.float32)
    return _to_rows(y_PQF, layout).astype(x_RD.dtype), (x_RD, w_EDF, layout)


def _blocked_bwd(saved, g_RF):
    x_RD, w_EDF, layout = saved
    x_PQD, g_PQF = _to_blocks(x_RD, layout), _to_blocks(g_RF, layout)
    w_PDF = w_EDF.astype(x_RD.dtype)[layout.expert_P]
    dx_PQD = jnp.einsum("pqf,pdf->pqd", g_PQF, w_PDF, preferred_element_type=jnp.float32)
    dw_PDF = jnp.einsum("pqd,pqf->pdf", x_PQD, g_PQF, preferred_element_type=jnp.float32)
    owner_EP = jax.nn.one_hot(layout.expert_P, w_EDF.shape[0], axis=0, dtype=jnp.float32)
    # A product with a one-hot matrix, not a scatter-add: a scatter of whole matrices is serial on
    # CPU.
    dw_EDF = jnp.einsum("ep,pdf->edf", owner_EP, dw_PDF, precision=jax.lax.Precision.HIGHEST)
    return _to_rows(dx_PQD, layout).astype(x_RD.dtype), dw_EDF.astype(w_EDF.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def _to_blocks(x_RD: jax.Array, layout: Blocks) -> jax.Array:
    return x_RD.at[layout.row_PQ].get(mode="fill", fill_value=0)


def _to_rows(x_PQD: jax.Array, layout: Blocks) -> jax.Array:
    return x_PQD.reshape(-1, x_PQD.shape[-1])[layout.slot_R]


def mosaic(x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array) -> jax.Array:
    """The Pallas kernel for Hopper (grouped_matmul_gpu.py): bfloat16, nothing padded or copied."""
    from glm45_jax.kernels import grouped_matmul_gpu  # Pallas is imported where it is used

    return grouped_matmul_gpu.grouped_matmul(x_RD, w_EDF, rows_E)


def _mosaic_supports(x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array) -> str | None:
    if why := not_hopper():
        return why
    from glm45_jax.kernels import grouped_matmul_gpu

    return grouped_matmul_gpu.refuses(x_RD, w_EDF, rows_E)


def mosaic_tpu(x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array) -> jax.Array:
    """The Pallas kernel for TPU (grouped_matmul_tpu.py): bfloat16, matrices and rows read once."""
    from glm45_jax.kernels import grouped_matmul_tpu

    return grouped_matmul_tpu.grouped_matmul(x_RD, w_EDF, rows_E)


def _mosaic_tpu_supports(x_RD: jax.Array, w_EDF: jax.Array, rows_E: jax.Array) -> str | None:
    from glm45_jax.kernels import grouped_matmul_tpu

    return grouped_matmul_tpu.refuses(x_RD, w_EDF, rows_E)


# On GPU `lax.ragged_dot` runs at 6 TFLOP/s of 704 (H100, jax 0.11.2, docs/log.md), on CPU at a
# fifth of the blocked form.
IMPLS = (
    Implementation("mosaic", mosaic, _mosaic_supports, ("gpu",)),
    Implementation("mosaic_tpu", mosaic_tpu, _mosaic_tpu_supports, ("tpu",)),
    Implementation("blocked", blocked, anything, ("cpu", "gpu")),
    Implementation("reference", reference, anything, ("cpu", "gpu", "tpu")),
)
