"""Where an op runs: the reference on CPU tensors, the Triton launcher on CUDA tensors and under the interpreter.

The decision depends on the tensors alone. There is no fallback: an op that Triton cannot run raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, update_wrapper
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from qinfer.env import settings

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op[Any, Any]] = {}
_forced: ContextVar[Literal["reference", "launch"] | None] = ContextVar("qinfer_implementation", default=None)


class Op(Generic[P, R]):
    """A checked function with two bodies, `reference` in torch and `launch` in Triton, chosen by its first tensor."""

    def __init__(self, launch: Callable[P, R], reference: Callable[P, R], check: Callable[..., None]) -> None:
        """Keep the three parts; `launch` gives the op its name and its documentation."""
        self.launch = launch
        self.reference = reference
        self.check = check
        self.name = launch.__name__
        update_wrapper(self, launch)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Check the arguments, then run the body that belongs to the first argument's device."""
        self.check(*args, **kwargs)
        first = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(first, Tensor):
            raise TypeError(f"the first argument of {self.name} must be a tensor, got {type(first).__name__}")
        body = _forced.get()
        if body is None:
            body = "launch" if first.is_cuda or settings().interpret else "reference"
        if body == "reference":
            return self.reference(*args, **kwargs)
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            # Triton launches on the current device, wherever the tensors are.
            with torch.cuda.device(first.device):
                return self.launch(*args, **kwargs)
        return self.launch(*args, **kwargs)


def op(*, reference: Callable[P, R], check: Callable[..., None]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make an op of a launcher and register it in `OPS` under the launcher's name."""

    def wrap(launch: Callable[P, R]) -> Op[P, R]:
        if launch.__name__ in OPS:
            raise ValueError(f"an op named {launch.__name__!r} exists already")
        OPS[launch.__name__] = made = Op(launch, reference, check)
        return made

    return wrap


@contextmanager
def implementation(body: Literal["reference", "launch"]) -> Iterator[None]:
    """Run every op inside the block with one body, wherever the tensors are: how a numerical bug is bisected."""
    token = _forced.set(body)
    try:
        yield
    finally:
        _forced.reset(token)


def is_ptx_target(tensor: Tensor) -> bool:
    """Say whether kernels on this tensor may contain NVIDIA assembly: not on AMD, not under the interpreter."""
    return not settings().interpret and torch.version.hip is None


def is_recorded(tensor: Tensor) -> bool:
    """Say whether what is launched on a tensor's device now is recorded into a graph, and does not run."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def default_device() -> torch.device:
    """Return the device that is used when nobody names one: the current CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_amd_target(tensor: Tensor) -> bool:
    """Say whether kernels on this tensor are compiled for AMD."""
    return not settings().interpret and torch.version.hip is not None


@cache
def num_sms(device: torch.device) -> int:
    """Return the number of multiprocessors of a CUDA device; 8 for a CPU, so that interpreted grids stay small."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def arch(device: torch.device) -> str:
    """Return the name under which a tile table is kept: 'sm_90' for CUDA, 'gfx942' for ROCm, 'cpu' for a CPU."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
