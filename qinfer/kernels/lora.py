"""What low-rank adapters add to a product, for rows that belong to different adapters or to none.

    y[m, n] += sum_r h[m, r] b[s, n, r],    h[m, r] = sum_k x[m, k] a[s, p, r, k],    s = slots[m]

    x [M, K], slots [M] int32, y [M, N]; a row of slot -1 is left as it is
    a [L, P, R, K] and b [L, N, R]: the adapters of L slots, ranks filled up to R with zeros

A merged product (q, k and v; gate and up) has P members side by side in N, each with an `a` of its own; `widths` are
their columns, and p is the member that n belongs to. Whatever scales an adapter is in its `b`.

Two launches. The first makes h in parts over K, [S, M, P R] fp32, the second adds the parts up in their order. A
program has a block of rows and visits the slots that occur in it, one after the other, lowest first; rows of other
slots multiply as zeros, so what is added to a row does not depend on its company. Rows without an adapter read and
write nothing. Slots are read on the device, and all shapes are those of the buffers: the launches can be recorded in a
graph. Sums are fp32; h is rounded to the dtype of b in front of the second product, so it must not exceed 65504 in
fp16, and y is rounded once, when it is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_float, check_index, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs

RANK_STEP, MAX_BLOCK_R = 16, 32  # what tensor cores multiply at a time, and what a program does
FEW_ROWS, MANY_ROWS = 16, 64  # rows of a program
PART_K, MAX_PARTS = {FEW_ROWS: 1024, MANY_ROWS: 2048}, 16  # features of K that a program sums up


def add_lora_reference(x: Tensor, a: Tensor, b: Tensor, slots: Tensor, y: Tensor, *, widths: Sequence[int]) -> None:
    """Compute `add_lora` in plain torch, one slot after the other."""
    for slot in slots.unique().tolist():
        if slot < 0:
            continue
        rows = (slots == slot).nonzero().flatten()
        parts = zip(a[slot].float(), b[slot].float().split(list(widths)), strict=True)
        inner = x[rows].float()
        y[rows] = (y[rows].float() + torch.cat([inner @ down.t() @ up.t() for down, up in parts], dim=1)).to(y.dtype)


@triton.jit
def _next(b_slots, slot, num_slots):
    """Return the lowest slot above `slot` that occurs in a block of rows; num_slots if there is none."""
    return tl.min(tl.where(b_slots > slot, b_slots, num_slots), axis=0)


@triton.jit(do_not_specialize=["M", "num_slots"])
def _shrink_kernel(
    p_x, p_a, p_slots, p_h, M, K, stride_x, num_slots,
    NUM_PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    i_r, i_part, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = tl.num_programs(0) * BLOCK_R  # P R
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = (i_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    num_steps = tl.cdiv(K, BLOCK_K)
    first, last = i_part * num_steps // NUM_PARTS, (i_part + 1) * num_steps // NUM_PARTS
    p_xs = p_x + o_m.to(tl.int64)[:, None] * stride_x + o_k[None, :]
    wait_for_inputs(OVERLAP)
    b_slots = tl.load(p_slots + o_m, mask=o_m < M, other=-1)
    b_h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    slot = _next(b_slots, -1, num_slots)
    while slot < num_slots:
        p_as = p_a + (slot.to(tl.int64) * width + o_r)[None, :] * K + o_k[:, None]
        m_m = b_slots == slot
        for i_step in range(first, last):
            m_k = i_step * BLOCK_K + o_k < K
            b_x = tl.load(p_xs + i_step * BLOCK_K, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_a = tl.load(p_as + i_step * BLOCK_K, mask=m_k[:, None], other=0.0)
            b_h = tl.dot(b_x, b_a, b_h, input_precision="ieee")
        slot = _next(b_slots, slot, num_slots)
    let_next_start(OVERLAP)
    p_out = p_h + (i_part * tl.cast(M, tl.int64) + o_m)[:, None] * width + o_r[None, :]
    tl.store(p_out, b_h, mask=(b_slots >= 0)[:, None])


@triton.jit(do_not_specialize=["M", "num_slots"])
def _expand_kernel(
    p_h, p_b, p_slots, p_y, M, N, stride_y, num_slots,
    WIDTHS: tl.constexpr, R: tl.constexpr, NUM_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    i_n, i_p, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, width = 0, 0
    for p in tl.static_range(len(WIDTHS)):
        start += tl.where(i_p > p, WIDTHS[p], 0)
        width += tl.where(i_p == p, WIDTHS[p], 0)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < width
    o_n = (start + o_n).to(tl.int64)
    wait_for_inputs(OVERLAP)
    b_slots = tl.load(p_slots + o_m, mask=o_m < M, other=-1)
    m_m = (b_slots >= 0)[:, None]
    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_r in tl.static_range(R // BLOCK_R):
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        p_parts = p_h + o_m.to(tl.int64)[:, None] * (len(WIDTHS) * R) + (i_p * R + o_r)[None, :]
        b_h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for i_part in tl.static_range(NUM_PARTS):
            b_h += tl.load(p_parts + i_part * tl.cast(M, tl.int64) * (len(WIDTHS) * R), mask=m_m, other=0.0)
        slot = _next(b_slots, -1, num_slots)
        while slot < num_slots:
            p_bs = p_b + (slot.to(tl.int64) * N + o_n)[None, :] * R + o_r[:, None]
            b_b = tl.load(p_bs, mask=m_n[None, :], other=0.0)
            b_mine = tl.where((b_slots == slot)[:, None], b_h, 0.0).to(p_b.dtype.element_ty)
            b_y = tl.dot(b_mine, b_b, b_y, input_precision="ieee")
            slot = _next(b_slots, slot, num_slots)
    let_next_start(OVERLAP)
    m_y = m_m & m_n[None, :]
    p_out = p_y + o_m.to(tl.int64)[:, None] * stride_y + o_n[None, :]
    b_y += tl.load(p_out, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_y)


def _check_add_lora(x: Tensor, a: Tensor, b: Tensor, slots: Tensor, y: Tensor, *, widths: Sequence[int]) -> None:
    num_slots, rank = a.shape[0], b.shape[-1]
    for name, tensor in (("x", x), ("y", y)):
        check_float(name, tensor.dtype)
        check_rows(name, tensor)
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} like x, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    check_shape("x", x, ("M", "K"))
    check_shape("a", a, ("L", len(widths), rank, x.shape[1]))
    check_shape("b", b, (num_slots, sum(widths), rank))
    check_shape("y", y, (x.shape[0], sum(widths)))
    if rank == 0 or rank != padded_rank(rank):
        raise ValueError(f"the rank of a and b must be {padded_rank(rank)}, got {rank}")
    check_device(x, a=a, b=b, slots=slots, y=y)
    check_index("slots", slots, x.shape[0], start=-1, stop=num_slots)


def padded_rank(rank: int) -> int:
    """Return the rank that the kernels need for one of this size: 16, or a multiple of 32."""
    step = RANK_STEP if rank <= RANK_STEP else MAX_BLOCK_R
    return max(1, -(-rank // step)) * step


@op(reference=add_lora_reference, check=_check_add_lora)
def add_lora(x: Tensor, a: Tensor, b: Tensor, slots: Tensor, y: Tensor, *, widths: Sequence[int]) -> None:
    """Add to every row of a product what the row's adapter adds, in place.

    y[m, n] += sum_r b[slots[m], n, r] sum_k a[slots[m], p, r, k] x[m, k],  p the member that n belongs to

    Args:
        x: [M, K] fp16, bf16 or fp32, last stride 1, features in the order in which `a` has them.
        a: [L, P, R, K] in x's dtype, contiguous; R is a `padded_rank`.
        b: [L, N, R] in x's dtype, contiguous.
        slots: [M] int32 (or int64) in [0, L), or -1 for a row that is left as it is.
        y: [M, N] fp16, bf16 or fp32, last stride 1; changed in place.
        widths: columns of each of the P members; they add up to N.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) a slot is out of range.
    """
    (num_rows, in_features), rank = x.shape, b.shape[2]
    if num_rows == 0 or a.shape[0] == 0 or in_features == 0:
        return
    block_m, block_r = FEW_ROWS if num_rows <= MANY_ROWS else MANY_ROWS, min(rank, MAX_BLOCK_R)
    block_k, block_n, warps = (128, 64, 4) if block_m == FEW_ROWS else (64, 128, 8)
    num_parts = min(triton.cdiv(in_features, PART_K[block_m]), MAX_PARTS)
    num_blocks = triton.cdiv(num_rows, block_m)
    h = torch.empty(num_parts, num_rows, len(widths) * rank, dtype=torch.float32, device=x.device)
    sizes = {"NUM_PARTS": num_parts, "BLOCK_M": block_m, "BLOCK_R": block_r, **overlap(x)}
    _shrink_kernel[(h.shape[2] // block_r, num_parts, num_blocks)](
        x, a, slots, h, num_rows, in_features, x.stride(0), a.shape[0], BLOCK_K=block_k, num_warps=4, **sizes
    )
    _expand_kernel[(triton.cdiv(max(widths), block_n), len(widths), num_blocks)](
        h, b, slots, y, num_rows, sum(widths), y.stride(0), a.shape[0],
        WIDTHS=tuple(widths), R=rank, BLOCK_N=block_n, num_warps=warps, **sizes,
    )  # fmt: skip
