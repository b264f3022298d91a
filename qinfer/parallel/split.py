"""integer_split: an integer in whole parts after given ratios, the arithmetic under every tensor-parallel plan.

    part[i] = floor(x · split[i] / Σ split), then one unit more for the largest remainders, ties to the lower index

in exact integers: a float counts as the binary fraction that it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isfinite, lcm

from qinfer.errors import PlanError


def integer_split(x: int, split: Sequence[float], minimum: int = 0, *, step: int = 1) -> list[int]:
    """Split an integer after ratios.

    The parts sum to x, each is a multiple of `step` and less than a step from its exact share, a ratio of zero gets
    nothing, and a larger ratio never gets less than a smaller one.

    A part below `minimum` is dropped: the smallest such ratio (the last of equals) leaves, and the others share x anew,
    until every part that is not zero reaches the minimum. ExLlamaV2's function of this name hands what it drops to the
    smallest part that is left instead, and where none is left everything to the last ratio, even one of zero. Without a
    minimum the two agree, but for exact ties that floating point decides the other way there.

    Args:
        x: What to split, a multiple of `step`, at least 0.
        split: Ratios of the parts, at least 0.
        minimum: Smallest part that is worth having.
        step: Unit of the parts.

    Returns:
        One part per ratio.

    Raises:
        ValueError: x, a ratio, the minimum or the step is out of range.
        PlanError: Nobody can take anything: every ratio is zero, or x is below the minimum.
    """
    if step < 1 or x < 0 or x % step:
        raise ValueError(f"x must be a multiple of step={step} and at least 0, got {x}")
    if minimum < 0:
        raise ValueError(f"minimum must be at least 0, got {minimum}")
    if not all(isfinite(ratio) and ratio >= 0 for ratio in split):
        raise ValueError(f"split must hold finite numbers of at least 0, got {list(split)}")
    ratios = _integers(split)
    if x == 0:
        return [0] * len(ratios)
    while any(ratios):
        parts = [step * units for units in _share(x // step, ratios)]
        # The part of a small ratio may be zero already, which is no part at all.
        small = [i for i, part in enumerate(parts) if 0 < part < minimum]
        if not small:
            return parts
        ratios[min(small, key=lambda i: (ratios[i], -i))] = 0
    reason = "every ratio is zero" if not any(split) else f"it is below the minimum part of {minimum}"
    raise PlanError(f"{x} cannot be split after {list(split)}: {reason}")


def _integers(split: Sequence[float]) -> list[int]:
    """Return integers in the same ratios."""
    fractions = [Fraction(ratio) for ratio in split]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def _share(units: int, ratios: Sequence[int]) -> list[int]:
    """Split by largest remainder."""
    total = sum(ratios)
    shares = [divmod(units * ratio, total) for ratio in ratios]
    parts = [part for part, _ in shares]
    neediest = sorted(range(len(ratios)), key=lambda i: (-shares[i][1], i))
    for i in neediest[: units - sum(parts)]:
        parts[i] += 1
    return parts
