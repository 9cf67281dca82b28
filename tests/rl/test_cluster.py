"""RL workers on Ray: the same runs as in one process, and what becomes of them when processes die.

Those with Ray share a cluster, and are slow: each run starts processes that import JAX. What
supervision promises is held in test_supervision.py, in milliseconds.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import sqlite3
import time

import jax
import pytest

from glm45_jax.envs.types import Env, Part
from glm45_jax.rl import cluster
from glm45_jax.rl.config import Async, Here, Ray
from glm45_jax.rl.sampler import HELD_OUT
from tests.rl import loop_run
from tests.rl.loop_run import RL, experiment, start

STORE = 100 * 2**20

with_ray = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed: pip install -r requirements-ray.txt",
    ),
]


def on_ray(**options):
    return Ray(store_bytes=STORE, **options)


def everywhere(ray):
    """The same test in one process and on Ray."""
    return pytest.mark.parametrize(
        "where",
        [pytest.param(Here(), id="here"), pytest.param(ray, id="ray", marks=with_ray)],
    )


@pytest.fixture(scope="module")
def ray():
    """One cluster for all runs of this file; they find it and leave it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(cluster.ADDRESS, raising=False)
        ray = cluster._ray()
        cluster._begin(ray, on_ray(engines=2, worlds=1))
    yield ray
    ray.shutdown()


def listening():
    """Where processes that this one began wait for others: addresses as the kernel writes them."""
    parents, ours = {}, {os.getpid()}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    for _ in parents:
        ours |= {pid for pid, parent in parents.items() if parent in ours}
    sockets = set()
    for pid in ours:
        with contextlib.suppress(OSError):
            sockets |= {os.readlink(path) for path in pathlib.Path(f"/proc/{pid}/fd").iterdir()}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {x[1].split(":")[0] for x in lines if x[3] == "0A" and f"socket:[{x[9]}]" in sockets}


def rolled(batches):
    return [
        (step, one.task_id, one.tokens_T.tolist(), set(one.versions_T[one.sampled_T].tolist()))
        for step, taken in batches
        for one in taken
    ]


def check_ledger(workdir, steps):
    """Every prompt was trained once, with all of its samples, and no lease is out."""
    with sqlite3.connect(f"file:{workdir}/pool/pool.sqlite?mode=ro", uri=True) as db:
        rows = db.execute("SELECT key, state, batch, samples, place FROM prompts").fetchall()
        samples = db.execute("SELECT place, sample FROM samples").fetchall()
    trained = [row for row in rows if row[1] == "trained"]
    assert len({key for key, *_ in trained}) == len(trained) == steps * RL.groups
    per_batch = collections.Counter(batch for _, _, batch, *_ in trained)
    assert per_batch == dict.fromkeys(range(steps), RL.groups)
    assert "leased" not in {row[1] for row in rows}
    for _, _, _, n, place in trained:
        assert sorted(j for at, j in samples if at == place) == list(range(n))


def slow_parity(task, messages):
    time.sleep(0.05)
    return loop_run.parity(task, messages)


def slow_world():
    """Judging takes so long that what is under way can be interrupted."""
    part = Part("even", slow_parity)
    return Env("parity", loop_run.task, (part, Part("seen", lambda t, m: 1.0, weight=0)))


@dataclasses.dataclass(frozen=True)
class Fatal:
    """Kills its own process when it judges one task, so often; files in `notes` count that."""

    notes: str
    number: int
    often: int = 1

    def __call__(self):
        def even(task, messages):
            notes = pathlib.Path(self.notes)
            if task.id == f"parity/{self.number}" and len(list(notes.iterdir())) < self.often:
                (notes / f"{time.time_ns()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return loop_run.parity(task, messages)

        part = Part("even", even)
        return Env("parity", loop_run.task, (part, Part("seen", lambda t, m: 1.0, weight=0)))


class Between:
    """Stands between loop and workers."""

    def __init__(self, workers):
        self.workers, self.version = workers, 0

    def __getattr__(self, name):
        return getattr(self.workers, name)

    def push(self, params, version):
        self.workers.push(params, version)
        self.version = version


class Assassin(Between):
    """Sends a signal to an engine's process in the middle of a round: some samples have come, some
    have not; or in the middle of the evaluation before the first.
    """

    def __init__(self, workers, version, sign):
        super().__init__(workers)
        self.at, self.sign, self.struck, self.rounds = version, sign, [], 0

    def poll(self):
        done = self.workers.poll()
        self.rounds += self.version == self.at and any(j.prompt.env != HELD_OUT for j, _ in done)
        due = self.rounds if self.at else "process" in self.workers.processes[0]
        if not self.struck and due and self.version == self.at and self.workers.running:
            self.struck.append(self.workers.processes[0])
            os.kill(int(self.struck[0].split()[1]), self.sign)
        return done


def run_from(exp, workdir, through=lambda workers: workers):
    state, outcome = loop_run.rl_run.run(
        exp,
        workdir,
        tokenizer=loop_run.TOKENIZER,
        updater=loop_run.updater_of(
            exp.model, exp.optim, exp.rl.update, exp.mesh, exp.rl.most_mismatch
        ),
        initial=lambda trainer: trainer.init(jax.random.key(exp.seed)),
        through=through,
    )
    return state, outcome, loop_run.read_jsonl(workdir / "metrics.jsonl")


@pytest.fixture
def plain(tmp_path, batches):
    """What a run of three batches in one process trains on."""
    start(experiment(tmp_path), tmp_path / "plain")
    found = rolled(batches)
    batches.clear()
    return found


def total(rows, name):
    return sum(row.scalars.get(f"rollout/{name}", 0) for row in rows)


@everywhere(on_ray(engines=2, worlds=1))
def test_a_run_trains_the_same_samples_wherever_they_are_drawn(
    where, request, tmp_path, batches, plain
):
    if isinstance(where, Ray):
        request.getfixturevalue("ray")
    exp = experiment(tmp_path, rl=dataclasses.replace(RL, where=where))
    _, outcome, rows = start(exp, tmp_path / "w")
    assert (outcome.step, outcome.why) == (3, "done")
    assert rolled(batches) == plain
    check_ledger(tmp_path / "w", 3)
    for row in rows[1:]:
        assert row.scalars["mismatch/gap"] < 1e-4 and row.scalars["staleness/max"] == 0
        assert row.scalars["rollout/tokens"] > 0 and row.scalars["rollout/tokens_per_s"] > 0
    assert total(rows, "engine_restarts") == total(rows, "given_back") == 0
    assert total(rows, "episodes") >= 2 * 6 + 3 * 12


class Tardy(Between):
    """Keeps back the samples of one group until two more pushes have been made."""

    def __init__(self, workers):
        super().__init__(workers)
        self.key, self.kept = None, []

    @property
    def running(self):
        return self.workers.running + len(self.kept)

    def poll(self):
        done = self.workers.poll()
        mine = [job.key for job, _ in done if self.version == 0 and job.prompt.env != HELD_OUT]
        self.key = self.key or (mine[-1] if mine else None)
        if self.version >= 2:
            done, self.kept = done + self.kept, []
            return done
        self.kept += [one for one in done if one[0].key == self.key]
        return [one for one in done if one[0].key != self.key]


@everywhere(on_ray())
def test_what_comes_too_late_is_dropped_counted_and_drawn_again(where, request, tmp_path, batches):
    if isinstance(where, Ray):
        request.getfixturevalue("ray")
    rl = dataclasses.replace(RL, where=where, mode=Async(staleness=1), dynamic=False)
    _, outcome, rows = run_from(experiment(tmp_path, steps=4, rl=rl), tmp_path / "w", Tardy)
    assert (outcome.step, outcome.why) == (4, "done")
    assert rows[2].scalars["pool/stale_samples"] == 0
    assert rows[-1].scalars["pool/stale_samples"] >= RL.samples
    assert rows[-1].scalars["pool/stale_groups"] >= 1
    for step, taken in batches:
        assert all(step - one.versions_T[one.sampled_T].min() <= 1 for one in taken)
    check_ledger(tmp_path / "w", 4)


@everywhere(on_ray(worlds=2))
def test_a_world_that_breaks_on_some_tasks_costs_these_alone(where, request, tmp_path, batches):
    if isinstance(where, Ray):
        request.getfixturevalue("ray")
    rl = dataclasses.replace(
        RL,
        where=where,
        world=loop_run.broken_world,
        evaluation=dataclasses.replace(RL.evaluation, tasks=0),
        split=loop_run.Split(first=0),
    )
    _, outcome, rows = start(experiment(tmp_path, steps=2, rl=rl), tmp_path / "w")
    assert outcome.why == "done" and rows[-1].scalars["pool/failed"] > 0
    assert all(int(one.task_id.split("/")[1]) % 3 for _, taken in batches for one in taken)
    check_ledger(tmp_path / "w", 2)


class Loses(Between):
    """Half of the samples of the second round are lost with what they had, as with an engine."""

    lost = 0

    def poll(self):
        done = []
        for job, one in self.workers.poll():
            if self.version == 1 and self.lost < 6 and job.prompt.env != HELD_OUT:
                self.lost += 1
                one = cluster._aborted(job)
            done.append((job, one))
        return done


def test_samples_that_are_given_back_are_drawn_again_and_the_others_are_kept(
    tmp_path, batches, plain
):
    _, outcome, _ = run_from(experiment(tmp_path), tmp_path / "w", Loses)
    assert outcome.why == "done" and rolled(batches) == plain
    check_ledger(tmp_path / "w", 3)


def ray_only(test):
    for mark in with_ray:
        test = mark(test)
    return test


@ray_only
def test_ray_that_a_run_begins_listens_on_loopback_alone(ray):
    assert listening() <= {"0100007F", "0000000000000000FFFF00000100007F", f"{'0' * 24}01000000"}
    assert listening()


@ray_only
@pytest.mark.parametrize(
    ("version", "sign", "engines", "patience"),
    [(1, signal.SIGKILL, 2, 600), (0, signal.SIGKILL, 1, 600), (1, signal.SIGSTOP, 1, 45)],
    ids=["in a round", "in an evaluation", "stopped in a round"],
)
def test_an_engine_that_is_killed_costs_no_sample_and_doubles_none(
    ray, tmp_path, batches, plain, version, sign, engines, patience
):
    where = on_ray(engines=engines, patience_s=patience)
    rl = dataclasses.replace(RL, where=where, world=slow_world)
    found = []

    def through(workers):
        found.append(Assassin(workers, version, sign))
        return found[0]

    _, outcome, rows = run_from(experiment(tmp_path, rl=rl), tmp_path / "w", through)
    assert (outcome.step, outcome.why) == (3, "done") and len(found[0].struck) == 1
    assert rolled(batches) == plain
    check_ledger(tmp_path / "w", 3)
    assert total(rows, "engine_restarts") == 1 and total(rows, "given_back") > 0
    assert rows[version + bool(version)].scalars["rollout/engine_restarts"] == 1
    for row in rows[1:]:
        assert row.scalars["mismatch/gap"] < 1e-4


@ray_only
def test_an_engine_that_dies_again_and_again_ends_the_run_and_the_ledger_is_whole(
    ray, tmp_path, batches, plain
):
    (tmp_path / "notes").mkdir()
    world = Fatal(str(tmp_path / "notes"), 8, often=100)
    rl = dataclasses.replace(RL, where=on_ray(restarts=1), world=world)
    _, outcome, _ = run_from(experiment(tmp_path, rl=rl), tmp_path / "w")
    assert outcome.why == "starved" and 0 < outcome.step < 3
    assert "engine 0 died 2 times" in outcome.said and "rl.where.restarts" in outcome.said
    assert len(list((tmp_path / "notes").iterdir())) == 2
    check_ledger(tmp_path / "w", outcome.step)
    # Where the trouble is gone the run goes on, in one process too.
    start(experiment(tmp_path), tmp_path / "w")
    assert rolled(batches) == plain
    check_ledger(tmp_path / "w", 3)


@ray_only
def test_a_process_of_worlds_that_dies_is_made_anew_and_asked_again(ray, tmp_path, batches, plain):
    (tmp_path / "notes").mkdir()
    rl = dataclasses.replace(RL, where=on_ray(worlds=1), world=Fatal(str(tmp_path / "notes"), 5))
    _, outcome, rows = run_from(experiment(tmp_path, rl=rl), tmp_path / "w")
    assert outcome.why == "done" and rolled(batches) == plain
    assert total(rows, "asked_again") > 0 and total(rows, "engine_restarts") == 0
    check_ledger(tmp_path / "w", 3)
