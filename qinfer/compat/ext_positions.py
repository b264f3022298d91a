"""The functions of `exllamav2_ext` that rotate heads by their position, and that number the positions of images.

The rotation is that of the compiled module bit by bit, in fp16 with fused multiply-adds and tables in fp16. qinfer's
own (`qinfer.kernels.rope`) has tables in fp32 and rounds once. Plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qinfer.compat.binding import check_tensor, check_together, extension, optional

BELOW_FP32 = (1 << 29) - 1  # bits of an fp64 mantissa that an fp32 mantissa has no room for

Span = tuple[int, int]
Grid = tuple[int, int, int]


@extension
def rope_(
    x: Tensor,
    sin: Tensor,
    cos: Tensor,
    past_len: int,
    num_heads: int,
    head_dim: int,
    offsets: Tensor | None,
    neox_style: bool,
) -> None:
    """Rotate pairs of features by the angles of their positions, in place.

    Token t of row b of the batch is at position past_len + offsets[b] + t, or, with past_len = -1, at
    max(offsets[b], 0) + t; below 0 it counts as 0. Features from S on stay as they are.

    Args:
        x: [B, ..., num_heads, head_dim] fp16 with T tokens in a row, or any other shape of the same order; contiguous.
        sin: [..., L, S] fp16 with S <= head_dim even; the angles of a pair stand at both of its places.
        cos: likewise.
        past_len: tokens before the first one; -1: the offsets alone say so.
        num_heads: heads per token.
        head_dim: features per head.
        offsets: [B] int32, or None.
        neox_style: pairs are (i, i + S / 2) rather than (2i, 2i + 1).

    Raises:
        RuntimeError: a dtype, a shape or a device does not fit, or a position is beyond the tables. (With offsets on a
            GPU, where looking at them would stall it, such a position ends in CUDA's own error.)
    """
    check_tensor("x", x, torch.float16, ("B", *("…" for _ in x.shape[1:])))
    sines, cosines = _table("sin", sin, head_dim), _table("cos", cos, head_dim)
    if cosines.shape != sines.shape:
        raise ValueError(f"sin and cos must agree, got {list(sin.shape)} and {list(cos.shape)}")
    given = optional(offsets)
    if given is not None:
        check_tensor("offsets", given, torch.int32, (x.shape[0],))
    check_together(x, sin=sin, cos=cos, offsets=given)
    if num_heads < 1 or not x.is_contiguous() or x[:1].numel() % (num_heads * head_dim):
        raise ValueError(
            f"x must be contiguous rows of tokens with {num_heads} heads of {head_dim} features, got {list(x.shape)} "
            f"with strides {list(x.stride())}"
        )
    if not x.numel():
        return
    heads = x.view(x.shape[0], -1, num_heads, head_dim)
    positions = _positions(past_len, given, heads, num_positions=sines.shape[0]).flatten()
    shape = (*heads.shape[:2], 1, -1)
    _rotate(heads, sines[positions].view(shape), cosines[positions].view(shape), is_neox=neox_style)


def _table(name: str, table: Tensor, head_dim: int) -> Tensor:
    """Return a table as [L, S]."""
    check_tensor(name, table, torch.float16, (*(1 for _ in table.shape[:-2]), "L", "S"))
    width = table.shape[-1]
    if not 2 <= width <= head_dim or width % 2:
        raise ValueError(f"{name} must be [L, S] with an even S from 2 to {head_dim}, got {list(table.shape)}")
    return table.reshape(-1, width)


def _positions(past_len: int, offsets: Tensor | None, heads: Tensor, *, num_positions: int) -> Tensor:
    """Return the position of every token as [B, T]."""
    batch, num_tokens = heads.shape[:2]
    tokens = torch.arange(num_tokens, device=heads.device)
    if offsets is None:
        if past_len == -1:
            raise ValueError("offsets must be given with past_len = -1")
        starts = torch.full((batch,), past_len, device=heads.device)
        last = past_len + num_tokens - 1
    else:
        starts = offsets.long().clamp(min=0) if past_len == -1 else offsets.long() + past_len
        last = 0 if starts.is_cuda else int(starts.max()) + num_tokens - 1
    if last >= num_positions:
        raise ValueError(f"sin and cos must reach position {last}, got {num_positions} positions")
    return (starts[:, None] + tokens).clamp(min=0)


def _rotate(heads: Tensor, sin: Tensor, cos: Tensor, *, is_neox: bool) -> None:
    """Rotate heads [B, T, H, D] by [B, T, 1, S] in place."""
    width = sin.shape[-1]
    if is_neox:
        half = width // 2
        left, right = heads[..., :half], heads[..., half:width]
        s, c = sin[..., :half], cos[..., :half]
        rotated = _fused(left, c, -s * right), _fused(right, c, s * left)
    else:
        left, right = heads[..., 0:width:2], heads[..., 1:width:2]
        rotated = (
            _fused(right, -sin[..., 0::2], cos[..., 0::2] * left),
            _fused(left, sin[..., 1::2], cos[..., 1::2] * right),
        )
    left.copy_(rotated[0])
    right.copy_(rotated[1])


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a · b + c of fp16 tensors, rounded once."""
    # torch rounds fp64 to fp32 on the way to fp16. With the bits that fp32 lacks collected in its last one, only the
    # second rounding changes anything.
    bits = (a.double() * b.double() + c.double()).view(torch.int64)
    lost = ((bits & BELOW_FP32) != 0).long() * (BELOW_FP32 + 1)
    return (bits & ~BELOW_FP32 | lost).view(torch.float64).half()


@extension
def gen_mrope_pos_ids(
    mrope_pos_ids: Tensor, ids: Tensor, merge_size: int, spans: Sequence[Span], grids: Sequence[Grid]
) -> int:
    """Number tokens in time, height and width: text counts up, an image spreads over its grid from where it begins.

    Token a + k of span (a, b), whose patches form the grid (t, h, w) = (t, H / merge_size, W / merge_size), is at
    (k / (h w) mod t, k / w mod h, k mod w) from the position behind the last text token. Text goes on behind the
    largest number so far.

    Args:
        mrope_pos_ids: [3, L] int64, written: time, height, width. Tokens behind the ids count as text.
        ids: [n] int64.
        merge_size: patches that make one token, in each direction.
        spans: ids [a, b) that stand for images; the first that fits counts.
        grids: for each of them, (T, H, W) in patches.

    Returns:
        The position behind the last token.

    Raises:
        RuntimeError: a dtype or a shape does not fit, or a grid has no token.
    """
    check_tensor("mrope_pos_ids", mrope_pos_ids, torch.int64, (3, "L"))
    check_tensor("ids", ids, torch.int64, ("n",))
    if len(spans) != len(grids):
        raise ValueError(f"there must be one grid per span, got {len(grids)} grids and {len(spans)} spans")
    if merge_size < 1:
        raise ValueError(f"merge_size must be at least 1, got {merge_size}")
    tokens = [(t, h // merge_size, w // merge_size) for t, h, w in grids]
    if any(min(grid) < 1 for grid in tokens):
        raise ValueError(f"grids must hold a token of {merge_size} x {merge_size} patches each, got {list(grids)}")
    length = mrope_pos_ids.shape[1]
    used = ids[:length].tolist()
    places = list(_numbered([*used, *[None] * (length - len(used))], spans, tokens))
    if places:
        mrope_pos_ids.copy_(torch.tensor(places).t())
    return max((max(place) + 1 for place in places), default=0)


def _numbered(ids: Sequence[int | None], spans: Sequence[Span], grids: Sequence[Grid]) -> Iterator[Grid]:
    """Yield where tokens are in time, height and width; None is a token of text."""
    images = list(zip(spans, grids, strict=True))
    base = behind = 0
    for token in ids:
        found = None if token is None else next((i for i in images if i[0][0] <= token < i[0][1]), None)
        if token is None or found is None:
            place = (behind, behind, behind)
            base = behind + 1
        else:
            (first, _), (t, h, w) = found
            k = token - first
            place = (base + k // w // h % t, base + k // w % h, base + k % w)
        behind = max(behind, *(number + 1 for number in place))
        yield place
