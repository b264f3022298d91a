"""Matrices of experts in a layout that one kernel reads: `ExpertOperand`.

Matrices that are stored alike lie in one buffer per tensor, [E, ...], one expert after the other, so a kernel finds the
matrix of expert e at e times a distance that follows from the layout. Experts may be stored differently (another mix of
widths); then several ExpertOperands share them out, and `slots` says where each expert is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qinfer.kernels.matmul import segments_of
from qinfer.kernels.operand import DenseOperand, Operand, PlaneOperand, SegmentedOperand


@dataclass(frozen=True)
class ExpertOperand:
    """Matrices of one layout in common buffers; `stack` makes it."""

    matrices: tuple[Operand, ...]  # views of the buffers; those of one operand follow each other; no order of their own
    slots: Tensor | None = None  # [E] int32: which matrix is that of an expert, -1: none of these; None: matrix e is

    @property
    def first(self) -> Operand:
        """The first matrix, which has the layout of all and lies where the buffers begin."""
        return self.matrices[0]

    @property
    def num_segments(self) -> int:
        """Matrices that lie on top of each other in that of an expert."""
        return len(self.first.segments) if isinstance(self.first, SegmentedOperand) else 1

    @property
    def num_experts(self) -> int:
        """E, those included whose matrix is elsewhere."""
        return len(self.matrices) if self.slots is None else self.slots.shape[0]


def layout(operand: Operand) -> tuple[object, ...]:
    """Return what must be equal for matrices to share buffers: kind, shapes, dtypes and widths, but not the order."""
    if isinstance(operand, DenseOperand):
        return DenseOperand, operand.weight.shape, operand.weight.dtype
    return type(operand), *(
        (
            part.bits,
            part.group_size,
            part.in_features,
            part.out_features,
            part.scales.dtype,
            None if part.offsets is None else part.offsets.dtype,
        )
        for part in segments_of(operand)
    )


def stack(operands: Sequence[Operand], slots: Sequence[int] | None = None) -> ExpertOperand:
    """Copy matrices of one layout into common buffers; their orders are left out.

    Args:
        operands: the matrices.
        slots: which of them is that of each expert, -1: none; None: the experts are these.

    Raises:
        ValueError: the layouts differ, or a matrix has an odd number of scales, which kernels could not read.
    """
    if len({layout(operand) for operand in operands}) != 1:
        raise ValueError(f"operands must be matrices of one layout, got {len({layout(o) for o in operands})} layouts")
    first = operands[0]
    matrices: tuple[Operand, ...]
    if isinstance(first, DenseOperand):
        weights = torch.stack([operand.weight for operand in operands if isinstance(operand, DenseOperand)])
        matrices, device = tuple(DenseOperand(weight) for weight in weights), weights.device
    else:
        parts = [segments_of(operand) for operand in operands if not isinstance(operand, DenseOperand)]
        stacked = [_stack_planes(same) for same in zip(*parts, strict=True)]
        is_plain, device = isinstance(first, PlaneOperand), stacked[0][0].scales.device
        matrices = tuple(stacked[0]) if is_plain else tuple(map(SegmentedOperand, zip(*stacked, strict=True)))
    table = None if slots is None else torch.tensor(slots, dtype=torch.int32, device=device)
    return ExpertOperand(matrices, table)


def _stack_planes(operands: Sequence[PlaneOperand]) -> list[PlaneOperand]:
    """Return the same matrices as views of common buffers."""
    if len(operands) > 1 and operands[0].scales.numel() % 2:
        shape = list(operands[0].scales.shape)
        raise ValueError(f"scales of experts must be an even number, for kernels read them in pairs, got {shape}")
    planes = [torch.stack(same) for same in zip(*(operand.planes for operand in operands), strict=True)]
    scales = torch.stack([operand.scales for operand in operands])
    given = [operand.offsets for operand in operands if operand.offsets is not None]
    offsets = torch.stack(given) if given else None
    return [
        replace(
            operand,
            order=None,
            planes=tuple(plane[number] for plane in planes),
            scales=scales[number],
            offsets=None if offsets is None else offsets[number],
        )
        for number, operand in enumerate(operands)
    ]
