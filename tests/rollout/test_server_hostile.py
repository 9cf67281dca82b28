"""Clients that break off, engines that fail, callers without the token: who is left gets an error
that says why, and nobody keeps a slot.
"""

import contextlib
import gc
import json
import socket
import time

import httpx2 as httpx
import openai
import pytest

from glm45_jax.rollout.server import app as server_app
from glm45_jax.rollout.server import command
from glm45_jax.rollout.server import http as server_http
from tests.rollout.serving import (
    CHAT,
    GENERATE,
    TOKEN,
    USER,
    Scripted,
    ids_of,
    refused,
    serving,
    tokenizer,
)

ENDLESS = "a" * 400


@pytest.fixture(scope="module")
def server():
    with serving(Scripted(scripts=[ids_of("a<|user|>")], max_tokens=480)) as running:
        yield running


@pytest.fixture
def http(server):
    """A client; after each test every slot and page is free, and the server answers as before."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client
        assert server.idle()
        server.engine.step_seconds = 0.0
        server.engine.scripts = [ids_of("a<|user|>")]
        answer = client.post(GENERATE, json={"tokens": [1], "max_tokens": 5})
        assert answer.json()["outputs"][0]["tokens"] == ids_of("a<|user|>")


def test_other_doors_and_methods_are_errors_of_the_same_form(http):
    refused(http.get("/v1/nothing"), 404, code="unknown_url", says="/v1/chat/completions")
    refused(http.post("/v1/models/"), 405, code="unknown_url", says="use GET")
    refused(http.get(CHAT), 405, code="unknown_url", says="use POST")
    refused(http.get("/v1/models/tin"), 404, param="model", code="model_not_found", says="tiny")


def test_bytes_that_are_no_http_get_an_answer_and_nobody_else_notices(server, http):
    host, port = server.url.removeprefix("http://").split(":")
    for garbage in (b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"a" * 100_000):
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(garbage)
            assert raw.recv(100).startswith(b"HTTP/1.1 400")


# Clients that leave


def request_bytes(path, body):
    text = json.dumps(body)
    return f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_who_leaves_frees_the_slots_at_once(server, http, stream, n):
    server.engine.scripts, server.engine.step_seconds = [ids_of(ENDLESS)], 0.01
    body = {"model": "tiny", "messages": USER, "stream": stream, "n": n, "max_tokens": 300}
    host, port = server.url.removeprefix("http://").split(":")
    cancelled = server.driver.stats.cancelled
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(request_bytes(CHAT, body))
        if stream:
            told = raw.recv(4096)
            while b"data: " not in told:
                told += raw.recv(4096)
        while server.driver.stats.running < n:
            time.sleep(0.005)
    began = time.monotonic()
    assert server.idle() and time.monotonic() - began < 1.5, "far less than the rest would take"
    assert server.driver.stats.cancelled == cancelled + n


def test_who_leaves_in_the_middle_of_a_body_leaves_nothing(server, http):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(request_bytes(CHAT, {"model": "tiny", "messages": USER})[:-10])
    assert server.idle()


def test_a_body_that_does_not_come_is_not_waited_for(server, http, monkeypatch):
    monkeypatch.setattr(server_http, "BODY_SECONDS", 0.1)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(request_bytes(CHAT, {"model": "tiny", "messages": USER})[:-10])
        assert raw.recv(4096).startswith(b"HTTP/1.1 408")


def unread(url):
    """A connection whose client asked for a long stream and reads nothing of it."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = url.removeprefix("http://").split(":")
    raw.connect((host, int(port)))
    body = {"model": "tiny", "messages": USER, "stream": True, "n": 24, "max_tokens": 400}
    raw.sendall(request_bytes(CHAT, {**body, "logprobs": True, "top_logprobs": 3}))
    return raw


def test_who_reads_nothing_is_not_waited_for(server, http, monkeypatch):
    monkeypatch.setattr(server_http, "SEND_SECONDS", 0.3)
    server.engine.scripts = [ids_of(ENDLESS)]
    line = f'glm45_rollout_http_requests_total{{path="{CHAT}",status="499"}} '

    def gone():
        found = [one for one in http.get("/metrics").text.splitlines() if one.startswith(line)]
        return int(found[0].removeprefix(line)) if found else 0

    before = gone()
    with unread(server.url):
        while not server.service.open_outputs:
            time.sleep(0.005)
        assert server.idle()
    assert gone() == before + 1


def test_who_reads_nothing_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(command, "GRACE_SECONDS", 0.3)
    with contextlib.ExitStack() as stack:
        with serving(Scripted(scripts=[ids_of(ENDLESS)])) as running:
            stack.enter_context(unread(running.url))
            while not running.service.open_outputs:
                time.sleep(0.005)
            while running.driver.stats.running:
                time.sleep(0.005)
            assert running.service.open_outputs == 24, "the outputs are there, and nobody reads"
            began = time.monotonic()
        assert time.monotonic() - began < 10 and running.idle()
        gc.collect()  # a connection that is still open would warn, here and not in another test


def test_who_waits_and_leaves_is_not_begun(server, http):
    server.engine.scripts, server.engine.step_seconds = [ids_of(ENDLESS)], 0.01
    begun = []
    host, port = server.url.removeprefix("http://").split(":")
    body = {"tokens": [1, 2], "max_tokens": 100, "n": 1}
    for _ in range(server.engine.slots + 3):
        begun.append(socket.create_connection((host, int(port)), timeout=10))
        begun[-1].sendall(request_bytes(GENERATE, body))
    while server.driver.stats.waiting < 3:
        time.sleep(0.005)
    for raw in reversed(begun):
        raw.close()
    assert server.idle()


def test_more_outputs_than_may_be_open_are_refused(server, http, monkeypatch):
    monkeypatch.setattr(server_app, "MAX_OPEN", 2)
    body = {"model": "tiny", "messages": USER, "n": 3}
    for stream in (False, True):
        error = refused(
            http.post(CHAT, json={**body, "stream": stream}),
            429,
            code="too_many_requests",
            says="at most 2",
        )
        assert error["type"] == "rate_limit_error"


# Engines that fail


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_ends_its_requests_and_not_the_next(server, http, stream):
    server.engine.scripts = [ids_of(ENDLESS)]
    server.engine.fails = RuntimeError("the device is on fire")
    body = {"model": "tiny", "messages": USER, "stream": stream, "max_tokens": 50}
    response = http.post(CHAT, json=body)
    if not stream:  # by then the first token of a stream was told
        error = refused(response, 500, code="engine_error", says="the device is on fire")
        assert error["type"] == "server_error"
    else:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            server.engine.fails = RuntimeError("the device is on fire")
            with pytest.raises(openai.APIError, match="on fire"):
                list(client.chat.completions.create(**body))
    assert http.get("/health").status_code == 200


def test_a_loop_that_crashed_is_no_health():
    with serving(Scripted(scripts=[ids_of(ENDLESS)])) as running:
        running.engine.fails = AssertionError("a bug")
        with httpx.Client(base_url=running.url, timeout=30) as http:
            response = http.post(GENERATE, json={"tokens": [1], "max_tokens": 9})
            refused(response, 500, code="engine_error", says="the rollout loop ended")
            response = http.get("/health")
            assert response.status_code == 503 and response.json()["status"] == "broken"
            assert "a bug" in response.json()["reason"]
            response = http.post(GENERATE, json={"tokens": [1], "max_tokens": 9})
            refused(response, 500, code="engine_error", says="the rollout loop ended")


# Admin calls


ADMIN = ("/admin/pause", "/admin/resume", "/admin/flush", "/admin/weights")


@pytest.mark.parametrize("path", ADMIN)
def test_admin_calls_need_the_token(server, http, path):
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
        error = refused(http.post(path, headers=given), 401, code="invalid_admin_token")
        assert error["type"] == "authentication_error" and TOKEN not in error["message"]
    given = {"authorization": "Bearer \xe9".encode("latin-1")}
    refused(http.post(path, headers=given), 401, code="invalid_admin_token")
    assert not server.driver._batch.closed


def test_without_a_token_admin_calls_say_how_to_set_one():
    with (
        serving(Scripted(), token=None) as running,
        httpx.Client(base_url=running.url) as http,
    ):
        for path in ADMIN:
            error = refused(
                http.post(path, headers={"authorization": "Bearer x"}),
                403,
                code="no_admin_token",
                says="GLM45_ADMIN_TOKEN",
            )
            assert error["type"] == "permission_error"


def test_a_pause_holds_requests_and_who_leaves_it_waits_for_nothing(server, http):
    given = {"authorization": f"Bearer {TOKEN}"}
    assert http.post("/admin/pause", headers=given, json={"drain": True}).status_code == 200
    assert http.get("/health").json()["status"] == "paused"
    with pytest.raises(httpx.ReadTimeout):
        http.post(GENERATE, json={"tokens": [1]}, timeout=0.3)
    assert server.idle()
    refused(
        http.post("/admin/pause", headers=given, json={"drian": True}),
        400,
        param="drian",
        code="unknown_parameter",
        says="did you mean drain?",
    )
    assert http.post("/admin/flush", headers=given).status_code == 200
    assert http.post("/admin/resume", headers=given).status_code == 200
    assert http.get("/health").json()["status"] == "ok"


def test_weights_are_pushed_once_and_told_in_the_versions():
    pushed = []

    def push(driver):
        async def push(path, step, version, policy):
            if path == "missing":
                raise FileNotFoundError(f"{path} is not there")
            driver.check_newer(version)
            pushed.append((path, step, policy))
            await driver.update(0, version, policy=policy)

        return push

    given = {"authorization": f"Bearer {TOKEN}"}
    with (
        serving(Scripted(scripts=[ids_of("a<|user|>")]), push=push) as running,
        httpx.Client(base_url=running.url, headers=given, timeout=30) as http,
    ):
        answer = http.post("/admin/weights", json={"path": "a", "step": 3, "policy": "drain"})
        assert (answer.json()["version"], pushed) == (1, [("a", 3, "drain")])
        answer = http.post(GENERATE, json={"tokens": [1], "max_tokens": 2})
        assert answer.json()["outputs"][0]["versions"] == [1, 1]
        refused(
            http.post("/admin/weights", json={"path": "missing"}),
            400,
            param="path",
            says="the old weights go on",
        )
        refused(
            http.post("/admin/weights", json={"path": "a", "version": 1}),
            400,
            param="path",
            says="not newer",
        )
        refused(
            http.post("/admin/weights", json={"path": "a", "policy": "hope"}),
            400,
            param="policy",
            says="none of drain",
        )
        assert http.get("/health").json()["version"] == 1


def test_metrics_count_tokens_and_requests(server, http):
    http.get("/v1/nothing")
    text = http.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(lines["glm45_rollout_free_slots"]) == server.engine.slots
    assert int(lines['glm45_rollout_http_requests_total{path="other",status="404"}']) > 0


def test_one_line_in_the_log_tells_of_a_request_and_none_of_its_text(server, http, caplog):
    caplog.set_level("INFO", "glm45_jax.rollout")
    secret = [{"role": "user", "content": "my secret"}]
    http.post(CHAT, json={"model": "tiny", "messages": secret, "max_tokens": 9})
    http.get("/a%0Ab")
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("glm45_jax")]
    (line,) = [told for told in ours if "completions" in told]
    assert 'POST "/v1/chat/completions" 200' in line and "finish stop" in line
    assert "secret" not in caplog.text and '"/a\\nb" 404' in caplog.text
    assert tokenizer().decode(ids_of("a")) not in line.partition("finish")[2].replace("stop", "")
