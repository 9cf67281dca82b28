"""Laws of conversion: a folder to a checkpoint of ours and back is the identity; runs go out."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from glm45_jax import hf, streamed, values
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.hf import convert, names
from glm45_jax.hf.__main__ import main
from glm45_jax.hf.convert import differences, digests, open_source
from glm45_jax.model import transformer
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


def abstract(params):
    return {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)}


@pytest.mark.parametrize("folder", FOLDERS)
def test_there_and_back_is_the_identity_to_the_bit_and_to_the_byte_of_the_config(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(names, "BLOCK_BYTES", 4096)  # many chunks a leaf
    monkeypatch.setattr(names, "_SCALE_ROWS", 1)
    there, back = str(tmp_path / "ours"), str(tmp_path / "back")
    assert main(["convert", str(GOLDEN / folder), there]) == 0
    assert main(["convert", there, back]) == 0
    old, new = tensors(GOLDEN / folder), tensors(tmp_path / "back")
    assert {k: bits(v) for k, v in new.items()} == {k: bits(v) for k, v in old.items()}
    assert (tmp_path / "back/config.json").read_bytes() == (
        GOLDEN / folder / "config.json"
    ).read_bytes()
    assert main(["diff", there, back]) == 0
    _, params = hf.load(GOLDEN / folder)
    restored = Checkpoints(tmp_path / "ours/checkpoints").restore(abstract(params))
    assert same(restored.state["params"], params)


def test_a_tensor_that_lies_in_another_dtype_than_its_leaf_comes_back_in_it(tmp_path):
    hf.save(tmp_path / "out", bf16(SMALL), params_of(bf16(SMALL), BF16))
    named = tensors(tmp_path / "out")
    router = "model.layers.2.mlp.gate.weight"  # of the MTP layer; a leaf of its own
    expert = "model.layers.1.mlp.experts.2.down_proj.weight"
    for name in (router, expert):
        named[name] = named[name].astype(np.float32) * np.float32(1.0001)
    folder = write(tmp_path / "mixed", named, config_of(tmp_path / "out"))
    convert.to_checkpoint(open_source(folder), tmp_path / "ours")
    convert.to_folder(open_source(tmp_path / "ours"), tmp_path / "back")
    found = tensors(tmp_path / "back")
    assert {k: bits(v) for k, v in found.items()} == {k: bits(v) for k, v in named.items()}


@pytest.mark.parametrize("cfg", [SMALL, SMALL_MLA], ids=["gqa", "mla"])
def test_the_weights_of_a_run_become_a_folder_in_the_dtype_that_is_asked_for(cfg, tmp_path):
    params = params_of(cfg)
    state = {"params": jax.tree.map(jax.numpy.asarray, params), "step": jax.numpy.int32(3)}
    experiment = {"dataclass": "experiments:Gone", "fields": {"model": values.to_json(cfg)}}
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        checkpoints.save(3, state, sidecars={"experiment": experiment})
    run = str(tmp_path / "run")
    assert main(["convert", run, str(tmp_path / "f32")]) == 0
    assert main(["convert", run, str(tmp_path / "bf16"), "--dtype", "bfloat16"]) == 0
    assert same(hf.load(tmp_path / "f32")[1], params)
    small, narrow = hf.load(tmp_path / "bf16")
    assert small.dtype == "bfloat16"
    want = jax.tree.map(lambda x: x.astype(BF16), params)
    for mine, theirs in zip(jax.tree.leaves(narrow), jax.tree.leaves(want), strict=True):
        if mine.dtype == BF16:
            assert bits(mine) == bits(theirs)
    assert same(narrow.moe.ffn.bias_E, params.moe.ffn.bias_E)


def test_a_conversion_that_is_interrupted_leaves_no_destination(tmp_path):
    source = open_source(GOLDEN / "b")

    def broken(entry, ranges):
        if entry.leaf == "moe.ffn.down_EFD":
            raise KeyboardInterrupt
        return source.rows(entry, ranges)

    with pytest.raises(BaseException) as caught:
        convert.to_checkpoint(dataclasses.replace(source, rows=broken), tmp_path / "ours")
    assert isinstance(caught.value, KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_holds_something_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/mine").write_text("x")
    assert main(["convert", str(GOLDEN / "b"), str(tmp_path / "ours")]) == 2
    assert "there and not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "ours").iterdir()] == ["mine"]


def test_a_source_that_is_none_is_named(tmp_path, capsys):
    assert main(["check", str(tmp_path / "gone")]) == 2
    assert main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "gone is not there" in said
    assert "neither config.json" in said


def test_check_counts_every_tensor_and_prints_the_sum_of_its_bytes(capsys):
    assert main(["check", str(GOLDEN / "a"), "--sha256"]) == 0
    said = capsys.readouterr().out
    assert "131 tensors" in said
    named = tensors(GOLDEN / "a")
    for digest in digests(open_source(GOLDEN / "a")):
        import hashlib

        assert digest.sha256 == hashlib.sha256(named[digest.name].tobytes()).hexdigest()
        assert f"{digest.sha256}  {digest.name}" in said


def test_a_nan_among_the_weights_is_an_error_of_check(tmp_path, capsys):
    params = params_of(SMALL)
    params.embed_VD[3, 1] = np.nan
    hf.save(tmp_path / "out", SMALL, params)
    assert main(["check", str(tmp_path / "out"), "--sha256"]) == 2
    assert "model.embed_tokens.weight has 1 NaN" in capsys.readouterr().out


def test_diff_names_each_tensor_that_differs_and_by_how_much(tmp_path, capsys):
    params = params_of(SMALL)
    hf.save(tmp_path / "one", SMALL, params)
    params.dense.ffn.up_DF[0, 2, 3] += 0.5
    hf.save(tmp_path / "two", SMALL, params)
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "1 differences"
    assert "model.layers.0.mlp.up_proj.weight" in said[0]
    assert "1 values differ, by 0.5 at most" in said[0]
    other = dataclasses.replace(SMALL, n_mtp=0)
    hf.save(tmp_path / "three", other, params_of(other))
    lines = list(differences(open_source(tmp_path / "one"), open_source(tmp_path / "three")))
    assert sum("only in the first" in line for line in lines) == 34


def test_an_array_of_several_hosts_worth_is_written_chunk_by_chunk(tmp_path):
    x = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)
    seen = []

    def parts():
        for row in range(0, 4, 2):
            seen.append(row)
            yield (slice(row, row + 2), slice(0, 6)), x[row : row + 2]

    leaf = streamed.Streamed(x.shape, x.dtype, (2, 6), parts)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"x": leaf}, sidecars={})
    assert seen == [0, 2]
    restored = Checkpoints(tmp_path).restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
    np.testing.assert_array_equal(restored.state["x"], x)
    stored = streamed.open_arrays(tmp_path / "0/state", ["x"])["x"]
    assert stored.chunk_layout.read_chunk.shape == (2, 6)
    np.testing.assert_array_equal(stored[1:3, 2].read().result(), x[1:3, 2])


def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "glm45_jax.hf", "check", str(GOLDEN / "lite")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "91 tensors" in done.stdout
    specs = transformer.specs(open_source(GOLDEN / "lite").cfg)
    assert specs.mtp is None
