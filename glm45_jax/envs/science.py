r"""Multiple choice from files, the options in another order for every question.

Rows are {"question", "options": [...], "answer"}; the answer is the right option's text, letter or
place from 0. A letter is read only where the policy commits to one: in \boxed{}, between
<answer> tags, or after "answer:", and all of these must agree.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import string
from collections.abc import Iterable, Sequence

from glm45_jax.envs.files import Deck, Row, digest, rows, side
from glm45_jax.envs.rewards import boxed, said
from glm45_jax.envs.types import Env, Message, Part, Task

ASK = r"Reason first. End with the letter of the one right option in \boxed{}, say \boxed{Z}."
LETTERS = string.ascii_uppercase[:25]  # Z is the example
_TAGGED = re.compile(r"<answer>([^<]{0,80})</answer>")
_NAMED = re.compile(r"\banswer\s*(?:is)?\s*:?\s*([^\n]{1,80})$", re.IGNORECASE)
_LETTER = re.compile(r"[(\[]?([A-Ya-y])[)\].:]?")


def env(
    source: str | os.PathLike | Iterable[Row],
    *,
    name: str = "science",
    held_out: bool | None = None,
    share: float = 1 / 8,
    seed: int = 0,
) -> Env:
    """Questions of a .jsonl file, or rows. Guessing is right once in as many as there are options.

    held_out: as in `math.env`. seed: of the order of questions; that of options is the question's
    own, so a task is the same everywhere. Parts: "answer"; "form", reported only: one letter.

    Raises: ValueError for rows that lack a key, have fewer than 2 options or more than 25, two
    alike, or an answer that is none of them.
    """
    found = rows(source, ("question", "options", "answer"))
    for at, row in enumerate(found):
        right(row, at)
    if held_out is not None:
        found = rows(side(found, "question", held_out=held_out, share=share), ())
    return Env(
        name=name,
        tasks=Tasks(found, Deck(len(found), seed)),
        rewards=(Part("answer", chosen), Part("form", one_letter, 0.0)),
    )


def right(row: Row, at: int = 0) -> int:
    """The place of the right option.

    Raises: as `env`.
    """
    options, answer = [str(option) for option in row["options"]], row["answer"]
    if not 2 <= len(options) <= len(LETTERS) or len(set(options)) != len(options):
        raise ValueError(f"row {at} has options {options}; give 2 to {len(LETTERS)}, all different")
    if isinstance(answer, int) and 0 <= answer < len(options):
        return answer
    if str(answer) in options:
        return options.index(str(answer))
    if str(answer) in set(LETTERS[: len(options)]):
        return LETTERS.index(str(answer))
    raise ValueError(f"row {at}: answer {answer!r} is no option, place or letter of {options}")


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Number to task."""

    rows: tuple[Row, ...]
    deck: Deck

    def __call__(self, number: int) -> Task:
        """The task of a number; the same row is the same task."""
        at = self.deck(number)
        row = self.rows[at]
        options = [str(option) for option in row["options"]]
        name = digest(str(row["question"]), *options)
        order = list(range(len(options)))
        random.Random(name).shuffle(order)
        lines = [
            f"{letter}) {options[i]}"
            for letter, i in zip(LETTERS[: len(order)], order, strict=True)
        ]
        prompt = "\n".join([str(row["question"]).rstrip(), "", *lines, "", ASK])
        answer = LETTERS[order.index(right(row))]
        return Task(name, prompt, answer, {"row": at, "options": len(options)})


def letter(text: str) -> str | None:
    """The one letter that a text commits to; None for none, or for two that differ."""
    claims = [*_TAGGED.findall(text)]
    if "\\boxed" in text:
        last = boxed(text)
        claims.append(re.sub(r"^\\(?:text|mathrm|textbf)\{([^{}]*)\}$", r"\1", last or ""))
    if not claims:
        claims = [m[1] for line in text.splitlines() if (m := _NAMED.search(line[-200:]))]
    marks = [claim.strip().strip("*_ .") for claim in claims]
    found = {m[1].upper() if (m := _LETTER.fullmatch(mark)) else None for mark in marks}
    return found.pop() if len(found) == 1 else None


def chosen(task: Task, messages: Sequence[Message]) -> float:
    """1 for the right letter."""
    return float(letter(said(messages)) == task.answer)


def one_letter(task: Task, messages: Sequence[Message]) -> float:
    """1 for one letter of the options."""
    found = letter(said(messages))
    return float(found is not None and found in LETTERS[: task.meta["options"]])
