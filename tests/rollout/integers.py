"""What the tests of the driver share: an engine of integers that remembers who wrote what, and what
an output must be.
"""

import dataclasses

import numpy as np

from glm45_jax.rollout.driver import Driver
from tests.rollout.arithmetic import BREAKS_INSERT, Arithmetic, answer


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def make(slots=2, pages=20, version=0, **options):
    clock = Clock()
    engine = Arithmetic(slots, pages)
    return Driver(engine, version, version=version, clock=clock, **options), engine, clock


def idle(driver, engine):
    """Whether every slot and page is free and nothing waits."""
    s = driver.stats
    free = (s.free_slots, s.free_pages) == (engine.slots, engine.pages)
    return free and not driver.busy and s.waiting == s.running == 0


def largest_table(driver):
    """Entries of the longest list or table that a driver holds, of which none may grow with the
    requests it served.
    """
    core = driver._batch
    tables = [*vars(core).values(), *vars(core._pages).values(), *vars(core._prefixes).values()]
    return max(len(table) for table in tables if isinstance(table, list | dict))


def check(request, engine):
    """The tokens are those of an undisturbed run, or its beginning; versions rise and are those
    that drew.
    """
    done = request.completion
    out = done.tokens_T.tolist()
    fits = 0 < len(request.prompt) < engine.max_tokens
    if fits and 96 not in request.prompt and request.sampling.seed != BREAKS_INSERT:
        want, finish = answer(request.prompt, request.sampling, engine.vocab)
        assert out == want[: len(out)]
        if done.finish in ("stop", "length"):
            assert (out, done.finish) == (want, finish)
        else:
            assert done.finish in ("cancelled", "deadline") and len(out) < len(want)
    else:
        assert done.finish in ("error", "cancelled", "deadline") and not out
    assert bool(done.error) == (done.finish == "error")
    assert list(done.versions) == sorted(done.versions) == (-done.logp_raw_T).tolist()
    np.testing.assert_array_equal(done.logp_T, -done.tokens_T.astype(np.float32) / 100)


@dataclasses.dataclass(frozen=True)
class Tagged(Arithmetic):
    """`Arithmetic`, whose state says in `by_PS` which version wrote each token of each page."""

    def init(self):
        state = super().init()
        state.by_PS = np.full(state.page_PS.shape, -1)
        return state

    def prefill(self, params, state, tokens, start, row):
        before = state.by_PS[list(row)].reshape(-1)[:start]
        assert (before == params).all(), f"version {params} reads on over keys of {set(before)}"
        state, last = super().prefill(params, state, tokens, start, row)
        self._write(state, row, start, start + len(tokens), params)
        return state, last

    def insert(self, state, seats):
        for target, by_S in [(s.copy[1], state.by_PS[s.copy[0]].copy()) for s in seats if s.copy]:
            state.by_PS[target] = by_S
        return super().insert(state, seats)

    def decode(self, params, state, table_BP, active_B):
        before_B = state.length_B.copy()
        state, step = super().decode(params, state, table_BP, active_B)
        for b in np.flatnonzero(active_B):
            self._write(state, table_BP[b], before_B[b], state.length_B[b], params)
        return state, step

    def _write(self, state, row, start, end, version):
        for at in range(start, end):
            state.by_PS[row[at // self.page], at % self.page] = version
