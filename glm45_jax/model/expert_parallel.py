"""Experts over the devices of a mesh: how tokens and experts meet. Types to know: the exchanges
`GatherWeights`, `GatherTokens`, `PaddedAllToAll`, `RaggedAllToAll`; one is `Rules.exchange`.

Every exchange is exact for any routing: what does not fit its buffers travels in further passes.
Letters: B T D E F A M R; here alone X devices that share a set of experts, C slots of a pair of
them, S slots of a pass, P the same slots in the order of experts. Lower case is this device's part.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import PartitionSpec

from glm45_jax import sharding
from glm45_jax.kernels.dispatch import say_once
from glm45_jax.kernels.fp8 import is_fp8
from glm45_jax.kernels.grouped_matmul import products
from glm45_jax.kernels.routing import Routing, combine, count_rows, inverse, permute
from glm45_jax.model.slots import Apply, by_expert, collect, in_passes, move, overlap, within

log = logging.getLogger(__name__)

# Where experts are gathered inside the body, by hand. The partitioner's way, before it, ends on GPU
# in gradients that are reduced whole on every device; but XLA's CPU runtime does not order
# collectives inside Muon's loops against others, and gradients that arrive one by one hang it
# (docs/adr/0011).
GATHER_INSIDE = ("gpu", "tpu")

Matmul = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Gated = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@struct.dataclass
class ExpertWeights:
    """Matrices of the routed experts, in the dtype of the activations, or each an `Fp8`."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


@struct.dataclass
class Mixed:
    """y: the sum over a token's experts, shaped like the tokens. load_E: valid tokens each expert
    took. spilled: rows that needed a pass beyond the first. The last two int32, over all devices.
    """

    y_BTD: jax.Array
    load_E: jax.Array
    spilled: jax.Array


@dataclasses.dataclass(frozen=True)
class Group:
    """The devices that share one set of experts: `size` along `axes`. everyone: all axes that split
    tokens, those of the group among them. Axes of size 1 are left out.
    """

    axes: tuple[str, ...] = ()
    everyone: tuple[str, ...] = ()
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes of one mixture: x[B/batch, T/seq, D], gate[E/group, D/embed, F/mlp].

    Experts are gathered over `embed` inside, so that their gradients are reduce-scattered. `mlp`
    splits no tokens: each of its devices multiplies its part of F for the same tokens, and the
    outputs are summed.
    """

    batch: tuple[str, ...] = ()
    seq: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    group: Group = Group()

    @property
    def tokens(self) -> PartitionSpec:
        """Of [B, T, ...]."""
        return PartitionSpec(self.batch or None, self.seq or None)

    @property
    def weights(self) -> ExpertWeights:
        """PartitionSpecs."""
        experts, embed, mlp = self.group.axes or None, self.embed or None, self.mlp or None
        up = PartitionSpec(experts, embed, mlp)
        return ExpertWeights(up, up, PartitionSpec(experts, mlp, embed))


def layout(
    sizes: Mapping[str, int], rules: sharding.Rules, *, experts: int, d_model: int, width: int
) -> Layout:
    """Where one mixture lies on a mesh of these axis sizes.

    Axes that hold experts and split no rows split T: no token is sent twice.

    Raises: ValueError where the experts do not divide over their axes.
    """
    sharding.check_experts(experts, sizes, rules)

    def unused(axes: tuple[str, ...], *taken: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(a for a in axes if sizes[a] > 1 and not any(a in t for t in taken))

    batch, held = unused(rules.batch), unused(rules.experts)
    seq = unused((*rules.seq, *(a for a in held if a not in rules.seq)), batch)
    embed = unused(rules.embed, held)
    embed = embed if d_model % sharding.ways(embed, sizes) == 0 else ()
    mlp = unused(rules.mlp, held, batch, seq, embed)
    mlp = mlp if width % sharding.ways(mlp, sizes) == 0 else ()
    return Layout(batch, seq, embed, mlp, Group(held, batch + seq, sharding.ways(held, sizes)))


def mixture(
    x_BTD: jax.Array,
    logits_BTE: jax.Array,
    valid_BT: jax.Array | None,
    bias_E: jax.Array,
    weights: ExpertWeights,
    *,
    top_k: int,
    route: Callable[..., Routing],
    matmul: Matmul,
    gated: Gated | None = None,
    routes_BTA: jax.Array | None = None,
) -> Mixed:
    """The routed experts of every token: x[B/batch, T/seq, D] -> y[B/batch, T/seq, D].

    On a mesh by `Rules.exchange`. valid_BT: bool; where False a token meets its experts and is
    counted in no load. gated: silu(gate x) * up x; by `matmul` if None. routes_BTA: experts to take
    in place of the router's, see `kernels.routing.route`.

    Raises: ValueError where the experts do not divide, or the exchange cannot run on these devices.
    """
    gated = gated or functools.partial(products, matmul=matmul)
    apply = functools.partial(swiglu, matmul=matmul, gated=gated)
    body = functools.partial(_mixture, route=route, apply=apply)
    ambient = sharding.current()
    if ambient is None:
        alone = dict(lay=Layout(), exchange=GatherWeights())
        return body(x_BTD, logits_BTE, valid_BT, routes_BTA, bias_E, weights, **alone)
    mesh, rules = ambient
    E, D, F = weights.gate_EDF.shape
    platform = mesh.devices.flat[0].platform
    lay = layout(mesh.shape, rules, experts=E, d_model=D, width=F)
    exchange = choose(rules.exchange, size=lay.group.size, top_k=top_k, platform=platform)
    if platform not in GATHER_INSIDE:
        lay = dataclasses.replace(lay, embed=())
        if rules.exchange is None:
            group = Group((), lay.group.everyone, 1)
            lay, exchange = dataclasses.replace(lay, mlp=(), group=group), GatherWeights()
    if is_fp8(weights.gate_EDF):  # outputs first, scales by blocks: split by experts alone
        lay = dataclasses.replace(lay, embed=(), mlp=())
    T, parts = x_BTD.shape[1], sharding.ways(lay.seq, mesh.shape)
    if T % parts:
        if valid_BT is None:
            valid_BT = jnp.ones(x_BTD.shape[:2], bool)
        x_BTD, logits_BTE, valid_BT = (
            _pad_time(x, -T % parts) for x in (x_BTD, logits_BTE, valid_BT)
        )
        if routes_BTA is not None:
            routes_BTA = _pad_time(routes_BTA, -T % parts, -1)
    mixed = jax.shard_map(
        functools.partial(body, lay=lay, exchange=exchange),
        mesh=mesh,
        in_specs=(lay.tokens, lay.tokens, lay.tokens, lay.tokens, PartitionSpec(), lay.weights),
        out_specs=Mixed(lay.tokens, PartitionSpec(), PartitionSpec()),
        check_vma=False,
    )(x_BTD, logits_BTE, valid_BT, routes_BTA, bias_E, weights)
    return mixed.replace(y_BTD=mixed.y_BTD[:, :T])


def _mixture(
    x_btD, logits_btE, valid_bt, routes_btA, bias_E, weights, *, route, apply, lay, exchange
):
    """One device: route, gather what is split of our experts, let tokens and experts meet."""
    b, t, D = x_btD.shape
    routes_mA = None if routes_btA is None else routes_btA.reshape(b * t, -1)
    r = route(logits_btE.reshape(b * t, -1), bias_E, routes_MA=routes_mA)
    if lay.embed:
        whole = functools.partial(lax.all_gather, axis_name=lay.embed, tiled=True)
        weights = ExpertWeights(
            whole(weights.gate_EDF, axis=1),
            whole(weights.up_EDF, axis=1),
            whole(weights.down_EFD, axis=2),
        )
    y_mD, spilled = exchange(x_btD.reshape(b * t, D), r, weights, group=lay.group, apply=apply)
    if lay.mlp:
        y_mD = lax.psum(y_mD, lay.mlp)  # after the sum over experts: m rows, not m·A
    valid_m = None if valid_bt is None else valid_bt.reshape(-1)
    load_E = count_rows(r.expert_MA, r.rows_E.shape[0], valid_m)
    if lay.group.everyone:
        load_E = lax.psum(load_E, lay.group.everyone)
        if not exchange.gathers_experts:
            spilled = lax.psum(spilled, lay.group.everyone)
    return Mixed(y_mD.astype(x_btD.dtype).reshape(b, t, D), load_E, spilled)


def swiglu(
    x_PD: jax.Array, w: ExpertWeights, rows_E: jax.Array, *, matmul: Matmul, gated: Gated
) -> jax.Array:
    """down(silu(gate x) * up x) of rows grouped by expert."""
    return matmul(gated(x_PD, w.gate_EDF, w.up_EDF, rows_E), w.down_EFD, rows_E)


@dataclasses.dataclass(frozen=True)
class GatherWeights:
    """Weights travel: every device gathers all experts, tokens stay. The one to take where a
    device's tokens outweigh the experts, and the only one of a single device.
    """

    gathers_experts = True

    def refuses(self, platform: str) -> str | None:
        """Why it cannot run there."""
        return None

    def residual_bytes(self, row: float, *, size: int, moe: Any, d_model: int, act: int) -> float:
        """Bytes a token that the backward pass reads, `row` of them for each routed row."""
        return moe.top_k * row

    def copied_bytes(self, *, size: int, moe: Any, d_model: int, act: int) -> float:
        """Bytes a token of copies that live beside those at the peak: none, rows stay."""
        return 0.0

    def __call__(self, x_mD, r: Routing, weights, *, group: Group, apply: Apply):
        """(y [m, D] float32, spilled) of this device's tokens, experts of all devices."""
        if group.axes:
            whole = functools.partial(lax.all_gather, axis_name=group.axes, axis=0, tiled=True)
            weights = jax.tree.map(whole, weights)
        where = r.order_R, r.place_MA
        y_rD = apply(permute(x_mD, *where, impl=r.copies), weights, r.rows_E)
        return combine(y_rD, r.gate_MA, *where, impl=r.copies), jnp.int32(0)


@dataclasses.dataclass(frozen=True)
class _Buffered:
    """factor: slots of a pass over the rows an even routing would fill. More rows, more passes."""

    factor: float = 1.25

    gathers_experts = False
    # Arrays of slots x D that live at the peak beside what the backward pass reads: sent, received,
    # regrouped, and their gradients. Counted in programs compiled for H100s and v5p (docs/log.md).
    copies = 6

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(
                f"{type(self).__name__}: factor {self.factor} is not above 0; try 1.25"
            )

    def refuses(self, platform: str) -> str | None:
        """Why it cannot run there."""
        return None

    def residual_bytes(self, row: float, *, size: int, moe: Any, d_model: int, act: int) -> float:
        """Bytes a token that the backward pass reads, `row` of them for each slot of the first
        pass.
        """
        return self._slots(size, moe) * row

    def copied_bytes(self, *, size: int, moe: Any, d_model: int, act: int) -> float:
        """Bytes a token of copies that live beside those at the peak of a step."""
        return self._slots(size, moe) * self.copies * d_model * act

    def _slots(self, size: int, moe: Any) -> float:
        """Slots of the first pass for one token."""
        return min(self.factor * moe.top_k, size * min(moe.top_k, moe.experts // size))

    def room(self, even: float, worst: int) -> int:
        """Slots for what an even routing makes `even` rows and no routing more than `worst`; whole
        eights, which kernels ask for.
        """
        return -(-min(max(1, int(self.factor * even)), worst) // 8) * 8


@dataclasses.dataclass(frozen=True)
class GatherTokens(_Buffered):
    """Each device gathers the tokens of its group, meets those that chose its experts, and the
    partial sums are reduce-scattered. For small groups: a token travels once to each device of
    the group, not once for each of its experts.
    """

    copies = 4  # nothing is regrouped

    def residual_bytes(self, row: float, *, size: int, moe: Any, d_model: int, act: int) -> float:
        """The slots, and the tokens of the whole group, their sums in float32."""
        slots = super().residual_bytes(row, size=size, moe=moe, d_model=d_model, act=act)
        return slots + size * d_model * (act + 4)

    def __call__(self, x_mD, r: Routing, weights, *, group: Group, apply: Apply):
        """(y [m, D] float32, spilled) of this device's tokens."""
        (m, A), (E,), X = r.gate_MA.shape, r.rows_E.shape, group.size
        gather = functools.partial(lax.all_gather, axis_name=group.axes, axis=0, tiled=True)
        x_MD, gate_MA, expert_MA = gather(x_mD), gather(r.gate_MA), gather(r.expert_MA)
        first = lax.axis_index(group.axes) * (E // X)
        # Our experts come first, in their order, and everybody else's rows behind them.
        order_R = jnp.argsort((expert_MA.reshape(-1) - first) % E, stable=True).astype(jnp.int32)
        rows_e = lax.psum_scatter(r.rows_E, group.axes, tiled=True)
        worst = X * m * min(A, E // X)
        S, R = self.room(m * A, worst), X * m * A

        def one(i, plan, x_MD, gate_MA, weights):
            order_R, place_MA, rows_e = plan
            place_S = i * S + jnp.arange(S, dtype=jnp.int32)
            ours = rows_e.sum()
            row_S = jnp.where(place_S < ours, order_R.at[place_S].get(mode="clip"), R)
            slot_MA = within(place_MA - i * S, place_MA < ours, S)
            x_SD = move(x_MD, row_S, slot_MA)
            y_SD = apply(x_SD, weights, overlap(rows_e, i * S, S))
            return collect(y_SD, gate_MA, row_S, slot_MA)

        plan = order_R, inverse(order_R).reshape(X * m, A), rows_e
        passes = None if S >= worst else -(-rows_e.sum() // S)
        y_MD = in_passes(one, passes, plan, x_MD, gate_MA, weights)
        spilled = jnp.maximum(rows_e.sum() - S, 0)
        return lax.psum_scatter(y_MD, group.axes, tiled=True), spilled


@dataclasses.dataclass(frozen=True)
class PaddedAllToAll(_Buffered):
    """Dense all-to-all: every pair of devices has slots for `factor` times its even share, empty
    ones travel too. A pair with more rows makes everybody take another pass.
    """

    def __call__(self, x_mD, r: Routing, weights, *, group: Group, apply: Apply):
        """(y [m, D] float32, spilled) of this device's tokens."""
        (m, A), (E,), X = r.gate_MA.shape, r.rows_E.shape, group.size
        e = E // X
        sent_X = r.rows_E.reshape(X, e).sum(axis=1)
        got_Xe = _swap(r.rows_E.reshape(X, e), group.axes)  # rows each device has for our experts
        worst = m * min(A, e)
        C = self.room(m * A / X, worst)
        S = X * C

        def one(i, plan, x_mD, gate_mA, weights):
            order_R, expert_mA, place_mA, sent_X, got_Xe = plan
            start_X = jnp.cumsum(sent_X) - sent_X
            place_XC = jnp.broadcast_to(i * C + jnp.arange(C, dtype=jnp.int32)[None], (X, C))
            row_XC = order_R.at[start_X[:, None] + place_XC].get(mode="clip")
            row_S = jnp.where(place_XC < sent_X[:, None], row_XC, m * A).reshape(S)
            to_mA = expert_mA // e
            nth_mA = place_mA - start_X[to_mA] - i * C
            slot_mA = within(to_mA * C + nth_mA, (nth_mA >= 0) & (nth_mA < C), S)
            x_SD = _swap(move(x_mD, row_S, slot_mA).reshape(X, C, -1), group.axes)
            here_Xe = jax.vmap(lambda rows_e: overlap(rows_e, i * C, C))(got_Xe)
            first_X = jnp.arange(X, dtype=jnp.int32) * C
            y_SD = by_expert(x_SD.reshape(S, -1), weights, here_Xe, first_X, apply)
            y_SD = _swap(y_SD.reshape(X, C, -1), group.axes).reshape(S, -1)
            return collect(y_SD, gate_mA, row_S, slot_mA)

        plan = r.order_R, r.expert_MA, r.place_MA, sent_X, got_Xe
        # The loop holds collectives: all devices must take the same number of passes.
        passes = None if C >= worst else lax.pmax(-(-sent_X.max() // C), group.everyone)
        y_mD = in_passes(one, passes, plan, x_mD, r.gate_MA, weights)
        return y_mD, jnp.maximum(sent_X - C, 0).sum()


@dataclasses.dataclass(frozen=True)
class RaggedAllToAll(_Buffered):
    """`lax.ragged_all_to_all`: only rows that exist travel, and pairs share the `factor` times even
    slots of their receiver. For TPU; the CPU has none, and on GPU it crawls.

    Source: docs/log.md (2 H100: 2.6 GB/s against 267 of a dense all-to-all).
    """

    copies = 2

    def refuses(self, platform: str) -> str | None:
        """Why it cannot run there."""
        return "XLA has no ragged all-to-all on CPU" if platform == "cpu" else None

    def __call__(self, x_mD, r: Routing, weights, *, group: Group, apply: Apply):
        """(y [m, D] float32, spilled) of this device's tokens."""
        (m, A), (E,), X = r.gate_MA.shape, r.rows_E.shape, group.size
        e = E // X
        rows_XXe = lax.all_gather(r.rows_E, group.axes).reshape(X, X, e)  # from, to, expert
        worst = X * m * min(A, e)
        S = self.room(m * A, worst)

        def one(i, plan, x_mD, gate_mA, weights):
            order_R, place_mA, rows_XXe = plan
            me = lax.axis_index(group.axes)
            rows_XX = rows_XXe.sum(axis=2)
            # Receivers take their rows by sender; this pass takes places i·S to (i + 1)·S of each.
            take_XX = jax.vmap(lambda rows_X: overlap(rows_X, i * S, S), 1, 1)(rows_XX)
            place_XX = jnp.cumsum(rows_XX, axis=0) - rows_XX - i * S
            skip_XX = jnp.clip(-place_XX, 0, rows_XX)  # went in earlier passes
            start_XX = jnp.cumsum(rows_XX, axis=1) - rows_XX + skip_XX  # at the sender
            at_XX = jnp.clip(place_XX, 0, S)  # at the receiver
            travel = functools.partial(lax.ragged_all_to_all, axis_name=group.axes)
            x_rD = permute(x_mD, order_R, place_mA)
            empty_SD = jnp.zeros((S, x_rD.shape[1]), x_rD.dtype)
            x_SD = travel(x_rD, empty_SD, start_XX[me], take_XX[me], at_XX[me], take_XX[:, me])
            flat_P = overlap(rows_XXe[:, me].reshape(-1), i * S, S)
            y_SD = by_expert(x_SD, weights, flat_P.reshape(X, e), at_XX[:, me], apply)
            y_rD = travel(
                y_SD,
                jnp.zeros_like(x_rD),
                at_XX[:, me],
                take_XX[:, me],
                start_XX[:, me],
                take_XX[me],
            )
            return collect(y_rD, gate_mA, order_R, place_mA)

        plan = r.order_R, r.place_MA, rows_XXe
        got_X = rows_XXe.sum(axis=(0, 2))
        passes = None if S >= worst else lax.pmax(-(-got_X.max() // S), group.everyone)
        y_mD = in_passes(one, passes, plan, x_mD, r.gate_MA, weights)
        return y_mD, jnp.maximum(got_X[lax.axis_index(group.axes)] - S, 0)


Exchange = GatherWeights | GatherTokens | PaddedAllToAll | RaggedAllToAll


def choose(asked: Any, *, size: int, top_k: int, platform: str) -> Any:
    """The exchange asked for, or the one for a group of this size; says once which and why. One
    device has nothing to exchange, whatever is asked for.

    Raises: ValueError where the one asked for cannot run on this platform.
    """
    if asked is None:
        picked, why = default_exchange(size, top_k, platform)
        if size > 1:
            said = f"experts over {size} devices on {platform}: {picked}, {why}"
            say_once(log, logging.INFO, said)
        return picked
    if why := asked.refuses(platform):
        raise ValueError(f"rules.exchange={asked}: {why}; rules.exchange=None picks for you")
    if size == 1:
        return GatherWeights()
    if isinstance(asked, RaggedAllToAll) and platform == "gpu":
        say_once(
            log,
            logging.WARNING,
            f"rules.exchange={asked}: on 2 H100 XLA's ragged all-to-all moved 2.6 GB/s, a dense "
            "one 267 (docs/log.md); take PaddedAllToAll(), or rules.exchange=None picks for you",
        )
    return asked


def default_exchange(size: int, top_k: int, platform: str) -> tuple[Exchange, str]:
    """Which exchange where none is asked for, and why.

    Bytes a token, bfloat16, forward and backward: 12 (size - 1) D by GatherTokens, whose sums are
    float32 on the way out; 10 top_k (size - 1) / size D by PaddedAllToAll. They meet at 5/6 top_k.
    """
    if size == 1:
        return GatherWeights(), "nothing to exchange"
    if platform == "cpu":
        return GatherWeights(), "XLA's CPU runtime can hang on exchanges beside Muon's collectives"
    if 2 * size <= top_k:
        return GatherTokens(), "a token meets more experts than there are devices"
    if platform == "tpu":
        return RaggedAllToAll(), "native there"
    return PaddedAllToAll(), "a ragged all-to-all is slow or missing there"


def _swap(x_XC: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Part i goes to device i of the group, and comes from it."""
    return lax.all_to_all(x_XC, axes, split_axis=0, concat_axis=0)


def _pad_time(x_BT: jax.Array, more: int, value: int = 0) -> jax.Array:
    """Zeros after the last position, of a mask False."""
    widths = [(0, 0), (0, more)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, widths, constant_values=value)
