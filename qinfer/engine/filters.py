"""What can be done to the weights of tokens before one is drawn, each as a pure function.

Weights are int64 and proportional to probabilities (`kernels/token_weights.py`); each function takes [R, V] weights
sorted likeliest first and parameters [R, 1], one per row. A filter sets weights to zero, leaves the others as they are,
and keeps at least one token; what is left renormalises by its own sum. Sums are integer sums, so that a row comes out
the same alone and in any batch. Top-k and top-p are `keep_top_k` and `keep_top_p` of `kernels/token_weights.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qinfer.kernels.token_weights import keep_top_p

# The unit in which an entropy is summed, in bits: fine, and 19 bits, the most there can be, stay below 2^63 units.
_ENTROPY_UNIT = 2.0**-56


def keep_min_p(weights: Tensor, min_p: Tensor) -> Tensor:
    """Keep the weights of at least min_p times the largest of their row; 0 keeps all.

    Args:
        weights: [R, V] int64, in any order.
        min_p: [R, 1] fp64 in [0, 1].

    Returns:
        [R, V] int64, the others zero.
    """
    return torch.where(weights.double() >= min_p * weights.amax(-1, keepdim=True).double(), weights, 0)


def keep_top_a(weights: Tensor, top_a: Tensor) -> Tensor:
    """Keep p_i >= top_a * (max p)^2: the surer the likeliest token, the fewer others; 0 keeps all.

    Args:
        weights: [R, V] int64, in any order.
        top_a: [R, 1] fp64 in [0, 1].

    Returns:
        [R, V] int64, the others zero.
    """
    largest = weights.amax(-1, keepdim=True).double()
    least = top_a * (largest / weights.sum(-1, keepdim=True).double()) * largest
    return torch.where(weights.double() >= least, weights, 0)


def keep_tail_free(weights: Tensor, tfs: Tensor) -> Tensor:
    """Cut where the curvature of the sorted weights has mostly been seen; 1 keeps all.

    With c_i = |w_i - 2 w_(i+1) + w_(i+2)| over the n tokens that have a weight, keeps the first and as many more as
    there are sums c_0 + … + c_i of at most tfs times the sum of all. Fewer than three tokens, and equal ones, are kept.

    Args:
        weights: [R, V] int64, likeliest first.
        tfs: [R, 1] fp64 in (0, 1].

    Returns:
        [R, V] int64, the others zero.
    """
    slope = weights[:, :-1] - weights[:, 1:]
    curvature = (slope[:, :-1] - slope[:, 1:]).abs()
    count = (weights > 0).sum(-1, keepdim=True)
    position = torch.arange(weights.shape[-1], device=weights.device)
    inside = position[: curvature.shape[-1]] < count - 2
    curvature = torch.where(inside, curvature, 0)
    total = curvature.sum(-1, keepdim=True)
    seen = inside & (curvature.cumsum(-1) <= (tfs * total.double()).long())
    num_kept = 1 + seen.sum(-1, keepdim=True)
    return torch.where((position < num_kept) | (tfs >= 1) | (total == 0), weights, 0)


def surprises(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log2 p of every token, and its mean over each row, the entropy in bits.

    Args:
        weights: [R, V] int64, in any order.

    Returns:
        [R, V] fp64, inf for tokens of weight zero, and [R, 1] fp64.
    """
    total = weights.sum(-1, keepdim=True).double()
    surprise = total.log2() - weights.double().log2()
    shares = torch.where(weights > 0, weights.double() / total * surprise / _ENTROPY_UNIT, 0).round().long()
    return surprise, shares.sum(-1, keepdim=True).double() * _ENTROPY_UNIT


def keep_typical(weights: Tensor, typical: Tensor) -> Tensor:
    """Keep the fewest tokens, those of the most typical surprise first, that reach a probability; 1 keeps all.

    Typical is a small |-log p_i - H|, H the entropy of the row; ties go to the likelier token.

    Args:
        weights: [R, V] int64, likeliest first.
        typical: [R, 1] fp64 in (0, 1].

    Returns:
        [R, V] int64, the others zero.
    """
    surprise, entropy = surprises(weights)
    order = (surprise - entropy).abs().sort(dim=-1, stable=True).indices
    kept = keep_top_p(weights.gather(-1, order), typical)
    return torch.zeros_like(weights).scatter_(-1, order, kept)


def keep_surprise(weights: Tensor, most: Tensor) -> Tensor:
    """Keep tokens whose surprise is at most `most` bits, and always a likeliest one: mirostat's truncation.

    Args:
        weights: [R, V] int64, in any order.
        most: [R, 1] fp64; inf keeps all.

    Returns:
        [R, V] int64, the others zero.
    """
    surprise, _ = surprises(weights)
    return torch.where(surprise <= torch.maximum(most, surprise.amin(-1, keepdim=True)), weights, 0)


def entropy_temperature(weights: Tensor, low: Tensor, high: Tensor, exponent: Tensor) -> Tensor:
    """Return low + (high - low) * (H / log n)^exponent, H the entropy of the n tokens that have a weight.

    Args:
        weights: [R, V] int64, in any order.
        low: [R, 1] fp64, the temperature of a row with one token.
        high: [R, 1] fp64, the temperature of a row with equal weights.
        exponent: [R, 1] fp64, above 0.

    Returns:
        [R, 1] fp64.
    """
    _, entropy = surprises(weights)
    most = (weights > 0).sum(-1, keepdim=True).double().log2()
    share = torch.where(most > 0, entropy / most, 0).clamp(0, 1)
    return low + (high - low) * share**exponent


def exclude_top_choices(weights: Tensor, probability: Tensor, threshold: Tensor, protected: Tensor | None) -> Tensor:
    """Give the law of XTC: with some probability, all likely tokens but the least likely of them are excluded.

    A token is likely when p >= threshold and it is not protected. The mixture of both cases is computed: with m the
    probability of the excluded tokens, theirs is multiplied by 1 - probability, that of all others by
    1 + probability * m / (1 - m). A draw from it has the same law as the coin and the draw.

    Args:
        weights: [R, V] int64, likeliest first.
        probability: [R, 1] fp64 in [0, 1]; 0 changes nothing.
        threshold: [R, 1] fp64 in (0, 1].
        protected: [R, V] bool, tokens that are never excluded; None protects none.

    Returns:
        [R, V] int64, rounded.
    """
    total = weights.sum(-1, keepdim=True)
    likely = (weights.double() >= threshold * total.double()) & (weights > 0)
    if protected is not None:
        likely &= ~protected
    # All but the last likely one: those behind which another one comes.
    rank = likely.cumsum(-1)
    excluded = likely & (rank < rank[:, -1:])
    mass = torch.where(excluded, weights, 0).sum(-1, keepdim=True)
    raised = 1 + probability * (mass.double() / (total - mass).double())
    return (weights.double() * torch.where(excluded, 1 - probability, raised)).round().long()


def skewed(uniform: float, skew: float) -> float:
    """Return uniform^exp(-skew), below 1: nearer to 0, where the likely tokens are, for a skew below 0."""
    return min(math.pow(uniform, math.exp(-skew)), 1 - 2.0**-53)
