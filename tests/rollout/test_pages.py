"""Pages: what is free is held by nobody, what is held was taken once."""

import random
from collections import Counter

import pytest

from glm45_jax.rollout.pages import Pages


def test_any_order_of_taking_sharing_and_releasing_keeps_the_books():
    rng = random.Random(0)
    pages, held = Pages(17), []  # held: one list a holder
    for _ in range(3000):
        match rng.randrange(3):
            case 0:
                n, free = rng.randint(0, 6), pages.free
                taken = pages.take(n)
                assert (taken is None) == (n > free)
                assert not set(taken or ()) & {page for row in held for page in row}
                held += [taken] if taken else []
            case 1 if held:
                shared = rng.choice(held)[:2]
                pages.share(shared)
                held.append(list(shared))
            case 2 if held:
                pages.release(held.pop(rng.randrange(len(held))))
        count = Counter(page for row in held for page in row)
        assert [pages.holders(page) for page in range(17)] == [count[page] for page in range(17)]
        assert pages.free == 17 - len(count)


def test_a_page_given_back_twice_or_shared_while_free_is_a_bug():
    pages = Pages(2)
    taken = pages.take(1)
    pages.release(taken)
    with pytest.raises(AssertionError, match="released more often"):
        pages.release(taken)
    with pytest.raises(AssertionError, match="is free"):
        pages.share(taken)
