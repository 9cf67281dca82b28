"""What a pipeline did: documents, characters and tokens in and out of every step, shown.

`funnel(corpus, built)` reads manifests for documents and characters, and the shards for tokens and
levels; `text`, `write` and `plot` show it. From the shell (builds first):
`python -m glm45_jax.data.pipeline experiments.corpus:recipe --sources DIR --out DIR`.
"""

import argparse
import hashlib
import importlib
import json
import logging
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm45_jax.data.outputs import Counts, Manifest, Shards
from glm45_jax.data.pipeline import READ, Built, Corpus, Line, build
from glm45_jax.data.quality import copies_of
from glm45_jax.data.shingles import in_batches
from glm45_jax.data.sources import Doc
from glm45_jax.integrity import write_whole
from glm45_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FILES = ("funnel.json", "funnel.txt", "funnel.png")

_BATCH_CHARS = 1 << 20
_BUCKET = re.compile(r"^quality_(?:.*_)?bucket_(\d+)_docs$")


@dataclass(frozen=True)
class Row:
    """One step, for one source of its line. tokens: None without a tokenizer.

    docs_in + added = docs_out + all dropped. Of the step `read`, documents in are those that the
    source gave; what it left out itself is in told, in its own units.
    """

    line: str
    step: str
    source: str
    docs_in: int
    docs_out: int
    added: int
    chars_in: int
    chars_out: int
    tokens_in: int | None
    tokens_out: int | None
    dropped: dict[str, int]
    told: dict[str, int]


@dataclass(frozen=True)
class Class:
    """Documents of one line, source, language, bucket and level, behind the last step.

    "" where no step gave one. reads: documents times copies (`copies_of`); read_chars and
    read_tokens: what an epoch over the line reads.
    """

    line: str
    source: str
    language: str
    bucket: str
    level: str
    docs: int
    chars: int
    tokens: int | None
    reads: int
    read_chars: int
    read_tokens: int | None

    @property
    def epochs(self) -> float:
        """How often its characters are read on average."""
        return self.read_chars / max(self.chars, 1)


@dataclass(frozen=True)
class Funnel:
    """All rows, in the order of lines, steps and sources."""

    digest: str
    tokenizer: str | None  # fingerprint
    rows: tuple[Row, ...]
    classes: tuple[Class, ...]


def funnel(corpus: Corpus, built: Built, tokenizer: Tokenizer | None = None) -> Funnel:
    """The counts of every step; every different text is made to tokens once."""
    tokens = _Tokens(tokenizer)
    rows: list[Row] = []
    classes: list[Class] = []
    for line in corpus.lines:
        came: dict[str, int | None] = {source.name: None for source in line.sources}
        for step in line.names:
            manifest = built.steps[line.name, step]
            for source in line.sources:
                shards = corpus.output(line.name, step, (source.name,))
                n_tokens = tokens.of(shards)
                counts = manifest.sources[source.name]
                rows.append(_row(manifest, source.name, counts, came[source.name], n_tokens))
                came[source.name] = n_tokens
        classes += _classes(corpus, line, tokens)
    fingerprint = tokenizer.fingerprint if tokenizer else None
    return Funnel(built.digest, fingerprint, tuple(rows), tuple(classes))


def text(found: Funnel) -> str:
    """The funnel as tables: steps (a source's own reasons in brackets), what is read how often,
    and the buckets of the last step that made some.
    """
    with_tokens = found.tokenizer is not None
    head = ["line", "step", "source", "docs in", "docs out", "kept", "chars in", "chars out"]
    head += ["tokens in", "tokens out"] * with_tokens + ["dropped"]
    body = []
    for row in found.rows:
        share = f"{row.docs_out / row.docs_in:.1%}" if row.docs_in else "-"
        cells = [row.line, row.step, row.source, _n(row.docs_in), _n(row.docs_out), share]
        cells += [_n(row.chars_in), _n(row.chars_out)]
        cells += [_n(row.tokens_in), _n(row.tokens_out)] * with_tokens
        own = {f"({name})": n for name, n in row.told.items() if "dropped" in name}
        reasons = row.dropped | own if row.step == READ else row.dropped
        why = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        shown = [f"{reason} {_n(n)}" for reason, n in why[:4]]
        shown += [f"{len(why) - 4} more"] * (len(why) > 4) + [f"added {row.added}"] * (
            row.added > 0
        )
        body.append([*cells, ", ".join(shown)])
    levels = ["line", "source", "language", "level", "docs", "chars", "epochs", "chars read"]
    levels += ["tokens", "tokens read"] * with_tokens
    parts = [_aligned(head, body), _aligned(levels, _level_cells(found, with_tokens))]
    if buckets := _bucket_cells(found, with_tokens):
        names = ["line", "bucket", "level", "docs in", "docs", "chars", "epochs"]
        parts.append(_aligned(names + ["tokens read"] * with_tokens, buckets))
    return "\n\n".join([*parts, f"hash of the documents: {found.digest}"]) + "\n"


def write(found: Funnel, folder: Path) -> tuple[Path, ...]:
    """Writes funnel.json, funnel.txt and funnel.png; their paths."""
    data = json.dumps(asdict(found), indent=1, sort_keys=True)
    json_file, text_file, plot_file = (folder / name for name in FILES)
    write_whole(json_file, data.encode() + b"\n")
    write_whole(text_file, text(found).encode())
    plot(found, plot_file)
    return json_file, text_file, plot_file


def plot(found: Funnel, path: Path) -> None:
    """A panel a line: what is left after each step, by source; then what is read, by level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit = "tokens" if found.tokenizer else "characters"
    lines = list(dict.fromkeys(row.line for row in found.rows))
    figure = Figure(figsize=(12, 1.2 + 2.6 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), name in zip(axes, lines, strict=True):
        _plot_steps(left, [row for row in found.rows if row.line == name], unit)
        _plot_levels(right, [c for c in found.classes if c.line == name], unit)
        left.set_title(f"{name}: {unit} after each step", loc="left", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})  # equal bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Builds a corpus and shows its funnel. Exit code 2 for bad input, with one line of why."""
    p = argparse.ArgumentParser(prog="python -m glm45_jax.data.pipeline", description=main.__doc__)
    p.add_argument("recipe", help="module:function (sources, out) -> Corpus")
    p.add_argument("--sources", required=True, help="the folder of the raw text")
    p.add_argument("--out", required=True, help="where the corpus goes; goes on with what is there")
    p.add_argument("--tokenizer", help="tokenizer.json to count tokens with")
    args = p.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # Wrappers sum up each shard; warnings with file and line stay.
    logging.getLogger("glm45_jax.data.reading").setLevel(logging.WARNING)
    try:
        corpus = _recipe(args.recipe)(args.sources, args.out)
        tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
        built = build(corpus)
        found = funnel(corpus, built, tokenizer)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(text(found))
    for path in write(found, Path(corpus.folder)):
        log.info("wrote %s", path)
    for (line, step), seconds in built.seconds.items():
        log.info("%s/%s took %.1f s", line, step, seconds)
    return 0


def _recipe(name: str) -> Any:
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{name!r} is not module:function of a recipe ({error}); say experiments.corpus:recipe"
        ) from error
    finally:
        sys.path.pop(0)


class _Tokens:
    """Numbers of tokens, without `<|endoftext|>`; each different text is encoded once."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.counts = tokenizer is not None
        self._tokenizer = tokenizer
        self._known: dict[bytes, int] = {}

    def of(self, shards: Shards) -> int | None:
        """Of all documents; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return sum(n or 0 for _, n in self.each(shards))

    def each(self, shards: Shards) -> Any:
        """Each document with its number of tokens."""
        if self._tokenizer is None:
            yield from ((doc, None) for doc in shards.docs())
            return
        for docs, texts in in_batches(((doc, doc.text) for doc in shards.docs()), _BATCH_CHARS):
            keys = [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts]
            new = {k: t for k, t in zip(keys, texts, strict=True) if k not in self._known}
            encoded = self._tokenizer.encode_batch(list(new.values()))
            self._known |= {k: len(ids) for k, ids in zip(new, encoded, strict=True)}
            yield from ((doc, self._known[key]) for doc, key in zip(docs, keys, strict=True))


def _row(
    manifest: Manifest, source: str, counts: Counts, came: int | None, left: int | None
) -> Row:
    return Row(
        line=manifest.line,
        step=manifest.name,
        source=source,
        docs_in=counts.docs_in,
        docs_out=counts.docs_out,
        added=counts.added,
        chars_in=counts.chars_in,
        chars_out=counts.chars_out,
        tokens_in=left if came is None else came,  # raw documents that cannot be read have none
        tokens_out=left,
        dropped=dict(counts.dropped),
        told=dict(counts.told),
    )


def _classes(corpus: Corpus, line: Line, tokens: _Tokens) -> list[Class]:
    sums: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for source in line.sources:
        for doc, n_tokens in tokens.each(corpus.output(line.name, of=(source.name,))):
            copies = copies_of(doc)
            sums[source.name, *_class_of(doc)].update(
                docs=1,
                chars=len(doc.text),
                tokens=n_tokens or 0,
                reads=copies,
                read_chars=copies * len(doc.text),
                read_tokens=copies * (n_tokens or 0),
            )
    found = []
    for (source_name, language, bucket, level), one in sorted(sums.items()):
        counts: dict[str, Any] = dict(one)
        if not tokens.counts:
            counts |= {"tokens": None, "read_tokens": None}
        found.append(Class(line.name, source_name, language, bucket, level, **counts))
    return found


def _class_of(doc: Doc) -> tuple[str, str, str]:
    bucket = doc.meta.get("bucket", "")
    return (
        doc.meta.get("language", ""),
        bucket.zfill(2) if bucket else "",
        doc.meta.get("level", ""),
    )


def _level_cells(found: Funnel, with_tokens: bool) -> list[list[str]]:
    """Buckets of a level together."""
    groups: defaultdict[tuple[str, ...], list[Class]] = defaultdict(list)
    for one in found.classes:
        groups[one.line, one.source, one.language, one.level].append(one)
    cells = []
    for (line, source, language, level), members in groups.items():
        chars, read = sum(c.chars for c in members), sum(c.read_chars for c in members)
        row = [line, source, language or "-", level or "-", _n(sum(c.docs for c in members))]
        row += [_n(chars), f"{read / max(chars, 1):.2f}", _n(read)]
        if with_tokens:
            row.append(_n(sum(c.tokens or 0 for c in members)))
            row.append(_n(sum(c.read_tokens or 0 for c in members)))
        cells.append(row)
    return cells


def _bucket_cells(found: Funnel, with_tokens: bool) -> list[list[str]]:
    """Sources and languages of a line together; also buckets of which nothing is left."""
    came: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # by line and step
    for row in found.rows:
        for name, n in row.told.items():
            if match := _BUCKET.search(name):
                came[row.line, row.step][match[1]] += n
    last = {line: counts for (line, _), counts in came.items()}  # the later step
    cells = []
    for line, counts in last.items():
        for bucket, docs_in in sorted(counts.items()):
            members = [c for c in found.classes if (c.line, c.bucket) == (line, bucket)]
            chars, read = sum(c.chars for c in members), sum(c.read_chars for c in members)
            level = ", ".join(sorted({c.level for c in members})) or "-"
            cell = [line, bucket, level, _n(docs_in), _n(sum(c.docs for c in members)), _n(chars)]
            cell.append(f"{read / max(chars, 1):.2f}")
            cells.append(cell + [_n(sum(c.read_tokens or 0 for c in members))] * with_tokens)
    return cells


def _plot_steps(axis: Any, rows: Sequence[Row], unit: str) -> None:
    steps = list(dict.fromkeys(row.step for row in rows))
    bottom = dict.fromkeys(steps, 0)
    for source in dict.fromkeys(row.source for row in rows):
        mine = {row.step: row for row in rows if row.source == source}
        left = [mine[s].tokens_out if unit == "tokens" else mine[s].chars_out for s in steps]
        axis.bar(range(len(steps)), left, bottom=list(bottom.values()), label=source, width=0.7)
        bottom = {s: bottom[s] + (n or 0) for s, n in zip(steps, left, strict=True)}
    for at, n in enumerate(bottom.values()):
        axis.annotate(_short(n), (at, n), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(steps)), steps)
    axis.margins(y=0.15)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=6, ncols=2)


def _plot_levels(axis: Any, classes: Sequence[Class], unit: str) -> None:
    """Once, and as often as it is read."""
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for one in classes:
        label = f"{one.level or '-'}.{one.bucket}" if one.bucket else one.level or "-"
        once, read = (
            (one.tokens, one.read_tokens) if unit == "tokens" else (one.chars, one.read_chars)
        )
        sums[label][0] += once or 0
        sums[label][1] += read or 0
    labels = sorted(sums)
    places = range(len(labels))
    axis.bar(places, [sums[label][1] for label in labels], width=0.8, label="read")
    axis.bar(places, [sums[label][0] for label in labels], width=0.4, label="there")
    axis.set_xticks(places, labels)
    axis.set_title("by level.bucket, and as often as read", loc="left", fontsize=9)
    axis.tick_params(labelsize=6)
    axis.tick_params(axis="x", rotation=60)
    axis.legend(fontsize=6)


def _aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[at]) for row in (head, *body)) for at in range(len(head))]
    texts = {"line", "step", "source", "language", "level", "bucket", "dropped"}

    def shown(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if name in texts else cell.rjust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        )
        return "  ".join(cells).rstrip()

    return "\n".join(map(shown, (head, ["-" * width for width in widths], *body)))


def _n(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
