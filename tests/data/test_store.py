"""Laws of the token store: what was written is what is read, and damage never passes."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.data.store import open_store, write_store

END = 99


def write(path, docs, vocab=100, chunk_tokens=16, **changes):
    fields = {"end": END, "tokenizer_fingerprint": "tok-a", "meta": {"source": "test"}} | changes
    return write_store(path, docs, vocab=vocab, chunk_tokens=chunk_tokens, **fields)


@pytest.fixture
def stored(tmp_path):
    docs = [list(range(i, i + 7)) for i in range(40)]
    write(tmp_path / "store", docs)
    return tmp_path / "store"


def largest_chunk(store):
    return max((store / "tokens" / "c").iterdir(), key=lambda file: int(file.name))


@settings(max_examples=25, deadline=None)
@given(
    docs=st.lists(st.lists(st.integers(0, 98), max_size=70), max_size=30),
    spans=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 50)), max_size=5),
)
def test_reading_gives_back_every_document_and_its_end(tmp_path_factory, docs, spans):
    path = tmp_path_factory.mktemp("law") / "store"
    manifest = write(path, iter(docs), chunk_tokens=1)  # many flushes of whole chunks
    store = open_store(path, verify=True)
    joined = np.array([token for doc in docs for token in (*doc, END)], np.int32)
    assert (manifest.n_docs, manifest.n_tokens) == (len(docs), len(joined))
    assert store.manifest == manifest
    everything = store.read(0, len(joined))
    assert everything.dtype == np.int32
    np.testing.assert_array_equal(everything, joined)
    for doc, start, stop in zip(docs, store.offsets_N1[:-1], store.offsets_N1[1:], strict=True):
        assert store.read(start, stop).tolist() == [*doc, END]
    starts = [start % (len(joined) + 1) for start, _ in spans]
    lengths = [min(n, len(joined) - start) for start, (_, n) in zip(starts, spans, strict=True)]
    for got, start, n in zip(store.read_spans(starts, lengths), starts, lengths, strict=True):
        np.testing.assert_array_equal(got, joined[start : start + n])


@pytest.mark.parametrize(("vocab", "dtype"), [(65535, "uint16"), (65536, "uint32")])
def test_ids_of_a_large_vocabulary_survive(tmp_path, vocab, dtype):
    docs = [[0, vocab - 1], [0] * 40]
    assert write(tmp_path / "s", docs, vocab=vocab).dtype == dtype
    store = open_store(tmp_path / "s", vocab=vocab)
    assert store.read(0, 3).tolist() == [0, vocab - 1, END]


def test_chunks_of_nothing_but_zeros_are_files_too(tmp_path):
    manifest = write(tmp_path / "s", [[0] * 64])
    assert sum(name.startswith("tokens/c/") for name in manifest.files) == 5


def test_a_truncated_chunk_is_refused_with_both_sizes(stored):
    chunk = largest_chunk(stored)
    os.truncate(chunk, 10)
    with pytest.raises(
        ValueError, match=r"damaged: tokens/c/\d+ has 10 bytes, the manifest 32; del"
    ):
        open_store(stored)


def test_a_missing_chunk_is_refused(stored):
    largest_chunk(stored).unlink()
    with pytest.raises(ValueError, match=r"damaged: tokens/c/\d+ is missing"):
        open_store(stored)


def test_changed_tokens_are_found_when_asked(stored):
    chunk = largest_chunk(stored)
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    open_store(stored)
    with pytest.raises(ValueError, match=r"damaged: tokens/c/\d+ has sha256 \w+, the manifest \w+"):
        open_store(stored, verify=True)


@pytest.mark.parametrize("field", ["n_tokens", "n_docs"])
def test_a_manifest_that_disagrees_with_the_offsets_is_refused(stored, field):
    file = stored / "manifest.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {field: fields[field] + 1}))
    with pytest.raises(ValueError, match=r"offsets\.npy ends at token 320 of 40 documents"):
        open_store(stored)


def test_a_broken_foreign_or_absent_manifest_is_refused(stored, tmp_path):
    with pytest.raises(ValueError, match=r"no token store at .*prepare the data again"):
        open_store(tmp_path / "nowhere")
    file = stored / "manifest.json"
    whole = file.read_text()
    file.write_text(whole[:40])
    with pytest.raises(ValueError, match=r"damaged: manifest\.json cannot be read"):
        open_store(stored)
    file.write_text(json.dumps(json.loads(whole) | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99, this code reads 1"):
        open_store(stored)


def test_a_store_of_another_vocabulary_or_tokenizer_is_refused_with_both_values(stored):
    open_store(stored, vocab=100, tokenizer_fingerprint="tok-a")
    with pytest.raises(ValueError, match="has vocab 100, expected 2048; prepare"):
        open_store(stored, vocab=2048)
    with pytest.raises(ValueError, match="with tokenizer tok-a, this one is tok-b; prepare"):
        open_store(stored, tokenizer_fingerprint="tok-b")


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def docs():
        yield [1, 2]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write(tmp_path / "s", docs())
    assert list(tmp_path.iterdir()) == []


def test_ids_outside_the_vocabulary_are_refused_before_anything_is_kept(tmp_path):
    with pytest.raises(ValueError, match=r"document 1 has ids 1\.\.100, vocab is 100"):
        write(tmp_path / "s", [[5], [1, 100]])
    with pytest.raises(ValueError, match="end id 99 is outside vocab 50"):
        write(tmp_path / "s", [[5]], vocab=50)
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_written_once(stored):
    with pytest.raises(ValueError, match="exists; a store is written once"):
        write(stored, [[1]])


def test_the_fingerprint_follows_the_content(tmp_path):
    a = write(tmp_path / "a", [[1, 2], [3]])
    assert write(tmp_path / "b", [[1, 2], [3]]).fingerprint == a.fingerprint
    assert write(tmp_path / "c", [[1, 2], [4]]).fingerprint != a.fingerprint
    assert write(tmp_path / "d", [[1, 2, 99], [3]]).fingerprint != a.fingerprint


def test_reading_past_the_end_is_refused(stored):
    store = open_store(stored)
    with pytest.raises(ValueError, match=r"tokens 319\.\.321 are not in .* which has 0\.\.320"):
        store.read(319, 321)
    with pytest.raises(ValueError, match="are not in"):
        store.read(-1, 3)
