"""Which pages of the KV-cache pool are in use: arithmetic on page numbers, no tensors.

Every page has a reference count: 0 while it is free, 1 after `allocate`, one more for each `share`. `free` takes one
reference back, and the page returns to the pool with its last one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from qinfer.errors import OutOfPages


class PageTable:
    """Counts the references to each page of a pool of fixed size."""

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
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that an allocation can have now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with at least one reference."""
        return self.num_pages - len(self._free)

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
        if count > len(self._free):
            raise OutOfPages(f"{count} pages wanted, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Add a reference to a page in use.

        Raises:
            ValueError: If the page is free.
        """
        if self.references(page) == 0:
            raise ValueError(f"page {page} is free and cannot be shared")
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
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def _check(self, page: int) -> None:
        """Refuse numbers that are not pages; a negative one would otherwise count from the end."""
        if not 0 <= page < self.num_pages:
            raise ValueError(f"page must be in 0..{self.num_pages - 1}, got {page}")
