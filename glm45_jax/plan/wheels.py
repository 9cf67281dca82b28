"""Compilers for machines that are not here: wheels of gigabytes, fetched when asked into a folder
of their own, never into the environment.

The pins are those of requirements-plan-tpu.txt, requirements-plan-gpu.txt and the extras of
setup.py; a test holds them together.
"""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import subprocess
import sys

PINS: dict[str, tuple[str, ...]] = {
    "tpu": ("libtpu==0.0.48.1",),
    # What compiles, not what runs: no cuBLAS, cuDNN, NCCL. ptxas and libdevice are in the last two.
    "gpu": (
        "jax-cuda13-pjrt==0.11.2",
        "jax-cuda13-plugin==0.11.2",
        "nvidia-cuda-nvcc==13.5.37",
        "nvidia-nvvm==13.5.37",
    ),
}
MODULE = {"tpu": "libtpu", "gpu": "jax_plugins.xla_cuda13"}
SIZE = {"tpu": "0.2 GB to fetch, 0.7 GB on disk", "gpu": "0.3 GB to fetch, 0.7 GB on disk"}


def folder(platform: str) -> pathlib.Path:
    """Where the compiler of a platform goes: below the working directory."""
    return pathlib.Path.cwd() / ".cache" / f"plan-{platform}"


def paths(platform: str) -> list[str]:
    """What the child's path needs: the folder, unless the environment has the compiler itself."""
    return [] if _installed(platform) else [str(folder(platform))]


def missing(platform: str) -> str:
    """Why this platform cannot be compiled for, and the way out; "" where it can."""
    if _installed(platform) or folder(platform).is_dir():
        return ""
    return (
        f"no compiler for {platform} targets in {folder(platform)}: add --install to fetch "
        f"{', '.join(PINS[platform][:2])}{' ...' if len(PINS[platform]) > 2 else ''} there "
        f"({SIZE[platform]}), or pip install glm45_jax[plan-{platform}]"
    )


def install(platform: str) -> pathlib.Path:
    """Fetches the pinned wheels; the folder appears when it is whole.

    Raises: ValueError where pip fails, with its last lines.
    """
    whole, half = folder(platform), folder(platform).with_suffix(".part")
    shutil.rmtree(half, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check"]
    command += ["--target", str(half), *PINS[platform]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise ValueError(f"pip could not fetch {', '.join(PINS[platform])}: {last}")
    shutil.rmtree(whole, ignore_errors=True)
    half.rename(whole)
    return whole


def _installed(platform: str) -> bool:
    try:
        return importlib.util.find_spec(MODULE[platform]) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False
