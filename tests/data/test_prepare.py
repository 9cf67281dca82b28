"""Laws of preparing data: every text once, on one side of the split, found again by fingerprint."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import BestFit
from glm45_jax.data.prepare import Data, data_fingerprint, prepare, rows
from glm45_jax.data.quality import copies_of
from glm45_jax.data.sources import Doc, Docstrings, PydocTopics, PythonSources, TextFiles
from glm45_jax.tokenizer import train_bpe

VOCAB = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (root / f"{i:02d}.txt").write_text(
            f"text {i}: " + "the quick brown fox jumps " * (i % 7 + 1)
        )
    for i in range(5):
        (root / f"copy{i}.txt").write_text((root / f"{i:02d}.txt").read_text())
    (root / "rude.txt").write_text("an untrusted <|endoftext|> and /nothink in the middle")
    return root


@pytest.fixture(scope="module")
def data(folder):
    return Data(
        sources=((TextFiles(str(folder)), 0.5), (PydocTopics(), 0.5)),
        seq_len=32,
        vocab=VOCAB,
        val_fraction=0.2,
        bpe_chars=100_000,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prepared(data, cache):
    return prepare(data, cache)


def texts(tokenizer, store):
    """Every document of a store, decoded."""
    end = tokenizer.id_of("<|endoftext|>")
    found = []
    for start, stop in pairwise(store.offsets_N1.tolist()):
        ids = store.read(start, stop).tolist()
        assert ids[-1] == end and end not in ids[:-1]
        found.append(tokenizer.decode(ids[:-1]))
    return found


@pytest.mark.parametrize("name", ["files", "topics"])
def test_every_different_text_is_stored_once_on_one_side(data, prepared, name):
    source = next(source for source, _ in data.sources if source.name == name)
    train = texts(prepared.tokenizer, prepared.train[name])
    val = texts(prepared.tokenizer, prepared.val[name])
    assert train and val
    assert Counter(train + val) == Counter({doc.text for doc in source.docs()})


def test_the_report_counts_what_is_there(data, prepared):
    assert prepared.report["duplicates_dropped"]["files"] == 5
    for name, splits in prepared.report["sources"].items():
        for split, counts in splits.items():
            store = {"train": prepared.train, "val": prepared.val}[split][name]
            decoded = texts(prepared.tokenizer, store)
            assert counts["docs"] == len(decoded) == store.manifest.n_docs
            assert counts["chars"] == sum(map(len, decoded))
            assert counts["tokens"] == store.manifest.n_tokens


def test_a_second_call_opens_what_the_first_has_made(data, prepared, cache):
    def times():
        return {path: path.stat().st_mtime_ns for path in cache.rglob("*")}

    before = times()
    again = prepare(data, cache, verify=True)
    assert times() == before
    assert again.report == prepared.report
    assert again.train["files"].manifest == prepared.train["files"].manifest


def test_another_machine_prepares_the_same_stores(data, prepared, tmp_path):
    other = prepare(data, tmp_path)
    assert other.tokenizer.fingerprint == prepared.tokenizer.fingerprint
    for name in ("files", "topics"):
        for mine, theirs in ((prepared.train, other.train), (prepared.val, other.val)):
            assert mine[name].manifest.fingerprint == theirs[name].manifest.fingerprint


def test_only_what_changes_the_stores_changes_the_fingerprint(data, prepared, folder):
    same = replace(data, seq_len=64, packing=BestFit())
    same = replace(same, sources=tuple((source, 1.0) for source, _ in data.sources))
    assert data_fingerprint(same) == prepared.fingerprint
    for change in (
        {"vocab": VOCAB + 1},
        {"val_fraction": 0.3},
        {"max_docs": 10},
        {"bpe_chars": 5},
        {"seed": 1},
        {"sources": data.sources[:1]},
        {"sources": ((TextFiles(str(folder), pattern="0*.txt"), 0.5), data.sources[1])},
    ):
        assert data_fingerprint(replace(data, **change)) != prepared.fingerprint


def test_documents_of_one_group_land_on_one_side(tmp_path):
    include = {"include": ("site",), "packages": ("optax",)}
    sources = ((PythonSources(**include), 0.5), (Docstrings(**include), 0.5))
    data = Data(sources=sources, vocab=VOCAB, val_fraction=0.3, bpe_chars=50_000)
    found = prepare(data, tmp_path)
    code = {doc.text: doc.id for doc in PythonSources(**include).docs()}
    prose = {doc.text: doc.id for doc in Docstrings(**include).docs()}
    val_code = {code[text] for text in texts(found.tokenizer, found.val["python"])}
    val_prose = {prose[text] for text in texts(found.tokenizer, found.val["docstrings"])}
    train_code = {code[text] for text in texts(found.tokenizer, found.train["python"])}
    assert val_prose and val_prose <= val_code
    assert not val_code & train_code


def test_the_tokenizer_never_saw_the_validation_text(tmp_path, folder):
    marker = "zyxwvu"

    class Marked:
        """Plain text, with a word of its own in every validation document."""

        name = "marked"

        def __init__(self, in_val):
            self.in_val = in_val

        def __repr__(self):
            return f"Marked({len(self.in_val)})"

        def version(self):
            return "1"

        def docs(self):
            for i in range(40):
                text = f"document {i} " + "plain words again and again " * 9
                suffix = marker * 50 if str(i) in self.in_val else ""
                yield Doc(str(i), text + suffix, self.name, {"group": str(i)})

    data = Data(sources=((Marked(frozenset()), 1.0),), vocab=320, val_fraction=0.3)
    plain = prepare(data, tmp_path)
    in_val = {text.split()[1] for text in texts(plain.tokenizer, plain.val["marked"])}
    marked = prepare(replace(data, sources=((Marked(frozenset(in_val)), 1.0),)), tmp_path)
    assert any(marker in text for text in texts(marked.tokenizer, marked.val["marked"]))
    assert marker not in "".join(texts(marked.tokenizer, marked.train["marked"]))
    assert len(marked.tokenizer.encode(marker)) == len(marker)


def test_documents_are_not_written_in_the_order_of_their_names(prepared):
    order = [text.split(":")[0] for text in texts(prepared.tokenizer, prepared.train["files"])]
    assert order != sorted(order)


def test_a_given_tokenizer_is_used_as_it_is(data, tmp_path):
    mine = train_bpe([topic.text for topic in PydocTopics().docs()], VOCAB + 20)
    with pytest.raises(ValueError, match=r"the tokenizer has 420 ids, data\.vocab is 400; set"):
        prepare(data, tmp_path, tokenizer=mine)
    found = prepare(replace(data, vocab=VOCAB + 20), tmp_path, tokenizer=mine)
    assert found.tokenizer.fingerprint == mine.fingerprint
    assert found.train["topics"].manifest.tokenizer == mine.fingerprint


def test_prepared_rows_go_through_the_loader(data, prepared):
    for packing in (data.packing, BestFit()):
        mixture = rows(replace(data, packing=packing), prepared)
        loader = Loader(mixture, seed=0, span=lambda step: (8 * step, 8), fingerprint="f")
        batch = loader.batch(3)
        assert batch.tokens_BT.shape == (8, 32)
        assert 0 <= batch.tokens_BT.min() <= batch.tokens_BT.max() < VOCAB
    assert [weight for _, weight in rows(data, prepared, "val")] == [0.5, 0.5]


def test_a_truncated_store_or_a_swapped_tokenizer_is_refused(data, tmp_path):
    made = prepare(data, tmp_path)
    (home,) = tmp_path.iterdir()
    train_bpe([topic.text for topic in PydocTopics().docs()], VOCAB).save(home)
    with pytest.raises(
        ValueError, match=r"was written with tokenizer \w+, this one is \w+; prepare"
    ):
        prepare(data, tmp_path)
    made.tokenizer.save(home)
    prepare(data, tmp_path)
    chunk = home / "train" / "topics" / "tokens" / "c" / "0"
    whole = chunk.stat().st_size
    os.truncate(chunk, whole // 2)
    damage = f"damaged: tokens/c/0 has {whole // 2} bytes, the manifest {whole}"
    with pytest.raises(ValueError, match=damage):
        prepare(data, tmp_path)


def test_a_failed_preparation_leaves_no_folder_behind(data, tmp_path):
    with pytest.raises(ValueError, match="base tokens of the"):
        prepare(replace(data, vocab=40_000, bpe_chars=10_000), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_split_or_named_is_refused(folder, tmp_path):
    files = TextFiles(str(folder))
    with pytest.raises(ValueError, match=r"source names are \['files', 'files'\]"):
        Data(sources=((files, 1.0), (files, 1.0)))
    with pytest.raises(ValueError, match="source 'files' has 1 documents"):
        prepare(Data(sources=((files, 1.0),), max_docs=1), tmp_path)
    with pytest.raises(ValueError, match="val_fraction 0 is not between 0 and 1"):
        Data(sources=((files, 1.0),), val_fraction=0)


def test_preparing_needs_no_jax():
    script = (
        "import sys, glm45_jax.data.prepare, glm45_jax.data.ngram\n"
        "print([m for m in ('jax', 'flax', 'grain', 'tensorflow') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_the_report_is_on_disk_as_json(prepared, cache):
    files = list(cache.glob("data-*/report.json"))
    assert prepared.report in [json.loads(file.read_text()) for file in files]


def test_a_text_that_is_not_unicode_is_dropped_and_counted(data, prepared, tmp_path):
    class Surrogates:
        name = "surrogates"

        def version(self):
            return "1"

        def docs(self):
            for i in range(12):
                yield Doc(f"{i}", f"text {i} \ud800" if i < 2 else f"text {i}", self.name)

    odd = replace(data, sources=((Surrogates(), 1.0),))
    report = prepare(odd, tmp_path, tokenizer=prepared.tokenizer).report
    assert report["read"]["surrogates"]["lone_surrogates"] == 2
    assert sum(side["docs"] for side in report["sources"]["surrogates"].values()) == 10


@dataclass(frozen=True)
class Read:
    """A folder whose documents are read as often as the first letter of their name says."""

    root: str
    name: str = "read"

    def docs(self):
        for doc in TextFiles(self.root).docs():
            epochs = {"0": "0.0", "1": "0.5", "2": "1", "3": "2.5", "4": "3.3"}.get(doc.id[0], "1")
            yield replace(doc, source=self.name, meta={**doc.meta, "epochs": epochs})

    def version(self):
        return TextFiles(self.root).version()


def test_copies_share_a_side_and_validation_reads_a_text_once(folder, tmp_path):
    data = Data(((Read(str(folder)), 1.0),), seq_len=32, vocab=340, val_fraction=0.3)
    ready = prepare(data, tmp_path)
    train, val = (
        Counter(texts(ready.tokenizer, stores["read"])) for stores in (ready.train, ready.val)
    )
    expected = {doc.text: copies_of(doc) for doc in Read(str(folder)).docs()}
    assert not train.keys() & val.keys() and set(val.values()) == {1}
    assert train.keys() | val.keys() == {text for text, n in expected.items() if n}
    assert all(n == expected[text] for text, n in train.items()) and max(train.values()) >= 3
    counts = ready.report["sources"]["read"]
    assert counts["train"]["docs"] == sum(train.values())
    assert counts["train"]["copies"] == sum(train.values()) - len(train) > 0
    assert counts["val"]["copies"] == 0
    assert ready.report["epochs_dropped"]["read"] >= 10  # those of 0 epochs, some of one half


def test_without_epochs_the_stores_are_as_they_were(data, prepared):
    assert all(n == 0 for n in prepared.report["epochs_dropped"].values())
    assert all(
        counts["copies"] == 0
        for splits in prepared.report["sources"].values()
        for counts in splits.values()
    )
