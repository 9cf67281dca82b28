"""The schedule of a run as a plot of characters, for a terminal: `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH = 90  # columns for the curves
HEIGHT = 6  # lines of the learning rate
_BLOCKS = " ▁▂▃▄▅▆▇█"
_LABEL = 26  # columns before the curves


def plot(parts: Sequence[tuple[Any, Any]], end: int) -> list[str]:
    """Lines: learning rate, and below it a line each for what else changes, over the steps.

    parts: (span, its experiment). end: step at which the run ends. Every stage is as wide as the
    others, or the short ones at the end would not be seen.
    """
    width = max(1, WIDTH // len(parts))
    seen = [
        _at(span, exp, step)
        for span, exp in parts
        for step in _steps(span.first_step, min(span.end_step, end), width)
    ]
    rates = [point["learning rate"] for point in seen]
    top = max(rates) or 1.0
    lines = []
    for line in reversed(range(HEIGHT)):
        bar = "".join(_block(rate / top * HEIGHT - line) for rate in rates)
        label = {HEIGHT - 1: f"lr {top:.3g}", 0: "0"}.get(line, "")
        lines.append(f"  {label:>{_LABEL}} {bar}")
    for name in list(seen[0])[1:]:
        numbers = [point[name] for point in seen]
        if len(set(numbers)) == 1:
            continue
        low, high = min(numbers), max(numbers)
        # From the least to the greatest: what rises by a tenth is seen as well.
        bar = "".join(_block((1 + 7 * (x - low) / (high - low)) / 8) for x in numbers)
        lines.append(f"  {f'{name} {low:,.6g} to {high:,.6g}':>{_LABEL}} {bar}")
    if len(parts) > 1:
        names = (f"{'│' + span.stage.name:<{width}.{width}}" for span, _ in parts)
        lines.append(f"  {'':>{_LABEL}} {''.join(names)}")
    return [line.rstrip() for line in lines]


def _steps(first: int, end: int, width: int) -> list[int]:
    """So many steps from the first to the last."""
    return [first + round(n * (end - 1 - first) / max(1, width - 1)) for n in range(width)]


def _at(span: Any, exp: Any, step: int) -> dict[str, float]:
    """What holds at a step, the learning rate first."""
    tokens = float(span.tokens_at(step))
    return {
        "learning rate": float(exp.optim.lr_at(tokens)),
        "rows": float(span.rows(step)[1]),
        "seq_len": float(exp.data.seq_len),
        "RoPE": float(exp.model.mixer.rope_theta),
        "bias": float(exp.train.bias_rate(tokens)),
        "MTP": float(exp.train.mtp_weight(tokens)),
    }


def _block(share: float) -> str:
    """How much of a character is filled; something, where it is above zero."""
    eighths = min(8, max(0, round(8 * share)))
    return _BLOCKS[eighths]
