"""Supervision of RL workers on Ray, over a stand-in for Ray, in milliseconds; and the script that
starts Ray on several hosts, with a small program in Python's place. With Ray: test_cluster.py.
"""

import collections
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax import params as params_lib
from glm45_jax.model import transformer
from glm45_jax.rl import cluster, worlds
from glm45_jax.rl.cluster import Cluster
from glm45_jax.rl.config import Async, Ray
from glm45_jax.rl.lease import Prompt
from glm45_jax.rl.sampler import HELD_OUT
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.rl.workers import Job, WorkersError
from glm45_jax.rollout import weights
from glm45_jax.rollout.sampling import Sampling
from tests.rl import fake_ray, loop_run
from tests.rl.fake_ray import FakeRay
from tests.rl.loop_run import RL, experiment

ROOT = pathlib.Path(__file__).resolve().parents[2]
STORE = 100 * 2**20


def on_ray(**options):
    return Ray(store_bytes=STORE, **options)


class Stub:
    """A sampler as an engine's process has one: it ends half of what it has with every poll."""

    def __init__(self, parcel):
        self.version, self.jobs, self.aborting = parcel.version, {}, False

    def receive(self, parcel):
        self.version = parcel.version

    def start(self, job):
        self.jobs[job.name] = job

    def poll(self):
        names = list(self.jobs) if self.aborting else list(self.jobs)[: 1 + len(self.jobs) // 2]
        status = "aborted" if self.aborting else "done"
        self.aborting = False
        return [(job, ended(job, self.version, status)) for job in map(self.jobs.pop, names)]

    def abort(self):
        self.aborting = True

    def counts(self):
        return {"tokens": 1.0, "seconds": 2.0, "episodes": 1.0, "inexact": 0.0}


def ended(job, version, status="done"):
    return Trajectory(
        task_id="t",
        group=job.prompt.key,
        tokens_T=np.array([1, job.sample], np.int32),
        sampled_T=np.array([False, True]),
        logp_T=np.zeros(2, np.float32),
        versions_T=np.full(2, version, np.int32),
        reward=1.0,
        status=status,
    )


def job_of(key, sample, env="parity"):
    return Job(key, Prompt(env, 0, 4, key), sample, Sampling())


MAKERS = {"parity": loop_run.world, HELD_OUT: loop_run.world}


@pytest.fixture(scope="module")
def params():
    return params_lib.init(transformer.specs(loop_run.MODEL), jax.random.key(0))


@pytest.fixture
def stubbed(monkeypatch, params):
    """Makes a cluster over a stand-in for Ray, whose engines sample by a stub, in no thread."""
    monkeypatch.setattr(cluster, "Threaded", lambda local: local)
    monkeypatch.delenv(cluster.ADDRESS, raising=False)
    monkeypatch.setattr(cluster, "WAIT_S", 0)

    def make(where, **options):
        fake = FakeRay(**options)
        monkeypatch.setitem(sys.modules, "ray", fake)
        parcel = weights.prepare(params, 0, cfg=loop_run.MODEL)
        build = lambda parcel, envs, judges: Stub(parcel)  # noqa: E731
        made = Cluster(where, parcel, build=build, makers=MAKERS, cfg=loop_run.MODEL)
        return made, fake

    return make


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 3), st.integers(0, 12))
def test_every_job_comes_back_once_however_often_engines_die(deaths, engines, n):
    fates = iter(deaths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "Threaded", lambda local: local)
        patch.setattr(cluster.log, "disabled", True)
        patch.setattr(cluster, "_wait_for_room", lambda ray, where: None)
        fake = FakeRay(fate=lambda actor: next(fates, False))
        patch.setitem(sys.modules, "ray", fake)
        parcel = weights.Parcel(0, jax.tree.structure([]), [], [], [])
        many = Cluster(
            Ray(engines=engines, restarts=len(deaths)),
            parcel,
            build=lambda parcel, envs, judges: Stub(parcel),
            makers=MAKERS,
            cfg=loop_run.MODEL,
        )
        jobs = [job_of(f"lease{i % 3}", i) for i in range(n)]
        jobs += [job_of("held", i, HELD_OUT) for i in range(n // 2)]
        for job in jobs:
            many.start(job)
        back = collections.Counter()
        while many.running:
            for job, one in many.poll():
                back[job.name] += 1
                # Only a ledger can have a sample drawn again.
                assert one.status == "done" or job.prompt.env != HELD_OUT
                assert one.group == job.prompt.key
        assert back == collections.Counter(job.name for job in jobs)
        counts = many.counts()
        assert counts["engine_restarts"] == sum(actor.dead for actor in fake.actors)
        many.close()
        assert all(actor.dead for actor in fake.actors) and not fake.began


def test_a_new_engine_has_the_newest_weights_and_counts_only_grow(stubbed, params):
    dying = set()
    many, fake = stubbed(on_ray(engines=2), fate=lambda actor: id(actor) in dying)
    versions = set()
    before = many.counts()
    for version in range(1, 4):
        many.push(params, version)
        for j in range(4):
            many.start(job_of(f"a{version}", j))
            many.start(job_of(f"b{version}", j))
        many.poll()
        dying |= {id(actor) for actor in fake.actors[-1:] if version == 2}
        while many.running:
            for _, one in many.poll():
                if one.status == "done":
                    versions |= {(version, int(one.versions_T[1]))}
        after = many.counts()
        assert all(after[name] >= before[name] for name in before)
        before = after
    assert versions == {(1, 1), (2, 2), (3, 3)}
    assert before["engine_restarts"] == 1 and before["given_back"] > 0
    with pytest.raises(ValueError, match="not newer"):
        many.push(params, 3)
    many.close()


def test_an_engine_that_does_not_answer_is_replaced(stubbed):
    many, fake = stubbed(on_ray(patience_s=0.05))
    many.start(job_of("k", 0))
    fake.actors[0].hangs = True
    many.poll()
    time.sleep(0.06)
    [(job, one)] = many.poll()
    assert job.name == ("k", 0) and one.status == "aborted" and fake.actors[0].dead
    many.start(job)
    while not (done := many.poll()):
        pass
    assert done[0][1].status == "done" and many.counts()["engine_restarts"] == 1
    many.close()


def test_what_dies_for_ever_ends_the_run_and_gives_everything_back(stubbed):
    many, fake = stubbed(on_ray(engines=2, restarts=2), fate=lambda actor: True)
    jobs = [job_of("a", 0), job_of("b", 0), job_of("h", 0, HELD_OUT)]
    for job in jobs:
        many.start(job)
    with pytest.raises(WorkersError, match=r"died 3 times.*restarts is 2.*the process died"):
        for _ in range(100):
            for job, one in many.poll():
                assert one.status == "aborted"
                many.start(job)
    assert len(fake.actors) <= 2 + 2 * 2
    with pytest.raises(WorkersError, match="died 3 times"):
        many.poll()  # it stays so
    many.abort()
    gone = many.poll()
    assert sorted(job.name for job, _ in gone) == sorted(job.name for job in jobs)
    assert {one.status for _, one in gone} == {"aborted"} and not many.running
    assert many.poll() == []
    many.close()


def test_weights_that_come_damaged_do_not_leave_the_old_ones_sampling(stubbed, params, monkeypatch):
    many, fake = stubbed(on_ray())
    many.start(job_of("k", 0))
    while many.running:
        many.poll()

    def refuses(self, parcel):
        raise RuntimeError("wq_DNH came as something else")

    with monkeypatch.context() as patch:
        patch.setattr(Stub, "receive", refuses)
        many.push(params, 1)
        many.start(job_of("k", 1))
        done = [one for _ in range(3) for _, one in many.poll()]
    assert [one.status for one in done] == ["aborted"] and len(fake.actors) == 2
    many.start(job_of("k", 2))
    while many.running:
        for _, one in many.poll():
            assert one.versions_T[1] == 1
    many.close()


@pytest.mark.parametrize("fp8", [False, True])
def test_weights_travel_bit_by_bit_and_damage_on_the_way_is_seen(fp8):
    cfg = dataclasses.replace(loop_run.MODEL, dtype="bfloat16")
    params = params_lib.init(transformer.specs(cfg), jax.random.key(0))
    sent = weights.prepare(params, 7, cfg=cfg, fp8=fp8)
    kept = jax.tree.map(np.asarray, sent.params)
    freight = cluster.ship(sent)
    assert not sent.leaves
    assert "bfloat16" in freight.dtypes and ("float8_e4m3fn" in freight.dtypes) == fp8
    came = weights.stage(cluster.unload(freight))
    assert came.version == 7

    def same(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)

    jax.tree.map(same, came.params, kept)
    words = jax.tree.leaves(freight.words)
    damaged = words[1].copy()
    damaged.flat[3] ^= 1
    leaves = [words[0], damaged, *words[2:]]
    tree = jax.tree.unflatten(jax.tree.structure(freight.words), leaves)
    with pytest.raises(RuntimeError, match=f"{freight.names[1]} of version 7 came as"):
        weights.stage(cluster.unload(dataclasses.replace(freight, words=tree)))


def test_a_call_of_a_world_whose_process_dies_goes_to_another():
    task, said = loop_run.task(0), [{"role": "assistant", "content": "ab"}]
    asked = []

    def fate(actor):
        asked.append(actor)
        return len(asked) == 2

    fake = FakeRay(fate)
    makers = {"parity": loop_run.world, "same": loop_run.agreeing_world, "again": loop_run.world}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", fake)
        make = fake.remote(worlds.World).options()
        many = worlds.Worlds([make.remote(makers) for _ in range(2)])
        far = worlds.Far(loop_run.world(), "parity", many)
        verdicts = [far.judge(task, said) for _ in range(6)]
        assert many.asked_again == 5  # the dead one stays so here, and has its turn every time
        assert verdicts == [loop_run.world().judge(task, said)] * 6
        broken = worlds.Worlds([make.remote({"parity": loop_run.broken_world})])
        with pytest.raises(OSError, match="the world is gone"):
            broken.ask("judge", "parity", task, said)
        fake.fate = lambda actor: True
        with pytest.raises(RuntimeError, match="3 processes died over it"):
            for _ in range(3):
                many.ask("judge", "parity", task, said)
    envs = worlds.make_all(makers)
    assert envs["parity"] is envs["again"] and far.step is None and far.max_turns == 1


def test_what_ray_says_in_many_lines_is_one():
    cause = ValueError("bad sizes")
    assert worlds.said(fake_ray.RayTaskError(cause)) == "bad sizes"
    died = "It died in \x1b[36mWorld()\x1b[39m:\n  File x\n\nOSError: gone\n"
    assert worlds.said(fake_ray.RayActorError(died)) == "It died in World(): … OSError: gone"
    assert worlds.said(fake_ray.RayActorError()) == "RayActorError()"


def test_what_does_not_fit_is_refused_with_a_way_out(stubbed, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="engines >= 1"):
        Ray(engines=0)
    with pytest.raises(ValueError, match="store_bytes"):
        Ray(store_bytes=1)
    with pytest.raises(ValueError, match=r"use Async\(2\)"):
        dataclasses.replace(RL, where=Ray(), mode=Async(2, thread=False))
    with pytest.raises(ValueError, match=r"'CPU': '2 of 3'.*ask for fewer"):
        stubbed(on_ray(engines=2, worlds=1), cpus=2)
    with pytest.raises(WorkersError, match="worlds does not begin: the process died"):
        stubbed(on_ray(worlds=1), fate=lambda actor: actor.cls is worlds.World)
    many, _ = stubbed(on_ray())
    with pytest.raises(ValueError, match="is none of"):
        many.start(job_of("k", 0, "nowhere"))
    many.start(job_of("k", 0))
    with pytest.raises(ValueError, match="under way"):
        many.start(job_of("k", 0))
    many.close()
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    exp = experiment(tmp_path, rl=dataclasses.replace(RL, where=Ray()))
    with pytest.raises(ValueError, match=r"requirements-ray\.txt"):
        loop_run.rl_run.updater_of(exp)


def test_ray_is_begun_for_this_run_alone_unless_the_environment_names_a_cluster(
    stubbed, monkeypatch
):
    many, fake = stubbed(on_ray(engines=2, worlds=1))
    [began] = fake.began
    assert began["address"] == "local" and began["num_cpus"] == 3
    assert began["include_dashboard"] is False and began["object_store_memory"] == STORE
    many.close()
    fake = FakeRay()
    monkeypatch.setenv(cluster.ADDRESS, "10.0.0.1:6379")
    cluster._begin(fake, on_ray())
    [began] = fake.began
    assert began.keys() == {"address", "logging_level"} and began["address"] == "10.0.0.1:6379"


# The launch script, with a small program in Python's place.

STAND_IN = """
import json, os, signal, socket, sys, time
names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
with open(os.environ["NOTES"], "a") as file:
    said = {"line": sys.argv[1:], **{name: os.environ.get(name) for name in names}}
    file.write(json.dumps(said) + "\\n")
if "--head" in sys.argv:
    server = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
    time.sleep(60)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if os.environ.get("WAITS"):
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(int(os.environ.get("CODE", 0)))
"""


@pytest.fixture
def launch(tmp_path):
    """Starts launch/ray.sh; what each program was told is in `notes`."""
    python, notes, begun = tmp_path / "python", tmp_path / "notes", []
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/stand_in.py "$@"\n')
    python.chmod(0o755)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    notes.touch()

    def start(*words, **more):
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "ray.sh"), *words],
            env=environ | {"GLM45_PYTHON": str(python), "NOTES": str(notes)} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        return process, lambda: [json.loads(line) for line in notes.read_text().splitlines()]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


LINE = ("experiments.mine:run", "--workdir", "my runs/w", "--set", "train.steps=3")
MAIN = ["-m", "glm45_jax.main", *LINE]


def test_without_an_address_the_run_begins_ray_itself(launch):
    process, told = launch(*LINE, RAY_ADDRESS="10.0.0.1:6379", CODE="5")
    assert process.wait(30) == 5
    assert [(one["line"], one["RAY_ADDRESS"]) for one in told()] == [(MAIN, None)]


def test_the_host_of_the_address_has_the_head_and_the_trainer(launch):
    port = str(free_port())
    process, told = launch("-a", "127.0.0.1", "-p", port, "-c", "3", *LINE, CODE="4")
    assert process.wait(30) == 4  # the head was ended, or this would take a minute
    head, main = told()
    assert head["line"][:5] == ["-m", "ray.scripts.scripts", "start", "--head", "--block"]
    assert head["line"][-4:] == ["--num-cpus", "3", "--num-gpus", "0"]
    assert (main["line"], main["RAY_ADDRESS"]) == (MAIN, f"127.0.0.1:{port}")
    for one in (head, main):
        assert one["RAY_AUTH_MODE"] == "token"
        assert one["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"  # on loopback


def test_a_signal_goes_to_the_trainer_and_its_code_comes_back(launch):
    process, _ = launch("-a", "127.0.0.1", "-p", str(free_port()), *LINE, WAITS="1")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_another_host_joins_and_lends_what_it_is_told(launch):
    here = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    if not here:
        pytest.skip("this host has no address but loopback, where nobody joins")
    with socket.create_server((here[0], 0)) as server:
        port = server.getsockname()[1]
        process, told = launch("-a", here[0], "-p", str(port), "-g", "8", "-j", *LINE)
        assert process.wait(30) == 1 and "the head goes on" in process.stderr.read()
        [one] = told()
        address = ["--address", f"{here[0]}:{port}", "--num-gpus", "8"]
        assert one["line"] == ["-m", "ray.scripts.scripts", "start", "--block", *address]
        assert one["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] is None


@pytest.mark.parametrize(
    "words", [(), ("-a", "trainer", *LINE), ("-j", *LINE), ("-a", "127.0.0.1", "-j", *LINE)]
)
def test_a_line_that_makes_no_sense_starts_nothing(launch, words):
    process, told = launch(*words)
    assert process.wait(30) == 2 and told() == []
    assert "launch/ray.sh [-a ADDRESS]" in process.stderr.read()
