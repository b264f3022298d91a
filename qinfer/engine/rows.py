"""The input of steps on the host: first streams with one token each, refilled in place, then pieces of prompts.

A buffer is read by its copy to the device while the host fills the next one, so there are two of them, taken in turn:
when a buffer comes round again, the ids of its step have been on the host, and its copy is long done.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import replace
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from qinfer.engine.sequence import Sequence
from qinfer.models.batch import Batch, Piece, Room, logit_rows, padded

_NUM_BUFFERS = 2

Ints: TypeAlias = npt.NDArray[np.int32]


class _Buffer:
    """One host buffer, its fields as arrays, and what its page table says."""

    def __init__(self, room: Room, table_width: int, *, pin: bool) -> None:
        sizes = {"T": room.tokens, "B": room.sequences, "W": table_width, "R": room.logits}
        host = torch.zeros(Batch.buffer_length(**sizes), dtype=torch.int32, pin_memory=pin)
        is_decode = room == Room.of_rows(room.sequences)
        self.batch = Batch.views(host, **sizes, max_query_len=1 if is_decode else room.tokens)
        self.adapted = replace(self.batch, has_adapters=True)
        self.token_ids: Ints = self.batch.token_ids.numpy()
        self.positions: Ints = self.batch.positions.numpy()
        self.slots: Ints = self.batch.slots.numpy()
        self.adapters: Ints = self.batch.adapters.numpy()
        self.context_lens: Ints = self.batch.context_lens.numpy()
        self.page_table: Ints = self.batch.page_table.numpy()
        self.query_starts: Ints = self.batch.query_starts.numpy()
        self.logit_rows: Ints = self.batch.logit_rows.numpy()
        self.streams: Rows[Sequence] | None = None  # whose step it holds, where that had no pieces
        # Of each row: whose pages it holds, of which allocation, and how many.
        self.owners = [(-1, 0, 0)] * room.sequences

    def arrange(self, streams: Rows[Sequence], pieces: Rows[Piece], page_size: int) -> None:
        """Write all that stays the same when the same streams have their next step."""
        count, room = len(streams), Room(len(self.token_ids), len(self.context_lens), len(self.logit_rows))
        rows = [*range(count), *(count + row for row in logit_rows(pieces))]
        lengths, rows = padded([1] * count + [len(piece.token_ids) for piece in pieces], rows, room)
        self.query_starts[:] = [0, *accumulate(lengths)]
        self.logit_rows[:] = rows
        for row, sequence in enumerate(streams):
            pages = sequence.pages
            owner = (sequence.id, sequence.allocation, len(pages))
            if self.owners[row] != owner:
                self.page_table[row, : len(pages)] = pages
                self.owners[row] = owner
        self.owners[count : count + len(pieces)] = [(-1, 0, 0)] * len(pieces)
        self.adapters[:count] = [sequence.adapter for sequence in streams]
        self.batch.fill(pieces, page_size, first_row=count, first_token=count)
        self.streams = None if pieces else streams


class StepRows:
    """Steps that fit a room; what they leave of it writes nothing and reads nothing."""

    def __init__(self, room: Room, *, table_width: int, page_size: int, pin: bool) -> None:
        """Allocate the buffers.

        Args:
            room: Tokens, sequences and rows of logits, padding included.
            table_width: Pages of the longest sequence.
            page_size: Tokens per page.
            pin: Whether the buffers are page-locked, so that a copy to a GPU does not wait.
        """
        self._buffers = [_Buffer(room, table_width, pin=pin) for _ in range(_NUM_BUFFERS)]
        self._page_size = page_size
        self._arange = np.arange(room.sequences)

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
        if pieces or streams is not buffer.streams:
            buffer.arrange(streams, pieces, self._page_size)
        buffer.token_ids[:count] = [sequence.newest for sequence in streams]
        positions = buffer.positions[:count]
        positions[:] = [sequence.num_computed for sequence in streams]
        page, offset = np.divmod(positions, self._page_size)
        buffer.slots[:count] = buffer.page_table[self._arange[:count], page] * self._page_size + offset
        np.add(positions, 1, out=buffer.context_lens[:count])
        return buffer.adapted if buffer.adapters.max() >= 0 else buffer.batch
