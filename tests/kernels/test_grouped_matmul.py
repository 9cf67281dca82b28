"""Grouped matmul: every implementation equals a loop over groups, forward and backward, at any
group sizes.

The Pallas kernel for Hopper runs here in an interpreter and is lowered for CUDA; on a GPU, for
real. The one for TPU runs in an interpreter, and test_grouped_matmul_tpu.py compiles it.
"""

import functools
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from glm45_jax.kernels import grouped_matmul as op
from glm45_jax.kernels import grouped_matmul_gpu as gpu
from glm45_jax.kernels import grouped_matmul_tpu as tpu
from glm45_jax.kernels.shapes import GROUPED

SMALL = [name for name, shape in GROUPED.items() if shape.small]
# Those that run anywhere.
NAMES = [i.name for i in op.IMPLS if i.name not in ("mosaic", "mosaic_tpu")]
# Rows of each of eight groups, of 272 rows: none, one, just under and over a tile, rows past the
# last group.
RAGGED = {
    "mixed": [0, 1, 127, 0, 129, 7, 8, 0],
    "short": [1, 2, 3, 4, 5, 63, 64, 65],
    "one takes all": [0, 0, 0, 0, 0, 272, 0, 0],
    "none": [0] * 8,
    "ends early": [34, 0, 0, 30, 0, 0, 0, 3],
}


WIDTHS = [(512, 256, 32), (1408, 4096, 6), (128, 128, 3)]  # D, F, E


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    busy = int(shape.R * shape.skew)
    sizes = np.bincount(rng.integers(0, shape.E, shape.R - busy), minlength=shape.E)
    sizes[shape.E // 2] += busy
    x = rng.normal(size=(shape.R, shape.D)).astype(np.float32)
    w = rng.normal(size=(shape.E, shape.D, shape.F)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes, jnp.int32)


def by_hand(x, w, sizes):
    edges = np.cumsum([0, *sizes])
    parts = [x[a:b] @ w[e] for e, (a, b) in enumerate(itertools.pairwise(edges))]
    return np.concatenate([*parts, np.zeros((len(x) - edges[-1], w.shape[2]))])


def gradient_by_hand(x, g, sizes):
    edges = np.cumsum([0, *sizes])
    return np.stack([x[a:b].T @ g[a:b] for a, b in itertools.pairwise(edges)])


def draw_half(sizes, D=192, F=320, R=272, seed=0):
    """x, w, sizes and a cotangent in bfloat16, and the three products by hand in float64."""
    rng = np.random.default_rng(seed)
    shapes = (R, D), (len(sizes), D, F), (R, F)
    x, w, g = (jnp.asarray(rng.normal(size=s).astype(np.float32), jnp.bfloat16) for s in shapes)
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, g))
    y, dx = by_hand(x64, w64, sizes), by_hand(g64, w64.swapaxes(1, 2), sizes)
    return (x, w, jnp.asarray(sizes, jnp.int32), g), (y, dx, gradient_by_hand(x64, g64, sizes))


def assert_rounded_once(ours, exact):
    """bfloat16 of the exact result: one rounding of 2^-9, float32 sums of some hundred terms."""
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=2**-8)


@functools.partial(jax.jit, static_argnames="impl")
def both_ways(x, w, sizes, cotangent, impl):
    out, pull = jax.vjp(lambda x, w: op.grouped_matmul(x, w, sizes, impl=impl), x, w)
    return out, pull(cotangent)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("impl", NAMES)
def test_every_implementation_equals_a_loop_over_groups(name, impl):
    x, w, sizes = draw(GROUPED[name])
    cotangent = jax.random.normal(jax.random.key(1), (x.shape[0], w.shape[2]))
    out, (dx, dw) = both_ways(x, w, sizes, cotangent, impl)
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, cotangent))
    np.testing.assert_allclose(out, by_hand(x64, w64, sizes), atol=2e-5)
    np.testing.assert_allclose(dx, by_hand(g64, w64.swapaxes(1, 2), sizes), atol=2e-5)
    np.testing.assert_allclose(dw, gradient_by_hand(x64, g64, sizes), atol=5e-5)


@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("impl", NAMES)
def test_rows_past_the_last_group_give_zeros_and_get_none(sizes, impl):
    (x, w, sizes, g), exact = draw_half(sizes, D=16, F=24)
    out, (dx, dw) = both_ways(x, w, sizes, g, impl)
    assert_rounded_once((out, dx, dw), exact)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    st.lists(st.integers(0, 200), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
)
def test_blocks_hold_every_row_once_and_each_block_one_expert(sizes):
    n, block = sum(sizes), 64
    layout = op.lay_out(jnp.asarray(sizes, jnp.int32), n_rows=n, block=block)
    held = np.asarray(layout.row_PQ)
    assert sorted(held[held < n].tolist()) == list(range(n))
    np.testing.assert_array_equal(held.reshape(-1)[np.asarray(layout.slot_R)], np.arange(n))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for rows, expert in zip(held, np.asarray(layout.expert_P), strict=True):
        assert set(owner[rows[rows < n]]) <= {int(expert)}


def test_products_in_bfloat16_accumulate_in_float32():
    x, w, sizes = draw(GROUPED["tiny"])
    half = jnp.bfloat16
    for impl in NAMES:
        out = op.grouped_matmul(x.astype(half), w.astype(half), sizes, impl=impl)
        assert out.dtype == half
        exact = by_hand(
            np.asarray(x.astype(half), np.float64), np.asarray(w.astype(half), np.float64), sizes
        )
        np.testing.assert_allclose(
            np.asarray(out, np.float64), exact, rtol=2**-8, atol=2**-8
        )  # one bf16 rounding


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.lists(st.integers(0, 400), min_size=1, max_size=8),
    st.integers(0, 300).map(lambda n: n * 8),
    st.sampled_from([gpu.HALF, gpu.ROWS]),
)
def test_tiles_hold_every_row_of_one_group_each(sizes, past, height):
    n = sum(sizes) + past
    tiles = gpu.lay_tiles(jnp.asarray(sizes, jnp.int32), n_rows=n, rows=height)
    tiles = jax.tree.map(np.asarray, tiles)
    total, edges = tiles.next_P[-1], np.cumsum([0, *sizes, past])
    assert total == sum(-(-rows // height) for rows in (*sizes, past)) <= len(tiles.next_P)
    np.testing.assert_array_equal(tiles.end_E, edges[1:-1])
    for p in range(total):
        expert = tiles.expert_P[p]
        assert (tiles.start_P[p], tiles.end_P[p]) == (edges[expert], edges[expert + 1])
        rows = edges[expert + 1] - edges[expert]
        assert tiles.next_P[p] - tiles.first_P[p] == -(-rows // height)
        assert tiles.first_P[p] <= p < tiles.next_P[p]


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.lists(st.integers(0, 400), min_size=1, max_size=8),
    st.integers(0, 300).map(lambda n: n * 8),
    st.integers(1, 5),
    st.integers(1, 9),
)
def test_turns_meet_every_row_and_column_and_load_all_ctas_alike(sizes, past, n_tiles, ctas):
    n, edges = sum(sizes) + past, np.cumsum([0, *sizes, past])
    hypothesis.assume(n)
    tiles = gpu.lay_tiles(jnp.asarray(sizes, jnp.int32), n_rows=n)
    turns = gpu.lay_turns(tiles, n_rows=n, n_tiles=n_tiles, ctas=ctas)
    *columns, ends_CN = map(np.asarray, turns.table)
    met, kinds = np.zeros((n, n_tiles), int), np.zeros((ctas, 2), int)
    for cta, turn in ((c, j) for c in range(ctas) for j in range(ends_CN[c, -1])):
        group, row, left, tile = (x.reshape(ctas, -1)[cta, turn] for x in columns)
        assert (edges[group] <= row) and row + left == edges[group + 1] and left > 0
        height = gpu.HALF if left <= gpu.HALF else gpu.ROWS
        met[row : min(row + height, row + left), tile] += 1
        kinds[cta, int(height == gpu.HALF and group < len(sizes))] += 1
    assert met.min() >= 1
    whole = sum(-(-rows // gpu.ROWS) for rows in (*sizes, past))
    half = sum(0 < rows % gpu.ROWS <= gpu.HALF for rows in sizes)
    np.testing.assert_array_equal(kinds.sum(axis=0), [(whole - half) * n_tiles, half * n_tiles])
    assert np.ptp(kinds, axis=0).max() <= 1
    assert np.ptp(kinds.sum(axis=1)) <= 1  # who has one whole tile more has no half one more


def test_the_mosaic_kernel_says_what_it_cannot_take():
    (x, w, sizes, _), _ = draw_half(RAGGED["mixed"])
    assert gpu.refuses(x, w, sizes) is None
    assert "bfloat16" in gpu.refuses(x.astype(jnp.float32), w, sizes)
    assert "multiples of 64" in gpu.refuses(x[:, :136], w[:, :136], sizes)
    assert "from 128 on" in gpu.refuses(x[:, :64], w[:, :64], sizes)
    assert "multiple of 8" in gpu.refuses(x[:100], w, sizes)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match=r"compute capability 9\.0; this is cpu"):
            op.grouped_matmul(x, w, sizes, impl="mosaic")


@pytest.mark.parametrize("rows", [gpu.HALF, gpu.ROWS])
@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
def test_the_mosaic_kernel_equals_a_loop_over_groups_in_the_interpreter(sizes, rows, monkeypatch):
    # Not shown here but by the gpu tests: two views of the same bytes, TMA past an edge.
    interpret = plgpu.InterpretGPUParams()
    monkeypatch.setattr(gpu, "tile_rows", lambda n_rows, groups: rows)
    (x, w, sizes, g), exact = draw_half(sizes, D=128, F=64 if rows == gpu.ROWS else 128)
    out, pull = jax.vjp(lambda x, w: gpu.grouped_matmul(x, w, sizes, interpret=interpret), x, w)
    assert_rounded_once((out, *pull(g)), exact)


def silu_by_hand(z, u, cotangent):
    """silu(z) * u and its gradients in float64."""
    s = (1 + np.tanh(z / 2)) / 2
    return z * s * u, cotangent * u * s * (1 + z * (1 - s)), cotangent * z * s


def draw_gated(sizes, D, F, R=272, seed=0):
    """Arguments of `gated_matmul`, a cotangent, and the value and gradients by hand in float64, of
    gate's and up's products rounded to bfloat16.
    """
    (x, gate, sizes, g), (gated, *_) = draw_half(sizes, D, F, R, seed)
    (_, up, *_), _ = draw_half(sizes, D, F, R, seed + 1)
    gate, gated = 16 * gate, 16 * gated  # exp of their sums is no float32
    x64, gate64, up64, g64 = (np.asarray(a, np.float64) for a in (x, gate, up, g))
    z, u = (
        np.asarray(a, jnp.bfloat16).astype(np.float64) for a in (gated, by_hand(x64, up64, sizes))
    )
    h, dz, du = silu_by_hand(z, u, g64)
    dx = by_hand(dz, gate64.swapaxes(1, 2), sizes) + by_hand(du, up64.swapaxes(1, 2), sizes)
    dw = (gradient_by_hand(x64, d, sizes) for d in (dz, du))
    return (x, gate, up, sizes, g), (h, dx, *dw)


def gated_both_ways(run, x, gate, up, sizes, g):
    out, pull = jax.vjp(lambda *some: run(*some, sizes), x, gate, up)
    return out, *pull(g)


@pytest.mark.parametrize("impl", NAMES)
def test_a_gated_product_is_two_products_and_silu(impl):
    args, exact = draw_gated(RAGGED["mixed"], 64, 32)
    run = functools.partial(op.gated_matmul, impl=impl)
    assert_near(gated_both_ways(run, *args), exact)


@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
def test_the_fused_gated_product_equals_two_and_silu_in_the_interpreter(sizes):
    args, exact = draw_gated(sizes, D=128, F=192)
    run = functools.partial(gpu.gated_matmul, interpret=plgpu.InterpretGPUParams())
    ours = gated_both_ways(run, *args)
    assert_near(ours, exact)
    np.testing.assert_array_equal(run(*args[:4]), ours[0])  # alone it keeps less, not other bits


@hypothesis.settings(max_examples=4)
@hypothesis.given(st.lists(st.integers(0, 200), min_size=8, max_size=8), st.integers(0, 9))
def test_the_kernels_for_hopper_take_any_sizes_of_groups(sizes, seed):
    interpret = plgpu.InterpretGPUParams()
    (x, gate, up, sizes, g), exact = draw_gated(clip(sizes, 272), D=128, F=128, seed=seed)
    run = functools.partial(gpu.gated_matmul, interpret=interpret)
    assert_near(gated_both_ways(run, x, gate, up, sizes, g), exact)
    ours = by_plans(x, gate, sizes, g, gpu.plan_for(128), interpret)
    w64, g64 = np.asarray(gate, np.float64), np.asarray(g, np.float64)
    y, dx = by_hand(np.asarray(x, np.float64), w64, sizes), by_hand(g64, w64.swapaxes(1, 2), sizes)
    assert_near(ours, (y, dx, gradient_by_hand(np.asarray(x, np.float64), g64, sizes)))


def test_the_fused_gated_product_says_what_it_cannot_take():
    (x, gate, up, sizes, _), _ = draw_gated(RAGGED["mixed"], 128, 128)
    assert gpu.refuses_gated(x, gate, up, sizes) is None
    assert "bfloat16" in gpu.refuses_gated(x, gate, up.astype(jnp.float32), sizes)
    assert "tiles of 64" in gpu.refuses_gated(x[:64], gate, up, sizes)


@pytest.mark.parametrize(
    "impl, R, kernels",
    [
        ("auto", 4096, {"rows_by_gate_and_up"}),
        ("mosaic", 4096, {"rows_by_gate_and_up"}),
        ("blocked", 4096, set()),
        ("auto", 128, {"rows_by_matrix"}),  # decoding: tiles of 64 rows
        ("auto", 4092, set()),
    ],
)
def test_gate_and_up_are_one_kernel_where_rows_fill_its_tiles(impl, R, kernels, on_hopper):
    of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    args = of((R, 256)), of((8, 256, 128)), of((8, 256, 128)), of((8,), dtype=jnp.int32)
    run = jax.jit(functools.partial(op.gated_matmul, impl=impl))
    text = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"@(rows_by_\w+)\(", text)) == kernels


def by_plans(x, w, sizes, g, plan, interpret=None):
    """The three products, each by this plan."""
    tiles = gpu.lay_tiles(sizes, n_rows=len(x), rows=gpu.ROWS)
    run = functools.partial(gpu.rows_by_matrix, plan=plan, interpret=interpret)
    dw = gpu.rows_by_rows(x, g, tiles, plan=plan, interpret=interpret)
    return run(x, w, tiles), run(g, w, tiles, transposed=True), dw


@pytest.mark.parametrize(
    "overlap, sizes",
    [(0, "mixed"), (2, "mixed"), (4, "mixed"), (4, "short"), (2, "none"), (4, "ends early")],
)
def test_a_tile_may_be_stored_over_any_steps_of_the_next_in_the_interpreter(overlap, sizes):
    args, exact = draw_half(RAGGED[sizes], D=192, F=256)
    plan = gpu.Plan(256, 4, overlap)
    assert_rounded_once(by_plans(*args, plan, plgpu.InterpretGPUParams()), exact)


@pytest.mark.parametrize("M, I, O", [(1, 1024, 192), (72, 512, 256)])
def test_few_rows_and_one_matrix_are_a_product_in_the_interpreter(M, I, O):
    (x, w, *_), (exact, *_) = draw_half([M], I, O, R=M)
    ours = gpu.few_rows(x, w[0], interpret=plgpu.InterpretGPUParams())
    assert_rounded_once([ours], [exact])
    if O == 192:  # and float32, which is not rounded
        run = functools.partial(gpu.few_rows, interpret=plgpu.InterpretGPUParams())
        np.testing.assert_allclose(run(x, w[0], dtype=jnp.float32), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["whole steps", "air gate", "air down"])
def test_the_mosaic_kernel_lowers_for_cuda_inside_shard_map(name):
    shape, half = GROUPED[name], jnp.bfloat16
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.P("data"), jax.P()

    def both(x, w, sizes, g):
        out, pull = jax.vjp(lambda x, w: gpu.grouped_matmul(x, w, sizes[0]), x, w)
        dx, dw = pull(g)
        return out, dx, jax.lax.psum(dw, "data")

    f = jax.shard_map(
        both,
        mesh=mesh,
        in_specs=(rows, whole, rows, rows),
        out_specs=(rows, rows, whole),
        check_vma=False,
    )
    shapes = ((2 * shape.R, shape.D), (shape.E, shape.D, shape.F), (2, shape.E))
    x, w, sizes = (
        jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, (half, half, jnp.int32), strict=True)
    )
    g = jax.ShapeDtypeStruct((2 * shape.R, shape.F), half)
    text = jax.jit(f).trace(x, w, sizes, g).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 3


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    st.lists(st.integers(0, 300), min_size=8, max_size=8),
    st.sampled_from([16, 128, 1024]),
    st.booleans(),
)
def test_visits_meet_every_row_once_and_load_no_tile_twice(sizes, height, every_group):
    sizes, n = clip(sizes, 1000), 1000
    visits = lay_visits(jnp.asarray(sizes, jnp.int32), n, height, every_group)
    table = {k: np.asarray(x).tolist() for k, x in vars(visits).items() if k != "count"}
    assert visits.count <= len(table["group_V"])
    rows = zip(*(x[: int(visits.count)] for x in table.values()), strict=True)
    met = [dict(zip(table, row, strict=True)) for row in rows]
    seen = [(v["group_V"], v["tile_V"] * height + r) for v in met for r in within(v)]
    owned = sizes if every_group else [*sizes, n - sum(sizes)]
    assert seen == list(zip(np.repeat(np.arange(len(owned)), owned), range(len(seen)), strict=True))
    groups = [[*vs] for _, vs in itertools.groupby(met, key=lambda v: v["group_V"])]
    wanted = [e for e, rows in enumerate(owned) if rows or every_group]
    assert [vs[0]["group_V"] for vs in groups] == wanted
    for vs in groups:
        assert [v["first_V"] for v in vs] == [1] + [0] * (len(vs) - 1)
        assert [v["last_V"] for v in vs] == [0] * (len(vs) - 1) + [1]
    loads = [tile for tile, _ in itertools.groupby(v["load_V"] for v in met)]
    assert loads == list(range(max(-(-sum(sizes) // height), 1)))
    real = [e for e, rows in enumerate(sizes) if rows]
    follows = dict(itertools.pairwise([*real, -1]))
    for v in met:
        if (e := v["group_V"]) in follows:
            assert (v["next_V"], v["slot_V"]) == (follows[e], real.index(e) % 2)


def clip(sizes, n):
    """The sizes, cut where they pass n in all."""
    return np.clip(n - np.cumsum([0, *sizes[:-1]]), 0, sizes).tolist()


def within(visit):
    return range(visit["low_V"], visit["high_V"])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def lay_visits(sizes, n, height, every_group):
    return tpu.lay_visits(sizes, n_rows=n, height=height, every_group=every_group)


def test_the_tpu_kernel_says_what_it_cannot_take():
    (x, w, sizes, _), _ = draw_half(RAGGED["mixed"], D=128, F=256)
    refuses = functools.partial(tpu.refuses, chip=tpu.V5P)
    assert refuses(x, w, sizes) is None
    assert "bfloat16" in refuses(x.astype(jnp.float32), w, sizes)
    assert "multiple of 128" in refuses(x[:, :64], w[:, :64], sizes)
    assert "no row" in refuses(x[:0], w, sizes)
    huge = jax.ShapeDtypeStruct((8, 2**17, 2**14), jnp.bfloat16)
    assert "MiB of VMEM" in refuses(jax.ShapeDtypeStruct((272, 2**17), x.dtype), huge, sizes)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="needs a TPU; this is cpu"):
            op.grouped_matmul(x, w, sizes, impl="mosaic_tpu")


@functools.cache
def in_tpu_interpreter(heights, cores):
    """Values and gradients, compiled once for all sizes."""
    # Two cores work on a grid's tiles of columns, and buffers hold NaN until they are written.
    interpret = pltpu.InterpretParams(num_cores_or_threads=cores, uninitialized_memory="nan")
    chip = tpu.Chip(cores, 2**26, heights)
    run = functools.partial(tpu.grouped_matmul, chip=chip, interpret=interpret)

    @jax.jit
    def both(x, w, sizes, g):
        out, pull = jax.vjp(lambda x, w: run(x, w, sizes), x, w)
        return out, *pull(g)

    return both


# Tiles of 128 rows cut groups; one of all rows has blocks of 256 and of 128.
@pytest.mark.parametrize("heights, cores", [((128,), 1), ((1024,), 2)])
def test_the_tpu_kernel_equals_a_loop_over_groups_in_the_interpreter(heights, cores):
    for sizes in RAGGED.values():
        (x, w, sizes, g), exact = draw_half(sizes, D=128, F=384)  # 384: tiles of 256 and 128
        n = int(sizes.sum())
        x, g = x.at[n:].set(jnp.nan), g.at[n:].set(jnp.nan)  # no row past the last group counts
        assert_rounded_once(in_tpu_interpreter(heights, cores)(x, w, sizes, g), exact)


@hypothesis.settings(max_examples=6)
@hypothesis.given(st.lists(st.integers(0, 90), min_size=8, max_size=8), st.integers(0, 9))
def test_the_tpu_kernel_takes_any_sizes_of_groups(sizes, seed):
    args, exact = draw_half(clip(sizes, 272), D=128, F=384, seed=seed)
    assert_rounded_once(in_tpu_interpreter((128,), 1)(*args), exact)


@pytest.mark.parametrize("name", SMALL)
def test_the_tpu_kernel_takes_the_shapes_table_in_the_interpreter(name):
    # Widths that Mosaic would refuse: the laws hold for them too.
    shape = GROUPED[name]
    sizes = np.asarray(draw(shape)[2]).tolist()
    args, exact = draw_half(sizes, shape.D, shape.F, R=shape.R)
    assert_rounded_once(in_tpu_interpreter((128,), 1)(*args), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
def test_the_mosaic_kernel_equals_a_loop_over_groups_on_a_gpu(sizes):
    (x, w, sizes, g), exact = draw_half(sizes)
    n = int(sizes.sum())
    x, g = x.at[n:].set(jnp.nan), g.at[n:].set(jnp.nan)  # no row past the last group counts
    out, (dx, dw) = both_ways(x, w, sizes, g, "mosaic")
    assert_rounded_once((out, dx, dw), exact)


def draw_widths(D, F, E, by=draw_half):
    """What `draw_half` or `draw_gated` draws, at the widths of a model."""
    shares = np.random.default_rng(F).dirichlet(np.ones(E))
    return by(np.random.default_rng(D).multinomial(4000, shares), D, F, R=4096)


def assert_near(ours, exact):
    """Relative to the norm, within one rounding to bfloat16."""
    for a, right in zip(ours, exact, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - right)
        assert error <= 2**-8 * np.linalg.norm(right)


@pytest.mark.gpu
@pytest.mark.parametrize("D, F, E", WIDTHS)
def test_the_mosaic_kernel_equals_a_loop_over_groups_at_model_widths(D, F, E):
    args, exact = draw_widths(D, F, E)
    out, (dx, dw) = both_ways(*args, "mosaic")
    assert_near((out, dx, dw), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("D, F, E", WIDTHS)
@pytest.mark.parametrize("overlap", [0, 1, 8])
def test_a_tile_may_be_stored_over_any_steps_of_the_next_at_model_widths(D, F, E, overlap):
    args, exact = draw_widths(D, F, E)
    assert_near(by_plans(*args, gpu.Plan(128, 6, overlap)), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("D, F, E", WIDTHS)
def test_the_fused_gated_product_equals_two_and_silu_three_times_at_model_widths(D, F, E):
    args, exact = draw_widths(D, F, E, draw_gated)
    runs = [gated_both_ways(gpu.gated_matmul, *args) for _ in range(3)]
    assert_near(runs[0], exact)
    for a, *others in zip(*runs, strict=True):
        for b in others:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.gpu
@pytest.mark.parametrize("R", [8, 512])
def test_decoding_rows_equal_a_loop_over_groups_at_model_widths(R):
    rng = np.random.default_rng(R)
    (x, w, sizes, g), exact = draw_half(rng.multinomial(R, [1 / 32] * 32), 1408, 512, R=R)
    out, (dx, dw) = both_ways(x, w, sizes, g, "mosaic")
    assert_rounded_once((out, dx, dw), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("M, I, O", [(1, 4096, 1024), (64, 1408, 4096), (130, 1024, 192)])
def test_few_rows_and_one_matrix_are_a_product_on_a_gpu(M, I, O):
    (x, w, *_), (exact, *_) = draw_half([M], I, O, R=M)
    for dtype, size in ((jnp.bfloat16, 2**-8), (jnp.float32, 1e-5)):
        error = np.asarray(gpu.few_rows(x, w[0], dtype=dtype), np.float64) - exact
        assert np.linalg.norm(error) / np.linalg.norm(exact) < size


@pytest.mark.gpu
def test_the_mosaic_kernel_gives_the_same_bits_every_time():
    (x, w, sizes, g), _ = draw_half([700, 0, 65, 1, 1282, 2000, 3, 0], 512, 768, R=4096)
    runs = [jax.tree.leaves(both_ways(x, w, sizes, g, "mosaic")) for _ in range(3)]
    for again in runs[1:]:
        for a, b in zip(runs[0], again, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.gpu
def test_implementations_agree_on_a_gpu_in_bfloat16():
    x, w, sizes = draw(GROUPED["whole steps"])
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    cotangent = jax.random.normal(jax.random.key(1), (x.shape[0], w.shape[2]), jnp.bfloat16)
    names = [i.name for i in op.IMPLS if i.supports(x, w, sizes) is None]
    first, *others = (jax.tree.leaves(both_ways(x, w, sizes, cotangent, n)) for n in names)
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
            assert jnp.linalg.norm((ours - theirs).ravel()) / jnp.linalg.norm(theirs.ravel()) < 1e-2


@pytest.mark.parametrize("dtype, rtol", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_a_product_with_silu_is_rounded_once_forward_and_backward(dtype, rtol):
    rng = np.random.default_rng(0)
    g, u, h = (jnp.asarray(4 * rng.normal(size=(64, 33)), dtype) for _ in range(3))
    g = g.at[0, :4].set(jnp.asarray([-300, -90, 90, 300], dtype))  # exp of the first is no float32
    out, pull = jax.vjp(op.silu_product, g, u)
    g64, u64, h64 = (np.asarray(a, np.float64) for a in (g, u, h))
    exact = silu_by_hand(g64, u64, h64)
    for ours, right in zip((out, *pull(h)), exact, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), right, rtol=rtol, atol=1e-6)
