"""Sequences that grow, fork, shrink, move and end over one pool: each always reads what it wrote, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.engine.pages import PageTable
from qinfer.kernels.attention import paged_attention
from qinfer.kernels.kv_codec import decode, encode
from qinfer.kernels.kv_write import kv_write
from tests.compare import assert_close
from tests.strategies import random_tensor

NUM_PAGES, HEAD_DIM, SCALE = 9, 32, 32**-0.5


@dataclass
class Text:
    """A sequence: its pages, and its keys and values as they must come back."""

    pages: list[int] = field(default_factory=list)
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 2, HEAD_DIM))


class PoolMachine(RuleBasedStateMachine):
    """The pages of a table and of a cache, used as an engine may use them, beside a list of rows per sequence."""

    @initialize(page_size=st.sampled_from([16, 64, 128, 256]), kv_format=st.sampled_from(["fp16", "fp8", "k8v4", "q6"]))
    def start(self, page_size: int, kv_format: str) -> None:
        self.table = PageTable(NUM_PAGES, page_size)
        self.cache = PagedKVCache(
            num_layers=1,
            num_pages=NUM_PAGES,
            num_kv_heads=1,
            head_dim=HEAD_DIM,
            device="cpu",
            page_size=page_size,
            kv_format=kv_format,
        )
        self.texts: list[Text] = []
        self.known: dict[bytes, Tensor] = {}  # what stands under each key
        self.count = 0

    @rule(data=st.data(), share=st.floats(0.05, 1.4), is_new=st.booleans())
    def append(self, data: st.DataObject, share: float, is_new: bool) -> None:
        """Write up to a page and a half behind a text, or behind nothing."""
        if is_new or not self.texts:
            self.texts.append(Text())
        text = self.texts[-1] if is_new else data.draw(st.sampled_from(self.texts))
        self.write(text, max(1, int(share * self.table.page_size)))

    def write(self, text: Text, count: int) -> None:
        """Write rows behind a text as far as there are pages; a page that others see is copied first."""
        start, size = len(text.rows), self.table.page_size
        stop = start + count
        if start % size and not self.is_own(text.pages[-1]):
            if not self.table.num_free:
                return
            (page,) = self.table.allocate(1)
            self.cache.copy_page(text.pages[-1], page)
            self.table.free([text.pages.pop()])
            text.pages.append(page)
        missing = self.table.pages_for(stop) - len(text.pages)
        text.pages += self.table.allocate(max(0, min(missing, self.table.num_free)))
        stop = min(stop, len(text.pages) * size)
        self.count += 1
        k, v = (random_tensor(stop - start, 1, HEAD_DIM, seed=2 * self.count + i) for i in range(2))
        slots = [text.pages[i // size] * size + i % size for i in range(start, stop)]
        sides = self.cache.pages(0)
        kv_write.reference(k, v, *sides, torch.tensor(slots, dtype=torch.int32))
        rows = [decode(*encode(x[:, 0], side.codec), side.codec) for x, side in zip((k, v), sides, strict=True)]
        text.rows = torch.cat([text.rows, torch.stack(rows, dim=1)])

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """Go on from a text in two ways."""
        if self.texts:
            text = data.draw(st.sampled_from(self.texts))
            for page in text.pages:
                self.table.share(page)
            self.texts.append(Text(list(text.pages), text.rows))
            for one in (text, self.texts[-1]):
                self.write(one, 3)

    @rule(data=st.data(), share=st.floats(0, 1))
    def rewind(self, data: st.DataObject, share: float) -> None:
        if self.texts:
            text = data.draw(st.sampled_from(self.texts))
            text.rows = text.rows[: int(share * len(text.rows))]
            kept = self.table.pages_for(len(text.rows))
            self.table.free(text.pages[kept:])
            del text.pages[kept:]

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.texts:
            text = self.texts.pop(data.draw(st.integers(0, len(self.texts) - 1)))
            self.table.free(text.pages)

    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """Make the first page of a text known, which is filled up before."""
        texts = [text for text in self.texts if text.pages and self.is_own(text.pages[0])]
        if texts:
            text = data.draw(st.sampled_from(texts))
            self.write(text, max(0, self.table.page_size - len(text.rows)))
            key = str(len(self.known)).encode()
            self.table.publish(text.pages[0], key)
            self.known[key] = text.rows[: self.table.page_size]

    @rule()
    def begin_alike(self) -> None:
        """Start a text with every page that is still known."""
        for key, rows in self.known.items():
            page = self.table.find(key)
            if page is not None:
                self.table.share(page)
                self.texts.append(Text([page], rows))

    @rule(data=st.data())
    def rotate(self, data: st.DataObject) -> None:
        """Move pages that one text alone has round in a ring."""
        own = [page for text in self.texts for page in text.pages if self.is_own(page)]
        ring = data.draw(st.permutations(own))
        self.move(dict(zip(ring, ring[1:] + ring[:1], strict=True)))

    @rule()
    def defragment(self) -> None:
        self.move(self.table.defragment())
        held = {page for text in self.texts for page in text.pages}
        assert max(held, default=-1) < self.table.num_used + self.table.num_idle

    def is_own(self, page: int) -> bool:
        """Whether one text alone sees a page."""
        return self.table.references(page) == 1 and page not in map(self.table.find, self.known)

    def move(self, moves: dict[int, int]) -> None:
        self.cache.move_pages(moves)
        for text in self.texts:
            text.pages = [moves.get(page, page) for page in text.pages]

    @invariant()
    def texts_read_what_they_wrote(self) -> None:
        """Bit for bit, and through attention, while NaN stands in every page that holds nothing, and behind the end."""
        known = set(map(self.table.find, self.known))
        sides = self.cache.pages(0)
        empty = [page for page in range(NUM_PAGES) if self.table.references(page) == 0 and page not in known]
        for tensor in (tensor for side in sides for tensor in side.tensors()):
            tensor[empty] = torch.nan if tensor.is_floating_point() else 255
        kept = [Text([page], self.known[key]) for key in self.known if (page := self.table.find(key)) is not None]
        for text in (*self.texts, *kept):
            count = len(text.rows)
            if not count:
                continue
            keys, values = text.rows.unbind(1)
            for side, expected in zip(sides, (keys, values), strict=True):
                assert torch.equal(side.decode(text.pages)[:, 0].flatten(0, 1)[:count], expected)
            q = random_tensor(1, 1, HEAD_DIM, seed=count)
            lens = [torch.tensor(x, dtype=torch.int32) for x in ([text.pages], [0, 1], [count])]
            actual = paged_attention.reference(q, *sides, *lens, max_query_len=1, scale=SCALE)
            weights = (keys @ q[0, 0] * SCALE).softmax(dim=0)
            assert_close(actual, (weights @ values)[None])


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=12, stateful_step_count=30)


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ({0: NUM_PAGES}, "a page must be from 0 to 8, got 9"),
        ({-1: 0}, "a page must be from 0 to 8, got -1"),
        ({0: 2, 1: 2}, "two pages cannot move to one, got {0: 2, 1: 2}"),
    ],
)
def test_impossible_moves_are_refused(moves: dict[int, int], message: str) -> None:
    sizes = {"num_layers": 1, "num_pages": NUM_PAGES, "num_kv_heads": 1, "head_dim": 16, "page_size": 16}
    cache = PagedKVCache(device="cpu", **sizes)
    with pytest.raises(ValueError, match=message):
        cache.move_pages(moves)
