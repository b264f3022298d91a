"""The layouts in which kernels read a weight matrix: many stored formats become one of these few.

`DenseOperand` keeps a matrix as torch keeps it, [N, K] row-major.

`PlaneOperand` keeps integer codes in bit planes. A code of b bits is cut into fields of 8, 4, 2 or 1 bits, the highest
first:

    8 = 8    6 = 4 + 2    5 = 4 + 1    4 = 4    3 = 2 + 1    2 = 2

and the fields of one width w make a plane, int16 [ceil(K / tile), N, 32] with tile = 512 / w features:

    bits w j .. w j + w-1 of element (t, n, c) hold the field of stored feature tile t + 32 j + c of output n.

So one int16 belongs to 16 / w different slices of 32 features; unpacking it gives one element of each slice, no data
moves between threads, and the planes of one code meet element by element. Padding is the code 2^(b-1).

    W[k, n] = (code[k, n] - 2^(b-1) - offset[g, n]) * scale[g, n],   g = k // group_size,   k in stored order

`SegmentedOperand` is several of them one after the other along K, each with its own width: EXL2's rows of mixed bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MIN_STEP = 128  # features that a kernel unpacks at a time, at the least
SLICE_K = 32  # features that share a bit position of a plane
FIELDS: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def tile_k(width: int) -> int:
    """Return the features per tile of a plane: 16 / width slices of 32."""
    return 16 // width * SLICE_K


def step_k(bits: int) -> int:
    """Return the features that a kernel unpacks at a time: whole tiles of all planes of a code."""
    return max(MIN_STEP, *(tile_k(width) for width in FIELDS[bits]))


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

    planes: tuple[Tensor, ...]  # one per field of FIELDS[bits]: int16 [ceil(K / tile_k(width)), N, 32]
    scales: Tensor  # [ceil(K / group_size), N] fp16 or bf16
    offsets: Tensor | None  # [ceil(K / group_size), N] int8 or int16, zero point minus 2^(bits-1); None: symmetric
    bits: int
    group_size: int  # 16 or a multiple of 32; the last group may be shorter
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


@dataclass(frozen=True)
class SegmentedOperand:
    """Integer matrices of different widths on top of each other."""

    segments: tuple[PlaneOperand, ...]  # equal N, no order of their own; every K but the last a multiple of 32
    order: Tensor | None = None  # [K] int32 over all segments, as in PlaneOperand

    @property
    def in_features(self) -> int:
        """K of all segments together."""
        return sum(segment.in_features for segment in self.segments)

    @property
    def out_features(self) -> int:
        """N."""
        return self.segments[0].out_features

    @property
    def nbytes(self) -> int:
        """Bytes that a matrix product reads."""
        return sum(segment.nbytes for segment in self.segments)


Operand = DenseOperand | PlaneOperand | SegmentedOperand
