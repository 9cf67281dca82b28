"""The data pool: prompts in, leases out, groups of trajectories back, batches to the trainer.

Types: `Pool`, `Rules`, `Prompt`, `Lease`. Everything is in one SQLite file (ledger.py), so any
process may die at any statement: what was committed is there, what was not is asked for again.

    waiting ─lease─▶ leased ─commit─▶ ready ─take─▶ taken ─trained─▶ trained
       ▲               │ aborted, missing, failed, expired             dropped (a filter, counted)
       └─── begun ◀────┘ or stale when a batch is taken                failed (errors, counted)

Exactly once is meant of the weights that survive: a checkpoint knows how many batches it has seen,
and `resume(step)` gives the later ones again, the same trajectories in the same order. A batch is
the first `groups` ready prompts in the queue's order, not those that were quick: long answers are
not left out. Numpy and SQLite only, no jax. Source: spec 8 (data buffer, partial rollout).
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from glm45_jax.rl import rows
from glm45_jax.rl.lease import (
    FINAL,
    Filter,
    Lease,
    Outcome,
    Prompt,
    Result,
    Rules,
    varied,
)
from glm45_jax.rl.ledger import Ledger
from glm45_jax.rl.record import plain
from glm45_jax.rl.trajectory import Trajectory

Samples = Sequence[Trajectory] | Mapping[int, Trajectory]  # in the order of a lease, or by sample

__all__ = ["Filter", "Lease", "Outcome", "Pool", "Prompt", "Result", "Rules", "varied"]


class Pool:
    """One open pool; threads may share it, other processes open their own.

    folder: on a local disk. run: whose pool it is, say the fingerprint of the experiment. filters:
    asked in order when a group is finished. clock: seconds since 1970, the same on all processes.

    Raises: ValueError for a damaged file and one of another run (`Ledger`).
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        run: str,
        rules: Rules,
        filters: Sequence[Filter] = (varied,),
        clock: Callable[[], float] = time.time,
        connection: type[sqlite3.Connection] = sqlite3.Connection,
    ):
        self.rules = rules
        self._filters = tuple(filters)
        self._clock = clock
        self._ledger = Ledger(folder, run=run, connection=connection)
        # What was committed here and not taken yet, with the checksum of its bytes in the ledger.
        self._near: dict[tuple[int, int], tuple[int, Trajectory]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """None, once the file is closed. Leases stay as they are."""
        self._ledger.close()

    def add(self, prompts: Iterable[Prompt], *, notes: Mapping[str, Any] | None = None) -> int:
        """How many of the prompts are new; they wait at the end of the queue, in this order.

        notes: JSON by name, written in the same transaction (the curriculum that chose them, say).

        Raises: ValueError for a key that is there with another task.
        """
        with self._ledger.write() as db:
            new = sum(rows.add(db, prompt) for prompt in prompts)
            for name, value in (notes or {}).items():
                text = json.dumps(plain(value), allow_nan=False)
                db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, text))
        return new

    def note(self, name: str) -> Any:
        """What `add` noted last under this name; None before that."""
        with self._ledger.read() as db:
            found = db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return json.loads(found[0]) if found else None

    def room(self, version: int) -> int:
        """Groups that may still be begun while the trainer has made `version` updates.

        accepted + running <= (staleness + version + 1) x groups, accepted being all that are ready,
        taken or trained. Counted in the ledger, so it holds across restarts.
        Source: AReaL (arXiv 2505.24298), its capacity rule.
        """
        with self._ledger.read() as db:
            return self._room(db, version)

    def lease(self, n: int, *, version: int, worker: str = "", spare: int = 0) -> list[Lease]:
        """Up to n prompts, the first in the queue, as far as there is `room`.

        Leases that have expired go back first, and samples too old for any batch to come are
        dropped. spare: groups to begin beyond the room, because filters will drop some. Where they
        do not, the surplus is ready for the next batch, or stale by then.
        """
        now = self._clock()
        leases = []
        with self._ledger.write() as db:
            rows.count(db, "expired_leases", rows.release(db, "expires <= ?", now))
            self._drop_stale(db, version)
            for place in rows.first_waiting(db, min(n, self._room(db, version) + spare)):
                prompt, status_of = rows.prompt_at(db, place), rows.statuses(db, place)
                lease = Lease(
                    prompt=prompt,
                    samples=tuple(
                        j for j in range(prompt.samples) if status_of.get(j) not in FINAL
                    ),
                    begun={
                        j: rows.read_sample(db, self._ledger.path, place, j)
                        for j, status in status_of.items()
                        if status == "aborted"
                    },
                    token=uuid.uuid4().hex,
                    expires=now + self.rules.lease_s,
                )
                rows.lend(db, place, lease.token, worker, lease.expires)
                leases.append(lease)
        return leases

    def heartbeat(self, leases: Iterable[Lease]) -> list[Lease]:
        """Those of the leases that are lost: stop working on them. The others get more time."""
        expires = self._clock() + self.rules.lease_s
        lost = []
        with self._ledger.write() as db:
            for lease in leases:
                if (place := rows.held(db, lease.token)) is None:
                    lost.append(lease)
                else:
                    db.execute("UPDATE prompts SET expires = ? WHERE place = ?", (expires, place))
        return lost

    def keep(self, lease: Lease, sample: int, one: Trajectory) -> bool:
        """Whether the sample is on disk now; its lease goes on. False: the lease is lost.

        For samples that are done before their group is, and for long ones every now and then
        (status "aborted"): a crash then loses less.
        """
        _check(lease, {sample: one})
        with self._ledger.write() as db:
            if (place := rows.held(db, lease.token)) is None:
                rows.count(db, "late_samples", 1)
                return False
            rows.write_sample(db, place, sample, one)
        return True

    def commit(self, lease: Lease, trajectories: Samples) -> Outcome:
        """What became of the group; the lease is over.

        trajectories: in the order of lease.samples, or by sample. Samples that are aborted, failed
        or left out go back to the queue, aborted ones with what they have.

        Raises: ValueError where these are not the lease's samples; what a filter raises. Both leave
        all as it was.
        """
        return self.commit_all([(lease, trajectories)])[0]

    def commit_all(self, ended: Sequence[tuple[Lease, Samples]]) -> list[Outcome]:
        """`commit` of several groups, in this order and in one transaction: all or none."""
        groups = []
        for lease, given in ended:
            if not isinstance(given, Mapping):
                given = dict(zip(lease.samples, given, strict=True))
            _check(lease, given)
            groups.append((lease, given))
        with self._ledger.write() as db:
            return [self._commit(db, lease, given) for lease, given in groups]

    def _commit(
        self, db: sqlite3.Connection, lease: Lease, trajectories: Mapping[int, Trajectory]
    ) -> Outcome:
        if (place := rows.held(db, lease.token)) is None:
            rows.count(db, "late_samples", len(trajectories))
            return "lost"
        near = {}
        for sample, one in trajectories.items():
            near[place, sample] = rows.write_sample(db, place, sample, one), one
        failed = any(one.status == "error" for one in trajectories.values())
        db.execute("UPDATE prompts SET errors = errors + ? WHERE place = ?", (failed, place))
        rows.count(db, "failed_leases", failed)
        outcome, why = self._outcome(db, place, lease.prompt, trajectories)
        if outcome == "waiting":
            rows.release(db, "place = ?", place)
        else:
            rows.settle(db, place, outcome, why)
        if outcome == "ready":
            self._near |= near
        return outcome

    def take(
        self, batch: int, *, version: int | None = None, groups: int | None = None
    ) -> list[Trajectory] | None:
        """The trajectories of this batch, groups in the queue's order; None: not enough are ready.

        batch: counts from 0. One that was taken before is given again as it was. version: updates
        that the weights have behind them which it will train; left out, as many as batches before.
        groups: instead of the rules' (what is left at the end).
        Samples that are older than `staleness` allows are dropped, counted, and sampled anew.

        Raises: ValueError for a batch that is not the next one, or one that was pruned.
        """
        version = batch if version is None else version
        with self._ledger.write() as db:
            n, pruned = rows.scalar(db, rows.BATCHES), rows.pruned(db)
            if not pruned <= batch <= n:
                raise ValueError(
                    f"batch {batch} is not to be had: {n} were taken, those before {pruned} were "
                    f"pruned; the next is take({n})"
                )
            if batch == n:
                self._drop_stale(db, version)
                if not rows.compose(db, batch, version, groups or self.rules.groups):
                    return None
            return [self._sample(db, *at) for at in rows.samples_of_batch(db, batch)]

    def trained(
        self,
        batch: int,
        *,
        advantages: Sequence[float | None] | None = None,
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        """Marks a batch as trained. Batches are trained in order, each once.

        advantages: of its trajectories as `take` gave them, None for those that `choose` dropped.
        numbers: loss, gradient norm and the like. Both are for the viewer.

        Raises: ValueError for a batch that is not the first one taken and not yet trained.
        """
        with self._ledger.write() as db:
            n, taken = rows.scalar(db, rows.TRAINED), rows.scalar(db, rows.BATCHES)
            if batch != n or n == taken:
                raise ValueError(
                    f"batch {batch} cannot be trained: {taken} were taken, {n} of them trained, so "
                    f"the next is {n}; weights of an older checkpoint need resume(step) first"
                )
            rows.set_trained(db, batch, numbers or {}, advantages)

    def resume(self, step: int) -> None:
        """Call once before a run goes on from weights that have seen `step` batches (0: none).

        Later batches are to be trained again, as they were; earlier ones are trained, whatever the
        ledger knew of it. All leases go back to the front of the queue: their holders are gone.
        Samples that later weights drew are kept: a run that is the same bits twice makes the same
        weights again, in any other the log-probs that were stored still say how they were drawn.

        Raises: ValueError for weights that have seen more than this pool, or whose next batches
        were pruned.
        """
        with self._ledger.write() as db:
            n, pruned = rows.scalar(db, rows.BATCHES), rows.pruned(db)
            if not pruned <= step <= n:
                raise ValueError(
                    f"the checkpoint has seen {step} batches, {self._ledger.path} holds those from "
                    f"{pruned} up to {n}; give the pool of the same run, and a checkpoint not "
                    "older than what prune() was told"
                )
            rows.count(db, "batches_trained_again", rows.rewind(db, step))
            rows.count(db, "reclaimed_leases", rows.release(db, "TRUE"))

    def reclaim(self, worker: str) -> int:
        """How many leases a dead worker had; they are back in the queue."""
        with self._ledger.write() as db:
            n = rows.release(db, "worker = ?", worker)
            rows.count(db, "reclaimed_leases", n)
        return n

    def prune(self, before: int) -> None:
        """Frees the trajectories of batches before this one, and of dropped and failed groups.

        before: what the oldest checkpoint that is kept has seen. The ledger's rows stay.

        Raises: ValueError for batches that are not trained.
        """
        with self._ledger.write() as db:
            n = rows.scalar(db, rows.TRAINED)
            if not 0 <= before <= n:
                raise ValueError(f"cannot prune before batch {before}: {n} are trained")
            rows.prune(db, before)

    def results(self, after: int = 0) -> list[Result]:
        """Groups finished after the one of this number, in the order in which they were."""
        with self._ledger.read() as db:
            return rows.results(db, after)

    def counts(self) -> dict[str, int]:
        """Prompts by state, batches, and all that was ever dropped, late, or given again."""
        with self._ledger.read() as db:
            return rows.counts(db)

    def _room(self, db: sqlite3.Connection, version: int) -> int:
        busy = "SELECT COUNT(*) FROM prompts WHERE state IN ('ready', 'taken', 'trained', 'leased')"
        return (self.rules.staleness + version + 1) * self.rules.groups - rows.scalar(db, busy)

    def _drop_stale(self, db: sqlite3.Connection, version: int) -> None:
        for at in rows.drop_stale(db, version - self.rules.staleness, self.rules.masked):
            self._near.pop(at, None)

    def _sample(self, db: sqlite3.Connection, place: int, sample: int) -> Trajectory:
        """What the ledger has; read back only where this is not its writer's memory."""
        crc, one = self._near.pop((place, sample), (None, None))
        if one is not None and crc == rows.checksum(db, place, sample):
            return one
        return rows.read_sample(db, self._ledger.path, place, sample)

    def _outcome(
        self, db: sqlite3.Connection, place: int, prompt: Prompt, new: Mapping[int, Trajectory]
    ) -> tuple[Outcome, str]:
        """What a leased prompt is now, and why."""
        status_of = rows.statuses(db, place)
        if sum(status in FINAL for status in status_of.values()) < prompt.samples:
            errors = rows.scalar(db, "SELECT errors FROM prompts WHERE place = ?", place)
            return ("failed", "errors") if errors >= self.rules.errors else ("waiting", "")
        group = [
            new[j] if j in new else rows.read_sample(db, self._ledger.path, place, j)
            for j in status_of
        ]
        why = next((why for ask in self._filters if (why := ask(prompt, group))), "")
        return ("dropped" if why else "ready"), why


def _check(lease: Lease, trajectories: Mapping[int, Trajectory]) -> None:
    for sample, one in trajectories.items():
        if sample not in lease.samples:
            raise ValueError(
                f"sample {sample} of {lease.prompt.key!r} is not of this lease, which "
                f"is for {lease.samples}"
            )
        if one.group != lease.prompt.key:
            raise ValueError(
                f"a trajectory of group {one.group!r} came for prompt {lease.prompt.key!r}; its "
                "group has to be the prompt's key"
            )
