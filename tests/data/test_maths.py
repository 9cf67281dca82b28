"""Laws of scores learnt from a larger model, which is here a rule behind a real HTTP server."""

import functools
import hashlib
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest

from glm45_jax.data.endpoint import Endpoint, Reply
from glm45_jax.data.maths import (
    Embedded,
    Joined,
    Rubric,
    Taught,
    as_text,
    extract_of,
    fit_scores,
    mathematical,
    rank_correlation,
)
from glm45_jax.data.quality import copies_of
from glm45_jax.data.scorers import Characters, Explains, Words, fit, save
from glm45_jax.data.sources import Doc, Docstrings
from glm45_jax.values import from_json, to_json
from tests.data.common import run
from tests.data.stub_endpoint import serving

NUMBERS = re.compile(
    r"\b(number|integer|float|value|sum|mean|random|distribution|decimal|return)", re.IGNORECASE
)


@functools.cache
def docstrings():
    return tuple(Docstrings().docs())  # of the standard library: real prose


@dataclass(frozen=True)
class Prose:
    """Read from disk once for all tests."""

    name: str = "docstrings"

    def docs(self):
        return iter(docstrings())

    def version(self):
        return "1"


SOURCE = Prose()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def extract(body):
    return body["messages"][0]["content"].split("<extract>\n")[1].split("\n</extract>")[0]


def truth(text):
    """A whole number from 0 to 10: how dense a text is in words about numbers."""
    words = len(re.findall(r"\w+", text)) or 1
    return min(10, round(120 * len(NUMBERS.findall(text)) / words))


def judge(body):
    """A stand-in for a large model; it errs by one now and then, and has its moods."""
    text = extract(body)
    mood = int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) % 50
    if mood == 0:
        return "I would rather not."
    if mood == 1:
        return (400, {}, b"no")
    return f"It could be a 3. Some of it.\n**Score:** {min(10, max(0, truth(text) + mood % 3 - 1))}"


def taught(endpoint, tmp_path, **fields):
    return Taught(
        **{
            "sources": (SOURCE,),
            "endpoint": endpoint,
            "answers": str(tmp_path / "answers.db"),
            "features": Words(n=1, bits=14),
            "max_docs": 300,
            "held_out": 0.3,
            "l2": 0.3,
        }
        | fields
    )


@pytest.mark.slow
def test_the_small_model_orders_documents_it_never_saw_as_the_large_one_does(tmp_path):
    with serving(judge) as (stub, endpoint):
        recipe = taught(endpoint, tmp_path)
        classifier, report = recipe.lesson()
        asked = len(stub.bodies)
        again = recipe.lesson()
    assert len(stub.bodies) == asked == report.sampled == 300  # the second time cost nothing
    assert again.report == report
    assert np.array_equal(again.classifier.weights_V, classifier.weights_V)
    print(as_text(report))
    assert report.failed and report.unread
    assert report.trained_on + report.held_out + report.failed + report.unread == 300
    assert report.rank_correlation > 0.5 and report.error < 0.8 * report.error_of_mean
    assert f"rank_correlation {report.rank_correlation:.3f}" in as_text(report)
    shares = [share for _, share, _, _ in report.at]
    assert shares == sorted(shares, reverse=True) and len(shares) == 9


def test_scores_that_cannot_be_learnt_are_reported_as_not_learnt(tmp_path):
    def moody(body):
        return f"Score: {int(hashlib.sha256(extract(body).encode()).hexdigest()[:4], 16) % 11}"

    with serving(moody) as (_, endpoint):
        report = taught(endpoint, tmp_path).lesson().report
    assert abs(report.rank_correlation) < 0.3 and report.error > 0.9 * report.error_of_mean


def test_what_reaches_the_threshold_is_read_more_often(tmp_path):
    with serving(judge) as (_, endpoint):
        classifier = taught(endpoint, tmp_path).classifier()
    scorer = save(classifier, tmp_path / "maths.safetensors")
    docs, counts = run(mathematical(SOURCE, scorer, threshold=0.4, epochs=(1, 3)))
    for doc in docs:
        assert copies_of(doc) == (3 if classifier.score(doc.text) >= 0.4 else 1)
    high = counts["quality_level_1_docs"]
    assert 0 < high < len(docs) and counts["quality_level_0_docs"] == len(docs) - high
    dropped, _ = run(mathematical(SOURCE, scorer, threshold=0.4, epochs=(0, 3)))
    assert len(dropped) == high
    by_truth = [truth(extract_of(doc.text, 6000)) for doc in docs]
    means = [np.mean([t for t, d in zip(by_truth, docs, strict=True) if d.meta["level"] == level])
             for level in "01"]  # fmt: skip
    assert means[1] > means[0] + 1


def test_shares_of_zero_and_one_are_learnt_as_the_sides_of_a_classifier():
    docs = list(SOURCE.docs())[:80]
    good = [doc.text for doc in docs if truth(doc.text) >= 2]
    bad = [doc.text for doc in docs if truth(doc.text) < 2]
    size = min(len(good), len(bad))
    good, bad = good[:size], bad[:size]
    sides = fit(Explains(), good, bad)
    shares = fit_scores(Explains(), good + bad, [1.0] * size + [0.0] * size)
    assert np.abs(sides.weights_V - shares.weights_V).max() < 0.02 * np.abs(sides.weights_V).max()
    with pytest.raises(ValueError, match=r"2 texts with scores 0\.5 to 0\.5"):
        fit_scores(Explains(), good[:2], [0.5, 0.5])


def test_joined_features_are_those_of_the_parts_side_by_side():
    parts = (Explains(), Characters(bits=10), Embedded(Fixed(), 3))
    joined = Joined(parts).of("Because of this, 2 + 2 = 4.")
    dense = np.zeros(Joined(parts).size)
    dense[joined.index_N] = joined.value_N
    rows = []
    for part in parts:
        row = np.zeros(part.size)
        one = part.of("Because of this, 2 + 2 = 4.")
        row[one.index_N] = one.value_N
        rows.append(row)
    assert np.array_equal(dense, np.concatenate(rows))
    assert (np.diff(joined.index_N) > 0).all()
    with pytest.raises(ValueError, match="3 entries, dim is 4"):
        Embedded(Fixed(), 4).of("x")


class Fixed:
    def __call__(self, texts):
        return np.full((len(texts), 3), 0.5, np.float32)


def test_a_score_is_read_where_it_is_meant_and_nowhere_else():
    rubric = Rubric()

    def read(text):
        return rubric.score(Reply("k", text))

    assert read("Rather 2 than 3.\nScore: 8") == 0.8 and read("score: **10**") == 1.0
    assert read("Score: 3? No.\nScore: 4") == 0.4 and read("Score: 2.5/10") == 0.25
    assert read("8") is None and read("Score: 11") is None and read("Score: -1") is None
    with pytest.raises(ValueError, match="0 times"):
        Rubric(prompt="How good?")


def test_a_document_cannot_open_the_prompt_and_a_long_one_is_shown_in_parts():
    rubric = Rubric(max_chars=300)
    text = "{text} {0} " + "a" * 500 + "MIDDLE" + "b" * 500 + " the end"
    prompt = rubric.body(Doc("1", text, "s"))["messages"][0]["content"]
    assert "{text} {0}" in prompt and "MIDDLE" in prompt and "the end" in prompt
    assert len(prompt) < len(rubric.prompt) + 330
    assert extract_of("short", 300) == "short"


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 60)
    b = a + rng.integers(0, 5, 60)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(a, -a) == pytest.approx(-1) and math.isnan(rank_correlation(a, a * 0))


def test_a_recipe_is_a_value_and_says_what_is_wrong(tmp_path):
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", served="abc")
    recipe = taught(endpoint, tmp_path, features=Explains())
    assert from_json(to_json(recipe), packages=("glm45_jax", "tests")) == recipe and hash(recipe)
    assert "served=abc" in recipe.version()
    assert recipe.version() != replace(recipe, endpoint=replace(endpoint, model="n")).version()
    with pytest.raises(ValueError, match=r"held_out 1\.0"):
        taught(endpoint, tmp_path, held_out=1.0)
    with serving(lambda body: "no score") as (_, served):
        with pytest.raises(ValueError, match="5 answers without a score"):
            taught(served, tmp_path, max_docs=5).lesson()
