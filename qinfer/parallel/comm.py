"""How the ranks of a model exchange tensors; the decoder calls these and never asks how many ranks there are."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Communicator(Protocol):
    """The collectives that a decoder needs; every rank calls the same ones in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0 to size - 1."""
        ...

    @property
    def size(self) -> int:
        """Number of processes that hold a share of the model."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's x; x itself may be overwritten with it."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Return every rank's x joined along `dim` in rank order; only that dimension may differ between ranks."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Return rank 0's x; on the other ranks x gives shape and dtype and may be overwritten."""
        ...


class Alone:
    """The communicator of a model that one process holds entirely: every collective is the identity, without a copy."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return x, the sum over one rank."""
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Return x, the only part.

        Args:
            x: [...] tensor.
            dim: dimension of x along which parts would be joined.

        Raises:
            IndexError: x has no such dimension.
        """
        x.size(dim)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Return x, which is rank 0's."""
        return x
