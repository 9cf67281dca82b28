"""Kernels compiled for a machine that is not here, in a child with that machine's compiler."""

import json
import pathlib
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from glm45_jax.plan import compile as compiling
from glm45_jax.plan import targets, wheels

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S = 1500.0  # of a child, which takes a minute or two of an idle machine


def compiled(target: str, command: Sequence[str], monkeypatch) -> list[dict[str, Any]]:
    """What the child printed, a JSON object a line, and of the lines of ptxas before it how many
    ("ptxas") and which speak of lost performance ("losses"); the test fails with the child's last
    words if it does. Skips where the target's compiler is not installed.
    """
    monkeypatch.chdir(ROOT)  # compilers lie below it
    machine = targets.parse(target)
    if why := wheels.missing(machine.chip.platform):
        pytest.skip(f"kernels for {target} are not compiled here: {why}")
    done = subprocess.run(
        command,
        env=compiling.environment(machine) | {"MOSAIC_GPU_DUMP_PTXAS": "1"},  # what ptxas says
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, compiling.last_words(done.stderr)
    rows, said = [], []
    for line in done.stdout.splitlines():
        if line.startswith("ptxas"):
            said.append(line)
        elif line.startswith("{"):
            losses = [x for x in said if "Potential Performance Loss" in x]
            rows.append(json.loads(line) | {"ptxas": len(said), "losses": losses})
            said = []
    return rows


def show(target: str, rows: Sequence[dict[str, Any]], capsys) -> None:
    """None; prints the rows although pytest keeps what tests print."""
    with capsys.disabled():
        for row in rows:
            print(f"\n  {target} {row}", end="")
