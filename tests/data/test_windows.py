"""Laws of packing while training: whole documents, once each, whoever asks for which row first."""

import pickle
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm45_jax.data.fit import best_fit
from glm45_jax.data.order import ENDLESS
from glm45_jax.data.pack import BestFit, take
from glm45_jax.data.windows import (
    MadeDocuments,
    MixedDocuments,
    StoredDocuments,
    WindowRows,
)
from tests.data.test_pack import PAD, check_packed_row, make_store

T = 16


class Counting(MadeDocuments):
    """Documents of running numbers that count what they are asked for."""

    def __init__(self, lengths, **options):
        self.asked = []
        starts = np.cumsum([0, *lengths])
        super().__init__(
            lambda seed, i: range(starts[i % len(lengths)], starts[i % len(lengths) + 1]), **options
        )

    def lengths(self, first, n):
        self.asked.append(first)
        return super().lengths(first, n)


def pieces_of(rows, n_rows):
    """Every piece of the first rows, as tuples of ids."""
    found = []
    for row in (rows[i] for i in range(n_rows)):
        check_packed_row(row, T)
        for segment in range(1, row["segments"].max() + 1):
            found.append(tuple(row["tokens"][row["segments"] == segment].tolist()))
    return found


def window_ends(rows, n):
    """Rows where windows 1 .. n begin."""
    ends, row = [], 0
    while len(ends) < n:
        window, first = rows.window_of(row)
        if window > len(ends):
            ends.append(first)
        row += 1
    return ends


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=20),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_window_of_an_epoch_holds_every_token_once_in_whole_pieces(
    tmp_path_factory, lengths, epochs, seed
):
    store = make_store(tmp_path_factory.mktemp("w"), lengths)
    rows = BestFit(window=len(lengths)).rows(store, T, PAD).seeded(seed)
    expected = []
    for start, stop in pairwise(store.offsets_N1.tolist()):
        doc = store.read(start, stop).tolist()
        expected += [tuple(doc[i : i + T]) for i in range(0, len(doc), T)]
    ends = [0, *window_ends(rows, epochs)]
    found = pieces_of(rows, ends[-1])
    assert sorted(found) == sorted(expected * epochs)
    per_epoch = [b - a for a, b in pairwise(ends)]
    assert per_epoch == [len(best_fit([len(p) for p in expected], T))] * epochs


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, T), min_size=1, max_size=30),
    window=st.integers(1, 40),
    asked=st.lists(st.integers(0, 30), min_size=1, max_size=5),
)
def test_no_document_that_fits_is_cut_and_no_row_depends_on_what_was_asked(lengths, window, asked):
    def rows():
        return WindowRows(Counting(lengths), T, PAD, window)

    starts = np.cumsum([0, *lengths])
    whole = {tuple(range(a, b)) for a, b in pairwise(starts.tolist())}
    assert set(pieces_of(rows(), 20)) <= whole
    in_order = rows()
    forward = [in_order[i] for i in range(31)]
    together = take(rows(), asked)
    for r, i in enumerate(asked):
        for name, array in together.items():
            np.testing.assert_array_equal(array[r], forward[i][name])


def test_documents_that_are_made_give_the_rows_of_documents_that_are_stored(tmp_path):
    store = make_store(tmp_path, [9, 0, 30, 5, 5, 17, 40, 3])
    stored = StoredDocuments(store).seeded(4)

    def make(seed, number):
        doc = int(stored.stored(np.array([number]))[0])
        return store.read(store.offsets_N1[doc], store.offsets_N1[doc + 1])

    made = WindowRows(MadeDocuments(make, keep=2), T, PAD, 5, seed=9)
    for a, b in zip(made, islice(WindowRows(stored, T, PAD, 5, seed=9), 40), strict=False):
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(1, 60), seed=st.integers(0, 2**32 - 1), weight=st.sampled_from([0.3, 0.5])
)
def test_documents_of_all_sources_share_rows_by_their_weights_and_come_once_an_epoch(
    tmp_path_factory, window, seed, weight
):
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "a").mkdir()
    long, short = make_store(folder / "a", [14, 13, 12] * 9), make_store(folder, [1, 2, 3] * 20)
    ((rows, share),) = BestFit(window=window).mixture([(long, 1 - weight), (short, weight)], T, PAD)
    rows = rows.seeded(seed)
    assert share == 1.0
    row = rows.take(range(rows.window_of(300)[1] or 1))
    found = [
        tuple(tokens[segments == segment].tolist())
        for tokens, segments in zip(row["tokens"], row["segments"], strict=True)
        for segment in range(1, segments.max() + 1)
    ]
    for store, kind, part in (
        (long, lambda n: n > 4, 1 - weight),
        (short, lambda n: n <= 4, weight),
    ):
        own = [piece for piece in found if kind(len(piece))]
        tokens = sum(map(len, own)) / sum(map(len, found))
        np.testing.assert_allclose(tokens, part, atol=0.05)
        n = store.manifest.n_docs
        counts = Counter(own)
        assert len(counts) == n and max(counts.values()) - min(counts.values()) <= 1


def test_short_documents_of_one_source_fill_the_rows_of_another(tmp_path):
    (tmp_path / "a").mkdir()
    stores = [(make_store(tmp_path / "a", [11] * 50), 12.0), (make_store(tmp_path, [3] * 50), 4.0)]
    alone, together = (packing.mixture(stores, T, PAD) for packing in (BestFit(), BestFit(50)))
    assert [weight for _, weight in alone] == [12.0, 4.0]
    assert (alone[0][0].take(range(50))["segments"] == 0).mean() == 0.25
    segments = together[0][0].take(range(200))["segments"]
    assert (segments == 0).mean() < 0.01 and (segments.max(axis=1) == 2).mean() > 0.95


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
    store = make_store(tmp_path, range(1, 40))
    rows = BestFit(window=40).rows(store, 64, PAD)
    orders = [rows.seeded(seed).take([0, 1, 2])["tokens"].tolist() for seed in (0, 1)]
    later = rows.seeded(0).window_of(10**3)[1]
    orders.append(rows.seeded(0).take([later, later + 1, later + 2])["tokens"].tolist())
    assert all(a != b for a, b in pairwise([*orders, orders[0]]))


def test_going_on_from_a_known_window_packs_none_before_it():
    lengths = np.random.default_rng(0).integers(1, T, 500).tolist()
    unbroken = WindowRows(Counting(lengths), T, PAD, 10)
    window, first = unbroken.window_of(400)
    assert window > 30
    documents = Counting(lengths)
    resumed = WindowRows(documents, T, PAD, 10)
    resumed.resume(window, first)
    for name, array in resumed[400].items():
        np.testing.assert_array_equal(array, unbroken[400][name])
    assert documents.asked == [window * 10]
    np.testing.assert_array_equal(resumed[3]["tokens"], unbroken[3]["tokens"])


def test_what_is_kept_stays_the_same_however_far_it_goes():
    rows = WindowRows(Counting([5, 9, 3], keep=50), T, PAD, 10)
    sizes = set()
    for i in range(0, 3000, 10):
        rows[i]
        sizes.add(len(rows._packed))
    assert max(sizes) <= 4


def test_the_padding_of_document_like_lengths_is_under_half_a_percent():
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(7.5, 1.5, 30_000), 300_000).astype(int) + 1
    length = 32768

    def padding(n_docs):
        cut = [n % length or length for n in lengths[:n_docs].tolist()]
        whole = int((lengths[:n_docs] // length).sum()) - cut.count(length)
        n_rows = len(best_fit(cut, length)) + whole
        return 1 - lengths[:n_docs].sum() / (n_rows * length)

    assert padding(4096) < 0.005
    assert padding(30_000) < 0.0005


def test_rows_survive_the_way_to_another_process(tmp_path):
    store = make_store(tmp_path, [9, 0, 30, 5])
    rows = BestFit(window=3).rows(store, T, PAD).seeded(8)
    again = pickle.loads(pickle.dumps(rows))
    for name, array in again.take([5, 0]).items():
        np.testing.assert_array_equal(array, rows.take([5, 0])[name])


def test_what_cannot_be_packed_is_refused(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="a window of 0 documents; use at least 1"):
        BestFit(window=0).rows(make_store(tmp_path, [3]), T, PAD)
    with pytest.raises(ValueError, match="documents 0 to 6 are all empty"):
        WindowRows(Counting([0]), T, PAD, 7)[0]
    rows = WindowRows(Counting([3]), T, PAD, 7)
    assert len(rows) == ENDLESS
    kinds = [MadeDocuments(lambda seed, i: [1]), StoredDocuments(make_store(tmp_path / "b", [3]))]
    with pytest.raises(ValueError, match=r"dtypes \['uint16', 'uint32'\] cannot be in one row"):
        MixedDocuments(kinds, [1.0, 1.0])
    with pytest.raises(IndexError, match="row -1 asked"):
        rows[-1]
