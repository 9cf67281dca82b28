"""seqio's tasks and metrics on a model: log-probs are the model's, predictions the engine's."""

import dataclasses

import jax
import numpy as np
import pytest

from glm45_jax import params as params_lib
from glm45_jax.data import tasks
from glm45_jax.evals.likelihood import target_scores
from glm45_jax.evals.tasks import evaluate_seqio
from glm45_jax.model import config, transformer
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.engine import GlmEngine
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.tokenizer import train_bpe

CFG = dataclasses.replace(config.tiny(), vocab=320)
QUESTIONS = ["two and two", "what is a bee?", "x", "a longer question than all the others here"]
SHORT = Sampling(temperature=0.0, max_tokens=6)
LONGEST = 65  # tokens of a pair of these tests


@pytest.fixture(scope="module")
def params():
    return params_lib.init(transformer.specs(CFG), jax.random.key(0))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(QUESTIONS, 300)


@pytest.fixture
def driver(params):
    engine = GlmEngine(CFG, slots=2, page=16, pages=16, max_tokens=96, buckets=(32, 64))
    return Driver(engine, params)


@jax.jit
def log_probs(params, row_1T):
    hidden = transformer.forward(params, row_1T, cfg=CFG)
    return jax.nn.log_softmax(transformer.logits(params, hidden, cfg=CFG)[0])


def by_hand(params, inputs, target):
    row = [*inputs, *target]
    assert len(row) <= LONGEST
    # One length, one program: what follows changes nothing before it (tests/model/test_laws.py).
    logp_TV = np.asarray(log_probs(params, np.array([row + [0] * (LONGEST - len(row))])))
    return sum(float(logp_TV[at - 1, row[at]]) for at in range(len(inputs), len(row)))


def test_scores_are_the_models_log_probs_whatever_the_rows(params):
    draw = np.random.default_rng(0)
    pairs = [
        (draw.integers(0, CFG.vocab, n).tolist(), draw.integers(0, CFG.vocab, m).tolist())
        for n, m in ((1, 1), (3, 9), (20, 4), (7, 0), (5, 60))
    ]
    want = [by_hand(params, *pair) for pair in pairs]
    assert want[3] == 0
    for rows, multiple in ((8, 64), (2, 32), (1, 1)):
        found = target_scores(params, pairs, cfg=CFG, rows=rows, multiple=multiple)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="pair 1 has 0 input tokens"):
        target_scores(params, [([1], [2]), ([], [2])], cfg=CFG)


def test_metrics_of_a_seqio_task_are_of_what_the_engine_says(params, tokenizer, driver):
    asked = [tokenizer.encode(question) for question in QUESTIONS]
    stop = tokenizer.stop_ids
    told = Driver(driver.engine, params)
    requests = [
        told.submit(ids, Sampling(temperature=0.0, max_tokens=6, stop=stop)) for ids in asked
    ]
    told.run()
    said = [
        tokenizer.decode(i for i in r.completion.tokens_T.tolist() if i < tokenizer.vocab)
        for r in requests
    ]
    answers = [*said[:3], "something else"]
    fns = [tasks.exact_match, tasks.log_likelihood]
    pairs = {"test": list(zip(QUESTIONS, answers, strict=True))}
    task = tasks.pair_task("questions", pairs, tokenizer, metric_fns=fns)
    found = evaluate_seqio(task, driver, params, tokenizer, cfg=CFG, sampling=SHORT)
    match = [a.strip() == s.strip() for a, s in zip(answers, said, strict=True)]
    want = [
        by_hand(params, ids, tokenizer.encode(answer))
        for ids, answer in zip(asked, answers, strict=True)
    ]
    assert sum(match) >= 3 and found["exact_match"] == sum(match) / 4
    assert found["log_likelihood"] == pytest.approx(sum(want) / 4, rel=1e-5)
    first = evaluate_seqio(task, driver, params, tokenizer, cfg=CFG, sampling=SHORT, limit=1)
    assert first["log_likelihood"] == pytest.approx(want[0], rel=1e-5)
    seqio = tasks.seqio()
    assert isinstance(task, seqio.Task) and task.predict_metric_fns and task.score_metric_fns


def test_tasks_that_cannot_be_scored_are_refused(params, tokenizer, driver):
    pairs = {"test": [("a", "b")]}
    dumb = tasks.pair_task("dumb", pairs, tokenizer, metric_fns=())
    with pytest.raises(ValueError, match="has no metric_fns"):
        evaluate_seqio(dumb, driver, params, tokenizer, cfg=CFG)
    task = tasks.pair_task("q", pairs, tokenizer, metric_fns=[tasks.exact_match])
    other = train_bpe(["other words, others still"], 292)
    with pytest.raises(ValueError, match="is over GlmVocabulary"):
        evaluate_seqio(task, driver, params, other, cfg=CFG)
    with pytest.raises(ValueError, match="'train'"):
        evaluate_seqio(task, driver, params, tokenizer, cfg=CFG, split="train")
