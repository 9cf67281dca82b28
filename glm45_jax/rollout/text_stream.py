"""Token ids to text as they are drawn: whole characters only, and no further than a stop string.

Types to know: `TokenBytes`, what each id writes, and `TextStream`, one output under way.
"""

from __future__ import annotations

import codecs
from collections.abc import Container, Sequence

from glm45_jax.tokenizer import SPECIAL_TOKENS, Tokenizer

# Stands for a `<` that is part of a word: no text has this character, Unicode calls it none.
MARK = "\U0010ffff"
THINK_TAGS = ("<think>", "</think>")
TAGS = tuple(token.text for token in SPECIAL_TOKENS if not token.special)


class TokenBytes:
    """What each id of a tokenizer writes; a table that fills as ids come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._hidden: set[int] = set()
        self.think_tags = frozenset(tokenizer.id_of(tag) for tag in THINK_TAGS)
        self.tags = frozenset(tokenizer.id_of(tag) for tag in TAGS)

    def of(self, token: int) -> bytes:
        """Bytes of an id, a part of a character perhaps; none for a row of the model's table that
        is padding.
        """
        if token not in self._known:
            # The text of one id cannot say which bytes a cut character has; its word can.
            word = self._tokenizer.word_of(token)
            self._known[token] = b"" if word is None else _bytes(word)
            if word is not None and not self._tokenizer.decode([token], skip_special=True):
                self._hidden.add(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """An id for people; a cut character is U+FFFD."""
        return self.of(token).decode(errors="replace")

    def shown(self, token: int) -> bytes:
        """Bytes of an id in a text for readers: none of a special token."""
        found = self.of(token)
        return b"" if token in self._hidden else found


class TextStream:
    """The text of one output: `feed` every id, then `close`, unless `hit` says that a stop string
    has ended it.

    stops: strings before which the text ends. tags: the model says a tag by its id, so the `<` of
    any other id comes as `MARK`, and words that look like a tag are not read as one; None leaves
    every `<` as it is. length: characters read so far, told or held back.
    """

    def __init__(
        self,
        table: TokenBytes,
        *,
        stops: Sequence[str] = (),
        tags: Container[int] | None = None,
    ) -> None:
        self._table, self._stops, self._tags = table, tuple(stops), tags
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.hit = False
        self.length = 0

    def feed(self, token: int) -> str:
        """The text that is certain now and was not told before."""
        found = self._decoder.decode(self._table.shown(token))
        is_tag = self._tags is None or token in self._tags
        return self._told(found if is_tag else _marked(found))

    def close(self) -> str:
        """What was held back. An unfinished character becomes U+FFFD."""
        if self.hit:
            return ""
        told = self._told(self._decoder.decode(b"", final=True))
        rest, self._held = "" if self.hit else self._held, ""
        return told + rest

    def _told(self, text: str) -> str:
        self.length += len(text)
        if not self._stops:
            return text
        text = self._held + text
        plain = unmarked(text)
        # The one that ends first: what a longer stop string would have been does not matter then.
        ends = [(at + len(s), at) for s in self._stops if (at := plain.find(s)) >= 0]
        if ends:
            self.hit = True
            end = min(ends)[1]
        else:
            end = len(text) - max(_overlap(plain, stop) for stop in self._stops)
        self._held = text[end:]
        return text[:end]


def _marked(text: str) -> str:
    return text.replace(MARK, "\ufffd").replace("<", MARK)


def unmarked(text: str) -> str:
    """The text as the model wrote it."""
    return text.replace(MARK, "<") if MARK in text else text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may be the beginning of a stop string."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, and its byte: itself
    where it prints, else the next from U+0100 on.
    """
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    prints += range(ord("®"), ord("ÿ") + 1)
    rest = [byte for byte in range(256) if byte not in prints]
    return {chr(b): b for b in prints} | {chr(256 + n): b for n, b in enumerate(rest)}


_BYTE_OF = _byte_characters()


def _bytes(word: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in word)
    except KeyError:  # an added token is written as it is
        return word.encode()
