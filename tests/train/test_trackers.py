"""Laws of trackers: each gets the numbers of the record, a resumed run goes on where it was, and a
package that is not there is said before anything begins.

Stand-ins that write down what they are told take the place of wandb and ClearML; where the real
ones are installed, they are asked too, offline.
"""

import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from experiments import pretrain, rl_reasoning
from glm45_jax import main
from glm45_jax.metrics import Jsonl, heat_map, read_jsonl
from glm45_jax.rl import run as rl_run
from glm45_jax.train.trackers import ClearML, TensorBoard, Wandb

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {Wandb: "wandb", ClearML: "clearml"}
LOAD_LE = np.array([[0.25, 0.75], [np.nan, 0.5]], np.float32)
ROWS = {
    step: ({"loss": 1 / step, "loss/ce": 0.5 / step}, {"load": LOAD_LE / step})
    for step in range(1, 4)
}


class Told:
    """What a stand-in was told: the words it was begun with, rows by step, how often it ended."""

    def __init__(self):
        self.begun, self.config = [], {}
        self.scalars, self.pictures, self.ends = {}, {}, 0


def stand_in_wandb(told):
    def log(row, *, step):
        assert step not in told.scalars
        told.scalars[step] = {k: v for k, v in row.items() if isinstance(v, float)}
        told.pictures[step] = {k: v.data for k, v in row.items() if isinstance(v, Image)}

    def finish():
        told.ends += 1

    def init(**words):
        told.begun.append(words)
        told.config = words["config"]
        return types.SimpleNamespace(log=log, finish=finish)

    class Image:
        def __init__(self, data):
            self.data = data

    return {"init": init, "Image": Image, "Histogram": list, "Settings": dict}


def stand_in_clearml(told):
    def report_scalar(title, series, value, iteration):
        assert series.startswith(title)
        told.scalars.setdefault(iteration, {})[series] = value

    def report_image(title, series, iteration, image):
        told.pictures.setdefault(iteration, {})[series] = image

    class Task:
        offline = False

        @classmethod
        def set_offline(cls, offline):
            cls.offline = offline

        @classmethod
        def init(cls, **words):
            told.begun.append(words | {"offline": cls.offline})
            task = cls()
            task.id = words["reuse_last_task_id"] or f"task-{len(told.begun)}"
            return task

        def connect_configuration(self, configuration, name):
            told.config = configuration

        def get_logger(self):
            return types.SimpleNamespace(report_scalar=report_scalar, report_image=report_image)

        def close(self):
            told.ends += 1

    return {"Task": Task}


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a stand-in in the place of a tracker's package; what that is told."""

    def put(tracker):
        told, name = Told(), PACKAGES[type(tracker)]
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        make = {"wandb": stand_in_wandb, "clearml": stand_in_clearml}[name]
        vars(module).update(make(told))
        monkeypatch.setitem(sys.modules, name, module)
        return told

    return put


def write_all(writer, rows=ROWS):
    for step, (scalars, arrays) in rows.items():
        writer.write(step, scalars, arrays)
    writer.close()
    writer.close()


EXP = pretrain.tiny()
TRACKERS = [Wandb(project="p", tags=("a",)), ClearML(project="p", tags=("a",))]


@pytest.mark.parametrize("tracker", TRACKERS, ids=str)
def test_a_tracker_is_told_the_numbers_of_the_record_once(stand_in, tmp_path, tracker):
    told = stand_in(tracker)
    write_all(tracker.open(EXP, tmp_path, 1))
    write_all(Jsonl(tmp_path / "metrics.jsonl"))
    record = {row.step: row for row in read_jsonl(tmp_path / "metrics.jsonl")}
    assert told.scalars == {step: row.scalars for step, row in record.items()}
    for step, row in record.items():
        np.testing.assert_array_equal(told.pictures[step]["load"], heat_map(row.arrays["load"]))
    assert told.ends == 1


@pytest.mark.parametrize("tracker", TRACKERS, ids=str)
def test_a_tracker_is_told_which_experiment_it_is(stand_in, tmp_path, tracker):
    told = stand_in(tracker)
    tracker.open(EXP, tmp_path, 1).close()
    assert told.config["optim.lr"] == EXP.optim.lr
    assert told.config["train.steps"] == EXP.train.steps and told.config["run"] == "run_training"
    json.dumps(told.config, allow_nan=False)
    assert EXP.name in told.begun[0].values() and ["a"] in told.begun[0].values()


@pytest.mark.parametrize("tracker", TRACKERS, ids=str)
def test_a_resumed_run_goes_on_in_the_same_place_and_another_workdir_in_another(
    stand_in, tmp_path, tracker
):
    told = stand_in(tracker)
    for folder, step in (("a", 1), ("a", 3), ("b", 1)):
        tracker.open(EXP, tmp_path / folder, step).close()
    if isinstance(tracker, Wandb):
        ids = [words["id"] for words in told.begun]
        assert ids[0] == ids[1] != ids[2]
        assert {words["resume"] for words in told.begun} == {"allow"}
    else:
        assert [words["reuse_last_task_id"] for words in told.begun] == [False, "task-1", False]
        goes_on = [words["continue_last_task"] for words in told.begun]
        assert goes_on[1] == 0 and goes_on[1] is not False  # 0: the steps are those of the run
        assert goes_on[0] is goes_on[2] is False


@pytest.mark.parametrize("tracker", [Wandb(offline=True), ClearML(offline=True)], ids=str)
def test_offline_is_said_before_anything_is_sent(stand_in, tmp_path, tracker):
    told = stand_in(tracker)
    tracker.open(EXP, tmp_path, 1).close()
    assert told.begun[0].get("mode") == "offline" or told.begun[0].get("offline") is True


def test_the_default_is_tensorboard_and_needs_nothing(tmp_path):
    assert EXP.tracker == TensorBoard()
    EXP.tracker.check()
    write_all(EXP.tracker.open(EXP, tmp_path, 1))
    assert any((tmp_path / "tensorboard").iterdir())


def experiment_in(folder, tracker):
    """An experiment file there, which has this tracker; its name on the command line."""
    (folder / "mine.py").write_text(
        "import dataclasses\nfrom experiments import pretrain\n"
        "from glm45_jax.train.trackers import ClearML, Wandb\n\n"
        f"def run():\n    return dataclasses.replace(pretrain.tiny(), tracker={tracker})\n"
    )
    return "mine:run"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory of our own, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("tracker", [Wandb(), ClearML()], ids=str)
@pytest.mark.parametrize("more", [["--dry-run"], ["--workdir", "w"]], ids=" ".join)
def test_a_package_that_is_not_there_is_one_message_and_no_run(
    elsewhere, monkeypatch, capsys, tracker, more
):
    package, known = PACKAGES[type(tracker)], importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else known(name, *a)
    )
    assert main.main([experiment_in(elsewhere, tracker), *more]) == main.BAD_INPUT
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"error: tracker={tracker} needs {package}, which is not installed")
    assert f"pip install -e '.[{package}]'" in message and "\n" not in message
    assert not (elsewhere / "w").exists()


@pytest.mark.slow
def test_a_whole_run_is_watched_where_the_experiment_says(elsewhere, stand_in):
    told = stand_in(Wandb())
    quick = ["--set", "train.steps=2", "--set", "report.prompts=()"]
    assert main.main([experiment_in(elsewhere, Wandb()), "--workdir", "w", *quick]) == 0
    rows = read_jsonl(elsewhere / "w" / "metrics.jsonl")
    assert told.scalars == {row.step: row.scalars for row in rows} and len(rows) == 2
    assert told.ends == 1 and not (elsewhere / "w" / "tensorboard").exists()
    assert (elsewhere / "w" / "report.html").exists()


def test_a_run_of_rl_is_watched_in_the_same_way(stand_in, tmp_path):
    told = stand_in(Wandb())
    exp = dataclasses.replace(rl_reasoning.tiny(), tracker=Wandb())
    writers = rl_run._writers(exp, tmp_path, 4)
    for writer in writers:
        writer.write(5, {"reward": 0.5}, {})
        writer.close()
    assert told.scalars == {5: {"reward": 0.5}} and told.ends == 1


REAL = """
import sys, pathlib, numpy as np
from experiments import pretrain
from glm45_jax.train.trackers import ClearML, Wandb
from tests.train.test_trackers import ROWS, write_all
for first in (1, 3):
    writer = {tracker}.open(pretrain.tiny(), pathlib.Path(sys.argv[1]), first)
    write_all(writer, {{step: row for step, row in ROWS.items() if step >= first}})
"""


def write_really(tmp_path, tracker):
    """The real package is told the rows, and the last of them by a second, resumed run."""
    environ = os.environ | {"HOME": str(tmp_path), "CLEARML_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run(
        [sys.executable, "-c", REAL.format(tracker=tracker), str(tmp_path)],
        cwd=ROOT,
        env=environ | {"JAX_PLATFORMS": "cpu"},
        check=True,
        timeout=120,
    )


def records_of(file):
    """The records of a wandb file: in blocks of 32 KB, pieces of (checksum, length, kind)."""
    data, whole = file.read_bytes()[7:], b""
    at = 0
    while at + 7 <= len(data):
        left = 2**15 - (at + 7) % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


@pytest.mark.slow
def test_the_real_wandb_keeps_offline_what_it_is_told(tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    write_really(tmp_path, Wandb(offline=True))
    found, ids = {}, set()
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        ids.add(file.stem.removeprefix("run-"))
        for raw in records_of(file):
            record = Record.FromString(raw)
            items = {
                ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if items:
                found[items["_step"]] = items
    assert ids == {(tmp_path / "wandb" / "id.txt").read_text()}
    for step, (scalars, _) in ROWS.items():
        assert {name: found[step][name] for name in scalars} == scalars
        assert found[step]["load._type"] == "image-file"
        assert found[step]["load/histogram._type"] == "histogram"


@pytest.mark.slow
def test_the_real_clearml_keeps_offline_what_it_is_told(tmp_path):
    pytest.importorskip("clearml")
    write_really(tmp_path, ClearML(offline=True))
    found, pictures = {}, set()
    for file in (tmp_path / "cache").glob("offline/*/metrics.jsonl"):
        for line in file.read_text().splitlines():
            for event in json.loads(line):
                if event["type"] == "training_stats_scalar":
                    found.setdefault(event["iter"], {})[event["variant"]] = event["value"]
                if event["type"] == "training_debug_image":
                    pictures.add((event["iter"], event["variant"]))
    assert found == {step: scalars for step, (scalars, _) in ROWS.items()}
    assert pictures == {(step, "load") for step in ROWS}
