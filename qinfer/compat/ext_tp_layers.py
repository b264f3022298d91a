"""The functions of `exllamav2_ext` that run a whole layer on the devices of one process.

Weights are cut by columns, so a device makes a slice of every product, and slices meet in the context's buffers:

    n = rms(x);  m = join over ID of act(n G_i) · (n U_i);  x = join over RS of x_i + m D_i
    n = rms(x);  a = join over Q of attention(n Q_i, n K_i, n V_i);  x = join over Q of x_i + a O_i

x comes from anywhere and is in buffer 0 afterwards; callers keep it there. Buffer 1 and the temp_ tensors are scratch
of the caller's, of which the first rows are used. Activations and softmax are computed in fp32 and rounded once;
attention is `qinfer.kernels.attention`, so no flash-attn is needed. Programs of several processes use
`qinfer.parallel.context.TPContext` and qinfer's own decoder instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from qinfer.compat.binding import check_tensor, extension
from qinfer.compat.ext_matrix import gemm_half_q_half_tp
from qinfer.compat.ext_norms import rms_norm_tp
from qinfer.compat.ext_positions import rope_
from qinfer.compat.ext_tp import Split, contexts, tp_broadcast, tp_gather
from qinfer.kernels.attention import paged_attention
from qinfer.kernels.kv_codec import KVPages
from qinfer.kernels.kv_write import kv_write

ID, RS, Q = 1, 3, 4
NO_ROPE, NEOX = 0, 2  # rope_style; 1 pairs neighbours, as GPT-J does


@extension
def tp_mlp_forward_(
    tp_context: int,
    hidden_states: Tensor,
    temp_bc0: Sequence[Tensor],
    temp_bc1: Sequence[Tensor],
    temp_bc2: Sequence[Tensor],
    temp_gate: Sequence[Tensor],
    temp_up: Sequence[Tensor],
    temp_down: Sequence[Tensor],
    pre_layernorm: Sequence[Tensor],
    norm_epsilon: float,
    gate: Sequence[int],
    up: Sequence[int],
    down: Sequence[int],
    act_gelu: bool,
) -> None:
    """Run a gated MLP: buffer 0 = x + down(act(gate(rms(x))) · up(rms(x))).

    Args:
        tp_context: from `make_tp_context`, with as many ID as RS spans, on the same devices.
        hidden_states: x [R, C] fp16 on any device, usually a view of buffer 0.
        temp_bc0: fp16 scratch [≥ R, C], one per device.
        temp_bc1: likewise.
        temp_bc2: fp16 scratch [≥ R, F].
        temp_gate: fp16 scratch [≥ R, columns of the ID span].
        temp_up: likewise.
        temp_down: fp16 scratch [≥ R, columns of the RS span].
        pre_layernorm: one [C] fp16 per device.
        norm_epsilon: of the norm.
        gate: handles of the slices [C, columns of the ID span].
        up: likewise.
        down: handles of the slices [F, columns of the RS span].
        act_gelu: the activation is GELU, by its tanh approximation, rather than SiLU.

    Raises:
        RuntimeError: a handle is none, or a number of tensors, a dtype, a shape or a device does not fit.
    """
    context = contexts.find(tp_context)
    _check_counts(
        context.split(ID), outputs=context.split(RS), temp_up=temp_up, temp_down=temp_down, norms=pre_layernorm
    )
    check_tensor("hidden_states", hidden_states, torch.float16, ("R", "C"))
    norm, temps = (pre_layernorm, norm_epsilon), (temp_bc0, temp_bc1, temp_bc2, temp_gate, temp_up, temp_down)
    bc0, bc1, bc2, gates, ups, downs = _begin(tp_context, hidden_states, (ID, 1), norm, temps)
    gemm_half_q_half_tp(bc1, gate, gates, False, tp_context)
    gemm_half_q_half_tp(bc1, up, ups, False, tp_context)
    for own_gate, own_up in zip(gates, ups, strict=True):
        numbers = own_gate.float()
        own_gate.copy_((gelu(numbers, approximate="tanh") if act_gelu else silu(numbers)) * own_up.float())
    tp_gather(tp_context, 1, gates, ID, bc2, ID, 1)
    gemm_half_q_half_tp(bc2, down, downs, False, tp_context)
    _end(tp_context, downs, bc0, (RS, 1))


@extension
def tp_attn_forward_paged_(
    tp_context: int,
    hidden_states: Tensor,
    temp_bc0: Sequence[Tensor],
    temp_bc1: Sequence[Tensor],
    temp_bc2: Sequence[Tensor],
    temp_q: Sequence[Tensor],
    temp_k: Sequence[Tensor],
    temp_v: Sequence[Tensor],
    temp_o: Sequence[Tensor],
    k_cache: Sequence[Tensor],
    v_cache: Sequence[Tensor],
    pre_layernorm: Sequence[Tensor],
    norm_epsilon: float,
    q_proj: Sequence[int],
    k_proj: Sequence[int],
    v_proj: Sequence[int],
    o_proj: Sequence[int],
    head_dim: int,
    rope_style: int,
    batch_size: int,
    q_len: int,
    sin: Sequence[Tensor],
    cos: Sequence[Tensor],
    past_lens: Sequence[Tensor],
    block_index: Sequence[Tensor],
    scaling: float,
) -> None:
    """Run causal attention over a paged cache: buffer 0 = x + o(attention(q, k, v)), with q, k and v of rms(x).

    Args:
        tp_context: from `make_tp_context`; one tensor or handle per Q span makes a list below.
        hidden_states: x [R, C] fp16 on any device, usually a view of buffer 0; R = batch_size · q_len, and C is
            head_dim times all query heads.
        temp_bc0: fp16 scratch [≥ R, C].
        temp_bc1: likewise.
        temp_bc2: likewise.
        temp_q: fp16 scratch [≥ R, H · head_dim], with the H heads of the span.
        temp_k: fp16 scratch [≥ R, G · head_dim], with its G key-value heads.
        temp_v: likewise.
        temp_o: as temp_q.
        k_cache: [P, S, G, head_dim] fp16, S a multiple of 16; keys of this step are written.
        v_cache: likewise, of values.
        pre_layernorm: [C] fp16.
        norm_epsilon: of the norm.
        q_proj: handles of the slices [C, H · head_dim].
        k_proj: handles of the slices [C, G · head_dim].
        v_proj: likewise.
        o_proj: as q_proj; slices of the output.
        head_dim: features per head.
        rope_style: 0: none, 1: pairs of neighbours, 2: pairs of halves.
        batch_size: sequences.
        q_len: new tokens of each.
        sin: tables of `rope_`, by number of the device.
        cos: likewise.
        past_lens: [batch_size] int32, tokens in the cache before.
        block_index: [batch_size, pages] int32, the pages of each sequence.
        scaling: of scores.

    Raises:
        RuntimeError: a handle is none, or a number of tensors, a dtype, a shape or a device does not fit, or (CPU only)
            a new token has no page.
    """
    if rope_style not in range(3):
        raise ValueError(f"rope_style must be 0, 1 or 2, got {rope_style}")
    if min(batch_size, q_len) < 1:
        raise ValueError(f"batch_size and q_len must be at least 1, got {batch_size} and {q_len}")
    split = contexts.find(tp_context).split(Q)
    _check_counts(split, norms=pre_layernorm, temp_k=temp_k, temp_v=temp_v, k_cache=k_cache, v_cache=v_cache)
    _check_counts(split, temp_o=temp_o, past_lens=past_lens, block_index=block_index)
    rows = batch_size * q_len
    check_tensor("hidden_states", hidden_states, torch.float16, (rows, split[-1][2] * head_dim))
    norm, temps = (pre_layernorm, norm_epsilon), (temp_bc0, temp_bc1, temp_bc2, temp_q, temp_k, temp_v, temp_o)
    bc0, bc1, bc2, queries, keys, values, outs = _begin(tp_context, hidden_states, (Q, head_dim), norm, temps)
    for matrices, products in ((q_proj, queries), (k_proj, keys), (v_proj, values)):
        gemm_half_q_half_tp(bc1, matrices, products, False, tp_context)
    for i, (device, _, _) in enumerate(split):
        q, k, v = (part[i].view(batch_size, q_len, -1, head_dim) for part in (queries, keys, values))
        if rope_style != NO_ROPE:
            for heads in (q, k):
                rope_(heads, sin[device], cos[device], 0, heads.shape[2], head_dim, past_lens[i], rope_style == NEOX)
        outs[i].copy_(_attention((q, k, v), (k_cache[i], v_cache[i]), past_lens[i], block_index[i], scaling))
    tp_gather(tp_context, 1, outs, Q, bc2, Q, head_dim)
    gemm_half_q_half_tp(bc2, o_proj, outs, False, tp_context)
    _end(tp_context, outs, bc0, (Q, head_dim))


@extension
def tp_attn_forward_(
    tp_context: int,
    hidden_states: Tensor,
    temp_bc0: Sequence[Tensor],
    temp_bc1: Sequence[Tensor],
    temp_bc2: Sequence[Tensor],
    temp_q: Sequence[Tensor],
    temp_k: Sequence[Tensor],
    temp_v: Sequence[Tensor],
    temp_o: Sequence[Tensor],
    k_cache: Sequence[Tensor],
    v_cache: Sequence[Tensor],
    pre_layernorm: Sequence[Tensor],
    norm_epsilon: float,
    q_proj: Sequence[int],
    k_proj: Sequence[int],
    v_proj: Sequence[int],
    o_proj: Sequence[int],
    head_dim: int,
    rope_style: int,
    batch_size: int,
    q_len: int,
    sin: Sequence[Tensor],
    cos: Sequence[Tensor],
    past_len_tp: Sequence[Tensor],
    scaling: float,
) -> None:
    """Run causal attention over a cache of one row per sequence; else as `tp_attn_forward_paged_`.

    Row b of k_cache and v_cache [≥ batch_size, S, G, head_dim] belongs to sequence b.

    Raises:
        RuntimeError: as `tp_attn_forward_paged_`.
    """
    rows = [torch.arange(batch_size, dtype=torch.int32, device=lens.device)[:, None] for lens in past_len_tp]
    tp_attn_forward_paged_(
        tp_context, hidden_states, temp_bc0, temp_bc1, temp_bc2, temp_q, temp_k, temp_v, temp_o, k_cache, v_cache,
        pre_layernorm, norm_epsilon, q_proj, k_proj, v_proj, o_proj, head_dim, rope_style, batch_size, q_len, sin, cos,
        past_len_tp, rows, scaling,
    )  # fmt: skip


def _attention(
    heads: tuple[Tensor, Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    past_lens: Tensor,
    block_index: Tensor,
    scale: float,
) -> Tensor:
    """Write the new keys and values into the cache, and return the attention [B · T, H · D] of the queries.

    Args:
        heads: queries, keys and values [B, T, heads, D].
        cache: [P, S, G, D] of keys and of values.
        past_lens: [B] int32.
        block_index: [B, W] int32.
        scale: of scores.
    """
    q, k, v = heads
    batch, num_tokens = q.shape[:2]
    for name, pages in zip(("k_cache", "v_cache"), cache, strict=True):
        check_tensor(name, pages, torch.float16, ("P", "S", *k.shape[2:]))
    check_tensor("past_lens", past_lens, torch.int32, (batch,))
    check_tensor("block_index", block_index, torch.int32, (batch, "W"))
    page_size, num_pages = cache[0].shape[1], block_index.shape[1]
    positions = past_lens[:, None] + torch.arange(num_tokens, dtype=torch.int32, device=q.device)
    if not q.is_cuda and not 0 <= int(positions.min()) <= int(positions.max()) < num_pages * page_size:
        raise ValueError(
            f"past_lens must be in [0, {num_pages * page_size - num_tokens}] for {num_tokens} new tokens in "
            f"{num_pages} pages of {page_size}, got {past_lens.tolist()}"
        )
    slots = block_index.gather(1, (positions // page_size).long()) * page_size + positions % page_size
    k_pages, v_pages = (KVPages.plain(pages.transpose(1, 2)) for pages in cache)
    kv_write(k.flatten(0, 1), v.flatten(0, 1), k_pages, v_pages, slots.flatten())
    starts = torch.arange(0, q.shape[0] * num_tokens + 1, num_tokens, dtype=torch.int32, device=q.device)
    lens = past_lens + num_tokens
    return paged_attention(
        q.flatten(0, 1), k_pages, v_pages, block_index, starts, lens, max_query_len=num_tokens, scale=scale
    )


def _begin(
    tp_context: int,
    x: Tensor,
    cut: tuple[int, int],
    norm: tuple[Sequence[Tensor], float],
    temps: Sequence[Sequence[Tensor]],
) -> list[list[Tensor]]:
    """Return the first rows of scratch, of which every device's first tensor holds x then, and the second rms(x).

    Args:
        tp_context: from `make_tp_context`.
        x: [R, C] fp16.
        cut: the kind of spans whose devices work, and how many columns their numbers count.
        norm: [C] fp16 per device, and epsilon.
        temps: per purpose a tensor [≥ R, columns] for each device.
    """
    for tensors in temps:
        for tensor in tensors:
            if tensor.dim() != 2 or tensor.shape[0] < x.shape[0] or not tensor.is_contiguous():
                raise ValueError(f"scratch must be contiguous with {x.shape[0]} rows or more, got {list(tensor.shape)}")
    firsts = [[tensor[: x.shape[0]] for tensor in tensors] for tensors in temps]
    (spans, dim), (weights, eps) = cut, norm
    tp_broadcast(tp_context, 0, x, spans, firsts[0], dim)
    rms_norm_tp(firsts[0], weights, firsts[1], eps, tp_context)
    return firsts


def _check_counts(split: Split, **lists: Sequence[object]) -> None:
    """Raise ValueError unless lists have one entry for each span."""
    for name, entries in lists.items():
        if len(entries) != len(split):
            raise ValueError(f"{name} must hold one entry for each of {len(split)} spans, got {len(entries)}")


def _end(tp_context: int, products: list[Tensor], whole: list[Tensor], cut: tuple[int, int]) -> None:
    """Add to the slices that devices made what x holds there, in fp16, and join them in buffer 0.

    `cut` is that of `_begin`.
    """
    spans, dim = cut
    for product, x, (_, start, stop) in zip(products, whole, contexts.find(tp_context).split(spans), strict=True):
        product += x[:, start * dim : stop * dim]
    tp_gather(tp_context, 0, products, spans, [], -1, dim)
