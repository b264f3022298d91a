"""One token per row of logits: temperature, then top-k, then top-p, then min-p, then one draw; nothing is sorted.

Weights instead of probabilities: w_i of `token_weights`, integers, whose sums are the same in any order.

Order of tokens: larger logit first, then lower id; only tokens with w > 0 count. Top-k keeps the first k, top-p the
fewest first tokens whose weights reach ceil(p · sum), min-p those with w >= ceil(min_p · 2^44). The draw is the inverse
CDF in the order of the ids: the first i with w_0 + … + w_i > floor(u · sum), u uniform in [0, 1).

A row is cut into chunks. Kernel 1 finds their largest logits; kernel 2 sums their weights and puts every token into one
of 2,048 buckets by t, which count tokens where there is a top-k and sum weights where there is none; without filters,
the draw is next. Kernel 3 finds the buckets in which a cut can lie: that of the sum is one, that of the count is one,
and what top-p cuts behind top-k is bounded by the counts and by what weights a bucket can hold. Kernel 4 lists the
tokens of these buckets, and of those before where they are few, and sums the others before them. Kernel 5, one program
per row, finds the cut exactly over that list, by comparing all its tokens if it is short and by bisection if not, and
draws from the list if everything left is on it, else from the chunks. Atomics add integers only.

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
from qinfer.kernels.sample_list import draw_listed, find_cut, kept_of, mass_of, rank_of
from qinfer.kernels.token_weights import PER_HALVING, draw, keep_top_k, keep_top_p, token_weights, weights_below

MAX_VOCABULARY = (1 << 19) - 1
COLUMNS = ("rate", "top_k", "top_p", "floor", "uniform")

CHUNK = 2048
BLOCK = 2048  # listed tokens that one program holds in registers
SPREAD = tl.constexpr(64)  # listed tokens that go to their chunks at a time
NUM_BUCKETS = 2048
NUM_COLUMNS = tl.constexpr(len(COLUMNS))
NUM_BOUNDS = tl.constexpr(4)  # first and last bucket of the list, how many tokens are before it and how many on it
HALF_UNIT = tl.constexpr(2.0**-45)  # half of the smallest weight
BUCKET_RATIO = tl.constexpr(2.0 ** (-1 / PER_HALVING.value))  # of the weights at the two ends of a bucket


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
def _is_active(b_peak, b_rate):
    return (b_peak > float("-inf")) & (b_peak < float("inf")) & (b_rate > 0.0)


@triton.jit
def _is_filtered(p_row):
    # Whether top-k or top-p has anything to cut in a row of the table.
    return (tl.load(p_row + 1) > 0.0) | (tl.load(p_row + 2) < 1.0)


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
    m_kept = (rank_of(b_x, o_v) >= b_cut) & (b_w.to(tl.float64) >= b_floor) & (o_v < V)
    b_reached = b_before + tl.cumsum(tl.where(m_kept, b_w, 0), 0)
    return i_chunk * CHUNK + tl.sum((b_reached <= b_target).to(tl.int32), 0)


@triton.jit
def _sample_peaks_kernel(
    p_logits, p_peaks, p_bests, p_buckets, V, stride_row, num_chunks,
    FILTERED: tl.constexpr, CHUNK: tl.constexpr, BUCKETS: tl.constexpr, OVERLAP: tl.constexpr,
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
    if FILTERED:  # noqa: SIM102 - a constant cannot be joined with a number of the device
        if i_chunk == 0:
            tl.store(p_buckets + i_row * BUCKETS + tl.arange(0, BUCKETS), tl.zeros([BUCKETS], tl.int64))


@triton.jit
def _sample_histogram_kernel(
    p_logits, p_table, p_peaks, p_buckets, p_kept, p_total, V, stride_row, num_chunks,
    FILTERED: tl.constexpr, CHUNK: tl.constexpr, BUCKETS: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(1)
    o_c = tl.arange(0, BLOCK_C)
    b_peak = tl.max(tl.load(p_peaks + i_row * num_chunks + o_c, mask=o_c < num_chunks, other=float("-inf")), 0)
    p_row = p_table + i_row * NUM_COLUMNS
    b_rate, b_floor = tl.load(p_row), tl.load(p_row + 3)
    b_active = _is_active(b_peak, b_rate)
    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(p_logits + i_row * stride_row + o_v, mask=(o_v < V) & b_active, other=float("-inf"))
    b_w, b_bucket = weights_below(b_x, tl.where(b_active, b_peak, 0.0), tl.where(b_active, b_rate, 1.0))
    b_w = tl.where(o_v < V, b_w, 0)
    tl.store(p_kept + i_row * num_chunks + i_chunk, tl.sum(tl.where(b_w.to(tl.float64) >= b_floor, b_w, 0), 0))
    if FILTERED:  # noqa: SIM102
        if b_active & _is_filtered(p_row):
            tl.store(p_total + i_row * num_chunks + i_chunk, tl.sum(b_w, 0))
            b_each = tl.where(tl.load(p_row + 1) > 0.0, tl.full([CHUNK], 1, tl.int64), b_w)
            tl.atomic_add(p_buckets + i_row * BUCKETS + b_bucket, b_each, mask=b_w > 0, sem="relaxed")


@triton.jit
def _sample_bounds_kernel(
    p_table, p_peaks, p_buckets, p_bounds, num_chunks,
    BUCKETS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    b_peak = tl.max(tl.load(p_peaks + i_row * num_chunks + o_c, mask=o_c < num_chunks, other=float("-inf")), 0)
    p_row = p_table + i_row * NUM_COLUMNS
    if _is_active(b_peak, tl.load(p_row)) & _is_filtered(p_row):
        b_top_k, b_top_p = tl.load(p_row + 1), tl.load(p_row + 2)
        o_b = tl.arange(0, BUCKETS)
        b_each = tl.load(p_buckets + i_row * BUCKETS + o_b)
        b_reached = tl.cumsum(b_each, 0)
        p_bounds += i_row * NUM_BOUNDS
        if b_top_k > 0.0:
            i_last = tl.minimum(tl.sum((b_reached.to(tl.float64) < b_top_k).to(tl.int32), 0), BUCKETS - 1)
            i_first = i_last
            if b_top_p < 1.0:
                # What tokens weigh at most and at least, as shares of the likeliest one's weight: a bucket tells a
                # weight to 1.6 %, rounding adds half of the smallest weight, and a thousandth covers fp32. Top-k keeps
                # at least what lies before the bucket of its cut.
                b_weight = tl.exp2(-o_b.to(tl.float32) / PER_HALVING)
                b_most = tl.cumsum(b_each.to(tl.float32) * (1.001 * b_weight + HALF_UNIT), 0)
                b_least = b_each.to(tl.float32) * tl.maximum(0.999 * BUCKET_RATIO * b_weight - HALF_UNIT, 0.0)
                b_needed = 0.999 * b_top_p.to(tl.float32) * tl.sum(tl.where(o_b < i_last, b_least, 0.0), 0)
                i_first = tl.minimum(tl.sum((b_most < b_needed).to(tl.int32), 0), i_last)
            # A block that holds all tokens up to the last bucket holds all that can be drawn.
            i_first = tl.where(tl.sum(tl.where(o_b <= i_last, b_each, 0), 0) <= BLOCK, 0, i_first)
            tl.store(p_bounds + 2, tl.sum(tl.where(o_b < i_first, b_each, 0), 0).to(tl.int32))
        else:
            b_needed = tl.maximum(tl.ceil(b_top_p * tl.sum(b_each, 0).to(tl.float64)).to(tl.int64), 1)
            i_last = tl.minimum(tl.sum((b_reached < b_needed).to(tl.int32), 0), BUCKETS - 1)
            i_first = i_last
        tl.store(p_bounds, i_first)
        tl.store(p_bounds + 1, i_last)
        tl.store(p_bounds + 3, i_last * 0)


@triton.jit
def _sample_candidates_kernel(
    p_logits, p_table, p_peaks, p_bounds, p_lists, p_before, p_kept_before, V, stride_row, num_chunks,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(1)
    o_c = tl.arange(0, BLOCK_C)
    b_peak = tl.max(tl.load(p_peaks + i_row * num_chunks + o_c, mask=o_c < num_chunks, other=float("-inf")), 0)
    p_row = p_table + i_row * NUM_COLUMNS
    b_rate, b_floor = tl.load(p_row), tl.load(p_row + 3)
    if _is_active(b_peak, b_rate) & _is_filtered(p_row):
        p_bounds += i_row * NUM_BOUNDS
        i_first, i_last = tl.load(p_bounds), tl.load(p_bounds + 1)
        o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
        b_x = tl.load(p_logits + i_row * stride_row + o_v, mask=o_v < V, other=float("-inf"))
        b_w, b_bucket = weights_below(b_x, b_peak, b_rate)
        b_before = tl.where((o_v < V) & (b_bucket < i_first), b_w, 0)
        tl.store(p_before + i_row * num_chunks + i_chunk, tl.sum(b_before, 0))
        b_kept = tl.where(b_before.to(tl.float64) >= b_floor, b_before, 0)
        tl.store(p_kept_before + i_row * num_chunks + i_chunk, tl.sum(b_kept, 0))
        b_listed = ((b_w > 0) & (o_v < V) & (b_bucket >= i_first) & (b_bucket <= i_last)).to(tl.int32)
        b_num = tl.sum(b_listed, 0)
        if b_num > 0:
            # In which order chunks take their places does not matter: the list is a set.
            b_place = tl.atomic_add(p_bounds + 3, b_num, sem="relaxed")
            p_places = p_lists + i_row * V + b_place + tl.cumsum(b_listed, 0) - 1
            tl.store(p_places, o_v, mask=b_listed > 0)


@triton.jit
def _sample_draw_kernel(
    p_logits, p_table, p_peaks, p_bests, p_bounds, p_lists, p_kept, p_total, p_before, p_kept_before, p_ids, p_host,
    V, stride_row, num_chunks,
    FILTERED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < num_chunks
    o_sums = i_row * num_chunks + o_c
    b_peaks = tl.load(p_peaks + o_sums, mask=m_c, other=float("-inf"))
    b_bests = tl.load(p_bests + o_sums, mask=m_c, other=V)
    b_peak = tl.max(b_peaks, 0)
    b_best = tl.min(tl.where(b_peaks == b_peak, b_bests, V), 0)
    p_row = p_table + i_row * NUM_COLUMNS
    b_rate, b_top_k, b_top_p = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    b_floor, b_uniform = tl.load(p_row + 3), tl.load(p_row + 4)
    p_row_logits = p_logits + i_row * stride_row
    b_active = _is_active(b_peak, b_rate)
    b_sums = tl.load(p_kept + o_sums, mask=m_c, other=0)
    b_cut = tl.sum(b_sums * 0, 0)
    b_drawn = b_cut.to(tl.int32) - 1
    if FILTERED:  # noqa: SIM102
        if b_active & ((b_top_k > 0.0) | (b_top_p < 1.0)):
            p_list = p_lists + i_row * V
            p_bounds += i_row * NUM_BOUNDS
            i_first, b_count, b_num = tl.load(p_bounds), tl.load(p_bounds + 2), tl.load(p_bounds + 3)
            b_sum = tl.sum(tl.load(p_before + o_sums, mask=m_c, other=0), 0)
            b_total = tl.sum(tl.load(p_total + o_sums, mask=m_c, other=0), 0)
            if b_top_k > 0.0:
                b_needed = b_top_k.to(tl.int64) - b_count
                b_cut = find_cut(p_row_logits, p_list, b_num, b_peak, b_rate, b_needed, False, BLOCK)
                b_total = b_sum + mass_of(p_row_logits, p_list, b_num, b_peak, b_rate, b_cut, True, 0, BLOCK)
            if b_top_p < 1.0:
                b_needed = tl.ceil(b_top_p * b_total.to(tl.float64)).to(tl.int64) - b_sum
                b_cut = find_cut(p_row_logits, p_list, b_num, b_peak, b_rate, b_needed, True, BLOCK)
            if (i_first == 0) & (b_num <= BLOCK):
                b_drawn = draw_listed(p_row_logits, p_list, b_num, b_peak, b_rate, b_cut, b_floor, b_uniform, BLOCK)
            else:
                b_sums = tl.load(p_kept_before + o_sums, mask=m_c, other=0)
                for o_start in range(0, b_num, SPREAD):
                    o_n = o_start + tl.arange(0, SPREAD)
                    o_v, b_kept = kept_of(p_row_logits, p_list, o_n, b_num, b_peak, b_rate, b_cut, b_floor)
                    m_here = (o_v // CHUNK)[None, :] == o_c[:, None]
                    b_sums += tl.sum(tl.where(m_here, b_kept[None, :], 0), 1)
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
    # One memory for all would begin at other multiples of 16 bytes with other numbers of rows, and compile again.
    kept = ids.new_empty(num_rows, num_chunks)
    total, before, kept_before = (torch.empty_like(kept) if filtered else kept for _ in range(3))
    buckets = ids.new_empty(num_rows if filtered else 0, NUM_BUCKETS)
    bounds = bests.new_empty(num_rows, NUM_BOUNDS.value)
    # Room for every token, because all may be equally likely; that is as much as the logits take.
    lists = bests.new_empty(num_rows, vocabulary if filtered else 0)
    grid, sizes = (num_rows, num_chunks), (vocabulary, logits.stride(0), num_chunks)
    # Fused multiply-adds would round weights differently than the reference.
    shape = {"BLOCK_C": triton.next_power_of_2(num_chunks), "enable_fp_fusion": False, **overlap(logits)}
    cut = {"FILTERED": filtered, "CHUNK": CHUNK, "BUCKETS": NUM_BUCKETS}
    first = (logits, peaks, bests, buckets)
    _sample_peaks_kernel[grid](*first, *sizes, num_warps=8, **cut, **overlap(logits))
    second = (logits, table, peaks, buckets, kept, total)
    _sample_histogram_kernel[grid](*second, *sizes, num_warps=8, **cut, **shape)
    if filtered:
        third = (table, peaks, buckets, bounds, num_chunks)
        _sample_bounds_kernel[(num_rows,)](*third, BUCKETS=NUM_BUCKETS, BLOCK=BLOCK, num_warps=8, **shape)
        fourth = (logits, table, peaks, bounds, lists, before, kept_before)
        _sample_candidates_kernel[grid](*fourth, *sizes, CHUNK=CHUNK, num_warps=8, **shape)
    last = (logits, table, peaks, bests, bounds, lists, kept, total, before, kept_before, ids, host)
    _sample_draw_kernel[(num_rows,)](*last, *sizes, FILTERED=filtered, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=16, **shape)
    return ids
