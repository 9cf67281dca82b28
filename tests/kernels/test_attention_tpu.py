"""The attention kernels for TPU through TPU's compiler, which needs no TPU: what `impl="auto"`
takes on a mesh of chips that are not here, at GLM shapes.
"""

import json
import sys

import pytest

from tests.kernels import ahead

CHIPS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# A child compiles each case and prints what the compiler said.
CHILD = r"""
import functools, json, sys, time
import jax
from jax.sharding import NamedSharding, PartitionSpec
from glm45_jax import sharding
from glm45_jax.kernels.attention import attention
from glm45_jax.kernels.decode_attention import decode_attention
from glm45_jax.plan import targets

def training(B, T, N, K, H, U, segments):
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, U), (B, T, N, U)]
    return [(x, "bfloat16") for x in shapes] + [((B, T), "int32")] * segments

def both(q, k, v, dout, segments=None):
    out, pull = jax.vjp(functools.partial(attention, segments_BT=segments), q, k, v)
    return out, *pull(dout)

def decoding(B, T, N, K, H, U, S, page, dtype, latent):
    pages = (4, B * S // page, page, K)  # of four layers
    stored = [((*pages, width), dtype) for width in (H - U if latent else H, U)]
    where = [((), "int32"), ((B, S // page), "int32"), ((B,), "int32")]
    return [((B, T, N, H), "bfloat16"), *stored, *where]

def decode(q, k, v, layer, table, start, latent):
    where = dict(layer=layer, table_BP=table, start_B=start)
    return decode_attention(q, k, v, **where, skip=1, latent=latent)

def place(mesh, shape, dtype):
    heads, spec = {4: 2, 5: 3}.get(len(shape)), [None] * len(shape)
    if heads is not None and shape[heads] % mesh.shape["tensor"] == 0:
        spec[heads] = "tensor"
    lies = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype), sharding=lies)

target, cases = json.loads(sys.argv[1])
devices = targets.topology(targets.parse(target)).devices
for n, kind, *shape in cases:
    mesh = sharding.make_mesh(sharding.MeshShape(tensor=n), devices[:n])
    shapes = training(*shape) if kind == "train" else decoding(*shape)
    run = both if kind == "train" else functools.partial(decode, latent=shape[-1])
    began = time.monotonic()
    with sharding.use(mesh, sharding.Rules()):
        compiled = jax.jit(run).lower(*(place(mesh, *x) for x in shapes)).compile()
    memory = compiled.memory_analysis()
    said = dict(
        seconds=time.monotonic() - began,
        kernels=compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        temporary=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
    )
    print(json.dumps(said), flush=True)
"""
# Devices, "train", B, T, N, K, H, U, segments; or devices, "decode", B, T, N, K, H, U, S, size of
# a page, dtype of pages, latent.
CASES = {
    "air 4k": (1, "train", 8, 4096, 96, 8, 128, 128, False),
    "air 4k packed, a token less": (1, "train", 8, 4095, 96, 8, 128, 128, True),
    "air 4k packed on four": (4, "train", 8, 4096, 96, 8, 128, 128, True),
    "air 32k packed": (1, "train", 1, 32768, 96, 8, 128, 128, True),
    "heads of 64": (1, "train", 2, 4096, 16, 4, 64, 64, True),
    "latents expanded": (1, "train", 1, 4096, 20, 20, 256, 256, True),
    "keys 192, values 128": (1, "train", 1, 4096, 16, 16, 192, 128, True),
    "decode 8k": (1, "decode", 64, 1, 96, 8, 128, 128, 8192, 16, "bfloat16", False),
    "drafts 8k fp8": (1, "decode", 64, 4, 96, 8, 128, 128, 8192, 16, "float8_e4m3fn", False),
    "decode 8k on four": (4, "decode", 64, 1, 96, 8, 128, 128, 8192, 16, "bfloat16", False),
    "decode 32k": (1, "decode", 32, 1, 96, 8, 128, 128, 32768, 16, "bfloat16", False),
    "decode latents": (1, "decode", 64, 1, 20, 1, 576, 512, 8192, 64, "bfloat16", True),
}


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_compiles_at_glm_shapes_and_copies_no_pages(chip, monkeypatch):
    told = json.dumps([CHIPS[chip], list(CASES.values())])
    found = ahead.compiled(CHIPS[chip], [sys.executable, "-c", CHILD, told], monkeypatch)
    assert len(found) == len(CASES)
    for (name, case), one in zip(CASES.items(), found, strict=True):
        print(chip, name, f"{one['seconds']:.1f} s, {one['temporary'] / 2**20:.0f} MiB temporary")
        assert one["kernels"] == (1 if case[1] == "decode" else 2), name
        if case[1] == "decode":  # of pages laid out anew only the half full vectors of one layer
            assert one["temporary"] < one["arguments"] / (8 if case[-1] else 50), name
