"""Routing in Pallas for TPU: logits to scores, biased top-k, gates and counts. Letters: M E A R; P
tiles of T tokens here.

Compiled for v5p and v6e, run only by the interpreter. Tokens lie along lanes and experts along
sublanes, so that a best expert is found by comparing whole registers: along lanes, every one of
top_k steps would be a shuffle.

The permutation is XLA's sort of one packed integer a row. Places are cheap to count, but the order,
their inverse, is a scatter of single words: in a TensorCore one scalar store after another. A sort
is vector work all through, and XLA's is one. Places are scattered where something reads them.

Rows are permuted and combined by XLA as well. `permute` reads and writes each byte once. `combine`
writes the gathered rows out and reads them again; fused, it would move 0.4 of the bytes, but by
copies of single rows, and in HBM two bfloat16 rows share each word.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from glm45_jax.kernels.routing import Routing, by_kernel, inverse

TILE = 512  # tokens a step
LANES = 128
TAKEN = jnp.iinfo(jnp.int32).min  # below any score
MOST_EXPERTS = 512  # 9.7 MiB of VMEM, of the 16 that a kernel may take unasked


def refuses(
    logits_ME: jax.Array,
    bias_E: jax.Array,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    norm_topk: bool,
    scale: float,
) -> str | None:
    """Why the kernel cannot run on these shapes and settings anywhere, or None."""
    M, E = logits_ME.shape
    if groups != 1:
        return f"experts come in {groups} groups, the kernel knows one"
    if E > MOST_EXPERTS:
        return f"{E} experts, at most {MOST_EXPERTS} fit in VMEM beside their copies"
    if M * top_k == 0 or E << _bits(M * top_k) > 2**31:
        return f"{M * top_k} rows of {E} experts, an expert and a row must fit in 31 bits"
    return None


def route(
    logits_ME: jax.Array,
    bias_E: jax.Array,
    *,
    top_k: int,
    groups: int,
    top_groups: int,
    norm_topk: bool,
    scale: float,
    interpret: Any = False,
) -> Routing:
    """As `glm45_jax.kernels.routing.route`, of one group of experts. Deterministic.

    Equal scores go to the lower expert, NaN first, as by `lax.top_k`.
    """
    how = dict(top_k=top_k, norm_topk=norm_topk, scale=scale, interpret=interpret)
    return by_kernel(functools.partial(_route, **how), norm_topk, scale, logits_ME, bias_E)


def _route(logits_ME, bias_E, *, top_k, norm_topk, scale, interpret) -> tuple[jax.Array, ...]:
    """The fields of `Routing`."""
    expert_AM, gate_AM, rows_PE1 = choose(
        logits_ME, bias_E, top_k=top_k, norm_topk=norm_topk, scale=scale, interpret=interpret
    )
    expert_MA, R = expert_AM.T, logits_ME.shape[0] * top_k
    packed_R = (expert_MA.reshape(-1) << _bits(R)) | jnp.arange(R, dtype=jnp.int32)
    order_R = lax.sort(packed_R, is_stable=False) & ((1 << _bits(R)) - 1)
    place_MA = inverse(order_R).reshape(expert_MA.shape)
    return expert_MA, gate_AM.T, order_R, place_MA, rows_PE1.sum(axis=(0, 2))


def _bits(rows: int) -> int:
    """Of a row's number."""
    return max(1, (rows - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("top_k", "norm_topk", "scale", "interpret"))
def choose(
    logits_ME: jax.Array,
    bias_E: jax.Array,
    *,
    top_k: int,
    norm_topk: bool,
    scale: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """expert[A, M] int32, gate[A, M] float32, and the rows of each expert by tile, int32 [P, E, 1].

    Tiles are independent: the cores of a chip share them.
    """
    (M, E), A = logits_ME.shape, top_k
    tile = min(TILE, pl.cdiv(M, LANES) * LANES)
    tiles = pl.cdiv(M, tile)

    def body(logits, bias, expert, gate, rows):
        score_ET = jax.nn.sigmoid(logits[...].astype(jnp.float32).T)
        key_ET = _ordered(score_ET + bias[...].astype(jnp.float32))
        at_ET = lax.broadcasted_iota(jnp.int32, (E, tile), 0)
        gates = []
        for a in range(A):
            best_1T = key_ET.max(axis=0, keepdims=True)
            pick_1T = jnp.where(key_ET == best_1T, at_ET, E).min(axis=0, keepdims=True)
            hit_ET = at_ET == pick_1T
            expert[a : a + 1, :] = pick_1T
            gates.append(jnp.where(hit_ET, score_ET, 0).sum(axis=0, keepdims=True))
            key_ET = jnp.where(hit_ET, TAKEN, key_ET)
        total_1T = functools.reduce(jnp.add, gates) + 1e-20 if norm_topk else 1.0
        for a, gate_1T in enumerate(gates):
            gate[a : a + 1, :] = gate_1T / total_1T * scale
        token_ET = pl.program_id(0) * tile + lax.broadcasted_iota(jnp.int32, (E, tile), 1)
        taken_ET = (key_ET == TAKEN) & (token_ET < M)  # the last tile may reach past the tokens
        rows[0] = taken_ET.astype(jnp.int32).sum(axis=1, keepdims=True)

    cost = pl.CostEstimate(
        flops=4 * A * M * E, bytes_accessed=4 * M * (E + 2 * A), transcendentals=M * E
    )
    of_token = pl.BlockSpec((A, tile), lambda p: (0, p))
    return pl.pallas_call(
        body,
        out_shape=(
            jax.ShapeDtypeStruct((A, M), jnp.int32),
            jax.ShapeDtypeStruct((A, M), jnp.float32),
            jax.ShapeDtypeStruct((tiles, E, 1), jnp.int32),
        ),
        grid=(tiles,),
        in_specs=[
            pl.BlockSpec((tile, E), lambda p: (p, 0)),
            pl.BlockSpec((E, 1), lambda p: (0, 0)),
        ],
        out_specs=(of_token, of_token, pl.BlockSpec((1, E, 1), lambda p: (p, 0, 0))),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=cost,
        interpret=interpret,
    )(logits_ME, bias_E[:, None])


def _ordered(x: jax.Array) -> jax.Array:
    """int32 in the order of these float32, NaN the largest, all above TAKEN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    key = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jnp.where(jnp.isnan(x), 0x7FFFFFFF, key)
