"""What the parts of a reward say, and that checking an answer is safe whatever it is."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.envs import arithmetic, rewards, workers
from glm45_jax.envs.rewards import Equal, Exact, Form, Language, Length, boxed, equal, tagged
from glm45_jax.envs.types import Task
from tests.envs.common import reply

TASK = Task("t", "?", "42")


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        *(
            ("42", text)
            for text in ("42", "42.0", "x = 42", "$42$", r"\(42\)", r"\text{42}", "42.")
        ),
        *(("42", text) for text in ("+42", "84/2", r"\frac{84}{2}", r"\$42", "42 apples", "042")),
        *(("0.5", text) for text in ("1/2", r"\frac{1}{2}", r"\frac12", ".5", "50%", r"50\%")),
        *(("1,250", text) for text in ("1250", "1250.00", "1,250")),
        ("-3", "-3"),
        (r"\frac{1}{6}", "1/6"),
        (r"(x-1)(x+1)", "x^2 - 1"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
    ],
)
def test_equal_answers_are_equal(gold, answer):
    assert equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        *(("42", text) for text in ("", "41", "-42", "42, 41", "41 or 42", "42 or 41", "41\n42")),
        *(
            ("42", text)
            for text in (r"\{41, 42\}", r"6 \times 7", "6*7", "40+2", "n", "42x", "4 2")
        ),
        *(("42", text) for text in ("42$ and $41", r"\pm 42", "[41, 43]", "> 41", "41 < 42 < 43")),
        *(("42", text) for text in ("４２", "٤٢", "4²", "42!", "1e9", "42; 41", "42 = 41", "Ⅳ")),
        *(("x^2", text) for text in ("x", "x^3", "y^2", "2x", "x^2 + 1", "x^{2}, x")),
        ("42", "__import__('os').system('touch /tmp/glm45_escaped')"),
        ("x", "open('/tmp/glm45_escaped', 'w')"),
    ],
)
def test_unequal_answers_are_not(gold, answer):
    assert not equal(gold, answer)
    assert not os.path.exists("/tmp/glm45_escaped")


def test_a_formula_without_end_costs_its_seconds_and_no_more():
    equal("x", "x")  # a worker is there
    began = time.monotonic()
    assert not equal("x", "9^{9^{9^{9}}}", seconds=0.5)
    assert time.monotonic() - began < 5
    assert equal("x^2", "x x")  # the next has a new worker


def test_checks_run_in_threads_at_once_and_leave_signals_alone():
    before = signal.getsignal(signal.SIGALRM)
    pairs = [(f"{n}", f"{n if n % 2 else n + 1}.0") for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: equal(*pair), pairs))
    assert found == [n % 2 == 1 for n in range(40)]
    assert signal.getsignal(signal.SIGALRM) is before and signal.alarm(0) == 0


def test_a_forked_process_has_workers_of_its_own():
    assert equal("2", "2.0")
    mine = workers._pool()
    done = []

    def forget():  # what os.fork does in a child, without forking a process full of threads
        workers._pool.cache_clear()
        done.append(workers._pool())

    thread = threading.Thread(target=forget)
    thread.start()
    thread.join()
    assert done[0] is not mine
    mine.close()
    assert equal("2", "2.0")


def test_workers_that_cannot_start_say_so():
    with pytest.raises(RuntimeError, match="no process for juggling checks"):
        workers.ask("juggling", (), seconds=1)


@given(st.text(alphabet="{}\\boxed <answer>/1", max_size=60))
def test_reading_never_fails_and_gives_a_part_of_the_text(text):
    for read in (tagged, boxed, rewards.whole):
        found = read(text)
        assert found is None or (found in text and found == found.strip() != "")


@given(st.text(max_size=30).map(str.strip).filter(bool))
def test_what_is_written_in_its_place_is_read(answer):
    if "<answer>" not in answer and "</answer>" not in answer:
        assert tagged(f"so <answer> {answer} </answer>!") == answer
    if not set(answer) & set("{}\\"):
        assert boxed(rf"so \boxed{{ {answer} }}!") == answer


def test_boxes_nest_and_the_last_counts():
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}} end }") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1} then \boxed{2") is None


def test_reading_a_long_message_takes_linear_time():
    for text in ("<answer>" * 20_000, "\\boxed{" * 20_000, "{" * 190_000, "9" * 190_000):
        began = time.monotonic()
        for part in (Exact(tagged), Exact(boxed), Form(tagged), arithmetic.is_number, Equal()):
            assert part(TASK, reply(TASK, text)) in (0, 1)
        assert time.monotonic() - began < 2


def test_form_asks_for_reasoning_or_for_none():
    for thinking, with_it, without in ((None, 1, 1), (True, 1, 0), (False, 0, 1)):
        form = Form(tagged, thinking)
        assert form(TASK, reply(TASK, "<answer>x</answer>", "thought")) == with_it
        assert form(TASK, reply(TASK, "<answer>x</answer>", " ")) == without
        assert form(TASK, reply(TASK, "x", "thought")) == 0


@given(st.integers(0, 400), st.integers(0, 400))
def test_length_costs_nothing_up_to_soft_and_all_from_hard(content, reasoning):
    value = Length(100, 300)(TASK, reply(TASK, "x" * content, "y" * reasoning))
    size = content + reasoning
    assert -1 <= value <= 0
    assert (value == 0) == (size <= 100) and (value == -1) == (size >= 300)
    longer = Length(100, 300)(TASK, reply(TASK, "x" * (content + 1), "y" * reasoning))
    assert longer <= value


def test_length_without_a_window_is_refused():
    with pytest.raises(ValueError, match="soft is 5, hard 5"):
        Length(5, 5)


def test_language_is_the_share_of_letters_of_its_scripts():
    def share(text: str, reasoning: str = "", scripts=("LATIN",)) -> float:
        return Language(scripts)(TASK, reply(TASK, text, reasoning))

    assert share("plain, π = 3.14 größer") == 1 and share("42") == 1 and share("") == 1
    assert share("ab中文") == 0.5 == share("ab", "中文")
    assert share("中文", scripts=("CJK",)) == 1 and share("текст") == 0
    assert share("漢字かな", scripts=("CJK", "HIRAGANA")) == 1


def test_chance_of_arithmetic_is_that_of_its_most_frequent_answer():
    assert arithmetic.chance(2, "+") == 90 / 8100  # 109
    assert arithmetic.chance(1, "-") == 10 / 100
    env = arithmetic.env()
    answers = [env.tasks(n).answer for n in range(4000)]
    most = max(answers.count(str(n)) for n in range(20, 199))
    assert most / 4000 < 2 * arithmetic.chance()


def test_what_arithmetic_holds_out_is_never_trained_on():
    train = {arithmetic.env(seed=1).tasks(n).prompt for n in range(3000)}
    test = {arithmetic.env(seed=2, held_out=True).tasks(n).prompt for n in range(1000)}
    assert not train & test and len(test) > 300
    with pytest.raises(ValueError, match="digits 0"):
        arithmetic.env(digits=0)
    with pytest.raises(ValueError, match="share 1"):
        arithmetic.env(share=1)
