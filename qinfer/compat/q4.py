"""The 4-bit codec of ExLlamaV2 for fp16 tensors: a rotation, and one scale per 32 numbers. Plain torch.

Encode, for every run of 64 consecutive numbers x, seen as 32 pairs (x[2t], x[2t+1]):

    w[2t+p] = sum_s H[t, s] x[2s+p]                  H: Sylvester's 32 × 32 Hadamard matrix, p = 0, 1
    m       = max |w| over 32 consecutive numbers
    code    = clamp(round(w / m * 8 + 8), 0, 15)     scale = m / 8

and two codes make a byte, the first one in the low half. Decode: w = (code - 8) * scale, the same rotation, and 1/32. A
run of zeros has the scale 0. The rotation takes five rounds of sums and differences; these and every other step round
to fp16, as they do in the CUDA kernels, so the bytes agree.

Source: shared facts on ExLlamaV2's Q4 codec (its cache stores the same bytes).
"""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 64  # numbers that are rotated together
GROUP = 32  # numbers that share a scale
HALF = 8  # the code of zero


def _rotate(x: Tensor) -> Tensor:
    """Rotate [runs, 64] fp16; not normalized: twice gives 32 x, up to rounding."""
    for stride in (1, 2, 4, 8, 16):
        pairs = x.view(-1, GROUP // (2 * stride), 2, stride, 2)
        first, second = pairs.unbind(2)
        x = torch.stack((first + second, first - second), dim=2)
    return x.reshape(-1, RUN)


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bytes [numel / 2] uint8 and the scales [numel / 32] fp16 of an fp16 tensor, numel a multiple of 64."""
    w = _rotate(x.reshape(-1, RUN)).view(-1, GROUP)
    largest = w.abs().amax(dim=1, keepdim=True)
    # Zeros divided by their largest magnitude, zero, would be NaN, whose conversion to an integer is undefined.
    ratio = torch.where(largest > 0, w / largest, -1)
    # In fp32 the product and the sum lose nothing that the rounding to fp16 would have seen: one rounding, like an FMA.
    codes = (ratio.float() * HALF + HALF).half().round().clamp(0, 2 * HALF - 1).to(torch.uint8).view(-1, 2)
    return codes[:, 0] | codes[:, 1] << 4, (largest / HALF).view(-1)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the fp16 numbers [2 * bytes] of bytes, uint8, and their scales [bytes / 16] fp16."""
    code = torch.stack((codes & 15, codes >> 4), dim=-1).view(-1, GROUP)
    w = (code.half() - HALF) * scales.view(-1, 1)
    return (_rotate(w.view(-1, RUN)) * (1 / GROUP)).view(-1)
