"""The quantized matrices behind the handles of both extension modules.

The tensors that an extension takes become a stored weight (`qinfer.quant`), which validates them, and then an operand:
once, when the handle is made. The tensors themselves are read and not kept; nothing is shuffled in place.

    y = x W + bias,   W [K, N], fp16 in and out, fp32 accumulation
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from qinfer.errors import CheckpointError
from qinfer.kernels.dequant import dequantize
from qinfer.kernels.gather import gather_columns
from qinfer.kernels.matmul import matmul
from qinfer.kernels.operand import DenseOperand, Operand, SegmentedOperand
from qinfer.kernels.tiles import FUSED_ROWS
from qinfer.quant.exl2 import COLUMNS_STEP, EXL2Weight
from qinfer.quant.gptq import GPTQWeight
from qinfer.quant.weight import Weight

NAME = "matrix"


@dataclass(frozen=True)
class Arguments:
    """The tensors of one call, as far as weight formats look at a checkpoint."""

    call: str
    stored: dict[str, Tensor]
    quant_config: dict[str, Any]

    def __contains__(self, name: str) -> bool:
        """Say whether the call passed this tensor."""
        return name in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.stored[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor."""
        return self.stored[name].dtype

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self.stored[name]

    def error(self, name: str | None, problem: str) -> CheckpointError:
        """Make the error that says which argument is wrong."""
        return CheckpointError(self.call, name and name.removeprefix(f"{NAME}."), problem)


@dataclass(frozen=True)
class QMatrix:
    """A quantized matrix on one device."""

    operand: Operand
    bias: Tensor | None  # [N]
    device: torch.device

    @classmethod
    def of(cls, weight: Weight, device: torch.device) -> QMatrix:
        """Convert a stored weight for fp16 activations on a device."""
        bias = None if weight.bias is None else weight.bias.to(device)
        return cls(weight.operand(device, torch.float16), bias, device)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.operand.in_features, self.operand.out_features

    def check_device(self, **tensors: Tensor) -> None:
        """Raise ValueError unless tensors live where the matrix does."""
        for name, tensor in tensors.items():
            if tensor.device != self.device:
                raise ValueError(f"{name} must be on {self.device} like the matrix, got {tensor.device}")

    def dense(self) -> Tensor:
        """Dequantize to [N, K] fp16, input features in stored order."""
        operand = self.operand
        if isinstance(operand, DenseOperand):
            return operand.weight
        weight = torch.empty(operand.out_features, operand.in_features, dtype=torch.float16, device=self.device)
        first = 0
        for segment in operand.segments if isinstance(operand, SegmentedOperand) else (operand,):
            columns = weight[:, first : first + segment.in_features]
            dequantize(segment.planes[0], segment, dtype=torch.float16, out=columns)
            first += segment.in_features
        return weight

    def reconstruct(self, out: Tensor) -> None:
        """Dequantize into out [K, N] fp16, input features in their original order."""
        stored, order = self.dense().t(), self.operand.order
        if order is None:
            out.copy_(stored)
        else:
            out.index_copy_(0, order.long(), stored)

    def multiply(self, x: Tensor, out: Tensor, *, route: Literal["auto", "packed", "dense"]) -> None:
        """Write x [M, K] times the matrix, plus its bias, to out [M, N].

        Args:
            x: fp16, features in their original order.
            out: fp16, or fp32 to keep all that was added up.
            route: "packed" reads the packed weights, however many rows there are; "dense" dequantizes the matrix and
                multiplies by that; "auto" leaves the choice to `qinfer.kernels.matmul`.
        """
        order = self.operand.order
        x = x if order is None else gather_columns(x, order)
        if route == "dense":
            matmul(x, DenseOperand(self.dense()), bias=self.bias, out=out)
            return
        step = FUSED_ROWS if route == "packed" else max(1, x.shape[0])
        for start in range(0, x.shape[0], step):
            matmul(x[start : start + step], self.operand, bias=self.bias, out=out[start : start + step])


def gptq_weight(call: str, group_size: int, **tensors: Tensor | None) -> GPTQWeight:
    """Make a 4-bit GPTQ weight, zero points stored minus one.

    Args:
        call: the extension function, for errors.
        group_size: features per group; it only counts where there is no g_idx.
        tensors: qweight [K/8, N], qzeros [G, N/8], scales [G, N], and g_idx [K], bias [N] or None.

    Raises:
        CheckpointError: a tensor has a wrong shape or dtype, or holds impossible values.
        UnsupportedError: qinfer does not serve this group size.
    """
    stored = {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items() if tensor is not None}
    config = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "checkpoint_format": "gptq"}
    return GPTQWeight.read(Arguments(call, stored, config), NAME)


def exl2_weight(call: str, **tensors: Tensor | None) -> EXL2Weight:
    """Make an EXL2 weight of the tensors as a checkpoint stores them, or of a slice of their columns.

    A slice may have any multiple of 8 columns; columns that nothing reads fill it up to what the format stores.

    Args:
        call: the extension function, for errors.
        tensors: q_weight, q_scale, q_scale_max, q_groups, q_invperm, and bias or None.

    Raises:
        CheckpointError: a tensor has a wrong shape or dtype, or holds impossible values.
    """
    stored = {f"{NAME}.{suffix}": tensor for suffix, tensor in tensors.items() if tensor is not None}
    columns = stored[f"{NAME}.q_weight"].shape[1]
    missing = -columns % COLUMNS_STEP
    for suffix, width in (("q_weight", missing), ("q_scale", missing // 8), ("bias", missing)):
        if missing and f"{NAME}.{suffix}" in stored:
            stored[f"{NAME}.{suffix}"] = pad(stored[f"{NAME}.{suffix}"], (0, width))
    return EXL2Weight.read(Arguments(call, stored, {"quant_method": "exl2"}), NAME).without_padding(columns)
