"""What ranks 1, 2, … of the tests run."""

from __future__ import annotations

import os
import time

import torch

from qinfer.parallel.comm import Group


def collectives(group: Group) -> list[torch.Tensor]:
    """One of each, with parts that tell from whom they come; every rank calls this."""
    mine = torch.arange(6.0).reshape(2, 3) + 10 * group.rank
    sizes = [2, 0, 3][: group.size]
    part = mine.new_full((2, sizes[group.rank]), group.rank)
    halves = torch.full((group.rank, 2), group.rank, dtype=torch.bfloat16)
    return [
        group.all_reduce(mine.clone()),
        group.all_gather(part, 1, sizes),
        group.all_gather(halves, 0, list(range(group.size))),
        group.all_gather(mine, -2),
        group.all_gather(mine[:, :0], 1),
        group.broadcast(mine.clone()),
        torch.tensor(group.agree(torch.tensor([7, 8]) * (group.rank + 1))),
    ]


def expected(size: int) -> list[torch.Tensor]:
    """What every rank must get, computed by one process."""
    base = torch.arange(6.0).reshape(2, 3)
    all_of = [base + 10 * rank for rank in range(size)]
    sizes = [2, 0, 3][:size]
    return [
        torch.stack(all_of).sum(0),
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
        if got.dtype != wanted.dtype or not torch.equal(got, wanted):
            raise AssertionError(f"result {index} is {got}, expected {wanted}")


def obey(group: Group) -> None:
    """Do what messages say until rank 0 closes the group."""
    while (message := group.receive()) is not None:
        match message["do"]:
            case "collectives":
                check_collectives(group)
            case "raise" if message["rank"] == group.rank:
                raise ValueError(message["text"])
            case "die" if message["rank"] == group.rank:
                os._exit(3)
            case "reduce":
                group.all_reduce(torch.zeros(1))
            case "sleep":
                time.sleep(message["seconds"])
