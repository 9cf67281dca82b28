"""The driver over an engine of integers, one thing at a time: what is refused, cancelled, late,
preempted, paused, pushed, asked from other threads.
"""

import asyncio
import contextlib
import dataclasses
import random
import sys
import threading
import time
import typing

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from glm45_jax.rollout.driver import Driver
from glm45_jax.rollout.sampling import Sampling
from glm45_jax.rollout.types import Finish
from tests.rollout.arithmetic import Arithmetic, answer
from tests.rollout.integers import check, idle, make


def test_a_failure_of_the_device_ends_its_request_and_the_others_go_on_as_if_nothing_was():
    driver, engine, _ = make(slots=3)
    ask = Sampling(max_tokens=8)
    good = [driver.submit([i, 5], ask) for i in range(2)]
    driver.tick()
    bad = driver.submit([1, 96], ask)
    driver.run()
    assert bad.completion.error == "RuntimeError: token 96 breaks the device"
    assert driver.stats.preempted == 2
    for request in good:
        check(request, engine)
    assert idle(driver, engine)


def test_a_failed_decode_ends_the_running_rows_and_those_that_wait_are_served():
    class Fragile(Arithmetic):
        def decode(self, params, state, table_BP, active_B):
            if state.index_B.max() == 4:
                raise RuntimeError("out of memory")
            return super().decode(params, state, table_BP, active_B)

    engine = Fragile(1, 10)
    driver = Driver(engine, 0)
    long = driver.submit([1], Sampling(max_tokens=9))
    short = driver.submit([2], Sampling(max_tokens=3))
    driver.run()
    assert long.completion.error == "RuntimeError: out of memory" and len(long.out) == 4
    check(short, engine)
    assert idle(driver, engine)


@pytest.mark.parametrize(
    ("tokens", "most", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([1] * 40, 1, "a prompt of 40 tokens leaves no room for an answer; a row holds 40"),
        ([1] * 30, 11, "a prompt of 30 tokens and max_tokens 11 .* 40 a row holds; use .* 10"),
        ([1, 97], 1, r"token 97 of the prompt is not in \[0, 97\)"),
        ([-1], 1, r"token -1 of the prompt is not in \[0, 97\)"),
    ],
)
def test_what_the_engine_cannot_serve_fails_with_the_way_out(tokens, most, message):
    driver, engine, _ = make()
    request = driver.submit(tokens, Sampling(max_tokens=most))
    assert request.completion.finish == "error"
    with pytest.raises(ValueError, match=message):
        raise ValueError(request.completion.error)
    assert idle(driver, engine)


def test_what_is_no_token_or_no_time_is_refused_at_the_door():
    driver, engine, _ = make()
    with pytest.raises(TypeError, match="float"):
        driver.submit([1.5], Sampling())
    with pytest.raises(ValueError, match="deadline nan"):
        driver.submit([1], Sampling(), deadline=float("nan"))
    request = driver.submit(np.asarray([1], np.int32), Sampling(max_tokens=1), deadline=-1.0)
    driver.run()
    assert request.completion.finish == "deadline" and idle(driver, engine)


def test_a_full_queue_refuses_and_takes_again_when_it_is_not():
    driver, _, _ = make(slots=1, max_waiting=2)
    ask = Sampling(max_tokens=2)
    first = [driver.submit([i], ask) for i in range(3)]
    assert [r.completion is None for r in first] == [True, True, False]
    assert first[2].completion.error == "2 requests wait already; try later"
    driver.tick()
    assert driver.submit([9], ask).completion is None


def test_cancel_frees_slot_and_pages_at_once_and_keeps_the_tokens():
    driver, engine, _ = make()
    request = driver.submit([1, 2, 3], Sampling(max_tokens=20))
    driver.tick()
    driver.cancel(request)
    assert idle(driver, engine)
    assert request.completion.finish == "cancelled" and len(request.completion.tokens_T) == 2
    driver.cancel(request)  # nothing more to end
    assert driver.stats.cancelled == 1


def test_deadlines_end_running_and_waiting_requests():
    driver, engine, clock = make(slots=1)
    running = driver.submit([1], Sampling(max_tokens=30), deadline=5)
    waiting = driver.submit([2], Sampling(max_tokens=30), deadline=3)
    for _ in range(7):
        driver.tick()
        clock.now += 1
    assert [r.completion.finish for r in (running, waiting)] == ["deadline"] * 2
    assert len(running.out) == 6 and not waiting.out
    assert idle(driver, engine)


def test_requests_start_in_the_order_they_came_long_ones_and_preempted_ones_too():
    driver, engine, _ = make(slots=4, pages=10, prefill_tokens=8)
    started = []
    ask = Sampling(max_tokens=15)
    requests = [driver.submit([i] * (1 + 19 * (i % 3 == 0)), ask) for i in range(20)]
    while driver.tick():
        started += [r.seq for r in requests if r.out and r.seq not in started]
    assert started == list(range(20))
    assert driver.stats.preempted > 0
    for request in requests:
        check(request, engine)


def test_the_youngest_row_gives_way_and_the_oldest_runs_through():
    driver, engine, _ = make(slots=3, pages=10)
    ended = []
    ask = Sampling(max_tokens=36)
    requests = [driver.submit([i], ask, on_done=lambda _, i=i: ended.append(i)) for i in range(3)]
    while requests[0].completion is None:
        driver.tick()
        assert requests[0].status != "waiting"
    assert driver.stats.preempted > 0
    driver.run()
    assert ended == [0, 1, 2]
    for request in requests:
        check(request, engine)


def test_a_group_whose_prompt_fills_the_cache_is_served_one_by_one():
    driver, engine, _ = make(slots=2, pages=10)
    prompt = [i % 90 for i in range(38)]
    group = [driver.submit(prompt, Sampling(max_tokens=2, seed=i)) for i in range(3)]
    driver.run()
    for request in group:
        check(request, engine)
    assert idle(driver, engine)


def test_a_prompt_cancelled_while_it_is_read_gives_its_pages_back():
    driver, engine, _ = make(prefill_tokens=8)
    one, two = (driver.submit([7] * 20, Sampling(max_tokens=3, seed=i)) for i in range(2))
    driver.tick()
    assert engine.pages - driver.stats.free_pages == 5 and not one.out
    driver.cancel(one)
    driver.run()
    assert driver.stats.prefill_tokens == 20  # the other goes on where it was
    check(two, engine)
    three = driver.submit([7] * 20, Sampling(max_tokens=3))
    driver.tick()
    driver.cancel(three)
    assert idle(driver, engine)


def test_a_group_prefills_its_prompt_once_and_copies_only_the_half_filled_page():
    driver, engine, _ = make(slots=4)
    group = [driver.submit(list(range(9)), Sampling(max_tokens=3, seed=i)) for i in range(4)]
    driver.tick()
    stats = driver.stats
    assert (stats.prefill_tokens, stats.shared_tokens) == (9, 27)
    assert engine.pages - stats.free_pages == 2 + 4  # two full ones for all, a tail each
    driver.run()
    for request in group:
        check(request, engine)
    assert idle(driver, engine)


def test_pause_stands_still_drain_runs_to_the_end_and_resume_goes_on():
    driver, engine, _ = make(slots=1)
    one, two = (driver.submit([i], Sampling(max_tokens=5)) for i in (1, 2))
    driver.tick()
    driver.pause()
    driver.tick()
    assert len(one.out) == 2
    with pytest.raises(RuntimeError, match="2 requests wait for a paused driver"):
        driver.run()
    driver.pause(drain=True)
    with pytest.raises(RuntimeError, match="1 requests wait"):
        driver.run()
    assert one.completion.finish == "length" and not two.out
    driver.resume()
    driver.run()
    check(two, engine)


def test_weights_pushed_between_two_ticks_draw_the_next_token_and_versions_only_rise():
    driver, engine, _ = make(version=2)
    request = driver.submit([1, 2], Sampling(max_tokens=6))
    driver.tick()
    driver.push(5, 5)
    driver.tick()
    driver.push(6, 6)
    driver.flush()
    assert driver.stats.free_pages == engine.pages
    driver.run()
    assert request.completion.versions == (2, 2, 5, 6, 6, 6)
    check(request, engine)
    with pytest.raises(ValueError, match="version 6 is not newer than 6"):
        driver.push(6, 6)


def test_the_async_face_serves_cancels_updates_and_leaves_nothing():
    engine = Arithmetic(4, 40)
    driver = Driver(engine, 0)

    async def scene():
        asks = [([i, 7], Sampling(max_tokens=1 + i % 9, seed=i)) for i in range(60)]
        tasks = [asyncio.create_task(driver.generate(*a)) for a in asks]
        gone = asyncio.create_task(driver.generate([3], Sampling(max_tokens=39)))
        await asyncio.sleep(0)
        gone.cancel()
        await driver.update(3, 3)
        late = await driver.generate([1], Sampling(max_tokens=2))
        done = await asyncio.gather(*tasks)
        with pytest.raises(asyncio.CancelledError):
            await gone
        while driver.busy:
            await asyncio.sleep(0.001)
        return asks, done, late

    asks, done, late = asyncio.run(asyncio.wait_for(scene(), 30))
    for (prompt, sampling), completion in zip(asks, done, strict=True):
        assert completion.tokens_T.tolist() == answer(prompt, sampling, 97)[0]
    assert late.versions == (3, 3)
    assert driver.stats.cancelled == 1 and idle(driver, engine)


def test_what_is_asked_during_a_step_happens_after_it():
    seen = []

    class Interrupted(Arithmetic):
        def decode(self, params, state, table_BP, active_B):
            for ask in (lambda: driver.cancel(one), lambda: driver.push(1, 1), driver.flush):
                thread = threading.Thread(target=ask)
                thread.start()
                thread.join()
            seen.append((one.completion, driver.stats.version, driver.stats.running))
            return super().decode(params, state, table_BP, active_B)

    engine = Interrupted(2, 20)
    driver = Driver(engine, 0)
    one, two = (driver.submit([i], Sampling(max_tokens=3)) for i in (1, 2))
    driver.tick()
    assert seen == [(None, 0, 2)]
    assert one.versions == two.versions == [0, 0]
    Interrupted.decode = Arithmetic.decode
    driver.run()
    assert one.completion.finish == "cancelled" and two.completion.versions == (0, 0, 1)
    check(two, engine)


def test_the_end_of_a_request_may_submit_the_next():
    driver, engine, _ = make(slots=1)
    chain = []

    def follow(_):
        if len(chain) < 5:
            ask = Sampling(max_tokens=2, seed=len(chain))
            chain.append(driver.submit([len(chain)], ask, on_done=follow))

    follow(None)
    driver.run()
    for request in chain:
        check(request, engine)
    assert len(chain) == 5 and idle(driver, engine)


@pytest.fixture
def restless():
    """Threads that take turns every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_any_thread_may_submit_cancel_and_push_while_another_ticks(restless):
    driver, engine, _ = make(slots=8, pages=40)
    requests, versions = [], iter(range(1, 10**6))

    def client(seed):
        rng = random.Random(seed)
        for _ in range(150):
            ask = Sampling(max_tokens=rng.randint(1, 9), seed=rng.randrange(99))
            requests.append(driver.submit([rng.randrange(96)], ask))
            if rng.random() < 0.2:
                driver.cancel(requests[-1])
            if rng.random() < 0.1:
                with contextlib.suppress(ValueError):  # another thread's was newer
                    version = next(versions)
                    driver.push(version, version)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    while driver.tick() or any(thread.is_alive() for thread in threads):
        pass
    for thread in threads:
        thread.join()
    driver.run()
    assert idle(driver, engine) and len(requests) == driver.stats.submitted == 600
    for request in requests:
        check(request, engine)


def test_a_bug_in_the_loop_fails_everyone_now_and_later_and_nobody_waits_for_ever():
    class Bug(Exception):
        pass

    class Buggy(Arithmetic):
        def decode(self, params, state, table_BP, active_B):
            raise Bug("never seen before")

    async def scene():
        driver = Driver(Buggy(2, 20), 0)
        tasks = [driver.generate([i], Sampling(max_tokens=3)) for i in range(5)]
        now = await asyncio.gather(*tasks)
        return [*now, await driver.generate([1], Sampling())]

    for completion in asyncio.run(asyncio.wait_for(scene(), 30)):
        assert completion.finish == "error" and "never seen before" in completion.error


def test_a_paused_driver_still_honours_deadlines_of_the_async_face():
    async def scene():
        driver = Driver(Arithmetic(2, 20), 0)
        driver.pause()
        start = time.monotonic()
        done = await driver.generate([1], Sampling(max_tokens=3), deadline=0.05)
        return done, time.monotonic() - start

    done, seconds = asyncio.run(asyncio.wait_for(scene(), 30))
    assert done.finish == "deadline" and seconds >= 0.05


def test_memory_of_ended_requests_is_given_back_though_their_deadlines_are_far():
    driver, _, _ = make(slots=1)
    driver.submit([1], Sampling(max_tokens=30))
    for i in range(1000):
        request = driver.submit([i % 96], Sampling(max_tokens=2), deadline=1e6)
        driver.cancel(request)
        driver.tick()
    held = driver._batch
    assert max(len(held._expiring), len(held._waiting)) < 200


def test_stats_are_a_copy():
    driver, _, _ = make()
    before = dataclasses.asdict(driver.stats)
    driver.submit([1], Sampling(max_tokens=1))
    driver.run()
    assert before["submitted"] == 0 and driver.stats.submitted == 1


def test_metrics_are_prometheus_text_with_every_count_page_and_time():
    driver, engine, clock = make(slots=1)
    for i in range(3):
        driver.submit([i] * 5, Sampling(max_tokens=4))
    while driver.tick():
        clock.now += 1  # every step takes a second
    driver.push(7, 7)
    last = driver.submit([9] * 6, Sampling(max_tokens=4))
    driver.tick()
    families = {f.name: f for f in text_string_to_metric_families(driver.metrics())}
    samples = {(s.name, *s.labels.values()): s.value for f in families.values() for s in f.samples}
    name, stats = "glm45_rollout_", driver.stats
    for field, value in dataclasses.asdict(stats).items():
        kinds = {"gauge": (name + field,), "counter": (f"{name}{field}_total",)}
        if field in typing.get_args(Finish):
            kinds = {"counter": (f"{name}finished_total", field)}
        (kind, key), *_ = [pair for pair in kinds.items() if pair[1] in samples]
        assert samples[key] == value
        assert families[key[0].removesuffix("_total")].type == kind
    assert samples[f"{name}pages", "7"] == engine.pages - stats.free_pages + stats.kept_pages == 2
    # The second waited 3 steps, the third 6; each drew two tokens in its first step.
    for field, values in {
        "queue_seconds": [0, 3, 6, 0],
        "first_token_seconds": [0, 3, 6, 0],
        "token_seconds": [2 / 3] * 3,
        "output_length": [4] * 3,
    }.items():
        assert families[name + field].type == "histogram"
        assert samples[f"{name}{field}_count",] == len(values)
        np.testing.assert_allclose(samples[f"{name}{field}_sum",], sum(values))
        for bound in [s.labels["le"] for s in families[name + field].samples if s.labels]:
            below = sum(value <= float(bound) for value in values)
            assert samples[f"{name}{field}_bucket", bound] == below
    driver.cancel(last)
    assert 'pages{version="7"} 1' in driver.metrics()
