"""Rows of experts in buffers of fixed size: filled pass by pass, regrouped, summed back. What the
exchanges of `expert_parallel` are made of.

Letters: M tokens, A experts a token, R = M·A rows, S slots of a pass, P the same slots in the order
of experts, X senders, E experts. An index past the end means "nowhere": it reads zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Apply = Callable[[jax.Array, Any, jax.Array], jax.Array]  # rows by expert, weights, rows of each


def in_passes(one, passes: jax.Array | None, plan: Any, *args: Any) -> Any:
    """Sum over i < passes of one(i, plan, *args); differentiable in args.

    passes: traced, at least 1 is taken; None: one suffices for any routing. The backward pass keeps
    the first pass's residuals and repeats the forward of the others, which are rare: memory does
    not grow with them.
    """
    if passes is None:
        return one(0, plan, *args)

    @jax.custom_vjp
    def total(passes, plan, args):
        return forward(passes, plan, args)[0]

    def forward(passes, plan, args):
        y, back = jax.vjp(functools.partial(one, jnp.int32(0), plan), *args)
        more = lax.fori_loop(1, passes, lambda i, y: y + one(i, plan, *args), y)
        return more, (passes, plan, args, back)

    def backward(saved, g):
        passes, plan, args, back = saved

        def add(i, sums):
            grads = jax.vjp(functools.partial(one, i, plan), *args)[1](g)
            return jax.tree.map(jnp.add, sums, grads)

        return None, None, lax.fori_loop(1, passes, add, back(g))

    total.defvjp(forward, backward)
    return total(passes, plan, args)


def by_expert(
    x_SD: jax.Array, weights: Any, rows_Xe: jax.Array, first_X: jax.Array, apply: Apply
) -> jax.Array:
    """`apply` of rows that lie by sender and, of one sender, by expert: regrouped by expert, and
    put back where they were. Slots that hold no row give zeros.

    rows_Xe: rows of each sender for each expert. first_X: slot of each sender's first row.
    """
    S = x_SD.shape[0]
    run_Xe = first_X[:, None] + jnp.cumsum(rows_Xe, axis=1) - rows_Xe  # first slot of each run
    rows_eX = rows_Xe.T.reshape(-1)
    start_eX = jnp.cumsum(rows_eX) - rows_eX
    shift_P = jnp.repeat(run_Xe.T.reshape(-1) - start_eX, rows_eX, total_repeat_length=S)
    place_P = jnp.arange(S, dtype=jnp.int32)
    slot_P = jnp.where(place_P < rows_eX.sum(), place_P + shift_P, S)
    place_S = jnp.full(S, S, jnp.int32).at[slot_P].set(place_P, mode="drop")
    x_PD = move(x_SD, slot_P, place_S[:, None])
    y_PD = apply(x_PD, weights, rows_Xe.sum(axis=0))
    return move(y_PD, place_S, slot_P[:, None])


@jax.custom_vjp
def move(x_MD: jax.Array, row_S: jax.Array, slot_MA: jax.Array) -> jax.Array:
    """y_SD[s] = x_MD[row_S[s] // A], zeros where row_S is M·A: an empty slot.

    slot_MA: where each row m·A + a lies, S for nowhere. Like `permute`, it never scatters, and sums
    the A gradients of a token in float32.
    """
    return x_MD.at[row_S // slot_MA.shape[1]].get(mode="fill", fill_value=0)


def _move_fwd(x_MD, row_S, slot_MA):
    return move(x_MD, row_S, slot_MA), slot_MA


def _move_bwd(slot_MA, g_SD):
    g_MAD = g_SD.at[slot_MA].get(mode="fill", fill_value=0)
    g_MD = g_MAD.astype(jnp.float32).sum(axis=1)  # over the copies of a token
    return g_MD.astype(g_SD.dtype), None, None


move.defvjp(_move_fwd, _move_bwd)


@jax.custom_vjp
def collect(y_SD: jax.Array, gate_MA: jax.Array, row_S: jax.Array, slot_MA: jax.Array) -> jax.Array:
    """Sum over a token's experts of gate times output, float32 [M, D]; rows that lie nowhere add
    nothing. `combine` for slots as `move` fills them.
    """
    return _collect_fwd(y_SD, gate_MA, row_S, slot_MA)[0]


def _collect_fwd(y_SD, gate_MA, row_S, slot_MA):
    y_MAD = y_SD.at[slot_MA].get(mode="fill", fill_value=0).astype(jnp.float32)
    return jnp.einsum("ma,mad->md", gate_MA, y_MAD), (y_SD, gate_MA, row_S, slot_MA)


def _collect_bwd(saved, g_MD):
    y_SD, gate_MA, row_S, slot_MA = saved
    gate_S = gate_MA.reshape(-1).at[row_S].get(mode="fill", fill_value=0)
    g_SD = g_MD.at[row_S // gate_MA.shape[1]].get(mode="fill", fill_value=0)
    y_MAD = y_SD.at[slot_MA].get(mode="fill", fill_value=0).astype(jnp.float32)
    dgate_MA = jnp.einsum("md,mad->ma", g_MD, y_MAD)
    return (g_SD * gate_S[:, None]).astype(y_SD.dtype), dgate_MA, None, None


collect.defvjp(_collect_fwd, _collect_bwd)


def overlap(rows_E: jax.Array, first: Any, size: int) -> jax.Array:
    """How many of each group's rows, laid one group after another, lie in [first, first + size)."""
    end_E = jnp.cumsum(rows_E)
    inside_E = jnp.minimum(end_E, first + size) - jnp.maximum(end_E - rows_E, first)
    return jnp.maximum(inside_E, 0)


def within(slot: jax.Array, lies_here: jax.Array, size: int) -> jax.Array:
    """The slot, or `size` (nowhere) for what does not lie in this pass."""
    return jnp.where(lies_here & (slot >= 0) & (slot < size), slot, size)
