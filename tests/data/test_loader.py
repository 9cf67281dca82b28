"""Laws of the loader: batches are a function of (seed, step), on any number of hosts."""

import json
import subprocess
import sys
from collections import Counter
from itertools import islice

import jax
import numpy as np
import pytest

from glm45_jax.data.loader import Loader
from glm45_jax.data.pack import BestFit, Cut
from glm45_jax.data.store import open_store, write_store

SEQ_LEN = 8


class Numbered:
    """Rows that say which they are: every token of row i is first + i."""

    def __init__(self, first, n, seq_len=SEQ_LEN):
        self.first, self.n, self.seq_len = first, n, seq_len

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        tokens = np.full(self.seq_len, self.first + i, np.int32)
        zeros = np.zeros(self.seq_len, np.int32)
        mask = np.ones(self.seq_len, np.float32)
        return {"tokens": tokens, "targets": tokens, "segments": zeros + 1} | {
            "positions": zeros,
            "mask": mask,
        }


def ramp(step):
    """Four rows a step, from step 3 on eight."""
    return (step * 4, 4) if step < 3 else (12 + (step - 3) * 8, 8)


def loader(**changes):
    fields = {
        "rows": [(Numbered(0, 50), 3.0), (Numbered(1000, 7), 1.0)],
        "seed": 5,
        "span": ramp,
        "fingerprint": "data-a",
    } | changes
    return Loader(fields.pop("rows"), **fields)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def ids(batch):
    return batch.tokens_BT[:, 0].tolist()


def test_a_batch_does_not_depend_on_what_was_asked_before():
    forward = {step: loader().batch(step) for step in range(6)}
    one = loader()
    for step in (4, 0, 5, 5, 2, 1, 3):
        assert_same(one.batch(step), forward[step])
    assert any(ids(loader(seed=6).batch(step)) != ids(forward[step]) for step in range(6))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_resumed_run_reads_what_an_unbroken_one_reads(threads):
    unbroken = list(islice(loader().iterate(threads=threads), 8))
    state = json.loads(json.dumps(loader().state(3)))
    again = loader()
    again.check_state(state)
    resumed = list(islice(again.iterate(state["step"], threads=threads), 5))
    assert len(resumed) == 5
    for a, b in zip(unbroken[3:], resumed, strict=True):
        assert_same(a, b)
    assert_same(unbroken[2], loader().batch(2))


@pytest.mark.parametrize("count", [2, 4])
def test_the_hosts_of_a_step_together_hold_the_batch_of_one_host(count):
    for step in (0, 4):
        parts = [loader(host=(index, count)).batch(step) for index in range(count)]
        together = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        assert_same(together, loader().batch(step))


def test_rows_that_do_not_divide_among_hosts_are_refused():
    with pytest.raises(ValueError, match="step 0 has 4 rows for 3 hosts; make the batch"):
        loader(host=(0, 3)).batch(0)
    with pytest.raises(ValueError, match="step 7 has 0 rows for 1 hosts"):
        loader(span=lambda step: (0, 0)).batch(7)


@pytest.mark.parametrize("n", [1, 2, 13, 64])
def test_every_epoch_holds_every_row_once_in_another_order(n):
    one = loader(rows=[(Numbered(0, n), 1.0)], span=lambda step: (step * n, n))
    epochs = [ids(one.batch(step)) for step in range(4)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 10:
        assert len({tuple(epoch) for epoch in epochs}) == 4
        assert list(range(n)) not in epochs


def test_a_mixture_keeps_its_shares_at_every_length():
    rows = [(Numbered(0, 50), 6.0), (Numbered(1000, 7), 3.0), (Numbered(2000, 9), 1.0)]
    mixed = loader(rows=rows, span=lambda step: (0, 600))
    drawn = np.array(ids(mixed.batch(0)))
    for upto in (100, 333, 600):
        shares = np.bincount(drawn[:upto] // 1000, minlength=3) / upto
        np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=1.5 / upto)
    # Inside a source nothing is drawn again before all of it was drawn.
    for source, n in enumerate((50, 7, 9)):
        seen = Counter(drawn[drawn // 1000 == source].tolist())
        assert len(seen) == n and max(seen.values()) - min(seen.values()) <= 1


def test_sources_of_one_size_are_shuffled_differently():
    rows = [(Numbered(0, 40), 1.0), (Numbered(1000, 40), 1.0)]
    drawn = np.array(ids(loader(rows=rows, span=lambda step: (0, 80)).batch(0)))
    assert drawn[drawn < 1000].tolist() != (drawn[drawn >= 1000] - 1000).tolist()


def test_an_exception_reaches_the_consumer_at_its_step():
    class Broken(Numbered):
        def __getitem__(self, i):
            if i == 3:
                raise OSError("disk gone")
            return super().__getitem__(i)

    broken = loader(rows=[(Broken(0, 20), 1.0)], span=lambda step: (step, 1))
    bad_step = broken.row_ids(0, 20).tolist().index(3)
    seen = []
    with pytest.raises(OSError, match="disk gone"):
        for batch in broken.iterate():
            seen.append(batch)
    assert len(seen) == bad_step


def test_a_closed_iterator_leaves_no_threads_and_never_runs_far_ahead():
    import threading

    made = []
    counting = loader(span=lambda step: made.append(step) or (step, 1))
    iterator = counting.iterate(ahead=3)
    for _ in range(5):
        next(iterator)
    iterator.close()
    assert max(made) <= 5 + 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "differs in seed: saved 5, now 6; restore the seed of the saved run"),
        ({"fingerprint": "data-b"}, "differs in fingerprint: saved data-a, now data-b"),
        ({"span": lambda step: (step * 2, 2)}, r"differs in span: saved \[12, 8\], now \[6, 2\]"),
        ({"rows": [(Numbered(0, 50), 1.0)]}, "differs in mixture: .*sources and weights"),
    ],
)
def test_a_state_of_another_run_is_refused_with_both_values(changes, message):
    state = json.loads(json.dumps(loader().state(3)))
    loader(host=(1, 2)).check_state(state)
    with pytest.raises(ValueError, match=message):
        loader(**changes).check_state(state)


def test_a_state_whose_order_of_rows_was_another_is_refused():
    state = loader().state(3)
    state["next_rows"] = state["next_rows"][::-1]
    with pytest.raises(ValueError, match=r"differs in next_rows: .*version of this code"):
        loader().check_state(state)
    with pytest.raises(ValueError, match="but no 'step'; not a loader state"):
        loader().check_state({"epoch": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "has 0 sources"),
        ({"rows": [(Numbered(0, 0), 1.0)]}, "source 0 has 0 rows"),
        ({"rows": [(Numbered(0, 5), 0.0)]}, "source 0 has weight 0.0"),
        (
            {"rows": [(Numbered(0, 5), 1.0), (Numbered(0, 5, seq_len=4), 1.0)]},
            r"source 1 has rows of \(4,\) tokens, source 0 of \(8,\)",
        ),
        ({"seed": -1}, "seed -1 is outside"),
        ({"host": (2, 2)}, r"host 2 of 2: the index must be in 0\.\.1"),
        ({"numbers": [3, 3]}, r"2 sources, numbers \[3, 3\], drawn \[0, 0\]; give each source"),
        ({"drawn": [1]}, r"2 sources, numbers \[0, 1\], drawn \[1\]"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused_at_the_door(changes, message):
    with pytest.raises(ValueError, match=message):
        loader(**changes)


def test_a_state_of_the_order_before_this_one_is_refused():
    state = loader().state(3)
    del state["format"], state["numbers"], state["drawn"], state["windows"]
    with pytest.raises(ValueError, match="differs in format: saved 1, now 2; restore the version"):
        loader().check_state(state)


def test_a_state_of_another_stage_is_refused():
    state = loader().state(3)
    with pytest.raises(ValueError, match=r"differs in drawn: saved \[0, 0\], now \[9, 1\]"):
        loader(drawn=[9, 1]).check_state(state)
    with pytest.raises(ValueError, match=r"differs in numbers: saved \[0, 1\], now \[2, 1\]"):
        loader(numbers=[2, 1]).check_state(state)


def test_a_resumed_loader_packs_no_window_before_its_own(tmp_path):
    docs = [range(i, i + 3 + i % 5) for i in range(40)]
    write_store(tmp_path / "s", docs, end=999, vocab=1000, tokenizer_fingerprint="t", meta={})
    rows = BestFit(window=6).rows(open_store(tmp_path / "s"), SEQ_LEN, 999)
    state = json.loads(json.dumps(loader(rows=[(rows, 1.0)]).state(30)))
    again = loader(rows=[(rows, 1.0)])
    again.check_state(state)
    assert again._sources[0]._base == state["windows"][0][0] > 20
    assert_same(again.batch(30), loader(rows=[(rows, 1.0)]).batch(30))


def test_a_state_of_other_weights_inside_the_windows_is_refused(tmp_path):
    docs = [range(i, i + 3 + i % 5) for i in range(40)]
    for name in "ab":
        write_store(tmp_path / name, docs, end=999, vocab=1000, tokenizer_fingerprint="t", meta={})
    stores = [open_store(tmp_path / name) for name in "ab"]

    def mixed(weight, window=6):
        both = [(stores[0], weight), (stores[1], 1.0)]
        return loader(rows=BestFit(window=window).mixture(both, SEQ_LEN, 999))

    state = json.loads(json.dumps(mixed(2.0).state(3)))
    mixed(2.0).check_state(state)
    for other in (mixed(3.0), mixed(2.0, window=7)):
        with pytest.raises(ValueError, match="differs in mixture"):
            other.check_state(state)


def test_arrays_that_batches_share_cannot_be_written(tmp_path):
    write_store(
        tmp_path / "s", [range(300)], end=999, vocab=1000, tokenizer_fingerprint="t", meta={}
    )
    one = loader(rows=[(Cut().rows(open_store(tmp_path / "s"), SEQ_LEN, 999), 1.0)])
    for step in (0, 0, 5):
        batch = one.batch(step)
        assert batch.mask_BT.shape == batch.tokens_BT.shape == (ramp(step)[1], SEQ_LEN)
        with pytest.raises(ValueError, match="read-only"):
            batch.mask_BT[0, 0] = 0
        batch.tokens_BT[0, 0] = 0


@pytest.mark.slow  # a worker process imports jax and grain
def test_processes_make_the_batches_that_threads_make(tmp_path):
    docs = [range(i * 30, i * 30 + 5 + i) for i in range(20)]
    write_store(tmp_path / "s", docs, end=999, vocab=1000, tokenizer_fingerprint="t", meta={})
    store = open_store(tmp_path / "s")
    rows = [(Cut(moving=True).rows(store, SEQ_LEN, 999), 1.0)]
    rows.append((BestFit(window=3).rows(store, SEQ_LEN, 999), 2.0))
    one = loader(rows=rows, host=(1, 2))
    iterator = one.iterate(2, processes=2)
    for step in range(2, 12):
        assert_same(next(iterator), one.batch(step))
    iterator.close()


@pytest.mark.parametrize(
    "packing",
    [Cut(document_mask=True), Cut(moving=True), BestFit(), BestFit(window=7)],
    ids=repr,
)
def test_a_batch_of_stored_text_is_its_rows(tmp_path, packing):
    docs = [range(i * 30, i * 30 + 5 + i) for i in range(20)]
    write_store(tmp_path / "s", docs, end=999, vocab=1000, tokenizer_fingerprint="t", meta={})
    rows = packing.rows(open_store(tmp_path / "s"), SEQ_LEN, 999)
    one = loader(rows=[(rows, 1.0)])
    batch, rows = one.batch(0), one._sources[0]  # with the seed that the loader gave it
    for b, i in enumerate(one.row_ids(0, 4)):
        for name in ("tokens", "targets", "segments", "positions", "mask"):
            array = getattr(batch, f"{name}_BT")
            assert array.dtype == (np.float32 if name == "mask" else np.int32)
            np.testing.assert_array_equal(array[b], rows[i][name])


def test_importing_the_loader_brings_in_no_tensorflow_or_torch():
    script = (
        "import sys, glm45_jax.data.loader\n"
        "print([m for m in ('tensorflow', 'torch', 'seqio') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_a_program_that_never_closes_its_iterator_ends_cleanly(tmp_path):
    docs = [range(900)] * 300
    write_store(tmp_path / "s", docs, end=999, vocab=1000, tokenizer_fingerprint="t", meta={})
    script = (
        "import sys\n"
        "from glm45_jax.data.loader import Loader\n"
        "from glm45_jax.data.pack import Cut\n"
        "from glm45_jax.data.store import open_store\n"
        "rows = Cut().rows(open_store(sys.argv[1]), 512, 0)\n"
        "one = Loader([(rows, 1.0)], seed=0, span=lambda s: (s * 64, 64), fingerprint='')\n"
        "batches = one.iterate(threads=2)\n"
        "[next(batches) for _ in range(20)]\n"
    )
    for _ in range(3):
        ended = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "s")],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ended.returncode, ended.stderr) == (0, "")
