"""Several ranks, one generator each, that go the same way: rank 0 takes the requests and tells what it did with them.

Every rank runs the same program: schedulers are deterministic, sampled ids are rank 0's, and what comes from outside,
new and cancelled requests, is told before each step. One message is a JSON object with

    generator    number of the generator it is about
    settings     how to make it, in its first message
    requests     new ones: id, prompt, params, priority, lora (its id, or null), and what their constraint is made of
    cancelled    ids of requests
    warm_up      true: warm up, there is no step
    released     numbers of generators that rank 0 has dropped since
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import count
from typing import Any

from qinfer.engine.constraints import Constraint
from qinfer.engine.grammar import Grammar
from qinfer.engine.params import SamplingParams
from qinfer.engine.sequence import Sequence
from qinfer.errors import UnsupportedError
from qinfer.parallel.comm import Communicator
from qinfer.tokenizer import Tokenizer

_numbers = count()
# Filled by the garbage collector, which may run anywhere, and emptied by the next message.
_released: deque[int] = deque()


class Turns:
    """What rank 0 has to tell about one generator; on other ranks, and alone, nothing is ever told."""

    def __init__(self, comm: Communicator, settings: dict[str, Any]) -> None:
        """Tell that there is a generator with these settings."""
        self._comm = comm
        self._is_heard = comm.size > 1 and comm.rank == 0
        self._number = next(_numbers)
        self._requests: list[dict[str, Any]] = []
        self._cancelled: list[int] = []
        if self._is_heard:
            comm.tell({"generator": self._number, "settings": settings, "released": _take_released()})
            weakref.finalize(self, _released.append, self._number)

    def request(self, sequence: Sequence) -> None:
        """Note a new request."""
        if self._is_heard:
            constraint = sequence.params.constraint
            self._requests.append(
                {
                    "id": sequence.id,
                    "prompt": [*sequence.prompt, *sequence.healed],
                    "params": asdict(replace(sequence.params, constraint=None)),
                    "priority": sequence.priority,
                    "lora": None if sequence.lora is None else sequence.lora.id,
                    "grammar": constraint.source if isinstance(constraint, Grammar) else None,
                }
            )

    def check(self, constraint: Constraint, tokenizer: Tokenizer | None) -> None:
        """Raise an UnsupportedError if other ranks cannot be told of a constraint."""
        if self._comm.size > 1 and (tokenizer is None or not isinstance(constraint, Grammar)):
            kind = type(constraint).__name__
            raise UnsupportedError(
                "with several ranks, a model takes a schema, a regex or a grammar as constraint, compiled with its own "
                f"tokenizer; got {kind}{' and the model has no tokenizer' if tokenizer is None else ''}"
            )

    def cancel(self, request: int) -> None:
        """Note that a request was cancelled; of one that was not told yet, nothing is told at all."""
        if self._is_heard:
            others = [one for one in self._requests if one["id"] != request]
            if len(others) == len(self._requests):
                self._cancelled.append(request)
            self._requests = others

    def warm_up(self) -> None:
        """Tell that this generator warms up now."""
        if self._is_heard:
            self._comm.tell({"generator": self._number, "warm_up": True, "released": _take_released()})

    def step(self) -> None:
        """Tell what was noted, and that a step follows."""
        if self._is_heard:
            turn = {"generator": self._number, "requests": self._requests, "cancelled": self._cancelled}
            self._requests, self._cancelled = [], []
            self._comm.tell({**turn, "released": _take_released()})


def heard(request: Mapping[str, Any], tokenizer: Tokenizer | None) -> SamplingParams:
    """Return the parameters of a request that rank 0 told."""
    params = SamplingParams(**request["params"])
    if request["grammar"] is None:
        return params
    assert tokenizer is not None
    return replace(params, constraint=Grammar("grammar", request["grammar"], tokenizer))


def _take_released() -> list[int]:
    return [_released.popleft() for _ in range(len(_released))]
