"""Our driver behind JetStream's gRPC service, and JetStream's load client against it."""

import asyncio
import contextlib
import inspect
import json
import os
import subprocess
import sys
import time
from importlib import metadata

import psutil
import pytest

if sys.version_info >= (3, 13):
    pytest.skip("JetStream's packages have no wheels for this Python", allow_module_level=True)

import grpc
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc

from glm45_jax.rollout import jetstream
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.sampling import Sampling
from tests.rollout.arithmetic import Arithmetic, answer
from tests.rollout.jetstream_common import (
    PATIENCE_S,
    DecodeRequest,
    by_ids,
    by_text,
    greedy,
    ids_of,
    model,
    prompts,
    text_of,
)


@pytest.fixture(scope="module")
def served_model():
    return model()


@pytest.fixture(scope="module")
def tokenizer(served_model):
    return served_model[0]


@pytest.fixture(scope="module")
def engine(served_model):
    return served_model[1]


@pytest.fixture(scope="module")
def params(served_model):
    return served_model[2]


@contextlib.contextmanager
def served(driver, tokenizer, **options):
    server = jetstream.serve_grpc(driver, tokenizer, **options)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield jetstream_pb2_grpc.OrchestratorStub(channel)
    finally:
        server.stop()


def test_decode_tells_what_the_driver_says_as_it_says_it(engine, params, tokenizer):
    text = "class Ünïcode(ExitStack):"
    asks = [(p, 9 + i) for i, p in enumerate(prompts(4, [1, 16, 70, 200]))]
    asks.append((tokenizer.encode(text), 60))
    long = greedy(engine, params, asks)
    stop = (long[1][3],)
    ours = greedy(engine, params, asks, stop)
    driver = Driver(engine, params, version=7)
    knobs = Sampling(temperature=0, stop=stop)
    with served(driver, tokenizer, sampling=knobs) as stub:
        calls = [stub.Decode(by_ids(*ask)) for ask in asks[:-1]] + [stub.Decode(by_text(text, 60))]
        told = [list(call) for call in calls]
        ends = [dict(call.trailing_metadata()) for call in calls]
    assert [ids_of(t) for t in told] == ours
    assert all(len(t) > 1 for t, out in zip(told, ours, strict=True) if len(out) > 1)
    wanted = ["stop" if out[-1] in stop else "length" for out in ours]
    assert [end["finish"] for end in ends] == wanted and {"stop", "length"} == set(wanted)
    assert {end["version"] for end in ends} == {"7"}
    assert text_of(told[-1]) == tokenizer.decode(ours[-1], skip_special=True)
    assert not any(map(text_of, told[:-1]))
    assert driver.stats.running == 0


def until(condition):
    """Whether it holds before the time is over."""
    end = time.monotonic() + PATIENCE_S
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.005)
    return held


class Slow(Arithmetic):
    """Integers that take their time."""

    def decode(self, *args):
        time.sleep(0.02)
        return super().decode(*args)


def test_a_cancelled_call_gives_its_slot_back_at_once(tokenizer):
    driver = Driver(Slow(slots=1, pages=250, max_tokens=1000), 0)
    with served(driver, tokenizer) as stub:
        call = stub.Decode(by_ids([1, 2], 900))
        next(call)
        call.cancel()
        assert until(lambda: driver.stats.cancelled == 1)
        stats = driver.stats
        assert (stats.running, stats.free_pages) == (0, 250) and stats.decode_steps < 450
        after = stub.Decode(by_ids([4], 3), timeout=PATIENCE_S)
        assert len(ids_of(after)) == 3
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Decode(by_ids([5], 900), timeout=0.3))
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert until(lambda: not driver.busy)
    stats = driver.stats
    assert (stats.free_slots, stats.free_pages) == (1, 250) and stats.decode_steps < 900


INVALID = "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (by_ids([3, 97], 4), INVALID, r"token 97 of the prompt is not in \[0, 97\)"),
        (by_ids([3, -5], 4), INVALID, r"token -5 of the prompt is not in \[0, 97\)"),
        (by_ids([3] * 50, 4), INVALID, "prompt of 50 tokens .* a row holds 40"),
        (by_ids([3] * 30, 11), INVALID, "30 tokens and max_tokens 11 .* 40 .* use max_tokens 10"),
        (by_ids([], 4), INVALID, "the prompt is empty"),
        (by_ids([3], 0), INVALID, "max_tokens 0 is not a positive integer"),
        (by_ids([3], -1), INVALID, "max_tokens -1 is not a positive integer"),
        (by_text("", 4), INVALID, "the prompt is empty"),
        (DecodeRequest(max_tokens=4), INVALID, "set text_content or token_content"),
        (
            DecodeRequest(session_cache="x", max_tokens=1),
            "UNIMPLEMENTED",
            "session_cache is not supported",
        ),
        (by_ids([3, 96], 4), "INTERNAL", "RuntimeError: token 96 breaks the device"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
)
def test_a_bad_request_is_told_why_and_the_server_lives(tokenizer, request_, code, message):
    engine = Arithmetic(slots=2, pages=40)
    with served(Driver(engine, 0), tokenizer) as stub:
        with pytest.raises(grpc.RpcError, match=message) as caught:
            list(stub.Decode(request_, timeout=PATIENCE_S))
        assert caught.value.code().name == code
        good = stub.Decode(by_ids([3, 5], 4), timeout=PATIENCE_S)
        wanted = [answer([3, 5], Sampling(max_tokens=4, seed=n), 97)[0] for n in (0, 1)]
        assert ids_of(good) == wanted[code == "INTERNAL"]  # each one that is served has a seed
        assert stub.HealthCheck(jetstream_pb2.HealthCheckRequest(), timeout=PATIENCE_S).is_live


class Bug(Exception):
    """What no engine may raise."""


class Broken(Arithmetic):
    def decode(self, *args):
        raise Bug("the loop ends here")


def test_a_full_queue_and_a_broken_loop_are_told_apart(tokenizer):
    driver = Driver(Arithmetic(slots=1, pages=40), 0, max_waiting=1)
    driver.pause()
    with served(driver, tokenizer) as stub:
        first = stub.Decode(by_ids([3], 4), timeout=PATIENCE_S)
        assert until(lambda: driver.stats.waiting == 1)
        with pytest.raises(grpc.RpcError, match="1 requests wait already; try later") as caught:
            list(stub.Decode(by_ids([4], 4), timeout=PATIENCE_S))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        driver.resume()
        assert len(ids_of(first)) == 4
    with served(Driver(Broken(slots=1, pages=40), 0), tokenizer) as stub:
        with pytest.raises(grpc.RpcError, match="the loop ends here") as caught:
            list(stub.Decode(by_ids([3], 4), timeout=PATIENCE_S))
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert not stub.HealthCheck(jetstream_pb2.HealthCheckRequest(), timeout=PATIENCE_S).is_live


def test_a_server_listens_on_loopback_alone_and_shares_no_port(tokenizer):
    driver = Driver(Arithmetic(slots=1, pages=40), 0)
    server = jetstream.serve_grpc(driver, tokenizer)
    try:
        mine = psutil.Process().net_connections("inet")
        hosts = {
            c.laddr.ip.removeprefix("::ffff:")
            for c in mine
            if c.status == "LISTEN" and c.laddr.port == server.port
        }
        assert hosts == {"127.0.0.1"}
        with pytest.raises(OSError, match=rf"127.0.0.1:{server.port} .*use another port"):
            jetstream.serve_grpc(driver, tokenizer, port=server.port)
    finally:
        server.stop()


def test_a_server_that_stops_ends_open_calls_and_frees_their_slots(tokenizer):
    driver = Driver(Slow(slots=1, pages=400, max_tokens=1000), 0)
    with served(driver, tokenizer) as stub:
        call = stub.Decode(by_ids([1, 2], 900))
        next(call)
    with pytest.raises(grpc.RpcError):
        list(call)
    driver.run()
    stats = driver.stats
    assert (stats.cancelled, stats.free_slots, stats.free_pages) == (1, 1, 400)


@pytest.mark.parametrize("inside", [True, False], ids=["from its loop", "from a thread"])
def test_it_shares_the_loop_of_another_server(tokenizer, inside):
    driver = Driver(Arithmetic(slots=2, pages=40), 0)
    knobs = Sampling(max_tokens=6)

    async def scene():
        options = dict(loop=asyncio.get_running_loop(), sampling=knobs)
        if inside:
            server = jetstream.serve_grpc(driver, tokenizer, **options)
        else:
            server = await asyncio.to_thread(jetstream.serve_grpc, driver, tokenizer, **options)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = jetstream_pb2_grpc.OrchestratorStub(channel).Decode(by_ids([3, 5], 6))
            theirs = asyncio.create_task(collected(call))
            ours = await driver.generate([3, 5], knobs)
            told = ids_of(await theirs)
        await server.aclose()
        return told, ours.tokens_T.tolist()

    async def collected(call):
        return [response async for response in call]

    told, ours = asyncio.run(asyncio.wait_for(scene(), PATIENCE_S))
    assert told == ours == answer([3, 5], knobs, 97)[0]


@pytest.fixture(scope="module")
def client(tokenizer, tmp_path_factory):
    """The file that the load client reads, and the tokenizer that it makes of it."""
    from jetstream.third_party.llama3 import llama3_tokenizer

    path = tmp_path_factory.mktemp("client") / "glm.tiktoken"
    jetstream.write_client_tokenizer(tokenizer, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # else it reads what once was under this path
        return path, llama3_tokenizer.Tokenizer(str(path))


def test_the_client_reads_text_as_we_do(tokenizer, client):
    theirs = client[1]
    for text in (inspect.getsource(json), "naïve café 你好 🚀\r\n\n  12345 I'LL", ""):
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == text


def test_the_load_client_of_the_wheel_runs_against_our_server(
    engine, params, tokenizer, client, tmp_path
):
    wheel = metadata.distribution("google-jetstream")
    answers = tmp_path / "answers.json"
    driver = Driver(engine, params)
    greedy(engine, params, [([1] * 8, 2)])  # compiled
    server = jetstream.serve_grpc(driver, tokenizer)
    flags = {
        "--server": "127.0.0.1",
        "--port": server.port,
        "--model": "llama-3",
        "--tokenizer": client[0],
        "--dataset": "test",
        "--total-mock-requests": 24,
        "--request-outputs-file-path": answers,
        "--additional-metadata-metrics-to-save": "{}",
    }
    line = [str(word) for flag in flags.items() for word in flag]
    try:
        done = subprocess.run(
            [
                sys.executable,
                wheel.locate_file("benchmarks/benchmark_serving.py"),
                *line,
                "--save-request-outputs",
                "--save-result",
            ],
            cwd=tmp_path,
            env=os.environ | {"TIKTOKEN_CACHE_DIR": ""},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    assert "Successful requests: 24\n" in done.stdout
    stats = driver.stats
    assert (stats.submitted, stats.stop + stats.length, stats.running) == (24, 24, 0)
    (file,) = tmp_path.glob("JetStream-*.json")
    result = json.loads(file.read_text())["metrics"]
    assert (result["completed"], result["total_output_tokens"]) == (24, stats.output_tokens)
    told = json.loads(answers.read_text())
    asks = [(tokenizer.encode(one["prompt"]), 10) for one in told]
    for one, ids in zip(told, greedy(engine, params, asks, tokenizer.stop_ids), strict=True):
        words = [client[1].decode(ids[:n]) for n in range(1, len(ids) + 1)]  # it asks for 1 to 10
        assert one["success"] and one["generated_text"] in words
