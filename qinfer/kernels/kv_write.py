"""Writing the new keys and values of one layer into its pages.

    k_pages[page, g, offset] = k[t, g],  v_pages[page, g, offset] = v[t, g],  slots[t] = page * S + offset

Pages are [P, G, S, D], so that the rows of one head in one page lie together, as attention reads them. A slot of -1
skips the row: a padding row of a CUDA graph. Two rows with the same slot leave either of them. Values are converted
once, to the pages' dtype. Offsets are 64-bit. A kernel does not look whether a slot is in range; the check does, for
CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_float, check_index, check_rows, check_shape
from qinfer.kernels.device import op

BLOCK_HEADS = 8


def kv_write_reference(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Compute `kv_write` in plain torch."""
    kept = slots >= 0
    slot = slots[kept].long()
    page_size = k_pages.shape[2]
    page, offset = slot // page_size, slot % page_size
    for x, pages in ((k, k_pages), (v, v_pages)):
        pages[page, :, offset] = x[kept].to(pages.dtype)


@triton.jit(do_not_specialize_on_alignment=["p_slots"])
def _kv_write_kernel(
    p_k,
    p_v,
    p_k_pages,
    p_v_pages,
    p_slots,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_page,
    stride_page_head,
    stride_page_row,
    G: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    i_slot = tl.load(p_slots + i_t).to(tl.int64)
    o_g = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_x = (o_g < G) & (o_d < D) & (i_slot >= 0)
    o_page = i_slot // S * stride_page + i_slot % S * stride_page_row + o_g * stride_page_head + o_d
    b_k = tl.load(p_k + i_t * stride_k_token + o_g * stride_k_head + o_d, mask=m_x).to(tl.float32)
    b_v = tl.load(p_v + i_t * stride_v_token + o_g * stride_v_head + o_d, mask=m_x).to(tl.float32)
    tl.store(p_k_pages + o_page, b_k.to(p_k_pages.dtype.element_ty), mask=m_x)
    tl.store(p_v_pages + o_page, b_v.to(p_v_pages.dtype.element_ty), mask=m_x)


def _check_kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    check_shape("k", k, ("T", "G", "D"))
    num_tokens, num_heads, head_dim = k.shape
    check_shape("v", v, (num_tokens, num_heads, head_dim))
    check_shape("k_pages", k_pages, ("P", num_heads, "S", head_dim))
    check_shape("v_pages", v_pages, tuple(k_pages.shape))
    if k_pages.stride() != v_pages.stride():
        raise ValueError(f"v_pages must have strides {list(k_pages.stride())}, got {list(v_pages.stride())}")
    for name, x in (("k", k), ("v", v), ("k_pages", k_pages), ("v_pages", v_pages)):
        check_float(name, x.dtype)
        check_rows(name, x)
    check_device(k, v=v, k_pages=k_pages, v_pages=v_pages, slots=slots)
    check_index("slots", slots, num_tokens, start=-1, stop=k_pages.shape[0] * k_pages.shape[2])


@op(reference=kv_write_reference, check=_check_kv_write)
def kv_write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write the new rows of one layer into their pages.

    Args:
        k: [T, G, D] fp16, bf16 or fp32, last stride 1.
        v: [T, G, D] fp16, bf16 or fp32, last stride 1.
        k_pages: [P, G, S, D] fp16, bf16 or fp32, last stride 1.
        v_pages: [P, G, S, D] with the strides of k_pages.
        slots: [T] int32 (or int64), page * S + offset of each row; -1 skips the row.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) a slot is out of range.
    """
    num_tokens, num_heads, head_dim = k.shape
    if k.numel():
        block_heads = min(BLOCK_HEADS, triton.next_power_of_2(num_heads))
        grid = (num_tokens, triton.cdiv(num_heads, block_heads))
        strides = *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3]
        shape = {"G": num_heads, "S": k_pages.shape[2], "D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
        _kv_write_kernel[grid](k, v, k_pages, v_pages, slots, *strides, **shape, BLOCK_HEADS=block_heads)
