"""Root-mean-square normalization, alone and fused with the addition of a block's output to the residual.

    rmsnorm      y = x * rsqrt(mean(x²) + eps) * weight
    add_rmsnorm  residual += delta (in place); y as above of the new residual; delta may be a product in parts over K
    both         out[..., j] = y[..., order[j]]

Everything is computed in fp32 and rounded once, at the output. (transformers rounds to the input's dtype before it
multiplies with the weight; the two differ by at most one rounding.) The sum of squares must fit fp32, which holds for
|x| up to 1e17. One program handles one row of at most 16384 features; x may be strided in all dimensions but the last,
such as the heads inside merged q, k, v rows.

A product in parts would pass through one multiprocessor, so many programs share its row. On NVIDIA one launch is all:
each program leaves its sum of squares in memory, waits until those of its row are there, and normalizes what it has in
registers. A word holds a sum beside the number of the launch, so that none has to be cleared; the number is in memory
too, for a recorded launch has the same arguments whenever it is replayed. Who waits for others must know that they run:
programs start in the order of their numbers, as CUTLASS's serial split-K and CUB's look-back rely on, and those of a
row have numbers in a row, so all of the first row that is not done are there. Interpreters run one program after the
other, and on AMD nobody has tried it: there a second launch normalizes.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_float, check_index, check_rows, check_shape
from qinfer.kernels.device import is_ptx_target, op
from qinfer.kernels.gather import inverse
from qinfer.kernels.overlap import let_next_start, overlap, starts_early, wait_for_inputs
from qinfer.kernels.parts import add_up, as_parts, load_sum

MAX_WIDTH = 16384
PART_BLOCK = 256  # features of a program that only adds
SHARE = 128  # features of a program that normalizes a share of a row, by one warp
WIDE_SHARE = 256  # of more rows than MANY_ROWS, by four
MANY_ROWS = 32
MAX_SHARED_ROWS = 512  # rows that have words for the sums of their programs


def rmsnorm_reference(
    x: Tensor, weight: Tensor, *, eps: float, out_dtype: torch.dtype | None = None, order: Tensor | None = None
) -> Tensor:
    """Compute `rmsnorm` in plain torch."""
    b = x.float()
    y = b * torch.rsqrt(b.square().mean(-1, keepdim=True) + eps) * weight.float()
    y = y if order is None else y.index_select(-1, order)
    return y.to(x.dtype if out_dtype is None else out_dtype).contiguous()


def add_rmsnorm_reference(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    *,
    eps: float,
    out_dtype: torch.dtype | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Compute `add_rmsnorm` in plain torch."""
    residual += add_up(delta)
    return rmsnorm_reference(residual, weight, eps=eps, out_dtype=out_dtype, order=order)


@triton.jit
def _normalize(b_x, b_weight, eps, C: tl.constexpr):
    """Normalize one row, padded with zeros beyond C."""
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) / C + eps) * b_weight


@triton.jit
def _rmsnorm_kernel(
    p_x,
    p_weight,
    p_order,
    p_out,
    size_1,
    size_2,
    stride_0,
    stride_1,
    stride_2,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    i_0 = i_row // (size_1 * size_2)
    i_1 = i_row // size_2 % size_1
    i_2 = i_row % size_2
    p_row = p_x + i_0 * stride_0 + i_1 * stride_1 + i_2 * stride_2
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    b_x = tl.load(p_row + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = _normalize(b_x, b_weight, eps, C).to(p_out.dtype.element_ty)
    if p_order is not None:
        b_y = tl.gather(b_y, tl.load(p_order + o_c, mask=m_c, other=0), axis=0)
    tl.store(p_out + i_row * C + o_c, b_y, mask=m_c)


@triton.jit
def _add_rmsnorm_kernel(
    p_residual,
    p_delta,
    p_weight,
    p_order,
    p_out,
    stride_residual,
    stride_delta,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    p_residual += i_row * stride_residual
    p_delta += i_row * stride_delta
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    # Not before: between ranks this waits for a sum, and weights of the product behind it would be in the sum's way.
    let_next_start(OVERLAP)
    b_x = tl.load(p_residual + o_c, mask=m_c, other=0.0) + tl.load(p_delta + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(p_residual + o_c, b_x, mask=m_c)
    b_y = _normalize(b_x, b_weight, eps, C).to(p_out.dtype.element_ty)
    if p_order is not None:
        # From registers, not from memory: a row that is overwritten while it is gathered would be a race.
        b_y = tl.gather(b_y, tl.load(p_order + o_c, mask=m_c, other=0), axis=0)
    tl.store(p_out + i_row * C + o_c, b_y, mask=m_c)


# The distance of parts grows with the number of rows, and a kernel per divisibility of it would be compiled in serving.
@triton.jit(do_not_specialize=["stride_part"])
def _add_parts_kernel(
    p_residual, p_delta, stride_residual, stride_delta, stride_part,
    C: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < C
    wait_for_inputs(OVERLAP)
    p_x = p_residual + i_row * stride_residual + o_c
    b_x = tl.load(p_x, mask=m_c, other=0.0)
    b_x += load_sum(p_delta + i_row * stride_delta + o_c, stride_part, m_c, NUM_PARTS)
    tl.store(p_x, b_x, mask=m_c)


@triton.jit(do_not_specialize=["stride_part"])
def _shared_rmsnorm_kernel(
    p_residual, p_delta, p_weight, p_inverse, p_out,
    p_sums,  # [rows, WORDS] int64: number of the launch, and below it a sum of squares
    p_launches,  # [rows] number of the last launch
    stride_residual, stride_delta, stride_part, eps,
    C: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if not EARLY:
        let_next_start(OVERLAP)
    i_block, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    o_c = i_block * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < C
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    o_out = o_c
    if p_inverse is not None:
        o_out = tl.load(p_inverse + o_c, mask=m_c, other=0)
    wait_for_inputs(OVERLAP)
    let_next_start(OVERLAP)
    i_launch = tl.load(p_launches + i_row) + 1
    p_x = p_residual + i_row * stride_residual + o_c
    b_x = tl.load(p_x, mask=m_c, other=0.0)
    b_x += load_sum(p_delta + i_row * stride_delta + o_c, stride_part, m_c, NUM_PARTS)
    b_sum = tl.sum(b_x * b_x, axis=0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    p_sums += i_row * WORDS
    # What others wait for goes first. Both halves of a word arrive at once, so that no other order has to be kept.
    tl.atomic_xchg(p_sums + i_block, (i_launch.to(tl.int64) << 32) | b_sum, sem="relaxed")
    tl.store(p_x, b_x, mask=m_c)
    o_b = tl.arange(0, triton.next_power_of_2(BLOCKS))
    m_b = o_b < BLOCKS
    b_sums = tl.load(p_sums + o_b, mask=m_b, other=0, volatile=True)
    while tl.sum((m_b & ((b_sums >> 32).to(tl.int32) != i_launch)).to(tl.int32), axis=0) > 0:
        b_sums = tl.load(p_sums + o_b, mask=m_b, other=0, volatile=True)
    if i_block == 0:
        # Every program has read the number by now, for it is in the words that have come.
        tl.store(p_launches + i_row, i_launch)
    b_squares = tl.where(m_b, b_sums.to(tl.int32).to(tl.float32, bitcast=True), 0.0)
    b_y = b_x * tl.rsqrt(tl.sum(b_squares, axis=0) / C + eps) * b_weight
    tl.store(p_out + i_row * C + o_out, b_y.to(p_out.dtype.element_ty), mask=m_c)


def _check_rmsnorm(
    x: Tensor, weight: Tensor, *, eps: float, out_dtype: torch.dtype | None = None, order: Tensor | None = None
) -> None:
    if not 2 <= x.ndim <= 4:
        raise ValueError(f"x must be [..., C] with 1 to 3 leading dimensions, got {list(x.shape)}")
    width = x.shape[-1]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"x must have 1 to {MAX_WIDTH} features, got {width}")
    check_float("x", x.dtype)
    check_float("weight", weight.dtype)
    check_float("out_dtype", x.dtype if out_dtype is None else out_dtype)
    check_rows("x", x)
    check_shape("weight", weight, (width,))
    check_rows("weight", weight)
    check_device(x, weight=weight, order=order)
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if order is not None:
        check_index("order", order, width, stop=width)


def _check_add_rmsnorm(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    *,
    eps: float,
    out_dtype: torch.dtype | None = None,
    order: Tensor | None = None,
) -> None:
    if residual.dtype != torch.float32:
        raise TypeError(f"residual must be float32, got {residual.dtype}")
    check_shape("residual", residual, ("T", "C"))
    _check_rmsnorm(residual, weight, eps=eps, out_dtype=out_dtype, order=order)
    check_float("delta", delta.dtype)
    check_shape("delta", delta, (*(("S",) if delta.ndim == 3 else ()), *residual.shape))
    check_rows("delta", delta)
    check_device(residual, delta=delta)


def _tile(width: int) -> tuple[int, int]:
    """Choose the block and the number of warps for a row."""
    block = triton.next_power_of_2(width)
    # Four or more features per thread also mean that no feature has a copy in a second warp, which could read the
    # residual after the first one has updated it.
    return block, min(max(block // 256, 1), 16)


@cache
def _sums_of(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what the programs of a row tell each other: [rows, words] and [rows], which every launch leaves in order.

    Launches share them, so all norms of products in parts on a device must run on one stream at a time.
    """
    sums = torch.zeros(MAX_SHARED_ROWS, MAX_WIDTH // SHARE, dtype=torch.int64, device=device)
    return sums, torch.zeros(MAX_SHARED_ROWS, dtype=torch.int32, device=device)


def _by_many(residual: Tensor, parts: Tensor, weight: Tensor, eps: float, order: Tensor | None, out: Tensor) -> None:
    """Launch the kernel in which programs share rows."""
    num_rows, width = residual.shape
    block, num_warps = (SHARE, 1) if num_rows <= MANY_ROWS else (WIDE_SHARE, 4)
    sums, launches = _sums_of(residual.device)
    _shared_rmsnorm_kernel[(triton.cdiv(width, block), num_rows)](
        residual, parts, weight, None if order is None else inverse(order), out, sums, launches,
        residual.stride(0), parts.stride(1), parts.stride(0), eps,
        C=width, NUM_PARTS=parts.shape[0], BLOCK=block, WORDS=sums.shape[1],
        EARLY=starts_early(parts.shape[0], num_rows), num_warps=num_warps, **overlap(residual),
    )  # fmt: skip


@op(reference=rmsnorm_reference, check=_check_rmsnorm)
def rmsnorm(
    x: Tensor, weight: Tensor, *, eps: float, out_dtype: torch.dtype | None = None, order: Tensor | None = None
) -> Tensor:
    """Normalize every row to a root mean square of one, then scale its features.

    y = x * rsqrt(mean(x²) + eps) * weight,  out[..., j] = y[..., order[j]]

    Args:
        x: [..., C] fp16, bf16 or fp32 with 1 to 3 leading dimensions of any stride, last stride 1; C <= 16384.
        weight: [C] fp16, bf16 or fp32.
        eps: added to the mean square.
        out_dtype: dtype of the result; None keeps that of x.
        order: [C] int32 (or int64) in [0, C), the input order of the next projection; None: 0, 1, 2 …

    Returns:
        [..., C], contiguous.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) an index is out of range.
    """
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype if out_dtype is None else out_dtype, device=x.device)
    if out.numel():
        block, num_warps = _tile(width)
        missing = 4 - x.ndim
        _, size_1, size_2 = (1,) * missing + tuple(x.shape[:-1])
        strides = (0,) * missing + x.stride()[:-1]
        _rmsnorm_kernel[(out.numel() // width,)](
            x, weight, order, out, size_1, size_2, *strides, eps,
            C=width, BLOCK=block, num_warps=num_warps, **overlap(x),
        )  # fmt: skip
    return out


@op(reference=add_rmsnorm_reference, check=_check_add_rmsnorm)
def add_rmsnorm(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    *,
    eps: float,
    out_dtype: torch.dtype | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Add a block's output to the residual stream in place and normalize the sum.

    residual += delta;  y = residual * rsqrt(mean(residual²) + eps) * weight,  out[:, j] = y[:, order[j]]

    Args:
        residual: [T, C] fp32, last stride 1, rows apart; updated in place. C <= 16384.
        delta: [T, C] fp16, bf16 or fp32, last stride 1, or [S, T, C], parts that are added in fp32 in their order; not
            the residual itself.
        weight: [C] fp16, bf16 or fp32.
        eps: added to the mean square.
        out_dtype: dtype of the result; None keeps that of the residual.
        order: [C] int32 (or int64) in [0, C), the input order of the next projection; None: 0, 1, 2 …

    Returns:
        [T, C], contiguous.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) an index is out of range.
    """
    num_rows, width = residual.shape
    parts = as_parts(delta)
    is_shared = parts.shape[0] > 1 and num_rows > 0
    if is_shared and not (is_ptx_target(residual) and num_rows <= MAX_SHARED_ROWS):
        _add_parts_kernel[(num_rows, triton.cdiv(width, PART_BLOCK))](
            residual, delta, residual.stride(0), parts.stride(1), parts.stride(0),
            C=width, NUM_PARTS=parts.shape[0], BLOCK=PART_BLOCK, **overlap(delta),
        )  # fmt: skip
        return rmsnorm.launch(residual, weight, eps=eps, out_dtype=out_dtype, order=order)
    out = torch.empty(
        (num_rows, width), dtype=residual.dtype if out_dtype is None else out_dtype, device=residual.device
    )
    if is_shared:
        _by_many(residual, parts, weight, eps, order, out)
    elif num_rows:
        block, num_warps = _tile(width)
        _add_rmsnorm_kernel[(num_rows,)](
            residual, delta, weight, order, out, residual.stride(0), parts.stride(1), eps,
            C=width, BLOCK=block, num_warps=num_warps, **overlap(delta),
        )  # fmt: skip
    return out
