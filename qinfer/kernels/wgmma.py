"""The product of `plane_part.py` for up to 256 rows on Hopper, in Gluon: weights are unpacked while `wgmma` runs.

    sums[n, m] = sum_k x[m, k] W[n, k],   k in one of the parts of K

Plain Triton waits for the tensor cores behind every `wgmma` whose first operand is in registers, so behind every slice
of 32 features, or, with two warps, takes `mma.sync`, which has half the rate. Here a step of 128 features is two
products of 64, and the wait stands where their sums or their registers are needed: at the end of the step or, with
`LATE`, behind the unpacking of the next half step. Of groups smaller than a step each is a product with sums of its
own, which are waited for when the weights of the next are unpacked. Whoever waits names the registers that the product
reads, for nothing else keeps them from being overwritten (`tests/compile/sass.py` checks the assembly). Weights of the
first stages are on their way before the kernel before has finished; x is fetched behind that.

A step has one tile of a plane of 4 bits and two of 8 bits; of a plane of 2 or 1 bits two or four steps share a tile,
which is fetched once and shifted to the slices of the step. The rings of tiles, x, scales and offsets are allocations
of their own, and so is each half of x: Triton keeps accesses to one allocation in order by barriers, whatever part of
it they touch.

Limits, which `check_wgmma` and the launcher see to: sm_90; K of every segment a multiple of 32, its group size 32, 64,
a multiple of 128 or K; N a multiple of 16; x in 16 bits. Interpreters do not know Gluon; GPU tests hold it against the
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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

from qinfer.errors import UnsupportedError
from qinfer.kernels.codes import constant_group, offset_codes, slice_codes
from qinfer.kernels.device import arch
from qinfer.kernels.operand import FIELDS, MIN_STEP, PlaneOperand
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs
from qinfer.kernels.tiles import WGMMA, Tile, shapes_of, wgmma_fits

ALIGNED = 16  # elements that a row of x, W or its scales is a multiple of
# The older name is that of Triton 3.6.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def _layout(block_m, num_warps):
    """Return the layout of sums [BLOCK_N, BLOCK_M]."""
    return gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, block_m, 16])


@gluon.constexpr_function
def _width(bits, plane):
    """Return the bits of a field of the first or second plane, 0 for none; 8 bits have their second tile for one."""
    return 8 if bits == 8 else (*FIELDS[bits], 0)[plane]


@gluon.constexpr_function
def _share(width):
    """Return how many steps have a tile of a plane in common."""
    return max(1, 4 // width)


@gluon.constexpr_function
def _lines(group):
    """Return how many groups a step has."""
    return 128 // group if 0 < group < 128 else 1


@gluon.constexpr_function
def _slots(width, stages):
    """Return the tiles of a plane from the one of the step at work to the one that is fetched."""
    return -(-(stages - 1) // _share(width)) + 1


@gluon.jit
def _slot_of(slot, i_step, WIDTH: gl.constexpr, STAGES: gl.constexpr):
    """Return where in its ring the tile of a step is; `slot` is that of the step in a ring without shared tiles."""
    if _share(WIDTH) == 1:
        return slot
    else:
        return i_step // _share(WIDTH) % _slots(WIDTH, STAGES)


@gluon.jit
def _fetch_tile(
    s_plane, p_plane, m_words, slot, i_step, first, last, step_words, N64, WIDTH: gl.constexpr, STAGES: gl.constexpr
):
    """Send the tile of a plane that a step reads on its way, unless a step before has."""
    SHARE: gl.constexpr = _share(WIDTH)
    if SHARE == 1:
        copy_to_shared(s_plane.index(slot), p_plane + step_words, mask=m_words & (i_step < last))
    else:
        # A branch and no mask, which would fill the tile with zeros.
        if (i_step < last) & ((i_step % SHARE == 0) | (i_step == first)):
            p_tile = p_plane + i_step // SHARE * (N64 * 32)
            copy_to_shared(s_plane.index(_slot_of(slot, i_step, WIDTH, STAGES)), p_tile, mask=m_words)


@gluon.jit
def _load_tile(s_plane, slot, i_step, WIDTH: gl.constexpr, STAGES: gl.constexpr, WEIGHTS: gl.constexpr):
    """Load the words of a step, its first slice in the lowest bits."""
    b_words = s_plane.index(_slot_of(slot, i_step, WIDTH, STAGES)).load(WEIGHTS)
    if _share(WIDTH) > 1:
        b_amount = gl.full(b_words.shape, i_step % _share(WIDTH) * (4 * WIDTH), gl.int32, WEIGHTS)
        # What crosses from one word of a pair to the other is masked away later.
        b_words = gl.inline_asm_elementwise(
            "shr.u32 $0, $1, $2;", "=r,r,r,r", [b_words, b_amount], dtype=gl.int16, is_pure=True, pack=2
        )  # fmt: skip
    return b_words


@gluon.jit
def _fetch_lines(
    s_lines, p_lines, m_lines, k_lines, slot, i_step, last, N64, K, group_size,
    GROUP: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """Send the scales or offsets of a step's groups on their way; k_lines: where in the step their groups begin."""
    first = (i_step * 128 // (group_size if GROUP == 0 else GROUP)) * N64
    m_lines = m_lines & (i_step < last)
    if not EVEN_K:
        m_lines = m_lines & (i_step * 128 + k_lines < K)
    copy_to_shared(s_lines.index(slot), p_lines + first, mask=m_lines)


@gluon.jit
def _load_words(rings, slot, i_step, BITS: gl.constexpr, STAGES: gl.constexpr, WEIGHTS: gl.constexpr):
    """Load the words of a step's planes, as `codes.py` wants them."""
    b_high = _load_tile(rings[0], slot, i_step, _width(BITS, 0), STAGES, WEIGHTS)
    b_low = b_high
    if _width(BITS, 1) > 0:
        b_low = _load_tile(rings[1], slot, i_step, _width(BITS, 1), STAGES, WEIGHTS)
    return b_high, b_low, b_high, b_high, b_low


@gluon.jit
def _load_line(s_lines, slot, LINE: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Load the scales or offsets of one of a step's groups: [BLOCK_N] fp32."""
    return s_lines.index(slot).slice(LINE * BLOCK_N, BLOCK_N).load(LAYOUT).to(gl.float32)


@gluon.jit
def _fetch_weights(
    rings, pointers, masks, slot, i_step, first, last, step_words, N64, K, group_size,
    BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSETS: gl.constexpr, EVEN_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Send the words, scales and offsets of a step on their way."""
    HIGH: gl.constexpr = _width(BITS, 0)
    LOW: gl.constexpr = _width(BITS, 1)
    _fetch_tile(rings[0], pointers[0], masks[0], slot, i_step, first, last, step_words, N64, HIGH, STAGES)
    if LOW > 0:
        m_words = masks[0]
        if BITS == 8 and not EVEN_K:
            m_words = m_words & (i_step * 128 + 64 < K)  # half a step has no second tile
        _fetch_tile(rings[1], pointers[1], m_words, slot, i_step, first, last, step_words, N64, LOW, STAGES)
    _fetch_lines(rings[2], pointers[2], masks[1], masks[2], slot, i_step, last, N64, K, group_size, GROUP, EVEN_K)
    if HAS_OFFSETS:
        _fetch_lines(rings[3], pointers[3], masks[3], masks[4], slot, i_step, last, N64, K, group_size, GROUP, EVEN_K)


@gluon.jit
def _fetch_x(s_x0, s_x1, p_x, m_x, k_x, slot, i_step, last, K, EVEN_K: gl.constexpr):
    """Send both halves of a step's x on their way; what is behind the end of the segment is 0."""
    m_0 = m_x & (i_step < last)
    m_1 = m_0
    if not EVEN_K:
        m_0, m_1 = m_0 & (i_step * 128 + k_x < K), m_1 & (i_step * 128 + 64 + k_x < K)
    copy_to_shared(s_x0.index(slot), p_x + i_step * 128, mask=m_0)
    copy_to_shared(s_x1.index(slot), p_x + (i_step * 128 + 64), mask=m_1)


@gluon.jit
def _slice(b_words, b_offsets, INDEX: gl.constexpr, BITS: gl.constexpr, HAS_OFFSETS: gl.constexpr, DTYPE: gl.constexpr):
    """Unpack a slice of a step: [BLOCK_N, 32] in DTYPE."""
    if HAS_OFFSETS:
        return offset_codes(b_words, b_offsets, BITS, INDEX, DTYPE, True)
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
def _add_groups(
    b_acc, b_words, rings, s_x0, s_x1, slot, x_slot,
    NUM_LINES: gl.constexpr, BITS: gl.constexpr, HAS_OFFSETS: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Add the products of a step of two or four groups, each while the weights of the next are unpacked."""
    BLOCK_N: gl.constexpr = b_acc.shape[0]
    DTYPE: gl.constexpr = s_x0.dtype
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    b_sum, b_weights = gl.zeros(b_acc.shape, gl.float32, MMA), b_words[0]
    b_scales = gl.zeros([BLOCK_N], gl.float32, gl.SliceLayout(1, MMA))
    for i in gl.static_range(NUM_LINES):
        b_offsets = _load_line(rings[3], slot, i, BLOCK_N, gl.SliceLayout(1, WEIGHTS))
        if NUM_LINES == 2:
            b_next = _half(b_words, b_offsets, i, BITS, HAS_OFFSETS, DTYPE, WEIGHTS)
            s_x = (s_x0 if i == 0 else s_x1).index(x_slot).permute((1, 0))
        else:
            b_next = _slice(b_words, b_offsets, i, BITS, HAS_OFFSETS, DTYPE)
            b_next = gl.convert_layout(b_next, WEIGHTS, assert_trivial=True)
            s_x = (s_x0 if i < 2 else s_x1).index(x_slot).slice(i % 2 * 32, 32, dim=1).permute((1, 0))
        if i > 0:
            b_sum, _ = warpgroup_mma_wait(0, deps=[b_sum, b_weights])
            b_acc += b_sum * b_scales[:, None]
        b_sum = warpgroup_mma(b_next, s_x, b_sum, use_acc=False, is_async=True)
        b_scales = _load_line(rings[2], slot, i, BLOCK_N, gl.SliceLayout(1, MMA))
        b_weights = b_next
    # Sums in flight at the end of a turn of the loop would be copied there, and ptxas then waits for every product.
    b_sum, _ = warpgroup_mma_wait(0, deps=[b_sum, b_weights])
    return b_acc + b_sum * b_scales[:, None]


@gluon.jit
def _next(slot, NUM_SLOTS: gl.constexpr):
    return gl.where(slot == NUM_SLOTS - 1, 0, slot + 1)


@gluon.jit
def _accumulate_steps(
    b_acc, p_x, p_high, p_low, p_scales, p_offsets, first, last, first_n, first_m, M, N, K, x_stride, group_size,
    BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSETS: gl.constexpr, EVEN_K: gl.constexpr, EVEN_N: gl.constexpr,
    LATE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Add the product of the steps from first to last of one segment to b_acc [BLOCK_N, BLOCK_M] fp32."""
    DTYPE: gl.constexpr = p_x.dtype.element_ty
    SCALE: gl.constexpr = p_scales.dtype.element_ty
    OFFSET: gl.constexpr = p_offsets.dtype.element_ty
    HIGH: gl.constexpr = _width(BITS, 0)
    LOW: gl.constexpr = _width(BITS, 1)
    MMA: gl.constexpr = _layout(BLOCK_M, num_warps)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    # Shared memory as `ldmatrix` and `wgmma` read it without conflicts; copies of 16 bytes, and of 4 for lines.
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    LINES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COPY_WORDS: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [num_warps, 1], [1, 0])
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    COPY_SCALES: gl.constexpr = gl.BlockedLayout([32 // SCALE.primitive_bitwidth], [32], [num_warps], [0])
    COPY_OFFSETS: gl.constexpr = gl.BlockedLayout([32 // OFFSET.primitive_bitwidth], [32], [num_warps], [0])
    # The last product of a step may still read its x while that of another is fetched.
    X_STAGES: gl.constexpr = STAGES + 1 if LATE else STAGES
    NUM_LINES: gl.constexpr = _lines(GROUP)
    LINES_N: gl.constexpr = NUM_LINES * BLOCK_N

    s_high = gl.allocate_shared_memory(gl.int16, [_slots(HIGH, STAGES), BLOCK_N, 32], WORDS)
    s_low = s_high
    if LOW > 0:
        s_low = gl.allocate_shared_memory(gl.int16, [_slots(LOW, STAGES), BLOCK_N, 32], WORDS)
    s_scales = gl.allocate_shared_memory(SCALE, [STAGES, LINES_N], LINES)
    s_offsets = s_scales
    if HAS_OFFSETS:
        s_offsets = gl.allocate_shared_memory(OFFSET, [STAGES, LINES_N], LINES)
    s_x0 = gl.allocate_shared_memory(DTYPE, [X_STAGES, BLOCK_M, 64], ROWS)
    s_x1 = gl.allocate_shared_memory(DTYPE, [X_STAGES, BLOCK_M, 64], ROWS)

    N64 = N.to(gl.int64)
    o_words = gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY_WORDS))
    # Lines of scales and offsets, one behind the other.
    o_scales, o_offsets = gl.arange(0, LINES_N, COPY_SCALES), gl.arange(0, LINES_N, COPY_OFFSETS)
    line_scales, line_offsets = o_scales // BLOCK_N, o_offsets // BLOCK_N
    o_scales, o_offsets = o_scales % BLOCK_N, o_offsets % BLOCK_N
    m_words = ((first_n + o_words < N) | EVEN_N)[:, None]
    m_scales, m_offsets = (first_n + o_scales < N) | EVEN_N, (first_n + o_offsets < N) | EVEN_N
    o_c = gl.arange(0, 32, gl.SliceLayout(0, COPY_WORDS))
    o_tile = first_n.to(gl.int64) * 32 + o_words[:, None] * 32 + o_c[None, :]
    p_high, p_low = p_high + o_tile, p_low + o_tile
    if BITS == 8:
        p_low = p_high + N64 * 32
    p_scales = p_scales + (first_n + o_scales + line_scales * N64)
    p_offsets = p_offsets + (first_n + o_offsets + line_offsets * N64)
    rings, pointers = (s_high, s_low, s_scales, s_offsets), (p_high, p_low, p_scales, p_offsets)
    masks = (m_words, m_scales, line_scales * GROUP, m_offsets, line_offsets * GROUP)
    o_x = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, COPY_X))
    m_x, o_k = (o_x < M)[:, None], gl.arange(0, 64, gl.SliceLayout(0, COPY_X))[None, :]
    k_x = o_k // 8 * 8  # of a copy of 8 elements
    p_x += o_x.to(gl.int64)[:, None] * x_stride + o_k

    per_step = N64 * (64 if BITS == 8 else 32)  # words, where steps share no tile
    step_words = first * per_step
    for i in gl.static_range(STAGES - 1):
        _fetch_weights(
            rings, pointers, masks, i, first + i, first, last, step_words, N64, K, group_size,
            BITS, GROUP, HAS_OFFSETS, EVEN_K, STAGES,
        )  # fmt: skip
        async_copy.commit_group()
        step_words += per_step
    wait_for_inputs(OVERLAP)
    for i in gl.static_range(STAGES - 1):
        _fetch_x(s_x0, s_x1, p_x, m_x, k_x, i, first + i, last, K, EVEN_K)
        async_copy.commit_group()

    b_sum = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    b_scale = gl.zeros([BLOCK_N], gl.float32, gl.SliceLayout(1, MMA))
    b_second = gl.zeros([BLOCK_N, 64], DTYPE, WEIGHTS)
    slot, free_slot, x_slot, free_x_slot = 0, STAGES - 1, 0, STAGES - 1
    for i_step in range(first, last):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        i_free = i_step + (STAGES - 1)
        _fetch_weights(
            rings, pointers, masks, free_slot, i_free, first, last, step_words, N64, K, group_size,
            BITS, GROUP, HAS_OFFSETS, EVEN_K, STAGES,
        )  # fmt: skip
        _fetch_x(s_x0, s_x1, p_x, m_x, k_x, free_x_slot, i_free, last, K, EVEN_K)
        async_copy.commit_group()
        b_words = _load_words(rings, slot, i_step, BITS, STAGES, WEIGHTS)
        if NUM_LINES > 1:
            b_acc = _add_groups(b_acc, b_words, rings, s_x0, s_x1, slot, x_slot, NUM_LINES, BITS, HAS_OFFSETS, MMA)
        else:
            b_scales = _load_line(s_scales, slot, 0, BLOCK_N, gl.SliceLayout(1, MMA))
            b_offsets = _load_line(s_offsets, slot, 0, BLOCK_N, gl.SliceLayout(1, WEIGHTS))
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
            # Registers that a product reads must be there until it has ended, and so they are named where that is
            # waited for.
            if LATE:
                b_scale = b_scales
                b_sum, _ = warpgroup_mma_wait(1, deps=[b_sum, b_first])
            else:
                b_sum, _, _ = warpgroup_mma_wait(0, deps=[b_sum, b_first, b_second])
                b_acc += b_sum * b_scales[:, None]
        step_words += per_step
        slot, free_slot = _next(slot, STAGES), _next(free_slot, STAGES)
        x_slot, free_x_slot = _next(x_slot, X_STAGES), _next(free_x_slot, X_STAGES)
    if LATE:
        b_sum, _ = warpgroup_mma_wait(0, deps=[b_sum, b_second])
        b_acc += b_sum * b_scale[:, None]
    # Copies behind the last step are zeros, which must not fall into the rings of the next segment.
    async_copy.wait_group(0)
    return b_acc


# What differs from step to step or from matrix to matrix is not specialized, as in `matmul.py`.
@gluon.jit(do_not_specialize=["M", "first_features", "first_parts", "part_steps", "long_parts", "group_sizes"])
def _wgmma_kernel(
    p_x, p_highs, p_lows, p_scales, p_offsets, p_bias,
    p_out,  # [parts of K, M, N], rows out_stride apart
    M, N, x_stride, out_stride, first_features, first_parts, part_steps, long_parts, group_sizes,
    SEGMENTS: gl.constexpr, IS_WHOLE: gl.constexpr, HAS_BIAS: gl.constexpr, EVEN_N: gl.constexpr, LATE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = _layout(BLOCK_M, num_warps)
    i_n, i_k, i_m = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    first_n = i_n * BLOCK_N
    b_acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    for g in gl.static_range(len(SEGMENTS)):
        # A program belongs to one segment, and walks over its part of it, or over all segments one after the other.
        is_mine = True if IS_WHOLE else (i_k >= first_parts[g]) & (i_k < first_parts[g + 1])
        if is_mine:
            i_part = i_k - (0 if IS_WHOLE else first_parts[g])
            first = i_part * part_steps[g] + gl.minimum(i_part, long_parts[g])
            last = first + part_steps[g] + (i_part < long_parts[g]).to(gl.int32)
            b_acc = _accumulate_steps(
                b_acc, p_x + first_features[g], p_highs[g], p_lows[g], p_scales[g], p_offsets[g],
                first, last, first_n, i_m * BLOCK_M, M, N, first_features[g + 1] - first_features[g], x_stride,
                group_sizes[g], SEGMENTS[g][0], SEGMENTS[g][1], SEGMENTS[g][2], SEGMENTS[g][3], EVEN_N, LATE,
                BLOCK_M, BLOCK_N, STAGES, OVERLAP, num_warps,
            )  # fmt: skip
    let_next_start(OVERLAP)
    o_n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))
    o_m = i_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA))
    m_n = (o_n < N) | EVEN_N
    if HAS_BIAS:
        # Once, whatever the number of parts.
        b_acc += gl.load(p_bias + o_n, mask=m_n & (i_k == 0), other=0.0).to(gl.float32)[:, None]
    p_y = p_out + (i_k.to(gl.int64) * M + o_m[None, :]) * out_stride + o_n[:, None]
    gl.store(p_y, b_acc.to(p_out.dtype.element_ty), mask=m_n[:, None] & (o_m < M)[None, :])


def check_wgmma(x: Tensor, segments: Sequence[PlaneOperand]) -> None:
    """Refuse what the kernel does not take.

    Raises:
        UnsupportedError: the GPU has no `wgmma`, or the matrix is not cut as the kernel wants it.
    """
    if arch(x.device) not in WGMMA:
        raise UnsupportedError(f"tiles with wgmma work on {', '.join(WGMMA)}, not on {arch(x.device)}")
    if not wgmma_fits(segments[0].out_features, shapes_of(segments)):
        raise UnsupportedError(
            "tiles with wgmma want N a multiple of 16, K of every segment a multiple of 32, and its group size 32, 64, "
            "a multiple of 128 or K; tiles with wgmma=False take every matrix"
        )


def launch_wgmma(
    x: Tensor, segments: Sequence[PlaneOperand], splits: Sequence[int], bias: Tensor | None, y: Tensor, tile: Tile
) -> None:
    """Write the parts of a product to y.

    Args:
        x: [M, K] fp16 or bf16, rows contiguous.
        segments: the matrices on top of each other, of a kind that `tiles.wgmma_fits`.
        splits: the parts of K of each; all 1 where y has one part, and a program walks over all segments.
        bias: [N], in the first part.
        y: [parts of K, M, N].
        tile: with `wgmma`.
    """
    parts, m, n = y.shape
    if x.stride(0) % ALIGNED or x.data_ptr() % (2 * ALIGNED):
        x = x.clone(memory_format=torch.contiguous_format)  # copies of 16 bytes want whole ones
    steps = [divmod(triton.cdiv(s.in_features, MIN_STEP), split) for s, split in zip(segments, splits, strict=True)]
    # Of offsets that have to be taken from the codes, ptxas would wait for every single `wgmma`.
    is_late = tile.late and all(s.offsets is None and s.group_size % MIN_STEP == 0 for s in segments)
    _wgmma_kernel[(triton.cdiv(n, tile.block_n), parts, triton.cdiv(m, tile.block_m))](
        x, tuple(s.planes[0] for s in segments), tuple(s.planes[-1] for s in segments),
        tuple(s.scales for s in segments), tuple(s.scales if s.offsets is None else s.offsets for s in segments),
        bias, y, m, n, x.stride(0), y.stride(1),
        tuple(accumulate((s.in_features for s in segments), initial=0)), tuple(accumulate(splits, initial=0)),
        *zip(*steps, strict=True), tuple(s.group_size for s in segments),
        SEGMENTS=tuple(
            (s.bits, constant_group(s.group_size), s.offsets is not None, s.in_features % MIN_STEP == 0)
            for s in segments
        ),
        IS_WHOLE=parts < len(segments) or len(segments) == 1, HAS_BIAS=bias is not None, EVEN_N=n % tile.block_n == 0,
        LATE=is_late, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages, num_warps=tile.warps,
        **overlap(x),
    )  # fmt: skip
