"""What the experts of a token give, weighted and added up.

    out[t] = sum_j weights[t, j] * (sum_s parts[s, t k + j])

Parts of a product are added first, in their order; then the experts of a token, in the order of its choice. Everything
is fp32, so the result does not depend on which other tokens there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_float, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs
from qinfer.kernels.parts import add_up, load_sum

BLOCK = 256  # columns per program: one token still spreads over several multiprocessors


def combine_reference(parts: Tensor, weights: Tensor) -> Tensor:
    """Compute `combine` in plain torch."""
    num_tokens, top_k = weights.shape
    rows = add_up(parts).view(num_tokens, top_k, parts.shape[2])
    total = torch.zeros(num_tokens, parts.shape[2], dtype=torch.float32, device=parts.device)
    for j in range(top_k):
        total += weights[:, j, None] * rows[:, j]
    return total


@triton.jit(do_not_specialize=["stride_part"])
def _combine_kernel(
    p_parts, p_weights, p_out, stride_part, stride_row, N,
    TOP_K: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_t = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        b_row = load_sum(p_parts + (i_t * TOP_K + j) * stride_row + o_n, stride_part, m_n, NUM_PARTS)
        b_total += tl.load(p_weights + i_t * TOP_K + j) * b_row
    tl.store(p_out + i_t * N + o_n, b_total, mask=m_n)


def _check_combine(parts: Tensor, weights: Tensor) -> None:
    check_float("parts", parts.dtype)
    if weights.dtype != torch.float32:
        raise TypeError(f"weights must be float32, got {weights.dtype}")
    check_shape("weights", weights, ("T", "k"))
    check_shape("parts", parts, ("S", weights.numel(), "N"))
    check_rows("parts", parts)
    if not weights.is_contiguous():
        raise ValueError(f"weights must be contiguous, got strides {list(weights.stride())}")
    check_device(parts, weights=weights)


@op(reference=combine_reference, check=_check_combine)
def combine(parts: Tensor, weights: Tensor) -> Tensor:
    """Add up what the experts of every token give.

    Args:
        parts: [S, T k, N] fp16, bf16 or fp32, last stride 1: a product in parts, row t k + j of token t's expert j.
        weights: [T, k] fp32, contiguous.

    Returns:
        [T, N] fp32.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit.
    """
    (num_tokens, top_k), (num_parts, _, width) = weights.shape, parts.shape
    out = torch.empty((num_tokens, width), dtype=torch.float32, device=parts.device)
    if out.numel():
        _combine_kernel[(num_tokens, triton.cdiv(width, BLOCK))](
            parts, weights, out, parts.stride(0), parts.stride(1), width,
            TOP_K=top_k, NUM_PARTS=num_parts, BLOCK=BLOCK, **overlap(parts),
        )  # fmt: skip
    return out
