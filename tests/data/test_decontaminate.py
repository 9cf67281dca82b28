"""Laws of decontamination: a document goes exactly when it shares a long enough run of words."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.data.decontaminate import Decontaminated, Overlap, index_of
from glm45_jax.data.fim import WithFim
from glm45_jax.data.prepare import Data, prepare
from glm45_jax.data.sources import PydocTopics, TextFiles
from tests.data.test_dedup import Texts, run, words

SMALL = Overlap(ngram=3, min_ngram=2)
SENTENCES = st.lists(st.lists(st.sampled_from("abc"), max_size=7).map(" ".join), max_size=5)


def named(texts, name="texts"):
    """A source whose documents are told apart by the number they begin with."""
    return Texts(tuple(f"{at}: {text}" for at, text in enumerate(texts)), name)


def runs(text, n):
    each = text.split()
    return {tuple(each[at : at + n]) for at in range(len(each) - n + 1)}


def plain_grams(item, overlap):
    """The n-grams to look for, by the definition."""
    n = min(len(item.split()), overlap.ngram)
    return runs(item, n) if n >= overlap.min_ngram else set()


@given(SENTENCES, SENTENCES, st.integers(1, 3))
def test_documents_go_when_they_share_enough_ngrams_and_only_then(items, texts, hits):
    overlap = Overlap(ngram=3, min_ngram=2, hits=hits)
    wanted = set().union(*(plain_grams(item, overlap) for item in items))
    if not wanted:
        with pytest.raises(ValueError, match=f"none of {len(items)} evaluation items has 2 words"):
            index_of(enumerate(items), overlap)
        return
    index = index_of(((str(at), item) for at, item in enumerate(items)), overlap)
    found = index.search(texts)
    for at, text in enumerate(texts):
        shared = {gram for n in (2, 3) for gram in runs(text, n)} & wanted
        assert len(np.unique(found.gram_M[found.text_M == at])) == len(shared)
    lengths = [len(item.split()) for item in items]
    assert index.too_short_I.tolist() == [n < 2 for n in lengths]
    source = Decontaminated(Texts(tuple(texts)), (Texts(tuple(items), "evals"),), overlap)
    clean = [
        text
        for text in texts
        if len({gram for n in (2, 3) for gram in runs(text, n)} & wanted) < hits
    ]
    assert run(source)[0] == clean


@pytest.fixture(scope="module")
def sets():
    """Two evaluation sets; the second has an item too short, and one found as a whole."""
    first = Texts(tuple(words(1000 + at, 30) for at in range(5)), "first")
    second = Texts((words(1100, 9), "too short an item", words(1101, 40)), "second")
    return first, second


def test_the_report_names_the_ngram_and_counts_by_set(sets):
    first, second = sets
    quoted = " ".join(first.texts[2].split()[4:17])
    texts = (
        words(200, 50),
        f"{words(201, 10)} {quoted.upper()}, {words(202, 10)}",
        f"{words(203)} ({quoted})",
        f"{words(204)} -- {second.texts[0]} -- {second.texts[2]}",
        f"{words(205)} {' '.join(first.texts[3].split()[:12])}",  # one word less than it takes
    )
    kept, counts = run(Decontaminated(Texts(texts), sets))
    assert kept == [texts[0], texts[4]]
    shown = "decontaminate_ngram "
    assert {name: n for name, n in counts.items() if name != "texts_read"} == {
        "decontaminate_docs_in": 5,
        "decontaminate_docs_out": 2,
        "decontaminate_chars_in": sum(map(len, texts)),
        "decontaminate_chars_out": sum(map(len, kept)),
        "decontaminate_contaminated": 3,
        "decontaminate_first_docs": 2,
        "decontaminate_first_items": 5,
        "decontaminate_first_items_too_short": 0,
        "decontaminate_first_items_found": 1,
        "decontaminate_second_docs": 1,
        "decontaminate_second_items": 3,
        "decontaminate_second_items_too_short": 1,
        "decontaminate_second_items_found": 2,
        f"{shown}first/{first.texts[2][:40]}: {quoted.upper()}": 1,
        f"{shown}first/{first.texts[2][:40]}: {quoted}": 1,
        f"{shown}second/{second.texts[0][:40]}: {second.texts[0]}": 1,
    }


def test_marking_keeps_them_all_and_says_why(sets):
    text = f"see {sets[0].texts[0]}"
    source = Decontaminated(Texts((text, words(3))), sets, Overlap(drop=False))
    docs = list(source.docs())
    assert [doc.text for doc in docs] == [text, words(3)]
    begin = " ".join(sets[0].texts[0].split()[:13])
    assert docs[0].meta["contaminated"] == f"first/{sets[0].texts[0][:40]}: {begin}"
    assert "contaminated" not in docs[1].meta
    assert run(source)[1]["decontaminate_contaminated"] == 1


def test_no_order_matters(sets):
    texts = [words(at) + (f" {sets[0].texts[at % 5]}" if at % 3 else "") for at in range(30)]
    answers = []
    for seed in range(3):
        key = np.random.default_rng(seed)
        key.shuffle(texts)
        turned = tuple(
            Texts(tuple(key.permutation(one.texts).tolist()), one.name)
            for one in sets[:: 1 - 2 * (seed % 2)]
        )
        kept, counts = run(Decontaminated(Texts(tuple(texts)), turned))
        assert kept == [text for text in texts if text in set(kept)]
        answers.append((sorted(kept), counts))
    assert answers[0] == answers[1] == answers[2] and len(answers[0][0]) == 10


def test_items_that_share_an_ngram_are_all_found():
    shared = words(0, 13)
    items = Texts(tuple(f"{words(1 + at, 5)} {shared}" for at in range(4)), "evals")
    counts = run(Decontaminated(Texts((f"x {shared} y",)), (items,)))[1]
    assert counts["decontaminate_evals_items_found"] == 4


def test_odd_documents_pass_and_are_counted(sets):
    odd = ("", " \n", "\ud800 lone", "x" * 50_000_000, "word " * 10_000_000, sets[0].texts[1])
    kept, counts = run(Decontaminated(Texts(odd), sets))
    assert kept == list(odd[:5]) and counts["decontaminate_docs_in"] == 6
    with_odd = Texts(("", "\ud800 " + words(9), sets[0].texts[1]), "evals")
    assert run(Decontaminated(Texts(odd[:3]), (with_odd,)))[0] == list(odd[:3])
    assert run(Decontaminated(Texts((odd[5],)), (with_odd,)))[0] == []


def test_prepare_reports_it(tmp_path):
    item = words(0, 20)
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "item.txt").write_text(item)
    for at in range(30):
        (tmp_path / f"{at}.txt").write_text(words(at + 1) + (f" {item}" if at < 4 else ""))
    evals = (TextFiles(str(tmp_path / "evals"), name="evals"),)
    source = Decontaminated(TextFiles(str(tmp_path), pattern="*.txt"), evals)
    data = Data(sources=((source, 1.0),), vocab=400, bpe_chars=50_000)
    read = prepare(data, tmp_path / "cache").report["read"]["files"]
    assert read["decontaminate_docs_out"] == 26 and read["decontaminate_evals_items_found"] == 1


def test_what_makes_no_sense_is_refused(sets):
    with pytest.raises(ValueError, match="give at least one, all different"):
        Decontaminated(Texts(()), ())
    with pytest.raises(ValueError, match="put the wrapper inside"):
        Decontaminated(WithFim(PydocTopics()), sets)
    with pytest.raises(ValueError, match="in this order"):
        Overlap(ngram=5)
    with pytest.raises(ValueError, match="hits 0"):
        Overlap(hits=0)
    assert Decontaminated(Texts(()), sets).version() != Texts(()).version()
