"""Notebooks: each says what it asks, keeps no outputs, and runs from top to bottom."""

import ast
import os
import pathlib
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
CPU_SECONDS = 2 * 180  # three minutes of two cores, whatever else the machine does


def name_of(path):
    return path.stem


def cells(path):
    return path.read_text(encoding="utf-8").split("# %%")[1:]


def test_the_planned_notebooks_are_there():
    planned = {"tour", "shapes", "moe_routing", "muon", "packing", "rollout", "rl", "ablation"}
    assert planned <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_begins_with_its_question_and_runtime_and_is_a_percent_script(path):
    text = path.read_text(encoding="utf-8")
    assert "format_name: percent" in text.split("# %%")[0]
    first = " ".join(cells(path)[0].split()).replace("# ", "")
    assert "Question:" in first and "Runtime:" in first, first
    assert "plt.show()" in text
    ast.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_runs_within_three_minutes_of_two_cores(path, tmp_path):
    """As `make notebooks` runs it: one device, compiled with XLA's optimisations."""
    tools = pathlib.Path(sys.executable).parent
    made = tmp_path / f"{path.stem}.ipynb"
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    to_ipynb = [tools / "jupytext", "--quiet", "--to", "ipynb", "--set-kernel", "python3"]
    subprocess.run([*to_ipynb, "--output", made, path], check=True, cwd=ROOT)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [tools / "jupyter-execute", "--kernel_name=python3", made],
        cwd=ROOT,
        env=env | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < CPU_SECONDS, f"{used:.0f} s of a processor"
