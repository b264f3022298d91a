"""Writing the new keys and values of one layer into its pages, and rotating queries and keys in the same launch.

    k_pages[page, g, offset] = encode(k[t, g]),  v_pages[page, g, offset] = encode(v[t, g]),  slots[t] = page S + offset

`rope_write` first turns q, in place, and k, on its way, by the angles of their positions (`rope.py`); given weights, it
normalizes every head of both before that, as Qwen3 does (`rmsnorm.py`). `kv_write` takes k as it is. How a row is
encoded is the pages' codec (`kv_codec.py`), in registers and in one pass. Pages are [P, G, S, row], so that the rows of
one head in one page lie together, as attention reads them. A slot of -1 skips the row: a padding row of a CUDA graph.
Two rows with the same slot leave either of them. A turned key is rounded to k's dtype before it is encoded, so that
both ops write the same bytes; between norm and turn nothing is rounded. Offsets are 64-bit. A kernel does not look
whether a slot or a position is in range; the check does, for CPU tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_float, check_index, check_rows, check_shape
from qinfer.kernels.device import op
from qinfer.kernels.kv_codec import KVPages, encode, run_length
from qinfer.kernels.kv_tile import store_rows
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs
from qinfer.kernels.rmsnorm import rmsnorm
from qinfer.kernels.rope import rope, rotate_heads

BLOCK_HEADS = 8
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


def rope_write_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> None:
    """Compute `rope_write` in plain torch."""
    turned_q, turned_k = q.float().clone(), k.float().clone()
    if q_weight is not None and k_weight is not None:
        turned_q, turned_k = (rmsnorm.reference(x, w, eps=eps) for x, w in ((turned_q, q_weight), (turned_k, k_weight)))
    rope.reference(turned_q, turned_k, cos, sin, positions, interleaved=interleaved)
    q.copy_(turned_q)
    kv_write_reference(turned_k.to(k.dtype), v, k_pages, v_pages, slots)


@triton.jit
def _turned(p_x, o_d, m_x, p_cos, p_sin, p_weight, eps, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load rows [M, D] from p_x [M, 1], normalize them if there is a weight, and turn them by one position's angles.

    Each feature stands beside its partner, whose memory may be written only behind a barrier.
    """
    if INTERLEAVED:
        o_pair, o_partner, m_first = o_d // 2, o_d ^ 1, o_d % 2 == 0
    else:
        m_first = o_d < HALF
        o_pair = tl.where(m_first, o_d, o_d - HALF)
        o_partner = tl.where(m_first, o_d + HALF, o_d - HALF)
    m_turn = o_d < 2 * HALF
    b_cos = tl.load(p_cos + o_pair, mask=m_turn, other=1.0)
    b_sin = tl.load(p_sin + o_pair, mask=m_turn, other=0.0)
    b_x = tl.load(p_x + o_d, mask=m_x, other=0.0).to(tl.float32)
    b_partner = tl.load(p_x + o_partner, mask=m_x & m_turn, other=0.0).to(tl.float32)
    if p_weight is not None:
        b_factor = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + eps)[:, None]
        b_x *= b_factor * tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        b_partner *= b_factor * tl.load(p_weight + o_partner, mask=m_turn, other=0.0).to(tl.float32)
    return b_x * b_cos + b_partner * tl.where(m_first, -b_sin, b_sin)


@triton.jit(do_not_specialize_on_alignment=["p_positions", "p_slots"])
def _kv_write_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_positions, p_slots, p_k_codes, p_k_scales, p_v_codes, p_v_scales,
    p_q_weight, p_k_weight, eps,  # None: no norm
    s_q_token, s_q_head, s_k_token, s_k_head, s_v_token, s_v_head, s_cos, s_sin,
    s_k_page, s_k_page_head, s_k_row, s_k_scale, s_v_page, s_v_page_head, s_v_row, s_v_scale,
    H: tl.constexpr,  # 0: no queries
    G: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # 0: keys are not turned
    INTERLEAVED: tl.constexpr,
    RUN: tl.constexpr,
    K_SCHEME: tl.constexpr,
    V_SCHEME: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAP)
    wait_for_inputs(OVERLAP)
    NUM_Q_BLOCKS: tl.constexpr = (H + BLOCK_HEADS - 1) // BLOCK_HEADS
    i_t = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    if HALF > 0:
        i_position = tl.load(p_positions + i_t).to(tl.int64)
        p_cos += i_position * s_cos
        p_sin += i_position * s_sin
    if i_block < NUM_Q_BLOCKS:
        if H > 0 and p_q_weight is not None:
            o_h = i_block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            o_d = tl.arange(0, BLOCK_D)[None, :]
            m_x = (o_h < H)[:, None] & (o_d < D)
            p_q_rows = p_q + i_t * s_q_token + o_h.to(tl.int64)[:, None] * s_q_head
            b_q = _turned(p_q_rows, o_d, m_x, p_cos, p_sin, p_q_weight, eps, D, HALF, INTERLEAVED)
            tl.debug_barrier()
            tl.store(p_q_rows + o_d, b_q.to(p_q.dtype.element_ty), mask=m_x)
        elif H > 0:
            o_i = tl.arange(0, BLOCK_HALF)
            b_cos = tl.load(p_cos + o_i, mask=o_i < HALF, other=0.0)[None, :]
            b_sin = tl.load(p_sin + o_i, mask=o_i < HALF, other=0.0)[None, :]
            rotate_heads(
                p_q + i_t * s_q_token, s_q_head, i_block * BLOCK_HEADS, H, b_cos, b_sin, o_i,
                HALF, INTERLEAVED, BLOCK_HEADS,
            )  # fmt: skip
    else:
        i_slot = tl.load(p_slots + i_t).to(tl.int64)
        i_page, i_row = i_slot // S, i_slot % S
        o_g = ((i_block - NUM_Q_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)
        m_g = (o_g < G) & (i_slot >= 0)
        o_d = tl.arange(0, BLOCK_D)[None, :]
        m_x = m_g[:, None] & (o_d < D)
        p_k_rows = p_k + i_t * s_k_token + o_g[:, None] * s_k_head
        if HALF > 0:
            b_turned = _turned(p_k_rows, o_d, m_x, p_cos, p_sin, p_k_weight, eps, D, HALF, INTERLEAVED)
            b_k = b_turned.to(p_k.dtype.element_ty)
        else:
            b_k = tl.load(p_k_rows + o_d, mask=m_x, other=0.0)
        b_v = tl.load(p_v + i_t * s_v_token + o_g[:, None] * s_v_head + o_d, mask=m_x, other=0.0)
        o_codes = i_page * s_k_page + o_g * s_k_page_head + i_row * s_k_row
        store_rows(b_k, p_k_codes, p_k_scales, o_codes, i_page * s_k_scale + o_g * S + i_row, m_g, D, RUN, K_SCHEME)
        o_codes = i_page * s_v_page + o_g * s_v_page_head + i_row * s_v_row
        store_rows(b_v, p_v_codes, p_v_scales, o_codes, i_page * s_v_scale + o_g * S + i_row, m_g, D, RUN, V_SCHEME)


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> None:
    rope.check(q, k, cos, sin, positions, interleaved=interleaved)
    _check_kv_write(k, v, k_pages, v_pages, slots)
    check_device(q, v=v)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must both be given, or neither")
    for x, weight in ((q, q_weight), (k, k_weight)):
        if weight is not None:
            rmsnorm.check(x, weight, eps=eps)


@dataclass(frozen=True)
class _Turn:
    """What happens to queries and keys before anything is written."""

    cos: Tensor
    sin: Tensor
    positions: Tensor
    interleaved: bool
    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float


def _launch(
    q: Tensor, k: Tensor, v: Tensor, turn: _Turn | None, k_pages: KVPages, v_pages: KVPages, slots: Tensor
) -> None:
    """Launch the kernel; without a turn, q is not looked at."""
    (num_tokens, num_kv_heads, head_dim), page_size = k.shape, k_pages.codes.shape[2]
    if not k.numel():
        return
    block_d, run = triton.next_power_of_2(head_dim), run_length(head_dim)
    half, num_heads = (0, 0) if turn is None else (turn.cos.shape[1], q.shape[1])
    turn = turn or _Turn(k, k, slots, interleaved=False, q_weight=None, k_weight=None, eps=0.0)
    is_rotated = k_pages.codec.is_rotated or v_pages.codec.is_rotated
    block_heads = max(BLOCK_HEADS, MIN_ROWS * run // block_d) if is_rotated else BLOCK_HEADS
    if not num_heads and not is_rotated:
        block_heads = min(block_heads, triton.next_power_of_2(num_kv_heads))
    block_half = triton.next_power_of_2(max(half, 1))
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], turn.cos.stride(0), turn.sin.stride(0)
    sides = [
        (*pages.codes.stride()[:3], 0 if pages.scales is None else pages.scales.stride(0))
        for pages in (k_pages, v_pages)
    ]
    _kv_write_kernel[(num_tokens, triton.cdiv(num_heads, block_heads) + triton.cdiv(num_kv_heads, block_heads))](
        q, k, v, turn.cos, turn.sin, turn.positions, slots,
        k_pages.codes, k_pages.scales, v_pages.codes, v_pages.scales, turn.q_weight, turn.k_weight, turn.eps,
        *strides, *sides[0], *sides[1],
        H=num_heads, G=num_kv_heads, S=page_size, D=head_dim, HALF=half, INTERLEAVED=turn.interleaved, RUN=run,
        K_SCHEME=k_pages.codec.scheme, V_SCHEME=v_pages.codec.scheme,
        BLOCK_HEADS=block_heads, BLOCK_D=block_d, BLOCK_HALF=block_half,
        # Few enough warps that no pair of a query has a copy in a second one, which could load it after its rotation.
        num_warps=min(max(block_heads * (block_half if num_heads else block_d) // 128, 1), 4),
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
    _launch(k, k, v, None, k_pages, v_pages, slots)


@op(reference=rope_write_reference, check=_check_rope_write)
def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
) -> None:
    """Turn queries in place by the angles of their positions, and write turned keys and values into their pages.

    Args:
        q: [T, H, D] fp16, bf16 or fp32, last stride 1, changed.
        k: [T, G, D] fp16, bf16 or fp32, last stride 1, left as it is.
        v: [T, G, D] fp16, bf16 or fp32, last stride 1.
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

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) a position or a slot is out of
            range.
        UnsupportedError: the codec cannot store rows of D numbers.
    """
    turn = _Turn(cos, sin, positions, interleaved, q_weight, k_weight, eps)
    _launch(q, k, v, turn, k_pages, v_pages, slots)
