"""Supervised fine-tuning: conversations to stores of ids with masks, and to packed rows.

`Chats` says what to learn from; `prepare` renders, splits and writes once, `rows` packs whole
samples into rows that the loader takes. A store's documents are samples; beside it lies one bit a
token, whether the model writes it. No jax. Source: spec 4.3, 5.3, 7.1.
Letters: `T` tokens of a row, `R` rows read together, `N` samples or tokens of a store.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glm45_jax.chat.template import encode, family_of
from glm45_jax.data.chats import Sample, counted_samples
from glm45_jax.data.pack import BestFit, Cut, Row, RowSource, best_fit
from glm45_jax.data.prepare import (
    SPLITS,
    Data,
    Prepared,
    built,
    digest,
    given_tokenizer,
    open_prepared,
    sample_texts,
    split_by_group,
    write_report,
)
from glm45_jax.data.prepare import prepare as prepare_text
from glm45_jax.data.prepare import rows as text_rows
from glm45_jax.data.reading import LONE
from glm45_jax.data.sources import Doc, Source, counted
from glm45_jax.data.store import write_store
from glm45_jax.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

log = logging.getLogger(__name__)

SFT_FORMAT = 1  # part of every fingerprint: raise it when the same value gives other stores


@dataclass(frozen=True)
class Drop:
    """Samples longer than a row are left out, and counted."""


@dataclass(frozen=True)
class Truncate:
    """Samples longer than a row lose their end, and are counted: the model learns no stop there.
    What has nothing to learn left is dropped.
    """


@dataclass(frozen=True)
class Chats:
    """What an SFT run reads: `prepare.Data` for conversations.

    sources: with their shares of the rows; their documents are conversations (data/chats.py).
    seq_len, long (what becomes of longer samples), weights and packing change without preparing
    again. val_fraction: of the conversations, by hash of their group. max_docs: a source, by hash.
    tokenizer: path of a tokenizer.json; None trains one on the training split. family,
    clear_thinking: of the chat format. direct: of the conversations with reasoning, the share that
    is read without it, in direct mode.
    Whether GLM's own SFT drops or cuts long samples, and its share of direct ones, is UNVERIFIED.
    """

    sources: tuple[tuple[Source, float], ...]
    seq_len: int = 4096
    vocab: int = 2048
    long: Drop | Truncate = Drop()
    packing: Cut | BestFit = field(default_factory=BestFit)
    val_fraction: float = 0.05
    max_docs: int | None = None
    bpe_chars: int = 4_000_000  # of training text that the tokenizer is trained on
    seed: int = 0  # of the split and of the order of conversations
    tokenizer: str | None = None
    family: str = "glm-4.5"
    clear_thinking: bool | None = None
    direct: float = 0.0

    def __post_init__(self):
        names = [source.name for source, _ in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"source names are {names}; give at least one, all different")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction {self.val_fraction} is not between 0 and 1")
        if not 0 <= self.direct <= 1:
            raise ValueError(f"direct {self.direct} is not between 0 and 1; it is a share")
        if self.packing != BestFit():
            raise ValueError(f"packing {self.packing}: conversations are packed by BestFit() alone")
        family_of(self.family)


def prepare(chats: Chats, cache: Path, *, tokenizer: Tokenizer | None = None) -> Prepared:
    """The stores of `chats`, made under `cache` the first time and opened every time.

    tokenizer: use this one instead of training one on the training split.

    Raises: ValueError for a damaged cache, a vocab mismatch, a document that is no conversation, or
    a source with too few of them.
    """
    tokenizer = given_tokenizer(chats.tokenizer, chats.vocab, tokenizer)
    fingerprint = fingerprint_of(chats, tokenizer)
    folder = Path(cache) / f"sft-{fingerprint[:16]}"
    if not folder.exists():
        _build(chats, folder, tokenizer)
    names = [source.name for source, _ in chats.sources]
    return open_prepared(folder, names, chats.vocab, fingerprint)


def fingerprint_of(chats: Chats, tokenizer: Tokenizer | None = None) -> str:
    """sha256 (hex) of all that the stores depend on."""
    limits = (chats.vocab, chats.val_fraction, chats.max_docs, chats.bpe_chars, chats.seed)
    parts = {
        "format": SFT_FORMAT,
        "sources": [[type(s).__name__, repr(s), s.version()] for s, _ in chats.sources],
        "tokenizer": tokenizer.fingerprint if tokenizer else version("tokenizers"),
        "limits": limits,
        "format of chat": [chats.family, chats.clear_thinking, chats.direct],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def rows(chats: Chats, prepared: Prepared, split: str = "train") -> list[tuple[RowSource, float]]:
    """Packed rows of every source with its weight, as `Loader` takes them."""
    stores = {"train": prepared.train, "val": prepared.val}[split]
    pad_id = prepared.tokenizer.id_of(END_OF_TEXT)
    found: list[tuple[RowSource, float]] = []
    for source, weight in chats.sources:
        store = stores[source.name]
        packed = pack(
            store,
            Written.load(_written_file(store.path), store.manifest.n_tokens),
            np.diff(store.offsets_N1) - 1,  # without its <|endoftext|>, which no chat has
            store.offsets_N1[:-1],
            seq_len=chats.seq_len,
            pad_id=pad_id,
            long=chats.long,
        )
        counts = ", ".join(f"{n:,} {name}" for name, n in packed.counts.items())
        log.info("%s, %s: %s", source.name, split, counts)
        found.append((packed, weight))
    return found


def prepare_any(data: Data | Chats, cache: Path) -> Prepared:
    """The stores of text or of conversations."""
    return prepare(data, cache) if isinstance(data, Chats) else prepare_text(data, cache)


def rows_of_any(
    data: Data | Chats, prepared: Prepared, split: str = "train"
) -> list[tuple[RowSource, float]]:
    """Rows of text or of conversations."""
    return (
        rows(data, prepared, split) if isinstance(data, Chats) else text_rows(data, prepared, split)
    )


def prompt_ids(data: Data | Chats, tokenizer: Tokenizer, text: str) -> list[int]:
    """What a model of this data continues: the text itself, or the turn after a user's."""
    if not isinstance(data, Chats):
        return tokenizer.encode(text)
    asked = [{"role": "user", "content": text}]
    return encode(tokenizer, asked, family=data.family, add_generation_prompt=True).tokens


class Spans(Protocol):
    """Where tokens are: a `TokenStore`, or `Held`."""

    def read_spans(self, starts: Iterable[int], lengths: Iterable[int]) -> list[np.ndarray]:
        """The tokens of many spans, each int32."""
        ...


@dataclass(frozen=True)
class Held:
    """Tokens in memory."""

    tokens_N: np.ndarray

    def read_spans(self, starts: Iterable[int], lengths: Iterable[int]) -> list[np.ndarray]:
        """The tokens of many spans, each int32."""
        return [self.tokens_N[a : a + n] for a, n in zip(starts, lengths, strict=True)]


@dataclass(frozen=True)
class Written:
    """For each token of a store, whether the model writes it: bits, eight a byte."""

    bits: np.ndarray

    @classmethod
    def of(cls, written_N: np.ndarray) -> "Written":
        """From bools."""
        return cls(np.packbits(written_N))

    @classmethod
    def load(cls, file: Path, n_tokens: int) -> "Written":
        """From a file, read as it is needed.

        Raises: ValueError where it is missing or of another length.
        """
        if not file.is_file():
            raise ValueError(f"{file} is missing; delete its folder and prepare the data again")
        bits = np.load(file, mmap_mode="r")
        if bits.shape != (-(-n_tokens // 8),):
            raise ValueError(
                f"{file} has {bits.size} bytes for {n_tokens} tokens, eight a byte; delete its "
                "folder and prepare the data again"
            )
        return cls(bits)

    def read(self, start: int, length: int) -> np.ndarray:
        """Bools of tokens start .. start + length."""
        first = start // 8
        bits = np.unpackbits(self.bits[first : -(-(start + length) // 8)])
        return bits[start - first * 8 :][:length].astype(bool)


@dataclass(frozen=True)
class ChatRows:
    """Whole samples packed into rows: row r holds samples bounds_R1[r] .. bounds_R1[r + 1].

    A segment is a sample, padding `pad_id` at the end. The mask is 1 where the *next* token of the
    sample is one that the model writes. counts: samples, dropped_long, truncated, dropped_cut
    (nothing to learn left), rows, tokens, written, padding.
    """

    spans: Spans
    written: Written
    seq_len: int
    pad_id: int
    begin_N: np.ndarray
    length_N: np.ndarray
    bounds_R1: np.ndarray
    counts: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.bounds_R1) - 1

    def __getitem__(self, i: int) -> Row:
        return {name: array[0] for name, array in self.take([i]).items()}

    def take(self, indices: Sequence[int] | np.ndarray) -> Row:
        """Many rows at once, each array [R, T]."""
        index_R = np.asarray(indices, np.int64)
        if index_R.size and not 0 <= index_R.min() <= index_R.max() < len(self):
            asked = f"{index_R.min()}..{index_R.max()}"
            raise IndexError(f"rows {asked} asked, there are 0..{len(self) - 1}")
        members = [np.arange(*self.bounds_R1[r : r + 2]) for r in index_R]
        member_P = np.concatenate(members) if members else np.zeros(0, np.int64)
        spans = iter(
            self.spans.read_spans(self.begin_N[member_P].tolist(), self.length_N[member_P].tolist())
        )
        shape = (len(index_R), self.seq_len)
        row: Row = {name: np.zeros(shape, np.int32) for name in ("segments", "positions")}
        row |= {name: np.full(shape, self.pad_id, np.int32) for name in ("tokens", "targets")}
        row["mask"] = np.zeros(shape, np.float32)
        counting_T = np.arange(self.seq_len, dtype=np.int32)
        for r, inside in enumerate(members):
            begin = 0
            for segment, i in enumerate(inside.tolist(), start=1):
                tokens, length = next(spans), int(self.length_N[i])
                end = begin + length
                row["tokens"][r, begin:end] = tokens
                row["targets"][r, begin : end - 1] = tokens[1:]
                row["mask"][r, begin : end - 1] = self.written.read(int(self.begin_N[i]), length)[
                    1:
                ]
                row["segments"][r, begin:end] = segment
                row["positions"][r, begin:end] = counting_T[:length]
                begin = end
        return row


def pack(
    spans: Spans,
    written: Written,
    length_N: np.ndarray,
    begin_N: np.ndarray,
    *,
    seq_len: int,
    pad_id: int,
    long: Drop | Truncate,
) -> ChatRows:
    """Best-fit rows of the samples that begin at these tokens and have these lengths.

    Raises: ValueError where no sample fits.
    """
    fits_N = length_N <= seq_len
    counts = {"samples": len(length_N), "dropped_long": 0, "truncated": 0, "dropped_cut": 0}
    kept_N = np.arange(len(length_N))
    if isinstance(long, Drop):
        counts["dropped_long"] = int((~fits_N).sum())
        kept_N = kept_N[fits_N]
    else:
        starts = zip(begin_N.tolist(), fits_N.tolist(), strict=True)
        some_N = np.array([fit or written.read(b, seq_len)[1:].any() for b, fit in starts], bool)
        counts["dropped_cut"] = int((~some_N).sum())
        counts["truncated"] = int((~fits_N & some_N).sum())
        kept_N = kept_N[some_N]
    if not len(kept_N):
        longest = int(length_N.max(initial=0))
        raise ValueError(
            f"none of {len(length_N)} samples fits into rows of {seq_len} tokens (the longest has "
            f"{longest}); raise data.seq_len, or use long=Truncate()"
        )
    length_N = np.minimum(length_N[kept_N], seq_len)
    bins = best_fit(length_N, seq_len)
    order_N = np.concatenate([np.array(members) for members in bins])
    begin_N, length_N = begin_N[kept_N][order_N], length_N[order_N]
    learned = sum(
        int(written.read(b, n)[1:].sum())
        for b, n in zip(begin_N.tolist(), length_N.tolist(), strict=True)
    )
    tokens = int(length_N.sum())
    counts |= {"rows": len(bins), "tokens": tokens, "written": learned}
    counts["padding"] = len(bins) * seq_len - tokens
    bounds_R1 = np.cumsum([0] + [len(members) for members in bins])
    return ChatRows(spans, written, seq_len, pad_id, begin_N, length_N, bounds_R1, counts)


def pack_samples(
    samples: Sequence[Sample], *, seq_len: int, pad_id: int, long: Drop | Truncate = Drop()
) -> ChatRows:
    """The same rows from samples in memory, without a store."""
    if not samples:
        raise ValueError("0 samples; give at least one that trains something")
    length_N = np.array([len(one.tokens_T) for one in samples])
    return pack(
        Held(np.concatenate([one.tokens_T for one in samples])),
        Written.of(np.concatenate([one.written_T for one in samples])),
        length_N,
        np.cumsum(length_N) - length_N,
        seq_len=seq_len,
        pad_id=pad_id,
        long=long,
    )


def _build(chats: Chats, folder: Path, tokenizer: Tokenizer | None) -> None:
    with built(folder) as temporary:
        docs, dropped = _gather(chats)
        if tokenizer is None:
            tokenizer = train_bpe(sample_texts(docs, chats.bpe_chars), chats.vocab)
        tokenizer.save(temporary)
        report: dict[str, Any] = {"tokenizer": tokenizer.fingerprint, "dropped": dropped}
        report["sources"] = {}
        for (name, split), part in docs.items():
            counts = _write(temporary / split / name, chats, part, tokenizer)
            report["sources"].setdefault(name, {})[split] = counts
            log.info("%s, %s: %s", name, split, counts)
        write_report(temporary, report)


def _write(path: Path, chats: Chats, docs: Sequence[Doc], tokenizer: Tokenizer) -> dict[str, int]:
    """A store of samples and the bits beside it; counts of `chats.counted_samples`."""
    counts: dict[str, int] = {}
    written: list[np.ndarray] = []

    def tokens() -> Iterator[np.ndarray]:
        options = dict(
            family=chats.family, clear_thinking=chats.clear_thinking, direct=chats.direct
        )
        for one in counted_samples(docs, tokenizer, counts, **options):
            written.append(np.append(one.written_T, False))  # the store ends it in <|endoftext|>
            yield one.tokens_T

    write_store(
        path,
        tokens(),
        end=tokenizer.id_of(END_OF_TEXT),
        vocab=tokenizer.vocab,
        tokenizer_fingerprint=tokenizer.fingerprint,
        meta={"source": path.name, "split": path.parent.name},
    )
    if not written:
        raise ValueError(
            f"none of the {len(docs)} conversations of {path.name!r} ({path.parent.name}) has a "
            "turn that the model learns from; give assistant turns that show what it wrote"
        )
    np.save(_written_file(path), Written.of(np.concatenate(written)).bits)
    return counts


def _written_file(store: Path) -> Path:
    return store.with_name(f"{store.name}.written.npy")


def _gather(chats: Chats) -> tuple[dict[tuple[str, str], list[Doc]], dict[str, dict[str, int]]]:
    """Conversations by (source, split) in the order of a hash, and what was left out."""
    docs: dict[tuple[str, str], list[Doc]] = {}
    dropped: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    for source, _ in chats.sources:
        counts: dict[str, int] = {}
        keyed, out = [], {"duplicates": 0, "lone_surrogates": 0}
        for doc in counted(source, counts):
            if "messages" not in doc.meta:
                raise ValueError(
                    f'{doc.id} of {source.name!r} is text: it has no meta["messages"]; '
                    "give conversations (data/chats.py)"
                )
            if LONE.search(doc.text) is not None:
                out["lone_surrogates"] += 1
                continue
            same = digest(*(doc.meta.get(name, "") for name in ("messages", "tools", "thinking")))
            if same in seen:
                out["duplicates"] += 1
                continue
            seen.add(same)
            keyed.append((digest(str(chats.seed), doc.id, same), doc))
        dropped[source.name] = out | counts
        keyed.sort(key=lambda pair: pair[0])
        kept = [doc for _, doc in keyed[: chats.max_docs]]
        for split, part in zip(SPLITS, _split(kept, source.name, chats), strict=True):
            docs[source.name, split] = part
    return docs, dropped


def _split(docs: Sequence[Doc], name: str, chats: Chats) -> tuple[list[Doc], list[Doc]]:
    """Train and val conversations; groups stay together, and neither side is empty."""
    group_of = [doc.meta.get("group") or doc.id for doc in docs]
    if (groups := len(set(group_of))) < 2:
        raise ValueError(
            f"source {name!r} has {len(docs)} conversations in {groups} groups, train and "
            "validation need one each; give it more"
        )
    return split_by_group(docs, group_of, chats.seed, chats.val_fraction)
