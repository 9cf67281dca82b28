"""Imports only go down: reads every import in glm45_jax/ and names the line that goes up.

The floors are those of docs/architecture.md. A room is a module or package right below glm45_jax.
Imports inside functions count as well: they are knowledge all the same.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    (
        *("params", "sharding", "values", "integrity", "streamed", "checkpoint"),
        *("metrics", "hosts", "tokenizer", "chat"),
    ),
    ("kernels",),
    ("optim",),
    ("model", "data", "envs"),
    ("hf",),
    ("train", "rollout"),
    ("rl", "evals"),
    ("plan", "start"),
    ("experiment",),
    ("main",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
GROUND = 0  # the only floor whose rooms may know each other

JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
JAX_FREE_ROOMS = {"data", "envs"}  # they run in worker processes and hand over numpy
JAX_ALLOWED = {"glm45_jax/data/types.py", "glm45_jax/data/loader.py"}

TENSORFLOW = {"tensorflow", "tensorflow_datasets", "seqio", "jetstream"}
TENSORFLOW_ALLOWED = {"glm45_jax/data/tasks.py", "glm45_jax/rollout/jetstream.py"}


def imported_names(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) for every import; `from a import b` gives a.b, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((node.lineno, ".".join((*prefix, alias.name))) for alias in node.names)


def objection(name: str, file: str, room: str, rooms: set[str]) -> str | None:
    """Why the module `file`, in `room`, may not import `name`; None where it may."""
    top, _, rest = name.partition(".")
    if top in JAX and room in JAX_FREE_ROOMS and file not in JAX_ALLOWED:
        return f"{room} is free of jax"
    if top in TENSORFLOW and file not in TENSORFLOW_ALLOWED:
        return f"TensorFlow enters by {' and '.join(sorted(TENSORFLOW_ALLOWED))} alone"
    if top == "experiments":
        return "the library does not know its experiments"
    target = rest.partition(".")[0]
    if top != "glm45_jax" or target not in rooms or target == room:
        return None
    if room == "__init__":
        return "`import glm45_jax` imports nothing"
    here, there = FLOOR_OF[room], FLOOR_OF[target]
    if there > here:
        return f"{room} (floor {here}) is below {target} (floor {there})"
    if there == here != GROUND:
        return f"{room} and {target} share floor {here} and may not know each other"
    return None


def violations(root: Path) -> list[str]:
    """'file:line: import name: why not' for each import under root/glm45_jax that goes up."""
    library = root / "glm45_jax"
    rooms = {path.stem for path in library.iterdir() if path.suffix == ".py" or path.is_dir()}
    rooms -= {"__init__", "__pycache__"}
    found = [f"glm45_jax/{room}: is on no floor" for room in sorted(rooms - FLOOR_OF.keys())]
    rooms &= FLOOR_OF.keys()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        room, file = parts[1], path.relative_to(root).as_posix()
        if room not in rooms | {"__init__"}:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=file)
        for line, name in imported_names(tree, package=parts[:-1]):
            if why := objection(name, file, room, rooms):
                found.append(f"{file}:{line}: import {name}: {why}")
    return found


def plant(root: Path, files: dict[str, str]) -> list[str]:
    """The violations of a small tree that holds these files below glm45_jax."""
    for name, text in {"__init__.py": "", **files}.items():
        path = root / "glm45_jax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return violations(root)


def test_imports_only_go_down():
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_every_room_is_a_package():
    folders = {path.parent for path in (ROOT / "glm45_jax").rglob("*.py")}
    bare = [
        str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()
    ]
    assert not bare, f"no __init__.py in {sorted(bare)}: setup.py and lint-imports would miss them"


def test_an_import_upwards_is_caught_wherever_it_hides(tmp_path):
    found = plant(
        tmp_path,
        {
            "hf.py": "",
            "train/__init__.py": "",
            "train/loop.py": "from glm45_jax.model import config\nfrom glm45_jax import hf\n",
            "model/__init__.py": "",
            "model/config.py": "import numpy\n\n\ndef f():\n    from ..train import loop\n",
            "values.py": "import glm45_jax.train.loop\n",
        },
    )
    assert [line.partition(": ")[0] for line in found] == [
        "glm45_jax/model/config.py:5",
        "glm45_jax/values.py:1",
    ]


def test_rooms_of_one_floor_do_not_know_each_other_but_on_the_ground(tmp_path):
    found = plant(
        tmp_path,
        {
            "params.py": "from . import values\n",
            "values.py": "",
            "kernels/__init__.py": "from glm45_jax.optim import muon\n",
            "optim/muon.py": "from glm45_jax import params\n",
        },
    )
    assert [line.partition(": ")[0] for line in found] == ["glm45_jax/kernels/__init__.py:1"]


def test_main_knows_experiment_knows_plan_and_not_the_other_way(tmp_path):
    found = plant(
        tmp_path,
        {
            "main.py": "from glm45_jax import experiment, plan\n",
            "experiment.py": "from glm45_jax import main\n",
            "plan.py": "from glm45_jax import experiment\nimport experiments.pretrain\n",
        },
    )
    assert [line.partition(": ")[0] for line in found] == [
        "glm45_jax/experiment.py:1",
        "glm45_jax/plan.py:1",
        "glm45_jax/plan.py:2",
    ]


def test_jax_stays_out_of_data_workers_and_tensorflow_out_of_everything_else(tmp_path):
    found = plant(
        tmp_path,
        {
            "data/pack.py": "import jax.numpy as jnp\n",
            "data/types.py": "import jax\n",
            "data/tasks.py": "def load():\n    import seqio\n",
            "envs/math.py": "from flax import struct\n",
            "rollout/jetstream.py": "import jetstream\n",
            "rollout/server.py": "from jetstream.core import orchestrator\n",
        },
    )
    assert [line.partition(": ")[0] for line in found] == [
        "glm45_jax/data/pack.py:1",
        "glm45_jax/envs/math.py:1",
        "glm45_jax/rollout/server.py:1",
    ]


def test_a_room_on_no_floor_is_caught(tmp_path):
    assert plant(tmp_path, {"utils.py": ""}) == ["glm45_jax/utils: is on no floor"]


def test_importing_the_package_may_not_pull_in_a_room(tmp_path):
    found = plant(tmp_path, {"__init__.py": "from glm45_jax import params\n", "params.py": ""})
    assert [line.partition(": ")[0] for line in found] == ["glm45_jax/__init__.py:1"]
