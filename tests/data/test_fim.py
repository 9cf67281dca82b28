"""Laws of fill-in-the-middle: undone exactly, as often as asked, the same wherever it runs."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.data.fim import INFILL_FROM, Fim, Mark, WithFim, fim, unfim, unfim_ids
from glm45_jax.data.prepare import Data, data_fingerprint, prepare
from glm45_jax.data.rules import Filtered
from glm45_jax.data.sources import Doc, PydocTopics, TextFiles
from glm45_jax.tokenizer import SPECIAL_TOKENS, train_bpe
from glm45_jax.values import from_json, override, to_json
from tests.data.common import run

LOOK_ALIKES = st.sampled_from([token.text for token in SPECIAL_TOKENS])
ANY_TEXT = st.lists(st.text(max_size=20) | LOOK_ALIKES, max_size=8).map("".join)
ALWAYS = Fim(rate=1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([topic.text for topic in PydocTopics().docs()][:200], 400)


class Texts:
    """A source of the texts it is given."""

    name = "texts"

    def __init__(self, *texts, meta=None):
        self.texts, self.meta = texts, meta or {}

    def docs(self):
        for at, text in enumerate(self.texts):
            yield Doc(str(at), text, self.name, self.meta)

    def version(self):
        return "1"


@given(ANY_TEXT, st.text(), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_the_parts_join_to_the_document(text, doc_id, rate, spm, seed):
    pieces = fim(text, doc_id=doc_id, how=Fim(rate, spm, seed))
    assert unfim(pieces) == text
    assert sorted("".join(p for p in pieces if isinstance(p, str))) == sorted(text)


@given(ANY_TEXT.filter(bool), st.text(max_size=5), st.sampled_from([0.0, 1.0]))
def test_tokens_give_the_document_back_and_marks_are_never_read_from_its_text(
    tokenizer, text, doc_id, spm
):
    source = WithFim(Texts(text), Fim(rate=1.0, spm=spm))
    (ids,) = source.encode([Doc(doc_id, text, "texts")], tokenizer)
    mark_ids = [tokenizer.id_of(mark.value) for mark in Mark]
    assert [i for i in ids if i in mark_ids] == mark_ids  # PREFIX, SUFFIX, MIDDLE, once each
    assert unfim_ids(ids, tokenizer) == text


def test_the_layouts_are_those_of_the_paper(tokenizer):
    psm = fim("abcdef", doc_id="x", how=Fim(rate=1.0, spm=0.0))
    spm = fim("abcdef", doc_id="x", how=Fim(rate=1.0, spm=1.0))
    prefix, suffix, middle = psm[2], psm[4], psm[6]
    assert prefix + middle + suffix == "abcdef"
    assert psm == ("", Mark.PREFIX, prefix, Mark.SUFFIX, suffix, Mark.MIDDLE, middle)
    assert spm == ("", Mark.PREFIX, Mark.SUFFIX, suffix, Mark.MIDDLE, prefix, middle)


@pytest.mark.parametrize(("rate", "spm"), [(0.0, 0.5), (0.5, 0.5), (0.9, 0.2), (1.0, 1.0)])
def test_the_rates_are_met(rate, spm):
    n = 4000
    source = WithFim(Texts(*(f"text {i}" for i in range(n))), Fim(rate=rate, spm=spm))
    counts = run(source)[1]
    assert sum(counts.values()) == n
    got = n - counts["fim_plain"]
    assert got == pytest.approx(rate * n, abs=4 * (n / 4) ** 0.5 * (0 < rate < 1))
    assert counts["fim_spm"] == pytest.approx(spm * got, abs=4 * (n / 4) ** 0.5 * (0 < spm < 1))


def test_cuts_are_uniform_over_all_places_both_ends_included():
    cuts = Counter()
    for i in range(6000):
        pieces = fim("ab", doc_id=str(i), how=Fim(rate=1.0, spm=0.0))
        cuts[len(pieces[2]), len(pieces[2]) + len(pieces[6])] += 1
    # Two draws from {0, 1, 2}: a pair of equal cuts once, of different ones twice, out of nine.
    assert set(cuts) == {(a, b) for a in range(3) for b in range(a, 3)}
    for (a, b), n in cuts.items():
        assert n / 6000 == pytest.approx((1 if a == b else 2) / 9, abs=0.025)


def test_a_cut_depends_on_seed_and_document_and_nothing_else():
    text = "def f(x):\n    return x\n" * 20
    one = fim(text, doc_id="a.py", how=ALWAYS)
    assert one == fim(text, doc_id="a.py", how=ALWAYS)
    assert one != fim(text, doc_id="b.py", how=ALWAYS)
    assert one != fim(text, doc_id="a.py", how=replace(ALWAYS, seed=1))
    # Known cut: another one means that stores of old runs cannot be made again (FIM_FORMAT).
    assert [len(p) for p in one if isinstance(p, str)] == [0, 212, 50, 198]


@given(ANY_TEXT, st.data())
def test_context_stays_in_front_and_whole(text, data):
    begin = data.draw(st.integers(0, len(text)))
    pieces = fim(text, doc_id="x", how=ALWAYS, begin=begin)
    assert pieces[0] == text[:begin] and pieces[1] is Mark.PREFIX
    assert unfim(pieces) == text


def test_the_last_file_of_a_repository_is_cut_and_the_others_are_context(tokenizer):
    doc = Doc("r/0", "context and file", "texts", {INFILL_FROM: "12"})
    (ids,) = WithFim(Texts(), ALWAYS).encode([doc], tokenizer)
    at = ids.index(tokenizer.id_of(Mark.PREFIX.value))
    assert tokenizer.decode(ids[:at]) == "context and "
    assert unfim_ids(ids, tokenizer) == doc.text


def test_documents_that_stay_plain_have_the_tokens_of_the_plain_source(tokenizer):
    docs = list(PydocTopics().docs())[:40]
    plain = tokenizer.encode_batch([doc.text for doc in docs])
    assert WithFim(PydocTopics(), Fim(rate=0.0)).encode(docs, tokenizer) == plain
    half = WithFim(PydocTopics()).encode(docs, tokenizer)
    one_by_one = [WithFim(PydocTopics()).encode([doc], tokenizer)[0] for doc in docs]
    assert half == one_by_one
    assert [unfim_ids(ids, tokenizer) for ids in half] == [doc.text for doc in docs]
    assert 0 < sum(a == b for a, b in zip(half, plain, strict=True)) < 40


@given(st.lists(st.sampled_from(["word ", "line\n", "<|code_prefix|>"]), max_size=60))
def test_long_documents_become_fragments_that_join_and_stay_in_one_group(parts):
    text = "".join(parts)
    docs = run(WithFim(Texts(text), Fim(), max_chars=37))[0]
    assert "".join(doc.text for doc in docs).strip() == text.strip()
    assert all(len(doc.text) <= 37 for doc in docs)
    assert len({doc.id for doc in docs}) == len(docs)
    assert len({doc.meta.get("group") for doc in docs}) <= 1


def test_prepare_stores_transformed_documents_that_undo_to_the_texts(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}: <|code_middle|> " + "a quick fox " * (i % 7))
    plain = TextFiles(str(tmp_path), name="code")
    data = Data(sources=((WithFim(plain, Fim(0.5)), 1.0),), vocab=340, val_fraction=0.2)
    found = prepare(data, tmp_path / "cache")
    texts, transformed = [], 0
    for store in (found.train["code"], found.val["code"]):
        for start, stop in pairwise(store.offsets_N1.tolist()):
            ids = store.read(start, stop).tolist()[:-1]
            texts.append(unfim_ids(ids, found.tokenizer))
            transformed += found.tokenizer.id_of(Mark.MIDDLE.value) in ids
    assert Counter(texts) == Counter(doc.text for doc in plain.docs())
    counts = found.report["read"]["code"]
    assert counts["fim_psm"] + counts["fim_spm"] == transformed
    again = prepare(data, tmp_path / "other")
    assert again.train["code"].manifest.fingerprint == found.train["code"].manifest.fingerprint
    bare = replace(data, sources=((plain, 1.0),))
    assert data_fingerprint(bare) != data_fingerprint(data)


def test_the_wrapper_is_a_value_like_any_other():
    data = Data(sources=((WithFim(PydocTopics(), Fim(seed=3)), 1.0),))
    assert from_json(to_json(data)) == data
    changed = override(data, "sources.0.0.fim.rate=0.9")
    assert changed.sources[0][0].fim == Fim(rate=0.9, seed=3)


def test_what_cannot_be_meant_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"rate 1\.5 is a share; use 0 to 1"):
        Fim(rate=1.5)
    with pytest.raises(ValueError, match="already encodes its documents; wrap what is inside"):
        WithFim(WithFim(PydocTopics()))
    with pytest.raises(ValueError, match="a filter around it would lose; put the filter inside"):
        Filtered(WithFim(PydocTopics()))
    with pytest.raises(ValueError, match=r"marks are \['PREFIX', 'MIDDLE'\], fim writes"):
        unfim(("", Mark.PREFIX, "a", Mark.MIDDLE, "b"))
    assert tokenizer.encode("<|code_prefix|>") != [tokenizer.id_of("<|code_prefix|>")]


def test_a_document_that_is_read_again_is_cut_elsewhere(tokenizer):
    first = Doc("d", "a text that is long enough to be cut at many places " * 9, "pydoc")
    again = replace(first, meta={"copy": "1"})
    one, other = WithFim(PydocTopics(), Fim(rate=1.0)).encode([first, again], tokenizer)
    assert one != other
    assert unfim_ids(one, tokenizer) == unfim_ids(other, tokenizer) == first.text
