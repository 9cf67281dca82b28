"""Laws of rows split over devices: the same output and gradient as of whole rows, the same work on
every device, and no device with all of a row's scores.
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
from glm45_jax.kernels import attention_tiles as tiles
from glm45_jax.kernels import dispatch
from glm45_jax.kernels.attention import reference
from glm45_jax.model import config, context_parallel, transformer
from glm45_jax.model.context_parallel import GatherKeys, RingKeys, choose, join, spread, zigzag
from glm45_jax.sharding import MeshShape, Rules
from glm45_jax.train.loss import Weights
from glm45_jax.train.step import gradients
from tests.train.common import packed_batch

T = 48
SIZES = (1, 2, 3, 4, 8)


@pytest.mark.parametrize("size", SIZES)
def test_every_device_has_the_same_number_of_causal_pairs(size):
    held = zigzag(T, size).reshape(size, -1)
    assert_array_equal(np.sort(held.reshape(-1)), np.arange(T))
    assert len(set((held + 1).sum(axis=1))) == 1
    assert (np.diff(held) > 0).all()  # rising: the keys that a query sees come first
    pairs = (held[:, :, None, None] >= held[None, None, :, :]).sum(axis=(1, 3))
    for step in range(1, size):  # of the ring: device i meets keys of device i - step
        assert len({pairs[i, (i - step) % size] for i in range(size)}) == 1


@pytest.mark.parametrize("size", SIZES)
def test_every_device_visits_the_same_number_of_tiles_at_every_step(size):
    tile, held = 4, zigzag(4 * T, size).reshape(size, -1)
    all_keys = np.arange(4 * T)

    def visited(at_T, at_S):
        keys = tiles.Keys(None, None, at_S)
        reach = [
            tiles._reach(at_t, np.zeros_like(at_t), keys, tile) for at_t in at_T.reshape(-1, tile)
        ]
        return sum(int(stop - first) for first, stop in reach)

    assert len({visited(held[i], all_keys) for i in range(size)}) == 1
    work = [[visited(held[i], held[(i - s) % size]) for i in range(size)] for s in range(size)]
    assert all(len(set(step)) == 1 for step in work)
    whole = visited(all_keys, all_keys)
    assert sum(map(sum, work)) == whole  # nothing is met twice, nothing in vain


@pytest.mark.parametrize("size", SIZES)
def test_rows_come_back_as_they_were(size):
    shape = MeshShape(1, fsdp=1, context=size)
    mesh = sharding.make_mesh(shape, jax.devices()[:size])
    x_3BT2 = np.random.default_rng(0).normal(size=(3, 2, T, 2))

    @jax.jit
    def there_and_back(x):
        with sharding.use(mesh, Rules()):
            there = spread(x, axis=2)
            return there, join(there, axis=2), spread(None)

    there, back, nothing = there_and_back(x_3BT2)
    assert_array_equal(there, np.float32(x_3BT2)[:, :, zigzag(T, size)])
    assert_array_equal(back, np.float32(x_3BT2))
    assert nothing is None


WIDTHS = {"grouped heads": (6, 2, 16, 16), "latent heads": (4, 4, 24, 16)}
MESHES = {
    "context 8": MeshShape(1, fsdp=1, context=8),
    "fsdp 2 x context 2 x tensor 2": MeshShape(1, fsdp=2, context=2, tensor=2),
}
MEET = (GatherKeys(), RingKeys(), GatherKeys(4), RingKeys(2))
DOCUMENTS = np.stack([np.arange(T) // 7 + 1, np.repeat([1, 2, 3, 0], [20, 1, 19, 8])])


def draw(widths):
    N, K, H, U = WIDTHS[widths]
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, T, N, H), (2, T, K, H), (2, T, K, U), (2, T, N, U))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def output_and_gradients(attention, q, k, v, cotangent):
    out, pull = jax.vjp(attention, q, k, v)
    return out, *pull(cotangent)


@functools.cache
def definition(widths, packed):
    segments_BT = jnp.asarray(DOCUMENTS, jnp.int32) if packed else None
    attention = functools.partial(reference, segments_BT=segments_BT)
    return jax.jit(functools.partial(output_and_gradients, attention))(*draw(widths))


@functools.cache
def split(mesh_name, widths, packed, meet):
    """Output and gradients on a mesh, of rows in their own order, and the compiled text."""
    mesh, rules = sharding.make_mesh(MESHES[mesh_name]), Rules(keys=meet)
    segments_BT = jnp.asarray(DOCUMENTS, jnp.int32) if packed else None

    def run(*args):
        with sharding.use(mesh, rules):
            attend = context_parallel.attend()
            attend = functools.partial(attend, segments_BT=spread(segments_BT))
            return tuple(map(join, output_and_gradients(attend, *map(spread, args))))

    compiled = jax.jit(run).lower(*draw(widths)).compile()
    return compiled(*draw(widths)), compiled.as_text()


@pytest.mark.parametrize("meet", MEET, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(
    "mesh_name, widths", [("context 8", "grouped heads"), (list(MESHES)[1], "latent heads")]
)
def test_gather_and_ring_are_exact_forward_and_backward(mesh_name, widths, packed, meet):
    found, _ = split(mesh_name, widths, packed, meet)
    for ours, theirs in zip(found, definition(widths, packed), strict=True):
        assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def collectives(text, op):
    """Shapes that come out of the collectives of one kind in a compiled program."""
    found = re.findall(rf"= (.+?) {op}(?:-start)?\(", text)
    return sorted(
        tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", " ".join(found))
    )


def test_keys_and_values_are_gathered_at_once_and_their_gradients_scattered():
    _, text = split("context 8", "grouped heads", True, GatherKeys(4))
    _, K, H, U = WIDTHS["grouped heads"]
    documents, whole = (2, T), (2, T, K, H + U)
    assert collectives(text, "all-gather") == [documents, whole]  # XLA shares it with the backward
    assert collectives(text, "reduce-scatter") == [(2, T // 8, K, H + U)]
    for other in ("all-reduce", "all-to-all"):
        assert collectives(text, other) == []


def test_a_ring_passes_keys_on_and_their_gradients_home_and_gathers_nothing():
    _, text = split("context 8", "grouped heads", False, RingKeys(2))
    _, K, H, U = WIDTHS["grouped heads"]
    part = (2, T // 8, K, H + U)
    moved = collectives(text, "collective-permute")
    # In the loop of the forward pass keys and values; in that of the backward pass these and their
    # gradients.
    assert moved.count(part) == 3
    for other in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all"):
        assert collectives(text, other) == []


@pytest.mark.parametrize("meet", [GatherKeys(4), RingKeys(2)], ids=str)
def test_no_device_holds_all_scores_of_a_row(meet):
    _, text = split("context 8", "grouped heads", False, meet)
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)}
    tile = meet.tile
    scores = [s for s in shapes if s[-2:] == (tile, tile)]
    assert scores
    t = T // 8  # queries of a device
    assert not [s for s in shapes if T in s and t in s]
    assert not [s for s in shapes if s.count(T) > 1]


def test_the_search_for_whole_scores_sees_those_of_the_definition():
    run = jax.jit(functools.partial(output_and_gradients, reference))
    text = run.lower(*draw("grouped heads")).compile().as_text()
    assert re.search(rf"f32\[[\d,]*{T},{T}\]", text)


def test_short_rows_are_gathered_and_long_ones_of_many_heads_go_round(caplog):
    row = 131_072 * 2  # bytes of one entry of all its tokens in bfloat16
    dispatch.say_once.cache_clear()  # plans of other tests may have said the same
    with caplog.at_level(logging.INFO):
        assert choose(None, gathered=row * 8 * 256, lanes=8) == GatherKeys()
        assert choose(None, gathered=row * 20 * 512, lanes=8) == RingKeys()
        assert choose(GatherKeys(512), gathered=row * 20 * 512, lanes=8) == GatherKeys(512)
    assert "512.0 MiB a device, at most 1024" in caplog.text
    assert "2560.0 MiB a device, above 1024" in caplog.text
    assert "mosaic and cudnn mask by the index in whole rows" in caplog.text


def test_a_choice_is_a_value_that_survives_json_and_has_parts_to_set():
    rules = Rules(keys=RingKeys(256))
    assert values.from_json(values.to_json(rules)) == rules
    assert values.override(rules, "keys.tile=128").keys == RingKeys(128)


def trace(call):
    mesh = sharding.make_mesh(MESHES["context 8"])

    def run(tokens_BT, *rest):
        with sharding.use(mesh, Rules()):
            return call(tokens_BT, *rest)

    return lambda *shapes: jax.eval_shape(run, *(jnp.zeros(s, jnp.int32) for s in shapes))


def forward(tokens_BT, **rest):
    cfg = config.tiny()
    params = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        transformer.specs(cfg),
        is_leaf=lambda s: hasattr(s, "axes"),
    )
    return transformer.forward(params, tokens_BT, cfg=cfg, **rest)


def test_what_cannot_be_split_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"row of 24 tokens .* 16 chunks.* use rows of 32"):
        trace(forward)((2, 24))
    with pytest.raises(ValueError, match=r"positions without segments .* rules.seq=\(\)"):
        trace(lambda tokens, at: forward(tokens, positions_BT=at))((2, 32), (2, 32))
    whole = jnp.zeros((2, 32, 2, 16))
    with pytest.raises(ValueError, match=r"impl='mosaic' is for whole rows, .* 'tiles'"):
        trace(lambda _: context_parallel.spread_rows(whole, whole, whole, impl="mosaic"))((2, 32))


def test_hosts_among_which_the_devices_of_a_row_are_count_by_the_mesh():
    class Device:
        def __init__(self, host):
            self.process_index = host

    class TwoHosts:
        def __init__(self):
            sizes = (1, 2, 1, 4, 1)
            self.axis_names, self.shape = (
                sharding.AXES,
                dict(zip(sharding.AXES, sizes, strict=True)),
            )
            self.devices = np.array([Device(n // 4) for n in range(8)]).reshape(sizes)

    assert sharding._hosts_of_a_row(TwoHosts(), Rules()) == 1
    assert sharding._hosts_of_a_row(TwoHosts(), Rules(batch=("data",), seq=("fsdp",))) == 2


def test_flat_tokens_stay_where_they_are_and_come_back():
    mesh = sharding.make_mesh(MeshShape(1, fsdp=2, context=4))
    x_BT = np.arange(4 * 23, dtype=np.float32).reshape(4, 23)  # MTP has T - 1 places

    @jax.jit
    def run(x_BT):
        with sharding.use(mesh, Rules()):
            x_M = sharding.flat(x_BT)
            return x_M, sharding.unflat(x_M, x_BT.shape)

    rows = sharding.NamedSharding(mesh, Rules().spec(("batch", "seq")))
    compiled = run.lower(jax.ShapeDtypeStruct((4, 24), jnp.float32, sharding=rows)).compile()
    for op in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collectives(compiled.as_text(), op) == []
    flat, back = run(x_BT)
    assert flat.shape == (4 * 24,)
    assert_array_equal(back, x_BT)


def test_whole_documents_and_latent_heads_give_one_devices_loss_and_gradient():
    cfg = dataclasses.replace(
        config.tiny(),
        n_dense=1,
        n_moe=0,
        mixer=config.Mla(heads=2, q_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8),
        impl=config.Impl(grouped_matmul="reference"),
    )
    params = params_lib.init(transformer.specs(cfg), jax.random.key(0))
    weights = Weights(jnp.float32(0.3), jnp.float32(1e-2))
    whole_rows = packed_batch(rows=4, length=32)
    whole_rows = whole_rows.replace(
        segments_BT=np.ones_like(whole_rows.segments_BT),
        positions_BT=np.tile(np.arange(32, dtype=np.int32), (4, 1)),
        mask_BT=np.ones_like(whole_rows.mask_BT),
    )

    def on(mesh):
        def run(params, batch):
            with sharding.use(mesh, Rules(keys=RingKeys(4))):
                return gradients(params, batch, weights, cfg=cfg, packed=False)

        return jax.device_get(jax.jit(run)(params, whole_rows))

    grads, out = on(sharding.make_mesh(MeshShape(1, fsdp=2, context=4)))
    alone_grads, alone = on(None)
    assert_array_equal(out.load_LE, alone.load_LE)
    assert alone.load_LE.sum() == 4 * 31 * cfg.moe.top_k  # MTP's T - 1 places, no more
    for part in alone.parts:
        assert_allclose(out.parts[part], alone.parts[part], rtol=1e-5, err_msg=part)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(alone_grads), strict=True):
        assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=1e-5)
