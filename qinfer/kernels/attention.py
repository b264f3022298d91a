"""Attention of new tokens over a paged KV cache, for any number of query tokens per sequence.

    out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, g]) v[j, g],   g = h // (H // G)

Query i (counted from 0) of sequence b sits at position p = context_lens[b] - qlen_b + i and sees the positions j <= p
and, with a window, j > p - window. Position j of sequence b lies in page page_table[b, j // S], row j % S.

Memory: pages are [P, G, S, D], so that the rows of one KV head in one page are contiguous; q is [T, H, D], the
sequences one after the other. One program owns one KV head and BLOCK_M rows, row r being query token r // GROUP and
head r % GROUP of that KV head, so a key is read once for all its query heads and decode is a chunk of one token. The
visible range is cut into `splits` runs of whole tiles; since the kernel does that from `context_lens`, one grid serves
all lengths. Each split leaves a normalized fp32 result and the base-2 logarithm of its softmax sum, and a second kernel
adds them up in a fixed order.

Softmax and accumulators are fp32; both products multiply in the pages' dtype (q and the probabilities are converted to
it) and accumulate in fp32. Limits: D <= 256, H / G <= 64, S a multiple of 16, q fp16, bf16 or fp32, offsets 64-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_float, check_rows, check_shape
from qinfer.kernels.device import num_sms, op

MAX_HEAD_DIM = 256
MAX_GROUP = 64
MAX_SPLITS = 32
MIN_BLOCK_N = 16  # smallest key tile; a tile lies in one page
LOG2_E = 1.4426950408889634


def paged_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    order: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Compute paged attention in plain torch and fp32, one sequence at a time."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    out = torch.zeros(num_tokens, num_heads, head_dim, dtype=torch.float32, device=q.device)
    starts, lens = query_starts.tolist(), context_lens.tolist()
    for b, context_len in enumerate(lens):
        rows = slice(starts[b], starts[b + 1])
        query_len = rows.stop - rows.start
        if query_len == 0 or context_len == 0:
            continue
        first = context_len - query_len
        first_page = 0 if window is None else max(first - window + 1, 0) // page_size
        pages = page_table[b, first_page : -(-context_len // page_size)].long()
        seen = slice(0, context_len - first_page * page_size)
        keys, values = (p[pages].transpose(0, 1).flatten(1, 2)[:, seen].float() for p in (k_pages, v_pages))
        grouped = q[rows].float().reshape(query_len, num_kv_heads, -1, head_dim)
        queries = grouped.permute(1, 2, 0, 3).flatten(1, 2)  # [G, GROUP * query_len, D]
        own = torch.arange(first, context_len, device=q.device)[:, None]
        position = torch.arange(first_page * page_size, context_len, device=q.device)
        hidden = position > own
        if window is not None:
            hidden |= position <= own - window
        scores = (queries @ keys.transpose(1, 2) * scale).reshape(num_kv_heads, -1, *hidden.shape)
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        result = (weights.flatten(1, 2) @ values).reshape(num_kv_heads, -1, query_len, head_dim)
        out[rows] = result.permute(2, 0, 1, 3).flatten(1, 2)
    flat = out.flatten(1)
    return (flat if order is None else flat[:, order.long()]).to(q.dtype)


# The fields of a batch are views into one buffer, at any alignment, and its sizes change from step to step.
@triton.jit(
    do_not_specialize=["s_table", "num_seqs", "search_steps"],
    do_not_specialize_on_alignment=["p_table", "p_starts", "p_lens"],
)
def _paged_attention_kernel(
    p_q, p_k, p_v, p_table, p_starts, p_lens,
    p_out,  # [T, H, SPLITS, D]: fp32 partial results, or with one split the result itself
    p_lse,  # [T, H, SPLITS] fp32, unused with one split
    scale,  # softmax scale times log2(e)
    s_q_token, s_q_head, s_k_page, s_k_head, s_k_row, s_v_page, s_v_head, s_v_row, s_table, num_seqs, search_steps,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # every sequence fits one query block
):  # fmt: skip
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # Later queries see more keys: starting with them leaves the short programs to fill the last wave.
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head = tl.program_id(1)
    i_split = tl.program_id(2)

    # Sequence b owns the blocks from query_starts[b] // BLOCK_Q + b on, which is never one too few.
    i_seq = i_block
    i_local = 0
    if not ONE_BLOCK:
        i_seq = i_block * 0
        b_above = i_seq + num_seqs
        for _ in range(search_steps):
            b_middle = (i_seq + b_above) // 2
            is_left = tl.load(p_starts + b_middle) // BLOCK_Q + b_middle <= i_block
            i_seq = tl.where(is_left, b_middle, i_seq)
            b_above = tl.where(is_left, b_above, b_middle)
        i_local = i_block - (tl.load(p_starts + i_seq) // BLOCK_Q + i_seq)

    b_start = tl.load(p_starts + i_seq)
    b_query_len = tl.load(p_starts + i_seq + 1) - b_start
    b_context_len = tl.load(p_lens + i_seq)
    b_first = b_context_len - b_query_len + i_local * BLOCK_Q

    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_query = i_local * BLOCK_Q + o_m // GROUP
    m_row = (o_m < BLOCK_Q * GROUP) & (o_query < b_query_len)
    m_d = o_d < HEAD_DIM
    # A row without a query sees nothing.
    b_own = tl.where(m_row, b_first + o_m // GROUP, -1)
    o_token = (b_start + o_query).to(tl.int64)
    o_head = i_head * GROUP + o_m % GROUP
    p_rows = p_q + o_token * s_q_token + o_head.to(tl.int64) * s_q_head
    b_q = tl.load(p_rows[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)
    b_q = b_q.to(p_k.dtype.element_ty)

    b_stop = tl.minimum(b_first + BLOCK_Q, b_context_len)
    b_stop = tl.where(i_local * BLOCK_Q < b_query_len, tl.maximum(b_stop, 0), 0)
    b_tile = b_stop * 0
    if WINDOW > 0:
        b_tile = tl.maximum(b_first - WINDOW + 1, 0) // BLOCK_N
    b_num_tiles = tl.maximum((b_stop + BLOCK_N - 1) // BLOCK_N - b_tile, 0)
    b_tile_stop = b_tile + b_num_tiles * (i_split + 1) // SPLITS
    b_tile_start = b_tile + b_num_tiles * i_split // SPLITS

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    p_k += i_head.to(tl.int64) * s_k_head
    p_v += i_head.to(tl.int64) * s_v_head
    p_table += i_seq.to(tl.int64) * s_table
    # The page of a tile is loaded one round early: as a load within its own round, Triton would give it pipeline stages
    # of its own and leave K and V a single buffer.
    b_page = tl.load(p_table + b_tile_start * BLOCK_N // PAGE_SIZE, mask=b_tile_start < b_tile_stop, other=0)
    for i_tile in range(b_tile_start, b_tile_stop):
        b_key = i_tile * BLOCK_N
        b_next = tl.load(p_table + (b_key + BLOCK_N) // PAGE_SIZE, mask=i_tile + 1 < b_tile_stop, other=0)
        o_row = (b_key % PAGE_SIZE + o_n).to(tl.int64)
        o_key = b_key + o_n
        # Rows of a page beyond the sequence may hold NaN, and a probability of 0 times NaN is NaN.
        m_key = o_key < b_stop
        p_k_tile = p_k + b_page.to(tl.int64) * s_k_page + o_row[None, :] * s_k_row + o_d[:, None]
        b_k = tl.load(p_k_tile, mask=m_key[None, :] & m_d[:, None], other=0.0)
        b_scores = tl.dot(b_q, b_k, input_precision="ieee") * scale
        m_seen = o_key[None, :] <= b_own[:, None]
        if WINDOW > 0:
            m_seen = m_seen & (o_key[None, :] > b_own[:, None] - WINDOW)
        b_scores = tl.where(m_seen, b_scores, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_scores, axis=1))
        # A row that has seen nothing yet would compute -inf - -inf.
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_p = tl.exp2(b_scores - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
        b_acc = b_acc * b_decay[:, None]
        p_v_tile = p_v + b_page.to(tl.int64) * s_v_page + o_row[:, None] * s_v_row + o_d[None, :]
        b_v = tl.load(p_v_tile, mask=m_key[:, None] & m_d[None, :], other=0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_max = b_new_max
        b_page = b_next

    b_out = b_acc / tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    o_out = (o_token * (tl.num_programs(1) * GROUP) + o_head) * SPLITS + i_split
    m_out = m_row[:, None] & m_d[None, :]
    if SPLITS > 1:
        # The reduction skips what a split without tiles would store, by its sum of zero.
        m_out = m_out & (b_tile_start < b_tile_stop)
        b_lse = b_max + tl.log2(tl.where(b_sum > 0.0, b_sum, 1.0))
        tl.store(p_lse + o_out, b_lse, mask=m_row)
    tl.store(p_out + o_out[:, None] * HEAD_DIM + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _reduce_splits_kernel(
    p_parts,  # [T, H, SPLITS, D]
    p_lse,  # [T, H, SPLITS]
    p_order,
    p_out,  # [T, H*D]
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    o_out = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_out = o_out < NUM_FEATURES
    o_feature = o_out
    if HAS_ORDER:
        o_feature = tl.load(p_order + o_out, mask=m_out, other=0)
    o_head = i_token * (NUM_FEATURES // HEAD_DIM) + o_feature // HEAD_DIM
    o_d = o_feature % HEAD_DIM
    if SPLITS == 1:
        b_out = tl.load(p_parts + o_head * HEAD_DIM + o_d, mask=m_out, other=0.0).to(tl.float32)
    else:
        o_split = tl.arange(0, BLOCK_S)
        o_part = o_head[None, :] * SPLITS + o_split[:, None]
        m_part = m_out[None, :] & (o_split < SPLITS)[:, None]
        b_lse = tl.load(p_lse + o_part, mask=m_part, other=float("-inf"))
        m_part = m_part & (b_lse > float("-inf"))
        b_part = tl.load(p_parts + o_part * HEAD_DIM + o_d[None, :], mask=m_part, other=0.0)
        b_max = tl.max(b_lse, axis=0)
        b_weight = tl.exp2(b_lse - tl.where(b_max == float("-inf"), 0.0, b_max)[None, :])
        b_sum = tl.sum(b_weight, axis=0)
        b_out = tl.sum(b_weight * b_part, axis=0) / tl.where(b_sum > 0.0, b_sum, 1.0)
    tl.store(p_out + i_token * NUM_FEATURES + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


class _Tiles(NamedTuple):
    """Compile-time choices of the attention kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _tiles(max_query_len: int, group: int, head_dim: int, page_size: int, itemsize: int) -> _Tiles:
    """Choose tiles that fit 99 KiB of shared memory and 255 registers on every NVIDIA target, 64 KiB on AMD.

    Args:
        max_query_len: Longest query of the step, in tokens.
        group: Query heads per KV head.
        head_dim: D.
        page_size: Tokens per page, a multiple of 16.
        itemsize: Bytes per element of the pages.
    """
    rows = max_query_len * group
    if itemsize == 4:  # exact fp32 products run on the plain ALUs and keep their operands in registers
        tiles = _Tiles(16 if group <= 16 else 64, 16, 4 if head_dim <= 64 and group <= 16 else 8, 1)
    elif rows <= 16:
        tiles = _Tiles(16, 64 if head_dim <= 128 else 32, 4, 3)
    elif head_dim > 128:
        tiles = _Tiles(64, 16, 8, 3)
    elif rows <= 64 and group <= 32:
        tiles = _Tiles(32, 64, 4, 3)
    else:
        tiles = _Tiles(128, 64 if head_dim <= 64 else 32, 8, 3)
    # Every stage but the one in registers is a buffer of keys and one of values; there is less room for them on AMD.
    # The largest power of two that divides the page size bounds a tile that lies in one page.
    num_stages = min(tiles.num_stages, 2) if torch.version.hip is not None else tiles.num_stages
    return tiles._replace(block_n=min(tiles.block_n, page_size & -page_size), num_stages=num_stages)


def _num_splits(num_programs: int, num_tiles: int, device: torch.device) -> int:
    """Return how many runs give two programs per multiprocessor, at most one per tile of keys."""
    return max(1, min(2 * num_sms(device) // num_programs, num_tiles, MAX_SPLITS))


def _check_paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    order: Tensor | None = None,
    splits: int | None = None,
) -> None:
    """Look at shapes, dtypes and devices; the values are the caller's word."""
    check_shape("q", q, ("T", "H", "D"))
    num_heads, head_dim = q.shape[1:]
    check_shape("k_pages", k_pages, ("P", "G", "S", head_dim))
    check_shape("v_pages", v_pages, tuple(k_pages.shape))
    check_shape("context_lens", context_lens, ("B",))
    num_seqs = context_lens.shape[0]
    check_shape("page_table", page_table, (num_seqs, "W"))
    check_shape("query_starts", query_starts, (num_seqs + 1,))
    num_kv_heads, page_size = k_pages.shape[1:3]
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"query heads must be a multiple of KV heads, got {num_heads} and {num_kv_heads}")
    if num_heads > MAX_GROUP * num_kv_heads:
        raise ValueError(f"at most {MAX_GROUP} query heads may share a KV head, got {num_heads // num_kv_heads}")
    if page_size % MIN_BLOCK_N != 0:
        raise ValueError(f"page size must be a multiple of {MIN_BLOCK_N}, got {page_size}")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head size must be at most {MAX_HEAD_DIM}, got {head_dim}")
    for name, x in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        check_float(name, x.dtype)
        check_rows(name, x)
    if v_pages.dtype != k_pages.dtype:
        raise TypeError(f"v_pages must be {k_pages.dtype} like k_pages, got {v_pages.dtype}")
    indices = {"page_table": page_table, "query_starts": query_starts, "context_lens": context_lens}
    if order is not None:
        check_shape("order", order, (num_heads * head_dim,))
        indices["order"] = order
    for name, x in indices.items():
        check_rows(name, x)
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {x.dtype}")
    check_device(q, k_pages=k_pages, v_pages=v_pages, **indices)
    for name, value in (("max_query_len", max_query_len), ("window", window), ("splits", splits)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


@op(reference=paged_attention_reference, check=_check_paged_attention)
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    order: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Let the new tokens of a batch attend to the pages of their sequences, their own keys included.

    Args:
        q: [T, H, D] fp16, bf16 or fp32 queries, last stride 1; the sequences follow each other without gaps.
        k_pages: [P, G, S, D] fp16, bf16 or fp32 keys, last stride 1.
        v_pages: Values, like `k_pages`.
        page_table: [B, W] int32 pages of each sequence; entries beyond the context are not read.
        query_starts: [B + 1] int32 first token of each sequence, from 0 to T.
        context_lens: [B] int32 tokens in the cache after this step; 0 marks padding, whose rows become zero.
        max_query_len: Upper bound of the query tokens of a sequence.
        scale: Factor of the scores, usually D ** -0.5.
        window: Number of newest positions that a query sees, its own included; None means all.
        order: [H * D] int32, feature j of the result is feature order[j] of the concatenated heads.
        splits: Runs into which the keys of a sequence are cut; None chooses from the shapes alone.

    Returns:
        [T, H * D] in q.dtype.

    Raises:
        ValueError: A shape, a stride or a device does not fit.
        TypeError: A dtype does not fit.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    num_seqs, table_width = page_table.shape
    group = num_heads // num_kv_heads
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    tiles = _tiles(max_query_len, group, head_dim, page_size, k_pages.element_size())
    block_q = tiles.block_m // group
    one_block = max_query_len <= block_q
    num_blocks = num_seqs if one_block else num_tokens // block_q + num_seqs
    if splits is None:
        num_keys = table_width * page_size if window is None else min(table_width * page_size, window + block_q)
        splits = _num_splits(num_blocks * num_kv_heads, num_keys // tiles.block_n, q.device)
    parts, lse = out, out
    if splits > 1:
        parts = torch.empty(num_tokens, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_tokens, num_heads, splits, dtype=torch.float32, device=q.device)
    elif order is not None:
        parts = torch.empty_like(out)
    _paged_attention_kernel[num_blocks, num_kv_heads, splits](
        q, k_pages, v_pages, page_table, query_starts, context_lens, parts, lse, scale * LOG2_E,
        *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0),
        num_seqs, (num_seqs - 1).bit_length(),
        GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size, WINDOW=window or 0, SPLITS=splits,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        ONE_BLOCK=one_block, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if splits > 1 or order is not None:
        block_f = 128 if splits > 1 else 1024
        _reduce_splits_kernel[num_tokens, triton.cdiv(num_heads * head_dim, block_f)](
            parts, lse, out if order is None else order, out,
            NUM_FEATURES=num_heads * head_dim, HEAD_DIM=head_dim, SPLITS=splits, HAS_ORDER=order is not None,
            BLOCK_F=block_f, BLOCK_S=triton.next_power_of_2(splits),
        )  # fmt: skip
    return out
