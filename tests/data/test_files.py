"""Laws of the sources that read files: what goes in comes out or is counted, whatever it is."""

import functools
import gzip
import io
import json
import logging
import os
import random
import resource
import tracemalloc
import zlib

import pytest
from array_record.python import array_record_module
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.data.files import ArrayRecords, Fields, JsonLines, Limits, Parquet
from glm45_jax.data.html import HtmlFiles
from glm45_jax.data.sources import TextFiles
from glm45_jax.data.warc import Warc
from tests.data.common import run

pytest.importorskip("pyarrow")
import pyarrow
import pyarrow.parquet

TEXTS = ["one", "zwei: schön", "three\nlines\n\nof text", "四つ目の文章です。 It is here."]
LONG = "x" * 50_000_000  # one line


def json_line(text):
    return json.dumps({"text": text, "url": f"u/{text[:3]}"}).encode() + b"\n"


def json_file(texts):
    return b"".join(map(json_line, texts))


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def parquet(texts, **options):
    out = io.BytesIO()
    table = pyarrow.table({"text": texts, "url": [f"u/{t[:3]}" for t in map(str, texts)]})
    pyarrow.parquet.write_table(table, out, **options)
    return out.getvalue()


def array_record(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:3")
    for record in records:
        writer.write(record)
    writer.close()
    return path.read_bytes()


def warc_record(body, status="200 OK", kind="response", head="Content-Type: text/html", url="u"):
    payload = body
    if kind == "response":
        payload = f"HTTP/1.1 {status}\r\n{head}\r\n\r\n".encode() + body
    lines = (
        "WARC/1.0",
        f"WARC-Type: {kind}",
        f"WARC-Target-URI: {url}",
        "WARC-Date: 2024-05-06T07:08:09Z",
        f"Content-Length: {len(payload)}",
        f"Content-Type: {'application/http' if kind == 'response' else 'text/plain'}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + payload + b"\r\n\r\n"


def warc(texts):
    return b"".join(warc_record(f"<p>{text}</p>".encode(), url=f"u/{text[:3]}") for text in texts)


def balanced(counts):
    """Whether files and records add up, as the docstring of `data/files.py` promises."""
    files = sum(n for key, n in counts.items() if key.startswith("dropped_file_"))
    records = sum(n for key, n in counts.items() if key.startswith("dropped_")) - files
    return (counts["files_in"], counts["records_in"]) == (
        counts["files_whole"] + files,
        counts["documents"] + records,
    )


def dropped(counts):
    return {key: n for key, n in counts.items() if key.startswith("dropped_")}


def write(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)


def kinds(tmp_path):
    """Every source with files that hold TEXTS."""
    lines = json_file(TEXTS)
    pages = warc(TEXTS)
    records = array_record(tmp_path / "scratch", [line[:-1] for line in lines.splitlines(True)])
    (tmp_path / "scratch").unlink()
    yield JsonLines, "a.jsonl", lines
    yield JsonLines, "a.jsonl.gz", gzip.compress(lines[:50]) + gzip.compress(lines[50:])
    yield JsonLines, "a.jsonl.zst", zstd(lines)
    yield Parquet, "a.parquet", parquet(TEXTS, row_group_size=3)
    yield ArrayRecords, "a.arrayrecord", records
    yield Warc, "a.warc", pages
    yield Warc, "a.warc.gz", b"".join(gzip.compress(warc([text])) for text in TEXTS)
    yield Warc, "a.warc.zst", zstd(pages)


def test_every_kind_of_file_gives_the_documents_that_went_in(tmp_path):
    for number, (kind, name, data) in enumerate(kinds(tmp_path)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, {name: data})
        source = kind(str(folder), licence="CC0-1.0")
        docs, counts = run(source)
        assert [" ".join(d.text.split()) for d in docs] == [" ".join(t.split()) for t in TEXTS]
        assert [d.id for d in docs] == [f"{name}:{n}" for n in (1, 2, 3, 4)]
        assert [d.meta["url"] for d in docs] == [f"u/{text[:3]}" for text in TEXTS] or kind is Warc
        assert all(d.meta["licence"] == "CC0-1.0" and d.meta["repo"] == folder.name for d in docs)
        assert all(d.source == source.name and d.meta["path"] == name for d in docs)
        assert not dropped(counts) and balanced(counts) and counts["documents"] == 4
        assert run(source) == (docs, counts)
        before = source.version()
        write(folder, {name: data + b" "})
        assert source.version() != before


def test_files_come_by_path_and_one_file_can_be_the_root(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path, {"c.jsonl": json_file(["3"]), "a.jsonl": json_file(["1"])})
    write(tmp_path / "b", {"x.jsonl": json_file(["2"])})
    assert [doc.text for doc in run(JsonLines(str(tmp_path)))[0]] == ["1", "2", "3"]
    assert [doc.text for doc in run(JsonLines(str(tmp_path / "c.jsonl")))[0]] == ["3"]
    with pytest.raises(ValueError, match="matches"):
        run(Parquet(str(tmp_path)))


def test_fields_say_where_text_id_and_meta_are(tmp_path):
    rows = [
        {"body": "one", "key": "k1", "meta": {"lang": "en", "n": 3, "none": None}, "url": "u"},
        {"body": "two", "key": "", "url": "v"},
        {"text": "three", "key": "k3"},
    ]
    write(tmp_path, {"a.jsonl": b"\n".join(json.dumps(row).encode() for row in rows)})
    fields = Fields(text="body", id="key", meta=("meta", "url"))
    docs, counts = run(JsonLines(str(tmp_path), fields=fields))
    assert [(d.id, d.text) for d in docs] == [("k1", "one")]
    assert docs[0].meta == {
        **{"path": "a.jsonl", "repo": tmp_path.name, "licence": ""},
        **{"lang": "en", "n": "3", "url": "u"},
    }
    assert dropped(counts) == {"dropped_no_id": 1, "dropped_no_text": 1}


@functools.cache
def bad_lines():
    """(line, reason it is left out for) of JSON lines."""
    return (
        (b"", "blank"),
        (b'{"text": ""}', "blank"),
        (b'{"text": " \\n"}', "blank"),
        (b'{"text": "half', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'{"text": ' + b"9" * 10_000 + b"}", "not_json"),
        (b'"text"', "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"text": null}', "no_text"),
        (b'{"other": "x"}', "no_text"),
        (b'{"text": "\xff\xfe"}', "not_utf8"),
        (b'{"text": "\\ud800"}', "not_unicode"),
        (json.dumps({"text": LONG}).encode(), "too_large"),
        (json.dumps({"text": "ok\n" + "y" * 2**20 + "y"}).encode(), "long_line"),
        (json.dumps({"text": "é" * 10_000_000}, ensure_ascii=False).encode(), "too_large"),
    )


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_bad_lines_are_left_out_each_under_its_reason_with_file_and_line(tmp_path, caplog, ending):
    pack = {"": bytes, ".gz": lambda data: gzip.compress(data, 1), ".zst": zstd}[ending]
    lines = [part for line, _ in bad_lines() for part in (line, b'{"text": "good"}')]
    write(tmp_path, {f"a.jsonl{ending}": pack(b"\n".join(lines))})
    with caplog.at_level(logging.WARNING):
        docs, counts = run(JsonLines(str(tmp_path), limits=Limits(max_ratio=1e6)))
    assert [doc.id for doc in docs] == [f"a.jsonl{ending}:{2 * n + 2}" for n in range(15)]
    assert balanced(counts) and counts["documents"] == 15
    for number, (_, why) in enumerate(bad_lines()):
        assert f"a.jsonl{ending}:{2 * number + 1}: dropped_{why}" in caplog.text
        assert counts[f"dropped_{why}"] == sum(why == other for _, other in bad_lines())


def damaged(data):
    """The start of a file, a file with bytes changed in the middle, no file, and noise."""
    middle = len(data) // 2
    return {
        "cut": data[: len(data) * 2 // 3],
        "changed": data[:middle]
        + bytes(b ^ 255 for b in data[middle : middle + 60])
        + data[middle + 60 :],
        "empty": b"",
        "noise": random.Random(0).randbytes(100_000),
    }


def test_a_damaged_file_of_any_kind_is_counted_and_the_others_are_read(tmp_path):
    """Damage is never an error of the run, and never a wrong text."""
    for number, (kind, name, data) in enumerate(kinds(tmp_path)):
        for how, bad in damaged(data).items():
            folder = tmp_path / f"{number}{how}"
            folder.mkdir()
            write(folder, {f"a_{name}": bad, name: data, f"z_{name}": data})
            docs, counts = run(kind(str(folder)))
            whole = [doc for doc in docs if not doc.id.startswith("a_")]
            assert len(whole) == 8 and balanced(counts), (name, how)
            lost = 4 - (len(docs) - 8)
            assert lost == 0 or dropped(counts) or how == "empty", (name, how)
            if how != "changed" or "jsonl" not in name:  # plain lines have no sum
                wrong = {" ".join(doc.text.split()) for doc in docs}
                assert name == "a.warc" or wrong <= {" ".join(t.split()) for t in TEXTS}, name
            if how == "cut" and name not in ("a.jsonl", "a.warc"):
                assert any(key.startswith("dropped_file_") for key in counts), (name, counts)


def test_gzip_and_zstd_that_unpack_without_end_are_refused(tmp_path):
    packer = zlib.compressobj(9, wbits=31)
    zeros = b"".join(packer.compress(bytes(2**20)) for _ in range(200)) + packer.flush()
    line = json_file(["the same text again " * 500])
    page = warc(["x " * 50_000])
    rows = ["0" * 100_000 + str(n) for n in range(900)]
    bombs = (
        (JsonLines, "a.jsonl.gz", zeros),
        (JsonLines, "a.jsonl.zst", zstd(bytes(2**28))),
        (JsonLines, "a.jsonl.zst", zstd(line * 20_000)),
        (Warc, "a.warc.zst", zstd(page * 2000)),
        (Parquet, "a.parquet", parquet(rows, use_dictionary=False, compression="zstd")),
    )
    for number, (kind, name, bomb) in enumerate(bombs):
        folder = tmp_path / str(number)
        folder.mkdir()
        good = next(data for _, other, data in kinds(folder) if other == name)
        write(folder, {name: bomb, f"good_{name}": good})
        source = kind(str(folder), limits=Limits(max_ratio=300.0))
        tracemalloc.start()
        docs, counts = run(source)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert counts["dropped_file_bomb"] == 1, (number, counts)
        assert balanced(counts) and counts["files_whole"] == 1
        assert memory < 100e6, (name, memory)
        assert len([doc for doc in docs if doc.id.startswith("good")]) == 4


def test_a_line_of_50_mb_takes_no_more_memory_than_the_limit(tmp_path):
    write(tmp_path, {"a.jsonl": json.dumps({"text": LONG}).encode() + b"\n" + json_line("next")})
    source = JsonLines(str(tmp_path), limits=Limits(max_bytes=10**6))
    tracemalloc.start()
    docs, counts = run(source)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [doc.text for doc in docs] == ["next"] and counts["dropped_too_large"] == 1
    assert memory < 10e6


@given(
    st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    st.integers(1, 50),
)
def test_lines_are_those_of_the_file_however_it_comes_in(lines, size):
    from glm45_jax.data.files import _lines

    class Stream:
        def __init__(self):
            self.file = io.BytesIO(b"\n".join(lines))

        def read(self):
            return self.file.read(size)

    expected = b"\n".join(lines).split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert list(_lines(Stream(), 20)) == [x if len(x) <= 20 else None for x in expected]


def test_what_is_no_plain_file_is_counted_by_every_source(tmp_path):
    for kind, name in (
        (JsonLines, "a.jsonl"),
        (Parquet, "a.parquet"),
        (ArrayRecords, "a.arrayrecord"),
        (Warc, "a.warc"),
        (TextFiles, "a.txt"),
        (HtmlFiles, "a.html"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        os.mkfifo(folder / f"pipe_{name}")
        os.symlink(tmp_path / "nowhere", folder / f"broken_{name}")
        os.symlink("/etc/hostname", folder / f"link_{name}")
        (folder / f"folder_{name}").mkdir()
        docs, counts = run(kind(str(folder)))
        assert not docs
        found = {
            key.rpartition("dropped_")[2].removeprefix("file_"): n for key, n in counts.items()
        }
        assert (found["symlink"], found["not_a_file"]) == (2, 1)
        assert counts.get("files_in", counts.get("html_in")) == 3


def test_parquet_rows_that_hold_no_text_are_counted_by_row(tmp_path, caplog):
    column = pyarrow.array([b"good", b"\xff\xfe", b"", None, b"x" * 2000, b"a\n" * 600])
    text = column.cast(pyarrow.binary()).view(pyarrow.string())
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), out)
    other = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2]}), other)
    numbers = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), numbers)
    write(tmp_path, {"a.parquet": out.getvalue(), "b.parquet": other.getvalue()})
    write(tmp_path, {"c.parquet": numbers.getvalue()})
    with caplog.at_level(logging.WARNING):
        docs, counts = run(Parquet(str(tmp_path), limits=Limits(max_bytes=1500, max_line=100)))
    assert [doc.text for doc in docs] == ["good", "a\n" * 600] and balanced(counts)
    assert dropped(counts) == {
        **{"dropped_not_utf8": 1, "dropped_blank": 1, "dropped_too_large": 1},
        **{"dropped_no_text": 3, "dropped_file_no_text": 1},
    }
    assert "a.parquet:2: dropped_not_utf8" in caplog.text


def test_a_value_that_parquet_repeats_is_held_once(tmp_path):
    rows = pyarrow.array([0] * 3000, pyarrow.int32())
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(rows, ["x" * 15_000_000])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")  # 45 GB in less than 1 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    docs, counts = run(Parquet(str(tmp_path), limits=Limits(max_bytes=10**7)))
    assert not docs and counts["dropped_too_large"] == 3000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_array_records_count_the_damaged_one_and_may_be_text_alone(tmp_path):
    path = tmp_path / "a.arrayrecord"
    data = array_record(path, [f"text number {n}".encode() * 20 for n in range(3000)])
    path.write_bytes(data[:5000] + bytes(8) + data[5008:])
    docs, counts = run(ArrayRecords(str(tmp_path), fields=None))
    assert counts["dropped_damaged"] >= 1 and balanced(counts) and counts["records_in"] == 3000
    assert len(docs) >= 2990 and docs[-1].text == "text number 2999" * 20


def test_a_crawl_keeps_its_pages_and_counts_the_rest(tmp_path, caplog):
    page = b"<p>A page of the web."
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(page), page)
    html = "Content-Type: text/html"
    bomb = gzip.compress(bytes(30_000_000))
    records = [
        (warc_record(b"software: x", kind="warcinfo"), "not_a_page"),
        (warc_record(b"GET / HTTP/1.1\r\n\r\n", kind="request"), "not_a_page"),
        (warc_record(page), None),
        (warc_record(gzip.compress(page), head=f"{html}\r\nContent-Encoding: gzip"), None),
        (warc_record(zlib.compress(page), head=f"{html}\r\nContent-Encoding: deflate"), None),
        (warc_record(chunked, head=f"{html}\r\nTransfer-Encoding: chunked"), None),
        (warc_record(page, head=f"{html}\r\nContent-Encoding: zebra"), "other_encoding"),
        (warc_record(page, head=f"{html}\r\nContent-Encoding: gzip"), "damaged"),
        (warc_record(bomb, head=f"{html}\r\nContent-Encoding: gzip"), "too_large"),
        (warc_record(b"<p>" + LONG.encode()), "too_large"),
        (warc_record(page, status="404 Not Found"), "bad_status"),
        (warc_record(page, head="Content-Type: image/png"), "other_type"),
        (warc_record(b""), "no_text"),
        (warc_record(b"<div>" * 100_000), "too_deep"),
        (warc_record(bytes(range(256)) * 99), "mis_encoded"),
        (warc_record("<p>Ünïcode".encode("cp1252"), head=f"{html}; charset=windows-1252"), None),
        (warc_record("Text, schön".encode(), kind="conversion"), None),
        (warc_record(b"\xff\xfe\xfd", kind="conversion"), "not_utf8"),
    ]
    write(tmp_path, {"a.warc": b"".join(record for record, _ in records)})
    with caplog.at_level(logging.WARNING):
        docs, counts = run(Warc(str(tmp_path)))
    assert [doc.text for doc in docs] == [*["A page of the web."] * 4, "Ünïcode", "Text, schön"]
    assert docs[0].meta["url"] == "u" and docs[0].meta["date"] == "2024-05-06T07:08:09Z"
    assert balanced(counts) and counts["records_in"] == len(records)
    reasons = [why for _, why in records if why]
    assert dropped(counts) == {f"dropped_{why}": reasons.count(why) for why in reasons}
    for number, (_, why) in enumerate(records, 1):
        assert why is None or f"a.warc:{number}: dropped_{why}" in caplog.text


@pytest.mark.parametrize(
    "tail",
    [
        b"garbage\r\n\r\n" + warc_record(b"<p>lost"),
        warc_record(b"<p>x").replace(b"Content-Length: ", b"Content-Length: 99"),
        warc_record(b"<p>x").replace(b"Content-Length: ", b"Content-Length: -"),
        warc_record(b"<p>x").replace(b"Content-Length: ", b"Content-Length: 9999999999999999999"),
        warc_record(b"<p>x").replace(b"Content-Length", b"Content-Size"),
        warc_record(b"<p>x")[:-12],
        warc_record(b"<p>x")[:70],
        b"WARC/1.0\r\nA: " + b"x" * 10**6,
    ],
)
def test_a_crawl_that_breaks_off_keeps_what_came_before(tmp_path, tail):
    write(tmp_path, {"a.warc": warc(TEXTS) + tail, "b.warc": warc(TEXTS)})
    docs, counts = run(Warc(str(tmp_path)))
    assert [doc.id for doc in docs] == [f"{name}.warc:{n}" for name in "ab" for n in (1, 2, 3, 4)]
    assert balanced(counts) and counts["files_whole"] == 1


def test_text_files_refuse_what_a_tokenizer_would_choke_on(tmp_path, caplog):
    good = "fine\n" * 1000
    write(tmp_path, {"a.txt": good.encode(), "b.txt": b"short\n" + LONG.encode(), "c.txt": b""})
    write(tmp_path, {"d.txt": b"ok\nbad \xff", "e.txt": b"z" * 3_000_000})
    with caplog.at_level(logging.WARNING):
        docs, counts = run(TextFiles(str(tmp_path), max_bytes=60_000_000))
    assert [doc.text for doc in docs] == [good]
    assert counts["files_in"] == 5 == counts["documents"] + sum(dropped(counts).values())
    assert dropped(counts) == {
        **{"dropped_long_line": 2, "dropped_blank": 1, "dropped_not_utf8": 1},
    }
    assert "b.txt:2: dropped_long_line" in caplog.text
    assert "d.txt:2: dropped_not_utf8" in caplog.text
