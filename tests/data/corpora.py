"""Sources, steps and a small corpus that the tests of the pipeline share."""

import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from glm45_jax.data import pipeline
from glm45_jax.data.decontaminate import Decontaminated, Overlap
from glm45_jax.data.minhash import MinHash
from glm45_jax.data.quality import Percentiles, Quality, Thresholds
from glm45_jax.data.rules import CodeRules, Filtered
from glm45_jax.data.scorers import Learned, Words
from glm45_jax.data.sources import Doc
from glm45_jax.data.steps import HERE, Applied, Dedup, Each, Exact, Level, Long

WORDS = "river engine bread star music glass bee tree law map clock wool stone rain salt".split()
SLOW = "PIPELINE_TEST_SECONDS"  # that a step of these tests waits for every shard


@dataclass(frozen=True)
class Made:
    """Documents made here: some twice, some nearly twice, some short, some with secrets."""

    name: str = "made"
    n: int = 40
    digits: bool = False  # numbers in place of words
    readings: list[int] = field(default_factory=list, compare=False, repr=False)

    def docs(self):
        self.readings.append(1)
        for i in range(self.n):
            seed = i - 1 if i % 5 == 1 else i
            draw = random.Random(f"{self.name if i % 10 else 'shared'} {seed}")
            words = " ".join(
                map(str, draw.choices(range(99) if self.digits else WORDS, k=30 + seed % 7 * 20))
            )
            if i % 10 == 1:
                words += " and one more"  # a near duplicate; the others are exact ones
            yield Doc(f"{self.name}/{i:03d}", f"{words}.\n", self.name, {"path": f"{i}.txt"})
        return {"dropped_elsewhere": 2}

    def version(self):
        return "1"


@dataclass(frozen=True)
class Lengthy:
    """A scorer: how long a text is."""

    scale: float = 2000.0

    def classifier(self):
        return self

    def score(self, text):
        return min(1.0, len(text) / self.scale)

    def version(self):
        return ""


@dataclass(frozen=True)
class Inside:
    """A scorer that asks another."""

    scorer: Learned

    def classifier(self):
        return self.scorer.classifier()

    def version(self):
        return self.scorer.version()


@dataclass(frozen=True)
class Asks:
    """A wrapper that holds a scorer."""

    source: object
    scorer: Learned
    name: str = "asks"

    def docs(self):
        judge = self.scorer.classifier()
        counts = Counter(asked=0)
        for doc in self.source.docs():
            counts["asked"] += 1
            if judge.score(doc.text) > 0.5:
                yield doc
            else:
                counts["asks_dropped_bad"] += 1
        return dict(counts)

    def version(self):
        return self.scorer.version()


@dataclass(frozen=True)
class Waits:
    """Drops texts with fewer characters; waits, if the environment says so."""

    least: int = 200
    name: str = "waits"

    def version(self):
        return ""

    def fit(self, inputs, folder):
        return self._work

    def _work(self, part):
        time.sleep(float(os.environ.get(SLOW, "0")))
        docs = [doc for doc in part.docs if len(doc.text) >= self.least]
        return Applied(docs, {"short": len(part.docs) - len(docs)}, {})


@dataclass(frozen=True)
class Fragile:
    """Fails over documents that hold a word."""

    word: str
    name: str = "fragile"

    def version(self):
        return ""

    def fit(self, inputs, folder):
        return self._work

    def _work(self, part):
        for at, doc in enumerate(part.docs, part.first):
            if self.word in doc.text:
                raise ZeroDivisionError(doc.id)
            assert doc.meta["number"] == str(at)
        return Applied(list(part.docs), {}, {})


@dataclass(frozen=True)
class Listed:
    """The documents given, whatever they are."""

    kept: tuple
    name: str = "listed"

    def docs(self):
        return iter(self.kept)

    def version(self):
        return "1"


class Killed(BaseException):
    """As a signal would: no step takes it for a document's fault."""


QUALITY = Quality((Lengthy(),), Percentiles((0, 1, 2, 2)), (0.0, 0.7, 2.5))
SOURCES = (Made(), Made("other", 30))


def recipe(sources, out):
    """Every kind of step, over two sources; `sources` is not read."""
    assert sources
    return corpus(out)


def corpus(folder, shard_chars=4000, least=200, quality=QUALITY):
    steps = (
        Dedup(Exact()),
        Dedup(MinHash()),
        Waits(least),
        Each("decontaminate", Decontaminated(HERE, (Made("evaluation", 11),), Overlap(hits=8))),
        Level(quality),
    )
    coded = (
        Level(Quality((Inside(_trained()),), Thresholds((0.9,)), (0.0, 1.0)), name="recall"),
        Each("rules", Filtered(HERE, CodeRules(mean_line_length=700))),
        Long(500, 3.0, 1.0),
    )
    web = pipeline.Line("web", SOURCES, steps)
    found = pipeline.Corpus(str(folder), (web,), shard_chars=shard_chars)
    code = pipeline.Line("code", (found.output("web", "minhash"),), coded)
    return replace(found, lines=(web, code))


def _trained():
    return Learned((Made("good", 9),), (Made("bad", 9, digits=True),), Words(bits=10))


def everything(folder):
    """Bytes of all files by path."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def docs_of(source):
    return list(source.docs())
