"""Adding up the runs into which attention cuts the keys of a sequence: what each program left, in a fixed order.

    out = sum_i 2^(lse_i - max lse) part_i / sum_i 2^(lse_i - max lse)

parts are [N, H, runs, D] fp32, each normalized by itself, lse [N, H, runs] the base-2 logarithms of their softmax
sums; a run without keys has -inf there, and its part is not read. Results are [T, H * D]. N is T, or what the streams
of a step with prompts may have together.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.attention_tiles import MAX_SPLITS
from qinfer.kernels.gather import inverse
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs

MAX_LOCKS = 1 << 16
CHUNK_PER_WARP = 2048  # numbers that a program adds up at once: 64 of each thread
BLOCK = 1024  # numbers that one program of the second kernel writes, of CHUNK runs at once
CHUNK = 8


@triton.jit
def store_rows(
    p_out, p_inverse, b_out, o_token, o_head, m_out,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Store finished rows [M, BLOCK_D] of tokens [M] and heads [M], each feature where it goes."""
    o_feature = o_head[:, None] * HEAD_DIM + tl.arange(0, b_out.shape[1])[None, :]
    if HAS_ORDER:
        o_feature = tl.load(p_inverse + o_feature, mask=m_out, other=0)
    p_rows = p_out + o_token[:, None] * (NUM_HEADS * HEAD_DIM) + o_feature
    tl.store(p_rows, b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _sum_of_runs(
    p_parts, p_lse, o_first, m_row, b_runs,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, ALL_THERE: tl.constexpr,
):  # fmt: skip
    """Add up the runs of rows [M], CHUNK of them at once: [M, BLOCK_D] fp32.

    Args:
        p_parts: [..., D].
        p_lse: [...].
        o_first: [M] number of the first run of each row.
        m_row: [M] rows that there are.
        b_runs: how many runs they have.
        HEAD_DIM: D.
        BLOCK_D: D rounded up to a power of two.
        CHUNK: a power of two.
        ALL_THERE: runs without keys have left zeros, and are read like the others.
    """
    M: tl.constexpr = o_first.shape[0]
    o_chunk, o_d = tl.arange(0, CHUNK), tl.arange(0, BLOCK_D)
    b_max = tl.full([M], float("-inf"), tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_out = tl.zeros([M, BLOCK_D], tl.float32)
    for i_chunk in range(tl.cdiv(b_runs, CHUNK)):
        o_run = i_chunk * CHUNK + o_chunk
        m_run = m_row[:, None] & (o_run < b_runs)[None, :]
        o_part = o_first[:, None] + o_run[None, :]
        b_lse = tl.load(p_lse + o_part, mask=m_run, other=float("-inf"), cache_modifier=".cg")
        # Both loads at once, if nothing of the second waits for the first.
        m_there = m_run if ALL_THERE else m_run & (b_lse != float("-inf"))
        p_part = p_parts + o_part[:, :, None] * HEAD_DIM + o_d[None, None, :]
        m_part = m_there[:, :, None] & (o_d < HEAD_DIM)[None, None, :]
        b_part = tl.load(p_part, mask=m_part, other=0.0, cache_modifier=".cg")
        b_new_max = tl.maximum(b_max, tl.max(b_lse, axis=1))
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_decay, b_weight = tl.exp2(b_max - b_shift), tl.exp2(b_lse - b_shift[:, None])
        b_out = b_out * b_decay[:, None] + tl.sum(b_weight[:, :, None] * b_part, axis=1)
        b_sum = b_sum * b_decay + tl.sum(b_weight, axis=1)
        b_max = b_new_max
    return b_out / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]


@triton.jit
def _reduce_block(
    p_parts, p_lse, p_out, p_inverse, i_first, i_part, b_num, i_head, b_runs, num_splits,
    GROUP: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Add up the runs of one block, those of all heads of a token at once."""
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)
    o_g = tl.arange(0, HEADS)
    m_g = o_g < GROUP
    m_out = m_g[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    o_head = i_head * GROUP + o_g
    for i_query in range(b_num):
        i_token = (i_first + i_query).to(tl.int64)
        o_first = ((i_part + i_query).to(tl.int64) * NUM_HEADS + o_head) * num_splits
        b_out = _sum_of_runs(p_parts, p_lse, o_first, m_g, b_runs, HEAD_DIM, BLOCK_D, CHUNK, True)
        o_token = i_token + tl.zeros([HEADS], tl.int64)
        store_rows(p_out, p_inverse, b_out, o_token, o_head, m_out, NUM_HEADS, HEAD_DIM, HAS_ORDER)


@triton.jit
def store_run(
    p_locks, i_lock, p_parts, p_lse, p_out, p_inverse, b_out, b_max, b_sum, i_first, i_part, b_num, o_query,
    i_head, o_head, m_row, m_out, i_split, b_runs, num_splits,
    GROUP: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr, HAS_LOCKS: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Store what a run has left of its block, and add the block up if this program is its last one to have come here.

    Args:
        p_locks: how many programs of a block have come, left at zero.
        i_lock: number of the block.
        p_parts: [N, H, runs, D].
        p_lse: [N, H, runs].
        p_out: [T, H * D].
        p_inverse: [H * D] where each feature goes, if HAS_ORDER.
        b_out: [M, BLOCK_D], normalized.
        b_max: [M] largest scores.
        b_sum: [M] softmax sums in units of two to the largest score.
        i_first: first token of the block.
        i_part: where its parts begin.
        b_num: tokens of the block, GROUP query heads each.
        o_query: [M] token of each row within the block.
        i_head: KV head of the block.
        o_head: [M] query head of each row.
        m_row: [M] rows that have a query.
        m_out: [M, BLOCK_D] numbers of those rows that there are.
        i_split: the run.
        b_runs: runs of the block, at most num_splits.
        num_splits: runs that parts have room for.
        GROUP: query heads per KV head.
        NUM_HEADS: H.
        HEAD_DIM: D.
        CHUNK: runs that are added up at once, a power of two.
        HAS_LOCKS: whether the last program adds up; otherwise another kernel will.
        HAS_ORDER: whether features are permuted.
    """
    BLOCK_D: tl.constexpr = b_out.shape[1]
    o_part = ((i_part + o_query).to(tl.int64) * NUM_HEADS + o_head) * num_splits + i_split
    m_part = m_out if HAS_LOCKS else m_out & (b_sum > 0.0)[:, None]
    tl.store(p_parts + o_part[:, None] * HEAD_DIM + tl.arange(0, BLOCK_D)[None, :], b_out, mask=m_part)
    tl.store(p_lse + o_part, b_max + tl.log2(tl.where(b_sum > 0.0, b_sum, 1.0)), mask=m_row)
    if HAS_LOCKS:
        # All threads' stores come before the one thread's release; its acquire comes before all threads' loads.
        tl.debug_barrier()
        if tl.atomic_add(p_locks + i_lock, 1, sem="acq_rel") == b_runs - 1:
            _reduce_block(
                p_parts, p_lse, p_out, p_inverse, i_first, i_part, b_num, i_head, b_runs, num_splits,
                GROUP, NUM_HEADS, HEAD_DIM, BLOCK_D, CHUNK, HAS_ORDER,
            )  # fmt: skip
            tl.store(p_locks + i_lock, 0)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _reduce_splits_kernel(
    p_parts,  # [T, H, runs, D]
    p_lse,  # [T, H, runs]
    p_inverse,
    p_out,  # [T, H * D], in the order of p_inverse
    num_rows, num_splits,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_ORDER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    # A row is a head of a token.
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_row < num_rows
    b_out = _sum_of_runs(p_parts, p_lse, o_row * num_splits, m_row, num_splits, HEAD_DIM, BLOCK_D, CHUNK, False)
    m_out = m_row[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    store_rows(
        p_out, p_inverse, b_out, o_row // NUM_HEADS, o_row % NUM_HEADS, m_out, NUM_HEADS, HEAD_DIM, HAS_ORDER
    )  # fmt: skip


@cache
def locks_of(device: torch.device) -> Tensor:
    """Return the arrival counters of a device; every launch leaves them at zero.

    Launches share them, so all attention of a device must run on one stream at a time.
    """
    return torch.zeros(MAX_LOCKS, dtype=torch.int32, device=device)


def runs_at_once(group: int, block_d: int, num_warps: int) -> int:
    """Return how many runs of all heads of a token a program has room for."""
    heads: int = triton.next_power_of_2(group)
    return max(1, min(MAX_SPLITS, CHUNK_PER_WARP * num_warps // (heads * block_d)))


def room_for_runs(q: Tensor, num_tokens: int, splits: int) -> tuple[Tensor | None, Tensor | None]:
    """Return parts [N, H, runs, D] and lse [N, H, runs], fp32, for N tokens of q [T, H, D]; None for a single run."""
    if splits == 1:
        return None, None
    num_heads, head_dim = q.shape[1:]
    parts = torch.empty(num_tokens, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
    return parts, torch.empty(num_tokens, num_heads, splits, dtype=torch.float32, device=q.device)


def add_runs(parts: Tensor, lse: Tensor, order: Tensor | None, out: Tensor) -> None:
    """Launch the kernel that adds up all runs, after the one that made them.

    Args:
        parts: [T, H, runs, D] fp32.
        lse: [T, H, runs] fp32.
        order: [H * D] int32, feature j of the result is feature order[j] of the concatenated heads.
        out: [T, H * D], written.
    """
    num_tokens, num_heads, num_splits, head_dim = parts.shape
    num_rows, block_d = num_tokens * num_heads, triton.next_power_of_2(head_dim)
    block_r = max(1, BLOCK // block_d)
    _reduce_splits_kernel[(triton.cdiv(num_rows, block_r),)](
        parts, lse, None if order is None else inverse(order), out, num_rows, num_splits,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, HAS_ORDER=order is not None,
        BLOCK_R=block_r, BLOCK_D=block_d, CHUNK=CHUNK, **overlap(out),
    )  # fmt: skip
