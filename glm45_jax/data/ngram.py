"""N-gram baselines in nats a token: what a language model must beat to have learnt context.

Unigram with add-one smoothing, bigram with interpolated Kneser-Ney smoothing. Numpy only.
Letters: `N` tokens or pairs, `V` vocab.
Source: Kneser and Ney 1995; Chen and Goodman 1998 (interpolated form, discount from counts).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from glm45_jax.data.store import TokenStore


def losses(stores: Iterable[TokenStore], rows_BT1: np.ndarray, vocab: int) -> dict[str, float]:
    """Nats a token of both models, fitted on all tokens of the stores, on the rows' targets."""
    train = np.concatenate([store.read(0, store.manifest.n_tokens) for store in stores])
    return {
        "unigram": float(unigram_nats(train, rows_BT1, vocab)),
        "bigram": float(bigram_nats(train, rows_BT1, vocab)),
    }


@dataclass(frozen=True)
class Bigram:
    """A bigram model: p(next | prev) from discounted counts and a smoothed unigram below them."""

    vocab: int
    pair_N: np.ndarray  # prev * vocab + next of every pair seen, sorted
    count_N: np.ndarray  # float64, minus the discount
    total_V: np.ndarray  # how often each id was followed by something
    spare_V: np.ndarray  # probability mass that the discount freed, 1 for an unseen prev
    lower_V: np.ndarray  # p(next) by in how many contexts it was seen

    def log_prob(self, prev_N: np.ndarray, next_N: np.ndarray) -> np.ndarray:
        """Natural log of p(next | prev), float64, any (equal) shape."""
        key_N = np.asarray(prev_N, np.int64) * self.vocab + next_N
        at_N = np.minimum(np.searchsorted(self.pair_N, key_N), len(self.pair_N) - 1)
        seen_N = np.where(self.pair_N[at_N] == key_N, self.count_N[at_N], 0.0)
        total_N = np.maximum(self.total_V[prev_N], 1)
        return np.log(seen_N / total_N + self.spare_V[prev_N] * self.lower_V[next_N])


def fit_bigram(train_tokens: np.ndarray, vocab: int) -> Bigram:
    """The interpolated Kneser-Ney bigram of one stream of tokens.

    Raises: ValueError for fewer than two tokens or ids outside the vocabulary.
    """
    token_N = _stream(train_tokens, vocab)
    pair_N, count_N = np.unique(token_N[:-1] * vocab + token_N[1:], return_counts=True)
    prev_N, next_N = np.divmod(pair_N, vocab)
    discount = _discount(count_N)
    total_V = np.bincount(token_N[:-1], minlength=vocab)
    kinds_V = np.bincount(prev_N, minlength=vocab)
    seen_V = total_V > 0
    return Bigram(
        vocab=vocab,
        pair_N=pair_N,
        count_N=count_N - discount,
        total_V=total_V,
        spare_V=np.where(seen_V, discount * kinds_V / np.maximum(total_V, 1), 1.0),
        lower_V=_continuation(np.bincount(next_N, minlength=vocab)),
    )


def unigram_nats(train_tokens: np.ndarray, val_tokens: np.ndarray, vocab: int) -> float:
    """Mean nats a token of the add-one unigram, on the targets that `bigram_nats` takes."""
    count_V = np.bincount(_stream(train_tokens, vocab), minlength=vocab) + 1
    _, next_N = _pairs(val_tokens, vocab)
    return float(-np.log(count_V / count_V.sum())[next_N].mean())


def bigram_nats(train_tokens: np.ndarray, val_tokens: np.ndarray, vocab: int) -> float:
    """Mean nats a token of the Kneser-Ney bigram on validation tokens.

    val_tokens: one stream, or [N, T] windows; the first token of each is context only, so [N, T+1]
    windows give exactly the targets of a model that reads T tokens.
    """
    prev_N, next_N = _pairs(val_tokens, vocab)
    return float(-fit_bigram(train_tokens, vocab).log_prob(prev_N, next_N).mean())


def _continuation(contexts_V: np.ndarray) -> np.ndarray:
    """p(next) from numbers of contexts, discounted in favour of a uniform share; sums to 1."""
    discount = _discount(contexts_V[contexts_V > 0])
    total = contexts_V.sum()
    spare = discount * np.count_nonzero(contexts_V) / total
    return np.maximum(contexts_V - discount, 0) / total + spare / len(contexts_V)


def _discount(count_N: np.ndarray) -> float:
    once, twice = int((count_N == 1).sum()), int((count_N == 2).sum())
    # With no singleton the estimate is 0, and an unseen pair would cost infinitely much.
    return max(once, 0.5) / max(once + 2 * twice, 1)


def _stream(tokens: np.ndarray, vocab: int) -> np.ndarray:
    token_N = np.asarray(tokens).astype(np.int64)
    if token_N.ndim != 1 or len(token_N) < 2:
        raise ValueError(f"training tokens have shape {token_N.shape}; give one stream of >= 2")
    _check_ids(token_N, vocab)
    return token_N


def _pairs(tokens: np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    windows = np.atleast_2d(np.asarray(tokens)).astype(np.int64)
    if windows.shape[1] < 2:
        raise ValueError(f"validation tokens have shape {windows.shape}; windows need >= 2 tokens")
    _check_ids(windows, vocab)
    return windows[:, :-1].ravel(), windows[:, 1:].ravel()


def _check_ids(tokens: np.ndarray, vocab: int) -> None:
    if not 0 <= tokens.min() <= tokens.max() < vocab:
        raise ValueError(
            f"ids {tokens.min()}..{tokens.max()} are outside vocab {vocab}; give the vocab of the "
            "tokenizer that made them"
        )
