"""Programs judged by tests, in a box: `env`. Source of the idea: spec 7.2.2, rewards are programs.

Rows are {"question"} and either "tests": [{"input", "output"}, ...], for programs that read stdin
and write stdout, or "asserts": [code, ...] with "entry": the names that these call. Nothing that
judges is where the program under test can reach it:

- the expected output stays here;
- asserts run in a box of their own and call over a socket into the program's box, which gets
  arguments and gives results as plain values, and never sees an assert. What it gives that is not
  plain stays there behind a handle of which only methods can be called.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from glm45_jax.envs import sandbox
from glm45_jax.envs.files import Deck, Row, digest, rows, side
from glm45_jax.envs.rewards import said
from glm45_jax.envs.types import Env, Message, Part, Task

MAX_CODE = 100_000  # characters
KEPT = 1024  # outcomes kept: the parts of a reward share a run, as do equal answers
ASK_PROGRAM = "Write a Python program that reads standard input and writes standard output."
ASK_FUNCTION = "Write Python code that defines {entry}."
ASK = " End with all of the code in one ```python block."
PYTHON = ("python3", "-I", "-B")
CALLS = Path(__file__).with_name("code_calls.py")  # both ends of the socket; runs in boxes only


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the tests said. compiles: whether it is Python at all."""

    passed: int
    total: int
    compiles: bool


def env(
    source: str | os.PathLike | Iterable[Row],
    *,
    name: str = "code",
    limits: sandbox.Limits = sandbox.Limits(),
    box: sandbox.Box = sandbox.Bwrap(),
    share_weight: float = 0.0,
    held_out: bool | None = None,
    share: float = 1 / 8,
    seed: int = 0,
) -> Env:
    """Programming tasks of a .jsonl file, or rows.

    limits: of one run: of one test's, or of all asserts of a task together. share_weight: of the
    part "passed", the share of tests; "all" weighs 1 and "compiles" is reported only. A share in
    the reward pays for special cases; it is 0 unless asked for. Asserts need bubblewrap.

    Raises: ValueError for rows that lack a key; SandboxError, at the first judgement, where no box
    can be made.
    """
    found = rows(source, ("question",))
    for at, row in enumerate(found):
        kinds = [key for key in ("tests", "asserts") if row.get(key)]
        if len(kinds) != 1 or (kinds == ["asserts"] and not row.get("entry")):
            raise ValueError(f"row {at} has {sorted(row)}; give tests, or asserts and entry")
    if held_out is not None:
        found = rows(side(found, "question", held_out=held_out, share=share), ())
    parts = (("all", 1.0), ("passed", share_weight), ("compiles", 0.0))
    return Env(
        name=name,
        tasks=Tasks(found, Deck(len(found), seed)),
        rewards=tuple(Part(kind, Judged(kind, limits, box), weight) for kind, weight in parts),
    )


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Number to task. The answer is the tests, as JSON."""

    rows: tuple[Row, ...]
    deck: Deck

    def __call__(self, number: int) -> Task:
        """The task of a number; the same row is the same task."""
        at = self.deck(number)
        row = self.rows[at]
        entry = row.get("entry", [])
        names = [entry] if isinstance(entry, str) else list(entry)
        ask = ASK_FUNCTION.format(entry=" and ".join(names)) if names else ASK_PROGRAM
        keys = ("tests", "asserts")
        tests = {key: row[key] for key in keys if row.get(key)} | {"entry": names}
        prompt = f"{str(row['question']).rstrip()}\n\n{ask}{ASK}"
        return Task(digest(prompt), prompt, json.dumps(tests, sort_keys=True), {"row": at})


@dataclasses.dataclass(frozen=True)
class Judged:
    """One part: "all" tests passed, "passed" share of them, or it "compiles"."""

    part: str
    limits: sandbox.Limits
    box: sandbox.Box

    def __call__(self, task: Task, messages: Sequence[Message]) -> float:
        """0 to 1."""
        code = block(said(messages))
        if code is None:
            return 0.0
        outcome = judge(code, str(task.answer), self.limits, self.box)
        whole = outcome.passed == outcome.total
        shares = {"passed": outcome.passed / outcome.total, "compiles": float(outcome.compiles)}
        return shares.get(self.part, float(whole))


def block(text: str) -> str | None:
    """The code of the last fenced block; None without one, or with one that is not closed."""
    found: str | None = None
    lines: list[str] | None = None
    for line in text.splitlines():
        if not line.strip().startswith("```"):
            if lines is not None:
                lines.append(line)
        elif lines is None:
            lines = []
        else:
            found, lines = "\n".join(lines), None
    done = found if lines is None else None
    return done if done and done.strip() and len(done) <= MAX_CODE else None


# By value: boxes and limits are frozen, but a box's mappings do not hash, so their text stands in.
@functools.lru_cache(maxsize=KEPT)
def _judged(code: str, tests: str, ways: _Ways) -> Outcome:
    wanted = json.loads(tests)
    if "asserts" in wanted:
        return by_asserts(code, wanted["asserts"], wanted["entry"], ways.limits, ways.box)
    return by_output(code, wanted["tests"], ways.limits, ways.box)


@dataclasses.dataclass(frozen=True)
class _Ways:
    """How to run it."""

    name: str
    limits: sandbox.Limits
    box: sandbox.Box = dataclasses.field(compare=False)


def judge(code: str, tests: str, limits: sandbox.Limits, box: sandbox.Box) -> Outcome:
    """What the tests, as in a task's answer, say of the code; outcomes are kept."""
    return _judged(code, tests, _Ways(repr(box), limits, box))


def by_output(code: str, tests: Sequence[Row], limits: sandbox.Limits, box: sandbox.Box) -> Outcome:
    """A run for every test. One that is over a limit ends it: the others count as failed."""
    check = ["-c", "import sys; compile(open('main.py').read(), 'main.py', 'exec')"]
    if not sandbox.run({"main.py": code}, [*PYTHON, *check], limits=limits, box=box).ok:
        return Outcome(0, len(tests), False)
    passed = 0
    for test in tests:
        done = sandbox.run(
            {"main.py": code},
            [*PYTHON, "main.py"],
            stdin=str(test["input"]).encode(),
            limits=limits,
            box=box,
        )
        passed += done.ok and _shown(done.stdout.decode(errors="replace")) == _shown(test["output"])
        if done.status not in ("ok", "failed"):
            break
    return Outcome(passed, len(tests), True)


def _shown(output: str) -> list[str]:
    """Lines without the space at their ends, and without empty ones at the end."""
    return "\n".join(line.rstrip() for line in str(output).splitlines()).rstrip().split("\n")


def by_asserts(
    code: str,
    asserts: Sequence[str],
    entry: Sequence[str],
    limits: sandbox.Limits,
    box: sandbox.Box,
) -> Outcome:
    """Both ends in boxes. What passes is counted by the asserts' end alone."""
    calls = CALLS.read_text(encoding="utf-8")
    # Not for the program's end: what the asserts print cannot be taken for the counts.
    mark = secrets.token_hex(16)
    wanted = {"asserts": list(asserts), "entry": list(entry), "code": code, "mark": mark}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ends = (ours.fileno(), theirs.fileno())
        most = (str(limits.cpu_s / 2), str(limits.wall_s / 2))  # one test that hangs fails alone
        program = sandbox.start(
            {"main.py": code, "calls.py": calls},
            [*PYTHON, "calls.py", "serve", str(ends[1]), *most],
            limits=limits,
            box=box,
            fds=[ends[1]],
        )
        theirs.close()
        ended: list[BaseException] = []
        waiting = threading.Thread(target=_waiting, args=(program, ended), daemon=True)
        waiting.start()
        try:
            done = sandbox.run(
                {"wanted.json": json.dumps(wanted), "calls.py": calls},
                [*PYTHON, "calls.py", "check", str(ends[0])],
                limits=limits,
                box=box,
                fds=[ends[0]],
            )
        finally:
            program.kill()
            waiting.join()
            ours.close()
    if ended:
        raise ended[0]
    return _counted(done.stdout, mark, len(asserts))


def _waiting(program: sandbox.Running, ended: list[BaseException]) -> None:
    """Waits. How the program ended is told by the asserts that failed; a box that did not start
    is not the program's fault.
    """
    try:
        program.wait()
    except (sandbox.SandboxError, OSError) as error:
        ended.append(error)


def _counted(stdout: bytes, mark: str, total: int) -> Outcome:
    """The counts from the checking end's lines."""
    passed, compiles = set(), False
    for line in stdout.decode(errors="replace").splitlines():
        match line.split():
            case [found, "passed", number] if found == mark:
                passed.add(int(number))
            case [found, "compiles"] if found == mark:
                compiles = True
    return Outcome(len(passed), total, compiles)
