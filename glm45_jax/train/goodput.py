"""Where the time of a run went, over all of its processes: productive, or lost to what. Type:
`Goodput`.

Its file is replaced in one move, with every checkpoint and every few seconds: what a kill leaves
unwritten counts as down.
"""

from __future__ import annotations

import json
import logging
import pathlib
import time
from collections.abc import Callable

from glm45_jax.integrity import write_whole

# productive: steps that count. start: checks, data, compiling (a stage's first step). data: waiting
# for a batch. hooks: validation, metrics, report. skipped: steps left out. redone: steps that a
# kill undid. down: from the last that is known of a process to the next one's start.
CAUSES = (
    "productive",
    *("start", "restore", "data", "checkpoint", "hooks", "skipped", "redone", "down"),
)
WRITE_EVERY_S = 5.0
_PARTS_KEPT = 64  # parts between checkpoints that a fallback may still undo

log = logging.getLogger(__name__)


class Goodput:
    """Seconds by cause; they add up to the time from the first process's start to the last `spent`.

    path: the ledger, taken up where it is there; None keeps it in memory. Call `spent` after each
    thing that took time. A time between a run that had ended (`close(done=True)`) and one that goes
    on later is not counted. wall, clock: for tests; seconds.
    """

    def __init__(
        self,
        path: pathlib.Path | None = None,
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._path, self._wall, self._clock = path, wall, clock
        self._seconds = dict.fromkeys(CAUSES, 0.0)
        self._parts: list[tuple[int, int, float]] = []  # first step, last step, productive seconds
        self._open = False  # whether the last part may grow
        self._last = self._written = clock()
        if path is not None and path.exists():
            self._take_up(json.loads(path.read_text()))

    def _take_up(self, saved: dict) -> None:
        self._seconds |= saved["seconds"]
        self._parts = [(int(a), int(b), float(s)) for a, b, s in saved["parts"]]
        if not saved["done"]:
            self._seconds["down"] += max(0.0, self._wall() - saved["at"])

    def spent(self, cause: str, step: int | None = None) -> None:
        """None; the time since the last call went to `cause`. step: of a productive one, from 1."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        self._seconds[cause] += seconds
        if cause == "productive" and step is not None:
            first, so_far = step, 0.0
            if self._open and self._parts:
                first, _, so_far = self._parts.pop()
            self._parts.append((first, step, so_far + seconds))
            self._open = True
        if cause == "checkpoint":
            self._open = False
            self._parts = self._parts[-_PARTS_KEPT:]
        if cause == "checkpoint" or now - self._written >= WRITE_EVERY_S:
            self.write()

    def resumed(self, step: int) -> None:
        """None; the run goes on after `step` steps: the time of those after it was for nothing."""
        kept = []
        for first, last, seconds in self._parts:
            undone = min(max(last - max(first - 1, step), 0) / (last - first + 1), 1.0)
            self._seconds["productive"] -= undone * seconds
            self._seconds["redone"] += undone * seconds
            if undone < 1:
                kept.append((first, min(last, step), (1 - undone) * seconds))
        self._parts, self._open = kept, False

    def seconds(self) -> dict[str, float]:
        """Seconds by cause, all of `CAUSES`."""
        return dict(self._seconds)

    def scalars(self) -> dict[str, float]:
        """goodput: productive share of all time; lost_s/<cause>: seconds, where there are any."""
        total = sum(self._seconds.values())
        lost = {f"lost_s/{c}": s for c, s in self._seconds.items() if s and c != "productive"}
        return {"goodput": self._seconds["productive"] / max(total, 1e-9)} | lost

    def text(self) -> str:
        """One line for people, the largest loss first."""
        total = sum(self._seconds.values())
        lost = sorted(((s, c) for c, s in self._seconds.items() if c != "productive"), reverse=True)
        named = ", ".join(f"{cause} {s:.1f} s" for s, cause in lost if s >= 0.05)
        share = self._seconds["productive"] / max(total, 1e-9)
        return f"{share:.1%} of {total:.0f} s productive" + (f"; lost: {named}" if named else "")

    def write(self, *, done: bool = False) -> None:
        """None; the file is that of now. done: the run has ended and nothing is waited for."""
        self._written = self._clock()
        if self._path is None:
            return
        at = self._wall() - (self._written - self._last)  # of the last `spent`
        text = json.dumps(
            {"at": at, "done": done, "seconds": self._seconds, "parts": self._parts}, indent=1
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, text.encode())
