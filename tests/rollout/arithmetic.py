"""An engine of integers under the driver: the next token is a function of all tokens that the pages
of its row hold, so a lost, doubled, crossed or stale page gives another answer. With `draft` a step
draws one token or more, and leaves rubbish where drafts that were wrong would lie.
"""

import dataclasses

import numpy as np

from glm45_jax.rollout.sampling import Draw
from glm45_jax.rollout.types import Prefilled, Step

BREAKS_INSERT = 1000  # a seed


@dataclasses.dataclass
class State:
    """What the device would hold. Written in place: nobody else has it."""

    page_PS: np.ndarray
    length_B: np.ndarray
    token_B: np.ndarray
    seed_B: np.ndarray
    index_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """A `SlotEngine`; its params are a number, the version, and come back as the raw log-prob."""

    slots: int
    pages: int
    page: int = 4
    max_tokens: int = 40
    chunk: int = 8
    vocab: int = 97
    draft: int = 0
    seats: int = 3
    together: int = 1

    def init(self):
        zeros = [np.zeros(self.slots, np.int64) for _ in range(4)]
        return State(np.full((self.pages, self.page), 10**6), *zeros)

    def prefill(self, params, state, tokens, start, row):
        assert 1 <= len(tokens) <= self.chunk
        if 96 in tokens:
            raise RuntimeError("token 96 breaks the device")
        for i, token in enumerate(tokens, start):
            state.page_PS[row[i // self.page], i % self.page] = token
        table_1P = np.full((1, self.row_pages), -1)
        table_1P[0, : len(row)] = row
        total_1 = weighted(self.read(state, table_1P), np.asarray([start + len(tokens)]))
        return state, Prefilled((total_1, params))

    def prefill_whole(self, params, state, prompts, rows):
        assert 1 <= len(prompts) <= self.together
        given = [
            self.prefill(params, state, p, 0, r)[1] for p, r in zip(prompts, rows, strict=True)
        ]
        return state, given

    def insert(self, state, seats):
        assert 1 <= len(seats) <= self.seats
        broken = [seat for seat in seats if seat.sampling.seed == BREAKS_INSERT]
        if broken:
            raise RuntimeError(f"seed {broken[0].sampling.seed} breaks the device")
        moved = [(seat.copy[1], state.page_PS[seat.copy[0]].copy()) for seat in seats if seat.copy]
        for target, page_S in moved:
            state.page_PS[target] = page_S
        drawn_N, params_N = [], []
        for seat in seats:
            total_1, params = seat.prefilled.logits_1V
            token_1 = next_token(
                total_1, np.asarray([seat.sampling.seed]), np.asarray([seat.index]), self.vocab
            )
            state.length_B[seat.slot], state.index_B[seat.slot] = seat.length, seat.index + 1
            state.token_B[seat.slot], state.seed_B[seat.slot] = token_1[0], seat.sampling.seed
            drawn_N.append(token_1[0])
            params_N.append(params)
        return state, Step(drawn(np.asarray(drawn_N), np.asarray(params_N)))

    def decode(self, params, state, table_BP, active_B):
        held_B = (table_BP >= 0).sum(axis=1) * self.page - state.length_B
        assert (held_B[active_B] > 0).all()
        # How many drafts are right is chance, but the same however the row came here.
        right_B = (state.length_B * 7 + state.seed_B + state.token_B) % (self.draft + 1)
        count_B = np.minimum(1 + right_B, held_B)
        drawn_TB = []
        for t in range(self.draft + 1):
            goes_on_B = active_B & (t < count_B)
            self.write(state, table_BP, goes_on_B, state.token_B)
            state.length_B += goes_on_B
            total_B = weighted(self.read(state, table_BP), state.length_B)
            token_B = next_token(total_B, state.seed_B, state.index_B, self.vocab)
            state.token_B = np.where(goes_on_B, token_B, state.token_B)
            state.index_B += goes_on_B
            drawn_TB.append(token_B)
        for t in range(self.draft):  # wrong drafts, where the row has a place for them
            self.write(state, table_BP, active_B & (t < held_B - count_B), 10**6 + 0 * token_B, t)
        if not self.draft:
            return state, Step(drawn(drawn_TB[0], params))
        return state, Step(drawn(np.stack(drawn_TB, axis=1), params), count_B=count_B)

    def write(self, state, table_BP, rows_B, token_B, ahead=0):
        for b in np.flatnonzero(rows_B):
            at = state.length_B[b] + ahead
            page = table_BP[b, at // self.page]
            assert page >= 0
            state.page_PS[page, at % self.page] = token_B[b]

    @property
    def beyond(self):
        return self.draft

    @property
    def row_pages(self):
        return -(-self.max_tokens // self.page)

    def read(self, state, table_BP):
        return state.page_PS[table_BP].reshape(len(table_BP), -1)


def weighted(token_BS, length_B):
    """A number that every token and its place change."""
    at_1S = np.arange(token_BS.shape[1])[None, :]
    return (np.where(at_1S < length_B[:, None], token_BS + 1, 0) * (3 * at_1S + 7)).sum(axis=1)


def next_token(total_B, seed_B, index_B, vocab):
    return (total_B * 31 + seed_B * 17 + index_B * 5) % (vocab - 1)


def drawn(token_B, version):
    logp_B = -token_B.astype(np.float32) / 100
    return Draw(token_B, logp_B, np.full(token_B.shape, -version, np.float32))


def answer(prompt, sampling, vocab):
    """Tokens of an undisturbed output, and how it ends."""
    tokens, out = list(prompt), []
    while True:
        total_1 = weighted(np.asarray([tokens]), np.asarray([len(tokens)]))
        seed_1, index_1 = np.asarray([sampling.seed]), np.asarray([len(out)])
        out.append(int(next_token(total_1, seed_1, index_1, vocab)[0]))
        tokens.append(out[-1])
        if out[-1] in sampling.stop:
            return out, "stop"
        if len(out) == sampling.max_tokens:
            return out, "length"
