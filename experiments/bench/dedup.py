"""How well and how fast duplicates are found: `python -m experiments.bench.dedup OLD NEW`.

OLD and NEW are folders with two versions of the same files, say the standard libraries of two
Pythons. Planted near-duplicates (words of real files edited at several rates) and the real pairs
between the folders are found by bands of minima, beside the formula and, if it is installed, by
datasketch in the same run. Writes experiments/bench/results/<device>.json under the key "dedup".
"""

import argparse
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.results import cpu_name, merge_result
from glm45_jax.data.decontaminate import Overlap, index_of
from glm45_jax.data.dedup import BATCH_CHARS, Deduplicated, Found
from glm45_jax.data.embed import Lexical
from glm45_jax.data.minhash import MinHash, chance_of_equal_band, jaccard
from glm45_jax.data.semdedup import SemDedup, kmeans, nearest_earlier
from glm45_jax.data.shingles import hash_ngrams, hash_words, in_batches
from glm45_jax.data.sources import Doc, TextFiles, counted

RULE = MinHash()
RATES = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.09, 0.14)  # of the words
BINS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0001)
PLANTED_WORDS = (300, 1500)  # shorter files are left out, longer ones cut
PEER_BYTES = 4_000_000  # what datasketch is timed on: it is slow
FRAME = (
    "the hotel in the old town of {} is open all the year for families and {} "
    "all of our large bright rooms have {} and a view of the famous {} "
    "you can walk to the sandy beach in {} minutes and the bus to the {} stops at our door "
    "we serve a breakfast with fresh {} from seven to half past ten at the {} bar "
    "guests who stay for a week get free {} parking and two bicycles to explore the {} hills "
)


def read_both(old: Path, new: Path, pattern: str, most: int) -> tuple[list[str], list[str]]:
    """Texts of the files that are in both folders, `most` of them, chosen by a hash of the path."""
    old_of, new_of = (
        {doc.id: doc.text for doc in TextFiles(str(folder), pattern).docs()}
        for folder in (old, new)
    )
    paths = sorted(old_of.keys() & new_of.keys())
    path_hash = hash_ngrams(hash_words(paths), 99, whole_if_short=True).hash_W
    chosen = [paths[at] for at in np.argsort(path_hash)[:most]]
    return [old_of[path] for path in chosen], [new_of[path] for path in chosen]


def edited(text: str, rate: float, key: np.random.Generator) -> str:
    """The text with `rate` of its words replaced, dropped or doubled, a third each."""
    words = text.split(" ")
    kinds = np.where(key.random(len(words)) < rate, key.integers(1, 4, len(words)), 0).tolist()
    ways: tuple[Callable[[str], list[str]], ...] = (
        lambda word: [word],
        lambda _: ["replaced"],
        lambda _: [],
        lambda word: [word, word],
    )
    return " ".join(
        new for word, kind in zip(words, kinds, strict=True) for new in ways[kind](word)
    )


def planted(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of an original and its edited copy."""
    key = np.random.default_rng(0)
    least, most = PLANTED_WORDS
    for text in texts:
        words = text.split()
        if len(words) >= least:
            original = " ".join(words[:most])
            for rate in RATES:
                yield original, edited(original, rate, key)


def sets_of(texts: Sequence[str]) -> list[np.ndarray]:
    """The different n-grams of each text, sorted."""
    ngrams = RULE.ngrams(texts)
    return [np.unique(part) for part in np.split(ngrams.hash_W, ngrams.start_N1[1:-1])]


def keys_of(texts: Sequence[str]) -> np.ndarray:
    batches = in_batches(((None, text) for text in texts), BATCH_CHARS)
    return np.concatenate([RULE.band_keys(RULE.ngrams(part)) for _, part in batches])


def table_of_planted(texts: Sequence[str]) -> list[dict[str, Any]]:
    """By true similarity: pairs, how many are found here and by datasketch, and the formula."""
    originals, copies = zip(*planted(texts), strict=True)
    similarity = np.array(
        [jaccard(a, b) for a, b in zip(sets_of(originals), sets_of(copies), strict=True)]
    )
    found = (keys_of(originals) == keys_of(copies)).any(axis=1)
    peer = peer_finds(originals, copies) if find_spec("datasketch") else None
    rows = []
    for low, high in pairwise(BINS):
        here = (low <= similarity) & (similarity < high)
        if here.any():
            chance = [chance_of_equal_band(s, RULE.bands, RULE.rows) for s in similarity[here]]
            shares = {"found": found[here].mean(), "formula": np.mean(chance)}
            shares |= {"datasketch": peer[here].mean()} if peer is not None else {}
            row = {"similarity": [low, min(high, 1.0)], "pairs": int(here.sum())}
            rows.append(row | {name: round(float(share), 4) for name, share in shares.items()})
    return rows


def peer_minhash(text: str) -> Any:
    """datasketch's signature of the same n-grams."""
    from datasketch import MinHash as Peer

    words = re.findall(r"\w+", text.lower())
    grams = {" ".join(words[at : at + 5]).encode() for at in range(max(1, len(words) - 4))}
    sketch = Peer(num_perm=RULE.bands * RULE.rows)
    sketch.update_batch(grams)
    return sketch


def peer_finds(originals: Sequence[str], copies: Sequence[str]) -> np.ndarray:
    """Whether datasketch's LSH, in as many bands, finds each copy by its original."""
    from datasketch import MinHashLSH

    index = MinHashLSH(num_perm=RULE.bands * RULE.rows, params=(RULE.bands, RULE.rows))
    sketch_of = {text: peer_minhash(text) for text in dict.fromkeys(originals)}
    for text, sketch in sketch_of.items():
        index.insert(text, sketch)
    return np.array(
        [
            text in index.query(peer_minhash(copy))
            for text, copy in zip(originals, copies, strict=True)
        ]
    )


def true_pairs(sets: Sequence[np.ndarray]) -> dict[tuple[int, int], float]:
    """Every pair with a similarity of 0.3 and more, by counting common n-grams."""
    from scipy.sparse import csr_matrix

    gram, column = np.unique(np.concatenate(sets), return_inverse=True)
    ends = np.concatenate(([0], np.cumsum([len(one) for one in sets])))
    has = csr_matrix((np.ones(len(column), np.int32), column, ends), (len(sets), len(gram)))
    common = (has @ has.T).tocoo()
    size_N = np.diff(ends)
    union = size_N[common.row] + size_N[common.col] - common.data
    keep = (common.row < common.col) & (common.data >= 0.3 * union)
    places = zip(common.row[keep].tolist(), common.col[keep].tolist(), strict=True)
    return dict(zip(places, (common.data[keep] / union[keep]).tolist(), strict=True))


def real_pairs(texts: Sequence[str]) -> dict[str, Any]:
    """Candidates against all true pairs; and what deduplication leaves and drops wrongly."""
    key_NA, sets = keys_of(texts), sets_of(texts)
    similarity_of = true_pairs(sets)
    candidates = {
        (a, b) for key_N in key_NA.T for a, b in equal_pairs(key_N) if len(sets[a]) and len(sets[b])
    }
    result: dict[str, Any] = {"documents": len(texts), "candidate_pairs": len(candidates)}
    for least in (0.5, 0.7, 0.8, 0.9):
        true = {pair for pair, s in similarity_of.items() if s >= least}
        both = len(true & candidates)
        result[f"at_{least}"] = {
            "true_pairs": len(true),
            "recall": round(both / max(1, len(true)), 4),
            "precision": round(both / max(1, len(candidates)), 4),
        }
    for name, rule in (("joined", RULE), ("verified_0.7", MinHash(verify=0.7))):
        found = found_by(rule, texts)
        gone = np.flatnonzero(~found.stays_N).tolist()
        to_kept = [jaccard(sets[at], sets[found.instead_N[at]]) for at in gone]
        left = {pair for pair, s in similarity_of.items() if s >= 0.8}
        left = {pair for pair in left if found.stays_N[list(pair)].all()}
        result[name] = {"dropped": len(gone), **found.counts}
        result[name] |= {"dropped_below_0.5": sum(s < 0.5 for s in to_kept)}
        result[name] |= {"pairs_left_at_0.8": len(left)}
    return result


def equal_pairs(key_N: np.ndarray) -> Iterator[tuple[int, int]]:
    """All pairs of places with equal keys."""
    order = np.argsort(key_N, kind="stable")
    for bucket in np.split(order, np.flatnonzero(np.diff(key_N[order])) + 1):
        members = bucket.tolist()
        yield from ((a, b) for at, a in enumerate(members) for b in members[at + 1 :])


def found_by(rule: MinHash | SemDedup, texts: Sequence[str]) -> Found:
    return rule.find(lambda: ((0, Doc(str(at), text, "x")) for at, text in enumerate(texts)))


def speeds(texts: Sequence[str]) -> dict[str, Any]:
    """MB of UTF-8 a CPU second, the best of three."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6
    short = [text[at : at + 500] for text in texts[::20] for at in range(0, len(text), 500)]
    short_size = sum(len(text.encode("utf-8", "surrogatepass")) for text in short) / 1e6
    index = index_of(((str(at), text) for at, text in enumerate(texts[:50])), Overlap())
    lexical = Lexical().fit(iter([list(texts)]))

    def each(call: Callable[[list[str]], Any], over: Sequence[str] = texts) -> None:
        for _, part in in_batches(((None, text) for text in over), BATCH_CHARS):
            call(part)

    result = {
        "mb": round(size, 1),
        "words": size / best_of(3, lambda: each(hash_words)),
        "minhash": size / best_of(3, lambda: each(lambda part: RULE.band_keys(RULE.ngrams(part)))),
        "minhash_500_chars": short_size
        / best_of(3, lambda: each(lambda part: RULE.band_keys(RULE.ngrams(part)), short)),
        "minhash_and_groups": size / best_of(3, lambda: found_by(RULE, texts)),
        "decontaminate": size / best_of(3, lambda: each(index.search)),
        "lexical_embedding": size / best_of(3, lambda: each(lexical)),
    }
    if find_spec("datasketch"):
        few, n = [], 0
        for text in texts:
            if n < PEER_BYTES:
                few.append(text)
                n += len(text.encode("utf-8", "surrogatepass"))
        result["datasketch"] = n / 1e6 / best_of(1, lambda: [peer_minhash(text) for text in few])
    return {name: round(value, 2) for name, value in result.items()}


def best_of(times: int, call: Callable[[], Any]) -> float:
    """CPU seconds of the fastest call: all here run in one thread, and other work may go on."""
    seconds = []
    for _ in range(times):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return min(seconds)


def bytes_a_document(n: int = 100_000) -> float:
    """Peak of what `MinHash.find` holds for n documents of twenty words."""
    texts = (" ".join(map(str, range(at, at + 20))) for at in range(0, 20 * n, 20))
    docs = ((0, Doc(str(at), text, "x")) for at, text in enumerate(texts))
    tracemalloc.start()
    RULE.find(lambda: docs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return round(peak / n)


def semdedup_numbers(texts: Sequence[str]) -> dict[str, Any]:
    """Template pages beside real files through both rules, and the time of 20,000 vectors."""
    frame = FRAME.split("{}")
    pages = ["".join(f"{part}p{at}s{slot}" for slot, part in enumerate(frame)) for at in range(200)]
    mixed = [*pages, *texts[:800]]
    by_minhash, by_vector = found_by(RULE, mixed), found_by(SemDedup(), mixed)
    key = np.random.default_rng(0)
    x_ND = key.normal(size=(20_000, 256)).astype(np.float32)
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    started = time.perf_counter()
    _, cluster_N = kmeans(x_ND, 20, 10)
    nearest_earlier(x_ND, cluster_N, np.arange(len(x_ND)))
    return {
        "template_pages": len(pages),
        "pages_left_by_minhash": int(by_minhash.stays_N[: len(pages)].sum()),
        "pages_left_by_semdedup": int(by_vector.stays_N[: len(pages)].sum()),
        "files": len(mixed) - len(pages),
        "files_left_by_minhash": int(by_minhash.stays_N[len(pages) :].sum()),
        "files_left_by_semdedup": int(by_vector.stays_N[len(pages) :].sum()),
        "seconds_20000_vectors_of_256": round(time.perf_counter() - started, 2),
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--pattern", default="**/*.py")
    parser.add_argument("--docs", type=int, default=2500, help="files of each folder")
    args = parser.parse_args()
    old, new = read_both(args.old, args.new, args.pattern, args.docs)
    rows = table_of_planted(new[:600])
    print("similarity    pairs   found  formula  datasketch")
    for row in rows:
        low, high = row["similarity"]
        peer = f"{row['datasketch']:8.3f}" if "datasketch" in row else "       -"
        found = f"{row['found']:.3f}    {row['formula']:.3f}"
        print(f"{low:.2f} to {high:.2f}  {row['pairs']:5d}   {found}{peer}")
    value = {
        "command": "python -m experiments.bench.dedup OLD NEW",
        "planted": rows,
        "real": real_pairs([*old, *new]),
        "mb_per_cpu_s": speeds(new),
        "minhash_bytes_a_document": bytes_a_document(),
        "semdedup": semdedup_numbers(new),
    }
    counts: dict[str, int] = {}
    source = Deduplicated(TextFiles(str(args.new), args.pattern), (RULE,))
    started = time.perf_counter()
    for _ in counted(source, counts):
        pass
    value["whole_folder"] = {"seconds": round(time.perf_counter() - started, 2), **counts}
    for name in ("real", "mb_per_cpu_s", "minhash_bytes_a_document", "semdedup", "whole_folder"):
        print(name, value[name])
    print(f"wrote {merge_result(cpu_name(), 'dedup', value)}")


if __name__ == "__main__":
    main()
