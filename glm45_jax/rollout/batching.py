"""The synchronous core of the driver: who runs, who waits, who holds which page. The type to know
is `Batcher`. One thread at a time. Letters: B slots, P pages of a row.

Order is arrival: a request waits for the one before it, a preempted one keeps its place.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from glm45_jax.rollout.pages import Pages, Prefix, Prefixes, names_of
from glm45_jax.rollout.prometheus import Times
from glm45_jax.rollout.request import Request, key_of, others_behind
from glm45_jax.rollout.types import (
    ENGINE_ERRORS,
    Finish,
    Policy,
    Prefilled,
    Seat,
    SlotEngine,
    Stats,
    Step,
)

log = logging.getLogger(__name__)


class Batcher:
    """Requests over the slots and pages of one engine, a step at a time.

    prefill_tokens: prompt tokens read in one step before the running rows go on, at least a chunk.
    max_waiting: requests that may queue; one more fails. reuse: whether full pages of rows that
    ended are found by later ones. clock: seconds, for deadlines. closed: no request is begun.
    paused: no row goes on. times: how long requests took.
    """

    def __init__(
        self,
        engine: SlotEngine,
        params: Any,
        *,
        version: int,
        prefill_tokens: int,
        max_waiting: int,
        reuse: bool,
        clock: Callable[[], float],
    ) -> None:
        self.engine, self._params, self._clock = engine, params, clock
        self._prefill_tokens, self._max_waiting, self._reuse = prefill_tokens, max_waiting, reuse
        self._state = engine.init()
        self._pages = Pages(engine.pages, version)
        self._prefixes = Prefixes(self._pages)
        width = -(-engine.max_tokens // engine.page)
        self._table_BP = np.full((engine.slots, width), -1, np.int32)
        self._slots: list[Request | None] = [None] * engine.slots
        self._occupied = 0
        self._waiting: list[tuple[int, Request]] = []  # heap; those that ended are skipped
        self._expiring: list[tuple[float, int, Request]] = []  # heap
        self._stats = Stats(version=version)
        self._queued = self._singly = 0  # to go one by one: some broke a call together
        self._seats: list[tuple[Request, Seat]] = []  # that the device has not been told of
        self._drawn: list[tuple[list[Request], Step]] = []  # first tokens, unread
        self._pending: tuple[Any, int] | None = None  # weights that wait for what has begun
        self.times = Times()
        self.unfinished: dict[int, Request] = {}
        self.broken = ""
        self.closed = self.paused = False

    @property
    def stats(self) -> Stats:
        """Numbers of now, a copy."""
        running = self._occupied
        return dataclasses.replace(
            self._stats,
            waiting=self._queued,
            running=running,
            free_slots=self.engine.slots - running,
            free_pages=self._pages.free,
            kept_pages=self._pages.kept,
        )

    @property
    def pages_by_version(self) -> dict[int | None, int]:
        """Pages in use, held or kept, by the version that wrote them; None for two versions."""
        return self._pages.by_version()

    @property
    def drains(self) -> bool:
        """Whether new weights wait for the end of what has begun."""
        return self._pending is not None

    @property
    def moves(self) -> bool:
        """Whether a step would do more than look at deadlines."""
        return (not self.closed and self._queued > 0) or (not self.paused and self._occupied > 0)

    def step(self) -> None:
        """None; deadlines, prefills, the next tokens of every running row."""
        self._expire()
        self._settle()
        if not self.closed:
            self._admit()
            self._read_first_tokens()
        if not self.paused:
            self._decode()
        self._settle()
        self._stats.ticks += 1

    def enter(self, request: Request) -> None:
        """None; the request waits, or has ended where it cannot be served."""
        self._stats.submitted += 1
        if why := self.broken or request.refusal(self.engine):
            self.finish(request, "error", why)
        elif self._queued >= self._max_waiting:
            self.finish(request, "error", f"{self._queued} requests wait already; try later")
        else:
            if request.expires < math.inf:
                heapq.heappush(self._expiring, (request.expires, request.seq, request))
            self._queue(request)

    def finish(self, request: Request, finish: Finish, error: str = "") -> None:
        """None; the end of a request wherever it stands. Of one that has ended nothing changes."""
        if request.status == "done":
            return
        if request.status == "waiting":
            self._unqueue(request)
        elif request.status == "running":
            self._leave(request)
        self.end(request, finish, error)

    def end(self, request: Request, finish: Finish, error: str = "") -> None:
        """None; its completion, without a look at what it holds."""
        completion = request.end(finish, error)
        del self.unfinished[request.seq]
        setattr(self._stats, finish, getattr(self._stats, finish) + 1)
        if request.out:
            self.times.ended(len(request.out), self._clock() - request.first)
        if request.on_done is not None:
            request.on_done(completion)

    def offer(self, params: Any, version: int, policy: Policy) -> None:
        """None; the next step is by these weights, or with "drain" the first one after the end of
        all that has begun. Weights that still wait for that are dropped for these.
        """
        self._pending = (params, version)
        if policy == "drain":
            self._settle()
            return
        self._swap()
        if policy == "abort_and_resume":
            self.flush()

    def _settle(self) -> None:
        """None; weights that waited are those of the next step, once nothing has begun."""
        if self._pending is None or self._occupied:
            return
        first = self._next()
        if first is None or not first.out:  # preempted rows come first
            self._swap()

    def _swap(self) -> None:
        assert self._pending is not None
        (self._params, self._stats.version), self._pending = self._pending, None
        self._stats.pushes += 1
        self._prefixes.drop_all()  # keys and values of other weights are shared with nobody new
        self._pages.renew(self._stats.version)
        for request in self._running():
            at, begun = divmod(request.cached, self.engine.page)
            self._pages.rewrite(request.pages[at:], begun=begun > 0)

    def flush(self) -> None:
        """None; every page is free, running requests wait again."""
        self._seats, self._drawn = [], []
        for request in self._running():
            self._preempt(request)
        self._prefixes.drop_all()
        self._pages.forget_all()

    def _queue(self, request: Request) -> None:
        request.status, request.key = "waiting", key_of(request.tokens())
        self._prefixes.want(request.key)
        heapq.heappush(self._waiting, (request.seq, request))
        self._queued += 1

    def _unqueue(self, request: Request) -> None:
        self._prefixes.unwant(request.key)
        self._queued -= 1

    def _leave(self, request: Request) -> None:
        """None; its slot and pages are free, and the full ones may be found."""
        full = request.cached // self.engine.page
        if self._reuse and self._pages.current(request.pages[:full]):
            tokens = request.tokens()[: request.cached]
            names = names_of(tokens, self.engine.page, request.names)
            at = request.seated // self.engine.page  # those before have theirs
            self._name(request.pages[at:full], names[at:], request.routes_since_seated())
        self._pages.release(request.pages)
        self._slots[request.slot] = None
        self._occupied -= 1
        self._table_BP[request.slot] = -1
        request.pages, request.slot, request.names, request.tail_TLA = [], -1, [], None

    def _name(self, pages: list[int], names: list[bytes], routes_TLA: np.ndarray | None) -> None:
        """None; full pages can be found by these names. routes_TLA: experts of their tokens."""
        size = self.engine.page
        for i, (page, name) in enumerate(zip(pages, names, strict=True)):
            routes = None if routes_TLA is None else routes_TLA[i * size : (i + 1) * size]
            self._pages.remember(page, name, routes)

    def _preempt(self, request: Request) -> None:
        """None; it waits again, at its old place, with the tokens it has."""
        self._leave(request)
        self._queue(request)
        self._stats.preempted += 1

    def _expire(self) -> None:
        if len(self._expiring) > 2 * len(self.unfinished) + 64:
            self._expiring = [entry for entry in self._expiring if entry[2].status != "done"]
            heapq.heapify(self._expiring)
        while self._expiring and self._expiring[0][0] <= self._clock():
            self.finish(heapq.heappop(self._expiring)[2], "deadline")

    def _running(self) -> list[Request]:
        """Running requests, oldest first."""
        return sorted((r for r in self._slots if r is not None), key=lambda r: r.seq)

    def _admit(self) -> None:
        """None; waiting requests get slots in their order, until slots, pages or the tokens of a
        tick run out.
        """
        budget = self._prefill_tokens
        while budget > 0 and None in self._slots and (request := self._next()) is not None:
            if self.drains and not request.out:
                break
            prefix = self._prefixes.get(request.key) or self._begin(request)
            if prefix is None:
                break
            if request.admitted is None:
                request.admitted = self.times.admitted(self._clock(), request.arrived)
            try:
                if not prefix.ready:
                    budget -= self._read_next(request, prefix)
                elif not self._join(request, prefix):
                    break
                else:
                    budget -= 1
            except ENGINE_ERRORS as error:
                self._fail([request], error)
        self._insert()

    def _next(self) -> Request | None:
        """The request that has waited longest."""
        if len(self._waiting) > 2 * self._queued + 64:
            self._waiting = [entry for entry in self._waiting if entry[1].status == "waiting"]
            heapq.heapify(self._waiting)
        while self._waiting and self._waiting[0][1].status != "waiting":
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _begin(self, request: Request) -> Prefix | None:
        """A prefix with pages for the tokens of a request, the first ones found where tokens began
        like this before; None while running rows need those that are free, one each.
        """
        tokens, page = request.tokens(), self.engine.page
        if self._reuse:
            request.names = names_of(tokens, page, request.names)
        # The last token is always read: its scores are not kept.
        found = self._pages.find(request.names[: (len(tokens) - 1) // page])
        with_next = len(tokens) // page + 1
        if not self._prefixes.reclaim(with_next - len(found) + self._occupied):
            self._pages.release(found)
            return None
        new = self._pages.take(-(-len(tokens) // page) - len(found))
        assert new is not None
        self._stats.prefix_hits += bool(found)
        self._stats.reused_tokens += len(found) * page
        routes = self._pages.routes(found)
        prefix = Prefix(tokens, found + new, request.names, len(found) * page, routes=routes)
        return self._prefixes.begin(request.key, prefix)

    def _read_next(self, request: Request, prefix: Prefix) -> int:
        """Tokens read: the next chunk of a prefix, or all of short ones that are begun together."""
        begun = [prefix, *self._short_behind(request, prefix)]
        copied = {seat.copy[0] for _, seat in self._seats if seat.copy is not None}
        if not copied.isdisjoint(page for one in begun for page in one.pages):
            self._insert()  # that page was given up since, and is written now
        if len(begun) == 1:
            piece = prefix.tokens[prefix.done : prefix.done + self.engine.chunk]
            self._state, last = self.engine.prefill(
                self._params, self._state, piece, prefix.done, prefix.pages
            )
            self._has_read(prefix, len(piece), last)
            return len(piece)
        tokens, rows = [one.tokens for one in begun], [one.pages for one in begun]
        try:
            self._state, lasts = self.engine.prefill_whole(self._params, self._state, tokens, rows)
            for one, last in zip(begun, lasts, strict=True):
                self._has_read(one, len(one.tokens), last)
        except ENGINE_ERRORS as error:  # one by one the culprit will be known
            self._singly = len(begun)
            self._fail([], error)
        return sum(map(len, tokens))

    def _short_behind(self, request: Request, prefix: Prefix) -> list[Prefix]:
        """Prefixes that are begun now, of the next who wait: new prompts of a chunk at most."""
        most, chunk = self.engine.together - 1, self.engine.chunk
        if not most or self._singly or prefix.done or len(prefix.tokens) > chunk:
            return []
        found: list[Prefix] = []
        for one in others_behind(self._waiting, request, most):
            room = self._pages.free - self._occupied - len(found) - 1  # a page for each to go on
            fits = one.length <= chunk and one.length // self.engine.page < room
            if len(found) == most or not fits or (self.drains and not one.out):
                break
            if self._prefixes.get(one.key) is None:
                other = self._begin(one)
                if other is None or other.done:  # its first pages were found: it goes by itself
                    break
                found.append(other)
        return found

    def _has_read(self, prefix: Prefix, count: int, last: Prefilled) -> None:
        """None; so many more tokens of a prefix are in the cache."""
        prefix.read(count, last)
        if prefix.ready and prefix.names:
            full = prefix.pages[: len(prefix.names)]
            self._name(full, prefix.names, np.concatenate(prefix.routes) if prefix.routes else None)
        self._stats.prefill_chunks += 1
        self._stats.prefill_tokens += count

    def _join(self, request: Request, prefix: Prefix) -> bool:
        """Whether a request took a slot over a ready prefix, and its next token with it.

        The last who waits takes the pages over; others share the full ones and copy the last, which
        they will write to.
        """
        length, page = len(prefix.tokens), self.engine.page
        full, copy = prefix.pages[: length // page], None
        shares = self._prefixes.waiting(request.key) > 1
        if shares and not self._prefixes.reclaim(1 + self._occupied, keep=request.key):
            if self._occupied:
                return False
            shares = False  # alone, and no page left: the prefix is its own
        if shares:
            tail = self._pages.take(1 if length % page else 0)
            assert tail is not None
            self._pages.share(full)
            pages = full + tail
            copy = (prefix.pages[-1], tail[0]) if tail else None
            self._stats.shared_tokens += length
        else:
            pages = self._prefixes.give(request.key).pages
        heapq.heappop(self._waiting)  # its own entry: it was the first
        self._unqueue(request)
        self._seat(request, pages)
        assert prefix.last is not None
        at = len(request.out)
        seat = Seat(prefix.last, request.slot, length, at, request.sampling, copy)
        self._seats.append((request, seat))
        request.take(prefix, page)
        if self._singly or len(self._seats) == self.engine.seats:
            self._insert()
        return True

    def _insert(self) -> None:
        """None; the device knows of the rows that took slots, and draws a token for each. Where it
        fails on several, they take slots again one by one, so that only the culprit ends.
        """
        if not self._seats:
            return
        requests = [request for request, _ in self._seats]
        seats, self._seats = [seat for _, seat in self._seats], []
        self._singly = max(self._singly - 1, 0)
        try:
            self._state, step = self.engine.insert(self._state, seats)
        except ENGINE_ERRORS as error:
            alone = len(requests) == 1
            self._singly = self._singly if alone else len(requests)
            self._fail(requests if alone else [], error)
            return
        self._drawn.append((requests, step))

    def _read_first_tokens(self) -> None:
        """None; requests that took a slot in this step have the tokens that were drawn for them,
        which come from the device all at once.
        """
        drawn, self._drawn = self._drawn, []
        try:
            steps = jax.device_get([step for _, step in drawn])
        except ENGINE_ERRORS as error:
            self._fail([request for requests, _ in drawn for request in requests], error)
            return
        for (requests, _), step in zip(drawn, steps, strict=True):
            for row, request in enumerate(requests):
                if request.status != "running":  # an older one may have failed with all pages
                    continue
                if not request.out:
                    request.first = self.times.began(self._clock(), request.arrived)
                self._append(request, step, row)

    def _seat(self, request: Request, pages: list[int]) -> None:
        slot = self._slots.index(None)
        request.status, request.slot, request.pages = "running", slot, pages
        self._slots[slot] = request
        self._occupied += 1
        self._table_BP[slot, : len(pages)] = pages

    def _decode(self) -> None:
        for request in self._running():
            if request.status == "running":  # an older one may have sent it back
                self._grow(request)
        running = self._running()
        if not running:
            return
        if self.engine.beyond:
            for request in running:
                self._grow_beyond(request)
        active_B = np.asarray([r is not None for r in self._slots])
        try:
            self._state, step = self.engine.decode(
                self._params, self._state, self._table_BP, active_B
            )
        except ENGINE_ERRORS as error:
            self._fail(running, error)
            return
        self._stats.decode_steps += 1
        if self.engine.draft:
            size, draft = self.engine.page, self.engine.draft
            whole = [r.slot for r in running if len(r.pages) * size - r.cached > draft]
            self._stats.count_drafts(step.count_B[whole])
        for request in running:
            if request.status == "running":  # an older one may have failed with all pages
                self._append(request, step, request.slot)

    def _grow(self, request: Request) -> None:
        """None; the row has the page its next token goes to. Where none is free, prefixes give
        theirs, then the youngest row does: it waits again.
        """
        at = request.cached // self.engine.page
        while at >= len(request.pages):
            if not self._prefixes.reclaim(1):
                youngest = self._running()[-1]
                self._preempt(youngest)
                if youngest is request:
                    return
                continue
            (page,) = self._pages.take(1) or []
            self._table_BP[request.slot, len(request.pages)] = page
            request.pages.append(page)
        assert self._pages.holders(request.pages[at]) == 1, "a shared page would be written"

    def _grow_beyond(self, request: Request) -> None:
        """None; the row has pages for what a step may draw beyond one token, as far as there are
        any: no row gives way for them.
        """
        end = len(request.prompt) + request.sampling.max_tokens - 1  # of all it will ever store
        last = min(request.cached + self.engine.beyond, end - 1)
        while last // self.engine.page >= len(request.pages) and self._prefixes.reclaim(1):
            (page,) = self._pages.take(1) or []
            self._table_BP[request.slot, len(request.pages)] = page
            request.pages.append(page)

    def _append(self, request: Request, step: Step, row: int) -> None:
        """None; the request has the tokens that a step drew for it, up to the one that ends it."""
        for place in step.places(row):
            if step.routes_BLA is not None:
                request.routes.append(step.routes_BLA[place][None].copy())
            try:
                finish = request.append(step, place, self._stats.version)
            except ArithmeticError as error:
                # Its pages hold what is not finite, and a weight of zero does not hide that from
                # the next who gets them.
                self._fail([request], error)
                return
            self._stats.output_tokens += 1
            if request.on_token is not None:
                request.on_token(request)
            if finish is not None:
                self.finish(request, finish)
                return

    def _fail(self, culprits: list[Request], error: BaseException) -> None:
        """None; what the engine raised ends its culprits. The others wait again with the
        tokens they have: the state went into the call that failed.
        """
        log.error("the engine failed, and %d requests with it", len(culprits), exc_info=error)
        self._stats.failures += 1
        for request in culprits:
            self.finish(request, "error", f"{type(error).__name__}: {error}")
        self.flush()
        self._state = None
        self._state = self.engine.init()
