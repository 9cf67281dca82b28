"""Synthetic data from our own server over HTTP: what it serves is what the pipeline keeps."""

import json

import pytest

from glm45_jax.data.agents import Trajectories
from glm45_jax.data.endpoint import Decoding, Endpoint
from glm45_jax.data.sources import Doc
from glm45_jax.data.synthetic import Reasoned, SameAnswer
from glm45_jax.data.tools import Functions
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


class Medians:
    name = "medians"

    def docs(self):
        (tool,) = [t for t in Functions().tools() if t.name == "statistics_median"]
        for n in range(3):
            plan = [{"name": tool.name, "arguments": {"data": [n, n, 9]}}]
            meta = {"level": "single", "tools": json.dumps([tool.function()])}
            yield Doc(str(n), f"Median of {n}, {n}, 9?", "m", meta | {"plan": json.dumps(plan)})

    def version(self):
        return "1"


def test_calls_that_a_model_we_serve_makes_are_run_and_their_results_go_back_to_it(tmp_path):
    call = "<arg_key>data</arg_key>\n<arg_value>[1, 1, 9]</arg_value>"
    call = f"<think>A tool.</think>\n<tool_call>statistics_median\n{call}\n</tool_call>"
    said = [f"{call}<|observation|>", "<think></think>\nIt is 1.<|user|>"]
    scripted = Scripted(scripts=[ids_of(text) for text in said], max_tokens=2048, pages=512)
    with serving(scripted) as server:
        endpoint = Endpoint(f"{server.url}/v1", "tiny", served="a script")
        made = Trajectories(
            Medians(), Functions(), endpoint, str(tmp_path / "a"), judges=(), user="",
            decoding=ByTurn(max_tokens=200),
        )  # fmt: skip
        (doc,), counts = run(made)
        assert server.idle()
    asked, called, told, answered = json.loads(doc.meta["messages"])
    assert (doc.id, asked["content"], told["content"]) == ("1/0", "Median of 1, 1, 9?", "1")
    assert called["tool_calls"][0]["function"]["arguments"] == {"data": [1, 1, 9]}
    assert (called["reasoning_content"], answered["content"]) == ("A tool.", "It is 1.")
    assert (counts["agents_not_reached"], counts["agents_good"]) == (2, 1)


class ByTurn(Decoding):
    """Each turn asks for the next script."""

    def body(self, messages, sample=0):
        return super().body(messages, sum(m["role"] == "assistant" for m in messages))
