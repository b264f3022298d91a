"""Hypothesis strategies shared by several tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """A normally distributed tensor that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


seeds = st.integers(0, 2**31 - 1)
float_dtypes = st.sampled_from(FLOAT_DTYPES)
