"""Scores as a page that people read."""

from collections.abc import Sequence
from pathlib import Path

from glm45_jax.evals.generate import Outcome


def write_report(outcomes: Sequence[Outcome], folder: Path, *, model: str) -> Path:
    """folder/report.md: a table of the scores with their intervals, a row a reward part."""
    rows = [
        "| evaluation | score | 95% | tasks | cut | failed | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        low, high = one.score.interval
        rows.append(
            f"| {one.name} | {one.score.value:.4f} | {low:.4f} to {high:.4f} | {one.score.n} | "
            f"{one.cut:.1%} | {one.errors} | {one.tokens:,} |"
        )
        for name, part in one.parts.items():
            low, high = part.interval
            rows.append(
                f"| · {name} | {part.value:.4f} | {low:.4f} to {high:.4f} | {part.n} | | | |"
            )
    files = [f"- `{one.file.name}`: every episode of {one.name}" for one in outcomes]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    path.write_text(
        "\n".join([f"# Evaluation of {model}", "", *rows, "", *files, ""]), encoding="utf-8"
    )
    return path
