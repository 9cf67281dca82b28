"""Documents on disk between the steps of `data/pipeline.py`: compressed JSON lines and a manifest.

A folder is one step's output: `SOURCE-00000.jsonl.gz`, ... with a small `.json` record beside each,
and `manifest.json`, written last: its presence says that the step is whole. `Shards` reads such a
folder as a source like any other; its version is the hash of the documents, wherever they lie.
`zcat F | head -1 | python -m json.tool` shows a document.
"""

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glm45_jax.data.reading import sha256_of
from glm45_jax.data.sources import Doc
from glm45_jax.integrity import write_whole

OUTPUTS_FORMAT = 1  # raise it when the same documents give other bytes
MANIFEST = "manifest.json"

_LEVEL = 1  # of gzip: these files are read again at once, and text still shrinks to a third


@dataclass(frozen=True)
class Counts:
    """What a step did to documents of one source: docs_in + added = docs_out + all dropped.

    dropped: by reason; added: documents with an id that did not come in. told: what the step says
    of itself, in units of its own.
    """

    docs_in: int = 0
    docs_out: int = 0
    chars_in: int = 0
    chars_out: int = 0
    added: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    told: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        gone = sum(self.dropped.values())
        if self.docs_in + self.added != self.docs_out + gone:
            raise ValueError(
                f"{self.docs_in} documents in and {self.added} added, but {self.docs_out} out and "
                f"{gone} dropped ({dict(self.dropped)}); a document is lost"
            )

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.docs_in + other.docs_in,
            self.docs_out + other.docs_out,
            self.chars_in + other.chars_in,
            self.chars_out + other.chars_out,
            self.added + other.added,
            added(self.dropped, other.dropped),
            added(self.told, other.told),
        )


@dataclass(frozen=True)
class Shard:
    """A record of one file. sha256: of its bytes; content: of the lines in it, which another
    release of the compressor does not change.
    """

    file: str
    source: str
    bytes: int
    sha256: str
    content: str
    counts: Counts


@dataclass(frozen=True)
class Manifest:
    """What a step says of its output. key: hash of all the output depends on; digest: of the
    documents; files: what it learnt, by name, with bytes and sha256.

    step: its repr, with every threshold. version: formats and libraries it depends on. code: hashes
    of the modules that define it when it was made, for the record: an edit that changes documents
    raises a format, and so the version.
    """

    format: int
    line: str
    name: str
    key: str
    digest: str
    step: str
    version: str
    code: Mapping[str, str]
    inputs: Mapping[str, str]
    sources: Mapping[str, Counts]
    shards: tuple[Shard, ...]
    files: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Shards:
    """The documents that a step wrote, as a source. of: those of some of its sources; () all.

    folder: where; it is in no repr, since the version says which documents these are.
    """

    folder: str = field(repr=False)
    name: str = "shards"
    of: tuple[str, ...] = ()

    def docs(self) -> Iterator[Doc]:
        """Every document in the order of its source; files are checked before they are read.

        Raises: ValueError for a step that is not built, or a damaged file.
        """
        for shard in self.shards():
            yield from read_shard(Path(self.folder), shard)

    def shards(self) -> tuple[Shard, ...]:
        """The records of the files these documents are in."""
        manifest = read_manifest(Path(self.folder))
        if unknown := set(self.of) - manifest.sources.keys():
            raise ValueError(
                f"{self.folder} has documents of {sorted(manifest.sources)}, not of "
                f"{sorted(unknown)}"
            )
        return tuple(s for s in manifest.shards if not self.of or s.source in self.of)

    def version(self) -> str:
        """The hash of the documents."""
        return f"shards={OUTPUTS_FORMAT} {digest_of(self.shards())}"


def digest_of(shards: Sequence[Shard]) -> str:
    """sha256 (hex) of the documents: of what the lines are, in order, not of how they lie on
    disk.
    """
    parts = [(shard.source, shard.counts.docs_out, shard.content) for shard in shards]
    return hashlib.sha256(json.dumps([OUTPUTS_FORMAT, parts]).encode()).hexdigest()


def write_shard(folder: Path, file: str, source: str, docs: Sequence[Doc], counts: Counts) -> Shard:
    """The record of the file written: first the file, then the record, each whole or not at all."""
    content = hashlib.sha256()
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", _LEVEL, buffer, mtime=0) as out:  # no name, no time: equal bytes
        for doc in docs:
            line = _line(doc)
            content.update(line)
            out.write(line)
    data = buffer.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    shard = Shard(file, source, len(data), sha256, content.hexdigest(), counts)
    write_whole(folder / file, data)
    write_whole(folder / record_name(file), dumped(shard))
    return shard


def read_shard(folder: Path, shard: Shard) -> Iterator[Doc]:
    """Its documents.

    Raises: ValueError when the file is not the one in the record.
    """
    if why := damage(folder, shard):
        raise ValueError(f"{why}; run the pipeline again, which makes it anew")
    with gzip.open(folder / shard.file, "rb") as lines:
        for line in lines:
            fields = json.loads(line.decode("utf-8", "surrogatepass"))
            yield Doc(fields["id"], fields["text"], fields["source"], fields["meta"])


def damage(folder: Path, shard: Shard) -> str:
    """What is wrong with the file of a record; empty when nothing is."""
    return _damage(folder, shard.file, shard.bytes, shard.sha256)


def damaged_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with files by name, bytes and sha256."""
    found = (_damage(folder, name, f["bytes"], f["sha256"]) for name, f in sorted(files.items()))
    return [why for why in found if why]


def file_facts(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_record(folder: Path, file: str) -> Shard | None:
    """The record of a file that was written whole; None where there is none, or no good one."""
    path = folder / record_name(file)
    try:
        shard = _shard(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError):  # a killed run leaves what it leaves
        return None
    return None if shard.file != file or damage(folder, shard) else shard


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step.

    Raises: ValueError when there is none, or one that this code does not read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}; build this step of the pipeline first")
    try:
        fields = json.loads(path.read_bytes())
        if fields["format"] == OUTPUTS_FORMAT:
            fields["sources"] = {name: Counts(**c) for name, c in fields["sources"].items()}
            fields["shards"] = tuple(map(_shard, fields["shards"]))
            return Manifest(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error}); build the step again") from error
    raise ValueError(f"{path} has format {fields['format']}, this code reads {OUTPUTS_FORMAT}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes it, whole or not at all."""
    write_whole(folder / MANIFEST, dumped(manifest))


def dumped(value: Any) -> bytes:
    """A dataclass as JSON, the same bytes for equal values."""
    return json.dumps(asdict(value), indent=1, sort_keys=True).encode() + b"\n"


def record_name(file: str) -> str:
    """The name of the record beside a file."""
    return file.removesuffix(".jsonl.gz") + ".json"


def added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    """Sums by name."""
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted(a.keys() | b.keys())}


def summed(counts: Iterable[Counts]) -> Counts:
    """All together."""
    return sum(counts, Counts())


def _shard(fields: dict[str, Any]) -> Shard:
    return Shard(**fields | {"counts": Counts(**fields["counts"])})


def _line(doc: Doc) -> bytes:
    meta = dict(sorted(doc.meta.items()))
    fields = {"id": doc.id, "source": doc.source, "meta": meta, "text": doc.text}
    # Paths in ids may hold bytes that are no UTF-8, as lone surrogates.
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _damage(folder: Path, file: str, size: int, sha256: str) -> str:
    path = folder / file
    if not path.is_file():
        return f"{path} is missing"
    if (found := path.stat().st_size) != size:
        return f"{path} has {found} bytes, its record says {size}"
    digest = sha256_of(path)
    return "" if digest == sha256 else f"{path} has sha256 {digest[:12]}, its record {sha256[:12]}"
