"""Conversations to learn from: where they come from, and how one becomes samples of ids and masks.

A conversation is a `Doc` whose meta["messages"] is a chat as JSON (OpenAI's form), with
meta["tools"] and meta["thinking"] where it has them; any `Source` may give such documents. What is
trained is `chat.encode`'s mask. Source: spec 4.3, 7.1.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glm45_jax import chat
from glm45_jax.data.sources import Doc, Source, counted, refuse_encoder
from glm45_jax.tokenizer import Tokenizer

USER = "<|user|>"
CHATS_FORMAT = 1  # raise it when AsChat gives the same conversation other ids
FIELDS = ("messages", "tools", "thinking", "id", "group")  # of a line of a file


@dataclass(frozen=True)
class Sample:
    """One text to learn from. tokens_T: int32. written_T: bool, the model writes it and is trained
    on it. thinking: whether it was rendered in thinking mode.
    """

    tokens_T: np.ndarray
    written_T: np.ndarray
    thinking: bool


@dataclass(frozen=True)
class ChatFile:
    """A file of JSON lines, or every file of a folder that matches the pattern, by path.

    A line: {"messages": [...]} and, if wanted, "tools": [...], "thinking": true or false (see
    `samples_of`), "id", and "group" (conversations that must not be parted by the validation
    split).
    """

    path: str
    name: str = "chats"
    pattern: str = "**/*.jsonl"

    def docs(self) -> Iterator[Doc]:
        """One document a line.

        Raises: ValueError for a line that is no conversation, with its place.
        """
        for file, where in self._files():
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield self._doc(line, f"{where}:{number}")

    def version(self) -> str:
        """A digest of paths, sizes and times, so that an edited file is read again."""
        digest = hashlib.sha256()
        for file, where in self._files():
            stat = file.stat()
            digest.update(f"{where} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _files(self) -> list[tuple[Path, str]]:
        root = Path(self.path)
        if root.is_file():
            return [(root, root.name)]
        found = sorted(p for p in root.glob(self.pattern) if p.is_file())
        if not found:
            raise ValueError(
                f"no conversations at {root}: neither a file nor a folder with {self.pattern}"
            )
        return [(p, p.relative_to(root).as_posix()) for p in found]

    def _doc(self, line: str, where: str) -> Doc:
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(fields, Mapping) or not isinstance(fields.get("messages"), list):
            raise ValueError(f'{where} has no list "messages"; a line is one conversation')
        if unknown := sorted(set(fields) - set(FIELDS)):
            raise ValueError(f"{where} has {unknown}; known are {', '.join(FIELDS)}")
        return document(
            fields["messages"],
            source=self.name,
            id=str(fields.get("id") or where),
            tools=fields.get("tools"),
            thinking=fields.get("thinking"),
            group=fields.get("group"),
        )


@dataclass(frozen=True)
class MadeChats:
    """Conversations made, or held, in memory: make(0) to make(count - 1), each a list of messages.

    make: a pure function. A named one, or a frozen dataclass that is called, can be part of an
    experiment. edition: raise it when `make` gives other conversations under the same name.
    """

    make: Callable[[int], Sequence[chat.Message]]
    count: int
    name: str = "made"
    edition: int = 0

    def docs(self) -> Iterator[Doc]:
        """One document a number."""
        for n in range(self.count):
            yield document(self.make(n), source=self.name, id=f"{self.name}/{n}")

    def version(self) -> str:
        """The edition."""
        return str(self.edition)


def document(
    messages: Sequence[chat.Message],
    *,
    source: str,
    id: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
    group: str | None = None,
) -> Doc:
    """A conversation as a document; its text is all that is said in it, one part a line.

    Raises: ValueError for a "thinking" that is neither true nor false.
    """
    if thinking is not None and not isinstance(thinking, bool):
        raise ValueError(f"{id}: thinking is {thinking!r}; use true, false, or leave it out")
    meta = {"messages": json.dumps(list(messages), ensure_ascii=False)}
    if tools:
        meta["tools"] = json.dumps(list(tools), ensure_ascii=False)
    if thinking is not None:
        meta["thinking"] = json.dumps(thinking)
    if group is not None:
        meta["group"] = str(group)
    return Doc(id, "\n".join(_said(messages)), source, meta)


def samples_of(
    doc: Doc,
    tokenizer: Tokenizer,
    *,
    family: str = "glm-4.5",
    clear_thinking: bool | None = None,
    direct: float = 0.0,
) -> list[Sample]:
    """What the model learns from a conversation: every turn of it once, as it wrote it.

    meta["thinking"] says the mode; without it, conversations with reasoning are in thinking mode
    and those without in direct mode. "true" without reasoning teaches to decide on an empty think
    block. direct: of the conversations in thinking mode, the share (by a hash) that is read with
    the reasoning taken out, in direct mode.

    The template shows reasoning after the last user message only. A conversation with reasoning
    before it becomes a sample for each user message, of all up to the next one, trained on what
    follows that message; any other is one sample. Samples that train nothing are left out.

    Raises: ValueError for a document that is no conversation, with its id.
    """
    try:
        messages = json.loads(doc.meta["messages"])
    except (KeyError, ValueError) as error:
        raise ValueError(f'{doc.id} of {doc.source!r} has no meta["messages"] in JSON') from error
    tools = json.loads(doc.meta["tools"]) if "tools" in doc.meta else None
    reasons = [_reasons(message) for message in messages]
    thinking = json.loads(doc.meta["thinking"]) if "thinking" in doc.meta else any(reasons)
    if thinking and direct and _share_of(doc) < direct:
        messages, reasons, thinking = [_bare(m) for m in messages], [False] * len(messages), False

    def sample(messages: Sequence[chat.Message], since: int) -> Sample:
        encoded = chat.encode(
            tokenizer,
            messages,
            tools=tools,
            enable_thinking=None if thinking else False,
            clear_thinking=clear_thinking,
            family=family,
        )
        tokens_T = np.array(encoded.tokens, np.int32)
        written_T = np.array(encoded.mask, bool)
        if since:
            places = np.flatnonzero(tokens_T == tokenizer.id_of(USER))
            written_T[: places[since - 1] + 1] = False
        return Sample(tokens_T, written_T, thinking)

    keeps = chat.FAMILIES[family].preserves and clear_thinking is False
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    try:
        if keeps or not thinking or not users or not any(reasons[: users[-1]]):
            found = [sample(messages, 0)]
        else:
            stops = [*users[1:], len(messages)]
            found = [sample(messages[:stop], n) for n, stop in enumerate(stops, start=1)]
    except ValueError as error:
        raise ValueError(f"{doc.id} of {doc.source!r}: {error}") from error
    return [one for one in found if one.written_T.any()]


def counted_samples(
    docs: Sequence[Doc], tokenizer: Tokenizer, counts: dict[str, int], **options: Any
) -> Generator[Sample]:
    """Samples of all documents, in order; `counts` gains conversations, samples, thinking, direct,
    untrained (conversations that train nothing), tokens and written (of these, by the model).
    """
    names = ("conversations", "samples", "thinking", "direct", "untrained", "tokens", "written")
    for name in names:
        counts.setdefault(name, 0)
    for doc in docs:
        samples = samples_of(doc, tokenizer, **options)
        counts["conversations"] += 1
        counts["untrained"] += not samples
        for one in samples:
            counts["samples"] += 1
            counts["thinking" if one.thinking else "direct"] += 1
            counts["tokens"] += len(one.tokens_T)
            counts["written"] += int(one.written_T.sum())
            yield one


@dataclass(frozen=True)
class AsChat:
    """Conversations (meta["messages"], meta["tools"]) in the chat format, every token learnt from.

    For mid-training; where only what the model writes is to be learnt, use `sft.Chats`.
    """

    source: Source
    family: str = "glm-4.5"

    def __post_init__(self):
        refuse_encoder(self.source, "AsChat")

    @property
    def name(self) -> str:
        """The name of the source inside."""
        return self.source.name

    def version(self) -> str:
        """That of the source inside."""
        return f"{self.source.version()} chat={CHATS_FORMAT}"

    def docs(self) -> Generator[Doc, None, dict[str, int]]:
        """As they are."""
        inner: dict[str, int] = {}
        yield from counted(self.source, inner)
        return inner

    def encode(self, docs: Sequence[Doc], tokenizer: Tokenizer) -> list[list[int]]:
        """Ids of every conversation, with the role that ends it.

        Raises: ValueError for a document that is no conversation.
        """
        return [self._ids(doc, tokenizer) for doc in docs]

    def _ids(self, doc: Doc, tokenizer: Tokenizer) -> list[int]:
        if "messages" not in doc.meta:
            raise ValueError(f'{doc.id} of {doc.source!r} has no meta["messages"]; it is no chat')
        messages = json.loads(doc.meta["messages"])
        tools = json.loads(doc.meta["tools"]) if "tools" in doc.meta else None
        reasons = any(message.get("reasoning_content") for message in messages)
        mode = None if reasons else False
        return chat.encode(
            tokenizer, messages, tools=tools, enable_thinking=mode, family=self.family
        ).tokens


def _said(messages: Sequence[chat.Message]) -> Iterator[str]:
    for message in messages:
        for part in (message.get("reasoning_content"), message.get("content")):
            if isinstance(part, str):
                yield part
            elif part:
                yield json.dumps(part, ensure_ascii=False)
        for call in message.get("tool_calls") or ():
            yield json.dumps(call, ensure_ascii=False)


def _reasons(message: chat.Message) -> bool:
    """Whether an assistant's message has reasoning, in its own field or inside the content."""
    if message.get("role") != "assistant":
        return False
    reasoning, content = message.get("reasoning_content"), message.get("content")
    if isinstance(reasoning, str):
        return bool(reasoning.strip())
    return isinstance(content, str) and "</think>" in content


def _bare(message: chat.Message) -> chat.Message:
    """The message without its reasoning."""
    if message.get("role") != "assistant":
        return message
    content = message.get("content")
    if isinstance(content, str) and not isinstance(message.get("reasoning_content"), str):
        content = content.split("</think>")[-1].lstrip("\n")
    return {**message, "content": content, "reasoning_content": ""}


def _share_of(doc: Doc) -> float:
    """A number in [0, 1) that is the document's own."""
    digest = hashlib.sha256(f"direct\0{doc.source}\0{doc.id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
