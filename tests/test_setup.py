"""Which Python `launch/setup.sh` takes, and that setup.py and requirements.txt pin the same.

The script runs in `--which` mode with a PATH and a HOME that hold only interpreters made here: this
one under other version numbers, or a shim that refuses like pyenv's.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASH = "/bin/bash"
REFUSAL = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"


def fake(path: Path, version: tuple[int, int, int], *, lacks: str = "") -> Path:
    """Writes an interpreter at `path` that runs `-c CODE` in this one and claims `version`."""
    claim = f"import sys; sys.version_info = {(*version, 'final', 0)}; "
    claim += f"sys.modules['{lacks}'] = None; " if lacks else ""
    claim += "exec(sys.argv[1])"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec \'{sys.executable}\' -c "{claim}" "$2"\n')
    path.chmod(0o755)
    return path


def refuse(path: Path) -> Path:
    """Writes a shim that is on PATH and runs nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(REFUSAL)
    path.chmod(0o755)
    return path


@pytest.fixture
def which(tmp_path):
    """Runs `setup.sh --which` with HOME and PATH inside tmp_path; returns the finished process."""

    def run(*path: str, **env: str) -> subprocess.CompletedProcess[str]:
        folders = ":".join(str(tmp_path / folder) for folder in path) or "/nowhere"
        return subprocess.run(
            [BASH, str(ROOT / "launch" / "setup.sh"), "--which"],
            env={"PATH": folders, "HOME": str(tmp_path), **env},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def pins(lines: list[str]) -> dict[str, str]:
    """{name: version} of `name==version` lines; raises where a line pins nothing."""
    kept = [line for line in lines if line and not line.startswith("#")]
    return dict(line.split("==") for line in kept)


def test_an_old_python3_and_a_refusing_shim_are_passed_over(which, tmp_path):
    refuse(tmp_path / "shims" / "python3.12")
    fake(tmp_path / "shims" / "python3", (3, 11, 7))
    good = fake(tmp_path / "usr" / "python3.13", (3, 13, 0))
    assert which("shims", "usr").stdout.strip() == str(good)


def test_the_version_that_ci_runs_goes_before_newer_ones(which, tmp_path):
    fake(tmp_path / "usr" / "python3", (3, 14, 0))
    fake(tmp_path / "usr" / "python3.13", (3, 13, 2))
    good = fake(tmp_path / "opt" / "python3.12", (3, 12, 9))
    assert which("usr", "opt").stdout.strip() == str(good)


def test_a_python_that_cannot_make_a_venv_is_passed_over_and_its_package_named(which, tmp_path):
    bare = fake(tmp_path / "usr" / "python3.12", (3, 12, 3), lacks="ensurepip")
    done = which("usr")
    assert f"{bare}: 3.12.3 cannot make a venv: apt-get install python3.12-venv" in done.stderr
    good = fake(tmp_path / "opt" / "python3.13", (3, 13, 3))
    assert which("usr", "opt").stdout.strip() == str(good)


def test_pyenv_is_searched_after_path_newest_patch_of_312_first(which, tmp_path):
    versions = tmp_path / ".pyenv" / "versions"
    for minor, patch in ((11, 7), (12, 1), (12, 9), (13, 0), (16, 0)):
        fake(versions / f"3.{minor}.{patch}" / "bin" / "python", (3, minor, patch))
    good = fake(versions / "3.12.10" / "bin" / "python", (3, 12, 10))
    assert which().stdout.strip() == str(good)
    on_path = fake(tmp_path / "usr" / "python3", (3, 13, 1))
    assert which("usr").stdout.strip() == str(on_path)


def test_pyenv_root_moves_the_search(which, tmp_path):
    good = fake(tmp_path / "py env" / "versions" / "3.13.2" / "bin" / "python", (3, 13, 2))
    assert which(PYENV_ROOT=str(tmp_path / "py env")).stdout.strip() == str(good)


def test_uv_is_asked_last_for_a_python_it_already_has(which, tmp_path):
    managed = fake(tmp_path / "uv" / "cpython-3.12.11" / "bin" / "python3.12", (3, 12, 11))
    uv = tmp_path / "usr" / "uv"
    uv.parent.mkdir()
    uv.write_text(f'#!/bin/sh\n[ "$2" = find ] && echo "{managed}"\n')
    uv.chmod(0o755)
    assert which("usr").stdout.strip() == str(managed)


def test_with_nothing_usable_it_names_every_candidate_and_what_to_install(which, tmp_path):
    old = fake(tmp_path / "usr" / "python3", (3, 11, 7))
    new = fake(tmp_path / "usr" / "python", (3, 15, 0))
    shim = refuse(tmp_path / "usr" / "python3.12")
    done = which("usr")
    assert done.returncode == 1 and not done.stdout
    assert f"{old}: 3.11.7 is older than 3.12" in done.stderr
    assert f"{new}: 3.15.0 is newer than 3.14" in done.stderr
    assert f"{shim}: does not run (exit 127)" in done.stderr
    assert "apt-get install python3.12 python3.12-venv" in done.stderr


def test_glm45_python_wins_and_is_never_replaced_in_silence(which, tmp_path):
    fake(tmp_path / "usr" / "python3.12", (3, 12, 1))
    mine = fake(tmp_path / "mine" / "python", (3, 13, 1))
    assert which("usr", GLM45_PYTHON=str(mine)).stdout.strip() == str(mine)
    old = fake(tmp_path / "mine" / "old", (3, 10, 0))
    done = which("usr", GLM45_PYTHON=str(old))
    assert done.returncode == 1 and not done.stdout
    assert "3.10.0 is older than 3.12" in done.stderr


def test_setup_py_and_requirements_pin_the_same_versions():
    pinned = pins((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    }
    direct = pins(lists["CORE"] + lists["DEV"] + lists["JETSTREAM"])
    assert direct.items() <= pinned.items(), sorted(direct.items() - pinned.items())
