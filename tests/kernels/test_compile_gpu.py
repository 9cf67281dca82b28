"""The Pallas kernels for Hopper compiled for an H100 that is not here, at every large shape of the
table and those of decoding and FP8. Nothing runs: sizes that do not fit shared memory, layouts and
registers are what a compiler can tell.
"""

import dataclasses
import functools
import json
import sys
import time

import pytest

from glm45_jax.kernels.shapes import (
    ATTENTION,
    DECODE,
    GROUPED,
    NEWTON_SCHULZ,
    ROUTING,
    AttentionShape,
)
from glm45_jax.plan import targets
from tests.kernels import ahead

TARGET = "h100:1x1"
WIDE = {  # rows, inputs, outputs; of FP8: the prompt's rows and a decode step's
    "air attention out": (4096, 12_288, 4096),
    "air dense": (64, 4096, 10_944),
}
HEADS = {  # widths that no model here has
    "192 and 192": AttentionShape(8, 4096, 16, 16, 192),
    "192 and 256": AttentionShape(8, 4096, 16, 16, 192, U=256),
    "256 and 128": AttentionShape(8, 4096, 16, 4, 256, U=128),
}

FUSED = {  # backward pass in one kernel
    "128": AttentionShape(1, 4096, 96, 8, 128),
    "128 packed": AttentionShape(1, 4096, 96, 8, 128, packed=True),
    "64 packed": AttentionShape(1, 4096, 96, 8, 64, packed=True),
}


def attentions():
    """Shapes of attention to compile."""
    return large(ATTENTION) | HEADS


def large(table):
    return {name: shape for name, shape in table.items() if not shape.small}


NAMES = sorted(
    [f"attention {name}" for name in attentions()]
    + [f"attention fused {name}" for name in FUSED]
    + [f"decode {name}" for name in large(DECODE)]
    + [f"{op} {name}" for name in large(GROUPED) for op in ("grouped", "gated", "grouped fp8")]
    + [f"{op} {name}" for name in large(ROUTING) for op in ("route", "copies")]
    + [f"fp8 {name}" for name in WIDE]
    + [f"newton_schulz {name}" for name in large(NEWTON_SCHULZ)]
)


@pytest.mark.slow
def test_every_hopper_kernel_compiles_at_every_large_shape(monkeypatch, capsys):
    rows = ahead.compiled(TARGET, [sys.executable, __file__], monkeypatch)
    ahead.show(TARGET, rows, capsys)
    assert sorted(row["name"] for row in rows) == NAMES
    assert not [row for row in rows if row["kernels"] == 0]
    assert not [row for row in rows if row["ptxas"] == 0]  # else it would not say what follows
    assert not [row for row in rows if row["losses"]]  # such as products one after the other


def main() -> None:
    """The child: compiles every case, a line each."""
    import jax
    import jax.numpy as jnp

    from glm45_jax import sharding
    from glm45_jax.kernels import routing
    from glm45_jax.kernels.attention import attention
    from glm45_jax.kernels.attention_gpu import flash_attention, tuning_of
    from glm45_jax.kernels.decode_attention import decode_attention
    from glm45_jax.kernels.fp8 import to_fp8
    from glm45_jax.kernels.fp8_matmul import fp8_matmul, grouped_matmul_fp8
    from glm45_jax.kernels.grouped_matmul import gated_matmul, grouped_matmul
    from glm45_jax.kernels.newton_schulz import newton_schulz

    devices = targets.topology(targets.parse(TARGET)).devices
    mesh = sharding.make_mesh(sharding.MeshShape(), devices[:1])
    here = jax.sharding.NamedSharding(mesh, jax.P())
    half, whole, i32 = jnp.bfloat16, jnp.float32, jnp.int32

    def report(name, run, *args):
        args = jax.tree.map(lambda x: of(x.shape, x.dtype), args)
        began = time.monotonic()
        with sharding.use(mesh, sharding.Rules()):
            compiled = jax.jit(run).lower(*args).compile()
        row = {"name": name, "seconds": round(time.monotonic() - began, 1)}
        row["kernels"] = compiled.as_text().count('custom_call_target="mosaic_gpu')
        row["temporary_mib"] = round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)
        print(json.dumps(row), flush=True)

    def of(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def quantized(shape):
        return jax.eval_shape(to_fp8, of(shape, half))

    def both_ways(run, *args):
        out, pull = jax.vjp(run, *args)
        return out, pull(out)

    for name, s in attentions().items():
        q, k = of((s.B, s.T, s.N, s.H), half), of((s.B, s.T, s.K, s.H), half)
        segments = (of((s.B, s.T), i32),)
        run = lambda q, k, v, seg: both_ways(  # noqa: E731
            functools.partial(attention, segments_BT=seg, impl="mosaic"), q, k, v
        )
        report(f"attention {name}", run, q, k, of(s.values, half), *segments)
    for name, s in FUSED.items():
        q, k = of((s.B, s.T, s.N, s.H), half), of((s.B, s.T, s.K, s.H), half)
        tuning = dataclasses.replace(tuning_of(s.H, s.H), fused=True)
        run = lambda q, k, v, seg, s=s, tuning=tuning: both_ways(  # noqa: E731
            functools.partial(
                flash_attention, segments_BT=seg if s.packed else None, tuning=tuning
            ),
            q,
            k,
            v,
        )
        report(f"attention fused {name}", run, q, k, k, of((s.B, s.T), i32))
    for name, s in large(DECODE).items():
        kv = of((2, s.B * s.S // s.page, s.page, s.K, s.H), jnp.float8_e4m3fn if s.fp8 else half)
        run = lambda q, k, v, layer, table, start: decode_attention(  # noqa: E731
            q, k, v, layer=layer, table_BP=table, start_B=start, impl="mosaic"
        )
        where = of((), i32), of((s.B, s.S // s.page), i32), of((s.B,), i32)
        report(f"decode {name}", run, of((s.B, s.T, s.N, s.H), half), kv, kv, *where)
    for name, s in large(GROUPED).items():
        x, rows = of((s.R, s.D), half), of((s.E,), i32)
        run = lambda x, w, rows: both_ways(  # noqa: E731
            lambda x, w: grouped_matmul(x, w, rows, impl="mosaic"), x, w
        )
        w = of((s.E, s.D, s.F), half)
        report(f"grouped {name}", run, x, w, rows)
        run = lambda x, gate, up, rows: both_ways(  # noqa: E731
            lambda *some: gated_matmul(*some, rows, impl="mosaic"), x, gate, up
        )
        report(f"gated {name}", run, x, w, w, rows)
        run = functools.partial(grouped_matmul_fp8, impl="mosaic")
        report(f"grouped fp8 {name}", run, x, quantized((s.E, s.D, s.F)), rows)
    for name, s in large(ROUTING).items():
        run = functools.partial(routing.route, top_k=s.A, impl="mosaic")
        report(f"route {name}", run, of((s.M, s.E), whole), of((s.E,), whole))
        R = s.M * s.A
        run = lambda x, gate, order: both_ways(  # noqa: E731
            lambda x, gate: routing.combine(
                routing.permute(x, order, impl="mosaic"), gate, order, impl="mosaic"
            ),
            x,
            gate,
        )
        width = 5120 if name == "glm45" else 4096
        report(f"copies {name}", run, of((s.M, width), half), of((s.M, s.A), whole), of((R,), i32))
    for name, (M, I, O) in WIDE.items():
        run = functools.partial(fp8_matmul, impl="mosaic")
        report(f"fp8 {name}", run, of((M, I), half), quantized((I, O)))
    for name, s in large(NEWTON_SCHULZ).items():
        run = functools.partial(newton_schulz, impl="mosaic")
        report(f"newton_schulz {name}", run, of((s.B, s.m, s.n), half))


if __name__ == "__main__":
    main()
