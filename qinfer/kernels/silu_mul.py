"""The gated activation of an MLP, on the merged output of its gate and up projections, in parts over K or whole.

    y[t, f] = silu(gate_up[t, f]) * gate_up[t, F + f],    silu(g) = g / (1 + exp(-g))
    out[t, j] = y[t, order[j]]

Rows of gate_up are read densely and may be strided; the output is contiguous. Everything is computed in fp32 and
rounded once, so a product above 65504 is infinite in fp16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_float, check_index, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.gather import gather_columns
from qinfer.kernels.overlap import let_next_start, overlap, starts_early, wait_for_inputs
from qinfer.kernels.parts import add_up, as_parts, load_sum

BLOCK = 1024
GATHERED_PARTS = 2  # in an order every part of an element is a load of its own, so that more are added up first


def silu_mul_reference(gate_up: Tensor, *, order: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Compute `silu_mul` in plain torch."""
    gate, up = add_up(gate_up).chunk(2, dim=-1)
    y = torch.nn.functional.silu(gate) * up
    return (y if order is None else y.index_select(1, order)).to(out_dtype or gate_up.dtype)


@triton.jit(do_not_specialize=["stride_part"])
def _silu_mul_kernel(
    p_x, p_order, p_out, stride_x, stride_part,
    F: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if not EARLY:
        let_next_start(OVERLAP)
    i_t = tl.program_id(0).to(tl.int64)
    o_j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_j = o_j < F
    o_f = o_j
    if p_order is not None:
        o_f = tl.load(p_order + o_j, mask=m_j, other=0)
    wait_for_inputs(OVERLAP)
    let_next_start(OVERLAP)
    p_gate = p_x + i_t * stride_x + o_f
    b_gate = load_sum(p_gate, stride_part, m_j, NUM_PARTS)
    b_up = load_sum(p_gate + F, stride_part, m_j, NUM_PARTS)
    b_y = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(p_out + i_t * F + o_j, b_y.to(p_out.dtype.element_ty), mask=m_j)


def _check_silu_mul(gate_up: Tensor, *, order: Tensor | None = None, out_dtype: torch.dtype | None = None) -> None:
    check_float("gate_up", gate_up.dtype)
    check_float("out_dtype", out_dtype or gate_up.dtype)
    check_shape("gate_up", gate_up, (*(("S",) if gate_up.ndim == 3 else ()), "T", "2F"))
    check_rows("gate_up", gate_up)
    width = gate_up.shape[-1]
    if width % 2:
        raise ValueError(f"gate_up must have an even number of columns, got {width}")
    check_device(gate_up, order=order)
    if order is not None:
        check_index("order", order, width // 2, stop=width // 2)


@op(reference=silu_mul_reference, check=_check_silu_mul)
def silu_mul(gate_up: Tensor, *, order: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Multiply silu of the gate half with the up half.

    y = silu(gate_up[:, :F]) * gate_up[:, F:],  out[:, j] = y[:, order[j]]

    Args:
        gate_up: [T, 2F] fp16, bf16 or fp32, last stride 1, or [S, T, 2F], parts that are added in fp32 in their order.
        order: [F] int32 (or int64) in [0, F), the input order of the next projection; None: 0, 1, 2 …
        out_dtype: dtype of the result; None keeps that of gate_up.

    Returns:
        [T, F], contiguous.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) an index is out of range.
    """
    parts = as_parts(gate_up)
    num_parts, num_tokens, width = parts.shape[0], parts.shape[1], parts.shape[2] // 2
    if order is not None and num_parts > GATHERED_PARTS:
        return gather_columns.launch(silu_mul.launch(gate_up, out_dtype=out_dtype), order)
    out = torch.empty((num_tokens, width), dtype=out_dtype or gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        grid = (num_tokens, triton.cdiv(width, block))
        _silu_mul_kernel[grid](
            gate_up, order, out, parts.stride(1), parts.stride(0),
            F=width, NUM_PARTS=num_parts, BLOCK=block, EARLY=starts_early(num_parts, num_tokens), **overlap(gate_up),
        )  # fmt: skip
    return out
