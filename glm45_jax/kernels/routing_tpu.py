"""Routing in Pallas for TPU, one kernel from logits to scores, biased top-k, gates, counts and the
place of each row. Letters: M E A R; P tiles of T tokens here.

Compiled for v5p and v6e, run only by the interpreter. Tokens lie along lanes and experts along
sublanes, so that a best expert is found by comparing whole registers: along lanes, every one of
top_k steps would be a shuffle.

The grid walks over the tokens twice: it chooses and counts, then a row's place is the rows of
experts before, those of tiles before, and a product with a triangle of ones inside the tile. What
was chosen stays in VMEM. The order, the inverse of the places, is a scatter of single words: in a
TensorCore one scalar store after another. So it is XLA's sort of one packed integer a row, which is
vector work all through.

Rows are permuted and combined by XLA as well. `permute` reads and writes each byte once. `combine`
writes the gathered rows out and reads them again; fused, it would move 0.4 of the bytes, but by
copies of single rows, and in HBM two bfloat16 rows share each word.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from glm45_jax.kernels.routing import Routing, by_kernel

TILE = 512  # tokens a step
LANES = 128
TAKEN = jnp.iinfo(jnp.int32).min  # below any score
VMEM = 32 << 20  # bytes that the kernel may take
MOST_EXPERTS = 512
MOST_ROWS = 1 << 20  # 4 MiB of what was chosen


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
    if not 0 < M * top_k <= MOST_ROWS:
        return f"{M * top_k} rows; one must be there, and VMEM keeps {MOST_ROWS} at most"
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


def _route(logits_ME, bias_E, **how) -> tuple[jax.Array, ...]:
    """The fields of `Routing`."""
    expert_AM, gate_AM, place_AM, rows_E = choose(logits_ME, bias_E, **how)
    expert_MA, R = expert_AM.T, expert_AM.size
    packed_R = (expert_MA.reshape(-1) << _bits(R)) | jnp.arange(R, dtype=jnp.int32)
    order_R = lax.sort(packed_R, is_stable=False) & ((1 << _bits(R)) - 1)
    return expert_MA, gate_AM.T, order_R, place_AM.T, rows_E


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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """expert[A, M] int32, gate[A, M] float32, place[A, M] int32, and the rows of each expert, int32
    [E].
    """
    (M, E), A = logits_ME.shape, top_k
    tile = min(TILE, pl.cdiv(M, LANES) * LANES)
    tiles = pl.cdiv(M, tile)

    def body(logits, bias, before_TT, expert, gate, place, rows, chosen, start):
        again, p = pl.program_id(0), pl.program_id(1)
        at_ET = lax.broadcasted_iota(jnp.int32, (E, tile), 0)
        token_ET = p * tile + lax.broadcasted_iota(jnp.int32, (E, tile), 1)

        @pl.when(again == 0)
        def _():
            score_ET = jax.nn.sigmoid(logits[...].astype(jnp.float32).T)
            key_ET = _ordered(score_ET + bias[...].astype(jnp.float32))
            gates = []
            for a in range(A):
                best_1T = key_ET.max(axis=0, keepdims=True)
                pick_1T = jnp.where(key_ET == best_1T, at_ET, E).min(axis=0, keepdims=True)
                hit_ET = at_ET == pick_1T
                expert[a : a + 1, :] = pick_1T
                chosen[p, a : a + 1, :] = pick_1T
                gates.append(jnp.where(hit_ET, score_ET, 0).sum(axis=0, keepdims=True))
                key_ET = jnp.where(hit_ET, TAKEN, key_ET)
            total_1T = functools.reduce(jnp.add, gates) + 1e-20 if norm_topk else 1.0
            for a, gate_1T in enumerate(gates):
                gate[a : a + 1, :] = gate_1T / total_1T * scale
            taken_ET = (key_ET == TAKEN) & (token_ET < M)  # the last tile may reach past the tokens
            count_E1 = taken_ET.astype(jnp.int32).sum(axis=1, keepdims=True)
            rows[...] = jnp.where(p == 0, 0, rows[...]) + count_E1

        @pl.when((again == 1) & (p == 0))
        def _():
            of_EE = jnp.broadcast_to(rows[...].astype(jnp.float32), (E, E)).T  # up to 2**24
            first_EE, second_EE = (lax.broadcasted_iota(jnp.int32, (E, E), i) for i in (0, 1))
            before_EE = jnp.where(second_EE < first_EE, of_EE, 0)
            start[...] = before_EE.sum(axis=1, keepdims=True).astype(jnp.int32)

        @pl.when(again == 1)
        def _():
            picks = [chosen[p, a : a + 1, :] for a in range(A)]
            hits = [at_ET == pick_1T for pick_1T in picks]
            hit_ET = functools.reduce(jnp.logical_or, hits) & (token_ET < M)
            inside_ET = jnp.dot(  # counts up to TILE
                hit_ET.astype(jnp.bfloat16), before_TT[...], preferred_element_type=jnp.float32
            )
            spot_ET = start[...] + inside_ET.astype(jnp.int32)
            for a, is_ET in enumerate(hits):
                place[a : a + 1, :] = jnp.where(is_ET, spot_ET, 0).sum(axis=0, keepdims=True)
            start[...] += hit_ET.astype(jnp.int32).sum(axis=1, keepdims=True)

    cost = pl.CostEstimate(
        flops=(8 * A + 2 * tile) * M * E,
        bytes_accessed=4 * M * (E + 3 * A),
        transcendentals=M * E,
    )
    # A block stays where it is while the other walk has no use for it.
    first = pl.BlockSpec((A, tile), lambda again, p: (0, jnp.where(again == 0, p, tiles - 1)))
    second = pl.BlockSpec((A, tile), lambda again, p: (0, jnp.where(again == 0, 0, p)))
    whole = functools.partial(pl.BlockSpec, index_map=lambda again, p: (0, 0))
    *of_tokens, rows_E1 = pl.pallas_call(
        body,
        out_shape=(
            jax.ShapeDtypeStruct((A, M), jnp.int32),
            jax.ShapeDtypeStruct((A, M), jnp.float32),
            jax.ShapeDtypeStruct((A, M), jnp.int32),
            jax.ShapeDtypeStruct((E, 1), jnp.int32),
        ),
        grid=(2, tiles),
        in_specs=[
            pl.BlockSpec((tile, E), lambda again, p: (jnp.where(again == 0, p, tiles - 1), 0)),
            whole((E, 1)),
            whole((tile, tile)),
        ],
        out_specs=(first, first, second, whole((E, 1))),
        scratch_shapes=[
            pltpu.VMEM((tiles, A, tile), jnp.int32),
            pltpu.VMEM((E, 1), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=cost,
        interpret=interpret,
    )(logits_ME, bias_E[:, None], np.triu(np.ones((tile, tile), jnp.bfloat16), 1))
    return *of_tokens, rows_E1[:, 0]


def _ordered(x: jax.Array) -> jax.Array:
    """int32 in the order of these float32, NaN the largest, all above TAKEN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    key = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jnp.where(jnp.isnan(x), 0x7FFFFFFF, key)
