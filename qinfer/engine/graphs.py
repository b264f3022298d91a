"""Steps as CUDA graphs: the kernels of a step are recorded once per room and replayed with one launch.

Two kinds of steps have rooms, as wide in pages as the longest sequence allowed:
- Decode: one token per sequence, sizes rounded up to buckets 1, 2, 4, 8, …
- Mixed: streams beside prompts or drafts, tokens rounded up to 16, 32, 64 and multiples of 64, with sequences for a
  full batch, and rows of logits for that or for drafts. Launching their kernels one by one takes the host longer than
  running them takes the GPU.
Steps in which somebody has an adapter are recorded apart, so that the others do without.

A room owns the buffer of a `Batch`; a step copies its own buffer over that one and replays. What a step leaves unused
carries slot -1 and context length 0: it writes nothing and reads nothing. Its attention gives zeros and its other rows
depend on no row but themselves.

All graphs allocate from one memory pool, so the logits of a step are overwritten by the next step of any room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.models.batch import Batch, Room

# The first run compiles kernels and loads libraries, which a capture must not do; the second shows that they are there.
_WARM_UP_RUNS = 2
_DRAFT_LOGITS = 64  # rows of logits that a mixed step has at least, if it has as many tokens
_MOST_MULTIPLES = 8  # of 64 tokens, or of more where they do not reach


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


def mixed_sizes(most: int) -> tuple[int, ...]:
    """Return the numbers of tokens to which mixed steps of at most `most` tokens are padded, none if that is 0."""
    step = 64 * max(1, -(-most // (64 * _MOST_MULTIPLES)))
    multiples = [step * i for i in range(1, -(-most // step) + 1)]
    return (*(size for size in (16, 32, 64) if multiples and size < step), *multiples)


class GraphRunner:
    """Runs steps through recorded graphs, one per room, recorded when first needed."""

    def __init__(
        self,
        decoder: Callable[[Batch, PagedKVCache], Tensor],
        cache: PagedKVCache,
        *,
        max_batch: int,
        table_width: int,
        max_mixed_tokens: int = 0,
        recorded: Callable[[torch.cuda.CUDAGraph], None] = lambda _: None,
    ) -> None:
        """Record nothing yet.

        Args:
            decoder: `(batch, cache) -> logits [R, V]`, without a synchronization of the device inside.
            cache: The pages that every replay reads and writes; they must stay where they are.
            max_batch: Most sequences in a step.
            table_width: Pages of the longest sequence.
            max_mixed_tokens: Most tokens of a step with prompts or drafts that goes through a graph.
            recorded: Gets every graph, to reset it before the ranks whose collectives it holds part.
        """
        self.buckets = bucket_sizes(max_batch)
        self.table_width = table_width
        # One sequence more, to which the padding belongs.
        # Drafts want the logits of every token, which costs small rooms next to nothing.
        self.mixed = tuple(
            Room(tokens, max_batch + 1, max(max_batch, min(tokens, _DRAFT_LOGITS)))
            for tokens in mixed_sizes(max_mixed_tokens)
        )
        self._decoder = decoder
        self._recorded = recorded
        self._cache = cache
        self._device = torch.device(cache.device)
        self._captured: dict[tuple[Room, bool], _Captured] = {}  # by room, and whether there are adapters

    def bucket(self, num_rows: int) -> int:
        """Return the size to which a step of `num_rows` sequences is padded.

        Raises:
            ValueError: If no bucket is that large.
        """
        if num_rows > self.buckets[-1]:
            raise ValueError(f"a step may have at most {self.buckets[-1]} sequences, got {num_rows}")
        return next(size for size in self.buckets if size >= num_rows)

    def mixed_room(self, used: Room) -> Room | None:
        """Return the smallest room for a mixed step that uses so much; None if there is none, and it runs eagerly."""
        fits = (room for room in self.mixed if all(has <= may for has, may in zip(used, room, strict=True)))
        return next(fits, None)

    def capture_all(self, *, has_adapters: bool = False) -> None:
        """Record every room now, largest first so that the smaller ones fit into its memory.

        Args:
            has_adapters: Whether to record the steps with adapters as well.
        """
        for adapted in (False, True)[: 1 + has_adapters]:
            for room in (*reversed(self.mixed), *map(Room.of_rows, reversed(self.buckets))):
                self._find(room, has_adapters=adapted)

    def forget_adapters(self) -> None:
        """Forget the steps with adapters: these have moved to other buffers."""
        self._captured = {key: captured for key, captured in self._captured.items() if not key[1]}

    def run(self, batch: Batch) -> Tensor:
        """Replay the step on a batch that was padded to a room, with `table_width=table_width`.

        Returns:
            [R, V] fp32 logits, valid until the next call; rows of padding hold values without meaning.
        """
        room = Room(batch.token_ids.shape[0], batch.context_lens.shape[0], batch.logit_rows.shape[0])
        is_known = room in self.mixed or (room.sequences in self.buckets and room == Room.of_rows(room.sequences))
        if not is_known or batch.buffer.shape != (self._buffer_length(room),):
            raise ValueError(
                f"batch must have one token per row and rows in {self.buckets}, or a room in {self.mixed}, and a page "
                f"table {self.table_width} wide; got {room} and a table {batch.page_table.shape[1]} wide"
            )
        captured = self._find(room, has_adapters=batch.has_adapters)
        captured.batch.buffer.copy_(batch.buffer, non_blocking=True)
        captured.graph.replay()
        return captured.logits

    def _find(self, room: Room, *, has_adapters: bool) -> _Captured:
        """Return a room, recorded now if it was not yet."""
        key = (room, has_adapters)
        if key not in self._captured:
            self._captured[key] = self._capture(room, has_adapters=has_adapters)
        return self._captured[key]

    def _sizes(self, room: Room) -> dict[str, int]:
        """Return the sizes of a room's fields."""
        return {"T": room.tokens, "B": room.sequences, "W": self.table_width, "R": room.logits}

    def _buffer_length(self, room: Room) -> int:
        """Return the length of a room's buffer."""
        return Batch.buffer_length(**self._sizes(room))

    def _padding(self, room: Room, *, has_adapters: bool = False) -> Batch:
        """Return a room of nothing but padding, so that recording leaves the cache as it is."""
        buffer = torch.zeros(self._buffer_length(room), dtype=torch.int32, device=self._device)
        is_decode = room == Room.of_rows(room.sequences)
        # Any piece of a mixed step may be as long as the step.
        batch = Batch.views(buffer, **self._sizes(room), max_query_len=1 if is_decode else room.tokens)
        batch.slots.fill_(-1)
        batch.adapters.fill_(-1)
        batch.page_table.fill_(-1)
        starts = torch.arange(room.sequences + 1, dtype=torch.int32).clamp_(max=room.tokens)
        starts[-1] = room.tokens
        batch.query_starts.copy_(starts)
        batch.logit_rows.copy_(torch.arange(room.logits).clamp_(max=room.tokens - 1))
        return replace(batch, has_adapters=has_adapters)

    def _capture(self, room: Room, *, has_adapters: bool) -> _Captured:
        """Run the step a few times on a stream of its own, then record it."""
        with torch.cuda.device(self._device):
            batch = self._padding(room, has_adapters=has_adapters)
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
        self._recorded(graph)
        return _Captured(graph=graph, batch=batch, logits=logits)
