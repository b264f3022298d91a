"""Attention of prompts on Hopper, in Gluon: two warpgroups take turns at the tensor cores, a third one fetches.

The mathematics, the blocks of queries and the runs of keys are those of `attention.py`, over pages of 16 bits. A block
has 128 rows of queries, 64 for each of two warpgroups, which walk over the tiles of keys from the last to the first. A
warpgroup multiplies its queries by the keys of the next tile and the weights of the last one by their values, and then
computes its softmax, 64 exponentials in a thread, while the tensor cores work for the other one: nothing makes the two
wait for each other. (Within a warpgroup the softmax could run beside the product with values, too. ptxas waits for both
products together, whatever PTX says.)

A third warpgroup with few registers fetches the tiles into a ring of keys and one of values. A barrier of each tile
tells when it is there, counted by the copies themselves, and one when both others are done with it. What one proxy has
written and the other reads, `wgmma`, is fenced by the readers.

Weights travel from one turn to the next as pairs in 32 bits: carried one by one, they would be taken apart and put
together in between.

Limits, which `is_prompt` and `takes_prompt` see to: sm_90; keys, values and queries in 16 bits, keys and values in one
format; D at most 256 and a multiple of 8; pages of a multiple of 64 tokens; more than 64 rows of queries; a positive
scale. The runs of keys depend on the step, so `invariant=True` goes without. Interpreters do not know Gluon; GPU tests
hold it against the reference.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qinfer.kernels.attention_blocks import MAX_HEAD_DIM, Places, Wanted, find_queries, run_of_tiles
from qinfer.kernels.attention_products import capped
from qinfer.kernels.attention_reduce import add_runs, room_for_runs
from qinfer.kernels.attention_tiles import choose_splits
from qinfer.kernels.device import arch
from qinfer.kernels.gather import inverse
from qinfer.kernels.kv_codec import KVPages
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs
from qinfer.kernels.tiles import WGMMA
from qinfer.kernels.wgmma_rings import copy_to_shared

BLOCK_M = gl.constexpr(128)  # rows of queries: tokens times the query heads of a KV head
STAGES = gl.constexpr(2)
FEW_ROWS = 64  # up to here smaller tiles waste less
MIN_PAGE = 64  # the smaller of two tiles of keys, each of which lies in one page
_ROWS = gl.constexpr(64)  # of a warpgroup
_WARPS = gl.constexpr(4)
_FETCHING = gl.constexpr(32 * 4)  # threads


@gluon.constexpr_function
def _sums(columns):
    """Return the layout of a warpgroup's scores or sums, [64, columns]."""
    return gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, columns, 16])


@gluon.constexpr_function
def _copies(columns):
    """Return the layout of rows of so many numbers, 16 bytes to a thread."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [_WARPS, 1], [1, 0])


@gluon.constexpr_function
def _stores():
    """Return the layout of results of any width.

    It is another one than that of queries, so that the compiler does not keep where their rows are across the loop.
    """
    return gl.BlockedLayout([1, 8], [4, 8], [_WARPS, 1], [1, 0])


@gluon.jit
def _pack(b_weights, DTYPE: gl.constexpr):
    """Round weights [M, N] fp32 to 16 bits, a column and the next one in a word: [M, N / 2] int32."""
    b_even, b_odd = gl.split(gl.reshape(b_weights, (b_weights.shape[0], b_weights.shape[1] // 2, 2)))
    ROUND: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;" if DTYPE.is_fp16() else "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(ROUND, "=r,f,f", [b_even, b_odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _unpack(b_words, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Undo `_pack`: the operand [M, N] of a product in DTYPE. Nothing moves but the names of registers."""
    b_even, b_odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [b_words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    b_weights = gl.reshape(gl.join(b_even, b_odd), (b_words.shape[0], b_words.shape[1] * 2))
    return gl.convert_layout(b_weights.to(DTYPE, bitcast=True), LAYOUT, assert_trivial=True)


@gluon.jit
def _softmax(
    b_scores, b_max, b_sum, b_own, first_key, scale,
    MASKED: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Take a tile of scores into the softmax; return its weights, and how much those of the tiles before count now."""
    BLOCK_N: gl.constexpr = b_scores.shape[1]
    if SOFTCAP > 0:
        b_scores = capped(b_scores, scale, SOFTCAP)
        scale = 1.0
    if MASKED:
        # Of keys the numbers within the tile, which the compiler knows.
        o_key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, b_scores.type.layout))[None, :]
        b_last = (b_own - first_key)[:, None]
        m_seen = o_key <= b_last
        if WINDOW > 0:
            m_seen = m_seen & (o_key > b_last - WINDOW)
        b_scores = gl.where(m_seen, b_scores, float("-inf"))
    b_new_max = gl.maximum(b_max, gl.max(b_scores, axis=1))
    b_shift = b_new_max * scale
    if MASKED:
        # A row that has seen nothing yet would compute -inf - -inf.
        b_shift = gl.where(b_new_max == float("-inf"), 0.0, b_shift)
    b_weights = gl.exp2(b_scores * scale - b_shift[:, None])
    b_decay = gl.exp2(b_max * scale - b_shift)
    return _pack(b_weights, DTYPE), b_new_max, b_sum * b_decay + gl.sum(b_weights, axis=1), b_decay


@gluon.jit
def _rows_of(part, i_head, b_start, b_num, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the query, the token and the head of each of a warpgroup's rows, and whether there is such a query."""
    o_m = part * _ROWS + gl.arange(0, _ROWS, LAYOUT)
    o_query = o_m // GROUP
    m_row = (o_query < BLOCK_M // GROUP) & (o_query < b_num)
    return o_query, (b_start + o_query).to(gl.int64), i_head * GROUP + o_m % GROUP, m_row


@gluon.jit
def _fetch(
    rings, pages, p_table, b_tile_start, b_tile_stop, b_stop,
    HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
):  # fmt: skip
    """Fetch the tiles of keys and values, from the last to the first: what the third warpgroup does."""
    s_k, s_v, k_there, k_done, v_there, v_done = rings
    p_k, p_v, s_k_page, s_v_page = pages
    BLOCK_N: gl.constexpr = s_k.shape[1]
    BLOCK_D: gl.constexpr = s_k.shape[2]
    COPY: gl.constexpr = _copies(BLOCK_D)
    o_row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, COPY))[:, None]
    o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, COPY))[None, :]
    m_d = o_d < HEAD_DIM
    o_keys, o_values = o_row * K_ROW + o_d, o_row * V_ROW + o_d
    num_tiles = b_tile_stop - b_tile_start
    b_page = gl.load(p_table + (b_tile_stop - 1) * BLOCK_N // PAGE_SIZE, mask=num_tiles > 0, other=0)
    for i in range(num_tiles):
        first_key = (b_tile_stop - 1 - i) * BLOCK_N
        slot, phase = i % STAGES, i // STAGES & 1
        b_next = gl.load(p_table + (first_key - BLOCK_N) // PAGE_SIZE, mask=i + 1 < num_tiles, other=0)
        i_page, first_row = b_page.to(gl.int64), first_key % PAGE_SIZE
        mbarrier.wait(k_done.index(slot), phase ^ 1)
        p_keys = p_k + (i_page * s_k_page + first_row * K_ROW) + o_keys
        if HEAD_DIM == BLOCK_D:
            copy_to_shared(s_k.index(slot), p_keys)
        else:
            copy_to_shared(s_k.index(slot), p_keys, mask=m_d)
        async_copy.mbarrier_arrive(k_there.index(slot), increment_count=False)
        mbarrier.wait(v_done.index(slot), phase ^ 1)
        # Rows of a page beyond the sequence may hold NaN, and a weight of 0 times NaN is NaN.
        p_values = p_v + (i_page * s_v_page + first_row * V_ROW) + o_values
        copy_to_shared(s_v.index(slot), p_values, mask=m_d & (first_key + o_row < b_stop))
        async_copy.mbarrier_arrive(v_there.index(slot), increment_count=False)
        b_page = b_next


@gluon.jit
def _turn(
    s_q, rings, i, b_tile_stop, b_scores, b_words, b_acc, b_max, b_sum, b_own, scale,
    MASKED: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Add the values of tile i - 1, and take the scores of tile i, counted from the last, into the softmax."""
    s_k, s_v, k_there, k_done, v_there, v_done = rings
    DTYPE: gl.constexpr = s_k.dtype
    BLOCK_N: gl.constexpr = s_k.shape[1]
    k_slot, v_slot = i % STAGES, (i - 1) % STAGES
    mbarrier.wait(k_there.index(k_slot), i // STAGES & 1)
    fence_async_shared()
    b_scores = warpgroup_mma(s_q, s_k.index(k_slot).permute((1, 0)), b_scores, use_acc=False, is_async=True)
    mbarrier.wait(v_there.index(v_slot), (i - 1) // STAGES & 1)
    fence_async_shared()
    b_weights = _unpack(b_words, DTYPE, gl.DotOperandLayout(0, b_acc.type.layout, 2))
    b_acc = warpgroup_mma(b_weights, s_v.index(v_slot), b_acc, is_async=True)
    b_scores = warpgroup_mma_wait(1, deps=[b_scores])
    mbarrier.arrive(k_done.index(k_slot), count=1)
    b_words, b_max, b_sum, b_decay = _softmax(
        b_scores, b_max, b_sum, b_own, (b_tile_stop - 1 - i) * BLOCK_N, scale, MASKED, WINDOW, SOFTCAP, DTYPE
    )
    b_acc, b_weights = warpgroup_mma_wait(0, deps=[b_acc, b_weights])
    mbarrier.arrive(v_done.index(v_slot), count=1)
    b_decay = gl.convert_layout(b_decay, gl.SliceLayout(1, b_acc.type.layout), assert_trivial=True)
    return b_scores, b_words, b_acc * b_decay[:, None], b_max, b_sum


@gluon.jit
def _walk(
    s_q, rings, b_own, b_first, b_tile_start, b_tile_stop, scale,
    BLOCK_Q: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Attend to all tiles; return sums over values [64, BLOCK_D], and the largest score and the softmax sum of rows."""
    s_k, s_v, k_there, k_done, v_there = rings[0], rings[1], rings[2], rings[3], rings[4]
    DTYPE: gl.constexpr = s_k.dtype
    BLOCK_N: gl.constexpr = s_k.shape[1]
    BLOCK_D: gl.constexpr = s_k.shape[2]
    SCORES: gl.constexpr = _sums(BLOCK_N)
    SUMS: gl.constexpr = _sums(BLOCK_D)
    b_max = gl.full([_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    b_sum = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    b_acc = gl.zeros([_ROWS, BLOCK_D], gl.float32, SUMS)
    num_tiles = b_tile_stop - b_tile_start
    if num_tiles > 0:
        b_scores = gl.zeros([_ROWS, BLOCK_N], gl.float32, SCORES)
        mbarrier.wait(k_there.index(0), 0)
        fence_async_shared()
        b_scores = warpgroup_mma(s_q, s_k.index(0).permute((1, 0)), b_scores, use_acc=False, is_async=True)
        b_scores = warpgroup_mma_wait(0, deps=[b_scores])
        mbarrier.arrive(k_done.index(0), count=1)
        b_words, b_max, b_sum, _decay = _softmax(
            b_scores, b_max, b_sum, b_own, (b_tile_stop - 1) * BLOCK_N, scale, True, WINDOW, SOFTCAP, DTYPE
        )
        # Tiles that some query does not see all of: the last ones and, with a window, the first.
        late = gl.maximum(gl.minimum(b_tile_stop - (b_first + 1) // BLOCK_N, num_tiles), 1)
        early = num_tiles
        if WINDOW > 0:
            first_seen = (gl.maximum(b_first + BLOCK_Q - WINDOW, 0) + BLOCK_N - 1) // BLOCK_N
            early = gl.maximum(gl.minimum(b_tile_stop - first_seen, num_tiles), late)
        for i in range(1, late):
            b_scores, b_words, b_acc, b_max, b_sum = _turn(
                s_q, rings, i, b_tile_stop, b_scores, b_words, b_acc, b_max, b_sum, b_own, scale, True, WINDOW, SOFTCAP
            )
        for i in range(late, early):
            b_scores, b_words, b_acc, b_max, b_sum = _turn(
                s_q, rings, i, b_tile_stop, b_scores, b_words, b_acc, b_max, b_sum, b_own, scale, False, WINDOW, SOFTCAP
            )
        if WINDOW > 0:
            for i in range(early, num_tiles):
                b_scores, b_words, b_acc, b_max, b_sum = _turn(
                    s_q, rings, i, b_tile_stop, b_scores, b_words, b_acc, b_max, b_sum, b_own, scale,
                    True, WINDOW, SOFTCAP,
                )  # fmt: skip
        slot, phase = (num_tiles - 1) % STAGES, (num_tiles - 1) // STAGES & 1
        mbarrier.wait(v_there.index(slot), phase)
        fence_async_shared()
        b_weights = _unpack(b_words, DTYPE, gl.DotOperandLayout(0, SUMS, 2))
        b_acc = warpgroup_mma(b_weights, s_v.index(slot), b_acc, is_async=True)
        b_acc, b_weights = warpgroup_mma_wait(0, deps=[b_acc, b_weights])
    return b_acc, b_max, b_sum


@gluon.jit
def _attend(
    part, s_q, rings, queries, outputs, place, tiles, scale,
    GROUP: gl.constexpr, NUM_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
    IS_SPLIT: gl.constexpr, HAS_ORDER: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """Attend with half of a block's rows: what the first two warpgroups do."""
    p_q, s_q_token, s_q_head = queries
    p_out, p_inverse, p_parts, p_lse = outputs
    i_head, b_start, b_num, b_first = place
    b_tile_start, b_tile_stop, i_split, num_splits = tiles
    DTYPE: gl.constexpr = s_q.dtype
    BLOCK_D: gl.constexpr = s_q.shape[1]
    COPY: gl.constexpr = _copies(BLOCK_D)
    SUMS: gl.constexpr = _sums(BLOCK_D)
    o_query, o_token, o_head, m_row = _rows_of(part, i_head, b_start, b_num, GROUP, gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, COPY))[None, :]
    m_q = m_row[:, None] & (o_d < HEAD_DIM)
    p_queries = p_q + o_token * s_q_token + o_head.to(gl.int64) * s_q_head
    s_q.store(gl.load(p_queries[:, None] + o_d, mask=m_q, other=0.0).to(DTYPE))
    fence_async_shared()

    SCORED: gl.constexpr = gl.SliceLayout(1, _sums(rings[0].shape[1]))
    o_query, _, _, m_own = _rows_of(part, i_head, b_start, b_num, GROUP, SCORED)
    # A row without a query sees nothing.
    b_own = gl.where(m_own, b_first + o_query, -1)
    b_acc, b_max, b_sum = _walk(
        s_q, rings, b_own, b_first, b_tile_start, b_tile_stop, scale, BLOCK_M // GROUP, WINDOW, SOFTCAP
    )
    let_next_start(OVERLAP)
    b_sum = gl.where(b_sum > 0.0, b_sum, 1.0)
    b_out = b_acc / gl.convert_layout(b_sum, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
    if IS_SPLIT:
        _, o_token, o_head, m_row = _rows_of(part, i_head, b_start, b_num, GROUP, gl.SliceLayout(1, SUMS))
        o_part = (o_token * NUM_HEADS + o_head) * num_splits + i_split
        o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, SUMS))[None, :]
        m_part = m_row[:, None] & (o_d < HEAD_DIM) & (b_tile_start < b_tile_stop)  # else it is not read
        gl.store(p_parts + o_part[:, None] * HEAD_DIM + o_d, b_out, mask=m_part)
        b_lse = b_max * (1.0 if SOFTCAP > 0 else scale) + gl.log2(b_sum)
        gl.store(p_lse + gl.convert_layout(o_part, SCORED, assert_trivial=True), b_lse, mask=m_own)
    else:
        # Through shared memory, so that a thread has numbers that stand beside each other.
        OUT: gl.constexpr = p_out.dtype.element_ty
        STORE: gl.constexpr = _stores()
        s_q.store(b_out.to(OUT).to(DTYPE, bitcast=True))
        _, o_token, o_head, m_row = _rows_of(part, i_head, b_start, b_num, GROUP, gl.SliceLayout(1, STORE))
        o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, STORE))[None, :]
        m_out = m_row[:, None] & (o_d < HEAD_DIM)
        o_feature = o_head[:, None] * HEAD_DIM + o_d
        if HAS_ORDER:
            o_feature = gl.load(p_inverse + o_feature, mask=m_out, other=0)
        b_y = s_q.load(STORE).to(OUT, bitcast=True)
        gl.store(p_out + o_token[:, None] * (NUM_HEADS * HEAD_DIM) + o_feature, b_y, mask=m_out)


# As in `attention.py`, what changes from step to step is not specialized.
@gluon.jit(
    do_not_specialize=["s_table", "num_seqs", "search_steps"],
    do_not_specialize_on_alignment=["p_table", "p_starts", "p_lens"],
)
def _prompt_attention_kernel(
    p_q, p_k, p_v, p_table, p_starts, p_lens, p_roles, p_inverse,
    p_out,  # [T, H * D], in the order of p_inverse
    p_parts,  # [T, H, runs, D] fp32, if there are several
    p_lse,  # [T, H, runs] fp32
    scale,  # softmax scale times log2(e)
    s_q_token, s_q_head, s_k_page, s_k_head, s_v_page, s_v_head, s_table, num_seqs, search_steps,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr,
    K_ROW: gl.constexpr, V_ROW: gl.constexpr,
    WINDOW: gl.constexpr,  # 0: none
    SOFTCAP: gl.constexpr,  # times log2(e); 0: none
    IS_SPLIT: gl.constexpr, HAS_ORDER: gl.constexpr, ROLE: gl.constexpr, FEW: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = p_k.dtype.element_ty
    if p_roles is not None:
        wait_for_inputs(OVERLAP)
    # Later queries see more keys: starting with them leaves the short programs to fill the last wave.
    i_block, i_head, i_split = gl.num_programs(0) - 1 - gl.program_id(0), gl.program_id(1), gl.program_id(2)
    i_seq, b_start, b_num, b_first, b_stop = find_queries(
        p_starts, p_lens, i_block, num_seqs, search_steps, BLOCK_M // GROUP, False, p_roles, ROLE, FEW
    )
    # The grid has room for a block more of every sequence. Those without queries end before memory is set up.
    if b_num <= 0:
        wait_for_inputs(OVERLAP)
        return
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    s_q0 = gl.allocate_shared_memory(DTYPE, [_ROWS, BLOCK_D], TILE)
    s_q1 = gl.allocate_shared_memory(DTYPE, [_ROWS, BLOCK_D], TILE)
    s_k = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_D], TILE)
    s_v = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_D], TILE)
    k_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_there.index(i), count=_FETCHING)
        mbarrier.init(v_there.index(i), count=_FETCHING)
        mbarrier.init(k_done.index(i), count=2)
        mbarrier.init(v_done.index(i), count=2)
    fence_async_shared()
    b_tile_start, b_tile_stop, num_splits = run_of_tiles(
        b_first, b_stop, i_split, gl.num_programs(2), 1, BLOCK_N, WINDOW, False
    )
    pages = (p_k + i_head.to(gl.int64) * s_k_head, p_v + i_head.to(gl.int64) * s_v_head, s_k_page, s_v_page)
    p_table += i_seq.to(gl.int64) * s_table
    rings = (s_k, s_v, k_there, k_done, v_there, v_done)
    queries, outputs = (p_q, s_q_token, s_q_head), (p_out, p_inverse, p_parts, p_lse)
    place, tiles = (i_head, b_start, b_num, b_first), (b_tile_start, b_tile_stop, i_split, num_splits)
    # Where the tokens stand is written before the first kernel of a step, which overlaps with nothing in front of it.
    wait_for_inputs(OVERLAP)
    gl.warp_specialize(
        [
            (_attend, (
                0, s_q0, rings, queries, outputs, place, tiles, scale,
                GROUP, NUM_HEADS, HEAD_DIM, WINDOW, SOFTCAP, IS_SPLIT, HAS_ORDER, OVERLAP,
            )),
            (_attend, (
                1, s_q1, rings, queries, outputs, place, tiles, scale,
                GROUP, NUM_HEADS, HEAD_DIM, WINDOW, SOFTCAP, IS_SPLIT, HAS_ORDER, OVERLAP,
            )),
            (_fetch, (rings, pages, p_table, b_tile_start, b_tile_stop, b_stop, HEAD_DIM, PAGE_SIZE, K_ROW, V_ROW)),
        ],
        [_WARPS, _WARPS],
        [224, 56],  # of the 504 registers that three warpgroups have; the first one gets what is left
    )  # fmt: skip


def is_prompt(q: Tensor, num_kv_heads: int, page_size: int, wanted: Wanted) -> bool:
    """Whether the kernel takes a step, were its pages plain: see the limits above."""
    head_dim, group = q.shape[2], q.shape[1] // num_kv_heads
    if arch(q.device) not in WGMMA or wanted.invariant or wanted.scale <= 0 or wanted.max_query_len * group <= FEW_ROWS:
        return False
    return q.element_size() == 2 and page_size % MIN_PAGE == 0 and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM


def takes_prompt(q: Tensor, k_pages: KVPages, v_pages: KVPages, wanted: Wanted) -> bool:
    """Whether the kernel takes a step over these pages."""
    if not is_prompt(q, k_pages.codes.shape[1], k_pages.codes.shape[2], wanted):
        return False
    keys, values = k_pages.words, v_pages.words
    if k_pages.codec != v_pages.codec or k_pages.codec.scheme != "plain" or keys.element_size() != 2:
        return False
    # Copies of 16 bytes want whole ones, and Triton to know that strides of pages and heads are multiples of 16.
    strides = (*keys.stride()[:2], *values.stride()[:2])
    is_aligned = all(pages.data_ptr() % 16 == 0 and pages.stride(2) % 8 == 0 for pages in (keys, values))
    return is_aligned and all(stride % 16 == 0 for stride in strides)


def launch_prompt(q: Tensor, k_pages: KVPages, v_pages: KVPages, places: Places, wanted: Wanted, out: Tensor) -> None:
    """Write attention of a step that `takes_prompt` to out [T, H * D]."""
    (num_tokens, num_heads, head_dim), (num_kv_heads, page_size) = q.shape, k_pages.codes.shape[1:3]
    num_seqs, group, order = len(places.context_lens), num_heads // num_kv_heads, wanted.order
    block_q, block_d = BLOCK_M.value // group, max(64, triton.next_power_of_2(head_dim))
    block_n = 128 if block_d <= 128 and page_size % 128 == 0 else MIN_PAGE
    num_blocks, splits = num_tokens // block_q + num_seqs, wanted.splits
    if splits is None:
        num_tiles = wanted.num_keys(places, page_size, block_q) // block_n
        # At most so many have queries; the grid has room for one more.
        num_programs = (triton.cdiv(num_tokens, block_q) + num_seqs - 1) * num_kv_heads
        splits = choose_splits(num_programs, num_tiles, 1, q.device)
    parts, lse = room_for_runs(q, num_tokens, splits)
    _prompt_attention_kernel[num_blocks, num_kv_heads, splits](
        q, k_pages.words, v_pages.words, *places, wanted.roles, None if order is None else inverse(order),
        out, parts, lse, wanted.scale, *q.stride()[:2], *k_pages.words.stride()[:2], *v_pages.words.stride()[:2],
        places.page_table.stride(0), num_seqs, (num_seqs - 1).bit_length(),
        NUM_HEADS=num_heads, GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
        K_ROW=k_pages.words.stride(2), V_ROW=v_pages.words.stride(2),
        WINDOW=wanted.window or 0, SOFTCAP=wanted.softcap or 0.0, IS_SPLIT=splits > 1, HAS_ORDER=order is not None,
        ROLE=wanted.role, FEW=wanted.few, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=_WARPS.value, **overlap(q),
    )  # fmt: skip
    if parts is not None and lse is not None:
        add_runs(parts, lse, order, out)
