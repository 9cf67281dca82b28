"""Parts of a reward, each one thing: `Exact`, `Equal`, `Form`, `Length`, `Language`.

Each is a frozen value that is called as (task, messages) -> float and can be pickled. All read the
last message only, and of it what follows the reasoning: an answer is what the policy commits to.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Sequence

from glm45_jax.envs.types import Message, Task

Read = Callable[[str], str | None]

MAX_TEXT = 200_000  # characters; a longer message has no answer
MAX_ANSWER = 20_000  # grids are long
MAX_FORMULA = 400
VERIFY_S = 5.0

# A number as people write it, a unit behind it: no operation that would leave the work undone.
_UNIT = r"(?:\s*[a-zA-Z°/ ]{0,40}\.?)"
_PLAIN = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s*/\s*\d+)?\s*(?:\\?%)?"
_FRACTION = r"[-+]?\\[dt]?frac(?:\{-?\d+\}|\d)(?:\{-?\d+\}|\d)"
_NUMBER = re.compile(rf"(?:[a-zA-Z]\s*=\s*)?(?:(?=[^a-zA-Z]*\d){_PLAIN}|{_FRACTION}){_UNIT}", re.A)


def said(messages: Sequence[Message]) -> str:
    """What the policy said last, without its reasoning; "" where it said nothing, or too much."""
    last = messages[-1] if messages else {}
    content = last.get("content") if last.get("role") == "assistant" else None
    return content if isinstance(content, str) and len(content) <= MAX_TEXT else ""


def thought(messages: Sequence[Message]) -> str:
    """The reasoning before it."""
    last = messages[-1] if messages else {}
    reasoning = last.get("reasoning_content") if last.get("role") == "assistant" else None
    return reasoning if isinstance(reasoning, str) else ""


def tagged(text: str) -> str | None:
    """What is between <answer> and </answer>; None unless there is exactly one pair."""
    opening, closing = "<answer>", "</answer>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return _short(text[start:end]) if start <= end else None


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{}: results on the way are boxed too. None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for at in range(start, min(len(text), start + MAX_ANSWER)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return _short(text[start:at])
    return None


def whole(text: str) -> str | None:
    """All of it, but for space around it; None for nothing."""
    return _short(text)


def _short(text: str) -> str | None:
    text = text.strip()
    return text if 0 < len(text) <= MAX_ANSWER else None


def words(text: str) -> str:
    """The text as it is compared: lines and words one space apart, ASCII letters small."""
    lines = [" ".join(line.split()) for line in text.strip().splitlines()]
    return re.sub(
        "[A-Z]", lambda match: match[0].lower(), "\n".join(line for line in lines if line)
    )


@dataclasses.dataclass(frozen=True)
class Exact:
    """1 where the answer is the task's, as text; see `words`. "4" is not "4.0", and "٤" no "4"."""

    read: Read = tagged

    def __call__(self, task: Task, messages: Sequence[Message]) -> float:
        """0 or 1."""
        answer = self.read(said(messages))
        return float(answer is not None and words(answer) == words(str(task.answer)))


@dataclasses.dataclass(frozen=True)
class Equal:
    r"""1 where the answer is equal to the task's in mathematics, by math-verify.

    Where the task's is a number, the answer must be one as well: "6\times 7" leaves work undone.
    seconds: after which it counts as not equal. The check runs in a process of its own, so it may
    be called from any thread, and a formula that never ends costs those seconds only.
    """

    read: Read = boxed
    seconds: float = VERIFY_S

    def __call__(self, task: Task, messages: Sequence[Message]) -> float:
        """0 or 1."""
        answer = self.read(said(messages))
        return float(answer is not None and equal(str(task.answer), answer, seconds=self.seconds))


def equal(gold: str, answer: str, *, seconds: float = VERIFY_S) -> bool:
    """Whether two formulas (LaTeX or plain) are equal.

    False for answers of several lines or formulas, of more than 400 characters, and with digits
    other than ASCII's.

    Raises: RuntimeError where no process for the check can be started.
    """
    from glm45_jax.envs import workers

    gold, answer = _formula(gold), _formula(answer)
    if not answer or len(answer) > MAX_FORMULA or "\n" in answer or "$" in answer:
        return False
    if any(unicodedata.category(mark) in ("Nd", "Nl", "No") for mark in answer if mark > "\x7f"):
        return False
    if _NUMBER.fullmatch(gold) and not _NUMBER.fullmatch(answer):
        return False
    if gold == answer:
        return True
    return workers.ask("equal", (gold, answer), seconds=seconds) is True


def _formula(text: str) -> str:
    r"""The formula without what surrounds it: dollars of LaTeX and money, \text{}, a full stop."""
    text = text.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inside:
            text = inside.strip()
            break
    text = re.sub(r"^(-?)\s*\\?\$\s*(?=[\d.])", r"\1", text)
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text)
    return re.sub(r"(?<=\w)\.$", "", text.replace(r"\!", "").replace(r"\,", " ")).strip()


@dataclasses.dataclass(frozen=True)
class Form:
    """1 where there is an answer in its form. thinking: True wants reasoning too, False none."""

    read: Read = tagged
    thinking: bool | None = None

    def __call__(self, task: Task, messages: Sequence[Message]) -> float:
        """0 or 1."""
        fits = self.thinking in (None, bool(thought(messages).strip()))
        return float(fits and self.read(said(messages)) is not None)


@dataclasses.dataclass(frozen=True)
class Length:
    """0 up to `soft` characters of reasoning and content, falling to -1 at `hard` and beyond.

    Source: the soft punishment of overlong answers, DAPO (arXiv 2503.14476) equation 13.
    """

    soft: int
    hard: int

    def __post_init__(self) -> None:
        if not 0 <= self.soft < self.hard:
            raise ValueError(f"soft is {self.soft}, hard {self.hard}; give 0 <= soft < hard")

    def __call__(self, task: Task, messages: Sequence[Message]) -> float:
        """-1 to 0."""
        last = messages[-1] if messages else {}
        size = len(str(last.get("content") or "")) + len(thought(messages))
        return -min(1.0, max(0.0, (size - self.soft) / (self.hard - self.soft)))


@dataclasses.dataclass(frozen=True)
class Language:
    """The share of letters, in reasoning and content, that are of these scripts; 1 without letters.

    scripts: first words of Unicode's names, say LATIN, CYRILLIC, CJK, HANGUL. Of formulas, Greek
    counts everywhere.
    """

    scripts: tuple[str, ...] = ("LATIN",)

    def __call__(self, task: Task, messages: Sequence[Message]) -> float:
        """0 to 1."""
        text = (said(messages) + thought(messages))[:MAX_TEXT]
        letters = [mark for mark in text if mark.isalpha()]
        allowed = {"GREEK", *self.scripts}
        return sum(_script(mark) in allowed for mark in letters) / len(letters) if letters else 1.0


def _script(letter: str) -> str:
    """LATIN, of full width too; UNNAMED where Unicode has no name."""
    names = unicodedata.name(letter, "UNNAMED").removeprefix("FULLWIDTH ").split()
    return names[0].split("-")[0]
