"""One optimizer step as a pure function (spec 2.5-2.7). Letters: B T L E; Z micro-batches.

Gradients are sums over micro-batches and devices; the router bias moves once, from the whole
batch's load.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from glm45_jax import params as params_lib
from glm45_jax.data.types import Batch
from glm45_jax.model.config import ModelConfig
from glm45_jax.model.transformer import Params
from glm45_jax.optim import rounding
from glm45_jax.optim.schedules import tokens_add, tokens_float
from glm45_jax.train.guard import Guard, judge, select
from glm45_jax.train.loss import LossOut, Weights, count, loss
from glm45_jax.train.state import Train, TrainState


@struct.dataclass
class StepOut:
    """scalars: float32, by metric name. load_LE: tokens each expert took. bias_LE: biases after the
    step. skipped: the step was left out, and the run goes on with the old weights and optimizer.
    ok: it was taken or left out; otherwise there is no budget for it, and the state is the old one.
    """

    scalars: dict[str, jax.Array]
    load_LE: jax.Array
    bias_LE: jax.Array
    ok: jax.Array
    skipped: jax.Array


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    cfg: ModelConfig,
    optim: Any,
    tx: optax.GradientTransformation,
    train: Train,
    specs: Any,
    packed: bool,
    accum: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, StepOut]:
    """The state after one batch, and what to log.

    tx: updates for a learning rate of one (`optim.build`); optim.lr_at gives the rate. axis_name:
    of a `pmap`; on a mesh the batch is global already. `train.guard` says which steps are left out.
    """
    seen = tokens_float(state.tokens_seen)
    weights = Weights(train.mtp_weight(seen), train.balance_weight(seen))
    grads, out = gradients(
        state.params, batch, weights, cfg=cfg, packed=packed, accum=accum, axis_name=axis_name
    )
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    state, stepped = descend(
        state,
        grads,
        out,
        optim=optim,
        tx=tx,
        specs=specs,
        tokens=batch.tokens_BT.size * devices,
        bias_rate=train.bias_rate(seen),
        guard=train.guard,
    )
    named = {f"loss/{name}": value for name, value in out.parts.items()}
    return state, stepped.replace(scalars=stepped.scalars | named)


def descend(
    state: TrainState,
    grads: Params,
    out: LossOut,
    *,
    optim: Any,
    tx: optax.GradientTransformation,
    specs: Any,
    tokens: int,
    bias_rate: jax.Array | None,
    guard: Guard | None = None,
) -> tuple[TrainState, StepOut]:
    """The state after a step along these gradients of the whole batch, or the old one where `guard`
    says so (None: where they or the loss are not finite); and what to log, but for the parts of the
    loss.

    tokens: places of the batch, which the schedules count. bias_rate: of the router biases; None
    leaves them alone, and then `out.load_LE` need not have all of their layers.
    Raises: ValueError for a plan whose dtypes are not those of `optim.stored`.
    """
    rounding.check(specs, optim.master_dtype)
    grad_norm = optax.tree.norm(grads)
    verdict = judge(guard, state.level, state.step, out.loss, grad_norm)
    tokens_seen = tokens_add(state.tokens_seen, tokens)
    lr = optim.lr_at(
        tokens_float(tokens_seen)
    )  # at the batch's end: the first step of a warmup moves
    with jax.named_scope("optimizer"):
        updates, opt = tx.update(grads, state.opt, state.params)
        params = rounding.moved(state.params, updates, lr, state.key)
    if bias_rate is not None:
        params = move_bias(params, out.load_LE, bias_rate)
    now = TrainState(
        step=state.step + 1,
        params=select(verdict.take, params, state.params),
        opt=select(verdict.take, opt, state.opt),
        key=jax.random.fold_in(state.key, state.step),
        tokens_seen=tokens_seen,
        level=verdict.level,
    )
    scalars = {
        "loss": out.loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens": tokens_float(tokens_seen),
    }
    if guard is not None:
        scalars["skipped"] = verdict.level.skipped.astype(jnp.float32)
    scalars |= {f"update_rms/{kind}": rms for kind, rms in update_rms(updates, specs).items()}
    bias_LE = biases(now.params)
    scalars |= balance_scalars(out.load_LE, bias_LE)
    if out.spilled is not None and out.load_LE.size:
        scalars["spilled"] = out.spilled.astype(jnp.float32)
    state = now.replace(**_kept(verdict.spent, state, now))
    ok = ~verdict.spent
    return state, StepOut(scalars, out.load_LE, bias_LE, ok, ok & ~verdict.take)


def _kept(spent: jax.Array, old: TrainState, now: TrainState) -> dict[str, Any]:
    """What beside weights and optimizer stays where a step is not taken and not counted."""
    names = ("step", "key", "tokens_seen", "level")
    return {name: select(spent, getattr(old, name), getattr(now, name)) for name in names}


def gradients(
    params: Params,
    batch: Batch,
    weights: Weights,
    *,
    cfg: ModelConfig,
    packed: bool,
    accum: int = 1,
    axis_name: str | None = None,
) -> tuple[Params, LossOut]:
    """Gradient and loss of the global batch: the same numbers however it is cut into micro-batches
    and devices.
    """
    denominators = _global(count(batch), axis_name)

    def one(micro: Batch):
        def scalar(params: Params):
            out = loss(params, micro, denominators, weights, cfg=cfg, packed=packed)
            return out.loss, out

        whole = vocabulary_in_float32(params)
        (_, out), grads = jax.value_and_grad(scalar, has_aux=True)(whole)
        # Of bfloat16 weights they are bfloat16: a sum over parts in it would lose the small ones.
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return grads, out.replace(tokens=count(micro).tokens)

    return _global(summed(one, batch, accum), axis_name)


def vocabulary_in_float32(params: Params) -> Params:
    """The same weights, embedding and head in float32 where they are kept in bfloat16; they lie
    where they lay.

    Their gradients come from two places each, trunk and MTP. In float32 XLA scatters them; summed
    in bfloat16, each micro-batch's are whole on every device (docs/log.md). Not so of the blocks: a
    copy of all layers would stand before their loop.
    """
    embed_VD, head_DV = (x.astype(jnp.float32) for x in (params.embed_VD, params.head_DV))
    return params.replace(embed_VD=embed_VD, head_DV=head_DV)


def summed(one: Callable[[Any], Any], batch: Any, accum: int) -> Any:
    """Sum over `accum` micro-batches of what `one` returns for each, leaf by leaf."""
    if accum == 1:
        return one(batch)
    split = in_micro_batches(batch, accum)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, _first(split)))
    total, _ = jax.lax.scan(lambda sums, micro: (_add(sums, one(micro)), None), zero, split)
    return total


def in_micro_batches(batch: Any, accum: int) -> Any:
    """Leaves [Z, B / Z, ...] of leaves [B, ...]. Micro-batch z takes rows z, z + Z, ...: rows stay
    on the device that holds them.
    """
    split = jax.tree.map(lambda x: x.reshape(x.shape[0] // accum, accum, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), split)


def row_by_row(one: Callable[[Any], jax.Array], batch: Any, accum: int) -> jax.Array:
    """What `one` returns for a batch, [B, ...], made in `accum` micro-batches."""
    if accum == 1:
        return one(batch)
    out_Zb = jax.lax.map(one, in_micro_batches(batch, accum))
    return jnp.moveaxis(out_Zb, 0, 1).reshape(-1, *out_Zb.shape[2:])


def move_bias(params: Params, load_LE: jax.Array, rate: jax.Array) -> Params:
    """Router biases moved by rate * sign(mean load - load). Source: spec 2.6. load_LE: MoE layers,
    then MTP.
    """
    step_LE, n_moe = bias_step(load_LE, rate), 0
    if params.moe is not None:
        n_moe = params.moe.ffn.bias_E.shape[0]
        moved = params.moe.ffn.replace(bias_E=params.moe.ffn.bias_E + step_LE[:n_moe])
        params = params.replace(moe=params.moe.replace(ffn=moved))
    if params.mtp is not None:
        block = params.mtp.block
        moved = block.ffn.replace(bias_E=block.ffn.bias_E + step_LE[n_moe:])
        params = params.replace(mtp=params.mtp.replace(block=block.replace(ffn=moved)))
    return params


def bias_step(load_LE: jax.Array, rate: jax.Array) -> jax.Array:
    """What each bias moves by: up where an expert took less than its layer's mean."""
    load_LE = load_LE.astype(jnp.float32)
    return rate * jnp.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)


def biases(params: Params) -> jax.Array:
    """Router biases of the MoE layers, then MTP: [L, E]."""
    parts = [] if params.moe is None else [params.moe.ffn.bias_E]
    parts += [] if params.mtp is None else [params.mtp.block.ffn.bias_E]
    return jnp.concatenate(parts) if parts else jnp.zeros((0, 1), jnp.float32)


def update_rms(updates: Any, specs: Any) -> dict[str, jax.Array]:
    """Root mean square of the unit-rate update of each kind of weight that an optimizer moves."""
    squares: dict[str, list[jax.Array]] = {}
    sizes: dict[str, int] = {}
    flat = jax.tree.leaves(specs, is_leaf=params_lib.is_spec)
    for spec, update in zip(flat, jax.tree.leaves(updates), strict=True):
        if spec.kind != "state":
            squares.setdefault(spec.kind, []).append(
                jnp.sum(jnp.square(update.astype(jnp.float32)))
            )
            sizes[spec.kind] = sizes.get(spec.kind, 0) + math.prod(spec.shape)
    return {
        kind: jnp.sqrt(sum(parts[1:], parts[0]) / float(sizes[kind]))  # 355B is no int32
        for kind, parts in squares.items()
    }


def balance_scalars(load_LE: jax.Array, bias_LE: jax.Array) -> dict[str, jax.Array]:
    """How even the experts are: largest load over the mean (worst layer), mean size of the
    biases.
    """
    if load_LE.size == 0:
        return {}
    load_LE = load_LE.astype(jnp.float32)
    worst = (load_LE.max(axis=1) / jnp.maximum(load_LE.mean(axis=1), 1.0)).max()
    return {"load_max_over_mean": worst, "bias_drift": jnp.abs(bias_LE).mean()}


def _global(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)
