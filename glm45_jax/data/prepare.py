"""From sources to token stores: gather, split, drop duplicates, train the tokenizer, encode, write.

`Data` says what to learn from; `prepare(data, cache)` does the work once for each fingerprint and
only opens what is there after that. The text of a run must fit in memory (larger corpora: write
stores with `store.write_store` shard by shard). No jax: this runs anywhere.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from glm45_jax.data.pack import BestFit, Cut, RowSource
from glm45_jax.data.quality import copies_of, repeated
from glm45_jax.data.reading import LONE
from glm45_jax.data.sources import Doc, Encodes, Source, counted
from glm45_jax.data.store import TokenStore, open_store, write_store
from glm45_jax.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

log = logging.getLogger(__name__)

PREPARE_FORMAT = 1  # part of every fingerprint: raise it when the same config gives other stores
SPLITS = ("train", "val")
_ENCODE_DOCS = 64
_REPORT = "report.json"


@dataclass(frozen=True)
class Data:
    """What a run reads. Weights, seq_len and packing can change without preparing again."""

    sources: tuple[tuple[Source, float], ...]  # with their shares of the rows
    seq_len: int = 128
    packing: Cut | BestFit = field(default_factory=Cut)
    vocab: int = 2048
    val_fraction: float = 0.05  # of the documents, by hash
    max_docs: int | None = None  # a source, by hash
    bpe_chars: int = 4_000_000  # of training text that the tokenizer is trained on
    seed: int = 0  # of the split and of the order of documents
    tokenizer: str | None = None  # path of a tokenizer.json; None trains one on the train split

    def __post_init__(self):
        names = [source.name for source, _ in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"source names are {names}; give at least one, all different")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction {self.val_fraction} is not between 0 and 1")


@dataclass(frozen=True)
class Prepared:
    """Open stores by source name; `report` holds counts of documents, characters and tokens."""

    tokenizer: Tokenizer
    train: Mapping[str, TokenStore]
    val: Mapping[str, TokenStore]
    report: Mapping[str, Any]
    fingerprint: str


def prepare(
    data: Data, cache: Path, *, tokenizer: Tokenizer | None = None, verify: bool = False
) -> Prepared:
    """The stores of `data`, made under `cache` the first time and opened every time.

    tokenizer: use this one (say GLM's) instead of training one on the train split; its vocab must
    be data.vocab. verify: hash every file on opening.

    Raises: ValueError for a damaged cache, a vocab mismatch, or a source with too few documents.
    """
    tokenizer = given_tokenizer(data.tokenizer, data.vocab, tokenizer)
    fingerprint = data_fingerprint(data, tokenizer)
    folder = Path(cache) / f"data-{fingerprint[:16]}"
    if not folder.exists():
        _build(data, folder, fingerprint, tokenizer)
    names = [source.name for source, _ in data.sources]
    return open_prepared(folder, names, data.vocab, fingerprint, verify=verify)


def given_tokenizer(path: str | None, vocab: int, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer that was given, or the one of a path; None: one is to be trained.

    Raises: ValueError for one of another vocabulary.
    """
    if tokenizer is None and path is not None:
        tokenizer = Tokenizer.load(Path(path))
    if tokenizer is not None and tokenizer.vocab != vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab} ids, data.vocab is {vocab}; set data.vocab "
            f"to {tokenizer.vocab}, or leave the tokenizer out to train one"
        )
    return tokenizer


def data_fingerprint(data: Data, tokenizer: Tokenizer | None = None) -> str:
    """sha256 (hex) of all that the stores depend on: sources and their versions, limits."""
    parts = {
        "format": PREPARE_FORMAT,
        "sources": [
            [type(source).__name__, repr(source), source.version()] for source, _ in data.sources
        ],
        "tokenizer": tokenizer.fingerprint if tokenizer else version("tokenizers"),
        "limits": [data.vocab, data.val_fraction, data.max_docs, data.bpe_chars, data.seed],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def rows(data: Data, prepared: Prepared, split: str = "train") -> list[tuple[RowSource, float]]:
    """Packed rows of every source with its weight, as `Loader` takes them."""
    stores = {"train": prepared.train, "val": prepared.val}[split]
    pad_id = prepared.tokenizer.id_of(END_OF_TEXT)
    mixed = [(stores[source.name], weight) for source, weight in data.sources]
    return data.packing.mixture(mixed, data.seq_len, pad_id)


def documents(data: Data) -> dict[tuple[str, str], list[Doc]]:
    """The documents of every (source, split), in the order in which its store has them.

    Copies are made here, behind the split: they share a side, and validation reads a text once.
    """
    return _with_copies(data, _gather(data).docs)


def _build(data: Data, folder: Path, fingerprint: str, tokenizer: Tokenizer | None) -> None:
    with built(folder) as temporary:
        started = time.monotonic()
        found = _gather(data)
        gathered = time.monotonic()
        if tokenizer is None:
            tokenizer = train_bpe(sample_texts(found.docs, data.bpe_chars), data.vocab)
        trained = time.monotonic()
        tokenizer.save(temporary)
        counts = _write_stores(temporary, data, found.docs, tokenizer)
        report: dict[str, Any] = {
            "fingerprint": fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "vocab": tokenizer.vocab,
            "duplicates_dropped": found.duplicates,
            "epochs_dropped": found.unread,
            "sources": counts,
            "seconds": {
                "gather": round(gathered - started, 2),
                "tokenizer": round(trained - gathered, 2),
                "encode_and_write": round(time.monotonic() - trained, 2),
            },
        }
        if found.read:
            report["read"] = found.read
        write_report(temporary, report)
    for name, splits in report["sources"].items():
        train, val = splits["train"], splits["val"]
        log.info(
            "%s: %s training tokens in %s documents, %s for validation",
            name,
            f"{train['tokens']:,}",
            f"{train['docs']:,}",
            f"{val['tokens']:,}",
        )


@contextlib.contextmanager
def built(folder: Path) -> Iterator[Path]:
    """A folder beside it to write to, which is it afterwards; nothing is left where that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
            log.info("%s was prepared by another process meanwhile; using that one", folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """None; the report that `open_prepared` reads."""
    (folder / _REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")


class _Gathered(NamedTuple):
    docs: dict[tuple[str, str], list[Doc]]  # by (source, split), in hash order
    duplicates: dict[str, int]  # exact ones, dropped
    unread: dict[str, int]  # whose epochs came to no copy (data/quality.py)
    read: dict[str, dict[str, int]]  # what sources counted themselves


def _gather(data: Data) -> _Gathered:
    from tqdm import tqdm

    found: dict[tuple[str, str], list[Doc]] = {}
    dropped: dict[str, int] = {}
    unread: dict[str, int] = {}
    read: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    for source, _ in data.sources:
        keyed, dropped[source.name], unread[source.name] = [], 0, 0
        counts: dict[str, int] = {}
        for doc in tqdm(
            counted(source, counts), desc=f"read {source.name}", unit=" docs", disable=None
        ):
            if LONE.search(doc.text) is not None:  # no tokenizer and no file takes such a text
                counts["lone_surrogates"] = counts.get("lone_surrogates", 0) + 1
                continue
            text_hash = digest(doc.text)
            if text_hash in seen:
                dropped[source.name] += 1
                continue
            if not copies_of(doc, data.seed):
                unread[source.name] += 1
                continue
            seen.add(text_hash)
            keyed.append((digest(str(data.seed), doc.id, doc.text), doc))
        if counts:
            read[source.name] = counts
        keyed.sort(key=lambda pair: pair[0])
        docs = [doc for _, doc in keyed[: data.max_docs]]
        if len(docs) < 2:
            raise ValueError(
                f"source {source.name!r} has {len(docs)} documents, train and validation need one "
                "each; check its fields and max_docs"
            )
        parts = _split(docs, data)
        found |= {(source.name, split): part for split, part in zip(SPLITS, parts, strict=True)}
    return _Gathered(found, dropped, unread, read)


def _split(docs: Sequence[Doc], data: Data) -> tuple[list[Doc], list[Doc]]:
    """Train and val documents; groups stay together, and neither side is empty."""
    group_of = [doc.meta.get("group") or f"{doc.id}\0{doc.text}" for doc in docs]
    if len(set(group_of)) < 2:
        raise ValueError(
            f"the {len(docs)} documents of {docs[0].source!r} are one group ({group_of[0]!r}), "
            "which cannot be split; give it more documents"
        )
    return split_by_group(docs, group_of, data.seed, data.val_fraction)


def split_by_group(
    docs: Sequence[Doc], group_of: Sequence[str], seed: int, val_fraction: float
) -> tuple[list[Doc], list[Doc]]:
    """Train and val documents of two groups or more, by a hash of the group: more of them move none
    of the old ones, but for the nearest group where one side would be empty.
    """
    place_of = {group: int(digest(str(seed), group)[:16], 16) for group in group_of}
    ordered = sorted(place_of.values())
    limit = min(max(int(val_fraction * 2**64), ordered[0] + 1), ordered[-1])
    in_val = [place_of[group] < limit for group in group_of]
    train = [doc for doc, val in zip(docs, in_val, strict=True) if not val]
    return train, [doc for doc, val in zip(docs, in_val, strict=True) if val]


def sample_texts(docs: Mapping[tuple[str, str], Sequence[Doc]], chars: int) -> Iterator[str]:
    """Training texts for the tokenizer, an equal share of every source's characters, each once.

    docs: by (source, split). chars: about how many in all.
    """
    parts = [part for (_, split), part in docs.items() if split == "train"]
    sizes = [sum(len(doc.text) for doc in part) for part in parts]
    share = min(1.0, chars / max(1, sum(sizes)))
    for part, size in zip(parts, sizes, strict=True):
        left = share * size
        for doc in part:
            if left <= 0:
                break
            yield doc.text
            left -= len(doc.text)


def _with_copies(
    data: Data, docs: Mapping[tuple[str, str], Sequence[Doc]]
) -> dict[tuple[str, str], list[Doc]]:
    return {
        (name, split): repeated(part, data.seed) if split == "train" else list(part)
        for (name, split), part in docs.items()
    }


def _write_stores(
    folder: Path,
    data: Data,
    docs: Mapping[tuple[str, str], Sequence[Doc]],
    tokenizer: Tokenizer,
) -> dict[str, dict[str, Any]]:
    from tqdm import tqdm

    counts: dict[str, dict[str, Any]] = {}
    source_of = {source.name: source for source, _ in data.sources}
    docs = _with_copies(data, docs)
    total = sum(len(doc.text) for part in docs.values() for doc in part)
    with tqdm(total=total, desc="encode", unit=" chars", unit_scale=True, disable=None) as bar:
        for (name, split), part in docs.items():
            size = {
                "docs": len(part),
                "copies": sum("copy" in doc.meta for doc in part),  # among them, second and later
                "chars": sum(len(doc.text) for doc in part),
                "bytes": sum(len(doc.text.encode()) for doc in part),
            }
            manifest = write_store(
                folder / split / name,
                _encoded(source_of[name], part, tokenizer, bar),
                end=tokenizer.id_of(END_OF_TEXT),
                vocab=tokenizer.vocab,
                tokenizer_fingerprint=tokenizer.fingerprint,
                meta={"source": name, "split": split} | size,
            )
            size["tokens"] = manifest.n_tokens
            ratio = round(size["bytes"] / manifest.n_tokens, 3)
            counts.setdefault(name, {})[split] = size | {"bytes_per_token": ratio}
    return counts


def _encoded(
    source: Source, docs: Sequence[Doc], tokenizer: Tokenizer, bar: Any
) -> Iterator[list[int]]:
    for start in range(0, len(docs), _ENCODE_DOCS):
        part = docs[start : start + _ENCODE_DOCS]
        if isinstance(source, Encodes):
            yield from source.encode(part, tokenizer)
        else:
            yield from tokenizer.encode_batch([doc.text for doc in part])
        bar.update(sum(len(doc.text) for doc in part))


def open_prepared(
    folder: Path, names: Sequence[str], vocab: int, fingerprint: str, *, verify: bool = False
) -> Prepared:
    """The stores of these sources. Raises: ValueError for a damaged folder."""
    report_file = folder / _REPORT
    if not report_file.is_file():
        raise ValueError(f"{folder} has no {report_file.name}; delete the folder and prepare again")
    tokenizer = Tokenizer.load(folder)
    stores = {
        split: {
            name: open_store(
                folder / split / name,
                vocab=vocab,
                tokenizer_fingerprint=tokenizer.fingerprint,
                verify=verify,
            )
            for name in names
        }
        for split in SPLITS
    }
    report = json.loads(report_file.read_text(encoding="utf-8"))
    return Prepared(tokenizer, stores["train"], stores["val"], report, fingerprint)


def digest(*parts: str) -> str:
    """sha256 (hex) of texts; a separator keeps ("ab", "c") and ("a", "bc") apart."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
