"""Which pages of the KV-cache pool are in use, and what stands in them: arithmetic on page numbers, no tensors.

Every page has a reference count: 0 while it is free, 1 after `allocate`, one more for each `share`. `free` takes one
reference back. A page whose content was published under a key can be found by it and shared; with its last reference it
becomes idle instead of empty: it still counts as free, and idle pages are emptied, the one unused longest first, when
no empty page is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from qinfer.errors import OutOfPages


class PageTable:
    """Counts the references to each page of a pool of fixed size, and remembers the published ones."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        """Start with every page free.

        Args:
            num_pages: Pages in the pool.
            page_size: Tokens per page.
        """
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages and page_size must be at least 1, got {num_pages} and {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages
        # A stack with the lowest page on top: a page freed last is the likeliest to be in a cache.
        self._empty = list(range(num_pages - 1, -1, -1))
        # Published pages without a reference, in the order in which they lost it.
        self._idle: dict[int, None] = {}
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that an allocation can have now."""
        return len(self._empty) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages with at least one reference."""
        return self.num_pages - self.num_free

    @property
    def num_idle(self) -> int:
        """Free pages whose content can still be found."""
        return len(self._idle)

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def references(self, page: int) -> int:
        """Return the number of references to a page, 0 when it is free."""
        self._check(page)
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, all or none.

        Raises:
            OutOfPages: If fewer than `count` pages are free; nothing is taken then.
        """
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        if count > self.num_free:
            raise OutOfPages(f"{count} pages wanted, {self.num_free} of {self.num_pages} are free")
        while len(self._empty) < count:
            page = next(iter(self._idle))
            self.forget(page)
        pages = [self._empty.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Add a reference to a page in use, or to an idle one.

        Raises:
            ValueError: If nothing stands in the page.
        """
        if self.references(page) == 0 and page not in self._idle:
            raise ValueError(f"page {page} is free and cannot be shared")
        self._idle.pop(page, None)
        self._references[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Take one reference from each page, or from none when one of them cannot give it.

        Raises:
            ValueError: If a page would be freed more often than it is referenced.
        """
        pages = list(pages)
        for page, times in Counter(pages).items():
            if self.references(page) < times:
                raise ValueError(
                    f"page {page} has {self._references[page]} references and cannot be freed {times} times"
                )
        # From the end, so that the end of a text is emptied before the beginning without which it is worth nothing.
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._empty.append(page)

    def publish(self, page: int, key: bytes) -> None:
        """Make a page in use known under a key; it must not be written any more. The first page of a key stays it.

        Raises:
            ValueError: If the page is free, or known under another key.
        """
        if self.references(page) == 0:
            raise ValueError(f"page {page} is free and cannot be published")
        if self._keys.get(page, key) != key:
            raise ValueError(f"page {page} is published under another key")
        if key not in self._pages:
            self._pages[key] = page
            self._keys[page] = key

    def find(self, key: bytes) -> int | None:
        """Return the page known under a key."""
        return self._pages.get(key)

    def forget(self, page: int) -> None:
        """Make a page unknown; an idle one becomes empty. Nothing happens to a page that is not published."""
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]
        if page in self._idle:
            del self._idle[page]
            self._empty.append(page)

    def defragment(self) -> dict[int, int]:
        """Give the lowest numbers to the pages in which something stands, in use or idle.

        Returns:
            Old number to new one of each page that moves, for those who keep numbers and those who keep contents; the
            new ones were empty, so moves may be made in any order.
        """
        num_full = self.num_pages - len(self._empty)
        targets = sorted(page for page in self._empty if page < num_full)
        empty = set(self._empty)
        sources = [page for page in range(num_full, self.num_pages) if page not in empty]
        moves = dict(zip(sources, targets, strict=True))
        for source, target in moves.items():
            self._references[target], self._references[source] = self._references[source], 0
            key = self._keys.pop(source, None)
            if key is not None:
                self._keys[target] = key
                self._pages[key] = target
        self._idle = {moves.get(page, page): None for page in self._idle}
        self._empty = list(range(self.num_pages - 1, num_full - 1, -1))
        return moves

    def _check(self, page: int) -> None:
        """Refuse numbers that are not pages; a negative one would otherwise count from the end."""
        if not 0 <= page < self.num_pages:
            raise ValueError(f"page must be in 0..{self.num_pages - 1}, got {page}")
