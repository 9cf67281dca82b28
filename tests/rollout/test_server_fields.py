"""Bodies that are wrong: each gets an error that names the field and the way out, in the form of
the OpenAI API, and never comes as far as the engine.
"""

import json

import httpx2 as httpx
import pytest

from glm45_jax.rollout.server import http as server_http
from tests.rollout.serving import CHAT, COMPLETION, GENERATE, USER, Scripted, refused, serving


@pytest.fixture(scope="module")
def server():
    with serving(Scripted(max_tokens=480)) as running:
        yield running
        assert running.idle() and running.driver.stats.submitted == 0


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def tool(**function):
    return {"type": "function", "function": {"name": "f", **function}}


def call(arguments):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c1", "function": function}]}


BAD_CHATS = [
    # (fields, field that is wrong, code, words of the message)
    ({"model": "gpt-4"}, "model", "model_not_found", 'use "tiny"'),
    ({"messages": []}, "messages", None, "empty"),
    ({"messages": None}, "messages", None, "missing"),
    ({"messages": "hi"}, "messages", None, 'messages is "hi"; give a list'),
    ({"messages": ["hi"]}, "messages.0", None, "send an object"),
    ({"messages": [{"role": "king", "content": ""}]}, "messages.0.role", None, "none of system"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", None, "missing"),
    ({"messages": [{**USER[0], "text": "x"}]}, "messages.0.text", "unknown_parameter", "leave"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0.type",
        None,
        "reads text only",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", None, "before any call"),
    ({"messages": [*USER, call("{")]}, None, "invalid_json", "arguments is not JSON"),
    (
        {"messages": [*USER, call("[1]")]},
        "messages.1.tool_calls.0.function.arguments",
        None,
        "object",
    ),
    ({"messages": [*USER, call('{"a": NaN}')]}, None, "invalid_json", "NaN is not a number"),
    (
        {"messages": [call("{}"), {"role": "tool", "tool_call_id": "c2", "content": ""}]},
        "messages.1.tool_call_id",
        None,
        'those are "c1"',
    ),
    ({"tools": {"f": {}}}, "tools", None, "give a list"),
    ({"tools": [{"type": "function"}]}, "tools.0.function", None, "missing"),
    ({"tools": [{"type": "retrieval"}]}, "tools.0.type", None, "give a function"),
    ({"tools": [tool(name="a b")]}, "tools.0.function.name", None, "letters"),
    ({"tools": [tool(parameters=[])]}, "tools.0.function.parameters", None, "an object"),
    (
        {"tools": [tool(parametres={})]},
        "tools.0.function.parametres",
        "unknown_parameter",
        "did you mean parameters?",
    ),
    ({"tools": [tool(strict=True)]}, "tools.0.function.strict", "unsupported_parameter", "schema"),
    ({"tools": [tool(), tool()]}, "tools", None, "second"),
    (
        {"tool_choice": "required"},
        "tool_choice",
        "unsupported_parameter",
        "holds the model to a call",
    ),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "unsupported_parameter", "use auto"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls", "unsupported_parameter", "first call"),
    (
        {"response_format": {"type": "json_object"}},
        "response_format",
        "unsupported_parameter",
        "form",
    ),
    ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter", "min_p"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter", "distribution"),
    ({"temperatur": 1}, "temperatur", "unknown_parameter", "did you mean temperature?"),
    ({"temperature": -1}, "temperature", None, "neither 0 nor"),
    ({"temperature": 10**400}, "temperature", None, "give a number"),
    ({"temperature": True}, "temperature", None, "give a number"),
    ({"temperature": "hot"}, "temperature", None, "give a number"),
    ({"top_p": 0}, "top_p", None, "(0, 1]"),
    ({"top_p": 1.5}, "top_p", None, "(0, 1]"),
    ({"min_p": 2}, "min_p", None, "[0, 1]"),
    ({"top_k": -1}, "top_k", None, "0 keeps every token"),
    ({"top_k": 1.5}, "top_k", None, "an integer"),
    ({"seed": -1}, "seed", None, "[0, 2**32)"),
    ({"seed": 2**32}, "seed", None, "[0, 2**32)"),
    ({"n": 0}, "n", None, "1 to 128"),
    ({"n": 129}, "n", None, "1 to 128"),
    ({"n": 10**30}, "n", None, "1 to 128"),
    ({"max_tokens": 0}, "max_tokens", None, "not a positive integer"),
    ({"max_tokens": 1e3}, "max_tokens", None, "an integer"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", None, "give one"),
    ({"max_tokens": 10**6}, "max_tokens", "context_length_exceeded", "use max_tokens"),
    (
        {"messages": [{**USER[0], "content": "a b" * 4000}]},
        "max_tokens",
        "context_length_exceeded",
        "leaves no room for an answer; a row holds 480",
    ),
    ({"stop": ["x"] * 17}, "stop", None, "at most 16"),
    ({"stop": [""]}, "stop", None, "characters"),
    ({"stop": [5]}, "stop", None, "characters"),
    ({"stop": {"a": 1}}, "stop", None, "a string or a list"),
    ({"top_logprobs": 2}, "top_logprobs", None, "set logprobs to true"),
    (
        {"logprobs": True, "top_logprobs": 4},
        "top_logprobs",
        "unsupported_parameter",
        "this engine tells 3",
    ),
    ({"logprobs": 1}, "logprobs", None, "true or false"),
    ({"stream": "yes"}, "stream", None, "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", None, "set stream"),
    (
        {"stream": True, "stream_options": {"x": 1}},
        "stream_options.x",
        "unknown_parameter",
        "leave it out",
    ),
    (
        {"chat_template_kwargs": {"enable_thinkin": True}},
        "chat_template_kwargs.enable_thinkin",
        "unknown_parameter",
        "did you mean enable_thinking?",
    ),
    ({"thinking": {"type": "maybe"}}, "thinking.type", None, "neither enabled"),
    (
        {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": False}},
        "thinking",
        None,
        "two things",
    ),
    ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter", "enable_thinking"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", None, "from 0 on"),
]


@pytest.mark.parametrize(("fields", "param", "code", "says"), BAD_CHATS)
def test_a_wrong_field_of_a_chat_is_named(http, server, fields, param, code, says):
    response = http.post(CHAT, json={"model": "tiny", "messages": USER, **fields})
    status = 404 if code == "model_not_found" else 400
    error = refused(response, status, param=param, code=code, says=says)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "fields", "param", "says"),
    [
        (COMPLETION, {"prompt": None}, "prompt", "missing"),
        (COMPLETION, {"prompt": []}, "prompt", "give 1 to 128"),
        (COMPLETION, {"prompt": ""}, "prompt", "the prompt is empty"),
        (COMPLETION, {"prompt": [[]]}, "prompt", "the prompt is empty"),
        (COMPLETION, {"prompt": [1, "a"]}, "prompt", 'prompt[1] is "a"'),
        (COMPLETION, {"prompt": [True]}, "prompt", "prompt[0] is true"),
        (COMPLETION, {"prompt": [1, 10**6]}, "prompt", "not in [0, 608)"),
        (COMPLETION, {"prompt": [1, -1]}, "prompt", "from 0 on"),
        (COMPLETION, {"prompt": "a", "echo": True}, "echo", "put the prompt before the text"),
        (COMPLETION, {"prompt": "a", "suffix": "b"}, "suffix", "fill-in-the-middle"),
        (COMPLETION, {"prompt": ["a"] * 65, "n": 2}, "n", "give 1 to 1"),
        (COMPLETION, {"prompt": "a", "logprobs": 9}, "logprobs", "this engine tells 3"),
        (COMPLETION, {"prompt": "a", "logprobs": True}, "logprobs", "an integer"),
        (COMPLETION, {"prompt": "a", "messages": USER}, "messages", "not a field"),
        (GENERATE, {"tokens": "hi"}, "tokens", "give a list"),
        (GENERATE, {"tokens": [1], "routes": True}, "routes", "--routes"),
        (GENERATE, {"tokens": [1], "stream": True}, "stream", "answers at the end"),
        (GENERATE, {"tokens": [1], "stop": "x"}, "stop", "give stop_token_ids"),
    ],
)
def test_a_wrong_field_of_the_other_doors_is_named(http, path, fields, param, says):
    response = http.post(path, json=fields)
    error = response.json()["error"]
    refused(response, 400, param=param, code=error["code"], says=says)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"model": "tiny", "temperature": NaN}', "NaN is not a number of JSON"),
        (b'{"temperature": Infinity}', "Infinity is not a number"),
        (b'{"temperature": -Infinity}', "-Infinity is not a number"),
        (b'{"model": "\\ud800"}', "not Unicode"),
        (b'{"n": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"messages": ' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper than 64"),
    ],
)
def test_a_body_that_is_no_json_is_refused(http, body, says):
    error = http.post(CHAT, content=body).json()["error"]
    assert says in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"[]", b"5", b'"x"', b"null"])
def test_a_body_that_is_no_object_is_refused(http, body):
    refused(http.post(CHAT, content=body), 400, says="send an object")


def test_a_temperature_that_overflows_is_refused(http):
    body = json.dumps({"model": "tiny", "messages": USER})[:-1] + ', "temperature": 1e999}'
    refused(http.post(CHAT, content=body), 400, param="temperature", says="inf is neither 0 nor")


def test_a_body_of_ten_megabytes_is_refused_with_its_limit(http):
    assert server_http.MAX_BODY_BYTES < 10 * 2**20
    message = [{"role": "user", "content": "a" * 10 * 2**20}]
    response = http.post(CHAT, json={"model": "tiny", "messages": message})
    refused(response, 413, code="body_too_large", says=str(server_http.MAX_BODY_BYTES))

    def chunks():  # of no length that is told before
        for _ in range(10):
            yield b" " * 2**20

    refused(http.post(CHAT, content=chunks()), 413, code="body_too_large")
