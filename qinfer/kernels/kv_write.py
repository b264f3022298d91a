"""Writing the new keys and values of one layer into its pages, and turning queries and keys in the same launch.

    k_pages[page, g, offset] = encode(k[t, g]),  v_pages[page, g, offset] = encode(v[t, g]),  slots[t] = page S + offset

`kv_write` takes k and v as they are. `rope_write` takes the merged product of q, k and v, in parts over K (`parts.py`)
or whole; it turns queries and keys by the angles of their positions (`rope.py`) and returns the queries. Given weights,
it normalizes every head of both before that, as Qwen3 does (`rmsnorm.py`). From the sum of the parts on everything is
fp32 in registers, and rounded once, to the dtype of the activations; that is what a row is encoded from.

How a row is encoded is the pages' codec (`kv_codec.py`), in one pass. Pages are [P, G, S, row], so that the rows of one
head in one page lie together, as attention reads them. A slot of -1 skips the row: a padding row of a CUDA graph. Two
rows with the same slot leave either of them. Offsets are 64-bit. A kernel does not look whether a slot or a position is
in range; the check does, for CPU tensors. Positions, slots and tables are read ahead of the wait (`overlap.py`): no
kernel that takes part in the overlap may write them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_float, check_index, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.kv_codec import KVPages, encode, run_length
from qinfer.kernels.kv_tile import is_rotated, store_rows
from qinfer.kernels.overlap import let_next_start, overlap, starts_early, wait_for_inputs
from qinfer.kernels.parts import add_up, as_parts, load_sum
from qinfer.kernels.rmsnorm import rmsnorm
from qinfer.kernels.rope import rope

BLOCK_HEADS = 8  # heads of a program
BLOCK_HEADS_OF_PARTS = 2  # where each of them has several parts to read
MIN_ROWS = 16  # of a product with the matrix that rotates runs


def kv_write_reference(k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slots: Tensor) -> None:
    """Compute `kv_write` in plain torch."""
    kept = slots >= 0
    slot = slots[kept].long()
    page_size = k_pages.codes.shape[2]
    page, offset = slot // page_size, slot % page_size
    for x, pages in ((k, k_pages), (v, v_pages)):
        codes, scales = encode(x[kept], pages.codec)
        pages.codes[page, :, offset] = codes
        if pages.scales is not None and scales is not None:
            pages.scales[page, :, offset] = scales


def heads_of(qkv: Tensor, k_pages: KVPages) -> tuple[Tensor, ...]:
    """Return views of the queries [S, T, H, D], the keys [S, T, G, D] and the values [S, T, G, D] of a product."""
    num_kv_heads, head_dim = k_pages.codes.shape[1], k_pages.head_dim
    heads = as_parts(qkv).unflatten(-1, (-1, head_dim))
    return tuple(torch.split(heads, [heads.shape[2] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=2))


def rope_write_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    slots: Tensor,
    *,
    interleaved: bool,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute `rope_write` in plain torch."""
    dtype = out_dtype or qkv.dtype
    q, k, v = (x[0].clone() for x in heads_of(add_up(qkv), k_pages))
    if q_weight is not None and k_weight is not None:
        q, k = (rmsnorm.reference(x, weight, eps=eps) for x, weight in ((q, q_weight), (k, k_weight)))
    rope.reference(q, k, cos, sin, positions, interleaved=interleaved)
    kv_write_reference(k.to(dtype), v.to(dtype), k_pages, v_pages, slots)
    return q.to(dtype)


@triton.jit
def _angles(p_cos, p_sin, o_d, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return what features and their partners are multiplied by at one position, and which are whose partners."""
    if INTERLEAVED:
        o_pair, o_partner, m_first = o_d // 2, o_d ^ 1, o_d % 2 == 0
    else:
        m_first = o_d < HALF
        o_pair = tl.where(m_first, o_d, o_d - HALF)
        o_partner = tl.where(m_first, o_d + HALF, o_d - HALF)
    m_turn = o_d < 2 * HALF
    b_cos = tl.load(p_cos + o_pair, mask=m_turn, other=1.0)
    b_sin = tl.load(p_sin + o_pair, mask=m_turn, other=0.0)
    return b_cos, tl.where(m_first, -b_sin, b_sin), tl.where(m_turn, o_partner, o_d)


@triton.jit
def _turned(
    p_x, stride_part, o_d, m_x, b_cos, b_sin, o_partner, p_weight, eps, D: tl.constexpr, NUM_PARTS: tl.constexpr,
    IS_MOVED: tl.constexpr,
):  # fmt: skip
    """Add up rows [M, D] from p_x [M, 1], normalize them if there is a weight, and turn them by one position's angles.

    Each feature stands beside its partner, which is loaded for itself: moving it between threads would cost more.
    """
    b_x = load_sum(p_x + o_d, stride_part, m_x, NUM_PARTS, IS_MOVED)
    b_partner = load_sum(p_x + o_partner, stride_part, m_x, NUM_PARTS, IS_MOVED)
    if p_weight is not None:
        b_factor = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)[:, None]
        b_x *= b_factor * tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_partner *= b_factor * tl.load(p_weight + o_partner, mask=o_d < D, other=0.0).to(tl.float32)
    return b_x * b_cos + b_partner * b_sin


# The distance of parts grows with the number of rows, and a kernel per divisibility of it would be compiled in serving.
@triton.jit(do_not_specialize=["s_part"], do_not_specialize_on_alignment=["p_positions", "p_slots"])
def _kv_write_kernel(
    p_q, p_k, p_v, p_out, p_cos, p_sin, p_positions, p_slots, p_k_codes, p_k_scales, p_v_codes, p_v_scales,
    p_q_weight, p_k_weight, eps,  # None: no norm
    s_part, s_k_token, s_k_head, s_v_token, s_v_head, s_cos, s_sin,  # queries have the strides of keys
    s_k_page, s_k_page_head, s_k_row, s_k_scale, s_v_page, s_v_page_head, s_v_row, s_v_scale,
    NUM_PARTS: tl.constexpr,
    H: tl.constexpr,  # 0: no queries
    G: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # 0: keys are not turned
    INTERLEAVED: tl.constexpr,
    RUN: tl.constexpr,
    K_SCHEME: tl.constexpr,
    V_SCHEME: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if not EARLY:
        let_next_start(OVERLAP)
    Q_BLOCKS: tl.constexpr = (H + BLOCK_Q - 1) // BLOCK_Q
    KV_BLOCKS: tl.constexpr = (G + BLOCK_KV - 1) // BLOCK_KV
    K_DTYPE: tl.constexpr = p_out.dtype.element_ty if HALF > 0 else p_k.dtype.element_ty
    V_DTYPE: tl.constexpr = p_out.dtype.element_ty if HALF > 0 else p_v.dtype.element_ty
    i_t = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    i_slot = tl.load(p_slots + i_t).to(tl.int64)
    if HALF > 0:
        i_position = tl.load(p_positions + i_t).to(tl.int64)
        b_cos, b_sin, o_partner = _angles(
            p_cos + i_position * s_cos, p_sin + i_position * s_sin, o_d, HALF, INTERLEAVED
        )
    wait_for_inputs(OVERLAP)
    let_next_start(OVERLAP)
    if i_block < Q_BLOCKS:
        if H > 0:
            o_h = (i_block * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)[:, None]
            m_q = (o_h < H) & (o_d < D)
            p_q_rows = p_q + i_t * s_k_token + o_h * s_k_head
            b_q = _turned(p_q_rows, s_part, o_d, m_q, b_cos, b_sin, o_partner, p_q_weight, eps, D, NUM_PARTS, False)
            tl.store(p_out + (i_t * H + o_h) * D + o_d, b_q.to(p_out.dtype.element_ty), mask=m_q)
    else:
        i_block -= Q_BLOCKS
        i_page, i_row = i_slot // S, i_slot % S
        o_g = (i_block % KV_BLOCKS * BLOCK_KV + tl.arange(0, BLOCK_KV)).to(tl.int64)
        m_g = (o_g < G) & (i_slot >= 0)
        m_x = m_g[:, None] & (o_d < D)
        if i_block < KV_BLOCKS:
            p_rows = p_k + i_t * s_k_token + o_g[:, None] * s_k_head
            if HALF > 0:
                b_k = _turned(
                    p_rows, s_part, o_d, m_x, b_cos, b_sin, o_partner, p_k_weight, eps, D, NUM_PARTS,
                    is_rotated(K_SCHEME),
                )  # fmt: skip
            else:
                b_k = tl.load(p_rows + o_d, mask=m_x, other=0.0)
            o_codes = i_page * s_k_page + o_g * s_k_page_head + i_row * s_k_row
            o_scales = i_page * s_k_scale + o_g * S + i_row
            store_rows(b_k.to(K_DTYPE), p_k_codes, p_k_scales, o_codes, o_scales, m_g, D, RUN, K_SCHEME)
        else:
            p_values = p_v + i_t * s_v_token + o_g[:, None] * s_v_head + o_d
            b_v = load_sum(p_values, s_part, m_x, NUM_PARTS, is_rotated(V_SCHEME))
            o_codes = i_page * s_v_page + o_g * s_v_page_head + i_row * s_v_row
            o_scales = i_page * s_v_scale + o_g * S + i_row
            store_rows(b_v.to(V_DTYPE), p_v_codes, p_v_scales, o_codes, o_scales, m_g, D, RUN, V_SCHEME)


def _check_kv_write(k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slots: Tensor) -> None:
    check_shape("k", k, ("T", "G", "D"))
    num_tokens, num_heads, head_dim = k.shape
    check_shape("v", v, (num_tokens, num_heads, head_dim))
    for name, x in (("k", k), ("v", v)):
        check_float(name, x.dtype)
        check_rows(name, x)
    k_pages.check("k_pages", ("P", num_heads, "S", head_dim))
    num_pages, _, page_size = k_pages.codes.shape[:3]
    v_pages.check("v_pages", (num_pages, num_heads, page_size, head_dim))
    check_device(k, v=v, k_pages=k_pages.codes, k_scales=k_pages.scales, v_pages=v_pages.codes, slots=slots)
    check_device(k, v_scales=v_pages.scales)
    check_index("slots", slots, num_tokens, start=-1, stop=num_pages * page_size)


def _check_rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    slots: Tensor,
    *,
    interleaved: bool,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> None:
    check_float("qkv", qkv.dtype)
    check_float("out_dtype", out_dtype or qkv.dtype)
    check_shape("qkv", qkv, (*(("S",) if qkv.ndim == 3 else ()), "T", "(H + 2 G) D"))
    check_rows("qkv", qkv)
    num_kv_heads, head_dim = k_pages.codes.shape[1], k_pages.head_dim
    num_heads = qkv.shape[-1] // head_dim - 2 * num_kv_heads
    if num_heads < 1 or qkv.shape[-1] % head_dim:
        raise ValueError(
            f"qkv must have (H + 2 · {num_kv_heads}) · {head_dim} columns for these pages, got {qkv.shape[-1]}"
        )
    q, k, v = (x[0] for x in heads_of(qkv, k_pages))
    rope.check(q, k, cos, sin, positions, interleaved=interleaved)
    _check_kv_write(k, v, k_pages, v_pages, slots)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must both be given, or neither")
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            rmsnorm.check(x, weight, eps=eps)


@dataclass(frozen=True)
class _Turn:
    """What happens to queries and keys before anything is written."""

    q: Tensor  # [S, T, H, D]
    out: Tensor  # [T, H, D]
    cos: Tensor
    sin: Tensor
    positions: Tensor
    interleaved: bool
    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float


def _launch(k: Tensor, v: Tensor, turn: _Turn | None, k_pages: KVPages, v_pages: KVPages, slots: Tensor) -> None:
    """Launch the kernel on keys and values [S, T, G, D]."""
    (num_parts, num_tokens, num_kv_heads, head_dim), page_size = k.shape, k_pages.codes.shape[2]
    half, num_heads = (0, 0) if turn is None else (turn.cos.shape[1], turn.q.shape[2])
    turn = turn or _Turn(k, k, k, k, slots, interleaved=False, q_weight=None, k_weight=None, eps=0.0)
    block_d, run = triton.next_power_of_2(head_dim), run_length(head_dim)
    block_q = block_kv = BLOCK_HEADS if num_parts == 1 else BLOCK_HEADS_OF_PARTS
    if k_pages.codec.is_rotated or v_pages.codec.is_rotated:
        block_kv = max(block_kv, MIN_ROWS * run // block_d)
    else:
        block_kv = min(block_kv, triton.next_power_of_2(num_kv_heads))
    sides = [
        (*pages.codes.stride()[:3], 0 if pages.scales is None else pages.scales.stride(0))
        for pages in (k_pages, v_pages)
    ]
    _kv_write_kernel[(num_tokens, triton.cdiv(num_heads, block_q) + 2 * triton.cdiv(num_kv_heads, block_kv))](
        turn.q, k, v, turn.out, turn.cos, turn.sin, turn.positions, slots,
        k_pages.codes, k_pages.scales, v_pages.codes, v_pages.scales, turn.q_weight, turn.k_weight, turn.eps,
        k.stride(0), *k.stride()[1:3], *v.stride()[1:3], turn.cos.stride(0), turn.sin.stride(0), *sides[0], *sides[1],
        NUM_PARTS=num_parts, H=num_heads, G=num_kv_heads, S=page_size, D=head_dim, HALF=half,
        INTERLEAVED=turn.interleaved, RUN=run, K_SCHEME=k_pages.codec.scheme, V_SCHEME=v_pages.codec.scheme,
        BLOCK_Q=block_q, BLOCK_KV=block_kv, BLOCK_D=block_d,
        num_warps=min(max(max(block_q if num_heads else 0, block_kv) * block_d // 128, 1), 4),
        EARLY=starts_early(num_parts, num_tokens),
        **overlap(k),
    )  # fmt: skip


@op(reference=kv_write_reference, check=_check_kv_write)
def kv_write(k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slots: Tensor) -> None:
    """Write the new rows of one layer into their pages.

    Args:
        k: [T, G, D] fp16, bf16 or fp32, last stride 1.
        v: [T, G, D] fp16, bf16 or fp32, last stride 1.
        k_pages: [P, G, S, D] in any codec.
        v_pages: [P, G, S, D] in any codec, not necessarily the same.
        slots: [T] int32 (or int64), page * S + offset of each row; -1 skips the row.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) a slot is out of range.
        UnsupportedError: the codec cannot store rows of D numbers.
    """
    if k.numel():
        _launch(k[None], v[None], None, k_pages, v_pages, slots)


@op(reference=rope_write_reference, check=_check_rope_write)
def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_pages: KVPages,
    v_pages: KVPages,
    slots: Tensor,
    *,
    interleaved: bool,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Turn queries and keys by the angles of their positions, and write turned keys and values into their pages.

    Args:
        qkv: [T, (H + 2 G) D] fp16, bf16 or fp32, last stride 1: heads of queries, keys and values side by side; or
            [S, T, (H + 2 G) D], parts that are added in fp32 in their order.
        cos: [L, R/2] fp32, cosine of the angle of pair i at each position; R <= D.
        sin: [L, R/2] fp32, its sine.
        positions: [T] int32 (or int64) in [0, L).
        k_pages: [P, G, S, D] in any codec.
        v_pages: [P, G, S, D] in any codec, not necessarily the same.
        slots: [T] int32 (or int64), page * S + offset of each row; -1 skips the row.
        interleaved: pairs are neighbours (2i, 2i + 1) rather than halves (i, i + R/2).
        q_weight: [D] fp16, bf16 or fp32: before they turn, queries become x * rsqrt(mean(x²) + eps) * q_weight; None
            leaves queries and keys as they are.
        k_weight: [D], the same of keys.
        eps: added to the mean squares.
        out_dtype: dtype of the result, and of the rows that are encoded; None takes that of qkv.

    Returns:
        [T, H, D] the turned queries, contiguous.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) a position or a slot is out of
            range.
        UnsupportedError: the codec cannot store rows of D numbers.
    """
    q, k, v = heads_of(qkv, k_pages)
    out = torch.empty(q.shape[1:], dtype=out_dtype or qkv.dtype, device=qkv.device)
    if out.numel():
        turn = _Turn(q, out, cos, sin, positions, interleaved, q_weight, k_weight, eps)
        _launch(k, v, turn, k_pages, v_pages, slots)
    return out
