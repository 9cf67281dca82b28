"""Queries of the pool's ledger, each inside a transaction of `ledger.Ledger`. No jax.

place: a prompt's place in the queue, its primary key. Nothing here begins or ends a transaction.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from glm45_jax.rl.lease import Prompt, Result
from glm45_jax.rl.ledger import damaged
from glm45_jax.rl.record import from_bytes, plain, to_bytes
from glm45_jax.rl.trajectory import Trajectory

STATES = ("waiting", "begun", "leased", "ready", "taken", "trained", "dropped", "failed")
BATCHES = "SELECT COUNT(*) FROM batches"
TRAINED = f"{BATCHES} WHERE state = 'trained'"
_PROMPT = "env, number, samples, key, meta"


def scalar(db: Connection, query: str, *args: Any) -> int:
    """The one number that a query finds."""
    return db.execute(query, args).fetchone()[0]


def count(db: Connection, name: str, n: int) -> None:
    """Adds n to a counter."""
    if n:
        db.execute(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n",
            (name, n),
        )


def add(db: Connection, prompt: Prompt) -> bool:
    """Whether the prompt is new, and now at the end of the queue."""
    meta = json.dumps(plain(prompt.meta), allow_nan=False, sort_keys=True)
    row = (prompt.env, prompt.number, prompt.samples, prompt.key, meta)
    known = db.execute(f"SELECT {_PROMPT} FROM prompts WHERE key = ?", (prompt.key,)).fetchone()
    if known is None:
        db.execute(f"INSERT INTO prompts ({_PROMPT}, state) VALUES (?, ?, ?, ?, ?, 'waiting')", row)
    elif known[:3] != row[:3]:
        raise ValueError(
            f"prompt {prompt.key!r} is {row[:3]} (environment, number, samples), the pool has it "
            f"as {known[:3]}; give other prompts other keys"
        )
    return known is None


def prompt_at(db: Connection, place: int) -> Prompt:
    """The prompt of this place."""
    found = db.execute(f"SELECT {_PROMPT} FROM prompts WHERE place = ?", (place,)).fetchone()
    env, number, samples, key, meta = found
    return Prompt(env, number, samples, key, json.loads(meta))


def first_waiting(db: Connection, n: int) -> list[int]:
    """The first n places of the queue that wait."""
    query = "SELECT place FROM prompts WHERE state = ? ORDER BY place LIMIT ?"
    found = [db.execute(query, (state, max(n, 0))).fetchall() for state in ("begun", "waiting")]
    return sorted(place for part in found for (place,) in part)[: max(n, 0)]


def lend(db: Connection, place: int, token: str, worker: str, expires: float) -> None:
    """Makes a waiting prompt a leased one."""
    db.execute(
        "UPDATE prompts SET state = 'leased', token = ?, worker = ?, expires = ? WHERE place = ?",
        (token, worker, expires, place),
    )


def held(db: Connection, token: str) -> int | None:
    """The place that is leased under this token; None where the lease is over."""
    found = db.execute("SELECT place FROM prompts WHERE token = ?", (token,)).fetchone()
    return found and found[0]


def release(db: Connection, where: str, *args: Any) -> int:
    """Ends the leases that fit; their prompts wait again, at their old place. Returns how many."""
    return _wait_again(db, f"state = 'leased' AND {where}", *args)


def settle(db: Connection, place: int, state: str, why: str) -> None:
    """Ends the lease of a prompt that has all it needs, or never will."""
    count(db, "finished", 1)
    if why:
        count(db, f"{state}_{why}", 1)
    db.execute(
        "UPDATE prompts SET state = ?, why = ?, token = NULL, worker = NULL, expires = NULL, "
        "finished = (SELECT n FROM counts WHERE name = 'finished') WHERE place = ?",
        (state, why, place),
    )


def drop_stale(db: Connection, oldest: int, masked: bool) -> list[tuple[int, int]]:
    """Drops samples of weights before `oldest`, and counts them; their prompts wait again. Returns
    place and sample of each.
    """
    stale = db.execute(
        "SELECT p.place, s.sample, p.state FROM prompts AS p JOIN samples AS s ON p.place = s.place"
        f" WHERE p.state IN ('ready', 'begun') AND s.{'newest' if masked else 'oldest'} < ?",
        (oldest,),
    ).fetchall()
    for place, sample, _ in stale:
        db.execute("DELETE FROM samples WHERE place = ? AND sample = ?", (place, sample))
    for place in {place for place, _, _ in stale}:
        _wait_again(db, "place = ?", place)
    count(db, "stale_samples", len(stale))
    count(db, "stale_groups", len({place for place, _, state in stale if state == "ready"}))
    return [(place, sample) for place, sample, _ in stale]


def write_sample(db: Connection, place: int, sample: int, one: Trajectory) -> int:
    """Writes a sample over what was there of it. Returns the checksum of its bytes."""
    versions = one.versions_T[one.sampled_T]
    oldest, newest = (int(versions.min()), int(versions.max())) if versions.size else (None, None)
    body = to_bytes(one)
    crc = zlib.crc32(body)
    db.execute(
        "INSERT OR REPLACE INTO samples (place, sample, status, reward, oldest, newest, crc, body) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (place, sample, one.status, float(one.reward), oldest, newest, crc, body),
    )
    return crc


def checksum(db: Connection, place: int, sample: int) -> int:
    """Of a sample that is there."""
    query = "SELECT crc FROM samples WHERE place = ? AND sample = ?"
    return db.execute(query, (place, sample)).fetchone()[0]


def read_sample(db: Connection, path: Path, place: int, sample: int) -> Trajectory:
    """A sample that is there.

    Raises: ValueError where its bytes are not those that were written.
    """
    query = "SELECT crc, body FROM samples WHERE place = ? AND sample = ?"
    crc, body = db.execute(query, (place, sample)).fetchone()
    if body is None or zlib.crc32(body) != crc:
        key = prompt_at(db, place).key
        raise damaged(path, f"sample {sample} of prompt {key!r} is not what was written")
    return from_bytes(body)


def statuses(db: Connection, place: int) -> dict[int, str]:
    """Status by sample, in the order of samples."""
    query = "SELECT sample, status FROM samples WHERE place = ? ORDER BY sample"
    return dict(db.execute(query, (place,)).fetchall())


def compose(db: Connection, batch: int, version: int, groups: int) -> bool:
    """Whether enough groups are ready; the first of them are the batch now."""
    query = "SELECT place FROM prompts WHERE state = 'ready' ORDER BY place LIMIT ?"
    first = db.execute(query, (groups,)).fetchall()
    if len(first) < groups:
        return False
    db.execute(
        "INSERT INTO batches (number, state, version) VALUES (?, 'taken', ?)", (batch, version)
    )
    for (place,) in first:
        db.execute("UPDATE prompts SET state = 'taken', batch = ? WHERE place = ?", (batch, place))
    return True


def samples_of_batch(db: Connection, batch: int) -> list[tuple[int, int]]:
    """(place, sample) of its samples, in order."""
    query = (
        "SELECT place, sample FROM prompts JOIN samples USING (place) WHERE batch = ? "
        "ORDER BY place, sample"
    )
    return db.execute(query, (batch,)).fetchall()


def set_trained(
    db: Connection,
    batch: int,
    numbers: Mapping[str, float],
    advantages: Sequence[float | None] | None,
) -> None:
    """Makes a taken batch a trained one. advantages: of its samples, in order.

    Raises: ValueError where they are more or fewer.
    """
    if advantages and len(advantages) != (n := len(samples_of_batch(db, batch))):
        raise ValueError(f"batch {batch} has {n} samples, and {len(advantages)} advantages came")
    texts = json.dumps(plain(numbers)), json.dumps(plain(advantages or ()))
    query = "UPDATE batches SET state = 'trained', numbers = ?, advantages = ? WHERE number = ?"
    db.execute(query, (*texts, batch))
    db.execute("UPDATE prompts SET state = 'trained' WHERE batch = ?", (batch,))


def advantages_of(db: Connection, batch: int) -> dict[tuple[int, int], float | None]:
    """By place and sample; empty where none are known."""
    query = "SELECT advantages FROM batches WHERE number = ?"
    known = json.loads(db.execute(query, (batch,)).fetchone()[0])
    return dict(zip(samples_of_batch(db, batch), known, strict=True)) if known else {}


def rewind(db: Connection, step: int) -> int:
    """Batches from `step` on are taken and not trained, those before are trained. Returns how many
    of the trained ones are to be trained again.
    """
    again = scalar(db, f"{TRAINED} AND number >= ?", step)
    db.execute(
        "UPDATE batches SET state = 'taken', numbers = '{}', advantages = '[]' WHERE number >= ?",
        (step,),
    )
    db.execute("UPDATE prompts SET state = 'taken' WHERE batch >= ?", (step,))
    for table, number in (("batches", "number"), ("prompts", "batch")):
        db.execute(
            f"UPDATE {table} SET state = 'trained' WHERE {number} < ? AND state = 'taken'", (step,)
        )
    return again


def prune(db: Connection, before: int) -> None:
    """Frees what the samples of earlier batches, and of groups that were not kept, said."""
    db.execute(
        "UPDATE samples SET body = NULL WHERE body IS NOT NULL AND place IN "
        "(SELECT place FROM prompts WHERE batch < ? OR state IN ('dropped', 'failed'))",
        (before,),
    )
    kept = max(before, pruned(db))
    db.execute("UPDATE facts SET value = ? WHERE name = 'pruned'", (str(kept),))


def pruned(db: Connection) -> int:
    """The first batch whose trajectories are still there, if it was taken."""
    return int(db.execute("SELECT value FROM facts WHERE name = 'pruned'").fetchone()[0])


def results(db: Connection, after: int) -> list[Result]:
    """Groups whose `finished` is larger, in its order."""
    query = "SELECT place, finished, state, why FROM prompts WHERE finished > ? ORDER BY finished"
    found = []
    for place, finished, state, why in db.execute(query, (after,)).fetchall():
        samples = db.execute(
            "SELECT reward, IFNULL(oldest, -1), IFNULL(newest, -1) FROM samples "
            "WHERE place = ? AND status != 'error' ORDER BY sample",
            (place,),
        ).fetchall()
        found.append(
            Result(
                finished=finished,
                prompt=prompt_at(db, place),
                rewards=tuple(reward for reward, _, _ in samples),
                state=state,
                why=why,
                versions=(
                    min((oldest for _, oldest, _ in samples), default=-1),
                    max((newest for _, _, newest in samples), default=-1),
                ),
            )
        )
    return found


def counts(db: Connection) -> dict[str, int]:
    """Prompts by state, batches, counters."""
    found = dict.fromkeys(STATES, 0)
    found |= dict(db.execute("SELECT state, COUNT(*) FROM prompts GROUP BY state").fetchall())
    found["batches"] = scalar(db, BATCHES)
    return found | dict(db.execute("SELECT name, n FROM counts ORDER BY name").fetchall())


def _wait_again(db: Connection, where: str, *args: Any) -> int:
    return db.execute(
        "UPDATE prompts SET token = NULL, worker = NULL, expires = NULL, finished = NULL, "
        "state = CASE WHEN EXISTS (SELECT 1 FROM samples WHERE samples.place = prompts.place) "
        f"THEN 'begun' ELSE 'waiting' END WHERE {where}",
        args,
    ).rowcount
