"""Texts as hashes of their words and of their word n-grams: what MinHash, decontamination and the
lexical embedding look at. Vectorised over the bytes of many documents; no loop over words.

A word is a run of ASCII letters, digits, `_` and of other scripts' characters, ASCII case folded.
Every character from U+3000 on (Chinese, Japanese, Korean) is a word of its own, since most of those
scripts part no words. ASCII punctuation, U+0080 to U+00BF, U+2000 to U+2BFF and U+3000 to U+303F
stand between words.
Letters: `N` texts, `W` words, `G` n-grams, `C` bytes; `start_N1` bounds each text's part of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

SHINGLES_FORMAT = 1  # raise it when the same text gives other hashes

_PIECE_BYTES = 1 << 16  # hashed at once: temporaries stay in the second-level cache
_PIECE_WORDS = 1 << 16
_WORD_BASE = 0x9E3779B97F4A7C15  # odd, so that powers have inverses modulo 2**64
_NGRAM_BASE = 0xD1B54A32D192ED03
_FOLD = bytes(
    0
    if c < 128 and not (chr(c).isalnum() or chr(c) == "_")
    else ord(chr(c).lower())
    if c < 128
    else c
    for c in range(256)
)


class Hashes(NamedTuple):
    """One hash a word or n-gram, uint64; text n has those from start_N1[n] to start_N1[n + 1]."""

    hash_W: np.ndarray
    start_N1: np.ndarray  # int64

    def lengths(self) -> np.ndarray:
        """How many each text has, int64 [N]."""
        return np.diff(self.start_N1)


def encoded(text: str) -> bytes:
    """The bytes that are hashed; lone surrogates pass as the three bytes they would have."""
    return text.encode("utf-8", "surrogatepass")


def hash_words(texts: Sequence[str]) -> Hashes:
    """A hash of every word of every text; the same word has the same hash in any text."""
    owners, pieces = [], []
    for at, text in enumerate(texts):
        for piece in _pieces(encoded(text)):
            owners.append(at)
            pieces.append(piece)
    found, count_N = [np.zeros(0, np.uint64)], np.zeros(len(texts), np.int64)
    for first, last in _groups([len(piece) for piece in pieces]):
        joined = b"\n".join(pieces[first:last])
        hash_W, begin_W, _ = _hash_piece(joined)
        ends = np.cumsum([len(piece) + 1 for piece in pieces[first:last]])
        of_W = np.asarray(owners[first:last])[np.searchsorted(ends, begin_W, "right")]
        count_N += np.bincount(of_W, minlength=len(texts))
        found.append(hash_W)
    return Hashes(np.concatenate(found), np.concatenate(([0], np.cumsum(count_N))))


def word_spans(text: str) -> np.ndarray:
    """Where the words of a text stand in `encoded(text)`: int64 [W, 2], begin and end in bytes."""
    spans, at = [np.zeros((0, 2), np.int64)], 0
    for piece in _pieces(encoded(text)):
        _, begin_W, end_W = _hash_piece(piece)
        spans.append(at + np.stack([begin_W, end_W], axis=1))
        at += len(piece)
    return np.concatenate(spans)


def hash_ngrams(words: Hashes, n: int, *, whole_if_short: bool) -> Hashes:
    """A hash of every run of n words within a text, in order, repeats included.

    A text of fewer than n words (but at least one) has one n-gram, of all its words, if
    whole_if_short; else none.
    """
    hash_W, start_N1 = words
    length_N = words.lengths()
    count_N = np.maximum(length_N - n + 1, 0)
    if whole_if_short:
        count_N = np.where(length_N > 0, np.maximum(count_N, 1), 0)
    out_N1 = np.concatenate(([0], np.cumsum(count_N)))
    # The word at which each n-gram begins, and the end of its text.
    begin_G = np.arange(out_N1[-1]) + np.repeat(start_N1[:-1] - out_N1[:-1], count_N)
    end_G = np.minimum(begin_G + n, np.repeat(start_N1[1:], count_N))
    hash_G = np.empty(len(begin_G), np.uint64)
    for low in range(0, len(begin_G), _PIECE_WORDS):
        begin, end = begin_G[low : low + _PIECE_WORDS], end_G[low : low + _PIECE_WORDS]
        for part in _near(begin):
            hash_G[low:][part] = _hash_runs(hash_W, begin[part], end[part])
    return Hashes(hash_G, out_N1)


def mix(x: np.ndarray) -> np.ndarray:
    """Each uint64 scrambled so that all its bits depend on all of x's (a bijection).

    Source: Stafford's variant 13 of the MurmurHash3 finaliser, as in SplitMix64.
    """
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draws(seed: int, n: int) -> np.ndarray:
    """n uint64 that depend on the seed alone, on any version of NumPy."""
    first = mix(np.array([seed % 2**64], np.uint64))
    return mix(first + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_WORD_BASE))


def in_batches[T](
    items: Iterable[tuple[T, str]], chars: int
) -> Iterator[tuple[list[T], list[str]]]:
    """(things, their texts) in lists of at most `chars` characters, or of one longer text."""
    things: list[T] = []
    texts: list[str] = []
    size = 0
    for thing, text in items:
        if texts and size + len(text) > chars:
            yield things, texts
            things, texts, size = [], [], 0
        things.append(thing)
        texts.append(text)
        size += len(text)
    if texts:
        yield things, texts


def _pieces(data: bytes) -> Iterator[bytes]:
    """Parts that join to `data`, cut after white space; inside a word only where it is too long."""
    begin = 0
    while len(data) - begin > _PIECE_BYTES:
        limit = begin + _PIECE_BYTES
        end = 1 + max(data.rfind(b" ", begin, limit), data.rfind(b"\n", begin, limit))
        if end <= begin:
            end = limit
            while end > limit - 4 and data[end] & 0xC0 == 0x80:  # not inside a character
                end -= 1
        yield data[begin:end]
        begin = end
    yield data[begin:]


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of pieces that fit, joined by one byte, into _PIECE_BYTES (and one byte)."""
    first, total = 0, 0
    for at, size in enumerate(sizes):
        if at > first and total + size > _PIECE_BYTES:
            yield first, at
            first, total = at, 0
        total += size + 1
    if sizes:
        yield first, len(sizes)


def _near(begin_G: np.ndarray) -> Iterator[slice]:
    """Parts of a rising array whose values span few words (texts without n-grams leave gaps)."""
    low = 0
    while low < len(begin_G):
        high = int(np.searchsorted(begin_G, begin_G[low] + _PIECE_WORDS))
        yield slice(low, high)
        low = high


def _hash_runs(hash_W: np.ndarray, begin_G: np.ndarray, end_G: np.ndarray) -> np.ndarray:
    """Polynomial hashes of hash_W[begin:end] from sums of prefixes: no cost for longer runs."""
    first = begin_G[0]
    part_W = hash_W[first : end_G.max()]
    up_W, down_W = _powers(_NGRAM_BASE)
    sum_W1 = np.zeros(len(part_W) + 1, np.uint64)
    np.cumsum(part_W * up_W[: len(part_W)], out=sum_W1[1:])
    begin_G, end_G = begin_G - first, end_G - first
    return mix((sum_W1[end_G] - sum_W1[begin_G]) * down_W[begin_G])


def _hash_piece(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hash, first byte and end of each word."""
    folded = data.translate(_FOLD)
    value_C = np.frombuffer(folded, np.uint8)
    begin_W, end_W = _bounds(value_C) if data.isascii() else _bounds_of_scripts(value_C)
    up_C, down_C = _powers(_WORD_BASE)
    term_C = np.multiply(value_C, up_C[: len(value_C)], dtype=np.uint64)
    sum_C = np.cumsum(term_C)
    sum_W = sum_C[end_W - 1] - sum_C[begin_W] + term_C[begin_W]
    # One letter is its code times the base: no word is a small number.
    return sum_W * down_C[begin_W] * np.uint64(_WORD_BASE), begin_W, end_W


def _bounds(value_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = np.zeros(len(value_C) + 2, np.bool_)
    np.not_equal(value_C, 0, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return edges[::2], edges[1::2]


def _bounds_of_scripts(value_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_bounds`, for UTF-8 beyond ASCII."""
    after_C = np.append(value_C[1:], np.uint8(0))
    mark = value_C == 0xC2  # U+0080 to U+00BF
    mark_long = (value_C == 0xE2) & (after_C < 0xB0) | (value_C == 0xE3) & (after_C == 0x80)
    wide = value_C >= 0xE3  # lead bytes from U+3000 on
    inside = np.zeros(len(value_C) + 2, np.bool_)
    inside[1:-1] = (value_C != 0) & ~_spread(mark | mark_long, 2) & ~_spread(mark_long, 3)
    in_wide = np.zeros(len(value_C) + 2, np.bool_)
    in_wide[1:-1] = _spread(wide, 3) | _spread(value_C >= 0xF0, 4)
    new = np.zeros(len(value_C) + 1, np.bool_)  # a word begins here, even right after another
    new[:-1] = wide
    new |= in_wide[:-1] & ~in_wide[1:]
    begins = inside[1:] & (~inside[:-1] | new)
    ends = inside[:-1] & (~inside[1:] | new)
    return np.flatnonzero(begins), np.flatnonzero(ends)


def _spread(at_C: np.ndarray, n: int) -> np.ndarray:
    """True for n places from each true one on."""
    found = at_C.copy()
    for shift in range(1, n):
        found[shift:] |= at_C[:-shift]
    return found


@cache
def _powers(base: int) -> tuple[np.ndarray, np.ndarray]:
    """base**i and its inverse modulo 2**64, i from 0; read only."""
    found = []
    for factor in (base, pow(base, -1, 2**64)):
        power_C = np.full(2 * _PIECE_BYTES, factor, np.uint64)
        power_C[0] = 1
        np.multiply.accumulate(power_C, out=power_C)
        power_C.setflags(write=False)
        found.append(power_C)
    return found[0], found[1]
