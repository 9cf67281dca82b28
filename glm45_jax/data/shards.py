"""Writes the documents of one part of a corpus: ArrayRecord shards by kind, repositories as files.

Records are JSON objects with id, text and meta, as `ArrayRecords` of `data/files.py` reads them.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from glm45_jax.data.gather import Piece
from glm45_jax.data.html import extract
from glm45_jax.data.reading import DroppedError, Ledger, sha256_of

PAGES = ("web", "web_multilingual")  # kinds whose texts are HTML


class PartWriter:
    """Documents of one part, into a shard a kind and a folder a repository."""

    def __init__(self, out: Path, part: str):
        self.out, self.part = out, part
        self.writers: dict[str, Any] = {}
        self.counts: dict[str, Counter[str]] = {}
        self.licences: dict[str, Counter[str]] = {}
        self.repositories: dict[str, str] = {}
        self.digests: list[str] = []

    def write(self, piece: Piece, ledger: Ledger) -> None:
        """Raises nothing for a bad piece: it is counted in the ledger."""
        data = piece.text.encode("utf-8", "surrogatepass")
        if piece.kind == "code" and not self._write_file(piece, data, ledger):
            return
        if piece.kind != "code":
            self._write_record(piece)
        counts = self.counts.setdefault(piece.kind, Counter())
        size = len(data)
        if piece.kind in PAGES:
            try:
                size = len(extract(piece.text).text.encode())
            except DroppedError:
                size = 0  # `HtmlText` will count it
        counts.update(documents=1, bytes=len(data), text_bytes=size)
        licences = self.licences.setdefault(piece.kind, Counter())
        licences[piece.meta.get("licence") or "UNKNOWN"] += size

    def finish(self) -> dict[str, Any]:
        """Closes the shards, puts them in their places and says what is in them."""
        kinds: dict[str, Any] = {}
        self.close()
        for kind, counts in sorted(self.counts.items()):
            kinds[kind] = {**counts, "licences": dict(sorted(self.licences[kind].items()))}
            if kind == "code":
                kinds[kind]["sha256"] = _digest(self.digests)
                continue
            path = self._path(kind)
            path.rename(path.with_name(f"{self.part}.arrayrecord"))
            path = path.with_name(f"{self.part}.arrayrecord")
            kinds[kind] |= {"sha256": sha256_of(path), "file_bytes": path.stat().st_size}
        return {"kinds": kinds, "repositories": self.repositories}

    def close(self) -> None:
        """A shard that is not finished has another ending, so that no source reads it."""
        for writer in self.writers.values():
            writer.close()
        self.writers = {}

    def _path(self, kind: str) -> Path:
        return self.out / kind / f"{self.part}.writing"

    def _write_record(self, piece: Piece) -> None:
        from array_record.python import array_record_module

        if piece.kind not in self.writers:
            path = self._path(piece.kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            options = "group_size:1,zstd:3"
            self.writers[piece.kind] = array_record_module.ArrayRecordWriter(str(path), options)
        doc_id = f"{piece.meta['repo']}/{piece.path}"
        record = {"id": doc_id, "text": piece.text, "meta": {"path": piece.path, **piece.meta}}
        self.writers[piece.kind].write(json.dumps(record, ensure_ascii=False).encode())

    def _write_file(self, piece: Piece, data: bytes, ledger: Ledger) -> bool:
        repo = piece.meta["repo"]
        root = self.out / "code" / repo
        if repo not in self.repositories:
            shutil.rmtree(root, ignore_errors=True)
            self.repositories[repo] = piece.meta["licence"]
        path = root / PurePosixPath(piece.path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:  # a name that is too long, or both a file and a folder
            ledger.drop(DroppedError("unwritable"), f"{repo}: {piece.path} ({error.strerror})")
            return False
        self.digests.append(f"{repo}/{piece.path} {_digest([piece.text])}")
        return True


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()
