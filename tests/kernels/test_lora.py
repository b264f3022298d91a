"""add_lora against its reference and against dense products, for rows of several adapters and of none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qinfer.kernels.lora import add_lora, padded_rank
from tests.compare import assert_close
from tests.strategies import FLOAT_DTYPES, random_tensor

BODIES = [add_lora.reference, pytest.param(add_lora.launch, marks=pytest.mark.kernel)]
MIXED = [1, -1, 0, 0, -1, 2, 1]


def adapters(k: int, widths: tuple[int, ...], rank: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    a = random_tensor(3, len(widths), rank, k, seed=1, dtype=dtype, scale=k**-0.5)
    return [a.to(device), random_tensor(3, sum(widths), rank, seed=2, dtype=dtype).to(device)]


def on(device: torch.device, slots: list[int]) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32, device=device)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("slots", "k", "widths", "rank"),
    [
        pytest.param(MIXED, 70, (40, 24, 9), 16, id="merged"),
        pytest.param([2], 2100, (33,), 16, id="parts"),
        pytest.param([-1] * 40 + [0] * 30, 64, (32,), 128, id="many-rows"),
    ],
)
def test_matches_reference(slots, k, widths, rank, dtype, device):
    x = random_tensor(len(slots), k, seed=3, dtype=dtype).to(device)
    a, b = adapters(k, widths, rank, device, dtype)
    y = random_tensor(len(slots), sum(widths), seed=4, dtype=dtype).to(device)
    expected = y.clone()
    add_lora.reference(x, a, b, on(device, slots), expected, widths=widths)
    assert not torch.equal(expected, y)
    add_lora.launch(x, a, b, on(device, slots), y, widths=widths)
    assert_close(y, expected)


@pytest.mark.parametrize("body", BODIES)
def test_is_a_product_with_the_adapter_of_the_row(body, device):
    widths = (20, 12)
    x, (a, b) = random_tensor(7, 40, seed=5).to(device), adapters(40, widths, 16, device, torch.float32)
    y = random_tensor(7, 50, seed=6).to(device)[:, 3:35]
    before = y.clone()
    body(x, a, b, on(device, MIXED), y, widths=widths)
    for row, slot in enumerate(MIXED):
        if slot < 0:
            assert torch.equal(y[row], before[row])
            continue
        matrix = torch.cat([b[slot, :20] @ a[slot, 0], b[slot, 20:] @ a[slot, 1]])
        assert_close(y[row], before[row] + matrix @ x[row])


@pytest.mark.parametrize("body", BODIES)
def test_a_row_does_not_depend_on_its_company(body, device):
    x, (a, b) = random_tensor(7, 40, seed=7).to(device), adapters(40, (8,), 16, device, torch.float32)
    mixed = torch.zeros(7, 8, device=device)
    body(x, a, b, on(device, MIXED), mixed, widths=(8,))
    for slot in {*MIXED} - {-1}:
        alone = torch.zeros(7, 8, device=device)
        body(x, a, b, on(device, [slot] * 7), alone, widths=(8,))
        own = [row for row, other in enumerate(MIXED) if other == slot]
        if body is add_lora.reference:  # a library's product may add in another order where rows are fewer
            assert_close(mixed[own], alone[own])
        else:
            assert torch.equal(mixed[own], alone[own])


@pytest.mark.parametrize("body", BODIES)
def test_rows_and_slots_that_are_not_meant_are_not_touched(body, device):
    x, (a, b) = random_tensor(3, 40, seed=8).to(device), adapters(40, (8,), 16, device, torch.float32)
    x[1], a[1], b[1] = float("nan"), float("nan"), float("nan")
    y = torch.zeros(3, 8, device=device)
    body(x, a, b, on(device, [0, -1, 2]), y, widths=(8,))
    assert y.isfinite().all()
    assert not y[1].any()
    empty = torch.zeros(0, 8, device=device)
    body(x[:0], a, b, on(device, []), empty, widths=(8,))


def test_padded_rank():
    wanted = {1: 16, 8: 16, 16: 16, 17: 32, 33: 64, 64: 64, 65: 96}
    assert {rank: padded_rank(rank) for rank in wanted} == wanted


def arguments(**changes: Tensor) -> dict[str, Tensor]:
    a, b = torch.zeros(2, 1, 16, 8), torch.zeros(2, 4, 16)
    return {"x": torch.zeros(3, 8), "a": a, "b": b, "slots": torch.zeros(3).int(), "y": torch.zeros(3, 4), **changes}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"x": torch.zeros(3, 9)}, ValueError, r"a must be \[L, 1, 16, 9\], got \[2, 1, 16, 8\]"),
        ({"a": torch.zeros(2, 1, 16, 8).half()}, TypeError, "a must be torch.float32 like x, got torch.float16"),
        ({"b": torch.zeros(2, 16, 4).mT}, ValueError, "b must be contiguous"),
        ({"b": torch.zeros(3, 4, 16)}, ValueError, r"b must be \[2, 4, 16\], got \[3, 4, 16\]"),
        ({"y": torch.zeros(3, 5)}, ValueError, r"y must be \[3, 4\], got \[3, 5\]"),
        ({"slots": torch.tensor([0, -2, 1])}, ValueError, r"slots must be in \[-1, 2\), got -2"),
        ({"slots": torch.tensor([0, 2, 1])}, ValueError, r"slots must be in \[-1, 2\), got 2"),
        ({"a": torch.zeros(2, 1, 8, 8), "b": torch.zeros(2, 4, 8)}, ValueError, "rank of a and b must be 16, got 8"),
    ],
)
def test_refuses(changes, error, text):
    with pytest.raises(error, match=text):
        add_lora(**arguments(**changes), widths=(4,))
