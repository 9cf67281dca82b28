"""The breakdown of a step by phase: every kernel's time lands in one phase, by where it is from."""

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import air_step


def named(x):
    """A phase within a scan that is computed again for its gradient, as a layer is."""

    def layer(x, _):
        with jax.named_scope("experts"):
            return jnp.tanh(x @ x), None

    with jax.named_scope("head"):
        y = jnp.sin(x)
    return jax.lax.scan(jax.checkpoint(layer), y, None, length=2)[0].sum()


def test_the_passes_of_a_compiled_gradient_are_told_apart():
    compiled = jax.jit(jax.grad(named)).lower(jnp.ones((8, 8))).compile()
    names = air_step.op_names(compiled.as_text())
    found = {air_step.phase_of(name) for name in names.values()}
    assert {"experts forward", "experts again", "experts backward", "head forward"} <= found
    times = [(name, 1.0) for name in names] + [("copy.77", 5.0)]
    by_phase = air_step.breakdown(times, names)
    assert sum(by_phase.values()) == len(names) + 5
    assert by_phase["rest"] >= 5
    assert list(by_phase.values()) == sorted(by_phase.values(), reverse=True)


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("jit(step)/optimizer/while/body/dot_general", "optimizer"),
        ("jit(step)/transpose(jvp(embed))/scatter-add", "embed"),
        ("jit(step)/jvp(attention)/dot", "attention forward"),
        ("jit(step)/transpose(jvp(attention))/dot", "attention backward"),
        ("jit(step)/convert", "rest"),
        ("", "rest"),
    ],
)
def test_a_phase_is_read_off_a_name(name, phase):
    assert air_step.phase_of(name) == phase
