"""HTML pages as text: the main content, with the indentation of code blocks kept (spec 6 D13).

One line of a `Data`: `HtmlFiles("/usr/share/doc")`, or `HtmlText(source)` around a source whose
documents are pages. What could hold up a machine (depth, attributes, formatting that each paragraph
repeats) is found in one linear look at the tags and refused before it is parsed; every refusal is
counted under its reason, and no clock takes part, so that two runs refuse the same pages.
resiliparse extracts: unlike others it leaves the lines of code as they are.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from glm45_jax.data.reading import DroppedError, Ledger, match_files, read_regular
from glm45_jax.data.sources import Doc, Source, counted, digest_files, refuse_encoder

HTML_FORMAT = 1  # raise it when the same pages give other texts


@dataclass(frozen=True)
class HtmlRules:
    """Limits; a page above one is refused under the name in brackets.

    Every limit is a CHOICE: browsers nest 512 deep, and a page at all the others takes seconds.
    """

    max_bytes: int = 8_000_000  # [too_large] a crawl cuts pages at 1 to 5 MB
    max_depth: int = 512  # [too_deep] elements open at once; extraction is quadratic in it
    max_attributes: int = 1000  # [too_many_attributes] of one element; quadratic as well
    max_nodes: int = 1_000_000  # [too_many_nodes] elements, and formatting that blocks repeat
    max_replaced: float = 0.001  # [mis_encoded] share of characters that are none
    min_chars: int = 1  # [no_text] of the text
    main_content: bool = True  # without navigation, side bars and footers


class Page(NamedTuple):
    """Text of a page. code_blocks: its `<pre>` elements that hold text; code_lost: how many of the
    first thousand the text lacks (in a side bar, say).
    """

    text: str
    code_blocks: int
    code_lost: int


def extract(page: bytes | str, rules: HtmlRules = HtmlRules(), encoding: str = "") -> Page:
    """The text of a page.

    Bytes are read as UTF-8, else in the encoding that came with them (of an HTTP header, say), else
    as the page says, else as what they look like.

    Raises: DroppedError (the names in `HtmlRules`).
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    if len(page) > rules.max_bytes:  # of a str: characters, never more than its bytes
        raise DroppedError("too_large")
    html = decode(page, rules, encoding)
    check_structure(html, rules)
    tree = HTMLTree.parse(html)
    # One walk: resiliparse searches its lists of elements anew for each of their items.
    blocks = [] if tree.body is None else [node for node in tree.body if node.tag == "pre"]
    if rules.main_content:
        _unname(blocks[:_CHECKED])
        _deepen(tree)
    text = extract_plain_text(tree, preserve_formatting=True, main_content=rules.main_content)
    text = _LINE_END.sub("", text.replace("\N{NO-BREAK SPACE}", " ")).strip("\n")
    if len(text.strip()) < max(rules.min_chars, 1):
        raise DroppedError("no_text")
    codes = [code for block in blocks if (code := _without_space(block.text or ""))]
    all_of_it = _without_space(text)
    return Page(text, len(codes), sum(code not in all_of_it for code in codes[:_CHECKED]))


def decode(page: bytes | str, rules: HtmlRules = HtmlRules(), encoding: str = "") -> str:
    """The characters of a page.

    Raises: DroppedError("mis_encoded") where more than `max_replaced` of them are none: bytes that
    the encoding does not have, control characters, halves of surrogate pairs.
    """
    html = page if isinstance(page, str) else _decoded(page, encoding)
    html, replaced = _NO_CHARACTER.subn("\N{REPLACEMENT CHARACTER}", html)
    if replaced > rules.max_replaced * len(html):
        raise DroppedError("mis_encoded")
    return html


def check_structure(html: str, rules: HtmlRules = HtmlRules()) -> None:
    """Refuses a page that costs more than its size; one pass over the tags, linear in the page.

    Counted as a parser would open elements, but for closing tags, of which each closes the nearest
    of its name: the true depth is at most a small multiple.

    Raises: DroppedError (too_deep, too_many_attributes, too_many_nodes).
    """
    opened: Counter[str] = Counter()  # by name
    formats: defaultdict[str, list[str]] = defaultdict(list)  # attributes of those open, by name
    depth, formatting, nodes, place = 0, 0, 0, 0
    while tag := _TAG.search(html, place):
        place = tag.end()
        if tag["comment"]:
            place = _after(html, "-->", place)
            continue
        name, attributes = tag["name"].lower(), tag["attributes"]
        if not tag["close"]:
            nodes += 1 + formatting
            if nodes > rules.max_nodes:
                raise DroppedError("too_many_nodes")
            if len(attributes) > rules.max_attributes:
                _check_attributes(attributes, rules)
            if name in _RAW_TEXT and not (opened["svg"] or opened["math"]):
                place = _after_raw(html, name, place)
                continue
        if name in _FORMATTING:
            formatting += _format(formats[name], name, tag["close"], attributes)
        elif name not in _LEAVES and (opened[name] or not tag["close"]):
            step = -1 if tag["close"] else 1
            opened[name] += step
            depth += step
            if depth > rules.max_depth:
                raise DroppedError("too_deep")


@dataclass(frozen=True)
class HtmlFiles:
    """A folder of pages, one document a file; meta["code_blocks"] says how many hold code."""

    root: str
    pattern: str = "**/*.htm*"
    name: str = "html"
    licence: str = ""
    rules: HtmlRules = HtmlRules()

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Pages with text, sorted by path; returns counts: html_in, html_kept, html_dropped_*.

        Raises: ValueError when nothing matches.
        """
        ledger = _ledger(self.name)
        meta = {"repo": Path(self.root).name, "licence": self.licence}
        for path, where in match_files(self.root, self.pattern):
            try:
                page = extract(read_regular(path, self.rules.max_bytes), self.rules)
            except DroppedError as error:
                _count(ledger, error, where)
                continue
            _count(ledger, page, where)
            found = {"path": where, "code_blocks": f"{page.code_blocks}"}
            yield Doc(where, page.text, self.name, meta | found)
        return ledger.report()

    def version(self) -> str:
        """A digest of paths, sizes and times, and the extractor."""
        return f"{digest_files(match_files(self.root, self.pattern))} {html_version()}"


@dataclass(frozen=True)
class HtmlText:
    """The documents of `source`, which are pages, as text."""

    source: Source
    rules: HtmlRules = HtmlRules()

    def __post_init__(self):
        refuse_encoder(self.source, "HtmlText")

    @property
    def name(self) -> str:
        """The name of the source inside."""
        return self.source.name

    def version(self) -> str:
        """That of the source inside, and the extractor."""
        return f"{self.source.version()} {html_version()}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """Pages with text; returns the counts of `HtmlFiles` beside those of the source."""
        inner: dict[str, int] = {}
        ledger = _ledger(self.name)
        for doc in counted(self.source, inner):
            try:
                page = extract(doc.text, self.rules)
            except DroppedError as error:
                _count(ledger, error, doc.id)
                continue
            _count(ledger, page, doc.id)
            meta = {**doc.meta, "code_blocks": f"{page.code_blocks}"}
            yield replace(doc, text=page.text, meta=meta)
        return inner | ledger.report()


def _ledger(source: str) -> Ledger:
    return Ledger(source, "html_in", "html_kept", "html_code_blocks", "html_code_lost")


def _count(ledger: Ledger, result: Page | DroppedError, where: str) -> None:
    ledger.counts["html_in"] += 1
    if isinstance(result, DroppedError):
        ledger.drop(result, where, "html_dropped_")
    else:
        ledger.counts["html_kept"] += 1
        ledger.counts["html_code_blocks"] += result.code_blocks
        ledger.counts["html_code_lost"] += result.code_lost


def html_version() -> str:
    """What the text of a page depends on besides its bytes and the rules."""
    return f"html={HTML_FORMAT} resiliparse=={version('resiliparse')}"


def _decoded(page: bytes, stated: str) -> str:
    from resiliparse.parse.encoding import detect_encoding

    for mark, encoding in _BYTE_ORDER_MARKS:
        if page.startswith(mark):
            return page.removeprefix(mark).decode(encoding, "replace")
    try:
        return page.decode("utf-8")
    except UnicodeDecodeError:
        encoding = detect_encoding(page, from_html_meta=True) or "utf-8"
    for name in filter(None, (stated, encoding)):
        try:
            return page.decode(name, "replace")
        except (LookupError, ValueError, TypeError):  # none that Python has, or none of text
            continue
    return page.decode("utf-8", "replace")


def _unname(blocks: Iterable[Any]) -> None:
    """Takes class, id and role from what is around code: a box named side bar that holds code is
    content, and the extractor would leave it out. What is one by its tag stays so.
    """
    for block in blocks:
        around = block.parent
        while around is not None and around.tag not in ("body", "html"):
            for attribute in ("class", "id", "role"):
                around.remove_attribute(attribute)
            around = around.parent


def _deepen(tree: Any) -> None:
    """Puts the body's children three elements down: the extractor takes any `<ul>` nearer to the
    body than that for a menu, and leaves out the lists of pages that are written by hand. What is
    a menu by its links, name or role stays one.
    """
    if tree.body is None:
        return
    outer = inner = tree.create_element("div")
    for _ in range(2):
        inner = inner.append_child(tree.create_element("div"))
    while (child := tree.body.first_child) is not None:
        inner.append_child(child)
    tree.body.append_child(outer)


def _without_space(text: str) -> str:
    return "".join(text.split())


def _after(html: str, end: str, place: int) -> int:
    """The place behind the next `end`; that of the page's end where there is none."""
    at = html.find(end, place)
    return len(html) if at < 0 else at + len(end)


def _after_raw(html: str, name: str, place: int) -> int:
    """Where the closing tag of an element begins whose content is no markup."""
    found = _RAW_TEXT[name].search(html, place)
    return found.start() if found else len(html)


def _check_attributes(attributes: str, rules: HtmlRules) -> None:
    if sum(1 for _ in _ATTRIBUTE.finditer(attributes)) > rules.max_attributes:
        raise DroppedError("too_many_attributes")


def _format(opened: list[str], name: str, close: str, attributes: str) -> int:
    """How many more formatting elements are open after a tag; `opened`, of its name, follows."""
    if close and opened:
        opened.pop()
        return -1
    # The next <a> closes one; parsers keep three of a kind ("Noah's Ark clause").
    if close or (opened and name in ("a", "nobr")) or opened.count(attributes) >= 3:
        return 0
    opened.append(attributes)
    return 1


_CHECKED = 1000  # blocks of code that are searched for in the text
# One attribute: a name, perhaps a value. Possessive, so that no page makes them go back.
_VALUE = r"""\s*+=\s*+(?:"[^"]*+"|'[^']*+'|[^\s>]*+)"""
_ATTRIBUTE = re.compile(rf"[^\s/>][^\s/>=]*+(?:{_VALUE})?+")
_TAG = re.compile(
    r"<(?:(?P<comment>!--)|(?P<close>/?)(?P<name>[a-zA-Z][^\s/>]*+)"
    rf"(?P<attributes>(?:[\s/]++|[^\s/>][^\s/>=]*+(?:{_VALUE})?+)*+))"
)
_NO_CHARACTER = re.compile("[\0-\x08\x0b\x0e-\x1f\x7f\ufffd\ud800-\udfff]")
_LINE_END = re.compile(r"[ \t]+$", re.MULTILINE)
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_RAW_TEXT = {
    name: re.compile(f"</{name}(?=[\\s/>])", re.IGNORECASE)
    for name in ("script", "style", "textarea", "title", "xmp", "iframe", "noembed", "noframes")
}
_FORMATTING = frozenset("a b big code em font i nobr s small strike strong tt u".split())
# Nothing is inside, or the next one of their kind closes them.
_LEAVES = frozenset(
    "area base br col embed hr img input keygen link meta param source track wbr html head body"
    " p li dt dd tr td th thead tbody tfoot colgroup caption option optgroup rb rp rt rtc".split()
)
