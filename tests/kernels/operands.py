"""Random operands for kernel tests."""

from __future__ import annotations

import torch

from qinfer.kernels.operand import PlaneOperand, SegmentedOperand
from qinfer.kernels.packing import pack_planes


def plane_operand(
    k: int,
    n: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    device: torch.device | str = "cpu",
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> PlaneOperand:
    """An operand of random codes, weights around 1/10 and offsets of every legal value."""
    generator = torch.Generator().manual_seed(seed)
    if group_size == -1:
        group_size = max(32, -(-k // 32) * 32)
    groups = -(-k // group_size)
    codes = torch.randint(0, 1 << bits, (k, n), dtype=torch.uint8, generator=generator)
    half = 1 << (bits - 1)
    scales = ((torch.rand(groups, n, generator=generator) + 0.5) * 0.16 / half).to(scale_dtype)
    offsets = (
        None
        if symmetric
        else torch.randint(-half, half + 1, (groups, n), generator=generator).to(
            torch.int8 if bits < 8 else torch.int16
        )
    )
    return PlaneOperand(
        planes=tuple(plane.to(device) for plane in pack_planes(codes, bits=bits)),
        scales=scales.to(device),
        offsets=None if offsets is None else offsets.to(device),
        bits=bits,
        group_size=group_size,
        in_features=k,
    )


def segmented_operand(
    sizes: list[tuple[int, int]], n: int, *, group_size: int = 32, device: torch.device | str = "cpu"
) -> SegmentedOperand:
    """Segments of (bits, K), symmetric, as EXL2 has them."""
    return SegmentedOperand(
        tuple(plane_operand(k, n, bits=bits, group_size=group_size, device=device, seed=bits) for bits, k in sizes)
    )
