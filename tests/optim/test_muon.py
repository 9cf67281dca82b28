"""Laws of Muon: Moonlight's trajectories, stacks, transposes, orthogonality, layouts on a mesh."""

import collections
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from glm45_jax import sharding
from glm45_jax.optim import mixed
from glm45_jax.optim.muon import Muon, muon, newton_schulz, orthogonal, scale_by_muon
from glm45_jax.optim.schedules import Constant
from glm45_jax.params import ParamSpec, tree_map

# Fixed numbers of a public implementation (spec 2.7). If one of these tests fails, ask first
# which line of the update changed: the file is never refreshed from this code.
GOLDEN = Path(__file__).parents[1] / "golden" / "extra" / "muon.npz"


def matrix(*shape, fan_in=None, batch=0):
    axes = ("layers", "experts")[:batch] + (None,) * (len(shape) - batch)
    return ParamSpec(shape, axes, "matrix", fan_in)


SPECS = {
    "wide": matrix(8, 12),
    "tall": matrix(12, 8),
    "experts": matrix(2, 3, 8, 6, batch=2),
    "heads": matrix(2, 8, 3, 4, fan_in=8, batch=1),
    "out": matrix(2, 3, 4, 8, fan_in=12, batch=1),
    "embed": ParamSpec((16, 8), (None, None), "embed"),
    "norm": ParamSpec((2, 8), ("layers", None), "norm"),
    "bias": ParamSpec((2, 4), ("layers", None), "bias"),
    "router_bias": ParamSpec((2, 3), ("layers", None), "state"),
}


def draw(specs, seed, scale=1.0):
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return tree_map(lambda s: scale * jax.random.normal(next(keys), s.shape), specs)


def run(tx, weights, seeds, update=None):
    state, update = tx.init(weights), update or tx.update
    for seed in seeds:
        updates, state = update(draw(SPECS, seed), state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state


def golden_run(dtype):
    """Weights after each step of the golden trajectory, and the golden weights."""
    file = np.load(GOLDEN)
    lr, decay, momentum, steps, b1, b2, eps = file["hyper_lr_wd_momentum_nssteps_beta1_beta2_eps"]
    names = ("muon0", "muon1", "adamw0", "adamw1")
    kinds = ("matrix", "matrix", "norm", "embed")
    weights = {n: jnp.asarray(file[f"{n}_init"]) for n in names}
    specs = {
        n: ParamSpec(weights[n].shape, (None,) * weights[n].ndim, k)
        for n, k in zip(names, kinds, strict=True)
    }
    tx = muon(
        float(lr),
        momentum=float(momentum),
        steps=int(steps),
        rms=0.2,
        weight_decay=float(decay),
        specs=specs,
        dtype=dtype,
        adam_b1=float(b1),
        adam_b2=float(b2),
        adam_eps=float(eps),
    )
    state, update = tx.init(weights), jax.jit(tx.update)
    short = "f32" if dtype == jnp.float32 else "bf16"
    for t in range(1, 7):
        grads = {n: jnp.asarray(file[f"{n}_grad{t}"]) for n in names}
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        for n in names:
            key = f"traj_{short}_{n}_step{t}" if n.startswith("muon") else f"traj_{n}_step{t}"
            yield n, weights[n], file[key], float(lr)


def test_float32_trajectory_is_moonlights():
    for name, ours, theirs, _ in golden_run(jnp.float32):
        assert_allclose(ours, theirs, atol=1e-6, rtol=0, err_msg=name)


def test_bfloat16_trajectory_is_moonlights_within_bfloat16():
    for name, ours, theirs, lr in golden_run(jnp.bfloat16):
        # A step moves an entry by lr * 0.2 * sqrt(64) * x; bf16 earns 2e-2 of x a step, 6 steps.
        atol = 6 * 2e-2 * lr * 0.2 * 8 if name.startswith("muon") else 1e-6
        assert_allclose(ours, theirs, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize("i", range(4))
def test_newton_schulz_is_moonlights(i):
    file = np.load(GOLDEN)
    x = jnp.asarray(file[f"ns_in_{i}"])
    f32 = newton_schulz(x, dtype=jnp.float32)
    bf16 = newton_schulz(x, dtype=jnp.bfloat16)
    assert (f32.dtype, bf16.dtype) == (jnp.float32, jnp.bfloat16)
    assert_allclose(f32, file[f"ns_out_f32_{i}"], atol=2e-6, rtol=0)
    assert_allclose(bf16.astype(jnp.float32), file[f"ns_out_bf16_{i}"], atol=2e-2, rtol=0)


def test_a_stack_is_each_of_its_matrices_alone():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 6))
    stacked = newton_schulz(x, dtype=jnp.float32)
    for i, j in np.ndindex(2, 3):
        assert_allclose(stacked[i, j], newton_schulz(x[i, j], dtype=jnp.float32), atol=1e-6)


def test_heads_are_sides_of_one_matrix_not_matrices():
    spec = SPECS["heads"]
    x = jax.random.normal(jax.random.key(0), spec.shape)
    flat = newton_schulz(x.reshape(2, 8, 12), dtype=jnp.float32)
    assert_allclose(orthogonal(x, spec, dtype=jnp.float32), flat.reshape(spec.shape), atol=1e-7)


def test_transposing_the_input_transposes_the_result():
    x = jax.random.normal(jax.random.key(0), (5, 24, 9))
    there = newton_schulz(x, dtype=jnp.float32)
    assert_allclose(there, newton_schulz(x.mT, dtype=jnp.float32).mT, atol=1e-6)


# bfloat16 rounds each product to 2**-9 of it: the ends of the interval blur by about that much.
@pytest.mark.parametrize(("dtype", "slack"), [(jnp.float32, 0.0), (jnp.bfloat16, 0.02)])
def test_singular_values_come_to_lie_about_one(dtype, slack):
    x = jax.random.normal(jax.random.key(0), (4, 16, 40))
    y = np.asarray(newton_schulz(x, dtype=dtype).astype(jnp.float32))
    s = np.linalg.svd(y, compute_uv=False)
    assert s.min() >= 0.5 - slack
    assert s.max() <= 1.5 + slack


def test_singular_vectors_stay():
    x = np.random.default_rng(0).normal(size=(4, 16, 40)).astype(np.float32)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    y = np.asarray(newton_schulz(jnp.asarray(x), dtype=jnp.float32))
    in_basis = np.swapaxes(u, 1, 2) @ y @ np.swapaxes(vt, 1, 2)
    assert np.abs(in_basis - in_basis * np.eye(16)).max() < 1e-5


def test_scale_of_the_gradient_does_not_matter_but_its_sign_does():
    x = jax.random.normal(jax.random.key(0), (8, 12))
    y = newton_schulz(x, dtype=jnp.float32)
    assert_allclose(newton_schulz(1e3 * x, dtype=jnp.float32), y, atol=1e-5)
    assert_array_equal(newton_schulz(-x, dtype=jnp.float32), -y)


def test_zero_gradients_leave_only_weight_decay():
    weights, zeros = draw(SPECS, 0), jax.tree.map(jnp.zeros_like, draw(SPECS, 0))
    tx = muon(0.5, weight_decay=0.1, specs=SPECS)
    updates, _ = tx.update(zeros, tx.init(weights), weights)
    for name, u in updates.items():
        decay = 0.0 if name == "router_bias" else 0.05
        assert_allclose(u, -decay * weights[name], atol=1e-7, err_msg=name)


def test_kinds_that_do_not_decay_stay_under_zero_gradients():
    weights, zeros = draw(SPECS, 0), jax.tree.map(jnp.zeros_like, draw(SPECS, 0))
    tx = muon(0.5, specs=SPECS, decay_kinds=("matrix", "embed"))
    updates, _ = tx.update(zeros, tx.init(weights), weights)
    moved = {name for name, u in updates.items() if np.any(u)}
    assert moved == {"wide", "tall", "experts", "heads", "out", "embed"}


def test_state_leaves_never_move_whatever_their_gradient():
    weights = draw(SPECS, 0)
    tx = muon(1.0, specs=SPECS, clip_norm=1.0)
    grads = draw(SPECS, 1) | {"router_bias": jnp.full((2, 3), jnp.nan)}
    updates, _ = tx.update(grads, tx.init(weights), weights)
    assert_array_equal(updates.pop("router_bias"), np.zeros((2, 3)))
    assert all(np.isfinite(u).all() for u in updates.values())


def test_memory_is_one_momentum_a_matrix_and_two_moments_for_the_rest():
    weights = draw(SPECS, 0)
    state = muon(1.0, specs=SPECS).init(weights)
    shapes = collections.Counter(x.shape for x in jax.tree.leaves(state) if x.ndim)
    expected = collections.Counter()
    for spec in SPECS.values():
        copies = {"matrix": 1, "state": 0}.get(spec.kind, 2)
        expected.update([spec.shape] * copies)
    assert shapes == expected


def test_optax_can_map_shardings_over_the_state():
    weights = draw(SPECS, 0)
    tx = Muon().build(SPECS)
    names = {name: name for name in SPECS}
    mapped = optax.tree_map_params(
        tx,
        lambda x, name: x if isinstance(x, optax.MaskedNode) else name,
        tx.init(weights),
        names,
        transform_non_params=lambda _: "rest",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    found = collections.Counter(jax.tree.leaves(mapped))
    assert found == {"wide": 1, "tall": 1, "experts": 1, "heads": 1, "out": 1} | {
        "embed": 2,
        "norm": 2,
        "bias": 2,
        "rest": 1,
    }


def test_eager_and_jitted_steps_agree():
    weights, tx = draw(SPECS, 0), muon(0.01, specs=SPECS, dtype=jnp.float32)
    eager, _ = run(tx, weights, (1, 2))
    jitted, _ = run(tx, weights, (1, 2), jax.jit(tx.update))
    for name in SPECS:
        assert_allclose(eager[name], jitted[name], atol=1e-6, err_msg=name)


def test_every_update_is_linear_in_the_learning_rate():
    config = Muon(lr=3e-3, schedule=Constant(0.5), clip_norm=0.7, dtype="float32")
    weights, grads = draw(SPECS, 0), draw(SPECS, 1)
    unit = config.build(SPECS)
    one, _ = unit.update(grads, unit.init(weights), weights)
    whole = muon(
        1.5e-3,
        specs=SPECS,
        clip_norm=0.7,
        decay_kinds=config.decay_kinds,
        dtype=jnp.float32,
    )
    expected, _ = whole.update(grads, whole.init(weights), weights)
    lr = config.lr_at(jnp.float32(1e12))
    for name in SPECS:
        assert_allclose(lr * one[name], expected[name], rtol=1e-5, atol=1e-9, err_msg=name)


def test_a_learning_rate_may_be_a_function_of_the_step():
    weights, grads = draw(SPECS, 0), draw(SPECS, 1)
    tx = muon(lambda count: 0.1 * (count.astype(jnp.float32) + 1.0), specs=SPECS, momentum=0.0)
    first, state = tx.update(grads, tx.init(weights), weights)
    second, _ = tx.update(grads, state, weights)
    assert_allclose(second["experts"], 2 * first["experts"], rtol=1e-5)


def test_adam_rate_ratio_moves_only_the_other_kinds():
    weights, grads = draw(SPECS, 0), draw(SPECS, 1)
    updates = []
    for ratio in (1.0, 0.5):
        tx = muon(0.1, specs=SPECS, adam_lr_ratio=ratio)
        updates.append(tx.update(grads, tx.init(weights), weights)[0])
    for name, spec in SPECS.items():
        ratio = 1.0 if spec.kind == "matrix" else 0.5
        assert_allclose(updates[1][name], ratio * updates[0][name], rtol=1e-6, err_msg=name)


def test_clipping_bounds_the_global_norm_of_trained_gradients_only():
    grads = draw(SPECS, 1, scale=10.0) | {"router_bias": jnp.full((2, 3), 1e9)}
    norm = mixed.global_norm(grads, SPECS)
    trained = np.concatenate([np.ravel(g) for n, g in grads.items() if n != "router_bias"])
    assert_allclose(norm, np.linalg.norm(trained), rtol=1e-6)
    tx = mixed.clipped(optax.identity(), 2.0, SPECS)
    clipped, _ = tx.update(grads, tx.init(grads), grads)
    assert_allclose(mixed.global_norm(clipped, SPECS), 2.0, rtol=1e-5)
    small = jax.tree.map(lambda g: g * 1e-12, grads)
    assert_array_equal(tx.update(small, tx.init(small), small)[0]["wide"], small["wide"])


def test_optax_muon_equals_step_one_and_departs_afterwards():
    # optax corrects the bias of its Nesterov momentum, Moonlight does not (spec 2.7).
    file = np.load(GOLDEN)
    spec, lr = {"w": matrix(48, 64)}, 2.5e-3
    ours = optax.chain(scale_by_muon(specs=spec, dtype=jnp.float32), optax.scale(-lr))
    theirs = optax.contrib.muon(lr, weight_decay=0.0, consistent_rms=0.2, eps=1e-7)
    weights = {"w": jnp.asarray(file["muon0_init"])}
    states, gaps = [ours.init(weights), theirs.init(weights)], []
    for t in range(1, 4):
        grads = {"w": jnp.asarray(file[f"muon0_grad{t}"])}
        a, states[0] = ours.update(grads, states[0], weights)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes in its bias correction
            b, states[1] = theirs.update(grads, states[1], weights)
        gaps.append(float(jnp.abs(a["w"] - b["w"]).max()))
    assert gaps[0] < 3e-8
    assert 1e-5 < min(gaps[1:]) and max(gaps) < 5e-4


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="another model"):
        orthogonal(jnp.zeros((4, 4)), matrix(8, 4))
    with pytest.raises(ValueError, match="momentum"):
        Muon(momentum=1.0)


SHARDED = {
    "experts": ParamSpec((3, 8, 16, 24), ("layers", "experts", "embed", "mlp")),
    "wq": ParamSpec((5, 16, 4, 6), ("layers", "embed", "heads", "head_dim"), fan_in=16),
    "wo": ParamSpec((5, 4, 6, 16), ("layers", "heads", "head_dim", "embed"), fan_in=24),
    "join": ParamSpec((1, 2, 16, 16), ("layers", None, "embed", None), fan_in=32),
    "router": ParamSpec((5, 16, 8), ("layers", "embed", None)),
    "head": ParamSpec((16, 64), ("embed", "vocab")),
    "odd": ParamSpec((1, 16, 7), ("layers", "embed", "mlp")),
}
MESHES = [
    sharding.MeshShape(fsdp=8),
    sharding.MeshShape(fsdp=4, expert=2),
    sharding.MeshShape(data=2, fsdp=2, tensor=2),
]
COLLECTIVE = re.compile(
    r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
)


@pytest.mark.parametrize("shape", MESHES, ids=lambda s: str(s))
def test_a_mesh_changes_no_result(shape):
    mesh, rules = sharding.make_mesh(shape), sharding.Rules()
    x = draw(SHARDED, 0)
    numbers = {"steps": 2, "dtype": jnp.float32}
    alone = {k: orthogonal(x[k], s, **numbers) for k, s in SHARDED.items()}
    layouts = sharding.shardings(SHARDED, mesh, rules)

    def spread(x):
        with sharding.use(mesh, rules):
            return {k: orthogonal(x[k], s, **numbers) for k, s in SHARDED.items()}

    out = jax.jit(spread, out_shardings=layouts)(jax.device_put(x, layouts))
    for name in SHARDED:
        assert_allclose(out[name], alone[name], atol=5e-6, err_msg=name)


@pytest.mark.parametrize("shape", MESHES[:2], ids=lambda s: str(s))
def test_experts_move_by_one_all_to_all_each_way_and_nothing_else(shape):
    mesh, rules = sharding.make_mesh(shape), sharding.Rules()
    spec = SHARDED["experts"]
    layout = sharding.shardings(spec, mesh, rules)

    def spread(x):
        with sharding.use(mesh, rules):
            return orthogonal(x, spec)

    x = jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=layout)
    text = jax.jit(spread, out_shardings=layout).lower(x).compile().as_text()
    assert collections.Counter(COLLECTIVE.findall(text)) == {"all-to-all": 2}


def test_update_rms_of_a_well_spread_gradient_is_near_the_target():
    x = jax.random.normal(jax.random.key(0), (32, 64))
    tx = scale_by_muon(specs={"w": matrix(32, 64)}, dtype=jnp.float32)
    u, _ = tx.update({"w": x}, tx.init({"w": x}))
    assert 0.16 < math.sqrt(float(jnp.mean(jnp.square(u["w"])))) < 0.22  # measured in spec 2.7
