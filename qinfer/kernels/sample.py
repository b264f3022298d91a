"""One token per row of logits: temperature, then top-k, then top-p, then min-p, then one draw; nothing is sorted.

Weights instead of probabilities: w_i of `token_weights`, integers, whose sums are the same in any order.

Order of tokens: larger logit first, then lower id; only tokens with w > 0 count. Top-k keeps the first k, top-p the
fewest first tokens whose weights reach ceil(p · sum), min-p those with w >= ceil(min_p · 2^44). The draw is the inverse
CDF in the order of the ids: the first i with w_0 + … + w_i > floor(u · sum), u uniform in [0, 1).

A row is cut into chunks. Kernel 1 finds their largest logits; kernel 2 sums their weights and puts every token into one
of 2,048 buckets by t, each with a count and a sum of weights; kernel 3 lists the tokens of the few buckets in which the
cut of top-k or top-p can lie, and of those before where they are few; kernel 4, one program per row, finds the cut
exactly by bisection over that list and draws from the list if everything left is on it, else from the chunks, which it
sums again. Atomics add integers only.

Limits: V < 2^19, because sums of weights have to stay below 2^63. Tokens less likely than 2^-45 of the likeliest are
never drawn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_chosen, check_device, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs
from qinfer.kernels.token_weights import draw, keep_top_k, keep_top_p, token_weights, weights_below

MAX_VOCABULARY = (1 << 19) - 1
COLUMNS = ("rate", "top_k", "top_p", "floor", "uniform")

CHUNK = 4096
BLOCK = 2048  # listed tokens that one program holds in registers
NUM_BUCKETS = 2048
NUM_COLUMNS = tl.constexpr(len(COLUMNS))
ID_BITS = tl.constexpr(19)
LAST_ID = tl.constexpr((1 << 19) - 1)
TOP_ID_BIT = tl.constexpr(1 << 18)
LOWEST_KEY = tl.constexpr(-(1 << 31))
RANK_BITS = tl.constexpr(32 + 19)
TOP_RANK_BIT = tl.constexpr(1 << 50)


def sample_rows_reference(
    logits: Tensor, table: Tensor, *, filtered: bool, out: Tensor | None = None, host: Tensor | None = None
) -> Tensor:
    """Compute `sample_rows` in plain torch."""
    peak, best = logits.max(dim=-1, keepdim=True)
    finite = torch.isfinite(peak)
    rate, top_k, top_p, floor, uniform = table[:, :, None].unbind(1)
    # A row that is not finite gets weights without meaning here, and its id is replaced at the end.
    weights = token_weights((logits - peak).neg_().double(), rate)
    if filtered:
        # Zero added makes one zero of two, so that equal logits are ties.
        order = (logits + 0.0).sort(dim=-1, descending=True, stable=True).indices
        kept = keep_top_p(keep_top_k(weights.gather(-1, order), top_k), top_p)
        weights = torch.zeros_like(weights).scatter_(-1, order, kept)
    drawn = draw(torch.where(weights.double() >= floor, weights, 0), uniform)
    ids = torch.where(finite, torch.where(rate == 0, best, drawn[:, None]), -1).squeeze(-1)
    if host is not None:
        host.copy_(ids)
    return ids if out is None else out.copy_(ids)


@triton.jit
def _rank(b_x, o_v):
    # Integers in the order of the tokens: larger logit first, then lower id. The sign of a zero does not count.
    b_bits = tl.where(b_x == 0.0, 0.0, b_x).to(tl.int32, bitcast=True)
    b_key = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return ((b_key.to(tl.int64) - LOWEST_KEY) << ID_BITS) + (LAST_ID - o_v)


@triton.jit
def _is_active(b_peak, b_rate):
    return (b_peak > float("-inf")) & (b_peak < float("inf")) & (b_rate > 0.0)


@triton.jit
def _buckets(p_histogram, b_top_k, b_top_p, BUCKETS: tl.constexpr, BLOCK: tl.constexpr):
    # The buckets lo..hi hold every token at which top-k or top-p can cut; what lies before lo is kept. lo is 0 where a
    # block holds all tokens up to hi.
    o_b = tl.arange(0, BUCKETS)
    b_counts = tl.load(p_histogram + o_b)
    b_sums = tl.load(p_histogram + BUCKETS + o_b)
    b_count = tl.cumsum(b_counts, 0)
    b_sum = tl.cumsum(b_sums, 0)
    i_hi = tl.where(b_top_k > 0, tl.minimum(tl.sum((b_count < b_top_k).to(tl.int32), 0), BUCKETS - 1), BUCKETS - 1)
    # Top-k keeps at least what lies before the bucket of its cut.
    b_before = tl.sum(tl.where(o_b < i_hi, b_sums, 0), 0)
    b_least = tl.where(b_top_k > 0, b_before, tl.sum(b_sums, 0))
    b_needed = tl.maximum(tl.ceil(b_top_p * b_least.to(tl.float64)).to(tl.int64), 1)
    i_lo = tl.where(b_top_p < 1.0, tl.minimum(tl.sum((b_sum < b_needed).to(tl.int32), 0), i_hi), i_hi)
    i_hi = tl.where(b_top_k > 0, i_hi, i_lo)
    i_lo = tl.where(tl.sum(tl.where(o_b <= i_hi, b_counts, 0), 0) <= BLOCK, 0, i_lo)
    b_count_above = tl.sum(tl.where(o_b < i_lo, b_counts, 0), 0)
    b_sum_above = tl.sum(tl.where(o_b < i_lo, b_sums, 0), 0)
    return i_lo, i_hi, b_count_above, b_sum_above, tl.sum(b_sums, 0)


@triton.jit
def _candidates(p_logits, p_list, o_n, b_num, b_peak, b_rate):
    # Ranks and weights of listed tokens; rank -1 behind the end of the list.
    m_n = o_n < b_num
    o_v = tl.load(p_list + o_n, mask=m_n, other=0)
    b_x = tl.load(p_logits + o_v, mask=m_n, other=float("-inf"))
    b_w, _ = weights_below(b_x, b_peak, b_rate)
    return tl.where(m_n, _rank(b_x, o_v), -1), b_w


@triton.jit
def _mass(
    p_logits, p_list, b_num, b_peak, b_rate, b_cut, WEIGHTED: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr
):
    # Count or weight of the tokens of a list, from its place START on, whose rank is at least b_cut.
    b_mass = b_cut * 0
    for o_start in range(START, b_num, BLOCK):
        b_rank, b_w = _candidates(p_logits, p_list, o_start + tl.arange(0, BLOCK), b_num, b_peak, b_rate)
        b_mass += tl.sum(tl.where(b_rank >= b_cut, b_w if WEIGHTED else 1, 0).to(tl.int64), 0)
    return b_mass


@triton.jit
def _find_cut(p_logits, p_list, b_num, b_peak, b_rate, b_needed, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    # The largest rank such that the tokens from it on have at least the count or weight that is needed, bit by bit.
    # 0 when all together have less. Nearly always the first block, which stays in registers, is the whole list.
    b_rank, b_w = _candidates(p_logits, p_list, tl.arange(0, BLOCK), b_num, b_peak, b_rate)
    b_w = b_w if WEIGHTED else tl.full([BLOCK], 1, tl.int64)
    b_cut = b_needed * 0
    b_bit = b_cut + TOP_RANK_BIT
    for _ in range(RANK_BITS):
        b_trial = b_cut + b_bit
        b_mass = tl.sum(tl.where(b_rank >= b_trial, b_w, 0), 0)
        if b_num > BLOCK:
            b_mass += _mass(p_logits, p_list, b_num, b_peak, b_rate, b_trial, WEIGHTED, BLOCK, BLOCK)
        b_cut = tl.where(b_mass >= b_needed, b_trial, b_cut)
        b_bit = b_bit >> 1
    return b_cut


@triton.jit
def _draw_listed(p_logits, p_list, b_num, b_peak, b_rate, b_cut, b_floor, b_uniform, BLOCK: tl.constexpr):
    # The draw where the first block of the list is all there is: the largest id before which at most the target lies,
    # bit by bit.
    o_n = tl.arange(0, BLOCK)
    o_v = tl.load(p_list + o_n, mask=o_n < b_num, other=0)
    b_rank, b_w = _candidates(p_logits, p_list, o_n, b_num, b_peak, b_rate)
    b_kept = tl.where((b_rank >= b_cut) & (b_w.to(tl.float64) >= b_floor), b_w, 0)
    b_target = (b_uniform * tl.sum(b_kept, 0).to(tl.float64)).to(tl.int64)
    b_id = b_num * 0
    b_bit = b_id + TOP_ID_BIT
    for _ in range(ID_BITS):
        b_before = tl.sum(tl.where(o_v < b_id + b_bit, b_kept, 0), 0)
        b_id = tl.where(b_before <= b_target, b_id + b_bit, b_id)
        b_bit = b_bit >> 1
    return b_id


@triton.jit
def _draw_from_chunks(
    p_logits, b_sums, b_peak, b_rate, b_cut, b_floor, b_uniform, b_active, V, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr
):
    # The draw from sums of chunks: the chunk in which the target lies, then the place in it.
    o_c = tl.arange(0, BLOCK_C)
    b_reached = tl.cumsum(b_sums, 0)
    b_target = (b_uniform * tl.sum(b_sums, 0).to(tl.float64)).to(tl.int64)
    i_chunk = tl.sum((b_reached <= b_target).to(tl.int32), 0)
    b_before = tl.sum(tl.where(o_c < i_chunk, b_sums, 0), 0)
    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(p_logits + o_v, mask=(o_v < V) & b_active, other=float("-inf"))
    b_w, _ = weights_below(b_x, tl.where(b_active, b_peak, 0.0), tl.where(b_active, b_rate, 1.0))
    m_kept = (_rank(b_x, o_v) >= b_cut) & (b_w.to(tl.float64) >= b_floor) & (o_v < V)
    b_reached = b_before + tl.cumsum(tl.where(m_kept, b_w, 0), 0)
    return i_chunk * CHUNK + tl.sum((b_reached <= b_target).to(tl.int32), 0)


@triton.jit
def _sample_peaks_kernel(
    p_logits, p_peaks, p_bests, p_histogram, V, stride_row, num_chunks,
    CHUNK: tl.constexpr, BUCKETS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(1)
    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(p_logits + i_row * stride_row + o_v, mask=o_v < V, other=float("-inf"))
    b_has_nan = tl.max((b_x != b_x).to(tl.int32), 0) > 0
    b_x = tl.where(b_x == b_x, b_x, float("-inf"))
    b_peak = tl.max(b_x, 0)
    b_best = tl.min(tl.where((b_x == b_peak) & (o_v < V), o_v, V), 0)
    # Infinity stands for NaN as well: both spoil the row.
    tl.store(p_peaks + i_row * num_chunks + i_chunk, tl.where(b_has_nan, float("inf"), b_peak))
    tl.store(p_bests + i_row * num_chunks + i_chunk, b_best)
    if i_chunk == 0:
        o_b = tl.arange(0, BUCKETS)
        p_row = p_histogram + i_row * (2 * BUCKETS + 1)
        b_zero = tl.zeros([BUCKETS], tl.int64)
        tl.store(p_row + o_b, b_zero)
        tl.store(p_row + BUCKETS + o_b, b_zero)
        tl.store(p_row + 2 * BUCKETS, tl.sum(b_zero, 0))


@triton.jit
def _sample_histogram_kernel(
    p_logits, p_table, p_peaks, p_histogram, p_sums, V, stride_row, num_chunks,
    CHUNK: tl.constexpr, BUCKETS: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(1)
    o_c = tl.arange(0, BLOCK_C)
    b_peak = tl.max(tl.load(p_peaks + i_row * num_chunks + o_c, mask=o_c < num_chunks, other=float("-inf")), 0)
    p_row = p_table + i_row * NUM_COLUMNS
    b_rate, b_top_k, b_top_p, b_floor = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2), tl.load(p_row + 3)
    b_active = _is_active(b_peak, b_rate)
    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(p_logits + i_row * stride_row + o_v, mask=(o_v < V) & b_active, other=float("-inf"))
    b_w, b_bucket = weights_below(b_x, tl.where(b_active, b_peak, 0.0), tl.where(b_active, b_rate, 1.0))
    b_kept = tl.where((b_w.to(tl.float64) >= b_floor) & (o_v < V), b_w, 0)
    tl.store(p_sums + i_row * num_chunks + i_chunk, tl.sum(b_kept, 0))
    if b_active & ((b_top_k > 0.0) | (b_top_p < 1.0)):
        p_row_histogram = p_histogram + i_row * (2 * BUCKETS + 1)
        m_w = (b_w > 0) & (o_v < V)
        b_one = tl.full([CHUNK], 1, tl.int64)
        tl.atomic_add(p_row_histogram + b_bucket, b_one, mask=m_w, sem="relaxed")
        tl.atomic_add(p_row_histogram + BUCKETS + b_bucket, b_w, mask=m_w, sem="relaxed")


@triton.jit
def _sample_candidates_kernel(
    p_logits, p_table, p_peaks, p_histogram, p_lists, V, stride_row, num_chunks,
    CHUNK: tl.constexpr, BUCKETS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(1)
    o_c = tl.arange(0, BLOCK_C)
    b_peak = tl.max(tl.load(p_peaks + i_row * num_chunks + o_c, mask=o_c < num_chunks, other=float("-inf")), 0)
    p_row = p_table + i_row * NUM_COLUMNS
    b_rate, b_top_k, b_top_p = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    if _is_active(b_peak, b_rate) & ((b_top_k > 0.0) | (b_top_p < 1.0)):
        p_row_histogram = p_histogram + i_row * (2 * BUCKETS + 1)
        i_lo, i_hi, _, _, _ = _buckets(p_row_histogram, b_top_k.to(tl.int64), b_top_p, BUCKETS, BLOCK)
        o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
        b_x = tl.load(p_logits + i_row * stride_row + o_v, mask=o_v < V, other=float("-inf"))
        b_w, b_bucket = weights_below(b_x, b_peak, b_rate)
        m_listed = (b_w > 0) & (o_v < V) & (b_bucket >= i_lo) & (b_bucket <= i_hi)
        b_listed = m_listed.to(tl.int64)
        # In which order chunks take their places does not matter: the list is a set.
        b_place = tl.atomic_add(p_row_histogram + 2 * BUCKETS, tl.sum(b_listed, 0), sem="relaxed")
        tl.store(p_lists + i_row * V + b_place + tl.cumsum(b_listed, 0) - 1, o_v, mask=m_listed)


@triton.jit
def _sample_draw_kernel(
    p_logits, p_table, p_peaks, p_bests, p_histogram, p_lists, p_sums, p_ids, p_host, V, stride_row, num_chunks,
    FILTERED: tl.constexpr, CHUNK: tl.constexpr, BUCKETS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    b_peaks = tl.load(p_peaks + i_row * num_chunks + o_c, mask=o_c < num_chunks, other=float("-inf"))
    b_bests = tl.load(p_bests + i_row * num_chunks + o_c, mask=o_c < num_chunks, other=V)
    b_peak = tl.max(b_peaks, 0)
    b_best = tl.min(tl.where(b_peaks == b_peak, b_bests, V), 0)
    p_row = p_table + i_row * NUM_COLUMNS
    b_rate, b_top_k, b_top_p = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    b_floor, b_uniform = tl.load(p_row + 3), tl.load(p_row + 4)
    p_row_logits = p_logits + i_row * stride_row
    b_active = _is_active(b_peak, b_rate)
    b_sums = tl.load(p_sums + i_row * num_chunks + o_c, mask=o_c < num_chunks, other=0)
    b_cut = tl.sum(b_sums * 0, 0)
    b_drawn = b_cut.to(tl.int32) - 1
    if FILTERED:  # noqa: SIM102 - a constant cannot be joined with a number of the device
        if b_active & ((b_top_k > 0.0) | (b_top_p < 1.0)):
            p_row_histogram = p_histogram + i_row * (2 * BUCKETS + 1)
            p_list = p_lists + i_row * V
            i_lo, _hi, b_count, b_sum, b_total = _buckets(
                p_row_histogram, b_top_k.to(tl.int64), b_top_p, BUCKETS, BLOCK
            )
            b_num = tl.load(p_row_histogram + 2 * BUCKETS).to(tl.int32)
            if b_top_k > 0.0:
                b_needed = b_top_k.to(tl.int64) - b_count
                b_cut = _find_cut(p_row_logits, p_list, b_num, b_peak, b_rate, b_needed, False, BLOCK)
                b_total = b_sum + _mass(p_row_logits, p_list, b_num, b_peak, b_rate, b_cut, True, 0, BLOCK)
            if b_top_p < 1.0:
                b_needed = tl.ceil(b_top_p * b_total.to(tl.float64)).to(tl.int64) - b_sum
                b_cut = _find_cut(p_row_logits, p_list, b_num, b_peak, b_rate, b_needed, True, BLOCK)
            if (i_lo == 0) & (b_num <= BLOCK):
                b_drawn = _draw_listed(p_row_logits, p_list, b_num, b_peak, b_rate, b_cut, b_floor, b_uniform, BLOCK)
            else:
                for i_chunk in range(num_chunks):
                    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
                    b_x = tl.load(p_row_logits + o_v, mask=o_v < V, other=float("-inf"))
                    b_w, _ = weights_below(b_x, b_peak, b_rate)
                    m_kept = (_rank(b_x, o_v) >= b_cut) & (b_w.to(tl.float64) >= b_floor) & (o_v < V)
                    b_sums = tl.where(o_c == i_chunk, tl.sum(tl.where(m_kept, b_w, 0), 0), b_sums)
    if b_drawn < 0:
        b_drawn = _draw_from_chunks(
            p_row_logits, b_sums, b_peak, b_rate, b_cut, b_floor, b_uniform, b_active, V, CHUNK, BLOCK_C
        )  # fmt: skip
    b_id = tl.where(b_active, b_drawn, tl.where((b_peak > float("-inf")) & (b_peak < float("inf")), b_best, -1))
    tl.store(p_ids + i_row, b_id.to(tl.int64))
    if p_host is not None:
        tl.store(p_host + i_row, b_id.to(tl.int64))


def _check_sample_rows(
    logits: Tensor, table: Tensor, *, filtered: bool, out: Tensor | None = None, host: Tensor | None = None
) -> None:
    check_shape("logits", logits, ("R", "V"))
    check_shape("table", table, (logits.shape[0], len(COLUMNS)))
    for name, tensor, dtype in (("logits", logits, torch.float32), ("table", table, torch.float64)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
        check_rows(name, tensor)
    if not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"logits must have 1 to {MAX_VOCABULARY} columns, got {logits.shape[1]}")
    if not table.is_contiguous():
        raise ValueError(f"table must be contiguous, got strides {list(table.stride())}")
    check_device(logits, table=table)
    check_chosen(logits, out, host)
    if not table.is_cuda and not filtered and bool(((table[:, 1] > 0) | (table[:, 2] < 1)).any()):
        raise ValueError("filtered must be True where a row has top_k above 0 or top_p below 1, got False")


@op(reference=sample_rows_reference, check=_check_sample_rows)
def sample_rows(
    logits: Tensor, table: Tensor, *, filtered: bool, out: Tensor | None = None, host: Tensor | None = None
) -> Tensor:
    """Draw one token per row.

    Args:
        logits: [R, V] fp32, last stride 1; -inf is a token that cannot be drawn.
        table: [R, 5] fp64, contiguous: log2(e) / temperature, or 0 for the likeliest token; top_k, 0 for all; top_p, 1
            for all; the least weight kept, at least 1 and at most 2^44; a uniform number in [0, 1 - 2^-53].
        filtered: Whether any row has top_k above 0 or top_p below 1; rows that have are not filtered if this is False.
        out: [R] int64 to write to, stride 1; a new tensor by default.
        host: [R] int64 in page-locked memory of the host, stride 1, to write the ids to as well.

    Returns:
        [R] int64 ids; -1 for a row with NaN, with +inf, or without any finite logit.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit.
    """
    num_rows, vocabulary = logits.shape
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    if num_rows == 0:
        return ids
    num_chunks = triton.cdiv(vocabulary, CHUNK)
    peaks = logits.new_empty(num_rows, num_chunks)
    bests = ids.new_empty(num_rows, num_chunks, dtype=torch.int32)
    sums = ids.new_empty(num_rows, num_chunks)
    histogram = ids.new_empty(num_rows, 2 * NUM_BUCKETS + 1)
    # Room for every token, because all may be equally likely; that is as much as the logits take.
    lists = ids.new_empty(num_rows, vocabulary if filtered else 0, dtype=torch.int32)
    grid, sizes = (num_rows, num_chunks), (vocabulary, logits.stride(0), num_chunks)
    shape = {"CHUNK": CHUNK, "BUCKETS": NUM_BUCKETS, **overlap(logits)}
    # Fused multiply-adds would round weights differently than the reference.
    exact = {"BLOCK_C": triton.next_power_of_2(num_chunks), "enable_fp_fusion": False, **shape}
    _sample_peaks_kernel[grid](logits, peaks, bests, histogram, *sizes, num_warps=8, **shape)
    _sample_histogram_kernel[grid](logits, table, peaks, histogram, sums, *sizes, num_warps=8, **exact)
    if filtered:
        listing = (logits, table, peaks, histogram, lists, *sizes)
        _sample_candidates_kernel[grid](*listing, BLOCK=BLOCK, num_warps=8, **exact)
    first = (logits, table, peaks, bests, histogram, lists, sums, ids, host, *sizes)
    _sample_draw_kernel[(num_rows,)](*first, FILTERED=filtered, BLOCK=BLOCK, num_warps=16, **exact)
    return ids
