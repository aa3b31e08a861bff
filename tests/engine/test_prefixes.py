"""The kept prefixes by themselves, against a plain list of token ids."""

from __future__ import annotations

from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrwkv.engine.memory import PAGE_BYTES, Memory, MemorySizes, Saved
from hrwkv.engine.prefixes import Prefixes

KINDS = {"hybrid": (30, 10), "all-linear": (PAGE_BYTES + 8, 0), "all-attention": (0, 10)}
PAGES = 14
texts = st.lists(st.integers(0, 1), min_size=1, max_size=9)


def make(kind: str = "hybrid", *, pages: int = PAGES, min_gain: int = 1) -> tuple[Memory, Prefixes]:
    """Blocks of two tokens; a state of three pages, or of two where there are no blocks."""
    sizes = MemorySizes(4, 20, 2, *KINDS[kind])
    memory = Memory(sizes, swap_bytes=5 * sizes.page_bytes, prefix_bytes=pages * sizes.page_bytes)
    return memory, Prefixes(memory, min_gain=min_gain)


def keep(prefixes: Prefixes, tokens: list[int]) -> Saved:
    kept = prefixes.keep(tokens)
    assert kept is not None
    kept[0].is_certain = True
    return kept[0]


def num_common(first: list[int], second: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_it_finds_what_a_search_through_all_would(kind: str, data: st.DataObject) -> None:
    """Two letters, so that all branches; few pages, so that many go out; some are never confirmed."""
    gain = data.draw(st.integers(1, 3))
    memory, prefixes = make(kind, min_gain=gain)
    known: dict[Saved, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        tokens, what = data.draw(texts), data.draw(st.sampled_from(["keep", "keep", "find", "drop", "fail"]))
        begins = {saved: text for saved, text in known.items() if text == tokens[: len(text)]}
        longest = max(begins, key=lambda saved: len(known[saved]), default=None)
        length = 0 if longest is None else len(known[longest])
        if what == "find":
            found = prefixes.find(tokens)
            assert (found.saved, found.length) == (longest, length)
            common = max((num_common(text, tokens) for text in known.values()), default=0)
            assert found.fork == (common if common - length >= gain else None)
        elif what == "keep":
            kept = prefixes.keep(tokens)
            stays = [saved for saved in known if saved in prefixes._nodes or not saved.is_certain]
            if kept is None:
                fits = memory.pages_for(len(tokens)) <= PAGES and all(saved.is_certain for saved in known)
                assert len(tokens) - length < gain or not fits
                known = {saved: known[saved] for saved in stays}
                continue
            saved, shared = kept
            assert shared == (0 if longest is None else len(longest.blocks[: length // 2]))
            assert saved.blocks[:shared] == ([] if longest is None else longest.blocks[:shared])
            assert len(saved.pages) == memory.pages_for(len(tokens))
            saved.is_certain = data.draw(st.booleans())
            known = {old: known[old] for old in stays} | {saved: tokens}
        elif what == "drop" and known:
            prefixes.drop(saved := data.draw(st.sampled_from(list(known))))
            del known[saved]
        elif what == "fail":
            prefixes.drop_uncertain()
            known = {saved: text for saved, text in known.items() if saved.is_certain}
        assert set(prefixes._nodes) == set(known)
        held = [set(saved.pages) for saved in known]
        assert memory.kept.used == len(set().union(*held)) <= PAGES
        assert all(page < PAGES for pages in held for page in pages)  # the others are the swap's
        states = [page for saved in known for page in saved.state]
        assert len(states) == len(set(states))
    for saved in known:
        prefixes.drop(saved)
    assert (memory.kept.used, prefixes._root.children) == (0, {})


def test_blocks_that_were_copied_are_not_copied_again() -> None:
    """Of five tokens two blocks are full, and kept by whoever goes on with them when the first is gone."""
    memory, prefixes = make()
    first = keep(prefixes, [1, 2, 3, 4, 5])
    second, shared = prefixes.keep([1, 2, 3, 4, 5, 6]) or pytest.fail("no room")
    assert (shared, second.blocks[:2], len(second.blocks)) == (2, first.blocks[:2], 3)
    prefixes.drop(first)
    assert memory.kept.used == 3 + 3


def test_the_least_recently_used_goes_out() -> None:
    """A conversation's prefix makes way for the next one; a beginning that several share stays."""
    _, prefixes = make("all-linear", pages=6)
    shared, other = keep(prefixes, [1, 1]), keep(prefixes, [2, 2])
    keep(prefixes, [1, 1, 1])
    assert prefixes.find([1, 1, 2]).saved is shared
    keep(prefixes, [3, 3])
    assert prefixes.find([2, 2]).saved is None
    assert other not in prefixes._nodes
    assert prefixes.find([1, 1, 3]).saved is shared


def test_what_no_step_has_confirmed_keeps_its_pages() -> None:
    """Its copy is still to be made: another's in the same pages would be written over."""
    _, prefixes = make("all-linear", pages=3)
    kept = prefixes.keep([1, 1])
    assert kept is not None
    assert prefixes.keep([2, 2]) is None
    kept[0].is_certain = True
    assert prefixes.keep([2, 2]) is not None
    assert prefixes.find([1, 1]).saved is None


def test_no_more_is_kept_than_fits_and_nothing_without_pages() -> None:
    _, prefixes = make(pages=6)
    keep(prefixes, [1, 2, 3])
    assert prefixes.keep([1] * 7) is None  # three pages for the state, four for blocks
    assert len(prefixes) == 1
    _, nothing = make(pages=0)
    assert nothing.keep([1, 2, 3]) is None
    assert nothing.find([1, 2, 3]).saved is None
