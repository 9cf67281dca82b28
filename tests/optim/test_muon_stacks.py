"""Laws of how Muon hands stacks to Newton-Schulz: joined, by name, on a mesh."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from glm45_jax import sharding
from glm45_jax.kernels import dispatch
from glm45_jax.optim import muon as room
from glm45_jax.optim.muon import Muon, orthogonal, scale_by_muon
from glm45_jax.params import ParamSpec, tree_map

SPECS = {
    "gate": ParamSpec((2, 3, 8, 6), ("layers", "experts", "embed", "mlp")),
    "up": ParamSpec((2, 3, 8, 6), ("layers", "experts", "embed", "mlp")),
    "down": ParamSpec((2, 3, 6, 8), ("layers", "experts", "mlp", "embed")),
    "query": ParamSpec((1, 8, 2, 3), ("layers", "embed", "heads", "head_dim"), fan_in=8),
    "odd": ParamSpec((5, 7), ("embed", None)),
}


def draw(specs, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), len(specs)))
    return tree_map(lambda s: jax.random.normal(next(keys), s.shape), specs)


def first_directions(specs, grads, **numbers):
    """Of a first step without momentum: the gradients themselves are made orthogonal."""
    tx = scale_by_muon(momentum=0.0, rms=1.0, specs=specs, **numbers)
    return tx.update(grads, tx.init(grads))[0]


@pytest.mark.parametrize("impl", ["xla", "gram"])
def test_a_weight_moves_as_if_it_were_the_only_one(impl):
    grads = draw(SPECS)
    together = first_directions(SPECS, grads, dtype=jnp.float32, impl=impl)
    for name, spec in SPECS.items():
        alone = orthogonal(grads[name], spec, dtype=jnp.float32, impl=impl)
        longer = max(spec.matrix_shape[1:])
        assert_allclose(together[name], np.sqrt(longer) * alone, atol=2e-5, err_msg=name)


def test_stacks_of_one_shape_go_together_until_they_are_large():
    most = room.JOINED
    assert room._joined([(6, 8, 6), (6, 8, 6), (6, 6, 8), (1, 8, 6)]) == [[0, 1, 3], [2]]
    assert room._joined([(most, 1, 1), (1, 1, 1), (1, 1, 1)]) == [[0], [1, 2]]
    split = room._joined([(most // 4, 2, 1)] * 5)
    assert [i for group in split for i in group] == [0, 1, 2, 3, 4] and len(split) == 3


@pytest.mark.parametrize(
    "shape", [sharding.MeshShape(fsdp=8), sharding.MeshShape(fsdp=4, expert=2)]
)
def test_a_mesh_changes_no_result_of_the_gram_form(shape):
    specs = {k: v for k, v in SPECS.items() if k in ("gate", "down")}
    specs = {
        k: ParamSpec((3, 8, *(4 * side for side in v.shape[2:])), v.axes) for k, v in specs.items()
    }
    grads, mesh, rules = draw(specs), sharding.make_mesh(shape), sharding.Rules()
    layouts = sharding.shardings(specs, mesh, rules)
    alone = first_directions(specs, grads, dtype=jnp.float32, impl="gram")

    def spread(grads):
        with sharding.use(mesh, rules):
            return first_directions(specs, grads, dtype=jnp.float32, impl="gram")

    out = jax.jit(spread, out_shardings=layouts)(jax.device_put(grads, layouts))
    for name in specs:
        assert_allclose(out[name], alone[name], atol=5e-5, err_msg=name)


def test_matrices_that_the_kernel_does_not_take_go_by_xla_and_the_log_says_why(caplog):
    dispatch.say_once.cache_clear()
    grads = draw({"odd": SPECS["odd"]})
    with caplog.at_level(logging.INFO, logger=room.__name__):
        by_name = first_directions({"odd": SPECS["odd"]}, grads, impl="mosaic")
    assert "5 x 7" in caplog.text and "'mosaic'" in caplog.text
    by_xla = first_directions({"odd": SPECS["odd"]}, grads, impl="xla")
    assert_allclose(by_name["odd"], by_xla["odd"], atol=0)


def test_the_kernel_by_name_on_a_machine_without_it_is_refused():
    if jax.default_backend() == "gpu":
        pytest.skip("this machine may have it")
    specs = {"experts": ParamSpec((256, 128, 128), ("experts", "embed", "mlp"))}
    with pytest.raises(ValueError, match="compute capability"):
        jax.eval_shape(lambda g: first_directions(specs, g, impl="mosaic"), draw(specs))
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        Muon(impl="cuda")  # type: ignore[arg-type]
