"""Laws of released folders: load∘save = id to the bit, on any mesh; what is wrong is named."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from glm45_jax import hf
from glm45_jax import params as params_lib
from glm45_jax.hf import names
from glm45_jax.hf.config_json import to_json
from glm45_jax.hf.sources import of_params
from glm45_jax.hf.writer import write_folder
from glm45_jax.model import transformer
from glm45_jax.model.config import glm45, glm45_air, glm47_flash
from glm45_jax.sharding import MeshShape, Rules, make_mesh, shardings
from tests.hf.common import (
    BF16,
    FOLDERS,
    GOLDEN,
    SMALL,
    SMALL_MLA,
    bf16,
    bits,
    config_of,
    params_of,
    same,
    tensors,
    write,
)

MESHES = (
    MeshShape(fsdp=8),
    MeshShape(fsdp=2, expert=2, tensor=2),
    MeshShape(data=2, fsdp=1, expert=4),
)


def test_a_released_checkpoint_has_as_many_tensors_as_the_family_s():
    assert len(hf.table(glm45())) == 44_691  # spec 3.1
    for cfg in (glm45(), glm45_air(), glm47_flash()):
        entries = hf.table(cfg)
        assert len({e.name for e in entries}) == len(entries)
        held = {name for name, _ in params_lib.leaves_with_path(transformer.specs(cfg))}
        assert {e.leaf for e in entries} == held


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_golden_folder_comes_back_tensor_by_tensor_and_its_config_byte_by_byte(folder, tmp_path):
    cfg, params = hf.load(GOLDEN / folder)
    hf.save(tmp_path / "out", cfg, params, max_shard_bytes=200_000, files=GOLDEN / folder)
    ours, theirs = tensors(tmp_path / "out"), tensors(GOLDEN / folder)
    assert {k: bits(v) for k, v in ours.items()} == {k: bits(v) for k, v in theirs.items()}
    assert (tmp_path / "out/config.json").read_bytes() == (
        GOLDEN / folder / "config.json"
    ).read_bytes()
    again, reloaded = hf.load(tmp_path / "out")
    assert again == cfg
    assert same(reloaded, params)


@pytest.mark.parametrize("cfg", [SMALL, SMALL_MLA, dataclasses.replace(SMALL, n_mtp=0)])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_load_after_save_is_the_identity_without_any_file_to_go_by(cfg, dtype, tmp_path):
    cfg = cfg if dtype == np.float32 else bf16(cfg)
    params = params_of(cfg, dtype)
    hf.save(tmp_path / "out", cfg, params)
    again, reloaded = hf.load(tmp_path / "out")
    assert dataclasses.replace(again, remat=cfg.remat) == cfg
    assert same(reloaded, params)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("cfg", [SMALL, SMALL_MLA], ids=["gqa", "mla"])
def test_every_mesh_gets_the_same_bits(cfg, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(names, "BLOCK_BYTES", 512)  # many blocks a tensor
    monkeypatch.setattr(names, "_SCALE_ROWS", 1)
    params = params_of(cfg)
    hf.save(tmp_path / "out", cfg, params)
    made = make_mesh(mesh)
    _, reloaded = hf.load(tmp_path / "out", mesh=made, rules=Rules())
    assert same(reloaded, params)
    wanted = shardings(transformer.specs(cfg), made, Rules())
    assert jax.tree.map(lambda x: x.sharding, reloaded) == wanted


def test_the_dtype_asked_for_is_the_dtype_of_all_but_the_router_s_bias(tmp_path):
    params = params_of(bf16(SMALL), BF16)
    hf.save(tmp_path / "out", bf16(SMALL), params)
    cfg, wide = hf.load(tmp_path / "out", dtype=np.float32)
    assert cfg.dtype == "float32"
    assert {str(x.dtype) for x in jax.tree.leaves(wide)} == {"float32"}
    assert same(wide, jax.tree.map(lambda x: x.astype(np.float32), params))
    cfg, narrow = hf.load(tmp_path / "out", dtype=BF16)
    assert (cfg.dtype, narrow.moe.ffn.bias_E.dtype) == ("bfloat16", np.float32)


def test_the_experts_of_transformers_5_are_taken_apart(tmp_path):
    named, config = tensors(GOLDEN / "a"), config_of(GOLDEN / "a")
    for layer in (1, 2, 3):
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = range(config["n_routed_experts"])
        take = {
            kind: np.stack([named.pop(f"{prefix}{e}.{kind}_proj.weight") for e in experts])
            for kind in ("gate", "up", "down")
        }
        named[prefix + "gate_up_proj"] = np.concatenate([take["gate"], take["up"]], axis=1)
        named[prefix + "down_proj"] = take["down"]
    _, params = hf.load(write(tmp_path / "fused", named, config))
    assert same(params, hf.load(GOLDEN / "a")[1])


def test_the_tokenizer_and_unknown_keys_go_along(tmp_path):
    cfg, params = hf.load(GOLDEN / "b")
    old = tmp_path / "old"
    shutil.copytree(GOLDEN / "b", old)
    (old / "io.npz").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (old / name).write_text(name)
    config = {**config_of(old), "transformers_version": "4.55"}
    (old / "config.json").write_text(json.dumps(config))
    changed = dataclasses.replace(
        cfg, mixer=dataclasses.replace(cfg.mixer, rope_theta=1e6), init_std=0.02
    )
    hf.save(tmp_path / "new", changed, params, files=old)
    assert (tmp_path / "new/tokenizer.json").read_text() == "tokenizer.json"
    written = config_of(tmp_path / "new")
    assert written == {**config, "rope_theta": 1e6}
    generation = json.loads((tmp_path / "new/generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([1, 2], 0)


def test_a_config_with_rope_parameters_is_read_and_keeps_its_form():
    flat = config_of(GOLDEN / "a")
    nested = {k: v for k, v in flat.items() if k not in ("rope_theta", "partial_rotary_factor")}
    nested["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": flat["rope_theta"],
        "partial_rotary_factor": 0.5,
    }
    assert hf.config(nested) == hf.config(flat)
    assert to_json(hf.config(nested), nested) == {**nested, "rope_scaling": None}


def test_the_released_configs_are_written_and_read_back():
    for cfg in (glm45(), glm45_air(), glm47_flash()):
        written = json.loads(json.dumps(to_json(cfg)))
        assert dataclasses.replace(hf.config(written), remat=cfg.remat) == cfg
    assert to_json(glm45())["eos_token_id"] == [151329, 151336, 151338]


def test_a_save_never_writes_over_what_is_there_and_leaves_nothing_half_written(tmp_path):
    params = params_of(SMALL)
    hf.save(tmp_path / "out", SMALL, params)
    before = sorted(p.read_bytes() for p in (tmp_path / "out").iterdir())
    with pytest.raises(ValueError, match="there and not empty"):
        hf.save(tmp_path / "out", SMALL, params)
    assert sorted(p.read_bytes() for p in (tmp_path / "out").iterdir()) == before

    def broken(entry, ranges):
        if entry.leaf == "head_DV":
            raise KeyboardInterrupt
        return of_params(SMALL, params).rows(entry, ranges)

    source = dataclasses.replace(of_params(SMALL, params), rows=broken)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "second", source)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_params_of_another_model_are_refused_with_both_shapes(tmp_path):
    with pytest.raises(ValueError, match=r"embed_VD has shape \(48, 16\).*needs \(49, 16\)"):
        hf.save(tmp_path / "out", dataclasses.replace(SMALL, vocab=49), params_of(SMALL))
    assert not list(tmp_path.iterdir())


def test_an_mtp_layer_that_an_exporter_dropped_is_missed_and_can_be_left_out(tmp_path):
    named = {k: v for k, v in tensors(GOLDEN / "a").items() if "layers.3." not in k}
    config = config_of(GOLDEN / "a")
    folder = write(tmp_path / "dropped", named, config)
    with pytest.raises(ValueError, match=r"some exporters drop it.*num_nextn_predict_layers to 0"):
        hf.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    cfg, params = hf.load(folder)
    assert (cfg.n_mtp, params.mtp) == (0, None)
    assert same(params, hf.load(GOLDEN / "a")[1].replace(mtp=None))


def test_an_mtp_copy_that_is_no_copy_is_refused(tmp_path):
    named = dict(tensors(GOLDEN / "b"))
    named["model.layers.4.shared_head.head.weight"] = named["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"is not a copy of lm_head.weight"):
        hf.load(write(tmp_path / "own", named, config_of(GOLDEN / "b")))


def test_one_error_lists_everything(tmp_path):
    named, config = dict(tensors(GOLDEN / "b")), config_of(GOLDEN / "b")
    for e in range(8):
        del named[f"model.layers.2.mlp.experts.{e}.up_proj.weight"]
    del named["model.norm.weight"]
    named["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    named["lm_head.weight"] = named["lm_head.weight"][:-1]
    with pytest.raises(ValueError) as caught:
        hf.load(write(tmp_path / "bad", named, config))
    text = str(caught.value)
    assert "missing: 8 like model.layers.*.mlp.experts.*.up_proj.weight" in text
    assert "missing: model.norm.weight" in text
    assert "unknown: model.layers.0.self_attn.rotary_emb.inv_freq" in text
    assert "lm_head.weight has shape (255, 64), the config needs (256, 64)" in text


def test_tensors_of_other_dtypes_in_one_leaf_are_read_as_float32(tmp_path):
    params = params_of(bf16(SMALL), BF16)
    hf.save(tmp_path / "out", bf16(SMALL), params)
    named = tensors(tmp_path / "out")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    named[name] = named[name].astype(np.float32) + np.float32(2**-12)
    folder = write(tmp_path / "mixed", named, config_of(tmp_path / "out"))
    _, mixed = hf.load(folder)
    assert mixed.moe.ffn.up_EDF.dtype == np.float32
    assert mixed.moe.ffn.gate_EDF.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.asarray(mixed.moe.ffn.up_EDF)[0, 0], named[name].T)
