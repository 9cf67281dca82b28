"""Laws of MinHash: minima are equal as often as sets are alike, and groups are what bands join."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm45_jax.data.dedup import Longest
from glm45_jax.data.minhash import MinHash, chance_of_equal_band, jaccard
from glm45_jax.data.sources import Doc
from tests.data.test_dedup import Texts, alone, run, words

# Each word a shingle, so that similarities can be planted exactly.
SINGLE = MinHash(ngram=1)


def pairs_of(similarity, n, seed=0):
    """n pairs of texts, each of 60 different words in all, with that Jaccard similarity."""
    shared = round(60 * similarity)
    for at in range(n):
        each = words((seed, at)).split()
        cut = shared + (60 - shared) // 2
        yield " ".join(each[:cut]), " ".join(each[:shared] + each[cut:])


def grams(text, n=5):
    """The set of word n-grams, in plain Python."""
    each = text.split()
    return {tuple(each[at : at + n]) for at in range(max(1, len(each) - n + 1))} if each else set()


def plain_jaccard(a, b):
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def groups(rule, texts):
    """The sets of places that the rule joins."""
    found = rule.find(lambda: ((0, Doc(str(at), text, "x")) for at, text in enumerate(texts)))
    members = {}
    for at, best in enumerate(found.instead_N.tolist()):
        members.setdefault(best, set()).add(at)
    return {frozenset(group) for group in members.values()}


def components(n, joined):
    """Connected components of n places, the naive way."""
    group = list(range(n))
    for a, b in joined:
        low, high = sorted((group[a], group[b]))
        group = [low if g == high else g for g in group]
    return {frozenset(at for at in range(n) if group[at] == g) for g in group}


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_minima_are_equal_as_often_as_the_sets_are_alike(similarity):
    a, b = zip(*pairs_of(similarity, 200), strict=True)
    equal = SINGLE.minima(SINGLE.ngrams(a)) == SINGLE.minima(SINGLE.ngrams(b))
    # 200 x 112 draws: unbiased, and as scattered as independent ones within a pair.
    assert abs(equal.mean() - similarity) < 5 * (similarity * (1 - similarity) / equal.size) ** 0.5
    spread = equal.mean(axis=0).std() / (similarity * (1 - similarity) / 112) ** 0.5
    assert 0.8 < spread < 1.2


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_pairs_with_the_chance_of_the_formula(similarity):
    a, b = zip(*pairs_of(similarity, 400, seed=1), strict=True)
    equal = SINGLE.band_keys(SINGLE.ngrams(a)) == SINGLE.band_keys(SINGLE.ngrams(b))
    chance = chance_of_equal_band(similarity, 14, 8)
    assert abs(equal.any(axis=1).mean() - chance) < 5 * (chance * (1 - chance) / 400) ** 0.5 + 0.01


def test_the_chance_at_its_ends_and_at_fineweb_s_numbers():
    assert chance_of_equal_band(0, 14, 8) == 0 and chance_of_equal_band(1, 14, 8) == 1
    # FineWeb, section 3.4: 77 % at a similarity of 0.75, 92 % at 0.8, 56 % at 0.7.
    assert [round(100 * chance_of_equal_band(s, 14, 8)) for s in (0.7, 0.75, 0.8)] == [56, 77, 92]


@given(st.lists(st.text("ab ", max_size=12), max_size=8), st.integers(1, 3))
def test_only_the_set_of_ngrams_matters_and_equal_bands_are_joined(texts, n):
    rule = MinHash(ngram=n, bands=3, rows=2)
    key_NA = rule.band_keys(rule.ngrams(texts))
    sets = [grams(text, n) for text in texts]
    joined = []
    for a, b in combinations(range(len(texts)), 2):
        if sets[a] and sets[b]:
            if sets[a] == sets[b]:
                assert np.array_equal(key_NA[a], key_NA[b])
            if (key_NA[a] == key_NA[b]).any():
                joined.append((a, b))
    assert groups(rule, texts) == components(len(texts), joined)


def test_verified_groups_are_those_of_the_exact_similarity():
    key = np.random.default_rng(0)
    texts = []
    for family in range(12):
        each = words(family, 40).split()
        for _ in range(6):
            changed = [
                w if key.random() > 0.02 * family else f"x{key.integers(10**9)}" for w in each
            ]
            texts.append(" ".join(changed))
    # So many bands of one row that no pair of some likeness is missed.
    rule = MinHash(bands=128, rows=1, verify=0.5)
    near = [
        (a, b) for a, b in combinations(range(72), 2) if plain_jaccard(texts[a], texts[b]) >= 0.5
    ]
    assert groups(rule, texts) == components(72, near)
    assert 12 < len(groups(rule, texts)) < 72
    assert len(groups(MinHash(bands=128, rows=1), texts)) < len(groups(rule, texts))


@given(st.sets(st.integers(0, 20), min_size=1), st.sets(st.integers(0, 20), min_size=1))
def test_jaccard_is_that_of_sets(a, b):
    found = jaccard(np.array(sorted(a), np.uint64), np.array(sorted(b), np.uint64))
    assert found == len(a & b) / len(a | b)


def test_texts_are_alike_whatever_case_and_punctuation():
    same = (
        "It is — truly — one text, of ten words in all.",
        "it is truly one text of TEN words in all",
    )
    assert groups(MinHash(), (*same, "another one")) == {frozenset({0, 1}), frozenset({2})}


@pytest.mark.parametrize("verify", [None, 0.7])
def test_odd_documents_are_counted_and_stay(verify):
    odd = ("", " \n", "...", "\ud800 lone surrogates \udfff", "one", "two words")
    kept, counts = run(alone(Texts((*odd, "One!", "two, words")), MinHash(verify=verify)))
    assert kept == [*odd[:4], "One!", "two, words"]
    assert counts["minhash_without_words"] == 3 and counts["minhash_clusters"] == 2
    nothing, counts = run(alone(Texts(()), MinHash(verify=verify)))
    assert nothing == [] and counts["minhash_docs_in"] == counts["minhash_largest_cluster"] == 0


def test_fifty_megabytes_on_one_line():
    line = words(0, 400_000) + " "
    whole = line * (50_000_000 // len(line))
    one_word = "x" * 50_000_000
    texts = (whole, whole + "end", one_word, "no other")
    assert groups(MinHash(), texts) == {frozenset({0, 1}), frozenset({2}), frozenset({3})}


def test_a_template_with_a_filling_in_every_five_words_survives():
    frame = (
        "welcome to {} our rooms are {} and staff is {} we serve {} until late {} come soon".split()
    )
    texts = [" ".join(frame).replace("{}", "{0}{1}").format("slot", at) for at in range(30)]
    assert len(groups(MinHash(), texts)) == 30


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bands": 0}, "bands 0 is not in 1 to 1024"),
        ({"ngram": 0}, "ngram 0"),
        ({"verify": 0.0}, r"verify 0\.0 is a Jaccard"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MinHash(**fields)


def test_another_seed_draws_other_permutations():
    ngrams = SINGLE.ngrams([words(0)])
    assert not np.array_equal(SINGLE.minima(ngrams), MinHash(ngram=1, seed=1).minima(ngrams))
    assert MinHash().keep == Longest()
