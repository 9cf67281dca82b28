"""Reasoning tasks without end, made by reasoning-gym, at a difficulty: `env`, `worlds`.

Only datasets whose tasks are a function of their number and whose right answers can be told from
wrong ones: `EXACT` has one right answer, compared as text; `CHECKED` has many, which a check of
ours or, fenced, of reasoning-gym decides. The others are refused with the reason: some depend on
Python's hash seed, some store no answer, some checkers run the answer as Python (`eval`) or accept
"right or 7".
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from glm45_jax.envs.files import digest
from glm45_jax.envs.mixed import mix
from glm45_jax.envs.rewards import Exact, Form, Read, said, tagged, words
from glm45_jax.envs.types import Env, Message, Part, Task

BLOCK = 1024  # tasks of one dataset object: some prepare all of their tasks when they are made
CHECK_S = 5.0
MAX_EXPRESSION = 200

EXACT = frozenset(
    """
    ab base_conversion basic_arithmetic bf binary_alternation bitwise_arithmetic caesar_cipher
    calendar_arithmetic chain_sum coin_flip color_cube_rotation count_bits count_primes
    course_schedule dice family_relationships figlet_font fraction_simplification game_of_life gcd
    gsm_symbolic knights_knaves largest_island lcm leg_counting
    letter_counting letter_jumble manipulate_matrix needle_haystack number_filtering number_sequence
    number_sorting products rotate_matrix rotten_oranges sentence_reordering simple_equations
    simple_geometry spell_backward spiral_matrix string_insertion string_manipulation syllogism
    tsumego word_sequence_reversal word_sorting zebra_puzzles arc_1d rearc circuit_logic
    number_format pool_matrix binary_matrix self_reference cryptarithm aiw
    """.split()
)


def _countdown(answer: str, entry: Mapping[str, Any]) -> bool:
    """Every number once, and the target."""
    facts = entry["metadata"]
    return _uses(answer, facts["numbers"]) and value(answer) == facts["target"]


def _puzzle24(answer: str, entry: Mapping[str, Any]) -> bool:
    """Every number once, and 24."""
    return _uses(answer, entry["metadata"]["numbers"]) and value(answer) == 24


def _n_queens(answer: str, entry: Mapping[str, Any]) -> bool:
    """One of the boards that the queens there allow."""
    boards = entry["metadata"]["valid_answers"]
    return words(answer) in {words(board) for board in boards}


@dataclasses.dataclass(frozen=True)
class Fenced:
    """reasoning-gym's own check, for answers of these marks only, in a process that may be late."""

    dataset: str
    marks: str

    def __call__(self, answer: str, entry: Mapping[str, Any]) -> bool:
        """Whether it scores 1: wrong answers score up to 0.99."""
        from glm45_jax.envs import workers

        if not re.fullmatch(self.marks, answer, re.A):
            return False
        return workers.ask("score", (self.dataset, answer, dict(entry)), seconds=CHECK_S) == 1.0


CHECKED: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "countdown": _countdown,
    "puzzle24": _puzzle24,
    "n_queens": _n_queens,
    "kakurasu": Fenced("kakurasu", r"[01 \n]+"),
    "mini_sudoku": Fenced("mini_sudoku", r"[1-4 \n]+"),
    "sudoku": Fenced("sudoku", r"[1-9 \n]+"),
    "shortest_path": Fenced("shortest_path", r"[a-z \n]+"),
    "palindrome_generation": Fenced("palindrome_generation", "[a-z]+"),
}

_HASHES = "its tasks depend on Python's hash seed, so another machine makes others"
_NO_ANSWER = "it stores no answer, so nothing shows that one scores 1"
_ORDER = "its right answers differ in order or form, and its check accepts more than those"
_LENIENT = "its check accepts wrong answers, and there are many right ones"
REFUSED = {
    **dict.fromkeys(("isomorphic_strings", "knight_swap", "ransom_note"), _HASHES),
    "polynomial_multiplication": f"{_HASHES}; and its check runs the answer as Python",
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic"), _NO_ANSWER),
    **dict.fromkeys(("rubiks_cube", "rush_hour"), _NO_ANSWER),
    **dict.fromkeys(("game_of_life_halting", "quantum_lock"), _LENIENT),
    **dict.fromkeys(("group_anagrams", "time_intervals"), _ORDER),
    **dict.fromkeys(("sokoban", "arc_agi"), "making one task takes a third of a second and more"),
    **dict.fromkeys(
        ("simple_integration", "intermediate_integration"), "its check runs the answer as Python"
    ),
}


def env(
    dataset: str, *, level: int | None = None, seed: int = 0, read: Read = tagged, **settings: Any
) -> Env:
    """A world of one dataset.

    level: of all that reasoning-gym's curriculum of it can make harder, from 0; the highest where
    it has fewer; None for the dataset's defaults. settings: of the dataset's configuration, over
    those. read: where the answer stands. Parts: "answer"; "form", reported only. `mixed.split`
    keeps tasks apart for tests.

    Raises: ValueError for datasets that cannot be used, with the reason, and for wrong settings.
    """
    config = _config(dataset, level, settings)
    name = f"reasoning.{dataset}" + ("" if level is None else f".{level}")
    if settings:
        name += "." + digest(repr(sorted(settings.items())))[:6]
    return Env(
        name=name,
        tasks=Tasks(dataset, config, seed),
        rewards=(Part("answer", Right(read)), Part("form", Form(read), 0.0)),
    )


def worlds(*datasets: str, level: int | None = None, seed: int = 0) -> Env:
    """Several datasets in one world, as often each."""
    return mix([env(dataset, level=level, seed=seed) for dataset in datasets], seed=seed)


def levels(dataset: str) -> dict[str, int]:
    """What can be made harder, and in how many levels."""
    _usable(dataset)
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if not has_curriculum(dataset):
        return {}
    return {name: len(kind.levels) for name, kind in create_curriculum(dataset).attributes.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Tasks:
    """Number to task. config: of the dataset, without size and seed, sorted."""

    dataset: str
    config: tuple[tuple[str, Any], ...]
    seed: int

    def __call__(self, number: int) -> Task:
        """The task of a number; numbers of different draws may give the same question."""
        if number < 0:
            raise ValueError(f"task number {number}; they begin at 0")
        entry = _block(self, number // BLOCK)[number % BLOCK]
        question = f"{entry['question'].rstrip()}\n\n{ASK}"
        answer = str(entry["answer"])
        kept = {"question": entry["question"], "answer": answer, "metadata": entry["metadata"]}
        return Task(
            id=digest(question),
            prompt=question,
            answer=kept if self.dataset in CHECKED else answer,
            meta={"dataset": self.dataset, "number": number},
        )


ASK = "Write the final answer, and nothing else, between <answer> and </answer>."


@dataclasses.dataclass(frozen=True)
class Right:
    """1 where the answer is right, else 0; the task says of which dataset it is."""

    read: Read = tagged

    def __call__(self, task: Task, messages: Sequence[Message]) -> float:
        """0 or 1."""
        check = CHECKED.get(task.meta["dataset"])
        if check is None:
            return Exact(self.read)(task, messages)
        answer = self.read(said(messages))
        return float(answer is not None and check(answer, task.answer))


_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value(expression: str) -> Fraction | None:
    """What + - * / of whole numbers give, exactly; None for anything else."""
    if len(expression) > MAX_EXPRESSION or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        return None
    try:
        return _evaluated(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _evaluated(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluated(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError(ast.dump(node))


def _uses(expression: str, numbers: Sequence[int]) -> bool:
    return sorted(int(n) for n in re.findall("[0-9]{1,18}", expression)) == sorted(numbers)


def _usable(dataset: str) -> None:
    if dataset in EXACT or dataset in CHECKED:
        try:
            import reasoning_gym  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error}: `make setup` leaves reasoning-gym out where it finds no C compiler; "
                "apt-get install gcc python3-dev, then pip install -r requirements-gym.txt"
            ) from error
        return
    why = REFUSED.get(dataset, "it is unknown, or nobody has looked at how it checks answers")
    raise ValueError(f"dataset {dataset}: {why}; usable are {sorted({*EXACT, *CHECKED})}")


def _config(
    dataset: str, level: int | None, settings: Mapping[str, Any]
) -> tuple[tuple[str, Any], ...]:
    """The configuration's fields, checked by making a dataset of one task."""
    _usable(dataset)
    import reasoning_gym
    from reasoning_gym.factory import create_curriculum, has_curriculum

    if level is not None and level < 0:
        raise ValueError(f"level {level}; they begin at 0")
    fields: dict[str, Any] = {}
    if level is not None:
        if not has_curriculum(dataset):
            raise ValueError(f"dataset {dataset} has no levels, and level is {level}; leave it out")
        course = create_curriculum(dataset)
        for name, kind in course.attributes.items():
            course.set_attr_level(name, min(level, len(kind.levels) - 1))
        made = course.generate_configuration()
        fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    fields |= settings
    for name in ("size", "seed"):
        fields.pop(name, None)
    try:
        reasoning_gym.create_dataset(dataset, size=1, seed=0, **fields)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"dataset {dataset} with {fields}: {error}") from error
    return tuple(sorted(fields.items()))


@functools.lru_cache(maxsize=16)
def _block(tasks: Tasks, block: int) -> Any:
    """A dataset object of `BLOCK` tasks, kept while it is in use."""
    import reasoning_gym

    seed = int(digest(tasks.dataset, str(tasks.seed), str(block))[:8], 16)
    return reasoning_gym.create_dataset(tasks.dataset, size=BLOCK, seed=seed, **dict(tasks.config))
