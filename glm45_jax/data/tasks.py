"""seqio: every source of a `Data` as a `seqio.Task`, every stage as a `seqio.Mixture` with rates.

`document_tasks` give documents as ids, and `materialise` writes those, or any seqio task over our
vocabulary, to token stores; `row_tasks` give the packed rows of those stores and `stage_mixture`
mixes them as `Loader` does. Nothing is looked up by name: providers are made from values and carry
the fingerprint of their data in their names; seqio's registries are touched by `register` alone.
Metrics are plain functions of seqio's form (`data/metrics.py`).
seqio brings TensorFlow and takes seconds to import, so it is imported when something asks for it.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from glm45_jax.data.metrics import MetricFn
from glm45_jax.data.metrics import exact_match as exact_match
from glm45_jax.data.metrics import log_likelihood as log_likelihood
from glm45_jax.data.metrics import mean_of as mean_of
from glm45_jax.data.metrics import metric_values as metric_values
from glm45_jax.data.metrics import token_f1 as token_f1
from glm45_jax.data.pack import BestFit, Cut, Row, RowSource, take
from glm45_jax.data.prepare import SPLITS, Data, Prepared, data_fingerprint, documents
from glm45_jax.data.sources import Doc, Encodes, Source
from glm45_jax.data.store import Manifest, write_store
from glm45_jax.tokenizer import END_OF_TEXT, Tokenizer
from glm45_jax.values import fingerprint

_ROWS_READ = 64
_INTS = ("tokens", "targets", "segments", "positions")  # of a row; its mask is float32


class Plan(Protocol):
    """What a mixture is made of; `train.stages.Stage` is one, `whole` makes one of a `Data`."""

    @property
    def name(self) -> str:
        """Part of the mixture's name."""
        ...

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        ...

    @property
    def packing(self) -> Cut | BestFit:
        """How documents become rows."""
        ...

    @property
    def mixture(self) -> tuple[tuple[str, float], ...]:
        """Names of sources with their shares of the rows."""
        ...


@dataclass(frozen=True)
class Whole:
    """A `Plan` of its fields."""

    name: str
    seq_len: int
    packing: Cut | BestFit
    mixture: tuple[tuple[str, float], ...]


def whole(data: Data, name: str = "all") -> Whole:
    """The one stage that a `Data` without stages is."""
    shares = tuple((source.name, float(share)) for source, share in data.sources)
    return Whole(name, data.seq_len, data.packing, shares)


@functools.cache
def seqio() -> Any:
    """The module `seqio`; its TensorFlow keeps its hands off accelerators."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of the load, which has much to say
    import seqio
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        if tf.config.list_physical_devices(kind):
            tf.config.set_visible_devices([], kind)  # else it takes their memory
    return seqio


def vocabulary(tokenizer: Tokenizer) -> Any:
    """The tokenizer as a `seqio.Vocabulary`; two of the same tokenizer are equal.

    `<|endoftext|>` ends a document and pads; text is text, tags in it are no tokens.
    """
    return _vocabulary_class()(tokenizer)


def document_tasks(
    data: Data, tokenizer: Tokenizer, *, metric_fns: Sequence[MetricFn] = ()
) -> dict[str, Any]:
    """A `seqio.Task` for every source, by the source's name; splits "train" and "val".

    Examples are the documents that `prepare(data)` writes, in that order (ask for shuffle=False):
    "targets", int32 [T] with `<|endoftext|>` last, and "id". Sources are read when the first
    example is asked for. Raises: ValueError when tokenizer.vocab is not data.vocab.
    """
    if tokenizer.vocab != data.vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab} ids, data.vocab is {data.vocab}; use the one of "
            "`prepare(data, ...)`, or set data.vocab"
        )
    gather = functools.cache(lambda: documents(data))
    feature = seqio().Feature(vocabulary(tokenizer), add_eos=True, dtype=_tf().int32, rank=1)
    tasks = {}
    for source, _ in data.sources:

        def of_split(split: str, name: str = source.name) -> list[Doc]:
            return gather()[name, split]

        tasks[source.name] = seqio().Task(
            provider_name(source.name, data_fingerprint(data, tokenizer)),
            _documents_source(of_split),
            {"targets": feature},
            [_encoder(source, tokenizer), seqio().preprocessors.append_eos],
            metric_fns=list(metric_fns),
        )
    return tasks


@dataclass(frozen=True)
class Pair:
    """An example to answer. inputs, targets: ids, without an end. target: what metrics compare
    with, the task's postprocessor's. example: as the task gives it.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    target: Any
    example: Mapping[str, Any]


def pair_task(
    name: str,
    pairs: Mapping[str, Sequence[tuple[str, str]]],
    tokenizer: Tokenizer,
    *,
    metric_fns: Sequence[MetricFn],
) -> Any:
    """A `seqio.Task` of questions and answers. pairs: of every split, (inputs, targets) as text."""
    tf = _tf()

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        order = _order(len(pairs[split]), shuffle_files, seed)
        columns = zip(*(pairs[split][at] for at in order), strict=True)
        slices = dict(zip(("inputs", "targets"), map(list, columns), strict=True))
        return tf.data.Dataset.from_tensor_slices(slices)

    feature = seqio().Feature(vocabulary(tokenizer), add_eos=False, dtype=tf.int32, rank=1)
    told = tuple((split, tuple(map(tuple, some))) for split, some in pairs.items())
    stamp = fingerprint((tokenizer.fingerprint, told))
    return seqio().Task(
        provider_name(name, stamp),
        seqio().FunctionDataSource(dataset, splits=tuple(pairs)),
        {"inputs": feature, "targets": feature},
        [seqio().preprocessors.tokenize],
        metric_fns=list(metric_fns),
    )


def read_pairs(task: Any, split: str, tokenizer: Tokenizer) -> Iterator[Pair]:
    """The examples of a task with "inputs" and "targets", in their order.

    Raises: ValueError for features that are missing or over another vocabulary.
    """
    for name in ("inputs", "targets"):
        _check_vocabulary(task, name, tokenizer)
    end = tokenizer.id_of(END_OF_TEXT)
    for example in task.get_dataset(
        split=split, shuffle=False, try_in_mem_cache=False
    ).as_numpy_iterator():
        inputs, targets = (
            tuple(int(i) for i in example[name] if i != end) for name in ("inputs", "targets")
        )
        text = tokenizer.decode(targets)
        target = task.postprocess_fn(text, example=example, is_target=True)
        yield Pair(inputs, targets, target, example)


def _check_vocabulary(task: Any, feature: str, tokenizer: Tokenizer) -> None:
    made_for = getattr(task.output_features.get(feature), "vocabulary", None)
    if made_for != vocabulary(tokenizer):
        raise ValueError(
            f"feature {feature!r} of task {task.name} is over {made_for}, not over "
            f"{vocabulary(tokenizer)}; make it with `vocabulary(tokenizer)`"
        )


def materialise(
    tasks: Mapping[str, Any],
    folder: str | Path,
    tokenizer: Tokenizer,
    *,
    splits: Sequence[str] = SPLITS,
    feature: str = "targets",
) -> dict[tuple[str, str], Manifest]:
    """Token stores folder/split/name of all examples of seqio tasks; the manifest of each.

    tasks: any whose `feature` is over this tokenizer's `vocabulary`. An `<|endoftext|>` that a task
    with add_eos puts last is the one that a store has after every document anyway. Splits that a
    task has not are left out. Examples are streamed, unshuffled, untrimmed, once.

    Raises: ValueError for a task over another vocabulary, or a store that is there already.
    """
    end, found = tokenizer.id_of(END_OF_TEXT), {}
    for name, task in tasks.items():
        _check_vocabulary(task, feature, tokenizer)
        for split in (split for split in splits if split in task.splits):
            ends = task.output_features[feature].add_eos
            found[split, name] = write_store(
                Path(folder) / split / name,
                _without_end(_examples(task, split, feature), end if ends else None),
                end=end,
                vocab=tokenizer.vocab,
                tokenizer_fingerprint=tokenizer.fingerprint,
                meta={"source": name, "split": split, "task": task.name},
            )
    return found


def row_tasks(data: Data, prepared: Prepared, plan: Plan) -> dict[str, Any]:
    """A `seqio.Task` over the packed rows of every source of a plan, by the source's name.

    Examples are the rows that `Loader` draws from: tokens, targets, segments, positions (int32 [T])
    and mask (float32 [T]), as in `Batch`; without shuffle in their order.

    Raises: ValueError for a source of the plan that the data has not.
    """
    known = [source.name for source, _ in data.sources]
    if missing := [name for name, _ in plan.mixture if name not in known]:
        raise ValueError(f"stage {plan.name} mixes {missing}, the data has {known}; add or drop")
    pad_id, tf = prepared.tokenizer.id_of(END_OF_TEXT), _tf()
    passed = seqio().PassThroughVocabulary(prepared.tokenizer.vocab, eos_id=pad_id)
    features = {
        name: seqio().Feature(passed, add_eos=False, dtype=tf.int32, rank=1) for name in _INTS
    }
    features["mask"] = seqio().ContinuousFeature(dtype=tf.float32, rank=1, add_eos=False)
    stamp = fingerprint((prepared.fingerprint, plan.seq_len, plan.packing))
    tasks = {}
    for name, _ in plan.mixture:
        stores = {"train": prepared.train[name], "val": prepared.val[name]}
        rows = {s: plan.packing.rows(store, plan.seq_len, pad_id) for s, store in stores.items()}
        source = _rows_source(rows, plan.seq_len)
        tasks[name] = seqio().Task(provider_name(f"{name}.rows", stamp), source, features)
    return tasks


def stage_mixture(data: Data, prepared: Prepared, plan: Plan) -> Any:
    """The `seqio.Mixture` of a stage: rows of its sources at their rates."""
    tasks = row_tasks(data, prepared, plan)
    stamp = fingerprint((plan.mixture, *(tasks[name].name for name, _ in plan.mixture)))
    name = provider_name(f"{plan.name}.stage", stamp)
    return seqio().Mixture(name, [(tasks[source], rate) for source, rate in plan.mixture])


def register(*providers: Any) -> None:
    """Puts tasks and mixtures, with the tasks of those, into seqio's registries, under their names.

    One whose name is there stays out: names tell the data by fingerprint.
    """
    for provider in providers:
        mixture = isinstance(provider, seqio().Mixture)
        if mixture:
            register(*provider.tasks)
        registry = seqio().MixtureRegistry if mixture else seqio().TaskRegistry
        if provider.name not in registry.names():
            registry.add_provider(provider.name, provider)


def provider_name(name: str, stamp: str) -> str:
    """A name that seqio takes: other characters as #hex, and the beginning of a fingerprint."""
    plain = re.sub(r"[^\w.:]", lambda found: f"#{ord(found[0]):x}", name, flags=re.ASCII)
    return f"glm45.{plain}.{stamp[:16]}"


def _tf() -> Any:
    seqio()
    import tensorflow as tf

    return tf


@functools.cache
def _vocabulary_class() -> Any:
    """A subclass of a class that is too dear to import with this file."""
    tf = _tf()

    class GlmVocabulary(seqio().Vocabulary):  # type: ignore[misc]
        """See `vocabulary`."""

        def __init__(self, tokenizer: Tokenizer):
            super().__init__(extra_ids=0)
            self.tokenizer = tokenizer

        @property
        def eos_id(self) -> int:
            return self.tokenizer.id_of(END_OF_TEXT)

        @property
        def pad_id(self) -> int:
            return self.eos_id

        @property
        def unk_id(self) -> None:
            return None  # bytes are the fallback

        @property
        def _base_vocab_size(self) -> int:
            return self.tokenizer.vocab

        def _encode(self, s: str) -> list[int]:
            return self.tokenizer.encode(s)

        def _decode(self, ids: Sequence[int]) -> str:
            return self.tokenizer.decode([i for i in ids if i != self.eos_id])

        def _encode_tf(self, s: Any) -> Any:
            return _ids_in_graph(lambda text: self._encode(text.decode()), s)

        def _decode_tf(self, ids: Any) -> Any:
            def decode(row: np.ndarray) -> Any:
                if row.ndim == 1:
                    return self._decode(row.tolist()).encode()
                return np.array([decode(one) for one in row], object)

            text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
            text.set_shape(ids.shape[:-1])
            return text

        def __eq__(self, other: object) -> bool:
            mine = self.tokenizer.fingerprint
            return isinstance(other, GlmVocabulary) and mine == other.tokenizer.fingerprint

        def __hash__(self) -> int:
            return hash(self.tokenizer.fingerprint)

        def __repr__(self) -> str:
            return f"GlmVocabulary({self.vocab_size}, {self.tokenizer.fingerprint[:12]})"

    return GlmVocabulary


def _ids_in_graph(encode: Callable[..., Sequence[int]], *strings: Any) -> Any:
    """Ids of Python's making, int32 [T], inside a tf.data pipeline."""
    tf = _tf()

    def run(*values: Any) -> np.ndarray:  # bytes in a graph, arrays of no dimension outside
        return np.asarray(encode(*(np.asarray(v, object).item() for v in values)), np.int32)

    ids = tf.numpy_function(run, list(strings), tf.int32, stateful=False)
    ids.set_shape([None])
    return ids


def _documents_source(of_split: Callable[[str], list[Doc]]) -> Any:
    tf = _tf()
    keys = ("id", "text", "source", "meta")

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        def examples() -> Iterator[dict[str, str]]:
            docs = of_split(split)
            for at in _order(len(docs), shuffle_files, seed):
                doc = docs[at]
                fields = (doc.id, doc.text, doc.source, json.dumps(dict(doc.meta)))
                yield dict(zip(keys, fields, strict=True))

        signature = {key: tf.TensorSpec([], tf.string) for key in keys}
        return tf.data.Dataset.from_generator(examples, output_signature=signature)

    return seqio().FunctionDataSource(dataset, splits=SPLITS)


def _encoder(source: Source, tokenizer: Tokenizer) -> Callable[[Any], Any]:
    """A preprocessor: text to ids, by the source itself where that is how it is written."""

    def ids_of(*fields: bytes) -> Sequence[int]:
        doc_id, text, name, meta = (field.decode() for field in fields)
        if isinstance(source, Encodes):
            return source.encode([Doc(doc_id, text, name, json.loads(meta))], tokenizer)[0]
        return tokenizer.encode(text)

    def encode(dataset: Any) -> Any:
        def one(example: dict[str, Any]) -> dict[str, Any]:
            fields = [example[key] for key in ("id", "text", "source", "meta")]
            return {"id": example["id"], "targets": _ids_in_graph(ids_of, *fields)}

        return dataset.map(one, num_parallel_calls=_tf().data.AUTOTUNE)

    return encode


def _rows_source(rows: Mapping[str, RowSource], seq_len: int) -> Any:
    tf = _tf()

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        def examples() -> Iterator[Row]:
            order = _order(len(rows[split]), shuffle_files, seed)
            for begin in range(0, len(order), _ROWS_READ):
                read = take(rows[split], order[begin : begin + _ROWS_READ])
                for at in range(len(read["tokens"])):
                    yield {name: column[at] for name, column in read.items()}

        signature = {name: tf.TensorSpec([seq_len], tf.int32) for name in _INTS}
        signature["mask"] = tf.TensorSpec([seq_len], tf.float32)
        return tf.data.Dataset.from_generator(examples, output_signature=signature)

    counts = {split: len(source) for split, source in rows.items()}
    return seqio().FunctionDataSource(dataset, splits=SPLITS, num_input_examples=counts)


def _order(n: int, shuffle: bool, seed: int | None) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n) if shuffle else np.arange(n)


def _examples(task: Any, split: str, feature: str) -> Iterator[np.ndarray]:
    dataset = task.get_dataset(split=split, shuffle=False, try_in_mem_cache=False)
    for example in dataset.as_numpy_iterator():
        yield example[feature]


def _without_end(docs: Iterator[np.ndarray], end: int | None) -> Iterator[np.ndarray]:
    for doc_T in docs:
        yield doc_T[:-1] if end is not None and len(doc_T) and doc_T[-1] == end else doc_T
