"""Commits as documents, message first, then the diff of each file as it was written.

`Commits` reads what version control leaves on disk: `git format-patch` files, the output of
`git log -p`, patches with a free or DEP-3 header. Nothing is made up: a diff without a message is
no commit, and change logs without diffs have no reader here; issues and pull requests have theirs
in `data/discussions.py`. Source: spec 6.3 (D17); the model filter named there is another step.
"""

import logging
import re
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from glm45_jax.data.rules import CodeRules, generated_name, mis_encoded, secret
from glm45_jax.data.sources import (
    Doc,
    DroppedError,
    digest_files,
    read_utf8,
    walk_files,
)

log = logging.getLogger(__name__)

COMMITS_FORMAT = 1  # raise it when the same files give other documents


class FileDiff(NamedTuple):
    """The part of a commit that changes one file, byte for byte; path: afterwards."""

    path: str
    text: str
    binary: bool


class Commit(NamedTuple):
    """author: for filters only, it does not go into the text."""

    id: str  # of git where there is one, else empty
    author: str
    message: str
    diffs: tuple[FileDiff, ...]


@dataclass(frozen=True)
class Commits:
    """One document a commit from every file below `root` that ends in one of `suffixes`.

    Left out, with counts: binary, lock and generated files; commits with no message, no diff, a
    damaged hunk, by a bot, with a secret, or outside the limits (spec 6.3 names these filters; the
    numbers are UNVERIFIED). Lines of a message that name people by address are taken out.
    """

    root: str
    suffixes: tuple[str, ...] = (".patch", ".diff")
    max_bytes: int = 2**28  # of a file of commits
    max_chars: int = 98_304  # of a commit; 32K tokens at 3 characters
    max_files: int = 100
    licence: str = ""
    name: str = "commits"

    def version(self) -> str:
        """A digest of paths, sizes and times, and the format of the documents."""
        return f"{digest_files(self._files())} commits={COMMITS_FORMAT}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Commits by file and place; returns counts.

        Counts: files_in, dropped_file_* by reason, commits_in, documents, dropped_* by reason,
        diffs_dropped (files of a commit that stays).

        Raises: ValueError when no file has such an ending.
        """
        counts = Counter(files_in=0, commits_in=0, documents=0, diffs_dropped=0)
        for path, where in self._files():
            counts["files_in"] += 1
            try:
                text = read_utf8(path, self.max_bytes)
            except DroppedError as error:
                counts[f"dropped_file_{error}"] += 1
                continue
            for at, raw in enumerate(split_history(text)):
                counts["commits_in"] += 1
                try:
                    doc = self._doc(f"{where}#{at}", parse_commit(raw), counts)
                except DroppedError as error:
                    counts[f"dropped_{error}"] += 1
                    continue
                counts["documents"] += 1
                yield doc
        log.info("%s: %s", self.name, dict(counts))
        return dict(counts)

    def _files(self) -> list[tuple[Path, str]]:
        found = [pair for pair in walk_files(Path(self.root)) if pair[1].endswith(self.suffixes)]
        if not found:
            raise ValueError(f"no file below {self.root} ends in {', '.join(self.suffixes)}")
        return found

    def _doc(self, doc_id: str, commit: Commit, counts: Counter[str]) -> Doc:
        if not commit.message:
            raise DroppedError("no_message")
        if not commit.diffs:
            raise DroppedError("no_diff")
        if BOT.search(commit.author):
            raise DroppedError("bot")
        kept = [d for d in commit.diffs if not d.binary and not generated_name(d.path)]
        if not kept:
            raise DroppedError("only_generated_or_binary")
        if len(kept) > self.max_files:
            raise DroppedError("many_files")
        text = commit.message + "\n\n" + "".join(diff.text for diff in kept)
        if len(text) > self.max_chars:
            raise DroppedError("too_long")
        meta = {"path": kept[0].path, "repo": doc_id.partition("/")[0], "licence": self.licence}
        doc = Doc(doc_id, text, self.name, meta | {"commit": commit.id})
        for rule in (mis_encoded, secret):
            if rule(doc, CodeRules()):
                raise DroppedError(rule.__name__)
        counts["diffs_dropped"] += len(commit.diffs) - len(kept)
        return doc


def split_history(text: str) -> list[str]:
    """The commits of `git log -p` or of a mailbox of patches, each as it stands; they join to text.

    What comes before the first one belongs to it; a text without such borders is one commit.
    """
    borders = [(found.start(), found.group()[:4]) for found in _BORDER.finditer(text)]
    # A mail may quote a line of the log, and the other way round.
    starts = [start for start, kind in borders if kind == borders[0][1]][1:]
    return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]


def parse_commit(raw: str) -> Commit:
    """Message and file diffs of one commit.

    Raises: DroppedError("bad_hunk") when a hunk has other lines than its head announces.
    """
    lines = re.findall(r"[^\n]*\n|[^\n]+", raw)  # splitlines would cut at form feeds
    at = next((i for i in range(len(lines)) if _begins_diff(lines, i)), len(lines))
    head = "".join(lines[:at])
    found = re.search(r"^(?:commit|From) ([0-9a-f]{40})\b", head, re.MULTILINE)
    author = re.search(r"^(?:Author|From): *(.*)$", head, re.MULTILINE)
    return Commit(
        id=found[1] if found else "",
        author=author[1] if author else "",
        message=_message(head),
        diffs=tuple(_file_diffs(lines, at)),
    )


def _begins_diff(lines: list[str], at: int) -> bool:
    if lines[at].startswith("diff --git "):
        return True
    pair = lines[at : at + 2]
    return len(pair) == 2 and pair[0].startswith("--- ") and pair[1].startswith("+++ ")


def _file_diffs(lines: list[str], at: int) -> Iterator[FileDiff]:
    """Lines between the diffs of two files (`Index:`, a mail's signature) belong to neither."""
    while at < len(lines):
        if not _begins_diff(lines, at):
            at += 1
            continue
        begin, binary = at, False
        if lines[at].startswith("diff --git "):
            at += 1
            while at < len(lines) and _EXTENDED.match(lines[at]):
                binary |= lines[at].startswith(("Binary files", "GIT binary patch"))
                at += 1
        names = lines[begin]
        if at < len(lines) and lines[at].startswith("--- ") and _begins_diff(lines, at):
            names = "".join(lines[at : at + 2])
            at = _end_of_hunks(lines, at + 2)
        yield FileDiff(_path(names), "".join(lines[begin:at]), binary)


def _end_of_hunks(lines: list[str], at: int) -> int:
    first = at
    while at < len(lines) and (found := _HUNK.match(lines[at])):
        old, new = (int(n) if n is not None else 1 for n in found.groups())
        at += 1
        while old > 0 or new > 0:
            kind = lines[at][0] if at < len(lines) else "end"
            # Editors strip the space of an empty context line.
            old -= kind in " -\n\r"
            new -= kind in " +\n\r"
            if kind not in " +-\\\n\r" or old < 0 or new < 0:
                raise DroppedError("bad_hunk")
            at += 1
        at += at < len(lines) and lines[at].startswith("\\")
    if at == first or (at < len(lines) and lines[at].startswith("@@ ")):
        raise DroppedError("bad_hunk")
    return at


def _path(names: str) -> str:
    """The path afterwards, out of `--- a/x +++ b/x` lines or of `diff --git a/x b/x`."""
    if names.startswith("diff --git "):
        names = names.split("\n", 1)[0].rstrip("\r")
        return names.rpartition(" b/" if " b/" in names else " ")[2]
    old, new = (line[4:].partition("\t")[0].strip() for line in names.splitlines()[:2])
    path = old if new == "/dev/null" else new
    return re.sub(r"^[ab]/", "", path)


def _message(head: str) -> str:
    """The words of the author: no headers, no addresses, no list of changed files."""
    head = _BORDER.sub("", head, count=1)
    if _LOG_HEADERS.match(head):
        head = _LOG_HEADERS.sub("", head, count=1)
        head = re.sub(r"^    ", "", head, flags=re.MULTILINE)
    elif _SUBJECT.search(head):
        headers, _, body = head.partition("\n\n")
        folded = re.sub(r"\n[ \t]+", " ", headers)
        subject = _SUBJECT.search(folded)
        body = re.split(r"^---[ \t]*$", body, maxsplit=1, flags=re.MULTILINE)[0]  # diffstat below
        head = f"{subject[1] if subject else ''}\n\n{body}"
    kept = [line.rstrip() for line in head.split("\n") if not _NO_MESSAGE.match(line[:_LINE_CHARS])]
    return "\n".join(kept).strip()


_BORDER = re.compile(
    r"^(?:commit [0-9a-f]{40}\b.*|From [0-9a-f]{40} Mon Sep 17 .*)\n", re.MULTILINE
)
_LOG_HEADERS = re.compile(r"\s*(?:(?:Author|AuthorDate|Commit|CommitDate|Date|Merge):.*\n)+")
_SUBJECT = re.compile(r"^Subject: *(?:\[[^\]\n]*\] *)*(.*)$", re.MULTILINE)
_NO_MESSAGE = re.compile(
    r".*[\w.+-]@[\w-]+\.\w|(?:Author|From|Date|Index|Only in)\b.*:|={20}|diff -"
    r"|index [0-9a-f]+\.\.|# (?:HG changeset|User|Date|Node ID|Parent)\b"
)
_LINE_CHARS = 300  # of a line of a message that are searched: the pattern is quadratic
_EXTENDED = re.compile(
    r"(?:old|new|deleted) (?:file )?mode |(?:dis)?similarity index |(?:rename|copy) (?:from|to) "
    r"|index [0-9a-f]+\.\.|Binary files |GIT binary patch"
)
_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
BOT = re.compile(r"\[bot\]|\bbot@|dependabot|renovate|greenkeeper|pre-commit-ci", re.IGNORECASE)
