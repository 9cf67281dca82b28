"""Named shapes of each op: one table for tests, benchmarks and tuning. `small` ones run in the CPU
suite.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """B rows of T queries and keys, N query and K kv heads of width H; packed: several documents a
    row; U: width of a value, None for H.
    """

    B: int
    T: int
    N: int
    K: int
    H: int
    packed: bool = False
    small: bool = False
    U: int | None = None

    @property
    def values(self) -> tuple[int, int, int, int]:
        """Shape of the values."""
        return self.B, self.T, self.K, self.U or self.H


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """B rows with room for S keys in pages of `page`, T of them new; N query and K kv heads of
    width H.
    """

    B: int
    T: int
    N: int
    K: int
    H: int
    S: int
    page: int = 16
    fp8: bool = False
    small: bool = False


@dataclasses.dataclass(frozen=True)
class GroupedShape:
    """R rows of width D times one of E matrices D x F; skew: share of rows the busiest expert
    takes, 0 for even.
    """

    R: int
    D: int
    F: int
    E: int
    skew: float = 0.0
    small: bool = False


@dataclasses.dataclass(frozen=True)
class RoutingShape:
    """M tokens, E experts in `groups`, A active."""

    M: int
    E: int
    A: int
    groups: int = 1
    top_groups: int = 1
    small: bool = False


@dataclasses.dataclass(frozen=True)
class LossShape:
    """M tokens of width D, V words, in chunks of `chunk`."""

    M: int
    D: int
    V: int
    chunk: int
    small: bool = False


@dataclasses.dataclass(frozen=True)
class MatricesShape:
    """B matrices with sides m and n."""

    B: int
    m: int
    n: int
    small: bool = False


ATTENTION = {
    "tiny": AttentionShape(2, 24, 6, 2, 16, small=True),
    "tiny packed": AttentionShape(2, 24, 6, 2, 16, packed=True, small=True),
    "one head": AttentionShape(1, 17, 1, 1, 8, small=True),
    "two tiles packed": AttentionShape(1, 200, 3, 1, 64, packed=True, small=True),
    "a tile and one": AttentionShape(1, 129, 2, 2, 128, small=True),
    "192 and 128 packed": AttentionShape(1, 200, 2, 1, 192, packed=True, small=True, U=128),
    "256 and one": AttentionShape(1, 129, 2, 1, 256, small=True),
    "air 4k": AttentionShape(8, 4096, 96, 8, 128),
    "air 4k, one of four": AttentionShape(8, 4096, 24, 2, 128),
    "air 32k": AttentionShape(1, 32768, 96, 8, 128),
    "flash 4k": AttentionShape(8, 4096, 20, 20, 256),
    "192 and 128, 4k": AttentionShape(8, 4096, 16, 16, 192, U=128),
}
DECODE = {
    "tiny": DecodeShape(3, 1, 6, 2, 16, 24, page=4, small=True),
    "tiny drafts": DecodeShape(3, 4, 6, 2, 16, 24, page=4, small=True),
    "tiny fp8": DecodeShape(2, 2, 4, 4, 8, 32, fp8=True, small=True),
    "three steps": DecodeShape(2, 1, 12, 1, 128, 144),
    "three steps of drafts fp8": DecodeShape(2, 4, 6, 2, 64, 160, page=32, fp8=True),
    "air 8k": DecodeShape(64, 1, 96, 8, 128, 8192),
    "air 8k drafts fp8": DecodeShape(64, 4, 96, 8, 128, 8192, fp8=True),
    "mini 2k": DecodeShape(256, 1, 16, 4, 64, 2048, page=64),
    "mini 2k drafts fp8": DecodeShape(256, 3, 16, 4, 64, 2048, page=32, fp8=True),
}
GROUPED = {
    "tiny": GroupedShape(144, 64, 32, 8, small=True),
    "one expert takes all": GroupedShape(200, 32, 16, 4, skew=1.0, small=True),
    "ragged": GroupedShape(333, 24, 40, 8, skew=0.4, small=True),
    "fewer rows than experts": GroupedShape(5, 16, 16, 8, small=True),
    "whole steps": GroupedShape(272, 128, 192, 8, skew=0.3),
    "air gate": GroupedShape(65_536, 4096, 1408, 128, skew=0.03),
    "air down": GroupedShape(65_536, 1408, 4096, 128, skew=0.03),
}
ROUTING = {
    "tiny": RoutingShape(48, 8, 3, small=True),
    "grouped": RoutingShape(64, 16, 4, groups=4, top_groups=2, small=True),
    "one expert": RoutingShape(10, 1, 1, small=True),
    "air": RoutingShape(8192, 128, 8),
    "glm45": RoutingShape(8192, 160, 8),
}
LOSS = {
    "tiny": LossShape(48, 64, 256, 64, small=True),
    "one chunk": LossShape(30, 16, 100, 512, small=True),
    "ragged chunk": LossShape(33, 16, 101, 32, small=True),
    "air": LossShape(8192, 4096, 151_552, 4096),
}
NEWTON_SCHULZ = {
    "wide": MatricesShape(1, 24, 40, small=True),
    "tall": MatricesShape(3, 40, 24, small=True),
    "square": MatricesShape(2, 32, 32, small=True),
    "odd": MatricesShape(5, 7, 13, small=True),
    "a row": MatricesShape(1, 1, 6, small=True),
    "half a tile left": MatricesShape(24, 192, 320),
    "mini gate": MatricesShape(546, 512, 256),
    "mini down": MatricesShape(264, 256, 512),
    "air gate": MatricesShape(128, 4096, 1408),
    "air down": MatricesShape(128, 1408, 4096),
    "air attention": MatricesShape(1, 4096, 12_288),
}
