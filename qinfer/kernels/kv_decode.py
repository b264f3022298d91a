"""The keys and values that the prompts of a step see, decoded: rows in any codec become rows of plain numbers.

    out[first_b + i, g, s] = decode(pages[page_table[b, seen_b + i], g, s])   for the pages i that sequence b sees

Attention of prompts reads a key for every block of queries, 64 times for a prompt of 2,048: decoding once is far less
work than decoding as often (`attention_decoded.py`). Decoded pages stand side by side in the order of the sequences,
as many as there is room for: memory depends neither on the cache nor on the longest sequence. What became of a
sequence is its role:

- STREAM: it has fewer queries than asked for, and is not decoded.
- PROMPT: it is decoded; its row of the new page table tells where.
- LEFT_OVER: it has queries enough, but no room was left.

Whole pages are decoded, in front of a window too, since kernels load whole tiles and a weight of 0 times NaN is NaN;
rows behind a sequence, which may hold anything, are neither read nor written.

The pages of all sequences are counted through, and a program has every so many tiles of them, of one head and one side.
Codes around a middle are small integers, exact in fp16, so they are rotated back by tensor cores, exactly, and scaled
afterwards in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.attention_blocks import LEFT_OVER, PROMPT, STREAM
from qinfer.kernels.attention_products import joined, load_tile
from qinfer.kernels.checks import check_device, check_float, check_int32, check_shape
from qinfer.kernels.device import is_ptx_target, num_sms, op
from qinfer.kernels.kv_codec import NUM_PLANES, KVPages, run_length
from qinfer.kernels.kv_tile import (
    has_scales,
    is_rotated,
    load_scales,
    num_planes,
    plane,
    rotate,
    step_of,
    weight_of,
    zero_of,
)
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs

BLOCK_R = 32  # rows of a tile, which lies in one page; page sizes are multiples of 16
WAVES = 8  # programs per multiprocessor


class Seen(NamedTuple):
    """What prompts see."""

    keys: Tensor  # [P, G, S, D]
    values: Tensor
    page_table: Tensor  # [B, W] int32
    roles: Tensor  # [B + 1] int32 of all sequences, then the number of those that are left over


def kv_decode_reference(
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    *,
    dtype: torch.dtype,
    max_pages: int,
    window: int | None = None,
    min_queries: int = 1,
) -> Seen:
    """Decode sequence by sequence."""
    out = _room(page_table, k_pages, dtype, max_pages)
    page_size, first, is_full = k_pages.codes.shape[2], 0, False
    starts, lens = query_starts.tolist(), context_lens.tolist()
    for b, length in enumerate(lens):
        num_queries = starts[b + 1] - starts[b]
        if num_queries < min_queries:
            out.roles[b] = STREAM.value
            continue
        seen = 0 if window is None else max(0, length - num_queries - window + 1) // page_size
        stop = -(-length // page_size)
        is_full = is_full or first + stop - seen > max_pages
        if is_full:
            out.roles[b] = LEFT_OVER.value
            continue
        out.roles[b] = PROMPT.value
        own = slice(first, first + stop - seen)
        for numbers, pages in ((out.keys, k_pages), (out.values, v_pages)):
            numbers[own] = pages.decode(page_table[b, seen:stop].long()).to(dtype)
        out.page_table[b, seen:stop] = torch.arange(own.start, own.stop)
        first = own.stop
    out.roles[-1] = (out.roles[:-1] == LEFT_OVER.value).sum()
    return out


def _room(page_table: Tensor, pages: KVPages, dtype: torch.dtype, max_pages: int) -> Seen:
    """Return room for the result."""
    shape = (max_pages, *pages.codes.shape[1:3], pages.head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=page_table.device) for _ in range(2))
    return Seen(keys, values, torch.empty_like(page_table), page_table.new_empty(len(page_table) + 1))


@triton.jit
def _numbers(b_words, b_upper, INDEX: tl.constexpr, SCHEME: tl.constexpr, PTX: tl.constexpr):
    """Return the numbers of a plane without the scales of their rows: integers, or those of the codec in fp8."""
    b_plane = plane(b_words, b_upper, INDEX, tl.float32, SCHEME, PTX)
    return (b_plane * (step_of(SCHEME, PTX) * weight_of(SCHEME, INDEX)) - zero_of(SCHEME)).to(tl.float16)


@triton.jit
def _decoded(b_words, b_upper, SCHEME: tl.constexpr, PTX: tl.constexpr):
    """Return all features of a tile of words, [R, D] fp16, without the scales of their rows."""
    PLANES: tl.constexpr = num_planes(SCHEME)
    b_0 = _numbers(b_words, b_upper, 0, SCHEME, PTX)
    b_1 = _numbers(b_words, b_upper, 1, SCHEME, PTX)
    if PLANES == 2:
        return joined((b_0, b_1), PLANES)
    else:
        b_2 = _numbers(b_words, b_upper, 2, SCHEME, PTX)
        b_3 = _numbers(b_words, b_upper, 3, SCHEME, PTX)
        return joined((b_0, b_1, b_2, b_3), PLANES)


@triton.jit
def _decode_side(
    p_words, p_scales, p_table, p_out, p_out_table, s_page, s_head, s_scale_page, s_table, s_out_table,
    b_len, b_seen, b_behind, num_pages,
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ROW: tl.constexpr, RUN: tl.constexpr, SCHEME: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PTX: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Decode a program's tiles of keys, or of values, and fill in the new page table if it is wanted."""
    TILES: tl.constexpr = S // BLOCK
    i_head, o_d = tl.program_id(1), tl.arange(0, BLOCK_D)
    o_seq = tl.arange(0, b_len.shape[0])
    for i in range(tl.program_id(0), num_pages * TILES, tl.num_programs(0)):
        i_out = i // TILES
        m_before = b_behind <= i_out
        m_own = o_seq == tl.sum(m_before.to(tl.int32))
        i_place = i_out - tl.max(tl.where(m_before, b_behind, 0)) + tl.sum(tl.where(m_own, b_seen, 0))
        i_seq = tl.sum(m_before.to(tl.int64))
        i_page = tl.load(p_table + i_seq * s_table + i_place).to(tl.int64)
        if HAS_TABLE and i % TILES + i_head == 0:
            tl.store(p_out_table + i_seq * s_out_table + i_place, i_out)
        o_row = i % TILES * BLOCK + tl.arange(0, BLOCK)
        m_row = i_place * S + o_row < tl.sum(tl.where(m_own, b_len, 0))
        p_page = p_words + i_page * s_page + i_head.to(tl.int64) * s_head
        b_words, b_upper = load_tile(p_page, o_row, m_row, ROW, D, BLOCK_D, SCHEME, True)
        b_x = _decoded(b_words, b_upper, SCHEME, PTX)
        b_x = rotate(b_x, RUN) if is_rotated(SCHEME) else b_x.to(tl.float32)
        if has_scales(SCHEME):
            b_x *= load_scales(p_scales, i_page * s_scale_page + i_head * S, o_row, m_row)[:, None]
        p_rows = p_out + ((i_out.to(tl.int64) * G + i_head) * S + o_row)[:, None] * D
        tl.store(p_rows + o_d[None, :], b_x.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


# The fields of a batch are views into one buffer, at any alignment, and its sizes change from step to step.
@triton.jit(
    do_not_specialize=["s_table", "s_out_table", "num_seqs", "max_pages"],
    do_not_specialize_on_alignment=["p_table", "p_starts", "p_lens"],
)
def _kv_decode_kernel(
    p_k, p_k_scale, p_v, p_v_scale, p_table, p_starts, p_lens,
    p_out_k, p_out_v,  # [P, G, S, D]
    p_out_table, p_roles,
    s_k_page, s_k_head, s_k_scale_page, s_v_page, s_v_head, s_v_scale_page, s_table, s_out_table, num_seqs, max_pages,
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, RUN: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, K_SCHEME: tl.constexpr, V_SCHEME: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    MIN_QUERIES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    i_side = tl.program_id(2)
    o_seq = tl.arange(0, BLOCK_B)
    m_seq = o_seq < num_seqs
    b_len = tl.load(p_lens + o_seq, mask=m_seq, other=0)
    b_queries = tl.load(p_starts + o_seq + 1, mask=m_seq, other=0) - tl.load(p_starts + o_seq, mask=m_seq, other=0)
    b_seen = b_len * 0
    if WINDOW > 0:
        b_seen = tl.maximum(b_len - b_queries - WINDOW + 1, 0) // S
    m_many = b_queries >= MIN_QUERIES
    b_behind = tl.cumsum(tl.where(m_many, tl.cdiv(b_len, S) - b_seen, 0))
    # Counts ascend, so once a sequence finds no room, none behind it does.
    m_fits = b_behind <= max_pages
    num_pages = tl.max(tl.where(m_fits, b_behind, 0))
    wait_for_inputs(OVERLAP)
    if tl.program_id(0) + tl.program_id(1) + i_side == 0:
        b_role = tl.where(m_many, tl.where(m_fits, PROMPT, LEFT_OVER), STREAM)
        tl.store(p_roles + o_seq, b_role, mask=m_seq)
        tl.store(p_roles + num_seqs, tl.sum((b_role == LEFT_OVER).to(tl.int32)))
    if i_side == 0:
        _decode_side(
            p_k, p_k_scale, p_table, p_out_k, p_out_table, s_k_page, s_k_head, s_k_scale_page, s_table, s_out_table,
            b_len, b_seen, b_behind, num_pages, G, S, D, K_ROW, RUN, K_SCHEME, BLOCK, BLOCK_D, PTX, True,
        )  # fmt: skip
    else:
        _decode_side(
            p_v, p_v_scale, p_table, p_out_v, p_out_table, s_v_page, s_v_head, s_v_scale_page, s_table, s_out_table,
            b_len, b_seen, b_behind, num_pages, G, S, D, V_ROW, RUN, V_SCHEME, BLOCK, BLOCK_D, PTX, False,
        )  # fmt: skip


def _check_kv_decode(
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    *,
    dtype: torch.dtype,
    max_pages: int,
    window: int | None = None,
    min_queries: int = 1,
) -> None:
    check_shape("page_table", page_table, ("B", "W"))
    num_seqs = page_table.shape[0]
    check_shape("query_starts", query_starts, (num_seqs + 1,))
    check_shape("context_lens", context_lens, (num_seqs,))
    k_pages.check("k_pages", ("P", "G", "S", k_pages.head_dim))
    v_pages.check("v_pages", (*k_pages.codes.shape[:3], k_pages.head_dim))
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.codec.scheme == "plain":
            raise ValueError(f"{name} must hold codes, got format {pages.codec.name}, whose rows are numbers already")
    if k_pages.codes.shape[2] % 16:
        raise ValueError(f"page size must be a multiple of 16, got {k_pages.codes.shape[2]}")
    check_float("dtype", dtype)
    for name, value in (("max_pages", max_pages), ("window", window), ("min_queries", min_queries)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    indices = {"page_table": page_table, "query_starts": query_starts, "context_lens": context_lens}
    check_int32(**indices)
    check_device(page_table, k_pages=k_pages.codes, v_pages=v_pages.codes, **indices)
    check_device(page_table, k_scales=k_pages.scales, v_scales=v_pages.scales)


@op(reference=kv_decode_reference, check=_check_kv_decode)
def kv_decode(
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    *,
    dtype: torch.dtype,
    max_pages: int,
    window: int | None = None,
    min_queries: int = 1,
) -> Seen:
    """Decode the keys and values that the prompts of a step see.

    Args:
        page_table: [B, W] int32 pages of each sequence; entries beyond the context, or behind the window, are not read.
        query_starts: [B + 1] int32 first query token of each sequence.
        context_lens: [B] int32 keys of each sequence; 0 marks padding.
        k_pages: [P, G, S, D] keys in a codec.
        v_pages: [P, G, S, D] values in a codec, not necessarily the same.
        dtype: of the numbers.
        max_pages: Most pages to decode. A sequence that has no room left, and those behind it, are left over.
        window: Number of newest positions that a query sees, its own included; None means all.
        min_queries: Fewest query tokens of a prompt; what has fewer is a stream.

    Returns:
        Keys and values [max_pages, G, S, D] in dtype, the page table [B, W] of prompts, and the roles [B + 1].
        Pages that nobody has, rows behind a sequence and other entries of the table hold anything.

    Raises:
        ValueError: A shape or a device does not fit, or the pages hold plain numbers.
        TypeError: A dtype does not fit.
    """
    num_heads, page_size = k_pages.codes.shape[1:3]
    head_dim, num_seqs, schemes = k_pages.head_dim, len(context_lens), (k_pages.codec.scheme, v_pages.codec.scheme)
    out, block = _room(page_table, k_pages, dtype, max_pages), min(BLOCK_R, page_size & -page_size)
    programs = min(max_pages * page_size // block, triton.cdiv(WAVES * num_sms(page_table.device), 2 * num_heads))
    _kv_decode_kernel[programs, num_heads, 2](
        k_pages.words, k_pages.scales, v_pages.words, v_pages.scales, page_table, query_starts, context_lens, *out,
        *k_pages.strides, *v_pages.strides, page_table.stride(0), out.page_table.stride(0), num_seqs, max_pages,
        G=num_heads, S=page_size, D=head_dim, RUN=run_length(head_dim),
        K_ROW=k_pages.words.stride(2), V_ROW=v_pages.words.stride(2), K_SCHEME=schemes[0], V_SCHEME=schemes[1],
        WINDOW=window or 0, MIN_QUERIES=min_queries, BLOCK_B=triton.next_power_of_2(num_seqs), BLOCK=block,
        BLOCK_D=max(16 * max(NUM_PLANES[scheme] for scheme in schemes), triton.next_power_of_2(head_dim)),
        PTX=is_ptx_target(page_table), num_warps=4, **overlap(page_table),
    )  # fmt: skip
    return out
