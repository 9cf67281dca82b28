"""Laws of packing: every token once, no short document cut, masks that never cross a document."""

import gc
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.data.pack import BestFit, Cut, best_fit, split_long, take
from glm45_jax.data.store import open_store, write_store

VOCAB, END, PAD = 60_000, 59_999, 59_998
CAPACITY = 20
lengths_lists = st.lists(st.integers(0, CAPACITY), max_size=60)


def best_fit_slow(lengths, capacity):
    """Best-fit decreasing by looking at every bin; `min` takes the first of equals."""
    bins, space = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [b for b in range(len(bins)) if space[b] >= lengths[i]]
        if fits:
            chosen = min(fits, key=lambda b: space[b])
        else:
            chosen = len(bins)
            bins.append([])
            space.append(capacity)
        bins[chosen].append(i)
        space[chosen] -= lengths[i]
    return bins


def fewest_bins(lengths, capacity):
    """The optimum, by trying every bin for every item (longest first)."""
    best = len(lengths)

    def place(rest, spaces):
        nonlocal best
        if len(spaces) >= best:
            return
        if not rest:
            best = len(spaces)
            return
        for b in {space: b for b, space in enumerate(spaces) if space >= rest[0]}.values():
            place(rest[1:], [s - rest[0] * (i == b) for i, s in enumerate(spaces)])
        place(rest[1:], [*spaces, capacity - rest[0]])

    place(sorted(lengths, reverse=True), [])
    return best


def first_fit(lengths, capacity):
    """Number of bins when items go, in their order, to the first bin that holds them."""
    spaces = []
    for length in lengths:
        at = next((b for b, space in enumerate(spaces) if space >= length), None)
        if at is None:
            spaces.append(capacity - length)
        else:
            spaces[at] -= length
    return len(spaces)


@settings(max_examples=150, deadline=None)
@given(lengths_lists)
def test_every_item_is_in_one_bin_and_no_bin_is_too_full(lengths):
    bins = best_fit(lengths, CAPACITY)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(members and sum(lengths[i] for i in members) <= CAPACITY for members in bins)


@settings(max_examples=150, deadline=None)
@given(lengths_lists)
def test_it_fills_bins_as_the_slow_definition_does(lengths):
    assert best_fit(lengths, CAPACITY) == best_fit_slow(lengths, CAPACITY)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=9))
def test_it_stays_within_three_halves_of_the_best_packing(lengths):
    # The proven worst case of best-fit decreasing (Simchi-Levi 1994).
    assert 2 * len(best_fit(lengths, CAPACITY)) <= 3 * fewest_bins(lengths, CAPACITY)


@pytest.mark.parametrize("seed", range(5))
def test_on_document_like_lengths_it_needs_no_more_bins_than_first_fit(seed):
    random = np.random.default_rng(seed)
    lengths = np.minimum(random.lognormal(5, 1.3, 1500).astype(int) + 1, 2048)
    bins = best_fit(lengths, 2048)
    assert len(bins) <= first_fit(lengths, 2048)
    assert len(bins) <= 1.02 * lengths.sum() / 2048 + 1


def test_ties_go_to_the_lower_index_and_the_bin_opened_first():
    assert best_fit([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert best_fit([3, 7, 7, 3, 6], 10) == [[1, 0], [2, 3], [4]]
    assert best_fit([], 10) == []


@pytest.mark.slow
@pytest.mark.parametrize("least", [0.0, 0.5], ids=["uniform", "upper half"])
def test_ten_times_the_documents_take_little_more_than_ten_times_as_long(least):
    # Uniform lengths leave the most different free spaces, which is the worst for a sorted list.
    random = np.random.default_rng(0)

    def seconds(n):
        lengths = random.integers(int(least * 32768) + 1, 32769, n)
        return min(timed(lambda: best_fit(lengths, 32768)) for _ in range(3))

    assert seconds(1_000_000) < 25 * seconds(100_000)  # n log n is 12; n**2 would be 100


def timed(call):
    gc.disable()  # it walks all bins again and again, which is not the algorithm's time
    started = time.process_time()
    call()
    seconds = time.process_time() - started
    gc.enable()
    return seconds


def test_an_item_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="item 1 has length 11, over capacity 10; split"):
        best_fit([3, 11], 10)
    with pytest.raises(ValueError, match="item 0 has length -1"):
        best_fit([-1, 3], 10)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 30))
def test_split_pieces_tile_every_document_in_order(lengths, capacity):
    pieces = split_long(lengths, capacity)
    assert ((pieces.length_N > 0) & (pieces.length_N <= capacity)).all()
    rebuilt = [[] for _ in lengths]
    for doc, begin, length in zip(*pieces, strict=True):
        rebuilt[doc] += range(begin, begin + length)
    assert rebuilt == [list(range(length)) for length in lengths]
    assert len(pieces.doc_N) == sum(-(-length // capacity) for length in lengths)


def make_store(folder, lengths):
    """Documents of running numbers, so that every token says where it stood."""
    docs, at = [], 0
    for length in lengths:
        docs.append(range(at, at + length))
        at += length
    path = folder / "store"
    write_store(
        path, docs, end=END, vocab=VOCAB, tokenizer_fingerprint="t", meta={}, chunk_tokens=64
    )
    return open_store(path)


stores = st.lists(st.integers(0, 40), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(lengths=stores, seq_len=st.integers(2, 16), document_mask=st.booleans())
def test_cut_rows_are_the_store_in_order(tmp_path_factory, lengths, seq_len, document_mask):
    store = make_store(tmp_path_factory.mktemp("cut"), lengths)
    n = store.manifest.n_tokens
    if n <= seq_len:
        with pytest.raises(ValueError, match=f"has {n} tokens, a row of seq_len {seq_len} needs"):
            Cut(document_mask).rows(store, seq_len, PAD)
        return
    rows = Cut(document_mask).rows(store, seq_len, PAD)
    assert len(rows) == (n - 1) // seq_len
    everything = take(rows, range(len(rows)))
    whole = store.read(0, n)
    used = len(rows) * seq_len
    np.testing.assert_array_equal(everything["tokens"].ravel(), whole[:used])
    np.testing.assert_array_equal(everything["targets"].ravel(), whole[1 : used + 1])
    if document_mask:
        check_segments_are_documents(store, rows, everything)
    else:
        assert (everything["segments"] == 1).all() and (everything["mask"] == 1).all()
        assert (everything["positions"] == np.arange(seq_len)).all()


@settings(max_examples=60, deadline=None)
@given(lengths=stores, seq_len=st.integers(2, 16), document_mask=st.booleans())
def test_moving_rows_cut_the_ring_of_all_tokens_elsewhere_in_every_epoch(
    tmp_path_factory, lengths, seq_len, document_mask
):
    store = make_store(tmp_path_factory.mktemp("moving"), lengths)
    n = store.manifest.n_tokens
    if n <= seq_len:
        return
    rows = Cut(document_mask, moving=True).rows(store, seq_len, PAD).seeded(7)
    ring, per_epoch, firsts = np.tile(store.read(0, n), 2), n // seq_len, []
    assert len(rows) == per_epoch
    doc_of = np.tile(np.repeat(np.arange(store.manifest.n_docs), np.diff(store.offsets_N1)), 2)
    for epoch in range(3):
        found = take(rows, np.arange(per_epoch) + epoch * per_epoch)
        first = rows._first(epoch, n)
        firsts.append(first)
        whole = np.roll(ring[:n], -first)
        np.testing.assert_array_equal(found["tokens"].ravel(), whole[: per_epoch * seq_len])
        ahead = np.roll(ring[:n], -first - 1)
        np.testing.assert_array_equal(found["targets"].ravel(), ahead[: per_epoch * seq_len])
        for r in range(per_epoch if document_mask else 0):
            start = (first + r * seq_len) % n
            doc_T1 = doc_of[start : start + seq_len + 1]
            # A document may stand at both ends of the ring: it ends at the seam all the same.
            seam_T = (np.arange(start, start + seq_len) + 1) % n == 0
            ends_T = (doc_T1[1:] != doc_T1[:-1]) | seam_T
            segments_T = 1 + np.cumsum([0, *ends_T[:-1]])
            np.testing.assert_array_equal(found["mask"][r], ~ends_T)
            np.testing.assert_array_equal(found["segments"][r], segments_T)
            positions = [int((segments_T[:t] == segments_T[t]).sum()) for t in range(seq_len)]
            assert found["positions"][r].tolist() == positions
    assert firsts[0] == 0 and (n < 50 or len(set(firsts)) > 1)


def test_every_place_of_the_ring_is_as_likely_to_be_cut(tmp_path):
    rows = Cut(moving=True).rows(make_store(tmp_path, [99]), 10, PAD)
    cuts = np.array([rows.seeded(seed)._first(1, 100) % 10 for seed in range(3000)])
    assert np.abs(np.bincount(cuts, minlength=10) - 300).max() < 75


def check_segments_are_documents(store, rows, everything):
    doc_of = np.repeat(np.arange(store.manifest.n_docs), np.diff(store.offsets_N1))
    for r in range(len(rows)):
        doc_T1 = doc_of[r * rows.seq_len : (r + 1) * rows.seq_len + 1]
        segment, position = 1, 0
        for t in range(rows.seq_len):
            if t and doc_T1[t] != doc_T1[t - 1]:
                segment, position = segment + 1, 0
            assert everything["segments"][r, t] == segment
            assert everything["positions"][r, t] == position
            assert everything["mask"][r, t] == (doc_T1[t] == doc_T1[t + 1])
            position += 1


@settings(max_examples=60, deadline=None)
@given(lengths=stores, seq_len=st.integers(2, 16))
def test_packed_rows_hold_every_token_once_in_whole_pieces(tmp_path_factory, lengths, seq_len):
    store = make_store(tmp_path_factory.mktemp("pack"), lengths)
    rows = BestFit().rows(store, seq_len, PAD)
    pieces = []
    for row in (rows[i] for i in range(len(rows))):
        check_packed_row(row, seq_len)
        for segment in range(1, row["segments"].max() + 1):
            pieces.append(row["tokens"][row["segments"] == segment].tolist())
    expected = []
    for start, stop in pairwise(store.offsets_N1.tolist()):
        doc = store.read(start, stop).tolist()
        expected += [doc[i : i + seq_len] for i in range(0, len(doc), seq_len)]
    assert sorted(pieces) == sorted(expected)


def check_packed_row(row, seq_len):
    segments, used = row["segments"], int((row["segments"] > 0).sum())
    assert (segments[:used] > 0).all() and segments[0] == 1  # padding only at the end
    assert set(np.diff(segments[:used])) <= {0, 1}
    padding = (row["tokens"][used:], row["targets"][used:])
    assert all((part == PAD).all() for part in padding) and not row["positions"][used:].any()
    for t in range(seq_len):
        starts = t == 0 or segments[t] != segments[t - 1]
        if t < used:
            assert row["positions"][t] == (0 if starts else row["positions"][t - 1] + 1)
        goes_on = t + 1 < used and segments[t + 1] == segments[t]
        assert row["mask"][t] == goes_on
        if goes_on:
            assert row["targets"][t] == row["tokens"][t + 1]


@pytest.mark.parametrize(
    "packing",
    [Cut(), Cut(document_mask=True), Cut(True, moving=True), BestFit(), BestFit(window=3)],
    ids=repr,
)
def test_rows_read_together_are_the_rows_read_alone(tmp_path, packing):
    rows = packing.rows(make_store(tmp_path, [9, 0, 30, 5, 5, 17, 40]), 8, PAD)
    order = [3, 0, min(len(rows) - 1, 20), 3]
    together = take(rows, order)
    for name, array in together.items():
        assert array.dtype == (np.float32 if name == "mask" else np.int32)
        assert array.shape == (4, 8)
        np.testing.assert_array_equal(array, np.stack([rows[i][name] for i in order]))


def test_a_row_that_is_not_there_is_refused(tmp_path):
    rows = Cut().rows(make_store(tmp_path, [40]), 8, PAD)
    with pytest.raises(IndexError, match=r"rows 5\.\.5 asked, there are 0\.\.4"):
        rows[5]
    assert len(list(rows)) == len(rows)
