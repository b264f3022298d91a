"""One way to compute something, its check and its time: what ops and their peers are measured as.

Correctness gates speed: a contender whose numbers are wrong, or that raises, has a problem instead of a time, and is
reported with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import ceil
from typing import TypeVar

import torch
from torch import Tensor

from qinfer.bench.measure import time_graph
from qinfer.errors import QinferError

ROTATE_BYTES = 200_000_000  # several times the largest cache, so that operands come from memory
TOLERANCE = 4e-3  # relative RMS against fp32; fp16 products of these sizes land near 5e-4
COARSE = 2e-2  # the same in bf16, with 8 bits of mantissa

Function = Callable[[Tensor], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Contender:
    """One way to compute a function of activations, on several copies of its other operand."""

    name: str
    functions: Sequence[Function]  # one per copy
    reference: Function  # fp32 result of the first copy
    nbytes: int  # of one copy
    dtype: torch.dtype = torch.float16  # of the activations


@dataclass(frozen=True)
class Peer:
    """Somebody else's way; its package, None for torch's own; made from the arguments of its kind."""

    name: str
    package: str | None
    make: Callable[..., Contender]


@dataclass(frozen=True)
class Outcome:
    """Milliseconds, or why there are none."""

    ms: float | None
    problem: str | None = None

    def __str__(self) -> str:
        return f"{self.ms * 1e3:.1f}" if self.ms is not None else (self.problem or "-").split(":")[0].split(" ")[0]


def more(make: Callable[[], T], nbytes: int) -> list[T]:
    """Make as many copies beside the first as all together exceed the cache."""
    return [make() for _ in range(ceil(ROTATE_BYTES / nbytes) - 1)]


def made(peer: Peer, *arguments: object) -> Contender | Outcome:
    """Make a peer's contender; an outcome with the problem where it is not installed or refuses."""
    if peer.package is not None and find_spec(peer.package) is None:
        return Outcome(None, f"missing: {peer.package} is not installed")
    try:
        return peer.make(*arguments)
    except Exception as problem:  # whatever a peer raises is its result
        return Outcome(None, _told(problem))


def outcome(contender: Contender, x: Tensor, *, is_peer: bool = False, repeats: int = 10) -> Outcome:
    """Check one copy, then time them all in one graph; what a peer raises is its result, what qinfer raises is not."""
    x = x.to(contender.dtype)
    try:
        error = relative_error(contender.functions[0](x), contender.reference(x))
        if not error < (COARSE if contender.dtype == torch.bfloat16 else TOLERANCE):
            return Outcome(None, f"wrong: relative error {error:.2g}")
        calls = [partial(function, x) for function in contender.functions]
        return Outcome(time_graph(calls, x.device, repeats=repeats).median)
    except Exception as problem:
        if not is_peer or isinstance(problem, QinferError):
            raise
        return Outcome(None, _told(problem))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the relative RMS error; NaN where there is NaN."""
    return float((actual.float() - expected).norm() / expected.norm())


def _told(problem: Exception) -> str:
    first = (str(problem).splitlines() or [""])[0][:200]
    return f"raised: {type(problem).__name__}: {first}"
