"""Who holds which page of the cache, on the host. Types to know: `Pages`, `Prefix`, `Prefixes`.

A page has as many holders as rows and prefixes that read it; it is free when it has none. Only a
page with one holder is ever written.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np

from glm45_jax.rollout.types import Prefilled


class Pages:
    """A free list with counts of holders. Not safe for threads."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many rows and prefixes hold a page."""
        return self._holders[page]

    def take(self, n: int) -> list[int] | None:
        """`n` free pages, each now held once; None, and nothing taken, where there are fewer."""
        if n > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free; nobody can share it"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each; those without any are free again."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is released more often than taken"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)


@dataclasses.dataclass(eq=False)
class Prefix:
    """A row of tokens on its way into the cache, or all there, for those that wait with the same
    tokens.

    done: tokens prefilled, all by the weights of now. routes: experts, a chunk each.
    """

    tokens: list[int]
    pages: list[int]
    done: int = 0
    last: Prefilled | None = None
    routes: list[np.ndarray] = dataclasses.field(default_factory=list)

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

    def begin(self, key: bytes, tokens: list[int], pages: list[int]) -> Prefix:
        """A prefix of which nothing is in the cache yet; it holds the pages from now on."""
        assert key not in self._of and self._waiting[key]
        self._of[key] = Prefix(tokens, pages)
        return self._of[key]

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
