"""Tensors of more than 2^31 elements: what lies behind that line is found and written like the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qinfer.kernels.attention import paged_attention
from qinfer.kernels.dequant import dequantize
from qinfer.kernels.gather import gather_rows
from qinfer.kernels.kv_codec import KVPages
from qinfer.kernels.kv_write import kv_write
from qinfer.kernels.matmul import matmul
from qinfer.kernels.operand import PlaneOperand
from tests.compare import assert_close
from tests.kernels.operands import plane_operand

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

BEYOND = 2**31 + 2**24  # elements
K, LAST = 32_768, 96  # features, and outputs behind the line that are looked at


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    """Give back what earlier tests hold: each test here takes gigabytes."""
    torch.cuda.empty_cache()


def large_operand(n: int, device: torch.device) -> tuple[PlaneOperand, PlaneOperand]:
    """Return a matrix of 4 bits with equal outputs but for the last ones, and the matrix of these alone."""
    last = plane_operand(K, LAST, device=device)
    (plane,) = last.planes
    planes = torch.full((plane.shape[0], n, *plane.shape[2:]), 0x7777, dtype=plane.dtype, device=device)
    scales = torch.ones(last.scales.shape[0], n, dtype=last.scales.dtype, device=device)
    planes[:, -LAST:], scales[:, -LAST:] = plane, last.scales
    whole = PlaneOperand((planes,), scales, None, bits=4, group_size=last.group_size, in_features=K)
    return whole, last


@pytest.mark.parametrize("m", [1, 16])
def test_matmul_reads_all_planes(device: torch.device, m: int) -> None:
    # Four codes to a word, so that the words are as many as the line says.
    operand, last = large_operand(4 * BEYOND // K, device)
    assert operand.planes[0].numel() >= BEYOND - K
    x = torch.randn(m, K, dtype=torch.float16, device=device)
    actual = matmul.launch(x, operand, out_dtype=torch.float32)
    assert_close(actual[:, -LAST:], matmul.reference(x, last, out_dtype=torch.float32), torch.float16)


def test_dequantize_writes_all_rows(device: torch.device) -> None:
    operand, last = large_operand(BEYOND // K, device)
    weight = dequantize.launch(operand.planes[0], operand, dtype=torch.float16)
    assert weight.numel() >= BEYOND - K
    assert torch.equal(weight[-LAST:], dequantize.reference(last.planes[0], last, dtype=torch.float16))


def test_gather_reads_the_last_rows(device: torch.device) -> None:
    table = torch.zeros(BEYOND // K, K, dtype=torch.float16, device=device)
    table[-2:] = torch.randn(2, K, dtype=torch.float16, device=device)
    ids = torch.tensor([len(table) - 1, 0, len(table) - 2], dtype=torch.int32, device=device)
    assert torch.equal(gather_rows.launch(table, ids), table[ids.long()])


def large_pages(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return pages for K and V of 4 heads, 256 tokens and 128 features, all zero."""
    shape = (BEYOND // (4 * 256 * 128), 4, 256, 128)
    return torch.zeros(shape, dtype=torch.float16, device=device), torch.zeros(
        shape, dtype=torch.float16, device=device
    )


def test_pages_are_written_and_read_behind_the_line(device: torch.device) -> None:
    k_pages, v_pages = large_pages(device)
    num_tokens, last = 40, len(k_pages) - 1
    k, v = (torch.randn(num_tokens, 4, 128, dtype=torch.float16, device=device) for _ in "kv")
    slots = last * 256 + torch.arange(num_tokens, dtype=torch.int32, device=device)
    pages = KVPages.plain(k_pages), KVPages.plain(v_pages)
    kv_write.launch(k, v, *pages, slots)
    assert torch.equal(k_pages[last, :, :num_tokens], k.transpose(0, 1))
    assert torch.equal(v_pages[last, :, :num_tokens], v.transpose(0, 1))
    assert not k_pages[:-1].any()

    q = torch.randn(1, 8, 128, dtype=torch.float16, device=device)
    starts, lens = (torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, 1], [num_tokens]))
    options = {"max_query_len": 1, "scale": 128**-0.5}
    table = torch.tensor([[last]], dtype=torch.int32, device=device)
    few = KVPages.plain(k_pages[-1:].clone()), KVPages.plain(v_pages[-1:].clone())
    expected = paged_attention.reference(q, *few, torch.zeros_like(table), starts, lens, **options)
    assert_close(paged_attention.launch(q, *pages, table, starts, lens, **options), expected, torch.float16)
