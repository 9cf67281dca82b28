"""Launch scripts start the line of `main` once a process, tell each who it is, and start again what
died. Most tests put a small program in Python's place; the slow one really trains.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm45_jax import hosts
from glm45_jax.train.watchdog import HUNG

ROOT = Path(__file__).resolve().parent.parent
LINE = ("experiments.pretrain:tiny", "--workdir")

# Writes down what it was told, then does what the test says that this start of this process does.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
if sys.argv[1] == "-c":
    exec(sys.argv[2])
    sys.exit()
here = Path(os.environ["NOTES"])
told = os.environ.get("GLM45_DISTRIBUTED", "")
number = told.split(",")[2] if "," in told else os.environ.get("SLURM_PROCID", "0")
starts = len(list(here.glob(f"{number}-*")))
(here / f"{number}-{starts}").write_text(json.dumps({"told": told, "line": sys.argv[1:]}))
what = json.loads(os.environ["DOES"]).get(number, [])
what = what[starts] if starts < len(what) else 0
many = int(told.split(",")[1] if "," in told else os.environ.get("SLURM_NTASKS", 1))
while len(list(here.glob("[0-9]*-*"))) < many * (starts + 1):  # the others have begun as well
    time.sleep(0.01)
def leave(*_):
    print("saving", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
if what == "wait":
    (here / f"waiting-{number}").write_text("")
    time.sleep(60)
if what == "stuck":  # in a call that hears no signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (here / f"waiting-{number}").write_text("")
    time.sleep(60)
if what == "hung":
    while not list(here.glob("waiting-*")):
        time.sleep(0.01)
    sys.exit(6)
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(what)
"""


@pytest.fixture
def stage(tmp_path):
    """A folder with the stand-in, and the environment that puts it in Python's place."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/stand_in.py "$@"\n')
    python.chmod(0o755)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "notes").mkdir()
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "GLM45_"))}
    return tmp_path, environ | {"GLM45_PYTHON": str(python), "NOTES": str(tmp_path / "notes")}


def launch(stage, script, *words, does=None, **more):
    folder, environ = stage
    environ = environ | {"DOES": json.dumps(does or {})} | more
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / script), *words],
        env=environ,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, seconds=60):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def told(stage):
    """What each start of each process was told, by "process-start"."""
    return {p.name: json.loads(p.read_text()) for p in stage[0].glob("notes/[0-9]*")}


def wait_for(stage, *names):
    deadline = time.monotonic() + 30
    while not all((stage[0] / "notes" / name).exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_process_gets_the_same_line_and_its_own_number(stage):
    line = (*LINE, "my runs/w", "--set", "train.steps=3")
    code, _, err = ended(launch(stage, "local.sh", "-n", "3", *line))
    assert code == 0, err
    found = told(stage)
    assert sorted(found) == ["0-0", "1-0", "2-0"]
    assert all(note["line"] == ["-m", "glm45_jax.main", *line] for note in found.values())
    where = [hosts.address(found[f"{i}-0"]["told"]) for i in range(3)]
    assert [w[1:] for w in where] == [(3, 0), (3, 1), (3, 2)] and len({w[0] for w in where}) == 1
    assert sorted(p.name for p in (stage[0] / "my runs/w/hosts").iterdir()) == ["1.log", "2.log"]


def test_one_process_is_told_nothing(stage):
    assert ended(launch(stage, "local.sh", *LINE, "w"))[0] == 0
    assert told(stage)["0-0"]["told"] == ""


def test_when_one_dies_the_others_end_and_all_start_again_elsewhere(stage):
    does = {"0": ["wait"], "1": ["die"], "2": ["wait"]}
    code, _, err = ended(launch(stage, "local.sh", "-n", "3", "-r", "2", *LINE, "w", does=does))
    assert code == 0, err
    assert "starting again from the last checkpoint (1 of 2)" in err
    found = told(stage)
    assert sorted(found) == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]
    ports = [found[f"1-{i}"]["told"].split(",")[0] for i in range(2)]
    assert ports[0] != ports[1]


def test_what_dies_for_ever_is_started_only_so_often(stage):
    code, _, err = ended(
        launch(stage, "local.sh", "-n", "2", "-r", "1", *LINE, "w", does={"1": ["die"] * 9})
    )
    assert code == 137, err
    assert "started 2 times, no more" in err


@pytest.mark.parametrize("code", [2, 3, 4, 5, 143])
def test_an_end_that_would_come_again_is_not_tried_again(stage, code):
    does = {"0": [code], "1": [code]}
    found, _, _ = ended(launch(stage, "local.sh", "-n", "2", "-r", "5", *LINE, "w", does=does))
    assert found == code and len(told(stage)) == 2


def test_a_run_whose_step_hangs_is_started_again(stage):
    does = {"0": ["hung"], "1": ["stuck"]}
    code, _, err = ended(launch(stage, "local.sh", "-n", "2", "-r", "1", *LINE, "w", does=does))
    assert code == 0 and f"a process ended with {HUNG}; starting again" in err
    assert len(told(stage)) == 4


def test_a_signal_goes_to_every_process_and_each_may_save(stage):
    process = launch(
        stage, "local.sh", "-n", "2", "-r", "5", *LINE, "w", does={"0": ["wait"], "1": ["wait"]}
    )
    wait_for(stage, "waiting-0", "waiting-1")
    process.send_signal(signal.SIGTERM)
    code, out, err = ended(process)
    assert code == 143, err
    assert "saving" in out
    assert "saving" in (stage[0] / "w/hosts/1.log").read_text()
    assert len(told(stage)) == 2


@pytest.mark.parametrize("words", [(), ("-n", "two", "x"), ("-n", "0", "x"), ("-q", "x")])
def test_bad_words_are_refused_with_how_to_use_it(stage, words):
    code, _, err = ended(launch(stage, "local.sh", *words))
    assert code == 2 and "launch/local.sh -n 4" in err and not told(stage)


# In Slurm's place: one process a task, with what Slurm tells it. Some time after the first has
# left, the others are told to stop, then killed; the highest code is srun's.
SRUN = """#!/bin/bash
[ "$1 $2" = "--kill-on-bad-exit=0 --wait=300" ] || exit 99
shift 2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=0 SLURM_NTASKS=2 "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
code=0 left=("${pids[@]}") since=
while [ ${#left[@]} -gt 0 ]; do
  sleep 0.05
  running=()
  for pid in "${left[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then running+=("$pid"); continue; fi
    wait "$pid"
    one=$?
    [ $one -le $code ] || code=$one
    since=${since:-$SECONDS}
  done
  left=("${running[@]}")
  if [ ${#left[@]} -gt 0 ] && [ -n "$since" ] && [ $((SECONDS - since)) -ge 2 ]; then
    kill -TERM "${left[@]}"
    sleep 0.2
    kill -KILL "${left[@]}" 2>/dev/null
  fi
done
exit $code
"""
# What sbatch and slurmctld do with a script: run it, and again where that was asked for.
SBATCH = """#!/bin/bash
export SLURM_JOB_ID=77 SLURM_RESTART_COUNT=0
while :; do
  asked=$(cat asked 2>/dev/null | wc -l)
  bash "$@" >>glm45_jax-77.log 2>&1
  code=$?
  [ $(cat asked 2>/dev/null | wc -l) -gt $asked ] || exit $code
  SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""


@pytest.fixture
def slurm(stage):
    folder, environ = stage
    scontrol = f"#!/bin/sh\necho $* >> {folder}/asked\n"
    for name, text in {"srun": SRUN, "sbatch": SBATCH, "scontrol": scontrol}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    more = {"PATH": f"{folder}:{environ['PATH']}", "SLURM_JOB_ID": "77"}
    return folder, environ | more


def asked(slurm):
    """How often the job was sent back into the queue."""
    file = slurm[0] / "asked"
    lines = file.read_text().splitlines() if file.exists() else []
    assert set(lines) <= {"requeue 77"}
    return len(lines)


def sbatch(slurm, **more):
    """The code of the job's last end, and its log."""
    folder, environ = slurm
    line = [str(folder / "sbatch"), str(ROOT / "launch" / "slurm.sh"), *LINE, "w"]
    done = subprocess.run(line, env=environ | more, cwd=folder, timeout=60, check=False)
    return done.returncode, (folder / "glm45_jax-77.log").read_text()


def test_slurm_starts_the_line_on_every_node_and_jax_finds_the_others(slurm):
    code, _, err = ended(launch(slurm, "slurm.sh", *LINE, "w"))
    assert code == 0, err
    found = told(slurm)
    assert sorted(found) == ["0-0", "1-0"] and not asked(slurm)
    assert {note["told"] for note in found.values()} == {"auto"}
    assert all(note["line"] == ["-m", "glm45_jax.main", *LINE, "w"] for note in found.values())


def test_a_preempted_slurm_job_saves_and_goes_back_into_the_queue(slurm):
    process = launch(slurm, "slurm.sh", *LINE, "w", does={"0": ["wait"], "1": ["wait"]})
    wait_for(slurm, "waiting-0", "waiting-1")
    process.send_signal(signal.SIGTERM)
    code, out, _ = ended(process)
    assert code == 143 and out.count("saving") == 2
    assert asked(slurm) == 1


@pytest.mark.parametrize(
    "does",
    [
        {"0": [HUNG], "1": [HUNG]},  # both watchdogs at the same time
        {"0": ["hung"], "1": ["stuck"]},  # one earlier; the other hears nothing and is killed
        {"0": ["stuck"], "1": ["die"]},
    ],
    ids=str,
)
def test_a_slurm_job_whose_step_hangs_or_whose_process_dies_is_started_again(slurm, does):
    code, log = sbatch(slurm, DOES=json.dumps(does))
    assert code == 0, log
    assert sorted(told(slurm)) == ["0-0", "0-1", "1-0", "1-1"] and asked(slurm) == 1
    assert "requeued, to go on from the last checkpoint" in log


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_a_slurm_job_that_would_end_so_again_is_not_requeued(slurm, code):
    assert sbatch(slurm, DOES=json.dumps({"0": [code], "1": [code]}))[0] == code
    assert not asked(slurm) and len(told(slurm)) == 2


def test_a_slurm_job_that_hangs_every_time_is_requeued_only_so_often(slurm):
    does = json.dumps({"0": [HUNG] * 9, "1": [HUNG] * 9})
    code, log = sbatch(slurm, DOES=does, GLM45_REQUEUES="2")
    assert code == HUNG and asked(slurm) == 2
    assert "as 2 times before; not requeued" in log


def test_a_preemption_between_failures_says_that_the_job_gets_on(slurm):
    does = {"0": [HUNG, 143, HUNG, 0], "1": [HUNG, 143, HUNG, 0]}
    code, log = sbatch(slurm, DOES=json.dumps(does), GLM45_REQUEUES="1")
    assert code == 0 and asked(slurm) == 3, log


def test_a_number_of_requeues_that_is_none_is_refused(slurm):
    code, _, err = ended(launch(slurm, "slurm.sh", *LINE, "w", GLM45_REQUEUES="many"))
    assert code == 2 and "GLM45_REQUEUES=many is not a number" in err and not told(slurm)


def test_slurm_script_outside_a_job_says_how_it_is_sent(stage):
    code, _, err = ended(launch(stage, "slurm.sh", *LINE, "w"))
    assert code == 2 and "sbatch" in err


def test_a_tpu_slice_gets_the_line_on_every_host_quoted_once(stage):
    (stage[0] / "gcloud").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (stage[0] / "gcloud").chmod(0o755)
    more = {"PATH": f"{stage[0]}:{os.environ['PATH']}", "TPU": "pod", "ZONE": "us-east5-a"}
    words = ("experiments.pretrain:glm45", "--workdir", "gs://a b/w")
    code, out, err = ended(launch(stage, "tpu_pod.sh", *words, **more))
    assert code == 0, err
    asked = out.splitlines()
    assert asked[4:7] == ["pod", "--zone", "us-east5-a"] and "all" in asked
    command = asked[asked.index("--command") + 1]
    assert "GLM45_DISTRIBUTED=auto" in command and r"gs://a\ b/w" in command


@pytest.mark.parametrize("text", ["1", "host,2,0", "host:1,2", "h:1,2,2", "h:0,2,1", "h:x,2,1"])
def test_a_number_of_hosts_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        hosts.join({hosts.VARIABLE: text})


class Job:
    """A tiny run in several processes that really train, started again once."""

    def __init__(self, workdir, processes, *settings):
        self.workdir, self.processes = workdir, processes
        more = [word for setting in settings for word in ("--set", setting)]
        flags = ["-n", str(processes), "-r", "1", "-d", "1"]
        self.process = subprocess.Popen(
            ["bash", "launch/local.sh", *flags, *LINE, str(workdir), *more],
            cwd=ROOT,
            env={**os.environ, "GLM45_PYTHON": sys.executable},
            stderr=subprocess.PIPE,
            text=True,
        )

    def losses(self):
        """By step, of whole lines."""
        file = self.workdir / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        rows = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
        return {row["step"]: row["scalars"]["loss"] for row in rows}

    def kill_one(self, *, after_save, at_step):
        """Losses by step when the last process was killed, after a checkpoint and some steps."""
        saved = self.workdir / "checkpoints" / str(after_save)
        while not (saved.exists() and max(self.losses(), default=0) >= at_step):
            assert self.process.poll() is None
            time.sleep(0.02)
        words = ["pgrep", "-f", rf"glm45_jax\.main.*{self.workdir}"]
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        assert len(found) == self.processes
        os.kill(int(found[-1]), signal.SIGKILL)
        return self.losses()

    def end(self):
        """What the launcher and the first process said; the run came to its end."""
        _, err = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, err
        return err


@pytest.mark.slow
def test_a_run_of_two_processes_whose_one_is_killed_ends_as_if_it_had_not_been(tmp_path):
    killed, whole = (tmp_path / name for name in ("killed", "whole"))
    job = Job(killed, 2, "train.save_every=5")
    job.kill_one(after_save=5, at_step=5)
    assert "starting again from the last checkpoint" in job.end()
    other = Job(whole, 2, "train.save_every=5")
    other.end()
    assert job.losses() == other.losses()


@pytest.mark.slow
def test_four_processes_whose_one_is_killed_take_up_the_run_and_redo_the_same_steps(tmp_path):
    job = Job(tmp_path / "run", 4, "train.save_every=9", "train.validate_every=0")
    before = job.kill_one(after_save=9, at_step=11)
    said = job.end()
    assert re.search(r"ended with (137|9|1|134); starting again from the last checkpoint", said)
    assert "resuming at step 9" in said or "resuming at step 18" in said
    after = job.losses()
    assert sorted(after) == [*range(1, 21)]
    assert {step: after[step] for step in before} == before
