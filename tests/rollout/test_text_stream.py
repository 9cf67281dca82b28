"""Ids to text as they come: the pieces are the text, and a stop string ends it at one place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.rollout.text_stream import MARK, TextStream, TokenBytes, unmarked
from tests.rollout.serving import VOCAB, ids_of, tokenizer

IDS = st.lists(st.integers(0, VOCAB - 1), max_size=40)
# Bytes of 日 and é, whole and cut, tags and special tokens among ordinary ids.
KNOTTY = [*ids_of("日é"), *ids_of("日é")[:2], *ids_of("<think></tool_call><|user|>/nothink<a")]
MIXED = st.lists(st.sampled_from(KNOTTY) | st.integers(0, VOCAB - 1), max_size=40)


@pytest.fixture(scope="module")
def table():
    return TokenBytes(tokenizer())


def read(table, ids, **how):
    """The pieces of a stream, its close last, and the stream."""
    stream, pieces = TextStream(table, **how), []
    for token in ids:
        pieces.append(stream.feed(token))
        if stream.hit:
            break
    return [*pieces, stream.close()], stream


@settings(max_examples=300)
@given(ids=IDS | MIXED)
def test_the_pieces_joined_are_the_decoded_text(table, ids):
    pieces, stream = read(table, ids)
    text = tokenizer().decode(ids, skip_special=True)
    assert "".join(pieces) == text and stream.length == len(text)


@settings(max_examples=300)
@given(ids=MIXED)
def test_marks_change_nothing_but_which_lesser_sign_is_of_a_tag(table, ids):
    pieces, _ = read(table, ids, tags=table.tags)
    marked, plain = "".join(pieces), "".join(read(table, ids)[0])
    assert unmarked(marked) == plain
    tags = sum(token in table.tags for token in ids)
    assert marked.count("<") == tags and marked.count(MARK) == plain.count("<") - tags


def test_a_character_is_told_when_it_is_whole(table):
    ids = tokenizer().encode("a日")
    assert len(ids) == 4, "the tokenizer of these tests has no token for it"
    assert read(table, ids)[0] == ["a", "", "", "日", ""]
    assert read(table, ids[:3])[0] == ["a", "", "", "\ufffd"]


def until_stop(text, stops):
    """The text before the stop string that ends first, looked for in every beginning of it."""
    for end in range(len(text) + 1):
        if starts := [end - len(stop) for stop in stops if text[:end].endswith(stop)]:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=400)
@given(
    text=st.text("ab<>日", max_size=24),
    stops=st.lists(st.text("ab<日", min_size=1, max_size=4), min_size=1, max_size=3),
    tags=st.booleans(),
)
def test_a_text_ends_before_the_stop_string_that_is_whole_first(table, text, stops, tags):
    how = {"tags": table.tags} if tags else {}
    pieces, stream = read(table, tokenizer().encode(text), stops=stops, **how)
    assert (unmarked("".join(pieces)), stream.hit) == until_stop(text, stops)


def test_what_may_be_a_stop_string_is_held_back_and_nothing_else(table):
    ids = [tokenizer().id_of(character) for character in "xabxabc!"]
    assert read(table, ids[:-2], stops=["abcd"])[0] == ["x", "", "", "abx", "", "", "ab"]
    assert read(table, ids, stops=["abc"])[0] == ["x", "", "", "abx", "", "", "", ""]


def test_a_tag_may_be_a_stop_string(table):
    pieces, stream = read(table, ids_of("<think>a</think>b"), stops=["</think>"], tags=table.tags)
    assert "".join(pieces) == "<think>a" and stream.hit


def test_a_row_of_the_table_that_is_padding_writes_nothing(table):
    ids = [*tokenizer().encode("a"), VOCAB + 3, *tokenizer().encode("b")]
    assert "".join(read(table, ids)[0]) == "ab" and table.of(VOCAB + 3) == b""
