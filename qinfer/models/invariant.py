"""Invariance: a text's logits depend on that text alone, to the last bit, whoever else is in the batch.

Every layer computes rows one by one but two: matrix products, which choose their tiles by the number of rows, and
attention, which chooses its tiles and runs by the shape of the step. Both have a fixed choice for this, and so has the
sum over ranks, whose order and dtype depend on its size otherwise. With pages that hold plain numbers, a prompt in
chunks gives the bits of a prompt in one piece, and a decoded token those of the same token in a prompt. Coded pages
give the same bits in any batch; in chunks they may differ by a rounding, for a block of queries scales its sums by the
largest value scale that any of them sees.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast

import torch

from qinfer.env import settings
from qinfer.errors import UnsupportedError
from qinfer.models.config import ModelConfig

T = TypeVar("T")


def make_invariant(layer: T) -> T:
    """Return a layer, and everything in it, with fixed choices.

    Args:
        layer: a decoder or a part of one, a frozen dataclass.
    """
    return cast("T", _rebuilt(layer))


def _rebuilt(value: Any) -> Any:  # noqa: ANN401 - whatever a layer has as a field
    """Rebuild layers from the inside; leave everything else as it is."""
    if type(value) is tuple:
        return tuple(_rebuilt(part) for part in value)
    # Layers live here; what they hold of other packages, operands and ranks, has no layers in it.
    if not type(value).__module__.startswith("qinfer.models.") or not dataclasses.is_dataclass(value):
        return value
    old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    new = {name: _rebuilt(part) for name, part in old.items()}
    if "invariant" in old:
        new["invariant"] = True
    changed = {name: part for name, part in new.items() if part is not old[name]}
    rebuild: Any = type(value)
    return rebuild(**{**old, **changed}) if changed else value


def check_invariant(device: torch.device, config: ModelConfig) -> None:
    """Refuse a device whose products are not the kernels', and experts, whose tiles depend on the step.

    Raises:
        UnsupportedError: torch multiplies there, or the model is a mixture of experts.
    """
    if config.experts is not None:
        raise UnsupportedError("invariant=True works for models without experts")
    if device.type == "cpu" and not settings().interpret:
        raise UnsupportedError(
            "invariant=True needs the kernels: on a CPU torch multiplies, and its bits depend on the number of rows; "
            "a GPU works, and so does TRITON_INTERPRET=1"
        )
