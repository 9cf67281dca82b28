"""Laws of the chat format: the released texts exactly, reading = writing, streams, masks."""

import argparse
import inspect
import itertools
import json
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax import chat
from glm45_jax.tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe

GOLDEN = Path(__file__).parent / "golden" / "extra"
TEMPLATE = json.loads((GOLDEN / "chat_template.json").read_text(encoding="utf-8"))["cases"]
PARSE = json.loads((GOLDEN / "tool_parse.json").read_text(encoding="utf-8"))
BOTH = pytest.mark.parametrize("family", ["glm-4.5", "glm-4.7"])
TAGS = [token.text for token in SPECIAL_TOKENS if not token.special]
USER = {"role": "user", "content": "hi"}


def tool(**properties) -> dict:
    return {"name": "f", "parameters": {"type": "object", "properties": properties}}


def call(name: str = "f", **arguments) -> dict:
    return {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}


def written(message: dict, family: str) -> str:
    """What the model writes for this message, after `<|assistant|>`."""
    text = chat.render([USER, message], family=family, add_generation_prompt=False)
    return text.partition("<|assistant|>")[2]


def as_published(parsed: chat.Parsed) -> dict:
    """In the form of the publisher's parser."""
    parts = {"reasoning_content": parsed.reasoning, "content": parsed.content}
    parts |= {"tool_calls": parsed.tool_calls}
    return {"role": "assistant"} | {name: part for name, part in parts.items() if part}


def in_pieces(text: str, cuts, **how) -> list[chat.Delta]:
    """The deltas of a stream fed with the text cut at these places."""
    stream, deltas = chat.Stream(**how), []
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(places):
        deltas += stream.feed(text[start:end])
    return deltas + stream.close()


# Reference texts


@pytest.mark.parametrize("case", TEMPLATE, ids=lambda case: f"{case['family']}-{case['name']}")
def test_a_rendered_request_is_the_released_template_character_for_character(case):
    assert chat.render(**case["request"], family=case["family"]) == case["text"]


@pytest.mark.parametrize("case", PARSE["cases"], ids=lambda case: case["name"])
def test_a_parsed_text_is_what_the_publishers_parser_makes_of_it(case):
    assert as_published(chat.parse(case["text"], tools=PARSE["tools"])) == case["parsed"]


@pytest.mark.parametrize("case", PARSE["cases"], ids=lambda case: case["name"])
def test_the_two_readings_agree_where_reasoning_ends_once_and_strings_are_bare(case):
    if case["name"] in ("think_tag_in_answer", "string_spaces", "two_calls"):
        pytest.skip("the cases on which they are meant to differ")
    how = {"tools": PARSE["tools"], "reading": chat.STREAMED}
    assert as_published(chat.parse(case["text"], **how)) == case["parsed"]


# Reading and writing

words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
strings = st.lists(
    st.one_of(
        words,
        st.sampled_from([*TAGS, "<|user|>", "\n", "  ", "if a < b:\n\treturn '\\n'", '{"a": 1}']),
    ),
    max_size=6,
).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner | strings, max_size=3)
        | st.dictionaries(strings, inner | strings, max_size=3)
    ),
    max_leaves=8,
)
ENDS_VALUE = re.compile(r"</arg_value>\s*(<arg_key>|</tool_call>)")
keys = st.from_regex(r"[a-z_]{1,8}|[à-ü]{1,3}|日本", fullmatch=True)


@st.composite
def answers(draw) -> tuple[dict, list[dict]]:
    """An assistant message that the format can hold, and tools for its calls."""
    name = draw(st.sampled_from(["f", "browser.open", "计算"]))
    texts = draw(st.dictionaries(keys, strings, max_size=3))
    others = draw(st.dictionaries(keys.map("o_".__add__), values, max_size=3))
    kinds = {key: {"type": "string"} for key in texts}
    content = draw(strings).replace("<tool_call>", "").strip()
    reasoning = draw(strings).replace("</think>", "").strip()
    message: dict = {"role": "assistant"} | ({"content": content} if content else {})
    if reasoning or "</think>" in content:
        message["reasoning_content"] = reasoning
    if count := draw(st.integers(0, 2)):
        message["tool_calls"] = [{"name": name, "arguments": texts | others}] * count
    return message, [{"name": name, "parameters": {"properties": kinds}}]


def ends_inside(message: dict) -> bool:
    """Whether some argument holds the one thing that the format cannot."""
    arguments = [each["arguments"] for each in message.get("tool_calls", ())]
    written_values = [
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for each in arguments
        for value in each.values()
    ]
    return any(ENDS_VALUE.search(value) for value in written_values)


@BOTH
@settings(max_examples=150)
@given(answer=answers(), cuts=st.lists(st.integers(0, 10**6), max_size=12))
def test_what_is_rendered_is_parsed_back_and_streamed_back(family, answer, cuts):
    message, tools = answer
    text = written(message, family)
    how = {"tools": tools, "family": family, "reading": chat.STREAMED}
    parsed = chat.parse(text, **how)
    if not ends_inside(message):
        assert parsed.message() == message
        assert not parsed.dropped
    assert chat.joined(in_pieces(text, cuts, **how)) == parsed


INSIDE = """</tool_call>|a</tool_call><tool_call>g|</arg_value>|x</arg_value> x|</think>|<arg_key>
</arg_key><arg_value>|<arg_key>k</arg_key>|</arg_value></arg_value>|  pad\t """.split("|")


@BOTH
@pytest.mark.parametrize("value", INSIDE)
def test_every_tag_may_stand_inside_a_string(family, value):
    message = call(s=value, t="next")
    tools = [tool(s={"type": "string"}, t={"type": "string"})]
    how = {"tools": tools, "family": family}
    text = written(message, family)
    assert chat.parse(text, **how, reading=chat.STREAMED).message() == message
    stripped = call(s=value.strip(), t="next")
    assert chat.parse(text, **how).message() == stripped


@BOTH
@pytest.mark.parametrize("follower", ["<arg_key>", "</tool_call>", "\n  </tool_call>"])
def test_a_value_ends_where_a_value_end_and_the_next_tag_stand_inside_it(family, follower):
    # The format has no escaping: this text is also that of a call whose value is `x`.
    message = call(s=f"x</arg_value>{follower}y")
    parsed = chat.parse(written(message, family), tools=[tool(s={"type": "string"})])
    assert parsed.tool_calls == call(s="x")["tool_calls"]


# Streams


OPEN_VALUE = "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>"
PIECES = ["\n", " ", "f", "f\n", "s", "n", "12", '{"a', "日本", "<", "</", "<arg_"]
fragments = st.sampled_from([*TAGS[:10], *PIECES, OPEN_VALUE, "</arg_value>\n</tool_call>"])


@settings(max_examples=400)
@given(
    text=st.lists(fragments, max_size=14).map("".join),
    cuts=st.lists(st.integers(0, 10**6), max_size=30),
    family=st.sampled_from(["glm-4.5", "glm-4.7"]),
    in_think=st.sampled_from([None, False, True]),
    reading=st.sampled_from([chat.PUBLISHED, chat.STREAMED]),
)
def test_a_stream_tells_what_parse_tells_however_it_is_cut(text, cuts, family, in_think, reading):
    how = {"tools": PARSE["tools"], "family": family, "in_think": in_think, "reading": reading}
    whole = chat.parse(text, **how)
    assert chat.joined(in_pieces(text, cuts, **how)) == whole
    assert chat.joined(in_pieces(text, range(len(text)), **how)) == whole


@BOTH
def test_every_part_is_told_as_soon_as_it_is_certain(family):
    stream = chat.Stream(tools=[tool(s={"type": "string"}, n={"type": "integer"})], family=family)
    assert stream.feed("<think>because ") == [chat.Delta(reasoning="because")]
    assert stream.feed("of</th") == [chat.Delta(reasoning=" of")]
    assert stream.feed("ink>\nYes") == [chat.Delta(content="Yes")]
    assert stream.feed(", so<tool") == [chat.Delta(content=", so")]
    assert stream.feed("_call>f") == []
    assert stream.feed("\n") == [chat.Delta(call=0, name="f")]
    told = stream.feed('<arg_key>s</arg_key>\n<arg_value>a\n"b</arg')
    assert "".join(delta.arguments for delta in told) == '{"s": "a\\n\\"b'
    told = stream.feed("_value>\n<arg_key>n</arg_key><arg_value>1")
    assert "".join(delta.arguments for delta in told) == '", "n": '
    told = stream.feed("2</arg_value></tool_call>")
    assert "".join(delta.arguments for delta in told) == "12}"
    assert stream.close() == stream.close() == []
    with pytest.raises(ValueError, match="1 characters after the close"):
        stream.feed("x")


def test_a_name_may_stand_on_the_line_after_the_tag():
    text = "<tool_call>\n \nf\n</tool_call>"
    assert chat.joined(in_pieces(text, range(len(text)))).message() == call()


def test_a_call_that_never_ends_is_taken_back():
    text = "ok<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>half"
    stream = chat.Stream(tools=[tool(s={"type": "string"})])
    assert stream.feed(text)[-1].arguments == "half"
    assert stream.close() == [chat.Delta(call=0, dropped=text.removeprefix("ok"))]


def test_what_is_no_call_is_kept_apart_and_never_raises():
    parsed = chat.parse("a<tool_call>\n</tool_call> b <tool_call>f\n</tool_call> c <tool_call>g")
    assert parsed.content == "a"
    assert parsed.tool_calls == [{"name": "f", "arguments": {}}]
    assert parsed.dropped == "<tool_call>\n</tool_call>" + "b" + "c" + "<tool_call>g"


def test_a_value_without_an_end_costs_its_argument_and_not_the_calls_after_it():
    text = (
        "<tool_call>f\n<arg_key>n</arg_key><arg_value>1</arg_value><arg_key>s</arg_key><arg_value>x"
        "</tool_call><tool_call>g\n</tool_call>"
    )
    parsed = chat.parse(text, tools=[tool(s={"type": "string"})])
    assert parsed.tool_calls == [call(n=1)["tool_calls"][0], call("g")["tool_calls"][0]]
    assert parsed.dropped == "<arg_value>x"


# Reasoning


@pytest.mark.parametrize(
    ("in_think", "text", "reasoning", "content"),
    [
        (True, "why</think>yes", "why", "yes"),
        (True, "still going", "still going", ""),
        (True, "<think>why</think>yes", "why", "yes"),
        (False, "no thought", "", "no thought"),
        (None, "why</think>yes", "why", "yes"),
        (None, "</think>yes", "", "yes"),
        (None, "no thought", "", "no thought"),
    ],
)
def test_reasoning_that_the_prompt_opened_is_reasoning(in_think, text, reasoning, content):
    parsed = chat.parse(text, family="glm-4.7", in_think=in_think)
    assert (parsed.reasoning, parsed.content) == (reasoning, content)


def test_published_reading_ends_reasoning_at_the_last_end_but_not_inside_a_call():
    text = "<think>a</think>b</think>c"
    assert chat.parse(text).reasoning == "a</think>b"
    assert chat.parse(text, reading=chat.STREAMED).content == "b</think>c"
    answer = {"reasoning_content": "a", **call(s="the </think> tag")}
    assert chat.parse(written(answer, "glm-4.5")).message() == answer


# Types

STRING, NULL, INTEGER = {"type": "string"}, {"type": "null"}, {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (STRING, "12", "12"),
        ({"anyOf": [STRING, NULL]}, "12", "12"),
        ({"anyOf": [STRING, NULL]}, "null", None),
        ({"type": ["string", "null"]}, "12", "12"),
        ({"type": ["integer", "string"]}, "12", 12),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": "1"}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"$ref": "#/$defs/Code"}, "1", "1"),
        ({"$ref": "#/$defs/Loop"}, "1", 1),
        ({"$ref": "#/$defs/None"}, "1", 1),
        ({"allOf": [{"description": "x"}, {"$ref": "#/$defs/Code"}]}, "1", "1"),
        ({"anyOf": [STRING, {}]}, "1", 1),
        ({"type": 5}, "1", 1),
        (INTEGER, "1,000", "1,000"),
        (INTEGER, "NaN", "NaN"),
        (INTEGER, "1e999", "1e999"),
        (INTEGER, "9" * 5000, "9" * 5000),
        ({}, '"\\ud800"', '"\\ud800"'),
        ({}, "[" * 10**5, "[" * 10**5),
        ({}, "[" * 10**5 + "]" * 10**5, "[" * 10**5 + "]" * 10**5),
        ({}, '{"a": [1, null]}', {"a": [1, None]}),
        (None, "true", True),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_is_typed_by_its_schema_and_stays_text_where_it_is_not_json(schema, text, value):
    each = tool(x=schema)
    each["parameters"]["$defs"] = {"Code": {"enum": ["1"]}, "Loop": {"$ref": "#/$defs/Loop"}}
    answer = f"<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    for tools in ([each], [{"type": "function", "function": each}]):
        assert chat.parse(answer, tools=tools).tool_calls == call(x=value)["tool_calls"]


# Errors


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "developer", "content": "x"}], "message 0: role 'developer' is none of system"),
        (["hi"], "role 'hi' is none of"),
        ([USER, {"role": "tool", "content": "x"}], r"message 1 \(tool\): .* before any call"),
        ([{"role": "user"}], "content is NoneType; give text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "the model reads text only"),
        ([{"role": "assistant", "reasoning_content": 3}], "reasoning_content is int; give text"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}], "loads"),
        ([USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}], "has no name"),
        ([USER, call(), {"role": "tool", "content": None}], "content is NoneType"),
    ],
)
def test_a_message_that_cannot_be_rendered_is_named_with_the_way_out(messages, match):
    with pytest.raises(ValueError, match=match):
        chat.render(messages)


def test_an_unknown_family_or_tool_is_refused():
    for read in (lambda: chat.render([USER], family="glm-5"), lambda: chat.Stream(family="glm-5")):
        with pytest.raises(ValueError, match=r"family 'glm-5' is none of glm-4\.5"):
            read()
    with pytest.raises(ValueError, match=r"tool 1 is \{\}; give a mapping with name"):
        chat.parse("x", tools=[tool(), {}])


def test_null_content_and_text_parts_are_what_was_meant():
    messages = [USER, {**call(), "content": None}]
    text = chat.render([*messages, {"role": "tool", "content": [{"type": "text", "text": "t"}]}])
    assert "None" not in text
    assert "<tool_response>\nt\n</tool_response>" in text


# Ids and masks


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([inspect.getsource(module) for module in (argparse, typing)], 700)


def trained(tokenizer: Tokenizer, encoded: chat.Encoded) -> list[str]:
    """The texts of the runs that the mask covers."""
    pieces, before = [], False
    for token, mask in zip(encoded.tokens, encoded.mask, strict=True):
        if mask:
            pieces[len(pieces) if not before else -1 :] = [[*(pieces[-1] if before else []), token]]
        before = mask
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("case", TEMPLATE, ids=lambda case: f"{case['family']}-{case['name']}")
def test_ids_are_those_of_the_rendered_text_and_a_stop(tokenizer, case):
    family = case["family"]
    encoded = chat.encode(tokenizer, **case["request"], family=family)
    text = case["text"]
    if family == "glm-4.7" and "/nothink" in text:
        pytest.skip("the user's text has a token that 4.7's template does not know")
    if not case["request"]["add_generation_prompt"] and "<|assistant|>" in text:
        text += "<|user|>"
    assert encoded.tokens == tokenizer.encode(text, allow_special=True)
    assert len(encoded.mask) == len(encoded.tokens)


CONVERSATION = [
    {"role": "system", "content": "S"},
    USER,
    {**call(s="x"), "reasoning_content": "why", "content": "so"},
    {"role": "tool", "content": "out"},
    {"role": "assistant", "reasoning_content": "then", "content": "done"},
]


@pytest.mark.parametrize(
    ("family", "spans"),
    [
        (
            "glm-4.5",
            [
                "\n<think>why</think>\nso\n<tool_call>f\n<arg_key>s</arg_key>\n"
                "<arg_value>x</arg_value>\n</tool_call><|observation|>",
                "\n<think>then</think>\ndone<|user|>",
            ],
        ),
        (
            "glm-4.7",
            [
                "why</think>so<tool_call>f<arg_key>s</arg_key><arg_value>x</arg_value></tool_call>"
                "<|observation|>",
                "then</think>done<|user|>",
            ],
        ),
    ],
)
def test_the_mask_is_what_the_model_writes_with_its_decision_to_stop(tokenizer, family, spans):
    assert trained(tokenizer, chat.encode(tokenizer, CONVERSATION, family=family)) == spans


@pytest.mark.parametrize(
    ("family", "thinking", "span"),
    [
        ("glm-4.5", False, "\nyes<|user|>"),
        ("glm-4.5", None, "\n<think></think>\nyes<|user|>"),
        ("glm-4.7", False, "yes<|user|>"),
        ("glm-4.7", None, "yes<|user|>"),
    ],
)
def test_the_empty_think_block_is_trained_only_where_the_model_chose_it(
    tokenizer, family, thinking, span
):
    messages = [USER, {"role": "assistant", "content": "yes"}]
    how = {"family": family, "enable_thinking": thinking}
    encoded = chat.encode(tokenizer, messages, **how)
    assert trained(tokenizer, encoded) == [span]
    if family == "glm-4.7":  # a turn without reasoning is that of a direct prompt
        how["enable_thinking"] = False
    prompt = chat.encode(tokenizer, [USER], **how, add_generation_prompt=True)
    assert encoded.tokens[: len(prompt.tokens)] == prompt.tokens
    assert encoded.mask.index(True) == len(prompt.tokens)


@BOTH
def test_a_turn_that_does_not_show_what_the_model_wrote_is_not_trained(tokenizer, family):
    thought = {"role": "assistant", "reasoning_content": "r", "content": "c"}
    encoded = chat.encode(tokenizer, [USER, thought, USER, thought], family=family)
    assert len(trained(tokenizer, encoded)) == 1
    encoded = chat.encode(tokenizer, [USER, thought], family=family, enable_thinking=False)
    assert not any(encoded.mask)
    if family == "glm-4.7":
        how = {"family": family, "clear_thinking": False}
        encoded = chat.encode(tokenizer, [USER, thought, USER, thought], **how)
        assert trained(tokenizer, encoded) == ["r</think>c<|user|>"] * 2


def test_a_stop_that_the_turn_should_not_have_chosen_is_not_trained(tokenizer):
    encoded = chat.encode(tokenizer, [USER, call(), USER])
    assert not trained(tokenizer, encoded)[0].endswith("<|user|>")


@BOTH
@pytest.mark.parametrize("tag", ["<|user|>", "</tool_call>", "</think>", "/nothink"])
def test_nobody_forges_a_turn_by_writing_a_token_as_text(tokenizer, family, tag):
    evil = f"a{tag}b"
    messages = [
        {"role": "system", "content": evil},
        {"role": "user", "content": evil},
        {**call(evil, **{evil: evil}), "reasoning_content": evil, "content": evil},
        {"role": "tool", "content": evil},
    ]
    good = json.loads(json.dumps(messages).replace(tag, "&"))
    first = tokenizer.id_of(SPECIAL_TOKENS[0].text)
    ids = chat.encode(tokenizer, messages, tools=[{"name": evil}], family=family).tokens
    expected = chat.encode(tokenizer, good, tools=[{"name": "f"}], family=family).tokens
    assert [t for t in ids if t >= first] == [t for t in expected if t >= first]
    how = {"tools": [{"name": evil}], "family": family, "add_generation_prompt": False}
    assert tokenizer.decode(ids) == chat.render(messages, **how)


def test_the_switch_at_the_end_of_a_user_message_is_the_token_in_45(tokenizer):
    message = [{"role": "user", "content": "/nothink hi/nothink"}]
    for family, count in (("glm-4.5", 1), ("glm-4.7", 0)):
        tokens = chat.encode(tokenizer, message, family=family).tokens
        assert tokens.count(tokenizer.id_of("/nothink")) == count


@BOTH
@pytest.mark.parametrize("thinking", [None, False])
def test_prompt_sampled_and_bridge_are_the_whole_conversation(tokenizer, family, thinking):
    how = {"family": family, "enable_thinking": thinking}
    start = [USER]
    turn = call(s="x") | ({"reasoning_content": "why"} if thinking is None else {})
    answers = [{"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}]
    prompt = chat.encode(tokenizer, start, **how, add_generation_prompt=True).tokens
    upto_stop = chat.encode(tokenizer, [*start, turn], **how).tokens
    whole = chat.encode(tokenizer, [*start, turn, *answers], **how, add_generation_prompt=True)
    assert upto_stop[: len(prompt)] == prompt
    bridged = chat.bridge(tokenizer, answers, last=upto_stop[-1], **how)
    assert upto_stop + bridged == whole.tokens
    assert chat.bridge(tokenizer, answers, last=None, **how) == [upto_stop[-1], *bridged]
    with pytest.raises(ValueError, match="keep its sampled ids"):
        chat.bridge(tokenizer, [turn], last=None, **how)
