"""The cache functions of `qinfer.compat.exllamav2_ext` against shared vectors, and laws of ranges and pages."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qinfer.compat import exllamav2_ext as ext
from tests.compat.vectors import EVERYWHERE, NOTHING, VECTORS, vectors
from tests.strategies import random_tensor, seeds

FEW = settings(max_examples=15)


def caches(shape: tuple[int, ...], wbits: int, seed: int = 0, where: str = "cpu") -> list[Tensor]:
    """Keys in fp16, their codes and scales, then the same of values; codes and scales hold what nothing encodes to."""
    *places, dim = shape
    tensors = []
    for i, bits in enumerate({4: (4, 4), 6: (8, 4), 8: (8, 8)}[wbits]):
        tensors.append(random_tensor(*shape, seed=seed + i, dtype=torch.float16))
        tensors.append(torch.full((*places, dim * bits // 8), 77, dtype=torch.uint8))
        tensors.append(torch.full((*places, dim // 32), -1.0, dtype=torch.float16))
    return [tensor.to(where) for tensor in tensors]


def changed(tensor: Tensor, fill: float) -> list[int]:
    """The tokens of a [B, S, ...] tensor that no longer hold the fill."""
    return (tensor.flatten(2) != fill).any(dim=2).flatten().nonzero().flatten().tolist()


@EVERYWHERE
def test_fp16_to_fp8(where: str) -> None:
    golden = vectors("kv_cache_quant", where)
    x = golden["x"].view(1, 8, 2, 128)
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=where)
    ext.fp16_to_fp8(x, codes, 1, 2, 5)
    assert torch.equal(codes[:, 2:7], golden["fp8_bytes"].view(x.shape)[:, 2:7])
    assert changed(codes, 0) == [2, 3, 4, 5, 6]


@EVERYWHERE
def test_fp8_to_fp16(where: str) -> None:
    golden = vectors("kv_cache_quant", where)
    codes = golden["fp8_bytes"].view(2, 4, 2, 128)
    x = torch.full(codes.shape, 9.0, dtype=torch.float16, device=where)
    ext.fp8_to_fp16(codes, x, 1, 0, 4)
    assert torch.equal(x[0], golden["fp8_back"].view(x.shape)[0])
    assert (x[1] == 9).all()


@EVERYWHERE
@pytest.mark.parametrize("wbits", [4, 6, 8])
def test_fp16_to_q_kv(wbits: int, where: str) -> None:
    golden = vectors("kv_cache_quant", where)
    k, k_codes, k_scales, v, v_codes, v_scales = caches((1, 8, 2, 128), wbits, where=where)
    k.copy_(golden["x"].view(k.shape))
    v.copy_(golden["x"].view(v.shape))
    ext.fp16_to_q_kv(k, k_codes, k_scales, v, v_codes, v_scales, 1, 0, 8, 0, NOTHING, NOTHING, wbits)
    for name, codes, scales in (
        ("q4" if wbits == 4 else "q8", k_codes, k_scales),
        ("q8" if wbits == 8 else "q4", v_codes, v_scales),
    ):
        assert torch.equal(codes.flatten(), golden[f"{name}_bytes"])
        assert torch.equal(scales.flatten(), golden[f"{name}_scales"])


@EVERYWHERE
@pytest.mark.parametrize("wbits", [4, 6, 8])
def test_q_to_fp16_kv(wbits: int, where: str) -> None:
    golden = vectors("kv_cache_quant", where)
    names = ("q4" if wbits == 4 else "q8", "q8" if wbits == 8 else "q4")
    k, k_codes, k_scales, v, v_codes, v_scales = caches((2, 4, 2, 128), wbits, where=where)
    for name, codes, scales in zip(names, (k_codes, v_codes), (k_scales, v_scales), strict=True):
        codes.copy_(golden[f"{name}_bytes"].view(codes.shape))
        scales.copy_(golden[f"{name}_scales"].view(scales.shape))
    ext.q_to_fp16_kv(k_codes, k, k_scales, v_codes, v, v_scales, 2, 0, 4, 0, None, None, wbits)
    for name, x in zip(names, (k, v), strict=True):
        assert torch.equal(x.flatten(), golden[f"{name}_dequant"])


@FEW
@given(seed=seeds, offset=st.integers(0, 12), width=st.integers(0, 4), dim=st.sampled_from([64, 128, 512]))
def test_a_range_is_widened_to_whole_units(seed: int, offset: int, width: int, dim: int) -> None:
    cache = caches((2, 16, dim // 32, 32), 4, seed)
    ext.fp16_to_q_kv(*cache, 1, offset, width, 0, None, None, 4)
    per_unit = 512 // dim
    first, last = offset // per_unit * per_unit, -(-(offset + width) // per_unit) * per_unit
    assert changed(cache[1], 77) == (list(range(first, last)) if width else [])


@FEW
@given(data=st.data(), seed=seeds, wbits=st.sampled_from([4, 6, 8]), q_len=st.integers(1, 7))
def test_pages_hold_what_contiguous_rows_hold(data: st.DataObject, seed: int, wbits: int, q_len: int) -> None:
    page, num_pages = 4, 3
    past = data.draw(st.integers(0, num_pages * page - q_len))
    table = data.draw(st.permutations(range(5)))[:num_pages]
    whole = caches((1, num_pages * page, 4, 128), wbits, seed)
    paged = caches((1, 5 * page, 4, 128), wbits, seed + 9)
    index = torch.tensor([table[t // page] * page + t % page for t in range(num_pages * page)])
    for one, other in zip(whole, paged, strict=True):
        other[:, index] = one
    lens, tables = torch.tensor([past], dtype=torch.int32), torch.tensor([table], dtype=torch.int32)
    ext.fp16_to_q_kv(*paged, 9, 9, q_len, page, lens, tables, wbits)
    ext.fp16_to_q_kv(*whole, 1, past, q_len, 0, None, None, wbits)
    assert all(torch.equal(one, other[:, index]) for one, other in zip(whole, paged, strict=True))
    assert changed(paged[1], 77) == sorted(index[past : past + q_len].tolist())
    back = [[codes, x.zero_(), scales] for x, codes, scales in (paged[:3], paged[3:])]
    lens += q_len
    # Codes that nobody wrote decode to something; only tokens of the sequence do.
    ext.q_to_fp16_kv(*back[0], *back[1], 0, 0, 0, page, lens, tables, wbits)
    assert changed(paged[0], 0) == sorted(index[: past + q_len].tolist())


def test_a_sequence_of_no_tokens_is_skipped() -> None:
    cache = caches((1, 8, 4, 128), 8)
    x, codes, scales, y, more_codes, more_scales = cache
    before = x.clone()
    tables = torch.tensor([[-7, 99]], dtype=torch.int32)
    lens = torch.zeros(1, dtype=torch.int32)
    ext.q_to_fp16_kv(codes, x, scales, more_codes, y, more_scales, 1, 0, 0, 4, lens, tables, 8)
    assert torch.equal(x, before)


@EVERYWHERE
def test_cache_rotate(where: str) -> None:
    golden = json.loads((VECTORS / "cache_rotate.json").read_text())
    cache = torch.tensor(golden["pages"], dtype=torch.float16, device=where)[:, None, None].repeat(1, 4, 8)
    order = torch.tensor(golden["order"], dtype=torch.int32, device=where)
    ext.cache_rotate(cache, order, torch.zeros(4, 8, dtype=torch.float16, device=where))
    assert cache[:, 0, 0].tolist() == golden["result"]
    assert (cache == cache[:, :1, :1]).all()


@FEW
@given(row=st.lists(st.integers(0, 3), max_size=6), other=st.lists(st.integers(0, 3), max_size=6), data=st.data())
def test_count_match(row: list[int], other: list[int], data: st.DataObject) -> None:
    max_a = data.draw(st.integers(0, len(row)))
    expected = 0
    while expected < min(max_a, len(other)) and row[expected] == other[expected]:
        expected += 1
    a, b = (torch.tensor([x], dtype=torch.int64) for x in (row, other))
    assert ext.count_match(a, b, max_a) == expected


def test_mistakes_are_runtime_errors() -> None:
    cache = caches((1, 8, 4, 128), 4)
    lens, table = torch.tensor([4], dtype=torch.int32), torch.tensor([[0, 9]], dtype=torch.int32)
    for arguments, message in (
        ((1, 0, 9, 0, None, None, 4), r"tokens must be in \[0, 8\), got offset 0 and width 9"),
        ((2, 0, 1, 0, None, None, 4), "batch_size must be from 0 to 1, got 2"),
        ((1, 0, 1, 0, None, None, 5), "wbits must be 4, 6 or 8, got 5"),
        ((1, 0, 1, 0, None, None, 8), "codes of keys must be"),
        ((1, 0, 1, 4, NOTHING, table, 4), "must be given with a page size"),
        ((1, 0, 1, 4, lens, table, 4), "pages below 2, got .9"),
        ((1, 0, 1, 3, lens, table, 4), "page_size must divide 8 tokens"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ext.fp16_to_q_kv(*cache, *arguments)
    with pytest.raises(RuntimeError, match="max_a must be from 0 to 2, got 3"):
        ext.count_match(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64), 3)
    pages = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="temp must hold a page of 16 bytes, got 12"):
        ext.cache_rotate(pages, torch.tensor([0, 1], dtype=torch.int32), torch.zeros(3))
    with pytest.raises(RuntimeError, match="pages below 3, got 3"):
        ext.cache_rotate(pages, torch.tensor([3], dtype=torch.int32), torch.zeros(4))
