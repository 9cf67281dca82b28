r"""Manual pages (roff with the man or mdoc macros) as plain text, without groff.

Only what pages use: headings, paragraphs, indented blocks that keep their lines, tags of lists,
fonts (dropped), characters by name, comments. Tables lose their lines and keep their cells;
pictures and conditionals are left out. Not a typesetter: text comes out as it is written, a
paragraph on one line.
"""

import re
from collections.abc import Iterator


def man_text(page: str) -> str:
    """The text of a manual page; empty for one that only names another (`.so`)."""
    out: list[str] = []
    paragraph: list[str] = []
    fill, table, tag = True, False, False

    def flush() -> None:
        if paragraph:
            out.append(" ".join(" ".join(paragraph).split()))
            paragraph.clear()

    for line in _lines(page):
        name, arguments = _request(line)
        text = _plain(line) if name is None else _words(name, arguments)
        if name is None and table:
            text = "" if _TABLE_FORMAT.fullmatch(line) else text.replace("\t", " | ")
        if name is None or name in _INLINE or name in _MDOC:
            if not fill or table:
                out.append(f"    {text}".rstrip())
            elif text.strip():
                paragraph.append(text)
            else:
                flush()
                out.append("")
        elif name in _HEADINGS:
            flush()
            out += ["", text, ""]
        elif name in _PARAGRAPHS:
            flush()
            out.append("")
            if name in ("IP", "It") and arguments:
                paragraph.append(text)
                flush()
            tag = name == "TP"
        elif name in _BREAKS:
            flush()
            fill = name in _FILL or (fill and name not in _NO_FILL)
            table = name == "TS" or (table and name != "TE")
        if tag and paragraph:  # the line after .TP stands by itself
            flush()
            tag = False
    flush()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n")


def _lines(page: str) -> Iterator[str]:
    """Lines that are not comments, definitions of macros or conditionals."""
    skip_to = ""
    for line in re.sub(r"\\\n", "", page).split("\n"):
        if skip_to:
            skip_to = "" if line.startswith(skip_to) else skip_to
        elif found := _DEFINITION.match(line):
            skip_to = f".{found[1] or '.'}"
        elif found := _CONDITION.match(line):
            if r"\{" in line:
                skip_to = r".\}"
        elif not line.startswith(("'\\\"", '.\\"', '\\"', "...")):
            yield re.sub(r'\\["#].*', "", line)


def _request(line: str) -> tuple[str | None, list[str]]:
    """Name and arguments of a request; (None, []) for text. '.' alone is a request of no name."""
    if line[:1] not in (".", "'"):
        return None, []
    name, _, rest = line[1:].strip().partition(" ")
    found = (a or b for a, b in _ARGUMENT.findall(rest))
    return name, [part.replace('""', '"') for part in found]


def _words(name: str, arguments: list[str]) -> str:
    parts = [_plain(part) for part in arguments]
    if name in _INLINE and len(name) == 2 and name not in ("SM", "SB"):  # BR: fonts in turn
        return "".join(parts)
    if name in ("UR", "MT", "URL", "IP"):  # an address, or the mark before an indented block
        return parts[0] if parts else ""
    return _mdoc(name, parts) if name in _MDOC else " ".join(parts)


def _mdoc(name: str, parts: list[str]) -> str:
    """Words of an mdoc line; macros among them only change fonts or put signs around."""
    out: list[str] = []
    for word in (name, *parts):
        if word in _MDOC or word in ("Ns", "No", "Ta", "Pq", "Dq", "Sq", "Qq"):
            if _SIGN.get(word):
                out.append(_SIGN[word])
        elif out and out[-1] in _SIGN.values():
            out[-1] += word
        else:
            out.append(word)
    return " ".join(out)


def _plain(text: str) -> str:
    text = _ESCAPE.sub(_character, text)
    return text.replace("\0", "\\")


def _character(found: re.Match[str]) -> str:
    name = found["two"] or found["bracket"]
    if name:
        if re.fullmatch(r"u[0-9A-F]{4,5}(?:_[0-9A-F]{4,5})*", name):
            codes = [int(part, 16) for part in name[1:].split("_")]
            return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        return _CHARACTERS.get(name, "")
    return _SINGLE.get(found["one"] or "", "")


_HEADINGS = frozenset("SH SS Sh Ss".split())
_PARAGRAPHS = frozenset("PP LP P Pp TP IP HP TQ It".split())
_NO_FILL = frozenset("nf EX Bd Vb".split())
_FILL = frozenset("fi EE Ed Ve".split())
_BREAKS = _NO_FILL | _FILL | {"br", "sp", "TS", "TE"}
_INLINE = frozenset("B I R SM SB BI BR IB IR RB RI UR MT URL".split())
_MDOC = frozenset(
    "Nm Nd Fl Ar Op Cm Pa Xr Sy Em Dv Ev Er Fn Fa Ft Vt Va Li Ql Qq Dq Sq Pq Aq Bq Brq Lk Mt"
    " Ic An At Bx Fx Nx Ox Ux Dl D1 In Cd Tn St Ad".split()
)
_SIGN = {"Fl": "-"}
_DEFINITION = re.compile(r"[.']\s*(?:de|de1|am|ig)\b(?:\s+\S+)?(?:\s+(\S+))?")
_CONDITION = re.compile(r"[.']\s*(?:if|ie|el)\b")
_TABLE_FORMAT = re.compile(r"[lcrnasLCRNASbBiI\d\s.,|^()\-_=;wt]*[.;]|_|=|\.TH|T[{}].?")
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\ |[^\s"])[^\s]*(?:(?<=\\) [^\s]*)*)')
_ESCAPE = re.compile(
    r"\\(?:f(?:\[[^\]]*\]|\(..|.)|s(?:\[[^\]]*\]|[-+]?\d{1,2}|\([-+]?..)"
    r"|[mMFkgnzYV*](?:\[[^\]]*\]|\(..|.)"
    r"|[hvwlLDNxbAoCZXRBS]'[^']*'|\((?P<two>..)|\[(?P<bracket>[^\]]*)\]|(?P<one>.))",
    re.DOTALL,
)
_SINGLE = {"-": "-", "e": "\0", "\\": "\0", " ": " ", "~": " ", "0": " ", "'": "'", "`": "`"}
_SINGLE |= {".": ".", "t": "\t", "_": "_", "/": "", "E": "\0"}
_CHARACTERS = dict(
    [
        *(("aq", "'"), ("cq", "’"), ("oq", "‘"), ("lq", "“"), ("rq", "”"), ("dq", '"')),
        *(("em", "—"), ("en", "–"), ("hy", "-"), ("mi", "−"), ("bu", "•"), ("co", "©")),
        *(("rg", "®"), ("tm", "™"), ("ha", "^"), ("ti", "~"), ("rs", "\0"), ("ga", "`")),
        *(("aa", "´"), ("Fo", "«"), ("Fc", "»"), ("fo", "‹"), ("fc", "›"), ("Bq", "„")),
        *(("bq", "‚"), ("ss", "ß"), ("ae", "æ"), ("AE", "Æ"), ("oe", "œ"), ("OE", "Œ")),
        *(("/o", "ø"), ("/O", "Ø"), ("de", "°"), ("sc", "§"), ("mu", "×"), ("di", "÷")),
        *(("+-", "±"), ("<=", "≤"), (">=", "≥"), ("!=", "≠"), ("->", "→"), ("<-", "←")),
        *(("Eu", "€"), ("Po", "£"), ("ct", "¢"), ("Ye", "¥"), ("sh", "#"), ("Do", "$")),
        *(("ba", "|"), ("br", "│"), ("ul", "_"), ("at", "@"), ("sl", "/"), ("lB", "[")),
        *(("rB", "]"), ("lC", "{"), ("rC", "}"), ("la", "⟨"), ("ra", "⟩"), ("*m", "μ")),
        *((f":{letter}", char) for letter, char in zip("aouAOUeiy", "äöüÄÖÜëïÿ", strict=True)),
        *((f"'{letter}", char) for letter, char in zip("aeiouAEIOU", "áéíóúÁÉÍÓÚ", strict=True)),
        *((f"`{letter}", char) for letter, char in zip("aeiouAEIOU", "àèìòùÀÈÌÒÙ", strict=True)),
        *((f"^{letter}", char) for letter, char in zip("aeiouAEIOU", "âêîôûÂÊÎÔÛ", strict=True)),
        *(("~n", "ñ"), ("~N", "Ñ"), ("~a", "ã"), ("~o", "õ"), (",c", "ç"), (",C", "Ç")),
        *(("oa", "å"), ("oA", "Å"), ("r!", "¡"), ("r?", "¿"), ("vs", "š"), ("vz", "ž")),
        *(("*a", "α"), ("*b", "β"), ("*p", "π"), ("if", "∞"), ("sr", "√"), ("no", "¬")),
        *(("12", "½"), ("14", "¼"), ("34", "¾"), ("S2", "²"), ("S3", "³"), ("lh", "☜")),
    ]
)
