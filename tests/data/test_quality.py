"""Laws of quality: ranks alone decide, the best scorer counts, epochs are what was asked for."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.data.languages import NaturalLanguage
from glm45_jax.data.prepare import Data, data_fingerprint
from glm45_jax.data.quality import (
    NEMOTRON_LEVELS,
    Group,
    Leveled,
    Percentiles,
    Quality,
    Thresholds,
    copies_of,
    repeated,
)
from glm45_jax.data.scorers import (
    Characters,
    Explains,
    Learned,
    Saved,
    Words,
    area_under_curve,
    chosen,
    fit,
    save,
)
from glm45_jax.data.sources import Doc, DroppedError, PydocTopics
from glm45_jax.values import from_json, override, to_json
from tests.data.common import run

TOPICS = "rivers engines bread stars music glass bees trees law maps clocks wool".split()
TEACH = (
    "The study of {0} is useful because it explains how {1} work. For example, when {0} change,"
    " we see that {1} follow, and therefore the two are related. This means that you can predict"
    " one of them if you know the other. In general, {0} are described by simple rules."
)
NOISE = (
    "BUY {0} NOW!!! $19.99 | {1} -50% | click here >> login / register / cart (0) * * *\n"
    "2024-03-01 12:00:01 INFO {0}={1} id=8f3a2b9c /var/log/{0}.log 404 0x7f\n"
)


def text(template, number):
    """One of many different texts of a kind."""
    pair = TOPICS[number % 12], TOPICS[(number // 12 + number) % 12]
    return "\n".join(template.format(*pair) for _ in range(number % 3 + 1)) + f"\n{number}"


@dataclass(frozen=True)
class Made:
    """Documents made here; `changed` gives others on every reading."""

    template: str = TEACH
    n: int = 120
    name: str = "made"
    mixed: bool = False  # every third document is noise
    changed: bool = False
    readings: list[int] = field(default_factory=list, compare=False, repr=False)

    def docs(self):
        self.readings.append(1)
        for i in range(self.n):
            template = NOISE if self.mixed and i % 3 == 0 else self.template
            id_ = f"{i}/{len(self.readings)}" if self.changed else f"{i:04d}"
            yield Doc(id_, text(template, i), self.name, {"path": f"{id_}.txt"})
        return {"made": self.n}

    def version(self):
        return f"{self.template[:4]} {self.n} {self.mixed}"


@dataclass(frozen=True)
class Given:
    """A scorer that reads the score from the text, for laws about what follows from scores."""

    place: int = 0
    power: float = 1.0

    def classifier(self):
        return self

    def score(self, text):
        return float(text.split()[self.place]) ** self.power

    def version(self):
        return "given"


@dataclass(frozen=True)
class Scored:
    """A document for each row of scores, written into its text."""

    rows: tuple[tuple[float, ...], ...]
    name: str = "scored"

    def docs(self):
        for i, row in enumerate(self.rows):
            yield Doc(f"{i:05d}", " ".join(map(repr, row)), self.name, {"path": "a/b.txt"})

    def version(self):
        return ""


TWO = (
    Learned((Made(n=60),), (Made(NOISE, 60, "noise"),), Words(bits=12)),
    Learned((Made(n=60),), (Made(NOISE, 60, "noise"),), Explains()),
)
scores = st.lists(
    st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)), min_size=2, max_size=60, unique=True
).filter(lambda rows: all(len(set(column)) > 1 for column in zip(*rows, strict=True)))


@pytest.mark.parametrize("features", [Words(bits=12), Characters(bits=14), Explains()], ids=repr)
def test_a_classifier_tells_apart_what_it_has_not_seen_and_is_trained_the_same_twice(features):
    recipe = Learned((Made(n=90),), (Made(NOISE, 60, "noise"),), features)
    first, second = recipe.classifier(), recipe.classifier()
    assert first.bias == second.bias and (first.weights_V == second.weights_V).all()
    good = [first.score(text(TEACH, i)) for i in range(200, 250)]
    bad = [first.score(text(NOISE, i)) for i in range(200, 250)]
    assert area_under_curve(good, bad) > 0.99
    assert all(0 <= score <= 1 for score in [*good, *bad])
    for strange in ("", " \n", "\0", "\ud800", "日本語", "a" * 50_000):
        assert 0 <= first.score(strange) <= 1


def test_words_are_counted_whatever_stands_between_them():
    one, other = (Words(n=1, bits=20).of(t) for t in ("The cat, the dog.", "dog\nTHE (cat) the"))
    assert one.index_N.tolist() == other.index_N.tolist() and len(one.index_N) == 3
    assert one.value_N.tolist() == other.value_N.tolist()
    assert math.isclose(float((one.value_N**2).sum()), 1, rel_tol=1e-6)
    pairs = [set(Words(n=2, bits=20).of(t).index_N.tolist()) for t in ("a b c", "b c a")]
    assert len(pairs[0] & pairs[1]) == 4 and len(pairs[0]) == 5  # a, b, c and "b c" of both
    assert len(Words(bits=20).of("").index_N) == 0
    assert len(Characters(1, 2, bits=20).of("abab").index_N) == 4  # a, b, ab, ba


def test_the_same_features_come_out_in_another_process():
    """Golden: a saved classifier is worthless where words hash otherwise."""
    assert Words(bits=16).of("Hash these words").index_N.tolist() == [
        16350,
        32248,
        51327,
        58631,
        60094,
    ]
    characters = Characters(1, 3, bits=16).of("日本語")
    assert characters.index_N.tolist() == [11856, 14957, 30289, 35996, 41263, 64132]


def test_a_saved_classifier_scores_the_same_and_only_under_its_hash(tmp_path):
    trained = TWO[0].classifier()
    saved = save(trained, tmp_path / "a.safetensors")
    assert save(TWO[0].classifier(), tmp_path / "b.safetensors").sha256 == saved.sha256
    texts = [text(template, i) for template in (TEACH, NOISE) for i in range(20)]
    loaded = saved.classifier()
    assert [loaded.score(t) for t in texts] == [trained.score(t) for t in texts]
    damaged = bytearray((tmp_path / "a.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "a.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match="another classifier, or damaged"):
        saved.classifier()


def test_training_documents_are_chosen_by_hash_whatever_their_order():
    class Backwards(Made):
        def docs(self):
            yield from reversed(list(super().docs()))

    some = [doc.id for doc in chosen((Made(),), 20)]
    assert len(some) == 20 and some == [doc.id for doc in chosen((Backwards(),), 20)]
    assert some == [doc.id for doc in chosen((Made(),), 30)][:20]
    assert some != [doc.id for doc in chosen((Made(),), 20, seed=1)]
    with pytest.raises(ValueError, match="0 good and 1 bad texts"):
        fit(Words(), [], ["a"])


def test_area_under_the_curve_is_the_share_of_pairs_in_order():
    assert area_under_curve([3, 2], [1, 0]) == 1 and area_under_curve([0], [1]) == 0
    assert area_under_curve([1, 1], [1]) == 0.5
    assert area_under_curve([0.2, 0.9], [0.1, 0.5]) == 0.75


@given(scores, st.sampled_from([0.3, 2.0, 5.0]), st.integers(1, 25))
def test_a_rising_map_of_a_scorer_changes_no_bucket(rows, power, buckets):
    cut = Percentiles(levels=(0,) * buckets)
    mapped = [(a**power, 7 * b - 1) for a, b in rows]
    if any(
        len(set(column)) < len(set(old))
        for column, old in zip(zip(*mapped, strict=True), zip(*rows, strict=True), strict=True)
    ):
        return  # rounding made two scores one
    before, after = cut.measured(rows), cut.measured(mapped)
    assert [before.bucket(row) for row in rows] == [after.bucket(row) for row in mapped]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=300, unique=True), st.integers(1, 25))
def test_buckets_of_one_scorer_are_of_equal_size(column, buckets):
    rows = [(score,) for score in column]
    cut = Percentiles(levels=(0,) * buckets).measured(rows)
    sizes = Counter(cut.bucket(row) for row in rows)
    whole = len(rows) / buckets
    assert all(math.floor(whole) <= sizes[b] <= math.ceil(whole) for b in range(buckets))
    ordered = [cut.bucket(row) for row in sorted(rows)]
    assert ordered == sorted(ordered)


@given(scores, st.data())
def test_the_ensemble_is_the_maximum_and_never_falls_when_a_score_rises(rows, data):
    cut = Percentiles(levels=(0,) * 20).measured(rows)
    alone = [Percentiles(levels=(0,) * 20).measured([(row[s],) for row in rows]) for s in range(2)]
    for row in rows:
        assert cut.bucket(row) == max(alone[s].bucket((row[s],)) for s in range(2))
    row = data.draw(st.sampled_from(rows))
    higher = tuple(score + data.draw(st.floats(0, 1)) for score in row)
    assert cut.bucket(higher) >= cut.bucket(row)


def test_equal_scores_share_their_lowest_bucket():
    rows = [(0.5,)] * 6 + [(0.6,)] * 3 + [(0.9,)]
    cut = Percentiles(levels=(0,) * 10).measured(rows)
    assert [cut.bucket(row) for row in ((0.5,), (0.6,), (0.9,), (0.0,), (1.0,))] == [0, 6, 9, 0, 9]
    with pytest.raises(ValueError, match="gives each of 3 documents the score"):
        Percentiles().measured([(0.5,)] * 3)


def test_thresholds_are_the_first_scores_of_their_level():
    cut = Thresholds((0.3, 0.7))
    assert [cut.bucket((s, 0.1)) for s in (0.0, 0.29, 0.3, 0.69, 0.7, 1.0)] == [0, 0, 1, 1, 2, 2]


def test_values_that_make_no_sense_are_refused():
    for make, words in (
        (lambda: Percentiles(levels=(0, 2)), "without a gap"),
        (lambda: Percentiles(levels=()), "without a gap"),
        (lambda: Percentiles(levels=(0, 1), edges=((0.5, 0.6),)), "2 edges for 2 buckets"),
        (lambda: Percentiles(levels=(0, 1, 1), edges=((0.6, 0.5),)), "rising"),
        (lambda: Percentiles().bucket((0.5,)), "0 rows of edges for 1 score"),
        (lambda: Thresholds((0.7, 0.3)), "do not rise"),
        (lambda: Quality(()), "scorers is empty"),
        (lambda: Quality(TWO, epochs=(1.0,)), "1 epochs for 5 levels"),
        (lambda: Quality(TWO, epochs=(0.0, 1.0, 1.0, 1.0, math.inf)), "numbers from 0 on"),
        (lambda: Leveled(Made(), (("a", Quality(TWO)),) * 2), "each one quality"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_the_defaults_are_what_the_report_states():
    quality = Quality(TWO)
    assert len(NEMOTRON_LEVELS) == 20 and max(NEMOTRON_LEVELS) == 4
    assert quality.epochs[0] == 0 and quality.epochs[-1] > 3.2
    assert list(quality.epochs) == sorted(quality.epochs)


def marked(n, epochs):
    return [Doc(f"{i}", f"text {i}", "s", {"epochs": repr(epochs)}) for i in range(n)]


@pytest.mark.parametrize("epochs", [0.0, 0.25, 1.0, 2.0, 3.3])
def test_expected_copies_are_the_epochs_asked_for(epochs):
    n = 4000
    copies = [copies_of(doc) for doc in marked(n, epochs)]
    fraction = epochs % 1
    error = math.sqrt(fraction * (1 - fraction) / n)
    assert abs(sum(copies) / n - epochs) <= 4 * error
    assert set(copies) <= {math.floor(epochs), math.ceil(epochs)}


@given(st.floats(0, 5), st.floats(0, 5), st.text(max_size=5))
def test_more_epochs_are_never_fewer_copies(a, b, name):
    doc = Doc(name, "text", "s")
    fewer, more = (copies_of(replace(doc, meta={"epochs": repr(e)})) for e in sorted((a, b)))
    assert fewer <= more and copies_of(doc) == 1


def test_copies_do_not_depend_on_the_order_and_lie_apart():
    docs = marked(300, 2.5)
    found = Counter(doc.id for doc in repeated(docs))
    assert found == Counter(doc.id for doc in repeated(docs[::-1]))
    assert found != Counter(doc.id for doc in repeated(docs, seed=1))
    order = [doc.id for doc in repeated(docs)]
    assert order[:300] == [doc.id for doc in docs]  # as they were, then the rounds
    assert sorted(order[300:600]) == sorted(order[:300]) != order[300:600]
    assert [doc.meta.get("copy", "0") for doc in repeated(docs)] == sorted(
        doc.meta.get("copy", "0") for doc in repeated(docs)
    )
    plain = [Doc(f"{i}", "text", "s") for i in range(5)]
    assert repeated(plain) == plain and repeated([]) == []
    for text in ("-1", "nan", "inf", "many"):
        with pytest.raises(ValueError, match="use 0 or more"):
            copies_of(Doc("a", "text", "s", {"epochs": text}))


def test_a_leveled_source_counts_every_document_and_says_what_it_earned():
    source = Made(mixed=True)
    docs, counts = run(Leveled(source, Quality(TWO)))
    assert counts["made"] == counts["quality_in"] == source.n
    assert len(docs) == counts["quality_kept"] == source.n - counts["quality_level_0_docs"]
    assert counts["quality_dropped_level"] == counts["quality_level_0_docs"] > 0
    assert sum(counts.get(f"quality_bucket_{b:02d}_docs", 0) for b in range(20)) == source.n
    epochs_of = dict(enumerate(Quality(TWO).epochs))
    for level in range(1, 5):
        here = [doc for doc in docs if doc.meta["level"] == str(level)]
        chars = sum(len(doc.text) for doc in here)
        assert counts[f"quality_level_{level}_docs"] == len(here) > 0
        assert counts[f"quality_level_{level}_chars"] == chars
        expected = chars * epochs_of[level]
        assert abs(counts[f"quality_level_{level}_epoch_chars"] - expected) <= 0.5
        assert {float(doc.meta["epochs"]) for doc in here} == {epochs_of[level]}
        assert all(NEMOTRON_LEVELS[int(doc.meta["bucket"])] == level for doc in here)
    noise = {f"{i:04d}" for i in range(0, source.n, 3)}
    assert not {doc.id for doc in docs if doc.meta["level"] == "4"} & noise
    assert docs == run(Leveled(source, Quality(TWO)))[0]
    by_id = {doc.id: doc for doc in source.docs()}
    assert all(doc.text == by_id[doc.id].text and doc.source == "made" for doc in docs)


def test_edges_measured_once_level_every_shard_alike():
    rows = tuple((i / 100 + 0.001, ((i * 37) % 100) / 100) for i in range(100))
    whole = Leveled(Scored(rows), Quality((Given(0), Given(1))))
    fixed = whole.measured()
    levels = {doc.id: doc.meta["level"] for doc in whole.docs()}
    shards = [replace(fixed, source=Scored(rows[i::2])) for i in range(2)]
    assert {doc.text: doc.meta["level"] for doc in whole.docs()} == {
        doc.text: doc.meta["level"] for shard in shards for doc in shard.docs()
    }
    assert {doc.id: doc.meta["level"] for doc in fixed.docs()} == levels
    source = Made(mixed=True)
    run(Leveled(source, Quality(TWO)))
    assert len(source.readings) == 2  # to rank, to hand on
    fixed = Leveled(source, Quality(TWO)).measured()
    source.readings.clear()
    run(fixed)
    assert len(source.readings) == 1


def test_epochs_of_wrappers_multiply_before_one_decision():
    rows = tuple((i / 1000,) for i in range(1000))
    half = Quality((Given(),), cut=Thresholds((0.5,)), epochs=(0.5, 0.5))
    twice = Quality((Given(),), cut=Thresholds((0.5,)), epochs=(2.0, 4.0))
    docs, _ = run(Leveled(Leveled(Scored(rows), half), twice))
    assert {doc.meta["epochs"] for doc in docs} == {"1.0", "2.0"}
    assert [copies_of(doc) for doc in docs] == [1] * 500 + [2] * 500


@dataclass(frozen=True)
class Halves:
    """Even documents, odd ones, and every tenth in no group."""

    def of(self, doc):
        if int(doc.id) % 10 == 9:
            raise DroppedError("ninth")
        return Group("even" if int(doc.id) % 2 == 0 else "odd", {"half": doc.id[-1]})

    def version(self):
        return "halves"


def test_groups_have_their_own_percentiles_and_tables():
    rows = tuple((i / 200 / (1 + i % 2),) for i in range(200))  # the odd ones score half
    tiers = Quality((Given(),), Percentiles(levels=(0, 1, 2, 2)), (0.0, 1.0, 2.0))
    docs, counts = run(Leveled(Scored(rows), tiers, Halves()))
    assert counts["quality_dropped_ninth"] == 20
    for half, n in (("even", 100), ("odd", 80)):
        assert [counts[f"quality_{half}_level_{level}_docs"] for level in range(3)] == [
            n // 4,
            n // 4,
            n // 2,
        ]
    assert all(doc.meta["half"] == doc.id[-1] for doc in docs)
    one, counts = run(Leveled(Scored(rows), (("even", tiers),), Halves()))
    assert counts["quality_dropped_group_odd"] == 80
    assert one == [doc for doc in docs if int(doc.id) % 2 == 0]


def test_a_source_that_changes_between_readings_is_refused():
    with pytest.raises(ValueError, match="must give the same documents every time"):
        run(Leveled(Made(mixed=True, changed=True), Quality(TWO)))


def test_whatever_changes_the_epochs_changes_the_fingerprint():
    def printed(leveled):
        return data_fingerprint(Data(sources=((leveled, 1.0),)))

    one = Leveled(Made(), Quality(TWO))
    assert printed(one) == printed(Leveled(Made(), Quality(TWO)))
    other_scorer = (replace(TWO[0], good=(Made(n=61),)), TWO[1])
    others = [
        Made(),
        replace(one, quality=Quality(TWO[:1])),
        replace(one, quality=Quality(other_scorer)),
        replace(one, quality=Quality(TWO, epochs=(0.0, 1.0, 1.0, 1.0, 3.3))),
        replace(one, groups=Halves()),
        one.measured(),
    ]
    assert len({printed(each) for each in (one, *others)}) == len(others) + 1


def test_a_leveled_source_is_a_value_that_goes_to_json_and_takes_overrides():
    recipe = Learned((PydocTopics(),), (PydocTopics(name="other"),), Words(n=1))
    tiers = Quality((recipe,), Thresholds(), (0.0, 1.0, 2.0))
    for quality in (Quality((recipe,)), (("en", tiers), ("de", tiers))):
        value = Leveled(PydocTopics(), quality, NaturalLanguage(folder=1))
        assert from_json(json.loads(json.dumps(to_json(value)))) == value
    value = Leveled(PydocTopics(), Quality((recipe, Saved("a", "b"))))
    assert override(value, "quality.epochs=(0,1,1,1,4.5)").quality.epochs[-1] == 4.5
    assert override(value, "quality.scorers.0.max_docs=5").quality.scorers[0].max_docs == 5


def test_a_source_that_encodes_is_refused():
    class Encoding(Made):
        def encode(self, docs, tokenizer):
            return []

    with pytest.raises(ValueError, match="put Leveled inside"):
        Leveled(Encoding(), Quality(TWO))
