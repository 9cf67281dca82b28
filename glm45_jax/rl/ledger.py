"""The SQLite file under the pool: opened or refused, written in transactions. Type: `Ledger`.

WAL, so that readers do not wait for writers; every commit is on disk when it returns
(`synchronous=FULL`). WAL needs shared memory: the folder must be on a local disk, not NFS. No jax.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from glm45_jax.integrity import write_whole

FILE = "pool.sqlite"
MARK = "pool.json"  # says that a ledger was here: an empty database is then damage, not a start
FORMAT = 3
PAGE = 32768  # bytes; a sample is some 16 a token and comes whole: fewer, larger writes
CACHE = 64  # MiB of pages in memory: what was just committed is taken without a read
WAL = 64  # MiB of the log before its pages go to their places
WAIT_S = 60.0  # for the write lock; a transaction takes milliseconds

_SCHEMA = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE counts (name TEXT PRIMARY KEY, n INTEGER NOT NULL)",
    # advantages: here and not with the samples, whose pages would all be written again.
    """CREATE TABLE batches (
        number INTEGER PRIMARY KEY,
        state TEXT NOT NULL CHECK (state IN ('taken', 'trained')),
        version INTEGER NOT NULL,
        numbers TEXT NOT NULL DEFAULT '{}',
        advantages TEXT NOT NULL DEFAULT '[]')""",
    # place: of the queue. waiting: nothing is there yet; begun: waits too, and has samples.
    """CREATE TABLE prompts (
        place INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        env TEXT NOT NULL,
        number INTEGER NOT NULL,
        samples INTEGER NOT NULL CHECK (samples > 0),
        meta TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('waiting', 'begun', 'leased', 'ready', 'taken',
            'trained', 'dropped', 'failed')),
        why TEXT NOT NULL DEFAULT '',
        token TEXT UNIQUE,
        worker TEXT,
        expires REAL,
        errors INTEGER NOT NULL DEFAULT 0,
        finished INTEGER UNIQUE,
        batch INTEGER REFERENCES batches (number),
        CHECK ((state = 'leased') = (token IS NOT NULL)),
        CHECK ((state IN ('taken', 'trained')) = (batch IS NOT NULL)))""",
    "CREATE INDEX by_state ON prompts (state, place)",
    "CREATE INDEX by_batch ON prompts (batch, place) WHERE batch IS NOT NULL",
    """CREATE TABLE samples (
        place INTEGER NOT NULL REFERENCES prompts (place),
        sample INTEGER NOT NULL,
        status TEXT NOT NULL,
        reward REAL NOT NULL,
        oldest INTEGER,
        newest INTEGER,
        crc INTEGER NOT NULL,
        body BLOB,
        PRIMARY KEY (place, sample))""",
)


class Ledger:
    """One open file. Threads may share it; after a fork, open it again.

    run: whose it is; None reads that of any run. read_only: nothing can be written.

    Raises: ValueError, with the path and the way out, for a file that is damaged, of another run
    or of another format; FileNotFoundError where read_only finds none.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        run: str | None,
        read_only: bool = False,
        connection: type[sqlite3.Connection] = sqlite3.Connection,
    ):
        self.path = Path(folder) / FILE
        self._lock = threading.RLock()
        if read_only and not self.path.exists():
            raise FileNotFoundError(f"{self.path} is not there; give the folder of a pool")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
            uri=True,
            timeout=WAIT_S,
            isolation_level=None,  # BEGIN and COMMIT are said below, and nowhere else
            check_same_thread=False,
            factory=connection,
        )
        try:
            with self._damage_told():
                self._open(run, read_only)
        except BaseException:
            self.db.close()
            raise

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it is on disk afterwards, or none."""
        with self._lock, self._damage_told():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                self.db.rollback()
                raise

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Several queries of one moment."""
        with self._lock, self._damage_told():
            self.db.execute("BEGIN")
            try:
                yield self.db
            finally:
                self.db.rollback()

    def close(self) -> None:
        """None, once the file is closed; may be called twice."""
        with self._lock:
            self.db.close()

    def _open(self, run: str | None, read_only: bool) -> None:
        if not read_only:
            self.db.execute(f"PRAGMA page_size={PAGE}")  # before a new file has any
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute(f"PRAGMA wal_autocheckpoint={WAL * 2**20 // PAGE}")
            self.db.execute(f"PRAGMA cache_size=-{CACHE * 2**10}")
            # Else every sample first copies the pages that it changes to a file of its own.
            self.db.execute("PRAGMA temp_store=MEMORY")
            self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("PRAGMA foreign_keys=ON")
        told = self.db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if told != "ok":
            raise sqlite3.DatabaseError(told)
        if not self.db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
            self._create(run, read_only)
        facts = dict(self.db.execute("SELECT name, value FROM facts"))
        if facts.get("format") != str(FORMAT):
            raise ValueError(
                f"{self.path} has format {facts.get('format')}, this code reads {FORMAT}; use the "
                "version of glm45_jax that wrote it, or another folder"
            )
        if run is not None and facts["run"] != run:
            raise ValueError(
                f"{self.path} is of run {facts['run']!r}, this is run {run!r}; give this run a "
                "folder of its own"
            )
        self.run = facts["run"]
        if not read_only:
            self._mark()

    def _create(self, run: str | None, read_only: bool) -> None:
        if read_only or run is None or (self.path.parent / MARK).exists():
            raise sqlite3.DatabaseError("it is empty")
        self.db.execute("BEGIN IMMEDIATE")
        # Another process may have been quicker.
        if not self.db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone():
            for statement in _SCHEMA:
                self.db.execute(statement)
            facts = [("format", str(FORMAT)), ("run", run), ("pruned", "0")]
            self.db.executemany("INSERT INTO facts VALUES (?, ?)", facts)
        self.db.execute("COMMIT")

    def _mark(self) -> None:
        mark = self.path.parent / MARK
        if not mark.exists():
            write_whole(mark, json.dumps({"run": self.run, "format": FORMAT}).encode())

    @contextlib.contextmanager
    def _damage_told(self) -> Iterator[None]:
        """What SQLite says of a file that it cannot trust, as one message that a reader can use."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if type(error) is sqlite3.DatabaseError or "no such" in str(error):
                raise damaged(self.path, " ".join(str(error).split())) from error
            raise  # locked, disk full, a broken constraint: the file is as it was


def damaged(path: Path, why: str) -> ValueError:
    """What to raise where the file does not hold what was written."""
    return ValueError(
        f"{path} is damaged: {why}; put a copy back (with its -wal file), or move the folder away "
        "and let the run fill a new pool"
    )
