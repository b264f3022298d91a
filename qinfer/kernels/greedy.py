"""The likeliest token of every row, the lower id of two.

    ids[r] = min { v : logits[r, v] = max_w logits[r, w] }, or -1 if that maximum is not finite or a logit is NaN

-inf is a token that cannot be chosen. Two launches: every program finds the best of one chunk of a row, then one
program per row the best of its chunks; a single program would read a whole row through one multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_chosen, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs

CHUNK = 2048


def greedy_reference(logits: Tensor, *, out: Tensor | None = None, host: Tensor | None = None) -> Tensor:
    """Compute `greedy` in plain torch."""
    peak, best = logits.max(dim=-1)
    # Zero for finite numbers, NaN for all others.
    best.masked_fill_((peak - peak) != 0, -1)
    if host is not None:
        host.copy_(best)
    return best if out is None else out.copy_(best)


@triton.jit
def _greedy_chunks_kernel(
    p_logits, p_peaks, p_bests, V, stride_row, num_chunks, CHUNK: tl.constexpr, OVERLAP: tl.constexpr
):
    let_next_start(OVERLAP)
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    wait_for_inputs(OVERLAP)
    b_x = tl.load(p_logits + i_row * stride_row + o_v, mask=o_v < V, other=float("-inf"))
    # Infinity stands for NaN as well: both spoil the row.
    b_x = tl.where(b_x == b_x, b_x, float("inf"))
    b_peak = tl.max(b_x, 0)
    tl.store(p_peaks + i_row * num_chunks + i_chunk, b_peak)
    tl.store(p_bests + i_row * num_chunks + i_chunk, tl.min(tl.where(b_x == b_peak, o_v, V), 0))


@triton.jit
def _greedy_rows_kernel(p_peaks, p_bests, p_ids, p_host, num_chunks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_start(OVERLAP)
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < num_chunks
    wait_for_inputs(OVERLAP)
    b_peaks = tl.load(p_peaks + i_row * num_chunks + o_c, mask=m_c, other=float("-inf"))
    b_bests = tl.load(p_bests + i_row * num_chunks + o_c, mask=m_c, other=0)
    b_peak = tl.max(b_peaks, 0)
    b_id = tl.min(tl.where(m_c & (b_peaks == b_peak), b_bests, 2147483647), 0)
    b_id = tl.where(tl.abs(b_peak) < float("inf"), b_id, -1).to(tl.int64)
    tl.store(p_ids + i_row, b_id)
    if p_host is not None:
        tl.store(p_host + i_row, b_id)


def _check_greedy(logits: Tensor, *, out: Tensor | None = None, host: Tensor | None = None) -> None:
    check_shape("logits", logits, ("R", "V"))
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, got {logits.dtype}")
    check_rows("logits", logits)
    if not logits.shape[1]:
        raise ValueError("logits must have a vocabulary, got none")
    check_chosen(logits, out, host)


@op(reference=greedy_reference, check=_check_greedy)
def greedy(logits: Tensor, *, out: Tensor | None = None, host: Tensor | None = None) -> Tensor:
    """Choose the likeliest token of every row.

    Args:
        logits: [R, V] fp32, last stride 1.
        out: [R] int64 to write to, stride 1; a new tensor by default.
        host: [R] int64 in page-locked memory of the host, stride 1, to write the ids to as well: the next kernel waits
            for a copy behind this one, for 9 µs on an H200 (benchmarks/LOG.md).

    Returns:
        [R] int64 ids, -1 where the largest logit is not finite or one is NaN.

    Raises:
        TypeError: logits are not fp32, or out or host is not int64.
        ValueError: a shape, a stride or a device does not fit.
    """
    num_rows, vocab_size = logits.shape
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device) if out is None else out
    if num_rows:
        num_chunks = triton.cdiv(vocab_size, CHUNK)
        peaks = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=logits.device)
        bests = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
        _greedy_chunks_kernel[num_rows, num_chunks](
            logits, peaks, bests, vocab_size, logits.stride(0), num_chunks, CHUNK=CHUNK, **overlap(logits)
        )
        block = triton.next_power_of_2(num_chunks)
        _greedy_rows_kernel[(num_rows,)](
            peaks, bests, ids, host, num_chunks, BLOCK=block, num_warps=1, **overlap(logits)
        )
    return ids
