"""Whether a box can be made here; the mark that skips where none can, with the reason."""

import functools
import shutil

import pytest

from glm45_jax.envs import sandbox


@functools.lru_cache(maxsize=1)
def why_not() -> str | None:
    return sandbox.missing()


needs_box = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
docker = shutil.which("docker")
