"""Decode steps as CUDA graphs: the kernels of a step are recorded once per batch size and replayed with one launch.

Steps in which somebody has an adapter are recorded apart, so that the others do without.

Batch sizes are rounded up to buckets 1, 2, 4, 8, …; a bucket owns the buffer of a `Batch` with one token per row, whose
page table is as wide as the longest sequence allowed. A step copies its own buffer over that one and replays. Rows that
a step leaves unused carry slot -1 and context length 0: they write nothing and read nothing.

All graphs allocate from one memory pool, so the logits of a step are overwritten by the next step of any bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.models.batch import Batch

# The first run compiles kernels and loads libraries, which a capture must not do; the second shows that they are there.
_WARM_UP_RUNS = 2


@dataclass(frozen=True)
class _Captured:
    """A recorded step: where its input is read and its logits appear."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    logits: Tensor


def bucket_sizes(max_batch: int) -> tuple[int, ...]:
    """Return the powers of two below max_batch, and max_batch itself.

    Raises:
        ValueError: If max_batch is below 1.
    """
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    return (*(1 << power for power in range((max_batch - 1).bit_length())), max_batch)


class GraphRunner:
    """Runs steps of one token per sequence through recorded graphs, one per bucket, recorded when first needed."""

    def __init__(
        self, decoder: Callable[[Batch, PagedKVCache], Tensor], cache: PagedKVCache, *, max_batch: int, table_width: int
    ) -> None:
        """Record nothing yet.

        Args:
            decoder: `(batch, cache) -> logits [R, V]`, without a synchronization of the device inside.
            cache: The pages that every replay reads and writes; they must stay where they are.
            max_batch: Most sequences in a step.
            table_width: Pages of the longest sequence.
        """
        self.buckets = bucket_sizes(max_batch)
        self.table_width = table_width
        self._decoder = decoder
        self._cache = cache
        self._device = torch.device(cache.device)
        self._captured: dict[tuple[int, bool], _Captured] = {}  # by bucket, and whether there are adapters

    def bucket(self, num_rows: int) -> int:
        """Return the size to which a step of `num_rows` sequences is padded.

        Raises:
            ValueError: If no bucket is that large.
        """
        if num_rows > self.buckets[-1]:
            raise ValueError(f"a step may have at most {self.buckets[-1]} sequences, got {num_rows}")
        return next(size for size in self.buckets if size >= num_rows)

    def capture_all(self, *, has_adapters: bool = False) -> None:
        """Record every bucket now, largest first so that the smaller ones fit into its memory.

        Args:
            has_adapters: Whether to record the steps with adapters as well.
        """
        for adapted in (False, True)[: 1 + has_adapters]:
            for size in reversed(self.buckets):
                self._find(size, has_adapters=adapted)

    def forget_adapters(self) -> None:
        """Forget the steps with adapters: these have moved to other buffers."""
        self._captured = {key: captured for key, captured in self._captured.items() if not key[1]}

    def run(self, batch: Batch) -> Tensor:
        """Replay the step on a batch that was built with `pad_to=bucket(n)` and `table_width=table_width`.

        Returns:
            [bucket, V] fp32 logits, valid until the next call; rows of padding hold values without meaning.
        """
        size = batch.context_lens.shape[0]
        if size not in self.buckets or batch.buffer.shape != (self._buffer_length(size),):
            raise ValueError(
                f"batch must have one token per row, a page table {self.table_width} wide and rows in {self.buckets}, "
                f"got {batch.token_ids.shape[0]} tokens, a table {batch.page_table.shape[1]} wide and {size} rows"
            )
        captured = self._find(size, has_adapters=batch.has_adapters)
        captured.batch.buffer.copy_(batch.buffer, non_blocking=True)
        captured.graph.replay()
        return captured.logits

    def _find(self, size: int, *, has_adapters: bool) -> _Captured:
        """Return a bucket, recorded now if it was not yet."""
        key = (size, has_adapters)
        if key not in self._captured:
            self._captured[key] = self._capture(size, has_adapters=has_adapters)
        return self._captured[key]

    def _buffer_length(self, size: int) -> int:
        """Return the length of a bucket's buffer."""
        return Batch.buffer_length(T=size, B=size, W=self.table_width, R=size)

    def _padding(self, size: int, *, has_adapters: bool = False) -> Batch:
        """Return a bucket of nothing but padding, so that recording leaves the cache as it is."""
        buffer = torch.zeros(self._buffer_length(size), dtype=torch.int32, device=self._device)
        batch = Batch.views(buffer, T=size, B=size, W=self.table_width, R=size, max_query_len=1)
        batch.slots.fill_(-1)
        batch.adapters.fill_(-1)
        batch.page_table.fill_(-1)
        torch.arange(size + 1, out=batch.query_starts)
        torch.arange(size, out=batch.logit_rows)
        return replace(batch, has_adapters=has_adapters)

    def _capture(self, size: int, *, has_adapters: bool) -> _Captured:
        """Run the step a few times on a stream of its own, then record it."""
        with torch.cuda.device(self._device):
            batch = self._padding(size, has_adapters=has_adapters)
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP_RUNS):
                    self._decoder(batch, self._cache)
            torch.cuda.current_stream().wait_stream(side)
            # Any recorded graph knows the pool that all of them share.
            pool = next((captured.graph.pool() for captured in self._captured.values()), None)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=side):
                logits = self._decoder(batch, self._cache)
        return _Captured(graph=graph, batch=batch, logits=logits)
