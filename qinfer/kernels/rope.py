"""Rotary position embedding of queries and keys, in place and in one launch.

With the angle of pair i at the token's position given by its cosine c and sine s, a pair (a, b) becomes
(a·c − b·s, b·c + a·s). The pairs of the first R features of a head are

    interleaved=False  (x[i], x[i + R/2])
    interleaved=True   (x[2i], x[2i + 1])

and features from R on stay as they are. Angles come from tables [L, R/2] in fp32, so that any scaling of the
frequencies is the table's business. Computed in fp32, rounded once. q and k may be strided views into one merged row.
Source: Su et al., RoFormer (arXiv:2104.09864), which pairs neighbours; Llama checkpoints pair halves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_float, check_index, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs

BLOCK_HEADS = 8  # heads that share one load of the cosines and sines


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> None:
    """Compute `rope` in plain torch."""
    half = cos.shape[1]
    c, s = (table.index_select(0, positions)[:, None, :] for table in (cos, sin))
    for x in (q, k):
        first, second = (
            (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2])
            if interleaved
            else (x[..., :half], x[..., half : 2 * half])
        )
        a, b = first.float(), second.float()
        # Both results exist before either is stored: for fp32 input a and b are views of x.
        rotated = a * c - b * s, b * c + a * s
        first.copy_(rotated[0])
        second.copy_(rotated[1])


@triton.jit
def rotate_heads(
    p_x,
    stride_head,
    i_head,
    num_heads,
    b_cos,
    b_sin,
    o_i,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Rotate one block of heads of one token, p_x being that token's first head."""
    o_head = i_head + tl.arange(0, BLOCK_HEADS)
    m_x = (o_head < num_heads)[:, None] & (o_i < HALF)[None, :]
    if INTERLEAVED:
        p_a = p_x + o_head.to(tl.int64)[:, None] * stride_head + 2 * o_i[None, :]
        p_b = p_a + 1
    else:
        p_a = p_x + o_head.to(tl.int64)[:, None] * stride_head + o_i[None, :]
        p_b = p_a + HALF
    b_a = tl.load(p_a, mask=m_x, other=0.0).to(tl.float32)
    b_b = tl.load(p_b, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_a, (b_a * b_cos - b_b * b_sin).to(p_x.dtype.element_ty), mask=m_x)
    tl.store(p_b, (b_b * b_cos + b_a * b_sin).to(p_x.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize_on_alignment=["p_positions"])
def _rope_kernel(
    p_q,
    p_k,
    p_cos,
    p_sin,
    p_positions,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_cos,
    stride_sin,
    H: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    i_t = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    i_position = tl.load(p_positions + i_t).to(tl.int64)
    o_i = tl.arange(0, BLOCK_HALF)
    m_i = o_i < HALF
    b_cos = tl.load(p_cos + i_position * stride_cos + o_i, mask=m_i, other=0.0)[None, :]
    b_sin = tl.load(p_sin + i_position * stride_sin + o_i, mask=m_i, other=0.0)[None, :]
    num_q_blocks: tl.constexpr = (H + BLOCK_HEADS - 1) // BLOCK_HEADS
    if i_block < num_q_blocks:
        rotate_heads(
            p_q + i_t * stride_q_token,
            stride_q_head,
            i_block * BLOCK_HEADS,
            H,
            b_cos,
            b_sin,
            o_i,
            HALF,
            INTERLEAVED,
            BLOCK_HEADS,
        )
    else:
        rotate_heads(
            p_k + i_t * stride_k_token,
            stride_k_head,
            (i_block - num_q_blocks) * BLOCK_HEADS,
            G,
            b_cos,
            b_sin,
            o_i,
            HALF,
            INTERLEAVED,
            BLOCK_HEADS,
        )


def _check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> None:
    check_shape("q", q, ("T", "H", "D"))
    num_tokens, _, head_dim = q.shape
    check_shape("k", k, (num_tokens, "G", head_dim))
    check_shape("cos", cos, ("L", "R/2"))
    check_shape("sin", sin, tuple(cos.shape))
    for name, x in (("q", q), ("k", k)):
        check_float(name, x.dtype)
        check_rows(name, x)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {table.dtype}")
        check_rows(name, table)
    if not 2 <= 2 * cos.shape[1] <= head_dim:
        raise ValueError(f"cos must be [L, R/2] with 2 <= R <= {head_dim}, got {list(cos.shape)}")
    check_device(q, k=k, cos=cos, sin=sin, positions=positions)
    check_index("positions", positions, num_tokens, stop=cos.shape[0])


@op(reference=rope_reference, check=_check_rope)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> None:
    """Rotate queries and keys in place by the angles of their positions.

    (a, b) -> (a·cos − b·sin, b·cos + a·sin) for every pair among the first R features of every head

    Args:
        q: [T, H, D] fp16, bf16 or fp32, last stride 1.
        k: [T, G, D] fp16, bf16 or fp32, last stride 1.
        cos: [L, R/2] fp32, cosine of the angle of pair i at each position; R <= D.
        sin: [L, R/2] fp32, its sine.
        positions: [T] int32 (or int64) in [0, L).
        interleaved: pairs are neighbours (2i, 2i + 1) rather than halves (i, i + R/2).

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) a position is out of range.
    """
    num_tokens, num_heads, _ = q.shape
    num_kv_heads = k.shape[1]
    num_blocks = triton.cdiv(num_heads, BLOCK_HEADS) + triton.cdiv(num_kv_heads, BLOCK_HEADS)
    if num_tokens and num_blocks:
        half = cos.shape[1]
        block_half = triton.next_power_of_2(half)
        strides = *q.stride()[:2], *k.stride()[:2], cos.stride(0), sin.stride(0)
        shape = {"H": num_heads, "G": num_kv_heads, "HALF": half, "INTERLEAVED": interleaved}
        # Few enough warps that no pair has a copy in a second one, which could load it after the first has rotated it.
        num_warps = min(max(BLOCK_HEADS * block_half // 128, 1), 4)
        _rope_kernel[(num_tokens, num_blocks)](
            q,
            k,
            cos,
            sin,
            positions,
            *strides,
            **shape,
            BLOCK_HEADS=BLOCK_HEADS,
            BLOCK_HALF=block_half,
            num_warps=num_warps,
            **overlap(q),
        )
