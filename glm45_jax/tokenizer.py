"""The GLM tokenizer: text to ids and back, and training a small one of the same form.

Byte-level BPE as in GLM-4.5: GPT-4 style splitting, no normalizer, nothing added at either end, the
36 GLM tokens after the base vocabulary. The type to know is `Tokenizer`, a plain wrapper over the
released `tokenizer.json`; `check_model` holds it against a model. Text is untrusted unless said
otherwise: `<|endoftext|>` in a document is thirteen characters, not the token. Source: spec 1.4.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from glm45_jax.integrity import write_whole


class SpecialToken(NamedTuple):
    """One added token; `special` tokens vanish from `decode(..., skip_special=True)`."""

    text: str
    special: bool


END_OF_TEXT = "<|endoftext|>"
# What ends a turn: the end of everything, the next user turn, the wait for a tool's answer.
STOP_TOKENS = (END_OF_TEXT, "<|user|>", "<|observation|>")

# Of so many texts, none of more characters, the ids are remembered: those that were asked for last.
# RL encodes a group's prompt once more with each of its answers.
RECENT, SHORT = 1024, 2048

# In the order of their ids. Think, tool, argument, box, image and video tokens are not special, so
# that a decode which skips special tokens still shows reasoning and tool calls. Source: spec 1.4.
SPECIAL_TOKENS: tuple[SpecialToken, ...] = (
    SpecialToken(END_OF_TEXT, True),
    SpecialToken("[MASK]", True),
    SpecialToken("[gMASK]", True),
    SpecialToken("[sMASK]", True),
    SpecialToken("<sop>", True),
    SpecialToken("<eop>", True),
    SpecialToken("<|system|>", True),
    SpecialToken("<|user|>", True),
    SpecialToken("<|assistant|>", True),
    SpecialToken("<|observation|>", True),
    SpecialToken("<|begin_of_image|>", True),
    SpecialToken("<|end_of_image|>", True),
    SpecialToken("<|begin_of_video|>", True),
    SpecialToken("<|end_of_video|>", True),
    SpecialToken("<|begin_of_audio|>", True),
    SpecialToken("<|end_of_audio|>", True),
    SpecialToken("<|begin_of_transcription|>", True),
    SpecialToken("<|end_of_transcription|>", True),
    SpecialToken("<|code_prefix|>", True),
    SpecialToken("<|code_middle|>", True),
    SpecialToken("<|code_suffix|>", True),
    SpecialToken("<think>", False),
    SpecialToken("</think>", False),
    SpecialToken("<tool_call>", False),
    SpecialToken("</tool_call>", False),
    SpecialToken("<tool_response>", False),
    SpecialToken("</tool_response>", False),
    SpecialToken("<arg_key>", False),
    SpecialToken("</arg_key>", False),
    SpecialToken("<arg_value>", False),
    SpecialToken("</arg_value>", False),
    SpecialToken("/nothink", True),
    SpecialToken("<|begin_of_box|>", False),
    SpecialToken("<|end_of_box|>", False),
    SpecialToken("<|image|>", False),
    SpecialToken("<|video|>", False),
)


class Release(NamedTuple):
    """Where a family has the GLM tokens, in their order from `first`, and which are special."""

    name: str
    first: int  # id of <|endoftext|>: the size of the base vocabulary
    rows: int  # of the model's table; those after the GLM tokens are padding
    tokens: tuple[SpecialToken, ...]


FLASH_SPECIAL = 18  # GLM-4.7-Flash: only the first so many are special
RELEASES = (
    Release("GLM-4.5, 4.6 and 4.7", 151_329, 151_552, SPECIAL_TOKENS),
    Release(
        "GLM-4.7-Flash",
        154_820,
        154_880,
        tuple(t._replace(special=at < FLASH_SPECIAL) for at, t in enumerate(SPECIAL_TOKENS)),
    ),
)

# Contractions of any case, a word with at most one leading mark, digits in runs of 1-3, marks with
# the line ends after them, blank lines, spaces (all but the one that belongs to the next word).
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A tokenizer made from the text of a `tokenizer.json`; never changes after that."""

    def __init__(self, json_text: str):
        """Reads the text.

        Raises: ValueError when it is not JSON or not a BPE tokenizer.
        """
        spec = _parsed(json_text)
        self._full = tokenizers.Tokenizer.from_str(json_text)
        # The library always recognises added tokens inside text, so untrusted text goes through a
        # twin that has none (nor their words, where a file lists them in the base vocabulary too).
        added = {token["content"] for token in spec.get("added_tokens") or ()}
        base = {word: at for word, at in spec["model"]["vocab"].items() if word not in added}
        plain = spec | {"added_tokens": [], "model": spec["model"] | {"vocab": base}}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self._vocab = 1 + max(self._full.get_vocab(with_added_tokens=True).values())

    @property
    def vocab(self) -> int:
        """Number of ids, added tokens included (151365 for GLM-4.5, whose table has more rows)."""
        return self._vocab

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the tokenizer does: the same in any layout of the file."""
        canonical = json.dumps(json.loads(self._full.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def id_of(self, token: str) -> int:
        """The id of one token written as it stands in the vocabulary.

        Raises: ValueError when there is no such token.
        """
        token_id = self._full.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"token {token!r} is not among the {self.vocab} tokens of this tokenizer; "
                "the GLM tokens are listed in glm45_jax.tokenizer.SPECIAL_TOKENS"
            )
        return token_id

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: of `<|endoftext|>`, `<|user|>`, `<|observation|>`, as released.

        Raises: ValueError when the vocabulary lacks one.
        """
        return tuple(self.id_of(token) for token in STOP_TOKENS)

    def check_model(
        self, *, rows: int, eos: int | Sequence[int] | None = None, pad: int | None = None
    ) -> None:
        """Returns if a model of `rows` embedding rows speaks this tokenizer's ids.

        eos, pad: `eos_token_id` and `pad_token_id` of its config.json, where it has them; eos may
        leave out stop ids but `<|endoftext|>`. A table as large as a released one must have the GLM
        tokens where that release has them.

        Raises: ValueError that names everything that does not fit.
        """
        found = [self._full.token_to_id(token.text) for token in SPECIAL_TOKENS]
        if wrong := self._misplaced(found, rows):
            problems = [wrong]
        else:
            problems = _other_ids("eos_token_id", eos, self.stop_ids)
            problems += _other_ids("pad_token_id", pad, self.stop_ids[:1])
        # Flags of other tokens differ between releases and do no harm.
        flags = {token.content: token.special for token in self._added.values()}
        hidden = [t.text for t in SPECIAL_TOKENS if not t.special and flags.get(t.text)]
        if hidden:
            problems.append(
                f"{', '.join(hidden)} are special, so decoding would lose reasoning and calls"
            )
        if problems:
            raise ValueError(
                f"tokenizer and model do not fit: {'; '.join(problems)}. Use tokenizer.json and "
                "config.json of one release, or correct the config"
            )

    @property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self._full.get_added_tokens_decoder()

    def _misplaced(self, found: list[int | None], rows: int) -> str:
        """What is wrong with the ids of the GLM tokens for a table of so many rows; else empty."""
        missing = [t.text for t, at in zip(SPECIAL_TOKENS, found, strict=True) if at is None]
        if missing:
            return f"the tokenizer lacks {', '.join(missing)}"
        ours = next(
            (release.name for release in RELEASES if release.first == found[0]), "no release"
        )
        if self.vocab > rows:
            return f"the tokenizer has {self.vocab} ids ({ours}), the model {rows} rows"
        known = next((release for release in RELEASES if release.rows == rows), None)
        first = known.first if known else found[0]
        for at, (token, got) in enumerate(
            zip(SPECIAL_TOKENS, found, strict=True), start=first or 0
        ):
            if got != at:
                where = f"in {known.name} ({rows} rows)" if known else "by the order of the release"
                return f"{token.text} is id {got} ({ours}), {where} it is {at}"
        return ""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of the text; nothing is added at either end.

        allow_special: read `<|user|>` and the like as tokens. Only for text that we wrote.
        """
        ids = _recent_ids if len(text) <= SHORT else _ids
        return list(ids(self._coder(allow_special), text))

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Ids of every text, on all cores; the same ids as `encode` one by one."""
        coder = self._coder(allow_special)
        encodings = coder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def word_of(self, token: int) -> str | None:
        """An id as the vocabulary writes it, a letter a byte; None where it has no such id."""
        return self._full.id_to_token(token)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of the ids; bytes that are not UTF-8 (a cut character) become U+FFFD.

        Raises: ValueError for an id that the vocabulary does not have.
        """
        known = [int(i) for i in ids]
        if known and not 0 <= min(known) <= max(known) < self.vocab:
            wrong = next(i for i in known if not 0 <= i < self.vocab)
            raise ValueError(
                f"id {wrong} is outside the tokenizer's {self.vocab} ids; these ids come from "
                "another tokenizer, or from padding rows of the model's table (mask them)"
            )
        return self._full.decode(known, skip_special_tokens=skip_special)

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json` (path is that file or its folder), whole or not at all."""
        file = _json_file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, self._full.to_str().encode())

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a `tokenizer.json` (path is that file or its folder).

        A `tokenizer_config.json` beside it must say the same of the added, eos and pad tokens.

        Raises: ValueError when the file is missing, damaged, no BPE tokenizer, or at odds with the
        other.
        """
        file = _json_file(path)
        if not file.is_file():
            raise ValueError(f"no tokenizer at {file}; train one (train_bpe) or copy one there")
        try:
            tokenizer = cls(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"cannot read the tokenizer {file}: {error}") from error
        config = file.with_name("tokenizer_config.json")
        if file.name == "tokenizer.json" and config.is_file():
            tokenizer._check_config(config)
        return tokenizer

    def _check_config(self, file: Path) -> None:
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); copy it again or remove it") from error
        said = {
            entry["content"]: int(at)
            for at, entry in (config.get("added_tokens_decoder") or {}).items()
        }
        for name in ("eos_token", "pad_token"):
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                said.setdefault(token, self.id_of(token))
        for token, at in said.items():
            if (got := self._full.token_to_id(token)) != at:
                raise ValueError(
                    f"{file} gives {token!r} id {at}, tokenizer.json {got}; "
                    "they are of two releases, copy both from one"
                )

    def _coder(self, allow_special: bool) -> tokenizers.Tokenizer:
        return self._full if allow_special else self._plain


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A GLM-style tokenizer with exactly `vocab` ids, the 36 GLM tokens last.

    Same texts in the same order give the same tokenizer. GLM tokens inside the texts are left out.

    Raises: ValueError when vocab is too small for 256 bytes and the GLM tokens, or when the texts
    have too few different words for it.
    """
    base = vocab - len(SPECIAL_TOKENS)
    if base < 256:
        least = 256 + len(SPECIAL_TOKENS)
        raise ValueError(f"vocab {vocab} is below {least} = 256 bytes + the GLM tokens; raise it")
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=base,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_special(texts), trainer)
    got = tokenizer.get_vocab_size()
    if got != base:
        raise ValueError(
            f"the texts give only {got} base tokens of the {base} that vocab {vocab} needs; "
            f"give more text or use vocab <= {got + len(SPECIAL_TOKENS)}"
        )
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token.text, special=token.special, normalized=False)
            for token in SPECIAL_TOKENS
        ]
    )
    return Tokenizer(tokenizer.to_str())


def _ids(coder: tokenizers.Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(coder.encode(text, add_special_tokens=False).ids)


_recent_ids = lru_cache(RECENT)(_ids)


def _untrained() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _without_special(texts: Iterable[str]) -> Iterator[str]:
    # "/nothink" is one word to the splitter: learnt as a base token it would take the GLM token's
    # place and shift every id after it.
    pattern = re.compile("|".join(re.escape(token.text) for token in SPECIAL_TOKENS))
    for text in texts:
        yield from pattern.split(text)


def _parsed(json_text: str) -> dict[str, Any]:
    try:
        spec = json.loads(json_text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{len(json_text)} characters that are not JSON ({error}); the file is cut short or "
            "not a tokenizer.json, copy it again"
        ) from error
    model = spec.get("model") if isinstance(spec, dict) else None
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE":
        raise ValueError(f"model type {kind!r}, expected 'BPE'; give a byte-level BPE tokenizer")
    return spec


def _other_ids(name: str, given: int | Sequence[int] | None, ours: Sequence[int]) -> list[str]:
    """One complaint where a config's ids are not the tokenizer's; it may leave some out."""
    given = [given] if isinstance(given, int) else given
    if given is None or (ours[0] in given and set(given) <= set(ours)):
        return []
    return [f"{name} is {list(given)}, the tokenizer says {list(ours)}"]


def _json_file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / "tokenizer.json"
