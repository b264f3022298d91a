"""Weights of tokens as integers: w = round(2^44 · 2^-t) with t = (max x - x) · log2(e) / temperature, int64.

Integer sums do not depend on the order in which a device adds, so a row draws the same token alone and in any batch.
Every step up to the weight is an addition or a product of fp64 rounded by itself (kernels are compiled without fused
multiply-adds), so kernel and reference agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE = 1 << 44  # the weight of the likeliest token

# 2^-(y + 1/2) for y in [-1/2, 1/2], highest power first: interpolated at Chebyshev nodes, relative error 4e-16.
_POWERS = (
    5.0010734852529635e-09, -7.218634138133848e-08, 9.344729070300923e-07, -1.0785257379802239e-05,
    0.00010891940829564976, -0.0009428249441895355, 0.006801044314316548, -0.03924733162034599,
    0.16986579209153765, -0.4901290717342769, 0.7071067811865476,
)  # fmt: skip

P0, P1, P2, P3, P4, P5, P6, P7, P8, P9, P10 = (tl.constexpr(power) for power in _POWERS)
PER_HALVING = tl.constexpr(44.0)  # buckets for a factor of two; 45 factors of two are all that have a weight


def token_weights(below: Tensor, rate: Tensor) -> Tensor:
    """Return round(2^44 · 2^-(below · rate)).

    Args:
        below: [R, V] fp64, how far each logit is below the largest of its row; at least 0.
        rate: [R, 1] fp64, log2(e) / temperature.

    Returns:
        [R, V] int64 in 0..2^44; what NaN gives has no meaning.
    """
    t = (below * rate).clamp(max=64.0)
    whole = t.floor()
    y = t - whole - 0.5
    value = torch.full_like(y, _POWERS[0])
    for power in _POWERS[1:]:
        value.mul_(y).add_(power)
    scale = ((1067 - whole.long()) << 52).view(torch.float64)
    return value.mul_(scale).add_(0.5).floor_().long()


def keep_top_k(weights: Tensor, top_k: Tensor) -> Tensor:
    """Keep the first top_k weights of each row that are not zero.

    Args:
        weights: [R, V] int64, likeliest first.
        top_k: [R, 1]; 0 keeps all.

    Returns:
        [R, V] int64, the others zero.
    """
    return torch.where(((weights > 0).cumsum(-1) <= top_k) | (top_k == 0), weights, 0)


def keep_top_p(weights: Tensor, top_p: Tensor) -> Tensor:
    """Keep the shortest prefix of each row whose share of the row's sum reaches top_p.

    Args:
        weights: [R, V] int64, likeliest first.
        top_p: [R, 1] fp64; 1 keeps all.

    Returns:
        [R, V] int64, the others zero.
    """
    reached = weights.cumsum(-1)
    needed = (top_p * reached[:, -1:].double()).ceil().long()
    return torch.where((reached - weights < needed) | (top_p >= 1), weights, 0)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the first index whose cumulative weight exceeds floor(uniform · sum).

    Args:
        weights: [R, V] int64, in any order; each row has a positive sum.
        uniform: [R, 1] fp64, at most 1 - 2^-53.

    Returns:
        [R] int64; an index of zero weight is never drawn.
    """
    reached = weights.cumsum(-1)
    # A uniform of at most 1 - 2^-53 keeps the product below the sum, rounded as it is.
    target = (uniform * reached[:, -1:].double()).long()
    return torch.searchsorted(reached, target, right=True).squeeze(-1)


@triton.jit
def weights_below(b_x, b_peak, b_rate):
    """Return `token_weights` of logits below a peak, by the same operations in the same order, and their buckets."""
    b_t = tl.minimum((b_peak - b_x).to(tl.float64) * b_rate, 64.0)
    b_whole = tl.floor(b_t)
    b_y = b_t - b_whole - 0.5
    b_value = b_y * P0 + P1
    b_value = b_value * b_y + P2
    b_value = b_value * b_y + P3
    b_value = b_value * b_y + P4
    b_value = b_value * b_y + P5
    b_value = b_value * b_y + P6
    b_value = b_value * b_y + P7
    b_value = b_value * b_y + P8
    b_value = b_value * b_y + P9
    b_value = b_value * b_y + P10
    b_scale = ((1067 - b_whole.to(tl.int64)) << 52).to(tl.float64, bitcast=True)
    b_bucket = (tl.minimum(b_t, 46.0) * PER_HALVING).to(tl.int32)
    return tl.floor(b_value * b_scale + 0.5).to(tl.int64), b_bucket
