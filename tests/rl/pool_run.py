"""A run over a pool that may die anywhere, for test_ledger.py and the processes that it kills; and
small pools for the other tests.

The trainer is a list of what it has seen; its checkpoint is a file with that list.
"""

import json
import os
import signal
import sqlite3
import sys
import zlib
from pathlib import Path

import numpy as np

from glm45_jax.rl.pool import Pool, Prompt, Rules, varied
from glm45_jax.rl.trajectory import Trajectory

RUN = "run of the tests"
SAMPLES = 2
TOKENS = 6  # of a whole sample, the first of them the prompt


class Crash(BaseException):
    """The process is gone."""


class Fuse:
    """Makes connections of which all statements fail from the one of this number on, or kill the
    process. After a COMMIT is before the next statement.
    """

    def __init__(self, statements=None, *, killed=False):
        self.last, self.killed, self.used = statements, killed, 0

    def connection(self):
        fuse = self

        class Fragile(sqlite3.Connection):
            def execute(self, *args):
                fuse.used += 1
                if fuse.last is not None and fuse.used > fuse.last:
                    if fuse.killed:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise Crash
                if args[0] == "PRAGMA synchronous=FULL":  # of use when the machine loses power,
                    args = ("PRAGMA synchronous=OFF",)  # and slow on a busy disk
                return super().execute(*args)

        return Fragile


def prompts(n):
    return [Prompt("sums", i, SAMPLES, f"sums/{i}", {"level": i % 3}) for i in range(n)]


def drawn(key, sample, length, *, version=0, status="done", begun=None):
    """The first `length` tokens of the one text of this sample, going on from what there is."""
    rng = np.random.default_rng(zlib.crc32(f"{key} {sample}".encode()))
    tokens_T = rng.integers(1, 99, TOKENS).astype(np.int32)[:length]
    versions_T = np.full(length, version, np.int32)
    have = 1 if begun is None else len(begun.tokens_T)
    if begun is not None:
        versions_T[:have] = begun.versions_T
    # every fifth prompt has samples that agree
    reward = float(sample == 0 and zlib.crc32(key.encode()) % 5 > 0)
    return Trajectory(
        task_id=key,
        group=key,
        tokens_T=tokens_T,
        sampled_T=np.arange(length) > 0,
        logp_T=-rng.random(TOKENS)[:length].astype(np.float32),
        versions_T=versions_T,
        reward=reward,
        messages=({"role": "user", "content": key},),
        parts={"right": reward},
        status=status,
    )


def keys_of(trajectories):
    return [one.group for one in trajectories[::SAMPLES]]


def expected(n, groups):
    """Batches of prompts that have something to teach, in the queue's order."""
    kept = [
        p.key
        for p in prompts(n)
        if not varied(p, [drawn(p.key, j, TOKENS) for j in range(SAMPLES)])
    ]
    return [kept[i : i + groups] for i in range(0, len(kept) - groups + 1, groups)]


def work(pool, lease, version):
    """One sample is kept early, one is aborted half-way the first time."""
    made = {}
    for sample in lease.samples:
        begun = lease.begun.get(sample)
        whole = sample == 0 or begun is not None
        made[sample] = drawn(
            lease.prompt.key,
            sample,
            TOKENS if whole else TOKENS // 2,
            version=version,
            status="done" if whole else "aborted",
            begun=begun,
        )
    if 0 in made:
        assert pool.keep(lease, 0, made.pop(0))
    pool.commit(lease, made)


def run(folder, n, *, rules, fuse=None, save_every=2):
    """Trains until nothing is left; returns the trajectories of each batch, over all restarts."""
    folder = Path(folder)
    saved = folder / "checkpoint.json"
    seen = json.loads(saved.read_text()) if saved.exists() else []
    connection = (fuse or Fuse()).connection()
    pool = Pool(folder, run=RUN, rules=rules, connection=connection)
    try:
        pool.resume(len(seen))
        pool.add(prompts(n), notes={"added": n})
        while True:
            leases = pool.lease(3, version=len(seen), worker="w")
            for lease in leases:
                work(pool, lease, len(seen))
            batch = pool.take(len(seen))
            if batch is None:
                if not leases:
                    return seen
                continue
            seen = [*seen, [(one.group, one.tokens_T.tolist()) for one in batch]]
            pool.trained(len(seen) - 1, advantages=[0.5] * len(batch), numbers={"loss": 1.0})
            if len(seen) % save_every == 0:
                temporary = folder / "checkpoint.tmp"
                temporary.write_text(json.dumps(seen))
                os.replace(temporary, saved)
                pool.prune(max(len(seen) - save_every, 0))
    finally:
        pool.close()


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def opened(folder, *, groups=2, n=6, filters=(), **options):
    """A pool with prompts waiting, that keeps every group."""
    clock = options.pop("clock", Clock())
    pool = Pool(
        folder,
        run=RUN,
        rules=Rules(groups=groups, **options),
        filters=filters,
        clock=clock,
        connection=Fuse().connection(),
    )
    pool.add(prompts(n))
    return pool


def whole(lease, version=0, status="done"):
    return [
        drawn(lease.prompt.key, j, TOKENS, version=version, status=status) for j in lease.samples
    ]


def finish(pool, n, version):
    """Leases, draws and commits n groups by weights of this version; their keys."""
    leases = pool.lease(n, version=version)
    for lease in leases:
        pool.commit(lease, whole(lease, version))
    return [lease.prompt.key for lease in leases]


if __name__ == "__main__":
    given = Rules(groups=int(sys.argv[3]), staleness=int(sys.argv[4]))
    fuse = Fuse(int(sys.argv[5]), killed=True) if sys.argv[5:] else None
    seen = run(sys.argv[1], int(sys.argv[2]), rules=given, fuse=fuse)
    Path(sys.argv[1], "done.json").write_text(json.dumps(seen))
