"""The official client against the server: what the model wrote, whole and in pieces, with the
log-probs of the engine.
"""

import asyncio
import itertools
import json

import numpy as np
import openai
import pytest

from glm45_jax import chat
from glm45_jax.rollout.server.answers import Answer
from glm45_jax.rollout.server.requests import Served, read_completion
from glm45_jax.rollout.types import Piece
from tests.rollout.serving import USER, Scripted, ids_of, serving, tokenizer

STRING = {"type": "object", "properties": {"s": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": STRING}}
CALL = (
    "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>x\n y</arg_value>\n<arg_key>n</arg_key>\n"
    '<arg_value>[1, {"a": "b"}]</arg_value>\n</tool_call>'
)
SCRIPTS = {
    "words": "\n<think></think>\nplain words<|user|>",
    "reasoning": "\n<think>why é日本\n</think>\nbecause <b>so</b><|user|>",
    "call": f"\n<think>why</think>\nso\n{CALL}<|observation|>",
    "calls": f"\n<think></think>{CALL}\n{CALL}<|observation|>",
    "cut": "\n<think>on and on",
    "cut call": f"\n<think>a</think>b\n{CALL}<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>x",
    "no value": "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>x</tool_call> and<|observation|>",
}


@pytest.fixture(scope="module")
def server():
    with serving(Scripted()) as running:
        yield running
        assert running.idle()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def ask(server, client):
    """Asks for a chat answer of what the model is to write."""

    def ask(text, messages=USER, **options):
        server.engine.scripts = [ids_of(text) if isinstance(text, str) else text]
        return client.chat.completions.create(model="tiny", messages=messages, **options)

    return ask


def folded(chunks):
    """What a client knows at the end of a stream: a message, how it ended, and the log-probs."""
    message, calls, finishes, logprobs = {}, {}, [], []
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        delta = choice.delta.model_dump(exclude_none=True)
        for call in delta.pop("tool_calls", ()):
            known = calls.setdefault(call["index"], {"name": "", "arguments": "", "id": ""})
            known["id"] += call.get("id", "")
            for name, piece in call["function"].items():
                known[name] += piece
        for name, piece in delta.items():
            message[name] = message.get(name, "") + piece
        finishes += [choice.finish_reason] if choice.finish_reason else []
        logprobs += choice.logprobs.content if choice.logprobs else []
    return message, calls, finishes, logprobs


# What the model wrote


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("tools", [[TOOL], openai.NOT_GIVEN], ids=["tools", "no tools"])
def test_a_stream_joined_is_the_whole_answer(ask, name, tools):
    text = SCRIPTS[name]
    options = {"tools": tools, "logprobs": True, "max_tokens": len(ids_of(text)), "seed": 0}
    whole = ask(text, **options)
    chunks = list(ask(text, stream=True, stream_options={"include_usage": True}, **options))
    message, calls, finishes, logprobs = folded(chunks)
    (choice,) = whole.choices
    said = choice.message.model_dump(exclude_none=True)
    broken = name in ("cut call", "no value") and tools is not openai.NOT_GIVEN
    assert finishes == [choice.finish_reason]
    assert logprobs == choice.logprobs.content
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    for field in ("content", "reasoning_content", "dropped"):
        assert (message.get(field) or None) == (said.get(field) or None)
    # A stream cannot take back: of a call that was not finished, its beginning stays told.
    whole_calls = [c.function.model_dump() for c in choice.message.tool_calls or ()]
    told = [{k: c[k] for k in ("arguments", "name")} for c in calls.values()]
    assert [c for c in told if c in whole_calls] == whole_calls
    assert (len(told) > len(whole_calls)) == broken
    assert len({call["id"] for call in calls.values()}) == len(calls)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_answer_is_what_the_parser_reads(ask, name):
    text = SCRIPTS[name]
    (choice,) = ask(text, tools=[TOOL], max_tokens=len(ids_of(text))).choices
    for stop in ("<|user|>", "<|observation|>"):
        text = text.removesuffix(stop)
    want = chat.parse(text, tools=[TOOL], reading=chat.STREAMED)
    calls = [
        {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
        for call in choice.message.tool_calls or ()
    ]
    said = choice.message.model_dump()
    assert (said["content"] or "") == want.content
    assert said.get("reasoning_content", "") == want.reasoning
    assert (calls, said.get("dropped", "")) == (want.tool_calls, want.dropped)
    cut = name.startswith("cut")
    assert choice.finish_reason == ("length" if cut else "tool_calls" if calls else "stop")


def test_words_that_look_like_tags_are_words(ask):
    words = "<think>a</think> <tool_call>f\n</tool_call> <|user|> é"
    ids = [*ids_of("\n<think></think>\n"), *tokenizer().encode(words), *ids_of("<|user|>")]
    (choice,) = ask(ids, tools=[TOOL]).choices
    assert choice.message.content == words
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


def test_an_argument_may_hold_every_tag_as_words(ask):
    value = "</arg_value>\n</tool_call><|user|>"
    ids = [*ids_of("<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>"), *tokenizer().encode(value)]
    ids += ids_of("</arg_value>\n</tool_call><|observation|>")
    (choice,) = ask(ids, tools=[TOOL]).choices
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"s": value}


def test_without_tools_a_call_is_content(ask):
    for none in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        (choice,) = ask(SCRIPTS["call"], **none).choices
        assert choice.message.content == f"so\n{CALL}" and choice.finish_reason == "stop"
        assert choice.message.reasoning_content == "why"


def test_a_round_trip_of_tools_renders_what_the_template_does(server, ask, client):
    answer = ask(SCRIPTS["calls"], tools=[TOOL])
    message = answer.choices[0].message
    first, second = (call.id for call in message.tool_calls)
    # Answers in the other order: the model knows them by their place.
    back = [
        *USER,
        message.model_dump(),
        {"role": "tool", "tool_call_id": second, "content": "two"},
        {"role": "tool", "tool_call_id": first, "content": [{"type": "text", "text": "one"}]},
    ]
    answer = ask(SCRIPTS["words"], back, tools=[TOOL], extra_body={"return_token_ids": True})
    arguments = {"s": "x\n y", "n": [1, {"a": "b"}]}
    want = [
        *USER,
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}] * 2},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
    ]
    prompt = chat.encode(tokenizer(), want, tools=[TOOL], add_generation_prompt=True).tokens
    assert answer.prompt_token_ids == prompt
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].token_ids == ids_of(SCRIPTS["words"])
    assert answer.choices[0].versions == [0] * len(ids_of(SCRIPTS["words"]))


@pytest.mark.parametrize(
    ("switch", "thinking"),
    [
        ({}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}, "chat_template_kwargs": {}}, True),
    ],
)
def test_the_switch_for_reasoning_is_the_templates(ask, switch, thinking):
    answer = ask(SCRIPTS["words"], extra_body={**switch, "return_token_ids": True})
    want = chat.encode(
        tokenizer(), USER, enable_thinking=thinking, add_generation_prompt=True
    ).tokens
    assert answer.prompt_token_ids == want


def test_47_thinks_from_the_first_token_and_answers_directly_when_told_to():
    with serving(Scripted(), family="glm-4.7") as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        running.engine.scripts = [ids_of("why</think>so<|user|>")]
        message = client.chat.completions.create(model="tiny", messages=USER).choices[0].message
        assert (message.reasoning_content, message.content) == ("why", "so")
        running.engine.scripts = [ids_of("so<|user|>")]
        direct = {"thinking": {"type": "disabled"}}
        message = (
            client.chat.completions.create(model="tiny", messages=USER, extra_body=direct)
            .choices[0]
            .message
        )
        assert message.content == "so" and "reasoning_content" not in message.model_dump()


# Stop strings, log-probs, several outputs


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text_and_cancels_the_request(server, ask, stream):
    text = "\n<think></think>one two three" + " and more" * 50
    cancelled = server.driver.stats.cancelled
    answer = ask(text, stop=["three", "never"], max_tokens=400, stream=stream)
    if stream:
        message, _, finishes, _ = folded(answer)
        content, (finish,) = message["content"], finishes
    else:
        content, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        upto = len(ids_of(text.partition("three")[0] + "three"))
        assert answer.usage.completion_tokens == upto
    assert (content, finish) == ("one two", "stop")
    assert server.idle() and server.driver.stats.cancelled == cancelled + 1


def test_of_a_piece_of_many_tokens_those_after_a_stop_string_are_not_told():
    served = Served.of("tiny", "glm-4.5", tokenizer(), Scripted())
    ask = read_completion({"prompt": "x", "stop": "two", "return_token_ids": True}, served)
    ids = ids_of("one two three")
    zeros = np.zeros(len(ids), np.float32)
    piece = Piece(np.int32(ids), zeros, zeros, (0,) * len(ids))
    answer = Answer(ask, served)
    answer.choices[0].take(piece)
    (told,) = answer.whole()["choices"]
    assert (told["text"], told["finish_reason"]) == ("one ", "stop")
    assert told["token_ids"] == ids_of("one two")


def test_log_probs_are_the_engines_one_a_drawn_token(ask):
    text = "\n<think>日</think>a<|user|>"
    (choice,) = ask(text, logprobs=True, top_logprobs=2).choices
    ids = ids_of(text)
    told = choice.logprobs.content
    assert b"".join(bytes(one.bytes) for one in told).decode() == text
    raw = np.float32(ids) / np.float32(-50)
    np.testing.assert_array_equal(np.float32([one.logprob for one in told]), raw)
    for token, one in zip(ids, told, strict=True):
        assert len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token
        assert one.top_logprobs[1].logprob == pytest.approx(-(token + 1) / 50, abs=1e-6)


def test_outputs_have_seeds_of_their_own_and_the_first_is_that_of_one(server, client):
    server.engine.scripts = [ids_of(f"\n<think></think>{n}<|user|>") for n in range(64)]

    def texts(**options):
        answer = client.chat.completions.create(model="tiny", messages=USER, **options)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.message.content for choice in answer.choices]

    three = texts(n=3, seed=5)
    assert three[0] == "5" and len(set(three)) == 3
    assert (texts(n=3, seed=5), texts(n=2, seed=5), texts(seed=5)) == (three, three[:2], ["5"])
    assert len(set(texts(n=16))) > 4  # drawn where none is given
    chunks = client.chat.completions.create(model="tiny", messages=USER, n=3, seed=5, stream=True)
    told = ["", "", ""]
    for choice in itertools.chain.from_iterable(chunk.choices for chunk in chunks):
        told[choice.index] += choice.delta.content or ""
    assert told == three


# The other doors


def test_a_completion_is_the_text_of_the_tokens(server, client):
    server.engine.scripts = [ids_of("ab<think>日 c<|user|>")]
    prompt = tokenizer().encode("say")
    whole = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=50, logprobs=2, seed=0
    )
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason) == ("ab<think>日 c", "stop")
    assert whole.usage.prompt_tokens == len(prompt)
    pieces, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert [choice.text[a:b] for a, b in itertools.pairwise(offsets)][:2] == pieces[:2]
    assert len(choice.logprobs.top_logprobs[0]) == 2
    chunks = list(
        client.completions.create(model="tiny", prompt="say", max_tokens=50, stream=True, seed=0)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]


def test_several_prompts_are_answered_in_order(server, client):
    server.engine.scripts = [ids_of(f"{n}<|user|>") for n in range(64)]
    answer = client.completions.create(model="tiny", prompt=["a", "bb"], n=2, seed=9)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == "9"
    assert answer.usage.prompt_tokens == sum(len(tokenizer().encode(p)) for p in ("a", "bb"))


def test_a_prompt_is_plain_text_unless_its_tokens_are_allowed(server, client):
    def prompt(**more):
        extra = {"return_token_ids": True, **more}
        answer = client.completions.create(model="tiny", prompt="[gMASK]<sop>a", extra_body=extra)
        return answer.prompt_token_ids

    server.engine.scripts = [ids_of("a<|user|>")]
    assert prompt() == tokenizer().encode("[gMASK]<sop>a")
    assert prompt(allow_special=True) == ids_of("[gMASK]<sop>a")


def test_end_ids_can_be_ignored_and_others_added(server, client):
    server.engine.scripts = [ids_of("a<|user|>b")]
    how = dict(model="tiny", prompt="x", max_tokens=3)
    answer = client.completions.create(**how, extra_body={"ignore_eos": True})
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "length")
    more = {"stop_token_ids": tokenizer().encode("a")}
    answer = client.completions.create(**how, extra_body=more)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("a", "stop")


def test_the_model_is_listed_under_its_name(server, client):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", server.engine.max_tokens)
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match='model "other" is not served here; use "tiny"'):
        client.models.retrieve("other")


def test_many_clients_at_once_get_their_own_answers(server):
    server.engine.scripts = [ids_of(f"\n<think></think>{n}<|user|>") for n in range(64)]

    async def scene():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0
        ) as client:

            async def one(seed):
                answer = await client.chat.completions.create(
                    model="tiny", messages=USER, seed=seed, stream=bool(seed % 2)
                )
                if not seed % 2:
                    return answer.choices[0].message.content
                return "".join([c.choices[0].delta.content or "" async for c in answer])

            return await asyncio.gather(*map(one, range(40)))

    assert asyncio.run(scene()) == [str(n) for n in range(40)]
    assert server.idle()
