"""Shares of passed tries: what curricula and evaluations reckon with. No jax."""

import math


def pass_at_k(tries: int, passes: int, k: int) -> float:
    """Estimate of the chance that one of k samples passes, from `tries` samples.

    Unbiased, 1 - C(tries - passes, k) / C(tries, k), where there are k tries (Chen et al. 2021,
    arXiv 2107.03374); with fewer, 1 - (1 - passes / tries)^k, which is too low on average.

    Raises: ValueError for more passes than tries, or no tries.
    """
    if not 0 <= passes <= tries or tries < 1 or k < 1:
        raise ValueError(f"{passes} passes of {tries} tries, k {k}: give at least one of each")
    if tries < k:
        return 1 - (1 - passes / tries) ** k
    return 1 - math.prod(1 - k / i for i in range(tries - passes + 1, tries + 1))
