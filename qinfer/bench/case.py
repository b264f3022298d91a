"""One op with one set of arguments, and the list of them all; `cases.py` fills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qinfer.bench.maker import Fill, Maker

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One op with one set of arguments."""

    op: str
    name: str
    make: Callable[[torch.device, Fill], Arguments]
    compiled: bool = True  # False: CI need not compile it; its kernels differ little from another case's


CASES: list[Case] = []


def case(op: str, name: str, *, compiled: bool = True) -> Callable[[Callable[[Maker], Arguments]], None]:
    """Register the function below as a case of an op."""

    def register(make: Callable[[Maker], Arguments]) -> None:
        CASES.append(Case(op, name, lambda device, fill: make(Maker(device, fill)), compiled))

    return register
