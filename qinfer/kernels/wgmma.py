"""The product of `plane_part.py` for up to 256 rows on Hopper, in Gluon: weights are unpacked while `wgmma` runs.

    sums[n, m] = sum_k x[m, k] W[n, k],   k in one of the parts of K

Plain Triton waits for the tensor cores behind every `wgmma` whose first operand is in registers, so behind every slice
of 32 features, or, with two warps, takes `mma.sync`, which has half the rate. Here a step of 128 features is two
products of 64, and the wait stands where their sums or their registers are needed: at the end of the step or, with
`LATE`, behind the unpacking of the next half step. Of groups smaller than a step each is a product with sums of its
own, which are waited for when the weights of the next are unpacked. Whoever waits names the registers that the product
reads, for nothing else keeps them from being overwritten (`tests/compile/sass.py` checks the assembly). Weights of the
first stages are on their way before the kernel before has finished; x is fetched behind that.

A gated product (`gated_matmul.py`) gives a program half as many columns of the gate, and those of up beside them, so
that a thread has both sums of a feature in registers, and stores one number in their place.

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
from qinfer.kernels.gather import inverse
from qinfer.kernels.operand import MIN_STEP, PlaneOperand
from qinfer.kernels.overlap import let_next_start, overlap, starts_early, wait_for_inputs
from qinfer.kernels.tiles import WGMMA, Tile, shapes_of, wgmma_fits
from qinfer.kernels.wgmma_rings import (
    fetch_weights,
    fetch_x,
    lines_of,
    load_line,
    load_words,
    next_slot,
    slots_of,
    width_of,
)

ALIGNED = 16  # elements that a row of x, W or its scales is a multiple of


@gluon.constexpr_function
def _layout(block_m, num_warps):
    """Return the layout of sums [BLOCK_N, BLOCK_M]."""
    return gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, block_m, 16])


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
        b_offsets = load_line(rings[3], slot, i, BLOCK_N, gl.SliceLayout(1, WEIGHTS))
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
        b_scales = load_line(rings[2], slot, i, BLOCK_N, gl.SliceLayout(1, MMA))
        b_weights = b_next
    # Sums in flight at the end of a turn of the loop would be copied there, and ptxas then waits for every product.
    b_sum, _ = warpgroup_mma_wait(0, deps=[b_sum, b_weights])
    return b_acc + b_sum * b_scales[:, None]


@gluon.jit
def _columns(o_n, N, BLOCK_N: gl.constexpr, IS_GATED: gl.constexpr):
    """Return which columns a program has, from its first one on; the second half of a gated one's are those of up."""
    if IS_GATED:
        # Said aloud, for the division hides from the compiler how many columns lie side by side.
        o_n += o_n // (BLOCK_N // 2) * (N // 2 - BLOCK_N // 2)
        return gl.max_contiguous(gl.multiple_of(o_n, 16), 16)
    else:
        return o_n


@gluon.jit
def _store_gated(b_acc, p_out, p_inverse, first_n, o_m, M, F, out_stride, MMA: gl.constexpr):
    """Store silu(gate) * up of sums [BLOCK_N, BLOCK_M], the gate's columns in front of up's."""
    HALF: gl.constexpr = b_acc.shape[0] // 2
    b_pair = gl.permute(gl.reshape(b_acc, (2, HALF, b_acc.shape[1])), (1, 2, 0))
    b_gate, b_up = gl.split(b_pair)
    b_y = gl.convert_layout(b_gate / (1.0 + gl.exp(-b_gate)) * b_up, MMA, assert_trivial=True)
    o_f = first_n + gl.arange(0, HALF, gl.SliceLayout(1, MMA))
    m_out = (o_f < F)[:, None] & (o_m < M)[None, :]
    if p_inverse is not None:
        o_f = gl.load(p_inverse + o_f, mask=o_f < F, other=0)
    p_y = p_out + o_m.to(gl.int64)[None, :] * out_stride + o_f[:, None]
    gl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_out)


@gluon.jit
def _accumulate_steps(
    b_acc, p_x, p_high, p_low, p_scales, p_offsets, first, last, first_n, first_m, M, N, K, x_stride, group_size,
    BITS: gl.constexpr, GROUP: gl.constexpr, HAS_OFFSETS: gl.constexpr, EVEN_K: gl.constexpr, EVEN_N: gl.constexpr,
    LATE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
    IS_GATED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Add the product of the steps from first to last of one segment to b_acc [BLOCK_N, BLOCK_M] fp32."""
    DTYPE: gl.constexpr = p_x.dtype.element_ty
    SCALE: gl.constexpr = p_scales.dtype.element_ty
    OFFSET: gl.constexpr = p_offsets.dtype.element_ty
    HIGH: gl.constexpr = width_of(BITS, 0)
    LOW: gl.constexpr = width_of(BITS, 1)
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
    NUM_LINES: gl.constexpr = lines_of(GROUP)
    LINES_N: gl.constexpr = NUM_LINES * BLOCK_N

    s_high = gl.allocate_shared_memory(gl.int16, [slots_of(HIGH, STAGES), BLOCK_N, 32], WORDS)
    s_scales = gl.allocate_shared_memory(SCALE, [STAGES, LINES_N], LINES)
    s_low, s_offsets = s_high, s_scales
    if LOW > 0:
        s_low = gl.allocate_shared_memory(gl.int16, [slots_of(LOW, STAGES), BLOCK_N, 32], WORDS)
    if HAS_OFFSETS:
        s_offsets = gl.allocate_shared_memory(OFFSET, [STAGES, LINES_N], LINES)
    s_x0 = gl.allocate_shared_memory(DTYPE, [X_STAGES, BLOCK_M, 64], ROWS)
    s_x1 = gl.allocate_shared_memory(DTYPE, [X_STAGES, BLOCK_M, 64], ROWS)

    N64 = N.to(gl.int64)
    o_words = _columns(gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY_WORDS)), N, BLOCK_N, IS_GATED)
    # Lines of scales and offsets, one behind the other.
    o_scales, o_offsets = gl.arange(0, LINES_N, COPY_SCALES), gl.arange(0, LINES_N, COPY_OFFSETS)
    line_scales, line_offsets = o_scales // BLOCK_N, o_offsets // BLOCK_N
    o_scales = _columns(o_scales % BLOCK_N, N, BLOCK_N, IS_GATED)
    o_offsets = _columns(o_offsets % BLOCK_N, N, BLOCK_N, IS_GATED)
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
        fetch_weights(
            rings, pointers, masks, i, first + i, first, last, step_words, N64, K, group_size,
            BITS, GROUP, HAS_OFFSETS, EVEN_K, STAGES,
        )  # fmt: skip
        async_copy.commit_group()
        step_words += per_step
    wait_for_inputs(OVERLAP)
    for i in gl.static_range(STAGES - 1):
        fetch_x(s_x0, s_x1, p_x, m_x, k_x, i, first + i, last, K, EVEN_K)
        async_copy.commit_group()

    b_sum = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    b_scale = gl.zeros([BLOCK_N], gl.float32, gl.SliceLayout(1, MMA))
    b_second = gl.zeros([BLOCK_N, 64], DTYPE, WEIGHTS)
    slot, free_slot, x_slot, free_x_slot = 0, STAGES - 1, 0, STAGES - 1
    for i_step in range(first, last):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        i_free = i_step + (STAGES - 1)
        fetch_weights(
            rings, pointers, masks, free_slot, i_free, first, last, step_words, N64, K, group_size,
            BITS, GROUP, HAS_OFFSETS, EVEN_K, STAGES,
        )  # fmt: skip
        fetch_x(s_x0, s_x1, p_x, m_x, k_x, free_x_slot, i_free, last, K, EVEN_K)
        async_copy.commit_group()
        b_words = load_words(rings, slot, i_step, BITS, STAGES, WEIGHTS)
        if NUM_LINES > 1:
            b_acc = _add_groups(b_acc, b_words, rings, s_x0, s_x1, slot, x_slot, NUM_LINES, BITS, HAS_OFFSETS, MMA)
        else:
            b_scales = load_line(s_scales, slot, 0, BLOCK_N, gl.SliceLayout(1, MMA))
            b_offsets = load_line(s_offsets, slot, 0, BLOCK_N, gl.SliceLayout(1, WEIGHTS))
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
        slot, free_slot = next_slot(slot, STAGES), next_slot(free_slot, STAGES)
        x_slot, free_x_slot = next_slot(x_slot, X_STAGES), next_slot(free_x_slot, X_STAGES)
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
    p_out,  # [parts of K, M, N], rows out_stride apart; [1, M, N / 2] if gated
    p_inverse,  # [N / 2] where each feature of a gated product goes, or None
    M, N, x_stride, out_stride, first_features, first_parts, part_steps, long_parts, group_sizes,
    SEGMENTS: gl.constexpr, IS_WHOLE: gl.constexpr, HAS_BIAS: gl.constexpr, EVEN_N: gl.constexpr, LATE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, IS_GATED: gl.constexpr,
    EARLY: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    if EARLY:
        let_next_start(OVERLAP)
    MMA: gl.constexpr = _layout(BLOCK_M, num_warps)
    i_n, i_k, i_m = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    first_n = i_n * (BLOCK_N // 2 if IS_GATED else BLOCK_N)
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
                BLOCK_M, BLOCK_N, STAGES, OVERLAP, IS_GATED, num_warps,
            )  # fmt: skip
    let_next_start(OVERLAP)
    o_n = first_n + _columns(gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA)), N, BLOCK_N, IS_GATED)
    o_m = i_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, MMA))
    m_n = (o_n < N) | EVEN_N
    if HAS_BIAS:
        # Once, whatever the number of parts.
        b_acc += gl.load(p_bias + o_n, mask=m_n & (i_k == 0), other=0.0).to(gl.float32)[:, None]
    if IS_GATED:
        _store_gated(b_acc, p_out, p_inverse, first_n, o_m, M, N // 2, out_stride, MMA)
    else:
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
    x: Tensor, segments: Sequence[PlaneOperand], splits: Sequence[int], bias: Tensor | None, y: Tensor, tile: Tile,
    *, is_gated: bool = False, order: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the parts of a product to y, or silu of its first half of columns times the second half.

    Args:
        x: [M, K] fp16 or bf16, rows contiguous.
        segments: the matrices on top of each other, of a kind that `tiles.wgmma_fits`.
        splits: the parts of K of each; all 1 where y has one part, and a program walks over all segments.
        bias: [N], in the first part.
        y: [parts of K, M, N]; [1, M, N / 2] if gated.
        tile: with `wgmma`; of those that `tiles.takes_gate` if gated.
        is_gated: whether the matrix is that of gate and up.
        order: [N / 2] int32, feature j of a gated result is feature order[j] of the product.
    """
    (parts, m, _), n = y.shape, segments[0].out_features
    if x.stride(0) % ALIGNED or x.data_ptr() % (2 * ALIGNED):
        x = x.clone(memory_format=torch.contiguous_format)  # copies of 16 bytes want whole ones
    steps = [divmod(triton.cdiv(s.in_features, MIN_STEP), split) for s, split in zip(segments, splits, strict=True)]
    # Of offsets that have to be taken from the codes, ptxas would wait for every single `wgmma`.
    is_late = tile.late and all(s.offsets is None and s.group_size % MIN_STEP == 0 for s in segments)
    _wgmma_kernel[(triton.cdiv(n, tile.block_n), parts, triton.cdiv(m, tile.block_m))](
        x, tuple(s.planes[0] for s in segments), tuple(s.planes[-1] for s in segments),
        tuple(s.scales for s in segments), tuple(s.scales if s.offsets is None else s.offsets for s in segments),
        bias, y, None if order is None else inverse(order), m, n, x.stride(0), y.stride(1),
        tuple(accumulate((s.in_features for s in segments), initial=0)), tuple(accumulate(splits, initial=0)),
        *zip(*steps, strict=True), tuple(s.group_size for s in segments),
        SEGMENTS=tuple(
            (s.bits, constant_group(s.group_size), s.offsets is not None, s.in_features % MIN_STEP == 0)
            for s in segments
        ),
        IS_WHOLE=parts < len(segments) or len(segments) == 1, HAS_BIAS=bias is not None, EVEN_N=n % tile.block_n == 0,
        LATE=is_late, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages, IS_GATED=is_gated,
        EARLY=starts_early(parts, m), num_warps=tile.warps, **overlap(x),
    )  # fmt: skip
