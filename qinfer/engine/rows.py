"""The input of steps on the host: first streams with one token each, refilled in place, then pieces of prompts.

The device reads a buffer when it comes to its step, and meanwhile the host fills the next one, so there are two of
them, taken in turn. The host waits before it fills one that was not read yet: of a long prompt it would fill all steps
before the device has ended the first.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import replace

import numpy as np
import torch

from qinfer.engine.sequence import Sequence
from qinfer.models.batch import Arrays, Batch, Piece, Room

_NUM_BUFFERS = 2


class _Buffer:
    """One host buffer, its fields as arrays, and what its page table says."""

    def __init__(self, room: Room, table_width: int, *, pin: bool) -> None:
        sizes = {"T": room.tokens, "B": room.sequences, "W": table_width, "R": room.logits}
        host = torch.zeros(Batch.buffer_length(**sizes), dtype=torch.int32, pin_memory=pin)
        self.batch = Batch.views(host, **sizes, max_query_len=room.longest)
        self.adapted = replace(self.batch, has_adapters=True)
        self.current = self.batch  # or the other one
        self.arrays = Arrays(self.batch)
        self.streams: Rows[Sequence] | None = None  # whose step it holds, where that had no pieces
        # Of each row: whose pages it holds, of which allocation, and how many.
        self.owners = [(-1, 0, 0)] * room.sequences
        self.wait_until_read: Callable[[], object] = lambda: None

    def arrange(self, streams: Rows[Sequence], pieces: Rows[Piece], page_size: int) -> None:
        """Write all that stays the same when the same streams have their next step."""
        count, page_table = len(streams), self.arrays.page_table
        owners = [(sequence.id, sequence.allocation, len(sequence.pages)) for sequence in streams]
        if owners != self.owners[:count]:
            for row, (owner, before, sequence) in enumerate(zip(owners, self.owners, streams, strict=False)):
                if owner != before:
                    page_table[row, : owner[2]] = sequence.pages
        self.owners[: count + len(pieces)] = owners + [(-1, 0, 0)] * len(pieces)
        self.arrays.fill(pieces, page_size, num_streams=count)
        self.arrays.adapters[:count] = [sequence.adapter for sequence in streams]
        self.current = self.adapted if self.arrays.adapters.max() >= 0 else self.batch
        self.streams = None if pieces else streams


class StepRows:
    """Steps that fit a room; what they leave of it writes nothing and reads nothing."""

    def __init__(self, room: Room, *, table_width: int, page_size: int, pin: bool) -> None:
        """Allocate the buffers.

        Args:
            room: What the step may have, padding included.
            table_width: Pages of the longest sequence.
            page_size: Tokens per page.
            pin: Whether the buffers are page-locked, so that a copy to a GPU does not wait.
        """
        self._buffers = [_Buffer(room, table_width, pin=pin) for _ in range(_NUM_BUFFERS)]
        self._page_size = page_size
        self._arange = np.arange(room.sequences)
        self._in_order = self._arange.tolist()
        self._sampled_in_order = -1 - self._arange

    def fill(self, streams: Rows[Sequence], pieces: Rows[Piece] = ()) -> Batch:
        """Describe the step in which each stream computes its newest token, and pieces of other sequences.

        Args:
            streams: Sequences with one token to compute, whose logits are wanted. The same list as in the step before
                means that their pages and adapters are the same as well.
            pieces: What other sequences compute.

        Returns:
            A batch on the host, valid until the second call after this one.
        """
        self._buffers.reverse()
        buffer, count = self._buffers[0], len(streams)
        buffer.wait_until_read()
        if pieces or streams is not buffer.streams:
            buffer.arrange(streams, pieces, self._page_size)
        arrays = buffer.arrays
        if [sequence.source for sequence in streams] == self._in_order[:count]:
            # As almost always: the step before has sampled all of them, and only the device knows what.
            arrays.token_ids[:count] = self._sampled_in_order[:count]
        else:
            arrays.token_ids[:count] = [sequence.newest for sequence in streams]
        positions = arrays.positions[:count]
        positions[:] = [sequence.num_computed for sequence in streams]
        page, offset = np.divmod(positions, self._page_size)
        arrays.slots[:count] = arrays.page_table[self._arange[:count], page] * self._page_size + offset
        np.add(positions, 1, out=arrays.context_lens[:count])
        return buffer.current

    def launched(self, wait_until_read: Callable[[], object]) -> None:
        """Note how to wait until the device has read the last batch; without this, it was read already."""
        self._buffers[0].wait_until_read = wait_until_read
