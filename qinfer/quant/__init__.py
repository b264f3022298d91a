"""Stored weight formats: `FORMATS` names them, `weight_class` picks one per module, `join` unites their operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels.operand import DenseOperand, Operand, PlaneOperand
from qinfer.quant.dense import DenseWeight
from qinfer.quant.gptq import GPTQWeight, options_of
from qinfer.quant.weight import Source, Weight

__all__ = ["FORMATS", "DenseWeight", "GPTQWeight", "Source", "Weight", "join", "weight_class"]

FORMATS: dict[str, type[Weight]] = {"dense": DenseWeight, "gptq": GPTQWeight}
MARKS = {"gptq": "qweight"}  # quant_method -> the tensor that every matrix of this format has


def weight_class(quant_config: dict[str, Any] | None, name: str, source: Source) -> type[Weight]:
    """Say in which format a module is stored.

    A quantized checkpoint may leave some modules dense, so the tensors that are there decide.

    Args:
        quant_config: `quantization_config` of the model; None when it has none.
        name: the module, without a trailing dot.
        source: the checkpoint.

    Raises:
        UnsupportedError: the quantization method is not one of MARKS.
        CheckpointError: the module has neither quantized nor dense tensors.
    """
    if quant_config is None:
        return DenseWeight
    method = quant_config.get("quant_method")
    if not isinstance(method, str) or method not in MARKS:
        known = ", ".join(sorted(MARKS))
        raise UnsupportedError(f"quantization method {method!r} is not supported; what works: {known}, or none at all")
    mark, is_dense = f"{name}.{MARKS[method]}", f"{name}.weight" in source
    if is_dense and (mark not in source or options_of(source, name) is None):
        return DenseWeight
    if mark in source:
        return FORMATS[method]
    raise source.error(mark, "the tensor is missing, and there is no dense weight either")


def join(operands: Sequence[Operand]) -> Operand | None:
    """Put matrices with the same input side by side along N, so that one product serves them all.

    A symmetric matrix beside one with zero points gets offsets of zero.

    Returns:
        One operand with the sum of the out_features; None where layouts differ: kind, dtype, bits, group size or input
        order.

    Raises:
        ValueError: there is nothing to join.
    """
    if not operands:
        raise ValueError("operands must hold at least one, got none")
    if len(operands) == 1:
        return operands[0]
    dense = [operand for operand in operands if isinstance(operand, DenseOperand)]
    planes = [operand for operand in operands if isinstance(operand, PlaneOperand)]
    if len(dense) == len(operands):
        return _join_dense(dense)
    return _join_planes(planes) if len(planes) == len(operands) else None


def _join_dense(operands: Sequence[DenseOperand]) -> DenseOperand | None:
    kinds = {(operand.weight.dtype, operand.weight.device, operand.in_features) for operand in operands}
    return DenseOperand(torch.cat([operand.weight for operand in operands])) if len(kinds) == 1 else None


def _join_planes(operands: Sequence[PlaneOperand]) -> PlaneOperand | None:
    first = operands[0]
    kinds = {(o.bits, o.group_size, o.in_features, o.scales.dtype, o.scales.device) for o in operands}
    if len(kinds) > 1 or not all(_is_same_order(first.order, operand.order) for operand in operands):
        return None
    offsets = None
    if any(operand.offsets is not None for operand in operands):
        offsets = torch.cat(
            [torch.zeros_like(o.scales, dtype=torch.int8) if o.offsets is None else o.offsets for o in operands], dim=1
        )
    return PlaneOperand(
        planes=tuple(torch.cat(parts, dim=1) for parts in zip(*(o.planes for o in operands), strict=True)),
        scales=torch.cat([operand.scales for operand in operands], dim=1),
        offsets=offsets,
        bits=first.bits,
        group_size=first.group_size,
        in_features=first.in_features,
        order=first.order,
    )


def _is_same_order(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
