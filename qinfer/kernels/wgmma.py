"""The product of `plane_part.py` for up to 64 rows on Hopper, in Gluon: weights are unpacked while `wgmma` runs.

    sums[n, m] = sum_k x[m, k] W[n, k],   k in one of the parts of K

Plain Triton waits for the tensor cores behind every `wgmma` whose first operand is in registers, so behind every slice
of 32 features, or, with two warps, takes `mma.sync`, which has half the rate. Here a step of 128 features is two
products of 64, and the wait stands where their sums or their registers are needed. Weights of the first stages are on
their way before the kernel before has finished; x is fetched behind that.

The rings of words, x, scales and offsets are allocations of their own, and so is each half of x and each tile of words:
Triton keeps accesses to one allocation in order by barriers, whatever part of it they touch.

Limits, checked by `tiles.wgmma_fits` and the caller: sm_90, codes of 4 or 8 bits, K and group size multiples of 128, N
and the rows' stride multiples of 16, x in 16 bits. Interpreters do not know Gluon; GPU tests hold it against the
reference.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qinfer.kernels.codes import MAX_CONSTANT_GROUP, num_steps, offset_codes, slice_codes
from qinfer.kernels.operand import PlaneOperand
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs
from qinfer.kernels.tiles import Tile

ALIGNED = 16  # elements that a row of x, W or its scales is a multiple of
# The older name is that of Triton 3.6.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _slice(b_words, b_offsets, INDEX: gl.constexpr, BITS: gl.constexpr, HAS_OFFSETS: gl.constexpr, DTYPE: gl.constexpr):
    """Unpack one slice of a step: [BLOCK_N, 32] in DTYPE."""
    if HAS_OFFSETS:
        return offset_codes(b_words, b_offsets.to(gl.float32), BITS, INDEX, DTYPE, True)
    else:
        return slice_codes(b_words, BITS, INDEX, DTYPE, True)


@gluon.jit
def _half(
    b_words, b_offsets, HALF: gl.constexpr, BITS: gl.constexpr, HAS_OFFSETS: gl.constexpr, DTYPE: gl.constexpr,
    WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Unpack two slices of a step side by side: [BLOCK_N, 64] in DTYPE. Nothing moves but the names of registers."""
    b_even = _slice(b_words, b_offsets, 2 * HALF, BITS, HAS_OFFSETS, DTYPE)
    b_odd = _slice(b_words, b_offsets, 2 * HALF + 1, BITS, HAS_OFFSETS, DTYPE)
    b_pair = gl.reshape(gl.permute(gl.join(b_even, b_odd), (0, 2, 1)), (b_even.shape[0], 64))
    return gl.convert_layout(b_pair, WEIGHTS, assert_trivial=True)


@gluon.jit
def _fetch_weights(
    s_words0, s_words1, s_scales, s_offsets, p_words, p_scales, p_offsets, m_words, m_scales, m_offsets,
    slot, step_words, i_step, last, N64, group_size,
    TILES: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSETS: gl.constexpr,
):  # fmt: skip
    """Send what a step reads besides x on its way; nothing behind the last step."""
    is_there = i_step < last
    copy_to_shared(s_words0.index(slot), p_words + step_words, mask=m_words & is_there)
    if TILES == 2:
        copy_to_shared(s_words1.index(slot), p_words + step_words + N64 * 32, mask=m_words & is_there)
    # One group per step is what most matrices have: then no product of 64 bits is left.
    group = step_words // 32 // TILES if GROUP == 128 else i_step * 128 // (group_size if GROUP == 0 else GROUP) * N64
    copy_to_shared(s_scales.index(slot), p_scales + group, mask=m_scales & is_there)
    if HAS_OFFSETS:
        copy_to_shared(s_offsets.index(slot), p_offsets + group, mask=m_offsets & is_there)


@gluon.jit
def _fetch_x(s_x0, s_x1, p_x, m_x, slot, i_step, last):
    """Send both halves of a step's x on their way."""
    copy_to_shared(s_x0.index(slot), p_x + i_step * 128, mask=m_x & (i_step < last))
    copy_to_shared(s_x1.index(slot), p_x + (i_step * 128 + 64), mask=m_x & (i_step < last))


@gluon.jit
def _next(slot, NUM_SLOTS: gl.constexpr):
    return gl.where(slot == NUM_SLOTS - 1, 0, slot + 1)


# What differs from step to step or from matrix to matrix is not specialized, as in `matmul.py`.
@gluon.jit(do_not_specialize=["M", "part_steps", "long_parts", "group_size"])
def _wgmma_kernel(
    p_x, p_words, p_scales, p_offsets, p_bias,
    p_out,  # [parts of K, M, N], rows out_stride apart
    M, N, x_stride, out_stride, part_steps, long_parts, group_size,
    BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSETS: gl.constexpr, HAS_BIAS: gl.constexpr, EVEN_N: gl.constexpr,
    LATE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = p_x.dtype.element_ty
    SCALE: gl.constexpr = p_scales.dtype.element_ty
    OFFSET: gl.constexpr = p_offsets.dtype.element_ty
    TILES: gl.constexpr = BITS // 4
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    # Shared memory as `ldmatrix` and `wgmma` read it without conflicts; copies of 16 bytes, and of 4 for a line.
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COPY_WORDS: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [num_warps, 1], [1, 0])
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    COPY_SCALES: gl.constexpr = gl.BlockedLayout([32 // SCALE.primitive_bitwidth], [32], [num_warps], [0])
    COPY_OFFSETS: gl.constexpr = gl.BlockedLayout([32 // OFFSET.primitive_bitwidth], [32], [num_warps], [0])
    # The last product of a step may still read its x while that of another is fetched.
    X_STAGES: gl.constexpr = STAGES + 1 if LATE else STAGES

    i_n, i_k, i_m = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    first_n, N64 = i_n * BLOCK_N, N.to(gl.int64)
    first = i_k * part_steps + gl.minimum(i_k, long_parts)
    last = first + part_steps + (i_k < long_parts).to(gl.int32)

    s_words0 = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, 32], WORDS)
    s_words1 = s_words0
    if TILES == 2:
        s_words1 = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, 32], WORDS)
    s_scales = gl.allocate_shared_memory(SCALE, [STAGES, BLOCK_N], LINE)
    s_offsets = s_scales
    if HAS_OFFSETS:
        s_offsets = gl.allocate_shared_memory(OFFSET, [STAGES, BLOCK_N], LINE)
    s_x0 = gl.allocate_shared_memory(DTYPE, [X_STAGES, BLOCK_M, 64], ROWS)
    s_x1 = gl.allocate_shared_memory(DTYPE, [X_STAGES, BLOCK_M, 64], ROWS)

    o_words = gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY_WORDS))
    o_scales, o_offsets = gl.arange(0, BLOCK_N, COPY_SCALES), gl.arange(0, BLOCK_N, COPY_OFFSETS)
    o_c = gl.arange(0, 32, gl.SliceLayout(0, COPY_WORDS))
    m_words = ((first_n + o_words < N) | EVEN_N)[:, None]
    m_scales, m_offsets = (first_n + o_scales < N) | EVEN_N, (first_n + o_offsets < N) | EVEN_N
    p_words += first_n.to(gl.int64) * 32 + o_words[:, None] * 32 + o_c[None, :]
    p_scales += first_n + o_scales
    p_offsets += first_n + o_offsets
    o_x = i_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, COPY_X))
    m_x = (o_x < M)[:, None]
    p_x += o_x.to(gl.int64)[:, None] * x_stride + gl.arange(0, 64, gl.SliceLayout(0, COPY_X))[None, :]

    step_words = first * (N64 * (32 * TILES))  # from the first tile of words to that of the step
    for i in gl.static_range(STAGES - 1):
        _fetch_weights(
            s_words0, s_words1, s_scales, s_offsets, p_words, p_scales, p_offsets, m_words, m_scales, m_offsets,
            i, step_words, first + i, last, N64, group_size, TILES, GROUP, HAS_OFFSETS,
        )  # fmt: skip
        async_copy.commit_group()
        step_words += N64 * (32 * TILES)
    wait_for_inputs(OVERLAP)
    for i in gl.static_range(STAGES - 1):
        _fetch_x(s_x0, s_x1, p_x, m_x, i, first + i, last)
        async_copy.commit_group()

    b_acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    b_sum, b_scale = b_acc, gl.zeros([BLOCK_N], gl.float32, gl.SliceLayout(1, MMA))
    b_second = gl.zeros([BLOCK_N, 64], DTYPE, WEIGHTS)
    slot, free_slot, x_slot, free_x_slot = 0, STAGES - 1, 0, STAGES - 1
    for i_step in range(first, last):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        _fetch_weights(
            s_words0, s_words1, s_scales, s_offsets, p_words, p_scales, p_offsets, m_words, m_scales, m_offsets,
            free_slot, step_words, i_step + (STAGES - 1), last, N64, group_size, TILES, GROUP, HAS_OFFSETS,
        )  # fmt: skip
        _fetch_x(s_x0, s_x1, p_x, m_x, free_x_slot, i_step + (STAGES - 1), last)
        async_copy.commit_group()
        b_words0, b_words1 = s_words0.index(slot).load(WEIGHTS), s_words1.index(slot).load(WEIGHTS)
        b_words = (b_words0, b_words1, b_words0, b_words0, b_words0)
        b_scales = s_scales.index(slot).load(gl.SliceLayout(1, MMA)).to(gl.float32)
        b_offsets = s_offsets.index(slot).load(gl.SliceLayout(1, WEIGHTS))
        b_first = _half(b_words, b_offsets, 0, BITS, HAS_OFFSETS, DTYPE, WEIGHTS)
        if LATE:
            # Only now are the sums of the step before needed: they were made while these weights were unpacked.
            b_sum, _ = warpgroup_mma_wait(0, deps=[b_sum, b_second])
            b_acc += b_sum * b_scale[:, None]
        s_x = s_x0.index(x_slot).permute((1, 0))
        b_sum = warpgroup_mma(b_first, s_x, b_sum, use_acc=False, is_async=True)
        b_second = _half(b_words, b_offsets, 1, BITS, HAS_OFFSETS, DTYPE, WEIGHTS)
        s_x = s_x1.index(x_slot).permute((1, 0))
        b_sum = warpgroup_mma(b_second, s_x, b_sum, is_async=True)
        # Registers that a product reads must be there until it has ended, and so they are named where it is waited for.
        if LATE:
            b_scale = b_scales
            b_sum, _ = warpgroup_mma_wait(1, deps=[b_sum, b_first])
        else:
            b_sum, _, _ = warpgroup_mma_wait(0, deps=[b_sum, b_first, b_second])
            b_acc += b_sum * b_scales[:, None]
        step_words += N64 * (32 * TILES)
        slot, free_slot = _next(slot, STAGES), _next(free_slot, STAGES)
        x_slot, free_x_slot = _next(x_slot, X_STAGES), _next(free_x_slot, X_STAGES)
    if LATE:
        b_sum, _ = warpgroup_mma_wait(0, deps=[b_sum, b_second])
        b_acc += b_sum * b_scale[:, None]
    let_next_start(OVERLAP)

    o_n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
    o_m = i_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA))
    m_n = (o_n < N) | EVEN_N
    if HAS_BIAS:
        # Once, whatever the number of parts.
        b_acc += gl.load(p_bias + o_n, mask=m_n & (i_k == 0), other=0.0).to(gl.float32)[:, None]
    p_y = p_out + (i_k.to(gl.int64) * M + o_m[None, :]) * out_stride + o_n[:, None]
    gl.store(p_y, b_acc.to(p_out.dtype.element_ty), mask=m_n[:, None] & (o_m < M)[None, :])


def launch_wgmma(x: Tensor, operand: PlaneOperand, bias: Tensor | None, y: Tensor, tile: Tile) -> None:
    """Write the parts of a product to y.

    Args:
        x: [M, K] fp16 or bf16, rows contiguous.
        operand: the matrix, one that `tiles.wgmma_fits`.
        bias: [N], in the first part.
        y: [parts of K, M, N].
        tile: with `wgmma`.
    """
    parts, m, n = y.shape
    if x.stride(0) % ALIGNED or x.data_ptr() % (2 * ALIGNED):
        x = x.clone(memory_format=torch.contiguous_format)  # copies of 16 bytes want whole ones
    group = operand.group_size if operand.group_size <= MAX_CONSTANT_GROUP else 0
    _wgmma_kernel[(triton.cdiv(n, tile.block_n), parts, triton.cdiv(m, tile.block_m))](
        x, operand.planes[0], operand.scales, operand.scales if operand.offsets is None else operand.offsets, bias, y,
        m, n, x.stride(0), y.stride(1), *divmod(num_steps(operand), parts), operand.group_size,
        BITS=operand.bits, GROUP=group, HAS_OFFSETS=operand.offsets is not None, HAS_BIAS=bias is not None,
        EVEN_N=n % tile.block_n == 0, LATE=tile.late and operand.offsets is None, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.warps, **overlap(x),
    )  # fmt: skip
