"""The backward pass in one kernel for Hopper: gradients equal the definition's, in an interpreter
and on a GPU, and every block of the grid adds to dq in its turn.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.kernels import attention_fused_gpu as fused
from glm45_jax.kernels import attention_gpu as gpu
from glm45_jax.kernels import attention_walk_gpu as walking
from glm45_jax.kernels.shapes import AttentionShape
from tests.kernels.test_attention import ON_GPU, check_half, segments

ENDS = (70, 128, 150, 260)  # inside a tile, at its end, and two inside one


def tuning(H, **changes):
    return dataclasses.replace(walking.tuning_of(H, H), fused=True, **changes)


def documents(T):
    return jnp.asarray(np.searchsorted(ENDS, np.arange(T), side="right")[None], jnp.int32)


def check_interpreted(H, T, packed, **changes):
    shape = AttentionShape(B=1, T=T, N=4, K=2, H=H)
    sizes = tuning(H, **{"sms": 2, "interpret": True} | changes)
    attention = functools.partial(gpu.flash_attention, tuning=sizes)
    check_half(shape, documents(T) if packed else None, attention)


@pytest.mark.parametrize(
    ("H", "T", "packed", "sizes"),
    [
        (128, 300, True, {}),
        (128, 300, False, {}),
        (128, 90, False, {}),
        (64, 300, True, {}),
        (128, 300, True, dict(stages_fused=3, parts_fused=1)),
        (128, 500, False, dict(sms=1)),  # the second tile of four and the last walk up
        (64, 300, False, dict(sms=6)),  # both kv heads at once
    ],
)
def test_one_kernel_interpreted_equals_the_definition(H, T, packed, sizes):
    check_interpreted(H, T, packed, **sizes)


def test_heads_of_128_take_one_kernel():
    def text(H, segment):
        q, k = (jax.ShapeDtypeStruct((1, 256, heads, H), jnp.bfloat16) for heads in (4, 2))
        flash = functools.partial(
            gpu.flash_attention,
            segments_BT=segment,
            tuning=dataclasses.replace(walking.tuning_of(H, H), interpret=True),
        )
        run = lambda q, k, v: jax.vjp(flash, q, k, v)[1](q)  # noqa: E731
        return str(jax.make_jaxpr(run)(q, k, k))

    one = "name=gradients"
    assert one in text(128, None) and one in text(128, documents(256))
    assert one not in text(64, None)


def places(tile, tiles, upward):
    """Tiles of queries in the order of a block's walk, one head a kv head."""
    block = fused._Block(None, None, None, None, 1, 128, 128, (0, 0, tile), (tile, tiles), upward)
    return np.asarray(block.place(jnp.arange(tiles - tile))[1])


@pytest.mark.parametrize("tile", [0, 3, 6, 7])
def test_a_block_walks_over_its_queries_once_either_way(tile):
    down, up = (places(tile, 8, upward) for upward in (None, True))
    assert down.tolist() == list(range(7, tile - 1, -1))
    assert up.tolist() == [*range(tile + 1, 8), tile]  # what is masked comes last
    np.testing.assert_array_equal(places(tile, 8, False), down)


def played(heads, tiles, sms, up):
    """A device that gives each block that ends the next one: ticks until all have ended, and how
    many tiles of queries are at work in a tick, in the mean. Adding in turn is waited for.
    """
    lanes = fused.heads_at_once(heads, tiles, sms)
    at = [
        [w, t, lane] for w in range(heads // lanes) for t in range(tiles) for lane in range(lanes)
    ]
    waves, tile, lane = np.asarray(at).T
    upward = np.asarray(fused.walks_up(waves, tile, tiles, sms)) & up
    todo = iter(zip(waves * lanes + lane, tile, upward, strict=True))
    turns, work, seen, ticks = np.zeros((heads, tiles), int), [], 0, 0
    while True:
        while len(work) < sms and (block := next(todo, None)):
            work.append((*block[:2], iter(places(block[1], tiles, block[2]).tolist())))
            work[-1] = [*work[-1], next(work[-1][2])]
        if not work:
            return ticks, seen / ticks
        seen, ticks = seen + len({(head, here) for head, _, _, here in work}), ticks + 1
        for block in work:
            head, own, walk, here = block
            if turns[head, here] == own:
                turns[head, here] += 1
                block[3] = next(walk, None)
        work = [block for block in work if block[3] is not None]


@pytest.mark.parametrize(("heads", "tiles"), [(3, 64), (16, 8)])
def test_blocks_stay_side_by_side_and_none_waits_for_ever(heads, tiles):
    sms, work = 33, heads * tiles * (tiles + 1) / 2
    ticks, apart = played(heads, tiles, sms, True)
    ticks_down, apart_down = played(heads, tiles, sms, False)
    assert ticks <= ticks_down <= work / sms + 1
    assert apart < 0.6 * apart_down


@pytest.mark.parametrize("many", [64, 128])
def test_the_turn_of_a_tile_is_the_number_of_tiles_before_it_that_add(many):
    rng, T, tile = np.random.default_rng(0), 1024, 128
    rows = [np.repeat(np.arange(T), rng.integers(1, most, T))[:T] for most in (5, 90, 300, 900)]
    rows = np.stack([np.zeros(T, int), *rows, np.arange(T) // tile, np.arange(T) // (tile + 1)])
    bounds = walking.bounds(jnp.asarray(rows, jnp.int32))
    begin_BT, end_BT = np.asarray(bounds.begin_BT), np.asarray(bounds.end_BT)
    for begin_T, end_T in zip(begin_BT, end_BT, strict=True):
        low = np.arange(T // tile) * (tile // many)  # what `_Block` walks over
        high = -(-end_T[tile - 1 :: tile] // many)
        for block in range(T // many):
            adds = [j for j in range(T // tile) if low[j] <= block < high[j]]
            seen = (begin_T[block * many] // tile, ((block + 1) * many - 1) // tile)
            assert adds == list(range(seen[0], seen[1] + 1))  # none is missed
            begin = jnp.int32(begin_T[block * many])
            turns = fused.turn(begin, jnp.asarray(adds, jnp.int32))
            np.testing.assert_array_equal(turns, np.arange(len(adds)))


@pytest.mark.parametrize(
    ("H", "changes"), [(64, {}), (128, {}), (128, dict(stages_fused=3, parts_fused=1))]
)
def test_one_kernel_fits_a_block_of_hopper(H, changes):
    scratch = fused._scratch(tuning(H, **changes), 64 * 128 // H, H, jnp.bfloat16).values()
    sizes = [np.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in scratch if hasattr(x, "shape")]
    assert len(sizes) == 8
    assert sum(sizes) <= 226 * 1024  # barriers and what the compiler wants take one more


def test_wider_heads_are_refused():
    assert {sizes.fused for sizes in walking.WIDE.values()} == {False}
    x = jax.ShapeDtypeStruct((1, 128, 2, 192), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"64 or 128 wide, not \(192, 192\); fused=False"):
        jax.eval_shape(
            lambda q: jax.vjp(lambda q: gpu.flash_attention(q, q, q, tuning=tuning(128)), q)[1](q),
            x,
        )


@pytest.mark.parametrize("packed", [False, True])
def test_one_kernel_lowers_for_cuda_at_air_shapes(packed):
    q, k = (jax.ShapeDtypeStruct((8, 4095, heads, 128), jnp.bfloat16) for heads in (96, 8))
    segment = jax.ShapeDtypeStruct((8, 4095), jnp.int32)

    def loss(q, k, v, segment):
        at = segment if packed else None
        return (
            gpu.flash_attention(q, k, v, segments_BT=at, tuning=tuning(128))
            .astype(jnp.float32)
            .sum()
        )

    jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, segment).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*ON_GPU, AttentionShape(2, 2048, 96, 8, 128)], ids=str)
def test_one_kernel_equals_the_reference_and_itself_forward_and_backward(shape):
    attention = functools.partial(gpu.flash_attention, tuning=tuning(shape.H))
    check_half(shape, segments(shape), attention, repeats=3)
