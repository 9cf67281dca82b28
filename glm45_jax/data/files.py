"""Sources that read files of documents: JSON lines, Parquet, ArrayRecord.

Each is one line of a `Data`: `JsonLines("corpus/web")`. (Crawls: `data/warc.py`; a plain tree of
files: `TextFiles` of `data/sources.py`; of pages: `HtmlFiles` of `data/html.py`.) Files are read as
streams, in bounded memory. Bad input is never an error of the run: what is left out is counted
under a reason, its first places are logged with file and line, and the counts add up:
`files_in = files_whole + every dropped_file_*`, `records_in = documents + every other dropped_*`.
A file that breaks off counts as dropped_file_*; its documents before the break stay.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from glm45_jax.data.reading import (
    DroppedError,
    Ledger,
    check_regular,
    check_text,
    match_files,
)
from glm45_jax.data.sources import Doc, digest_files

FILES_FORMAT = 1  # raise it when the same files give other documents
KEYS = ("files_in", "files_whole", "records_in", "documents")


@dataclass(frozen=True)
class Limits:
    """What a document or file may cost; above a limit it is refused under the name in brackets.

    Every limit is a CHOICE: far above what people write, far below what fills a memory.
    """

    max_bytes: int = 2**24  # of a record; [too_large]
    max_line: int = 2**20  # characters of one line of a text; [long_line]
    max_ratio: float = 300.0  # a file may unpack to that many times its size; [bomb]
    free_bytes: int = 2**24  # that it may unpack to in any case


@dataclass(frozen=True)
class Fields:
    """Where a record keeps what.

    text: the field of the text. id: that of an id which is unique in the source; "" numbers the
    records by file and line. meta: fields that go into `Doc.meta`, as strings; of one that is an
    object, its items.
    """

    text: str = "text"
    id: str = ""
    meta: tuple[str, ...] = ("meta", "url", "language", "licence")


class Record(NamedTuple):
    """A record as a file holds it. number: its line or row, from 1; value: or why there is none."""

    number: int
    value: Mapping[str, Any] | DroppedError


class Matched(Protocol):
    """A source of the files below `root` that match `pattern`."""

    @property
    def root(self) -> str:
        """A folder or one file."""
        ...

    @property
    def pattern(self) -> str:
        """As of `Path.glob`."""
        ...


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line; files that end in .gz or .zst are unpacked on the way."""

    root: str
    pattern: str = "**/*.jsonl*"
    name: str = "jsonl"
    fields: Fields = Fields()
    limits: Limits = Limits()
    licence: str = ""  # of records that state none

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Documents by file and line; returns the counts of the module's docstring.

        Raises: ValueError when nothing matches.
        """
        return _documents(self, lambda path: json_records(path, self.limits))

    def version(self) -> str:
        """A digest of paths, sizes and times."""
        return f"{digest_files(match_files(self.root, self.pattern))} files={FILES_FORMAT}"


@dataclass(frozen=True)
class Parquet:
    """One row a document; only the columns of `fields` are read, and not a row group at a time.

    Needs pyarrow, which the extra `seqio` brings.
    """

    root: str
    pattern: str = "**/*.parquet"
    name: str = "parquet"
    fields: Fields = Fields()
    limits: Limits = Limits()
    licence: str = ""

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Documents by file and row; returns counts.

        Raises: ValueError when nothing matches.
        """
        return _documents(self, lambda path: _parquet_records(path, self.fields, self.limits))

    def version(self) -> str:
        """A digest of paths, sizes and times."""
        return f"{digest_files(match_files(self.root, self.pattern))} files={FILES_FORMAT}"


@dataclass(frozen=True)
class ArrayRecords:
    """One JSON object a record, or the text itself where `fields` is None.

    The format checks its own sums: a damaged record is one that is left out (dropped_damaged). It
    has no limit to what a record unpacks to, so it is not for files of strangers.
    """

    root: str
    pattern: str = "**/*.arrayrecord"
    name: str = "arrayrecord"
    fields: Fields | None = Fields()
    limits: Limits = Limits()
    licence: str = ""

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Documents by file and record; returns counts.

        Raises: ValueError when nothing matches.
        """
        return _documents(self, lambda path: _array_records(path, self.fields, self.limits))

    def version(self) -> str:
        """A digest of paths, sizes and times."""
        return f"{digest_files(match_files(self.root, self.pattern))} files={FILES_FORMAT}"


def _documents(
    source: JsonLines | Parquet | ArrayRecords, read: Callable[[Path], Iterator[Record]]
) -> Generator[Doc, None, dict[str, int]]:
    ledger = Ledger(source.name, *KEYS)
    base = {"repo": Path(source.root).name, "licence": source.licence}
    fields = source.fields or Fields()
    yield from documents(
        source,
        ledger,
        read,
        lambda where, record: _doc(source.name, where, record, fields, base, source.limits),
    )
    return ledger.report()


def documents(
    source: Matched,
    ledger: Ledger,
    read: Callable[[Path], Iterator[Record]],
    make: Callable[[str, Record], Doc],
) -> Iterator[Doc]:
    """What `make` makes of a file's path and a record of it; all that comes and goes is counted."""
    for where, record in records(source, ledger, read):
        try:
            doc = make(where, record)
        except DroppedError as error:
            ledger.drop(DroppedError(str(error), record.number), where)
            continue
        ledger.counts["documents"] += 1
        yield doc


def records(
    source: Matched, ledger: Ledger, read: Callable[[Path], Iterator[Record]]
) -> Iterator[tuple[str, Record]]:
    """Every record of every file of a source, with the path of the file; files are counted here."""
    for path, where in match_files(source.root, source.pattern):
        ledger.counts["files_in"] += 1
        number = 0
        try:
            check_regular(path)
            for record in read(path):
                ledger.counts["records_in"] += 1
                number = record.number
                yield where, record
        except DroppedError as error:
            ledger.drop(DroppedError(str(error), number + 1), where, "dropped_file_")
        else:
            ledger.counts["files_whole"] += 1


def _doc(
    name: str, where: str, record: Record, fields: Fields, base: Mapping[str, str], limits: Limits
) -> Doc:
    if isinstance(record.value, DroppedError):
        raise record.value
    text = record.value.get(fields.text)
    if not isinstance(text, str):
        raise DroppedError("no_text")
    # Characters first: the bytes of most texts need not be counted.
    if len(text) > limits.max_bytes // 4 and _size(text) > limits.max_bytes:
        raise DroppedError("too_large")
    check_text(text, limits.max_line)
    meta = {"path": where, **base}
    for key in fields.meta:
        value = record.value.get(key)
        items = value if isinstance(value, Mapping) else {key: value}
        meta |= {str(k): _string(v) for k, v in items.items() if v is not None}
    doc_id = f"{where}:{record.number}"
    if fields.id:
        stated = record.value.get(fields.id)
        if stated is None or stated == "":
            raise DroppedError("no_id")
        doc_id = _string(stated)
    return Doc(doc_id, text, name, meta)


def _string(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


class Unpacked:
    """A file as a stream of bytes, unpacked where its name ends in .gz or .zst.

    Never holds more than was asked for. `read` raises DroppedError (unreadable, damaged, cut_off,
    bomb), which `failed` keeps: a library in between may turn it into another.
    """

    def __init__(self, path: Path, limits: Limits):
        self.limits, self.count = limits, 0
        self.failed: DroppedError | None = None
        try:
            self.raw = path.open("rb")
        except OSError as error:
            raise DroppedError("unreadable") from error
        self.stream: Any = self.raw
        if path.suffix == ".gz":
            self.stream = gzip.GzipFile(fileobj=self.raw)
        elif path.suffix == ".zst":
            from fastwarc.stream_io import ZstdReader

            self.stream = ZstdReader(self.raw)

    def read(self, size: int = 2**20) -> bytes:
        """At most `size` bytes; none at the end."""
        try:
            data = self.stream.read(size)
        except EOFError as error:
            raise self._fail("cut_off") from error
        except (OSError, zlib.error) as error:  # also what zstd says
            raise self._fail("cut_off" if "incomplete" in str(error) else "damaged") from error
        self.count += len(data)
        if self.count > self.limits.free_bytes and self.stream is not self.raw:
            if self.count > self.limits.max_ratio * self.raw.tell():
                raise self._fail("bomb")
        return data

    def tell(self) -> int:
        """Bytes read so far."""
        return self.count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Only for readers that ask where they are."""
        if (offset, whence) != (0, io.SEEK_CUR):
            raise io.UnsupportedOperation("a stream only goes forward")
        return self.count

    def close(self) -> None:
        """Closes the file."""
        self.raw.close()

    def _fail(self, reason: str) -> DroppedError:
        self.failed = DroppedError(reason)
        return self.failed


def _lines(stream: Unpacked, max_bytes: int) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is longer, of which nothing more is kept."""
    parts: list[bytes] = []
    size = 0
    while chunk := stream.read():
        first, *rest = chunk.split(b"\n")
        for at, piece in enumerate((first, *rest)):
            if at:  # the line before this piece has ended
                yield b"".join(parts) if size <= max_bytes else None
                parts, size = [], 0
            size += len(piece)
            parts = [*parts, piece] if size <= max_bytes else []
    if size:
        yield b"".join(parts) if size <= max_bytes else None


def json_records(path: Path, limits: Limits) -> Iterator[Record]:
    """The objects of a file of JSON lines."""
    with closing(Unpacked(path, limits)) as stream:
        # An object around the text, and escapes that are six bytes a character.
        for number, line in enumerate(_lines(stream, 2 * limits.max_bytes), 1):
            if line is None:
                yield Record(number, DroppedError("too_large"))
            elif line.strip():
                yield Record(number, _json(line))
            else:
                yield Record(number, DroppedError("blank"))


def _json(line: bytes) -> Mapping[str, Any] | DroppedError:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return DroppedError("not_utf8")
    except (ValueError, RecursionError):  # an integer of too many digits is a ValueError as well
        return DroppedError("not_json")
    return value if isinstance(value, dict) else DroppedError("not_an_object")


def _parquet_records(path: Path, fields: Fields, limits: Limits) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError('Parquet needs pyarrow; pip install "glm45_jax[seqio]"') from error

    number = 0
    try:
        metadata = pyarrow.parquet.read_metadata(path)
        names = metadata.schema.to_arrow_schema().names
        if fields.text not in names:
            raise DroppedError("no_text")
        _refuse_parquet_bomb(metadata, limits)
        wanted = [n for n in dict.fromkeys((fields.text, fields.id, *fields.meta)) if n in names]
        # A value that every row repeats is kept once: a small file can't unpack to a memory.
        with pyarrow.parquet.ParquetFile(
            path, metadata=metadata, read_dictionary=[fields.text], buffer_size=2**20
        ) as file:
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                for row in range(batch.num_rows):
                    number += 1
                    yield Record(number, _parquet_row(batch, row, fields.text, limits))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DroppedError("damaged") from error


def _refuse_parquet_bomb(metadata: Any, limits: Limits) -> None:
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
            if unpacked > max(limits.free_bytes, limits.max_ratio * packed):
                raise DroppedError("bomb")


def _parquet_row(
    batch: Any, row: int, text: str, limits: Limits
) -> Mapping[str, Any] | DroppedError:
    try:
        value = batch.column(text)[row]
        value = getattr(value, "value", value)  # of a dictionary
        if value is not None and hasattr(value, "as_buffer"):
            held = value.as_buffer()
            if held is not None and held.size > limits.max_bytes:
                return DroppedError("too_large")
        found = value.as_py() if value is not None else None
        found = found.decode() if isinstance(found, bytes) else found
        others = {n: batch.column(n)[row].as_py() for n in batch.schema.names if n != text}
    except UnicodeDecodeError:
        return DroppedError("not_utf8")
    return {text: found, **others}


def _array_records(path: Path, fields: Fields | None, limits: Limits) -> Iterator[Record]:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    total = reader.num_records()
    try:
        for number in range(1, total + 1):
            try:
                (data,) = reader.read([number - 1])
            except RuntimeError:
                yield Record(number, DroppedError("damaged"))
                continue
            yield Record(number, _array_record(data, fields, limits))
    finally:
        try:
            reader.close()
        except RuntimeError as error:
            if total == 0:  # says here what is wrong with a file that did not open
                raise DroppedError("damaged") from error


def _array_record(
    data: bytes, fields: Fields | None, limits: Limits
) -> Mapping[str, Any] | DroppedError:
    if len(data) > 2 * limits.max_bytes:
        return DroppedError("too_large")
    if fields is not None:
        return _json(data)
    try:
        return {Fields().text: data.decode("utf-8")}
    except UnicodeDecodeError:
        return DroppedError("not_utf8")
