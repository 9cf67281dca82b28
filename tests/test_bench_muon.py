"""The benchmark of Muon's update: the peer does the same work, bytes are those of the arrays."""

import math

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from experiments.bench import muon as bench
from glm45_jax import params as params_lib
from glm45_jax.model import config, transformer
from glm45_jax.params import ParamSpec

HEADS = {
    "experts": ParamSpec((2, 3, 8, 6), ("layers", "experts", "embed", "mlp")),
    "wo": ParamSpec((2, 3, 4, 8), ("layers", "heads", "head_dim", "embed"), fan_in=12),
    "join": ParamSpec((1, 2, 8, 8), ("layers", None, "embed", None), fan_in=16),
}


def test_optax_reads_every_weight_as_the_same_matrices():
    specs = HEADS | dict(params_lib.leaves_with_path(transformer.specs(config.tiny())))
    for name, spec in specs.items():
        if (told := bench.sides(spec)) is None:
            assert spec.kind != "matrix", name
            continue
        rows, columns = told
        assert [*range(spec.batch_dims), *rows, *columns] == list(range(len(spec.shape)))
        assert (
            math.prod(spec.shape[i] for i in rows),
            math.prod(spec.shape[i] for i in columns),
        ) == spec.matrix_shape[1:]


def test_the_first_step_of_the_peer_is_ours():
    """Later ones differ: optax corrects the bias of its momentum (tests/optim/test_muon.py)."""
    case = bench.Case("test", "", HEADS, jnp.float32)
    weights, grads = bench.draw(HEADS, 0), bench.draw(HEADS, 1)
    moved = []
    for chosen in (bench.ours(case, "float32"), bench.peer(case, "float32")):
        start, update = bench.jitted(case, chosen)
        after, _ = update(jax.tree.map(jnp.copy, weights), start(weights), grads)
        moved.append(jax.tree.map(jnp.subtract, after, weights))
    for name in HEADS:
        assert_allclose(*(m[name] for m in moved), atol=1e-7, err_msg=name)
        assert float(jnp.abs(moved[0][name]).max()) > 1e-6


@pytest.mark.parametrize("momentum", bench.MOMENTA)
def test_bytes_are_those_of_what_an_update_reads_and_writes(momentum):
    case = bench.tiny()[0]
    start, _ = bench.jitted(case, bench.ours(case, momentum))
    weights = params_lib.abstract(case.specs)
    held = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    untrained = sum(
        4 * s.size for _, s in params_lib.leaves_with_path(case.specs) if s.kind == "state"
    )
    states = held(jax.eval_shape(start, weights))
    expected = 3 * (held(weights) - untrained) + 2 * states
    assert case.nbytes(momentum) == pytest.approx(expected, abs=64)  # but for counters of steps


def test_a_run_of_the_small_experts_has_a_row_for_each_contender_and_momentum():
    saved = []
    bench.run(bench.tiny()[1:], bench.TINY_STACKS, None, saved.extend, small=True)
    alone = [("xla", None), ("gram", None)]
    forms = (f"{bench.OURS} xla", f"{bench.OURS} gram", bench.OPTAX)
    assert [(r["impl"], r["momentum"]) for r in saved] == alone + [
        (impl, m) for m in bench.MOMENTA for impl in forms
    ]
    assert 0 < saved[1]["err"] < saved[0]["err"] < 0.2  # of the float32 form, in bfloat16
    assert all(r["ms"] > 0 and "error" not in r for r in saved)
    assert len({tuple(r[k] for k in bench.IDENTITY) for r in saved}) == len(saved)
