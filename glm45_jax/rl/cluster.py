"""The RL workers on Ray: the trainer is this process, engines and worlds are actors. The type to
know is `Cluster`, one more `Workers`; `Engine` is what runs in an engine's process.

Weights go through Ray's object store, once a version, as the parcel that every push is: each engine
compares checksums before it serves them. Calls of an actor happen in the order in which they were
made, so what is asked after a push is drawn by its weights, and the trainer waits for nobody.

An engine that dies, raises or does not answer is killed and made anew, from the newest weights. Its
jobs come back "aborted": the loop gives their leases back, and the ledger has them sampled again.
Held-out jobs, which no ledger knows, are begun again here. Ray is imported where it is needed.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import importlib.util
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from glm45_jax.envs.types import Env
from glm45_jax.model.config import ModelConfig
from glm45_jax.rl.config import Ray
from glm45_jax.rl.sampler import HELD_OUT
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.rl.workers import WAIT_S, Done, Job, Local, Threaded, WorkersError
from glm45_jax.rl.worlds import Far, Makers, World, Worlds, make_all, said
from glm45_jax.rollout import weights
from glm45_jax.rollout.weights import Parcel, Push

log = logging.getLogger(__name__)

ADDRESS = "RAY_ADDRESS"  # of a cluster to join; without it Ray is started here, for this run alone
LOOK_S = 1.0  # between two looks whether a cluster has grown to what is asked

# The sampler of these weights over these environments, with so many threads of judges.
Build = Callable[[Parcel, Mapping[str, Env], int], Local]


def check(where: Ray) -> None:
    """None. Raises: ValueError where Ray, or one process that trains, is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(
            f"rl.where={where} needs Ray, which is not installed: pip install -r "
            "requirements-ray.txt (or 'glm45_jax[ray]'), or use rl.where=Here()"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"rl.where={where}: {jax.process_count()} processes train; with Ray one does, and the "
            "engines are what is spread"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Freight:
    """A parcel on its way between processes. words: its tree, leaves as NumPy integers of the same
    width (pickle hands over their memory; bfloat16 it would copy); dtypes: what they are, in order.
    """

    version: int
    words: Any
    dtypes: tuple[str, ...]
    names: tuple[str, ...]
    sums: tuple[int, ...]


def ship(parcel: Parcel) -> Freight:
    """The parcel on this host; it is empty afterwards."""
    words, dtypes = [], []
    leaves, parcel.leaves = parcel.leaves, []
    while leaves:
        leaf = np.asarray(leaves.pop(0))
        dtypes.append(leaf.dtype.name)
        words.append(leaf.view(f"u{leaf.dtype.itemsize}"))
    tree = jax.tree.unflatten(parcel.tree, words)
    return Freight(parcel.version, tree, tuple(dtypes), tuple(parcel.names), tuple(parcel.sums))


def unload(freight: Freight) -> Parcel:
    """What was shipped; `weights.stage` checks that it came whole."""
    words, tree = jax.tree.flatten(freight.words)
    leaves = [x.view(jnp.dtype(name)) for x, name in zip(words, freight.dtypes, strict=True)]
    return Parcel(freight.version, tree, leaves, list(freight.names), list(freight.sums))


@dataclasses.dataclass(frozen=True)
class Report:
    """What an engine says when it is asked. ended: names of jobs and what became of them."""

    ended: list[tuple[tuple[str, int], Trajectory]]
    counts: Mapping[str, float]
    process: str


class Engine:
    """One sampler in a thread of its own, in the process of an actor."""

    def __init__(
        self, build: Build, makers: Makers, freight: Freight, worlds: Sequence[Any], cpu: bool
    ) -> None:
        if cpu:
            jax.config.update("jax_platforms", "cpu")
        envs, judges = make_all(makers), 0
        self._worlds = Worlds(worlds)
        if worlds:
            envs = {name: cast(Env, Far(env, name, self._worlds)) for name, env in envs.items()}
            judges = len(worlds)
        self._local = build(unload(freight), envs, judges)
        self._threaded = Threaded(self._local)
        self._process = f"process {os.getpid()} on {socket.gethostname()}"
        self._error: Exception | None = None

    def push(self, freight: Freight) -> None:
        """None; what is asked later is drawn by these weights. What goes wrong, `poll` says: the
        old ones must not answer in their place.
        """
        try:
            self._local.receive(unload(freight))
        except Exception as error:
            self._error = error

    def abort(self) -> None:
        """As `Workers`."""
        self._threaded.abort()

    def poll(self, jobs: Sequence[Job]) -> Report:
        """What ended, after these jobs were begun; waits a little."""
        if self._error is not None:
            raise self._error
        for job in jobs:
            self._threaded.start(job)
        ended = [(job.name, one) for job, one in self._threaded.poll()]
        again = {"asked_again": float(self._worlds.asked_again)}
        return Report(ended, {**self._threaded.counts(), **again}, self._process)


@dataclasses.dataclass
class _Seat:
    """An engine's place, whoever sits there. asked: the call under way, since a time; counts: of
    this process; process: empty until it was heard of; deaths: since the last push.
    """

    number: int
    actor: Any
    jobs: dict[tuple[str, int], Job] = dataclasses.field(default_factory=dict)
    asked: Any = None
    since: float = 0.0
    counts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    process: str = ""
    deaths: int = 0

    @property
    def who(self) -> str:
        """Which process sits here."""
        return self.process or "not heard of yet"


class Cluster:
    """Engines and worlds as actors. parcel: the first weights. build, makers: what an engine's
    process makes its sampler of, worlds by name. cfg, how: of pushes. One thread at a time.

    Raises: ValueError (`check`), and where the cluster is too small and stays so; WorkersError
    where a process of worlds does not begin.
    """

    def __init__(
        self,
        where: Ray,
        parcel: Parcel,
        *,
        build: Build,
        makers: Makers,
        cfg: ModelConfig,
        how: Push = Push(),
    ) -> None:
        check(where)
        self._ray = _ray()
        self._where, self._cfg, self._how = where, cfg, how
        self._names: set[tuple[str, int]] = set()  # of jobs that poll has not given back
        self._waiting: list[Job] = []
        self._ended: list[Done] = []
        self._past: collections.Counter[str] = collections.Counter()  # of processes that are gone
        self._failed, self._aborted = "", False
        self._known = sorted(makers)
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _begin(self._ray, where)
        self._seats: list[_Seat] = []
        self._worlds: list[Any] = []
        try:
            _wait_for_room(self._ray, where)
            self._version, self._freight = parcel.version, self._ray.put(ship(parcel))
            self._build, self._makers = self._ray.put(build), dict(makers)
            world = self._ray.remote(World).options(num_cpus=1, max_restarts=-1)
            self._worlds = [world.remote(self._makers) for _ in range(where.worlds)]
            self._seats = [_Seat(n, self._engine()) for n in range(where.engines)]
            self._see_worlds()
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> int:
        """Jobs that `poll` has not given back."""
        return len(self._names)

    @property
    def processes(self) -> list[str]:
        """Which process sits where, as far as they have been heard of."""
        return [seat.who for seat in self._seats]

    def start(self, job: Job) -> None:
        """As `Workers`; it is sent with the next `poll`."""
        if job.prompt.env not in self._known:
            raise ValueError(f"environment {job.prompt.env!r} is none of {self._known}")
        if job.name in self._names:
            raise ValueError(f"job {job.name} is under way; give each a key of its own")
        self._names.add(job.name)
        self._waiting.append(job)

    def poll(self) -> list[Done]:
        """As `Workers`."""
        if self._failed and not self._aborted:
            raise WorkersError(self._failed)
        if not self._failed:
            self._ask()
            self._look()
        done, self._ended = self._ended, []
        self._names -= {job.name for job, _ in done}
        return done

    def push(self, params: Any, version: int) -> None:
        """As `Workers`; copies the weights and checks that they are finite. They reach every engine
        before anything that is asked of it later.
        """
        if version <= self._version:
            raise ValueError(f"version {version} is not newer than {self._version}; versions rise")
        if self._failed:
            raise WorkersError(self._failed)
        parcel = weights.prepare(params, version, cfg=self._cfg, fp8=self._how.fp8)
        self._freight, self._version = self._ray.put(ship(parcel)), version
        for seat in self._seats:
            seat.deaths = 0
            seat.actor.push.remote(self._freight)

    def abort(self) -> None:
        """As `Workers`."""
        self._aborted = True
        self._give_back(self._waiting)
        self._waiting = []
        for seat in self._seats:
            seat.actor.abort.remote()

    def counts(self) -> Mapping[str, float]:
        """As `Workers`. seconds: the mean over engines. Besides: engine_restarts; given_back,
        samples that were under way then; asked_again, calls of worlds whose process died.
        """
        total = collections.Counter(self._past)
        for seat in self._seats:
            total.update(seat.counts)
        names = ("episodes", "inexact", "tokens", "seconds", "asked_again")
        found = {n: float(total[n]) for n in (*names, "engine_restarts", "given_back")}
        return found | {"seconds": found["seconds"] / self._where.engines}

    def close(self) -> None:
        """None; the actors are gone, and Ray where this run began it."""
        for actor in [*(seat.actor for seat in self._seats), *self._worlds]:
            self._ray.kill(actor)
        self._seats, self._worlds = [], []
        if self._ours:
            self._ray.shutdown()

    def _see_worlds(self) -> None:
        """None. Raises: WorkersError. Ray does not begin one again that failed to be made."""
        for world in self._worlds:
            try:
                self._ray.get(world.names.remote(), timeout=self._where.patience_s)
            except self._ray.exceptions.RayError as error:
                raise WorkersError(f"a process of worlds does not begin: {said(error)}") from error

    def _engine(self) -> Any:
        """A new process, which serves the newest weights."""
        where = self._where
        actor = self._ray.remote(Engine).options(
            num_cpus=where.cpus, num_gpus=where.gpus, max_restarts=0, max_task_retries=0
        )
        return actor.remote(self._build, self._makers, self._freight, self._worlds, where.gpus == 0)

    def _ask(self) -> None:
        """None; every engine has a call under way, and new jobs go with it, those of a prompt to
        one engine, which has read it then.
        """
        free = [seat for seat in self._seats if seat.asked is None]
        new: dict[int, list[Job]] = {seat.number: [] for seat in free}
        groups: dict[str, list[Job]] = {}
        for job in self._waiting:
            groups.setdefault(job.key, []).append(job)
        late = []
        ready = [seat for seat in self._seats if seat.process] or free  # others still begin
        for jobs in groups.values():
            seat = min(ready or self._seats, key=lambda seat: len(seat.jobs))
            if seat.asked is not None:
                late += jobs  # its call returns in a moment
                continue
            new[seat.number] += jobs
            seat.jobs |= {job.name: job for job in jobs}
        self._waiting = late
        for seat in free:
            seat.asked, seat.since = seat.actor.poll.remote(new[seat.number]), time.monotonic()

    def _look(self) -> None:
        """None; answers are taken, and who does not answer any more is replaced."""
        seats = {seat.asked: seat for seat in self._seats}
        ready, _ = self._ray.wait(list(seats), num_returns=1, timeout=WAIT_S)
        if ready:
            ready, _ = self._ray.wait(list(seats), num_returns=len(seats), timeout=0)
        for call, seat in seats.items():
            if call in ready:
                try:
                    self._take(seat, self._ray.get(call, timeout=self._where.patience_s))
                except self._ray.exceptions.RayError as error:
                    self._replace(seat, said(error))
            elif (silent := time.monotonic() - seat.since) > self._where.patience_s:
                self._replace(seat, f"no answer for {silent:.0f} s (rl.where.patience_s)")

    def _take(self, seat: _Seat, report: Report) -> None:
        seat.asked, seat.counts, seat.process = None, report.counts, report.process
        for name, one in report.ended:
            self._ended.append((seat.jobs.pop(name), one))

    def _replace(self, seat: _Seat, why: str) -> None:
        """None; another process sits there, and what the last one had under way comes back.

        Raises: WorkersError where too many have died there.
        """
        self._ray.kill(seat.actor)  # it may be alive, and must not go on
        self._past.update(seat.counts)
        held_out = [job for job in seat.jobs.values() if job.prompt.env == HELD_OUT]
        lost = [job for job in seat.jobs.values() if job.prompt.env != HELD_OUT]
        self._waiting += held_out
        self._give_back(lost)
        self._past["given_back"] += len(seat.jobs)
        seat.deaths += 1
        log.warning("engine %d, %s, is lost: %s", seat.number, seat.who, why)
        seat.jobs, seat.counts = {}, {}
        if seat.deaths > self._where.restarts:
            self._fail(
                f"engine {seat.number} died {seat.deaths} times under weights of version "
                f"{self._version} (rl.where.restarts is {self._where.restarts}); the last, "
                f"{seat.who}: {why}"
            )
        log.warning("%d samples are given back; a new engine begins", len(lost))
        self._past["engine_restarts"] += 1
        seat.asked, seat.process, seat.actor = None, "", self._engine()

    def _fail(self, why: str) -> None:
        """Raises: WorkersError. Every job ends as aborted, for the `poll` after an `abort`."""
        self._failed = why
        for seat in self._seats:
            self._ray.kill(seat.actor)
            self._give_back(seat.jobs.values())
            seat.jobs = {}
        self._give_back(self._waiting)
        self._waiting = []
        raise WorkersError(why)

    def _give_back(self, jobs: Any) -> None:
        self._ended += [(job, _aborted(job)) for job in jobs]


def _aborted(job: Job) -> Trajectory:
    """What there is of a job whose engine is gone: what it began with."""
    if job.begun is not None:
        return job.begun
    nothing_T = np.zeros(0, np.int32)
    return Trajectory(
        task_id=job.prompt.key,
        group=job.prompt.key,
        tokens_T=nothing_T,
        sampled_T=nothing_T.astype(bool),
        logp_T=nothing_T.astype(np.float32),
        versions_T=nothing_T,
        reward=0.0,
        status="aborted",
        temperature=job.sampling.temperature,
    )


def _ray() -> Any:
    """Ray, imported; it reads the environment then. It is silent towards its makers, and where no
    cluster is named it listens on loopback alone: the name of that switch tells of other systems,
    and on Linux it does the same.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get(ADDRESS):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    return importlib.import_module("ray")


def _begin(ray: Any, where: Ray) -> None:
    """None; Ray runs: the cluster that the environment names, or one for this process alone."""
    address, sizes = os.environ.get(ADDRESS, ""), {}
    if not address:
        sizes = {
            "num_cpus": max(1, int(np.ceil(where.engines * where.cpus + where.worlds))),
            "object_store_memory": where.store_bytes,
            "include_dashboard": False,
        }
    with warnings.catch_warnings():
        # It forks to exec at once, JAX warns of the first alone; a device that no engine asks for
        # is hidden from it, which is to change in Ray.
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
        ray.init(address=address or "local", logging_level=logging.ERROR, **sizes)


def _wait_for_room(ray: Any, where: Ray) -> None:
    """None; the cluster has what engines and worlds ask for. Hosts may join late.

    Raises: ValueError where it does not within `patience_s`.
    """
    asked = {"CPU": where.engines * where.cpus + where.worlds, "GPU": where.engines * where.gpus}
    until = time.monotonic() + where.patience_s
    while True:
        there = ray.cluster_resources()
        short = {
            n: f"{there.get(n, 0):g} of {x:g}" for n, x in asked.items() if x > there.get(n, 0)
        }
        if not short:
            return
        if not os.environ.get(ADDRESS) or time.monotonic() > until:
            raise ValueError(
                f"Ray's cluster has too little for {where}: {short}; start more hosts "
                "(launch/ray.sh), or ask for fewer engines"
            )
        log.info("waiting for hosts: %s", short)
        time.sleep(LOOK_S)
