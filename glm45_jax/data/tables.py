"""A database as the tools of an agent: SQLite in memory, whose end state can be compared.

SQL that a model wrote runs without files, extensions or other databases, with functions of a list
alone, for a bounded time and size.
"""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm45_jax.data.tools import Session, Tool, shown

_MOST_STEPS = 200_000  # of SQLite's machine, for one statement
_MOST_ROWS = 50
_MOST_VALUE = 20_000  # bytes of a text or a row; with the steps it bounds what a sort can hold
_MOST_BYTES = 16 * 2**20  # of a database
# No chance, no clock (but for 'now'), and nothing that one call makes slow or large.
_FUNCTIONS = frozenset(
    """abs avg char coalesce concat concat_ws count date datetime dense_rank first_value
    group_concat hex ifnull iif instr julianday lag last_value lead length like lower ltrim
    max min nth_value ntile nullif quote rank replace round row_number rtrim sign strftime
    string_agg substr substring sum time total trim typeof unicode upper""".split()
)


@dataclass(frozen=True)
class Tables:
    """A database in memory: `query` reads, `execute` changes, `describe` shows the tables.

    script: SQL that makes it. about_it: what its tables stand for, told to who writes tasks.

    Raises: ValueError for a script that SQLite refuses.
    """

    script: str
    about_it: str = ""

    @property
    def exact(self) -> bool:
        """Always."""
        return True

    def __post_init__(self):
        self.open().close()

    def tools(self) -> tuple[Tool, ...]:
        """describe, query, execute."""
        statement: dict[str, Any] = {"type": "object", "properties": {"sql": {"type": "string"}}}
        statement |= {"required": ["sql"], "additionalProperties": False}
        nothing = {"type": "object", "properties": {}, "additionalProperties": False}
        reads = "Run one SELECT statement of SQLite and return its columns and rows."
        changes = "Run one INSERT, UPDATE or DELETE statement; return how many rows it changed."
        return (
            Tool("describe", "Return the CREATE statements of all tables.", json.dumps(nothing)),
            Tool("query", reads, json.dumps(statement)),
            Tool("execute", changes, json.dumps(statement)),
        )

    def open(self) -> Session:
        """A new database."""
        return _Database(self.script)

    def about(self) -> str:
        """The script, and what it means."""
        return f"{self.about_it}\n\nThe database was made by:\n{self.script}".strip()

    def version(self) -> str:
        """Of SQLite."""
        return f"sqlite={sqlite3.sqlite_version}"


_READS = (
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
)
_CHANGES = (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE)


class _Database:
    def __init__(self, script: str):
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_VALUE)
        self._db.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 50)
        self._db.execute(f"PRAGMA max_page_count = {_MOST_BYTES // 4096}")
        try:
            self._db.executescript(script)
        except sqlite3.Error as error:
            self._db.close()
            raise ValueError(f"SQLite refuses the script of the tables: {error}") from None

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        if name == "describe":
            text = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid"
            return shown([row[0] for row in self._db.execute(text)])
        allowed = _READS if name == "query" else _READS + _CHANGES

        def judge(action: int, first: str | None, second: str | None, *_: str | None) -> int:
            if action == sqlite3.SQLITE_FUNCTION and str(second).lower() not in _FUNCTIONS:
                return sqlite3.SQLITE_DENY
            return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY

        self._db.set_authorizer(judge)
        steps = iter(range(_MOST_STEPS // 1000))
        self._db.set_progress_handler(lambda: next(steps, None) is None, 1000)
        try:
            cursor = self._db.execute(arguments["sql"])
            if cursor.description is None:
                return shown({"changed": cursor.rowcount})
            rows = cursor.fetchmany(_MOST_ROWS + 1)
            found: dict[str, Any] = {"columns": [column[0] for column in cursor.description]}
            found["rows"] = [list(row) for row in rows[:_MOST_ROWS]]
            return shown(found | ({"more": True} if len(rows) > _MOST_ROWS else {}))
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            return shown({"error": f"{type(error).__name__}: {error}"})
        finally:
            self._db.set_progress_handler(None, 0)
            self._db.set_authorizer(None)
            if self._db.in_transaction:
                self._db.rollback()  # each call stands alone

    def note(self, result: str) -> None:
        raise AssertionError("results of a database need no request")

    def state(self) -> str:
        digest = hashlib.sha256()
        names = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
        for (table,) in self._db.execute(names).fetchall():
            quoted = '"' + table.replace('"', '""') + '"'
            rows = sorted(map(repr, self._db.execute(f"SELECT * FROM {quoted}")))
            digest.update(repr((table, rows)).encode())
        return digest.hexdigest()

    def close(self) -> None:
        self._db.close()
