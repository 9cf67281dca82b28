"""Laws of the alarms: silent while nothing changes, loud after what is injected, the same after a
restart; canaries never pay and are never trained."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.envs.types import Env, Part, Task
from glm45_jax.rl.alarms import (
    CANARY,
    FIRST_CANARY,
    FIRST_ROUNDS,
    LATEST_ROUNDS,
    RULES,
    Alarm,
    Beside,
    Canary,
    Diverge,
    Drift,
    Moments,
    canary,
    from_json,
    no_answer,
    not_trained,
    repetition,
    scalars,
    to_json,
    watch,
)
from glm45_jax.rl.pool import Pool, Prompt, Rules, varied
from glm45_jax.rl.trajectory import Trajectory
from tests.rl.pool_run import TOKENS, drawn

QUIET = FIRST_ROUNDS + LATEST_ROUNDS


def sample(rng, group, *, length=100.0, loops=False, empty=0.0, cut=0.0, parts=(0.5, 0.5), task=""):
    """A group's sample with these habits; parts: how often each of two parts passes."""
    T = max(int(rng.normal(length, length / 5)), 2)
    tokens_T = rng.integers(0, 5000, T) if not loops else np.arange(T) % 7
    content = "" if rng.random() < empty else "42"
    paid, trusted = (float(rng.random() < p) for p in parts)
    return Trajectory(
        task_id=task or group,
        group=group,
        tokens_T=tokens_T.astype(np.int32),
        sampled_T=np.arange(T) > 0,
        logp_T=np.zeros(T, np.float32),
        versions_T=np.zeros(T, np.int32),
        reward=paid,
        messages=({"role": "user", "content": "?"}, {"role": "assistant", "content": content}),
        parts={"judge": paid, "tests": trusted},
        status="length" if rng.random() < cut else "done",
    )


def habits(rng, n=16, **options):
    return [sample(rng, f"g{i}", **options) for i in range(n) for _ in range(4)]


def rounds(rules, batches, state=None):
    """(state, names of alarms) after each round."""
    state = state or {}
    for batch in batches:
        state, alarms = watch(rules, state, batch)
        yield state, {alarm.rule for alarm in alarms}


ALL = (*RULES, Diverge("judge", "tests"))


def test_nothing_is_said_while_nothing_changes():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        batches = [habits(rng, empty=0.1, cut=0.1, parts=(0.4, 0.5)) for _ in range(60)]
        assert not any(names for _, names in rounds(ALL, batches))


@pytest.mark.parametrize(
    ("name", "habit"),
    [
        ("answer_tokens", {"length": 250.0}),
        ("answer_tokens", {"length": 40.0}),
        ("repetition", {"loops": True}),
        ("no_answer", {"empty": 0.5}),
        ("cut", {"cut": 0.4}),
        ("judge_against_tests", {"parts": (0.9, 0.2)}),
        ("judge_against_tests", {"parts": (0.5, 0.1)}),
    ],
)
def test_what_is_injected_is_named_within_as_many_rounds_as_are_looked_at(name, habit):
    rng = np.random.default_rng(0)
    before = [habits(rng) for _ in range(QUIET)]
    after = [habits(rng, **habit) for _ in range(LATEST_ROUNDS)]
    *quiet, last = [names for _, names in rounds(ALL, before + after)]
    assert name in last and not any(quiet[:QUIET])
    assert last <= {name, "answer_tokens", "repetition"}  # looping answers are also long savings


def test_a_reward_that_all_parts_agree_on_may_rise():
    rng = np.random.default_rng(1)
    batches = [habits(rng, parts=(0.2 + 0.03 * i,) * 2) for i in range(25)]
    assert not any(names for _, names in rounds((Diverge("judge", "tests", most=0.3),), batches))


def test_a_small_change_is_not_news_however_sure_it_is():
    rng = np.random.default_rng(2)
    batches = [habits(rng, length=100.0 + 2 * i, n=64) for i in range(25)]
    *_, (state, names) = rounds(RULES, batches)
    assert state["answer_tokens"].deviations > 4 and not names


def test_a_large_change_of_one_noisy_group_is_chance():
    rng = np.random.default_rng(3)
    first = [habits(rng, n=2) for _ in range(QUIET)]
    odd = [*habits(rng, n=1), sample(rng, "odd", empty=1.0)]
    *_, (_, names) = rounds((Drift("no_answer", no_answer, most=0.05),), [*first, odd])
    assert not names


def test_passing_canaries_are_told_at_once_and_chance_is_allowed():
    rng = np.random.default_rng(4)

    def with_canaries(p):
        passed = [sample(rng, f"c{i}", parts=(p, 0), task=f"{CANARY}{i}") for i in range(8)]
        return habits(rng) + passed

    *_, (state, names) = rounds((Canary(),), [with_canaries(0.0)] * 3)
    assert not names and state["canary"].now == Moments(24)
    _, (alarm,) = watch((Canary(),), state, with_canaries(0.5))
    assert isinstance(alarm, Alarm) and "tasks that cannot be solved" in alarm.message
    guessed = list(rounds((Canary(chance=0.25),), [with_canaries(0.25) for _ in range(40)]))
    assert not any(names for _, names in guessed)
    *_, (_, names) = rounds((Canary(chance=0.25),), [with_canaries(0.75) for _ in range(5)])
    assert names == {"canary"}


def test_canaries_do_not_count_for_other_rules():
    rng = np.random.default_rng(5)
    batch = habits(rng)
    loud = [sample(rng, "c", empty=1.0, length=900.0, task=f"{CANARY}c")]
    assert watch(RULES[:-1], {}, batch + loud) == watch(RULES[:-1], {}, batch)
    with_parts = (Diverge("judge", "tests"),)
    assert watch(with_parts, {}, batch + loud) == watch(with_parts, {}, batch)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), cut=st.integers(0, 24))
def test_a_restored_watch_says_the_same_and_order_does_not_matter(seed, cut):
    rng = np.random.default_rng(seed)
    batches = [habits(rng, n=4, length=60.0 + 10 * i) for i in range(25)]
    whole = list(rounds(ALL, batches))
    state = from_json(json.loads(json.dumps(to_json(whole[cut][0]))))
    assert state == whole[cut][0]
    shuffled = [batch[::-1] for batch in batches[cut + 1 :]]
    for (a, names_a), (b, names_b) in zip(
        rounds(ALL, shuffled, state), whole[cut + 1 :], strict=True
    ):
        assert names_a == names_b
        assert scalars(a, []) == pytest.approx(scalars(b, []))


@given(a=st.lists(st.floats(-9, 9)), b=st.lists(st.floats(-9, 9)))
def test_moments_join_as_if_they_had_been_one_list(a, b):
    def of(values):
        if not values:
            return Moments()
        return Moments(len(values), float(np.mean(values)), float(np.var(values) * len(values)))

    joined, direct = of(a).joined(of(b)), of(a + b)
    assert joined.n == direct.n
    assert joined.mean == pytest.approx(direct.mean, abs=1e-9)
    assert joined.squares == pytest.approx(direct.squares, abs=1e-9)


def test_measures_of_extreme_answers():
    rng = np.random.default_rng(6)
    assert repetition(sample(rng, "g", loops=True)) > 0.8
    assert repetition(sample(rng, "g", length=10)) == 0 <= repetition(sample(rng, "g")) < 0.5
    call = dataclasses.replace(
        sample(rng, "g"), messages=({"role": "assistant", "content": "", "tool_calls": [{}]},)
    )
    assert not no_answer(call) and no_answer(dataclasses.replace(call, messages=()))


def test_two_rules_of_one_name_are_refused():
    with pytest.raises(ValueError, match="give each a name of its own"):
        watch((Canary(), Canary(chance=0.5)), {}, [])


def sums(same=False):
    def exact(task, messages):
        return float(messages[-1]["content"] == task.answer)

    def task(number):
        return Task(f"sums/{number}", f"{number} + 1 = ?", "7" if same else str((number + 1) // 2))

    return Env("sums", task, (Part("exact", exact),))


@given(number=st.integers(0, 1000))
def test_the_right_answer_is_wrong_on_a_canary(number):
    env, swapped = sums(), canary(sums())
    task = swapped.tasks(number)
    assert task.id == f"{CANARY}sums/{number}" and task.prompt == env.tasks(number).prompt
    right = [{"role": "assistant", "content": env.tasks(number).answer}]
    assert swapped.judge(task, right).reward == 0 and env.judge(env.tasks(number), right).reward
    assert swapped.tasks(number) == task


def test_a_world_of_one_answer_has_no_canaries():
    with pytest.raises(ValueError, match="have the answer '7'"):
        canary(sums(same=True)).tasks(3)


def test_canaries_beside_a_world_have_numbers_of_their_own():
    env = Beside(sums)()
    for n in range(5):
        assert env.tasks(n) == sums().tasks(n)
        assert env.tasks(FIRST_CANARY + n) == canary(sums()).tasks(n)


def test_canaries_are_dropped_before_training_and_counted(tmp_path):
    with Pool(tmp_path, run="r", rules=Rules(groups=1), filters=(not_trained, varied)) as pool:
        pool.add([Prompt(canary(sums()).name, 0, 2, "c"), Prompt("sums", 0, 2, "s")])
        while leases := pool.lease(1, version=0):
            for lease in leases:
                pool.commit(lease, [drawn(lease.prompt.key, j, TOKENS) for j in lease.samples])
        assert [one.group for one in pool.take(0)] == ["s", "s"]
        assert pool.counts()["dropped_canary"] == 1
        assert [result.why for result in pool.results()] == ["canary", ""]
