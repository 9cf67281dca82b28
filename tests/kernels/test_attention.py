"""Attention: every implementation that runs here equals the definition, and the definition keeps
its laws.

The Pallas kernels for Hopper run here in an interpreter and are lowered for CUDA; on a GPU, for
real. Those for TPU run in an interpreter, and test_attention_tpu.py compiles them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax import sharding
from glm45_jax.kernels import attention as op
from glm45_jax.kernels import attention_gpu as gpu
from glm45_jax.kernels import attention_tiles as tiles
from glm45_jax.kernels import attention_tpu as tpu
from glm45_jax.kernels import attention_walk_gpu as walking
from glm45_jax.kernels import dispatch
from glm45_jax.kernels.attention_tiles import tiled_attention
from glm45_jax.kernels.shapes import ATTENTION, AttentionShape

SMALL = [name for name, shape in ATTENTION.items() if shape.small]


def draw(shape, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (shape.B, shape.T, shape.N, shape.H))
    k = jax.random.normal(keys[1], (shape.B, shape.T, shape.K, shape.H))
    return q, k, jax.random.normal(keys[2], shape.values)


def segments(shape):
    row = np.arange(shape.T) // max(7, shape.T // 5) + 1
    return jnp.asarray(np.tile(row, (shape.B, 1)).astype(np.int32)) if shape.packed else None


def check_half(shape, segment, attention, repeats=1):
    """Output and gradients of `attention` in bfloat16 are near the float32 definition's and equal,
    bit for bit, in every repeat.
    """
    args = tuple(x.astype(jnp.bfloat16) for x in draw(shape))
    out = (*args[0].shape[:3], args[2].shape[-1])
    cotangent = jax.random.normal(jax.random.key(1), out, jnp.bfloat16)
    exact, pull = jax.vjp(
        functools.partial(op.reference, segments_BT=segment),
        *(x.astype(jnp.float32) for x in args),
    )

    @jax.jit
    def both(q, k, v, cotangent):
        out, pull = jax.vjp(functools.partial(attention, segments_BT=segment), q, k, v)
        return out, *pull(cotangent)

    found = both(*args, cotangent)
    for ours, theirs in zip(found, (exact, *pull(cotangent.astype(jnp.float32))), strict=True):
        theirs = np.asarray(theirs)
        gap = np.linalg.norm(np.asarray(ours, np.float32) - theirs) / np.linalg.norm(theirs)
        assert gap < 4e-3, gap  # bfloat16 operands and results: 2e-3 to 3e-3
    for _ in range(repeats - 1):
        for first, again in zip(found, both(*args, cotangent), strict=True):
            np.testing.assert_array_equal(first, again)


def check_interpreted(shape):
    """The kernels for Hopper, with sizes as on the device, on two multiprocessors."""
    sizes = walking.tuning_of(shape.H, shape.values[-1])
    tuning = dataclasses.replace(sizes, sms=2, interpret=True)
    check_half(shape, segments(shape), functools.partial(gpu.flash_attention, tuning=tuning))


def by_hand(q, k, v, segment):
    """float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    segment = None if segment is None else np.asarray(segment)
    B, T, N, H = q.shape
    out = np.zeros((B, T, N, v.shape[-1]))
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(t + 1) if segment is None or segment[b, s] == segment[b, t]]
        kv = n // (N // k.shape[2])
        score = k[b, seen, kv] @ q[b, t, n] / np.sqrt(H)
        weight = np.exp(score - score.max())
        out[b, t, n] = weight @ v[b, seen, kv] / weight.sum()
    return out


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("impl", [i.name for i in op.IMPLS])
def test_every_implementation_equals_a_query_at_a_time(name, impl):
    shape = ATTENTION[name]
    q, k, v = draw(shape)
    chosen = next(i for i in op.IMPLS if i.name == impl)
    if why := chosen.supports(q, k, v, segments_BT=segments(shape)):
        with pytest.raises(ValueError, match="impl='auto' picks for you"):
            op.attention(q, k, v, segments_BT=segments(shape), impl=impl)
        assert impl in why
        return
    out = op.attention(q, k, v, segments_BT=segments(shape), impl=impl)
    np.testing.assert_allclose(out, by_hand(q, k, v, segments(shape)), atol=2e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tile", [8, 16, 64])
def test_tiles_of_any_width_equal_the_definition_forward_and_backward(tile, packed):
    shape = AttentionShape(B=2, T=45, N=6, K=2, H=16, packed=packed)
    q, k, _ = draw(shape)
    v, cotangent = (
        jax.random.normal(jax.random.key(heads), (2, 45, heads, 24)) for heads in (2, 6)
    )

    def both(attention, q, k, v):
        out, pull = jax.vjp(functools.partial(attention, segments_BT=segments(shape)), q, k, v)
        return out, *pull(cotangent)

    found = jax.jit(functools.partial(both, functools.partial(tiled_attention, tile=tile)))(q, k, v)
    for ours, theirs in zip(found, both(op.reference, q, k, v), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_tiles_of_other_documents_are_not_visited():
    documents = jnp.asarray([[1] * 20 + [2] * 28])
    keys = tiles.Keys(None, None, jnp.arange(48))
    at_t = jnp.arange(40, 48)[None]
    first, stop = tiles._reach(at_t, tiles.begins(documents)[:, 40:], keys, 8)
    assert (int(first), int(stop)) == (2, 6)


def test_long_rows_go_by_tiles_and_short_ones_by_the_definition():
    def shapes_of(T):
        whole = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        text = jax.jit(op.attention).lower(whole, whole, whole).as_text()
        return f"x{T}x{T}x" in text

    assert shapes_of(1024)
    assert not shapes_of(2048)
    with pytest.raises(ValueError, match=r"tiles masks by index; .*auto"):
        q, k, v = draw(ATTENTION["tiny"])
        op.attention(q, k, v, positions_BT=jnp.zeros(q.shape[:2], jnp.int32), impl="tiles")


def test_future_keys_have_no_gradient():
    q, k, v = draw(ATTENTION["tiny"])
    grads = jax.grad(lambda k, v: op.attention(q, k, v)[:, :9].sum(), argnums=(0, 1))(k, v)
    for grad in grads:
        assert (np.asarray(grad[:, 9:]) == 0).all()
        assert (np.abs(np.asarray(grad[:, :9])).max(axis=(0, 2, 3)) > 0).any()


def test_a_kv_head_serves_its_group_in_repeat_interleave_order():
    q, k, v = draw(ATTENTION["tiny"])
    group = q.shape[2] // k.shape[2]
    whole = op.attention(q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2))
    np.testing.assert_allclose(op.attention(q, k, v), whole, atol=1e-6)


def test_one_document_by_segments_equals_no_segments():
    q, k, v = draw(ATTENTION["tiny"])
    ones = jnp.ones(q.shape[:2], jnp.int32)
    np.testing.assert_array_equal(op.attention(q, k, v, segments_BT=ones), op.attention(q, k, v))


HOPPER = ("two tiles packed", "a tile and one", "192 and 128 packed", "256 and one")


@pytest.mark.parametrize("name", HOPPER)
def test_the_hopper_kernels_interpreted_equal_the_definition_forward_and_backward(name):
    check_interpreted(ATTENTION[name])


@pytest.mark.slow  # the default suite has a pair of each kind; 10 s each
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("widths", list(walking.WIDE), ids=str)
def test_every_pair_of_wide_widths_interpreted_equals_the_definition(widths, packed):
    H, U = widths
    check_interpreted(AttentionShape(B=1, T=300, N=2, K=1, H=H, packed=packed, U=U))


def test_the_sizes_of_every_pair_of_widths_fit_a_block_of_hopper():
    for H, U in walking.WIDTHS:
        s, wide = walking.tuning_of(H, U), H > 128

        def ring(rows, stages, early, H=H, U=U):
            return rows * (stages * H + (early or stages) * U)

        forward = 128 * (s.stages_q * H + (64 if wide else U)) + ring(s.keys, s.stages, None)
        dq = 128 * (H + U + (0 if wide else H)) + ring(s.keys_dq, s.stages_dq, s.stages_early)
        dk = 128 * (H + U) + ring(s.queries, s.stages_dkv, s.stages_early)
        dv = 128 * (H + 64) + ring(s.queries, s.stages_dkv, None)
        assert 2 * (dv if s.apart else 0) <= 223 * 1024, (H, U)
        assert 2 * max(forward, dq, dk) <= 224 * 1024, (H, U)
        assert s.apart == wide


@pytest.mark.parametrize(
    "B, T, K, sms, together",
    [
        (1, 4096, 2, 132, 1),
        (3, 1024, 4, 132, 1),
        (8, 4096, 16, 132, 4),
        (2, 128, 16, 132, 1),
        (1, 384, 16, 5, 3),
    ],
)
def test_blocks_take_every_query_tile_once_and_about_as_many_keys_each(B, T, K, sms, together):
    walk = walking.Walk((B, T, 16, 128), K, sms, (2, 2), 128)
    assert walk.together == together
    most = -(-walk.pieces // walk.blocks)

    def pieces(sm):
        mine = jax.vmap(walk.place)(jnp.arange(most))
        return jnp.stack(mine), jnp.arange(most) < walk.mine()

    place, taken = jax.vmap(pieces, axis_name="sm")(jnp.arange(walk.blocks))
    place, taken = np.moveaxis(np.asarray(place), 1, -1), np.asarray(taken)
    tiles = T // 128
    found = np.ravel_multi_index(tuple(place[taken].T), (B, 16, tiles))
    np.testing.assert_array_equal(np.sort(found), np.arange(B * 16 * tiles))
    keys = np.where(taken, place[..., 2] + 1, 0).sum(axis=1)
    assert keys.max() <= 1.04 * keys.mean() + together


@pytest.mark.parametrize(
    ("H", "U", "why"),
    [
        (192, 128, None),
        (256, 256, None),
        (128, 128, None),
        (96, 96, "(256, 256) wide, not (96"),
        (128, 256, "not (128, 256)"),
    ],
)
def test_mosaic_says_which_widths_it_takes(H, U, why, on_hopper):
    q, v = (jax.ShapeDtypeStruct((1, 64, 2, width), jnp.bfloat16) for width in (H, U))
    found = op._mosaic_supports(q, q, v)
    assert found is None if why is None else why in found


@pytest.mark.parametrize("name", ["two tiles packed", "a tile and one"])
def test_the_tpu_kernels_interpreted_equal_the_definition_forward_and_backward(name):
    tuning = tpu.Tuning(queries=128, keys=128, interpret=True)
    shape = ATTENTION[name]
    check_half(shape, segments(shape), functools.partial(tpu.flash_attention, tuning=tuning))


def test_the_tpu_kernels_interpreted_take_keys_by_chunks_heads_by_parts_and_wider_values():
    tuning = tpu.Tuning(queries=128, keys=128, rows=256, rows_back=128, chunk=170, interpret=True)

    def attention(q, k, v, **masks):  # 128 + 256 lanes: a chunk is one tile of keys
        wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 64)))
        out = tpu.flash_attention(q, k, wide, tuning=tuning, **masks)
        np.testing.assert_equal(out.shape[-1], 192)
        return out[..., :128]

    shape = AttentionShape(B=2, T=300, N=4, K=1, H=128, packed=True)
    rows = jnp.stack([jnp.full(300, 1), jnp.arange(300) // 190]).astype(jnp.int32)
    check_half(shape, rows, attention)


@pytest.mark.parametrize("per", [None, 2])
@pytest.mark.parametrize("queries", [4, 8])
def test_the_list_has_each_pair_of_tiles_with_something_to_see_once_in_order(queries, per):
    T, keys = 48, 8
    lengths = np.random.default_rng(0).integers(1, 25, (30, T))
    rows = [np.repeat(np.arange(T), row)[:T] for row in lengths]
    begin_BT = tiles.begins(jnp.asarray(np.stack([np.zeros(T, int), *rows]), jnp.int32))
    grid = tpu._Tiles(T, queries, keys)
    code_CBP, count_C = tpu.pairs(grid, begin_BT[:, None], per)
    alone_C1P, alone_C = tpu.pairs(grid, None, per)
    np.testing.assert_array_equal(code_CBP[:, 0], alone_C1P[:, 0])  # the row of one document
    np.testing.assert_array_equal(count_C, alone_C)
    at = np.arange(T)
    for b, begin_T in enumerate(np.asarray(begin_BT)):
        seen_TS = (at[None] <= at[:, None]) & (at[None] >= begin_T[:, None])
        seen_IJ = seen_TS.reshape(T // queries, queries, T // keys, keys)
        some_IJ, all_IJ = seen_IJ.any(axis=(1, 3)), seen_IJ.all(axis=(1, 3))
        for c, code_BP in enumerate(np.asarray(code_CBP)):
            row = code_BP[b][(code_BP[b] & tpu.LIVE) != 0]
            found = list(zip(*(x.tolist() for x in tpu._places(row, grid)), strict=True))
            within = slice(c * per, (c + 1) * per) if per else slice(None)
            here_IJ = np.zeros_like(some_IJ)
            here_IJ[:, within] = some_IJ[:, within]
            expected = np.argwhere(here_IJ)
            assert found == [(i * queries, j * keys) for i, j in expected]
            for code, (i, j) in zip(row, expected, strict=True):
                row_J = np.flatnonzero(here_IJ[i])
                assert bool(code & tpu.FIRST) == (j == row_J[0])
                assert bool(code & tpu.LAST) == (j == row_J[-1])
                assert bool(code & tpu.EDGE) or all_IJ[i, j]
            rest = code_BP[b][len(row) :]  # nothing new to fetch
            assert (rest >> tpu.KEY_SHIFT == row[-1] >> tpu.KEY_SHIFT).all()
            assert not (rest & (tpu.FIRST | tpu.LAST)).any()


def test_the_tpu_kernels_say_what_they_do_not_take():
    def refuses(dtype=jnp.bfloat16, T=4096, H=128, U=128, rows=8):
        q, k, v = (jax.ShapeDtypeStruct((8, T, 4, width), dtype) for width in (H, H, U))
        return tpu.refuses(q, k, v, rows=rows)

    assert refuses() is None
    assert refuses(H=192) is None
    assert "takes bfloat16, not ['float32'" in refuses(dtype=jnp.float32)
    assert "not keys and values (96, 128)" in refuses(H=96)
    assert "131072 pairs of tiles, not the 131584 of 4 rows of 131072" in refuses(T=2**17, rows=4)


def test_bounds_are_those_of_the_run_of_equal_segments():
    row_BT = np.random.default_rng(0).integers(0, 3, (20, 40))
    found = gpu.bounds(jnp.asarray(row_BT, jnp.int32))
    begin_BT, end_BT = np.asarray(found.begin_BT), np.asarray(found.end_BT)
    for (b, t), segment in np.ndenumerate(row_BT):
        begin, end = begin_BT[b, t], end_BT[b, t]
        assert begin <= t < end
        assert (row_BT[b, begin:end] == segment).all()
        assert begin == 0 or row_BT[b, begin - 1] != segment
        assert end == 40 or row_BT[b, end] != segment


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_the_hopper_kernels_lower_for_cuda_at_air_shapes(packed, widths):
    sizes = ((96, widths[0]), (8, widths[0]), (8, widths[1]))
    q, k, v = (jax.ShapeDtypeStruct((8, 4095, *size), jnp.bfloat16) for size in sizes)
    segment = jax.ShapeDtypeStruct((8, 4095), jnp.int32)

    def loss(q, k, v, segment):
        out = gpu.flash_attention(q, k, v, segments_BT=segment if packed else None)
        return out.astype(jnp.float32).sum()

    jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, segment).lower(lowering_platforms=("cuda",))


def test_on_a_mesh_each_device_runs_its_own_rows_and_heads(monkeypatch):
    seen = []

    def spy(q, k, v, *, segments_BT):
        seen.append((q.shape, k.shape, segments_BT.shape))
        return op.reference(q, k, v, segments_BT=segments_BT)

    monkeypatch.setattr(gpu, "flash_attention", spy)
    shape = dataclasses.replace(ATTENTION["tiny packed"], B=4)
    q, k, v = draw(shape)
    alone = op.reference(q, k, v, segments_BT=segments(shape))
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, tensor=2))
    with sharding.use(mesh, sharding.Rules()):
        out = jax.jit(op._mosaic)(q, k, v, segments_BT=segments(shape))
    np.testing.assert_allclose(out, alone, atol=1e-6)
    assert seen == [((1, 24, 3, 16), (1, 24, 1, 16), (1, 24))]


@pytest.mark.parametrize(("there", "taken"), [(True, "_cudnn"), (False, "_mosaic")])
def test_mosaic_yields_to_cudnn_only_where_it_is_installed(there, taken, on_hopper, monkeypatch):
    monkeypatch.setattr(op, "_cudnn_there", lambda: there)
    q, k = (jax.ShapeDtypeStruct((1, 2048, heads, 64), jnp.bfloat16) for heads in (4, 2))
    assert dispatch.pick("attention", op.IMPLS, "auto", q, k, k).__name__ == taken
    # GLM's heads: mosaic is the faster one.
    for T in (4096, 32_768):
        q, k = (jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16) for heads in (96, 8))
        assert dispatch.pick("attention", op.IMPLS, "auto", q, k, k).__name__ == "_mosaic"
    # GLM-4.7-Flash's too; values of their own width cudnn does not take.
    q, v = (jax.ShapeDtypeStruct((1, 4096, 20, width), jnp.bfloat16) for width in (256, 128))
    at = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    for args, masks, name in (
        ((q, q, q), {}, "_mosaic"),
        ((q, q, v), {}, "_mosaic"),
        ((q, q, q), {"segments_BT": at}, "_mosaic"),
    ):
        assert dispatch.pick("attention", op.IMPLS, "auto", *args, **masks).__name__ == name


ON_GPU = (  # heads as wide as a tile, or half
    AttentionShape(2, 256, 6, 2, 64),
    AttentionShape(2, 1000, 24, 2, 128, packed=True),
    AttentionShape(1, 999, 4, 4, 128),
    AttentionShape(2, 777, 12, 1, 64, packed=True),
    AttentionShape(1, 64, 2, 2, 128),
)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        *ON_GPU,
        *(
            AttentionShape(2, 777, 6, 2, H, packed=packed, U=U)
            for H, U in walking.WIDE
            for packed in (False, True)
        ),
    ],
    ids=str,
)
def test_mosaic_equals_the_reference_and_itself_forward_and_backward(shape):
    attention = functools.partial(op.attention, impl="mosaic")
    check_half(shape, segments(shape), attention, repeats=3)


@pytest.mark.gpu
def test_auto_takes_mosaic_for_packed_rows():
    shape = AttentionShape(2, 384, 12, 1, 128, packed=True)
    q, k, v = (x.astype(jnp.bfloat16) for x in draw(shape))
    at = jnp.broadcast_to(jnp.arange(384)[None], (2, 384))
    given = dict(segments_BT=segments(shape), positions_BT=at, positions_BS=at)
    text = jax.jit(functools.partial(op.attention, **given)).lower(q, k, v).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.gpu
@pytest.mark.parametrize("T", [255, 256])
def test_cudnn_equals_the_reference_in_bfloat16_forward_and_backward(T):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, T, 8, 64), jnp.bfloat16)
    k, v = (jax.random.normal(key, (2, T, 2, 64), jnp.bfloat16) for key in keys[1:3])
    cotangent = jax.random.normal(keys[3], q.shape, jnp.bfloat16)
    exact, pull = jax.vjp(op.reference, *(x.astype(jnp.float32) for x in (q, k, v)))
    out, pull_out = jax.vjp(lambda q, k, v: op.attention(q, k, v, impl="cudnn"), q, k, v)
    pairs = [
        (out, exact),
        *zip(pull_out(cotangent), pull(cotangent.astype(jnp.float32)), strict=True),
    ]
    for ours, theirs in pairs:
        error = jnp.linalg.norm((ours.astype(jnp.float32) - theirs).ravel()) / jnp.linalg.norm(
            theirs.ravel()
        )
        assert error < 1e-2  # bf16 operands
