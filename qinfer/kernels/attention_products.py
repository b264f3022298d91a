"""The two products of the attention kernel, for pages in any codec: queries by keys, and probabilities by values.

Coded rows are decoded in registers, a tile at a time: codes become exact fp16 integers, the scale of a key multiplies
its scores, and the scale of a value its probabilities. Scores are in units of log 2, as the softmax takes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qinfer.kernels.kv_tile import has_scales, is_packed, is_rotated, load_rows, rotate, split_pairs


@triton.jit
def prepared(b_q, scale, PAGE_DTYPE: tl.constexpr, DTYPE: tl.constexpr, RUN: tl.constexpr, SCHEME: tl.constexpr):
    """Return queries as the product over keys takes them, [M, D] or twice [M, D / 2], and the factor of scores."""
    if SCHEME == "plain":
        b_even = b_q.to(PAGE_DTYPE)
        b_odd, b_factor = b_even, scale
    else:
        b_x = b_q.to(tl.float32)
        if is_rotated(SCHEME):
            b_x = rotate(b_q, RUN)
        b_largest = tl.max(tl.abs(b_x), axis=1)[:, None]
        b_largest = tl.where(b_largest > 0.0, b_largest, 1.0)
        b_even = (b_x / b_largest).to(DTYPE)
        b_odd, b_factor = b_even, b_largest * scale
        if is_packed(SCHEME):
            b_even, b_odd = split_pairs(b_even)
    return b_even, b_odd, b_factor


@triton.jit
def scores(
    b_even, b_odd, b_factor, p_k_page, p_scale, o_scale, o_row, m_key, s_row, DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCHEME: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Multiply queries by a tile of keys, and cap the scores if SOFTCAP is not 0: [M, N] fp32."""
    if SCHEME == "plain":
        o_d = tl.arange(0, BLOCK_D)
        p_k_tile = p_k_page + o_row[None, :] * s_row + o_d[:, None]
        b_k = tl.load(p_k_tile, mask=m_key[None, :] & (o_d < HEAD_DIM)[:, None], other=0.0)
        b_scores = tl.dot(b_even, b_k, input_precision="ieee")
    else:
        b_k, b_k_odd = load_rows(p_k_page + o_row * s_row, m_key, DTYPE, HEAD_DIM, BLOCK_D, SCHEME)
        b_scores = tl.dot(b_even, tl.trans(b_k), input_precision="ieee")
        if is_packed(SCHEME):
            b_scores = tl.dot(b_odd, tl.trans(b_k_odd), b_scores, input_precision="ieee")
        if has_scales(SCHEME):
            b_scores *= tl.load(p_scale + o_scale + o_row, mask=m_key, other=0.0).to(tl.float32)[None, :]
    b_scores *= b_factor
    if SOFTCAP > 0:
        # tanh by exp2, which ends in 1 and -1 where it leaves the range; 2.885 is 2 log2(e).
        b_scores = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp2(b_scores * (2.8853900817779268 / SOFTCAP))))
    return b_scores


@triton.jit
def add_values(
    b_acc, b_acc_odd, b_unit, b_decay, b_p, p_v_page, p_scale, o_scale, o_row, m_key, s_row, DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SCHEME: tl.constexpr,
):  # fmt: skip
    """Add a tile of values, weighted by b_p, to the decayed sums, which are in units of the largest scale so far."""
    if has_scales(SCHEME):
        b_scale = tl.load(p_scale + o_scale + o_row, mask=m_key, other=0.0).to(tl.float32)
        b_new_unit = tl.maximum(b_unit, tl.max(b_scale, axis=0))
        b_inverse = 1.0 / tl.where(b_new_unit > 0.0, b_new_unit, 1.0)
        b_p = b_p * (b_scale * b_inverse)[None, :]
        b_decay = b_decay * (b_unit * b_inverse)
        b_unit = b_new_unit
    b_acc = b_acc * b_decay[:, None]
    if SCHEME == "plain":
        o_d = tl.arange(0, BLOCK_D)
        p_v_tile = p_v_page + o_row[:, None] * s_row + o_d[None, :]
        b_v = tl.load(p_v_tile, mask=m_key[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    else:
        b_v, b_v_odd = load_rows(p_v_page + o_row * s_row, m_key, DTYPE, HEAD_DIM, BLOCK_D, SCHEME)
        b_p = b_p.to(DTYPE)
        b_acc = tl.dot(b_p, b_v, b_acc, input_precision="ieee")
        if is_packed(SCHEME):
            b_acc_odd = tl.dot(b_p, b_v_odd, b_acc_odd * b_decay[:, None], input_precision="ieee")
    return b_acc, b_acc_odd, b_unit
