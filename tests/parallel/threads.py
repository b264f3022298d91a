"""Ranks as threads of one process: the collectives of a Group without its start-up, for tests of what they compute."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from qinfer.parallel.comm import Graph, check_sizes

T = TypeVar("T")


class ThreadRank:
    """One of several ranks that exchange tensors through a list."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._board = barrier, board

    def _exchange(self, x: Any) -> list[Any]:
        self._board[self.rank] = x
        self._barrier.wait(60)
        everyone = list(self._board)
        self._barrier.wait(60)
        return everyone

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_reduce_parts(self, parts: Tensor, *, in_order: bool = False) -> Tensor:
        mine = parts.sum(0, keepdim=True)
        return self.all_gather(mine, 0) if in_order else self.all_reduce(mine)

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
        check_sizes(x, dim, sizes, rank=self.rank, size=self.size)
        parts = self._exchange(x)
        assert sizes is None or [part.shape[dim] for part in parts] == list(sizes)
        return torch.cat(parts, dim)

    def broadcast(self, x: Tensor) -> Tensor:
        return self._exchange(x)[0].clone()

    def agree(self, ids: Tensor) -> list[int]:
        return self.broadcast(ids).tolist()

    def tell(self, message: dict[str, Any]) -> None:
        raise AssertionError("every rank is called by the test itself")

    def recorded(self, graph: Graph) -> None:
        raise AssertionError("threads of a CPU record nothing")

    def fail(self, reason: str) -> None:
        self._barrier.abort()

    def close(self) -> None:
        pass


def on_ranks(size: int, function: Callable[[ThreadRank], T]) -> list[T]:
    """Call a function on so many ranks at once and return what each gives."""
    barrier, board = threading.Barrier(size), [None] * size

    def call(rank: int) -> T:
        try:
            return function(ThreadRank(rank, size, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(call, rank) for rank in range(size)]
        errors = [future.exception() for future in futures]
        real = [error for error in errors if error and not isinstance(error, threading.BrokenBarrierError)]
        for error in [*real, *filter(None, errors)]:
            raise error
        return [future.result() for future in futures]
