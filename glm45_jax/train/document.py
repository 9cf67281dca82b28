"""What a report says, as values: each part is Markdown and HTML. `write_document` writes both; the
types are `Heading`, `Paragraph`, `Items`, `Table`, `Picture`, `Verbatim` and `Link`.

HTML is static and self-contained: no scripts, nothing loaded, everything escaped, since the texts
are a model's and a stranger's. The same parts give the same bytes. No jax.
"""

import base64
import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path

END = "</body></html>\n"
_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;color:#222;background:#fff}
table{border-collapse:collapse;margin:.5em 0}td,th{border:1px solid #ccc;padding:.1em .6em;
text-align:left;font-variant-numeric:tabular-nums}figure{margin:1em 0}img{max-width:100%}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f7f7f7;padding:.6em;
font:13px/1.9 ui-monospace,monospace}.hidden{background:#222;color:#fff}
"""


@dataclasses.dataclass(frozen=True)
class Heading:
    """The title of a section."""

    said: str


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Running text."""

    said: str


@dataclasses.dataclass(frozen=True)
class Items:
    """A list of lines."""

    lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of as many texts as the head has; the first of a row is its name."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file, named from the folder of the document; the page has it inside."""

    name: str
    alt: str


@dataclasses.dataclass(frozen=True)
class Verbatim:
    """A text as it is."""

    said: str


@dataclasses.dataclass(frozen=True)
class Link:
    """A link to a file, named from the folder of the document."""

    said: str
    name: str


Part = Heading | Paragraph | Items | Table | Picture | Verbatim | Link


def markdown_of(part: Part) -> str:
    """The part as Markdown, without a line break at its end; "" where it has nothing to say."""
    match part:
        case Heading(said):
            return f"## {cell(said)}"
        case Paragraph(said):
            return said
        case Items(lines):
            return "\n".join(f"- {cell(line)}" for line in lines)
        case Table(head, rows):
            return table(head, [(name, *map(cell, values)) for name, *values in rows])
        case Picture(name, alt):
            return f"![{alt}]({name})"
        case Verbatim(said):
            return block(said)
        case Link(said, name):
            return f"[{said}]({name})"


def html_of(part: Part, folder: Path) -> str:
    """The part as HTML; "" where it has nothing to say. folder: where pictures are read."""
    match part:
        case Heading(said):
            return f"<h2>{text(said)}</h2>"
        case Paragraph(said):
            return f"<p>{text(said)}</p>" if said else ""
        case Items(lines):
            return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>" * bool(lines)
        case Table(head, rows):
            return html_table(rows, head)
        case Picture(name, alt):
            data = base64.b64encode((folder / name).read_bytes()).decode()
            return (
                f"<figure><img alt='{attribute(alt)}' src='data:image/png;base64,{data}'></figure>"
            )
        case Verbatim(said):
            return f"<pre>{text(said)}</pre>"
        case Link(said, name):
            return f"<p><a href='{attribute(name)}'>{text(said)}</a></p>"


def write_document(folder: Path, title: str, parts: Sequence[Part]) -> Path:
    """Path of `folder`/report.md; `report.html` beside it says the same in one file that needs no
    other.
    """
    body = [html_of(part, folder) for part in parts]
    pieces = [start(title, pictures=True), f"<h1>{text(title)}</h1>", *body, END]
    page = "\n".join(piece for piece in pieces if piece)
    (folder / "report.html").write_text(page, encoding="utf-8", newline="\n")
    said = [f"# {cell(title)}", *(markdown_of(part) for part in parts)]
    return write_text(folder / "report.md", said)


def cell(said: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(str(said).split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; "" without rows. Of a row only the name, its first cell, is escaped."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join([cell(name), *values])} |" for name, *values in rows]
    return "\n".join(lines)


def block(said: str) -> str:
    """The text in a block, fenced by more backticks than it has in a row."""
    longest = max((len(ticks) for ticks in re.findall("`+", said)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{said}\n{fence}"


def write_text(path: Path, parts: Sequence[str]) -> Path:
    """The path, whose file has these parts with an empty line between; empty ones are left out."""
    whole = "\n\n".join(part for part in parts if part) + "\n"
    path.write_text(whole, encoding="utf-8", errors="backslashreplace", newline="\n")
    return path


def start(title: str, style: str = "", *, pictures: bool = False) -> str:
    """A page up to its body. style: CSS after that of every page. pictures: PNGs inside the page
    are shown; whatever the texts say, a browser loads and runs nothing else.
    """
    images = "; img-src data:" if pictures else ""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta http-equiv='Content-Security-Policy' "
        f"content=\"default-src 'none'; style-src 'unsafe-inline'{images}\">"
        f"<title>{attribute(title)}</title><style>{_STYLE}{style}</style></head><body>"
    )


def html_table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """A table of HTML, the first cell of a row its name; "" without rows."""
    if not rows:
        return ""
    lines = [f"<tr>{''.join(f'<th>{text(one)}</th>' for one in head)}</tr>"] if any(head) else []
    for name, *values in rows:
        cells = "".join(f"<td>{text(value)}</td>" for value in values)
        lines.append(f"<tr><th>{text(name)}</th>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def text(value: object) -> str:
    """Any text as HTML that shows it: markup is escaped, what is invisible (controls, marks that
    turn the direction, halves of a surrogate pair) becomes a visible code point.
    """
    return "".join(
        html.escape(one, quote=True)
        if one in "\n\t" or (one.isprintable() or one == " ")
        else f"<span class='hidden'>U+{ord(one):04X}</span>"
        for one in str(value)
    )


def attribute(value: object) -> str:
    """Any text as the inside of a quoted attribute."""
    return html.escape(
        "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in str(value)), quote=True
    )
