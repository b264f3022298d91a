"""One part of K of a product with planes: the device function that every kernel over packed weights is made of.

    sums[n, m] = sum_k x[m, k] W[n, k],   k in one of the parts of K

The problem is transposed, Yᵀ = W · Xᵀ, so that the tensor cores take weights, unpacked in registers, as their first
operand, and rows of x as their second. A bit position of a plane is a K slice of 32 features (`operand.py`), so a step
of K is 4, 8 or 16 dots against as many slices of x. Accumulation is fp32.

Scales meet the product in one of two places. After it, they multiply the fp32 sums of a group, which takes two sets of
sums and an operation per sum and group: best for few rows. Before it, they multiply the weights, rounded once to x's
type, exactly the numbers that `dequantize` writes: one set of sums, and an operation per weight, which the rows share.

Behind the product of the fewest rows, what is taken from all codes of a group and output is taken from the sum too:

    sum_k x[m, k] (code[n, k] - middle[n]) = sum_k x[m, k] code[n, k] - middle[n] sum_k x[m, k]

Then codes of one field are multiplied as the subnormal numbers of fp16 that their bits are, with one operation for two
of them where centred codes take two, and the tensor cores sum x as well. Such a product runs at the speed of memory,
and a GPU that reads weights at that speed is near its limit of power: an operation costs clock, even where there is
time for it. Tensor cores cut off what they add some 25 bits below the largest exponent, and subnormal numbers share
theirs, so these sums are right to 1e-6 of the largest where others are to 1e-7 (benchmarks/LOG.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from qinfer.kernels.codes import (
    load_step,
    offset_codes,
    scaled_codes,
    slice_codes,
    slice_num_fields,
    spread,
    subnormal_codes,
    subnormal_unit,
)
from qinfer.kernels.overlap import offset_of_inputs, wait_for_inputs


@triton.jit
def _scales(p_scales, i_group, o_n, m_n, N64, EVEN_N: tl.constexpr):
    """Load the scales of one group for outputs of any shape, in fp32.

    As 32-bit words of two, because Triton's pipeline fetches nothing narrower ahead of its use, and waiting in every
    step for scales to come from memory costs as much as the products.
    """
    first = i_group * N64
    # From the last even element on, where a pair begins.
    o_scale = o_n if EVEN_N else o_n + (first & 1).to(tl.int32)
    p_pairs = p_scales.to(tl.pointer_type(tl.int32), bitcast=True) + (first >> 1)
    b_bits = tl.load(p_pairs + (o_scale >> 1), mask=m_n, other=0) >> (o_scale & 1) * 16
    return b_bits.to(tl.int16).to(p_scales.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def _offsets(p_offsets, i_group, o_n, m_n, N64, IN_WORDS: tl.constexpr):
    """Load the offsets of one group, in fp32; in 32-bit words, for the same reason, where a row has whole ones.

    Codes of two fields leave no registers for offsets that are fetched ahead, nor do weights that take their scales.
    """
    if IN_WORDS:
        PER_WORD: tl.constexpr = 32 // p_offsets.dtype.element_ty.primitive_bitwidth
        p_words = p_offsets.to(tl.pointer_type(tl.int32), bitcast=True) + i_group * (N64 // PER_WORD)
        b_words = tl.load(p_words + o_n // PER_WORD) >> o_n % PER_WORD * (32 // PER_WORD)
        return b_words.to(p_offsets.dtype.element_ty).to(tl.float32)
    else:
        return tl.load(p_offsets + i_group * N64 + o_n, mask=m_n, other=0).to(tl.float32)


@triton.jit
def accumulate_part(
    p_x, p_high, p_low, p_scales, p_offsets, i_part, part_steps, long_parts, o_m, m_m, first_n, N,
    K, x_stride, num_high, num_groups, group_size,
    BITS: tl.constexpr, HIGH_TILES: tl.constexpr, HAS_LOW: tl.constexpr, SLICES: tl.constexpr, RUN: tl.constexpr,
    GROUP: tl.constexpr, HAS_OFFSETS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    PTX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
    COPIES: tl.constexpr = 0,
):  # fmt: skip
    """Multiply one part of K of one segment: [BLOCK_N, BLOCK_M] fp32.

    COPIES is 0 to scale the sums of a group. Otherwise weights are scaled before they are multiplied, and it says how
    many times each scale is loaded: together as often as the program has threads, for Triton lets a smaller load take
    the layout of the planes, and then weights go from registers to the tensor cores through shared memory.
    """
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    STEP: tl.constexpr = SLICES * 32
    o_c = tl.arange(0, 32)
    o_n = first_n + tl.arange(0, BLOCK_N)
    m_n = (o_n < N) | EVEN_N
    N64 = tl.cast(N, tl.int64)
    first = i_part * part_steps + tl.minimum(i_part, long_parts)
    last = first + part_steps + (i_part < long_parts).to(tl.int32)
    p_xs = p_x + o_m.to(tl.int64)[None, :] * x_stride + o_c[:, None]
    # A division by a number known to the compiler is a shift; larger groups are few.
    divisor = tl.cast(group_size if GROUP == 0 else GROUP, tl.uint32)
    # `mma.sync` adds to its sums one after the other, and waits each time: two sets take turns.
    IN_TURN: tl.constexpr = BLOCK_M == 8 and RUN > 1
    ONE_FIELD: tl.constexpr = slice_num_fields(BITS, 0, False) == 1
    AS_STORED: tl.constexpr = IN_TURN and PTX and tl.float16 == DTYPE and ONE_FIELD
    UNIT: tl.constexpr = subnormal_unit(BITS, 0)
    b_ones = tl.full([BLOCK_N, 32], 1, DTYPE)
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i_step in tl.range(first, last, num_stages=STAGES):
        # Weights first: they are on their way while the kernel before still writes x.
        b_words = load_step(p_high, p_low, i_step, first_n, m_n, N64, num_high, HIGH_TILES, HAS_LOW)
        p_step = p_xs + (i_step * STEP + offset_of_inputs(i_step, OVERLAP))
        b_part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        b_other, b_sum_x = b_part, b_part
        for s in tl.static_range(SLICES):
            o_k = i_step * STEP + s * 32
            m_x = m_m if EVEN_K else m_m & (o_k + o_c[:, None] < K)
            # A run of slices shares a group, or two groups of 16 share a slice: each takes the features of x that are
            # its own. What lies behind K is multiplied by zero and takes the last group's.
            for half in tl.static_range(2 if RUN == 0 else 1):
                i_group = (o_k + half * 16).to(tl.uint32) // divisor
                i_group = (i_group if EVEN_K else tl.minimum(i_group, num_groups - 1)).to(tl.int32)
                if HAS_OFFSETS and (RUN == 0 or s % RUN == 0):
                    b_offsets = _offsets(p_offsets, i_group, o_n, m_n, N64, EVEN_N and COPIES == 0 and ONE_FIELD)
                if AS_STORED:
                    b_codes = subnormal_codes(b_words, BITS, s)
                elif HAS_OFFSETS:
                    b_codes = offset_codes(b_words, b_offsets, BITS, s, DTYPE, PTX)
                else:
                    b_codes = slice_codes(b_words, BITS, s, DTYPE, PTX)
                m_group = m_x & (o_c[:, None] // 16 == half) if RUN == 0 else m_x
                b_x = tl.load(p_step + s * 32, mask=m_group, other=0.0)
                if COPIES > 0:
                    if RUN == 0 or s % RUN == 0:
                        o_copies = o_n[:, None] + tl.zeros([1, COPIES], tl.int32)
                        b_scales = spread(_scales(p_scales, i_group, o_copies, m_n[:, None], N64, EVEN_N))
                    b_weights = scaled_codes(b_codes, b_scales, p_scales.dtype.element_ty, PTX)
                    b_acc = tl.dot(b_weights, b_x, b_acc, input_precision="ieee")
                else:
                    if AS_STORED:
                        b_sum_x = tl.dot(b_ones, b_x, b_sum_x, input_precision="ieee")
                    if IN_TURN and s % 2 == 1:
                        b_other = tl.dot(b_codes, b_x, b_other, input_precision="ieee")
                    else:
                        b_part = tl.dot(b_codes, b_x, b_part, input_precision="ieee")
                    if RUN == 0 or (s + 1) % RUN == 0:
                        if AS_STORED:
                            b_middle = UNIT * (1 << (BITS - 1))
                            if HAS_OFFSETS:
                                b_middle += b_offsets[:, None] * UNIT
                            b_part += b_other * (UNIT / subnormal_unit(BITS, 1))
                            b_part -= b_sum_x * b_middle
                            b_sum_x = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                        elif IN_TURN:
                            b_part += b_other
                        b_acc += b_part * _scales(p_scales, i_group, o_n, m_n, N64, EVEN_N)[:, None]
                        b_part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                        b_other = b_part
    wait_for_inputs(OVERLAP)
    return b_acc / UNIT if AS_STORED else b_acc
