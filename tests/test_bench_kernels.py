"""Benchmarks of kernels: contenders take turns in changing orders; a row for each, with an error or
with what was wrong.
"""

import collections
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import kernels as bench
from experiments.bench import kernels_attention as attention
from experiments.bench import kernels_routing as routing


def test_contenders_take_turns_in_orders_that_change():
    told = []
    made = {
        name: lambda name=name: bench.Contender(lambda: told.append(name), lambda _: None)
        for name in "abc"
    }
    made["broken"] = lambda: 1 / 0
    found = bench.race(made, samples=12)
    turns = [told[i] for i in range(6, len(told), bench.CALLS)]  # six calls warmed up
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 12 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    follows = collections.Counter(itertools.pairwise(turns))
    assert {a for a, b in follows if b == "a"} >= {"b", "c"}  # not always the same one before
    assert found["broken"] == {"error": "ZeroDivisionError: division by zero"}
    assert all(found[name]["ms_min"] <= found[name]["ms"] for name in "abc")


def test_output_and_gradients_of_a_function():
    out, (dx, dy) = bench.forward_and_backward(jnp.multiply)(2.0, 3.0, 5.0)
    assert (float(out), float(dx), float(dy)) == (6.0, 15.0, 10.0)


@pytest.mark.parametrize("case", [attention.Case(1, 96, 4, 2, 64, documents=3)], ids=str)
def test_attention_has_a_row_a_contender_with_its_error_or_why_not(case):
    rows = attention.measure(case, samples=1, skip=(), ceiling=1.0)
    assert [r["op"] for r in rows] == ["attention fwd"] * 2 + ["attention fwd+bwd"] * 2
    ours, theirs = rows[::2], rows[1::2]
    for r in ours:  # on a GPU it has an error of one rounding to bfloat16, as the reference has
        assert r["err"] < 2**-8 if "err" in r else "compute capability 9.0" in r["error"]
    assert all(r["impl"] == "reference" and r["err"] < 2**-8 for r in theirs)
    starts = np.flatnonzero(case.starts_BT[0]).tolist()
    lengths = np.diff([0, *starts, case.T])
    pairs = np.square(lengths).sum() / 2
    assert case.flops(backward=False) == 4 * pairs * case.N * case.H
    assert case.flops(backward=True) == 3.5 * case.flops(backward=False)


def test_routing_has_a_row_for_each_implementation_and_none_of_kernels_without_a_gpu():
    rows = routing.routing_rows(32, 16)
    assert {row["op"] for row in rows} == {"route"}
    assert {row["impl"] for row in rows if "same" in row} == {"counting", "reference"}
    assert all(row["same"] for row in rows if "same" in row)
    assert all(row["ms"] > 0 for row in rows)
