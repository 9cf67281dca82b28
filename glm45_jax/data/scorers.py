"""Trained classifiers of documents: features of a text, and a linear model over them.

`Learned` says how to train one (which documents are good, which bad) and is a value; `fit` makes
the `Classifier`, the same from the same documents; `save` writes it down and `Saved` is the value
that names it by its hash. `data/quality.py` makes levels of their scores. Numpy, and scikit-learn
for the training alone.
Letters: `C` characters, `W` words, `N` features that a text has, `V` all there are, `D` documents.
"""

import functools
import hashlib
import heapq
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from glm45_jax.data.sources import Doc, Source
from glm45_jax.values import from_json, to_json

SCORERS_FORMAT = 1  # raise it when the same recipe gives another classifier


class Scorer(Protocol):
    """What `Quality` asks of a scorer, a hashable value: `Learned`, `Saved`, or one of your own."""

    def classifier(self) -> "Judge":
        """What scores texts."""
        ...

    def version(self) -> str:
        """What the scores depend on besides the fields."""
        ...


class Judge(Protocol):
    """A classifier, a regressor that learnt from a larger model, a rule."""

    def score(self, text: str) -> float:
        """0 (bad) to 1 (good)."""
        ...


class Sparse(NamedTuple):
    """Features of one text: which (int64, rising) and how much (float32); the others are 0."""

    index_N: np.ndarray
    value_N: np.ndarray


class Features(Protocol):
    """A text as numbers: `Words`, `Characters`, `Explains`."""

    @property
    def size(self) -> int:
        """How many features there are."""
        ...

    def of(self, text: str) -> Sparse:
        """Features of a text; an empty one may have none."""
        ...


@dataclass(frozen=True)
class Words:
    """Runs of 1 to `n` words, hashed; lower case, a document a unit vector.

    A bag of hashed n-grams under a linear model is what fastText is, without its low rank.
    """

    n: int = 2
    bits: int = 18  # 2**bits features
    max_chars: int = 20_000  # of the beginning

    @property
    def size(self) -> int:
        """How many features there are."""
        return 1 << self.bits

    def of(self, text: str) -> Sparse:
        """Counts of the n-grams, scaled to length 1."""
        chars_C = _code_points(text[: self.max_chars].lower())
        word_C = _is_word()[chars_C]
        edge_C = np.diff(word_C, prepend=False, append=False)
        begin_W, end_W = np.flatnonzero(edge_C).reshape(-1, 2).T
        return _counted(_runs(_hashed_spans(chars_C, begin_W, end_W), 1, self.n), self.bits)


@dataclass(frozen=True)
class Characters:
    """Runs of `low` to `high` characters, hashed: for scripts that do not part words."""

    low: int = 1
    high: int = 4
    bits: int = 18
    max_chars: int = 20_000

    @property
    def size(self) -> int:
        """How many features there are."""
        return 1 << self.bits

    def of(self, text: str) -> Sparse:
        """Counts of the n-grams, scaled to length 1."""
        chars_C = _code_points(text[: self.max_chars].lower()).astype(np.uint64)
        return _counted(_runs(chars_C, self.low, self.high), self.bits)


@dataclass(frozen=True)
class Explains:
    """Measures of a text that teaches: sentences, connectives, few marks, few repeats.

    English words are among them; other languages want `Words` or `Characters`.
    """

    max_chars: int = 20_000

    @property
    def size(self) -> int:
        """How many features there are."""
        return len(_MEASURES)

    def of(self, text: str) -> Sparse:
        """All measures, each about 0 to 1."""
        parts = _Parts.of(text[: self.max_chars])
        values = [min(max(measure(parts), 0.0), 1.0) for measure in _MEASURES]
        return Sparse(np.arange(self.size), np.array(values, np.float32))


@dataclass(frozen=True, eq=False)
class Classifier:
    """A linear model over features; the score of a text is how probable it is to be a good one."""

    features: Features
    weights_V: np.ndarray  # float32, V = features.size
    bias: float

    def logit(self, text: str) -> float:
        """Log odds that the text is good; no bounds."""
        index_N, value_N = self.features.of(text)
        return float(self.weights_V[index_N] @ value_N) + self.bias

    def score(self, text: str) -> float:
        """0 (bad) to 1 (good)."""
        return float(0.5 * (1 + np.tanh(0.5 * self.logit(text))))  # sigmoid that cannot overflow


@dataclass(frozen=True)
class Learned:
    """A classifier by recipe, trained where it is needed: documents of `good` against `bad`.

    max_docs: at most so many of each side, chosen by hash. l2: strength of the penalty on weights.
    """

    good: tuple[Source, ...]
    bad: tuple[Source, ...]
    features: Features = Words()
    max_docs: int = 20_000
    l2: float = 1.0
    seed: int = 0

    def classifier(self) -> Classifier:
        """Trained now."""
        good, bad = (chosen(side, self.max_docs, self.seed) for side in (self.good, self.bad))
        return fit(self.features, [d.text for d in good], [d.text for d in bad], l2=self.l2)

    def version(self) -> str:
        """What the classifier depends on besides the fields."""
        inside = " ".join(source.version() for source in (*self.good, *self.bad))
        return f"scorer={SCORERS_FORMAT} scikit-learn=={version('scikit-learn')} {inside}"


@dataclass(frozen=True)
class Saved:
    """A classifier that `save` wrote: another file under that name is refused."""

    path: str
    sha256: str

    def classifier(self) -> Classifier:
        """Read from the file.

        Raises: ValueError when it is not the file that `save` returned.
        """
        return _load(Path(self.path), self.sha256)

    def version(self) -> str:
        """The features it was trained for; the hash is a field."""
        return f"scorer={SCORERS_FORMAT}"


def fit(
    features: Features, good: Sequence[str], bad: Sequence[str], *, l2: float = 1.0
) -> Classifier:
    """Logistic regression, both sides of equal weight however many texts they have.

    The same texts in the same order give the same weights on one kind of processor; between kinds
    the last bits may differ, which `save` is for.

    Raises: ValueError when a side is empty.
    """
    if not good or not bad:
        raise ValueError(f"{len(good)} good and {len(bad)} bad texts; a classifier needs both")
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    rows = [features.of(text) for text in (*good, *bad)]
    begins = np.cumsum([0, *(len(row.index_N) for row in rows)])
    index, value = (np.concatenate(part) for part in zip(*rows, strict=True))
    matrix = csr_matrix((value.astype(np.float64), index, begins), (len(rows), features.size))
    side_D = np.repeat([1, 0], [len(good), len(bad)])
    # C multiplies the sum of the losses, so the penalty stays the same a document.
    model = LogisticRegression(C=_C / l2, class_weight="balanced", max_iter=1000)
    with threadpool_limits(1):  # sums in another order have other last bits
        model.fit(matrix, side_D)
    return Classifier(features, model.coef_[0].astype(np.float32), float(model.intercept_[0]))


def chosen(sources: Sequence[Source], max_docs: int, seed: int = 0) -> list[Doc]:
    """The documents of all sources, or `max_docs` of them by hash; in the order of their hashes."""
    keyed = (
        (hashlib.sha256(f"{seed}\0{doc.source}\0{doc.id}".encode()).digest(), number, doc)
        for number, doc in enumerate(doc for source in sources for doc in source.docs())
    )
    return [doc for _, _, doc in heapq.nsmallest(max_docs, keyed)]


def save(classifier: Classifier, path: str | Path) -> Saved:
    """Writes the classifier; the value to put into a config."""
    from safetensors.numpy import save as to_bytes

    about = {"format": SCORERS_FORMAT, "features": to_json(classifier.features)}
    about["bias"] = to_json(classifier.bias)
    data = to_bytes({"weights": classifier.weights_V}, {"classifier": json.dumps(about)})
    Path(path).write_bytes(data)
    return Saved(str(path), hashlib.sha256(data).hexdigest())


def area_under_curve(good: Sequence[float], bad: Sequence[float]) -> float:
    """How often a good document scores above a bad one, ties half; 0.5 knows nothing."""
    from scipy.stats import rankdata

    ranks = rankdata([*good, *bad])[: len(good)]
    return float((ranks.sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad)))


def _load(path: Path, sha256: str) -> Classifier:
    from safetensors.numpy import load

    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} has sha256 {found}, the config asks for {sha256}; it is another classifier, "
            "or damaged: save it again and use the value that `save` returns"
        )
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["classifier"])
    features, bias = from_json(about["features"]), from_json(about["bias"])
    return Classifier(features, load(data)["weights"], bias)


class _Parts(NamedTuple):
    """What the measures look at, each once; `kinds` counts the characters of each of `_kind_of`."""

    text: str
    kinds: np.ndarray
    words: Counter[str]  # in lower case
    n_words: int
    lines: list[str]  # with text, without the space around it
    sentences: int

    @classmethod
    def of(cls, text: str) -> "_Parts":
        words = _WORD.findall(text.lower())
        lines = [line for each in text.split("\n") if (line := each.strip())]
        kinds = np.bincount(_kind_of()[_code_points(text)], minlength=len(_KINDS))
        ends = sum(text.count(end) for end in _SENTENCE_ENDS)
        return cls(text, kinds, Counter(words), len(words), lines, ends)

    def of_kind(self, kind: str) -> float:
        """Share of the characters."""
        return float(self.kinds[_KINDS.index(kind)]) / max(len(self.text), 1)

    def of_words(self, words: Sequence[str]) -> float:
        """Share of the words."""
        return sum(map(self.words.__getitem__, words)) / max(self.n_words, 1)

    def of_lines(self, that: Callable[[str], bool]) -> float:
        """Share of the lines."""
        return sum(map(that, self.lines)) / max(len(self.lines), 1)


_KINDS = ("mark", "letter", "capital", "digit", "space", "stop")


@functools.cache
def _kind_of() -> np.ndarray:
    """The place in `_KINDS` of each code point."""

    def kind(char: str) -> str:
        if char.isalpha():
            return "capital" if char.isupper() else "letter"
        if char.isspace():
            return "space"
        return "digit" if char.isdigit() else "stop" if char in ".,;:'()-\"" else "mark"

    return np.array([_KINDS.index(kind(chr(point))) for point in range(0x110000)], np.uint8)


_WORD = re.compile(r"[^\W\d_]+")
_SENTENCE_ENDS = (". ", ".\n", "! ", "? ", "?\n", "\N{IDEOGRAPHIC FULL STOP}")
_LINE_ENDS = (".", "!", "?", ":", "\N{IDEOGRAPHIC FULL STOP}", "\N{FULLWIDTH QUESTION MARK}")
_FUNCTION = "the of and to a in is that for it as with be on by this are or an from".split()
_LINKING = (
    "because therefore thus however although since whether while hence unless if when then instead"
    " otherwise whereas"
).split()
_DEFINING = "means called defined known used uses consists describes represents example".split()
_TALKING = "you your we our note see let consider suppose why how".split()
# Scaled so that most texts lie in 0 to 1; what is above is cut.
_MEASURES: tuple[Callable[[_Parts], float], ...] = (
    lambda parts: math.log10(len(parts.text) + 1) / 5,
    lambda parts: parts.n_words / 30 / max(parts.sentences, 1),
    lambda parts: len(parts.text) / 120 / max(len(parts.lines), 1),
    lambda parts: len(set(parts.lines)) / max(len(parts.lines), 1),
    lambda parts: len(parts.words) / max(parts.n_words, 1) ** 0.75 / 4,  # it falls with length
    lambda parts: sum(len(w) * n for w, n in parts.words.items()) / 12 / max(parts.n_words, 1),
    lambda parts: parts.of_kind("letter"),
    lambda parts: parts.of_kind("capital") * 5,
    lambda parts: parts.of_kind("digit") * 4,
    lambda parts: parts.of_kind("mark") * 5,
    lambda parts: parts.of_kind("stop") * 5,
    lambda parts: parts.of_lines(lambda line: line.endswith(_LINE_ENDS)),
    lambda parts: parts.of_lines(lambda line: line[0] in "0123456789*+|#$>=-"),
    lambda parts: parts.of_lines(lambda line: len(line) <= 30),
    lambda parts: parts.of_lines(lambda line: line[-1] in "{};=\\|" or " = " in line),
    lambda parts: parts.of_words(_FUNCTION) * 2,
    lambda parts: parts.of_words(_LINKING) * 15,
    lambda parts: parts.of_words(_DEFINING) * 15,
    lambda parts: parts.of_words(_TALKING) * 15,
    lambda parts: parts.text.count("?") * 30 / max(parts.n_words, 1),
    lambda parts: parts.text.count("/") * 5 / max(parts.n_words, 1),
)
_C = 10.0  # of LogisticRegression at l2 = 1: rows are unit vectors, so weights may be large
_PRIME = 0x9E3779B97F4A7C15  # odd, its bits look random: 2**64 over the golden ratio
_MASK = (1 << 64) - 1


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@functools.cache
def _is_word() -> np.ndarray:
    """Whether each code point is a letter or a digit of any script."""
    return np.array([chr(point).isalnum() for point in range(0x110000)])


def _hashed_spans(chars_C: np.ndarray, begin_W: np.ndarray, end_W: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each span: its characters as the digits of a number in base `_PRIME`."""
    power_C1, inverse_C1 = _powers(-(-(len(chars_C) + 1) // 4096) * 4096)
    total_C1 = np.zeros(len(chars_C) + 1, np.uint64)
    np.cumsum((chars_C.astype(np.uint64) + 1) * power_C1[: len(chars_C)], out=total_C1[1:])
    return (total_C1[end_W] - total_C1[begin_W]) * inverse_C1[begin_W]


@functools.cache
def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers 0 .. n-1 of `_PRIME` and of its inverse, modulo 2**64."""
    inverse = pow(_PRIME, -1, 1 << 64)
    steps = [np.full(n, base, np.uint64) for base in (_PRIME, inverse)]
    for step in steps:
        step[0] = 1
        np.cumprod(step, out=step)
    return steps[0], steps[1]


def _runs(unit_W: np.ndarray, low: int, high: int) -> np.ndarray:
    """Hashes of all runs of low to high units."""
    prime = np.uint64(_PRIME)
    run_W, found = unit_W * prime, []
    for length in range(1, high + 1):
        if length > 1:
            run_W = (run_W[:-1] ^ (run_W[:-1] >> np.uint64(29))) * prime + unit_W[length - 1 :]
        if length >= low:
            found.append(run_W)
        if not len(run_W):
            break
    return np.concatenate(found) if found else run_W


def _counted(hash_N: np.ndarray, bits: int) -> Sparse:
    """Hashes folded to `bits` bits and counted, as a unit vector."""
    mixed_N = (hash_N ^ (hash_N >> np.uint64(32))) * np.uint64(_PRIME)
    index_N, count_N = np.unique(mixed_N >> np.uint64(64 - bits), return_counts=True)
    value_N = count_N / max(np.sqrt(np.square(count_N.astype(np.float64)).sum()), 1)
    return Sparse(index_N.astype(np.int64), value_N.astype(np.float32))
