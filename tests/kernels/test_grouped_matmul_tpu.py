"""The Pallas kernels for TPU, of grouped matmul and routing, compiled for v5p and v6e at the shapes
of GLM-4.5 and GLM-4.5-Air by a compiler that needs no TPU. Nothing runs.
"""

import functools
import json
import sys
import time

import pytest

from glm45_jax.plan import targets
from tests.kernels import ahead

CASES = {  # rows, width, width of an expert, experts
    "air gate": (65_536, 4096, 1408, 128),
    "air down": (65_536, 1408, 4096, 128),
    "glm45 gate": (65_536, 5120, 1536, 160),
    "air decoding": (512, 4096, 1408, 128),
}
ROUTES = {
    "air route": (8192, 128, 8),
    "glm45 route": (8192, 160, 8),
    "largest route": (131_072, 512, 8),
}
PRODUCTS = ("fwd", "dlhs", "drhs")
NAMES = sorted([f"{case} {product}" for case in CASES for product in PRODUCTS] + list(ROUTES))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5p:2x2x1", "v6e:2x2"])
def test_the_tpu_kernels_compile_at_the_models_shapes(target, monkeypatch, capsys):
    rows = ahead.compiled(target, [sys.executable, __file__, target], monkeypatch)
    ahead.show(target, rows, capsys)
    assert sorted(row["name"] for row in rows) == NAMES
    for row in rows:
        # One kernel, and no copy of a matrix or of rows beside it.
        assert row["kernels"] == 1 and row["temporary_mib"] < 16, row


def main(name: str) -> None:
    """The child: compiles every case for the first device of this target, a line each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from glm45_jax.kernels import grouped_matmul_tpu as grouped
    from glm45_jax.kernels import routing_tpu

    device = targets.topology(targets.parse(name)).devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("x",))
    here = jax.sharding.NamedSharding(mesh, jax.P())
    chip = grouped.CHIPS[device.device_kind]

    def report(name, run, *shapes):
        args = [jax.ShapeDtypeStruct(s, dtype, sharding=here) for s, dtype in shapes]
        began = time.process_time()  # of all cores, whatever else the machine does
        compiled = jax.jit(run).lower(*args).compile()
        row = {"name": name, "cpu_s": round(time.process_time() - began, 1)}
        row["kernels"] = compiled.as_text().count('custom_call_target="tpu_custom_call"')
        memory = compiled.memory_analysis()
        row["peak_gib"] = round(memory.peak_memory_in_bytes / 2**30, 2)
        row["temporary_mib"] = round(memory.temp_size_in_bytes / 2**20, 1)
        print(json.dumps(row), flush=True)

    half, sizes = jnp.bfloat16, jnp.int32
    for case, (R, D, F, E) in CASES.items():
        x, w, g, rows = ((R, D), half), ((E, D, F), half), ((R, F), half), ((E,), sizes)
        multiply = functools.partial(grouped.rows_by_matrix, chip=chip)
        back = functools.partial(multiply, transposed=True)
        report(f"{case} fwd", multiply, x, w, rows)
        report(f"{case} dlhs", back, g, w, rows)
        report(f"{case} drhs", functools.partial(grouped.rows_by_rows, chip=chip), x, g, rows)
    for case, (M, E, A) in ROUTES.items():
        how = dict(top_k=A, groups=1, top_groups=1, norm_topk=True, scale=2.5)
        logits, bias = ((M, E), jnp.float32), ((E,), jnp.float32)
        report(case, functools.partial(routing_tpu.route, **how), logits, bias)


if __name__ == "__main__":
    main(sys.argv[1])
