"""gather_rows and gather_columns: exact copies, so every comparison is an equality."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qinfer.kernels.gather import gather_columns, gather_rows
from tests.strategies import FLOAT_DTYPES, random_tensor, seeds

ROWS = [gather_rows.reference, pytest.param(gather_rows.launch, marks=pytest.mark.kernel)]
COLUMNS = [gather_columns.reference, pytest.param(gather_columns.launch, marks=pytest.mark.kernel)]


@pytest.mark.kernel
@pytest.mark.parametrize("out_dtype", [None, *FLOAT_DTYPES])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("vocabulary", "width", "num_ids"), [(7, 64, 3), (5, 257, 1), (3, 2500, 2), (4, 96, 0)])
def test_rows_match_reference(vocabulary, width, num_ids, dtype, out_dtype, device):
    table = random_tensor(vocabulary, width, seed=1, dtype=dtype).to(device)
    ids = torch.randint(vocabulary, (num_ids,), dtype=torch.int32).to(device)
    actual = gather_rows.launch(table, ids, out_dtype=out_dtype)
    expected = gather_rows.reference(table, ids, out_dtype=out_dtype)
    assert actual.dtype == expected.dtype == (out_dtype or dtype)
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("num_tokens", "width"), [(3, 64), (1, 257), (2, 1500), (0, 96)])
def test_columns_match_reference(num_tokens, width, dtype, device):
    x = random_tensor(num_tokens, width, seed=1, dtype=dtype).to(device)
    order = torch.randperm(width).int().to(device)
    actual = gather_columns.launch(x, order)
    assert actual.dtype == dtype
    assert torch.equal(actual, gather_columns.reference(x, order))


@pytest.mark.parametrize("body", ROWS)
def test_rows_by_hand(body, device):
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float16, device=device)
    ids = torch.tensor([2, 0, 2], dtype=torch.int64, device=device)
    out = body(table, ids, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert out.tolist() == [[5.0, 6.0], [1.0, 2.0], [5.0, 6.0]]


@pytest.mark.parametrize("body", ROWS)
def test_rows_of_a_strided_table_by_ids_inside_a_buffer(body, device):
    wide = random_tensor(6, 100, seed=2).to(device)
    table = wide[:, 30:70]
    ids = torch.tensor([9, 9, 9, 4, 1], dtype=torch.int32, device=device)[3:]
    assert torch.equal(body(table, ids), wide[[4, 1], 30:70])


@pytest.mark.parametrize("body", COLUMNS)
def test_columns_of_a_strided_activation(body, device):
    wide = random_tensor(3, 12, seed=2).to(device)
    order = torch.tensor([2, 0, 1, 3], dtype=torch.int32, device=device)
    assert torch.equal(body(wide[:, 5:9], order), wide[:, [7, 5, 6, 8]])


@pytest.mark.parametrize("body", COLUMNS)
@given(width=st.integers(1, 70), seed=seeds)
def test_the_inverse_order_undoes_columns(body, width, seed, device):
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed)).int().to(device)
    x = random_tensor(2, width, seed=seed).to(device)
    assert torch.equal(body(body(x, order), order.argsort().int()), x)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements():
    table = torch.zeros(70_000, 32_768, dtype=torch.float16, device="cuda")
    table[69_999] = 7
    out = gather_rows(table, torch.tensor([69_999, 0], dtype=torch.int32, device="cuda"))
    assert out.sum(dim=1, dtype=torch.float32).tolist() == [7 * 32_768, 0]


@pytest.mark.parametrize(
    ("table", "ids", "options", "error", "text"),
    [
        (torch.zeros(4), torch.zeros(1).int(), {}, ValueError, r"table must be \[V, C\], got \[4\]"),
        (torch.zeros(4, 2).int(), torch.zeros(1).int(), {}, TypeError, "table must be .* got torch.int32"),
        (torch.zeros(4, 2), torch.zeros(1), {}, TypeError, "ids must be int32 or int64, got torch.float32"),
        (torch.zeros(4, 2), torch.zeros(1, 1).int(), {}, ValueError, r"ids must be \[T\], got \[1, 1\]"),
        (torch.zeros(4, 2).t(), torch.zeros(1).int(), {}, ValueError, "table must have last stride 1"),
        (torch.zeros(4, 2), torch.tensor([1, 4]), {}, ValueError, r"ids must be in \[0, 4\), got 4"),
        (torch.zeros(4, 2), torch.tensor([-1, 1]), {}, ValueError, r"ids must be in \[0, 4\), got -1"),
        (torch.zeros(4, 2), torch.tensor([1]), {"out_dtype": torch.int8}, TypeError, "out_dtype .* got torch.int8"),
    ],
)
def test_rows_refuse(table, ids, options, error, text):
    with pytest.raises(error, match=text):
        gather_rows(table, ids, **options)


@pytest.mark.parametrize(
    ("order", "error", "text"),
    [
        (torch.tensor([0, 1]), ValueError, r"order must be \[3\], got \[2\]"),
        (torch.tensor([0, 1, 3]), ValueError, r"order must be in \[0, 3\), got 3"),
        (torch.tensor([0.0, 1, 2]), TypeError, "order must be int32 or int64, got torch.float32"),
    ],
)
def test_columns_refuse(order, error, text):
    with pytest.raises(error, match=text):
        gather_columns(torch.zeros(2, 3), order)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are_whatever_device_is_current():
    table, ids = torch.randn(9, 40), torch.tensor([8, 0, 3], dtype=torch.int32)
    with torch.cuda.device(0):
        assert torch.equal(gather_rows(table.to("cuda:1"), ids.to("cuda:1")).cpu(), table[ids.long()])
        assert torch.cuda.current_device() == 0
