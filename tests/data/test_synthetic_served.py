"""Synthetic reasoning from our own server over HTTP: what it serves is what the pipeline keeps."""

import json

import pytest

from glm45_jax.data.endpoint import Decoding, Endpoint
from glm45_jax.data.sources import Doc
from glm45_jax.data.synthetic import Reasoned, SameAnswer
from tests.data.common import run
from tests.rollout.serving import Scripted, ids_of, serving


class Sums:
    name = "sums"

    def docs(self):
        for n in range(6):
            yield Doc(str(n), f"What is {n} + {n}?", "sums", {"answer": str(2 * n)})

    def version(self):
        return "1"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_only_right_answers_of_a_model_that_we_serve_are_kept_and_asked_for_once(tmp_path):
    said = "<think>Four and four.</think>\nIt is <answer>8</answer>.<|user|>"
    answers = str(tmp_path / "answers.jsonl")
    with serving(Scripted(scripts=[ids_of(said)])) as server:
        endpoint = Endpoint(f"{server.url}/v1", "tiny", served="a script")
        decoding = Decoding(temperature=0.7, max_tokens=200)
        reasoned = Reasoned(Sums(), SameAnswer(), endpoint, answers, samples=2, decoding=decoding)
        (doc,), counts = run(reasoned)
        asked = server.driver.stats.submitted
        again = run(reasoned)
        assert server.driver.stats.submitted == asked == 12
        assert server.idle()
    assert again == ([doc], counts)
    assert (counts["synthetic_right"], counts["synthetic_wrong"]) == (2, 10)
    assert (counts["synthetic_solved"], counts["synthetic_kept"]) == (1, 1)
    message = json.loads(doc.meta["messages"])[1]
    assert doc.meta["answer"] == "8" and doc.id.startswith("4/")
    assert (message["reasoning_content"], message["content"]) == ("Four and four.", "It is 8.")
