"""SemDedup (spec 6 D6), a rule for `Deduplicated`: of documents with near vectors one stays.

Catches what MinHash cannot: pages made from one template with other fillings share no run of five
words. k-means cuts the corpus into clusters, and inside each a document goes when its cosine with
an earlier one is above 1 - epsilon. Earlier is by distance to the centroid, or by score.
Letters: `N` documents, `D` width of the vectors, `K` clusters, `R` rows compared at once.
Source: SemDeDup (Abbas et al. 2023, section 3); the paper keeps the least prototypical.
"""

from dataclasses import dataclass

import numpy as np

from glm45_jax.data.dedup import Facts, FirstSource, Found, Keep, Read, group_counts, ranked
from glm45_jax.data.embed import Embed, Fits, Lexical, unit_rows

_ROWS = 1024
_POINTS_PER_CENTRE = 256  # more change a centroid little


@dataclass(frozen=True)
class Far:
    """The one farthest from the centroid stays: the least prototypical."""


@dataclass(frozen=True)
class Near:
    """The one nearest to the centroid stays: the most prototypical."""


@dataclass(frozen=True)
class SemDedup:
    """How documents become vectors, how near is too near, and which stays.

    epsilon belongs to the embedding and the corpus (GLM-4.5 states none, UNVERIFIED): the default
    is for `Lexical()`; look at what goes before you trust another. cluster_docs: documents a
    cluster on average; duplicates in two clusters are not found. Takes 8 bytes for each entry of a
    vector. Sources made from one another (files and their docstrings) are near by intention: keep
    them out of one call.
    """

    embed: Embed | Fits = Lexical()
    epsilon: float = 0.3
    cluster_docs: int = 1000
    iterations: int = 20
    keep: Far | Near | Keep = Far()

    def __post_init__(self):
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon {self.epsilon} is not in 0 to 1; cosines go up to 1")
        if self.cluster_docs < 1 or self.iterations < 1:
            raise ValueError(
                f"cluster_docs {self.cluster_docs} and iterations {self.iterations} must be 1 or "
                "more"
            )
        if " at 0x" in repr(self.embed):
            raise ValueError(
                f"embed {self.embed!r} is named by its address, so every process would prepare "
                "again; make it a frozen dataclass with __call__"
            )

    @property
    def label(self) -> str:
        """Of its counts."""
        return "semdedup"

    def find(self, read: Read) -> Found:
        """Groups of documents with near vectors; those whose vector is zero stay, and are counted.

        Raises: ValueError for vectors of another number or shape, or not finite.
        """
        by_score = None if isinstance(self.keep, Far | Near) else self.keep
        facts = Facts(by_score or FirstSource())
        embed = self._fitted(read)
        parts = [_checked(embed(texts), len(texts)) for texts in facts.batches(read())]
        table = facts.table()
        # In the order of their hashes the first K are a random sample, and no other order matters.
        order_N = np.lexsort((table.place_N, table.digest_N))
        x_ND = np.concatenate(parts)[order_N] if parts else np.zeros((0, 1), np.float32)
        del parts
        centre_KD, cluster_N = kmeans(x_ND, -(-len(x_ND) // self.cluster_docs), self.iterations)
        if by_score:
            rank_N = table.rank_N[order_N]
        else:
            near_N = np.einsum("nd,nd->n", x_ND, centre_KD[cluster_N])
            rank_N = ranked(near_N if isinstance(self.keep, Far) else -near_N)
        cosine_N, earlier_N = nearest_earlier(x_ND, cluster_N, rank_N)
        gone_N = cosine_N > 1 - self.epsilon
        instead_N = follow(np.where(gone_N, earlier_N, np.arange(len(x_ND))))
        # Back to the order in which they were read.
        read_stays_N, read_instead_N = np.empty_like(gone_N), np.empty_like(instead_N)
        read_stays_N[order_N], read_instead_N[order_N] = ~gone_N, order_N[instead_N]
        counts = group_counts(read_instead_N) | {
            "kmeans_clusters": len(centre_KD),
            "kmeans_largest_cluster": int(np.bincount(cluster_N).max(initial=0)),
            "without_vector": int((~x_ND.any(axis=1)).sum()),
        }
        return Found(table.place_N, read_stays_N, read_instead_N, counts)

    def _fitted(self, read: Read) -> Embed:
        if not isinstance(self.embed, Fits):
            return self.embed
        return self.embed.fit(Facts(FirstSource()).batches(read()))


def kmeans(x_ND: np.ndarray, k: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit centroids, float32 [K, D], and the one of each row, int64 [N]; by cosine.

    Begins with the first k rows, so give rows in random order; the same rows give the same answer.
    Centroids are learnt from the first 256 k rows; one without members stays where it is.
    """
    centre_KD = x_ND[:k]
    sample_ND = x_ND[: _POINTS_PER_CENTRE * k]
    before = None
    for _ in range(iterations):
        cluster = _nearest(sample_ND, centre_KD)
        if before is not None and np.array_equal(cluster, before):
            break
        before = cluster
        order = np.argsort(cluster, kind="stable")
        here, start = np.unique(cluster[order], return_index=True)
        sums = np.add.reduceat(sample_ND[order].astype(np.float64), start) if len(here) else here
        centre_KD = centre_KD.copy()
        centre_KD[here] = unit_rows(sums) if len(here) else 0
    return centre_KD, _nearest(x_ND, centre_KD)


def nearest_earlier(
    x_ND: np.ndarray, cluster_N: np.ndarray, rank_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each unit row its largest cosine with a row of its cluster and lower rank, and that row.

    -inf and itself for the first row of a cluster. The earlier rows need not stay themselves.
    Memory: 1024 rows times the largest cluster.
    """
    cosine_N = np.full(len(x_ND), -np.inf, np.float32)
    earlier_N = np.arange(len(x_ND))
    order_N = np.lexsort((rank_N, cluster_N))
    edges = np.flatnonzero(np.diff(cluster_N[order_N])) + 1
    for member_N in np.split(order_N, edges):
        y_ND = x_ND[member_N]
        for low in range(0, len(y_ND), _ROWS):
            high = min(low + _ROWS, len(y_ND))
            cosine_RN = y_ND[low:high] @ y_ND[:high].T
            cosine_RN[np.arange(low, high)[:, None] <= np.arange(high)] = -np.inf
            best_R = cosine_RN.argmax(axis=1)
            first = int(low == 0)  # it has none before it
            cosine_N[member_N[low:high]] = cosine_RN[np.arange(high - low), best_R]
            earlier_N[member_N[low + first : high]] = member_N[best_R[first:]]
    return cosine_N, earlier_N


def follow(instead_N: np.ndarray) -> np.ndarray:
    """Where each one ends up that is sent to another, and on from there."""
    while not np.array_equal(further_N := instead_N[instead_N], instead_N):
        instead_N = further_N
    return instead_N


def _nearest(x_ND: np.ndarray, centre_KD: np.ndarray) -> np.ndarray:
    found = [
        (x_ND[low : low + _ROWS] @ centre_KD.T).argmax(axis=1) for low in range(0, len(x_ND), _ROWS)
    ]
    return np.concatenate([np.zeros(0, np.int64), *found])


def _checked(x_ND: np.ndarray, n: int) -> np.ndarray:
    if x_ND.ndim != 2 or len(x_ND) != n:
        raise ValueError(f"embed gave shape {x_ND.shape} for {n} texts; it must be [{n}, D]")
    if not np.isfinite(x_ND).all():
        raise ValueError("embed gave numbers that are not finite")
    return unit_rows(x_ND)
