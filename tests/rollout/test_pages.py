"""Pages: what is free is held by nobody, what is held was taken once, what is found is what was
written.
"""

import random
from collections import Counter

import numpy as np
import pytest

from glm45_jax.rollout.pages import MIXED, Pages, names_of


def test_any_order_of_taking_sharing_naming_finding_and_releasing_keeps_the_books():
    rng = random.Random(0)
    pages, held = Pages(17), []  # held: one list a holder
    written, lost = {}, set()  # name -> page, of what was named; names whose page may be anything
    for step in range(5000):
        match rng.randrange(6):
            case 0:
                n, free = rng.randint(0, 6), pages.free
                taken = pages.take(n)
                assert (taken is None) == (n > free)
                assert not set(taken or ()) & {page for row in held for page in row}
                lost |= {name for name, page in written.items() if page in (taken or ())}
                held += [taken] if taken else []
            case 1 if held:
                shared = rng.choice(held)[:2]
                pages.share(shared)
                held.append(list(shared))
            case 2 if held:
                pages.release(held.pop(rng.randrange(len(held))))
            case 3 if held:
                page, name = rng.choice(rng.choice(held)), str(step).encode()
                if page not in {p for n, p in written.items() if n not in lost}:
                    pages.remember(page, name)
                    written[name] = page
            case 4 if written:
                asked = rng.sample(list(written), min(3, len(written)))
                there = [name not in lost for name in asked]
                want = [written[name] for name in asked[: [*there, False].index(False)]]
                assert pages.find(asked) == want
                held += [want] if want else []
            case 5 if rng.random() < 0.02:
                pages.forget_all()
                lost = set(written)
        count = Counter(page for row in held for page in row)
        assert [pages.holders(page) for page in range(17)] == [count[page] for page in range(17)]
        assert pages.free == 17 - len(count)
        findable = {page for name, page in written.items() if name not in lost}
        assert pages.kept == len(findable - set(count))


def test_a_page_given_back_twice_or_shared_or_named_while_free_is_a_bug():
    pages = Pages(2)
    taken = pages.take(1)
    pages.release(taken)
    with pytest.raises(AssertionError, match="released more often"):
        pages.release(taken)
    with pytest.raises(AssertionError, match="is free"):
        pages.share(taken)
    with pytest.raises(AssertionError, match="may be anything"):
        pages.remember(taken[0], b"")


def test_pages_held_least_recently_give_way_first_and_of_one_row_its_end():
    pages = Pages(6)
    rows = {row: pages.take(3) for row in (b"a", b"b")}
    for row, held in rows.items():
        for i, page in enumerate(held):
            pages.remember(page, row + bytes([i]))
        pages.release(held)
    names = {row: [row + bytes([i]) for i in range(3)] for row in rows}
    pages.release(pages.find(names[b"a"]))  # now the other one is older
    for left_a, left_b in [(3, 2), (3, 1), (3, 0), (2, 0), (1, 0), (0, 0)]:
        pages.take(1)
        found = {row: pages.find(names[row]) for row in (b"b", b"a")}
        assert (len(found[b"a"]), len(found[b"b"])) == (left_a, left_b)
        for held in found.values():
            pages.release(held)


def test_experts_are_kept_with_their_page_and_go_with_it():
    pages, routes_SLA = Pages(2), np.arange(8).reshape(4, 2, 1)
    (page,) = pages.take(1)
    pages.remember(page, b"name", routes_SLA)
    np.testing.assert_array_equal(pages.routes([page])[0], routes_SLA)
    pages.release([page])
    pages.take(2)
    assert pages.routes([page]) == []


def test_a_page_says_which_version_wrote_it_and_whether_two_did():
    pages = Pages(8, version=3)
    old, row, kept = pages.take(1), pages.take(3), pages.take(1)
    pages.remember(kept[0], b"kept")
    pages.release(kept)
    assert pages.by_version() == {3: 5} and pages.current(old + row)
    pages.renew(4)
    assert pages.by_version() == {3: 4} and pages.find([b"kept"]) == []
    pages.rewrite(row[1:], begun=True)  # its second page was half-filled, its third empty
    assert pages.by_version() == {3: 2, MIXED: 1, 4: 1}
    assert pages.current(row[2:]) and not pages.current(row[1:]) and not pages.current(row[:1])
    pages.renew(5)
    pages.rewrite(row[1:], begun=True)
    assert pages.by_version() == {3: 2, MIXED: 1, 5: 1}
    pages.release(old + row)
    assert pages.by_version() == {}
    pages.take(8)
    assert pages.by_version() == {5: 8}


def test_a_name_stands_for_all_tokens_up_to_the_end_of_its_page():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 100, 23).tolist()
    names = names_of(tokens, 4)
    assert len(names) == len(set(names)) == 5
    assert names_of(tokens, 4, names[:2]) == names == names_of(np.asarray(tokens), 4)
    for i in range(23):
        other = names_of([*tokens[:i], 100, *tokens[i + 1 :]], 4)
        assert [a == b for a, b in zip(names, other, strict=True)] == [n < i // 4 for n in range(5)]
