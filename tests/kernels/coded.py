"""Pages of every codec for tests: made, poisoned, filled, and compared."""

from __future__ import annotations

import torch
from torch import Tensor

from qinfer.kernels.kv_codec import Codec, KVPages, encode, rotated


def poisoned(codec: Codec, num_pages: int, num_heads: int, page_size: int, head_dim: int, device) -> KVPages:
    """Pages that hold what must never be read: NaN where the dtype has it, and NaN scales."""
    places = (num_pages, num_heads, page_size)
    codes = torch.full((*places, codec.width(head_dim)), 255, dtype=torch.uint8).to(codec.dtype)
    if codec.scheme == "plain":
        codes.fill_(float("nan"))
    scales = torch.full(places, float("nan"), dtype=torch.bfloat16).to(device) if codec.has_scales else None
    return KVPages(codes.to(device), scales, codec)


def coded(pages: Tensor, codec: Codec) -> KVPages:
    """Encode plain pages; rows of NaN become poison."""
    empty = poisoned(codec, *pages.shape, pages.device)
    kept = ~pages.isnan().any(dim=-1)
    codes, scales = encode(pages[kept], codec)
    empty.codes[kept] = codes
    if empty.scales is not None and scales is not None:
        empty.scales[kept] = scales
    return empty


def half_step(x: Tensor, scales: Tensor | None, codec: Codec) -> Tensor:
    """What a number [..., D] may lose, in the domain in which it is coded, with scales [...]."""
    x, scale = x.float().abs(), torch.tensor(0.0) if scales is None else scales.float()[..., None]
    if codec.scheme == "plain":
        info = torch.finfo(codec.dtype)
        return x.clamp_min(info.smallest_normal) * info.eps / 2
    if codec.scheme == "e5m2":
        return torch.clamp_min(x / 8, 2.0**-17)
    if codec.scheme == "e4m3":
        return torch.maximum(x / 16, scale * 2.0**-18)
    return scale * (1 << (8 - codec.bits)) / 2 + 0 * x


def loss(x: Tensor, decoded: Tensor, scales: Tensor | None, codec: Codec) -> float:
    """The largest loss of any number, in half steps."""
    if codec.is_rotated:
        x, decoded = rotated(x), rotated(decoded)
    # Where half a step is zero, nothing may be lost.
    allowed = half_step(x, scales, codec).clamp_min(1e-37)
    return float(((x.float() - decoded).abs() / allowed).max()) if x.numel() else 0.0
