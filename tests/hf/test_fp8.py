"""FP8 folders, both released forms in, one out: what comes in is q * scale, bad ones are named."""

import json

import jax
import numpy as np
import pytest

from glm45_jax import hf
from glm45_jax.hf.__main__ import main
from glm45_jax.kernels import fp8
from tests.hf.common import BF16, E4M3, GOLDEN, SMALL, bits, config_of, params_of, tensors, write

NAME = "model.layers.1.mlp.experts.2.down_proj.weight"


def channel_folder(folder, damage=lambda named, config: None):
    """`golden/a` as compressed-tensors: a float32 scale for each output channel."""
    named, config = dict(tensors(GOLDEN / "a")), config_of(GOLDEN / "a")
    for name in list(named):
        if "_proj.weight" in name and "eh_proj" not in name:
            q, scale = fp8.quantize_channels(named[name])
            named[name] = np.asarray(q).view(E4M3)
            named[f"{name}_scale"] = np.array(scale)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
    }
    damage(named, config)
    return write(folder, named, config), named


def block_folder(folder, damage=lambda named, config: None):
    """`golden/a` in blocks of 16 x 32, DeepSeek style."""
    named, config = dict(tensors(GOLDEN / "a")), config_of(GOLDEN / "a")
    for name in list(named):
        if "_proj.weight" in name and "eh_proj" not in name:
            q, scale = fp8.quantize_blocks(named[name], (16, 32))
            named[name] = np.asarray(q).view(E4M3)
            named[f"{name}_scale_inv"] = np.array(scale)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    damage(named, config)
    return write(folder, named, config), named


def dequantized(q, scale, block):
    """q * scale in float32, rounded once to bfloat16; plain numpy."""
    scale = scale.astype(np.float32)
    if block is not None:
        scale = np.kron(scale, np.ones(block, np.float32))[: q.shape[0], : q.shape[1]]
    return (q.astype(np.float32) * scale).astype(BF16)


@pytest.mark.parametrize(
    ("make", "suffix", "block"),
    [(channel_folder, "_scale", None), (block_folder, "_scale_inv", (16, 32))],
)
def test_fp8_weights_come_in_as_q_times_scale(make, suffix, block, tmp_path):
    folder, named = make(tmp_path / "fp8")
    cfg, params = hf.load(folder)
    want = dequantized(named[NAME], named[NAME + suffix], block)
    assert bits(np.asarray(params.moe.ffn.down_EFD)[0, 2]) == bits(want.T)
    assert params.norm_D.dtype == np.float32  # not quantised: as it lies there
    full = tensors(GOLDEN / "a")[NAME]
    error = np.abs(want.astype(np.float32) - full).max() / np.abs(full).max()
    assert 0 < error < 2**-4
    assert main(["check", str(folder), "--sha256"]) == 0
    assert cfg.moe.experts == 8


def test_fp8_out_is_the_block_layout_and_reads_back_as_itself(tmp_path):
    params = params_of(SMALL)
    hf.save(tmp_path / "out", SMALL, params, fp8_block=(128, 128))
    named = tensors(tmp_path / "out")
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["weight_block_size"] == [128, 128]
    q, scale = fp8.quantize_blocks(np.asarray(params.moe.ffn.down_EFD[0, 2]).T)
    assert bits(named[NAME].view(np.uint8)) == bits(q)
    assert bits(named[NAME + "_scale_inv"]) == bits(scale)
    kept = {name for name in named if name.endswith("proj.weight") and named[name].dtype != E4M3}
    assert kept == {"model.layers.2.eh_proj.weight"}
    for name in ("lm_head.weight", "model.layers.1.mlp.gate.weight", "model.norm.weight"):
        assert named[name].dtype == np.float32
        if name != "model.norm.weight":
            assert name.removesuffix(".weight") in config["modules_to_not_convert"]
    _, back = hf.load(tmp_path / "out")
    want = dequantized(named[NAME], named[NAME + "_scale_inv"], (128, 128))
    assert bits(np.asarray(back.moe.ffn.down_EFD)[0, 2]) == bits(want.T)
    # Quantising what was dequantised moves nothing by more than the format's own step.
    hf.save(tmp_path / "again", SMALL, back, fp8_block=(128, 128))
    _, twice = hf.load(tmp_path / "again")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=2**-3, atol=1e-2
        ),
        back,
        twice,
    )


def test_the_command_writes_fp8_from_a_folder(tmp_path):
    out = str(tmp_path / "out")
    assert main(["convert", str(GOLDEN / "a"), out, "--to", "hf", "--dtype", "fp8"]) == 0
    named = tensors(tmp_path / "out")
    q, scale = fp8.quantize_blocks(tensors(GOLDEN / "a")[NAME])
    assert bits(named[NAME].view(np.uint8)) == bits(q)
    assert bits(named[NAME + "_scale_inv"]) == bits(scale)
    assert main(["convert", str(GOLDEN / "a"), str(tmp_path / "x"), "--dtype", "fp8"]) == 2


def nan_scale(named, config):
    named[NAME + "_scale"][3] = np.nan


def negative_scale(named, config):
    named[NAME + "_scale"][3] = -1


def no_scale(named, config):
    del named[NAME + "_scale"]


def misshapen_scale(named, config):
    named[NAME + "_scale"] = named[NAME + "_scale"][:-1]


def stray_scale(named, config):
    named["lm_head.weight_scale"] = np.ones((256, 1), np.float32)


def other_method(named, config):
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (nan_scale, "_scale: 1 NaN or infinite"),
        (negative_scale, "negative"),
        (no_scale, "_scale is missing"),
        (misshapen_scale, r"_scale is float32\[63, 1\], needs \[64, 1\]"),
        (stray_scale, "unknown: lm_head.weight_scale"),
        (other_method, "'gptq'"),
    ],
)
def test_a_bad_scale_is_named(damage, said, tmp_path):
    folder, _ = channel_folder(tmp_path / "bad", damage)
    with pytest.raises(ValueError, match=said):
        hf.load(folder)


def test_a_block_that_is_none_is_named(tmp_path):
    def damage(named, config):
        config["quantization_config"]["weight_block_size"] = [16, 0]

    folder, _ = block_folder(tmp_path / "bad", damage)
    with pytest.raises(ValueError, match=r"weight_block_size \[16, 0\]"):
        hf.load(folder)
    assert json.loads((folder / "config.json").read_text())
