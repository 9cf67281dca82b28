"""Laws of hashed words: the words are those of the definition, and equal hashes are equal runs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.data import shingles
from glm45_jax.data.shingles import draws, encoded, hash_ngrams, hash_words, in_batches, word_spans

ALPHABET = "aBz_09 .\n\0é\xa0«—…、。中文字ひ한😀\ud800\u2c00\u2fff"
TEXTS = st.lists(st.text(st.sampled_from(ALPHABET), max_size=30), max_size=6)


def is_word(char):
    code = ord(char)
    if code < 0x80:
        return char.isalnum() or char == "_"
    return not (code < 0xC0 or 0x2000 <= code < 0x2C00 or 0x3000 <= code < 0x3040)


def plain_words(text):
    """The words of a text by the definition, one character after the other."""
    found, open_run = [], False
    for char in text:
        if not is_word(char):
            open_run = False
        elif ord(char) >= 0x3000:
            found.append(char)
            open_run = False
        else:
            folded = char.lower() if ord(char) < 0x80 else char
            found[-1:] = [found[-1] + folded] if open_run else [*found[-1:], folded]
            open_run = True
    return found


def spelt(hashes, words_of):
    """The word behind each hash; fails where one hash stands for two words, or two for one."""
    word_of = {}
    for at, words in enumerate(words_of):
        own = hashes.hash_W[hashes.start_N1[at] : hashes.start_N1[at + 1]].tolist()
        assert len(own) == len(words)
        for h, word in zip(own, words, strict=True):
            assert word_of.setdefault(h, word) == word
    assert len(set(word_of.values())) == len(word_of)
    return word_of


@given(TEXTS)
def test_words_are_those_of_the_definition_with_one_hash_each(texts):
    spelt(hash_words(texts), [plain_words(text) for text in texts])
    for text in texts:
        data = encoded(text)
        found = [data[a:b].decode("utf-8", "surrogatepass") for a, b in word_spans(text).tolist()]
        assert [plain_words(word) for word in found] == [[word] for word in plain_words(text)]


@given(TEXTS, st.integers(1, 4))
def test_ngrams_are_runs_of_words_within_a_text(texts, n):
    words = [plain_words(text) for text in texts]
    runs = [[tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in words]
    hashes = hash_words(texts)
    spelt(hash_ngrams(hashes, n, whole_if_short=False), runs)
    wholes = [found or ([tuple(w)] if w else []) for found, w in zip(runs, words, strict=True)]
    spelt(hash_ngrams(hashes, n, whole_if_short=True), wholes)


@pytest.mark.parametrize("size", [32, 100])
def test_neighbours_and_pieces_change_no_hash(monkeypatch, size):
    texts = ["one Two, three " * 40, "", "中文" * 60, "é" * 200 + " end", "short"]
    whole = [hash_words([text]).hash_W.tolist() for text in texts]
    together = hash_words(texts)
    assert [part.tolist() for part in np.split(together.hash_W, together.start_N1[1:-1])] == whole
    grams = hash_ngrams(together, 5, whole_if_short=True).hash_W
    monkeypatch.setattr(shingles, "_PIECE_WORDS", size)
    assert np.array_equal(hash_ngrams(together, 5, whole_if_short=True).hash_W, grams)
    monkeypatch.setattr(shingles, "_PIECE_BYTES", size)
    cut = [hash_words([text]).hash_W.tolist() for text in texts]
    assert [cut[at] == whole[at] for at in range(5)] == [True, True, True, False, True]
    assert np.array_equal(
        hash_words(texts).hash_W, np.concatenate([np.uint64(part) for part in cut])
    )


def test_hashes_look_random():
    hash_W = hash_words([" ".join(f"{i:x}" for i in range(50_000))]).hash_W
    mixed = hash_ngrams(hash_words([" ".join(map(str, range(50_000)))]), 2, whole_if_short=False)
    assert len(np.unique(hash_W)) == 50_000
    for bits in (mixed.hash_W, draws(3, 50_000)):
        ones = ((bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(axis=0)
        assert np.abs(ones - 0.5).max() < 5 * 0.5 / 50_000**0.5


@given(st.lists(st.text("ab", max_size=9), max_size=12))
def test_batches_hold_every_text_once_in_order_and_few_characters(texts):
    batches = list(in_batches(enumerate(texts), 10))
    assert [t for _, part in batches for t in part] == texts
    assert [at for places, _ in batches for at in places] == list(range(len(texts)))
    assert all(len(part) == 1 or sum(map(len, part)) <= 10 for _, part in batches)
