"""Programs compiled before they are needed do what they do when compiled in place."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm45_jax.optim.schedules import BatchRamp
from glm45_jax.sharding import MeshShape
from glm45_jax.train.ahead import Asked, Programs, batch_shapes, compiling, of_span
from glm45_jax.train.parallel import Pmap
from glm45_jax.train.stages import Span
from tests.train.common import ROWS, T, packed_batch, trainer


class Lowered:
    """What `lower` returns here: compiling it waits for `may`, and gives a function."""

    def __init__(self, name, may=None):
        self.name, self.may = name, may

    def compile(self):
        assert self.may is None or self.may.wait(30)
        return lambda state, batch: (self.name, state, batch)


def in_place(state, batch):
    return ("in place", state, batch)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def test_only_what_was_asked_for_is_taken_from_what_was_compiled():
    programs = Programs(in_place, lambda shapes: Lowered(f"{shapes.shape}"))
    assert programs.compile(zeros(2)) > 0
    assert programs(0, zeros(2))[0] == "(2,)"
    assert programs(0, zeros(3))[0] == "in place"
    assert programs(0, np.zeros(2, np.int32))[0] == "in place"  # another dtype, another program


def test_what_was_compiled_in_place_is_not_compiled_again():
    programs = Programs(in_place, lambda shapes: Lowered("ahead"))
    assert programs(0, zeros(2))[0] == "in place"
    assert programs.compile(zeros(2)) == 0.0
    assert programs(0, zeros(2))[0] == "in place"


def test_a_program_is_compiled_once_and_its_call_waits_for_it():
    may, lowered, out = threading.Event(), [], []

    def lower(shapes):
        lowered.append(shapes)
        return Lowered("ahead", may)

    programs = Programs(in_place, lower)
    worker = threading.Thread(target=programs.compile, args=(zeros(2),))
    worker.start()
    while not lowered:
        pass
    assert programs.compile(zeros(2)) == 0.0
    caller = threading.Thread(target=lambda: out.append(programs(1, zeros(2))[0]))
    caller.start()
    assert not out
    may.set()
    worker.join()
    caller.join()
    assert out == ["ahead"] and len(lowered) == 1


def test_what_does_not_compile_is_raised_where_it_is_called():
    def lower(shapes):
        raise ValueError("too large")

    programs = Programs(in_place, lower)
    with compiling([Asked("large", programs.compile, zeros(2))], threads=1):
        pass
    with pytest.raises(ValueError, match="too large"):
        programs(0, zeros(2))


def test_programs_are_begun_in_order_and_those_not_begun_are_dropped():
    begun, go = [], threading.Event()

    def compile(batch):
        begun.append(batch)
        assert go.wait(30)
        return 1.0

    asked = [Asked(str(n), compile, n) for n in range(4)]
    with compiling(asked, threads=2):
        while len(begun) < 2:
            pass
        threading.Timer(0.2, go.set).start()
        # The end is here already: the two that are being compiled are waited for, no other begins.
    assert sorted(begun) == [0, 1]
    with compiling(asked, threads=0):
        pass
    assert len(begun) == 2


def test_a_run_asks_for_the_sizes_it_has_still_to_take():
    class Own:
        compile_step, compile_nll = "step", "nll"

    # Two rows to eight in twos: sizes 2, 4, 6, 8.
    ramp = BatchRamp(2, 8, 240, 10, 2)
    span = Span(ramp, 100, 120)
    firsts = [first for first, _ in span.sizes()]

    def sizes(start, end=120):
        asked = of_span(Own, span, end, start, [packed_batch(rows=4)])
        assert [one.compile for one in asked[:-1]] == ["step"] * (len(asked) - 1)
        assert asked[-1].compile == "nll" and asked[-1].batch.tokens_BT.shape == (4, T)
        return [one.batch.tokens_BT.shape for one in asked[:-1]]

    assert sizes(0) == [(2, 10), (4, 10), (6, 10), (8, 10)]
    assert sizes(firsts[1] - 1) == sizes(0)
    assert sizes(firsts[1]) == sizes(0)[1:]
    assert sizes(firsts[3]) == sizes(0)[3:]
    assert sizes(0, end=firsts[2]) == sizes(0)[:2]


@pytest.mark.parametrize("where", [MeshShape(data=2, fsdp=4), Pmap()], ids=["mesh", "pmap"])
def test_a_step_compiled_ahead_is_the_step(where):
    plain, ahead = trainer(where), trainer.__wrapped__(where)
    shapes = batch_shapes(ROWS, T)
    took = []

    def compile_step(batch):
        took.append(ahead.compile_step(batch))
        return took[-1]

    asked = [Asked("step", compile_step, shapes), Asked("nll", ahead.compile_nll, shapes)]
    ends = [after_two_steps(plain)]
    with compiling(asked, threads=2):
        ends.append(after_two_steps(ahead))
    assert took[0] > 0
    mine, theirs = (jax.tree.leaves(end) for end in ends)
    assert all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(mine, theirs, strict=True)
    )


def after_two_steps(run):
    state, outs = run.init(jax.random.key(0)), []
    for seed in (0, 1):
        state, out = run.step(state, packed_batch(seed))
        outs.append(jax.device_get(out.scalars))
    view = run.save_view(state)
    return view.params, outs, run.nll(state, packed_batch(2)), jnp.asarray(view.tokens_seen)


def test_one_program_is_traced_at_a_time_while_those_before_it_compile():
    tracing, most, both = [], [], threading.Barrier(2)

    class Slow:
        """Compiles for as long as another one does."""

        def compile(self):
            both.wait(30)
            return lambda state, batch: None

    def lower(shapes):
        tracing.append(shapes)
        time.sleep(0.05)  # another that traces now would be seen
        most.append(len(tracing))
        tracing.remove(shapes)
        return Slow()

    programs = Programs(in_place, lower)
    asked = [
        Asked(f"{n}", programs.compile, jax.ShapeDtypeStruct((n,), jnp.float32)) for n in (2, 4)
    ]
    with compiling(asked, 2):
        for one in asked:
            programs(0, one.batch)
    assert most == [1, 1]
