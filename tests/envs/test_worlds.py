"""Sources of tasks: reasoning-gym at a difficulty, files, mixtures, what is held out."""

import collections
import json
import sys

import pytest

from glm45_jax.envs import arithmetic, math, mixed, reasoning, science
from glm45_jax.envs.files import Deck
from glm45_jax.envs.types import Env, Part
from tests.envs.common import reply, score
from tests.gym import needs_gym

ROWS = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(200)]


def length_of(task) -> int:
    return len(str(task.prompt))


@needs_gym
@pytest.mark.parametrize("dataset", ["chain_sum", "spell_backward", "gcd"])
def test_higher_levels_are_harder(dataset):
    worlds = [reasoning.env(dataset, level=level) for level in (0, 3)]
    sizes = [sum(length_of(env.tasks(n)) for n in range(50)) for env in worlds]
    assert sizes[1] > sizes[0]
    assert max(reasoning.levels(dataset).values()) > 1


@needs_gym
def test_settings_go_over_the_level_and_into_the_name():
    reasoning.env("basic_arithmetic", operators=["+", "-"]).tasks(0)
    env = reasoning.env("chain_sum", level=3, min_terms=2, max_terms=2)
    assert all(str(env.tasks(n).prompt).split("\n")[1].count(" ") <= 4 for n in range(5))
    assert env.name != reasoning.env("chain_sum", level=3).name


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        ("isomorphic_strings", "hash seed"),
        ("rush_hour", "stores no answer"),
        ("simple_integration", "runs the answer as Python"),
        ("game_of_life_halting", "accepts wrong answers"),
        ("chain_sums", "unknown"),
    ],
)
def test_datasets_that_prove_nothing_are_refused_with_the_reason(dataset, why):
    with pytest.raises(ValueError, match=why):
        reasoning.env(dataset)


@needs_gym
def test_wrong_settings_are_refused_when_the_world_is_made():
    with pytest.raises(ValueError, match="chain_sum with"):
        reasoning.env("chain_sum", no_such_setting=1)
    with pytest.raises(ValueError, match="chain_sum with"):
        reasoning.env("chain_sum", min_terms=9, max_terms=2)
    with pytest.raises(ValueError, match="level -1"):
        reasoning.env("chain_sum", level=-1)
    with pytest.raises(ValueError, match="gsm_symbolic has no levels"):
        reasoning.env("gsm_symbolic", level=0)
    with pytest.raises(ValueError, match="task number -1"):
        reasoning.env("chain_sum").tasks(-1)


@needs_gym
def test_no_dataset_is_both_used_and_refused():
    from reasoning_gym.factory import DATASETS

    used = {*reasoning.EXACT, *reasoning.CHECKED}
    assert not used & set(reasoning.REFUSED) and not reasoning.EXACT & set(reasoning.CHECKED)
    assert {*used, *reasoning.REFUSED} <= set(DATASETS)


def everything(dataset: str) -> None:
    """Gold is right, near misses are wrong, at every difficulty that there is."""
    levels = (None, 0, 1) if reasoning.levels(dataset) else (None,)
    for level in levels:
        env = reasoning.env(dataset, level=level)
        for number in (0, 1, 2048):
            task = env.tasks(number)
            checked = dataset in reasoning.CHECKED
            gold = task.answer["answer"] if checked else task.answer
            assert score(env, task, f"<answer>{gold}</answer>") == 1, (dataset, level, task)
            for wrong in ("", f"{gold} or 7", f"{gold}\n7 7", "0 zz", gold + gold):
                assert score(env, task, f"<answer>{wrong}</answer>") == 0, (dataset, wrong)


@needs_gym
@pytest.mark.parametrize("dataset", sorted({*reasoning.CHECKED, "zebra_puzzles", "self_reference"}))
def test_gold_is_right_and_near_misses_are_wrong(dataset):
    everything(dataset)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", sorted(reasoning.EXACT))
def test_gold_is_right_in_every_dataset(dataset):
    everything(dataset)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2*3", 7),
        ("(8 - 4) / 2", 2),
        ("1/3+1/3", None),
        ("-3", -3),
        ("2**9", None),
        ("9//2", None),
    ],
)
def test_expressions_are_worked_out_exactly_or_not_at_all(expression, value):
    found = reasoning.value(expression)
    assert (found == value) if value is not None else (found is None or found.denominator == 3)
    for bad in ("__import__('os')", "1+x", "(" * 99 + "1", "1/0", "1" * 999, "", "１", "1 2", "()"):
        assert reasoning.value(bad) is None


def test_countdown_wants_every_number_once():
    entry = {"metadata": {"numbers": [2, 3, 7], "target": 42}}
    assert reasoning.CHECKED["countdown"]("7*3*2", entry)
    for cheat in ("42", "7*6", "7*3*2*1", "7*3*2+0", "(7*3)*2/1", "7*3+3*7", "84/2", "7*32"):
        assert not reasoning.CHECKED["countdown"](cheat, entry)


def test_a_deck_deals_every_row_once_a_round_in_changing_order():
    deck = Deck(7, seed=3)
    rounds = [[deck(7 * turn + n) for n in range(7)] for turn in range(20)]
    assert all(sorted(order) == list(range(7)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 15
    with pytest.raises(ValueError, match="task number -1"):
        deck(-1)


def test_files_are_read_and_rows_that_lack_something_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert [math.env(path).tasks(n) for n in range(9)] == [
        math.env(ROWS).tasks(n) for n in range(9)
    ]
    with pytest.raises(ValueError, match=r"row 1 has \['question'\], and no \['answer'\]"):
        math.env([ROWS[0], {"question": "?"}])
    with pytest.raises(ValueError, match="no rows"):
        math.env([])
    for row, why in (
        ({"options": ["x"], "answer": "x"}, "give 2 to 25"),
        ({"options": ["x", "x"], "answer": "x"}, "all different"),
        ({"options": ["x", "y"], "answer": "z"}, "is no option"),
        ({"options": ["x", "y"], "answer": "C"}, "is no option"),
    ):
        with pytest.raises(ValueError, match=why):
            science.env([{"question": "?", **row}])


def test_rows_that_are_held_out_are_on_one_side_only():
    sides = [
        {math.env(ROWS, held_out=held).tasks(n).id for n in range(400)} for held in (True, False)
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == len(ROWS)
    assert 5 < len(sides[0]) < 60


def test_options_stand_in_the_same_order_for_a_question_and_in_any_for_all():
    rows = [{"question": f"Q{n}", "options": list("wxyz"), "answer": "w"} for n in range(200)]
    tasks = [science.env(rows).tasks(n) for n in range(200)]
    again = {task.id: task for task in map(science.env(rows, seed=9).tasks, range(200))}
    assert all(again[task.id].prompt == task.prompt for task in tasks)
    counts = collections.Counter(task.answer for task in tasks)
    assert set(counts) == set("ABCD") and min(counts.values()) > 25


@needs_gym
def test_the_sides_of_a_split_share_no_prompt():
    env = reasoning.env("gcd", level=0)
    train = {mixed.split(env, held_out=False).tasks(n).prompt for n in range(300)}
    other = reasoning.env("gcd", level=0, seed=5)
    test = {mixed.split(other, held_out=True).tasks(n).prompt for n in range(60)}
    assert not train & test and len(test) > 30


def test_a_split_without_tasks_on_a_side_says_so():
    env = math.env([{"question": "Only this", "answer": "1"}])
    for held_out in (True, False):
        try:
            mixed.split(env, held_out=held_out).tasks(0)
        except ValueError as error:
            assert "all on the other side" in str(error)
            return
    raise AssertionError("one question is on both sides")


@needs_gym
def test_a_mixture_draws_by_weight_and_judges_by_the_tasks_own_world():
    sums, words = arithmetic.env(), reasoning.env("spell_backward", level=0)
    env = mixed.mix({sums: 3.0, words: 1.0})
    tasks = [env.tasks(n) for n in range(400)]
    counts = collections.Counter(task.meta["world"] for task in tasks)
    assert 250 < counts[sums.name] < 350
    for task in tasks[:20]:
        gold = f"<answer>{task.answer}</answer>"
        mine = task.answer if task.meta["world"] == sums.name else gold
        assert env.judge(task, reply(task, mine)).reward == 1
        assert env.judge(task, reply(task, "no")).reward == 0
        assert set(env.judge(task, reply(task, mine)).parts) == {"answer", "number", "form"}
    assert len({task.id for task in tasks}) > 300


def test_worlds_that_do_not_fit_together_are_refused():
    one = arithmetic.env()
    heavy = Env("heavy", one.tasks, (Part("answer", one.rewards[0].reward, 2.0),))
    talking = Env("talking", one.tasks, one.rewards, step=lambda task, messages: None)
    for worlds, why in (
        ([one, arithmetic.env(seed=2)], "all named differently"),
        ([], "give one or more"),
        ([one, heavy], "part answer weighs 1.0 and, in heavy, 2.0"),
        ([talking], "take turns"),
        ({one: -1.0}, "none below 0"),
    ):
        with pytest.raises(ValueError, match=why):
            mixed.mix(worlds)


def test_without_reasoning_gym_a_world_of_it_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r"apt-get install gcc .* requirements-gym\.txt"):
        reasoning.env("chain_sum")
