"""rmsnorm and add_rmsnorm against their references, golden numbers, and the laws of a normalization."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.kernels.parts import add_up
from qinfer.kernels.rmsnorm import MANY_ROWS, MAX_SHARED_ROWS, MAX_WIDTH, add_rmsnorm, rmsnorm
from tests.compare import assert_close
from tests.strategies import random_tensor, seeds

VECTORS = Path(__file__).parents[1] / "vectors" / "small_kernels.npz"
ALONE = [rmsnorm.reference, pytest.param(rmsnorm.launch, marks=pytest.mark.kernel)]
ADDING = [add_rmsnorm.reference, pytest.param(add_rmsnorm.launch, marks=pytest.mark.kernel)]
SHAPES = [(3, 96), (1, 257), (2, 4096), (0, 64), (1, 1)]
DTYPES = [
    (torch.float32, torch.float16, torch.float16),
    (torch.float16, torch.float16, None),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
]


@pytest.mark.kernel
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("dtype", "weight_dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 64), (2, 3, 2, 48), (1, MAX_WIDTH)])
def test_matches_reference(shape, dtype, weight_dtype, out_dtype, ordered, device):
    x = random_tensor(*shape, seed=1, dtype=dtype).to(device)
    weight = random_tensor(shape[-1], seed=2, dtype=weight_dtype).to(device)
    order = torch.randperm(shape[-1]).int().to(device) if ordered else None
    actual = rmsnorm.launch(x, weight, eps=1e-5, out_dtype=out_dtype, order=order)
    assert actual.dtype == (out_dtype or dtype)
    assert actual.is_contiguous()
    assert_close(actual, rmsnorm.reference(x, weight, eps=1e-5, out_dtype=out_dtype, order=order))


@pytest.mark.kernel
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("dtype", "weight_dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_matches_reference(shape, dtype, weight_dtype, out_dtype, ordered, device):
    residual = random_tensor(*shape, seed=1).to(device)
    delta = random_tensor(*shape, seed=2, dtype=dtype).to(device)
    weight = random_tensor(shape[-1], seed=3, dtype=weight_dtype).to(device)
    order = torch.randperm(shape[-1]).int().to(device) if ordered else None
    expected_residual = residual.clone()
    expected = add_rmsnorm.reference(expected_residual, delta, weight, eps=1e-6, out_dtype=out_dtype, order=order)
    actual = add_rmsnorm.launch(residual, delta, weight, eps=1e-6, out_dtype=out_dtype, order=order)
    assert actual.dtype == (out_dtype or torch.float32)
    assert torch.equal(residual, expected_residual)
    assert_close(actual, expected)


@pytest.mark.parametrize("body", ALONE)
def test_golden(body, device):
    with np.load(VECTORS) as file:
        x, weight, expected = (torch.from_numpy(file[name]).to(device) for name in ("rms_x", "rms_w", "rms_y"))
        eps = float(file["rms_eps"])
    assert_close(body(x, weight, eps=eps), expected)


@pytest.mark.parametrize("body", ALONE)
def test_order_takes_column_order_j_to_j(body, device):
    x = torch.tensor([[3.0, 4.0, 12.0]], device=device)
    weight = torch.tensor([1.0, 10.0, 100.0], device=device)
    order = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    root = (169 / 3) ** 0.5
    expected = torch.tensor([[1200 / root, 3 / root, 40 / root]], device=device)
    assert_close(body(x, weight, eps=0.0, order=order), expected)


@pytest.mark.parametrize("body", ALONE)
def test_heads_inside_merged_rows(body, device):
    rows = random_tensor(3, 200, seed=4, dtype=torch.float16).to(device)
    weight = random_tensor(24, seed=5).to(device)
    for start, num_heads in ((0, 4), (96, 2)):
        heads = rows[:, start : start + num_heads * 24].unflatten(1, (num_heads, 24))
        assert not heads.is_contiguous()
        actual = body(heads, weight, eps=1e-6)
        assert actual.is_contiguous()
        assert_close(actual, rmsnorm.reference(heads.contiguous(), weight, eps=1e-6))


@pytest.mark.parametrize("body", ADDING)
def test_add_on_strided_rows_leaves_the_rest_alone(body, device):
    wide = random_tensor(3, 50, seed=6).to(device)
    before = wide.clone()
    delta = random_tensor(3, 90, seed=7).to(device)[:, 20:60]
    body(wide[:, 5:45], delta, torch.ones(40, device=device), eps=1e-6)
    assert torch.equal(wide[:, 5:45], before[:, 5:45] + delta)
    assert torch.equal(wide[:, :5], before[:, :5])
    assert torch.equal(wide[:, 45:], before[:, 45:])


@pytest.mark.parametrize("body", ADDING)
@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_add_takes_a_product_in_parts(body, num_parts, device):
    residual, weight = random_tensor(3, 70, seed=8).to(device), random_tensor(70, seed=9).to(device)
    parts = random_tensor(num_parts, 3, 70, seed=10).to(device)
    expected_residual = residual.clone()
    expected = body(expected_residual, add_up(parts), weight, eps=1e-6)
    actual = body(residual, parts, weight, eps=1e-6)
    assert torch.equal(residual, expected_residual)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("body", ALONE)
@pytest.mark.parametrize("spike", [False, True])
def test_large_residuals_stay_finite_in_fp16(body, spike, device):
    x = torch.full((2, 4096), 0.01 if spike else 2e5, device=device)
    x[:, 7] = -2e5
    actual = body(x, torch.ones(4096, device=device), eps=1e-5, out_dtype=torch.float16)
    assert_close(actual[:, 7].float(), torch.full((2,), -64.0 if spike else -1.0, device=device), torch.float16)
    assert torch.isfinite(actual).all()


@pytest.mark.parametrize("body", ALONE)
def test_a_zero_row_gives_zeros(body, device):
    actual = body(torch.zeros(2, 96, device=device), torch.ones(96, device=device), eps=1e-6)
    assert torch.equal(actual, torch.zeros(2, 96, device=device))


@pytest.mark.parametrize("body", ALONE)
@given(seed=seeds, exponent=st.integers(-20, 20), width=st.integers(1, 70))
def test_is_scale_invariant_without_eps(body, seed, exponent, width, device):
    x, weight = random_tensor(2, width, seed=seed).to(device), random_tensor(width, seed=seed + 1).to(device)
    assert_close(body(x * 1.7 * 2.0**exponent, weight, eps=0.0), body(x, weight, eps=0.0))


@pytest.mark.parametrize("body", ADDING)
@given(seed=seeds, width=st.integers(1, 70))
def test_add_is_a_sum_then_a_norm_then_a_gather(body, seed, width, device):
    residual, delta = (random_tensor(2, width, seed=seed + i).to(device) for i in range(2))
    weight, order = random_tensor(width, seed=seed + 2).to(device), torch.randperm(width).int().to(device)
    expected = rmsnorm.reference(residual + delta, weight, eps=1e-6)[:, order.long()]
    assert_close(body(residual, delta, weight, eps=1e-6, order=order), expected)


@pytest.mark.parametrize(
    ("x", "weight", "options", "error", "text"),
    [
        (torch.zeros(4), torch.ones(4), {}, ValueError, r"1 to 3 leading dimensions, got \[4\]"),
        (torch.zeros(1, MAX_WIDTH + 1), torch.ones(4), {}, ValueError, "features, got 16385"),
        (torch.zeros(2, 4), torch.ones(3), {}, ValueError, r"weight must be \[4\], got \[3\]"),
        (torch.zeros(2, 4).int(), torch.ones(4), {}, TypeError, "x must be .* got torch.int32"),
        (torch.zeros(2, 4), torch.ones(4).int(), {}, TypeError, "weight must be .* got torch.int32"),
        (torch.zeros(4, 2).t(), torch.ones(4), {}, ValueError, "x must have last stride 1"),
        (torch.zeros(2, 4), torch.ones(8)[::2], {}, ValueError, "weight must have last stride 1"),
        (torch.zeros(2, 4), torch.ones(4), {"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        (torch.zeros(2, 4), torch.ones(4), {"out_dtype": torch.int8}, TypeError, "out_dtype .* got torch.int8"),
        (torch.zeros(2, 4), torch.ones(4), {"order": torch.arange(3)}, ValueError, r"order must be \[4\], got \[3\]"),
        (torch.zeros(2, 4), torch.ones(4), {"order": torch.full((4,), 4)}, ValueError, r"\[0, 4\), got 4"),
    ],
)
def test_refuses(x, weight, options, error, text):
    with pytest.raises(error, match=text):
        rmsnorm(x, weight, **({"eps": 1e-6} | options))


@pytest.mark.parametrize(
    ("residual", "delta", "error", "text"),
    [
        (torch.zeros(2, 4).half(), torch.zeros(2, 4), TypeError, "residual must be float32, got torch.float16"),
        (torch.zeros(2, 2, 4), torch.zeros(2, 2, 4), ValueError, r"residual must be \[T, C\], got \[2, 2, 4\]"),
        (torch.zeros(2, 4), torch.zeros(3, 4), ValueError, r"delta must be \[2, 4\], got \[3, 4\]"),
        (torch.zeros(2, 4), torch.zeros(4, 2).t(), ValueError, "delta must have last stride 1"),
        (torch.zeros(2, 4), torch.zeros(2, 4).int(), TypeError, "delta must be .* got torch.int32"),
    ],
)
def test_add_refuses(residual, delta, error, text):
    with pytest.raises(error, match=text):
        add_rmsnorm(residual, delta, torch.ones(4), eps=1e-6)


# --- programs that share rows, on a GPU


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "width", "num_parts"),
    [(1, 4096, 8), (3, 257, 2), (MANY_ROWS, 8192, 5), (MANY_ROWS + 1, 8192, 3), (MAX_SHARED_ROWS, MAX_WIDTH, 2)],
)
def test_programs_share_a_row(num_rows, width, num_parts, ordered, device):
    parts = random_tensor(num_parts, num_rows, width, seed=1).to(device)
    weight = random_tensor(width, seed=2, dtype=torch.bfloat16).to(device)
    order = torch.randperm(width).int().to(device) if ordered else None
    residual = random_tensor(num_rows, width, seed=3).to(device)
    for _ in range(4):  # every launch finds what the one before has left
        expected_residual = residual.clone()
        options = {"eps": 1e-5, "out_dtype": torch.bfloat16, "order": order}
        expected = add_rmsnorm.reference(expected_residual, parts, weight, **options)
        again = residual.clone()
        actual = add_rmsnorm.launch(residual, parts, weight, **options)
        assert torch.equal(residual, expected_residual)
        assert_close(actual, expected)
        assert torch.equal(add_rmsnorm.launch(again, parts, weight, **options), actual)


@pytest.mark.gpu
@pytest.mark.kernel
def test_rows_of_other_widths_come_and_go(device):
    for seed, (num_rows, width) in enumerate([(2, 16384), (40, 300), (2, 128), (64, 16384), (1, 4096), (512, 129)] * 3):
        residual, weight = random_tensor(num_rows, width, seed=seed).to(device), torch.ones(width, device=device)
        parts = random_tensor(3, num_rows, width, seed=seed + 1).to(device)
        if seed % 4 == 0:
            parts[0, 0, width // 2] = float("nan")  # whose row alone it spoils
        expected = add_rmsnorm.reference(residual.clone(), parts, weight, eps=1e-6)
        actual = add_rmsnorm.launch(residual, parts, weight, eps=1e-6)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert_close(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.gpu
@pytest.mark.kernel
@pytest.mark.parametrize("num_rows", [1, 64])
def test_recorded_launches_are_replayed_with_new_numbers(num_rows, device):
    residual, weight = torch.zeros(num_rows, 5000, device=device), torch.ones(5000, device=device)
    parts = torch.zeros(2, num_rows, 5000, device=device)
    graph = torch.cuda.CUDAGraph()
    add_rmsnorm.launch(residual, parts, weight, eps=1e-6)
    with torch.cuda.graph(graph):
        results = [add_rmsnorm.launch(residual, parts, weight, eps=1e-6) for _ in range(20)]
    for seed in range(30):
        parts.copy_(random_tensor(2, num_rows, 5000, seed=seed))
        expected = residual.clone()
        graph.replay()
        for result in results:
            assert_close(result, add_rmsnorm.reference(expected, parts, weight, eps=1e-6))
        assert torch.equal(residual, expected)
        if seed % 7 == 0:  # launches beside recorded ones
            add_rmsnorm.launch(residual, parts, weight, eps=1e-6)
