"""Laws of `Deduplicated`: what stays depends on no order, is counted, and the work is done once."""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.data.dedup import (
    AtRandom,
    Best,
    Deduplicated,
    FirstSource,
    Longest,
    Repeats,
    deduplicated,
    join_groups,
    ranked,
)
from glm45_jax.data.fim import WithFim
from glm45_jax.data.minhash import MinHash
from glm45_jax.data.prepare import Data, prepare
from glm45_jax.data.sources import Doc, PydocTopics, TextFiles, counted

LINE = "a line of words that is surely long enough to be looked at, number "


@dataclass(frozen=True)
class Texts:
    """A source of given texts; `reads` counts how often it was read."""

    texts: tuple
    name: str = "texts"
    meta: tuple = ()
    reads: Counter = field(default=None, repr=False, compare=False)

    def docs(self):
        if self.reads is not None:
            self.reads[self.name] += 1
        for at, text in enumerate(self.texts):
            yield Doc(text[:40], text, self.name, self.meta[at] if self.meta else {})
        return {"texts_read": len(self.texts)}

    def version(self):
        return "1"


def run(source):
    """The texts of a source, and the counts it returns."""
    counts = {}
    return [doc.text for doc in counted(source, counts)], counts


def alone(source, *rules):
    """One source, deduplicated by itself."""
    return Deduplicated(source, rules)


def words(seed, n=60):
    """A text of n words of its own."""
    return " ".join(f"w{x}" for x in np.random.default_rng(seed).integers(0, 10**9, n))


@pytest.fixture(scope="module")
def families():
    """Twenty families of three near-duplicates, of different lengths."""
    return tuple(words(f) + " more" * m for f in range(20) for m in (1, 2, 3))


def test_one_of_each_family_stays_the_longest(families):
    kept, counts = run(alone(Texts(families), MinHash()))
    assert kept == [text for text in families if text.endswith(" more more more")]
    assert counts == {
        "texts_read": 60,
        "minhash_docs_in": 60,
        "minhash_docs_out": 20,
        "minhash_chars_in": sum(map(len, families)),
        "minhash_chars_out": sum(map(len, kept)),
        "minhash_dropped_for_texts": 40,
        "minhash_clusters": 20,
        "minhash_largest_cluster": 3,
        "minhash_without_words": 0,
    }


@pytest.mark.parametrize("keep", [Longest(), FirstSource(), AtRandom(), AtRandom(1), Best("score")])
def test_the_order_of_documents_changes_nothing(families, keep):
    shuffled = list(zip(families, range(60), strict=True))
    answers = []
    for seed in range(3):
        np.random.default_rng(seed).shuffle(shuffled)
        texts = tuple(text for text, _ in shuffled)
        meta = tuple({"score": str(place % 7)} for _, place in shuffled)
        kept, _ = run(alone(Texts(texts, meta=meta), MinHash(keep=keep)))
        assert kept == [text for text in texts if text in set(kept)]  # in the order of the source
        answers.append(sorted(kept))
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 20


def test_each_keep_rule_keeps_what_it_names(families):
    meta = tuple({"score": str(-len(text))} for text in families)
    kept, _ = run(alone(Texts(families, meta=meta), MinHash(keep=Best("score"))))
    assert kept == [text for text in families if text.count("more") == 1]
    kept = [run(alone(Texts(families), MinHash(keep=AtRandom(s))))[0] for s in range(2)]
    assert kept[0] != kept[1]
    with pytest.raises(ValueError, match=r"meta 'score' = None.*score the source first"):
        run(alone(Texts(families), MinHash(keep=Best("score"))))
    with pytest.raises(ValueError, match="not finite"):
        Best("score").score(Doc("a", "b", "c", {"score": "nan"}))


def test_sources_are_deduplicated_together_and_the_work_is_done_once(families):
    reads = Counter()
    first = Texts(families[::3], "first", reads=reads)
    second = Texts(families, "second", reads=reads)
    wrapped = deduplicated(((first, 0.7), (second, 0.3)), MinHash(keep=FirstSource(), seed=5))
    assert [(source.name, weight) for source, weight in wrapped] == [
        ("first", 0.7),
        ("second", 0.3),
    ]
    (kept, counts), (none, others) = (run(source) for source, _ in wrapped)
    assert kept == list(families[::3]) and none == []
    assert counts["minhash_docs_out"] == 20 and others["minhash_dropped_for_first"] == 60
    assert counts["minhash_clusters"] == others["minhash_clusters"] == 20
    assert reads == {"first": 2, "second": 2}  # to find, and to hand on


def test_each_rule_sees_what_the_one_before_it_left(families):
    lines = tuple(f"{LINE * 2}\n{LINE * 2}1\n{text}" for text in families)
    kept, counts = run(alone(Texts(lines), Repeats(unit="\n"), MinHash()))
    assert counts["repeated_lines_units_cut"] == 2 * 59
    assert counts["repeated_lines_units"] == 2 * 60 + 60
    assert counts["minhash_chars_in"] == counts["repeated_lines_chars_out"]
    kept_too, _ = run(alone(alone(Texts(lines), Repeats(unit="\n")), MinHash()))
    assert kept == kept_too and len(kept) == 20
    assert sum(LINE in text for text in kept) <= 1


def test_prepare_counts_it_in_one_line_of_a_data(tmp_path, families):
    for at, text in enumerate(families):
        (tmp_path / f"{at}.txt").write_text(text)
    sources = ((TextFiles(str(tmp_path)), 0.5), (PydocTopics(), 0.5))
    data = Data(sources=sources, vocab=400, bpe_chars=50_000)
    data = replace(data, sources=deduplicated(sources, MinHash()))
    report = prepare(data, tmp_path / "cache").report
    assert report["read"]["files"]["minhash_docs_in"] == 60
    assert report["read"]["topics"]["minhash_docs_out"] <= 79
    assert sum(report["sources"]["files"][split]["docs"] for split in ("train", "val")) == 20


def test_a_source_that_changes_is_refused(families):
    class Growing(Texts):
        def docs(self):
            self.reads["n"] += 1
            yield from (
                Doc(text, text, "x") for text in self.texts[: 9 + self.step * self.reads["n"]]
            )

    for step in (1, -1):
        Growing.step = step
        source = Growing(families, name=f"grows{step}", reads=Counter())
        with pytest.raises(ValueError, match=f"gave {9 + step} documents.*the same ones each time"):
            run(alone(source, MinHash()))


def test_what_cannot_be_wrapped_is_refused(families):
    texts = Texts(families)
    with pytest.raises(ValueError, match="put the wrapper inside"):
        Deduplicated(WithFim(PydocTopics()), (MinHash(),))
    with pytest.raises(ValueError, match="must all be different"):
        deduplicated(((texts, 0.5), (texts, 0.5)), MinHash())
    with pytest.raises(ValueError, match="is not among"):
        Deduplicated(texts, (MinHash(),), among=(PydocTopics(),))
    with pytest.raises(ValueError, match=r"rules are \['minhash', 'minhash'\]"):
        alone(texts, MinHash(), MinHash(seed=1))
    with pytest.raises(ValueError, match="there are no rules"):
        alone(texts)
    assert alone(texts, MinHash()).version() != texts.version()


def without_repeats(docs, unit, least):
    """(id, text) without long units that an earlier document has, in the naive way."""
    seen, found = set(), []
    for text in docs:
        parts = []
        for part in text.split(unit):
            key = " ".join(part.split())
            if len(key) < least or key not in seen:
                parts.append(part)
            if len(key) >= least:
                seen.add(key)
        found.append(unit.join(parts))
    return found


@given(st.lists(st.lists(st.sampled_from("abc "), max_size=5), max_size=6), st.integers(1, 2))
def test_repeats_are_cut_from_all_but_the_first_in_rank(docs, least):
    texts = tuple(dict.fromkeys("\n".join(lines) for lines in docs))
    rule = Repeats(unit="\n", min_chars=least, keep=Best("place"))
    meta = tuple({"place": str(-at)} for at in range(len(texts)))
    source = Texts(texts, meta=meta)
    wanted = without_repeats(texts, "\n", least)
    kept, counts = run(alone(source, rule))
    gone = [
        before != after and not after.strip() for before, after in zip(texts, wanted, strict=True)
    ]
    assert kept == [text for text, goes in zip(wanted, gone, strict=True) if not goes]
    assert counts.get("repeated_lines_emptied", 0) == sum(gone)
    backwards = Texts(texts[::-1], meta=meta[::-1])
    assert run(alone(backwards, rule))[0] == kept[::-1]


def test_repeats_say_what_they_cut():
    texts = tuple(
        "\n\n".join((LINE * 2 + "1", f"short {at}", LINE * 2 + str(at))) for at in range(3)
    )
    kept, counts = run(alone(Texts(texts), Repeats()))
    assert counts["repeated_paragraphs_units"] == 6 and counts["repeated_paragraphs_units_cut"] == 3
    assert "\n\n".join(kept).count(LINE * 2 + "1") == 1
    assert [f"short {at}" in text for at, text in enumerate(kept)] == [True] * 3
    with pytest.raises(ValueError, match="unit is empty"):
        Repeats(unit="")


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_joining_many_pairs_at_once_is_joining_them_one_by_one(n, pairs):
    pairs = [(a % n, b % n) for a, b in pairs]
    group = list(range(n))
    for a, b in pairs:
        low, high = sorted((group[a], group[b]))
        group = [low if g == high else g for g in group]
    a_E, b_E = np.array(pairs, np.int64).reshape(-1, 2).T
    assert join_groups(np.arange(n), a_E, b_E).tolist() == group
    half = len(pairs) // 2
    root_N = join_groups(np.arange(n), a_E[:half], b_E[:half])
    assert join_groups(root_N, a_E[half:], b_E[half:]).tolist() == group


def test_ranks_go_by_the_first_key_then_the_next():
    assert ranked(np.array([1, 0, 1, 0]), np.array([5, 7, 3, 7])).tolist() == [3, 0, 2, 1]
