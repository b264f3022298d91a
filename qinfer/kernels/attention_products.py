"""The two products of the attention kernel, for pages in any codec: queries by keys, and probabilities by values.

Coded rows are decoded in registers, a tile at a time and a plane after the other (`kv_tile.py`): codes become exact fp16
integers, and the scale of a key multiplies its scores. The scale of a value multiplies its probability. So that the
product of both fits fp16, the softmax shifts by the largest sum of a score and the exponent of its value's scale; sums
then are what they are, whatever the scales. Scores are in units of log 2, as the softmax takes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qinfer.kernels.kv_tile import has_scales, is_rotated, join_pairs, load_scales, num_planes, plane, rotate, split_pairs


@triton.jit
def planes_of(b_x, PLANES: tl.constexpr):
    """Split columns [M, D] into planes, a tuple of [M, D / PLANES]: plane j has columns j, j + PLANES, …"""
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
def no_sums(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PLANES: tl.constexpr):
    """Return a tuple of [BLOCK_M, BLOCK_D / PLANES] zeros, one for each plane."""
    b_zero = tl.zeros([BLOCK_M, BLOCK_D // PLANES], tl.float32)
    if PLANES == 1:
        return (b_zero,)
    elif PLANES == 2:
        return (b_zero, b_zero)
    else:
        return (b_zero, b_zero, b_zero, b_zero)


@triton.jit
def prepared(b_q, scale, PAGE_DTYPE: tl.constexpr, DTYPE: tl.constexpr, RUN: tl.constexpr, SCHEME: tl.constexpr):
    """Return the planes of queries [M, D] as the product over keys takes them, and the factor of scores."""
    if SCHEME == "plain":
        return (b_q.to(PAGE_DTYPE),), scale
    else:
        b_x = rotate(b_q, RUN) if is_rotated(SCHEME) else b_q.to(tl.float32)
        b_largest = tl.max(tl.abs(b_x), axis=1)[:, None]
        b_largest = tl.where(b_largest > 0.0, b_largest, 1.0)
        return planes_of((b_x / b_largest).to(DTYPE), num_planes(SCHEME)), b_largest * scale


@triton.jit
def _load_upper(p_page, o_row, o_word, s_row, mask, HEAD_DIM: tl.constexpr):
    """Load the bytes behind the words of a "q6" row, one for each word."""
    p_bytes = p_page.to(tl.pointer_type(tl.uint8), bitcast=True) + HEAD_DIM // 2
    return tl.load(p_bytes + o_row * (2 * s_row) + o_word, mask=mask, other=0).to(tl.int16)


@triton.jit
def scores(
    b_q, b_factor, p_page, p_scale, o_scale, o_row, m_key, s_row, DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCHEME: tl.constexpr, SOFTCAP: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Multiply queries by a tile of keys, and cap the scores if SOFTCAP is not 0: [M, N] fp32."""
    PLANES: tl.constexpr = num_planes(SCHEME)
    o_w = tl.arange(0, BLOCK_D // PLANES)[:, None]
    m_k = m_key[None, :] & (o_w < HEAD_DIM // PLANES)
    b_k = tl.load(p_page + o_row[None, :] * s_row + o_w, mask=m_k, other=0)
    if SCHEME == "plain":
        b_scores = tl.dot(b_q[0], b_k, input_precision="ieee")
    else:
        b_upper = b_k
        if SCHEME == "q6":
            b_upper = _load_upper(p_page, o_row[None, :], o_w, s_row, m_k, HEAD_DIM)
        b_scores = tl.dot(b_q[0], plane(b_k, b_upper, 0, DTYPE, SCHEME, PTX), input_precision="ieee")
        for j in tl.static_range(1, PLANES):
            b_scores = tl.dot(b_q[j], plane(b_k, b_upper, j, DTYPE, SCHEME, PTX), b_scores, input_precision="ieee")
        if has_scales(SCHEME):
            b_scores *= load_scales(p_scale, o_scale + o_row, m_key)[None, :]
    b_scores *= b_factor
    if SOFTCAP > 0:
        # tanh by exp2, which ends in 1 and -1 where it leaves the range; 2.885 is 2 log2(e).
        b_scores = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp2(b_scores * (2.8853900817779268 / SOFTCAP))))
    return b_scores


@triton.jit
def add_values(
    b_acc, b_decay, b_p, p_page, o_row, m_key, s_row, DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCHEME: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Add a tile of values, weighted by b_p [M, N], to the decayed sums, a tuple of planes."""
    PLANES: tl.constexpr = num_planes(SCHEME)
    o_w = tl.arange(0, BLOCK_D // PLANES)[None, :]
    m_v = m_key[:, None] & (o_w < HEAD_DIM // PLANES)
    b_v = tl.load(p_page + o_row[:, None] * s_row + o_w, mask=m_v, other=0)
    if SCHEME == "plain":
        return (tl.dot(b_p.to(b_v.dtype), b_v, b_acc[0] * b_decay[:, None], input_precision="ieee"),)
    else:
        b_upper = b_v
        if SCHEME == "q6":
            b_upper = _load_upper(p_page, o_row[:, None], o_w, s_row, m_v, HEAD_DIM)
        b_p = b_p.to(DTYPE)
        b_first = _add_plane(b_acc[0], b_decay, b_p, b_v, b_upper, 0, DTYPE, SCHEME, PTX)
        b_second = _add_plane(b_acc[1], b_decay, b_p, b_v, b_upper, 1, DTYPE, SCHEME, PTX)
        if PLANES == 2:
            return (b_first, b_second)
        else:
            b_third = _add_plane(b_acc[2], b_decay, b_p, b_v, b_upper, 2, DTYPE, SCHEME, PTX)
            b_fourth = _add_plane(b_acc[3], b_decay, b_p, b_v, b_upper, 3, DTYPE, SCHEME, PTX)
            return (b_first, b_second, b_third, b_fourth)


@triton.jit
def _add_plane(
    b_acc, b_decay, b_p, b_words, b_upper, INDEX: tl.constexpr, DTYPE: tl.constexpr, SCHEME: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    b_v = plane(b_words, b_upper, INDEX, DTYPE, SCHEME, PTX)
    return tl.dot(b_p, b_v, b_acc * b_decay[:, None], input_precision="ieee")
