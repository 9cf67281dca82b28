"""Laws of code-related pages, on documentation that packages ship, rendered as sites render it."""

import functools
import hashlib
import html
import re
import sysconfig
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from glm45_jax.data.code_web import (
    COUNTED_CHARS,
    RECALLED,
    CodePages,
    OfPage,
    PageFiles,
    Recall,
    Tagged,
    code_web,
    plain,
)
from glm45_jax.data.html import HtmlRules
from glm45_jax.data.quality import Percentiles, Quality, Thresholds, copies_of
from glm45_jax.data.reading import DroppedError
from glm45_jax.data.scorers import Learned, Words, save
from glm45_jax.data.sources import Doc
from tests.data.common import run

FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"<pre><code[^>]*>(.*?)</code></pre>", re.DOTALL)


def page(body):
    menu = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/a'>About</a></li></ul></nav>"
    return f"<html><body>{menu}<main>{body}</main><footer>© us</footer></body></html>"


def without_tags(body):
    """The page as an old site shows code: lines ended by <br>, spaces that are hard."""

    def lines(found):
        return "<div>" + found[1].replace(" ", "&nbsp;").replace("\n", "<br>") + "</div>"

    return re.sub(r"</?code[^>]*>", "", BLOCK.sub(lines, body))


def texts():
    """What the installed packages say of themselves, of datasets, and of their licences."""
    site = Path(sysconfig.get_paths()["purelib"])
    for package in metadata.distributions():
        about = (package.metadata.get("Description") or "").strip()
        yield Doc(f"{package.name}/about", about, "docs", {"repo": package.name})
    for pattern in ("tensorflow_datasets/**/README.md", "*.dist-info/**/LICEN[CS]E*"):
        for path in sorted(site.glob(pattern)):
            where = path.relative_to(site).as_posix()
            text = path.read_text("utf-8", "replace") if path.is_file() else ""
            yield Doc(where, text, "docs", {"repo": where.split("/")[0]})


@functools.cache
def corpus():
    """(page, its markdown) of every text that is clearly about code, or clearly not.

    A third of the pages about code have lost their tags; each page that is not names something in
    <code>. Licences that begin alike are one.
    """
    markdown, found, seen = MarkdownIt(), [], set()
    for doc in texts():
        text = doc.text[:8_000]
        begin = re.sub(r"\W+", "", text)[:150]
        if begin in seen or len(text) < 400:
            continue
        seen.add(begin)
        code = "".join(FENCED.findall(text))
        if len(code) >= 200:
            body = markdown.render(text)
            planted = "stripped" if place(doc) < 1 / 3 else "tagged"
            if planted == "stripped":
                body = without_tags(body)
        elif not re.search(r"`|::|>>>|^(    |\t)\S|def |import |pip ", text, re.MULTILINE):
            prose = "\n".join(line.strip() for line in text.split("\n"))  # no block by indentation
            body, planted = markdown.render(prose) + "<p>See <code>LICENSE</code>.</p>", "prose"
        else:
            continue  # neither for sure
        meta = {"planted": planted, "repo": doc.meta["repo"]}
        found.append((Doc(doc.id, page(body), "docs", meta), text))
    return tuple(found)


def place(doc, salt=""):
    return int.from_bytes(hashlib.sha256(f"{salt}{doc.id}".encode()).digest()[:4]) / 2**32


@dataclass(frozen=True)
class Pages:
    """Half of the corpus, by hash; or given pages."""

    half: int
    given: tuple[str, ...] = ()
    name: str = "docs"

    def docs(self):
        if self.given:
            yield from (Doc(str(n), text, "docs") for n, text in enumerate(self.given))
            return
        for doc, _ in corpus():
            if int(place(doc, "half") * 2) == self.half:
                yield doc

    def version(self):
        return "1"


@functools.cache
def classifier(folder):
    """Taught by tags on one half: a page that lost its tags stands on the wrong side there."""
    sides = [(Tagged(Pages(0), has),) for has in (True, False)]
    return save(Learned(*sides, features=Words(n=1, bits=14)).classifier(), folder / "code.st")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("scorer"))


def measured(recall):
    """(recall, precision) of a way on the half that nobody learnt from."""
    docs, counts = run(CodePages(Pages(1), recall))
    about = {doc.id for doc in Pages(1).docs() if doc.meta["planted"] != "prose"}
    kept = {doc.id for doc in docs}
    assert counts["code_web_in"] == len(list(Pages(1).docs()))
    return len(kept & about) / len(about), len(kept & about) / max(len(kept), 1)


def test_tag_and_classifier_together_find_what_neither_finds_alone(learned):
    both = Recall(learned)
    by_tag = measured(Recall())
    by_score = measured(replace(both, min_code_chars=COUNTED_CHARS))
    union = measured(both)
    print(f"recall, precision: tag {by_tag}, mostly classifier {by_score}, both {union}")
    assert by_tag[1] > 0.95 and by_tag[0] < 0.8  # a third has no tag, and none is found wrongly
    assert union[0] > 0.85 and union[1] > 0.8 and union[0] > max(by_tag[0], by_score[0])
    docs, counts = run(CodePages(Pages(1), both))
    ways = [doc.meta[RECALLED] for doc in docs]
    assert {way: ways.count(way) for way in ("tag", "classifier", "both")} == {
        way: counts[f"code_web_{way}"] for way in ("tag", "classifier", "both")
    }
    stripped = [doc.meta[RECALLED] for doc in docs if doc.meta["planted"] == "stripped"]
    assert stripped and set(stripped) == {"classifier"}


def squeezed(text):
    return [line.rstrip() for line in text.split("\n") if line.strip()]


def test_pages_are_graded_by_their_own_model_and_come_out_with_their_lines_of_code(learned):
    dump = "<pre>" + "\n".join(f"0x{n:08x} 404 GET /{n} {n * 7}" for n in range(60)) + "</pre>"
    dumps = tuple(page(f"<p>{n}</p>{dump}") for n in range(6))
    grades = Learned(
        (Tagged(Pages(0), True),), (Tagged(Pages(0, dumps), True),), Words(n=1, bits=14)
    )
    quality = Quality((grades,), Thresholds((0.3, 0.6)), epochs=(0, 1, 3))
    low, counts = run(code_web(Pages(1, dumps), Recall(learned), quality))
    assert not low and counts["quality_level_0_docs"] == counts["code_web_in"] == 6
    docs, counts = run(code_web(Pages(1), Recall(learned), quality))
    assert counts["quality_level_2_docs"] > 10 and counts["html_kept"] == len(docs)
    written = {doc.id: text for doc, text in corpus()}
    indented = whole = 0
    for doc in docs:
        assert copies_of(doc) == {"1": 1, "2": 3}[doc.meta["level"]]
        if doc.meta["planted"] != "tagged":
            continue
        lines = "\n".join(squeezed(doc.text))
        for code in FENCED.findall(written[doc.id]):
            if not re.search(r"^ +\S", code, re.MULTILINE):
                continue
            indented += 1
            whole += "\n".join(squeezed(code)) in lines
    print(f"{whole} of {indented} blocks of code with indentation are whole")
    assert indented > 30 and whole >= 0.97 * indented


def test_the_wanted_tiers_can_be_of_groups_and_percentiles(learned):
    cut = Percentiles((0, 0, 1, 1))
    quality = (("", Quality((learned,), cut, epochs=(0, 2))),)
    docs, counts = run(code_web(Pages(1), Recall(), quality))
    assert 0 < len(docs) == counts["quality_level_1_docs"] < counts["quality_in"]


def test_code_is_counted_once_however_it_is_nested_and_names_are_no_code():
    nested = page(
        "<p>a</p><pre>1 2 <code>3<code>4</code></code>\n5</pre><code>6<code>7</code></code>"
    )
    assert plain(nested).code_chars == 7
    assert plain(page("<pre>" + "x" * 5000 + "</pre>")).code_chars == COUNTED_CHARS
    assert plain(page("<p>no</p>")).code_chars == 0 and "Home" not in plain(page("<p>no</p>")).text
    names = page("<p>Set <code>PATH</code> to <code>/usr/bin</code>, then call us.</p>")
    docs, counts = run(CodePages(Pages(1, (names, page(f"<pre>{'x = 1 ' * 40}</pre>")))))
    assert [doc.id for doc in docs] == ["1"] and counts["code_web_dropped_not_code"] == 1
    with pytest.raises(ValueError, match="min_code_chars 0"):
        Recall(min_code_chars=0)


def test_many_blocks_take_no_longer_than_their_size():
    many = page("<p>some text</p><code>a b</code>" * 20_000)
    start = time.monotonic()
    assert plain(many).code_chars == COUNTED_CHARS
    empty = page("<p>some text</p><code></code>" * 20_000)
    assert plain(empty).code_chars == 0
    assert time.monotonic() - start < 20


def test_hostile_pages_are_counted_and_a_scorer_gives_them_nothing(learned):
    bombs = {
        "too_deep": "<div>" * 10_000 + "x",
        "mis_encoded": "\ud800" * 100,
        "no_text": " <p> </p>",
        "too_large": "<p>x</p>" * 8000,
    }
    rules = HtmlRules(max_bytes=60_000)
    docs, counts = run(CodePages(Pages(1, tuple(bombs.values())), Recall(learned), rules))
    assert not docs and {
        name: counts[f"code_web_dropped_{name}"] for name in bombs
    } == dict.fromkeys(bombs, 1)
    judge = OfPage(learned, rules).classifier()
    assert [judge.score(text) for text in bombs.values()] == [0.0] * 4
    assert not list(Tagged(Pages(1, tuple(bombs.values())), False, rules=rules).docs())
    with pytest.raises(DroppedError, match="too_deep"):
        plain(bombs["too_deep"])


def test_pages_of_a_folder_come_as_they_are(tmp_path):
    (tmp_path / "a.html").write_bytes(page("<p>é</p>").encode("latin-1"))
    (tmp_path / "b.html").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "c.htm").symlink_to("a.html")
    docs, counts = run(PageFiles(str(tmp_path)))
    assert [doc.id for doc in docs] == ["a.html"] and html.unescape("&eacute;") in docs[0].text
    assert counts["pages_in"] == 3 and counts["pages_dropped_symlink"] == 1
    assert counts["pages_dropped_mis_encoded"] == 1
