"""Strict JAX on eight virtual CPU devices, with a compile cache that all workers share.

GLM45_TEST_PLATFORM=cuda or tpu runs on that platform instead, with the CPU beside it.
"""

import importlib.util
import os
from pathlib import Path

PLATFORM = os.environ.get("GLM45_TEST_PLATFORM", "cpu")
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "jax"
# In the environment too, before jax is imported: tests that start processes share the cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# The suite is bound by compiling: LLVM's optimisations cost a third of it and win nothing on tiny
# models.
FAST_COMPILE = "--xla_backend_optimization_level=0"
# The newer emitters take each fusion through MLIR, which is more than half of a step's compile.
PLAIN_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
# Eight devices share the cores: on a loaded machine one may be minutes late at a collective, and
# XLA aborts the process after 40 seconds.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
for flag in (FAST_COMPILE, PLAIN_EMITTERS, PATIENCE):
    if PLATFORM == "cpu" and flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu" if PLATFORM == "cpu" else f"{PLATFORM},cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

if importlib.util.find_spec("hypothesis"):  # the bare accelerator machines have none
    import hypothesis

    # No deadline: the first example compiles. Derandomised: a failure in CI is one here.
    hypothesis.settings.register_profile("repo", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("repo")


@pytest.fixture(scope="module", autouse=True)
def executables_go_with_their_file():
    """Every compiled program maps memory; a process that keeps all of the suite's runs into the
    kernel's 65,530 mappings and crashes.
    """
    yield
    jax.clear_caches()
