"""The 4- and 8-bit codec of ExLlamaV2 for fp16 tensors: a rotation, and one scale per 32 numbers. Plain torch.

Encode, for every run of 64 consecutive numbers x, seen as 32 pairs (x[2t], x[2t+1]):

    w[2t+p] = sum_s H[t, s] x[2s+p]                  H: Sylvester's 32 × 32 Hadamard matrix, p = 0, 1
    m       = max |w| over 32 consecutive numbers
    code    = clamp(round(w / m * half + half), 0, 2 half - 1)     scale = m / half     half = 8 or 128

and two codes of 4 bits make a byte, the first one in the low half. Decode: w = (code - half) * scale, the same
rotation, and 1/32. A run of zeros has the scale 0. The rotation takes five rounds of sums and differences; these and
every other step round to fp16, as they do in the CUDA kernels, so the bytes agree.

Source: shared facts on ExLlamaV2's Q4 and Q8 cache codec (weights held in Q4 have the same bytes).
"""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 64  # numbers that are rotated together
GROUP = 32  # numbers that share a scale
HALF = {4: 8, 8: 128}  # bits -> the code of zero


def _rotate(x: Tensor) -> Tensor:
    """Rotate [runs, 64] fp16; not normalized: twice gives 32 x, up to rounding."""
    for stride in (1, 2, 4, 8, 16):
        pairs = x.view(-1, GROUP // (2 * stride), 2, stride, 2)
        first, second = pairs.unbind(2)
        x = torch.stack((first + second, first - second), dim=2)
    return x.reshape(-1, RUN)


def encode(x: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Return the bytes and the scales of an fp16 tensor of a multiple of 64 numbers.

    Returns:
        [numel * bits / 8] uint8 and [numel / 32] fp16.
    """
    half = HALF[bits]
    w = _rotate(x.reshape(-1, RUN)).view(-1, GROUP)
    largest = w.abs().amax(dim=1, keepdim=True)
    # Zeros divided by their largest magnitude, zero, would be NaN, whose conversion to an integer is undefined.
    ratio = torch.where(largest > 0, w / largest, -1)
    # In fp32 the product and the sum lose nothing that the rounding to fp16 would have seen: one rounding, like an FMA.
    codes = (ratio.float() * half + half).half().round().clamp(0, 2 * half - 1).to(torch.uint8).view(-1, 2)
    scales = (largest / half).view(-1)
    return (codes.view(-1) if bits == 8 else codes[:, 0] | codes[:, 1] << 4), scales


def decode(codes: Tensor, scales: Tensor, bits: int = 4) -> Tensor:
    """Return the fp16 numbers of bytes, uint8, and their scales, fp16, one per 32 numbers."""
    code = codes if bits == 8 else torch.stack((codes & 15, codes >> 4), dim=-1)
    w = (code.reshape(-1, GROUP).half() - HALF[bits]) * scales.view(-1, 1)
    return (_rotate(w.view(-1, RUN)) * (1 / GROUP)).view(-1)
