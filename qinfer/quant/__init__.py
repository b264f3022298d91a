"""Stored weight formats: `FORMATS` names them, `weight_class` picks one per module, `join` unites their operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels.operand import DenseOperand, Operand, PlaneOperand, SegmentedOperand
from qinfer.quant.awq import AWQWeight, is_left_dense
from qinfer.quant.compressed import CompressedWeight
from qinfer.quant.compressed_scheme import group_of
from qinfer.quant.dense import DenseWeight
from qinfer.quant.exl2 import EXL2Weight
from qinfer.quant.foreign import refuse_foreign
from qinfer.quant.fp8 import FP8Weight
from qinfer.quant.gptq import GPTQWeight
from qinfer.quant.options import options_of
from qinfer.quant.weight import Source, Weight

__all__ = [
    "FORMATS",
    "AWQWeight",
    "CompressedWeight",
    "DenseWeight",
    "EXL2Weight",
    "FP8Weight",
    "GPTQWeight",
    "Source",
    "Weight",
    "join",
    "weight_class",
    "without_padding",
]

FORMATS: dict[str, type[Weight]] = {
    "dense": DenseWeight,
    "gptq": GPTQWeight,
    "awq": AWQWeight,
    "compressed-tensors": CompressedWeight,
    "fp8": FP8Weight,
    "exl2": EXL2Weight,
}
# quant_method -> the tensor that every matrix of this format has
MARKS = {
    "gptq": "qweight",
    "awq": "qweight",
    "compressed-tensors": "weight_packed",
    "fp8": "weight_scale_inv",
    "exl2": "q_weight",
}
# quant_method -> whether the config leaves a module dense; it decides where a module is stored both ways
LEFT_DENSE: dict[str, Callable[[Source, str], bool]] = {
    "gptq": lambda source, name: options_of(source, name) is None,
    "awq": is_left_dense,
    "compressed-tensors": lambda source, name: group_of(source, name) is None,
}


def weight_class(quant_config: dict[str, Any] | None, name: str, source: Source) -> type[Weight]:
    """Say in which format a module is stored.

    A quantized checkpoint may leave some modules dense, so the tensors that are there decide.

    Args:
        quant_config: `quantization_config` of the model; None when it has none.
        name: the module, without a trailing dot.
        source: the checkpoint.

    Raises:
        UnsupportedError: the quantization method is not one of MARKS, or the tensors are those of another format.
        CheckpointError: the module has neither quantized nor dense tensors.
    """
    # Converters of EXL2 did not always write a config, or kept the one of the model they started from.
    if f"{name}.{MARKS['exl2']}" in source:
        return EXL2Weight
    is_dense = f"{name}.weight" in source
    if quant_config is None:
        refuse_foreign(source, name)
        return DenseWeight
    method = quant_config.get("quant_method")
    if not isinstance(method, str) or method not in MARKS:
        known = ", ".join(sorted(MARKS))
        raise UnsupportedError(f"quantization method {method!r} is not supported; what works: {known}, or none at all")
    mark = f"{name}.{MARKS[method]}"
    # Asked in any case, because a config may also ask for something that concerns the whole model.
    is_left = method in LEFT_DENSE and LEFT_DENSE[method](source, name)
    if mark in source:
        return DenseWeight if is_left and is_dense else FORMATS[method]
    refuse_foreign(source, name)
    if is_dense:
        return DenseWeight
    raise source.error(mark, "the tensor is missing, and there is no dense weight either")


def without_padding(weight: Weight, out_features: int) -> Weight:
    """Drop the columns that a format appends to whole words, if that is what makes a matrix wider than out_features."""
    return weight.without_padding(out_features) if isinstance(weight, EXL2Weight) else weight


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
    segmented = [operand for operand in operands if isinstance(operand, SegmentedOperand)]
    if len(segmented) == len(operands):
        return _join_segmented(segmented)
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


def _join_segmented(operands: Sequence[SegmentedOperand]) -> SegmentedOperand | None:
    first = operands[0]
    if len({len(o.segments) for o in operands}) > 1 or not all(_is_same_order(first.order, o.order) for o in operands):
        return None
    joined = [_join_planes(parts) for parts in zip(*(operand.segments for operand in operands), strict=True)]
    segments = tuple(segment for segment in joined if segment is not None)
    return SegmentedOperand(segments, first.order) if len(segments) == len(joined) else None


def _is_same_order(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
