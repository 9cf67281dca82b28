"""Tables of sizes: kernels read what the tuner writes, and nothing else changes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import tune
from glm45_jax.kernels import (
    attention_gpu,
    decode_attention_gpu,
    fp8_matmul_gpu,
    grouped_matmul_gpu,
    newton_schulz,
    newton_schulz_gpu,
    tuning,
)
from glm45_jax.kernels.fp8 import to_fp8
from glm45_jax.kernels.grouped_matmul_gpu import Plan
from glm45_jax.kernels.shapes import ATTENTION, DECODE, GROUPED, NEWTON_SCHULZ

KINDS = {
    "rows_by_matrix": Plan,
    "rows_by_rows": Plan,
    "product": newton_schulz_gpu.Plan,
    "flash_attention": attention_gpu.Tuning,
    "paged_attention": decode_attention_gpu.Tuning,
    "fp8 matmul": fp8_matmul_gpu.Plan,
    "fp8 grouped_matmul": fp8_matmul_gpu.Plan,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.table.cache_clear()
    yield tmp_path
    tuning.table.cache_clear()


def row(op="product", sizes=None, **key):
    return {"op": op, "key": key, "sizes": sizes or {}, "ms": 1.0, "default_ms": 2.0}


def test_a_kernel_takes_the_sizes_of_exactly_its_shape_on_exactly_this_device(folder):
    here = jax.devices()[0].device_kind
    tune.keep(here, row(sizes={"columns": 128}, m=8, n=16))
    tune.keep(here, row(m=8, n=32))
    tune.keep("another device", row(sizes={"columns": 64}, m=1, n=1))
    own = Plan()
    assert tuning.tuned("product", own, n=16, m=8) == dataclasses.replace(own, columns=128)
    for op, key in (("product", {"m": 8, "n": 32}), ("product", {"m": 1, "n": 1}), ("rows", {})):
        assert tuning.tuned(op, own, **key) is own


def test_a_later_row_takes_the_place_of_an_older_one_and_lists_come_back_as_tuples(folder):
    here = jax.devices()[0].device_kind
    for number in (1, 2):
        tune.keep(here, row(sizes={"registers": [number, 240]}, T=4))
    assert [found["sizes"] for found in tuning.rows(here)] == [{"registers": [2, 240]}]
    found = tuning.tuned("product", attention_gpu.Tuning(), T=4)
    assert found.registers == (2, 240)


def test_a_size_that_no_kernel_has_is_said(folder):
    tune.keep(jax.devices()[0].device_kind, row(sizes={"wings": 2}, m=1))
    with pytest.raises(ValueError, match=r"wings.*tune it again"):
        tuning.tuned("product", Plan(), m=1)


def test_the_tables_that_are_kept_fit_the_kernels():
    for file in tuning.FOLDER.glob("*.json"):
        for found in json.loads(file.read_text())["rows"]:
            fields = {field.name for field in dataclasses.fields(KINDS[found["op"]])}
            assert found["sizes"].keys() <= fields, found
            assert found["ms"] <= found["default_ms"], found


def test_every_row_of_the_tuner_is_asked_for_by_a_kernel(monkeypatch):
    asked = []

    def tuned(op, default, **key):
        asked.append((op, key))
        return default

    for module in (
        *(attention_gpu, decode_attention_gpu, fp8_matmul_gpu),
        *(grouped_matmul_gpu, newton_schulz_gpu),
    ):
        monkeypatch.setattr(module, "tuned", tuned)
    jax.clear_caches()  # a kernel that was traced does not ask again
    half = jnp.bfloat16

    def of(*shape, dtype=half):
        return jax.ShapeDtypeStruct(shape, dtype)

    def both_ways(f, *args):
        out, back = jax.vjp(f, *args)
        return back(out)

    s, i32 = GROUPED["air gate"], jnp.int32
    wanted = [tune.by_matrix(s, False), tune.by_matrix(s, True), tune.by_rows(s)]
    wanted.append(tune.fp8_grouped(s))
    x, w, rows = of(s.R, s.D), of(s.E, s.D, s.F), of(s.E, dtype=i32)
    jax.eval_shape(
        lambda x, w, n: both_ways(lambda x, w: grouped_matmul_gpu.grouped_matmul(x, w, n), x, w),
        *(x, w, rows),
    )
    jax.eval_shape(fp8_matmul_gpu.grouped_matmul, x, jax.eval_shape(to_fp8, w), rows)

    wanted.append(tune.fp8(64, 4096, 12_288))
    jax.eval_shape(fp8_matmul_gpu.matmul, of(64, 4096), jax.eval_shape(to_fp8, of(4096, 12_288)))

    s = NEWTON_SCHULZ["air gate"]
    wanted += [tune.product(s, what) for what in ("inner", "polynomial", "into")]
    jax.eval_shape(lambda x: newton_schulz.mosaic(x, steps=5), of(s.B, s.m, s.n))

    s = ATTENTION["air 4k"]
    wanted.append(tune.attention(s))
    q, kv = of(s.B, s.T, s.N, s.H), of(s.B, s.T, s.K, s.H)
    jax.eval_shape(attention_gpu.flash_attention, q, kv, kv)

    for s in (DECODE["air 8k"], DECODE["air 8k drafts fp8"]):
        wanted.append(tune.decode(s))
        kv = of(1, 99, s.page, s.K, s.H, dtype=jnp.float8_e4m3fn if s.fp8 else half)
        where = {"layer": of(dtype=i32), "start_B": of(s.B, dtype=i32)}
        where["table_BP"] = of(s.B, s.S // s.page, dtype=i32)
        jax.eval_shape(
            decode_attention_gpu.paged_attention, of(s.B, s.T, s.N, s.H), kv, kv, **where
        )

    for case in wanted:
        assert (case.op, case.key) in asked, case.name
    assert {op for op, _ in asked} == KINDS.keys()


def test_the_fastest_that_is_right_wins_where_it_wins_by_more_than_noise():
    case = tune.by_rows(GROUPED["air gate"])
    sizes = {tune.OWN: case.own, "a": Plan(128, 6, 4), "b": Plan(256, 3, 2)}

    def chosen(**ms_and_err):
        found = {name: {"ms": ms, "err": err} for name, (ms, err) in ms_and_err.items()}
        return tune.case_row(case, sizes, found)

    own = (1.0, 0.0)
    assert chosen(own=own, a=(0.9, 0.0), b=(0.5, 0.5))["sizes"] == {"columns": 128, "stages": 6}
    assert chosen(own=own, a=(0.99, 0.0), b=(0.985, 0.0))["sizes"] == {}
    won = chosen(own=own, a=(2.0, 0.0), b=(0.7, 0.001))
    assert (won["sizes"], won["ms"], won["default_ms"]) == ({"stages": 3, "overlap": 2}, 0.7, 1.0)
    failed = {tune.OWN: {"error": "no room"}, "a": {"ms": 1.0, "err": 0.0}}
    with pytest.raises(RuntimeError, match="rows_by_rows D=4096 F=1408: no room"):
        tune.case_row(case, sizes, failed)


def test_a_difference_is_relative_to_the_largest_number_of_any_array():
    right = (jnp.asarray([1.0, -4.0]), jnp.asarray([100.0]))
    assert tune.difference(right, right) == 0
    assert tune.difference((right[0] + 1, right[1] + 1), right) == 0.25
