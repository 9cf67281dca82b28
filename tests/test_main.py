"""The door: four flags, a run from end to end, and one clear message and exit code 2 for everything
that is wrong.
"""

import dataclasses
import inspect
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from experiments import pretrain
from glm45_jax import main, values
from glm45_jax.experiment import BadInput, FromHF
from glm45_jax.hf.__main__ import main as hf_main
from glm45_jax.metrics import read_jsonl
from glm45_jax.plan import table as dry_run
from glm45_jax.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).parent.parent
TINY = "experiments.pretrain:tiny"
QUICK = ["--set", "train.steps=12", "--set", "train.save_every=4"]


@pytest.fixture(scope="module", autouse=True)
def from_the_root():
    before = os.getcwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of the tiny experiment, made once."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    assert main.main([TINY, "--workdir", str(workdir), *QUICK]) == 0
    return workdir


def refused(capsys, *argv):
    """The message of a call that must be refused."""
    assert main.main(list(argv)) == main.BAD_INPUT
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def everything_in(workdir):
    return {p: p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}


def test_the_command_line_has_four_flags():
    flags = {a.option_strings[0] if a.option_strings else a.dest for a in main.parser()._actions}
    assert flags == {"-h", "experiment", "--workdir", "--set", "--dry-run"}


def test_a_run_leaves_metrics_checkpoints_a_report_and_plots(done):
    rows = read_jsonl(done / "metrics.jsonl")
    assert [row.step for row in rows] == list(range(1, 13))
    assert {
        "loss",
        "loss/ce",
        "loss/mtp",
        "loss/balance",
        "lr",
        "grad_norm",
        "update_rms/matrix",
    } <= set(rows[0].scalars)
    assert rows[0].arrays["load"].shape == rows[0].arrays["bias"].shape == (3, 8)
    assert rows[-1].scalars["loss/ce"] < rows[0].scalars["loss/ce"] - 0.1
    assert "val/loss" in rows[9].scalars and "val/loss" in rows[11].scalars
    assert (done / "checkpoints" / "12").is_dir()
    assert {"loss.png", "load.png", "lr.png"} <= {p.name for p in (done / "plots").iterdir()}
    assert "The " in (done / "report.md").read_text()
    assert any((done / "tensorboard").iterdir())


def test_a_finished_run_started_again_trains_no_further(done):
    before = (done / "metrics.jsonl").read_bytes()
    assert main.main([TINY, "--workdir", str(done), *QUICK]) == 0
    assert (done / "metrics.jsonl").read_bytes() == before


def test_a_workdir_of_another_experiment_is_refused_and_left_alone(done, capsys):
    before = everything_in(done)
    message = refused(capsys, TINY, "--workdir", str(done), *QUICK, "--set", "optim.lr=0.1")
    assert "optim.lr: 0.005 there, 0.1 here" in message and "another --workdir" in message
    assert everything_in(done) == before


def test_a_truncated_token_store_is_refused_and_left_alone(done, capsys):
    files = [
        p
        for p in (done / "data").rglob("*")
        if p.is_file() and p.stat().st_size > 1000 and "c" in p.parts
    ]
    victim = max(files, key=lambda p: p.stat().st_size)
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    before = everything_in(done)
    message = refused(capsys, TINY, "--workdir", str(done), *QUICK)
    assert str(len(whole)) in message.replace(",", "") and str(len(whole) // 2) in message.replace(
        ",", ""
    )
    assert everything_in(done) == before
    victim.write_bytes(whole)


def test_an_unknown_key_is_refused_with_the_nearest_names(capsys):
    assert "optim.lr" in refused(capsys, TINY, "--workdir", "/nowhere", "--set", "optim.lrr=1e-3")


def test_a_batch_that_does_not_divide_is_refused(capsys, tmp_path):
    workdir = tmp_path / "new"
    message = refused(capsys, TINY, "--workdir", str(workdir), "--set", "train.rows=12")
    assert "12 rows" in message and "8 devices" in message
    assert not workdir.exists()
    dry = refused(capsys, TINY, "--dry-run", "--set", "train.rows=12")
    assert "12 rows" in dry and "8 devices" in dry


def test_a_vocabulary_mismatch_is_refused(capsys):
    message = refused(capsys, TINY, "--workdir", "/nowhere", "--set", "model.vocab=500")
    assert "512" in message and "500" in message


def test_a_missing_workdir_function_or_module_is_refused(capsys):
    assert "--workdir is missing" in refused(capsys, TINY)
    assert "glm45_air" in refused(capsys, "experiments.pretrain:glm45_ari", "--dry-run")
    assert "run from the repository's root" in refused(
        capsys, "experiment.pretrain:tiny", "--dry-run"
    )
    assert "is not module:function" in refused(capsys, "experiments.pretrain", "--dry-run")


def needs_arguments(function):
    """Whether it makes something else, say a corpus of a folder."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters)


def all_experiments():
    for path in sorted((ROOT / "experiments").glob("*.py")):
        if path.stem != "__init__":
            module = __import__(f"experiments.{path.stem}", fromlist=["*"])
            for name, function in vars(module).items():
                own = getattr(function, "__module__", None) == module.__name__
                if (
                    own
                    and callable(function)
                    and not name.startswith("_")
                    and isinstance(function, type(all_experiments))
                    and not needs_arguments(function)
                ):
                    yield f"{module.__name__}:{name}"


@pytest.mark.parametrize("name", list(all_experiments()))
def test_every_experiment_builds_dry_runs_and_survives_json(name):
    experiment = main.find(name)()
    assert values.from_json(json.loads(json.dumps(values.to_json(experiment)))) == experiment
    began = time.monotonic()
    table = dry_run(experiment)
    assert time.monotonic() - began < 20
    for word in ("parameters", "FLOPs a token", "memory a device"):
        assert word in table.replace("GFLOPs", "FLOPs")


def test_the_large_dry_runs_print_the_paper_s_sizes():
    assert "355.23B body + MTP" in dry_run(main.find("experiments.pretrain:glm45")())
    table = dry_run(main.find("experiments.pretrain:glm45_air")())
    assert "107.99B body + MTP" in table and "active 12.18B" in table


def test_a_killed_process_saves_and_leaves_with_the_code_of_the_signal(tmp_path):
    command = [sys.executable, "-m", "glm45_jax.main", TINY, "--workdir", str(tmp_path / "w")]
    process = subprocess.Popen(
        [*command, "--set", "train.steps=4000"], cwd=ROOT, stderr=subprocess.PIPE
    )
    lines = tmp_path / "w" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == main.STOPPED
    saved = [int(p.name) for p in (tmp_path / "w" / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved) == len(read_jsonl(lines)) < 4000


def test_the_devices_of_these_tests_are_eight():
    assert jax.device_count() == 8


LATE = "--xla_cpu_collective_call_terminate_timeout_seconds="


@pytest.mark.parametrize(
    "flags,devices,waits",
    [
        ("", None, []),  # one device waits for nobody, and an accelerator never reads the flag
        ("", "4", [LATE + "300"]),
        ("--xla_force_host_platform_device_count=2", None, [LATE + "300"]),
        (LATE + "7", "4", [LATE + "7"]),
    ],
)
def test_devices_of_one_cpu_wait_for_a_late_one_unless_told_how_long(
    monkeypatch, capsys, flags, devices, waits
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    if devices:
        monkeypatch.setenv("JAX_NUM_CPU_DEVICES", devices)
    assert main.main([TINY, "--dry-run"]) == 0
    assert [flag for flag in os.environ["XLA_FLAGS"].split() if flag.startswith(LATE)] == waits


@pytest.mark.slow
def test_a_run_becomes_a_folder_with_its_tokenizer_and_the_next_run_starts_from_it(done, tmp_path):
    folder = tmp_path / "released"
    assert hf_main(["convert", str(done), str(folder)]) == 0
    tokenizer = Tokenizer.load(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(tokenizer.stop_ids)
    first = values.override(pretrain.tiny(), ["train.steps=2"])
    exp = dataclasses.replace(first, init=FromHF(str(folder)))
    other = values.override(exp, ["data.bpe_chars=30000"])  # trains other merges
    with pytest.raises(BadInput, match=r"set data.tokenizer=.*released/tokenizer.json"):
        other.run(other, tmp_path / "other")
    exp = values.override(exp, [f"data.tokenizer={folder}/tokenizer.json"])
    outcome = exp.run(exp, tmp_path / "next")
    assert outcome.step == 2
    rows, before = read_jsonl(tmp_path / "next/metrics.jsonl"), read_jsonl(done / "metrics.jsonl")
    assert rows[0].scalars["loss/ce"] < before[5].scalars["loss/ce"]  # it goes on, not anew
