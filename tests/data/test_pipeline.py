"""Laws of the pipeline: the same bytes twice, whatever kills it; no document is lost."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from glm45_jax import integrity
from glm45_jax.data.dedup import Deduplicated, Repeats
from glm45_jax.data.funnel import funnel
from glm45_jax.data.minhash import MinHash
from glm45_jax.data.outputs import Counts, read_manifest
from glm45_jax.data.pipeline import READ, Corpus, Line, build
from glm45_jax.data.prepare import Data, data_fingerprint, prepare
from glm45_jax.data.quality import Leveled, Quality, Thresholds, copies_of, repeated
from glm45_jax.data.rules import Filtered
from glm45_jax.data.scorers import Learned, Words
from glm45_jax.data.semdedup import SemDedup
from glm45_jax.data.sources import Doc
from glm45_jax.data.steps import HERE, Dedup, Each, Exact, Level, Long
from tests.data.corpora import (
    QUALITY,
    SLOW,
    SOURCES,
    Asks,
    Fragile,
    Inside,
    Killed,
    Lengthy,
    Listed,
    Made,
    Waits,
    corpus,
    docs_of,
    everything,
)

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A corpus built in one go, what was built, and all its bytes."""
    made = corpus(tmp_path_factory.mktemp("once"))
    return made, build(made), everything(made.folder)


def test_two_runs_write_the_same_bytes_and_a_third_writes_nothing(once, tmp_path):
    _, built, files = once
    other = build(corpus(tmp_path))
    assert other.digest == built.digest and other.made == built.made
    assert everything(tmp_path) == files
    assert build(corpus(tmp_path)).made == ()
    assert everything(tmp_path) == files
    assert len({shard.file for shard in built.steps["web", READ].shards}) > 6


def test_no_step_loses_a_document(once):
    made, built, _ = once
    for line in made.lines:
        left = None
        for name in line.names:
            manifest = built.steps[line.name, name]
            for source, counts in manifest.sources.items():
                gone = sum(counts.dropped.values())
                assert counts.docs_in == counts.docs_out + gone and not counts.added
                docs = docs_of(made.output(line.name, name, (source,)))
                assert len(docs) == counts.docs_out
                assert sum(len(doc.text) for doc in docs) == counts.chars_out
                if left is not None:
                    assert (counts.docs_in, counts.chars_in) == left[source]
            left = {s: (c.docs_out, c.chars_out) for s, c in manifest.sources.items()}
    dropped = Counter()
    for manifest in built.steps.values():
        for counts in manifest.sources.values():
            dropped.update(counts.dropped)
    assert "other" not in dropped
    assert dropped.keys() >= {"like_one_of_made", "short", "contaminated", "level"}
    with pytest.raises(ValueError, match="a document is lost"):
        Counts(docs_in=2, docs_out=1)


def test_steps_keep_what_the_wrappers_keep_however_the_shards_are_cut(once, tmp_path):
    made, _, _ = once
    rules = (Exact(), MinHash())
    for source in SOURCES:
        whole = Deduplicated(source, rules, SOURCES)
        assert docs_of(made.output("web", "minhash", (source.name,))) == docs_of(whole)
    leveled = Leveled(made.output("web", "decontaminate"), QUALITY)
    assert docs_of(made.output("web")) == docs_of(leveled)
    wide = corpus(tmp_path, shard_chars=10**9)
    build(wide)
    assert docs_of(wide.output("web")) == docs_of(made.output("web"))
    assert docs_of(wide.output("code")) == docs_of(made.output("code"))


def test_killed_between_any_two_writes_it_ends_with_the_same_bytes(once, tmp_path, monkeypatch):
    _, _, files = once
    left = [0]
    whole = os.replace

    def replace_or_die(*paths):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        whole(*paths)

    monkeypatch.setattr(integrity.os, "replace", replace_or_die)
    kills = 0
    for writes in range(1, 1000):  # each run gets one write further than its share
        left[0] = 1 + writes % 3
        try:
            build(corpus(tmp_path))
            break
        except Killed:
            kills += 1
    assert kills > 40
    assert everything(tmp_path) == files


def test_a_process_killed_by_a_signal_goes_on_at_the_shard_where_it_stood(once, tmp_path):
    _, built, files = once
    code = f"from tests.data.corpora import *; pipeline.build(corpus({str(tmp_path)!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {SLOW: "0.2"}
    )
    deadline = time.monotonic() + 60
    waits = tmp_path / "web" / "waits"
    while len(list(waits.glob("*-*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in waits.glob("*-*.json")}
    assert 2 <= len(before) < len(built.steps["web", "waits"].shards)
    resumed = build(corpus(tmp_path))
    assert ("web", "minhash") not in resumed.made and ("web", "waits") in resumed.made
    assert all((waits / name).stat().st_mtime_ns == when for name, when in before.items())
    assert everything(tmp_path) == files


def test_a_changed_threshold_makes_again_what_follows_and_nothing_else(tmp_path):
    build(corpus(tmp_path))
    changed = build(corpus(tmp_path, least=400))
    assert changed.made == (("web", "waits"), ("web", "decontaminate"), ("web", "level"))
    fresh = tmp_path / "fresh"
    build(corpus(fresh, least=400))
    names = {name for name in everything(tmp_path) if not name.startswith("fresh/")}
    assert {name: everything(tmp_path)[name] for name in names} == everything(fresh)
    other = replace(QUALITY, epochs=(0.0, 0.7, 3.5))
    assert build(corpus(tmp_path, least=400, quality=other)).made == (("web", "level"),)
    # A threshold that drops the same documents changes nothing behind it.
    assert build(corpus(tmp_path, least=401, quality=other)).made == (("web", "waits"),)


def test_a_damaged_shard_is_found_and_made_again_with_a_warning(once, tmp_path, caplog):
    _, _, files = once
    build(corpus(tmp_path))
    for name, spoil in (
        ("web/read/made-00001.jsonl.gz", lambda data: data[:40] + b"?" + data[41:]),
        ("web/minhash/other-00000.jsonl.gz", lambda data: data[:-3]),
        ("code/recall/learned-0.safetensors", lambda data: data[:-1] + b"?"),
        ("web/exact/manifest.json", lambda data: data[:30]),
    ):
        path = tmp_path / name
        path.write_bytes(spoil(path.read_bytes()))
        other = path.parent / "made-00000.jsonl.gz"
        kept = other.stat().st_mtime_ns if other.exists() else None
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            rebuilt = build(corpus(tmp_path))
        assert [record for record in caplog.records if str(path) in record.getMessage()]
        line, step, _ = name.split("/")
        assert rebuilt.made == ((line, step),)
        if name.endswith(".gz") and kept is not None:
            assert other.stat().st_mtime_ns == kept  # whole ones stay
        assert everything(tmp_path) == files


def test_a_missing_or_damaged_shard_is_refused_by_who_reads_it(tmp_path):
    made = corpus(tmp_path)
    with pytest.raises(ValueError, match="build this step"):
        docs_of(made.output("web"))
    build(made)
    victim = tmp_path / "web" / "level" / "made-00000.jsonl.gz"
    victim.write_bytes(b"\x1f\x8b" + victim.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"made-00000.*bytes"):
        docs_of(made.output("web"))


def test_bad_documents_are_counted_and_the_others_stay(tmp_path):
    good = tuple(Doc(f"{i}", f"text {i}", "x", {"number": str(i)}) for i in range(9))
    bad = (
        Doc("b0", " \n", "x"),
        Doc("b1", "half a pair \ud800", "x"),
        Doc("b2", "y" * 60_000, "x"),
        Doc("b3", None, "x"),  # type: ignore[arg-type]
        Doc("b4", "number", "x", {"n": 3}),  # type: ignore[dict-item]
        Doc("3", "again", "x"),
    )
    made = Corpus(
        str(tmp_path),
        (Line("l", (Listed((*good[:5], *bad, *good[5:])),), (Fragile("text 7"),)),),
        shard_chars=20,
        max_chars=50_000,
    )
    built = build(made)
    read = built.steps["l", READ].sources["listed"]
    assert read.dropped == {
        "blank": 1, "lone_surrogates": 1, "too_long": 1, "not_text": 1, "bad_meta": 1,
        "repeated_id": 1,
    }  # fmt: skip
    assert read.docs_in == 15 and docs_of(made.output("l", READ)) == list(good)
    assert built.steps["l", "fragile"].sources["listed"].dropped == {"error_ZeroDivisionError": 1}
    assert docs_of(made.output("l")) == [doc for doc in good if doc.id != "7"]


def test_a_step_that_fails_over_every_document_is_at_fault_itself(tmp_path):
    docs = Listed(tuple(Doc(f"{i}", "text", "x", {"number": str(i)}) for i in range(4)))
    with pytest.raises(ZeroDivisionError):
        build(Corpus(str(tmp_path), (Line("l", (docs,), (Fragile("text"),)),)))
    half = Listed((*docs.kept, *(Doc(f"{i}", "fine", "x", {"number": f"{i}"}) for i in (4, 5))))
    few = Corpus(str(tmp_path), (Line("l", (half,), (Fragile("text"),)),), max_errors=3)
    with pytest.raises(ZeroDivisionError):
        build(few)
    assert build(replace(few, max_errors=4)).steps["l", "fragile"].sources["listed"].docs_out == 2


def test_a_line_without_documents_passes_through_every_step(tmp_path):
    rules = (Exact(), MinHash(), SemDedup(), Repeats())
    steps = (*map(Dedup, rules), Level(QUALITY), Long())
    built = build(Corpus(str(tmp_path), (Line("l", (Listed(()),), steps),)))
    assert all(m.sources["listed"] == Counts(told=m.sources["listed"].told)
               for m in built.steps.values())  # fmt: skip


def test_what_a_step_learnt_is_kept_and_learnt_once(tmp_path):
    good, bad = Made("good", 13), Made("bad", 13)
    learned = Learned((good,), (bad,), Words(bits=10))
    quality = replace(QUALITY, scorers=(learned, Inside(learned), Lengthy()))
    steps = (Each("asks", Asks(HERE, learned)), Level(quality))
    made = Corpus(str(tmp_path), (Line("l", (Made(n=90),), steps),), shard_chars=3000)
    build(made)
    assert len(good.readings) == 1  # whatever the number of steps and shards
    files = everything(tmp_path)
    names = {"learned-scorers.json", "learned-0.safetensors"}
    assert read_manifest(tmp_path / "l" / "asks").files.keys() == names
    manifest = read_manifest(tmp_path / "l" / "level")
    assert manifest.files.keys() == names | {"learned.json"}
    asked = Asks(made.output("l", READ), learned)
    assert docs_of(made.output("l", "asks")) == docs_of(asked)
    leveled = Leveled(made.output("l", "asks"), quality)
    assert docs_of(made.output("l")) == docs_of(leveled)
    good.readings.clear()
    for step in ("asks", "level"):
        (tmp_path / "l" / step / manifest.shards[1].file).unlink()
    assert build(made).made == (("l", "asks"), ("l", "level"))
    assert not good.readings and everything(tmp_path) == files


def test_tiers_by_threshold_and_group_need_no_measuring(tmp_path):
    quality = Quality((Lengthy(),), Thresholds((0.2,)), (0.0, 2.0))
    made = Corpus(str(tmp_path), (Line("l", (Made(),), (Level((("", quality),)),)),), 3000)
    build(made)
    whole = Leveled(Made(), quality)
    assert docs_of(made.output("l")) == docs_of(whole)
    assert json.loads((tmp_path / "l/level/learned.json").read_bytes())["edges"] is None


def test_long_documents_are_read_more_often(tmp_path):
    made = Corpus(str(tmp_path), (Line("l", (Made(),), (Level(QUALITY), Long(500, 2.0, 1.0))),))
    build(made)
    before = {d.id: float(d.meta["epochs"]) for d in made.output("l", "level").docs()}
    for doc in made.output("l").docs():
        assert float(doc.meta["epochs"]) == before[doc.id] * (2 if len(doc.text) >= 500 else 1)


def test_prepare_reads_the_corpus_with_its_epochs_and_knows_it_by_its_documents(once, tmp_path):
    made, built, _ = once
    found = funnel(made, built)
    output = made.output("web")
    docs = docs_of(output)
    reads = sum(one.reads for one in found.classes if one.line == "web")
    assert reads == sum(map(copies_of, docs)) == len(repeated(docs)) > len(docs)
    data = Data(((output, 1.0),), vocab=300, bpe_chars=20_000)
    report = prepare(data, tmp_path).report["sources"]["web"]
    assert report["train"]["copies"] > 0 and report["val"]["copies"] == 0
    elsewhere = corpus(tmp_path / "elsewhere")
    build(elsewhere)
    same = replace(data, sources=((elsewhere.output("web"), 1.0),))
    assert data_fingerprint(same) == data_fingerprint(data)


def test_a_second_process_and_a_foreign_folder_are_refused(tmp_path):
    import fcntl

    made = corpus(tmp_path)
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process"):
            build(made)
    (tmp_path / "web" / READ).mkdir(parents=True)
    (tmp_path / "web" / READ / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="no pipeline wrote"):
        build(made)
    assert (tmp_path / "web" / READ / "thesis.tex").read_text() == "mine"


def test_a_source_that_changes_under_a_killed_run_is_refused(tmp_path, monkeypatch):
    line = Line("l", (Made(),))
    build(Corpus(str(tmp_path), (line,), 3000))
    folder = tmp_path / "l" / READ
    manifest = read_manifest(folder)
    (folder / "started.json").write_text(json.dumps({"key": manifest.key}))
    (folder / "manifest.json").unlink()
    changed = [replace(doc, text=doc.text + "!") for doc in Made().docs()]
    monkeypatch.setattr(Made, "docs", lambda self: iter(changed))
    with pytest.raises(ValueError, match="other documents before"):
        build(Corpus(str(tmp_path), (line,), 3000))


def test_what_cannot_be_a_line_is_refused():
    with pytest.raises(ValueError, match="all different"):
        Line("l", (Made(), Made()))
    with pytest.raises(ValueError, match="all different"):
        Line("l", (Made(),), (Waits(), Waits(3)))
    with pytest.raises(ValueError, match="names a file"):
        Line("l", (Made("a/b"),))
    with pytest.raises(ValueError, match="use Level"):
        Each("level", Leveled(HERE, QUALITY))
    with pytest.raises(ValueError, match="around HERE"):
        Each("rules", Filtered(Made()))
    with pytest.raises(ValueError, match="no 'wob'"):
        Corpus("x", (Line("web", (Made(),)),)).output("wob")
    with pytest.raises(ValueError, match="only a pipeline"):
        docs_of(HERE)
