"""What a driver counts, as Prometheus reads it: text, format 0.0.4. Types to know: `Histogram`,
`Times`.
"""

from __future__ import annotations

import bisect
import dataclasses
import typing
from collections.abc import Mapping

from glm45_jax.rollout.types import Finish, Stats

PREFIX = "glm45_rollout_"
GAUGES = ("waiting", "running", "free_slots", "free_pages", "kept_pages", "version")
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)


class Histogram:
    """How many values fell at or below each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """None; one more value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """Its samples: counts up to each bound, sum, count."""
        counts, total, out = list(self._counts), 0, []
        for bound, count in zip((*self._bounds, "+Inf"), counts, strict=True):
            total += count
            out.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*out, f"{name}_sum {self._sum}", f"{name}_count {total}"]


@dataclasses.dataclass
class Times:
    """How long requests waited and took, in seconds of the driver's clock, and how much they got.

    queue_seconds: until their prompt was begun. first_token_seconds: until their first token.
    token_seconds: of one output's later tokens, the mean. output_length: tokens of those with any.
    """

    queue_seconds: Histogram = dataclasses.field(default_factory=lambda: Histogram(SECONDS))
    first_token_seconds: Histogram = dataclasses.field(default_factory=lambda: Histogram(SECONDS))
    token_seconds: Histogram = dataclasses.field(default_factory=lambda: Histogram(SECONDS))
    output_length: Histogram = dataclasses.field(default_factory=lambda: Histogram(TOKENS))

    def admitted(self, now: float, arrived: float) -> float:
        """Now; a prompt was begun."""
        self.queue_seconds.observe(now - arrived)
        return now

    def began(self, now: float, arrived: float) -> float:
        """Now; a request has its first token."""
        self.first_token_seconds.observe(now - arrived)
        return now

    def ended(self, tokens: int, seconds: float) -> None:
        """None; an output of so many tokens ended so long after its first."""
        self.output_length.observe(tokens)
        if tokens > 1:
            self.token_seconds.observe(seconds / (tokens - 1))


def exposition(stats: Stats, pages: Mapping[int | None, int], times: Times) -> str:
    """Every number of a driver, each family with its type. pages: in use, by the version that wrote
    them.
    """
    finishes = typing.get_args(Finish)
    lines = []
    for name, value in dataclasses.asdict(stats).items():
        if name in GAUGES:
            lines += [f"# TYPE {PREFIX}{name} gauge", f"{PREFIX}{name} {value}"]
        elif name not in finishes:
            lines += [f"# TYPE {PREFIX}{name}_total counter", f"{PREFIX}{name}_total {value}"]
    lines.append(f"# TYPE {PREFIX}finished_total counter")
    for reason in finishes:
        count = getattr(stats, reason)
        lines.append(f'{PREFIX}finished_total{{reason="{reason}"}} {count}')
    lines.append(f"# TYPE {PREFIX}pages gauge")
    for version, count in pages.items():
        label = "mixed" if version is None else version
        lines.append(f'{PREFIX}pages{{version="{label}"}} {count}')
    for field in dataclasses.fields(times):
        lines.append(f"# TYPE {PREFIX}{field.name} histogram")
        lines += getattr(times, field.name).lines(PREFIX + field.name)
    return "\n".join(lines) + "\n"
