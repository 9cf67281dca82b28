"""What a model costs: parameters, FLOPs a token, MFU, bytes a device. Letters: M D N K H E A F V.

Parameters, FLOPs of products, and bytes of weights, gradients and optimizer are counted over the
plan of weights. Terms of `memory_per_device` that begin with "E" are estimates. Nothing here
allocates but `peak_flops` on an unknown device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glm45_jax import params as plan
from glm45_jax import sharding
from glm45_jax.kernels.cross_entropy import chunk_words
from glm45_jax.model.block import block_specs
from glm45_jax.model.config import Gqa, ModelConfig
from glm45_jax.model.context_parallel import GatherKeys, choose
from glm45_jax.model.expert_parallel import Layout, default_exchange, layout
from glm45_jax.model.transformer import specs

# Dense bfloat16 FLOP/s of one chip; the first kind that the device's name contains counts.
# Source: vendors' datasheets. Without structured sparsity; SXM parts unless said.
DATASHEET: tuple[tuple[str, float], ...] = (
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("gb200", 2500e12),
    ("b200", 2250e12),
    ("a100", 312e12),
    ("tpu v4", 275e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),
    ("tpu v6", 918e12),
)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters. The router bias moves by rule and is not counted.

    body: decoder layers and final norm. embedding: one vocabulary matrix; the head is as large.
    total_stored: the released checkpoint, which repeats embedding and head for the MTP layer.
    active_*: those that one token meets.
    """

    body: int
    mtp: int
    embedding: int
    total_stored: int
    active_body: int

    @property
    def body_and_mtp(self) -> int:
        """What the paper calls 355B."""
        return self.body + self.mtp

    @property
    def active_body_and_head(self) -> int:
        """Active body and the head."""
        return self.active_body + self.embedding


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one token by part: 2 a multiply-add, matrix products only, nothing recomputed.

    experts: routed and shared. mtp: the whole MTP layer, its scores and its pass through the head
    included.
    """

    attention_proj: float
    attention_scores: float
    dense_mlp: float
    experts: float
    router: float
    head: float
    mtp: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(dataclasses.astuple(self))


def param_counts(cfg: ModelConfig) -> Counts:
    """Parameters of a model by part. Source: spec 1.2 states them for the released models."""
    body = mtp = active = 0.0
    for path, spec in plan.leaves_with_path(specs(cfg)):
        if spec.kind == "state" or path in ("embed_VD", "head_DV"):
            continue
        if path.startswith("mtp."):
            mtp += spec.size
        else:
            body += spec.size
            active += spec.size * _share(spec, cfg)
    embedding = cfg.vocab * cfg.d_model
    stored = body + mtp + 2 * embedding * (1 + cfg.n_mtp)
    return Counts(int(body), int(mtp), embedding, int(stored), round(active))


def flops_per_token(
    cfg: ModelConfig, seq_len: int, *, training: bool = True, mtp: bool = True
) -> Flops:
    """FLOPs of one token of a row of `seq_len` tokens that is one document; packed rows cost less.

    training: forward and backward, three times the forward. A causal query meets half the row,
    rounded up to itself.
    """
    factor = 3.0 if training else 1.0
    keys = (seq_len + 1) / 2
    scores = keys * cfg.mixer.pair_flops
    head = 2.0 * cfg.vocab * cfg.d_model
    parts = dict.fromkeys((f.name for f in dataclasses.fields(Flops)), 0.0)
    for path, spec in plan.leaves_with_path(specs(cfg)):
        if spec.kind == "matrix" and path != "head_DV":
            parts[_part(path)] += 2.0 * spec.size * _share(spec, cfg)
    parts["attention_scores"] = scores * cfg.n_layers
    parts["head"] = head
    parts["mtp"] = parts["mtp"] + scores + head if cfg.n_mtp and mtp else 0.0
    return Flops(**{name: factor * n for name, n in parts.items()})


def mfu(tokens_per_s: float, cfg: ModelConfig, seq_len: int, n_devices: int, peak: float) -> float:
    """Model FLOP/s of training over the peak of all devices; recomputation does not count."""
    return tokens_per_s * flops_per_token(cfg, seq_len).total / (n_devices * peak)


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """(FLOP/s, its source): dense bfloat16 of the datasheet, or a measured float32 ceiling."""
    kind = device.device_kind.lower()
    for name, flops in DATASHEET:
        if name in kind:
            return flops, f"datasheet, dense bfloat16, {device.device_kind}"
    return _measured(device)


def memory_per_device(
    cfg: ModelConfig,
    *,
    optim: Any,
    mesh_sizes: tuple[int, ...],
    rules: sharding.Rules,
    rows: int,
    seq_len: int,
    accumulate: bool = False,
    platform: str = "",
) -> dict[str, float]:
    """Bytes on one device in a training step, by term; terms that begin with "E" are estimates.

    optim: a value with `build(specs)` and `stored(specs)`. mesh_sizes: devices along
    `sharding.AXES`. rows: of one micro-batch, all devices. platform: "gpu" or "tpu", where known.
    Attention is counted as a fused kernel; the reference keeps some N·T·T scores a row besides. Not
    counted: the workspace of Newton-Schulz, the allocator's slack. `glm45_jax.plan` asks the
    compiler, which runs less at a time where memory is short, and then needs less.
    """
    sizes = dict(zip(sharding.AXES, mesh_sizes, strict=True))
    ways = math.prod(sizes[a] for a in (*rules.batch, *rules.seq))
    tokens = math.ceil(rows * seq_len / ways)
    weights = optim.stored(specs(cfg))
    leaves = [s for _, s in plan.leaves_with_path(weights)]
    held = float(sum(_local_bytes(s, s.dtype, sizes, rules) for s in leaves))
    act = jnp.dtype(cfg.dtype).itemsize
    saved, block, dispatch = _activations(cfg, act, sizes, rules)
    layer = _layer_weights(cfg, optim, act, sizes, rules)
    gathered = sharding.ways(rules.embed, sizes) > 1
    summed = float(sum(_local_bytes(s, jnp.float32, sizes, rules) for s in leaves))
    terms = {
        "parameters": held,
        "gradients": held,
        "optimizer": float(_optimizer_bytes(optim.build(weights), weights, sizes, rules)),
        "E gradients being summed": summed if accumulate else 0.0,
        "E saved activations": tokens * saved,
        "E one block, recomputed": tokens * block,
        "E rows of experts": tokens * dispatch,
        "E keys of other devices": _whole_keys(cfg, act, sizes, rules, rows=rows, seq_len=seq_len),
        "E chunk of logits": tokens * min(chunk_words(tokens), cfg.vocab) * (4.0 + act),
        "E weights of one layer": layer,
        "E gradients of one layer": layer if gathered else 0.0,  # before they are scattered
        "E embedding, whole": _whole_embedding(cfg, act, sizes, rules),
        "E copies of experts' rows": tokens * _copied_bytes(cfg, act, sizes, rules, platform),
        "E weights as gathered": (
            _laid_out(weights, sizes, rules)
            if gathered and accumulate and platform == "gpu"
            else 0.0
        ),
    }
    return terms | {"total": sum(terms.values())}


def _share(spec: plan.ParamSpec, cfg: ModelConfig) -> float:
    """Share of a weight that one token meets."""
    return cfg.moe.top_k / cfg.moe.experts if "experts" in spec.axes else 1.0


def _part(path: str) -> str:
    """The field of `Flops` that a matrix belongs to."""
    if path.startswith("mtp."):
        return "mtp"
    if ".mixer." in path:
        return "attention_proj"
    if path.startswith("dense."):
        return "dense_mlp"
    return "router" if ".router_" in path else "experts"


def _local_bytes(
    spec: plan.ParamSpec, dtype: Any, sizes: Mapping[str, int], rules: sharding.Rules
) -> int:
    """Bytes that one device holds of an array shaped like a weight."""
    return sharding.local_size(spec.shape, spec.axes, rules, sizes) * jnp.dtype(dtype).itemsize


def _optimizer_bytes(
    tx: optax.GradientTransformation, weights: Any, sizes: Mapping[str, int], rules: sharding.Rules
) -> int:
    """Bytes of the optimizer on one device: moments lie like their weights, the rest everywhere."""
    state = jax.eval_shape(tx.init, plan.abstract(weights))

    def one(x: jax.ShapeDtypeStruct, spec: plan.ParamSpec | None) -> int:
        if spec is None:
            return x.size * x.dtype.itemsize
        return _local_bytes(spec, x.dtype, sizes, rules)

    return sum(jax.tree.leaves(jax.tree.map(one, state, plan.owners(weights, state))))


def _activations(
    cfg: ModelConfig, act: int, sizes: Mapping[str, int], rules: sharding.Rules
) -> tuple[float, float, float]:
    """Bytes a token: saved by the remat policy, of one block's backward pass, of its expert rows.

    act: bytes of an activation. The factors count the residuals that the code of a block leaves at
    `remat="none"`, float32 ones apart; the tests hold them against its trace.
    """
    D = cfg.d_model
    shared = cfg.moe.shared * cfg.moe.d_expert
    gated = _gated_copies(cfg) * act
    mixer = D * (4 * act + 8) + cfg.mixer.residual_bytes(act)
    dense = mixer + gated * cfg.d_mlp
    router = D * (act + 4) + 20 * cfg.moe.experts  # float32
    moe = mixer + router + gated * shared
    dispatch = _dispatch_bytes(cfg, act, sizes, rules) if cfg.n_moe else 0.0
    n_moe = cfg.n_moe + cfg.n_mtp
    dots = {"dense": 2 * cfg.d_mlp * act, "moe": 2 * shared * act + 4 * cfg.moe.experts}
    match cfg.remat:
        case "none":
            return float(cfg.n_dense * dense + n_moe * (moe + dispatch)), 0.0, 0.0
        case "full":
            saved = (cfg.n_dense + n_moe) * D * act
        case "outputs":
            saved = (cfg.n_dense + n_moe) * 2 * D * act
        case "dots":
            mixer = (2 * D + cfg.mixer.dots_width) * act
            saved = cfg.n_dense * (mixer + dots["dense"]) + n_moe * (mixer + dots["moe"])
    return float(saved), float(moe if n_moe else dense), float(dispatch)


def _whole_keys(
    cfg: ModelConfig,
    act: int,
    sizes: Mapping[str, int],
    rules: sharding.Rules,
    *,
    rows: int,
    seq_len: int,
) -> float:
    """Bytes of keys and values that come from other devices of a row, and of their gradients, in
    one attention's backward pass; 0 where rows are whole.

    Gathered they are whole rows: in the compute dtype, their gradients in float32, and these once
    more in the order of the devices, from which they are scattered. In a ring what is here and what
    is coming: keys and values, and float32 gradients. Source: model/context_parallel.py.
    """
    lanes = sharding.ways(rules.seq, sizes)
    if lanes == 1:
        return 0.0
    mixer = cfg.mixer
    heads = mixer.kv_heads if isinstance(mixer, Gqa) else mixer.heads  # Mla expands its latents
    entries = heads * mixer.pair_flops // (2 * mixer.heads)  # of a key and its value
    split = sharding.ways(rules.kv_heads, sizes)
    entries = entries // split if heads % split == 0 else entries
    entries *= math.ceil(rows / sharding.ways(rules.batch, sizes)) * seq_len
    if isinstance(choose(rules.keys, gathered=entries * act, lanes=lanes), GatherKeys):
        return float(entries * (act + 2 * 4))
    return float(entries / lanes * 2 * (act + 4))


def _layer_weights(
    cfg: ModelConfig, optim: Any, act: int, sizes: Mapping[str, int], rules: sharding.Rules
) -> float:
    """Bytes of one layer's weights as a block uses them: gathered, in the compute dtype.

    Tensor parallelism splits them still, and experts lie on their devices unless the exchange
    gathers them. Zero where a block uses the weights as they are stored.
    """
    one_block = optim.stored(block_specs(cfg, 1, dense=not cfg.n_moe))
    layer = [s for _, s in plan.leaves_with_path(one_block)]
    kept = {a: n if a in (*rules.heads, *rules.mlp) else 1 for a, n in sizes.items()}
    one_device = math.prod(sizes.values()) == 1
    total = 0.0
    for spec in layer:
        as_stored = one_device and jnp.dtype(spec.dtype).itemsize == act
        if spec.kind != "matrix" or as_stored:
            continue
        if "experts" in spec.axes:
            total += spec.size * act * _held_experts(cfg, sizes, rules)
        else:
            total += _local_bytes(spec, cfg.dtype, kept, rules)
    return total


def _gated_copies(cfg: ModelConfig) -> int:
    """Arrays as wide as an MLP: gate, up and their product; of a block that is recomputed the
    gradients of these as well, which its backward pass has beside them.
    """
    return 3 if cfg.remat == "none" else 6


def _dispatch_bytes(
    cfg: ModelConfig, act: int, sizes: Mapping[str, int], rules: sharding.Rules
) -> float:
    """Bytes a token of one mixture's expert rows."""
    exchange, lay = _exchange(cfg, sizes, rules)
    width = cfg.moe.d_expert / sharding.ways(lay.mlp, sizes)
    row, size = (2 * cfg.d_model + _gated_copies(cfg) * width) * act, lay.group.size
    return exchange.residual_bytes(row, size=size, moe=cfg.moe, d_model=cfg.d_model, act=act)


def _copied_bytes(
    cfg: ModelConfig, act: int, sizes: Mapping[str, int], rules: sharding.Rules, platform: str
) -> float:
    """Bytes a token of what an exchange of experts copies on its way."""
    exchange, lay = _exchange(cfg, sizes, rules, platform or "gpu")
    if not cfg.n_moe + cfg.n_mtp or lay.group.size == 1:
        return 0.0
    size, D = lay.group.size, cfg.d_model
    return exchange.copied_bytes(size=size, moe=cfg.moe, d_model=D, act=act)


def _whole_embedding(
    cfg: ModelConfig, act: int, sizes: Mapping[str, int], rules: sharding.Rules
) -> float:
    """Bytes of the embedding as a device looks tokens up in it, or of its gradient before that is
    scattered; 0 where it is not split over D.
    """
    if sharding.ways(rules.embed, sizes) == 1:
        return 0.0
    return cfg.vocab * cfg.d_model * act / sharding.ways(rules.vocab, sizes)


def _laid_out(weights: Any, sizes: Mapping[str, int], rules: sharding.Rules) -> float:
    """Bytes of stacked matrices once more. XLA's GPU compiler gathers along the first dimension: it
    turns D to the front, for all layers at once, before the loop over micro-batches.
    """
    leaves = [s for _, s in plan.leaves_with_path(weights)]
    turned = [s for s in leaves if s.kind == "matrix" and {"layers", "embed"} <= set(s.axes)]
    return float(sum(_local_bytes(s, s.dtype, sizes, rules) for s in turned))


def _held_experts(cfg: ModelConfig, sizes: Mapping[str, int], rules: sharding.Rules) -> float:
    """Share of a layer's routed weights that one device holds while it multiplies."""
    exchange, lay = _exchange(cfg, sizes, rules)
    group = 1 if exchange.gathers_experts else lay.group.size
    return 1 / (sharding.ways(lay.mlp, sizes) * group)


def _exchange(
    cfg: ModelConfig, sizes: Mapping[str, int], rules: sharding.Rules, platform: str = "gpu"
) -> tuple[Any, Layout]:
    """How tokens meet experts on this mesh, and where both lie."""
    moe = cfg.moe
    lay = layout(sizes, rules, experts=moe.experts, d_model=cfg.d_model, width=moe.d_expert)
    # What the backward pass reads is the same for the exchanges that the platform decides between.
    return rules.exchange or default_exchange(lay.group.size, moe.top_k, platform)[0], lay


@functools.cache
def _measured(device: jax.Device) -> tuple[float, str]:
    """The best float32 matmul rate within 0.2 s, an equal share of it for each CPU device."""
    n, seconds = 1024, 0.2
    with jax.default_device(device):
        x = jnp.ones((n, n), jnp.float32)
        product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
        product(x).block_until_ready()
        best, end = math.inf, time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            product(x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    # Virtual CPU devices share the cores that one of them just had to itself.
    sharing = jax.local_device_count("cpu") if device.platform == "cpu" else 1
    text = f"measured: float32 matmul {n}^3 on {device.device_kind}, best of {seconds} s"
    return 2.0 * n**3 / best / sharing, text + (f", shared by {sharing}" if sharing > 1 else "")
