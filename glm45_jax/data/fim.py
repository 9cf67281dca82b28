"""Fill in the middle: a document as prefix, suffix, middle, so that a model learns to infill.

One line of a `Data`: `WithFim(PythonSources(), Fim())` in place of `PythonSources()`. The wrapper
hands on the documents as they are, so duplicates, split and tokenizer training see plain text, and
takes part only where `prepare` turns them into tokens (`Encodes`): the three code tokens go in by
id there, never by text. The cut is a function of (seed, document id) and stands in the store, so
resumed runs and other host counts cannot differ. Each epoch repeats the same cuts.
Source: spec 6.1 (D10); Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the
Middle".
"""

import enum
import hashlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from glm45_jax.data.sources import Doc, Encodes, Source, counted, split_at_lines
from glm45_jax.tokenizer import Tokenizer

FIM_FORMAT = 1  # raise it when the same fields give other tokens
INFILL_FROM = "infill_from"  # meta of a Doc: characters before this one are context, never cut


class Mark(enum.Enum):
    """A special token between parts of a document; not a string, so that no text can be one."""

    PREFIX = "<|code_prefix|>"
    SUFFIX = "<|code_suffix|>"
    MIDDLE = "<|code_middle|>"


Piece = str | Mark


@dataclass(frozen=True)
class Fim:
    """How often, and in which layout.

    UNVERIFIED for GLM-4.5, which states neither rates nor layout: the paper finds 0.5 to 0.9 free
    of harm to left-to-right loss, and halves the layouts between PSM and SPM.
    """

    rate: float = 0.5  # of the documents
    spm: float = 0.5  # of those: suffix, prefix, middle; the others prefix, suffix, middle
    seed: int = 0

    def __post_init__(self):
        for name, value in (("rate", self.rate), ("spm", self.spm)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value} is a share; use 0 to 1")


def fim(text: str, *, doc_id: str, how: Fim, begin: int = 0) -> tuple[Piece, ...]:
    """The document in parts and marks: itself alone, PSM or SPM.

    PSM: PREFIX prefix SUFFIX suffix MIDDLE middle. SPM: PREFIX SUFFIX suffix MIDDLE prefix middle.
    Both cuts are uniform over the places between characters from `begin` on; any part may be empty.
    What stands before `begin` comes first, as it is.
    """
    coin, layout, one, other = _draws(how.seed, doc_id)
    if coin >= how.rate * 2**64:
        return (text,)
    places = len(text) - begin + 1
    a, b = sorted((begin + one % places, begin + other % places))
    context, prefix, middle, suffix = text[:begin], text[begin:a], text[a:b], text[b:]
    if layout < how.spm * 2**64:
        return (context, Mark.PREFIX, Mark.SUFFIX, suffix, Mark.MIDDLE, prefix, middle)
    return (context, Mark.PREFIX, prefix, Mark.SUFFIX, suffix, Mark.MIDDLE, middle)


def unfim(pieces: Iterable[Piece]) -> str:
    """The text that `fim` was given.

    Raises: ValueError for marks that are not one of each in the order of `fim`.
    """
    parts, marks = [""], []
    for piece in pieces:
        if isinstance(piece, Mark):
            marks.append(piece)
            parts.append("")
        else:
            parts[-1] += piece
    if not marks:
        return parts[0]
    if marks != [Mark.PREFIX, Mark.SUFFIX, Mark.MIDDLE]:
        raise ValueError(
            f"marks are {[mark.name for mark in marks]}, fim writes PREFIX, SUFFIX, MIDDLE; "
            "give one whole document"
        )
    context, prefix, suffix, middle = parts  # of SPM: nothing, suffix, prefix and middle
    return context + prefix + middle + suffix


def unfim_ids(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    """The text behind the tokens of one document (without `<|endoftext|>`), transformed or not.

    Raises: ValueError as `unfim` does, or for ids of another tokenizer.
    """
    mark_of = {tokenizer.id_of(mark.value): mark for mark in Mark}
    pieces: list[Piece] = []
    run: list[int] = []
    for i in ids:
        if i in mark_of:
            pieces += (tokenizer.decode(run), mark_of[i])
            run = []
        else:
            run.append(i)
    return unfim((*pieces, tokenizer.decode(run)))


@dataclass(frozen=True)
class WithFim:
    """`source` with some documents in fill-in-the-middle form, in both splits.

    max_chars: cut longer documents at line ends into documents of their own first. A row of 4096
    tokens that holds only a piece of a transformed document teaches nothing of the rest; None
    leaves documents whole. A document with meta["infill_from"] (the last file of a repository) is
    cut only from that character on.
    """

    source: Source
    fim: Fim = Fim()
    max_chars: int | None = None

    def __post_init__(self):
        if isinstance(self.source, Encodes):
            raise ValueError(f"{self.source!r} already encodes its documents; wrap what is inside")
        if self.max_chars is not None and self.max_chars < 1:
            raise ValueError(f"max_chars {self.max_chars} is below 1; use None for no limit")

    @property
    def name(self) -> str:
        """The name of the source inside."""
        return self.source.name

    def version(self) -> str:
        """That of the source inside, and of the transform."""
        return f"{self.source.version()} fim={FIM_FORMAT}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """The documents as plain text; returns counts of documents by layout."""
        inner: dict[str, int] = {}
        layouts = Counter({f"fim_{kind}": 0 for kind in ("plain", "psm", "spm")})
        for doc in counted(self.source, inner):
            for part in self._parts(doc):
                layouts[_layout(self._pieces(part))] += 1
                yield part
        return inner | layouts

    def encode(self, docs: Sequence[Doc], tokenizer: Tokenizer) -> list[list[int]]:
        """Ids of every document; the parts are encoded apart, as they are in use.

        Raises: ValueError when the tokenizer lacks a code token.
        """
        id_of = {mark: tokenizer.id_of(mark.value) for mark in Mark}
        pieces_of = [self._pieces(doc) for doc in docs]
        texts = [piece for pieces in pieces_of for piece in pieces if isinstance(piece, str)]
        encoded = iter(tokenizer.encode_batch(texts))
        found = []
        for pieces in pieces_of:
            ids: list[int] = []
            for piece in pieces:
                ids += next(encoded) if isinstance(piece, str) else [id_of[piece]]
            found.append(ids)
        return found

    def _pieces(self, doc: Doc) -> tuple[Piece, ...]:
        begin = int(doc.meta.get(INFILL_FROM, "0"))
        copy = doc.meta.get("copy")  # of a document that is read in several epochs: cut elsewhere
        doc_id = doc.id if copy is None else f"{doc.id}\0{copy}"
        return fim(doc.text, doc_id=doc_id, how=self.fim, begin=begin)

    def _parts(self, doc: Doc) -> Iterator[Doc]:
        if self.max_chars is None or len(doc.text) <= self.max_chars:
            yield doc
            return
        meta = {key: value for key, value in doc.meta.items() if key != INFILL_FROM}
        meta = {"group": f"doc/{doc.id}"} | meta
        for at, text in enumerate(split_at_lines(doc.text, self.max_chars)):
            if text.strip():
                yield Doc(f"{doc.id}#{at}", text, doc.source, meta)


def _layout(pieces: tuple[Piece, ...]) -> str:
    if len(pieces) == 1:
        return "fim_plain"
    return "fim_spm" if pieces[2] is Mark.SUFFIX else "fim_psm"


def _draws(seed: int, doc_id: str) -> tuple[int, ...]:
    """Four numbers below 2**64; a digest, because random generators change between versions."""
    digest = hashlib.sha256(f"{seed}\0{doc_id}".encode("utf-8", "surrogatepass")).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, 32, 8))
