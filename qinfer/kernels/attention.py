"""Attention of new tokens over a paged KV cache, for any number of query tokens per sequence.

    out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, g]) v[j, g],   g = h // (H // G)

Query i (counted from 0) of sequence b sits at position p = context_lens[b] - qlen_b + i and sees the positions j <= p
and, with a window, j > p - window. Position j of sequence b lies in page page_table[b, j // S], row j % S. With a
softcap c, scores x become c tanh(x / c) before the softmax.

Memory: pages are [P, G, S, row], so that the rows of one KV head in one page are contiguous; q is [T, H, D], the
sequences one after the other. One program owns one KV head and BLOCK_M rows, row r being query token r // GROUP and
head r % GROUP of that KV head, so a key is read once for all its query heads and decode is a chunk of one token. The
visible range is cut into at most as many runs of whole tiles as the grid is deep; since the kernel does that from
`context_lens`, one grid serves all lengths. Each run leaves a normalized fp32 result and the base-2 logarithm of its
softmax sum. In decode the program that arrives last adds them up, in the order of the runs; for longer queries, and on
AMD, where a barrier does not wait for other waves' stores, a second kernel does.

Coded pages (`kv_codec.py`) are decoded in registers (`attention_products.py`), or, for prompts on Hopper, in front of
the launch (`attention_decoded.py`). In registers, queries are rotated like the keys and divided by their largest
number, so that fp16 holds them whatever their dtype; what is summed up over rotated values is rotated back once.

Softmax and accumulators are fp32. Products over plain pages multiply in the pages' dtype (q and the probabilities are
converted to it), over coded pages in fp16, or in fp32 if q is fp32. Limits: D <= 256, H / G <= 64, S a multiple of 16,
q fp16, bf16 or fp32, offsets 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.attention_blocks import (
    EVERY,
    LEFT_OVER,
    MAX_HEAD_DIM,
    PROMPT,
    STREAM,
    Places,
    Wanted,
    find_queries,
    is_idle,
    run_of_tiles,
)
from qinfer.kernels.attention_decoded import decode_prompts
from qinfer.kernels.attention_fresh import Fresh, fresh_queries, place_of
from qinfer.kernels.attention_reduce import (
    MAX_LOCKS,
    add_runs,
    locks_of,
    room_for_runs,
    runs_at_once,
    store_rows,
    store_run,
)
from qinfer.kernels.attention_run import attend
from qinfer.kernels.attention_tiles import MAX_SPLITS, MIN_BLOCK_N, choose_splits, choose_tiles, registers
from qinfer.kernels.attention_wgmma import launch_prompt, takes_prompt
from qinfer.kernels.checks import check_device, check_float, check_int32, check_rows, check_shape
from qinfer.kernels.device import arch, is_amd_target, is_ptx_target, num_sms, op
from qinfer.kernels.gather import inverse
from qinfer.kernels.kv_codec import NUM_PLANES, KVPages, run_length
from qinfer.kernels.overlap import overlap, wait_for_inputs

MAX_GROUP = 64
INVARIANT_ROWS = 32
CROWD = 3  # programs of decode that fit a multiprocessor with three stages of plain pages
MIN_MIXED = 64  # tokens of a step of several sequences, from which on streams have a launch of their own
STREAM_ROWS = 8  # queries of all heads of a KV head, up to which a sequence is a stream: the tile of decode
MIN_SHARE = 16  # programs for each tile that a run must have: few sequences are cut finely, many are not
LOG2_E = 1.4426950408889634


def paged_attention_reference(
    q: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    order: Tensor | None = None,
    splits: int | None = None,
    invariant: bool = False,
) -> Tensor:
    """Compute paged attention in plain torch and fp32, one sequence at a time."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.codes.shape[1:3]
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
        keys, values = (p.decode(pages).transpose(0, 1).flatten(1, 2)[:, seen] for p in (k_pages, v_pages))
        grouped = q[rows].float().reshape(query_len, num_kv_heads, -1, head_dim)
        queries = grouped.permute(1, 2, 0, 3).flatten(1, 2)  # [G, GROUP * query_len, D]
        own = torch.arange(first, context_len, device=q.device)[:, None]
        position = torch.arange(first_page * page_size, context_len, device=q.device)
        hidden = position > own
        if window is not None:
            hidden |= position <= own - window
        logits = (queries @ keys.transpose(1, 2) * scale).reshape(num_kv_heads, -1, *hidden.shape)
        if softcap is not None:
            logits = torch.tanh_(logits / softcap) * softcap
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        result = (weights.flatten(1, 2) @ values).reshape(num_kv_heads, -1, query_len, head_dim)
        out[rows] = result.permute(2, 0, 1, 3).flatten(1, 2)
    flat = out.flatten(1)
    return (flat if order is None else flat[:, order.long()]).to(q.dtype)


# The fields of a batch are views into one buffer, at any alignment, and its sizes change from step to step.
@triton.jit(
    do_not_specialize=["s_table", "num_seqs", "search_steps", "min_tiles"],
    do_not_specialize_on_alignment=["p_table", "p_starts", "p_lens"],
)
def _paged_attention_kernel(
    p_q, fresh, p_k, p_k_scale, p_v, p_v_scale, p_table, p_starts, p_lens, p_roles, p_inverse, p_locks,
    p_out,  # [T, H * D], in the order of p_inverse
    p_parts,  # [T, H, runs, D] fp32, if there are several
    p_lse,  # [T, H, runs] fp32
    scale,  # softmax scale times log2(e)
    s_q_token, s_q_head, s_k_page, s_k_head, s_k_scale_page, s_v_page, s_v_head, s_v_scale_page,
    s_table, num_seqs, search_steps, min_tiles,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    K_SCHEME: tl.constexpr, V_SCHEME: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, RUN: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,  # times log2(e); 0: none
    IS_SPLIT: tl.constexpr,
    HAS_LOCKS: tl.constexpr, HAS_ORDER: tl.constexpr,  # the last program of a block to arrive adds up its runs
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    ONE_BLOCK: tl.constexpr, KEYS_FIRST: tl.constexpr,  # every sequence fits one query block; see the products
    ROLE: tl.constexpr, FEW: tl.constexpr, PTX: tl.constexpr, OVERLAP: tl.constexpr,
    NUM_PARTS: tl.constexpr, INTERLEAVED: tl.constexpr,  # of fresh queries
):  # fmt: skip
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    if is_idle(p_roles, num_seqs, ROLE, OVERLAP):
        return
    # Later queries see more keys: starting with them leaves the short programs to fill the last wave.
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)
    i_head, i_split, num_splits = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    i_seq, b_start, b_num, b_first, b_stop = find_queries(
        p_starts, p_lens, i_block, num_seqs, search_steps, BLOCK_Q, ONE_BLOCK, p_roles, ROLE, FEW
    )
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_query = o_m // GROUP
    m_row = (o_m < BLOCK_Q * GROUP) & (o_query < b_num)
    m_out = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
    # A row without a query sees nothing.
    b_own = tl.where(m_row, b_first + o_query, -1)
    o_token = (b_start + o_query).to(tl.int64)
    o_head = i_head * GROUP + o_m % GROUP
    b_tile_start, b_tile_stop, b_runs = run_of_tiles(
        b_first, b_stop, i_split, num_splits, min_tiles, BLOCK_N, WINDOW, HAS_LOCKS
    )
    p_table += i_seq.to(tl.int64) * s_table
    b_page = tl.load(p_table + b_tile_start * BLOCK_N // PAGE_SIZE, mask=b_tile_start < b_tile_stop, other=0)

    if NUM_PARTS > 0:
        place = place_of(fresh, i_seq, HEAD_DIM // 2)
    # Where the tokens stand is written before the first kernel of a step, which overlaps with nothing in front of it.
    wait_for_inputs(OVERLAP)
    if NUM_PARTS > 0:
        if (i_split > 0) & (b_tile_start == b_tile_stop):
            return
        is_last = (b_tile_start < b_tile_stop) & (b_tile_stop * BLOCK_N >= b_stop)
        b_x = fresh_queries(
            p_q, fresh, place, p_k, p_v, i_seq, i_head, o_head, m_row, is_last, s_q_token, s_q_head, s_k_page, s_k_head,
            s_v_page, s_v_head, PAGE_SIZE, K_ROW, V_ROW, HEAD_DIM // 2, INTERLEAVED, NUM_PARTS, p_out.dtype.element_ty,
        )  # fmt: skip
    else:
        p_queries = p_q + o_token * s_q_token + o_head.to(tl.int64) * s_q_head
        b_x = tl.load(p_queries[:, None] + o_d[None, :], mask=m_out, other=0.0)
    b_out, b_max, b_sum = attend(
        b_x, p_k, p_k_scale, p_v, p_v_scale, p_table, b_page, b_tile_start, b_tile_stop, b_first, b_stop, b_own, i_head,
        scale, s_k_page, s_k_head, s_k_scale_page, s_v_page, s_v_head, s_v_scale_page, HEAD_DIM, PAGE_SIZE,
        K_SCHEME, V_SCHEME, K_ROW, V_ROW, RUN, WINDOW, SOFTCAP, BLOCK_N, KEYS_FIRST, PTX, OVERLAP,
    )  # fmt: skip
    if IS_SPLIT:
        if b_runs > 1:
            if i_split < b_runs:
                store_run(
                    p_locks, i_block * NUM_KV_HEADS + i_head, p_parts, p_lse, p_out, p_inverse, b_out, b_max, b_sum,
                    b_start, i_block * FEW if ROLE == STREAM else b_start, b_num, o_query, i_head, o_head, m_row, m_out,
                    i_split, b_runs, num_splits, GROUP, NUM_HEADS, HEAD_DIM, CHUNK, HAS_LOCKS, HAS_ORDER,
                )  # fmt: skip
        elif i_split == 0:
            store_rows(p_out, p_inverse, b_out, o_token, o_head, m_out, NUM_HEADS, HEAD_DIM, HAS_ORDER)
    else:
        store_rows(p_out, p_inverse, b_out, o_token, o_head, m_out, NUM_HEADS, HEAD_DIM, HAS_ORDER)


def _element_size(q: Tensor, k_pages: KVPages, v_pages: KVPages) -> int:
    """Return the bytes of the widest number that a product takes."""
    both = (k_pages, v_pages)
    return max((pages.codes if pages.codec.scheme == "plain" else q).element_size() for pages in both)


def _check_paged_attention(
    q: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    order: Tensor | None = None,
    splits: int | None = None,
    invariant: bool = False,
) -> None:
    """Look at shapes, dtypes and devices; the values are the caller's word."""
    check_shape("q", q, ("T", "H", "D"))
    num_heads, head_dim = q.shape[1:]
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head size must be at most {MAX_HEAD_DIM}, got {head_dim}")
    k_pages.check("k_pages", ("P", "G", "S", head_dim))
    num_pages, num_kv_heads, page_size = k_pages.codes.shape[:3]
    v_pages.check("v_pages", (num_pages, num_kv_heads, page_size, head_dim))
    check_shape("context_lens", context_lens, ("B",))
    num_seqs = context_lens.shape[0]
    check_shape("page_table", page_table, (num_seqs, "W"))
    check_shape("query_starts", query_starts, (num_seqs + 1,))
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"query heads must be a multiple of KV heads, got {num_heads} and {num_kv_heads}")
    if num_heads > MAX_GROUP * num_kv_heads:
        raise ValueError(f"at most {MAX_GROUP} query heads may share a KV head, got {num_heads // num_kv_heads}")
    if page_size % MIN_BLOCK_N != 0:
        raise ValueError(f"page size must be a multiple of {MIN_BLOCK_N}, got {page_size}")
    check_float("q", q.dtype)
    check_rows("q", q)
    indices = {"page_table": page_table, "query_starts": query_starts, "context_lens": context_lens}
    if order is not None:
        check_shape("order", order, (num_heads * head_dim,))
        indices["order"] = order
    check_int32(**indices)
    check_device(q, k_pages=k_pages.codes, v_pages=v_pages.codes, **indices)
    check_device(q, k_scales=k_pages.scales, v_scales=v_pages.scales)
    for name, value in (("max_query_len", max_query_len), ("window", window), ("splits", splits)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, got {softcap}; None caps nothing")
    if invariant and splits not in (None, 1):
        raise ValueError(f"invariant=True computes the keys of a sequence in one run, got splits={splits}")
    if splits is not None and splits > MAX_SPLITS:
        raise ValueError(f"splits must be at most {MAX_SPLITS}, got {splits}")


@op(reference=paged_attention_reference, check=_check_paged_attention)
def paged_attention(
    q: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    order: Tensor | None = None,
    splits: int | None = None,
    invariant: bool = False,
) -> Tensor:
    """Let the new tokens of a batch attend to the pages of their sequences, their own keys included.

    Args:
        q: [T, H, D] fp16, bf16 or fp32 queries, last stride 1; the sequences follow each other without gaps.
        k_pages: [P, G, S, D] keys in any codec.
        v_pages: [P, G, S, D] values in any codec, not necessarily the same.
        page_table: [B, W] int32 pages of each sequence; entries beyond the context, or behind the window, are not read.
        query_starts: [B + 1] int32 first token of each sequence, from 0 to T.
        context_lens: [B] int32 tokens in the cache after this step; 0 marks padding, whose rows become zero.
        max_query_len: Upper bound of the query tokens of a sequence.
        scale: Factor of the scores, usually D ** -0.5.
        window: Number of newest positions that a query sees, its own included; None means all.
        softcap: Scores x become softcap * tanh(x / softcap), as Gemma 2 has it; None leaves them.
        order: [H * D] int32, feature j of the result is feature order[j] of the concatenated heads.
        splits: Runs into which the keys of a sequence are cut; None chooses from the shapes alone.
        invariant: Fix what is otherwise chosen by the step (tiles, and one run), so that a row depends on its own
            sequence alone, to the last bit. Over plain pages it does not depend on the chunks of its prompt either.

    Returns:
        [T, H * D] in q.dtype.

    Raises:
        ValueError: A shape, a stride or a device does not fit.
        TypeError: A dtype does not fit.
    """
    out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    if out.shape[0] == 0:
        return out
    places, cap = Places(page_table, query_starts, context_lens), None if softcap is None else softcap * LOG2_E
    wanted = Wanted(max_query_len, scale * LOG2_E, window, cap, order, splits, invariant)
    few = _most_of_a_stream(q, k_pages, places, wanted)
    prompts = wanted._replace(role=(PROMPT if few else EVERY).value, few=few)
    # Prompts first: what adds up their runs writes all rows.
    decoded = decode_prompts(q, k_pages, v_pages, places, prompts)
    if decoded is not None:
        some = prompts._replace(role=PROMPT.value, roles=decoded.roles)
        launch_prompt(q, decoded.keys, decoded.values, places._replace(page_table=decoded.page_table), some, out)
        if decoded.may_be_full:
            launch_pages(q, k_pages, v_pages, places, some._replace(role=LEFT_OVER.value), out)
    else:
        launch = launch_prompt if takes_prompt(q, k_pages, v_pages, wanted) else launch_pages
        launch(q, k_pages, v_pages, places, prompts, out)
    if few:
        launch_pages(q, k_pages, v_pages, places, prompts._replace(max_query_len=few, role=STREAM.value), out)
    return out


def _most_of_a_stream(q: Tensor, k_pages: KVPages, places: Places, wanted: Wanted) -> int:
    """Return the most query tokens of sequences that get a launch of their own beside prompts; 0: nobody gets one."""
    few = max(1, STREAM_ROWS * k_pages.codes.shape[1] // q.shape[1])
    is_mixed = len(places.context_lens) > 1 and wanted.max_query_len > few and len(q) >= MIN_MIXED
    # On AMD nothing adds up the runs of some sequences only, and streams by themselves would be one run each.
    return few if is_mixed and not wanted.invariant and not is_amd_target(q) else 0


def launch_pages(
    q: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    places: Places,
    wanted: Wanted,
    out: Tensor,
    fresh: Fresh | None = None,
) -> None:
    """Write attention to out [T, H * D], by the kernel that takes every step; fresh queries are those of `fresh`."""
    (num_tokens, num_heads, head_dim), (num_kv_heads, page_size) = q.shape, k_pages.codes.shape[1:3]
    num_seqs, group, order = len(places.context_lens), num_heads // num_kv_heads, wanted.order
    schemes = (k_pages.codec.scheme, v_pages.codec.scheme)
    # A few queries' tile: one that decode does not waste and that prompts can live with.
    tile_queries = max(1, INVARIANT_ROWS // group) if wanted.invariant else wanted.max_query_len
    is_crowded = num_seqs * num_kv_heads > CROWD * num_sms(q.device) and not wanted.invariant
    itemsize, name = _element_size(q, k_pages, v_pages), arch(q.device)
    tiles = choose_tiles(tile_queries, group, head_dim, page_size, itemsize, schemes, name, is_crowded=is_crowded)
    block_q = tiles.block_m // group
    one_block = wanted.max_query_len <= block_q
    num_blocks = num_seqs if one_block else num_tokens // block_q + num_seqs
    num_programs, min_tiles, splits = num_blocks * num_kv_heads, 1, 1 if wanted.invariant else wanted.splits
    has_locks = tiles.block_m <= 16 and num_programs <= MAX_LOCKS and not is_amd_target(q)
    if splits is None:
        num_tiles = wanted.num_keys(places, page_size, block_q) // tiles.block_n
        splits = choose_splits(num_programs, num_tiles, tiles.residents, q.device)
        min_tiles = max(1, num_programs // MIN_SHARE)
    if wanted.role in (STREAM.value, LEFT_OVER.value) and not has_locks:
        splits = 1  # what adds up runs behind the launch would write all rows
    # Streams are a block each, and may stand anywhere among the tokens.
    parts, lse = room_for_runs(q, num_seqs * wanted.few if wanted.role == STREAM.value else num_tokens, splits)
    locks = locks_of(q.device) if has_locks and parts is not None else None
    block_d = max(16 * max(NUM_PLANES[scheme] for scheme in schemes), triton.next_power_of_2(head_dim))
    _paged_attention_kernel[num_blocks, num_kv_heads, splits](
        q, None if fresh is None else fresh.arguments,
        k_pages.words, k_pages.scales, v_pages.words, v_pages.scales, *places, wanted.roles,
        None if order is None else inverse(order), locks, out, parts, lse, wanted.scale,
        *q.stride()[:2], *k_pages.strides, *v_pages.strides, places.page_table.stride(0),
        num_seqs, (num_seqs - 1).bit_length(), min_tiles, K_ROW=k_pages.words.stride(2), V_ROW=v_pages.words.stride(2),
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size,
        K_SCHEME=k_pages.codec.scheme, V_SCHEME=v_pages.codec.scheme, RUN=run_length(head_dim),
        WINDOW=wanted.window or 0, SOFTCAP=wanted.softcap or 0.0,
        IS_SPLIT=splits > 1, HAS_LOCKS=has_locks, HAS_ORDER=order is not None,
        ROLE=wanted.role, FEW=wanted.few, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_d,
        CHUNK=runs_at_once(group, block_d, tiles.num_warps), ONE_BLOCK=one_block, KEYS_FIRST=tiles.keys_first,
        NUM_PARTS=0 if fresh is None else fresh.num_parts, INTERLEAVED=fresh is not None and fresh.interleaved,
        PTX=is_ptx_target(q), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        **registers(name, tiles, schemes, has_order=order is not None, is_padded=block_d > head_dim), **overlap(q),
    )  # fmt: skip
    if parts is not None and lse is not None and not has_locks:
        add_runs(parts, lse, order, out)
