"""Metrics in seqio's form, plain functions of targets and a model's outputs: ours, and a caller for
any. Neither seqio nor jax.
"""

from __future__ import annotations

import collections
import inspect
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

MetricFn = Callable[..., Mapping[str, Any]]  # (targets, predictions) or (targets, scores)


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Share of the predictions that are their target, space at both ends aside; 0 to 1."""
    _same_length(targets, predictions)
    return _mean("exact_match", [t.strip() == p.strip() for t, p in _pairs(targets, predictions)])


def token_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Mean F1 of the words in common, without case, marks and English articles; 0 to 1.

    Source: SQuAD's evaluation (Rajpurkar et al. 2016); no words on both sides are a match.
    """
    _same_length(targets, predictions)
    return _mean("token_f1", [_f1(_words(t), _words(p)) for t, p in _pairs(targets, predictions)])


def log_likelihood(targets: Sequence[Any], scores: Sequence[float]) -> dict[str, float]:
    """Mean of the log-probabilities that a model gives whole targets; nats, 0 or below."""
    _same_length(targets, scores)
    return _mean("log_likelihood", [float(score) for score in scores])


def mean_of(name: str, grade: Callable[[Any, Any], float]) -> MetricFn:
    """A seqio metric function of a grader of one example, `grade(target, prediction)`."""

    def graded(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        _same_length(targets, predictions)
        return _mean(name, [float(grade(t, p)) for t, p in _pairs(targets, predictions)])

    return graded


def metric_values(
    metric_fns: Sequence[MetricFn], targets: Sequence[Any], **outputs: Sequence[Any]
) -> dict[str, float]:
    """What seqio metric functions, ours or a task's, say of a model's outputs, as numbers.

    outputs: `predictions`, `scores`, `aux_values`; each function gets those that it names. Values
    that seqio wraps (Scalar) are taken out. Needs no seqio for functions that need none.

    Raises: ValueError for an output that is missing, a metric that is there twice or no number.
    """
    found: dict[str, float] = {}
    for metric in metric_fns:
        wanted = [name for name in inspect.signature(metric).parameters if name != "targets"]
        given = {name: outputs[name] for name in wanted if name in outputs}
        if missing := [name for name in wanted if name not in outputs]:
            raise ValueError(f"metric {_label(metric)} needs {missing}, given are {list(outputs)}")
        for name, value in metric(targets, **given).items():
            value = getattr(value, "value", value)
            if not isinstance(value, int | float | np.number):
                raise ValueError(f"metric {_label(metric)}: {name} is {value!r}, not a number")
            if name in found:
                raise ValueError(f"two metrics are called {name}; leave one of them out")
            found[name] = float(value)
    return found


def _words(text: str) -> list[str]:
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _f1(target: list[str], prediction: list[str]) -> float:
    if not target or not prediction:
        return float(target == prediction)
    common = sum((collections.Counter(target) & collections.Counter(prediction)).values())
    return 2 * common / (len(target) + len(prediction))


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: math.fsum(values) / len(values) if values else math.nan}


def _pairs(targets: Sequence[Any], predictions: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(targets, predictions, strict=True)


def _same_length(targets: Sequence[Any], outputs: Sequence[Any]) -> None:
    if len(targets) != len(outputs):
        raise ValueError(f"{len(outputs)} outputs for {len(targets)} targets; give one for each")


def _label(metric: MetricFn) -> str:
    return getattr(metric, "__name__", repr(metric))
