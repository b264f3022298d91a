"""Which pages of a sequence a model still looks at: where every layer has a window, those behind the longest are free.

The token at position p sees the positions p - window + 1 ... p, so nothing from p on reads a page that ends before the
first of them. One layer that sees everything keeps all pages.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """How far back any layer looks, in pages."""

    length: int | None  # positions, the own one included; None: all
    page_size: int

    def first_page(self, position: int) -> int:
        """Return the number, within its sequence, of the first page that a token at `position` or later may see."""
        return 0 if self.length is None else max(0, position - self.length + 1) // self.page_size

    def most_pages(self, num_tokens: int) -> int:
        """Return how many pages a sequence needs at a time to grow to so many tokens.

        What the next token sees besides itself touches one page more than it fills; the second is its own, and makes
        room for as many tokens in a step as a page holds.
        """
        needed = -(-num_tokens // self.page_size)
        return needed if self.length is None else min(needed, -(-(self.length - 1) // self.page_size) + 2)
