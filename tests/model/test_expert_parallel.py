"""Laws of expert parallelism: on any mesh, by any exchange, one device's loss, gradient and load;
tokens travel and experts stay.
"""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from glm45_jax import params as params_lib
from glm45_jax import sharding, values
from glm45_jax.model import config, cost, expert_parallel, transformer
from glm45_jax.model.context_parallel import RingKeys
from glm45_jax.model.expert_parallel import (
    GatherTokens,
    GatherWeights,
    PaddedAllToAll,
    RaggedAllToAll,
    choose,
    default_exchange,
)
from glm45_jax.optim.muon import Muon
from glm45_jax.sharding import MeshShape, Rules
from glm45_jax.train.loss import Weights
from glm45_jax.train.step import biases, gradients, move_bias
from tests.train.common import packed_batch

ONE = MeshShape(1, 1)
# The definition of the grouped product compiles fastest, and exchanges do not depend on it.
TINY = dataclasses.replace(config.tiny(), impl=config.Impl(grouped_matmul="reference"))
CFG = dataclasses.replace(TINY, n_dense=0, n_moe=1, n_mtp=0)
# Its one mixture is MTP's: of rows split over devices, the last place stays as padding.
MTP = dataclasses.replace(TINY, n_dense=1, n_moe=0, n_mtp=1)
EXPERTS, D, F = CFG.moe.experts, CFG.d_model, CFG.moe.d_expert

MESHES = {
    "fsdp 8": (CFG, MeshShape(fsdp=8), Rules()),
    "expert 8": (CFG, MeshShape(fsdp=1, expert=8), Rules(exchange=PaddedAllToAll())),
    "expert 4 x fsdp 2": (CFG, MeshShape(fsdp=2, expert=4), Rules(exchange=GatherTokens())),
    "tensor 2 x fsdp 4": (CFG, MeshShape(fsdp=4, tensor=2), Rules()),
    "tensor 2 x expert 4": (
        dataclasses.replace(CFG, remat="full"),
        MeshShape(fsdp=1, expert=4, tensor=2),
        Rules(exchange=PaddedAllToAll(0.5)),
    ),
    "data 2 x expert 2 x fsdp 2": (
        dataclasses.replace(CFG, remat="dots"),
        MeshShape(data=2, fsdp=2, expert=2),
        Rules(exchange=PaddedAllToAll()),
    ),
    "experts over fsdp 4 x expert 2": (
        CFG,
        MeshShape(fsdp=4, expert=2),
        Rules(experts=("fsdp", "expert"), exchange=PaddedAllToAll()),
    ),
    "experts over expert 2 x tensor 2": (
        CFG,
        MeshShape(fsdp=2, expert=2, tensor=2),
        Rules(experts=("expert", "tensor"), exchange=GatherTokens(4.0)),
    ),
    "expert 4 x context 2": (
        CFG,
        MeshShape(fsdp=1, expert=4, context=2),
        Rules(exchange=PaddedAllToAll()),
    ),
    "data 2 x expert 2 x context 2": (
        MTP,
        MeshShape(data=2, fsdp=1, expert=2, context=2),
        Rules(exchange=GatherTokens()),
    ),
    "context 8": (
        dataclasses.replace(MTP, remat="full"),
        MeshShape(fsdp=1, context=8),
        Rules(keys=RingKeys()),
    ),
}
LENGTH = 32  # of a row: two chunks for each of 8 devices, and documents across their borders
SKEWS = {
    "as the router likes": [0.0] * 8,
    "one takes all, one nothing": [0.0, 0, 0, 9, 0, -9, 0, 0],
}


def placed(cfg, shape, rules):
    """The mesh, and large weights on it: experts must differ by more than rounding."""
    mesh = sharding.make_mesh(shape, jax.devices()[: 1 if shape == ONE else 8])
    specs = transformer.specs(cfg)
    params = params_lib.init(specs, jax.random.key(0))
    params = jax.tree.map(lambda w: w * 4 if w.ndim > 2 else w, params)
    return mesh, jax.device_put(params, sharding.shardings(specs, mesh, rules))


@functools.cache
def three_steps(cfg, shape=ONE, rules=Rules()):
    """By skew of the routing: gradient and loss of the first of three steps of plain descent, and
    the biases after them; and the compiled step's text.
    """
    mesh, params = placed(cfg, shape, rules)
    weights = Weights(jnp.float32(0.3), jnp.float32(1e-2))

    def step(params, batch):
        with sharding.use(mesh, rules):
            grads, out = gradients(params, batch, weights, cfg=cfg, packed=True)
        moved = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
        return move_bias(moved, out.load_LE, jnp.float32(1e-2)), grads, out

    batches = [packed_batch(seed, length=LENGTH) for seed in range(3)]
    batches = [sharding.put(batch, mesh, rules) for batch in batches]
    layout = jax.tree.map(lambda w: w.sharding, params)
    compiled = jax.jit(step, out_shardings=(layout, layout, None)).lower(params, batches[0])
    compiled = compiled.compile()
    found = {}
    for skew, bias in SKEWS.items():
        start = jax.tree_util.tree_map_with_path(
            lambda path, w, bias=bias: _biased(path, w, bias), params
        )
        moved, grads, out = compiled(start, batches[0])
        for batch in batches[1:]:
            moved = compiled(moved, batch)[0]
        found[skew] = jax.device_get((grads, out, biases(moved)))
    return found, compiled.as_text()


def _biased(path, w, bias):
    if "bias_E" not in jax.tree_util.keystr(path):
        return w
    return jax.device_put(jnp.broadcast_to(jnp.asarray(bias), w.shape), w.sharding)


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_one_devices_loss_gradient_and_biases(name):
    cfg, shape, rules = MESHES[name]
    found, alone_found = three_steps(cfg, shape, rules)[0], three_steps(alone_of(cfg))[0]
    paths = [path for path, _ in params_lib.leaves_with_path(transformer.specs(cfg))]
    for skew in SKEWS:
        (grads, out, bias_LE), (alone_grads, alone, alone_bias_LE) = found[skew], alone_found[skew]
        assert_allclose(out.loss, alone.loss, rtol=1e-5, err_msg=skew)
        for part in alone.parts:
            assert_allclose(out.parts[part], alone.parts[part], rtol=1e-5, err_msg=part)
        assert_array_equal(out.load_LE, alone.load_LE)
        assert_array_equal(bias_LE, alone_bias_LE)
        assert np.ptp(bias_LE) > 0
        for path, ours, theirs in zip(
            paths, jax.tree.leaves(grads), jax.tree.leaves(alone_grads), strict=True
        ):
            atol = 1e-5 * np.abs(theirs).max()
            assert_allclose(ours, theirs, atol=atol, rtol=1e-5, err_msg=f"{skew}: {path}")
    taken = alone_found["one takes all, one nothing"][1].load_LE[0]
    assert taken[3] == taken.sum() // cfg.moe.top_k and taken[5] == 0


def alone_of(cfg):
    return dataclasses.replace(cfg, remat="none")


def test_the_loss_counts_the_rows_that_took_another_pass():
    spilled = {
        name: [out.spilled for _, out, _ in three_steps(*MESHES[name])[0].values()]
        for name in ("expert 4 x context 2", "fsdp 8")
    }
    assert spilled["expert 4 x context 2"][1] > spilled["expert 4 x context 2"][0]
    assert spilled["fsdp 8"] == [0, 0]  # weights travel


def collectives(text, op):
    """Shapes that come out of the collectives of one kind in a compiled program."""
    found = re.findall(rf"= (.+?) {op}(?:-start)?\(", text)
    return [
        tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", " ".join(found))
    ]


def whole_experts(shapes):
    return [s for s in shapes if s[-3:] in ((EXPERTS, D, F), (EXPERTS, F, D))]


@pytest.mark.parametrize("name", ["expert 8", "data 2 x expert 2 x fsdp 2", "expert 4 x fsdp 2"])
def test_tokens_travel_and_no_device_gathers_all_experts(name):
    text = three_steps(*MESHES[name])[-1]
    assert not whole_experts(collectives(text, "all-gather"))
    if isinstance(MESHES[name][2].exchange, GatherTokens):
        moved = [s for s in collectives(text, "all-gather") if s[-1] == D and s[0] > EXPERTS]
    else:
        moved = [s for s in collectives(text, "all-to-all") if s[-1] == D]
    assert moved


def test_the_search_for_gathered_experts_sees_those_of_gathered_weights():
    assert whole_experts(collectives(mixture_of(GatherWeights())[-1], "all-gather"))


BIASES = {
    "as the router likes": [0.0] * 8,
    "every token to the same three": [9.0, 9, 9, 0, 0, 0, 0, 0],
    "one takes all, one nothing": [0.0, 0, 0, 9, 0, -9, 0, 0],
    "all on the last device": [0.0, 0, 0, 0, 0, 9, 9, 9],
}
EXCHANGES = (
    GatherWeights(),
    GatherTokens(),
    PaddedAllToAll(),
    PaddedAllToAll(0.2),
    RaggedAllToAll(0.2),
)
SPREAD = MeshShape(fsdp=2, expert=4)


def emulated_ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What `lax.ragged_all_to_all` is documented to do, which the CPU has not."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    sent, starts, sizes, places = map(gather, (operand, input_offsets, send_sizes, output_offsets))
    me = jax.lax.axis_index(axis_name)
    at = jnp.arange(output.shape[0])
    for source in range(sent.shape[0]):
        nth = at - places[source, me]
        comes = (nth >= 0) & (nth < sizes[source, me])
        rows = sent[source].at[starts[source, me] + nth].get(mode="clip")
        output = jnp.where(comes[:, None], rows, output)
    return output


@functools.cache
def mixture_of(exchange, shape=SPREAD, gather_inside=()):
    """A function of the selection bias: output and gradients of one mixture; and its HLO.
    gather_inside: what the caller has set `GATHER_INSIDE` to, for the cache.
    """
    rules = Rules(exchange=exchange)
    mesh, params = placed(CFG, shape, rules)
    p = jax.tree.map(lambda w: w[0], params.moe.ffn)
    x_BTD = sharding.put(np.float32(np.random.default_rng(0).normal(size=(16, 24, D))), mesh, rules)
    segments_BT = sharding.put(packed_batch().segments_BT, mesh, rules)

    def run(p, x_BTD, segments_BT, bias_E):
        def scalar(p, x_BTD):
            impl = dict(impl_route="auto", impl_matmul="reference")
            with sharding.use(mesh, rules):
                out = CFG.moe(p.replace(bias_E=bias_E), x_BTD, segments_BT=segments_BT, **impl)
            return jnp.sin(out.y_BTD).sum() + out.balance_B.sum(), out

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(p, x_BTD)

    args = p, x_BTD, segments_BT
    compiled = jax.jit(run).lower(*args, jnp.zeros(EXPERTS)).compile()

    def of(bias):
        (_, out), grads = compiled(*args, jax.device_put(jnp.asarray(bias), p.bias_E.sharding))
        return jax.device_get(out), jax.device_get(grads)

    return of, compiled.as_text()


@pytest.fixture
def ragged_on_cpu(monkeypatch):
    monkeypatch.setattr(expert_parallel.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    monkeypatch.setattr(RaggedAllToAll, "refuses", lambda self, platform: None)


@pytest.mark.parametrize("exchange", EXCHANGES, ids=str)
def test_every_exchange_is_exact_however_skewed_the_routing(exchange, ragged_on_cpu):
    for name, bias in BIASES.items():
        out, grads = mixture_of(exchange)[0](bias)
        alone, alone_grads = mixture_of(GatherWeights(), ONE)[0](bias)
        assert_allclose(out.y_BTD, alone.y_BTD, atol=1e-5, err_msg=name)
        assert_allclose(out.balance_B, alone.balance_B, rtol=1e-5, err_msg=name)
        assert_array_equal(out.load_E, alone.load_E, err_msg=name)
        for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(alone_grads), strict=True):
            assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), err_msg=name)


def test_experts_gathered_by_hand_give_the_same_and_scatter_their_gradients(monkeypatch):
    monkeypatch.setattr(expert_parallel, "GATHER_INSIDE", ("cpu",))
    of, text = mixture_of(PaddedAllToAll(), SPREAD, ("cpu",))
    bias = BIASES["one takes all, one nothing"]
    out, grads = of(bias)
    alone, alone_grads = mixture_of(GatherWeights(), ONE)[0](bias)
    assert_allclose(out.y_BTD, alone.y_BTD, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(alone_grads), strict=True):
        assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert len(collectives(text, "reduce-scatter")) == 3
    assert not whole_experts(collectives(text, "all-gather"))


def test_rows_beyond_the_slots_of_a_pass_are_counted():
    m, A, X = 16 * 24 // 8, CFG.moe.top_k, 4
    slots = -(-int(1.25 * m * A / X) // 8) * 8  # of one pair; of one receiver X times as many
    bias = BIASES["every token to the same three"]  # two of them on device 0, one on device 1
    out, _ = mixture_of(PaddedAllToAll())[0](bias)
    assert out.spilled == 8 * ((2 * m - slots) + max(m - slots, 0)) > 0
    out, _ = mixture_of(GatherTokens())[0](bias)
    slots = -(-int(1.25 * m * A) // 8) * 8
    assert out.spilled == 2 * (max(X * 2 * m - slots, 0) + max(X * m - slots, 0)) > 0
    assert mixture_of(GatherWeights())[0](bias)[0].spilled == 0
    assert mixture_of(PaddedAllToAll(0.2))[0](BIASES["as the router likes"])[0].spilled > 0


def test_a_mixture_gives_the_same_bits_twice():
    of = mixture_of(PaddedAllToAll(0.2))[0]
    bias = BIASES["one takes all, one nothing"]
    jax.tree.map(assert_array_equal, of(bias), of(bias))


def test_experts_that_do_not_divide_are_refused_with_both_numbers():
    rules = Rules(experts=("expert", "tensor"))
    nine = dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, experts=12))
    with pytest.raises(ValueError, match=r"12 experts do not divide over 8 .* use 4 devices"):
        placed(nine, MeshShape(fsdp=1, expert=4, tensor=2), rules)


def test_an_exchange_that_the_platform_lacks_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"no ragged all-to-all on CPU; .*None picks"):
        placed(CFG, SPREAD, Rules(exchange=RaggedAllToAll()))
    with pytest.raises(ValueError, match=r"no ragged all-to-all on CPU; .*None picks"):
        choose(RaggedAllToAll(), size=4, top_k=8, platform="cpu")
    with pytest.raises(ValueError, match=r"factor 0 is not above 0; try 1\.25"):
        PaddedAllToAll(0)


def test_the_slow_ragged_lowering_is_never_picked_on_gpu_and_named_when_asked_for(caplog):
    for size in (1, 2, 4, 8, 64):
        assert not isinstance(default_exchange(size, 8, "gpu")[0], RaggedAllToAll)
    assert isinstance(default_exchange(8, 8, "tpu")[0], RaggedAllToAll)
    assert default_exchange(1, 8, "tpu")[0] == GatherWeights()
    assert default_exchange(4, 8, "gpu")[0] == GatherTokens()
    assert default_exchange(8, 8, "gpu")[0] == PaddedAllToAll()
    assert default_exchange(8, 8, "cpu")[0] == GatherWeights()
    with caplog.at_level(logging.WARNING):
        choose(RaggedAllToAll(1.3), size=8, top_k=8, platform="gpu")
    assert "2.6 GB/s" in caplog.text and "PaddedAllToAll" in caplog.text


def test_an_exchange_is_a_value_that_survives_json_and_has_parts_to_set():
    rules = Rules(exchange=PaddedAllToAll(1.5))
    assert values.from_json(values.to_json(rules)) == rules
    assert values.override(rules, "exchange.factor=2").exchange == PaddedAllToAll(2.0)
    assert choose(PaddedAllToAll(), size=1, top_k=8, platform="cpu") == GatherWeights()


def test_planned_memory_follows_the_exchange():
    def memory(exchange):
        terms = cost.memory_per_device(
            config.glm45(),
            optim=Muon(),
            mesh_sizes=(1, 128, 8, 1, 1),
            rules=Rules(exchange=exchange),
            rows=1024,
            seq_len=4096,
        )
        return terms["E weights of one layer"], terms["E rows of experts"]

    gathered, padded, tokens = memory(GatherWeights()), memory(None), memory(GatherTokens())
    one_layer = 160 * 3 * 5120 * 1536 * 2  # bytes of a layer's experts in bfloat16
    assert_allclose(gathered[0] - padded[0], one_layer * 7 / 8)
    assert_allclose(padded[1], 1.25 * gathered[1])
    assert_allclose(tokens[1] - padded[1], 4096 * 8 * 5120 * 6)


def test_positions_added_to_divide_a_row_are_counted_nowhere():
    rules = Rules()
    mesh, params = placed(CFG, MeshShape(fsdp=1, expert=4, context=2), rules)
    p = jax.tree.map(lambda w: w[0], params.moe.ffn)

    def run(p, x_BTD):
        with sharding.use(mesh, rules):
            return CFG.moe(p, x_BTD, segments_BT=None, impl_route="auto", impl_matmul="auto")

    out = jax.jit(run)(p, jnp.ones((8, 23, D)))
    assert out.y_BTD.shape == (8, 23, D)
    assert out.load_E.sum() == 8 * 23 * CFG.moe.top_k
