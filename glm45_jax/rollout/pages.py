"""Who holds which page of the cache, on the host. Types to know: `Pages`, `Prefix`, `Prefixes`.

A page has as many holders as rows and prefixes that read it. Only a page with one holder is ever
written. A page that nobody holds is free; a full one that has a name is kept until its place is
needed, so that later tokens that begin the same way find it. Letters: S tokens of a page, L A.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from glm45_jax.rollout.types import Prefilled

MIXED = None  # instead of a version: weights of two wrote the page
NAME_BYTES = 16


class Pages:
    """A free list with counts of holders, what wrote each page, and the names of those that can be
    found. Not safe for threads.

    version: of the weights that write to pages taken from now on.
    """

    def __init__(self, count: int, version: int = 0) -> None:
        self._empty = list(range(count - 1, -1, -1))
        self._kept: dict[int, None] = {}  # free, but findable; least recently held first
        self._holders = [0] * count
        self._version = version
        self._writer: list[int | None] = [version] * count
        self._name: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._routes: dict[int, np.ndarray] = {}

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._empty) + len(self._kept)

    @property
    def kept(self) -> int:
        """Free pages that can be found."""
        return len(self._kept)

    def holders(self, page: int) -> int:
        """How many rows and prefixes hold a page."""
        return self._holders[page]

    def take(self, n: int) -> list[int] | None:
        """`n` free pages, each now held once; None, and nothing taken, where there are fewer.

        Kept ones go last, the one held least recently first of them.
        """
        if n > self.free:
            return None
        taken = [self._empty.pop() for _ in range(min(n, len(self._empty)))]
        while len(taken) < n:
            page = next(iter(self._kept))
            self._forget(page)
            taken.append(self._empty.pop())
        for page in taken:
            self._holders[page], self._writer[page] = 1, self._version
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free; nobody can share it"
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each; those without any are free again, the last one of a row the
        first to be taken: without those before it nobody finds it.
        """
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} is released more often than taken"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._name:
                    self._kept[page] = None
                else:
                    self._empty.append(page)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The pages of these names up to the first that is not there, each with a holder more."""
        found = []
        for name in names:
            page = self._named.get(name)
            if page is None:
                break
            self._kept.pop(page, None)
            self._holders[page] += 1
            found.append(page)
        return found

    def remember(self, page: int, name: bytes, routes_SLA: np.ndarray | None = None) -> None:
        """None; a full page that somebody holds can be found from now on, unless it has a name or
        the name a page. routes_SLA: experts of its tokens, kept with it.
        """
        assert self._holders[page] > 0, f"page {page} is free; what it holds may be anything"
        if page in self._name or name in self._named:
            return
        self._name[page], self._named[name] = name, page
        if routes_SLA is not None:
            self._routes[page] = routes_SLA.copy()  # not a view of all tokens of its row

    def routes(self, pages: Iterable[int]) -> list[np.ndarray]:
        """Experts of the tokens of found pages, an array a page, where they were kept."""
        return [self._routes[page] for page in pages if page in self._routes]

    def forget_all(self) -> None:
        """None; no page is found any more, whoever holds it."""
        for page in list(self._name):
            self._forget(page)

    def renew(self, version: int) -> None:
        """None; what is written from now on is by weights of this version, and nobody finds what is
        of older ones.
        """
        self._version = version
        self.forget_all()

    def rewrite(self, pages: Sequence[int], *, begun: bool) -> None:
        """None; these pages of a row will be written by the weights of now. begun: the first of
        them holds tokens already, so it will be of two versions.
        """
        for i, page in enumerate(pages):
            mixed = begun and i == 0 and self._writer[page] != self._version
            self._writer[page] = MIXED if mixed else self._version

    def current(self, pages: Iterable[int]) -> bool:
        """Whether the weights of now wrote all of these."""
        return all(self._writer[page] == self._version for page in pages)

    def by_version(self) -> dict[int | None, int]:
        """How many pages in use (held or kept) the weights of each version wrote; `MIXED` for those
        that two did.
        """
        used = (p for p, n in enumerate(self._holders) if n or p in self._kept)
        return dict(Counter(self._writer[page] for page in used))

    def _forget(self, page: int) -> None:
        self._routes.pop(page, None)
        if name := self._name.pop(page, None):
            del self._named[name]
        if page in self._kept:
            del self._kept[page]
            self._empty.append(page)


def names_of(tokens: Sequence[int], page: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """A name of each full page of a row: a hash of its tokens and of the name before it, so of all
    tokens up to its end.

    known: the first names, or more, where they are known. 128 bits: two rows do not meet by chance.
    """
    names = list(known)[: len(tokens) // page]
    for start in range(len(names) * page, len(tokens) - page + 1, page):
        before = names[-1] if names else b""
        content = before + np.asarray(tokens[start : start + page], np.int32).tobytes()
        names.append(hashlib.blake2b(content, digest_size=NAME_BYTES).digest())
    return names


@dataclasses.dataclass(eq=False)
class Prefix:
    """A row of tokens on its way into the cache, or all there, for those that wait with the same
    tokens.

    names: of its full pages, or none where pages are not found again. done: tokens in the cache,
    all by the weights of now, those that were found among them. routes: experts, in pieces.
    """

    tokens: list[int]
    pages: list[int]
    names: list[bytes] = dataclasses.field(default_factory=list)
    done: int = 0
    last: Prefilled | None = None
    routes: list[np.ndarray] = dataclasses.field(default_factory=list)

    def read(self, count: int, last: Prefilled) -> None:
        """None; so many more tokens are in the cache. last: what their prefill left."""
        self.done, self.last = self.done + count, last
        if last.routes_TLA is not None:
            self.routes.append(last.routes_TLA)

    @property
    def ready(self) -> bool:
        """Whether all of it is in the cache."""
        return self.done == len(self.tokens)


class Prefixes:
    """Prefixes that somebody waits for, by their tokens; each goes with the last who waits."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._waiting: Counter[bytes] = Counter()
        self._of: dict[bytes, Prefix] = {}

    def want(self, key: bytes) -> None:
        """One more waits for these tokens."""
        self._waiting[key] += 1

    def unwant(self, key: bytes) -> None:
        """One less waits; after the last the prefix is dropped."""
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]
            self.drop(key)

    def waiting(self, key: bytes) -> int:
        """How many wait for these tokens."""
        return self._waiting[key]

    def get(self, key: bytes) -> Prefix | None:
        """The prefix of these tokens, where it was begun."""
        return self._of.get(key)

    def begin(self, key: bytes, prefix: Prefix) -> Prefix:
        """The prefix, for all who wait for these tokens; it holds its pages from now on."""
        assert key not in self._of and self._waiting[key]
        self._of[key] = prefix
        return prefix

    def give(self, key: bytes) -> Prefix:
        """The prefix with its pages, which are the caller's from now on."""
        return self._of.pop(key)

    def drop(self, key: bytes) -> None:
        """None; its pages have a holder less, who waits for it begins again."""
        if prefix := self._of.pop(key, None):
            self._pages.release(prefix.pages)

    def drop_all(self) -> None:
        """None; as after a push of weights, whose keys and values these are not."""
        for key in list(self._of):
            self.drop(key)

    def reclaim(self, wanted: int, *, keep: bytes | None = None) -> bool:
        """Whether `wanted` pages are free, prefixes but `keep` dropped, youngest first, until they
        are.
        """
        for key in list(reversed(self._of)):
            if self._pages.free >= wanted:
                break
            if key != keep:
                self.drop(key)
        return self._pages.free >= wanted
