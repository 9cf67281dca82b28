"""What people wrote about their changes: change logs, and releases as commit-like records.

Entries of change logs are `Commit`s without diffs. Two releases of a package give one with diffs:
the section of the later one's list of changes, then how each file differs, as `data/commits.py`
reads it. Nothing is made up: a release whose section is not found gives no record.
"""

import difflib
import re
from collections.abc import Iterator, Mapping

from glm45_jax.data.commits import Commit


def debian_entries(text: str) -> Iterator[tuple[str, Commit]]:
    """(version, entry) of a Debian change log; names and dates stay outside the message."""
    version = ""
    body: list[str] = []
    for line in text.split("\n"):
        if found := _DEBIAN.match(line):
            version, body = found["version"], []
        elif version and line.startswith((" -- ", "-- ")):
            message = _unindented("\n".join(body).strip("\n"))
            if message.strip():
                yield version, Commit("", line[3:].partition("<")[0].strip(), message, ())
            version = ""
        else:
            body.append(line)


def gnu_entries(text: str) -> Iterator[tuple[str, Commit]]:
    """(date, entry) of a GNU change log: `2024-05-06  Name  <address>`, then indented lines."""
    heads = list(_GNU.finditer(text))
    ends = [*(found.start() for found in heads[1:]), len(text)]
    for found, end in zip(heads, ends, strict=False):  # a text without heads has one end
        message = _unindented(text[found.end() : end].strip("\n"))
        if message.strip():
            yield found["date"], Commit("", found["author"].strip(), message, ())


def entries(text: str) -> list[tuple[str, Commit]]:
    """The entries of a change log in either form; none of one that is free prose."""
    return list(debian_entries(text)) or list(gnu_entries(text))


def section(description: str, version: str) -> str:
    """What a description says that changed in `version`: below its heading, up to the next.

    Empty where no line is a heading of that version.
    """
    lines = description.split("\n")
    heads = [n for n, line in enumerate(lines) if _HEADING.match(line)]
    for n, at in enumerate(heads):
        found = _HEADING.match(lines[at])
        if found and found["version"] == version:
            end = heads[n + 1] if n + 1 < len(heads) else len(lines)
            below = lines[at + 1 : end]
            if below and re.fullmatch(r"[-=~^\"']{3,}\s*", below[0]):
                below = below[1:]
            body = "\n".join(line.rstrip() for line in below).strip("\n")
            return f"{lines[at].lstrip('# ').rstrip()}\n\n{body}" if body.strip() else ""
    return ""


def release_diff(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Unified diffs of the files that differ, by path; texts by path go in."""
    out: list[str] = []
    for path in sorted({*old, *new}):
        before, after = old.get(path), new.get(path)
        if before == after:
            continue
        a = "/dev/null" if before is None else f"a/{path}"
        b = "/dev/null" if after is None else f"b/{path}"
        for line in difflib.unified_diff(_lines(before), _lines(after), a, b):
            out.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return "".join(out)


def _lines(text: str | None) -> list[str]:
    """With their ends; unlike splitlines not cut at form feeds."""
    return re.findall(r"[^\n]*\n|[^\n]+", text or "")


def _unindented(text: str) -> str:
    lines = text.split("\n")
    margin = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
    return "\n".join(line[margin:].rstrip() for line in lines)


_DEBIAN = re.compile(r"[a-z0-9][a-z0-9+.-]* \((?P<version>[^)\s]+)\) [^;]+;")
_GNU = re.compile(
    r"^(?P<date>\d{4}-\d\d-\d\d)[ \t]+(?P<author>[^<\n]+)<[^>\n]*>[ \t]*\n", re.MULTILINE
)
_HEADING = re.compile(
    r"^(?:#+ +|\[)*v?(?P<version>\d+(?:\.\d+)+(?:[a-z]+\d+)?)\]?(?:[ \t]*[-–(\[].*)?\s*$"
)
