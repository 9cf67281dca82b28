"""Reading files that others wrote: what is refused, under which reason, and how that is counted.

`Ledger` keeps the counts of one source; `DroppedError` says why something is left out, and where.
"""

import hashlib
import logging
import re
import stat
from collections import Counter
from pathlib import Path

log = logging.getLogger(__name__)


class DroppedError(Exception):
    """A document or file that is left out; the text is the reason it is counted under.

    line: where in the file, from 1; 0 where that says nothing.
    """

    def __init__(self, reason: str, line: int = 0):
        super().__init__(reason)
        self.line = line


class Ledger:
    """Counts of one source (`counts`); the first places of every reason are logged by name."""

    def __init__(self, source: str, *keys: str):
        self.source, self.counts = source, Counter(dict.fromkeys(keys, 0))

    def drop(self, error: DroppedError, where: str, prefix: str = "dropped_") -> None:
        """One more left out, at `where` (a file)."""
        key = f"{prefix}{error}"
        self.counts[key] += 1
        if self.counts[key] <= _LOGGED:
            line = f":{error.line}" if error.line else ""
            last = "; the next ones are only counted" * (self.counts[key] == _LOGGED)
            log.warning("%s: %s%s: %s%s", self.source, where, line, key, last)

    def report(self) -> dict[str, int]:
        """The counts, for a generator of documents to return; they are logged as well."""
        log.info("%s: %s", self.source, dict(self.counts))
        return dict(self.counts)


def match_files(root: str | Path, pattern: str) -> list[tuple[Path, str]]:
    """What below `root` matches and is no folder, with its path from there, sorted by that.

    Links, also broken ones, and pipes are listed, so that who reads them can count them. A root
    that is a file is the only one.

    Raises: ValueError when nothing matches.
    """
    root = Path(root)
    if root.is_file():
        return [(root, root.name)]
    found = [(p, p.relative_to(root).as_posix()) for p in root.glob(pattern)]
    found = [(path, where) for path, where in found if path.is_symlink() or not path.is_dir()]
    if not found:
        raise ValueError(f"no file in {root} matches {pattern!r}; check root and pattern")
    return sorted(found, key=lambda pair: pair[1])


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file.

    Raises: DroppedError (symlink, not_a_file, unreadable, too_large).
    """
    check_regular(path, max_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DroppedError("unreadable") from error


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Refuses what is no plain file of at most `max_bytes`; `read_regular` says how."""
    try:
        info = path.lstat()
    except OSError as error:
        raise DroppedError("unreadable") from error
    if stat.S_ISLNK(info.st_mode):
        raise DroppedError("symlink")
    if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
        raise DroppedError("not_a_file")
    if max_bytes is not None and info.st_size > max_bytes:
        raise DroppedError("too_large")


def read_utf8(path: Path, max_bytes: int) -> str:
    """The text of a file, line ends as they are.

    Raises: DroppedError (those of `read_regular`, not_utf8, blank).
    """
    return decoded(read_regular(path, max_bytes))


def decoded(data: bytes) -> str:
    """The text of UTF-8. Raises: DroppedError (not_utf8, blank)."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DroppedError("not_utf8", data.count(b"\n", 0, error.start) + 1) from error
    if not text.strip():
        raise DroppedError("blank")
    return text


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_text(text: str, max_line: int) -> str:
    """The text itself.

    Raises: DroppedError (blank, long_line, not_unicode: half of a surrogate pair).
    """
    if not text.strip():
        raise DroppedError("blank")
    if len(text) > max_line:
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > max_line:
                raise DroppedError("long_line", number)
    if not text.isascii() and (found := LONE.search(text)):
        raise DroppedError("not_unicode", text.count("\n", 0, found.start()) + 1)
    return text


_LOGGED = 5  # places of one reason
LONE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: no tokenizer takes such a text
