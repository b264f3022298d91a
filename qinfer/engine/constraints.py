"""Constraints: which ids may come next, decided by the ids that were generated so far.

A request names a `Constraint` (`SamplingParams.constraint`); each text then has a `Walk` of its own through it, on the
host. Before a step is sampled the walk has taken every id before it, and says by one bit per id what may follow:

    id i may follow  ⟺  words[i // 32] >> (i % 32) & 1

The bits of all constrained rows of a step reach the device in one copy and become −inf in those rows alone
(`keep_allowed`). Ids that end the text are not the constraint's affair: they may be drawn where it is complete, and
nowhere else. `engine/steering.py` is what walks for a request; `engine/grammar.py` makes constraints of JSON schemas,
regular expressions and grammars.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words: TypeAlias = NDArray[np.int32]


class Walk(Protocol):
    """Where one text stands in its constraint."""

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether the text has to end here: it is complete, and no id may follow."""
        ...

    def allowed(self) -> Words:
        """Return [ceil(V / 32)] bits of the ids that may follow; words that are left out at the end allow nothing."""
        ...

    def advance(self, token_id: int) -> None:
        """Take the next id, one of those allowed."""
        ...

    def rewind(self, count: int) -> None:
        """Take the latest ids back."""
        ...


class Constraint(Protocol):
    """What texts have to look like; it keeps nothing of a text, so any number of requests may share it."""

    def begin(self) -> Walk:
        """Return a walk that has taken nothing."""
        ...


def packed(ids: Iterable[int], vocab_size: int) -> Words:
    """Return ids as bits.

    Args:
        ids: Below `vocab_size`.
        vocab_size: V.

    Returns:
        [ceil(V / 32)] int32.
    """
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[np.fromiter(ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def keep_allowed(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """Set the logits of ids that may not be drawn to −inf, in place, on their device.

    Args:
        logits: [R, V].
        rows: [n] int64, rows that are constrained.
        words: [n, ceil(V / 32)] int32, the bits of each.
    """
    places = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_closed = (words[:, :, None] >> places & 1).flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill(is_closed, -math.inf)
