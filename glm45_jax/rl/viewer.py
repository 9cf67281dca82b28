"""A pool as one HTML page: prompt, tokens with log-probs and versions, reward parts, advantage,
gradient step. Static and self-contained: no scripts, nothing loaded, everything escaped, since the
texts are a model's and a stranger's. `python -m glm45_jax.rl.viewer POOL_DIR --out FILE.html`

Tokens are ids, or text with `--tokenizer` (a tokenizer.json or its folder). No jax.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm45_jax.rl import rows
from glm45_jax.rl.ledger import Ledger
from glm45_jax.rl.trajectory import Trajectory
from glm45_jax.train.document import END, html_table, start, text

BATCHES = 2  # shown unless told; the last ones
GROUPS = 8  # of a batch
TOKENS = 1000  # of a sample; a token is about 100 bytes of HTML
SHADES = 10  # colours of a log-probability
SHADE_NATS = 0.5  # a colour each; the last is for all that is less likely
VERSION_COLOURS = 6

_STYLE = """
summary{cursor:pointer}details{margin:.4em 0 .4em 1em}
.tokens{white-space:pre-wrap;overflow-wrap:anywhere;background:#f7f7f7;padding:.6em;
font:13px/1.9 ui-monospace,monospace}
.tokens span{border-bottom:3px solid transparent;margin-right:1px}.given{color:#999}
.plus{color:#0a6b2d}.minus{color:#a11}
"""


@dataclasses.dataclass(frozen=True)
class Shown:
    """What of a pool is shown. batches: the last so many; groups and tokens: the first of each."""

    batches: int = BATCHES
    groups: int = GROUPS
    tokens: int = TOKENS


def page(
    ledger: Ledger, *, shown: Shown = Shown(), decode: Callable[[int], str] | None = None
) -> Iterator[str]:
    """The page in pieces. decode: text of an id; None shows ids. What is left out is said."""
    yield start(f"{ledger.run}: pool", _STYLE + _colours())
    with ledger.read() as db:
        yield f"<h1>{text(ledger.run)}</h1>{_table(rows.counts(db))}{_legend()}"
        batches = rows.scalar(db, rows.BATCHES)
        first = max(batches - shown.batches, 0)
        yield _left_out(first, batches, "batches", "--batches")
        for batch in range(first, batches):
            yield from _batch(ledger, batch, shown, decode)
    yield END


def write_page(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    shown: Shown = Shown(),
    decode: Callable[[int], str] | None = None,
) -> None:
    """Writes the page of the pool in `folder`, whole or not at all; a run may go on meanwhile.

    Raises: FileNotFoundError for a folder without a pool; ValueError for a damaged one.
    """
    ledger = Ledger(folder, run=None, read_only=True)
    temporary = Path(out).with_name(f".{Path(out).name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(page(ledger, shown=shown, decode=decode))
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
        ledger.close()


def _batch(
    ledger: Ledger, batch: int, shown: Shown, decode: Callable[[int], str] | None
) -> Iterator[str]:
    """A gradient step and its groups."""
    db = ledger.db
    state, version, numbers = db.execute(
        "SELECT state, version, numbers FROM batches WHERE number = ?", (batch,)
    ).fetchone()
    places = [place for place, _ in rows.samples_of_batch(db, batch)]
    places = list(dict.fromkeys(places))
    yield f"<h2>Gradient step {batch}</h2>"
    facts = {"state": state, "groups": len(places), "version of the weights": version}
    yield _table(facts | json.loads(numbers))
    if batch < rows.pruned(db):
        yield "<p>Its trajectories were pruned; rewards and advantages are left.</p>"
    advantages = rows.advantages_of(db, batch)
    for place in places[: shown.groups]:
        yield from _group(ledger, place, advantages, shown, decode)
    yield _left_out(len(places) - shown.groups, len(places), "groups", "--groups")


def _group(
    ledger: Ledger,
    place: int,
    advantages: Mapping[tuple[int, int], float | None],
    shown: Shown,
    decode: Callable[[int], str] | None,
) -> Iterator[str]:
    prompt = rows.prompt_at(ledger.db, place)
    samples = ledger.db.execute(
        "SELECT sample, status, reward, body IS NULL FROM samples WHERE place = ? ORDER BY sample",
        (place,),
    ).fetchall()
    mean = float(np.mean([reward for _, _, reward, _ in samples]))
    yield (
        f"<details><summary><b>{text(prompt.key)}</b> task {prompt.number} of {text(prompt.env)}, "
        f"{len(samples)} samples, mean reward {mean:.4g}</summary>"
    )
    if prompt.meta:
        yield _table(prompt.meta)
    for sample, status, reward, pruned in samples:
        advantage = advantages.get((place, sample))
        told = "not trained" if advantage is None else f"advantage {_signed(advantage)}"
        yield (
            f"<details><summary>sample {sample}: reward {reward:.4g}, {told}, {text(status)}"
            "</summary>"
        )
        if not pruned:
            one = rows.read_sample(ledger.db, ledger.path, place, sample)
            yield from _sample(one, shown, decode)
        yield "</details>"
    yield "</details>"


def _sample(one: Trajectory, shown: Shown, decode: Callable[[int], str] | None) -> Iterator[str]:
    if one.parts:
        yield _table(one.parts)
    versions = np.unique(one.versions_T[one.sampled_T]).tolist()
    drawn_by = ", ".join(map(str, versions)) or "none"
    yield (
        f"<p>{len(one.tokens_T)} tokens, {int(one.sampled_T.sum())} drawn by weights of version "
        f"{drawn_by} at temperature {one.temperature:g}; their log-prob "
        f"{float(one.logp_T[one.sampled_T].sum()):.4g}</p><div class='tokens'>"
    )
    for t in range(min(len(one.tokens_T), shown.tokens)):
        yield _token(one, t, decode)
    yield "</div>"
    yield _left_out(len(one.tokens_T) - shown.tokens, len(one.tokens_T), "tokens", "--tokens")
    if one.messages:
        yield "<details><summary>messages</summary>"
        for message in one.messages:
            yield f"<p><b>{text(message.get('role', ''))}</b></p><pre>{_message(message)}</pre>"
        yield "</details>"


def _token(one: Trajectory, t: int, decode: Callable[[int], str] | None) -> str:
    token = int(one.tokens_T[t])
    said = text(decode(token)) if decode else str(token)
    gap = "" if decode else " "
    if not one.sampled_T[t]:
        return f"<span class='given' title='{t}: id {token}, given'>{said}</span>{gap}"
    logp, version = float(one.logp_T[t]), int(one.versions_T[t])
    shade = min(max(int(-logp / SHADE_NATS), 0), SHADES - 1)
    title = (
        f"{t}: id {token}, log-prob {logp:.4f} (p {np.exp(min(logp, 0)):.4f}), version {version}"
    )
    return f"<span class='p{shade} v{version % VERSION_COLOURS}' title='{title}'>{said}</span>{gap}"


def _message(message: Any) -> str:
    """A message's parts, each named."""
    parts = []
    for name, value in message.items():
        if name == "role" or value in (None, "", [], ()):
            continue
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
        parts.append(said if name == "content" else f"[{name}]\n{said}")
    return text("\n".join(parts))


def _table(values: Any) -> str:
    return html_table([(name, _number(value)) for name, value in dict(values).items()])


def _number(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _signed(value: float) -> str:
    return f"<span class='{'minus' if value < 0 else 'plus'}'>{value:+.4g}</span>"


def _left_out(n: int, total: int, what: str, flag: str) -> str:
    return f"<p>{n} of {total} {what} are not shown ({flag}).</p>" if n > 0 else ""


def _legend() -> str:
    shades = "".join(f"<span class='p{i}'> {i * SHADE_NATS:g} </span>" for i in range(SHADES))
    return (
        f"<p class='tokens'>A drawn token's colour is -log-prob in nats: {shades}; the line below "
        "it is the version of the weights; grey was given. Point at one for its numbers.</p>"
    )


def _colours() -> str:
    shades = (f".p{i}{{background:hsl({130 - 13 * i},65%,{90 - 1.5 * i}%)}}" for i in range(SHADES))
    lines = (
        f".tokens .v{i}{{border-color:hsl({200 + 360 * i // VERSION_COLOURS},70%,45%)}}"
        for i in range(VERSION_COLOURS)
    )
    return "".join((*shades, *lines))


def _decoder(path: str) -> Callable[[int], str]:
    """Text of an id; a number for one that the tokenizer does not have (padding of the table)."""
    from glm45_jax.tokenizer import Tokenizer  # loads a native library

    tokenizer = Tokenizer.load(path)
    return lambda token: tokenizer.decode([token]) if 0 <= token < tokenizer.vocab else f"<{token}>"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m glm45_jax.rl.viewer", description=__doc__)
    parser.add_argument("pool", help="folder of the pool")
    parser.add_argument("--out", required=True, help="the HTML file to write")
    parser.add_argument("--tokenizer", help="tokenizer.json or its folder")
    parser.add_argument("--batches", type=int, default=BATCHES, help="the last so many")
    parser.add_argument("--groups", type=int, default=GROUPS, help="of each batch")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each sample")
    given = parser.parse_args(argv)
    decode = _decoder(given.tokenizer) if given.tokenizer else None
    shown = Shown(given.batches, given.groups, given.tokens)
    try:
        write_page(given.pool, given.out, shown=shown, decode=decode)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
