"""Reading a matrix product that is still in parts over K (`matmul_parts`): the reader adds them in their order.

x[t, j] = sum_s parts[s, t, j],   parts [S, T, N], every part with dense rows; a plain [T, N] is its own only part
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def as_parts(x: Tensor) -> Tensor:
    """Return [S, T, N] for a product in parts or a plain [T, N]."""
    return x if x.ndim == 3 else x[None]


def add_up(x: Tensor) -> Tensor:
    """Return the [T, N] sum in fp32, added in the order of the kernels."""
    total, *others = as_parts(x).float().unbind()
    for part in others:
        total = total + part
    return total


@triton.jit
def load_sum(p_x, part_stride, mask, NUM_PARTS: tl.constexpr, IS_MOVED: tl.constexpr = False):
    """Load and add the parts of some elements in fp32; p_x points to those of the first part.

    IS_MOVED says that the sum will move between threads, as the operand of a product does. Then Triton shall see a
    loop, across which it does not move; of parts that stand in a row, it would move every one by itself.
    """
    b_sum = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    if IS_MOVED:
        for i_part in tl.range(1, NUM_PARTS, num_stages=1, loop_unroll_factor=NUM_PARTS):
            b_sum += tl.load(p_x + i_part * tl.cast(part_stride, tl.int64), mask=mask, other=0.0).to(tl.float32)
    else:
        for i_part in tl.static_range(1, NUM_PARTS):
            b_sum += tl.load(p_x + i_part * tl.cast(part_stride, tl.int64), mask=mask, other=0.0).to(tl.float32)
    return b_sum
