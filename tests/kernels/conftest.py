"""A Hopper that is not here, for what is decided before anything runs."""

from types import SimpleNamespace

import pytest

from glm45_jax.kernels import attention, dispatch


@pytest.fixture
def on_hopper(monkeypatch):
    """Kernels are picked, refused and lowered as for one; its real topology wants CUDA's compiler,
    see test_compile_gpu.py.
    """
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
    for module in (dispatch, attention):
        monkeypatch.setattr(module, "device", lambda: hopper)
