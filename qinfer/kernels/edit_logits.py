"""Changes of single logits: penalties, biases and bans.

    out[row, id] = x * (up if x > 0 else down) + offset,  x = logits[row, id],  (row, id) = places[n],
                                                          (up, down, offset) = changes[n]

Everything else of `out` stays. Product and sum are fp32, each rounded by itself, so kernel and reference agree bit for
bit. An offset of -inf bans a token. A place may occur once: two changes of the same one leave either of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_rows, check_shape
from qinfer.kernels.device import op

BLOCK = 256


def edit_logits_reference(logits: Tensor, out: Tensor, places: Tensor, changes: Tensor) -> None:
    """Compute `edit_logits` in plain torch."""
    row, token = places.long().unbind(1)
    up, down, offset = changes.unbind(1)
    x = logits[row, token]
    out[row, token] = x * torch.where(x > 0, up, down) + offset


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["p_places", "p_changes"])
def _edit_logits_kernel(p_logits, p_out, p_places, p_changes, N, stride_logits, stride_out, BLOCK: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    i_row = tl.load(p_places + o_n * 2, mask=m_n, other=0).to(tl.int64)
    i_id = tl.load(p_places + o_n * 2 + 1, mask=m_n, other=0)
    b_up = tl.load(p_changes + o_n * 3, mask=m_n)
    b_down = tl.load(p_changes + o_n * 3 + 1, mask=m_n)
    b_offset = tl.load(p_changes + o_n * 3 + 2, mask=m_n)
    b_x = tl.load(p_logits + i_row * stride_logits + i_id, mask=m_n, other=0.0)
    tl.store(p_out + i_row * stride_out + i_id, b_x * tl.where(b_x > 0, b_up, b_down) + b_offset, mask=m_n)


def _check_edit_logits(logits: Tensor, out: Tensor, places: Tensor, changes: Tensor) -> None:
    check_shape("logits", logits, ("R", "V"))
    check_shape("out", out, tuple(logits.shape))
    check_shape("places", places, ("N", 2))
    check_shape("changes", changes, (places.shape[0], 3))
    expected = {"logits": torch.float32, "out": torch.float32, "places": torch.int32, "changes": torch.float32}
    for (name, dtype), tensor in zip(expected.items(), (logits, out, places, changes), strict=True):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
        check_rows(name, tensor)
    for name, tensor in (("places", places), ("changes", changes)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
    check_device(logits, out=out, places=places, changes=changes)
    # Looking at values on a GPU would stall it.
    if not places.is_cuda:
        limit = torch.tensor(logits.shape, dtype=torch.int32)
        bad = places[((places < 0) | (places >= limit)).any(1)]
        if bad.numel():
            raise ValueError(f"places must lie in logits of shape {list(logits.shape)}, got {bad[0].tolist()}")


@op(reference=edit_logits_reference, check=_check_edit_logits)
def edit_logits(logits: Tensor, out: Tensor, places: Tensor, changes: Tensor) -> None:
    """Write changed logits into their places of `out`, which may be `logits` itself.

    Args:
        logits: [R, V] fp32, last stride 1.
        out: [R, V] fp32, last stride 1.
        places: [N, 2] int32, contiguous: row and token id; each place once.
        changes: [N, 3] fp32, contiguous: factor of a positive logit, factor of any other, and what is added.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) a place is not in `logits`.
    """
    num = places.shape[0]
    if num:
        sizes = (num, logits.stride(0), out.stride(0))
        grid = (triton.cdiv(num, BLOCK),)
        # A fused multiply-add would round differently than the reference.
        _edit_logits_kernel[grid](logits, out, places, changes, *sizes, BLOCK=BLOCK, enable_fp_fusion=False)
