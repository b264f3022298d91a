"""What the layers behind handles of `exllamav2_ext` are made of: norms, projections with adapters, the residual.

    norm        y = x * rsqrt(mean(x²) + eps) * weight,  or  (x - mean(x)) * rsqrt(var(x) + eps) * weight + bias
    projection  y = x W + b + Σ (x A) B,  over the adapters that a call names
    residual    x += y,  x += norm(y),  or, without a residual, x = y and x = norm(y)

Products of a layer's last matrix stay in fp32 until they reach x; so does the sum of a product and its adapters. Other
products are rounded to fp16, as the activations that quantized matrices read are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from qinfer.compat.binding import check_tensor, optional
from qinfer.compat.ext_matrix import find_matrix
from qinfer.compat.matrices import QMatrix
from qinfer.kernels.rmsnorm import rmsnorm

MAX_HALF = 65504.0
NOTHING: tuple[None, None] = (None, None)


@dataclass(frozen=True)
class Norm:
    """A normalization of rows."""

    weight: Tensor  # [C] fp32
    bias: Tensor | None  # [C] fp32
    is_rms: bool
    eps: float

    @classmethod
    def of(
        cls, name: str, tensors: tuple[Tensor | None, Tensor | None], matrix: QMatrix, *, is_rms: bool, eps: float
    ) -> Norm | None:
        """Copy the weight and bias [C] fp16 of a norm; None where no weight is given.

        Args:
            name: what the caller calls the weight.
            tensors: the weight and the bias, or nothing.
            matrix: a matrix that reads C features, where the norm is to live.
            is_rms: an RMS norm rather than a layer norm.
            eps: added to the mean square, or to the variance.
        """
        weight, bias = (optional(tensor) for tensor in tensors)
        if weight is None:
            if bias is not None:
                raise ValueError(f"{name}_bias must come with {name}, got it alone")
            return None
        if bias is not None and is_rms:
            raise ValueError(f"{name}_bias must be nothing for an RMS norm, got {list(bias.shape)}")
        for suffix, tensor in (("", weight), ("_bias", bias)):
            if tensor is not None:
                check_tensor(f"{name}{suffix}", tensor, torch.float16, (matrix.shape[0],))
                matrix.check_device(**{f"{name}{suffix}": tensor})
        return cls(weight.float(), None if bias is None else bias.float(), is_rms, eps)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalize x [M, C]; fp16 rows that overflowed count as the largest finite number, for an RMS norm."""
        if self.is_rms:
            x = x.clamp(-MAX_HALF, MAX_HALF) if x.dtype == torch.float16 else x
            return rmsnorm(x, self.weight, eps=self.eps, out_dtype=dtype)
        return layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(dtype)


@dataclass
class Projection:
    """A quantized matrix and the adapters that calls may add to it."""

    name: str
    matrix: QMatrix
    adapters: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # id -> A [K, r], B [r, N], both fp32

    @classmethod
    def of(cls, name: str, handle: int) -> Projection:
        """Make one of the matrix of a handle; name is what the caller calls it."""
        return cls(name, find_matrix(handle))

    def check(self, in_features: int, out_features: int, device: torch.device) -> None:
        """Raise ValueError unless the matrix is [in_features, out_features] and on a device."""
        if self.matrix.shape != (in_features, out_features):
            expected = [in_features, out_features]
            raise ValueError(f"{self.name} must be a matrix {expected}, got {list(self.matrix.shape)}")
        if self.matrix.device != device:
            raise ValueError(f"{self.name} must be on {device} like the other matrices, got {self.matrix.device}")

    def checked_adapters(self, a: Mapping[int, Tensor], b: Mapping[int, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return copies of adapters, once A [K, r] and B [r, N] fp16 fit."""
        if a.keys() != b.keys():
            raise ValueError(f"{self.name} must have A and B of the same adapters, got {sorted(a)} and {sorted(b)}")
        in_features, out_features = self.matrix.shape
        for adapter, matrix in a.items():
            first, second = f"A of {self.name} in adapter {adapter}", f"B of {self.name} in adapter {adapter}"
            check_tensor(first, matrix, torch.float16, (in_features, "rank"))
            check_tensor(second, b[adapter], torch.float16, (matrix.shape[1], out_features))
            self.matrix.check_device(**{first: matrix, second: b[adapter]})
        return {adapter: (a[adapter].float(), b[adapter].float()) for adapter in a}

    def multiply(self, x: Tensor, out: Tensor, loras: Sequence[int]) -> None:
        """Write the product of x [M, K] fp16 to out [M, N] fp16 or fp32; adapters without this matrix are skipped."""
        active = [self.adapters[lora] for lora in loras if lora in self.adapters]
        if not active:
            self.matrix.multiply(x, out, route="auto")
            return
        y = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        self.matrix.multiply(x, y, route="auto")
        rows = x.float()
        for a, b in active:
            y += rows @ a @ b
        out.copy_(y)


def set_adapters(projections: Sequence[Projection | None], tensors: Sequence[Mapping[int, Tensor]]) -> int:
    """Replace the adapters of projections by the pairs of A and B in `tensors`; return the largest rank, or 0.

    Nothing is replaced unless everything fits.
    """
    checked = []
    for projection, a, b in zip(projections, tensors[::2], tensors[1::2], strict=True):
        if projection is not None:
            checked.append((projection, projection.checked_adapters(a, b)))
        elif a or b:
            raise ValueError(
                f"adapters must be for matrices that the layer has, got {sorted({*a, *b})} for another one"
            )
    for projection, adapters in checked:
        projection.adapters = adapters
    return max((a.shape[1] for _, adapters in checked for a, _ in adapters.values()), default=0)


def check_lora_temp(
    temp: Tensor | None, rows: int, projections: Sequence[Projection | None], ids: Sequence[int]
) -> None:
    """Raise unless scratch for adapters, where it is given, holds rows times the rank of those that a call names."""
    pairs = [p.adapters[lora] for p in projections if p is not None for lora in ids if lora in p.adapters]
    needed = rows * max((a.shape[1] for a, _ in pairs), default=0)
    temp = optional(temp)
    if temp is not None and needed and (temp.dtype != torch.float16 or temp.numel() < needed):
        raise ValueError(f"the adapters' scratch must hold {needed} fp16 numbers, got {temp.numel()} of {temp.dtype}")


def check_scratch(**scratch: Tensor | None) -> None:
    """Raise TypeError unless scratch that is given is fp16; nothing is ever kept in it."""
    for name, tensor in scratch.items():
        if (given := optional(tensor)) is not None and given.dtype != torch.float16:
            raise TypeError(f"{name} must be float16, got {given.dtype}")


@dataclass(frozen=True)
class Residual:
    """How a layer reads the rows of the residual stream, and what it does to them."""

    hidden_size: int
    max_rows: int
    device: torch.device
    norm: Norm | None
    post_norm: Norm | None = None
    has_residual: bool = True
    dtype: torch.dtype = torch.float16

    @classmethod
    def of(
        cls,
        reader: QMatrix,
        layernorm: tuple[Tensor | None, Tensor | None],
        post_layernorm: tuple[Tensor | None, Tensor | None] = NOTHING,
        *,
        is_rms: bool,
        eps: float,
        max_rows: int,
        has_residual: bool = True,
        is_fp32: bool = False,
    ) -> Residual:
        """Make one of the arguments of a layer.

        Args:
            reader: a matrix that reads the stream.
            layernorm: weight and bias of the norm before it, [C] fp16 or nothing.
            post_layernorm: those of the norm behind the layer.
            is_rms: the norms are RMS norms rather than layer norms.
            eps: of the norms.
            max_rows: most rows that x may have.
            has_residual: the layer adds to x rather than writing it.
            is_fp32: x is fp32 rather than fp16.
        """
        norm, post_norm = (
            Norm.of(name, tensors, reader, is_rms=is_rms, eps=eps)
            for name, tensors in (("layernorm", layernorm), ("post_layernorm", post_layernorm))
        )
        dtype = torch.float32 if is_fp32 else torch.float16
        return cls(reader.shape[0], max_rows, reader.device, norm, post_norm, has_residual, dtype)

    def rows(self, x: Tensor) -> Tensor:
        """Return x [..., C] as [M, C], once it fits."""
        check_tensor("x", x, self.dtype, (*("..." for _ in range(max(x.dim(), 2) - 1)), self.hidden_size))
        if not x.is_contiguous():
            raise ValueError(f"x must be contiguous, got strides {x.stride()}")
        if x.device != self.device:
            raise ValueError(f"x must be on {self.device} like the matrices, got {x.device}")
        rows = x.view(-1, self.hidden_size)
        if rows.shape[0] > self.max_rows:
            raise ValueError(f"x must have at most max_rows = {self.max_rows} rows, got {rows.shape[0]}")
        return rows

    def normalized(self, rows: Tensor) -> Tensor:
        """Return rows [M, C] normalized, in fp16."""
        return rows.half() if self.norm is None else self.norm(rows, torch.float16)

    def add(self, rows: Tensor, y: Tensor) -> None:
        """Add what a layer made, y [M, C] fp32, to the rows, or replace them by it."""
        y = y if self.post_norm is None else self.post_norm(y, torch.float32)
        if self.has_residual:
            rows += y
        else:
            rows.copy_(y)

    def add_product(self, rows: Tensor, projection: Projection, x: Tensor, loras: Sequence[int]) -> None:
        """Add the product of x [M, K] fp16 to the rows, or replace them by it."""
        y = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        projection.multiply(x, y, loras)
        self.add(rows, y)
