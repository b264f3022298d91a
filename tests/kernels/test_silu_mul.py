"""silu_mul against its reference, a few numbers by hand, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.kernels.parts import add_up
from qinfer.kernels.silu_mul import silu_mul
from tests.compare import assert_close
from tests.strategies import FLOAT_DTYPES, random_tensor, seeds

BODIES = [silu_mul.reference, pytest.param(silu_mul.launch, marks=pytest.mark.kernel)]

# The interpreter computes with NumPy, which reports that the exponential of a very negative gate is infinite: as meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.mark.kernel
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("num_tokens", "width"), [(3, 96), (1, 257), (2, 1500), (0, 64)])
def test_matches_reference(num_tokens, width, dtype, ordered, device):
    gate_up = random_tensor(num_tokens, 2 * width, seed=1, dtype=dtype, scale=4.0).to(device)
    order = torch.randperm(width).int().to(device) if ordered else None
    actual = silu_mul.launch(gate_up, order=order)
    assert actual.dtype == dtype
    assert_close(actual, silu_mul.reference(gate_up, order=order))


@pytest.mark.parametrize("body", BODIES)
def test_by_hand(body, device):
    wide = torch.full((2, 9), float("nan"), device=device)
    gate_up = wide[:, 2:8]
    gate_up.copy_(torch.tensor([[1.0, -2.0, 0.0, 3.0, 5.0, 7.0], [-100.0, 100.0, 0.5, 1.0, 1.0, 2.0]]))

    def silu(g: float) -> float:
        return g / (1 + math.exp(-g))

    expected = torch.tensor([[silu(1) * 3, silu(-2) * 5, 0.0], [silu(-100), silu(100), silu(0.5) * 2]])
    assert_close(body(gate_up).cpu(), expected)
    order = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    assert_close(body(gate_up, order=order).cpu(), expected[:, [2, 0, 1]])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_takes_a_product_in_parts(body, num_parts, device):
    parts = random_tensor(num_parts, 3, 90, seed=2).to(device)
    actual = body(parts, out_dtype=torch.float16)
    assert actual.dtype == torch.float16
    assert torch.equal(actual, body(add_up(parts)).half())
    order = torch.randperm(45).int()
    assert torch.equal(body(parts, order=order.to(device), out_dtype=torch.float16), actual[:, order.to(device)])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("gate", [-65504.0, -90.0, 90.0, 65504.0])
def test_extreme_gates_stay_finite_in_fp16(body, gate, device):
    gate_up = torch.tensor([[gate, 1.0]], dtype=torch.float16, device=device)
    assert body(gate_up).item() == max(gate, 0.0)


@pytest.mark.parametrize("body", BODIES)
@given(seed=seeds, factor=st.sampled_from([-8.0, -0.5, 0.25, 2.0]))
def test_is_linear_in_up(body, seed, factor, device):
    gate, up = random_tensor(2, 33, seed=seed).to(device), random_tensor(2, 33, seed=seed + 1).to(device)
    scaled = body(torch.cat([gate, up * factor], dim=1))
    # The factor is a power of two, so that scaling commutes with every rounding.
    assert torch.equal(scaled, body(torch.cat([gate, up], dim=1)) * factor)


@pytest.mark.parametrize(
    ("gate_up", "order", "error", "text"),
    [
        (torch.zeros(2, 5), None, ValueError, "even number of columns, got 5"),
        (torch.zeros(4), None, ValueError, r"gate_up must be \[T, 2F\], got \[4\]"),
        (torch.zeros(2, 4).double(), None, TypeError, "gate_up must be .* got torch.float64"),
        (torch.zeros(4, 2).t(), None, ValueError, "gate_up must have last stride 1"),
        (torch.zeros(2, 4), torch.arange(4), ValueError, r"order must be \[2\], got \[4\]"),
        (torch.zeros(2, 4), torch.tensor([0, 2]), ValueError, r"order must be in \[0, 2\), got 2"),
    ],
)
def test_refuses(gate_up, order, error, text):
    with pytest.raises(error, match=text):
        silu_mul(gate_up, order=order)
