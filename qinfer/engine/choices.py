"""Choices of the next ids that one op makes for all rows of a step, by a table of numbers: what can be recorded.

Rows that are penalized, constrained or filtered in other ways are `sample`'s (`engine/sampling.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qinfer.kernels.greedy import greedy
from qinfer.kernels.sample import sample_rows

if TYPE_CHECKING:
    from qinfer.engine.sampling import SamplerState

# The choices that rows can make by one op: the likeliest ids, a draw, a draw from the likeliest.
Choice: TypeAlias = Literal["greedy", "draw", "filtered draw"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
GREEDY_NUMBERS = (0.0, 0.0, 1.0, 1.0, 0.0)  # a row of `sample_rows`' table that chooses the likeliest id


def choose(
    choice: Choice, logits: Tensor, table: Tensor | None, *, out: Tensor | None = None, host: Tensor | None = None
) -> Tensor:
    """Launch a choice.

    Args:
        choice: What the rows of the table make.
        logits: [R, V] fp32; not changed.
        table: [R, 5] fp64 of `sample_rows`, on the device; None for "greedy", which looks at none.
        out: As in `sample_rows`.
        host: As in `sample_rows`.

    Returns:
        [R] int64 ids, -1 where the logits are not finite.
    """
    if choice == "greedy":
        return greedy(logits, out=out, host=host)
    assert table is not None
    return sample_rows(logits, table, filtered=choice == "filtered draw", out=out, host=host)


def check_table(logits: Tensor, table: NDArray[np.float64]) -> None:
    """Raise a ValueError unless a table on the host has a row for every row of logits."""
    if len(table) != len(logits):
        raise ValueError(f"table must have {len(logits)} rows, one per row of logits, got {len(table)}")


def choice_of(table: NDArray[np.float64]) -> Choice:
    """Return the choice that the rows of `sample_rows`' table make."""
    if not table[:, 0].any():
        return "greedy"
    return "filtered draw" if (table[:, 1] > 0).any() or (table[:, 2] < 1).any() else "draw"


class FixedRows:
    """Rows that differ from step to step in their random numbers alone: what else they say is laid out once."""

    def __init__(self, states: Sequence[SamplerState]) -> None:
        """Lay out the rows of requests whose `is_fixed` is True."""
        self._states = states
        self._table = np.array([state.numbers for state in states], np.float64)
        self.choice = choice_of(self._table)

    def table(self, steps: Sequence[int]) -> NDArray[np.float64]:
        """Return the table of `sample_rows` for a step, valid until the next call.

        Args:
            steps: How many ids each request has generated.
        """
        if self.choice != "greedy":
            self._table[:, -1] = [state.uniforms.at(step) for state, step in zip(self._states, steps, strict=True)]
        return self._table
