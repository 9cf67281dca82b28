"""Laws of metrics: a file gives back what was written; resumed, it is the uninterrupted one."""

import io
import json
import logging
import math
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax import metrics
from glm45_jax.metrics import Jsonl, Progress, TensorBoard, Window, heat_map, read_jsonl

ROOT = Path(__file__).parents[1]


def write_rows(writer: metrics.Writer, steps) -> None:
    for step in steps:
        load_LE = np.random.default_rng(step).random((2, 3), np.float32)
        writer.write(step, {"loss": 5 / (1 + step), "lr": 1e-3 * step}, {"load": load_LE})


@given(st.dictionaries(st.text(), st.floats() | st.floats(width=32)), st.integers(0, 2**60))
def test_every_scalar_comes_back_as_it_was_from_strict_json(tmp_path_factory, scalars, step):
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    writer = Jsonl(path)
    writer.write(step, scalars, {})
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (row,) = read_jsonl(path)
    assert row.step == step
    assert {k: repr(v) for k, v in row.scalars.items()} == {k: repr(v) for k, v in scalars.items()}


@pytest.mark.parametrize(
    "array",
    [
        np.array([[0.1, -0.0, np.nan], [np.inf, -np.inf, 1e-45]], np.float32),
        np.array([0.1, 1 / 3], np.float64),
        np.array(65504, np.float16),
        np.arange(6, dtype=np.int64).reshape(1, 2, 3) * 2**40,
        np.array([True, False]),
        np.zeros((0, 5), np.float32),
    ],
)
def test_every_array_comes_back_with_its_bits_shape_and_dtype(tmp_path, array):
    writer = Jsonl(tmp_path / "m.jsonl")
    writer.write(0, {}, {"a": array})
    back = read_jsonl(tmp_path / "m.jsonl")[0].arrays["a"]
    writer.close()
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


def test_a_bfloat16_array_comes_back_as_the_same_numbers(tmp_path):
    array = np.array([0.1, 3.0], ml_dtypes.bfloat16)
    writer = Jsonl(tmp_path / "m.jsonl")
    writer.write(0, {}, {"a": array})
    writer.close()
    np.testing.assert_array_equal(
        read_jsonl(tmp_path / "m.jsonl")[0].arrays["a"], array.astype(np.float32)
    )


def test_a_line_is_in_the_file_as_soon_as_write_returns(tmp_path):
    writer = Jsonl(tmp_path / "new" / "m.jsonl")
    for step in range(3):
        write_rows(writer, [step])
        assert [row.step for row in read_jsonl(tmp_path / "new" / "m.jsonl")] == [*range(step + 1)]
    writer.close()


@pytest.mark.parametrize("torn", ["", '{"step":7,"sca', '{"step":7}'])
@pytest.mark.parametrize("resume", [0, 3, 7])
def test_a_resumed_file_equals_that_of_a_run_that_never_stopped(tmp_path, resume, torn):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    for path, until in ((whole, 10), (resumed, 7)):
        writer = Jsonl(path)
        write_rows(writer, range(until))
        writer.close()
    with resumed.open("a") as file:
        file.write(torn)
    writer = Jsonl.open_resumed(resumed, resume)
    assert [row.step for row in read_jsonl(resumed)] == [*range(resume)]
    write_rows(writer, range(resume, 10))
    writer.close()
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["resumed.jsonl", "whole.jsonl"]


def test_a_run_that_resumes_without_a_file_starts_one(tmp_path):
    writer = Jsonl.open_resumed(tmp_path / "m.jsonl", 5)
    write_rows(writer, [5])
    writer.close()
    assert [row.step for row in read_jsonl(tmp_path / "m.jsonl")] == [5]


def test_a_line_cut_short_is_left_out_and_said(tmp_path, caplog):
    writer = Jsonl(tmp_path / "m.jsonl")
    write_rows(writer, range(2))
    writer.close()
    text = (tmp_path / "m.jsonl").read_text()
    (tmp_path / "m.jsonl").write_text(text[:-1])
    assert [row.step for row in read_jsonl(tmp_path / "m.jsonl")] == [0]
    assert "line 2 was cut short" in caplog.text


@pytest.mark.parametrize("bad", ["x", "[1]", '{"step":1}', '{"step":1,"scalars":3,"arrays":{}}'])
def test_a_line_that_is_no_metrics_line_is_named(tmp_path, bad):
    (tmp_path / "m.jsonl").write_text(f'{{"step":0,"scalars":{{}},"arrays":{{}}}}\n{bad}\n')
    before = (tmp_path / "m.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"m\.jsonl line 2 is no metrics line"):
        read_jsonl(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match=r"m\.jsonl line 2 is no metrics line"):
        Jsonl.open_resumed(tmp_path / "m.jsonl", 1)
    assert (tmp_path / "m.jsonl").read_bytes() == before


def events_of(directory):
    """The events of the one file there: each record is length, crc, bytes, crc."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = directory.iterdir()
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard_holds_the_scalars_and_a_picture_of_each_matrix(tmp_path):
    writer = TensorBoard(tmp_path / "tb")
    load_LE = np.array([[0.25, 0.75], [np.nan, 0.5]], np.float32)
    writer.write(3, {"loss": 1.5, "val/loss": 2.5}, {"load": load_LE, "row": load_LE[0]})
    writer.close()
    values = [(e.step, v) for e in events_of(tmp_path / "tb") for v in e.summary.value]
    assert {step for step, _ in values} == {3}
    scalars = {v.tag: v.simple_value for _, v in values if v.HasField("simple_value")}
    assert scalars == {"loss": 1.5, "val/loss": 2.5}
    assert [v.tag for _, v in values if v.HasField("image")] == ["load"]
    counts = {v.tag: v.histo.num for _, v in values if v.HasField("histo")}
    assert counts == {"load": 3, "row": 2}


def test_a_heat_map_goes_from_dark_to_light_and_shows_what_is_not_finite():
    picture = heat_map(np.array([[0.0, 0.5, 1.0], [np.nan, 1.0, 0.0]]))
    cells = picture[::16, ::16].astype(int)
    assert picture.shape == (32, 48, 3)
    assert (cells[0, 0] == cells[1, 2]).all() and (cells[0, 2] == cells[1, 1]).all()
    brightness = cells.sum(axis=-1)
    assert brightness[0, 0] < brightness[0, 1] < brightness[0, 2]
    assert len({*cells[1, 0].tolist()}) == 1, "grey"
    assert heat_map(np.full((2, 2000), 7.0)).shape == (2, 2000, 3)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_for_the_last_step():
    now, out = [100.0], io.StringIO()
    progress = Progress(50, 10, stream=out, clock=lambda: now[0])
    for step in range(11, 51):
        now[0] += 1.0
        progress.write(step, {"loss": 60 / step, "tokens_per_s": 12345.0, "mfu": 0.412}, {})
    progress.close()
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["11/50", "21/50", "31/50", "41/50", "50/50"]
    assert lines[1] == ("step 21/50 (42%)  loss 2.8571  12.3k tokens/s  MFU 41.2%  0:00:29 left")
    assert lines[-1] == "step 50/50 (100%)  loss 1.2000  12.3k tokens/s  MFU 41.2%"
    assert "\r" not in out.getvalue()


def test_on_a_terminal_the_bar_shows_the_steps_done_and_the_numbers():
    out = Terminal()
    progress = Progress(20, 5, stream=out)
    for step in range(6, 21):
        progress.update(step, {"loss": 1.25, "val/loss": 1.5, "tokens_per_s": 2e6, "mfu": 0.5})
    progress.close()
    last = out.getvalue().split("\r")[-1]
    assert "20/20" in last
    assert "loss 1.2500  val 1.5000  2M tokens/s  MFU 50.0%" in last


@given(st.floats(1e-6, 1e15))
def test_a_short_number_is_right_to_three_digits(value):
    text = metrics.short(value)
    units = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    unit = units.get(text[-1], 1.0)
    assert math.isclose(float(text.rstrip("kMGT")) * unit, value, rel_tol=5.1e-3)
    assert len(text) <= 8


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(0.01, 1e3)), min_size=1))
def test_a_window_is_all_tokens_over_all_seconds(steps):
    window = Window()
    for tokens, seconds in steps:
        window = window.add(tokens, seconds)
    expected = sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)
    assert math.isclose(window.tokens_per_s, expected)
    assert math.isnan(Window().tokens_per_s)


def test_logging_is_set_up_once_and_other_processes_only_warn(capsys):
    root, absl = logging.getLogger(), logging.getLogger("absl")
    before = (root.level, absl.level, [*root.handlers])
    gone = logging.StreamHandler(io.StringIO())  # an earlier call's, its stderr closed since
    gone.stream.close()
    root.addHandler(gone)
    try:
        metrics.setup_logging(process=3)
        metrics.setup_logging(process=3)
        logging.getLogger("room").info("hello")
        logging.getLogger("room").warning("look")
        metrics.setup_logging()
        logging.getLogger("room").info("first")
    finally:
        root.setLevel(before[0])
        absl.setLevel(before[1])
        root.handlers[:] = before[2]
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["[3] W room: look", "I room: first"]


def test_on_one_process_the_mean_over_hosts_is_the_tree_itself():
    tree = {"loss": 1.5, "load": np.ones((2, 3))}
    assert metrics.host_mean(tree) is tree


TWO_PROCESSES = """
import sys, jax, numpy as np
from glm45_jax.metrics import host_mean
process = int(sys.argv[2])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, process)
load = np.arange(6.0).reshape(2, 3)
mean = host_mean({"tokens": 2**40 + 2 * process, "load": load * (1 + process), "loss": 1.0})
assert mean["tokens"] == 2**40 + 1, mean
assert mean["loss"] == 1.0
np.testing.assert_array_equal(mean["load"], load * 1.5)
"""


@pytest.mark.slow
def test_on_two_processes_the_mean_is_taken_in_float64():
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", TWO_PROCESSES, str(port)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = [subprocess.Popen([*command, str(n)], cwd=ROOT, env=env) for n in (0, 1)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]


def test_the_console_shows_the_parts_of_the_loss():
    stream = io.StringIO()
    progress = Progress(1, stream=stream)
    progress.update(1, {"loss": 3.5, "loss/ce": 2.25, "loss/mtp": 4.125, "loss/balance": 1.5})
    progress.close()
    assert "loss 3.5000" in stream.getvalue()
    assert "(ce 2.250, mtp 4.125, balance 1.500)" in stream.getvalue()
