"""Laws of rounding at random: exact where it can be, a neighbour elsewhere, right in the mean, the
same bits on any mesh and without a word between devices.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from glm45_jax import params as params_lib
from glm45_jax import sharding
from glm45_jax.model import config, transformer
from glm45_jax.optim import rounding
from glm45_jax.optim.mixed import AdamW
from glm45_jax.optim.muon import Muon
from glm45_jax.params import ParamSpec

COLLECTIVE = re.compile(r"(all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)")
SPECS = {
    "experts": ParamSpec((3, 8, 16, 24), ("layers", "experts", "embed", "mlp")),
    "wq": ParamSpec((5, 16, 4, 6), ("layers", "embed", "heads", "head_dim"), fan_in=16),
    "head": ParamSpec((16, 64), ("embed", "vocab"), "embed"),
    "odd": ParamSpec((1, 16, 7), ("layers", "embed", "mlp")),
    "norm": ParamSpec((5, 16), ("layers", "embed"), "norm"),
}
BF16 = rounding.stored(SPECS, "bfloat16")


def every_bfloat16():
    bits = jnp.arange(2**16, dtype=jnp.uint32).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def between(seed, n):
    """Float32 numbers of many sizes, and the bfloat16 numbers on both sides of each."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=n) * 2.0 ** rng.integers(-30, 30, n)).astype(np.float32)
    low = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    high = ((x.view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(2**16)).view(np.float32)
    return x, low, high


@pytest.mark.parametrize("seed", range(3))
def test_what_bfloat16_holds_stays_and_what_is_not_finite_too(seed):
    x = every_bfloat16()
    out = rounding.rounded(x.astype(jnp.float32), jax.random.key(seed))
    assert out.dtype == jnp.bfloat16
    assert_array_equal(np.asarray(out, np.float32), np.asarray(x, np.float32))  # NaN for NaN


def test_a_number_becomes_one_of_its_neighbours():
    x, low, high = between(0, 50_000)
    out = np.asarray(rounding.rounded(jnp.asarray(x), jax.random.key(0)), np.float32)
    assert np.all((out == low) | (out == high))
    assert 0.45 < np.mean(out == high) < 0.55


def test_the_mean_over_keys_is_the_number():
    n = 4096
    x, low, high = between(1, 500)
    keys = jax.random.split(jax.random.key(0), n)
    up = jax.vmap(lambda key: rounding.rounded(jnp.asarray(x), key).astype(jnp.float32))(keys)
    share = np.mean(np.asarray(up) == high, axis=0)
    odds = (x.astype(np.float64) - low) / (high.astype(np.float64) - low)
    sigma = np.sqrt(odds * (1 - odds) / n) + 1e-12
    z = (share - odds) / sigma
    assert np.abs(z).max() < 5 and abs(z.mean()) < 5 / np.sqrt(len(z))
    assert 0.85 < z.std() < 1.15  # places and keys are independent


def test_steps_too_small_for_nearest_rounding_add_up():
    """1 + 2**-12 is 1 in bfloat16, whose next number is 1 + 2**-7."""
    weights = {"w": jnp.ones(4096, jnp.bfloat16)}
    updates = {"w": jnp.ones(4096, jnp.float32)}
    lr, steps = jnp.float32(2.0**-12), 2**12 // 4

    def one(weights, key):
        return rounding.moved(weights, updates, lr, key), None

    keys = jax.random.split(jax.random.key(0), steps)
    moved = np.asarray(jax.lax.scan(one, weights, keys)[0]["w"], np.float64)
    assert np.all(np.asarray(weights["w"] + lr.astype(jnp.bfloat16)) == 1)
    # A step is 2**-7 with the odds of 2**-5: after n of them the variance is n 2**-14 2**-5.
    sigma = np.sqrt(steps * 2.0**-19)
    assert abs(moved.mean() - 1.25) < 5 * sigma / np.sqrt(4096)
    assert 0.9 * sigma < moved.std() < 1.1 * sigma


def drawn(specs, seed):
    return params_lib.init(
        params_lib.tree_map(lambda s: dataclasses.replace(s, init=0.5), specs),
        jax.random.key(seed),
    )


def test_float32_weights_move_as_they_always_did():
    weights, updates = drawn(SPECS, 0), drawn(SPECS, 1)
    lr = jnp.float32(3e-3)
    moved = rounding.moved(weights, updates, lr, jax.random.key(0))
    for name, weight in weights.items():
        assert_array_equal(moved[name], weight + lr * updates[name])
    mixed = rounding.moved(drawn(BF16, 0), updates, lr, jax.random.key(0))
    assert_array_equal(mixed["norm"], moved["norm"])
    for name in ("experts", "wq", "head", "odd"):
        assert mixed[name].dtype == jnp.bfloat16


def test_an_update_of_zero_moves_nothing():
    weights = drawn(BF16, 0)
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape), weights)
    moved = rounding.moved(weights, zeros, jnp.float32(1.0), jax.random.key(0))
    jax.tree.map(assert_array_equal, moved, weights)


def test_leaves_and_keys_have_chances_of_their_own():
    twins = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16)}
    updates = {name: jnp.full(4096, 2.0**-8) for name in twins}  # even odds
    first = rounding.moved(twins, updates, jnp.float32(1.0), jax.random.key(0))
    second = rounding.moved(twins, updates, jnp.float32(1.0), jax.random.key(1))
    for x, y in ((first["a"], first["b"]), (first["a"], second["a"])):
        assert 0.45 < float(jnp.mean(x == y)) < 0.55
    one, update = ({"a": x["a"]} for x in (twins, updates))
    alone = rounding.moved(one, update, jnp.float32(1.0), jax.random.key(0))
    assert_array_equal(alone["a"], first["a"])  # a weight more changes no other


@pytest.mark.parametrize(
    "shape",
    [
        sharding.MeshShape(fsdp=8),
        sharding.MeshShape(fsdp=4, expert=2),
        sharding.MeshShape(data=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_a_mesh_changes_no_bit_and_devices_tell_each_other_nothing(shape):
    mesh, rules = sharding.make_mesh(shape), sharding.Rules()
    weights, updates, lr = drawn(BF16, 0), drawn(SPECS, 1), jnp.float32(1e-2)
    alone = jax.jit(rounding.moved)(weights, updates, lr, jax.random.key(0))
    layout = sharding.shardings(SPECS, mesh, rules)
    spread = jax.jit(rounding.moved, out_shardings=layout)
    args = (*jax.device_put((weights, updates), (layout, layout)), lr, jax.random.key(0))
    out = spread(*args)
    for name in SPECS:
        assert_array_equal(np.asarray(out[name]), np.asarray(alone[name]), err_msg=name)
        assert out[name].sharding == layout[name]
    compiled = spread.lower(*args).compile()
    assert not COLLECTIVE.findall(compiled.as_text())
    # Nor does a device draw numbers for the places of others.
    whole = sum(spec.size * 4 for spec in SPECS.values())
    assert compiled.memory_analysis().temp_size_in_bytes < whole


def test_matrices_and_embeddings_are_kept_in_bfloat16_and_the_rest_in_float32():
    specs = transformer.specs(config.tiny())
    for optim in (Muon(), AdamW()):
        assert optim.stored(specs) is specs
    kept = Muon(master_dtype="bfloat16").stored(specs)
    assert Muon(master_dtype="bfloat16").stored(kept) == kept
    for path, spec in params_lib.leaves_with_path(kept):
        low = spec.kind in ("matrix", "embed") and not path.endswith("router_DE")
        assert spec.dtype == (jnp.bfloat16 if low else jnp.float32), path
    rounding.check(kept, "bfloat16")
    rounding.check(specs, "float32")
    with pytest.raises(ValueError, match=r"optim\.stored\(specs\).*master_dtype=float32"):
        rounding.check(specs, "bfloat16")


def test_updates_do_not_depend_on_how_weights_are_kept_but_through_decay():
    grads = drawn(SPECS, 1)
    for optim in (Muon(dtype="float32", weight_decay=0.0), AdamW(weight_decay=0.0)):
        tx = optim.build(SPECS)
        updates = [
            tx.update(grads, tx.init(weights), weights)[0]
            for weights in (drawn(SPECS, 0), drawn(BF16, 0))
        ]
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-7), *updates)
