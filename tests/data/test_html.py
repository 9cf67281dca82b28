"""Laws of pages to text: code keeps its lines, hostile pages are refused quickly and counted."""

import ast
import os
import time

import pytest

from glm45_jax.data.html import HtmlFiles, HtmlRules, HtmlText, check_structure, decode, extract
from glm45_jax.data.sources import Doc, DroppedError, TextFiles
from tests.data.common import run

PROSE = "A long enough sentence that explains what the thing does, and why it does so."
CODE = """def halves(n):
    \"\"\"How often n can be halved.\"\"\"
    count = 0

    while n % 2 == 0 and n:
        n //= 2
        count += 1
    return count"""
BLOCKS = {
    "plain": f"<pre>{CODE}</pre>",
    "code_inside": f"<pre><code class='language-python'>{CODE}\n</code></pre>",
    "sphinx": "<div class='highlight-python notranslate'><div class='highlight'><pre><span></span>"
    + CODE.replace("count", "<span class='n'>count</span>")
    + "</pre></div></div>",
    "line_breaks": "<pre>" + CODE.replace("\n", "<br>") + "</pre>",
    "lines_as_blocks": "<pre>"
    + "".join(f"<div>{line or ' '}</div>" for line in CODE.split("\n"))
    + "</pre>",
    "hard_spaces": "<pre>" + CODE.replace(" ", "&nbsp;") + "</pre>",
    "in_a_list": f"<ol><li>Do this: <pre>{CODE}</pre></li></ol>",
    "in_a_box": f"<div class='sidebar' id='sidebar'><p>A note.</p><pre>{CODE}</pre></div>",
    "beside_line_numbers": "<table><tr><td class='linenos'><pre>1\n2\n3</pre></td>"
    f"<td class='code'><pre>{CODE}</pre></td></tr></table>",
}
BOMBS = {
    "too_deep": "<div>" * 100_000 + "hello" + "</div>" * 100_000,
    "too_deep with closing tags of others": "<div></b></i>" * 100_000 + "hello",
    "too_deep in a drawing": "<svg><title>" + "<g>" * 100_000,
    "too_many_attributes": "<p " + " ".join(f"a{i}=1" for i in range(100_000)) + ">hello",
    "too_many_attributes behind a quoted end": "<p x='>' " + "/".join(map(str, range(100_000))),
    "too_many_nodes": "<p>"
    + "".join(f"<b a{i}=1>" for i in range(400))
    + "</p>"
    + "<p>x</p>" * 4000,
    "too_large": "<p>hello</p>" * 4_500_000,  # 54 MB
    "no_text": "<!--" * 1_000_000,
    "no_text of an open script": "<script>" * 500_000,
    "no_text at all": "",
    "no_text but space": " \n\t&nbsp;<p> </p>",
    "mis_encoded": "\ud800\udc00" * 100,
}


def page(body):
    """A page with something to leave out around the body."""
    menu = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/a'>About us</a></li></ul></nav>"
    foot = "<footer>All rights reserved</footer>"
    main = f"<main><h1>Title</h1><p>{PROSE}</p>{body}<p>{PROSE}</p></main>"
    return f"<html><head><title>T</title></head><body>{menu}{main}{foot}</body></html>"


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_code_comes_out_line_by_line_as_it_went_in(name):
    found = extract(page(BLOCKS[name]))
    text = "\n".join(line.rstrip() for line in found.text.split("\n"))
    assert CODE in text or CODE.replace("\n\n", "\n") in text  # an empty <div> is no line
    assert found.code_blocks and not found.code_lost
    begin = text.index("def halves")
    code = text[begin : text.index("return count") + len("return count")]
    assert ast.unparse(ast.parse(code)) == ast.unparse(ast.parse(CODE))


def test_prose_is_joined_and_what_surrounds_it_left_out():
    text = extract(page("<p>One   line,\n  and <b>the</b> next.</p>")).text
    assert "One line, and the next." in text and text.count(PROSE) == 2
    assert "About us" not in text and "rights" not in text
    whole = extract(page(""), HtmlRules(main_content=False)).text
    assert "About us" in whole and "rights" in whole


@pytest.mark.parametrize("wrap", ["{}", "<main>{}</main>", "<div><article>{}</article></div>"])
def test_a_list_of_the_text_stays_and_a_menu_does_not(wrap):
    items = "<ul><li>The first thing to know.</li><li>And another.</li></ul>"
    menu = "<ul><li><a href=x>Shop</a></li><li><a href=y>Contact</a></li></ul>"
    body = f"{menu}<p>{PROSE}</p>{items}<p>{PROSE}</p>"
    text = extract(f"<body><nav><ul><li>Home</li></ul></nav>{wrap.format(body)}").text
    assert "The first thing to know." in text and "And another." in text
    assert "Shop" not in text and "Contact" not in text and "Home" not in text


def test_code_that_the_main_content_lacks_is_counted():
    found = extract(page(f"<aside><pre>{CODE}</pre></aside><pre>kept = 1</pre>"))
    assert "halves" not in found.text
    assert (found.code_blocks, found.code_lost) == (2, 1)


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_page_that_costs_more_than_its_size_is_refused_at_once(name):
    started = time.perf_counter()
    with pytest.raises(DroppedError, match=name.split(" ", maxsplit=1)[0]):
        extract(BOMBS[name])
    assert time.perf_counter() - started < 5  # minutes, or all memory, without the limits


@pytest.mark.parametrize(
    "old",
    [
        "<p>A paragraph that nobody closed. " * 5000,
        "<ul>" + "<li>An item of a list that has many. " * 5000 + "</ul>",
        "<table>" + "<tr><td>a cell<td>another" * 3000,
        "<a name=x>anchors, too. " * 5000,
        "<font color=red>and fonts. " * 2000,
        "<script>" + "'<div>' + " * 3000 + "</script><p>text</p>",
        "<!-- " + "<div>" * 3000 + " --><p>text</p>",
        "<br>text<hr>" * 5000,
    ],
)
def test_pages_of_careless_authors_pass(old):
    check_structure(old)
    assert extract(old, HtmlRules(main_content=False)).text


def test_limits_are_the_last_values_that_pass():
    rules = HtmlRules(max_depth=3, max_attributes=20, max_nodes=5, max_bytes=60)
    for passes, fails in (
        ("<div><div><div>x", "<div><div><div><div>x"),
        ("<p " + "a " * 20 + ">x", "<p " + "a " * 21 + ">x"),
        ("<p>x" * 5, "<p>x" * 6),
    ):
        assert extract(passes, rules).text
        with pytest.raises(DroppedError):
            extract(fails, rules)
    assert extract("<p>".ljust(60, "x"), rules).text
    with pytest.raises(DroppedError, match="too_large"):
        extract("<p>".ljust(61, "x"), rules)
    with pytest.raises(DroppedError, match="no_text"):
        extract("<p>abc</p>", HtmlRules(min_chars=4))


@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        ("utf-8", ""),
        ("utf-8-sig", ""),
        ("utf-16", ""),
        ("gbk", "<meta charset=gbk>"),
        ("shift_jis", "<meta http-equiv=Content-Type content='text/html; charset=shift_jis'>"),
    ],
)
def test_bytes_are_read_in_the_encoding_they_name(encoding, head):
    html = f"{head}<p>日本 is written 日本</p>"
    assert decode(html.encode(encoding)) == html


def test_a_few_bad_bytes_are_replaced_and_many_refused():
    good = b"<p>" + b"good text here. " * 500
    assert decode(good + b"\xff\xfe").count("\N{REPLACEMENT CHARACTER}") <= 2
    for bad in (bytes(range(256)) * 100, good + b"\xff\x00" * 400):
        with pytest.raises(DroppedError, match="mis_encoded"):
            decode(bad)
    assert decode("<p>" + "x" * 5000 + "\ud800").endswith("\N{REPLACEMENT CHARACTER}")
    assert decode(b"<meta charset=klingon><p>" + b"x" * 5000 + b"\xe9")  # not known to Python


def test_files_and_documents_give_the_same_texts_and_count_what_they_refuse(tmp_path):
    (tmp_path / "sub").mkdir()
    good = page(BLOCKS["plain"])
    (tmp_path / "sub" / "good.html").write_text(good)
    (tmp_path / "deep.html").write_text("<div>" * 2000)
    (tmp_path / "empty.htm").write_text("")
    (tmp_path / "bytes.html").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "large.html").write_text("<p>x" * 2_100_000)
    os.symlink(tmp_path / "sub" / "good.html", tmp_path / "link.html")
    os.mkfifo(tmp_path / "pipe.html")
    docs, counts = run(HtmlFiles(str(tmp_path), licence="MIT"))
    assert [doc.id for doc in docs] == ["sub/good.html"]
    assert docs[0].meta["code_blocks"] == "1" and docs[0].meta["licence"] == "MIT"
    refused = "too_deep no_text mis_encoded too_large symlink not_a_file".split()
    assert counts == {"html_in": 7, "html_kept": 1, "html_code_blocks": 1, "html_code_lost": 0} | {
        f"html_dropped_{why}": 1 for why in refused
    }
    for name in ("bytes.html", "large.html", "link.html", "pipe.html"):
        (tmp_path / name).unlink()
    plain = TextFiles(str(tmp_path), pattern="**/*.htm*")
    texts, counts = run(HtmlText(plain))
    assert [doc.text for doc in texts] == [docs[0].text] and counts["html_dropped_too_deep"] == 1
    assert HtmlText(plain).name == plain.name and HtmlText(plain).version() != plain.version()
    with pytest.raises(ValueError, match="matches"):
        list(HtmlFiles(str(tmp_path), pattern="*.xyz").docs())


def test_a_changed_page_changes_the_version(tmp_path):
    (tmp_path / "a.html").write_text("<p>one</p>")
    before = HtmlFiles(str(tmp_path)).version()
    assert HtmlFiles(str(tmp_path)).version() == before
    (tmp_path / "a.html").write_text("<p>other</p>")
    assert HtmlFiles(str(tmp_path)).version() != before


def test_a_source_that_encodes_is_refused():
    class Encoding:
        name = "x"

        def docs(self):
            yield Doc("a", "<p>a</p>", "x")

        def version(self):
            return ""

        def encode(self, docs, tokenizer):
            return []

    with pytest.raises(ValueError, match="put HtmlText inside"):
        HtmlText(Encoding())
