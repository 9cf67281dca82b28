"""Laws of the ledger of time (its parts are all the time there was) and of the watchdog (a process
that hangs leaves its stacks and ends).
"""

import pathlib
import subprocess
import sys

import pytest

from glm45_jax.train.goodput import CAUSES, WRITE_EVERY_S, Goodput
from glm45_jax.train.watchdog import HUNG, Watchdog

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


class Time:
    """A clock that goes on when told; it and the wall's agree but for where they began."""

    def __init__(self):
        self.now = 100.0

    def ledger(self, path=None):
        return Goodput(path, wall=lambda: self.now + 5000, clock=lambda: self.now)

    def spend(self, ledger, cause, seconds, step=None):
        self.now += seconds
        ledger.spent(cause, step)


def a_session(time, path, start, end, save_every=4):
    """A process that comes up, trains steps start + 1 .. end, and is killed right after a write."""
    ledger = time.ledger(path)
    time.spend(ledger, "start", 3.0)
    time.spend(ledger, "restore", 0.5)
    ledger.resumed(start)
    for step in range(start + 1, end + 1):
        time.spend(ledger, "data", 0.25)
        time.spend(ledger, "skipped" if step == 2 else "productive", 1.0, step)
        time.spend(ledger, "hooks", 0.125)
        if step % save_every == 0:
            time.spend(ledger, "checkpoint", 0.5)
    ledger.write()
    return ledger


def test_the_parts_are_all_the_time_over_every_kill(tmp_path):
    time, path = Time(), tmp_path / "goodput.json"
    began = time.now
    a_session(time, path, 0, 7)
    time.now += 60  # killed at 7, of which 4 are saved; away for a minute
    ledger = a_session(time, path, 4, 10)
    assert sum(ledger.seconds().values()) == pytest.approx(time.now - began, abs=1e-9)
    assert ledger.seconds() == {
        "productive": pytest.approx(9.0),  # 1, 3 .. 10, each once
        "start": 6.0,
        "restore": 1.0,
        "data": 0.25 * 13,
        "checkpoint": 1.0,
        "hooks": 0.125 * 13,
        "skipped": 1.0,
        "redone": pytest.approx(3.0),
        "down": 60.0,
    }


def test_what_was_not_written_before_a_kill_counts_as_down(tmp_path):
    time, path = Time(), tmp_path / "goodput.json"
    ledger = time.ledger(path)
    time.spend(ledger, "productive", WRITE_EVERY_S, 1)
    time.spend(ledger, "productive", WRITE_EVERY_S / 2, 2)  # is lost
    time.now += 10
    found = time.ledger(path).seconds()
    assert found["productive"] == WRITE_EVERY_S and found["down"] == WRITE_EVERY_S / 2 + 10


def test_a_fallback_to_an_older_checkpoint_undoes_part_of_what_was_between():
    time = Time()
    ledger = time.ledger()
    for step in range(1, 9):
        time.spend(ledger, "productive", 1.0, step)
        if step in (4, 8):
            time.spend(ledger, "checkpoint", 1.0)
    ledger.resumed(6)
    assert ledger.seconds()["redone"] == pytest.approx(2)
    ledger.resumed(4)
    assert ledger.seconds()["redone"] == pytest.approx(4)
    ledger.resumed(4)
    assert ledger.seconds()["productive"] == pytest.approx(4)
    ledger.resumed(0)
    assert ledger.seconds()["productive"] == pytest.approx(0)
    assert sum(ledger.seconds().values()) == pytest.approx(10)


def test_the_time_after_a_run_that_had_ended_is_nobody_s(tmp_path):
    time, path = Time(), tmp_path / "goodput.json"
    time.spend(ledger := time.ledger(path), "productive", 10.0, 1)
    ledger.write(done=True)
    time.now += 1e6
    assert time.ledger(path).seconds() == ledger.seconds()


def test_metrics_and_the_line_for_people_say_the_share_and_the_losses():
    time = Time()
    ledger = time.ledger()
    time.spend(ledger, "start", 6.0)
    time.spend(ledger, "productive", 12.0, 1)
    time.spend(ledger, "data", 2.0)
    assert ledger.scalars() == {"goodput": 0.6, "lost_s/start": 6.0, "lost_s/data": 2.0}
    assert ledger.text() == "60.0% of 20 s productive; lost: start 6.0 s, data 2.0 s"
    assert set(ledger.seconds()) == set(CAUSES)


HANGS = """
import pathlib, re, sys, threading, time
from glm45_jax.train.watchdog import Watchdog
def waits_for_a_host_that_is_gone():
    time.sleep(60)
def holds_the_interpreter():
    re.match(r"(a+)+$", "a" * 64 + "b")
with Watchdog(pathlib.Path(sys.argv[1]), 0.3) as dog:
    for _ in range(8):
        time.sleep(0.1)
        dog.beat()
    globals()[sys.argv[2]]()
"""


@pytest.mark.parametrize(
    "how, code", [("waits_for_a_host_that_is_gone", HUNG), ("holds_the_interpreter", 1)]
)
def test_a_process_without_steps_leaves_its_stacks_and_ends(tmp_path, how, code):
    path = tmp_path / "hung" / "host0.txt"
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, str(path), how], cwd=ROOT, timeout=30, capture_output=True
    )
    assert ended.returncode == code, ended.stderr
    text = path.read_text()
    assert how in text and "most recent call first" in text
    if code == HUNG:
        assert "no step for 0.3 s" in text and b"stacks are in" in ended.stderr


def test_a_run_that_did_not_hang_leaves_no_file(tmp_path):
    left = []
    for seconds in (0, 30):
        with Watchdog(tmp_path / "hung" / "host0.txt", seconds, leave=left.append) as dog:
            dog.beat()
    assert not left and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="-1"):
        Watchdog(tmp_path / "x", -1)
