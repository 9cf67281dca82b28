"""Laws of synthetic reasoning: what stays is right, asked for once, and in no evaluation set."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from glm45_jax.data.endpoint import Decoding, Endpoint
from glm45_jax.data.prepare import Data, _split
from glm45_jax.data.sources import Doc
from glm45_jax.data.synthetic import (
    Family,
    GymCheck,
    GymProblems,
    PageProblems,
    Reasoned,
    SameAnswer,
    answer_in,
    normal,
    synthetic,
)
from glm45_jax.values import from_json, to_json
from tests.data.common import run
from tests.data.stub_endpoint import completion, serving
from tests.gym import needs_gym

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = (
    Family("chain_sum", 20, (("min_terms", 2), ("max_terms", 3))),
    Family("prime_factorization", 12),
    Family("gcd", 8),
)
NOWHERE = Endpoint("http://127.0.0.1:9/v1", "m")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@dataclass(frozen=True)
class Made:
    texts: tuple[str, ...]
    name: str = "made"
    marks: tuple[tuple[str, str], ...] = field(default=())

    def docs(self):
        for number, text in enumerate(self.texts):
            yield Doc(str(number), text, self.name, dict(self.marks))

    def version(self):
        return "1"


@functools.cache
def oracle():
    """The stored answer of every question of the families."""
    from reasoning_gym import create_dataset

    found = {}
    for family in FAMILIES:
        for entry in create_dataset(family.name, size=family.size, seed=0, **dict(family.config)):
            found[entry["question"].strip()] = entry["answer"]
    return found


def question(body):
    return body["messages"][-1]["content"]


class Solver:
    """Answers well but for what `spoils` says: verdict by question and seed."""

    def __init__(self, spoils=lambda question, seed: ""):
        self.answers, self.spoils = oracle(), spoils

    def __call__(self, body):
        asked = question(body)
        answer, kind = self.answers[asked], self.spoils(asked, body["seed"])
        thought = f"Let me see: {asked[::-1]}"
        if kind == "inline":
            return f"<think>{thought}</think>\nSo <answer>{answer}</answer>"
        if kind == "cut":
            return completion(f"<answer>{answer}</answer>", reasoning=thought, finish="length")
        if kind == "no_answer":
            return completion(f"It is {answer}.", reasoning=f"<answer>{answer}</answer>")
        if kind == "failed_status_400":
            return (400, {}, b"no")
        said = {"wrong": f"{answer}1", "check_failed": "no idea"}.get(kind, answer)
        said = f"Not <answer>0</answer> but\n\n\n<answer>\n{said}\n</answer>"
        return completion(said, reasoning=thought)


def reasoned(endpoint, tmp_path, **fields):
    answers = str(tmp_path / "answers.db")
    return Reasoned(GymProblems(FAMILIES), GymCheck(), endpoint, answers, **fields)


@needs_gym
def test_what_stays_is_right_and_every_other_answer_is_counted(tmp_path):
    kinds = ["", "wrong", "inline", "cut", "no_answer", "failed_status_400", "check_failed"]
    order = {asked: number for number, asked in enumerate(oracle())}

    def spoils(asked, seed):
        kind = kinds[order[asked] % len(kinds)]
        return "wrong" if kind == "check_failed" and "×" not in oracle()[asked] else kind

    with serving(Solver(spoils)) as (stub, endpoint):
        source = reasoned(endpoint, tmp_path)
        docs, counts = run(source)
        again = run(source)
    assert again == (docs, counts)
    assert len(stub.bodies) == len(order) == counts["synthetic_problems"]  # none was asked twice
    by_text = {asked: spoils(asked, 0) for asked in order}
    good = [asked for asked in order if by_text[asked] in ("", "inline")]
    assert [doc.text.split("\n\nLet me see")[0] for doc in docs] == good
    assert counts["synthetic_kept"] == counts["synthetic_solved"] == len(good)
    assert counts["synthetic_dropped_unsolved"] == len(order) - len(good)
    for kind in kinds[1:2] + kinds[3:]:
        assert counts[f"synthetic_{kind}"] == list(by_text.values()).count(kind) > 0, kind
    families = [counts[f"synthetic_{f.name}_answers"] for f in FAMILIES]
    assert sum(families) == counts["synthetic_answers"] == len(order)
    assert counts["problems_chain_sum_made"] == 20
    for doc in docs:
        assert GymCheck().right(doc, doc.meta["answer"])
        asked, said = json.loads(doc.meta["messages"])
        assert said["reasoning_content"] == f"Let me see: {asked['content'][::-1]}"
        assert doc.text.endswith(said["content"]) and "<" not in said["content"]


@needs_gym
def test_samples_give_a_pass_rate_and_stay_on_one_side_of_the_split(tmp_path):
    def spoils(asked, seed):
        return "wrong" if (len(asked) + seed) % 3 == 0 or len(asked) % 7 == 0 else ""

    with serving(Solver(spoils)) as (_, endpoint):
        docs, counts = run(reasoned(endpoint, tmp_path, samples=3, keep=2))
    assert counts["synthetic_answers"] == 3 * counts["synthetic_problems"]
    assert counts["synthetic_kept"] == len(docs) == 2 * counts["synthetic_solved"]
    assert {doc.meta["pass_rate"] for doc in docs} == {"0.6667"}
    assert len({doc.id for doc in docs}) == len(docs)
    train, val = _split(docs, Data(((Made(("a",)), 1.0),), val_fraction=0.3))
    groups = [{doc.meta["group"] for doc in side} for side in (train, val)]
    assert train and val and not groups[0] & groups[1]
    with pytest.raises(ValueError, match="keep 3 of 2"):
        reasoned(NOWHERE, tmp_path, samples=2, keep=3)


@needs_gym
def test_what_is_in_an_evaluation_set_is_not_asked_and_what_recites_one_goes(tmp_path):
    asked = list(oracle())
    # Numbers make items of their own; the wording of a family is longer than a chance.
    banned = asked[3]
    secret = "one of a kind of sentence that only the evaluation set and a model that saw it has"
    evaluations = (Made((banned, secret), "held_out"),)

    class Reciting(Solver):
        def __call__(self, body):
            said = super().__call__(body)
            if question(body) == asked[5]:
                said["choices"][0]["message"]["reasoning_content"] += f"\nI know {secret}."
            return said

    with serving(Reciting()) as (stub, endpoint):
        source = synthetic(FAMILIES, endpoint, str(tmp_path / "a.db"), evaluations)
        docs, counts = run(source)
    sent = {question(body) for body in stub.bodies}
    assert banned not in sent and asked[5] in sent
    texts = "\n".join(doc.text for doc in docs)
    assert secret not in texts and len(docs) == len(asked) - 2
    assert counts["problems_decontaminate_contaminated"] == 1
    assert counts["decontaminate_contaminated"] == 1


@needs_gym
def test_problems_are_the_same_every_time_and_no_question_stands_twice():
    few = GymProblems((Family("chain_sum", 60, (("max_digits", 1), ("max_terms", 2))),))
    docs, counts = run(few)
    assert run(few) == (docs, counts)
    assert len({doc.text for doc in docs}) == len(docs) == 60 - counts["chain_sum_twice"] < 60
    others, _ = run(replace(few, seed=1))
    assert not {doc.id for doc in docs} & {doc.id for doc in others}
    with pytest.raises(ValueError, match="no family 'chainsum'"):
        run(GymProblems((Family("chainsum"),)))


def test_a_recipe_is_a_value():
    source = synthetic(FAMILIES, NOWHERE, "a.db", (Made(("a",)),), samples=2)
    inside = from_json(to_json(source.source), packages=("glm45_jax", "tests"))
    assert inside == source.source and hash(inside) and "reasoning-gym==" in source.version()


PAGE = "The river Ouse is 84 km long. It rises near Lower Beeding and ends at Newhaven."
FOUND = [
    {"question": "Where does the river end whose length is 84 km?", "answer": "newhaven"},
    {"question": "How long is the Ouse, in km?", "answer": 84},
    {"question": "What is its source?", "answer": "Mordor"},
    {"question": "Does it end at Newhaven?", "answer": "Newhaven"},
    {"question": "How long is the Ouse, in km?", "answer": "84"},
    {"question": "Where?"},
]


def test_problems_from_pages_have_answers_that_the_page_holds(tmp_path):
    def find(body):
        if "<extract>" in question(body):
            assert PAGE in question(body)
            return "```json\n" + "\n".join(map(json.dumps, FOUND)) + "\n```"
        return f"<answer>{'84.0 ' if 'long' in question(body) else 'Lewes'}</answer>"

    with serving(find) as (_, endpoint):
        answers = str(tmp_path / "a.db")
        pages = PageProblems(Made((PAGE,), marks=(("path", "p"),)), endpoint, answers, most=6)
        docs, counts = run(pages)
        kept, more = run(Reasoned(pages, SameAnswer(), endpoint, answers))
    assert [doc.meta["answer"] for doc in docs] == ["newhaven", "84"]
    reasons = ("not_in_document", "in_question", "twice", "unreadable")
    assert [counts[f"find_bad_{reason}"] for reason in reasons] == [1, 1, 1, 1]
    assert [doc.id for doc in kept] == ["0#1/0"] and kept[0].meta["path"] == "p"
    assert more["synthetic_wrong"] == 1 and more["problems_find_docs"] == 1


def test_answers_are_compared_by_what_they_say():
    assert normal("  1,000 Km") == normal("1000.0 km") and normal("-3") != normal("3")
    assert normal("Å, b!") == "å b" and normal("2.50") != normal("2.05") and normal("…") == ""
    assert answer_in("<answer>1</answer> <answer>\n2\n</answer>") == "2"
    assert answer_in("<answer>1") is None


@pytest.mark.slow
def test_our_own_server_is_such_an_endpoint(tmp_path):
    from glm45_jax import values
    from glm45_jax.checkpoint import Checkpoints
    from glm45_jax.model import config
    from glm45_jax.tokenizer import train_bpe
    from tests.rollout.common import weights

    tokenizer = train_bpe(["".join(oracle())], 400)
    cfg = replace(config.tiny(vocab=400), n_mtp=0)
    tokenizer.save(tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as saved:
        saved.save(1, {"params": weights(cfg, 0)}, sidecars={"model": values.to_json(cfg)})
    args = ["--checkpoint", tmp_path, "--port", 0, "--slots", 4, "--max-tokens", 512]
    process = subprocess.Popen(
        [sys.executable, "-m", "glm45_jax.rollout.server", *map(str, args)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    lines, ready = [], threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line)
            if "serving http" in line:
                ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(120), "".join(lines)
        (url,) = re.findall(r"serving (http://127\.0\.0\.1:\d+)/v1", "".join(lines))
        endpoint = Endpoint(f"{url}/v1", tmp_path.name, at_once=4)
        source = Reasoned(
            GymProblems(FAMILIES[:1]),
            GymCheck(),
            endpoint,
            str(tmp_path / "a.db"),
            decoding=Decoding(max_tokens=24, seed=5),
        )
        docs, counts = run(source)
    finally:
        process.kill()
        reader.join()
        process.stderr.close()
        process.wait()
    # A random model knows nothing, and each of its answers came.
    assert not docs and not [name for name in counts if "failed" in name]
    assert counts["synthetic_cut"] + counts.get("synthetic_no_answer", 0) == 20
    assert run(source) == (docs, counts)  # the server is gone, its answers are not
