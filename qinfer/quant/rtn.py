"""Round a matrix to b-bit codes with one scale and one zero point per group of input features and output.

    W[k, n] ≈ (code[k, n] - zero[g, n]) * scale[g, n],   g = k // group_size

Each group takes the step, out of `RATIOS`, that gives the least squared error. Ratio 1 is the step at which no value of
the group is clipped; below it the few largest values are clipped and all others are rounded more finely. The step is
rounded to fp16, as it will be stored, before the codes are chosen, so the search judges exactly the matrix that is read
back. The zero point does not depend on the ratio, because clipping shrinks both ends of the range alike.

All of it is computed in fp32; the memory in use is a few times that of the matrix in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qinfer.quant.weight import check_matrix

RATIOS = tuple(1.0 - 0.3 * i / 19 for i in range(20))  # 1.0 to 0.7
SMALLEST_SCALE = 2.0**-24  # smallest positive fp16: a group of zeros gets it instead of 0, so that nothing divides by 0


def round_to_nearest(
    w: Tensor, *, bits: int, group_size: int, symmetric: bool, lowest_zero: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a matrix group by group.

    Args:
        w: [K, N] floating point, input features in the order in which they are grouped.
        bits: 2 to 8.
        group_size: input features per group; the last group may be shorter; -1 puts all of K into one group.
        symmetric: every zero point is 2^(bits-1), and the range reaches as far down as up.
        lowest_zero: smallest zero point to use when not symmetric; formats that store zero - 1 cannot store 0.

    Returns:
        codes [K, N] uint8; scales [ceil(K/group_size), N] fp16; zeros [ceil(K/group_size), N] uint8.

    Raises:
        ValueError: an argument is out of range, `w` is not a matrix of finite numbers, or a scale exceeds fp16.
        TypeError: `w` is not floating point.
    """
    check_matrix(w)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if group_size < 1 and group_size != -1:
        raise ValueError(f"group_size must be positive or -1, got {group_size}")
    in_features, out_features = w.shape
    rows = max(in_features, 1)
    rows = rows if group_size == -1 else min(group_size, rows)
    num_groups = -(-in_features // rows)
    # Zeros are exact in every group, so padding the last group with them changes neither its range nor its error.
    padded = torch.zeros(num_groups * rows, out_features, dtype=torch.float32, device=w.device)
    padded[:in_features] = w
    groups = padded.view(num_groups, rows, out_features)
    step, zeros = _widest(groups, bits, symmetric=symmetric, lowest_zero=lowest_zero)
    if step.numel() and float(step.max()) > torch.finfo(torch.float16).max:
        raise ValueError(f"w must be small enough for fp16 scales, got a scale of {float(step.max()):g}")

    best_scale = torch.empty_like(step)
    best_error = torch.full_like(step, float("inf"))
    for ratio in RATIOS:
        scale = (step * ratio).half().float().clamp_min(SMALLEST_SCALE)
        error = ((_codes(groups, scale, zeros, bits) - zeros) * scale - groups).square().sum(dim=1, keepdim=True)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    codes = _codes(groups, best_scale, zeros, bits).to(torch.uint8)
    return (
        codes.view(num_groups * rows, out_features)[:in_features].contiguous(),
        best_scale[:, 0].half(),
        zeros[:, 0].to(torch.uint8),
    )


def _widest(groups: Tensor, bits: int, *, symmetric: bool, lowest_zero: int) -> tuple[Tensor, Tensor]:
    """Return the step at which no value of groups [g, rows, N] is clipped, and the zero point, both [g, 1, N] fp32."""
    last = (1 << bits) - 1
    if not groups.shape[0]:
        nothing = groups.new_zeros(0, 1, groups.shape[2])
        return nothing, nothing
    low, high = groups.aminmax(dim=1, keepdim=True)
    if symmetric:
        middle = 1 << (bits - 1)
        # Codes reach `middle` steps down and one fewer up.
        return torch.maximum(-low / middle, high / (middle - 1)), torch.full_like(low, middle)
    high = high.clamp_min(0)
    # The range always holds zero, and `lowest_zero` steps below it.
    low = torch.minimum(low.clamp_max(0), -high * (lowest_zero / (last - lowest_zero)))
    step = (high - low) / last
    return step, (-low / step.clamp_min(SMALLEST_SCALE)).round().clamp(lowest_zero, last)


def _codes(groups: Tensor, scale: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return ((groups / scale).round() + zeros).clamp(0, (1 << bits) - 1)
