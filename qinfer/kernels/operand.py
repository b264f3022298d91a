"""The layouts in which kernels read a weight matrix: many stored formats become one of these few.

`DenseOperand` keeps a matrix as torch keeps it, [N, K] row-major. `PlaneOperand` keeps integer codes in bit planes,
tile-major along K, so that every plane of a tile is a K slice of its own and unpacking needs no shuffle:

    4 bits: planes[0] is int16 [K/128, N, 32]; bits 4j..4j+3 of element (t, n, c) hold the code of stored input
            feature 128 t + 32 j + c of output n.

`W[k, n] = (code[k, n] - 2^(bits-1) - offset[g, n]) * scale[g, n]` with g = k // group_size, k counted in stored order.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

TILE_K = 128  # input features per tile of a PlaneOperand; stored K is padded to a multiple of it


@dataclass(frozen=True)
class DenseOperand:
    """A floating-point matrix."""

    weight: Tensor  # [N, K] fp16, bf16 or fp32, last stride 1

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def order(self) -> Tensor | None:
        """A dense matrix multiplies its input as it comes."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes that a matrix product reads."""
        return self.weight.nbytes


@dataclass(frozen=True)
class PlaneOperand:
    """An integer matrix in bit planes with one scale, and possibly one offset, per group and output."""

    planes: tuple[Tensor, ...]  # 4 bits: (int16 [K_padded/128, N, 32],)
    scales: Tensor  # [ceil(K/group_size), N] fp16 or bf16
    offsets: Tensor | None  # [ceil(K/group_size), N] int8, zero point minus 2^(bits-1); None: symmetric
    bits: int
    group_size: int  # 32, 64 or a multiple of 128; K rounded up to a multiple of 128 stands for one group
    in_features: int  # K, without padding
    order: Tensor | None = None  # [K] int32: stored feature j multiplies x[:, order[j]]; None: j multiplies x[:, j]

    @property
    def out_features(self) -> int:
        """N."""
        return self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that a matrix product reads."""
        tensors = (*self.planes, self.scales, *(() if self.offsets is None else (self.offsets,)))
        return sum(tensor.nbytes for tensor in tensors)


Operand = DenseOperand | PlaneOperand
