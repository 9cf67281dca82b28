"""Episodes: what was sampled is never tokenised again, many at once are the same as one by one,
and nothing is lost however an episode ends.
"""

import concurrent.futures
import dataclasses
import itertools

import numpy as np
import pytest

from glm45_jax import chat
from glm45_jax.envs.types import Env, Part, Task
from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.episode import Episodes, Format, Talk, ask_driver, react, run
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Completion
from glm45_jax.tokenizer import train_bpe
from tests.rollout.arithmetic import Arithmetic

TOKENIZER = train_bpe(["add two numbers"], 292)
USER, OBSERVATION = TOKENIZER.id_of("<|user|>"), TOKENIZER.id_of("<|observation|>")
TOOL = {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}
DIRECT = Format(TOKENIZER, thinking=False)


def length(task, messages):
    return float(sum(len(m.get("content") or "") for m in messages))


def world(step=None, turns=1, tools=(), reward=length):
    return Env("test", ask_for, (Part("size", reward),), step=step, tools=tools, max_turns=turns)


def ask_for(n):
    return Task(id=f"t{n}", prompt=f"{n}+{n}=", answer=2 * n)


def answers(*texts, stop=USER, finish="stop"):
    """An engine that says these, one a call; it remembers what it was asked."""
    left, asked = list(texts), []

    def ask(tokens, sampling):
        asked.append((list(tokens), sampling))
        ids = TOKENIZER.encode(left.pop(0), allow_special=True)
        ids = [*ids, stop] if finish == "stop" else ids
        n = len(ids)
        logp_T = -np.arange(1, n + 1, dtype=np.float32)
        return Completion(np.asarray(ids, np.int32), logp_T, logp_T, (len(asked),) * n, finish)

    ask.asked = asked
    return ask


def talk_to(env, ask, *, format=DIRECT, sampling=Sampling(max_tokens=100), room=1000, n=3):
    return run(env, env.tasks(n), ask, format=format, sampling=sampling, room=room)


def test_one_turn_is_the_prompt_and_what_was_sampled():
    ask = answers("\n6")
    episode = talk_to(world(), ask)
    ((prompt, sampling),) = ask.asked
    assert (
        prompt
        == chat.encode(
            TOKENIZER, ask_for(3).messages, enable_thinking=False, add_generation_prompt=True
        ).tokens
    )
    assert sampling.stop == TOKENIZER.stop_ids
    n = len(prompt)
    assert episode.tokens_T[:n].tolist() == prompt and episode.tokens_T[-1] == USER
    assert episode.sampled_T.tolist() == [False] * n + [True] * 3
    assert episode.logp_T[n:].tolist() == [-1, -2, -3] and not episode.logp_T[:n].any()
    assert set(episode.versions_T[:n]) == {-1} and set(episode.versions_T[n:]) == {1}
    assert episode.messages[-1] == {"role": "assistant", "content": "6"}
    assert (episode.status, episode.turns, episode.exact) == ("done", 1, True)
    assert episode.verdict.parts == {"size": len("3+3=") + 1}


def calls_then_ends(task, messages):
    calls = messages[-1].get("tool_calls")
    return [{"role": "tool", "content": f"got {c['arguments']['a']}"} for c in calls or ()] or None


CALL = "\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"


@pytest.mark.parametrize("stop", [OBSERVATION, USER])
def test_each_turn_begins_with_exactly_the_tokens_before_it(stop):
    env = world(calls_then_ends, 5, (TOOL,))
    ask = answers(CALL.format(1), CALL.format(22), "\ndone", stop=stop)
    episode = talk_to(env, ask)
    prompts = [tokens for tokens, _ in ask.asked]
    for before, after in itertools.pairwise(prompts):
        assert after[: len(before)] == before
    assert episode.tokens_T[: len(prompts[-1])].tolist() == prompts[-1]
    assert episode.turns == 3 and [m["role"] for m in episode.messages[1:]] == [
        *("assistant", "tool", "assistant", "tool", "assistant")
    ]
    drawn = episode.tokens_T[episode.sampled_T].tolist()
    text = TOKENIZER.decode(drawn)
    role = TOKENIZER.decode([stop])
    assert text == CALL.format(1) + role + CALL.format(22) + role + "\ndone" + role
    # Where the policy ends a call by the wrong role the template would write something else.
    assert episode.exact == (stop == OBSERVATION)


def test_what_the_template_would_write_otherwise_is_kept_and_said():
    ask = answers("\n  6  ")  # the template strips content
    episode = talk_to(world(), ask)
    assert TOKENIZER.decode(episode.tokens_T[episode.sampled_T][:-1]) == "\n  6  "
    assert not episode.exact


@pytest.mark.parametrize("family", ["glm-4.5", "glm-4.7"])
def test_reasoning_is_read_in_both_families(family):
    opened = "\n<think>" if family == "glm-4.5" else ""
    ask = answers(f"{opened}three twice</think>6")
    episode = talk_to(world(), ask, format=Format(TOKENIZER, family))
    assert episode.messages[-1]["reasoning_content"] == "three twice"
    assert episode.messages[-1]["content"] == "6"


def test_the_budget_is_of_all_turns_and_the_row_has_an_end():
    env = world(calls_then_ends, 9, (TOOL,))
    first = TOKENIZER.encode(CALL.format(1), allow_special=True)
    ask = answers(CALL.format(1), CALL.format(2), stop=OBSERVATION)
    episode = talk_to(env, ask, sampling=Sampling(max_tokens=2 * (len(first) + 1)))
    assert [s.max_tokens for _, s in ask.asked] == [2 * (len(first) + 1), len(first) + 1]
    assert episode.status == "length" and episode.verdict is not None and episode.turns == 2
    seeds = {s.seed for _, s in ask.asked}
    assert len(seeds) == 2
    prompt = len(DIRECT.prompt(env, ask_for(3).messages))
    ask = answers(CALL.format(1), stop=OBSERVATION)
    episode = talk_to(env, ask, room=prompt + len(first) + 1)
    assert episode.status == "length" and len(ask.asked) == 1
    nothing = talk_to(env, answers(), room=prompt)
    assert nothing.status == "length" and not nothing.sampled_T.any()


def test_a_cut_answer_is_judged_as_it_is():
    episode = talk_to(world(), answers("\n61", finish="length"))
    assert episode.status == "length" and episode.messages[-1]["content"] == "61"
    assert episode.verdict.reward > 0


def breaks(task, messages):
    raise KeyError("nothing here")


@pytest.mark.parametrize("env", [world(reward=breaks), world(breaks, 2)])
def test_a_world_that_raises_ends_its_episode_alone(env):
    episode = talk_to(env, answers("\n6"))
    assert episode.status == "error" and "KeyError" in episode.error and episode.verdict is None


def test_a_world_is_not_asked_to_go_on_after_the_last_turn():
    assert react(world(breaks, 2), ask_for(1), (), last=True).verdict is not None


def test_ids_beyond_the_tokenizer_say_nothing():
    message = DIRECT.message(world(), [*TOKENIZER.encode("\n6"), 5000, USER])
    assert message["content"] == "6"


@dataclasses.dataclass(frozen=True)
class Chatty(Arithmetic):
    """`Arithmetic` that ends turns often."""

    def insert(self, state, seats):
        state, step = super().insert(state, seats)
        return state, self._ended(state, step, [seat.slot for seat in seats], slice(None))

    def decode(self, params, state, table_BP, active_B):
        state, step = super().decode(params, state, table_BP, active_B)
        slots = np.flatnonzero(active_B)
        return state, self._ended(state, step, slots, slots)

    def _ended(self, state, step, slots, rows):
        token_B = step.draw.token_B
        token_B = np.where(token_B % 3 == 0, OBSERVATION, np.where(token_B == 96, 97, token_B))
        state.token_B[slots] = token_B[rows]
        return step.replace(draw=step.draw.replace(token_B=token_B))


ENGINE = Chatty(slots=3, pages=30, page=8, max_tokens=80, vocab=292)


def says_more(task, messages):
    return [{"role": "tool", "content": f"{len(messages)}"}] if len(messages) < 6 else None


def tool_first(n):
    """A task whose prompt has a call, so that tools may answer."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    return Task(f"t{n}", ({"role": "user", "content": str(n)}, call), None)


MANY = dataclasses.replace(world(says_more, 4), tasks=tool_first)


def alone(n):
    driver = Driver(ENGINE, 0)
    sampling = Sampling(max_tokens=30, seed=n)
    return run(MANY, tool_first(n), ask_driver(driver), format=DIRECT, sampling=sampling, room=80)


def gathered(episodes, n):
    found = {}
    for _ in range(10_000):
        for key, episode in episodes.tick():
            assert key not in found
            found[key] = episode
        if len(found) == n:
            assert episodes.running == 0
            return found
    raise AssertionError(f"{len(found)} of {n} episodes ended")


@pytest.mark.parametrize("threads", [0, 2])
def test_many_at_once_are_the_same_as_one_by_one(threads):
    executor = concurrent.futures.ThreadPoolExecutor(threads) if threads else None
    episodes = Episodes(Driver(ENGINE, 0), DIRECT, executor=executor)
    for n in range(12):
        episodes.start(n, MANY, tool_first(n), Sampling(max_tokens=30, seed=n))
    assert episodes.running == 12
    found = gathered(episodes, 12)
    turns = set()
    for n, episode in found.items():
        want = alone(n)
        for name in ("tokens_T", "sampled_T", "logp_T", "versions_T"):
            np.testing.assert_array_equal(getattr(episode, name), getattr(want, name))
        assert (episode.messages, episode.status) == (want.messages, want.status)
        turns.add(episode.turns)
    assert len(turns) > 1, "the engine should end some turns and not others"
    if executor:
        executor.shutdown()


def test_a_key_is_used_once_and_a_refused_prompt_is_an_error():
    episodes = Episodes(Driver(ENGINE, 0, max_waiting=1), DIRECT)
    for key in "ab":
        episodes.start(key, MANY, tool_first(1), Sampling(max_tokens=5))
    with pytest.raises(ValueError, match="key of its own"):
        episodes.start("a", MANY, tool_first(2), Sampling(max_tokens=5))
    found = gathered(episodes, 2)
    assert found["a"].status in ("done", "length")
    assert found["b"].status == "error" and "try later" in found["b"].error


def test_an_aborted_episode_keeps_its_tokens_and_goes_on_from_them():
    driver = Driver(ENGINE, 0)
    episodes = Episodes(driver, DIRECT)
    for n in range(6):
        episodes.start(n, MANY, tool_first(n), Sampling(max_tokens=30, seed=n))
    early = {}
    for _ in range(4):
        early |= dict(episodes.tick())
    episodes.abort()
    aborted = {}
    while episodes.running:
        aborted |= dict(episodes.tick())
    partial = {k: e for k, e in aborted.items() if e.status == "aborted"}
    assert partial and all(e.verdict is None for e in partial.values())
    driver.push(1, 1)
    for n, begun in partial.items():
        episodes.start(n, MANY, tool_first(n), Sampling(max_tokens=30, seed=n), begun=begun)
    for n, episode in gathered(episodes, len(partial)).items():
        before = partial[n]
        t = len(before.tokens_T)
        np.testing.assert_array_equal(episode.tokens_T[:t], before.tokens_T)
        np.testing.assert_array_equal(episode.logp_T[:t], before.logp_T)
        assert episode.status in ("done", "length") and episode.verdict is not None
        drawn_T = episode.versions_T[episode.sampled_T]
        assert (np.diff(drawn_T) >= 0).all() and drawn_T[-1] == 1
        assert episode.sampled_T.sum() <= 30
    with pytest.raises(ValueError, match="only an aborted one"):
        done = next(iter(gathered_one(driver)))
        Talk(MANY, tool_first(0), DIRECT, Sampling(max_tokens=3), room=80, begun=done)


def gathered_one(driver):
    episodes = Episodes(driver, DIRECT)
    episodes.start(0, MANY, tool_first(0), Sampling(max_tokens=9))
    return gathered(episodes, 1).values()


def test_routes_cover_every_token_once_with_those_that_drew_first():
    calls = []

    def ask(tokens, sampling):
        calls.append(len(tokens))
        text = CALL.format(1) if len(calls) == 1 else "\nok"
        ids = [*TOKENIZER.encode(text, allow_special=True), OBSERVATION]
        read = len(tokens) + len(ids) - 1
        routes_TLA = np.full((read, 2, 3), len(calls), np.uint8)
        logp_T = np.zeros(len(ids), np.float32)
        return Completion(
            np.asarray(ids), logp_T, logp_T, (0,) * len(ids), "stop", routes_TLA=routes_TLA
        )

    episode = talk_to(world(calls_then_ends, 3, (TOOL,)), ask)
    routes_TLA = episode.routes_TLA
    assert routes_TLA.shape == (len(episode.tokens_T), 2, 3) and routes_TLA.dtype == np.int16
    first = calls[1] - 1 - int(np.argmax(episode.tokens_T[: calls[1]][::-1] == OBSERVATION))
    assert (routes_TLA[:first] == 1).all() and (routes_TLA[first:-1] == 2).all()
    assert (routes_TLA[-1] == -1).all()
