"""Rules that source code must pass before anything is learnt from it (spec 6 D8).

Each rule is a function (document, thresholds) -> whether to drop; the first that says so gives the
reason a file is counted under. One line of a `Data`: `Filtered(PythonSources(), CodeRules())`.
Rules only: quality models per language (D9) are another step.
"""

import re
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass

from glm45_jax.data.sources import Doc, Source, counted, refuse_encoder

RULES_FORMAT = 1  # raise it when the same thresholds drop other files


@dataclass(frozen=True)
class CodeRules:
    """Thresholds. GLM-4.5 states none (UNVERIFIED for it); where these are in use is said beside.

    Codex names the quantities (Chen et al. 2021, 3.1); CodeParrot's filter, from which the numbers
    come, is public: transformers, examples/research_projects/codeparrot/README.md.
    """

    max_bytes: int = 1_000_000  # UNVERIFIED; usual for GitHub corpora
    max_line_length: int = 1000  # CodeParrot, DeepSeek-Coder (Guo et al. 2024, 2.1)
    mean_line_length: float = 100.0  # CodeParrot, DeepSeek-Coder
    alphanumeric_share: float = 0.25  # CodeParrot; DeepSeek-Coder counts letters only
    generated_lines: int = 5  # from the top that are searched for markers: CodeParrot
    licences: tuple[str, ...] = ()  # allowed in meta["licence"], exactly; () allows all

    def __post_init__(self):
        if not 0 <= self.alphanumeric_share <= 1:
            raise ValueError(f"alphanumeric_share {self.alphanumeric_share} is not in 0 to 1")


def too_large(doc: Doc, rules: CodeRules) -> bool:
    """More bytes than `max_bytes`: data rather than code."""
    return len(doc.text.encode("utf-8", "surrogatepass")) > rules.max_bytes


def mis_encoded(doc: Doc, rules: CodeRules) -> bool:
    """NUL bytes, replacement characters or lone surrogates: binary, or decoded wrongly."""
    return _NOT_TEXT.search(doc.text) is not None


def long_line(doc: Doc, rules: CodeRules) -> bool:
    """One line above `max_line_length` characters: minified, or a table."""
    return max(map(len, doc.text.split("\n"))) > rules.max_line_length


def long_lines_on_average(doc: Doc, rules: CodeRules) -> bool:
    """A mean above `mean_line_length` characters, line ends not counted."""
    ends = doc.text.count("\n")
    lines = ends + (not doc.text.endswith("\n"))
    return len(doc.text) - ends > rules.mean_line_length * lines


def few_alphanumeric(doc: Doc, rules: CodeRules) -> bool:
    """Less than `alphanumeric_share` of the characters are letters or digits of any script."""
    return sum(map(str.isalnum, doc.text)) < rules.alphanumeric_share * len(doc.text)


def generated(doc: Doc, rules: CodeRules) -> bool:
    """A marker of generated files in the first lines, or a name that only such files have."""
    head = "\n".join(doc.text.split("\n", rules.generated_lines)[: rules.generated_lines])
    return _GENERATED.search(head) is not None or generated_name(doc.meta.get("path", ""))


def secret(doc: Doc, rules: CodeRules) -> bool:
    """Something with the form of a live key; placeholders that say EXAMPLE pass."""
    return any("EXAMPLE" not in found.group() for found in _SECRET.finditer(doc.text))


def other_licence(doc: Doc, rules: CodeRules) -> bool:
    """A licence that is not in `licences`, where those are given."""
    return bool(rules.licences) and doc.meta.get("licence", "") not in rules.licences


Rule = Callable[[Doc, CodeRules], bool]
RULES: tuple[Rule, ...] = (  # cheap ones first; the first that drops is the one that counts
    other_licence,
    too_large,
    mis_encoded,
    long_line,
    long_lines_on_average,
    few_alphanumeric,
    generated,
    secret,
)


def why_drop(doc: Doc, rules: CodeRules) -> str | None:
    """The name of the first rule that drops the document; None when it passes."""
    return next((rule.__name__ for rule in RULES if rule(doc, rules)), None)


def generated_name(path: str) -> bool:
    """Whether tools write files of this name: locks, minified and compiled sources."""
    name = path.rpartition("/")[2].lower()
    return name in _GENERATED_NAMES or name.endswith(_GENERATED_ENDS)


@dataclass(frozen=True)
class Filtered:
    """The documents of `source` that pass the rules; how many did not, by reason, is counted."""

    source: Source
    rules: CodeRules = CodeRules()

    def __post_init__(self):
        refuse_encoder(self.source, "the filter")

    @property
    def name(self) -> str:
        """The name of the source inside."""
        return self.source.name

    def version(self) -> str:
        """That of the source inside, and of the rules."""
        return f"{self.source.version()} rules={RULES_FORMAT}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """The documents that pass; returns counts: rules_in, rules_kept, rules_dropped_*."""
        inner: dict[str, int] = {}
        counts = Counter(rules_in=0, rules_kept=0)
        for doc in counted(self.source, inner):
            counts["rules_in"] += 1
            if why := why_drop(doc, self.rules):
                counts[f"rules_dropped_{why}"] += 1
            else:
                counts["rules_kept"] += 1
                yield doc
        return inner | counts


_NOT_TEXT = re.compile("[\0\ufffd\ud800-\udfff]")
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated automatically|@generated"  # CodeParrot's
    r"|code generated .{0,80}do not edit|generated by the protocol buffer compiler",
    re.IGNORECASE,
)
_GENERATED_NAMES = frozenset(
    "package-lock.json npm-shrinkwrap.json yarn.lock pnpm-lock.yaml poetry.lock pipfile.lock"
    " uv.lock cargo.lock composer.lock gemfile.lock go.sum".split()
)
_GENERATED_ENDS = (".min.js", ".min.css", "_pb2.py", "_pb2_grpc.py", ".pb.go", ".pb.cc", ".pb.h")
# Forms their issuers document; each has a prefix of its own, so that false alarms are rare.
_SECRET = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS access key id
    r"|\bgh[pousr]_[0-9A-Za-z]{36,}\b|\bgithub_pat_[0-9A-Za-z_]{40,}\b"  # GitHub
    r"|\bglpat-[0-9A-Za-z_-]{20,}"  # GitLab
    r"|\bxox[abprs]-[0-9]{8,}-[0-9A-Za-z-]{10,}"  # Slack
    r"|\bAIza[0-9A-Za-z_-]{35}\b"  # Google API
    r"|\b[rs]k_live_[0-9A-Za-z]{20,}\b"  # Stripe
    r"|\bpypi-AgEIcHlwaS5vcmc[0-9A-Za-z_-]{50,}"  # PyPI upload
    r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY(?: BLOCK)?-----\s+[0-9A-Za-z+/=\s]{60,}"  # PEM, with body
)
