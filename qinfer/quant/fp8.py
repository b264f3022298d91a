"""FP8 with a scale per block, as DeepSeek and Qwen publish it: read exactly, held dense.

    W[k, n] = weight[n, k] * weight_scale_inv[n // bn, k // bk],   weight_block_size = [bn, bk]

    weight, bias      float8_e4m3fn [N, K], [N]; the bias is optional
    weight_scale_inv  fp32 or bf16 [ceil(N/bn), ceil(K/bk)]   a factor, in spite of its name; the last blocks may be cut

`operand` gives a dense matrix in the dtype of the activations, which takes two bytes per weight on a GPU. Activations
are not rounded to FP8, so results are closer to the unquantized model than those of FP8 products. Source: transformers'
finegrained_fp8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from qinfer.errors import UnsupportedError
from qinfer.kernels.operand import DenseOperand
from qinfer.quant.weight import Dim, Source, check_cut, check_matrix, take, take_bias

E4M3 = torch.float8_e4m3fn
LARGEST_CODE, LARGEST_VALUE = torch.finfo(E4M3).max, torch.finfo(torch.float16).max
SERVED = "what works: dynamic activations and a weight_block_size such as [128, 128]"


@dataclass(frozen=True)
class FP8Weight:
    """A matrix in 8-bit floating point with a scale per block."""

    weight: Tensor  # [N, K] float8_e4m3fn
    weight_scale_inv: Tensor  # [ceil(N/bn), ceil(K/bk)] fp32 or bf16
    bias: Tensor | None  # [N]
    block: tuple[int, int]  # bn, bk

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        out_features, in_features = self.weight.shape
        return in_features, out_features

    @property
    def quant_config(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint that holds this weight."""
        block = list(self.block)
        return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}

    @classmethod
    def read(cls, source: Source, name: str) -> Self:
        """Take `name.weight`, `.weight_scale_inv` and, if it is there, `.bias`.

        Raises:
            CheckpointError: a tensor is missing, has a wrong shape or dtype, or holds NaN or infinite values.
            UnsupportedError: the scheme is not one with blocks and dynamic activations.
        """
        block = _read_block(source)
        weight = take(source, f"{name}.weight", (None, None), (E4M3,))
        # e4m3fn has no infinities, and one NaN of each sign: all bits but that of the sign.
        if not weight.is_meta and bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise source.error(f"{name}.weight", "the tensor holds NaN or infinite values")
        shape = [-(-size // step) for size, step in zip(weight.shape, block, strict=True)]
        scale = take(source, f"{name}.weight_scale_inv", shape, (torch.float32, torch.bfloat16), finite=True)
        return cls(weight, scale, take_bias(source, name, weight.shape[0]), block)

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix."""
        stored = {"weight": self.weight, "weight_scale_inv": self.weight_scale_inv}
        return stored | ({} if self.bias is None else {"bias": self.bias})

    @classmethod
    def quantize(cls, w: Tensor, *, block: tuple[int, int] = (128, 128), bias: Tensor | None = None) -> Self:
        """Scale every block so that its largest value is the largest code, and round.

        Args:
            w: [K, N] floating point.
            block: outputs and inputs per scale.
            bias: [N], kept as it is.

        Raises:
            ValueError: `w` is not a matrix of finite numbers that fp16 holds, or `block` is not positive.
            TypeError: `w` is not floating point.
        """
        check_matrix(w)
        if min(block) < 1:
            raise ValueError(f"block must be two positive sizes, got {block}")
        if w.numel() and float(w.abs().max()) > LARGEST_VALUE:
            raise ValueError(f"w must stay within {LARGEST_VALUE:g}, got {float(w.abs().max()):g}")
        (rows, columns), (height, width) = w.t().shape, block
        down, across = -(-rows // height), -(-columns // width)
        padded = torch.zeros(down * height, across * width, dtype=torch.float32, device=w.device)
        padded[:rows, :columns] = w.t()
        largest = padded.view(down, height, across, width).abs().amax(dim=(1, 3)) if padded.numel() else w.new_zeros(0)
        scale = torch.where(largest > 0, largest / LARGEST_CODE, 1.0).float().view(down, across)
        codes = (w.t().float() / _spread(scale, block, (rows, columns))).clamp(-LARGEST_CODE, LARGEST_CODE)
        return cls(codes.to(E4M3).contiguous(), scale, bias, block)

    def dequantize(self) -> Tensor:
        """Return W [K, N] in fp32."""
        return self._dense().t()

    def cuts(self, dim: Dim) -> Sequence[int]:
        """Return where blocks end."""
        in_features, out_features = self.shape
        length, step = (in_features, self.block[1]) if dim == "in" else (out_features, self.block[0])
        return (*range(0, length, step), length)

    def slice(self, dim: Dim, start: int, stop: int) -> Self:
        """Return the part between two cuts."""
        check_cut(self.cuts(dim), dim, start, stop)
        step = self.block[1] if dim == "in" else self.block[0]
        blocks = slice(start // step, -(-stop // step) if stop > start else start // step)
        if dim == "in":
            return replace(
                self,
                weight=self.weight[:, start:stop].contiguous(),
                weight_scale_inv=self.weight_scale_inv[:, blocks].contiguous(),
            )
        return replace(
            self,
            weight=self.weight[start:stop],
            weight_scale_inv=self.weight_scale_inv[blocks],
            bias=None if self.bias is None else self.bias[start:stop],
        )

    def operand(self, device: torch.device, dtype: torch.dtype) -> DenseOperand:
        """Return the matrix itself on a device, in the dtype of the activations: held dense."""
        moved = replace(self, weight=self.weight.to(device), weight_scale_inv=self.weight_scale_inv.to(device))
        return DenseOperand(moved._dense().to(dtype))

    def _dense(self) -> Tensor:
        """Return W transposed, [N, K] in fp32."""
        out_features, in_features = self.weight.shape
        return self.weight.float() * _spread(self.weight_scale_inv.float(), self.block, (out_features, in_features))


def _spread(scale: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Repeat the scale of each block over the block, [N, K]."""
    rows, columns = (torch.arange(size, device=scale.device) // step for size, step in zip(shape, block, strict=True))
    return scale[rows[:, None], columns[None, :]]


def _read_block(source: Source) -> tuple[int, int]:
    """Return the size of a block from `quantization_config`."""
    config = source.quant_config or {}
    activations, layout = config.get("activation_scheme", "dynamic"), config.get("fmt", "e4m3")
    if activations != "dynamic" or layout != "e4m3":
        raise UnsupportedError(
            f"FP8 with activation_scheme {activations!r} and fmt {layout!r} cannot be read; {SERVED}"
        )
    block = config.get("weight_block_size")
    if block is None:
        raise UnsupportedError(f"FP8 without weight_block_size cannot be read; {SERVED}")
    is_sizes = isinstance(block, list) and all(isinstance(size, int) and size > 0 for size in block)
    if not is_sizes or len(block) != 2:
        raise source.error(None, f"quantization_config.weight_block_size must be two sizes, got {block!r}")
    return block[0], block[1]
