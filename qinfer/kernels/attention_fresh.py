"""Queries of decode, turned where attention needs them, and the row of keys and values that each token brings along.

Every program of attention adds up the parts of its own queries, normalizes and turns them, as `rope_write` does
(`kv_write.py`); the one whose run ends with the sequence writes the new row first. So a step of a few sequences needs
no launch in between. Each feature is read once, and the two of a pair meet in registers: here many programs turn the
same queries, and reading them twice takes longer than the launch that is saved (benchmarks/LOG.md).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.parts import load_sum


class Fresh(NamedTuple):
    """What the tokens of a step are made of in which every sequence has one."""

    arguments: tuple[Tensor | float | int | None, ...]  # in the order of `fresh_queries`
    num_parts: int
    interleaved: bool


@triton.jit
def _turned_once(
    p_x, part_stride, m_x, b_cos, b_sin, p_weight, eps, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):  # fmt: skip
    """Add up rows from p_x [M, 1], normalize them if there is a weight, and turn them by one angle per pair: [M, D]."""
    o_pair = tl.arange(0, HALF)[None, :]
    o_first = 2 * o_pair if INTERLEAVED else o_pair
    o_second = 2 * o_pair + 1 if INTERLEAVED else HALF + o_pair
    b_first = load_sum(p_x + o_first, part_stride, m_x, NUM_PARTS)
    b_second = load_sum(p_x + o_second, part_stride, m_x, NUM_PARTS)
    if p_weight is not None:
        b_squares = tl.sum(b_first * b_first, axis=1) + tl.sum(b_second * b_second, axis=1)
        b_factor = tl.rsqrt(b_squares / (2 * HALF) + eps)[:, None]
        b_first *= b_factor * tl.load(p_weight + o_first).to(tl.float32)
        b_second *= b_factor * tl.load(p_weight + o_second).to(tl.float32)
    b_pairs = tl.join(b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin)
    if not INTERLEAVED:
        b_pairs = tl.permute(b_pairs, (0, 2, 1))
    return tl.reshape(b_pairs, (b_first.shape[0], 2 * HALF))


@triton.jit
def place_of(fresh, i_seq, HALF: tl.constexpr):
    """Return where a token goes, and cosines and sines of its angles: nothing that the step before it writes."""
    p_cos, p_sin, p_positions, p_slots, s_cos, s_sin = fresh[2], fresh[3], fresh[4], fresh[5], fresh[10], fresh[11]
    o_pair = tl.arange(0, HALF)[None, :]
    i_position = tl.load(p_positions + i_seq).to(tl.int64)
    b_cos, b_sin = tl.load(p_cos + i_position * s_cos + o_pair), tl.load(p_sin + i_position * s_sin + o_pair)
    return tl.load(p_slots + i_seq).to(tl.int64), b_cos, b_sin


@triton.jit
def fresh_queries(
    p_q, fresh, place, p_k, p_v, i_seq, i_head, o_head, m_row, is_last,
    s_token, s_head, s_k_page, s_k_head, s_v_page, s_v_head,
    PAGE_SIZE: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    NUM_PARTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Write a token's key and value if the run of this program is the last, and return its queries [M, D] in DTYPE.

    Args:
        p_q: parts of the queries, heads s_head apart.
        fresh: parts of keys and values, cosines, sines, positions and slots of the tokens, weights of the norm of
            queries and of keys or None, eps, and the strides of parts, cosines and sines.
        place: what `place_of` returned.
        p_k: plain keys of all pages.
        p_v: values.
        i_seq: the sequence, which is the token.
        i_head: KV head.
        o_head: [M] query heads.
        m_row: [M] those that there are.
        is_last: whether the run ends with the sequence.
        s_token: stride of a token of the parts.
        s_head: of a head.
        s_k_page: of a page of keys.
        s_k_head: of a head of one.
        s_v_page: the same for values.
        s_v_head: the same.
        PAGE_SIZE: tokens of a page.
        K_ROW: from one key to the next.
        V_ROW: from one value to the next.
        HALF: pairs of a head, all of whose features turn.
        INTERLEAVED: pairs are neighbours.
        NUM_PARTS: of the product.
        DTYPE: to which everything is rounded.
    """
    p_k_new, p_v_new, p_q_weight, p_k_weight, eps, s_part = fresh[0], fresh[1], fresh[6], fresh[7], fresh[8], fresh[9]
    i_slot, b_cos, b_sin = place
    i_t, i_g = i_seq.to(tl.int64), i_head.to(tl.int64)
    if is_last & (i_slot >= 0):
        o_d = tl.arange(0, 2 * HALF)[None, :]
        m_new = tl.full([1, 1], True, tl.int1)
        o_new = i_t * s_token + i_g * s_head + tl.zeros([1, 1], tl.int64)
        b_k = _turned_once(p_k_new + o_new, s_part, m_new, b_cos, b_sin, p_k_weight, eps, HALF, INTERLEAVED, NUM_PARTS)
        b_v = load_sum(p_v_new + o_new + o_d, s_part, m_new, NUM_PARTS)
        i_page, i_row = i_slot // PAGE_SIZE, i_slot % PAGE_SIZE
        tl.store(p_k + i_page * s_k_page + i_g * s_k_head + i_row * K_ROW + o_d, b_k.to(DTYPE))
        tl.store(p_v + i_page * s_v_page + i_g * s_v_head + i_row * V_ROW + o_d, b_v.to(DTYPE))
        # The loads of other threads come behind it.
        tl.debug_barrier()
    p_rows = p_q + i_t * s_token + o_head.to(tl.int64)[:, None] * s_head
    b_q = _turned_once(p_rows, s_part, m_row[:, None], b_cos, b_sin, p_q_weight, eps, HALF, INTERLEAVED, NUM_PARTS)
    return b_q.to(DTYPE)
