"""Laws of the pool: nothing is leased twice, nothing stale is trained, batches are in the order of
the queue, and nothing is dropped without being counted."""

import gc
import random
import tempfile
import threading
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from glm45_jax.rl.pool import Pool, Prompt, Rules
from glm45_jax.rl.record import to_bytes
from tests.rl.pool_run import (
    RUN,
    SAMPLES,
    TOKENS,
    Clock,
    drawn,
    finish,
    keys_of,
    opened,
    prompts,
    whole,
)

# ---- leases


def test_nothing_is_leased_twice_and_a_late_commit_changes_nothing(tmp_path):
    clock = Clock()
    with opened(tmp_path, groups=6, clock=clock, lease_s=60.0) as pool:
        first, second = pool.lease(2, version=0)
        assert [lease.prompt.key for lease in (first, second)] == ["sums/0", "sums/1"]
        clock.now += 50
        assert pool.heartbeat([first]) == []
        clock.now += 50
        again, *_ = pool.lease(6, version=0)
        assert again.prompt == second.prompt and again.token != second.token
        assert pool.heartbeat([first, second]) == [second]
        assert pool.commit(second, whole(second)) == "lost"
        assert not pool.keep(second, 0, drawn("sums/1", 0, TOKENS))
        assert pool.commit(first, whole(first)) == "ready"
        assert pool.commit(first, whole(first)) == "lost"  # sent twice
        assert pool.commit(again, whole(again)) == "ready"
        counts = pool.counts()
        assert (counts["expired_leases"], counts["late_samples"], counts["ready"]) == (1, 5, 2)


def test_a_lease_out_of_time_that_nobody_else_got_still_counts(tmp_path):
    clock = Clock()
    with opened(tmp_path, clock=clock, lease_s=1.0) as pool:
        (lease,) = pool.lease(1, version=0)
        clock.now += 100
        assert pool.commit(lease, whole(lease)) == "ready"


def test_a_dead_workers_prompts_are_the_first_to_go_out_again(tmp_path):
    with opened(tmp_path, groups=6) as pool:
        pool.lease(2, version=0, worker="a")
        pool.lease(1, version=0, worker="b")
        assert pool.reclaim("a") == 2 and pool.reclaim("a") == 0
        again = pool.lease(3, version=0)
        assert [lease.prompt.number for lease in again] == [0, 1, 3]


@settings(max_examples=30)
@given(
    groups=st.integers(1, 3),
    staleness=st.integers(0, 2),
    asks=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12),
)
def test_capacity_and_staleness_hold_in_any_order_of_events(groups, staleness, asks):
    with (
        tempfile.TemporaryDirectory() as folder,
        opened(folder, groups=groups, n=40, staleness=staleness) as pool,
    ):
        version, held, rng = 0, [], random.Random(len(asks))
        for n, train in asks:
            held += [(version, lease) for lease in pool.lease(n, version=version)]
            counts = pool.counts()
            accepted = counts["ready"] + counts["taken"] + counts["trained"]
            assert accepted + counts["leased"] <= (staleness + version + 1) * groups
            rng.shuffle(held)
            for begun, lease in held[: len(held) // 2]:
                pool.commit(lease, whole(lease, begun))
            held = held[len(held) // 2 :]
            if train and (batch := pool.take(version)) is not None:
                assert len(batch) == groups * SAMPLES
                assert all(version - one.versions_T[1] <= staleness for one in batch)
                pool.trained(version)
                version += 1


def test_spare_groups_go_beyond_the_room(tmp_path):
    with opened(tmp_path, groups=2) as pool:
        assert pool.room(0) == 2 and pool.room(1) == 4
        assert len(pool.lease(9, version=0, spare=1)) == 3
        assert pool.room(0) == -1 and pool.lease(9, version=0) == []


def test_two_processes_share_the_queue_and_nothing_is_leased_by_both(tmp_path):
    """Threads stand in for them: each has its own connection."""
    opened(tmp_path, groups=40, n=40).close()
    keys, errors = [], []

    def worker():
        try:
            with Pool(tmp_path, run=RUN, rules=Rules(groups=40), filters=()) as pool:
                while leases := pool.lease(3, version=0):
                    for lease in leases:
                        assert pool.commit(lease, whole(lease)) == "ready"
                        keys.append(lease.prompt.key)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(keys) == sorted(prompt.key for prompt in prompts(40))


# ---- samples


def test_prompts_that_came_back_are_leased_in_their_old_order(tmp_path):
    with opened(tmp_path, groups=6) as pool:
        first, second, third = pool.lease(3, version=0)
        pool.commit(second, {})  # nothing yet: it waits
        pool.commit(third, {0: drawn("sums/2", 0, 3, status="aborted")})  # it has begun
        pool.commit(first, {1: drawn("sums/0", 1, TOKENS)})
        again = pool.lease(4, version=0)
        assert [lease.prompt.number for lease in again] == [0, 1, 2, 3]
        assert [lease.samples for lease in again] == [(0,), (0, 1), (0, 1), (0, 1)]


def test_a_group_that_is_finished_again_is_a_new_result(tmp_path):
    with opened(tmp_path, n=2, groups=2) as pool:
        finish(pool, 2, version=0)
        seen = pool.results()[-1].finished
        assert pool.take(0, version=1) is None and pool.results(after=seen) == []
        finish(pool, 2, version=1)
        assert [one.prompt.number for one in pool.results(after=seen)] == [0, 1]


def test_an_aborted_sample_goes_on_from_what_it_has(tmp_path):
    with opened(tmp_path, n=1, groups=1, staleness=3) as pool:
        (lease,) = pool.lease(1, version=0)
        half = drawn("sums/0", 1, 3, version=0, status="aborted")
        done = drawn("sums/0", 0, TOKENS, version=0)
        assert pool.commit(lease, [done, half]) == "waiting"
        (lease,) = pool.lease(1, version=2)
        assert lease.samples == (1,) and list(lease.begun) == [1]
        begun = lease.begun[1]
        for name in ("tokens_T", "logp_T", "versions_T", "sampled_T"):
            assert_array_equal(getattr(begun, name), getattr(half, name))
        more = drawn("sums/0", 1, TOKENS, version=2, begun=begun)
        assert pool.commit(lease, [more]) == "ready"
        first, second = pool.take(0, version=2)
        assert_array_equal(first.tokens_T, done.tokens_T)
        assert_array_equal(second.versions_T, [0, 0, 0, 2, 2, 2])
        assert second.messages == more.messages and second.parts == more.parts


def test_stale_samples_are_dropped_counted_and_drawn_anew(tmp_path):
    with opened(tmp_path, n=2, groups=2, staleness=1) as pool:
        finish(pool, 2, version=0)
        assert pool.take(0, version=2) is None
        counts = pool.counts()
        assert (counts["stale_samples"], counts["stale_groups"]) == (4, 2)
        assert finish(pool, 2, version=2) == ["sums/0", "sums/1"]
        assert all((one.versions_T[1:] == 2).all() for one in pool.take(0, version=2))


def test_what_was_dropped_as_stale_or_taken_is_not_held_in_memory(tmp_path):
    with opened(tmp_path, n=1, groups=1, staleness=1) as pool:
        for version in (0, 2):
            (lease,) = pool.lease(1, version=version)
            mine = [drawn("sums/0", j, TOKENS, version=version) for j in range(SAMPLES)]
            pool.commit(lease, mine)
            held = [weakref.ref(one) for one in mine]
            del mine
            assert all(one() is not None for one in held)
            assert bool(pool.take(0, version=2)) == (version == 2)
            gc.collect()
            assert all(one() is None for one in held)


def test_only_the_stale_samples_of_a_group_are_drawn_anew(tmp_path):
    with opened(tmp_path, n=1, groups=1, staleness=1) as pool:
        (lease,) = pool.lease(1, version=0)
        mixed = [drawn("sums/0", j, TOKENS, version=j) for j in range(2)]
        pool.commit(lease, mixed)
        assert pool.take(0, version=2) is None
        (lease,) = pool.lease(1, version=2)
        assert lease.samples == (0,) and not lease.begun


@pytest.mark.parametrize(("masked", "dropped"), [(False, 1), (True, 0)])
def test_a_continued_sample_is_as_old_as_its_oldest_token_unless_old_ones_are_masked(
    tmp_path, masked, dropped
):
    with opened(tmp_path, n=1, groups=1, staleness=1, masked=masked) as pool:
        (lease,) = pool.lease(1, version=0)
        begun = drawn("sums/0", 1, 3, version=0, status="aborted")
        pool.commit(lease, [drawn("sums/0", 0, TOKENS, version=2), begun])
        (lease,) = pool.lease(1, version=1)
        pool.commit(lease, [drawn("sums/0", 1, TOKENS, version=2, begun=begun)])
        assert (pool.take(0, version=2) is None) == bool(dropped)
        assert pool.counts().get("stale_samples", 0) == dropped


def test_a_begun_sample_too_old_for_any_batch_is_not_continued(tmp_path):
    with opened(tmp_path, n=1, groups=1) as pool:
        (lease,) = pool.lease(1, version=0)
        pool.commit(lease, {1: drawn("sums/0", 1, 3, status="aborted")})
        (lease,) = pool.lease(1, version=1)
        assert not lease.begun and lease.samples == (0, 1)
        assert pool.counts()["stale_samples"] == 1


def test_a_prompt_that_only_fails_is_given_up_and_counted(tmp_path):
    with opened(tmp_path, n=1, groups=1, errors=2) as pool:
        (lease,) = pool.lease(1, version=0)
        assert pool.commit(lease, whole(lease, status="error")) == "waiting"
        (lease,) = pool.lease(1, version=0)
        assert lease.samples == (0, 1) and not lease.begun
        assert pool.commit(lease, whole(lease, status="error")) == "failed"
        assert pool.lease(1, version=0) == []
        counts = pool.counts()
        assert (counts["failed"], counts["failed_errors"], counts["failed_leases"]) == (1, 1, 2)
        assert pool.results()[0].rewards == ()


def test_filters_drop_whole_groups_for_a_reason_that_is_counted(tmp_path):
    def odd(prompt, group):
        assert [one.task_id for one in group] == [prompt.key] * SAMPLES
        return "odd" if prompt.number % 2 else ""

    def never(prompt, group):
        assert prompt.number % 2 == 0, "the first reason is enough"
        return ""

    with opened(tmp_path, groups=3, filters=(odd, never)) as pool:
        keys = finish(pool, 3, version=0)
        assert pool.counts()["dropped_odd"] == 1 and pool.take(0) is None
        keys += finish(pool, 3, version=0) + finish(pool, 3, version=0)
        assert keys_of(pool.take(0)) == ["sums/0", "sums/2", "sums/4"]
        results = pool.results()
        assert [one.why for one in results] == ["", "odd"] * 2 + [""]
        assert pool.results(after=results[2].finished) == results[3:]


def test_a_filter_that_raises_leaves_the_lease_as_it_was(tmp_path):
    def broken(prompt, group):
        raise RuntimeError("no model to ask")

    with opened(tmp_path, filters=(broken,)) as pool:
        (lease,) = pool.lease(1, version=0)
        with pytest.raises(RuntimeError, match="no model"):
            pool.commit(lease, whole(lease))
        assert pool.heartbeat([lease]) == [] and pool.counts()["leased"] == 1


# ---- batches


def test_a_batch_is_the_first_of_the_queue_however_slow_they_were(tmp_path):
    with opened(tmp_path, groups=4, n=4) as pool:
        for lease in reversed(pool.lease(4, version=0)):
            pool.commit(lease, whole(lease))
        assert keys_of(pool.take(0)) == [f"sums/{i}" for i in range(4)]


def test_a_batch_is_the_same_however_often_it_is_taken_and_comes_back_after_a_rewind(tmp_path):
    with opened(tmp_path, n=8, staleness=3) as pool:
        finish(pool, 8, version=0)
        batches = [pool.take(i) for i in range(3)]
        for i in range(2):
            pool.trained(i, advantages=[1.0, None, -1.0, 0.5], numbers={"loss": 0.25})
        pool.resume(1)
        assert pool.counts()["batches_trained_again"] == 1
        assert pool.counts()["trained"] == 2 and pool.counts()["taken"] == 4
        for i in (1, 2):
            again = pool.take(i)
            assert [to_bytes(one) for one in again] == [to_bytes(one) for one in batches[i]]
        with pytest.raises(ValueError, match="batch 0 cannot be trained: 3 were taken, 1 of them"):
            pool.trained(0)
        pool.trained(1)
        pool.resume(3)  # the checkpoint knows more than the ledger: it died before `trained`
        assert pool.counts()["trained"] == 6
        assert keys_of(pool.take(3)) == ["sums/6", "sums/7"]


def test_what_cannot_be_trained_or_taken_is_refused(tmp_path):
    with opened(tmp_path, n=4, staleness=3) as pool:
        finish(pool, 4, version=0)
        with pytest.raises(ValueError, match=r"batch 1 is not to be had: 0 were taken.*take\(0\)"):
            pool.take(1)
        with pytest.raises(ValueError, match="batch 0 cannot be trained: 0 were taken"):
            pool.trained(0)
        pool.take(0)
        with pytest.raises(ValueError, match="cannot prune before batch 1: 0 are trained"):
            pool.prune(1)
        with pytest.raises(ValueError, match="has 4 samples, and 1 adv"):
            pool.trained(0, advantages=[1.0])
        assert pool.counts()["taken"] == 2  # and nothing was half done
        pool.trained(0)
        pool.prune(1)
        with pytest.raises(ValueError, match="those before 1 were pruned"):
            pool.take(0)
        with pytest.raises(ValueError, match=r"has seen 0 batches, .* holds those from 1 up to 1"):
            pool.resume(0)
        with pytest.raises(ValueError, match="has seen 2 batches"):
            pool.resume(2)
        assert keys_of(pool.take(1)) == ["sums/2", "sums/3"]
        assert pool.results()[0].rewards == (1.0, 0.0)  # of the pruned, too


def test_the_last_groups_may_be_fewer(tmp_path):
    with opened(tmp_path, groups=4, n=3) as pool:
        finish(pool, 3, version=0)
        assert pool.take(0) is None
        assert keys_of(pool.take(0, groups=3)) == ["sums/0", "sums/1", "sums/2"]
        assert len(pool.take(0)) == 3 * SAMPLES


def test_prompts_are_added_once_and_a_key_means_one_task(tmp_path):
    with opened(tmp_path, n=3) as pool:
        assert pool.add(prompts(5), notes={"cursor": {"at": (5, 1)}}) == 2
        assert pool.note("cursor") == {"at": [5, 1]} and pool.note("else") is None
        other = Prompt("sums", 9, SAMPLES, "sums/1")
        with pytest.raises(ValueError, match=r"'sums/1' is \('sums', 9, 2\).*as \('sums', 1, 2\)"):
            pool.add([Prompt("sums", 7, SAMPLES, "new"), other], notes={"cursor": 0})
        assert pool.note("cursor") == {"at": [5, 1]} and pool.counts()["waiting"] == 5


def test_trajectories_that_are_not_the_leases_are_refused(tmp_path):
    with opened(tmp_path) as pool:
        (lease,) = pool.lease(1, version=0)
        with pytest.raises(ValueError, match="group 'sums/5' came for prompt 'sums/0'"):
            pool.commit(lease, [drawn("sums/5", j, TOKENS) for j in range(2)])
        with pytest.raises(ValueError, match="sample 2 of 'sums/0' is not of this lease"):
            pool.keep(lease, 2, drawn("sums/0", 2, TOKENS))
        with pytest.raises(ValueError, match="shorter"):
            pool.commit(lease, whole(lease)[:1])
        assert pool.commit(lease, whole(lease)) == "ready"
