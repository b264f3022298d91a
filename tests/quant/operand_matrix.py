"""What the layout of an operand means, spelled out: the yardstick of every format's `operand()`."""

from __future__ import annotations

import torch
from torch import Tensor

from qinfer.kernels.operand import DenseOperand, Operand, PlaneOperand, SegmentedOperand
from qinfer.kernels.packing import unpack_planes


def operand_matrix(operand: Operand) -> Tensor:
    """W [K, N] in fp32, input features in their original order; products with the scale are exact or rounded once."""
    if isinstance(operand, DenseOperand):
        return operand.weight.float().t()
    if isinstance(operand, PlaneOperand):
        return _unordered(_stored_matrix(operand), operand.order)
    assert isinstance(operand, SegmentedOperand)
    assert len({segment.out_features for segment in operand.segments}) == 1
    assert all(segment.order is None for segment in operand.segments)
    assert all(segment.in_features % 32 == 0 for segment in operand.segments[:-1])
    return _unordered(torch.cat([_stored_matrix(segment) for segment in operand.segments]), operand.order)


def _stored_matrix(operand: PlaneOperand) -> Tensor:
    assert operand.group_size == 16 or operand.group_size % 32 == 0
    assert operand.scales.shape == (-(-operand.in_features // operand.group_size), operand.out_features)
    assert operand.scales.is_contiguous()
    codes = unpack_planes(operand.planes, bits=operand.bits, in_features=operand.in_features)
    group = torch.arange(operand.in_features, device=codes.device) // operand.group_size
    zero = torch.full_like(operand.scales, 1 << (operand.bits - 1), dtype=torch.float32)
    if operand.offsets is not None:
        assert operand.offsets.dtype in (torch.int8, torch.int16)
        assert operand.offsets.shape == operand.scales.shape
        zero = zero + operand.offsets
    return (codes.float() - zero[group]) * operand.scales.float()[group]


def _unordered(stored: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return stored
    assert order.dtype == torch.int32
    assert torch.equal(order.sort().values, torch.arange(stored.shape[0], dtype=torch.int32, device=order.device))
    original = torch.empty_like(stored)
    original[order.long()] = stored
    return original
