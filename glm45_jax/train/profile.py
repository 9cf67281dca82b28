"""A trace of the steps one asks for, for xprof: what each device did, kernel by kernel. `Tracing`.

`Train.profile` names the steps. To look at it: `xprof --logdir W/profile`, or TensorBoard with its
profile plugin.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

import jax


class Tracing:
    """Within `with tracing.step(n)`: step n, from 1, is traced where it is one of `steps`.

    folder: a trace of steps that follow each other is `folder`/step<the first>. A step that is
    traced is slower, and its tokens a second tell; the last of them also writes the trace. Of a run
    that ends earlier, `close` writes what there is.
    """

    def __init__(self, folder: pathlib.Path, steps: Sequence[int]):
        self._folder, self._steps = folder, frozenset(steps)
        self._open = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """None; whatever is dispatched inside and waited for is the step's."""
        if number not in self._steps:
            yield
            return
        if not self._open:
            jax.profiler.start_trace(self._folder / f"step{number}")
            self._open = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """None; what was traced is on disk."""
        if self._open:
            jax.profiler.stop_trace()
        self._open = False
