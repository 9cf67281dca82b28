"""A model behind the server: what clients are told is what the engine drew; and the command that
serves one from disk.
"""

import base64
import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import jax
import numpy as np
import openai
import pytest

from glm45_jax import hf, values
from glm45_jax.checkpoint import Checkpoints
from glm45_jax.model import config
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.server import command
from glm45_jax.rollout.server.model import open_model, open_weights
from tests.rollout.common import weights
from tests.rollout.serving import USER, VOCAB, Scripted, ids_of, serving, tokenizer

ROOT = Path(__file__).resolve().parents[2]
CFG = dataclasses.replace(config.tiny(vocab=VOCAB), n_mtp=0)


@pytest.fixture(scope="module")
def server():
    engine = GlmEngine(
        CFG, slots=3, pages=24, page=8, max_tokens=64, buckets=(32,), routes=True, top_logprobs=2
    )
    with serving(engine, weights(CFG, 0)) as running:
        yield running
        assert running.idle()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(server, prompt, sampling):
    """What the engine draws for one request, without a server."""
    driver = Driver(server.engine, server.driver._batch._params)
    request = driver.submit(prompt, sampling)
    driver.run()
    return request.completion


def test_tokens_in_and_out_are_the_engines_to_the_bit(server):
    body = {"tokens": ids_of("<|user|>hello"), "max_tokens": 12, "temperature": 0.7, "seed": 3}
    body |= {"n": 2, "routes": True, "top_logprobs": 2, "ignore_eos": True, "top_p": 0.9}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    assert [one["index"] for one in answer["outputs"]] == [0, 1]
    assert answer["outputs"][0]["seed"] == 3
    for one in answer["outputs"]:
        how = Sampling(temperature=0.7, top_p=0.9, max_tokens=12, seed=one["seed"])
        want = alone(server, body["tokens"], how)
        assert (one["tokens"], one["finish"]) == (want.tokens_T.tolist(), want.finish)
        for name in ("logp", "logp_raw"):
            np.testing.assert_array_equal(np.float32(one[name]), getattr(want, f"{name}_T"))
        assert one["versions"] == list(want.versions)
        np.testing.assert_array_equal(one["top_ids"], want.top_ids_TK)
        np.testing.assert_array_equal(np.float32(one["top_logp"]), want.top_logp_TK)
        packed = one["routes"]
        routes = np.frombuffer(base64.b64decode(packed["base64"]), packed["dtype"])
        np.testing.assert_array_equal(routes.reshape(packed["shape"]), want.routes_TLA)
    assert answer["usage"]["completion_tokens"] == 24


def test_chat_log_probs_are_the_engines_and_a_seed_repeats_them(server, client):
    how = dict(model="tiny", messages=USER, max_tokens=10, logprobs=True, top_logprobs=1, seed=11)
    how["extra_body"] = {"return_token_ids": True}
    first, again = (client.chat.completions.create(**how) for _ in range(2))
    want = alone(
        server,
        first.prompt_token_ids,
        Sampling(max_tokens=10, seed=11, stop=tokenizer().stop_ids),
    )
    assert first.choices[0].token_ids == want.tokens_T.tolist()
    told = first.choices[0].logprobs.content
    np.testing.assert_array_equal(np.float32([t.logprob for t in told]), want.logp_raw_T)
    top = np.float32([t.top_logprobs[0].logprob for t in told])
    np.testing.assert_array_equal(top, want.top_logp_TK[:, 0])
    assert first.choices == again.choices


def test_a_stream_of_random_tokens_joins_to_the_whole(server, client):
    how = dict(model="tiny", messages=USER, max_tokens=40, seed=5)
    whole = client.chat.completions.create(**how).choices[0].message
    told = [c.choices[0].delta for c in client.chat.completions.create(**how, stream=True)]
    assert "".join(delta.content or "" for delta in told) == (whole.content or "")


# From disk


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model as a workdir and as a released folder."""
    root = tmp_path_factory.mktemp("served")
    cfg = config.tiny(vocab=VOCAB)
    params = weights(cfg, 1)
    with Checkpoints(root / "run" / "checkpoints") as saved:
        saved.save(
            7, {"params": params, "other": params.norm_D}, sidecars={"model": values.to_json(cfg)}
        )
    tokenizer().save(root / "run")
    hf.save(root / "released", cfg, params, files=root / "run")
    (root / "released" / "chat_template.jinja").write_text("without that switch")
    return root, cfg, params


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("name", "family"), [("run", "glm-4.5"), ("released", "glm-4.7")])
def test_a_folder_gives_the_model_that_was_saved(folders, name, family):
    root, cfg, params = folders
    device = jax.local_devices()[1]
    model = open_model(root / name, device=device)
    equal(model.params, params)
    assert {leaf.device for leaf in jax.tree.leaves(model.params)} == {device}
    assert (model.tokenizer.fingerprint, model.family) == (tokenizer().fingerprint, family)
    assert {p for p, _, _ in values.diff(model.cfg, cfg)} <= {"remat", "init_std"}
    without = open_model(root / name, device=device, mtp=False)
    assert (without.cfg.n_mtp, without.params.mtp) == (0, None)
    equal(open_weights(root / name, model.cfg, device=device), params)
    other = dataclasses.replace(cfg, mixer=dataclasses.replace(cfg.mixer, rope_theta=5e5))
    with pytest.raises(ValueError, match="RoPE base 500000"):
        open_weights(root / name, other, device=device)
    with pytest.raises(ValueError, match=r"holds another model: moe.scale: 2.5 there, 1.0 here"):
        moe = dataclasses.replace(cfg.moe, scale=1.0)
        open_weights(root / name, dataclasses.replace(cfg, moe=moe), device=device)


def test_a_run_of_several_rope_bases_has_to_say_which(tmp_path):
    cfg = config.tiny(vocab=VOCAB)
    stages = [{"fields": {"rope_theta": base}} for base in (1e4, 1e6)]
    sidecars = {"model": values.to_json(cfg), "experiment": {"fields": {"stages": stages}}}
    with Checkpoints(tmp_path / "checkpoints") as saved:
        saved.save(1, {"params": weights(cfg, 1)}, sidecars=sidecars)
    tokenizer().save(tmp_path)
    device = jax.local_devices()[0]
    with pytest.raises(ValueError, match=r"\[10000.0, 1000000.0\]; say by --rope-theta"):
        open_model(tmp_path, device=device)
    model = open_model(tmp_path, device=device, rope_theta=1e6)
    assert model.cfg.mixer.rope_theta == 1e6


@pytest.fixture
def own_logging():
    """The command sets up logging for its process; the one of the tests has it back afterwards."""
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    yield
    root.handlers[:], _ = handlers, root.setLevel(level)


@pytest.mark.usefixtures("own_logging")
def test_bad_input_ends_the_command_with_two_and_one_message(tmp_path, capfd, folders):
    def said(*args):
        assert command.main(["--checkpoint", *map(str, args)]) == 2
        return capfd.readouterr().err.splitlines()[-1]

    assert "is not there" in said(tmp_path / "none", "--port", 0)
    assert "neither config.json" in said(tmp_path, "--port", 0)
    token = tmp_path / "token"
    token.write_text("\n")
    assert "is empty" in said(folders[0] / "run", "--port", 0, "--admin-token", token)
    assert "draft 4 is not in" in said(folders[0] / "run", "--port", 0, "--draft", 4)
    with serving(Scripted()) as running:
        port = running.url.rpartition(":")[2]
        assert "use another --port" in said(folders[0] / "run", "--port", port)


@contextlib.contextmanager
def commanded(*args, env):
    """The process of the command, and the lines it has written so far, once it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "glm45_jax.rollout.server", *map(str, args)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    )
    lines, serving = [], threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line)
            if "serving http" in line:
                serving.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert serving.wait(60), "".join(lines)
        yield process, lines
    finally:
        process.kill()
        reader.join()
        process.stderr.close()
        process.wait()


def decoded(port, prompt, count):
    """What JetStream's protocol says to a prompt of ids."""
    import grpc
    from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc

    content = jetstream_pb2.DecodeRequest.TokenContent(token_ids=prompt)
    request = jetstream_pb2.DecodeRequest(token_content=content, max_tokens=count)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        told = list(jetstream_pb2_grpc.OrchestratorStub(channel).Decode(request, timeout=30))
    samples = [sample for one in told for sample in one.stream_content.samples]
    return [token for sample in samples for token in sample.token_ids]


def test_the_command_serves_a_checkpoint_until_it_is_told_to_end(folders):
    root, _, _ = folders
    args = ["--checkpoint", root / "run", "--port", 0, "--slots", 2, "--max-tokens", 32]
    args += ["--grpc-port", 0] if importlib.util.find_spec("jetstream") else []
    with commanded(*args, env={"GLM45_ADMIN_TOKEN": "secret"}) as (process, lines):
        (url,) = re.findall(r"serving (http://127\.0\.0\.1:\d+)/v1", "".join(lines))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            how = dict(model="run", messages=USER, max_tokens=4, temperature=0)
            answer = client.chat.completions.create(**how)
            assert answer.usage.completion_tokens == 4
            pushed = httpx.post(
                f"{url}/admin/weights",
                json={"path": str(root / "run"), "policy": "abort_and_resume"},
                headers={"authorization": "Bearer secret"},
                timeout=60,
            )
            assert pushed.json()["version"] == 1, pushed.text
            extra = {"return_token_ids": True}
            again = client.chat.completions.create(**how, extra_body=extra)
            assert again.choices[0].message == answer.choices[0].message  # the same weights
            assert again.choices[0].versions == [1] * 4
        if "--grpc-port" in args:
            (port,) = re.findall(r"gRPC on port (\d+)", "".join(lines))
            ids = decoded(port, again.prompt_token_ids, 4)
            assert ids == again.choices[0].token_ids, "one engine, both greedy"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert "secret" not in "".join(lines)


# The end


@pytest.mark.parametrize("stream", [True, False])
def test_at_the_end_what_runs_has_time_and_then_is_told(monkeypatch, stream):
    monkeypatch.setattr(command, "GRACE_SECONDS", 0.3)
    engine = Scripted(scripts=[ids_of("a<|user|>"), ids_of("a" * 400)], step_seconds=0.01)
    answers = {}

    def ask(url, seed):
        body = {"model": "tiny", "messages": USER, "seed": seed, "stream": stream}
        answers[seed] = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)

    with serving(engine) as running:
        threads = [threading.Thread(target=ask, args=(running.url, seed)) for seed in (0, 1)]
        for thread in threads:
            thread.start()
        while running.driver.stats.running < 1 or running.driver.stats.submitted < 2:
            time.sleep(0.005)
    for thread in threads:
        thread.join()
    assert running.idle()
    last = answers[1].text.strip().split("data: ")[-1]
    assert json.loads(last)["error"]["code"] == "closing"
    assert answers[1].status_code == (200 if stream else 503)
    assert answers[0].status_code == 200 and "closing" not in answers[0].text
