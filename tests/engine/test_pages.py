from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qinfer.engine.pages import PageTable
from qinfer.errors import OutOfPages


def test_allocation_is_all_or_nothing() -> None:
    table = PageTable(4, 16)
    first = table.allocate(3)
    with pytest.raises(OutOfPages, match="2 pages wanted, 1 of 4 are free"):
        table.allocate(2)
    assert (table.num_free, table.num_used) == (1, 3)
    assert sorted(first + table.allocate(1)) == [0, 1, 2, 3]


def test_shared_page_returns_with_its_last_reference() -> None:
    table = PageTable(2, 16)
    (page,) = table.allocate(1)
    table.share(page)
    table.free([page])
    assert table.references(page) == 1
    assert table.num_free == 1
    table.free([page])
    assert table.num_free == 2


def test_double_free_changes_nothing() -> None:
    table = PageTable(3, 16)
    first, second = table.allocate(2)
    with pytest.raises(ValueError, match=f"page {second} has 1 references and cannot be freed 2 times"):
        table.free([first, second, second])
    assert table.num_used == 2
    table.free([first])
    with pytest.raises(ValueError, match="cannot be freed"):
        table.free([first])


def test_free_pages_and_strangers_cannot_be_shared() -> None:
    table = PageTable(3, 16)
    with pytest.raises(ValueError, match="page 1 is free"):
        table.share(1)
    for page in (-1, 3):
        with pytest.raises(ValueError, match=r"page must be in 0\.\.2"):
            table.share(page)


def test_pages_for_rounds_up() -> None:
    table = PageTable(3, 16)
    assert [table.pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


@pytest.mark.parametrize("sizes", [(0, 16), (4, 0)])
def test_bad_sizes(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PageTable(*sizes)


def test_published_page_stays_until_its_room_is_needed() -> None:
    table = PageTable(4, 4)
    pages = table.allocate(3)
    for page, key in zip(pages, (b"a", b"b", b"c"), strict=True):
        table.publish(page, key)
    table.free(pages)
    assert (table.num_free, table.num_used, table.num_idle) == (4, 0, 3)
    assert [table.find(key) for key in (b"a", b"b", b"c")] == pages
    # A page that is found is used again, and is the last to go from then on.
    table.share(pages[2])
    assert (table.references(pages[2]), table.num_idle) == (1, 2)
    table.free([pages[2]])
    # The empty page first, then the end of the text that was unused longest.
    assert table.allocate(1) == [3]
    assert table.allocate(1) == [pages[1]]
    assert [table.find(key) for key in (b"a", b"b", b"c")] == [pages[0], None, pages[2]]
    assert sorted(table.allocate(2)) == [pages[0], pages[2]]
    assert table.num_idle == 0
    with pytest.raises(OutOfPages):
        table.allocate(1)


def test_first_page_of_a_key_stays_it() -> None:
    table = PageTable(3, 4)
    first, second = table.allocate(2)
    table.publish(first, b"a")
    table.publish(first, b"a")
    table.publish(second, b"a")
    assert table.find(b"a") == first
    table.free([second])
    assert table.num_idle == 0
    with pytest.raises(ValueError, match="under another key"):
        table.publish(first, b"b")
    with pytest.raises(ValueError, match=f"page {second} is free"):
        table.publish(second, b"c")


def test_forgotten_page_is_empty() -> None:
    table = PageTable(2, 4)
    page, other = table.allocate(2)
    table.publish(page, b"a")
    table.publish(other, b"b")
    table.forget(page)
    table.forget(page)
    table.free([page, other])
    table.forget(other)
    assert (table.find(b"a"), table.find(b"b"), table.num_idle, table.num_free) == (None, None, 0, 2)
    assert sorted(table.allocate(2)) == [0, 1]


def test_defragmentation_moves_what_stands_high_and_keeps_what_is_known() -> None:
    table = PageTable(6, 4)
    pages = table.allocate(5)
    table.publish(4, b"used")
    table.publish(3, b"idle")
    table.share(4)
    table.free([0, 2, 3])
    assert table.defragment() == {3: 0, 4: 2}
    assert [table.references(page) for page in range(6)] == [0, 1, 2, 0, 0, 0]
    assert (table.find(b"used"), table.find(b"idle"), table.num_idle, table.num_free) == (2, 0, 1, 4)
    assert table.defragment() == {}
    # Idle pages go last, as before.
    assert [table.allocate(3), table.allocate(1)] == [[3, 4, 5], [0]]
    assert table.find(b"idle") is None
    table.free([2, 2, 1])
    assert sorted(pages) == [0, 1, 2, 3, 4]


class PageMachine(RuleBasedStateMachine):
    """Owners take, share and return pages; the table must agree with a plain list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(6, 4)
        self.owners: list[list[int]] = []

    @rule(count=st.integers(0, 8))
    def allocate(self, count: int) -> None:
        held = {page for owner in self.owners for page in owner}
        if count > 6 - len(held):
            with pytest.raises(OutOfPages):
                self.table.allocate(count)
            return
        pages = self.table.allocate(count)
        assert len(set(pages)) == count
        assert not held & set(pages)
        self.owners.append(pages)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.owners:
            pages = list(data.draw(st.sampled_from(self.owners)))
            for page in pages:
                self.table.share(page)
            self.owners.append(pages)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.owners:
            owner = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
            self.table.free(owner)

    @rule()
    def defragment(self) -> None:
        moves = self.table.defragment()
        held = {page for owner in self.owners for page in owner}
        assert moves.keys() <= held
        assert held.isdisjoint(moves.values())
        self.owners = [[moves.get(page, page) for page in owner] for owner in self.owners]

    @invariant()
    def counts_agree(self) -> None:
        counts = Counter(page for owner in self.owners for page in owner)
        assert [self.table.references(page) for page in range(6)] == [counts[page] for page in range(6)]
        assert self.table.num_used == len(counts)


TestPageMachine = PageMachine.TestCase
