"""Random operands for kernel tests."""

from __future__ import annotations

import torch

from qinfer.kernels.operand import TILE_K, PlaneOperand
from qinfer.kernels.packing import pack_planes


def plane_operand(
    k: int,
    n: int,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    device: torch.device | str = "cpu",
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> PlaneOperand:
    """A 4-bit operand of random codes, scales around 1/50 and offsets of every legal value."""
    generator = torch.Generator().manual_seed(seed)
    if group_size == -1:
        group_size = -(-k // TILE_K) * TILE_K
    groups = -(-k // group_size)
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(groups, n, generator=generator) * 0.02 + 0.01).to(scale_dtype)
    offsets = None if symmetric else torch.randint(-8, 9, (groups, n), dtype=torch.int8, generator=generator)
    return PlaneOperand(
        planes=(pack_planes.reference(codes, bits=4).to(device),),
        scales=scales.to(device),
        offsets=None if offsets is None else offsets.to(device),
        bits=4,
        group_size=group_size,
        in_features=k,
    )
