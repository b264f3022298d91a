"""What ranks 1, 2, … of the tests run."""

from __future__ import annotations

import os
import time
from typing import Any, cast

import torch

from qinfer.engine.follow import follow
from qinfer.kernels.parts import add_up
from qinfer.models.model import Model
from qinfer.parallel.comm import Group


def collectives(group: Group) -> list[torch.Tensor]:
    """One of each, with parts that tell from whom they come; every rank calls this."""
    mine = torch.arange(6.0, device=group.device).reshape(2, 3) + 10 * group.rank
    sizes = [2, 0, 3, 1][: group.size]
    part = mine.new_full((2, sizes[group.rank]), group.rank)
    halves = mine.new_full((group.rank, 2), group.rank, dtype=torch.bfloat16)
    return [
        group.all_reduce(mine.clone()),
        group.all_reduce_parts(torch.stack([mine] * (1 + group.rank))),
        group.all_gather(part, 1, sizes),
        group.all_gather(halves, 0, list(range(group.size))),
        group.all_gather(mine, -2),
        group.all_gather(mine[:, :0], 1),
        group.broadcast(mine.clone()),
        torch.tensor(group.agree(torch.tensor([7, 8], device=group.device) * (group.rank + 1))),
    ]


def expected(size: int) -> list[torch.Tensor]:
    """What every rank must get, computed by one process."""
    base = torch.arange(6.0).reshape(2, 3)
    all_of = [base + 10 * rank for rank in range(size)]
    sizes = [2, 0, 3, 1][:size]
    return [
        torch.stack(all_of).sum(0),
        sum((1 + rank) * x for rank, x in enumerate(all_of))[None],
        torch.cat([base.new_full((2, width), rank) for rank, width in enumerate(sizes)], 1),
        torch.cat([torch.full((rank, 2), rank, dtype=torch.bfloat16) for rank in range(size)]),
        torch.cat(all_of),
        base[:, :0],
        base,
        torch.tensor([7, 8]),
    ]


def check_collectives(group: Group) -> None:
    """Raise where a collective differs from the model of one process."""
    for index, (got, wanted) in enumerate(zip(collectives(group), expected(group.size), strict=True)):
        if got.dtype != wanted.dtype or not torch.equal(got.cpu(), wanted):
            raise AssertionError(f"result {index} is {got}, expected {wanted}")


def check_sums(group: Group) -> None:
    """Sums of parts, run and replayed: the same bits on every rank, close to what NCCL gives.

    Sizes around the largest that goes through mailboxes, in an order that uses channels unequally often.
    """
    random = torch.Generator(group.device).manual_seed(group.rank)
    for rows in (1, 7, 25, 26, 1, 2, 200, 1):
        parts = torch.empty(1 + (group.rank + rows) % 3, rows, 5000, device=group.device).normal_(generator=random)
        check_sum(group, parts, group.all_reduce_parts(parts.clone()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                summed = group.all_reduce_parts(parts.clone())
        for _ in range(4):
            parts.normal_(generator=random)
            graph.replay()
            check_sum(group, parts, summed)


def check_large_sums(group: Group) -> None:
    """Sums that no mailbox takes: rounded to bf16 within the bound, and in order, where a row is what it is alone."""
    random = torch.Generator(group.device).manual_seed(group.rank)
    # More than 512 KB, and a number of rows that ranks cannot share evenly.
    parts = torch.empty(1, 1031, 256, device=group.device).normal_(generator=random)
    everyone = group.all_gather(parts.double(), 0)
    rounded = group.all_reduce_parts(parts.bfloat16())
    # Every rank rounds once, and so does every addition. bf16 has 8 bits, so half a unit of the last one is at most
    # 2^-8 of what is rounded, which is some partial sum.
    bound = 2.0**-8 * 1.01 * (2 * group.size - 1) * everyone.abs().sum(0)
    if rounded.dtype != torch.bfloat16 or not ((rounded[0].double() - everyone.sum(0)).abs() <= bound).all():
        raise AssertionError("a sum in bf16 is off by more than its roundings")
    summed = add_up(group.all_reduce_parts(parts.clone(), in_order=True))
    for row in (0, 7, 517, 1030):
        alone = add_up(group.all_reduce_parts(parts[:, row : row + 1].clone(), in_order=True))
        if not torch.equal(alone[0], summed[row]):
            raise AssertionError(f"row {row} depends on the others")
    for name, mine in (("rounded", rounded[0]), ("in order", summed)):
        if not torch.equal(group.all_gather(mine[None], 0), mine.expand(group.size, *mine.shape)):
            raise AssertionError(f"ranks differ in a sum {name}")


def check_sum(group: Group, parts: torch.Tensor, summed: torch.Tensor) -> None:
    """Raise unless `summed` is the sum of the parts of all ranks, here and there."""
    if not torch.equal(group.all_gather(summed, 0), summed.expand(group.size, *summed.shape[1:])):
        raise AssertionError(f"ranks differ in a sum of {list(parts.shape)}")
    expected = group.all_reduce(parts.double().sum(0))
    error = float((summed[0] - expected).abs().max() / expected.abs().max())
    if not error < 1e-6:
        raise AssertionError(f"relative error {error} in a sum of {list(parts.shape)}")


# The end of a model that was given a group ends the group.
_kept: list[Model] = []


def keep(model: Model) -> Model:
    """Let a model live as long as the process, so that another one can follow in its group."""
    _kept.append(model)
    return model


class UntilDone:
    """A group whose messages end where a test is done with its model."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @property
    def is_closed(self) -> bool:
        return self._group.is_closed

    def receive(self) -> dict[str, Any] | None:
        message = self._group.receive()
        return None if message == {"do": "done"} else message


def obey(group: Group) -> None:
    """Do what messages say until rank 0 closes the group."""
    while (message := group.receive()) is not None:
        match message["do"]:
            case "check_collectives" | "check_sums" | "check_large_sums" as check:
                globals()[check](group)
            case "follow":
                model = Model.load(message["path"], parallel=group, **message["options"])
                follow(keep(model), cast("Group", UntilDone(group)))
            case "raise" if message["rank"] == group.rank:
                raise ValueError(message["text"])
            case "die" if message["rank"] == group.rank:
                os._exit(3)
            case "reduce":
                group.all_reduce(torch.zeros(1, device=group.device))
            case "reduce parts":
                group.all_reduce_parts(torch.zeros(1, 1, 8, device=group.device))
            case "sleep":
                time.sleep(message["seconds"])
