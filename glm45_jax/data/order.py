"""Which row of which source stands at a place of the endless order: `Order`.

Closed forms for a block of places at once, so any place costs the same and nothing is stored: the
mixture is the integer rule of grain's `MapDataset.mix` (a test compares), the shuffle a keyed
permutation. grain's own shuffle takes 2 us a row and 33 ms / n in a source of n < 10,000 rows; its
mixture cannot say what it has drawn before a place, which a stage that goes on from another needs.
Letters: `S` sources, `N` places.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ORDER_FORMAT = 2  # raise it when the same seed gives another order; 1 had grain's shuffle
ENDLESS = 2**48  # the length of a source that never repeats; its rows come in their own order

_LEAST_SHARE = 100  # weights count in hundredths of the smallest, as in grain
_BLOCK = 4096  # places computed together
_BLOCKS_KEPT = 8
_ROUNDS = 6  # of the cipher; even, so that both halves end where they began
_LEAST_BITS = 4  # fewer do not make all orders of five rows equally likely
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / the golden ratio
_MIX = np.uint64(0xBF58476D1CE4E5B9)  # of splitmix64 (Steele et al. 2014)
_ONE, _HALF = np.uint64(1), np.uint64(32)


class Drawn(NamedTuple):
    """What stands at some places: row `row` of a source, drawn for the epoch-th time (from 0)."""

    source_N: np.ndarray
    row_N: np.ndarray
    epoch_N: np.ndarray


class Order:
    """A mixture of shuffled sources, each shuffled anew whenever all of it was drawn."""

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        seeds: Sequence[int],
        drawn: Sequence[int],
    ):
        """lengths: rows of each source. seeds: below 2**32, of each source's shuffle. drawn: rows
        of each source that were drawn before place 0.
        """
        self._length_S = np.array(lengths, np.int64)
        self._seed_S = np.array(seeds, np.uint64)
        self._drawn_S = np.array(drawn, np.int64)
        scale = _LEAST_SHARE / min(weights)
        self._shares = [int(weight * scale) for weight in weights]
        self._blocks: dict[int, Drawn] = {}
        self._lock = threading.Lock()

    def at(self, first: int, n: int) -> Drawn:
        """What stands at places first .. first + n."""
        blocks = range(first // _BLOCK, (first + n - 1) // _BLOCK + 1)
        found = [self._block(block) for block in blocks]
        begin = first - blocks.start * _BLOCK
        if len(found) == 1:
            return Drawn(*(x[begin : begin + n] for x in found[0]))
        return Drawn(*(np.concatenate(x)[begin : begin + n] for x in zip(*found, strict=True)))

    def drawn_before(self, place: int) -> list[int]:
        """Rows of each source drawn before a place, those before place 0 included."""
        counts = self._counts(np.array([place]))
        return [int(b) + int(count_N[0]) for b, count_N in zip(self._drawn_S, counts, strict=True)]

    def _counts(self, place_N: np.ndarray) -> list[np.ndarray]:
        """Times each source stands before the places: the first gets its share of all places,
        rounded up, the second its share of what is left, and so on.
        """
        left = sum(self._shares)
        if int(place_N.max()) * left >= 2**63:
            raise ValueError(
                f"place {place_N.max()} of a mixture with shares {self._shares} is beyond 64 bits; "
                "use weights that are less far apart"
            )
        out = []
        for share in self._shares:
            rest_N = place_N * (left - share) // left
            out.append(place_N - rest_N)
            place_N, left = rest_N, left - share
        return out

    def of(self, place_N: np.ndarray) -> Drawn:
        """What stands at these places, in any order; computed anew."""
        source_N, key_N = (np.zeros(len(place_N), np.int64) for _ in range(2))
        both = zip(self._counts(place_N), self._counts(place_N + 1), strict=True)
        for s, (before_N, after_N) in enumerate(both):
            at = np.flatnonzero(after_N > before_N)
            source_N[at], key_N[at] = s, before_N[at] + self._drawn_S[s]
        length_N = self._length_S[source_N]
        epoch_N, row_N = np.divmod(key_N, length_N)
        at = np.flatnonzero(length_N < ENDLESS)
        keys = (self._seed_S[source_N[at]] << _HALF) + epoch_N[at].astype(np.uint64)
        row_N[at] = permuted(row_N[at], length_N[at], keys)
        return Drawn(source_N, row_N, epoch_N)

    def _block(self, block: int) -> Drawn:
        with self._lock:
            if block in self._blocks:
                return self._blocks[block]
        drawn = self.of(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
        with self._lock:
            self._blocks[block] = drawn
            while len(self._blocks) > _BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]
        return drawn


def permuted(place_N: np.ndarray, length_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """Where each place 0 <= place < length goes in the permutation of its length and key.

    key_N: uint64. A Feistel network over the next power of two, applied again while it leads
    outside (Black and Rogaway 2002, cycle walking). Good for shuffling, not for secrets.
    """
    out_N, length_N = place_N.astype(np.uint64), length_N.astype(np.uint64)
    key_N = _mixed(key_N)
    bits_N = np.maximum(np.frexp(length_N - _ONE)[1], _LEAST_BITS).astype(np.uint64)
    todo = np.arange(len(out_N))
    while todo.size:
        out_N[todo] = _cipher(out_N[todo], bits_N[todo], key_N[todo])
        todo = todo[out_N[todo] >= length_N[todo]]
    return out_N.astype(np.int64)


def _cipher(x_N: np.ndarray, bits_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    low_N = bits_N >> _ONE
    high_N = bits_N - low_N
    left_N, right_N = x_N >> low_N, x_N & ((_ONE << low_N) - _ONE)
    for _ in range(_ROUNDS):
        key_N = key_N + _ODD
        left_N, right_N = right_N, left_N ^ (_mixed(right_N ^ key_N) >> (np.uint64(64) - high_N))
        low_N, high_N = high_N, low_N
    return (left_N << low_N) | right_N


def _mixed(x_N: np.ndarray) -> np.ndarray:
    x_N = (x_N ^ (x_N >> _HALF)) * _ODD
    x_N = (x_N ^ (x_N >> _HALF)) * _MIX
    return x_N ^ (x_N >> _HALF)
