"""What a program of attention does with its run of keys: a tile after the other, by an online softmax.

    m' = max(m, max_j s_j),   l' = 2^(m - m') l + sum_j 2^(s_j - m'),   o' = 2^(m - m') o + sum_j 2^(s_j - m') v_j

for the scores s_j of a tile in units of log 2; the result is o / l (Milakov and Gimelshein 2018; Dao et al. 2022).
"""

from __future__ import annotations

import triton
import triton.language as tl

from qinfer.kernels.attention_products import (
    add_values,
    along_keys,
    along_queries,
    finished,
    no_sums,
    prepared,
    scores,
    turned,
)
from qinfer.kernels.kv_tile import has_scales, load_scales, log2_of, num_planes
from qinfer.kernels.overlap import let_next_start

MIN_SCALE = tl.constexpr(2.0**-64)  # that the softmax shifts by; weights stay below 2^64


@triton.jit
def attend(
    b_x, p_k, p_k_scale, p_v, p_v_scale, p_table, b_page, b_tile_start, b_tile_stop, b_first, b_stop, b_own, i_head,
    scale, s_k_page, s_k_head, s_k_scale_page, s_v_page, s_v_head, s_v_scale_page,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, K_SCHEME: tl.constexpr, V_SCHEME: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, RUN: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend to the tiles of a run, and let the next kernel start.

    Args:
        b_x: [M, BLOCK_D] queries.
        p_k: keys of all pages, rows K_ROW apart.
        p_k_scale: their scales, if they are coded.
        p_v: values.
        p_v_scale: their scales.
        p_table: pages of the sequence.
        b_page: that of the first tile.
        b_tile_start: the first tile of the run.
        b_tile_stop: the one behind its last.
        b_first: position of the first query.
        b_stop: position behind the last key.
        b_own: [M] positions of the queries, -1 for a row without one, which sees nothing.
        i_head: KV head.
        scale: softmax scale times log2(e).
        s_k_page: stride of a page of keys.
        s_k_head: of a head of one.
        s_k_scale_page: of a page of their scales.
        s_v_page: the same for values.
        s_v_head: the same.
        s_v_scale_page: the same.
        HEAD_DIM: D.
        PAGE_SIZE: tokens of a page, a multiple of BLOCK_N.
        K_SCHEME: how keys are coded.
        V_SCHEME: how values are.
        K_ROW: numbers or words from one key to the next.
        V_ROW: from one value to the next.
        RUN: features that a codec rotates together.
        WINDOW: newest positions that a query sees; 0: all.
        SOFTCAP: times log2(e); 0: none.
        BLOCK_N: keys of a tile.
        KEYS_FIRST: scores are [keys, queries].
        PTX: whether codes are decoded by PTX.
        OVERLAP: whether kernels overlap.

    Returns:
        b_out [M, BLOCK_D] fp32, divided by its sums; b_max [M], the largest scores; b_sum [M], sums of 2^(s - b_max).
    """
    BLOCK_M: tl.constexpr = b_x.shape[0]
    BLOCK_D: tl.constexpr = b_x.shape[1]
    DTYPE: tl.constexpr = tl.float32 if b_x.dtype == tl.float32 else tl.float16
    b_q, b_factor, b_offset = prepared(b_x, scale, p_k.dtype.element_ty, DTYPE, RUN, K_SCHEME, PTX)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # With few rows, sums over keys meet behind the loop: a tile then has one reduction across warps, not two.
    LATE_SUM: tl.constexpr = BLOCK_M <= 16
    TILE: tl.constexpr = (BLOCK_N, BLOCK_M) if KEYS_FIRST else (BLOCK_M, BLOCK_N)
    b_sum = tl.zeros(TILE if LATE_SUM else [BLOCK_M], tl.float32)
    b_acc = no_sums(BLOCK_M, BLOCK_D, V_SCHEME, KEYS_FIRST)
    b_q = turned(b_q, num_planes(K_SCHEME), KEYS_FIRST)
    KEY_AXIS: tl.constexpr = 0 if KEYS_FIRST else 1
    p_k += i_head.to(tl.int64) * s_k_head
    p_v += i_head.to(tl.int64) * s_v_head
    for i_tile in range(b_tile_start, b_tile_stop):
        b_key = i_tile * BLOCK_N
        # The page of a tile is loaded one round early: as a load within its own round, Triton would give it pipeline
        # stages of its own and leave K and V a single buffer.
        b_next = tl.load(p_table + (b_key + BLOCK_N) // PAGE_SIZE, mask=i_tile + 1 < b_tile_stop, other=0)
        i_page = b_page.to(tl.int64)
        o_row = b_key % PAGE_SIZE + tl.arange(0, BLOCK_N)
        o_key = b_key + tl.arange(0, BLOCK_N)
        # Rows of a page beyond the sequence may hold NaN, and a probability of 0 times NaN is NaN.
        m_key = o_key < b_stop
        b_scores = scores(
            b_q, b_factor, b_offset, p_k + i_page * s_k_page, p_k_scale, i_page * s_k_scale_page + i_head * PAGE_SIZE,
            o_row, m_key, K_ROW, DTYPE, HEAD_DIM, BLOCK_D, K_SCHEME, SOFTCAP, PTX, KEYS_FIRST,
        )  # fmt: skip
        # Every query of a block sees all keys of the tiles in front of its first one.
        if KEYS_FIRST or WINDOW > 0 or b_key + BLOCK_N > b_first + 1:
            m_seen = along_keys(o_key, KEYS_FIRST) <= along_queries(b_own, KEYS_FIRST)
            if WINDOW > 0:
                m_seen = m_seen & (along_keys(o_key, KEYS_FIRST) > along_queries(b_own - WINDOW, KEYS_FIRST))
            b_scores = tl.where(m_seen, b_scores, float("-inf"))
        b_bound = b_scores
        if has_scales(V_SCHEME):
            b_scale = load_scales(p_v_scale, i_page * s_v_scale_page + i_head * PAGE_SIZE, o_row, m_key)
            # Not that of zero, which has no logarithm: where all scales are tiny, sums of weights would be infinite.
            b_bound += along_keys(log2_of(tl.maximum(b_scale, MIN_SCALE)), KEYS_FIRST)
        b_new_max = tl.maximum(b_max, tl.max(b_bound, axis=KEY_AXIS))
        # A row that has seen nothing yet would compute -inf - -inf.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_scores - along_queries(b_shift, KEYS_FIRST))
        b_decay = tl.exp2(b_max - b_shift)
        if LATE_SUM:
            b_sum = b_sum * along_queries(b_decay, KEYS_FIRST) + b_p
        else:
            b_sum = b_sum * b_decay + tl.sum(b_p, axis=KEY_AXIS)
        if has_scales(V_SCHEME):
            b_p *= along_keys(b_scale, KEYS_FIRST)
        b_acc = add_values(
            b_acc, b_decay, b_p, p_v + i_page * s_v_page, o_row, m_key, V_ROW, DTYPE,
            HEAD_DIM, BLOCK_D, V_SCHEME, PTX, KEYS_FIRST,
        )  # fmt: skip
        b_max = b_new_max
        b_page = b_next
    let_next_start(OVERLAP)
    if LATE_SUM:
        b_sum = tl.sum(b_sum, axis=KEY_AXIS)
    return finished(b_acc, b_sum, DTYPE, RUN, HEAD_DIM, V_SCHEME, PTX, KEYS_FIRST), b_max, b_sum
