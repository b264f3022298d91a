"""Routing: which experts each token takes and how much each counts, and the rows of every expert side by side.

    route           p = softmax(logits[t]);  experts[t] = the k likeliest, the lower index first where two are equal
                    weights[t, j] = p[experts[t, j]], divided by their sum if `normalized`
    sort_by_expert  blocks of rows for a product with one matrix per expert

Token t and its j-th expert make the pair t k + j. A block is a number of pairs of one expert, in ascending order; the
last block of an expert is filled up with -1. Blocks follow each other by expert. There are as many as the worst case
needs, so shapes depend on T, k and E alone and nothing waits for the GPU; blocks that are not needed have expert -1.

A row of logits with NaN gives experts that exist and weights that are NaN. All sums are fp32; there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_index, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs

MAX_EXPERTS = 1024
CHUNK = 64  # pairs that a program looks at in one go
MIN_BLOCK = 16  # rows that a matrix product takes at least


def route_reference(logits: Tensor, *, top_k: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """Compute `route` in plain torch."""
    order = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).sort(stable=True, descending=True)
    experts = order.indices[:, :top_k]
    weights = logits.softmax(dim=1).gather(1, experts)
    if normalized:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return experts.to(torch.int32), weights


def sort_by_expert_reference(experts: Tensor, *, num_experts: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """Compute `sort_by_expert` in plain torch."""
    flat, num_blocks = experts.flatten(), max_blocks(experts.numel(), num_experts, block_rows)
    block_experts = torch.full((num_blocks,), -1, dtype=torch.int32, device=experts.device)
    rows = torch.full((num_blocks, block_rows), -1, dtype=torch.int32, device=experts.device)
    first = 0
    for expert in flat.unique().tolist():
        pairs = (flat == expert).nonzero().flatten()
        blocks = -(-pairs.numel() // block_rows)
        block_experts[first : first + blocks] = expert
        rows[first : first + blocks].view(-1)[: pairs.numel()] = pairs.to(torch.int32)
        first += blocks
    return block_experts, rows


def max_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """Return the number of blocks in the worst case: every expert that has a pair leaves a block almost empty."""
    return min(num_pairs, (num_pairs + min(num_pairs, num_experts) * (block_rows - 1)) // block_rows)


@triton.jit(do_not_specialize_on_alignment=["p_logits"])
def _route_kernel(
    p_logits, p_experts, p_weights, logits_stride,
    E: tl.constexpr, TOP_K: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_t = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BLOCK)
    m_e = o_e < E
    b_logits = tl.load(p_logits + i_t * logits_stride + o_e, mask=m_e, other=float("-inf")).to(tl.float32)
    # NaN loses every comparison here, and makes every weight below NaN.
    b_keys = tl.where(b_logits == b_logits, b_logits, float("-inf"))
    b_place = tl.where(m_e, TOP_K, TOP_K + 1)  # where in the choice an expert stands; TOP_K: not chosen
    for j in tl.static_range(TOP_K):
        m_left = b_place == TOP_K
        b_best = tl.max(tl.where(m_left, b_keys, float("-inf")), axis=0)
        i_best = tl.min(tl.where(m_left & (b_keys == b_best), o_e, BLOCK), axis=0)
        b_place = tl.where(o_e == i_best, j, b_place)
    b_p = tl.where(m_e, tl.exp(b_logits - tl.max(b_keys, axis=0)), 0.0)
    b_p /= tl.sum(b_p, axis=0)
    m_chosen = b_place < TOP_K
    if NORMALIZED:
        b_p /= tl.sum(tl.where(m_chosen, b_p, 0.0), axis=0)
    o_out = i_t * TOP_K + b_place
    tl.store(p_experts + o_out, o_e, mask=m_chosen)
    tl.store(p_weights + o_out, b_p, mask=m_chosen)


# The number of pairs differs from step to step; a kernel per divisibility of it would be compiled while serving.
@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _sort_by_expert_kernel(
    p_experts, p_block_experts, p_rows, num_pairs, num_blocks,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_expert = tl.program_id(0)
    o_e, o_c, o_r = tl.arange(0, BLOCK_E), tl.arange(0, CHUNK), tl.arange(0, BLOCK_ROWS)
    b_counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, num_pairs, CHUNK):
        b_experts = tl.load(p_experts + start + o_c, mask=start + o_c < num_pairs, other=-1)
        b_counts += tl.sum((b_experts[:, None] == o_e[None, :]).to(tl.int32), axis=0)
    b_blocks = (b_counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    first = tl.sum(tl.where(o_e < i_expert, b_blocks, 0), axis=0)
    mine = tl.sum(tl.where(o_e == i_expert, b_blocks, 0), axis=0)
    num_rows = tl.sum(tl.where(o_e == i_expert, b_counts, 0), axis=0)
    p_mine = p_rows + first.to(tl.int64) * BLOCK_ROWS
    for i_block in range(mine):
        tl.store(p_block_experts + first + i_block, i_expert)
        o_row = i_block * BLOCK_ROWS + o_r
        tl.store(p_mine + o_row, tl.full([BLOCK_ROWS], -1, tl.int32), mask=o_row >= num_rows)
    placed = 0
    for start in range(0, num_pairs, CHUNK):
        b_experts = tl.load(p_experts + start + o_c, mask=start + o_c < num_pairs, other=-1)
        b_is_mine = (b_experts == i_expert).to(tl.int32)
        b_row = placed + tl.cumsum(b_is_mine, axis=0) - 1
        tl.store(p_mine + b_row, start + o_c, mask=b_is_mine == 1)
        placed += tl.sum(b_is_mine, axis=0)
    if i_expert == 0:
        for i_block in range(tl.sum(b_blocks, axis=0), num_blocks):
            tl.store(p_block_experts + i_block, -1)
            tl.store(p_rows + i_block * BLOCK_ROWS + o_r, tl.full([BLOCK_ROWS], -1, tl.int32))


def _check_route(logits: Tensor, *, top_k: int, normalized: bool) -> None:
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, got {logits.dtype}")
    check_shape("logits", logits, ("T", "E"))
    check_rows("logits", logits)
    if not 1 <= top_k <= logits.shape[1] <= MAX_EXPERTS:
        raise ValueError(
            f"top_k must be from 1 to the number of experts, and these at most {MAX_EXPERTS}, "
            f"got {top_k} of {logits.shape[1]}"
        )


def _check_sort_by_expert(experts: Tensor, *, num_experts: int, block_rows: int) -> None:
    check_shape("experts", experts, ("T", "k"))
    if not experts.is_contiguous():
        raise ValueError(f"experts must be contiguous, got strides {list(experts.stride())}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts must be from 1 to {MAX_EXPERTS}, got {num_experts}")
    check_index("experts", experts.flatten(), "T k", stop=num_experts)
    if block_rows < MIN_BLOCK or block_rows & (block_rows - 1):
        raise ValueError(f"block_rows must be a power of two from {MIN_BLOCK} on, got {block_rows}")


@op(reference=route_reference, check=_check_route)
def route(logits: Tensor, *, top_k: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """Choose the experts of every token.

    Args:
        logits: [T, E] fp32, last stride 1, E <= 1024.
        top_k: k, experts per token.
        normalized: whether the weights of a token are divided by their sum.

    Returns:
        experts [T, k] int32, the likeliest first, and weights [T, k] fp32.

    Raises:
        TypeError: the dtype is another.
        ValueError: a shape or a stride does not fit, or there are fewer than k experts.
    """
    num_tokens, num_experts = logits.shape
    experts = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits, experts, weights, logits.stride(0),
            E=num_experts, TOP_K=top_k, NORMALIZED=normalized, BLOCK=triton.next_power_of_2(num_experts),
            num_warps=1, **overlap(logits),
        )  # fmt: skip
    return experts, weights


@op(reference=sort_by_expert_reference, check=_check_sort_by_expert)
def sort_by_expert(experts: Tensor, *, num_experts: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """Put the pairs of every expert into blocks of rows.

    Args:
        experts: [T, k] int32 in [0, num_experts), contiguous.
        num_experts: E.
        block_rows: M, pairs per block, a power of two from 16 on.

    Returns:
        [B] int32, the expert of each block or -1, and [B, M] int32, its pairs, then -1; B = `max_blocks`.

    Raises:
        TypeError: `experts` holds no integers.
        ValueError: a shape does not fit, or (CPU tensors only) an expert is out of range.
    """
    num_blocks = max_blocks(experts.numel(), num_experts, block_rows)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=experts.device)
    rows = torch.empty((num_blocks, block_rows), dtype=torch.int32, device=experts.device)
    if num_blocks:
        _sort_by_expert_kernel[(num_experts,)](
            experts, block_experts, rows, experts.numel(), num_blocks,
            E=num_experts, BLOCK_E=triton.next_power_of_2(num_experts), BLOCK_ROWS=block_rows, CHUNK=CHUNK,
            **overlap(experts),
        )  # fmt: skip
    return block_experts, rows
