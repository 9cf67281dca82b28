"""Decode attention: every implementation that runs here equals the definition, and the definition
keeps its laws.

The Pallas kernels for Hopper run here in an interpreter and are lowered for CUDA; on a GPU, for
real. The one for TPU runs in an interpreter, and test_attention_tpu.py compiles it.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax import sharding
from glm45_jax.kernels import decode_attention as op
from glm45_jax.kernels import decode_attention_gpu as gpu
from glm45_jax.kernels import decode_attention_tpu as tpu
from glm45_jax.kernels.shapes import DECODE, DecodeShape

SMALL = [name for name, shape in DECODE.items() if shape.small]
FP8 = jnp.float8_e4m3fn
LAYER = 1  # of two


def draw(shape, starts, *, skip=0, dtype=jnp.float32, seed=0):
    """Queries and pages in random order; entries of the table past a row's last key are no page."""
    width = shape.S // shape.page
    pages = shape.B * width + 1
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (shape.B, shape.T, shape.N, shape.H)).astype(dtype)
    size = (2, pages, shape.page, shape.K, shape.H)
    k, v = (jax.random.normal(key, size).astype(FP8 if shape.fp8 else dtype) for key in keys[1:])
    table = np.random.default_rng(seed).permutation(pages)[: shape.B * width]
    table = table.reshape(shape.B, width).astype(np.int32)
    for row, start in zip(table, starts, strict=True):
        row[-(-max(0, start + shape.T) // shape.page) :] = pages
    where = dict(
        layer=jnp.int32(LAYER),
        table_BP=jnp.asarray(table),
        start_B=jnp.asarray(starts, jnp.int32),
        skip=skip,
    )
    return (q, k, v), where


def starts_of(shape, seed=0):
    """Rows that are full, have one token, and lie between."""
    some = np.random.default_rng(seed).integers(0, shape.S - shape.T, shape.B)
    some[0], some[-1] = shape.S - shape.T, 0
    return some.tolist()


def by_hand(q, k, v, *, layer, table_BP, start_B, skip=0):
    """float64, one query at a time; zeros where it sees no key."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        at = np.arange(skip, int(start_B[b]) + t + 1)
        if not at.size:
            continue
        page, slot = np.asarray(table_BP)[b, at // k.shape[2]], at % k.shape[2]
        kv = n // (N // k.shape[3])
        score = k[layer, page, slot, kv] @ q[b, t, n] / np.sqrt(H)
        weight = np.exp(score - score.max())
        out[b, t, n] = weight @ v[layer, page, slot, kv] / weight.sum()
    return out


def check_half(shape, starts, attention, skip=0):
    """The output in bfloat16 is near float64's, relative to each row's size, and 0 without keys."""
    args, where = draw(shape, starts, skip=skip, dtype=jnp.bfloat16)
    found = np.asarray(attention(*args, **where).astype(jnp.float32))
    exact = by_hand(*args, **where)
    for ours, theirs in zip(found, exact, strict=True):
        gap = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-9)
        assert gap < 4e-3, gap  # bfloat16 weights and results: 2e-3 to 3e-3
    return found


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("impl", [i.name for i in op.IMPLS])
def test_every_implementation_equals_a_query_at_a_time(name, impl, skip):
    shape = DECODE[name]
    args, where = draw(shape, starts_of(shape), skip=skip)
    chosen = next(i for i in op.IMPLS if i.name == impl)
    if why := chosen.supports(*args, **where):
        with pytest.raises(ValueError, match="impl='auto' picks for you"):
            op.decode_attention(*args, **where, impl=impl)
        assert impl in why
        return
    out = op.decode_attention(*args, **where, impl=impl)
    assert np.isfinite(np.asarray(out)).all()
    exact = by_hand(*args, **where)
    sees = np.asarray(where["start_B"])[:, None] + np.arange(shape.T) >= skip
    np.testing.assert_allclose(np.asarray(out)[sees], exact[sees], atol=2e-6)


def test_where_a_page_lies_does_not_matter():
    shape = DECODE["tiny drafts"]
    (q, k, v), where = draw(shape, starts_of(shape))
    order = np.random.default_rng(3).permutation(k.shape[1])
    back = np.append(np.argsort(order), k.shape[1]).astype(np.int32)  # and the id that is no page
    moved = where | {"table_BP": jnp.asarray(back)[where["table_BP"]]}
    np.testing.assert_array_equal(
        op.decode_attention(q, k[:, order], v[:, order], **moved),
        op.decode_attention(q, k, v, **where),
    )


def test_new_tokens_at_once_equal_one_at_a_time():
    shape = DECODE["tiny drafts"]
    (q, k, v), where = draw(shape, starts_of(shape))
    whole = op.decode_attention(q, k, v, **where)
    for t in range(shape.T):
        one = op.decode_attention(
            q[:, t : t + 1], k, v, **(where | {"start_B": where["start_B"] + t})
        )
        np.testing.assert_allclose(one[:, 0], whole[:, t], atol=1e-6)


def test_keys_after_a_query_or_of_another_layer_or_skipped_do_not_change_it():
    shape = DECODE["tiny drafts"]
    (q, k, v), where = draw(shape, [9, 9, 9], skip=1)
    before = op.decode_attention(q, k, v, **where)
    row = np.asarray(where["table_BP"])[0]
    for at in (0, 11):  # the skipped one, and one after the first two queries
        k = k.at[LAYER, row[at // 4], at % 4].add(7.0)
    k, v = k.at[1 - LAYER].set(5.0), v.at[1 - LAYER].set(5.0)
    after = op.decode_attention(q, k, v, **where)
    np.testing.assert_array_equal(after[:, :2], before[:, :2])
    assert (np.abs(np.asarray(after - before))[0, 2:].max(axis=-1) > 1e-3).all()


def test_a_latent_serves_as_key_and_value():
    B, T, N, R, Z = 2, 3, 5, 6, 10
    rotated = jax.random.normal(jax.random.key(0), (2, 7, 4, 1, R))
    latent = jax.random.normal(jax.random.key(1), (2, 7, 4, 1, Z))
    q = jax.random.normal(jax.random.key(2), (B, T, N, Z + R))
    table = jnp.asarray([[3, 1, 5], [0, 6, 2]], jnp.int32)
    where = dict(layer=LAYER, table_BP=table, start_B=jnp.asarray([8, 2], jnp.int32))
    out = op.decode_attention(q, rotated, latent, **where, latent=True)
    # Values padded to the width of keys: the pad comes out as zeros.
    pages = jnp.concatenate([latent, rotated], axis=-1), jnp.pad(latent, ((0, 0),) * 4 + ((0, R),))
    np.testing.assert_allclose(out, by_hand(q, *pages, **where)[..., :Z], atol=2e-6)


def interpreted(edges):
    tuning = gpu.Tuning(edges=edges, interpret=True)
    return functools.partial(gpu.paged_attention, tuning=tuning)


def test_the_hopper_kernel_interpreted_equals_the_definition_and_knows_no_other_row():
    shape, attention = DECODE["three steps"], interpreted((0, 64, 144))
    found = check_half(shape, [143, 70], attention, skip=1)
    beside_idle = check_half(shape, [143, -1], attention, skip=1)
    np.testing.assert_array_equal(found[0], beside_idle[0])


def test_the_hopper_kernel_interpreted_reads_8_bits_and_drafts():
    check_half(DECODE["three steps of drafts fp8"], [156, 62], interpreted((0, 128, 160)))


def test_a_longer_table_changes_no_split_of_a_row():
    for pairs in (8, 64, 512):
        longest = gpu.edges(40_000, pairs)
        assert longest[0] == 0
        assert longest[-1] == 40_000
        assert all(b - a <= 4096 and a % 128 == 0 for a, b in itertools.pairwise(longest))
        for capacity in (16, 512, 1040, 9000):
            some = gpu.edges(capacity, pairs)
            assert some == (*(e for e in longest if e < capacity), capacity)


@pytest.mark.parametrize("name", ["air 8k", "mini 2k drafts fp8"])
def test_the_hopper_kernel_lowers_for_cuda(name):
    shape, room = DECODE[name], jax.ShapeDtypeStruct
    width = shape.S // shape.page
    q = room((shape.B, shape.T, shape.N, shape.H), jnp.bfloat16)
    size = (2, shape.B * width, shape.page, shape.K, shape.H)
    pages = room(size, FP8 if shape.fp8 else jnp.bfloat16)
    assert op._mosaic_refuses(q, pages, pages, False) is None

    def run(q, k, v, layer, table, start):
        return op._mosaic(q, k, v, layer=layer, table_BP=table, start_B=start, skip=1)

    where = (room((), jnp.int32), room((shape.B, width), jnp.int32), room((shape.B,), jnp.int32))
    text = jax.jit(run).trace(q, pages, pages, *where).lower(lowering_platforms=("cuda",))
    assert text.as_text().count("mosaic_gpu") >= 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(page=8), "pages of 16, 32 or 64 tokens, not 8"),
        (dict(H=96), "heads 64 or 128 wide"),
        (dict(N=40, K=2, T=4), "up to 64 queries of a kv head .* not 80"),
        (dict(latent=True), "latents are both at once"),
        (dict(dtype=jnp.float32), "queries in bfloat16, not float32"),
    ],
    ids=str,
)
def test_the_hopper_kernel_says_what_it_does_not_take(change, why):
    latent, dtype = change.pop("latent", False), change.pop("dtype", jnp.bfloat16)
    shape = dataclasses.replace(DecodeShape(2, 1, 4, 2, 64, 64), **change)
    args, _ = draw(shape, [5, 5], dtype=dtype)
    with pytest.raises(ValueError, match=why):
        raise ValueError(op._mosaic_refuses(*args, latent))


def test_on_a_mesh_each_device_runs_its_own_rows_and_heads_over_all_pages(monkeypatch):
    seen = []

    def spy(q, k, v, **where):
        seen.append((q.shape, k.shape, where["table_BP"].shape, where["start_B"].shape))
        return op.reference(q, k, v, **where)

    monkeypatch.setattr(gpu, "paged_attention", spy)
    shape = dataclasses.replace(DECODE["tiny drafts"], B=4)
    args, where = draw(shape, [3, 20, 0, 7], skip=1)
    alone = op.reference(*args, **where)
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, tensor=2))
    run = functools.partial(op._mosaic, skip=where.pop("skip"))
    with sharding.use(mesh, sharding.Rules()):
        out = jax.jit(run)(*args, **where)
    np.testing.assert_allclose(out, alone, atol=1e-6)
    assert seen == [((1, 4, 3, 16), (2, 25, 4, 1, 16), (1, 6), (1,))]


def interpreted_tpu(columns, **kwargs):
    tuning = tpu.Tuning(columns=columns, interpret=True)
    return functools.partial(tpu.paged_attention, tuning=tuning, **kwargs)


def test_the_tpu_kernel_interpreted_equals_the_definition_and_knows_no_other_row():
    shape, attention = DECODE["three steps"], interpreted_tpu(64)
    found = check_half(shape, [143, 70], attention, skip=1)
    beside_idle = check_half(shape, [143, -1], attention, skip=1)
    np.testing.assert_array_equal(found[0], beside_idle[0])


def test_the_tpu_kernel_interpreted_reads_8_bits_drafts_and_several_heads():
    check_half(DECODE["three steps of drafts fp8"], [156, 62], interpreted_tpu(128))


def test_the_tpu_kernel_interpreted_takes_latents():
    B, T, N, R, Z = 3, 2, 5, 64, 128
    keys = jax.random.split(jax.random.key(0), 3)
    rotated, latent = (
        jax.random.normal(key, (2, 13, 8, 1, width), jnp.bfloat16)
        for key, width in zip(keys, (R, Z), strict=False)
    )
    q = jax.random.normal(keys[2], (B, T, N, Z + R), jnp.bfloat16)
    table = jnp.asarray([[3, 1, 5, 12], [0, 6, 2, 4], [8, 9, 10, 11]], jnp.int32)
    where = dict(layer=LAYER, table_BP=table, start_B=jnp.asarray([29, 2, 13], jnp.int32))
    found = interpreted_tpu(16)(q, rotated, latent, **where, latent=True)
    exact = op.reference(
        *(x.astype(jnp.float32) for x in (q, rotated, latent)), **where, latent=True
    )
    gap = jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert gap < 4e-3


@pytest.mark.parametrize("skip", [0, 1])
def test_the_list_has_each_block_of_each_row_once_and_a_row_without_keys_has_one(skip):
    keys, T, capacity = 8, 3, 40
    start_B = np.random.default_rng(0).integers(-4, capacity - T + 1, 40).astype(np.int32)
    code_CP, count = tpu.blocks(jnp.asarray(start_B), T, keys, capacity, skip, 2)
    found = []
    for code_P in np.asarray(code_CP):
        live_P = code_P[(code_P & tpu.LIVE) != 0]
        assert len(live_P) <= count
        found += live_P.tolist()
        rest_P = code_P[len(live_P) :]
        assert (rest_P >> tpu.BLOCK_SHIFT == live_P[-1] >> tpu.BLOCK_SHIFT).all()
        assert not (rest_P & (tpu.FIRST | tpu.LAST)).any()
    held_B = np.maximum(start_B + T, 1)
    expected = [(b, i) for b, held in enumerate(held_B) for i in range(-(-held // keys))]
    assert [(tpu._row(code), tpu._block(code)) for code in found] == expected
    for code, (b, i) in zip(found, expected, strict=True):
        assert bool(code & tpu.FIRST) == (i == 0)
        assert bool(code & tpu.LAST) == (i == -(-held_B[b] // keys) - 1)
        whole = (i + 1) * keys <= start_B[b] + 1 and not (skip and i == 0)
        assert bool(code & tpu.EDGE) == (not whole)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(H=64), "whole vectors of 128 lanes, not .64, 64.: XLA"),
        (dict(page=4, K=1), "multiple of 8 keys x heads, not 4 x 1 = 4"),
        (dict(N=256, T=4), "up to 512 queries a row .* not 1024"),
        (dict(S=2**24), "up to 131072 pages, not 2097152; use larger pages"),
        (dict(dtype=jnp.float32), "queries in bfloat16, not float32"),
    ],
    ids=str,
)
def test_the_tpu_kernel_says_what_it_does_not_take(change, why):
    dtype = change.pop("dtype", jnp.bfloat16)
    shape, room = (
        dataclasses.replace(DecodeShape(2, 1, 4, 2, 128, 64), **change),
        jax.ShapeDtypeStruct,
    )
    q = room((shape.B, shape.T, shape.N, shape.H), dtype)
    pages = room((2, 8, shape.page, shape.K, shape.H), jnp.bfloat16)
    table = room((shape.B, shape.S // shape.page), jnp.int32)
    found = tpu.refuses(q, pages, pages, table, latent=False)
    assert re.search(why, found), found


def test_on_a_mesh_the_one_head_of_latents_is_everywhere_and_queries_split(monkeypatch):
    seen = []

    def spy(q, k, v, **where):
        seen.append((q.shape, k.shape, v.shape))
        return op.reference(q, k, v, **where)

    monkeypatch.setattr(tpu, "paged_attention", spy)
    rotated, latent = (jax.random.normal(jax.random.key(i), (2, 9, 4, 1, 6 + i)) for i in range(2))
    q = jax.random.normal(jax.random.key(2), (4, 1, 6, 13))
    table = jnp.arange(8, dtype=jnp.int32).reshape(4, 2)
    where = dict(layer=jnp.int32(1), table_BP=table, start_B=jnp.asarray([3, 6, 0, 7], jnp.int32))
    alone = op.reference(q, rotated, latent, **where, latent=True)
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, tensor=2))
    with sharding.use(mesh, sharding.Rules()):
        out = jax.jit(functools.partial(op._mosaic_tpu, latent=True))(q, rotated, latent, **where)
    np.testing.assert_allclose(out, alone, atol=1e-6)
    assert seen == [((1, 1, 3, 13), (2, 9, 4, 1, 6), (2, 9, 4, 1, 7))]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "skip"),
    [
        (DecodeShape(5, 1, 12, 1, 128, 2048), 0),
        (DecodeShape(4, 3, 16, 4, 64, 1024, page=64, fp8=True), 1),
        (DecodeShape(3, 4, 32, 2, 128, 4096, page=32), 1),
        (DecodeShape(70, 2, 4, 4, 128, 512, fp8=True), 0),
    ],
    ids=str,
)
def test_mosaic_equals_the_definition_and_itself(shape, skip):
    starts = starts_of(shape)
    starts[1] = -shape.T  # idle
    attention = functools.partial(op.decode_attention, impl="mosaic")
    found = check_half(shape, starts, attention, skip)
    for _ in range(2):
        np.testing.assert_array_equal(check_half(shape, starts, attention, skip), found)
