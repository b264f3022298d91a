"""From the product of q, k and v to what attention makes of it: `rope_write` (`kv_write.py`), then `paged_attention`.

Where every sequence has one token and pages are plain, both are one launch (`attention_fresh.py`), which saves 0.4 to
1.7 µs of a layer on an H200. A single sequence with large heads keeps two: its write is so small that it hides behind
the product (benchmarks/LOG.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qinfer.kernels.attention import LOG2_E, launch_pages, paged_attention
from qinfer.kernels.attention_blocks import Places, Wanted
from qinfer.kernels.attention_fresh import Fresh
from qinfer.kernels.attention_reduce import MAX_LOCKS
from qinfer.kernels.device import is_amd_target, op
from qinfer.kernels.kv_codec import KVPages
from qinfer.kernels.kv_write import heads_of, rope_write

MAX_FRESH = 64  # tokens of a step that is one launch
SMALL_HEAD = 64  # features up to which a single token is one, too
MAX_FRESH_GROUP = 16  # query heads of a KV head: the rows of a tile of decode


def rope_attention_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    slots: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    interleaved: bool,
    max_query_len: int,
    scale: float,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    window: int | None = None,
    order: Tensor | None = None,
    invariant: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute `rope_attention` in plain torch."""
    q = rope_write.reference(
        qkv,
        cos,
        sin,
        positions,
        k_pages,
        v_pages,
        slots,
        interleaved=interleaved,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        out_dtype=out_dtype,
    )
    return paged_attention.reference(
        q,
        k_pages,
        v_pages,
        page_table,
        query_starts,
        context_lens,
        max_query_len=max_query_len,
        scale=scale,
        window=window,
        order=order,
        invariant=invariant,
    )


def _check_rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    slots: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    interleaved: bool,
    max_query_len: int,
    scale: float,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    window: int | None = None,
    order: Tensor | None = None,
    invariant: bool = False,
    out_dtype: torch.dtype | None = None,
) -> None:
    rope_write.check(
        qkv,
        cos,
        sin,
        positions,
        k_pages,
        v_pages,
        slots,
        interleaved=interleaved,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        out_dtype=out_dtype,
    )
    paged_attention.check(
        heads_of(qkv, k_pages)[0][0],
        k_pages,
        v_pages,
        page_table,
        query_starts,
        context_lens,
        max_query_len=max_query_len,
        scale=scale,
        window=window,
        order=order,
        invariant=invariant,
    )


@op(reference=rope_attention_reference, check=_check_rope_attention)
def rope_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    slots: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    interleaved: bool,
    max_query_len: int,
    scale: float,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    window: int | None = None,
    order: Tensor | None = None,
    invariant: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Turn queries and keys, write keys and values into their pages, and let the queries attend to these.

    Args:
        qkv: [T, (H + 2 G) D] fp16, bf16 or fp32, or parts of it [S, T, (H + 2 G) D], as `rope_write` takes them.
        cos: [L, R/2] fp32.
        sin: [L, R/2] fp32.
        positions: [T] int32 in [0, L).
        k_pages: [P, G, S, D] keys in any codec.
        v_pages: [P, G, S, D] values in any codec, not necessarily the same.
        slots: [T] int32, page * S + offset of the place of each token among those of its sequence; -1 writes nothing.
        page_table: [B, W] int32.
        query_starts: [B + 1] int32.
        context_lens: [B] int32, the new tokens included.
        interleaved: pairs are neighbours.
        max_query_len: Upper bound of the query tokens of a sequence.
        scale: Factor of the scores.
        q_weight: [D] of a norm of every query head; None: there is none.
        k_weight: [D] of key heads.
        eps: Added to their mean squares.
        window: Newest positions that a query sees; None: all.
        order: [H * D] int32, feature j of the result is feature order[j].
        invariant: A row depends on its own sequence alone, to the last bit.
        out_dtype: dtype of the result, of the turned queries and of what is encoded; None takes that of qkv.

    Returns:
        [T, H * D].

    Raises:
        TypeError: a dtype is none that `rope_write` and `paged_attention` take.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) a position or a slot is out of
            range.
        UnsupportedError: a codec cannot store rows of D numbers.
    """
    q, k, v = heads_of(qkv, k_pages)
    dtype, places = out_dtype or qkv.dtype, Places(page_table, query_starts, context_lens)
    if max_query_len == 1 and not invariant and _fits(q, k_pages, v_pages, cos, places, dtype):
        out = torch.empty(q.shape[1], q.shape[2] * q.shape[3], dtype=dtype, device=q.device)
        strides = q.stride(0), cos.stride(0), sin.stride(0)
        fresh = Fresh((k, v, cos, sin, positions, slots, q_weight, k_weight, eps, *strides), len(q), interleaved)
        wanted = Wanted(1, scale * LOG2_E, window, None, order, None, False)
        launch_pages(q[0], k_pages, v_pages, places, wanted, out, fresh)
        return out
    turned = rope_write.launch(
        qkv,
        cos,
        sin,
        positions,
        k_pages,
        v_pages,
        slots,
        interleaved=interleaved,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        out_dtype=dtype,
    )
    return paged_attention.launch(
        turned,
        k_pages,
        v_pages,
        *places,
        max_query_len=max_query_len,
        scale=scale,
        window=window,
        order=order,
        invariant=invariant,
    )


def _fits(q: Tensor, k_pages: KVPages, v_pages: KVPages, cos: Tensor, places: Places, dtype: torch.dtype) -> bool:
    """Return whether one launch takes queries [S, T, H, D]: heads all of which turn, over pages of 16 bits."""
    (_, num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k_pages.codes.shape[1]
    is_plain = all(pages.codec.scheme == "plain" and pages.codes.element_size() == 2 for pages in (k_pages, v_pages))
    turns = 2 * cos.shape[1] == head_dim >= 16 and head_dim & (head_dim - 1) == 0
    is_small = (2 if head_dim > SMALL_HEAD else 1) <= num_tokens <= MAX_FRESH and num_tokens * num_kv_heads <= MAX_LOCKS
    has_tile = num_heads <= MAX_FRESH_GROUP * num_kv_heads and dtype.itemsize == 2 and not is_amd_target(q)
    return is_plain and turns and is_small and has_tile and num_tokens == len(places.context_lens)
