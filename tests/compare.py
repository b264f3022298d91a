"""One comparison for every numerical test: two numbers, one table of tolerances, NaN never passes."""

from __future__ import annotations

import torch
from torch import Tensor

# dtype -> (largest error relative to the largest expected magnitude, relative root mean square error).
# fp16 and bf16 round once at the output (2^-11, 2^-8) and a few times on the way.
TOLERANCE: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (2e-5, 2e-6),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 6e-3),
}


def errors(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the largest error and the RMS error, both relative to `expected`, in float64."""
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    if e.numel() == 0:
        return 0.0, 0.0
    difference = a - e
    largest = difference.abs().max() / e.abs().max().clamp_min(1e-30)
    rms = difference.square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-30)
    return float(largest), float(rms)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert that two tensors agree within the tolerance of `dtype`, by default that of `actual`."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "the result holds NaN or infinite values"
    assert torch.isfinite(expected).all(), "the reference holds NaN or infinite values"
    largest, rms = errors(actual, expected)
    allowed = TOLERANCE[dtype or actual.dtype]
    assert largest <= allowed[0], f"largest relative error {largest:.2e}, allowed {allowed[0]:.1e} (RMS {rms:.2e})"
    assert rms <= allowed[1], f"relative RMS error {rms:.2e}, allowed {allowed[1]:.1e} (largest {largest:.2e})"
