"""Columns of an activation in the input order of the expert that each row goes to.

    out[p, j] = x[p // (P / R), order[experts[p], j]],   x [R, K], order [E, K], experts P in all, P a multiple of R

R is the number of tokens where several experts take the row of one token, or that of the pairs where every expert has a
row of its own. Values are moved, not computed with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_float, check_index, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs

BLOCK = 1024


def gather_expert_columns_reference(x: Tensor, order: Tensor, experts: Tensor) -> Tensor:
    """Compute `gather_expert_columns` in plain torch."""
    per_row = experts.numel() // max(x.shape[0], 1)
    rows = x.repeat_interleave(per_row, dim=0)
    return rows.gather(1, order[experts.flatten().long()].long())


@triton.jit
def _gather_expert_columns_kernel(
    p_x, p_order, p_experts, p_out, stride_x, K,
    PER_ROW: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_pair = tl.program_id(0).to(tl.int64)
    i_expert = tl.load(p_experts + i_pair).to(tl.int64)
    o_j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_j = o_j < K
    o_k = tl.load(p_order + i_expert * K + o_j, mask=m_j, other=0)
    b_x = tl.load(p_x + i_pair // PER_ROW * stride_x + o_k, mask=m_j, other=0.0)
    tl.store(p_out + i_pair * K + o_j, b_x, mask=m_j)


def _check_gather_expert_columns(x: Tensor, order: Tensor, experts: Tensor) -> None:
    check_float("x", x.dtype)
    check_shape("x", x, ("R", "K"))
    check_rows("x", x)
    check_shape("order", order, ("E", x.shape[1]))
    check_device(x, order=order, experts=experts)
    check_index("order", order.flatten(), order.numel(), stop=x.shape[1])
    check_index("experts", experts.flatten(), "P", stop=order.shape[0])
    for name, tensor in (("order", order), ("experts", experts)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    if experts.numel() % x.shape[0] if x.shape[0] else experts.numel():
        raise ValueError(f"experts must hold a multiple of {x.shape[0]}, one or more per row, got {experts.numel()}")


@op(reference=gather_expert_columns_reference, check=_check_gather_expert_columns)
def gather_expert_columns(x: Tensor, order: Tensor, experts: Tensor) -> Tensor:
    """Write the rows that go to experts, each in the order in which its expert stores its inputs.

    Args:
        x: [R, K] fp16, bf16 or fp32, last stride 1.
        order: [E, K] int32 (or int64) in [0, K), contiguous.
        experts: [T, k] int32 in [0, E), contiguous; their number P is a multiple of R.

    Returns:
        [P, K] in x.dtype, contiguous.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) an index is out of range.
    """
    num_pairs, width = experts.numel(), x.shape[1]
    out = torch.empty((num_pairs, width), dtype=x.dtype, device=x.device)
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        _gather_expert_columns_kernel[(num_pairs, triton.cdiv(width, block))](
            x, order, experts, out, x.stride(0), width, PER_ROW=num_pairs // x.shape[0], BLOCK=block, **overlap(x)
        )
    return out
