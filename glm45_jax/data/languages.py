"""Which language a document is in, natural or of programs, and how much of each is read.

Natural: `multilingual(source, (Language("de", ...), ...))` identifies each document, drops what is
in another language than its label says, scores educational utility with the classifier of its
language and up-samples what reaches that language's threshold (spec 6 D7). Of programs:
`Leveled(source, (("python", quality), ...), CodeLanguage())` has a quality model and three tiers
for each (D9). Both are the machinery of `data/quality.py`.
"""

import functools
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from glm45_jax.data.quality import Group, Leveled, Quality, Thresholds
from glm45_jax.data.scorers import Scorer
from glm45_jax.data.sources import Doc, DroppedError, Source

LANGUAGES_FORMAT = 1  # raise it when the same texts are taken for other languages


@dataclass(frozen=True)
class NaturalLanguage:
    """Groups by the language of the text, as ISO 639-1 where there is a code of two letters.

    What is left out is counted as language_short (fewer than `min_letters` letters),
    language_uncertain (below `confidence`), language_unknown_X (a label X that names none) and
    language_X_is_Y (labelled X, found Y: pages that nobody translated, mostly).
    """

    confidence: float = 0.7  # posterior; a paragraph reaches 0.9, neighbours like hr and bs do not
    min_letters: int = 40
    max_chars: int = 2000  # looked at, in four slices over the document
    among: tuple[str, ...] = ()  # languages that can be found; () allows all that are known
    folder: int | None = None  # which folder of meta["path"] is the label; None: meta["language"]

    def __post_init__(self):
        if not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence {self.confidence} is a probability; use 0 to 1")

    def of(self, doc: Doc) -> Group:
        """The language, its confidence in meta["language_confidence"].

        A label stands for its near relatives too, which the model confuses (hr, bs and sr).

        Raises: DroppedError (the names above).
        """
        sample = _slices(doc.text, self.max_chars)
        if sum(map(str.isalpha, sample)) < self.min_letters:
            raise DroppedError("language_short")
        shares = identify(sample, self.among)
        found = max(shares, key=lambda code: shares[code])
        label = self._label(doc)
        claimed = canonical(label) if label else found
        if claimed is None:
            raise DroppedError(f"language_unknown_{label}")
        near = _RELATIVES.get(claimed, frozenset([claimed])) if label else [found]
        confidence = min(1.0, sum(shares.get(code, 0.0) for code in near))
        if confidence < self.confidence:
            other = shares[found] >= self.confidence
            raise DroppedError(f"language_{claimed}_is_{found}" if other else "language_uncertain")
        return Group(claimed, {"language": claimed, "language_confidence": f"{confidence:.4f}"})

    def version(self) -> str:
        """Of the model."""
        return f"languages={LANGUAGES_FORMAT} py3langid=={version('py3langid')}"

    def _label(self, doc: Doc) -> str:
        if self.folder is None:
            return doc.meta.get("language", "")
        folders = doc.meta.get("path", "").split("/")[:-1]
        return folders[self.folder] if self.folder < len(folders) else ""


@dataclass(frozen=True)
class Language:
    """A language that is learnt: its judges of educational utility, and how often it is read.

    threshold: of the best score; documents from there on are up-sampled. All numbers are a CHOICE.
    """

    code: str
    utility: tuple[Scorer, ...]
    threshold: float = 0.5
    epochs: float = 2.0  # from the threshold on
    epochs_below: float = 1.0  # 0 drops them

    def __post_init__(self):
        if self.code != _normal(self.code) or self.code not in _TWO_LETTERS.values():
            raise ValueError(
                f"{self.code!r} is no language here; use two letters of ISO 639-1, as in 'de'"
            )

    def quality(self) -> Quality:
        """Two levels by score."""
        epochs = (self.epochs_below, self.epochs)
        return Quality(self.utility, cut=Thresholds((self.threshold,)), epochs=epochs)


def multilingual(
    source: Source,
    languages: tuple[Language, ...],
    identified: NaturalLanguage = NaturalLanguage(),
) -> Leveled:
    """The documents of `source` that are in one of the languages, with the epochs of theirs."""
    return Leveled(source, tuple((lang.code, lang.quality()) for lang in languages), identified)


def identify(text: str, among: tuple[str, ...] = ()) -> dict[str, float]:
    """The probability of each language; a dialect counts for the language it joins.

    Raises: ValueError for a language in `among` that the model does not know.
    """
    shares: dict[str, float] = {}
    for label, probability in _identifier(among).rank(text):
        language = _JOINED.get(label, label)
        shares[language] = shares.get(language, 0.0) + float(probability)
    return shares


def canonical(label: str) -> str | None:
    """The language behind `pt-BR`, `zh_TW`, `deu_Latn`, `nb`; None where it names none."""
    code = _normal(label)
    return code if code in _identifier(()).labels else None


@dataclass(frozen=True)
class CodeLanguage:
    """Groups by the programming language that the name of the file tells.

    A name that tells none is counted as dropped: code_unknown.
    """

    def of(self, doc: Doc) -> Group:
        """The language.

        Raises: DroppedError("code_unknown").
        """
        name = doc.meta.get("path", doc.id).rpartition("/")[2].lower()
        language = _LANGUAGE_OF.get(name) or _LANGUAGE_OF.get(name.rpartition(".")[2])
        if language is None:
            raise DroppedError("code_unknown")
        return Group(language, {"language": language})

    def version(self) -> str:
        """Of the table of names."""
        return f"languages={LANGUAGES_FORMAT}"


@functools.cache
def _identifier(among: tuple[str, ...]) -> Any:
    """The model, 140 languages or those of `among`; a second or so to load."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if among:
        parts = [code for code, whole in _JOINED.items() if whole in among]
        identifier.set_languages([*among, *(code for code in parts if code in identifier.labels)])
    return identifier


def _normal(label: str) -> str:
    code = re.split(r"[-_.@]", label.lower(), maxsplit=1)[0]
    code = _TWO_LETTERS.get(code, code)
    return _JOINED.get(code, code)


def _slices(text: str, max_chars: int) -> str:
    """At most `max_chars` of a text, from four places: the top of a page may be English on any."""
    if len(text) <= max_chars:
        return text
    size = max_chars // 4
    step = (len(text) - size) // 3
    return "\n".join(text[at : at + size] for at in range(0, 3 * step + 1, step))


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


# Of one language for our purpose, or other names of it.
_JOINED = _pairs("nb no nn no wuu zh yue zh uzs uz iw he in id fil tl ary ar arz ar")
_RELATIVES = {
    code: frozenset(family.split())
    for family in ("bs hr sr", "da no", "id ms jv", "gl pt", "cs sk", "bg mk", "af nl")
    for code in family.split()
}
# ISO 639-3, as FineWeb-2 names its parts.
_TWO_LETTERS = _pairs(
    "afr af amh am arb ar ara ar asm as azj az aze az bel be bul bg ben bn bre br bos bs cat ca"
    " ces cs cym cy dan da deu de ell el eng en epo eo spa es ekk et est et eus eu fas fa pes fa"
    " fin fi fra fr gle ga glg gl guj gu heb he hin hi hrv hr hun hu hye hy ind id isl is ita it"
    " jpn ja jav jv kat ka kaz kk khm km kan kn kor ko kmr ku kir ky lat la lao lo lit lt lav lv"
    " lvs lv mlg mg mkd mk mal ml khk mn mon mn mar mr msa ms zsm ms mya my npi ne nep ne nld nl"
    " nob no nno no nor no ory or pan pa pol pl pus ps por pt ron ro rus ru sin si slk sk slv sl"
    " som so sqi sq als sq srp sr swe sv swh sw swa sw tam ta tel te tha th tgl tl tur tr uig ug"
    " ukr uk urd ur uzn uz vie vi cmn zh zho zh yor yo zul zu"
)
# A file name, or its last ending.
_LANGUAGE_OF = _pairs(
    "py python pyi python pyx python c c h c cc cpp cpp cpp cxx cpp hpp cpp hh cpp cu cuda cuh cuda"
    " java java kt kotlin kts kotlin scala scala go go rs rust js javascript mjs javascript"
    " jsx javascript ts typescript tsx typescript rb ruby php php cs csharp swift swift m objc"
    " dart dart lua lua pl perl pm perl r r jl julia hs haskell ml ocaml erl erlang ex elixir"
    " exs elixir clj clojure sh shell bash shell ps1 powershell sql sql html html css css scss css"
    " tex latex f90 fortran f fortran asm assembly s assembly v verilog vhd vhdl zig zig nim nim"
    " dockerfile docker makefile make mk make cmakelists.txt cmake cmake cmake"
)
