"""Matrices that are not quantized: `weight` [N, K] in fp16, bf16 or fp32, as torch.nn.Linear stores it.

W[k, n] = weight[n, k]. A dense matrix may be cut anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from qinfer.kernels.operand import DenseOperand
from qinfer.quant.weight import FLOATS, Dim, Source, check_cut, check_matrix, take, take_bias


@dataclass(frozen=True)
class DenseWeight:
    """A matrix in floating point."""

    weight: Tensor  # [N, K] fp16, bf16 or fp32
    bias: Tensor | None = None  # [N]

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        out_features, in_features = self.weight.shape
        return in_features, out_features

    @property
    def quant_config(self) -> dict[str, Any] | None:
        """None: a dense checkpoint says nothing about quantization."""
        return None

    @classmethod
    def read(cls, source: Source, name: str) -> Self:
        """Take `name.weight` and, if it is there, `name.bias`.

        Raises:
            CheckpointError: a tensor is missing, has a wrong shape or dtype, or holds NaN or infinite values.
        """
        weight = take(source, f"{name}.weight", (None, None), FLOATS, finite=True)
        return cls(weight, take_bias(source, name, weight.shape[0]))

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})

    @classmethod
    def quantize(cls, w: Tensor, *, dtype: torch.dtype = torch.float16, bias: Tensor | None = None) -> Self:
        """Cast a matrix.

        Args:
            w: [K, N] floating point.
            dtype: element type to store.
            bias: [N], kept as it is.

        Raises:
            ValueError: `w` is not a matrix of finite numbers, `dtype` is not a storage type or cannot hold a value.
            TypeError: `w` is not floating point.
        """
        check_matrix(w)
        if dtype not in FLOATS:
            raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
        limit = torch.finfo(dtype).max
        if w.numel() and float(w.abs().max()) > limit:
            raise ValueError(f"w must stay within {limit:g} to be stored as {dtype}, got {float(w.abs().max()):g}")
        return cls(w.t().to(dtype).contiguous(), bias)

    def dequantize(self) -> Tensor:
        """Return W [K, N] in fp32."""
        return self.weight.t().float()

    def cuts(self, dim: Dim) -> Sequence[int]:
        """Return every position: dense matrices may be cut anywhere."""
        in_features, out_features = self.shape
        return range((in_features if dim == "in" else out_features) + 1)

    def slice(self, dim: Dim, start: int, stop: int) -> Self:
        """Return the part from start to stop, contiguous."""
        check_cut(self.cuts(dim), dim, start, stop)
        if dim == "in":
            return type(self)(self.weight[:, start:stop].contiguous(), self.bias)
        return type(self)(self.weight[start:stop].contiguous(), None if self.bias is None else self.bias[start:stop])

    def operand(self, device: torch.device, dtype: torch.dtype) -> DenseOperand:
        """Return the matrix on a device in the dtype of the activations."""
        return DenseOperand(self.weight.to(device=device, dtype=dtype))
