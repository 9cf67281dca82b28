"""Every environment proves itself; its tasks are pure functions of their number."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from glm45_jax.envs import arithmetic, math, mixed, reasoning, science
from glm45_jax.envs.types import Env
from tests.envs.common import prove, tricks
from tests.gym import needs_gym

MATHS = (
    {"question": "6 times 7?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
    {"question": "A half of a third?", "answer": r"\frac{1}{6}"},
    {"question": "Factor x squared minus one.", "answer": "(x-1)(x+1)"},
    {"question": "How many?", "answer": "1,250"},
)
SCIENCE = (
    {"question": "Heaviest?", "options": ["He", "Pb", "Fe", "Na"], "answer": "Pb"},
    {"question": "Lightest?", "options": ["He", "Pb", "Fe"], "answer": "A"},
    {"question": "Noble?", "options": ["Cl", "K", "Ne", "S", "P"], "answer": 2},
)


def tag(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def box(answer: str) -> str:
    return f"So it is \\boxed{{{answer}}}."


def plain(answer: str) -> str:
    return answer


@pytest.mark.parametrize("operators", ["+", "-", "*", "+-*"])
@pytest.mark.parametrize("digits", [1, 2, 5])
def test_arithmetic_proves_itself(digits, operators):
    env = arithmetic.env(digits=digits, operators=operators)
    for number in range(5):
        task = env.tasks(number)
        wrong = str(int(task.answer) + 1)
        more = {
            "question again": str(task.prompt) + task.answer,
            "zero before": "0" + task.answer,
            "as a formula": f"{task.answer}+0",
            "underscore": f"1_{task.answer}",
            "point": f"{task.answer}.0",
            "tag": tag(task.answer),
            "plus": f"+{task.answer}",
        }
        prove(env, task, task.answer, {**tricks(plain, task.answer, wrong), **more})


@needs_gym
@pytest.mark.parametrize(
    "dataset", ["chain_sum", "spell_backward", "knights_knaves", "rotate_matrix", "countdown"]
)
def test_reasoning_proves_itself(dataset):
    env = reasoning.env(dataset, level=0)
    for number in (0, 1, 5000):
        task = env.tasks(number)
        checked = dataset in reasoning.CHECKED
        gold = task.answer["answer"] if checked else task.answer
        more = {
            "two tags": tag(gold) + tag(gold),
            "quoted prompt": "between <answer> and </answer>: " + tag(gold),
            "tag in tag": tag(tag(gold)),
            "tag open": f"<answer>{gold}",
            "tag backwards": f"</answer>{gold}<answer>",
            "no tag": gold,
        }
        prove(env, task, f"I think {tag(gold)}", {**tricks(tag, gold, "0 zz"), **more})


def test_mathematics_proves_itself():
    env = math.env(MATHS)
    for number in range(4):
        task = env.tasks(number)
        wrongs = {**tricks(box, task.answer, "17"), "no box": task.answer}
        wrongs["box not closed"] = f"\\boxed{{{task.answer}"
        wrongs["another box after it"] = box(task.answer) + box("17")
        del wrongs["in the reasoning only"]
        prove(env, task, box("1") + box(task.answer), wrongs)


@needs_gym
@pytest.mark.parametrize("dataset", ["gsm_symbolic", "chain_sum", "gcd"])
def test_grade_school_proves_itself(dataset):
    env = math.grade_school(dataset)
    task = env.tasks(3)
    wrong = str(int(task.answer.replace(",", "")) + 1)
    work = {
        "work left undone": box(f"{task.answer}+0"),
        "a product": box(f"{task.answer} \\times 1"),
    }
    prove(env, task, box(task.answer), {**tricks(box, task.answer, wrong), **work})


def test_science_proves_itself():
    env = science.env(SCIENCE)
    for number in range(3):
        task = env.tasks(number)
        letters = science.LETTERS[: task.meta["options"]]
        wrong = next(mark for mark in letters if mark != task.answer)
        looks = {"A": "\u0410", "B": "\u0412", "C": "\u0421", "D": "\u216e", "E": "\u0415"}
        more = {
            "all letters": box("".join(letters)),
            "all with commas": box(", ".join(letters)),
            "letter of another script": box(looks[task.answer]),
            "wide letter": box(chr(ord(task.answer) + 0xFEE0)),
            "two answers": f"Answer: {task.answer}\nAnswer: {wrong}",
            "tag and box differ": tag(task.answer) + box(wrong),
            "right, then wrong": box(task.answer) + box(wrong),
            "a letter in words": f"{task.answer} could be, and so could others.",
            "no such option": box("Y"),
            "the example": box("Z"),
        }
        wrongs = {**tricks(box, task.answer, wrong), **more}
        prove(env, task, box(task.answer), wrongs)
        for good in (
            box(f"\\text{{{task.answer}}}"),
            f"Answer: {task.answer}",
            f"(answer: ({task.answer})",
        ):
            assert env.judge(task, [{"role": "assistant", "content": good}]).reward == 1, good
        for good in (
            tag(task.answer),
            f"The answer is **{task.answer}**.",
            box(task.answer.lower()),
        ):
            assert env.judge(task, [{"role": "assistant", "content": good}]).reward == 1, good


def all_worlds() -> list[Env]:
    return [
        arithmetic.env(operators="+-"),
        reasoning.env("chain_sum", level=2),
        reasoning.worlds("gcd", "spell_backward", level=1),
        math.env(MATHS),
        math.grade_school("gsm_symbolic", "lcm"),
        science.env(SCIENCE),
        mixed.split(reasoning.env("products"), held_out=True),
    ]


def prints(numbers=(0, 7, 1023, 1024, 10**6)) -> list[list[str]]:
    return [
        [
            json.dumps([task.id, task.messages, task.answer, dict(task.meta)])
            for task in map(env.tasks, numbers)
        ]
        for env in all_worlds()
    ]


@needs_gym
def test_a_task_is_a_function_of_its_number_in_every_process():
    code = "from tests.envs.test_laws import *; import json; print(json.dumps(prints()))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parents[2],
        env={"PYTHONHASHSEED": "77", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    mine = prints()
    assert json.loads(done.stdout) == mine == prints()
    assert all(len(set(row)) > 1 for row in mine)


@needs_gym
def test_environments_can_be_sent_to_workers():
    for env in all_worlds():
        again = pickle.loads(pickle.dumps(env))
        assert again.tasks(5) == env.tasks(5) and again.name == env.name


@needs_gym
def test_names_of_worlds_differ():
    names = [env.name for env in all_worlds()]
    names += [reasoning.env("chain_sum").name, reasoning.env("chain_sum", min_terms=3).name]
    assert len(set(names)) == len(names) - 1  # two mixtures have the default's
