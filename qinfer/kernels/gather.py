"""Gathers: rows of a table by token id, and columns of an activation by a weight's input order.

    gather_rows     out[t, c] = table[ids[t], c]
    gather_columns  out[t, j] = x[t, order[j]]

A kernel that has a column in registers and writes it in an order wants to know where it goes: `inverse` keeps that.

Rows are read densely and may be strided; the output is contiguous. A value is only converted, once, to the output's
dtype. Offsets are 64-bit: an embedding of 256k × 16k entries has more than 2^31. A kernel does not look whether an
index is in range; the check does, for CPU tensors.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qinfer.kernels.checks import check_device, check_float, check_index, check_rows, check_shape
from qinfer.kernels.device import is_recorded, op
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs

BLOCK = 1024  # columns per program: a decode step of one token still spreads over several multiprocessors


# The inverse of an order, as long as the order lives.
_inverses: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()


def inverse(order: Tensor) -> Tensor:
    """Return where each column goes, [K] int32, if order [K] says where each comes from.

    It is computed once, and kept.

    Raises:
        RuntimeError: it would be computed while the stream is recorded, so that it would not be there before the first
            replay, and other recordings would read what happens to stand in its place.
    """
    if order not in _inverses:
        if is_recorded(order):
            raise RuntimeError("the inverse of an order must be known before a step is recorded: run the step once")
        _inverses[order] = order.argsort().to(torch.int32)
    return _inverses[order]


def gather_rows_reference(table: Tensor, ids: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """Compute `gather_rows` in plain torch."""
    return table.index_select(0, ids).to(table.dtype if out_dtype is None else out_dtype)


def gather_columns_reference(x: Tensor, order: Tensor) -> Tensor:
    """Compute `gather_columns` in plain torch."""
    return x.index_select(1, order)


@triton.jit(do_not_specialize_on_alignment=["p_ids"])
def _gather_rows_kernel(
    p_table, p_ids, p_out, stride_table, C: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_t = tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_ids + i_t).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < C
    b_x = tl.load(p_table + i_row * stride_table + o_c, mask=m_c)
    tl.store(p_out + i_t * C + o_c, b_x.to(tl.float32).to(p_out.dtype.element_ty), mask=m_c)


@triton.jit
def _gather_columns_kernel(p_x, p_order, p_out, stride_x, K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_t = tl.program_id(0).to(tl.int64)
    o_j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_j = o_j < K
    o_k = tl.load(p_order + o_j, mask=m_j, other=0)
    tl.store(p_out + i_t * K + o_j, tl.load(p_x + i_t * stride_x + o_k, mask=m_j), mask=m_j)


def _check_gather_rows(table: Tensor, ids: Tensor, *, out_dtype: torch.dtype | None = None) -> None:
    check_float("table", table.dtype)
    check_float("out_dtype", table.dtype if out_dtype is None else out_dtype)
    check_shape("table", table, ("V", "C"))
    check_rows("table", table)
    check_device(table, ids=ids)
    check_index("ids", ids, "T", stop=table.shape[0])


def _check_gather_columns(x: Tensor, order: Tensor) -> None:
    check_float("x", x.dtype)
    check_shape("x", x, ("T", "K"))
    check_rows("x", x)
    check_device(x, order=order)
    check_index("order", order, x.shape[1], stop=x.shape[1])


@op(reference=gather_rows_reference, check=_check_gather_rows)
def gather_rows(table: Tensor, ids: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """Collect rows of a table: an embedding look-up, or the rows of a step whose logits are wanted.

    out[t] = table[ids[t]]

    Args:
        table: [V, C] fp16, bf16 or fp32, last stride 1.
        ids: [T] int32 or int64 in [0, V).
        out_dtype: dtype of the result; None keeps the table's.

    Returns:
        [T, C], contiguous.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) an id is out of range.
    """
    num_ids, width = ids.shape[0], table.shape[1]
    out = torch.empty((num_ids, width), dtype=table.dtype if out_dtype is None else out_dtype, device=table.device)
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        grid = (num_ids, triton.cdiv(width, block))
        _gather_rows_kernel[grid](table, ids, out, table.stride(0), C=width, BLOCK=block, **overlap(ids))
    return out


@op(reference=gather_columns_reference, check=_check_gather_columns)
def gather_columns(x: Tensor, order: Tensor) -> Tensor:
    """Put the features of an activation into the order in which a weight stores its inputs.

    out[:, j] = x[:, order[j]]

    Args:
        x: [T, K] fp16, bf16 or fp32, last stride 1.
        order: [K] int32 (or int64) in [0, K), usually a permutation.

    Returns:
        [T, K] in x.dtype, contiguous.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) an index is out of range.
    """
    num_tokens, width = x.shape
    out = torch.empty((num_tokens, width), dtype=x.dtype, device=x.device)
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        grid = (num_tokens, triton.cdiv(width, block))
        _gather_columns_kernel[grid](x, order, out, x.stride(0), K=width, BLOCK=block, **overlap(x))
    return out
