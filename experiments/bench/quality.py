"""How well and how fast documents are judged: `python -m experiments.bench.quality [--html DIR]`.

Real text of this machine: documentation and docstrings of Python packages against change logs, file
tables and logs. Two scorers with different features and different positives are trained on two
thirds of the packages; AUC is taken on the others. Then everything is leveled as web pages would
be. Writes experiments/bench/results/<device>.json under the key "quality".
"""

import argparse
import gzip
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.results import cpu_name, merge_result
from glm45_jax.data.html import HtmlFiles
from glm45_jax.data.languages import identify
from glm45_jax.data.quality import Leveled, Quality, copies_of
from glm45_jax.data.scorers import Explains, Learned, Words, area_under_curve
from glm45_jax.data.sources import (
    Doc,
    Docstrings,
    PackageDocs,
    PydocTopics,
    Source,
    TextFiles,
    split_at_lines,
)

SITE_PACKAGES = str(Path(np.__file__).parent.parent)
PART_CHARS = 8000  # of a log or a table, so that none is one huge document


@dataclass(frozen=True)
class Changelogs:
    """Change logs of Debian packages."""

    name: str = "changelogs"

    def docs(self) -> Iterator[Doc]:
        for path in sorted(Path("/usr/share/doc").glob("*/changelog*.gz")):
            text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
            where = "/".join(path.parts[-2:])
            yield Doc(where, text, self.name, {"path": where})

    def version(self) -> str:
        return ""


@dataclass(frozen=True)
class Kept:
    """Documents in memory: parts of those of `sources`, of some packages only.

    third: which thirds of the packages, by hash of the first folder of a path.
    """

    name: str
    sources: tuple[Source, ...]
    third: tuple[int, ...] = (0, 1, 2)

    def docs(self) -> Iterator[Doc]:
        for source in self.sources:
            for doc in read(source):
                package = doc.meta["path"].split("/")[0]
                if hashlib.sha256(package.encode()).digest()[0] % 3 in self.third:
                    yield doc

    def version(self) -> str:
        return ""


GOOD: tuple[Source, ...] = (PydocTopics(), Docstrings(include=("stdlib", "site")), PackageDocs())
BAD: tuple[Source, ...] = (
    Changelogs(),
    TextFiles(SITE_PACKAGES, "*.dist-info/RECORD", name="records"),
    TextFiles("/var/lib/dpkg/info", "*.md5sums", name="checksums"),
    TextFiles("/var/log", "**/*.log", name="logs"),
)
TRAIN = (0, 1)
REFERENCE = Learned(
    (Kept("reference", GOOD[:2], TRAIN),), (Kept("noise", BAD, TRAIN),), Words(), max_docs=3000
)
EXPLAINS = Learned(
    (Kept("explaining", (GOOD[0], GOOD[2]), TRAIN),),
    (Kept("noise", BAD[:2], TRAIN),),
    Explains(),
    max_docs=3000,
)
SCORERS = {"reference_words": REFERENCE, "explains": EXPLAINS}

_read: dict[str, list[Doc]] = {}


def read(source: Source) -> list[Doc]:
    """The documents of a source in parts, read once."""
    if source.name not in _read:
        _read[source.name] = [
            Doc(f"{doc.id}:{i}", part, source.name, doc.meta)
            for doc in source.docs()
            for i, part in enumerate(split_at_lines(doc.text, PART_CHARS)[:20])
            if part.strip()
        ]
    return _read[source.name]


def timed(docs: list[Doc], judge: Any) -> dict[str, float]:
    """Documents and MB a second of a function of a text."""
    started = time.perf_counter()
    for doc in docs:
        judge(doc.text)
    seconds = time.perf_counter() - started
    megabytes = sum(len(doc.text.encode()) for doc in docs) / 1e6
    return {
        "docs_per_s": round(len(docs) / seconds),
        "mb_per_s": round(megabytes / seconds, 2),
    }


def held_out(name: str, scorer: Learned) -> dict[str, Any]:
    """AUC on packages that were not trained on: against all that is bad, and each kind of it."""
    started = time.perf_counter()
    classifier = scorer.classifier()
    seconds = time.perf_counter() - started
    good = [classifier.score(doc.text) for doc in Kept("", GOOD, (2,)).docs()]
    bad = {
        source.name: [classifier.score(doc.text) for doc in Kept("", (source,), (2,)).docs()]
        for source in BAD
    }
    each = {
        kind: round(area_under_curve(good, scores), 5) for kind, scores in bad.items() if scores
    }
    every = area_under_curve(good, [score for scores in bad.values() for score in scores])
    docs = list(Kept("", (*GOOD, *BAD), (2,)).docs())
    found = {"auc": round(every, 5), "auc_against": each, "fit_s": round(seconds, 2)}
    print(f"{name:16s} AUC {every:.4f} {each} fitted in {seconds:.1f} s")
    return found | timed(docs, classifier.score)


def leveled(quality: Quality) -> dict[str, Any]:
    """Everything as one population: buckets, levels, what is in them, and the speed."""
    source = Kept("all", (*GOOD, *BAD))
    kinds = Counter(doc.source for doc in source.docs())
    n = kinds.total()
    megabytes = sum(len(doc.text.encode()) for doc in source.docs()) / 1e6
    started = time.perf_counter()
    wrapped = Leveled(source, quality).measured()
    measured = time.perf_counter()
    docs, walk = [], wrapped.docs()
    while True:
        try:
            docs.append(next(walk))
        except StopIteration as end:
            counts = end.value
            break
    seconds = time.perf_counter() - measured
    buckets = [counts.get(f"quality_bucket_{b:02d}_docs", 0) for b in range(20)]
    print("buckets", buckets)
    levels = []
    for level, epochs in enumerate(quality.epochs):
        here = [doc for doc in docs if doc.meta["level"] == str(level)]
        inside = Counter(doc.source for doc in here)
        if not epochs:  # not among docs
            inside = kinds - Counter(doc.source for doc in docs)
        row = {
            "epochs": epochs,
            "docs": counts.get(f"quality_level_{level}_docs", 0),
            "mchars": round(counts.get(f"quality_level_{level}_chars", 0) / 1e6, 2),
            "copies": sum(copies_of(doc) for doc in here),
            "epoch_mchars": round(counts.get(f"quality_level_{level}_epoch_chars", 0) / 1e6, 2),
            "sources": dict(sorted(inside.items())),
        }
        print(f"level {level}", row)
        levels.append(row)
    return {
        "docs": n,
        "mb": round(megabytes, 1),
        "buckets": buckets,
        "levels": levels,
        "fit_and_rank_s": round(measured - started, 1),
        "fit_and_level_docs_per_s": round(n / seconds),
        "fit_and_level_mb_per_s": round(megabytes / seconds, 2),
    }


def html(folder: str) -> dict[str, Any]:
    """Speed of text from pages, and how much code survives."""
    source = HtmlFiles(folder)
    started = time.perf_counter()
    walk, chars = source.docs(), 0
    while True:
        try:
            chars += len(next(walk).text)
        except StopIteration as end:
            counts = end.value
            break
    seconds = time.perf_counter() - started
    megabytes = sum(path.stat().st_size for path in Path(folder).glob(source.pattern)) / 1e6
    speed = {"mb_per_s": round(megabytes / seconds, 2), "mb": round(megabytes, 1)}
    return counts | speed | {"mchars": round(chars / 1e6, 2)}


def main() -> None:
    """Reads, trains, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--html", help="a folder of pages, to time their extraction")
    pages = parser.parse_args().html
    for source in (*GOOD, *BAD):
        docs = read(source)
        print(
            f"{source.name:12s} {len(docs):6d} parts {sum(len(d.text) for d in docs) / 1e6:7.2f} M"
        )
    scorers = {name: held_out(name, scorer) for name, scorer in SCORERS.items()}
    sample = [replace(doc, text=doc.text[:2000]) for doc in Kept("", GOOD, (2,)).docs()]
    identify("load the model")
    value = {
        "command": "python -m experiments.bench.quality" + (" --html DIR" if pages else ""),
        "scikit_learn": version("scikit-learn"),
        "scorers": scorers,
        "language_of_2000_chars": timed(sample, identify),
        "leveled": leveled(Quality(tuple(SCORERS.values()))),
    }
    print({key: value[key] for key in ("scorers", "language_of_2000_chars")})
    if pages:
        value["html"] = html(pages)
        print("html", value["html"])
    print(f"wrote {merge_result(cpu_name(), 'quality', value)}")


if __name__ == "__main__":
    from experiments.bench import quality  # not as __main__: values name their module

    quality.main()
