"""How random matrices are stored: every width that operands have, and the mixtures that ExLlamaV2 writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil

import torch

from qinfer.kernels.operand import FIELDS, SLICE_K, Operand, PlaneOperand, SegmentedOperand, tile_k
from qinfer.quant.exl2 import kept_widths

Make = Callable[[int, int, torch.device], Operand]


@dataclass(frozen=True)
class Recipe:
    """How random matrices are stored."""

    make: Make | None  # of K, N and the device; None: dense, in the dtype of the activations
    bits: float  # per weight as kernels read it, scales and offsets included
    dtype: torch.dtype = torch.float16  # of the activations on a GPU


def random_planes(
    k: int,
    n: int,
    device: torch.device,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    fan_in: int | None = None,
) -> PlaneOperand:
    """Make an integer matrix [K, N] of random codes whose product with unit activations has unit size.

    `fan_in` is the K of the whole product where this is one segment of it.
    """
    planes = tuple(
        torch.randint(-(2**15), 2**15, (ceil(k / tile_k(width)), n, SLICE_K), dtype=torch.int16, device=device)
        for width in FIELDS[bits]
    )
    groups = ceil(k / group_size)
    # Uniform codes of b bits have a standard deviation of 2^b / sqrt(12).
    scales = (torch.rand(groups, n, device=device) * 0.5 + 0.75) * (12 / (fan_in or k)) ** 0.5 / 2**bits
    offsets = None if symmetric else torch.randint(-2, 3, (groups, n), dtype=torch.int8, device=device)
    return PlaneOperand(planes, scales.half(), offsets, bits=bits, group_size=group_size, in_features=k)


def random_segments(
    k: int, n: int, device: torch.device, *, shares: dict[int, float], group_size: int
) -> SegmentedOperand:
    """Make an EXL2-like matrix: bits -> share of the rows, in whole groups; the largest share takes what is left."""
    rows = {bits: round(k * share / group_size) * group_size for bits, share in shares.items()}
    most = max(shares, key=lambda bits: shares[bits])
    rows[most] += k - sum(rows.values())
    counts = Counter[int]()
    for bits, kept in kept_widths(rows).items():
        counts[kept] += rows[bits]
    make = partial(random_planes, n=n, device=device, group_size=group_size, fan_in=k)
    return SegmentedOperand(tuple(make(count, bits=bits) for bits, count in counts.items() if count > 0))


def _planes(bits: int, group_size: int = 128, *, symmetric: bool = True) -> Recipe:
    """Describe an integer matrix with fp16 scales."""
    make = partial(random_planes, bits=bits, group_size=group_size, symmetric=symmetric)
    return Recipe(make, bits + (16 if symmetric else 24) / group_size)


def _mix(shares: dict[int, float]) -> Recipe:
    """Describe an EXL2 matrix: bits in the file -> share of the rows."""
    make = partial(random_segments, shares=shares, group_size=128)
    kept = kept_widths({bits: round(1000 * share) for bits, share in shares.items()})
    return Recipe(make, sum(kept[bits] * share for bits, share in shares.items()) + 16 / 128)


PACKED: dict[str, Recipe] = {
    **{f"int{bits}-g128": _planes(bits) for bits in FIELDS},
    "int4-g32": _planes(4, 32),
    "int4-g64": _planes(4, 64),
    "int4-g128-asym": _planes(4, symmetric=False),
    # What ExLlamaV2 writes: most rows at the width next to the mean, some at its neighbours.
    "exl2-3.0": _mix({4: 0.15, 3: 0.7, 2: 0.15}),
    "exl2-4.0": _mix({5: 0.1, 4: 0.8, 3: 0.1}),
    "exl2-4.25": _mix({6: 0.05, 5: 0.25, 4: 0.6, 3: 0.1}),
    "exl2-5.0": _mix({6: 0.15, 5: 0.7, 4: 0.15}),
    "exl2-6.0": _mix({8: 0.1, 6: 0.8, 5: 0.1}),
}
WEIGHTS: dict[str, Recipe] = {
    "gptq-4bit-g128": PACKED["int4-g128"],
    **PACKED,
    "fp16": Recipe(None, 16),
    "bf16": Recipe(None, 16, torch.bfloat16),
}
