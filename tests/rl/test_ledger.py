"""Laws of what is on disk: whatever dies and when, every prompt is trained once and batches are in
order; a file that is damaged, or of another run, is refused; a trajectory comes back bit by bit."""

import dataclasses
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from glm45_jax.rl.lease import Lease
from glm45_jax.rl.ledger import FILE, MARK, Ledger
from glm45_jax.rl.pool import Pool, Prompt, Rules
from glm45_jax.rl.record import from_bytes, to_bytes
from glm45_jax.rl.trajectory import Trajectory
from tests.rl.common import trajectory
from tests.rl.pool_run import (
    RUN,
    SAMPLES,
    TOKENS,
    Crash,
    Fuse,
    drawn,
    expected,
    finish,
    opened,
    prompts,
    run,
)

ROOT = Path(__file__).resolve().parents[2]


# ---- crashes


def crashed_and_resumed(folder, n, rules, crashes):
    """What a run has seen that died at each of these statements, counted from each start."""
    for statements in crashes:
        try:
            return run(folder, n, rules=rules, fuse=Fuse(statements))
        except Crash:
            pass
    return run(folder, n, rules=rules)


def check(seen, folder, n, groups):
    batches = [[key for key, _ in batch[::SAMPLES]] for batch in seen]
    assert batches == expected(n, groups)
    for batch in seen:
        for i, (key, tokens) in enumerate(batch):
            assert tokens == drawn(key, i % SAMPLES, TOKENS).tokens_T.tolist()
    connection = Fuse().connection()
    with Pool(folder, run=RUN, rules=Rules(groups=groups), connection=connection) as pool:
        counts = pool.counts()
        assert pool.note("added") == n
    assert counts["trained"] == sum(map(len, batches))
    assert counts["trained"] + counts["dropped"] + counts["ready"] == n
    assert counts["dropped"] == counts.get("dropped_no_variance", 0)


def test_a_crash_at_any_statement_loses_and_repeats_nothing(tmp_path):
    rules, n = Rules(groups=1), 3
    whole = Fuse()
    run(tmp_path / "whole", n, rules=rules, fuse=whole)
    assert whole.used > 150
    for statement in range(whole.used):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            check(crashed_and_resumed(folder, n, rules, [statement]), folder, n, 1)


@settings(max_examples=40)
@given(
    crashes=st.lists(st.integers(0, 300), max_size=8),
    n=st.integers(1, 11),
    groups=st.integers(1, 3),
    staleness=st.integers(0, 2),
)
def test_after_any_crashes_every_prompt_was_trained_once_and_in_order(
    crashes, n, groups, staleness
):
    with tempfile.TemporaryDirectory() as folder:
        rules = Rules(groups=groups, staleness=staleness)
        check(crashed_and_resumed(folder, n, rules, crashes), folder, n, groups)


def test_killed_processes_are_continued_by_others(tmp_path):
    n, rng = 24, random.Random(0)
    command = [sys.executable, "-m", "tests.rl.pool_run", str(tmp_path), str(n), "2", "1"]
    for _ in range(6):  # SIGKILL, from within a statement
        killed = subprocess.run([*command, str(rng.randrange(20, 400))], cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, check=True)
    seen = json.loads((tmp_path / "done.json").read_text())
    check([[tuple(one) for one in batch] for batch in seen], tmp_path, n, 2)


# ---- files


def test_a_damaged_file_is_refused_with_one_message(tmp_path):
    with opened(tmp_path) as pool:
        finish(pool, 2, version=0)
    whole_file = (tmp_path / FILE).read_bytes()
    noise = np.random.default_rng(0).bytes(len(whole_file) - 4096)
    for body in (b"", b"not a database", whole_file[:4096] + noise, whole_file[: len(noise) // 2]):
        (tmp_path / FILE).write_bytes(body)
        with pytest.raises(ValueError, match=r"pool.sqlite is damaged: .*put a copy back"):
            opened(tmp_path)
    (tmp_path / FILE).write_bytes(whole_file)
    with opened(tmp_path) as pool:
        assert len(pool.take(0)) == 2 * SAMPLES


def test_a_flipped_bit_in_a_trajectory_is_found_when_it_is_read(tmp_path):
    with opened(tmp_path) as pool:
        finish(pool, 2, version=0)
    tokens = drawn("sums/1", 0, TOKENS).tokens_T.tobytes()
    body = (tmp_path / FILE).read_bytes()
    assert body.count(tokens) == 1
    (tmp_path / FILE).write_bytes(body.replace(tokens, bytes([tokens[0] ^ 1]) + tokens[1:]))
    with (
        opened(tmp_path) as pool,
        pytest.raises(ValueError, match="damaged: sample 0 of prompt 'sums/1' is not what was"),
    ):
        pool.take(0)


def test_another_runs_pool_and_another_format_are_refused(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(ValueError, match=f"is of run '{RUN}', this is run 'mine'; give this run"):
        Pool(tmp_path, run="mine", rules=Rules(groups=1))
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("UPDATE facts SET value = '0' WHERE name = 'format'")
    db.close()
    with pytest.raises(ValueError, match="has format 0, this code reads 3"):
        opened(tmp_path)
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("DROP TABLE facts")
    db.close()
    with pytest.raises(ValueError, match="damaged: no such table: facts"):
        opened(tmp_path)


def test_a_commit_is_on_disk_before_it_returns(tmp_path):
    told = []

    class Told(sqlite3.Connection):
        def execute(self, *args):
            told.append(args[0])
            return super().execute(*args)

    with Pool(tmp_path, run=RUN, rules=Rules(groups=1), connection=Told) as pool:
        pool.add(prompts(1))
    assert "PRAGMA synchronous=FULL" in told and "PRAGMA journal_mode=WAL" in told
    assert told.count("BEGIN IMMEDIATE") == told.count("COMMIT") == 2


def test_a_reader_needs_a_pool_and_writes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the folder of a pool"):
        Ledger(tmp_path, run=None, read_only=True)
    opened(tmp_path).close()
    ledger = Ledger(tmp_path, run=None, read_only=True)
    assert ledger.run == RUN and (tmp_path / MARK).exists()
    with pytest.raises(sqlite3.OperationalError, match="readonly"), ledger.write() as db:
        db.execute("DELETE FROM prompts")
    ledger.close()


def test_pool_and_viewer_start_without_jax():
    code = (
        "import sys, glm45_jax.rl.pool, glm45_jax.rl.viewer; "
        "sys.exit('jax' in sys.modules or 'tokenizers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- bytes


@given(length=st.integers(1, 20), seed=st.integers(0, 99), routed=st.booleans())
def test_a_trajectory_survives_as_bytes_and_a_lease_as_json(length, seed, routed):
    one = trajectory(np.random.default_rng(seed), length, routes=(2, 3) if routed else None)
    one = dataclasses.replace(
        one,
        messages=({"role": "user", "content": "\ud800 </script>\0"}, {"role": "a", "n": [1, None]}),
        parts={"right": np.float32(0.5)},
        status="length",
    )
    back = from_bytes(to_bytes(one))
    for field in dataclasses.fields(Trajectory):
        was, now = getattr(one, field.name), getattr(back, field.name)
        if isinstance(was, np.ndarray):
            assert was.dtype == now.dtype
            assert_array_equal(was, now)
        else:
            assert was == now
    lease = Lease(Prompt("e", 3, 4, "k", {"level": 2}), (1, 3), {3: one}, "t", 1.5)
    read = Lease.from_json(json.loads(json.dumps(lease.to_json())))
    assert dataclasses.replace(read, begun={}).to_json() == {**lease.to_json(), "begun": {}}
    assert to_bytes(read.begun[3]) == to_bytes(one)
    assert len({lease.seed(j) for j in range(64)}) == 64 and lease.seed(1) == read.seed(1)


def test_bytes_that_are_no_trajectory_are_refused():
    one = trajectory(np.random.default_rng(0), 5)
    good = to_bytes(one)
    with pytest.raises(ValueError, match="not the bytes of a trajectory"):
        from_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(ValueError, match="not the bytes of a trajectory"):
        from_bytes(good[: len(good) // 2])
    line, _, data = good.partition(b"\n")
    said = json.loads(line)
    arrays, more = said["arrays"], data + bytes(40)
    for changed, body, message in (
        ({"arrays": {**arrays, "tokens_T": ["|O", [5]]}}, data, "tokens_T is .O"),
        ({"arrays": {**arrays, "tokens_T": ["<i4", [-5]]}}, data, "tokens_T is <i4"),
        ({"arrays": {**arrays, "tokens_T": ["<i4", [2**60]]}}, data, "not the bytes"),
        ({"arrays": {**arrays, "tokens_T": 3}}, data, "not the bytes"),
        ({"arrays": {**arrays, "surprise_T": ["<f8", [5]]}}, more, r"has no \['surprise_T'\]"),
        ({"arrays": {**arrays, "tokens_T": ["<i4", [4]]}}, data[4:], r"sampled_T is \(5,\)"),
        ({}, data + b"1", "bytes of arrays"),
        ({}, data[:-1], "not the bytes"),
        ({"fields": {}}, data, "not a whole trajectory"),
        ({"fields": 1}, data, "not the bytes"),
        ({"fields": {"tokens_T": 1}}, data, "come twice"),
    ):
        with pytest.raises(ValueError, match=message):
            from_bytes(json.dumps(said | changed).encode() + b"\n" + body)
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_bytes(dataclasses.replace(one, reward=float("nan")))
