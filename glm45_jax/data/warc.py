"""Web crawls as documents: WARC and WET files, read by fastwarc, pages made text by `data/html.py`.

One line of a `Data`: `Warc("crawl")`. Counts and limits are those of `data/files.py`.
"""

import io
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm45_jax.data.files import FILES_FORMAT, KEYS, Limits, Record, Unpacked, documents
from glm45_jax.data.html import HtmlRules, extract, html_version
from glm45_jax.data.reading import DroppedError, Ledger, check_text, match_files
from glm45_jax.data.sources import Doc, digest_files


@dataclass(frozen=True)
class Warc:
    """Web pages of a crawl, as text; of WET files the text that they hold.

    Responses with status 200 that are HTML; all else is counted: not_a_page (requests, metadata),
    bad_status, other_type, and what `HtmlRules` refuse. meta: url, date, path (of the file),
    code_blocks. Damage ends a file: what follows it can't be told from what a page holds.
    """

    root: str
    pattern: str = "**/*.warc*"
    name: str = "warc"
    rules: HtmlRules = HtmlRules()
    limits: Limits = Limits(max_ratio=1000.0)  # crawls hold long runs of the same page
    licence: str = ""

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Documents by file and record; returns counts, and how much code is in them.

        Raises: ValueError when nothing matches.
        """
        ledger = Ledger(self.name, *KEYS, "html_code_blocks", "html_code_lost")
        yield from documents(
            self,
            ledger,
            lambda path: _warc_records(path, self),
            lambda where, record: self._doc(where, record, ledger),
        )
        return ledger.report()

    def version(self) -> str:
        """A digest of paths, sizes and times, and the extractor."""
        digest = digest_files(match_files(self.root, self.pattern))
        return f"{digest} files={FILES_FORMAT} {html_version()}"

    def _doc(self, where: str, record: Record, ledger: Ledger) -> Doc:
        if isinstance(record.value, DroppedError):
            raise record.value
        meta = {"path": where, "repo": Path(self.root).name, "licence": self.licence}
        meta |= record.value["meta"]
        doc_id = f"{where}:{record.number}"
        if (text := record.value.get("text")) is not None:  # of a WET file
            return Doc(doc_id, check_text(text, self.limits.max_line), self.name, meta)
        page = extract(record.value["page"], self.rules, record.value["encoding"])
        check_text(page.text, self.limits.max_line)
        ledger.counts["html_code_blocks"] += page.code_blocks
        ledger.counts["html_code_lost"] += page.code_lost
        return Doc(doc_id, page.text, self.name, meta | {"code_blocks": f"{page.code_blocks}"})


def _warc_records(path: Path, source: Warc) -> Iterator[Record]:
    from fastwarc.warc import ArchiveIterator

    with closing(Unpacked(path, source.limits)) as stream:
        number = 0
        try:
            # Bodies are unpacked below: fastwarc loses its place in one that is not read out.
            found = ArchiveIterator(
                stream, fsspec_args=False, stream_detect=False, auto_decode="none"
            )
            for number, record in enumerate(found, 1):
                yield Record(number, _warc_record(record, source))
        except OSError as error:
            raise stream.failed or DroppedError("damaged") from error
        if stream.failed:
            raise stream.failed
        if number == 0:
            raise DroppedError("no_records")


def _warc_record(record: Any, source: Warc) -> Mapping[str, Any] | DroppedError:
    """Raises: DroppedError("cut_off") for a record that has fewer bytes than it says."""
    from fastwarc.warc import WarcRecordType

    if not (record.headers.get("Content-Length") or "").strip().isdecimal():
        raise DroppedError("damaged")
    if record.content_length > source.rules.max_bytes:
        return DroppedError("too_large")
    payload, size = record.reader.read(record.content_length), record.content_length
    if len(payload) < size:
        raise DroppedError("cut_off")
    url = record.headers.get("WARC-Target-URI") or ""
    meta = {"url": url, "date": record.headers.get("WARC-Date") or ""}
    if record.record_type == WarcRecordType.conversion:
        try:
            return {"text": payload.decode("utf-8"), "meta": meta}
        except UnicodeDecodeError:
            return DroppedError("not_utf8")
    if record.record_type != WarcRecordType.response or record.http_headers is None:
        return DroppedError("not_a_page")
    if record.http_headers.status_code != 200:
        return DroppedError("bad_status")
    if (record.http_content_type or "").lower() not in _PAGES:
        return DroppedError("other_type")
    try:
        page = _body(payload, record.http_headers, source.rules.max_bytes)
    except DroppedError as error:
        return error
    return {"page": page, "encoding": record.http_charset or "", "meta": meta}


def _body(payload: bytes, headers: Any, max_bytes: int) -> bytes:
    """The page inside an HTTP body; at most one byte more than `max_bytes`, which is refused later.

    Raises: DroppedError (other_encoding, damaged).
    """
    from fastwarc.stream_io import BrotliReader, ChunkedReader

    try:
        if (headers.get("Transfer-Encoding") or "").lower() == "chunked":
            payload = ChunkedReader(io.BytesIO(payload)).read(max_bytes + 1)
        encoding = (headers.get("Content-Encoding") or "identity").strip().lower()
        if encoding in ("gzip", "x-gzip", "deflate"):
            bits = 15 + 32  # finds out which of the two it is
            return zlib.decompressobj(bits).decompress(payload, max_bytes + 1)
        if encoding == "br":
            return BrotliReader(io.BytesIO(payload)).read(max_bytes + 1)
    except (OSError, zlib.error) as error:
        raise DroppedError("damaged") from error
    if encoding not in ("identity", "utf-8", ""):
        raise DroppedError("other_encoding")
    return payload


_PAGES = ("text/html", "application/xhtml+xml")
