"""Both ends of calls from asserts into a program that may cheat. Runs in boxes; stdlib only.

`serve` has the program and no assert, `check` the asserts and never runs the program. Between them
go plain values by JSON, a length before each message: what a program returns can be wrong, but it
cannot be an object of its own with an `__eq__` that is always true. Objects that are not plain stay
in the program's box; the other side holds a `Remote`.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import sys

MAX_MESSAGE = 4_000_000  # bytes
MAX_ITEMS = 100_000  # of what a program yields
MAX_STALE = 1000  # messages of earlier tests, skipped


def send(sock, message):
    """One message."""
    data = json.dumps(message).encode()
    sock.sendall(struct.pack(">I", len(data)) + data)


def receive(sock):
    """One message, no byte more: a forked process goes on reading where this one stops."""

    def exactly(size):
        data = b""
        while len(data) < size:
            more = sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    (size,) = struct.unpack(">I", exactly(4))
    if size > MAX_MESSAGE:
        raise ValueError(f"message of {size} bytes, {MAX_MESSAGE} at most")
    return json.loads(exactly(size))


def packed(value, keep):
    """A value as JSON; keep(value) names what is not plain."""
    if value is None or isinstance(value, bool | str):
        return {"v": value if value is None or isinstance(value, bool) else str(value)}
    if isinstance(value, int):
        return {"v": int(value)}
    if isinstance(value, float):
        return {"f": float(value).hex()}
    if isinstance(value, complex):
        return {"c": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes):
        return {"b": value.hex()}
    for letter, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if isinstance(value, kind):
            return {letter: [packed(item, keep) for item in value]}
    if isinstance(value, dict):
        return {"d": [[packed(key, keep), packed(item, keep)] for key, item in value.items()]}
    return {"h": keep(value)}


def unpacked(message, found):
    """The value of a message; found(name) is what stands for a kept one."""
    ((letter, body),) = message.items()
    if letter == "v":
        if not (body is None or type(body) in (bool, int, str)):
            raise ValueError(f"{type(body)} is not plain")
        return body
    if letter == "h":
        return found(body)
    if letter == "d":
        return {unpacked(key, found): unpacked(item, found) for key, item in body}
    if letter in "ltsz":
        kind = {"l": list, "t": tuple, "s": set, "z": frozenset}[letter]
        return kind(unpacked(item, found) for item in body)
    if letter == "c":
        return complex(float.fromhex(body[0]), float.fromhex(body[1]))
    return {"f": float.fromhex, "b": bytes.fromhex}[letter](body)


class Served:
    """The program's end."""

    def __init__(self, sock, cpu_s, wall_s):
        """cpu_s, wall_s: seconds for one test."""
        self.sock, self.cpu_s, self.wall_s = sock, cpu_s, wall_s
        self.names = {"__name__": "program"}
        self.kept = []
        self.failed = None

    def load(self):
        """Runs the program's definitions; what it raises is raised by every call."""
        try:
            with open("main.py", encoding="utf-8") as file:
                exec(compile(file.read(), "main.py", "exec"), self.names)
        except BaseException as error:  # SystemExit too: it is not our program
            self.failed = error

    def run(self):
        """A forked process for every test, so that none sees what another left."""
        while True:
            message = receive(self.sock)
            if message["op"] != "test":
                continue  # of a test whose process has died
            pid = os.fork()
            if not pid:
                self.test()
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            # Said of all, for a program may end its process as if the test had: who waits knows.
            send(self.sock, {"dead": message["test"], "why": f"wait status {status}"})

    def test(self):
        """Answers the calls of one test."""
        signal.setitimer(signal.ITIMER_PROF, self.cpu_s)  # these kill, whatever it is doing
        signal.setitimer(signal.ITIMER_REAL, self.wall_s)
        while (message := receive(self.sock))["op"] != "end":
            try:
                reply = self.do(message)
            except BaseException as error:
                reply = {"raised": type(error).__name__, "text": str(error)[:1000]}
            send(self.sock, {"id": message["id"], **reply})

    def keep(self, value):
        """A name for what is not plain."""
        self.kept.append(value)
        return f"o:{len(self.kept) - 1}"

    def found(self, name):
        """What a name stands for."""
        kind, _, rest = name.partition(":")
        return self.names[rest] if kind == "n" else self.kept[int(rest)]

    def do(self, message):
        """One operation on something kept."""
        if self.failed is not None:
            raise self.failed
        target = self.found(message["on"])
        if message["op"] == "get":
            value = getattr(target, message["name"])
            return {"method": True} if callable(value) else {"value": packed(value, self.keep)}
        if message["op"] == "list":
            return {"value": packed(list(itertools.islice(target, MAX_ITEMS)), self.keep)}
        call = getattr(target, message["name"]) if message["name"] else target
        args = [unpacked(item, self.found) for item in message["args"]]
        named = {key: unpacked(item, self.found) for key, item in message["named"].items()}
        value = call(*args, **named)
        after = [
            packed(item, self.keep) if type(item) in (list, dict, set) else None for item in args
        ]
        return {"value": packed(value, self.keep), "after": after}


class DeadError(Exception):
    """The program's process is gone."""


class ProgramError(Exception):
    """What a program raised, of a kind that is not Python's own."""


class Caller:
    """The asserts' end."""

    def __init__(self, sock):
        """No test runs yet."""
        self.sock, self.ids, self.number = sock, itertools.count(), -1

    def ask(self, message):
        """A reply of the program to an operation.

        Raises: what it raised; DeadError.
        """
        mine = next(self.ids)
        try:
            send(self.sock, {**message, "id": mine})
            for _ in range(MAX_STALE):
                reply = receive(self.sock)
                if reply.get("dead") == self.number:
                    raise DeadError(str(reply.get("why")))
                if reply.get("id") == mine:
                    break
            else:
                raise DeadError("it talks without being asked")
        except (OSError, EOFError, ValueError) as error:
            raise DeadError(repr(error)) from None
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            raised = kind if known and kind is not None else ProgramError
            raise raised(reply.get("text"))
        return reply

    def value(self, reply):
        """The value in a reply."""
        return unpacked(reply["value"], lambda name: Remote(self, str(name)))

    def call(self, on, name, args, named):
        """Calls, and changes lists, dicts and sets among the arguments as the program did."""
        pack = lambda item: packed(item, _kept)  # noqa: E731
        packs = [pack(item) for item in args]
        naming = {key: pack(item) for key, item in named.items()}
        message = {"op": "call", "on": on, "name": name, "args": packs, "named": naming}
        reply = self.ask(message)
        for mine, theirs in zip(args, reply.get("after") or [], strict=False):
            if theirs is not None:
                new = unpacked(theirs, lambda name: Remote(self, str(name)))
                if type(new) is not type(mine):
                    raise DeadError("an argument came back as something else")
                if new != mine:
                    mine.clear()
                    (mine.extend if isinstance(mine, list) else mine.update)(new)
        return self.value(reply)


def _kept(value):
    """The name of something of the program's."""
    if type(value) is not Remote:
        raise TypeError(f"{type(value).__name__} cannot go to the program: only plain values can")
    return object.__getattribute__(value, "_name")


class Remote:
    """Something in the program's box: a function, class or object.

    Compared with a plain value it raises: what the program says of itself proves nothing.
    """

    __slots__ = ("_caller", "_name")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, caller, name):
        """name: the program's end knows it by it."""
        object.__setattr__(self, "_caller", caller)
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name):
        """Its attribute, or a method to call."""
        reply = self._caller.ask({"op": "get", "on": self._name, "name": name})
        if reply.get("method") is True:
            return lambda *args, **named: self._caller.call(self._name, name, args, named)
        return self._caller.value(reply)

    def __call__(self, *args, **named):
        """Its result."""
        return self._caller.call(self._name, "", args, named)

    def __iter__(self):
        """What it yields, as a list."""
        return iter(self._caller.value(self._caller.ask({"op": "list", "on": self._name})))

    def __next__(self):
        """The next that it yields."""
        return self._caller.call(self._name, "__next__", (), {})

    def __len__(self):
        """Its length; TypeError without one, as `list` asks and expects."""
        try:
            return self._caller.call(self._name, "__len__", (), {})
        except AttributeError as error:
            raise TypeError(str(error)) from None

    def __getitem__(self, key):
        """Its item."""
        return self._caller.call(self._name, "__getitem__", (key,), {})

    def __str__(self):
        """As text."""
        return self._caller.call(self._name, "__str__", (), {})

    def __repr__(self):
        """As text."""
        return self._caller.call(self._name, "__repr__", (), {})

    def __bool__(self):
        """Not told."""
        raise TypeError("what is not plain is neither true nor false here")

    def __eq__(self, other):
        """Of two of the program's, what it says; else not told."""
        if type(other) is not Remote:
            raise TypeError(f"what is not plain cannot be equal to {type(other).__name__}")
        return self._caller.call(self._name, "__eq__", (other,), {}) is True

    def __ne__(self, other):
        """As ==."""
        return not self == other


def check(sock):
    """Runs the asserts, and prints a line for each that passes."""
    with open("wanted.json", encoding="utf-8") as file:
        wanted = json.load(file)
    say = lambda *words: print(wanted["mark"], *words, flush=True)  # noqa: E731
    try:
        compile(wanted["code"], "main.py", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return
    say("compiles")
    caller = Caller(sock)
    for number, code in enumerate(wanted["asserts"]):
        caller.number = number
        names = {name: Remote(caller, f"n:{name}") for name in wanted["entry"]}
        try:
            send(sock, {"op": "test", "test": number})
            exec(compile(code, f"assert {number}", "exec"), {"__name__": "asserts", **names})
        except Exception:  # of any kind: the assert does not hold
            pass
        else:
            say("passed", number)
        with contextlib.suppress(OSError):
            send(sock, {"op": "end"})


def main(kind, descriptor, cpu_s="0", wall_s="0"):
    """One end, over an inherited socket."""
    sock = socket.socket(fileno=int(descriptor))
    if kind == "check":
        check(sock)
        return
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    served = Served(sock, float(cpu_s), float(wall_s))
    served.load()
    with contextlib.suppress(EOFError):
        served.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
