"""A token store: documents as one long row of ids in a TensorStore (zarr3) array.

A folder with `tokens/` (uint16 or uint32 chunks, uncompressed so that a size check means
something), `offsets.npy` (where documents begin) and `manifest.json` (counts, vocabulary,
tokenizer, size and sha256 of every file). Every document ends in `<|endoftext|>`. A store is
written once, appears whole or not at all, and is checked against its manifest on opening.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from glm45_jax.data.chunks import Chunks
from glm45_jax.data.reading import sha256_of

STORE_FORMAT = 1
CHUNK_TOKENS = 1024 * 1024  # a file each; reads take only the bytes they want (data/chunks.py)
_FLUSH_CHUNKS = 4


@dataclass(frozen=True)
class Manifest:
    """What a store says of itself. `files` maps each path to {"bytes": n, "sha256": hex}."""

    format: int
    n_tokens: int
    n_docs: int
    vocab: int
    dtype: str
    chunk_tokens: int
    end: int  # id of <|endoftext|>
    tokenizer: str  # fingerprint of the tokenizer
    meta: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content: the files, the vocabulary and the tokenizer."""
        parts = [self.vocab, self.end, self.tokenizer]
        parts += [(name, self.files[name]["sha256"]) for name in sorted(self.files)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class TokenStore:
    """An open store; safe to read from several threads.

    Document i is tokens offsets_N1[i] .. offsets_N1[i + 1], its `<|endoftext|>` included.
    """

    path: Path
    manifest: Manifest
    offsets_N1: np.ndarray
    array: ts.TensorStore  # the same tokens, for other readers; ours go through `chunks`
    chunks: Chunks

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop (exclusive) as int32.

        Raises: ValueError when the range leaves the store.
        """
        return self.read_spans([start], [stop - start])[0]

    def read_spans(self, starts: Iterable[int], lengths: Iterable[int]) -> list[np.ndarray]:
        """The tokens of many spans, each int32.

        Raises: ValueError when a span leaves the store.
        """
        start_N = np.fromiter(starts, np.int64)
        length_N = np.fromiter(lengths, np.int64)
        if len(start_N) != len(length_N):
            raise ValueError(f"{len(start_N)} starts, {len(length_N)} lengths; give one of each")
        n = self.manifest.n_tokens
        outside = np.flatnonzero((start_N < 0) | (length_N < 0) | (start_N + length_N > n))
        if outside.size:
            start, stop = start_N[outside[0]], (start_N + length_N)[outside[0]]
            raise ValueError(f"tokens {start}..{stop} are not in {self.path}, which has 0..{n}")
        ends_N = np.cumsum(length_N)
        joined = np.empty(int(length_N.sum()), self.chunks.dtype)
        self.chunks.read_into(joined, ends_N - length_N, start_N, length_N)
        return np.split(joined.astype(np.int32), ends_N[:-1]) if len(ends_N) else []


def write_store(
    path: str | Path,
    docs_tokens: Iterable[Sequence[int] | np.ndarray],
    *,
    end: int,
    vocab: int,
    tokenizer_fingerprint: str,
    meta: Mapping[str, Any],
    chunk_tokens: int = CHUNK_TOKENS,
) -> Manifest:
    """The manifest of the store written at `path` from token documents, streamed.

    end: id of `<|endoftext|>`, put after every document (the documents come without it).
    meta: anything JSON can hold. Memory stays at a few chunks however long the stream.

    Raises: ValueError when the folder exists or an id is outside the vocabulary.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists; a store is written once, delete it or choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.writing-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        dtype = "uint16" if vocab < 65536 else "uint32"
        docs = _checked(docs_tokens, end, vocab, np.dtype(dtype))
        offsets_N1 = _write_tokens(temporary / "tokens", docs, dtype, chunk_tokens)
        np.save(temporary / "offsets.npy", offsets_N1)
        manifest = Manifest(
            format=STORE_FORMAT,
            n_tokens=int(offsets_N1[-1]),
            n_docs=len(offsets_N1) - 1,
            vocab=vocab,
            dtype=dtype,
            chunk_tokens=chunk_tokens,
            end=end,
            tokenizer=tokenizer_fingerprint,
            meta=dict(meta),
            versions=_versions(),
            files=_file_table(temporary),
        )
        text = json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True)
        (temporary / "manifest.json").write_text(text, encoding="utf-8")
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def open_store(
    path: str | Path,
    *,
    vocab: int | None = None,
    tokenizer_fingerprint: str | None = None,
    verify: bool = False,
) -> TokenStore:
    """The store at `path`, its files checked against the manifest.

    Every file's existence and size are always checked; `verify` also hashes them (reads all).
    vocab, tokenizer_fingerprint: what the caller's model and tokenizer expect.

    Raises: ValueError when the store is missing, cut short, damaged, or made for another tokenizer.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    _check_made_for(path, manifest, vocab, tokenizer_fingerprint)
    _check_files(path, manifest, verify)
    offsets_N1 = np.load(path / "offsets.npy")
    if int(offsets_N1[-1]) != manifest.n_tokens or len(offsets_N1) != manifest.n_docs + 1:
        raise _damaged(
            path,
            f"offsets.npy ends at token {int(offsets_N1[-1])} of {len(offsets_N1) - 1} documents,"
            f" the manifest says {manifest.n_tokens} of {manifest.n_docs}",
        )
    array = _open_array(path / "tokens")
    if array.shape != (manifest.n_tokens,):
        found = array.shape[0]
        raise _damaged(path, f"the array has {found} tokens, the manifest {manifest.n_tokens}")
    chunks = Chunks(path / "tokens" / "c", manifest.dtype, manifest.chunk_tokens)
    return TokenStore(path, manifest, offsets_N1, array, chunks)


def _checked(
    docs_tokens: Iterable[Sequence[int] | np.ndarray], end: int, vocab: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    if not 0 <= end < vocab:
        raise ValueError(f"end id {end} is outside vocab {vocab}; use the tokenizer's own vocab")
    for i, tokens in enumerate(docs_tokens):
        doc_T = np.asarray(tokens, dtype=np.int64)
        if doc_T.size and not 0 <= doc_T.min() <= doc_T.max() < vocab:
            raise ValueError(
                f"document {i} has ids {doc_T.min()}..{doc_T.max()}, vocab is {vocab}; "
                "encode with the tokenizer whose vocab this is"
            )
        yield np.append(doc_T, end).astype(dtype)


def _write_tokens(
    path: Path, docs: Iterator[np.ndarray], dtype: str, chunk_tokens: int
) -> np.ndarray:
    array = ts.open(_create_spec(path, dtype, chunk_tokens)).result()
    offsets, pending, held, written = [0], [], 0, 0
    for doc_T in docs:
        offsets.append(offsets[-1] + len(doc_T))
        pending.append(doc_T)
        held += len(doc_T)
        if held >= _FLUSH_CHUNKS * chunk_tokens:  # whole chunks only: each is written once
            joined = np.concatenate(pending)
            whole = held // chunk_tokens * chunk_tokens
            array = _append(array, written, joined[:whole])
            pending, held, written = [joined[whole:]], held - whole, written + whole
    rest = np.concatenate(pending) if pending else np.zeros(0, dtype)
    _append(array, written, rest)
    return np.array(offsets, np.int64)


def _append(array: ts.TensorStore, written: int, tokens: np.ndarray) -> ts.TensorStore:
    stop = written + len(tokens)
    array = array.resize(exclusive_max=[stop]).result()
    if len(tokens):
        array[written:stop].write(tokens).result()
    return array


def _create_spec(path: Path, dtype: str, chunk_tokens: int) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": [chunk_tokens]}}
    plain = {"name": "bytes", "configuration": {"endian": "little"}}  # default: shards of 1 token
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "shape": [0],
            "chunk_grid": grid,
            "codecs": [plain],
            "data_type": dtype,
        },
        # A chunk of zeros is a file like any other: the manifest accounts for every chunk.
        "store_data_equal_to_fill_value": True,
        "create": True,
    }


def _open_array(path: Path) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "recheck_cached_data": "open",  # a store never changes: no look at the disk per read
        "open": True,
    }
    return ts.open(spec, read=True).result()


def _file_table(root: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in files
    }


def _versions() -> dict[str, str]:
    libraries = ("numpy", "tensorstore", "tokenizers")
    return {"python": platform.python_version()} | {name: version(name) for name in libraries}


def _read_manifest(path: Path) -> Manifest:
    file = path / "manifest.json"
    if not file.is_file():
        raise ValueError(
            f"no token store at {path}: {file.name} is missing; prepare the data again"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise _damaged(path, f"manifest.json cannot be read ({error})") from error
    if fields.get("format") != STORE_FORMAT:
        raise ValueError(
            f"store {path} has format {fields.get('format')}, this code reads {STORE_FORMAT}; "
            "prepare the data again"
        )
    expected = {field.name for field in dataclasses.fields(Manifest)}
    if set(fields) != expected:
        raise _damaged(path, f"manifest.json differs in fields {sorted(set(fields) ^ expected)}")
    return Manifest(**fields)


def _check_made_for(
    path: Path, manifest: Manifest, vocab: int | None, tokenizer_fingerprint: str | None
) -> None:
    if vocab is not None and vocab != manifest.vocab:
        raise ValueError(
            f"store {path} has vocab {manifest.vocab}, expected {vocab}; prepare the data with "
            "this tokenizer, or use the tokenizer and model config that the store was made for"
        )
    if tokenizer_fingerprint is not None and tokenizer_fingerprint != manifest.tokenizer:
        raise ValueError(
            f"store {path} was written with tokenizer {manifest.tokenizer[:12]}, this one is "
            f"{tokenizer_fingerprint[:12]}; prepare the data again or load the other tokenizer"
        )


def _check_files(path: Path, manifest: Manifest, verify: bool) -> None:
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing, the manifest has {expected['bytes']} bytes")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise _damaged(path, f"{name} has {size} bytes, the manifest {expected['bytes']}")
        if verify and (found := sha256_of(file)) != expected["sha256"]:
            raise _damaged(
                path, f"{name} has sha256 {found[:12]}, the manifest {expected['sha256'][:12]}"
            )


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"token store {path} is damaged: {what}; delete the folder and prepare the data again, "
        "or copy it anew"
    )
