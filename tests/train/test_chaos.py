"""One law: whatever kills a run, as often as it likes, the run ends with the weights, optimizer,
metrics and step of the one that nothing happened to, bit for bit.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from glm45_jax.checkpoint import Checkpoints
from glm45_jax.metrics import read_jsonl
from tests.train.chaos_run import SAVE_EVERY, final, run

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
WAYS = ("SIGKILL", "SIGTERM", "truncated", "full disk")
KILLS, STEPS = 20, 60
FULL_AT = 64 * 1024  # bytes of a file; the tiny model's arrays are more


class Signal:
    """A hook that sends SIGTERM to this process after a step."""

    def __init__(self, at):
        self.at = at

    def due(self, step):
        return step == self.at

    def __call__(self, step, state, trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}


class Crash(Signal):
    """A hook after which nothing of the process is finished, but for what runs already."""

    def __call__(self, step, state, trainer):
        raise KeyboardInterrupt


def damage(workdir, rng):
    """Cuts the largest file of the newest checkpoint short; the one before it stays."""
    steps = Checkpoints(workdir / "checkpoints").steps()
    if len(steps) < 2:
        return False
    files = [p for p in (workdir / "checkpoints" / str(steps[-1])).rglob("*") if p.is_file()]
    path = max(files, key=lambda p: p.stat().st_size)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return True


def numbers(workdir):
    """Loss and gradient norm of each step, as logged."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    return [(r.step, r.scalars["loss"], r.scalars["grad_norm"]) for r in rows]


def check_same(ours, theirs):
    for a, b in zip(final(ours), final(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert numbers(ours) == numbers(theirs)


def test_a_run_that_is_stopped_crashes_and_finds_its_checkpoint_damaged_is_the_undisturbed_one(
    tmp_path,
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, 10).why == "done"
    assert run(cut, 10, [Signal(3)]).step == 3
    with pytest.raises(KeyboardInterrupt):
        run(cut, 10, [Crash(7)])
    assert damage(cut, random.Random(0))
    assert run(cut, 10, [Signal(8)]).step == 8
    assert run(cut, 10).why == "done"
    check_same(cut, whole)
    assert list((cut / "checkpoints").glob("*.damaged"))
    lost = json.loads((cut / "goodput.json").read_text())["seconds"]
    assert lost["restore"] > 0 and lost["redone"] > 0 and lost["down"] > 0


def start(workdir, most_bytes=0):
    command = [sys.executable, "-m", "tests.train.chaos_run", workdir, STEPS, most_bytes]
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=log, stderr=log)


def steps_done(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def strike(workdir, way, rng):
    """Starts the run, and ends it in this way at a moment of its own; True where it was ended."""
    before = max(Checkpoints(workdir / "checkpoints").steps(), default=0)
    process = start(workdir, FULL_AT if way == "full disk" else 0)
    wanted = before + rng.randrange(1, 2 * SAVE_EVERY + 2)
    deadline = time.monotonic() + 120
    while way != "full disk" and steps_done(workdir) < wanted and process.poll() is None:
        assert time.monotonic() < deadline, workdir.with_suffix(".log").read_text()[-2000:]
        time.sleep(0.01)
    time.sleep(rng.random() * 0.2)
    if way in ("SIGKILL", "truncated"):
        process.kill()
    elif way == "SIGTERM":
        process.terminate()
    code = process.wait(timeout=120)
    if way == "truncated":
        return damage(workdir, rng)
    # A SIGTERM before the loop or after it ends the process as well, with nothing to save.
    assert code in {"SIGTERM": (143, -15, 0), "full disk": (1, -6), "SIGKILL": (-9, 0)}[way], code
    return code != 0


@pytest.mark.slow
def test_twenty_kills_of_four_kinds_change_nothing(tmp_path):
    rng, struck = random.Random(7), []
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    while len(struck) < KILLS:
        way = WAYS[len(struck) % len(WAYS)]
        if strike(cut, way, rng):
            struck.append(way)
        assert max(Checkpoints(cut / "checkpoints").steps(), default=0) < STEPS, struck
    assert start(cut).wait(timeout=300) == 0
    assert start(whole).wait(timeout=300) == 0
    check_same(cut, whole)
    assert {way: struck.count(way) for way in WAYS} == dict.fromkeys(WAYS, KILLS // len(WAYS))
