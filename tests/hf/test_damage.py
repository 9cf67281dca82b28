"""No damaged folder is accepted, and none ends in a traceback: each is named in one message."""

import json
import pathlib
import random
import shutil

import numpy as np
import pytest

from glm45_jax import hf
from glm45_jax.hf.__main__ import main
from tests.hf.common import SMALL, config_of, params_of

INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.mlp.experts.2.down_proj.weight"
CASES = 500


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of several files, as `hf.save` writes it, FP8 and its scales included."""
    folder = tmp_path_factory.mktemp("good") / "folder"
    hf.save(folder, SMALL, params_of(SMALL), max_shard_bytes=9000, fp8_block=(128, 128))
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy to damage."""
    return pathlib.Path(shutil.copytree(good, tmp_path / "folder"))


def without_sums(folder):
    """The folder as others write it: nothing but its structure can be checked."""
    (folder / "checksums.json").unlink()


def file_of(folder, name=NAME):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def header(file):
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def rewrite(file, head, data):
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edited(folder, change, name=NAME):
    """Changes the header of the file that holds `name`."""
    file = file_of(folder, name)
    head, data = header(file)
    change(head)
    rewrite(file, head, data)


def truncated(folder):
    file = file_of(folder)
    file.write_bytes(file.read_bytes()[:-100])


def longer(folder):
    file = file_of(folder)
    file.write_bytes(file.read_bytes() + b"\0" * 8)


def empty_shard(folder):
    file_of(folder).write_bytes(b"")


def huge_header(folder):
    file = file_of(folder)
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


def wrong_dtype(folder):
    edited(folder, lambda head: head[NAME].update(dtype="I8"))


def wrong_shape(folder):
    edited(folder, lambda head: head[NAME].update(shape=head[NAME]["shape"][::-1]))


def shape_of_words(folder):
    edited(folder, lambda head: head[NAME].update(shape=["a", 4]))


def overlap(folder):
    edited(folder, lambda head: head[NAME].update(data_offsets=[0, 128]))


def renamed(folder):
    edited(folder, lambda head: head.update({"model.layers.1.other": head.pop(NAME)}))


def no_shape(folder):
    edited(folder, lambda head: head[NAME].pop("shape"))


def header_no_json(folder):
    file = file_of(folder)
    raw = bytearray(file.read_bytes())
    raw[9] = 0xFF
    file.write_bytes(bytes(raw))


def index_edit(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def index_misses_one(folder):
    index_edit(folder, lambda index: index["weight_map"].pop(NAME))


def index_adds_one(folder):
    index_edit(folder, lambda index: index["weight_map"].update(ghost=file_of(folder).name))


def index_leaves_the_folder(folder):
    index_edit(folder, lambda index: index["weight_map"].update({NAME: "../../secret.safetensors"}))


def index_is_absolute(folder):
    index_edit(folder, lambda index: index["weight_map"].update({NAME: "/etc/passwd"}))


def index_is_a_list(folder):
    index_edit(folder, lambda index: index.update(weight_map=[1, 2]))


def index_without_a_map(folder):
    index_edit(folder, lambda index: index.pop("weight_map"))


def index_gone(folder):
    (folder / INDEX).unlink()


def shard_gone(folder):
    file_of(folder).unlink()


def extra_tensor(folder):
    def change(head):
        end = max(v["data_offsets"][1] for k, v in head.items() if k != "__metadata__")
        head["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}

    edited(folder, change)
    file = file_of(folder)
    file.write_bytes(file.read_bytes() + b"\0" * 4)
    index_edit(folder, lambda index: index["weight_map"].update(extra=file.name))


def doubled(folder):
    file = file_of(folder)
    shutil.copyfile(file, folder / "again.safetensors")
    index = json.loads((folder / INDEX).read_text())
    twice = {n: "again.safetensors" for n, f in index["weight_map"].items() if f == file.name}
    index["weight_map"] = {**index["weight_map"], **dict(list(twice.items())[:1])}
    (folder / INDEX).write_text(json.dumps(index))


def nan_scale(folder):
    name = NAME + "_scale_inv"
    file = file_of(folder, name)
    head, data = header(file)
    begin, _ = head[name]["data_offsets"]
    rewrite(file, head, data[:begin] + np.float32(np.nan).tobytes() + data[begin + 4 :])


def config_gone(folder):
    (folder / "config.json").unlink()


def config_edit(**changes):
    def change(folder):
        config = {**config_of(folder), **changes}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def config_key_twice(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_size": 16,', 1))


NAMED = {
    "truncated": (truncated, "copy it again"),
    "longer": (longer, "its header tells of"),
    "empty_shard": (empty_shard, "in a file of 0"),
    "huge_header": (huge_header, "a header of 1152921504606846976 bytes"),
    "wrong_dtype": (wrong_dtype, "is I8"),
    "wrong_shape": (wrong_shape, "the config needs"),
    "shape_of_words": (shape_of_words, "has shape ['a', 4]"),
    "overlap": (overlap, "begins at byte"),
    "renamed": (renamed, "promises, but"),
    "no_shape": (no_shape, "KeyError: 'shape'"),
    "header_no_json": (header_no_json, "is not what it should be"),
    "index_misses_one": (index_misses_one, f"has, but not in {INDEX}"),
    "index_adds_one": (index_adds_one, "ghost"),
    "index_leaves_the_folder": (index_leaves_the_folder, "no file name of a folder"),
    "index_is_absolute": (index_is_absolute, "'/etc/passwd'"),
    "index_is_a_list": (index_is_a_list, INDEX),
    "index_without_a_map": (index_without_a_map, "'weight_map'"),
    "index_gone": (index_gone, f"{INDEX} is missing"),
    "shard_gone": (shard_gone, "but not in the folder"),
    "extra_tensor": (extra_tensor, "unknown: extra"),
    "doubled": (doubled, "repeats a tensor of another file"),
    "nan_scale": (nan_scale, "_scale_inv: 1 NaN"),
    "config_gone": (config_gone, "config.json: No such file"),
    "config_key_twice": (config_key_twice, "['hidden_size'] stand there twice"),
    "config_type": (config_edit(hidden_size="16"), "hidden_size is '16', expected int"),
    "config_null": (config_edit(num_hidden_layers=None), "num_hidden_layers is missing"),
    "config_zero": (config_edit(num_attention_heads=0), "num_attention_heads is 0, out of range"),
    "config_huge": (config_edit(num_hidden_layers=10**9), "beyond any model"),
    "config_heads": (config_edit(num_key_value_heads=4), "not a multiple of kv_heads"),
    "config_other": (config_edit(model_type="llama"), "'llama' is none of"),
    "config_tied": (config_edit(tie_word_embeddings=True), "tie_word_embeddings is True"),
    "config_yarn": (config_edit(rope_scaling={"type": "yarn"}), "rope_scaling is"),
    "config_gelu": (config_edit(hidden_act="gelu"), "hidden_act is 'gelu'"),
}


@pytest.mark.parametrize("case", NAMED)
def test_each_damage_is_named_by_load_and_by_the_command(case, folder, capsys):
    damage, said = NAMED[case]
    without_sums(folder)
    damage(folder)
    with pytest.raises(ValueError) as caught:
        hf.load(folder)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    assert main(["check", str(folder)]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_checksums_is_read_and_said_so(folder, caplog):
    without_sums(folder)
    with caplog.at_level("INFO", logger="glm45_jax"):
        hf.load(folder)
    assert "has no checksums.json" in caplog.text


def test_a_changed_byte_of_a_weight_is_found_though_the_structure_is_whole(folder):
    file = file_of(folder)
    head, _ = header(file)
    raw = bytearray(file.read_bytes())
    begin = len(raw) - max(v["data_offsets"][1] for k, v in head.items() if k != "__metadata__")
    raw[begin + head[NAME]["data_offsets"][0] + 5] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match=r"has CRC-32 \d+, \d+ was written; copy the file again"):
        hf.load(folder)


def _random_damage(rng: random.Random, folder: pathlib.Path) -> str:
    """Damages one file somehow; says how."""
    file = rng.choice(sorted(folder.iterdir()))
    raw = bytearray(file.read_bytes())
    kind = rng.choice(("flip", "flip", "cut", "grow", "zero", "swap", "drop", "head"))
    at = rng.randrange(len(raw))
    if kind == "flip":
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del raw[at:]
    elif kind == "grow":
        raw[at:at] = rng.randbytes(rng.randint(1, 64))
    elif kind == "zero":
        raw[at : at + 16] = rng.randbytes(len(raw[at : at + 16]))
    elif kind == "swap":
        other = rng.choice(sorted(set(folder.iterdir()) - {file}))
        raw = bytearray(other.read_bytes())
    elif kind == "drop" and file.name != "checksums.json":  # without it the folder is another's
        file.unlink()
        return f"{file.name}: {kind}"
    else:
        raw[: rng.randint(1, 12)] = rng.randbytes(4)
    file.write_bytes(bytes(raw))
    return f"{file.name}: {kind} at {at}"


def test_five_hundred_random_damages_are_all_refused_with_a_message(good, tmp_path, capsys):
    rng, accepted = random.Random(0), []
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    for case in range(CASES):
        folder = pathlib.Path(shutil.copytree(good, tmp_path / str(case)))
        what = _random_damage(rng, folder)
        after = {file.name: file.read_bytes() for file in folder.iterdir()}
        if after == before:
            continue
        code = main(["check", str(folder), "--sha256"])
        said = capsys.readouterr().err
        if code != 2 or "error: " not in said or "Traceback" in said:
            accepted.append((what, code, said[-300:]))
        shutil.rmtree(folder)
    assert not accepted


def test_what_is_not_damaged_is_not_refused(good):
    assert main(["check", str(good), "--sha256"]) == 0
