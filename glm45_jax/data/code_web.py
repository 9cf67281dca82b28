"""Web pages about code: found by tag or by classifier, graded by their own model, parsed again.

`code_web(source, recall, quality)` is a `Source` of the three steps over one whose documents are
pages as HTML (`PageFiles`, or any with pages for texts): `CodePages` keeps a page that has code in
`<pre>` or `<code>` or whose plain text a classifier takes for code-related; `data/quality.py` gives
tiers by what `OfPage` sees; `data/html.py` parses what is left with the lines of code as they are.
The classifier can be taught by the tags: `Learned((Tagged(pages, True),), (Tagged(pages, False),))`
finds pages that lost theirs.
Source: spec 6 D11, D12, D13. Thresholds are a CHOICE (UNVERIFIED for GLM-4.5).
"""

import functools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from glm45_jax.data.html import HtmlRules, HtmlText, check_structure, decode, html_version
from glm45_jax.data.quality import Everything, Groups, Leveled, Quality
from glm45_jax.data.reading import DroppedError, Ledger, match_files, read_regular
from glm45_jax.data.scorers import Judge, Scorer
from glm45_jax.data.sources import Doc, Source, counted, digest_files, refuse_encoder

CODE_WEB_FORMAT = 1  # raise it when the same pages are found otherwise

COUNTED_CHARS = 1000  # of code on a page; what is above is not counted
RECALLED = "recalled"  # meta of a Doc: what found it, "tag", "classifier" or "both"


class Plain(NamedTuple):
    """A page at a glance. text: its main content in one line, lines of code and all.

    code_chars: characters of `<pre>` and `<code>`, white space not counted, each once, at most
    `COUNTED_CHARS`.
    """

    text: str
    code_chars: int


@functools.lru_cache(maxsize=2)  # finding and grading look at one page after the other
def plain(html: str, rules: HtmlRules = HtmlRules()) -> Plain:
    """The page at a glance.

    Raises: DroppedError (the names in `HtmlRules`).
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    if len(html) > rules.max_bytes:
        raise DroppedError("too_large")
    html = decode(html, rules)
    check_structure(html, rules)
    tree = HTMLTree.parse(html)
    if tree.body is None:
        raise DroppedError("no_text")
    text = extract_plain_text(
        tree, preserve_formatting=False, main_content=rules.main_content
    ) or extract_plain_text(tree, preserve_formatting=False)  # a page that is all menu
    if not text.strip():
        raise DroppedError("no_text")
    return Plain(text, _code_chars(tree.body))


@dataclass(frozen=True)
class Recall:
    """What makes a page code-related: enough code in tags, or a score of its plain text.

    min_code_chars: names in running text stand in `<code>` on all kinds of pages. scorer None:
    tags alone.
    """

    scorer: Scorer | None = None
    threshold: float = 0.5
    min_code_chars: int = 40

    def __post_init__(self):
        if not 1 <= self.min_code_chars <= COUNTED_CHARS:
            raise ValueError(
                f"min_code_chars {self.min_code_chars} is not in 1 to {COUNTED_CHARS}, up to which "
                "code is counted"
            )

    def by(self, page: Plain, judge: Judge | None) -> str:
        """ "tag", "classifier", "both", or "" for neither."""
        tag = page.code_chars >= self.min_code_chars
        likely = judge is not None and judge.score(page.text) >= self.threshold
        return {(1, 1): "both", (1, 0): "tag", (0, 1): "classifier", (0, 0): ""}[tag, likely]


@dataclass(frozen=True)
class CodePages:
    """The pages of `source` that are code-related, still as HTML; meta["recalled"] says by what."""

    source: Source
    recall: Recall = Recall()
    rules: HtmlRules = HtmlRules()

    def __post_init__(self):
        refuse_encoder(self.source, "CodePages")

    @property
    def name(self) -> str:
        """The name of the source inside."""
        return self.source.name

    def version(self) -> str:
        """That of the source inside, of the parser and of the classifier."""
        scorer = self.recall.scorer
        return f"{_version(self.source)}{f' {scorer.version()}' if scorer else ''}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Pages that one of both finds.

        Returns counts: code_web_in, code_web_tag, _classifier, _both (what found those that stay),
        code_web_dropped_not_code, code_web_dropped_* (the names in `HtmlRules`).
        """
        ways = ("in", "tag", "classifier", "both")
        ledger = Ledger(
            self.name, *(f"code_web_{way}" for way in ways), "code_web_dropped_not_code"
        )
        judge = None if self.recall.scorer is None else self.recall.scorer.classifier()
        inner: dict[str, int] = {}
        for doc in counted(self.source, inner):
            ledger.counts["code_web_in"] += 1
            try:
                by = self.recall.by(plain(doc.text, self.rules), judge)
            except DroppedError as error:
                ledger.drop(error, doc.id, "code_web_dropped_")
                continue
            ledger.counts[f"code_web_{by or 'dropped_not_code'}"] += 1
            if by:
                yield replace(doc, meta={**doc.meta, RECALLED: by})
        return inner | ledger.report()


@dataclass(frozen=True)
class Tagged:
    """Plain texts of the pages that have code in tags, or of those that have not."""

    source: Source
    has: bool
    min_code_chars: int = 40
    rules: HtmlRules = HtmlRules()

    def __post_init__(self):
        refuse_encoder(self.source, "Tagged")

    @property
    def name(self) -> str:
        """The name of the source inside."""
        return self.source.name

    def version(self) -> str:
        """That of the source inside and of the parser."""
        return _version(self.source)

    def docs(self) -> Iterator[Doc]:
        """Those pages; what cannot be parsed is on neither side."""
        for doc in self.source.docs():
            try:
                page = plain(doc.text, self.rules)
            except DroppedError:
                continue
            if (page.code_chars >= self.min_code_chars) == self.has:
                yield replace(doc, text=page.text)


@dataclass(frozen=True)
class OfPage:
    """A scorer of texts that scores pages, by their plain text; 0 for what cannot be parsed."""

    scorer: Scorer
    rules: HtmlRules = HtmlRules()

    def classifier(self) -> Judge:
        """The classifier inside, behind the parser."""
        return _PageJudge(self.scorer.classifier(), self.rules)

    def version(self) -> str:
        """That of the scorer inside and of the parser."""
        return f"code_web={CODE_WEB_FORMAT} {html_version()} {self.scorer.version()}"


def code_web(
    source: Source,
    recall: Recall,
    quality: Quality | tuple[tuple[str, Quality], ...],
    *,
    groups: Groups = Everything(),
    rules: HtmlRules = HtmlRules(),
) -> HtmlText:
    """Found, graded, parsed: the code-related pages of `source` as text, with their epochs.

    quality: its scorers see plain texts; tiers as for code are `Quality((scorer,),
    Thresholds((low, high)), epochs=(0, 1, 3))`. groups: see HTML.
    """
    if isinstance(quality, Quality):
        graded: Quality | tuple[tuple[str, Quality], ...] = _of_pages(quality, rules)
    else:
        graded = tuple((name, _of_pages(one, rules)) for name, one in quality)
    return HtmlText(Leveled(CodePages(source, recall, rules), graded, groups), rules)


@dataclass(frozen=True)
class PageFiles:
    """A folder of pages as they are, one document a file: `HtmlFiles` before it parses."""

    root: str
    pattern: str = "**/*.htm*"
    name: str = "pages"
    licence: str = ""
    rules: HtmlRules = HtmlRules()

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Pages by path; returns counts: pages_in, pages_kept, pages_dropped_*.

        Raises: ValueError when nothing matches.
        """
        ledger = Ledger(self.name, "pages_in", "pages_kept")
        meta = {"repo": Path(self.root).name, "licence": self.licence}
        for path, where in match_files(self.root, self.pattern):
            ledger.counts["pages_in"] += 1
            try:
                html = decode(read_regular(path, self.rules.max_bytes), self.rules)
            except DroppedError as error:
                ledger.drop(error, where, "pages_dropped_")
                continue
            ledger.counts["pages_kept"] += 1
            yield Doc(where, html, self.name, meta | {"path": where})
        return ledger.report()

    def version(self) -> str:
        """A digest of paths, sizes and times, and the parser."""
        return f"{digest_files(match_files(self.root, self.pattern))} {html_version()}"


@dataclass(frozen=True)
class _PageJudge:
    judge: Judge
    rules: HtmlRules

    def score(self, text: str) -> float:
        """The score of the page's plain text."""
        try:
            return self.judge.score(plain(text, self.rules).text)
        except DroppedError:
            return 0.0


def _code_chars(body: Any) -> int:
    """Characters of the outermost elements of code, until there are `COUNTED_CHARS`.

    One walk in the order of the page: resiliparse's lists of elements are searched anew for each
    of their items.
    """
    chars = 0
    for node in body:
        if node.tag in _CODE and not _in_code(node):
            chars += len("".join((node.text or "").split()))
            if chars >= COUNTED_CHARS:
                return COUNTED_CHARS
    return chars


def _in_code(block: Any) -> bool:
    """Whether an element stands in code already."""
    around = block.parent
    while around is not None and around.tag not in _CODE:
        around = around.parent
    return around is not None


def _of_pages(quality: Quality, rules: HtmlRules) -> Quality:
    return replace(quality, scorers=tuple(OfPage(scorer, rules) for scorer in quality.scorers))


def _version(source: Source) -> str:
    return f"{source.version()} code_web={CODE_WEB_FORMAT} {html_version()}"


_CODE = ("pre", "code")
