"""What importing costs, and what it must not bring along. Each measured in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS_OVER_JAX = 0.3
ENTRY_MODULES = """
    main experiment plan hf chat tokenizer train.loop train.step train.stages data.loader
    rollout.engine rollout.driver rollout.server rl.loop evals.report
""".split()
HEAVY = {"tensorflow", "seqio", "jetstream", "torch", "ray", "matplotlib", "tensorboardX", "wandb"}
MAY_LOAD_JAX = {f"glm45_jax.data.{name}" for name in ("types", "loader", "tasks")}


def run(code: str) -> str:
    """What a fresh interpreter prints for `code`; raises with its traceback if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tops_after(modules: list[str]) -> set[str]:
    """Top-level modules loaded once these have been imported."""
    names = (
        "import json, sys; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    return set(json.loads(run("\n".join([*(f"import {m}" for m in modules), names]))))


def exists(module: str) -> bool:
    path = ROOT.joinpath("glm45_jax", *module.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def test_importing_the_package_adds_nothing_to_importing_jax():
    code = (
        "import jax, time; start = time.perf_counter(); import glm45_jax;"
        "print(time.perf_counter() - start)"
    )
    assert min(float(run(code)) for _ in range(3)) < SECONDS_OVER_JAX
    assert "jax" not in tops_after(["glm45_jax"])


def test_no_entry_point_pulls_in_tensorflow_or_a_plotting_library_at_start():
    modules = ["glm45_jax", *(f"glm45_jax.{name}" for name in ENTRY_MODULES if exists(name))]
    loaded = HEAVY & tops_after(modules)
    assert not loaded, f"importing {modules} loads {sorted(loaded)}: import inside the function"


def test_data_workers_and_environments_start_without_jax():
    files = [*ROOT.glob("glm45_jax/data/*.py"), *ROOT.glob("glm45_jax/envs/*.py")]
    names = {f"glm45_jax.{file.parent.name}.{file.stem}" for file in files} - MAY_LOAD_JAX
    modules = ["glm45_jax", *sorted(names)]
    assert "jax" not in tops_after(modules), f"one of {modules} loads jax"
