"""The two products of the attention kernel, for pages in any codec: queries by keys, and probabilities by values.

Coded rows are decoded in registers, a tile at a time and a plane after the other (`kv_tile.py`), into numbers that are
exact in fp16 and want a weight per plane, a step, and a middle z taken from them. None of it meets a number: queries
carry the weights of their planes, and

    q . k_j = (step sum_d q_d number_jd - z sum_d q_d) scale_j
    sum_j p_j v_jd = step weight sum_j p_j number_jd - z sum_j p_j,    p_j with the scale of the value

where the sum of q is known before the loop and that of p is one more product, with ones. The scale of a value
multiplies its probability. So that the product of both fits fp16, the softmax shifts by the largest sum of a score and
the logarithm of its value's scale; sums then are what they are, whatever the scales. Scores are in units of log 2, as
the softmax takes them.

The stride of a row is known at compile time, because Triton takes a number that 16 does not divide for odd: rows of 20
words (80 features of four bits) would be loaded one by one and, being narrower than 32 bits, outside of the pipeline.

Tensor cores take 16 rows of their first operand, and 8 columns of their second: where queries are few, KEYS_FIRST swaps
the two, so that scores are [keys, queries], and sums over values [features, queries].
"""

from __future__ import annotations

import triton
import triton.language as tl

from qinfer.kernels.kv_tile import (
    has_scales,
    is_rotated,
    join_pairs,
    load_scales,
    num_planes,
    plane,
    rotate,
    split_pairs,
    step_of,
    weight_of,
    zero_of,
)

ONES = tl.constexpr(16)  # columns, or rows, of the product with ones: the fewest that tensor cores take


@triton.jit
def along_keys(b_x, KEYS_FIRST: tl.constexpr):
    """Give a vector over keys the shape that meets scores."""
    return b_x[:, None] if KEYS_FIRST else b_x[None, :]


@triton.jit
def along_queries(b_x, KEYS_FIRST: tl.constexpr):
    """Give a vector over queries the shape that meets scores, and sums over values."""
    return b_x[None, :] if KEYS_FIRST else b_x[:, None]


@triton.jit
def planes_of(b_x, PLANES: tl.constexpr):
    """Split columns [M, D] into planes, a tuple of [M, D / PLANES]: plane j has columns j, j + PLANES and so on."""
    if PLANES == 1:
        return (b_x,)
    else:
        b_even, b_odd = split_pairs(b_x)
        if PLANES == 2:
            return (b_even, b_odd)
        else:
            b_0, b_2 = split_pairs(b_even)
            b_1, b_3 = split_pairs(b_odd)
            return (b_0, b_1, b_2, b_3)


@triton.jit
def joined(b_planes, PLANES: tl.constexpr):
    """Undo `planes_of`."""
    if PLANES == 1:
        return b_planes[0]
    elif PLANES == 2:
        return join_pairs(b_planes[0], b_planes[1])
    else:
        return join_pairs(join_pairs(b_planes[0], b_planes[2]), join_pairs(b_planes[1], b_planes[3]))


@triton.jit
def no_sums(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SCHEME: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Return zero sums over values, a tuple of one tile for each plane, and of the sums of what weighs them."""
    PLANES: tl.constexpr = num_planes(SCHEME)
    WIDTH: tl.constexpr = BLOCK_D // PLANES
    b_zero = tl.zeros([WIDTH, BLOCK_M] if KEYS_FIRST else [BLOCK_M, WIDTH], tl.float32)
    b_weights = tl.zeros([ONES, BLOCK_M] if KEYS_FIRST else [BLOCK_M, ONES], tl.float32)
    if PLANES == 1:
        return (b_zero,)
    elif PLANES == 2:
        return (b_zero, b_zero, b_weights) if is_rotated(SCHEME) else (b_zero, b_zero)
    else:
        return (b_zero, b_zero, b_zero, b_zero, b_weights)


@triton.jit
def _turned(b_x, KEYS_FIRST: tl.constexpr):
    """Transpose one tile of queries or sums if keys come first."""
    return tl.trans(b_x) if KEYS_FIRST else b_x


@triton.jit
def turned(b_planes, PLANES: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Transpose every plane if keys come first."""
    if PLANES == 1:
        return (_turned(b_planes[0], KEYS_FIRST),)
    elif PLANES == 2:
        return (_turned(b_planes[0], KEYS_FIRST), _turned(b_planes[1], KEYS_FIRST))
    else:
        return (
            _turned(b_planes[0], KEYS_FIRST),
            _turned(b_planes[1], KEYS_FIRST),
            _turned(b_planes[2], KEYS_FIRST),
            _turned(b_planes[3], KEYS_FIRST),
        )


@triton.jit
def prepared(
    b_q, scale, PAGE_DTYPE: tl.constexpr, DTYPE: tl.constexpr, RUN: tl.constexpr, SCHEME: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Return the planes of queries [M, D] as the product over keys takes them, with factor and offset of their scores.

    A score is the product times the factor, plus the offset, and all of it times the key's scale.
    """
    if SCHEME == "plain":
        b_factor = tl.zeros([b_q.shape[0]], tl.float32) + scale
        return (b_q.to(PAGE_DTYPE),), b_factor, b_factor * 0.0
    else:
        b_x = rotate(b_q, RUN) if is_rotated(SCHEME) else b_q.to(tl.float32)
        b_largest = tl.max(tl.abs(b_x), axis=1)
        b_largest = tl.where(b_largest > 0.0, b_largest, 1.0)
        b_x = (b_x / b_largest[:, None]).to(DTYPE)
        b_factor = b_largest * scale
        b_offset = b_factor * (-zero_of(SCHEME) * tl.sum(b_x.to(tl.float32), axis=1))
        return _weighted(planes_of(b_x, num_planes(SCHEME)), SCHEME), b_factor * step_of(SCHEME, PTX), b_offset


@triton.jit
def _weighted(b_planes, SCHEME: tl.constexpr):
    """Multiply queries of at most 1 by the weights of their planes, which are powers of two."""
    if num_planes(SCHEME) == 2:
        return b_planes
    else:
        return (
            b_planes[0] * weight_of(SCHEME, 0),
            b_planes[1] * weight_of(SCHEME, 1),
            b_planes[2] * weight_of(SCHEME, 2),
            b_planes[3] * weight_of(SCHEME, 3),
        )


@triton.jit
def load_tile(
    p_page, o_row, m_key, ROW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCHEME: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):  # fmt: skip
    """Load a tile of numbers or of words, rows by features or features by rows, and the upper bits of "q6"."""
    PLANES: tl.constexpr = num_planes(SCHEME)
    o_w = tl.arange(0, BLOCK_D // PLANES)
    o_row = o_row[:, None] if ROWS_FIRST else o_row[None, :]
    o_w = o_w[None, :] if ROWS_FIRST else o_w[:, None]
    m_tile = o_w < HEAD_DIM // PLANES
    if not is_rotated(SCHEME):
        # What nobody wrote may stand for NaN. Where any bits are a code, it is enough that its scale is masked.
        m_tile = m_tile & (m_key[:, None] if ROWS_FIRST else m_key[None, :])
    b_words = tl.load(p_page + o_row * ROW + o_w, mask=m_tile, other=0)
    b_upper = b_words
    if SCHEME == "q6":
        # Behind the words of a row there is a byte for each of them.
        p_bytes = p_page.to(tl.pointer_type(tl.uint8), bitcast=True) + HEAD_DIM // 2
        b_upper = tl.load(p_bytes + o_row * (2 * ROW) + o_w, mask=m_tile, other=0).to(tl.int16)
    return b_words, b_upper


@triton.jit
def capped(b_scores, factor, SOFTCAP: tl.constexpr):
    """Cap scores that are still to be multiplied by a factor: SOFTCAP tanh(factor score / SOFTCAP)."""
    # tanh by exp2, which ends in 1 and -1 where it leaves the range; 2.885 is 2 log2(e).
    return SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp2(b_scores * (factor * (2.8853900817779268 / SOFTCAP)))))


@triton.jit
def scores(
    b_q, b_factor, b_offset, p_page, p_scale, o_scale, o_row, m_key, ROW: tl.constexpr, DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCHEME: tl.constexpr, SOFTCAP: tl.constexpr, PTX: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Multiply queries, turned if keys come first, by a tile of keys, and cap the scores if SOFTCAP is not 0: fp32."""
    PLANES: tl.constexpr = num_planes(SCHEME)
    b_words, b_upper = load_tile(p_page, o_row, m_key, ROW, HEAD_DIM, BLOCK_D, SCHEME, KEYS_FIRST)
    b_k = b_words if SCHEME == "plain" else plane(b_words, b_upper, 0, DTYPE, SCHEME, PTX)
    b_scores = _product(b_q[0], b_k, None, KEYS_FIRST)
    for j in tl.static_range(1, PLANES):
        b_scores = _product(b_q[j], plane(b_words, b_upper, j, DTYPE, SCHEME, PTX), b_scores, KEYS_FIRST)
    b_factors = along_queries(b_factor, KEYS_FIRST)
    if is_rotated(SCHEME):
        b_scores = tl.fma(b_scores, b_factors, along_queries(b_offset, KEYS_FIRST))
    else:
        b_scores *= b_factors
    if has_scales(SCHEME):
        b_scores *= along_keys(load_scales(p_scale, o_scale, o_row, m_key), KEYS_FIRST)
    return capped(b_scores, 1.0, SOFTCAP) if SOFTCAP > 0 else b_scores


@triton.jit
def _product(b_queries, b_rows, b_sum, KEYS_FIRST: tl.constexpr):
    """Multiply what belongs to queries with what belongs to keys or values."""
    if KEYS_FIRST:
        return tl.dot(b_rows, b_queries, b_sum, input_precision="ieee")
    else:
        return tl.dot(b_queries, b_rows, b_sum, input_precision="ieee")


@triton.jit
def _added(b_acc, b_decay, b_p, b_rows, KEYS_FIRST: tl.constexpr):
    """Add a product over keys to decayed sums."""
    if KEYS_FIRST:
        # Not in the tensor cores, which cut off what they add: codes that are not centred would drift in long sums.
        b_sum = _product(b_p, b_rows, None, KEYS_FIRST)
        return tl.fma(b_acc, tl.broadcast_to(b_decay, b_acc.shape), b_sum)
    else:
        return _product(b_p, b_rows, b_acc * b_decay, KEYS_FIRST)


@triton.jit
def add_values(
    b_acc, b_decay, b_p, p_page, o_row, m_key, ROW: tl.constexpr, DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCHEME: tl.constexpr, PTX: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Add a tile of values, weighted by b_p, to the decayed sums, a tuple of planes and of the sums of weights."""
    PLANES: tl.constexpr = num_planes(SCHEME)
    b_words, b_upper = load_tile(p_page, o_row, m_key, ROW, HEAD_DIM, BLOCK_D, SCHEME, not KEYS_FIRST)
    b_decay = along_queries(b_decay, KEYS_FIRST)
    if SCHEME == "plain":
        return (_product(b_p.to(b_words.dtype), b_words, b_acc[0] * b_decay, KEYS_FIRST),)
    else:
        b_p = b_p.to(DTYPE)
        b_first = _added(b_acc[0], b_decay, b_p, plane(b_words, b_upper, 0, DTYPE, SCHEME, PTX), KEYS_FIRST)
        b_second = _added(b_acc[1], b_decay, b_p, plane(b_words, b_upper, 1, DTYPE, SCHEME, PTX), KEYS_FIRST)
        if not is_rotated(SCHEME):
            return (b_first, b_second)
        else:
            BLOCK_N: tl.constexpr = b_words.shape[1 if KEYS_FIRST else 0]
            b_ones = tl.full([ONES, BLOCK_N] if KEYS_FIRST else [BLOCK_N, ONES], 1.0, DTYPE)
            b_weights = _added(b_acc[PLANES], b_decay, b_p, b_ones, KEYS_FIRST)
            if PLANES == 2:
                return (b_first, b_second, b_weights)
            else:
                b_third = _added(b_acc[2], b_decay, b_p, plane(b_words, b_upper, 2, DTYPE, SCHEME, PTX), KEYS_FIRST)
                b_fourth = _added(b_acc[3], b_decay, b_p, plane(b_words, b_upper, 3, DTYPE, SCHEME, PTX), KEYS_FIRST)
                return (b_first, b_second, b_third, b_fourth, b_weights)


@triton.jit
def _centred(b_acc, b_zero, SCHEME: tl.constexpr, INDEX: tl.constexpr, PTX: tl.constexpr):
    """Return what the sums of one plane stand for."""
    return b_acc * (step_of(SCHEME, PTX) * weight_of(SCHEME, INDEX)) - b_zero


@triton.jit
def _values_of(b_acc, SCHEME: tl.constexpr, PTX: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Return the planes of sums over values, without what codes have beside them."""
    if not is_rotated(SCHEME):
        return b_acc
    else:
        # The sums of weights are all the same along the axis of ones.
        b_weights = tl.max(b_acc[num_planes(SCHEME)], axis=0 if KEYS_FIRST else 1)
        b_zero = along_queries(b_weights * zero_of(SCHEME), KEYS_FIRST)
        b_0 = _centred(b_acc[0], b_zero, SCHEME, 0, PTX)
        b_1 = _centred(b_acc[1], b_zero, SCHEME, 1, PTX)
        if num_planes(SCHEME) == 2:
            return (b_0, b_1)
        else:
            return (b_0, b_1, _centred(b_acc[2], b_zero, SCHEME, 2, PTX), _centred(b_acc[3], b_zero, SCHEME, 3, PTX))


@triton.jit
def finished(
    b_acc, b_sum, DTYPE: tl.constexpr, RUN: tl.constexpr, HEAD_DIM: tl.constexpr, SCHEME: tl.constexpr,
    PTX: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Divide sums over values by those of the probabilities, and undo the rotation: [M, D] fp32."""
    PLANES: tl.constexpr = num_planes(SCHEME)
    b_out = joined(turned(_values_of(b_acc, SCHEME, PTX, KEYS_FIRST), PLANES, KEYS_FIRST), PLANES)
    if is_rotated(SCHEME):
        if b_out.shape[1] > HEAD_DIM:
            b_out = tl.where(tl.arange(0, b_out.shape[1])[None, :] < HEAD_DIM, b_out, 0.0)
        # The scales are in the sums: divided by the largest number, a row fits fp16 for the rotation.
        b_largest = tl.max(tl.abs(b_out), axis=1)[:, None]
        b_largest = tl.where(b_largest > 0.0, b_largest, 1.0)
        b_out = rotate((b_out / b_largest).to(DTYPE), RUN) * b_largest
    return b_out / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
