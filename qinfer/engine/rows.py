"""The input of decode steps on the host: one token per row, refilled in place, and only where it changed.

A buffer is read by its copy to the device while the host fills the next one, so there are two of them, taken in turn:
when a buffer comes round again, the ids of its step have been on the host, and its copy is long done.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from qinfer.engine.sequence import Sequence
from qinfer.models.batch import Batch

_NUM_BUFFERS = 2

Ints: TypeAlias = npt.NDArray[np.int32]


class _Buffer:
    """One host buffer, its fields as arrays, and what its page table says."""

    def __init__(self, num_rows: int, table_width: int, *, pin: bool) -> None:
        sizes = {"T": num_rows, "B": num_rows, "W": table_width, "R": num_rows}
        host = torch.zeros(Batch.buffer_length(**sizes), dtype=torch.int32, pin_memory=pin)
        self.batch = Batch.views(host, **sizes, max_query_len=1)
        self.token_ids: Ints = self.batch.token_ids.numpy()
        self.positions: Ints = self.batch.positions.numpy()
        self.slots: Ints = self.batch.slots.numpy()
        self.adapters: Ints = self.batch.adapters.numpy()
        self.context_lens: Ints = self.batch.context_lens.numpy()
        self.page_table: Ints = self.batch.page_table.numpy()
        self.batch.query_starts.numpy()[:] = np.arange(num_rows + 1)
        self.batch.logit_rows.numpy()[:] = np.arange(num_rows)
        self.slots[:] = -1
        self.adapted = replace(self.batch, has_adapters=True)
        # Of each row: whose pages it holds, of which allocation, and how many.
        self.owners = [(-1, 0, 0)] * num_rows


class DecodeRows:
    """Decode steps of at most `num_rows` sequences; rows without a sequence write nothing and read nothing."""

    def __init__(self, num_rows: int, *, table_width: int, page_size: int, pin: bool) -> None:
        """Allocate the buffers.

        Args:
            num_rows: Rows of the batch, padding included.
            table_width: Pages of the longest sequence.
            page_size: Tokens per page.
            pin: Whether the buffers are page-locked, so that a copy to a GPU does not wait.
        """
        self._buffers = [_Buffer(num_rows, table_width, pin=pin) for _ in range(_NUM_BUFFERS)]
        self._page_size = page_size
        self._arange = np.arange(num_rows)

    def fill(self, sequences: Rows[Sequence]) -> Batch:
        """Describe the step in which each sequence computes its newest token.

        Returns:
            A batch on the host, valid until the second call after this one.
        """
        self._buffers.reverse()
        buffer, count = self._buffers[0], len(sequences)
        buffer.token_ids[:count] = [sequence.newest for sequence in sequences]
        positions = buffer.positions[:count]
        positions[:] = [sequence.num_computed for sequence in sequences]
        for row, sequence in enumerate(sequences):
            owner = (sequence.id, sequence.allocation, len(sequence.pages))
            if buffer.owners[row] != owner:
                buffer.page_table[row, : len(sequence.pages)] = sequence.pages
                buffer.owners[row] = owner
        page, offset = np.divmod(positions, self._page_size)
        buffer.slots[:count] = buffer.page_table[self._arange[:count], page] * self._page_size + offset
        buffer.context_lens[:count] = positions + 1
        buffer.adapters[:count] = [sequence.adapter for sequence in sequences]
        buffer.token_ids[count:] = 0
        buffer.positions[count:] = 0
        buffer.slots[count:] = -1
        buffer.adapters[count:] = -1
        buffer.context_lens[count:] = 0
        return buffer.adapted if buffer.adapters.max() >= 0 else buffer.batch
