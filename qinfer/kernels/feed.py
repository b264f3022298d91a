"""Ids that only the device knows, put where the host has left their places: in front of the embedding of a step.

    token_ids[t] = max(sampled[-1 - token_ids[t]], 0)   where token_ids[t] < 0; other ids stay

The host launches a step before it knows what the last one sampled, and names such a token by the row that sampled it.
An id of -1 in `sampled` says that sampling failed: that token is computed as id 0, and thrown away later. In place; a
row that is not in `sampled` is not looked for on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qinfer.kernels.checks import check_device, check_index
from qinfer.kernels.device import op
from qinfer.kernels.overlap import let_next_start, overlap, wait_for_inputs

BLOCK = 128


def feed_reference(token_ids: Tensor, sampled: Tensor) -> None:
    """Compute `feed` in plain torch."""
    is_known = token_ids >= 0
    rows = token_ids.bitwise_not().masked_fill_(is_known, 0)
    torch.where(is_known, token_ids, sampled.index_select(0, rows).clamp_(min=0).to(token_ids.dtype), out=token_ids)


@triton.jit(do_not_specialize=["num_ids"], do_not_specialize_on_alignment=["p_ids"])
def _feed_kernel(p_ids, p_sampled, num_ids, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    let_next_start(OVERLAP)
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(OVERLAP)
    b_ids = tl.load(p_ids + o_t, mask=o_t < num_ids, other=0)
    m_unknown = b_ids < 0
    b_sampled = tl.load(p_sampled + (-1 - b_ids), mask=m_unknown, other=0)
    tl.store(p_ids + o_t, tl.maximum(b_sampled, 0).to(p_ids.dtype.element_ty), mask=m_unknown)


def _check_feed(token_ids: Tensor, sampled: Tensor) -> None:
    check_index("sampled", sampled, "R", start=-1, stop=torch.iinfo(torch.int32).max)
    check_device(token_ids, sampled=sampled)
    check_index("token_ids", token_ids, "T", start=-sampled.shape[0], stop=torch.iinfo(torch.int32).max)
    if not sampled.shape[0]:
        raise ValueError("sampled must have rows, got none")


@op(reference=feed_reference, check=_check_feed)
def feed(token_ids: Tensor, sampled: Tensor) -> None:
    """Put sampled[r] in the place of every id -1 - r.

    Args:
        token_ids: [T] int32 (or int64), at least -R; changed in place.
        sampled: [R] int32 (or int64) ids, -1 where sampling failed.

    Raises:
        TypeError: a dtype is none of those above.
        ValueError: a shape, a stride or a device does not fit, or (CPU tensors only) a row is out of range.
    """
    num_ids = token_ids.shape[0]
    if num_ids:
        _feed_kernel[(triton.cdiv(num_ids, BLOCK),)](
            token_ids, sampled, num_ids, BLOCK=BLOCK, num_warps=4, **overlap(token_ids)
        )
