"""A checkpoint in memory, as far as weight formats look at one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qinfer.errors import CheckpointError
from qinfer.quant import Weight


@dataclass(frozen=True)
class MemorySource:
    """Tensors by full name, and the quantization_config beside them."""

    stored: dict[str, Tensor]
    quant_config: dict[str, Any] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.stored[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.stored[name].dtype

    def read(self, name: str) -> Tensor:
        return self.stored[name]

    def error(self, name: str | None, problem: str) -> CheckpointError:
        return CheckpointError("memory.safetensors", name, problem)


def stored_as(weight: Weight, name: str) -> MemorySource:
    """Put one weight into a checkpoint under a module's name."""
    return MemorySource({f"{name}.{suffix}": t for suffix, t in weight.tensors().items()}, weight.quant_config)
