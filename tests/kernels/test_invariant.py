"""A row's bits are its own: alone, in any batch, at any place in it, and in any chunk of its prompt."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import qinfer.kernels.matmul as matmul_module
from qinfer.bench.recipes import PACKED
from qinfer.kernels.attention import paged_attention
from qinfer.kernels.invariant import fixed_tile, invariant_matmul
from qinfer.kernels.kv_codec import CODECS, KVPages
from qinfer.kernels.matmul import matmul
from qinfer.kernels.operand import DenseOperand, Operand
from qinfer.kernels.tiles import FUSED_ROWS, lookup, shapes_of
from tests.compare import assert_close
from tests.kernels.coded import coded
from tests.kernels.test_attention import Case, int32, make_case

K, N = 2048, 64


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one multiprocessor even these small matrices are split by the number of rows: in 4 for one, in 2 for 64."""
    monkeypatch.setattr(matmul_module, "num_sms", lambda device: 1)


def _operand(kind: str, device: torch.device) -> Operand:
    torch.manual_seed(0)
    if kind == "dense":
        return DenseOperand((torch.randn(N + 8, K) * K**-0.5).half().to(device))
    make = PACKED[kind].make
    assert make is not None
    return make(K, N, device)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["int4-g128", "dense"])
def test_a_row_has_the_same_bits_in_any_batch(kind, device):
    operand = _operand(kind, device)
    x = torch.randn(FUSED_ROWS + 6, K, generator=torch.Generator().manual_seed(1)).half().to(device)
    bias = torch.linspace(-1, 1, operand.out_features).half().to(device)
    whole = invariant_matmul.launch(x, operand, bias=bias, out_dtype=torch.float32)
    assert_close(whole, invariant_matmul.reference(x, operand, bias=bias, out_dtype=torch.float32), torch.float16)
    for rows in ([37], [4, 69, 3, 1, 64], list(range(20, 37))):
        part = invariant_matmul.launch(x[rows], operand, bias=bias, out_dtype=torch.float32)
        assert torch.equal(part, whole[rows]), rows
    if kind == "int4-g128":
        # The plain product takes another tile for one row, and so adds in another order: bits could have differed.
        assert not torch.equal(matmul.launch(x[37:38], operand, bias=bias, out_dtype=torch.float32), whole[37:38])


def test_the_tile_of_a_mixture_is_fixed_too():
    """Segments share one tile, the one that many rows would get."""
    operand = _operand("exl2-4.0", torch.device("cpu"))
    shapes = shapes_of(operand.segments)
    assert [shape.bits for shape in shapes] == [segment.bits for segment in operand.segments]
    assert fixed_tile(operand, torch.device("cpu")) == lookup("cpu", 1, FUSED_ROWS, N, shapes, False)


@pytest.mark.kernel
def test_a_row_of_a_dense_product_goes_where_it_is_told(device):
    operand = _operand("dense", device)
    x = torch.randn(3, K).half().to(device)
    wide = torch.zeros(3, 2 * operand.out_features, dtype=torch.float16, device=device)
    out = wide[:, operand.out_features :]
    assert invariant_matmul.launch(x, operand, out=out) is out
    assert_close(out, invariant_matmul.reference(x, operand))
    assert not wide[:, : operand.out_features].any()
    assert invariant_matmul.launch(x[:0], operand).shape == (0, operand.out_features)


def test_a_matrix_that_does_not_fit_is_refused(device):
    operand = _operand("dense", torch.device("cpu"))
    with pytest.raises(ValueError, match="x must be"):
        invariant_matmul(torch.zeros(2, K + 1, dtype=torch.float16), operand)
    with pytest.raises(ValueError, match="rows of the matrix must be contiguous"):
        invariant_matmul(torch.zeros(2, 8, dtype=torch.float16), DenseOperand(torch.zeros(8, 16).half().t()[:, :8]))


def _sequence(case: Case, b: int, queries: slice) -> Case:
    """One sequence of a batch alone, with some of its queries, each at its own position."""
    start, length = int(case.query_starts[b]), case.query_lens[b]
    first, stop, _ = queries.indices(length)
    context = int(case.context_lens[b]) - length + stop
    device = case.q.device
    starts, lens = int32([0, stop - first], device), int32([context], device)
    q, table = case.q[start + first : start + stop], case.page_table[b : b + 1]
    return Case(q, case.k_pages, case.v_pages, table, starts, lens, case.keys[b : b + 1], case.values[b : b + 1])


def _attend(case: Case, pages: tuple[KVPages, KVPages], **options: object) -> Tensor:
    return paged_attention.launch(case.q, *pages, *case.args[3:], **case.options, **options, invariant=True)


@pytest.mark.kernel
@pytest.mark.parametrize("window", [None, 18])
def test_attention_is_the_same_in_any_batch_and_chunk(window, device):
    case = make_case([1, 19, 5], [70, 40, 33], device, dtype=torch.float16)
    pages = KVPages.plain(case.k_pages), KVPages.plain(case.v_pages)
    whole = _attend(case, pages, window=window)
    assert_close(whole, paged_attention.reference(*case.args, **case.options, window=window))
    for b, chunks in ((0, [0, 1]), (1, [0, 1, 13, 19]), (2, [0, 5])):
        start = int(case.query_starts[b])
        for first, stop in pairwise(chunks):
            part = _attend(_sequence(case, b, slice(first, stop)), pages, window=window)
            assert torch.equal(part, whole[start + first : start + stop]), (b, first, stop)


@pytest.mark.kernel
def test_attention_over_codes_is_the_same_in_any_batch(device):
    # Pages of 64, so that the tile that is best for one query is not the best for nine.
    case = make_case([1, 9], [40, 21], device, page_size=64)
    case = replace(case, q=case.q.half())
    pages = coded(case.k_pages, CODECS["q8"]), coded(case.v_pages, CODECS["q4"])
    whole = _attend(case, pages)
    for b in (0, 1):
        start, length = int(case.query_starts[b]), case.query_lens[b]
        assert torch.equal(_attend(_sequence(case, b, slice(0, length)), pages), whole[start : start + length])


def test_invariance_leaves_nothing_to_choose(device):
    case = make_case([1], [5], device)
    with pytest.raises(ValueError, match="in one run, got splits=2"):
        paged_attention(*case.args, **case.options, splits=2, invariant=True)
