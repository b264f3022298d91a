"""Keys of whole pages: a page is the same as another when it and everything before it hold the same tokens.

    key_0 = hash(adapter, ids of page 0) · key_i = hash(key_{i-1}, ids of page i)

Keys and values depend on the adapter that computed them, whose number is never given to another.

Keys are 128 bits of blake2b. Only whole pages have one: what a sequence shares is never written again, since its next
token goes to a page behind it.

A model that looks back no further than a window needs of a known beginning only the pages that its next token sees.
"""

from __future__ import annotations

import hashlib

import numpy as np

from qinfer.engine.pages import PageTable
from qinfer.engine.sequence import Sequence
from qinfer.engine.window import Window

_KEY_BYTES = 16


def keys(sequence: Sequence, count: int, page_size: int) -> list[bytes]:
    """Return the keys of the first `count` pages of a sequence, whose ids must be on the host."""
    known = sequence.page_keys
    for index in range(len(known), count):
        ids = np.array(sequence.ids(index * page_size, (index + 1) * page_size), dtype=np.int32)
        before = known[-1] if known else b"" if sequence.lora is None else b"lora %d:" % sequence.lora.id
        known.append(hashlib.blake2b(before + ids.tobytes(), digest_size=_KEY_BYTES).digest())
    return known[:count]


def publish(pages: PageTable, sequence: Sequence) -> None:
    """Make the whole pages of a sequence known, as far as they are computed and their ids on the host."""
    whole = min(sequence.num_computed, sequence.num_known) // pages.page_size
    if whole > sequence.num_published:
        for page, key in list(zip(sequence.pages, keys(sequence, whole, pages.page_size), strict=False))[
            sequence.num_published :
        ]:
            # What was given back before its ids were on the host stays unknown.
            if page >= 0:
                pages.publish(page, key)
        sequence.num_published = whole


def match(pages: PageTable, sequence: Sequence, window: Window) -> list[int]:
    """Return the known pages with which a sequence begins, -1 for those that none of its next tokens sees.

    At least one token is left, for its logits are wanted.
    """
    found: list[int | None] = []
    best = run = 0
    for key in keys(sequence, sequence.num_skippable // pages.page_size, pages.page_size):
        found.append(pages.find(key))
        run = 0 if found[-1] is None else run + 1
        if run and run >= len(found) - window.first_page(len(found) * pages.page_size):
            best = len(found)
    first = window.first_page(best * pages.page_size)
    return [-1] * first + [page for page in found[first:best] if page is not None]
