"""Steps as CUDA graphs: the kernels of a step are recorded once per room and replayed with one launch.

Launching the kernels of a step one by one takes the host tens of milliseconds, longer than the GPU takes for a few
hundred tokens, so every step has a room. There are two kinds, as wide in pages as the longest sequence allowed:
- Decode: one token per sequence, sizes rounded up to buckets 1, 2, 4, 8, …
- Mixed: prompts or drafts, alone or beside streams, with sequences for a full batch, and rows of logits for that or for
  drafts. Tokens are rounded up to a few sizes up to the largest step. Beyond about a thousand tokens the GPU is the
  slower one and padding costs time; there sizes stand an eighth apart and the largest step, of which a long prompt is
  made, has none. Graphs still free the host, and where ranks share a model the GPU is the slower one much later.
Steps in which somebody has an adapter are recorded apart, so that the others do without. What wants more rows of logits
than a room has, such as a prompt that is scored, runs without a graph.

A room owns the buffer of a `Batch`; a step copies its own buffer over that one and replays. What a step leaves unused
carries slot -1 and context length 0: it writes nothing and reads nothing. Its attention gives zeros and its other rows
depend on no row but themselves.

Behind each step one of three choices of ids may follow, recorded as well (`engine/choices.py`): the likeliest ids, and
draws with and without filters, whose numbers a table on the device holds. Other ways of sampling are launched.

All graphs allocate from one memory pool on one stream; what a pool holds for several streams it keeps apart. So the
largest room has memory for all of them, and the logits of a step are overwritten by the next step of any room.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qinfer.cache.paged import PagedKVCache
from qinfer.engine.choices import CHOICES, GREEDY_NUMBERS, Choice, check_table, choose
from qinfer.kernels.sample import MAX_VOCABULARY
from qinfer.models.batch import Batch, Room

_DRAFT_LOGITS = 64  # rows of logits that a mixed step has at least, if it has as many tokens
# Attention cuts keys into runs where the blocks of all sequences that a room may have leave multiprocessors idle. So a
# sequence by itself has rooms of its own up to this size, beyond which its own blocks are enough of them.
_MOST_ALONE = 256


class _Memory:
    """The memory of a tensor on a GPU without a claim to it: the pool may give it to the next room."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.dtype == torch.float32
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(4 * stride for stride in tensor.stride()),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


@dataclass(frozen=True)
class _Captured:
    """A recorded step: where its input is read and its logits appear, and the choices of ids that may follow."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    logits: Tensor  # [R, V]
    choices: dict[Choice, torch.cuda.CUDAGraph]


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, beside: torch.cuda.CUDAGraph | None) -> Iterator[None]:
    """Record what is launched on the current stream into a graph, in the memory pool of another one.

    `torch.cuda.graph` gives all memory back to the device first, which takes longer than the recording. The garbage
    collector waits meanwhile: it may end the graphs of a generator that is no longer used, and then the recording is
    lost. What other threads do, such as taking memory for a model, does no harm.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        graph.capture_begin(None if beside is None else beside.pool(), capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
    finally:
        if was_collecting:
            gc.enable()


def bucket_sizes(max_batch: int) -> tuple[int, ...]:
    """Return the powers of two below max_batch, and max_batch itself.

    Raises:
        ValueError: If max_batch is below 1.
    """
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    return (*(1 << power for power in range((max_batch - 1).bit_length())), max_batch)


def mixed_sizes(most: int) -> tuple[int, ...]:
    """Return the numbers of tokens to which mixed steps of at most `most` tokens are padded, none if that is 0.

    16, 32, multiples of 64, from 512 on of an eighth of the power of two before them, and `most` itself: 26 sizes for
    2,048 tokens, 8 more whenever they double.
    """
    sizes, size = [16, 32], 64
    while size < most:
        sizes.append(size)
        size += max(64, 1 << (size.bit_length() - 4))
    return (*(size for size in sizes if size < most), most) if most else ()


class GraphRunner:
    """Runs steps through recorded graphs, one per room, recorded when first needed."""

    def __init__(
        self,
        decoder: Callable[[Batch, PagedKVCache], Tensor],
        cache: PagedKVCache,
        *,
        rehearse: Callable[[Batch, PagedKVCache], Tensor] | None = None,
        max_batch: int,
        table_width: int,
        max_step_tokens: int = 0,
        recorded: Callable[[torch.cuda.CUDAGraph], None] = lambda _: None,
    ) -> None:
        """Record nothing yet.

        Args:
            decoder: `(batch, cache) -> logits [R, V]`, without a synchronization of the device inside.
            cache: The pages that every replay reads and writes; they must stay where they are.
            rehearse: Launches every kernel that the decoder launches, so that recording compiles none; by default the
                decoder itself.
            max_batch: Most sequences in a step.
            table_width: Pages of the longest sequence.
            max_step_tokens: Most tokens of a step with prompts or drafts that goes through a graph.
            recorded: Gets every graph, to reset it before the ranks whose collectives it holds part.
        """
        self.buckets = bucket_sizes(max_batch)
        self.table_width = table_width
        # Drafts want the logits of every token, which costs small rooms next to nothing.
        self.mixed = tuple(
            Room(tokens, count + 1, max(count, min(tokens, _DRAFT_LOGITS)), tokens)
            for tokens in mixed_sizes(max_step_tokens)
            for count in ([1] if tokens <= _MOST_ALONE and max_batch > 1 else []) + [max_batch]
        )
        self._rooms = frozenset((*self.mixed, *map(Room.of_rows, self.buckets)))
        # Of the step whose ids were chosen last. All rooms write there, so the next step finds them whatever its room.
        self.ids = torch.zeros(max(room.logits for room in self._rooms), dtype=torch.int64, device=cache.device)
        # The same on the host, where they stay until the next are chosen.
        self.host_ids = torch.zeros(len(self.ids), dtype=torch.int64, pin_memory=self.ids.is_cuda)
        self._table = torch.tensor([GREEDY_NUMBERS] * len(self.ids), dtype=torch.float64, device=cache.device)
        self._host_table = self._table.cpu().pin_memory() if self.ids.is_cuda else self._table.clone()
        self._decoder = decoder
        self._rehearse = rehearse or decoder
        self._recorded = recorded
        self._cache = cache
        self._device = torch.device(cache.device)
        self._captured: dict[tuple[Room, bool], _Captured] = {}  # by room, and whether there are adapters
        self._side: torch.cuda.Stream | None = None  # on which all rooms are recorded
        self._last: _Captured | None = None  # the step that was replayed last

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
        # One sequence more, to which the padding belongs.
        padded = used._replace(sequences=used.sequences + 1)
        return next((room for room in self.mixed if room.holds(padded)), None)

    def capture_all(self, *, has_adapters: bool = False) -> None:
        """Record every room now, largest first so that the smaller ones fit into its memory.

        Args:
            has_adapters: Whether to record the steps with adapters as well.
        """
        for adapted in (False, True)[: 1 + has_adapters]:
            for room in sorted(self._rooms, reverse=True):
                self._find(room, has_adapters=adapted)
        # What the rehearsals took, few other steps will take.
        torch.cuda.empty_cache()

    def forget_adapters(self) -> None:
        """Forget the steps with adapters: these have moved to other buffers."""
        self._captured = {key: captured for key, captured in self._captured.items() if not key[1]}

    def run(self, batch: Batch) -> Tensor:
        """Replay the step on a batch that was padded to a room, with `table_width=table_width`.

        Returns:
            [R, V] fp32 logits, valid until the next call; rows of padding hold values without meaning.
        """
        tokens, sequences, logits = map(len, (batch.token_ids, batch.context_lens, batch.logit_rows))
        room = Room(tokens, sequences, logits, batch.max_query_len)
        if room not in self._rooms or batch.page_table.shape[1] != self.table_width:
            raise ValueError(
                f"batch must have one token per row and rows in {self.buckets}, or a room in {self.mixed}, and a page "
                f"table {self.table_width} wide; got {room} and a table {batch.page_table.shape[1]} wide"
            )
        captured = self._find(room, has_adapters=batch.has_adapters)
        captured.batch.buffer.copy_(batch.buffer, non_blocking=True)
        captured.graph.replay()
        self._last = captured
        return captured.logits

    def choose(self, logits: Tensor, choice: Choice, table: NDArray[np.float64]) -> Tensor | None:
        """Choose ids of the step that ran last with one launch, which is all that most steps want.

        Args:
            logits: [n, V] the first rows of what `run` returned last.
            choice: What the rows of the table make.
            table: [n, 5] of `sample_rows`.

        Returns:
            [n] int64, -1 where the logits are not finite: the first of `ids`, on their way to `host_ids` as well; None
            if the logits are others, or the vocabulary is too large for such a choice.

        Raises:
            ValueError: The table has other rows than the logits.
        """
        check_table(logits, table)
        last = self._last
        if last is None or logits.data_ptr() != last.logits.data_ptr() or choice not in last.choices:
            return None
        if choice != "greedy":
            rows = self._host_table[: len(last.logits)]
            rows.numpy()[: len(table)] = table
            # Rows of padding are cheapest so.
            rows.numpy()[len(table) :] = GREEDY_NUMBERS
            self._table[: len(rows)].copy_(rows, non_blocking=True)
        last.choices[choice].replay()
        return self.ids[: len(logits)]

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
        batch = Batch.views(buffer, **self._sizes(room), max_query_len=room.longest)
        batch.slots.fill_(-1)
        batch.adapters.fill_(-1)
        batch.page_table.fill_(-1)
        starts = torch.arange(room.sequences + 1, dtype=torch.int32).clamp_(max=room.tokens)
        starts[-1] = room.tokens
        batch.query_starts.copy_(starts)
        batch.logit_rows.copy_(torch.arange(room.logits).clamp_(max=room.tokens - 1))
        return replace(batch, has_adapters=has_adapters)

    def _capture(self, room: Room, *, has_adapters: bool) -> _Captured:
        """Rehearse the step and the choices after it on a stream of their own, then record them."""
        with torch.cuda.device(self._device):
            batch = self._padding(room, has_adapters=has_adapters)
            # What the last step chose may still have readers.
            unread = torch.empty(room.logits, dtype=torch.int64, pin_memory=True)
            self._side = side = self._side or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                logits = self._rehearse(batch, self._cache)
                choices = CHOICES if logits.shape[1] <= MAX_VOCABULARY else CHOICES[:1]
                for choice in choices:
                    choose(choice, logits, self._table[: len(logits)], host=unread)
            torch.cuda.current_stream().wait_stream(side)
            if all(room > other for other, _ in self._captured):
                # It takes new memory, some of which the rehearsal has had.
                torch.cuda.empty_cache()
            graph, after = torch.cuda.CUDAGraph(), {choice: torch.cuda.CUDAGraph() for choice in choices}
            side.synchronize()
            with torch.cuda.stream(side):
                # Any recorded graph knows the pool that all of them share.
                with _recording(graph, next((captured.graph for captured in self._captured.values()), None)):
                    logits = self._decoder(batch, self._cache)
                table, out, host = (rows[: len(logits)] for rows in (self._table, self.ids, self.host_ids))
                for choice, chosen in after.items():
                    with _recording(chosen, graph):
                        choose(choice, logits, table, out=out, host=host)
            # A tensor that owned them would take megabytes from the pool for every room.
            logits = torch.as_tensor(_Memory(logits), device=self._device)
        self._recorded(graph)
        return _Captured(graph=graph, batch=batch, logits=logits, choices=after)
