"""Laws of cost: published parameter counts, FLOPs as XLA's, bytes as shards and traces hold."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from glm45_jax import params, sharding
from glm45_jax.model import config, cost, transformer
from glm45_jax.model.context_parallel import GatherKeys, RingKeys, spread_rows
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon

TINY = config.tiny()
TINY_MLA = dataclasses.replace(TINY, mixer=config.Mla(4, 48, 32, 16, 8, v_dim=20))
mixers = pytest.mark.parametrize("tiny", [TINY, TINY_MLA], ids=("gqa", "mla"))


@pytest.mark.parametrize(
    ("cfg", "billions"),
    [
        (config.glm45(), (351.25, 355.23, 0.776, 358.34, 32.08, 32.86)),
        (config.glm45_air(), (105.61, 107.99, 0.621, 110.47, 12.18, 12.80)),
        (config.glm47_flash(), (29.31, 29.95, 0.317, 31.22, 3.26, 3.58)),
    ],
    ids=("glm45", "air", "flash"),
)
def test_parameter_counts_are_the_published_ones_to_every_digit_shown(cfg, billions):
    n = cost.param_counts(cfg)
    ours = (n.body, n.body_and_mtp, n.embedding, n.total_stored, n.active_body)
    for count, shown in zip((*ours, n.active_body_and_head), billions, strict=True):
        digits = 3 if shown < 1 else 2
        assert round(count / 1e9, digits) == shown


def test_flash_with_its_vocabulary_and_without_mtp_is_the_30b_of_its_name():
    n = cost.param_counts(config.glm47_flash())
    assert round((n.body + 2 * n.embedding) / 1e9, 2) == 29.94


@mixers
def test_parts_of_a_model_sum_to_all_its_trained_weights(tiny):
    n = cost.param_counts(tiny)
    assert n.body_and_mtp + 2 * n.embedding == params.count(transformer.specs(tiny))


def test_a_token_that_meets_every_expert_meets_every_weight():
    dense = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, top_k=TINY.moe.experts))
    n = cost.param_counts(dense)
    assert n.active_body == n.body


def test_flops_of_a_token_are_six_an_active_weight_plus_scores():
    cfg = config.glm45()
    flops = cost.flops_per_token(cfg, 4096, mtp=False)
    six = 6 * cost.param_counts(cfg).active_body_and_head  # norms and biases: a millionth
    assert_allclose(flops.total - flops.attention_scores, six, rtol=1e-4)
    assert_allclose(flops.attention_scores, 3 * 2 * 4097 * 96 * 128 * 92, rtol=1e-12)
    assert flops.mtp == 0.0
    flash = cost.flops_per_token(config.glm47_flash(), 4096)
    assert_allclose(flash.attention_scores, 3 * 4097 * 20 * (192 + 64 + 256) * 47, rtol=1e-12)


def test_training_costs_three_forwards_and_mtp_adds_only_its_part():
    train = cost.flops_per_token(TINY, 64)
    assert_allclose(train.total, 3 * cost.flops_per_token(TINY, 64, training=False).total)
    without = cost.flops_per_token(TINY, 64, mtp=False)
    assert_allclose(train.total - train.mtp, without.total)


@mixers
def test_flops_are_xlas_but_for_padding_and_masked_scores(tiny):
    # One layer of each kind: XLA counts the body of a scan once, whatever its length. XLA sees
    # also the masked half of the scores (here 6% of all), blocks padded to 64 rows (at most 8% of
    # the routed rows), and elementwise work; it sees no product that `cost` does not.
    B, T = 64, 32
    impl = config.Impl(attention="reference", grouped_matmul="blocked")
    cfg = dataclasses.replace(tiny, n_mtp=0, n_moe=1, impl=impl)

    def logits(p, tokens_BT):
        return transformer.logits(p, transformer.forward(p, tokens_BT, cfg=cfg), cfg=cfg)

    tokens_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    compiled = jax.jit(logits).lower(params.abstract(transformer.specs(cfg)), tokens_BT).compile()
    xla = compiled.cost_analysis()["flops"] / (B * T)
    assert 1.0 <= xla / cost.flops_per_token(cfg, T, training=False).total < 1.2


def test_mfu_is_one_at_the_rate_that_fills_the_devices():
    rate = 8 * 989e12 / cost.flops_per_token(TINY, 128).total
    assert_allclose(cost.mfu(rate, TINY, 128, 8, 989e12), 1.0)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_known_devices_have_their_datasheet_peak(kind, flops):
    peak, source = cost.peak_flops(types.SimpleNamespace(device_kind=kind))
    assert peak == flops
    assert "datasheet" in source and kind in source


def test_an_unknown_device_is_measured_once_and_says_so():
    peak, source = cost.peak_flops(jax.devices("cpu")[0])
    assert 1e8 < peak < 1e14
    assert "measured" in source
    assert "shared by 8" in source  # eight virtual devices on the same cores
    assert cost.peak_flops(jax.devices("cpu")[0]) == (peak, source)


@pytest.mark.parametrize(
    "optim",
    [Muon(), AdamW(), Muon(master_dtype="bfloat16", momentum_dtype="bfloat16")],
    ids=("muon", "adamw", "muon in bfloat16"),
)
def test_counted_bytes_are_those_of_the_arrays_on_a_device(optim):
    shape, rules = sharding.MeshShape(fsdp=2, expert=2, tensor=2), sharding.Rules()
    mesh = sharding.make_mesh(shape)
    specs = optim.stored(transformer.specs(TINY))
    layouts = sharding.shardings(specs, mesh, rules)
    weights = jax.tree.map(
        lambda x, layout: jax.device_put(np.zeros(x.shape, x.dtype), layout),
        params.abstract(specs),
        layouts,
    )
    # `zeros_like` outside `jit` keeps the layout of the weight: a real state to weigh.
    state = optim.build(specs).init(weights)
    device = mesh.devices.flat[0]

    def held(tree):
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
        return sum(s.data.nbytes for s in shards if s.device == device)

    memory = cost.memory_per_device(
        TINY, optim=optim, mesh_sizes=shape.resolve(8), rules=rules, rows=8, seq_len=16
    )
    assert memory["parameters"] == memory["gradients"] == held(weights)
    assert memory["optimizer"] == held(state)


def saved_bytes(cfg, rows, T):
    """Bytes of all residuals of a forward pass, weights included."""
    weights = params.abstract(transformer.specs(cfg))

    def residuals(weights, tokens_BT):
        def trunk(weights):
            hidden = transformer.forward(weights, tokens_BT, cfg=cfg, keep_router_logits=False)
            return hidden.hidden_BTD

        return jax.vjp(trunk, weights)[1]

    leaves = jax.tree.leaves(
        jax.eval_shape(residuals, weights, jax.ShapeDtypeStruct((rows, T), jnp.int32))
    )
    return sum(x.size * x.dtype.itemsize for x in leaves)


def bytes_a_layer(cfg, T, moe):
    """Residual bytes that one more layer leaves for one more token."""

    def at(layers, rows):
        sizes = {"n_moe": layers} if moe else {"n_dense": layers}
        return saved_bytes(dataclasses.replace(cfg, **sizes), rows, T)

    return ((at(3, 8) - at(2, 8)) - (at(3, 4) - at(2, 4))) / (4 * T)


@mixers
@pytest.mark.parametrize("moe", [False, True], ids=("dense", "moe"))
@pytest.mark.parametrize("remat", ["none", "full", "dots", "outputs"])
def test_saved_activations_are_what_a_trace_saves(remat, moe, tiny):
    T, rows, act = 32, 8, 2
    cfg = dataclasses.replace(tiny, dtype="bfloat16", remat=remat, n_mtp=0, n_dense=1, n_moe=1)
    traced = bytes_a_layer(cfg, T, moe)
    if remat == "none":  # the reference keeps scores in float32 and once more in bfloat16
        traced -= T * cfg.mixer.heads * (4 + act)

    def estimate(layers):
        sizes = {"n_moe": layers} if moe else {"n_dense": layers}
        memory = cost.memory_per_device(
            dataclasses.replace(cfg, **sizes),
            optim=Muon(),
            mesh_sizes=(1, 1, 1, 1, 1),
            rules=sharding.Rules(),
            rows=rows,
            seq_len=T,
        )
        return memory["E saved activations"] / (rows * T)

    tolerance = 0.05 if remat == "none" else 1e-9
    assert_allclose(estimate(3) - estimate(2), traced, rtol=tolerance)


def sent(jaxpr, found):
    """(primitive, bytes of the larger side) of each collective, those of inner programs too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("all_gather", "reduce_scatter", "ppermute"):
            sides = [
                sum(v.aval.size * v.aval.dtype.itemsize for v in side)
                for side in (eqn.invars, eqn.outvars)
            ]
            found.add((eqn.primitive.name, max(sides)))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                sent(inner, found)
    return found


@mixers
@pytest.mark.parametrize("keys", [None, GatherKeys(), RingKeys()], ids=str)
def test_keys_of_other_devices_are_those_that_a_trace_sends(keys, tiny):
    """Gathered: what arrives, and twice the float32 gradients that are scattered. In a ring: twice
    what is passed on.
    """
    rows, T = 4, 32
    shape, rules = sharding.MeshShape(fsdp=2, context=4), sharding.Rules(keys=keys)
    cfg = dataclasses.replace(tiny, dtype="bfloat16")
    mixer, mesh = cfg.mixer, sharding.make_mesh(shape)
    latent = isinstance(mixer, config.Mla)
    heads, widths = mixer.heads, (mixer.qk_dim, mixer.v_dim) if latent else (mixer.head_dim,) * 2
    kv_heads = heads if latent else mixer.kv_heads

    def attention(q, k, v):
        with sharding.use(mesh, rules):
            return spread_rows(q, k, v).astype(jnp.float32).sum()

    args = [
        jax.ShapeDtypeStruct((rows, T, n, width), jnp.bfloat16)
        for n, width in ((heads, widths[0]), (kv_heads, widths[0]), (kv_heads, widths[1]))
    ]
    traced = sent(jax.make_jaxpr(jax.grad(attention, (0, 1, 2)))(*args).jaxpr, set())
    one = {name: max(size for n, size in traced if n == name) for name, _ in traced}
    if isinstance(keys, RingKeys):
        passed = {size for name, size in traced if name == "ppermute"}
        assert len(passed) == 2  # keys and values; their gradients
        expected = 2 * sum(passed)
    else:
        expected = one["all_gather"] + 2 * one["reduce_scatter"]
    memory = functools.partial(
        cost.memory_per_device, cfg, optim=Muon(), rules=rules, rows=rows, seq_len=T
    )
    held = memory(mesh_sizes=shape.resolve(8))
    assert held["E keys of other devices"] == expected
    whole = memory(mesh_sizes=sharding.MeshShape(fsdp=8).resolve(8))
    assert whole["E keys of other devices"] == 0
    assert_allclose(held["total"], sum(v for k, v in held.items() if k != "total"))


def test_bfloat16_masters_halve_weights_and_gradients_but_not_their_sum():
    def memory(optim):
        return cost.memory_per_device(
            config.glm45(),
            optim=optim,
            mesh_sizes=sharding.MeshShape(fsdp=64, expert=8).resolve(512),
            rules=sharding.Rules(),
            rows=512,
            seq_len=4096,
            accumulate=True,
        )

    full, half = memory(Muon()), memory(Muon(master_dtype="bfloat16"))
    for term in ("parameters", "gradients"):
        assert_allclose(half[term], full[term] / 2, rtol=5e-3)  # routers, norms, biases
    for term in full.keys() - {"parameters", "gradients", "total"}:
        assert half[term] == full[term], term


def test_terms_fall_with_the_axes_that_split_them_and_the_total_is_their_sum():
    def memory(**axes):
        return cost.memory_per_device(
            config.glm45(),
            optim=Muon(),
            mesh_sizes=sharding.MeshShape(**axes).resolve(math.prod(axes.values())),
            rules=sharding.Rules(),
            rows=512,
            seq_len=4096,
            accumulate=True,
        )

    one, two = memory(fsdp=32, expert=8), memory(fsdp=64, expert=8)
    assert_allclose(one["total"], sum(v for k, v in one.items() if k != "total"))
    for term in ("parameters", "gradients", "optimizer", "E saved activations"):
        assert 0.5 * one[term] <= two[term] < 0.52 * one[term], term
    assert one["E gradients being summed"] == one["gradients"]
    assert two["E weights of one layer"] == one["E weights of one layer"]
