"""Laws of asking: every request once, in order, whatever stops it; failures are kept as such."""

import json
import sqlite3
import threading
import time

import pytest

from glm45_jax.data.endpoint import (
    UNREACHABLE,
    Answers,
    Decoding,
    Endpoint,
    Http,
    OpenAiClient,
    read_reply,
    seconds_of,
)
from glm45_jax.values import from_json, to_json
from tests.data.stub_endpoint import completion, serving

DECODING = Decoding(temperature=0.0, max_tokens=8)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def bodies(n):
    return [DECODING.body([{"role": "user", "content": str(i)}]) for i in range(n)]


def number(body):
    return int(body["messages"][0]["content"])


def echo(body):
    return f"so {number(body)}"


@pytest.mark.parametrize("transport", [Http(), OpenAiClient()])
def test_replies_come_in_the_order_of_the_requests_and_are_asked_for_once(tmp_path, transport):
    def slow_first(body):
        time.sleep(0.05 if number(body) % 3 == 0 else 0)
        return completion(echo(body), reasoning="hm")

    with serving(slow_first, transport=transport, at_once=4) as (stub, endpoint):
        for _ in range(2):
            with Answers(endpoint, tmp_path / "a.db") as answers:
                replies = list(answers.ask(bodies(12)))
                assert [r.content for r in replies] == [f"so {i}" for i in range(12)]
                assert {(r.reasoning, r.finish, r.tokens, r.failure) for r in replies} == {
                    ("hm", "stop", 2, "")
                }
        assert len(stub.bodies) == 12 and answers.counts == {"requests": 12, "cached": 12}
        assert 1 < stub.most <= 4
    assert set(stub.paths) == {"/v1/chat/completions"}
    assert stub.bodies[0].items() >= {"model": "stub", "temperature": 0.0, "seed": 0}.items()


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path):
    with serving(echo, at_once=2) as (stub, endpoint):
        with Answers(endpoint, tmp_path / "a.db") as answers:
            some = answers.ask(bodies(40))
            first = [next(some) for _ in range(5)]
            some.close()
        before = len(stub.bodies)
        assert 5 <= before < 40
        with Answers(endpoint, tmp_path / "a.db") as answers:
            replies = list(answers.ask(bodies(40)))
        assert [r.content for r in replies[:5]] == [r.content for r in first]
        assert len(stub.bodies) == 40 == len({number(body) for body in stub.bodies})
        assert answers.counts["cached"] == before


def test_a_request_that_stands_twice_is_sent_once(tmp_path):
    gate = threading.Event()

    def wait(body):
        gate.wait(5)
        return echo(body)

    with serving(wait, at_once=4) as (stub, endpoint), Answers(endpoint, tmp_path / "a") as answers:
        threading.Timer(0.1, gate.set).start()
        assert [r.content for r in answers.ask(bodies(1) * 6)] == ["so 0"] * 6
        assert len(stub.bodies) == 1


def test_another_model_seed_or_weights_are_another_answer_and_another_address_is_not():
    body = bodies(1)[0]
    here = Endpoint("http://a/v1", "m")
    keys = {
        here.key_of(body),
        Endpoint("http://a/v1", "n").key_of(body),
        Endpoint("http://a/v1", "m", served="sha").key_of(body),
        here.key_of(DECODING.body(body["messages"], sample=1)),
    }
    assert len(keys) == 4
    assert Endpoint("http://b/v1", "m", at_once=1).key_of(body) in keys


@pytest.mark.parametrize("transport", [Http(), OpenAiClient()])
def test_what_may_pass_is_tried_again(tmp_path, transport):
    seen = {}

    def moody(body):
        seen[number(body)] = tries = seen.get(number(body), 0) + 1
        if tries > number(body):
            return echo(body)
        return [(503, {}, b"busy"), (429, {"Retry-After": "0.01"}, b"{}"), (0, {}, b"")][tries - 1]

    with serving(moody, transport=transport) as (_, endpoint):
        with Answers(endpoint, tmp_path / "a") as answers:
            assert [r.content for r in answers.ask(bodies(4))] == [f"so {i}" for i in range(4)]
        assert answers.counts["retried"] == 0 + 1 + 2 + 3
        assert answers.counts["sent"] == 4 + 6


def test_a_server_that_asks_for_a_pause_gets_it_from_every_thread(tmp_path):
    times = []

    def once(body):
        times.append(time.monotonic())
        return (429, {"Retry-After": "0.4"}, b"") if len(times) == 1 else echo(body)

    with (
        serving(once, at_once=1) as (_, endpoint),
        Answers(endpoint, tmp_path / "a") as answers,
    ):
        assert len(list(answers.ask(bodies(3)))) == 3
    assert times[1] - times[0] >= 0.4


def test_no_more_attempts_a_minute_than_allowed(tmp_path):
    with (
        serving(echo, per_minute=60 * 20) as (_, endpoint),  # one every 50 ms
        Answers(endpoint, tmp_path / "a") as answers,
    ):
        start = time.monotonic()
        assert len(list(answers.ask(bodies(7)))) == 7
        assert time.monotonic() - start >= 6 * 0.05


BAD = {
    "not_json": b"<html>oops",
    "no_choice": {"choices": []},
    "no_content": completion("  "),
    "status_400": (400, {}, b"too long"),
}


def test_a_bad_answer_is_counted_kept_and_not_asked_for_again_unless_wanted(tmp_path):
    names = list(BAD)
    with serving(lambda body: BAD[names[number(body)]]) as (stub, endpoint):
        for _ in range(2):
            with Answers(endpoint, tmp_path / "a") as answers:
                assert [r.failure for r in answers.ask(bodies(4))] == names
        assert len(stub.bodies) == 4
        with Answers(endpoint, tmp_path / "a") as answers:
            kept = list(answers.failures())
        assert sorted(number(body) for body, _ in kept) == [0, 1, 2, 3]
        assert {"oops" in reply.detail for _, reply in kept} == {True, False}
        stub.say = echo
        with Answers(endpoint, tmp_path / "a", again=True) as answers:
            assert [r.content for r in answers.ask(bodies(4))] == [f"so {i}" for i in range(4)]
            assert not list(answers.failures()) and answers.counts["answered"] == 4


def test_one_request_without_an_answer_is_a_failure_and_asked_for_the_next_time(tmp_path):
    broken = {2}

    def say(body):
        return (500, {}, b"again?") if number(body) in broken else echo(body)

    with serving(say, attempts=2) as (stub, endpoint):
        with Answers(endpoint, tmp_path / "a") as answers:
            replies = list(answers.ask(bodies(5)))
            assert [r.failure for r in replies] == ["", "", UNREACHABLE, "", ""]
            assert replies[2].detail == "500: again?" and answers.counts["failed_unreachable"] == 1
        broken.clear()
        with Answers(endpoint, tmp_path / "a") as answers:
            assert [r.failure for r in answers.ask(bodies(5))] == [""] * 5
        assert len(stub.bodies) == 4 + 2 + 1


def test_a_server_that_is_gone_ends_the_run_soon_and_keeps_what_came(tmp_path):
    with serving(echo) as (_, endpoint), Answers(endpoint, tmp_path / "a") as answers:
        list(answers.ask(bodies(3)))
    gone = Endpoint(endpoint.url, "stub", attempts=2, backoff_s=0.01, down_after=3)
    with Answers(gone, tmp_path / "a") as answers:
        with pytest.raises(ConnectionError, match=r"3 requests in a row .* run again"):
            list(answers.ask(bodies(1000)))
        assert answers.counts["sent"] < 100
        assert [r.content for r in answers.ask(bodies(3))] == ["so 0", "so 1", "so 2"]


def test_a_wrong_key_or_model_is_said_at_once_and_the_key_is_never_written(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "very-secret")
    with serving(echo, key_variable="A_KEY") as (stub, endpoint):
        with Answers(endpoint, tmp_path / "a") as answers:
            list(answers.ask(bodies(1)))
        assert stub.keys == ["Bearer very-secret"]
        stub.say = lambda body: (404, {}, b"no model stub")
        with Answers(endpoint, tmp_path / "a") as answers:
            with pytest.raises(ValueError, match=r"answers 404 for model 'stub'.*check url, model"):
                list(answers.ask(bodies(3)))
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"so 0" in held and b"very-secret" not in held
    monkeypatch.delenv("A_KEY")
    with pytest.raises(ValueError, match="the environment has no A_KEY"):
        Answers(endpoint, tmp_path / "a")


def test_the_file_is_plain_sqlite_and_an_endpoint_a_value(tmp_path):
    with serving(echo) as (_, endpoint), Answers(endpoint, tmp_path / "a") as answers:
        list(answers.ask(bodies(2)))
    rows = sqlite3.connect(tmp_path / "a")
    assert rows.execute("SELECT count(*) FROM replies WHERE failure = ''").fetchone() == (2,)
    rows.close()
    assert from_json(to_json(endpoint)) == endpoint and hash(endpoint)
    with pytest.raises(ValueError, match="attempts 0"):
        Endpoint("http://x", "m", attempts=0)


def test_answers_are_read_leniently_where_servers_differ():
    no_usage = {"choices": [{"message": {"content": None, "reasoning_content": "so"}}]}
    reply = read_reply("k", 200, json.dumps(no_usage))
    assert (reply.reasoning, reply.content, reply.tokens, reply.failure) == ("so", "", -1, "")
    assert seconds_of("2.5") == 2.5 and seconds_of("") == seconds_of("soon") == 0
    assert seconds_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and seconds_of("1e9") == 600
